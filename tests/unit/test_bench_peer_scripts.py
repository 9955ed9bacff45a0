"""What runs in the peers' environments and needs no peer to be tested: llama.cpp's scheduler, GGUF files."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import cluster.bench.peers
from actors.models.source import ResolvedSource, resolve_source
from actors.models.threads import cpus_of_cores, physical_cores
from cluster.bench.engines import peers
from cluster.bench.engines.interface import EngineUnavailableError
from cluster.bench.engines.peers import PEERS, PeerOptions
from cluster.bench.peers.environments import ENVIRONMENTS, MARKER, python_of
from cluster.bench.peers.first_layers import first_layers, num_layers
from cluster.bench.peers.gguf_files import gguf_file, write_dequantised
from tests.toy_tokenizers import byte_level_folder

END = 0
VOCABULARY = 50


@pytest.fixture
def scheduler_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(cluster.bench.peers.__file__).parent))
    return importlib.import_module("llama_cpp_scheduler")


def next_token(context: list[int]) -> int:
    """A model that looks at everything before, repeats itself, and seldom ends."""
    return (sum(context[-3:]) * 7 + 3 * len(context) // 40) % VOCABULARY


class FakeLibrary:
    """Keeps what was decoded for every slot and refuses a gap or an overwritten position."""

    def __init__(self, batch_tokens: int) -> None:
        self.batch_tokens = batch_tokens
        self.slots: dict[int, list[int]] = {}
        self.sizes: list[int] = []

    def decode(self, entries: list[tuple[int, int, int, bool]]) -> np.ndarray:
        assert 0 < len(entries) <= self.batch_tokens
        self.sizes.append(len(entries))
        best = []
        for token, position, slot, wanted in entries:
            context = self.slots.setdefault(slot, [])
            assert position == len(context), "the cache holds other tokens than the scheduler thinks"
            context.append(token)
            if wanted:
                best.append(next_token(context))
        return np.array(best, np.int64)

    def truncate(self, slot: int, length: int) -> bool:
        del self.slots.setdefault(slot, [])[length:]
        return True

    def clear(self) -> None:
        self.slots.clear()

    def ends(self, token: int) -> bool:
        return token == END


class Recorder:
    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []

    def send(self, *messages: dict[str, Any]) -> None:
        self.messages += messages

    def error(self, request_id: str, message: str) -> None:
        self.send({"event": "error", "id": request_id, "message": message})

    def tokens(self, request_id: str) -> list[int]:
        steps = [m["token_ids"] for m in self.messages if m["id"] == request_id and m["event"] == "tokens"]
        return [token for step in steps for token in step]

    def end(self, request_id: str) -> dict[str, Any]:
        [message] = [m for m in self.messages if m["id"] == request_id and m["event"] in ("done", "error")]
        return message


def expected(prompt: list[int], max_tokens: int, ignore_eos: bool) -> list[int]:
    context = list(prompt)
    while len(context) < len(prompt) + max_tokens:
        context.append(next_token(context))
        if context[-1] == END and not ignore_eos:
            break
    return context[len(prompt) :]


def generate(name: str, prompt: list[int], max_tokens: int, ignore_eos: bool) -> dict[str, Any]:
    settings = {"max_tokens": max_tokens, "ignore_eos": ignore_eos, "temperature": 0.0, "seed": 0}
    return {"op": "generate", "id": name, "prompt_ids": prompt, **settings}


def lookup(ids: np.ndarray) -> np.ndarray:
    """Guesses of changing length, some right, some wrong."""
    context = ids.tolist()
    guesses = []
    for offset in range(len(context) % 4):
        right = next_token(context)
        guesses.append(right if (len(context) + offset) % 3 else (right + 1) % VOCABULARY)
        context.append(right)
    return np.array(guesses, np.intc)


@pytest.mark.parametrize("draft", [None, lookup], ids=["plain", "lookup"])
@pytest.mark.parametrize("batch_tokens", [8, 64])
def test_every_request_gets_the_models_own_continuation(
    scheduler_module: ModuleType, draft: Any, batch_tokens: int
) -> None:
    library, channel = FakeLibrary(batch_tokens), Recorder()
    scheduler = scheduler_module.Scheduler(library, channel, 3, 200, draft)
    rng = np.random.default_rng(0)
    wanted: dict[str, tuple[list[int], int, bool]] = {}
    for index in range(12):
        prompt = [int(t) for t in rng.integers(1, VOCABULARY, rng.integers(1, 40))]
        wanted[str(index)] = (prompt, int(rng.integers(1, 60)), bool(index % 2))
    for name, settings in wanted.items():
        scheduler.handle(generate(name, *settings))
    for _ in range(2000):
        if not scheduler.busy:
            break
        scheduler.step()
    assert not scheduler.busy
    for name, (prompt, max_tokens, ignore_eos) in wanted.items():
        tokens = channel.tokens(name)
        assert tokens == expected(prompt, max_tokens, ignore_eos)
        assert channel.end(name)["finish_reason"] == ("length" if len(tokens) == max_tokens else "stop")
        counts = channel.end(name)["speculation"]
        assert (counts is None) == (draft is None)
        if counts is not None:
            # Each round, those without drafts included, emits its accepted drafts and one token more.
            steps = [m for m in channel.messages if m["id"] == name and m["event"] == "tokens"]
            assert counts["rounds"] == len(steps)
            assert len(tokens) in (counts["accepted"] + counts["rounds"] - i for i in range(4))
            assert counts["accepted"] == sum(counts["accepted_by_position"]) <= counts["drafted"]
    if draft is not None:
        assert any(channel.end(name)["speculation"]["accepted"] > 0 for name in wanted)
    assert max(library.sizes) > 3, "requests did not share steps"


class ForgetsAll(FakeLibrary):
    """As for a recurrent model: no part can be forgotten."""

    def truncate(self, slot: int, length: int) -> bool:
        return length in (0, len(self.slots.get(slot, ()))) and super().truncate(slot, length)


@pytest.mark.parametrize(("library_class", "read"), [(FakeLibrary, 2), (ForgetsAll, 34)])
def test_a_later_turn_reads_only_what_its_slot_has_not(
    scheduler_module: ModuleType, library_class: type[FakeLibrary], read: int
) -> None:
    library, channel = library_class(64), Recorder()
    scheduler = scheduler_module.Scheduler(library, channel, 2, 200, None)

    def tokens_read(name: str, prompt: list[int]) -> int:
        """By a request that gets ten tokens: its prompt, as far as it is read, and nine of them."""
        before = sum(library.sizes)
        scheduler.handle(generate(name, prompt, 10, True))
        while scheduler.busy:
            scheduler.step()
        assert channel.tokens(name) == expected(prompt, 10, True)
        return sum(library.sizes) - before - 9

    first = list(range(1, 21))
    assert tokens_read("first", first) == 20
    # Of 33 the slot has the first 29: the last token of the answer was never read.
    second = [*first, *channel.tokens("first"), 5, 6, 7]
    assert tokens_read("another", [9, 8, 7]) == 3  # in the other slot
    assert tokens_read("second", second) == 4
    assert tokens_read("second, with another end", [*second[:-1], 30, 31]) == read
    scheduler.handle({"op": "reset", "id": "reset"})
    assert tokens_read("after the reset", second) == 33


@pytest.fixture
def vllm_host(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(cluster.bench.peers.__file__).parent))
    return importlib.import_module("vllm_host")


def vllm_counters(drafts: int, drafted: int, accepted: int, *by_position: int) -> dict[str, Any]:
    """As vLLM counts: rounds with drafts only."""
    names = ("drafts", "draft_tokens", "accepted_tokens", "accepted_tokens_per_pos")
    values = (drafts, drafted, accepted, list(by_position))
    return {f"vllm:spec_decode_num_{name}": value for name, value in zip(names, values, strict=True)}


@pytest.mark.parametrize(
    ("tokens", "rounds"),
    [
        (20, 15),  # two rounds with drafts gave 2 + 1 and 3 + 1 tokens, 13 without drafts one each
        (7, 2),  # only the two
        (6, 2),  # the second was cut by a stop
    ],
)
def test_vllms_rounds_without_drafts_count(vllm_host: ModuleType, tokens: int, rounds: int) -> None:
    before, after = vllm_counters(5, 9, 7, 5, 2), vllm_counters(7, 17, 12, 7, 4, 1)
    assert vllm_host.difference(before, after, tokens) == {
        "rounds": rounds,
        "drafted": 8,
        "accepted": 5,
        "accepted_by_position": [2, 2, 1],
    }


def test_the_first_request_of_a_vllm_has_nothing_before(vllm_host: ModuleType) -> None:
    assert vllm_host.difference({}, {}, 9)["rounds"] == 9


def test_hugging_faces_rounds_without_drafts_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(cluster.bench.peers.__file__).parent))
    host = importlib.import_module("hugging_face_host")
    channel = Recorder()
    progress = host.Progress([host.Row("r", 7, frozenset())], channel, None, True)
    progress.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for drafted, tokens in ((0, [4]), (10, [5, 6, 7]), (0, [8]), (4, [9]), (0, [10])):
        progress.drafted = drafted
        progress.put(torch.tensor([tokens]))
    assert channel.end("r")["speculation"] == {
        "rounds": 5,
        "drafted": 14,
        "accepted": 2,
        "accepted_by_position": [1, 1],
    }


def test_a_cancelled_request_frees_its_slot(scheduler_module: ModuleType) -> None:
    channel = Recorder()
    scheduler = scheduler_module.Scheduler(FakeLibrary(64), channel, 1, 1000, None)
    scheduler.handle(generate("long", [1, 2], 900, True))
    scheduler.handle(generate("next", [3, 4], 5, True))
    scheduler.step()
    scheduler.handle({"op": "cancel", "id": "long"})
    for _ in range(5):
        scheduler.step()
    assert channel.tokens("next") == expected([3, 4], 5, True)
    assert not scheduler.busy


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"max_tokens": 99}, "max_model_len 100"),
        ({"prompt_ids": []}, "at least one"),
        ({"temperature": 1.0}, "greedily"),
    ],
)
def test_what_cannot_be_served_is_refused(
    scheduler_module: ModuleType, change: dict[str, Any], reason: str
) -> None:
    channel = Recorder()
    scheduler = scheduler_module.Scheduler(FakeLibrary(64), channel, 1, 100, None)
    scheduler.handle(generate("r", [1, 2], 5, True) | change)
    assert reason in channel.end("r")["message"]
    assert not scheduler.busy


@pytest.fixture
def small_gguf(tmp_path: Path) -> Path:
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1)
    writer.add_token_list([f"t{i}" for i in range(64)])
    writer.add_token_scores([float(i) for i in range(64)])
    values = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q4_1
    writer.add_tensor("token_embd.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.add_tensor("output_norm.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(("precision", "bits"), [("bf16", 8), ("f16", 11)])
def test_dequantised_gguf_keeps_metadata_and_numbers(
    small_gguf: Path, tmp_path: Path, precision: str, bits: int
) -> None:
    write_dequantised(small_gguf, tmp_path / "out.gguf", precision)
    before, after = gguf.GGUFReader(small_gguf), gguf.GGUFReader(tmp_path / "out.gguf")
    for key in ("general.architecture", "llama.context_length", "tokenizer.ggml.tokens"):
        assert after.fields[key].contents() == before.fields[key].contents()
    assert (
        after.fields["tokenizer.ggml.scores"].contents() == before.fields["tokenizer.ggml.scores"].contents()
    )
    assert after.fields["general.file_type"].contents() != before.fields["general.file_type"].contents()
    old, new = ({t.name: t for t in reader.tensors} for reader in (before, after))
    assert new["output_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    matrix = new["token_embd.weight"]
    assert matrix.tensor_type.name.lower() == precision
    wanted = gguf.quants.dequantize(old["token_embd.weight"].data, gguf.GGMLQuantizationType.Q4_1)
    found = gguf.quants.dequantize(matrix.data, matrix.tensor_type)
    np.testing.assert_allclose(found, wanted, rtol=2.0**-bits, atol=1e-6)


def test_gguf_is_written_once_and_never_half(
    small_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("S2D_CACHE_DIR", str(tmp_path / "cache"))
    source = resolve_source(str(small_gguf))
    said: list[str] = []
    file = gguf_file(source, "bf16", Path("python"), 1, said.append)
    assert gguf_file(source, "bf16", Path("python"), 1, said.append) == file
    assert len(said) == 1
    with pytest.raises(EngineUnavailableError, match="quantising to q8_0 failed"):
        gguf_file(source, "q8_0", Path("/bin/false"), 1, said.append)
    left = sorted(path.suffixes[-1] for path in file.parent.iterdir())
    assert left == [".gguf", ".gguf"]  # bf16, and the f16 that q8_0 is made from


def test_a_folder_is_no_gguf(tmp_path: Path) -> None:
    source = ResolvedSource("folder", "folder", tmp_path, "folder", "00")
    with pytest.raises(EngineUnavailableError, match="needs a GGUF"):
        gguf_file(source, "f16", Path("python"), 1, print)


def test_every_peer_says_how_to_install_it(tmp_path: Path) -> None:
    for name, build in PEERS.items():
        engine = build(PeerOptions(environments=tmp_path))
        assert engine.name == name
    for name, environment in ENVIRONMENTS.items():
        with pytest.raises(EngineUnavailableError, match=f"s2d bench install {name} --folder"):
            python_of(name, tmp_path)
        (tmp_path / name).mkdir()
        (tmp_path / name / MARKER).write_text(environment.marker)
        assert python_of(name, tmp_path) == tmp_path / name / "bin" / "python"
        (tmp_path / name / MARKER).write_text("{}")  # other versions
        with pytest.raises(EngineUnavailableError):
            python_of(name, tmp_path)


@pytest.mark.parametrize(
    ("allowed", "threads", "binding"),
    [
        ({0, 1, 2, 3}, 0, "0,2"),
        ({2, 3}, 0, "2"),
        ({2, 3, 6}, 0, "2,6"),
        ({0, 1, 2, 3}, 1, "0"),
        ({0, 1, 2, 3}, 3, "0,1,2"),
    ],
)
def test_vllms_threads_are_on_cores_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: set[int], threads: int, binding: str
) -> None:
    """Where CPUs 0 and 1 are one core, 2 and 3 the next."""
    for cpu in range(8):
        topology = tmp_path / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "core_id").write_text(f"{cpu // 2}\n")
        (topology / "physical_package_id").write_text("0\n")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: allowed)
    monkeypatch.setattr(peers, "cpus_of_cores", lambda: cpus_of_cores(tmp_path))
    monkeypatch.setattr(peers, "physical_cores", lambda: physical_cores(tmp_path, tmp_path / "no quota"))
    monkeypatch.setattr(peers, "model_folder", lambda source, progress: source.path)
    engine = PEERS["vllm-bf16"](PeerOptions(threads=threads))
    source = ResolvedSource("folder", "folder", tmp_path, "folder", "00")
    launch = engine._plan(source, Path("python"), print)  # type: ignore[attr-defined]
    assert launch.environment["VLLM_CPU_OMP_THREADS_BIND"] == binding


async def test_a_peer_that_is_not_installed_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(EngineUnavailableError, match=r"s2d bench install llama\.cpp"):
        await PEERS["llama.cpp-bf16"](PeerOptions(environments=tmp_path)).start()


def test_the_first_layers_are_a_model_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    monkeypatch.setenv("S2D_CACHE_DIR", str(tmp_path / "cache"))
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 300}
    whole = LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **sizes)).to(torch.bfloat16)
    folder = byte_level_folder(tmp_path / "model")
    whole.save_pretrained(folder)
    assert num_layers(folder) == 3
    draft = first_layers(folder, 2, "ab" * 32)
    assert num_layers(draft) == 2
    wanted = {k: v for k, v in whole.state_dict().items() if "layers.2." not in k}
    found = AutoModelForCausalLM.from_pretrained(draft, dtype=torch.bfloat16).state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)  # not again
    assert first_layers(folder, 2, "ab" * 32) == draft
    assert list(draft.parent.iterdir()) == [draft]


def test_earlier_answers_are_forgotten_and_settings_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(cluster.bench.peers.__file__).parent))
    module = importlib.import_module("vllm_suffix_reset")

    class Cache:
        def __init__(self, max_tree_depth: int, max_cached_requests: int) -> None:
            self.max_tree_depth, self.max_cached_requests = max_tree_depth, max_cached_requests

    old = Cache(24, 10)
    worker = module.SuffixReset()
    worker.model_runner = SimpleNamespace(drafter=SimpleNamespace(suffix_cache=old))
    worker.forget_suffixes()
    new = worker.model_runner.drafter.suffix_cache
    assert new is not old
    assert (new.max_tree_depth, new.max_cached_requests) == (24, 10)
