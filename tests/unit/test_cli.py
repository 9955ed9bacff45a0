"""The command line: options, errors in one line, colours, process bookkeeping."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from rich.progress import Progress
from typer.testing import CliRunner

from actors.target_worker.messages import GenerationChunk, GenerationRequest
from cluster.cli.common import err, fail
from cluster.cli.generate import accepted_marks, colored, summary
from cluster.cli.local_cluster import (
    LocalCluster,
    StartupError,
    StopSignal,
    check_gpus,
    cpus_needed,
    gpus_needed,
    port_problem,
)
from cluster.cli.main import app
from cluster.cli.serve import banner, phase, read_config, urls
from cluster.cli.status import tables
from cluster.config import ClusterConfig, GatewayConfig
from cluster.processes import descendants, end_processes, names_of
from protos.s2d.v1 import generation_pb2 as pb
from tests.unit.fake_target import MODEL, FakeTarget, gateway, refuse

runner = CliRunner()
ROOT = Path(__file__).resolve().parents[2]
IN_A_PIPE = """
import signal

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background

from cluster.cli.main import app

app()
"""
IN_A_TERMINAL = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n" + IN_A_PIPE


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_help_lists_the_commands() -> None:
    text = runner.invoke(app, ["--help"]).output
    assert all(name in text for name in ("serve", "generate", "chat", "status", "models"))


def test_version() -> None:
    result = runner.invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"s2d-serve {version('s2d-serve')}\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "hi", "--address", "127.0.0.1:{port}"],
        ["status", "--url", "http://127.0.0.1:{port}"],
        ["models", "--url", "http://127.0.0.1:{port}"],
    ],
)
def test_no_server_is_one_line(arguments: list[str]) -> None:
    port = free_port()
    result = runner.invoke(app, [a.format(port=port) for a in arguments])
    assert result.exit_code == 1
    assert "no server at" in result.output
    assert f":{port}" in result.output.replace("\n", "")
    assert "Traceback" not in result.output


def test_port_in_use_is_said_before_ray_starts() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        began = time.monotonic()
        result = runner.invoke(app, ["serve", "--port", str(port), "--grpc-port", str(free_port())])
        assert result.exit_code == 1
        assert f"cannot listen on 127.0.0.1:{port}" in result.output.replace("\n", "")
        assert time.monotonic() - began < 5
        grpc = GatewayConfig(http_port=free_port(), grpc_port=port)
        assert "--grpc-port" in (port_problem(grpc) or "")
    assert "both" in (port_problem(GatewayConfig(http_port=5000, grpc_port=5000)) or "")
    assert port_problem(GatewayConfig(http_port=free_port(), grpc_port=free_port())) is None


def test_config_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"models": [{"name": "m", "source": "x"}]}), encoding="utf-8")
    config = read_config(path, "float32", host="0.0.0.0", http_port=1234, grpc_port=None)
    assert config.models[0].dtype == "float32"
    assert (config.gateway.http_port, config.gateway.grpc_port) == (1234, 9000)
    assert urls(config.gateway) == ("http://127.0.0.1:1234", "127.0.0.1:9000")
    assert read_config(None, None).models[0].name == "SmolLM2-135M-Instruct"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models: [", "not valid YAML"),
        ("modles: 1", "models"),
        (None, "No such file"),
    ],
)
def test_bad_config_is_one_line(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "c.yaml"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    result = runner.invoke(app, ["serve", "-c", str(path)])
    assert result.exit_code == 1
    assert said in result.output
    assert "Traceback" not in result.output


def test_bad_dtype() -> None:
    result = runner.invoke(app, ["serve", "--dtype", "int3"])
    assert (result.exit_code, "dtype" in result.output) == (1, True)


NO_MARKUP = "[/b] pip install 's2d-serve[train]' [bold]x[/] :key: [/"


def test_an_error_is_printed_as_it_is() -> None:
    with err.capture() as printed:
        fail(NO_MARKUP)
    assert printed.get() == f"error: {NO_MARKUP}\n"


def test_why_a_start_failed_is_printed_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: LocalCluster, phase: object) -> None:
        raise StartupError(NO_MARKUP)

    monkeypatch.setattr(LocalCluster, "start", start)
    result = runner.invoke(app, ["serve", "--port", str(free_port()), "--grpc-port", str(free_port())])
    assert result.exit_code == 1
    assert f"error: {NO_MARKUP}\n" in result.output


def test_phases_are_printed_as_they_are() -> None:
    with err.capture() as printed, Progress(console=err, disable=True) as progress:
        with phase(progress, NO_MARKUP):
            pass
        rendered = progress.make_tasks_table(progress.tasks)
        err.print(rendered)
    first, table = printed.get().split("\n", 1)
    assert first.startswith(f"✓ {NO_MARKUP} (")
    assert "s2d-serve[train]" in table


def test_names_are_shown_as_they_are() -> None:
    model: dict[str, Any] = {"name": "m[/b]", "ready": False, "error": "e[/b]"}
    replica: dict[str, Any] = {"replica_id": "r[/b]", "engine": {"drafters": {}}}
    replica["engine"]["drafters"]["x"] = {"rounds": 1, "drafted": 1, "accepted": 1}
    worker = {"id": "w[/b]", "address": "a[/b]", "error": "f[/b]"}
    state = {"models": [model | {"replicas": r} for r in ([], [replica])], "draft_workers": [worker]}
    with err.capture() as printed:
        for table in tables(state):
            err.print(table)
        err.print(banner(ClusterConfig.model_validate({"models": [{"name": "n[/b]", "source": "x"}]})))
    for letter in "merwafn":
        assert f"{letter}[/b]" in printed.get()


def test_a_refusal_is_printed_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"error": {"message": NO_MARKUP, "param": "x"}}
    answer = httpx.Response(400, json=body)
    monkeypatch.setattr(httpx, "request", lambda *args, **options: answer)
    result = runner.invoke(app, ["models", "unload", "m"])
    assert result.exit_code == 1
    assert f"error: {NO_MARKUP}\n" in result.output


def test_banner_without_models_says_how_to_load_some() -> None:
    assert "s2d models load" in banner(ClusterConfig(models=()))


def test_banner_can_be_pasted() -> None:
    text = banner(ClusterConfig.default()).replace("\\[", "[")
    assert "curl -N http://127.0.0.1:8000/v1/chat/completions" in text
    assert "s2d generate 'Why is the sky blue?' --color" in text
    assert "127.0.0.1:9000 s2d.v1.GenerationService/Chat" in text


def chunk() -> pb.GenerateChunk:
    def logprob(text: str) -> pb.PositionLogprobs:
        return pb.PositionLogprobs(chosen=pb.TokenLogprob(token=text))

    return pb.GenerateChunk(
        text="abcd", token_ids=[1, 2, 3, 4], tokens_per_round=[3, 1], accepted_per_round=[2, 0],
        logprobs=[logprob(t) for t in "abcd"],
    )  # fmt: skip


def test_colouring_marks_accepted_tokens() -> None:
    assert list(accepted_marks(chunk())) == [True, True, False, False]
    text = colored(chunk())
    assert text.plain == "abcd"
    assert [(s.start, s.end, s.style) for s in text.spans] == [
        (0, 1, "green"), (1, 2, "green"), (2, 3, "yellow"), (3, 4, "yellow"),
    ]  # fmt: skip
    assert colored(pb.GenerateChunk(text="x", token_ids=[1])).plain == "x"


def of_tokens(text: str, *tokens: str) -> pb.GenerateChunk:
    """A chunk of one round whose tokens, each decoded alone, are `tokens`; the last is no accepted draft."""
    logprobs = [pb.PositionLogprobs(chosen=pb.TokenLogprob(token=token)) for token in tokens]
    return pb.GenerateChunk(
        text=text, token_ids=range(len(tokens)), logprobs=logprobs,
        tokens_per_round=[len(tokens)], accepted_per_round=[len(tokens) - 1],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("chunk", "styled"),
    [
        (of_tokens("Hi", "Hi", "<|im_end|>"), ["Hi"]),
        (of_tokens("a😀!b", "a", "\ufffd", "\ufffd", "!", "b"), ["a", "!", "b"]),
        (of_tokens("one", "one", " stop"), ["one"]),  # the stop string is not part of the text
        (of_tokens(" STOx", "x"), ["x"]),  # what was held back belongs to tokens of an earlier chunk
        (of_tokens("", "�"), []),
        (of_tokens("", "", "<|im_end|>"), []),
    ],
)
def test_colouring_changes_no_text(chunk: pb.GenerateChunk, styled: list[str]) -> None:
    text = colored(chunk)
    assert text.plain == chunk.text
    assert [text.plain[s.start : s.end] for s in text.spans] == styled


def test_summary() -> None:
    last = pb.GenerateChunk(finish_reason="stop")
    last.usage.completion_tokens = 10
    last.speculation.num_draft_tokens = 8
    last.speculation.num_accepted_draft_tokens = 6
    last.speculation.mean_acceptance_length = 2.5
    said = "10 tokens in 2.0 s (5/s) · stop · accepted 6 of 8 drafts, 2.50 tokens a step"
    assert summary(last, 2.0) == said


def test_status_tables() -> None:
    drafters = {"x": {"rounds": 1, "drafted": 4, "accepted": 3}}
    replica = {"replica_id": "r", "engine": {"running": 1, "drafters": drafters}}
    worker = {"id": "d", "address": "a", "error": None, "sessions": 1, "streams": 1, "queued_rounds": 0,
              "kv_blocks_used": 0, "drafters": ["x"], "ahead_foreseen": 3, "ahead_partly": 1,
              "ahead_missed": 4}  # fmt: skip
    down = {"id": "e", "address": "b", "error": "UNAVAILABLE"}
    models = [
        {"name": "m", "ready": True, "replicas": [replica]},
        {"name": "n", "ready": False, "replicas": []},
    ]
    targets, speculation, drafts = tables({"models": models, "draft_workers": [worker, down]})
    assert (targets.row_count, speculation.row_count, drafts.row_count) == (2, 1, 2)
    assert next(iter(drafts.columns[-1].cells)) == "0.38 + 0.12"


@pytest.fixture
def grpc_server() -> Iterator[tuple[str, FakeTarget]]:
    """A gRPC server on a thread of its own: the commands run their own event loop."""
    import threading

    from tests.unit.test_gateway_grpc import serving

    target = FakeTarget()
    loop = asyncio.new_event_loop()
    address: list[str] = []
    stop, ready = asyncio.Event(), threading.Event()

    async def main() -> None:
        async with serving(gateway(target)) as client:
            address.append(client.address)
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(main(),), daemon=True)
    thread.start()
    assert ready.wait(10)
    yield address[0], target
    loop.call_soon_threadsafe(stop.set)
    thread.join(10)
    loop.close()


def test_generate_streams(grpc_server: tuple[str, FakeTarget]) -> None:
    address, target = grpc_server
    result = runner.invoke(app, ["generate", "hi", "-a", address, "--system", "be", "--draft-tokens", "3"])
    assert result.exit_code == 0, result.output
    assert "abcd" in result.output
    assert target.requests[0].messages is not None
    assert [m.role for m in target.requests[0].messages] == ["system", "user"]
    speculation = target.requests[0].speculation
    assert (speculation.max_draft_tokens, speculation.force) == (3, True)
    result = runner.invoke(app, ["generate", "[b]", "-a", address, "--raw", "--color", "--no-speculation",
                                 "-m", MODEL, "--stop", "x", "--stop", "y"])  # fmt: skip
    assert (result.exit_code, "abcd" in result.output) == (0, True)
    assert (target.requests[1].prompt_text, target.requests[1].stop) == ("[b]", ("x", "y"))
    assert target.requests[1].speculation.enabled is False
    result = runner.invoke(app, ["generate", "x", "-a", address, "--top-p", "7"])
    assert (result.exit_code, "top_p" in result.output) == (1, True)


def test_chat_keeps_the_conversation(grpc_server: tuple[str, FakeTarget]) -> None:
    address, target = grpc_server
    result = runner.invoke(app, ["chat", "-a", address], input="one\ntwo\n/reset\nthree\n/quit\n")
    assert result.exit_code == 0, result.output
    conversations = [[m.content for m in r.messages or ()] for r in target.requests]
    assert conversations == [["one"], ["one", "abcd", "two"], ["three"]]


def test_a_failed_answer_does_not_end_the_chat(grpc_server: tuple[str, FakeTarget]) -> None:
    address, target = grpc_server

    def script(request: GenerationRequest) -> list[GenerationChunk]:
        target.script = None
        begun = [GenerationChunk(text="half", token_ids=(1,), seed=1)] if len(target.requests) == 3 else []
        answer = begun + refuse("overloaded", "full [/b]")(request) if len(target.requests) > 1 else None
        chunks = target.chunks(request) if answer is None else answer
        target.script = script
        return chunks

    target.script = script
    result = runner.invoke(app, ["chat", "-a", address], input="one\ntwo\nthree\n")
    assert result.exit_code == 0, result.output
    assert result.output.count("error: full [/b]\n") == 2
    assert "half\nerror:" in result.output
    conversations = [[m.content for m in r.messages or ()] for r in target.requests]
    assert conversations == [["one"], ["one", "abcd", "two"], ["one", "abcd", "three"]]


def test_a_chat_in_which_nothing_was_answered_fails(grpc_server: tuple[str, FakeTarget]) -> None:
    address, target = grpc_server
    target.script = refuse("overloaded", "full")
    assert runner.invoke(app, ["chat", "-a", address], input="one\n").exit_code == 1
    assert runner.invoke(app, ["chat", "-a", address], input="").exit_code == 0


def test_a_chat_ends_where_no_server_answers() -> None:
    address = f"127.0.0.1:{free_port()}"
    result = runner.invoke(app, ["chat", "-a", address, "-m", "m"], input="one\ntwo\n")
    assert result.exit_code == 1
    assert result.output.replace("\n", "").count("no server at") == 1


class Screen:
    """What a program writes to a descriptor, read as far as somebody waited for it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._ahead = b""

    def wait_for(self, wanted: bytes) -> None:
        while wanted not in self._ahead:
            ready, _, _ = select.select([self._descriptor], [], [], 60.0)
            more = os.read(self._descriptor, 4096) if ready else b""
            assert more, self._ahead
            self._ahead += more
        self._ahead = self._ahead.split(wanted, 1)[1]


