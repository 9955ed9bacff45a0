"""Installing a peer's environment, with packages made here."""

from __future__ import annotations

import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from typer import Typer
from typer.testing import CliRunner

from cluster.bench.peers.environments import MARKER, PeerEnvironment, is_installed, python_of
from cluster.bench.peers.install import InstallError, install, install_command


def wheel(folder: Path, name: str) -> str:
    """The smallest package that pip installs, with one module of its name."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", "")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(
            f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n"
        )
    return str(path)


@pytest.mark.slow
def test_an_environment_is_made_once_and_only_counts_when_it_works(tmp_path: Path) -> None:
    requirements = (wheel(tmp_path, "s2d_test_wanted"), wheel(tmp_path, "s2d_test_unwanted"))
    environment = PeerEnvironment(
        "toy", requirements, "import s2d_test_wanted, no_such_module", ("s2d_test_unwanted",)
    )
    said: list[str] = []
    with pytest.raises(InstallError, match="no_such_module"):
        install(environment, tmp_path, said.append)
    assert not is_installed(environment, tmp_path)
    late = (wheel(tmp_path, "s2d_test_late"),)
    environment = replace(environment, check="import s2d_test_wanted, s2d_test_late", unisolated=late)
    assert install(environment, tmp_path, said.append)
    assert any("Successfully installed" in line for line in said)
    assert not install(environment, tmp_path, said.append)
    python = tmp_path / "toy" / "bin" / "python"
    gone = subprocess.run([python, "-c", "import s2d_test_unwanted"], capture_output=True)
    assert gone.returncode != 0
    assert is_installed(environment, tmp_path)
    for changed in ({"requirements": ("s2d-test-wanted==2.0",)}, {"unisolated": ()}):
        assert not is_installed(replace(environment, **changed), tmp_path)


def test_a_step_that_hangs_is_ended(tmp_path: Path) -> None:
    python = tmp_path / "toy" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!{sys.executable}\nimport time\nprint('resolving', flush=True)\ntime.sleep(60)\n")
    python.chmod(0o755)
    started = time.monotonic()
    with pytest.raises(InstallError, match=r"took too long:\n  resolving"):
        install(PeerEnvironment("toy", ("x==1",), ""), tmp_path, lambda line: None, timeout_s=1.0)
    assert time.monotonic() - started < 10
    assert not (tmp_path / "toy" / MARKER).exists()


def test_the_command_names_the_peers_that_there_are() -> None:
    app = Typer()
    app.command()(install_command)
    result = CliRunner().invoke(app, ["sglang"])
    assert result.exit_code == 2
    assert "llama.cpp" in result.output


def test_the_command_has_nothing_to_do_twice(tmp_path: Path) -> None:
    from cluster.bench.peers.environments import ENVIRONMENTS

    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / MARKER).write_text(ENVIRONMENTS["hf"].marker)
    app = Typer()
    app.command()(install_command)
    result = CliRunner().invoke(app, ["hf", "--folder", str(tmp_path)])
    assert result.exit_code == 0
    assert "is installed already" in result.output
    assert python_of("hf", tmp_path).parent == tmp_path / "hf" / "bin"
