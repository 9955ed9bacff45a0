"""`s2d bench install PEER`: a virtual environment with a peer's pinned requirements."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from actors.models.threads import physical_cores
from cluster.bench.peers.environments import (
    ENVIRONMENTS,
    MARKER,
    PeerEnvironment,
    environments_folder,
    is_installed,
)

INSTALL_TIMEOUT_S = 3600.0
SHOWN_LINES = 12
"""Of the output of a step that failed."""
Progress = Callable[[str], None]


class InstallError(RuntimeError):
    """A step failed or took too long; the message ends with its last output."""


def install(
    environment: PeerEnvironment, folder: Path, progress: Progress, timeout_s: float = INSTALL_TIMEOUT_S
) -> bool:
    """Create `folder`/NAME, or bring it up to date. False when there was nothing to do. Raises InstallError.

    An environment counts as installed only after its check has passed; an interrupted installation is
    continued by the next call.
    """
    if is_installed(environment, folder):
        return False
    deadline = time.monotonic() + timeout_s
    target = folder / environment.name
    (target / MARKER).unlink(missing_ok=True)
    python = target / "bin" / "python"
    if not python.is_file():
        shutil.rmtree(target, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        progress(f"creating {target}")
        _run([sys.executable, "-m", "venv", str(target)], deadline, progress)
    pip = [str(python), "-m", "pip"]
    quiet = ["--no-input", "--disable-pip-version-check"]
    _run([*pip, "install", *quiet, *environment.requirements], deadline, progress)
    if environment.removed:
        _run([*pip, "uninstall", "--yes", *quiet, *environment.removed], deadline, progress)
    if environment.unisolated:
        alone = ["--no-build-isolation", "--no-deps"]
        _run([*pip, "install", *quiet, *alone, *environment.unisolated], deadline, progress)
    progress("checking")
    _run([str(python), "-c", environment.check], deadline, progress)
    (target / MARKER).write_text(environment.marker)
    return True


def _run(command: Sequence[str], deadline: float, progress: Progress) -> None:
    """Passes each line of output to `progress`."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    if command[0] != sys.executable:
        # As activated: builds look for tools on the path, and CMake for Python by this variable.
        bin_folder = Path(command[0]).parent
        environment["PATH"] = f"{bin_folder}{os.pathsep}{environment.get('PATH', os.defpath)}"
        environment["VIRTUAL_ENV"] = str(bin_folder.parent)
    environment.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", str(physical_cores()))
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,
    )
    late = threading.Event()

    def end() -> None:
        late.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(max(0.0, deadline - time.monotonic()), end)
    timer.start()
    last: deque[str] = deque(maxlen=SHOWN_LINES)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip():
                last.append(line.strip())
                progress(line.strip())
        code = process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    finally:
        timer.cancel()
    if late.is_set() or code != 0:
        reason = "took too long" if late.is_set() else f"failed with exit status {code}"
        raise InstallError("\n  ".join([f"{' '.join(command[:6])} ... {reason}:", *last]))


def install_command(
    peers: Annotated[list[str], typer.Argument(help=f"{', '.join(ENVIRONMENTS)}, or all.")],
    folder: Annotated[Path | None, typer.Option(help="Where environments lie; the user's cache.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for each peer.")] = INSTALL_TIMEOUT_S,
) -> None:
    """Install engines to compare with, each in a Python environment of its own."""
    console = Console(stderr=True, highlight=False)
    root = environments_folder(folder)
    names = list(ENVIRONMENTS) if "all" in peers else peers
    unknown = [name for name in names if name not in ENVIRONMENTS]
    if unknown:
        raise typer.BadParameter(f"unknown peer {unknown[0]!r}; known: {', '.join(ENVIRONMENTS)}, all")
    for name in names:
        environment = ENVIRONMENTS[name]
        started = time.monotonic()
        try:
            with console.status(f"{name}: installing {environment.note}") as status:

                def show(line: str, name: str = name) -> None:
                    status.update(f"{name}: {escape(line[: max(20, console.width - len(name) - 8)])}")

                done = install(environment, root, show, timeout)
        except InstallError as error:
            console.print(f"[bold red]error:[/] {name}: {escape(str(error))}", soft_wrap=True)
            raise typer.Exit(1) from error
        took = f"installed in {time.monotonic() - started:.0f} s" if done else "is installed already"
        console.print(f"{name} {took}: {root / name}", soft_wrap=True)