def test_ctrl_c_at_the_prompt_leaves_the_chat(grpc_server: tuple[str, FakeTarget]) -> None:
    address, _ = grpc_server
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", IN_A_TERMINAL, "chat", "-a", address],
        cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
    )  # fmt: skip
    try:
        os.close(theirs)
        screen = Screen(ours)
        screen.wait_for(b"> ")
        os.write(ours, b"hello\n")
        screen.wait_for(b"abcd")
        screen.wait_for(b"> ")
        os.write(ours, b"\x03")
        assert process.wait(10) == 130
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_a_signal_leaves_a_chat_that_waits_for_a_pipe(grpc_server: tuple[str, FakeTarget]) -> None:
    address, _ = grpc_server
    with subprocess.Popen(
        [sys.executable, "-c", IN_A_PIPE, "chat", "-a", address],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(b"hello\n")
            process.stdin.flush()
            Screen(process.stdout.fileno()).wait_for(b"abcd\n> ")
            time.sleep(0.5)  # until the thread is in the read that follows
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == 130
            assert process.stderr is not None
            assert b"Fatal" not in process.stderr.read()
        finally:
            process.kill()


def test_cpus_needed() -> None:
    assert cpus_needed(ClusterConfig.default()) == pytest.approx(1.7)


def test_gpus_needed() -> None:
    assert gpus_needed(ClusterConfig.default()) == 0
    models = [
        {"name": "a", "source": "x", "num_gpus": 0.5, "replicas": 3},
        {"name": "b", "source": "x", "num_gpus": 1, "autoscaling": {"min_replicas": 0, "max_replicas": 9}},
        {
            "name": "c", "source": "x", "num_gpus": 2,
            "autoscaling": {"min_replicas": 1, "initial_replicas": 2, "max_replicas": 9},
        },
    ]  # fmt: skip
    pool = {"num_gpus": 1, "autoscaling": {"min_replicas": 2, "max_replicas": 9}}
    config = ClusterConfig.model_validate({"models": models, "draft_pool": pool})
    assert gpus_needed(config) == 1.5 + 0 + 4 + 2
    check_gpus(config, 7.5)
    with pytest.raises(StartupError, match=r"need 7\.5 GPUs, this machine has 4"):
        check_gpus(config, 4.0)


def test_gpus_that_are_not_there_are_said_before_serve_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []
    for name in ("RAY_ENVIRONMENT", "CROWDED_ENVIRONMENT"):
        monkeypatch.setattr(f"cluster.cli.local_cluster.{name}", {})  # other tests run in this process
    monkeypatch.setattr("ray.init", lambda **options: None)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr("ray.serve.start", lambda **options: started.append(options))
    config = ClusterConfig.model_validate({"models": [{"name": "m", "source": "x", "num_gpus": 1}]})
    stop = StopSignal()
    try:
        with pytest.raises(StartupError, match="models and draft workers need 1 GPUs, this machine has 0"):
            LocalCluster(config, stop).start(lambda name: contextlib.nullcontext())
    finally:
        stop.restore()
    assert started == []


def test_stop_signal() -> None:
    stop = StopSignal()
    before = signal.getsignal(signal.SIGTERM)
    stop.install()
    try:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(5)
        assert not stop.urgent
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.urgent
    finally:
        stop.restore()
    assert signal.getsignal(signal.SIGTERM) is before


def test_processes_are_ended_and_only_ours() -> None:
    code = "import subprocess,sys,time; subprocess.Popen(['sleep','60']); time.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-c", code])
    other = subprocess.Popen(["sleep", "60"])
    try:
        deadline = time.monotonic() + 10
        while "sleep" not in names_of(descendants(parent.pid)) and time.monotonic() < deadline:
            time.sleep(0.05)
        ours = descendants(os.getpid())
        assert {parent.pid, other.pid} <= ours.keys()
        below = descendants(parent.pid)
        assert len(below) == 1
        end_processes({pid: start + 1 for pid, start in below.items()}, 0.1)  # another process of that pid
        assert names_of(below) == {"sleep"}
        end_processes(below, 0.1)
        deadline = time.monotonic() + 10
        while names_of(below) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert names_of(below) == set()
    finally:
        for process in (parent, other):
            process.kill()
            process.wait(10)
