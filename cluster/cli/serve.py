"""`s2d serve`: a whole cluster on this machine, from nothing to ready and back to nothing."""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path
from typing import Annotated

import typer
import yaml
from pydantic import ValidationError
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from cluster.cli.common import err, fail, out
from cluster.cli.local_cluster import LocalCluster, StartupError, StopSignal, port_problem
from cluster.config import ClusterConfig, GatewayConfig

EXAMPLE_PROMPT = "Why is the sky blue?"


def serve(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="YAML file; the embedded model without one.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, int8 or float32, for every model.")] = None,
    host: Annotated[str | None, typer.Option(help="Address of the HTTP proxy.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="HTTP port.")] = None,
    grpc_port: Annotated[int | None, typer.Option(min=1, max=65535, help="gRPC port.")] = None,
    drain_timeout: Annotated[
        float, typer.Option(min=0.0, help="Seconds that running requests get at the end.")
    ] = 30.0,
) -> None:
    """Serve models on this machine until Ctrl-C or SIGTERM."""
    settings = read_config(config, dtype, host=host, http_port=port, grpc_port=grpc_port)
    problem = port_problem(settings.gateway)
    if problem is not None:
        raise fail(problem)
    stop = StopSignal()
    stop.install()
    cluster = LocalCluster(settings, stop)
    code = 0
    try:
        with phases() as progress:
            cluster.start(lambda name: phase(progress, name))
        if not stop.requested:
            out.print(banner(settings), soft_wrap=True)
            cluster.wait()
    except StartupError as error:
        code = fail(str(error)).exit_code
    finally:
        if stop.requested:
            err.print("stopping: waiting for running requests; once more to stop at once")
        cluster.close(drain_timeout)
        stop.restore()
    if code == 0:
        err.print("stopped")
    raise typer.Exit(code)


def read_config(path: Path | None, dtype: str | None, **gateway: str | int | None) -> ClusterConfig:
    """The file, or the default, with what the command line overrides."""
    try:
        base = ClusterConfig.from_yaml(path) if path is not None else ClusterConfig.default()
        data = base.model_dump()
        data["gateway"] |= {name: value for name, value in gateway.items() if value is not None}
        if dtype is not None:
            data["models"] = [{**model, "dtype": dtype} for model in data["models"]]
        return ClusterConfig.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise fail(f"{path or 'options'}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except yaml.YAMLError as error:
        raise fail(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from error
    except OSError as error:
        raise fail(f"{path}: {error.strerror or error}") from error


def phases() -> Progress:
    return Progress(
        SpinnerColumn(finished_text="[green]✓[/]"),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=err,
        disable=not err.is_terminal,
    )


class phase:
    """One line of progress: a spinner that becomes a tick when the block ends well."""

    def __init__(self, progress: Progress, name: str) -> None:
        self._progress = progress
        self._name = name
        self._began = time.monotonic()
        self._task: TaskID = progress.add_task(escape(name), total=1)

    def __enter__(self) -> phase:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._progress.stop_task(self._task)
            return
        self._progress.update(self._task, completed=1)
        if not self._progress.console.is_terminal:  # a spinner shows nothing there before the end
            line = f"✓ {self._name} ({time.monotonic() - self._began:.1f} s)"
            self._progress.console.print(line, markup=False)


def urls(gateway: GatewayConfig) -> tuple[str, str]:
    """What a client on this machine uses: HTTP URL and gRPC address."""
    host = "127.0.0.1" if gateway.host in ("0.0.0.0", "::") else gateway.host
    bracketed = f"[{host}]" if ":" in host else host
    return f"http://{bracketed}:{gateway.http_port}", f"{bracketed}:{gateway.grpc_port}"


def banner(config: ClusterConfig) -> str:
    """What to do next, in rich's markup."""
    http, grpc = map(escape, urls(config.gateway))
    if not config.models:
        return f"\n[bold green]Ready[/] for models: s2d models load --help (the server is {http})\n"
    model = config.models[0].name
    key = " -H 'Authorization: Bearer $S2D_API_KEY'".replace("'", '"') if config.gateway.api_key else ""
    body = json.dumps(
        {"model": model, "messages": [{"role": "user", "content": EXAMPLE_PROMPT}], "stream": True}
    )
    request = {"model": model, "messages": [{"role": "user", "content": EXAMPLE_PROMPT}]}
    address = "" if config.gateway.grpc_port == 9000 else f" --address {grpc}"
    names = ", ".join(f"{escape(m.name)} ({m.dtype})" for m in config.models)
    return "\n".join(
        (
            f"\n[bold green]Ready:[/] {names}",
            f"  OpenAI API  {http}/v1",
            f"  gRPC        {grpc} (s2d.v1.GenerationService, with reflection)",
            f"  Operators   {http}/state  {http}/metrics  {http}/ready\n",
            f"curl -N {http}/v1/chat/completions -H 'Content-Type: application/json'{key} \\",
            f"  -d {_literal(body)}",
            f"s2d generate {shlex.quote(EXAMPLE_PROMPT)} --color{address}",
            f"grpcurl -plaintext -d {_literal(json.dumps(request))} \\",
            f"  {grpc} s2d.v1.GenerationService/Chat\n",
        )
    )


def _literal(text: str) -> str:
    """Quoted for the shell, and with rich's markup switched off."""
    return shlex.quote(text).replace("[", "\\[")
