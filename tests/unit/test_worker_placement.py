"""Where workers run: devices and Ray's resources, CPUs that they are bound to, and what follows from them."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from actors.draft_worker.server import build_draft_server
from actors.drafting.interface import DraftQuery, SessionOpen, TargetIdentity
from actors.drafting.nested_load import dtype_on, load_nested
from actors.models.cores import Cores, bind_threads, check_cpus, cores_of
from actors.models.load import choose_device, load_runner
from actors.models.threads import takes_every_core
from actors.sampling.params import DraftSampling
from actors.text.tokenizer import TextTokenizer
from cluster.app import build_app
from cluster.cli.local_cluster import (
    LocalCluster,
    StartupError,
    StopSignal,
    gpus_needed,
    resources_needed,
    spread_over_gpus,
    usable_gpus,
)
from cluster.config import ClusterConfig, DraftPoolConfig, EngineConfig, ModelConfig, NestedDrafterConfig
from cluster.deployments import wiring
from tests.draft_rig import Worker, drafted, until, wish
from tests.toy_draft import toy_base, toy_draft

NO_CUDA = not torch.cuda.is_available()


def bind_all(cpus: set[int]) -> None:
    for name in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(name), cpus)


@pytest.fixture
def cpus() -> Iterator[list[int]]:
    """At least two CPUs that this process may run on, and does again afterwards."""
    before = os.sched_getaffinity(0)
    if len(before) < 2:
        pytest.skip("needs two CPUs")
    yield sorted(before)
    bind_all(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_base(tmp_path_factory.mktemp("base"))


def cluster(*models: dict[str, object], **fields: object) -> ClusterConfig:
    named = [{"name": f"m{i}", "source": "x"} | model for i, model in enumerate(models)]
    return ClusterConfig.model_validate({"models": named, **fields})


# -- devices -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "device", "gpus"),
    [
        ({}, "cpu", 0),
        ({"num_gpus": 0.5}, "cuda", 0.5),
        ({"num_gpus": 0}, "cpu", 0),
        ({"device": "cuda"}, "cuda", 1),
        ({"device": "cuda", "num_gpus": 0}, "cuda", 0),
        ({"device": "cuda:1"}, "cuda:1", 0),
        ({"device": "cpu", "num_gpus": 1}, "cpu", 1),
    ],
)
def test_a_worker_takes_a_gpu_that_it_reserves_and_no_other(
    fields: dict[str, Any], device: str, gpus: float
) -> None:
    for placed in (ModelConfig(name="m", source="x", **fields), DraftPoolConfig(**fields)):
        assert (placed.torch_device, placed.gpus) == (device, gpus)


def deployments(config: ClusterConfig) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Ray's options of the gateway, the first model and the draft pool."""
    gateway: Any = build_app(config)._bound_deployment
    _, targets, pool = gateway.init_args
    first = next(iter(targets.values()))._bound_deployment
    return gateway.ray_actor_options, first.ray_actor_options, pool._bound_deployment.ray_actor_options


def test_ray_is_told_what_workers_reserve() -> None:
    pool = {"device": "cuda", "num_gpus": 0.5, "resources": {"drafts": 1}, "cpus": [0, 1]}
    config = cluster({"device": "cuda", "resources": {"big": 0.5}, "engine": {"cpus": [2]}}, draft_pool=pool)
    gateway, target, draft = deployments(config)
    assert (target["num_gpus"], target["resources"]) == (1, {"big": 0.5})
    assert (draft["num_gpus"], draft["resources"]) == (0.5, {"drafts": 1})
    assert (gateway["num_gpus"], gateway.get("resources")) == (0, None)
    threads = [options["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] for options in (target, draft)]
    assert threads == ["1", "2"]
    plain = deployments(cluster({}))
    assert [options["num_gpus"] for options in plain] == [0, 0, 0]


def gpus_of(config: ClusterConfig) -> list[float]:
    return [model.gpus for model in config.models]


def test_models_share_the_gpus_of_this_machine() -> None:
    one = ClusterConfig.default()
    assert gpus_of(spread_over_gpus(one, 2)) == [1]
    assert spread_over_gpus(one, 2).models[0].torch_device == "cuda"
    assert spread_over_gpus(one, 2).draft_pool.torch_device == "cpu"
    assert spread_over_gpus(one, 0) == one
    assert gpus_of(spread_over_gpus(cluster({}, {}), 2)) == [1, 1]
    assert gpus_of(spread_over_gpus(cluster({}, {}, {}), 2)) == [0.5] * 3, "not two thirds: one would wait"
    assert gpus_of(spread_over_gpus(cluster({"replicas": 2}, {}), 1)) == [1 / 3] * 2


def test_models_that_say_where_they_run_stay_there() -> None:
    config = cluster(
        {}, {"device": "cpu"}, {"num_gpus": 0}, {"num_gpus": 0.5}, {"dtype": "int8"}, {"backend": "native"}
    )
    assert gpus_of(spread_over_gpus(config, 3)) == [1, 0, 0, 0.5, 0, 0]
    taken = cluster({}, draft_pool={"num_gpus": 1})
    assert gpus_of(spread_over_gpus(taken, 1)) == [0], "the draft pool has the only one"
    assert gpus_needed(spread_over_gpus(taken, 2)) == 2
    shared = cluster({}, {}, draft_pool={"num_gpus": 0.5})
    assert gpus_of(spread_over_gpus(shared, 1)) == [0.25] * 2, "what the draft pool leaves of the only one"
    assert gpus_of(spread_over_gpus(shared, 2)) == [0.5] * 2, "all of the other one"
    three = cluster({}, *[{"num_gpus": 0.6}] * 3)
    assert gpus_of(spread_over_gpus(three, 3)) == [0.4, 0.6, 0.6, 0.6], "0.6 three times leaves no whole one"


def test_gpus_that_torch_cannot_use_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert usable_gpus(4.0) == 0
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert (usable_gpus(4.0), usable_gpus(2.0), usable_gpus(0.0)) == (3, 2, 0)


def test_int8_is_for_cpus(monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for fields in ({"device": "cuda"}, {"num_gpus": 1}):
        with pytest.raises(ValidationError, match="dtype: int8 is computed on CPUs only"):
            ModelConfig.model_validate({"name": "m", "source": "x", "dtype": "int8", **fields})
    with pytest.raises(ValidationError, match="backend: native is for CPUs only"):
        ModelConfig.model_validate({"name": "m", "source": "x", "backend": "native", "num_gpus": 1})
    with pytest.raises(ValidationError, match="numbers them from 0"):
        ModelConfig.model_validate({"name": "m", "source": "x", "device": "cuda:1", "num_gpus": 1})
    with pytest.raises(ValueError, match="dtype int8 is computed on CPUs only"):
        load_runner(str(base), dtype="int8", device="cuda")
    assert choose_device("auto", "int8").type == "cpu"
    assert choose_device("auto").type == "cuda"


def test_a_draft_that_is_int8_on_a_cpu_is_bfloat16_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert [dtype_on(device, "int8") for device in ("cpu", "auto")] == ["int8", "int8"]
    assert dtype_on("cuda", "float32") == "float32"
    assert not caplog.records
    assert dtype_on("cuda", "int8") == "bfloat16"
    assert "nested.dtype" in caplog.text


def test_drafts_are_computed_where_the_configuration_says(
    monkeypatch: pytest.MonkeyPatch, base: Path, tmp_path: Path
) -> None:
    """A machine with a GPU that nobody has reserved: neither worker nor copy takes it."""
    toy_draft(tmp_path / "d.safetensors", base)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    asked: list[str] = []

    def load(*args: object, device: str = "auto", **options: object) -> Any:
        asked.append(device)
        raise RuntimeError("enough")

    monkeypatch.setattr("actors.drafting.nested_load.load_nested", load)
    nested = {"source": str(base), "artifact": str(tmp_path / "d.safetensors")}
    for fields in ({}, {"num_gpus": 1}):
        pool = DraftPoolConfig.model_validate({"drafters": ["nested"], "nested": nested, **fields})
        with pytest.raises(RuntimeError, match="enough"):
            build_draft_server(pool, "w")
    assert asked == ["cpu", "cuda"]


# -- Ray's own resources -----------------------------------------------------------------------------------


def test_one_machine_has_every_custom_resource() -> None:
    config = cluster(
        {"resources": {"big": 0.5}, "replicas": 3}, {"resources": {"big": 1, "fast": 1}},
        draft_pool={"resources": {"drafts": 1}},
    )  # fmt: skip
    assert resources_needed(config) == {"big": 2.5, "fast": 1, "drafts": 1}


@pytest.mark.parametrize("resources", [{"GPU": 1}, {"CPU": 1}, {"memory": 1}, {"mine": 0}, {"mine": -1}])
def test_what_is_no_custom_resource_is_refused(resources: dict[str, float]) -> None:
    for config, fields in ((ModelConfig, {"name": "m", "source": "x"}), (DraftPoolConfig, {})):
        with pytest.raises(ValidationError, match="resources"):
            config.model_validate({**fields, "resources": resources})


# -- CPUs --------------------------------------------------------------------------------------------------


def test_every_thread_is_bound_and_so_are_those_to_come(cpus: list[int]) -> None:
    ended = threading.Event()
    found: list[set[int]] = []
    sleeper = threading.Thread(target=ended.wait)
    sleeper.start()
    try:
        bind_threads([cpus[1]], "field")
        later = threading.Thread(target=lambda: found.append(os.sched_getaffinity(0)))
        later.start()
        later.join()
        assert sleeper.native_id is not None
        assert found == [os.sched_getaffinity(sleeper.native_id)] == [{cpus[1]}]
        assert cores_of("cpu").cpus == {cpus[1]}
    finally:
        ended.set()
        sleeper.join()


def test_cpus_that_are_not_there_are_refused_by_name() -> None:
    before = os.sched_getaffinity(0)
    missing = max(before) + 1
    with pytest.raises(ValueError, match=rf"engine\.cpus: \[{missing}\] are not among the CPUs"):
        bind_threads([min(before), missing], "engine.cpus")
    assert os.sched_getaffinity(0) == before
    check_cpus(before, "engine.cpus")
    bind_threads((), "engine.cpus")
    assert os.sched_getaffinity(0) == before
    with pytest.raises(ValueError, match=r"draft_pool\.cpus"):
        build_draft_server(DraftPoolConfig(cpus=(missing,)), "w")
    for config in (cluster({"engine": {"cpus": [missing]}}), cluster({}, draft_pool={"cpus": [missing]})):
        with pytest.raises(StartupError, match=r"cpus: \["):  # before anything starts
            LocalCluster(config, StopSignal()).start(lambda name: pytest.fail(name))


@pytest.mark.parametrize("cpus", [[-1], [0, 0]])
def test_a_list_of_cpus_is_a_set(cpus: list[int]) -> None:
    for config in (EngineConfig, DraftPoolConfig):
        with pytest.raises(ValidationError, match="cpus"):
            config.model_validate({"cpus": cpus})


@pytest.mark.parametrize(
    ("fields", "engine", "draft"),
    [({}, 0, 1), ({"cpus": (4, 6)}, 2, 2), ({"cpus": (4,), "threads": 3}, 3, 3), ({"threads": 2}, 2, 2)],
)
def test_threads_default_to_the_number_of_cpus(fields: dict[str, Any], engine: int, draft: int) -> None:
    assert EngineConfig(**fields).compute_threads == engine
    assert DraftPoolConfig(**fields).compute_threads == draft


@pytest.mark.parametrize("shared", [False, True])
def test_draft_ahead_switches_itself_on_where_no_cpu_is_shared(  # type: ignore[no-untyped-def]
    worker: Worker, sources, cpus: list[int], base: Path, shared: bool
) -> None:
    """As `engine.cpus` and `draft_pool.cpus` of one machine have it: the target says what it is bound to."""
    target = Cores(cores_of("cpu").host, frozenset(cpus[:2] if shared else cpus[:1]))
    config = DraftPoolConfig.model_validate(
        {
            "drafters": ["nested"],
            "nested": {"source": str(base), "exits": [1, 3], "dtype": "float32", "kv_blocks": 64},
            "port_range": [0, 0],
            "cpus": cpus[1:2],
        }
    )
    assert config.draft_ahead is None
    worker.run(build_draft_server(config, "worker"))
    tokenizer = TextTokenizer(base)
    source = sources(worker, cores=target, vocab_size=320, tokenizer_hash=tokenizer.vocab_hash)
    source.open(SessionOpen(1, (5, 6, 7), 3, DraftSampling(key=5)))
    assert worker.server is not None
    server = worker.server
    longer = drafted(source, wish(1, 1, budget=5))
    drafted(source, wish(1, 2, budget=3))
    if not shared:
        until(lambda: server.state.ahead.steps > 0)
    assert drafted(source, wish(1, 3, longer.token_ids[:4], budget=1)).token_ids == longer.token_ids[4:]
    assert (server.state.ahead.steps > 0) is not shared
    assert (server.state.ahead.foreseen > 0) is not shared


@pytest.mark.parametrize("bound", [False, True])
def test_a_target_that_leaves_cores_to_the_draft_worker_holds_no_copy(
    monkeypatch: pytest.MonkeyPatch, cpus: list[int], base: Path, bound: bool
) -> None:
    built: dict[str, Any] = {}
    monkeypatch.setattr(wiring, "TargetWorker", lambda config, **options: built.update(options))
    asked: list[tuple[int | None, str]] = []

    def source(
        pool: object, leases: object, sessions: int, threads: int | None, target: object, device: str
    ) -> None:
        asked.append((threads, device))

    monkeypatch.setattr(wiring, "draft_source", source)
    pool = DraftPoolConfig(drafters=("nested",), nested=NestedDrafterConfig(source=str(base), exits=(1,)))
    engine = EngineConfig(cpus=tuple(cpus[:1]) if bound else (), threads=0 if bound else len(cpus))
    config = ModelConfig(name="m", source=str(base), engine=engine)
    wiring.build_target_worker(config, pool, list, replica_id="r", stream_interval_ms=None)
    built["build_draft_source"](target=SimpleNamespace())
    assert asked == [(None if bound else len(cpus), "cpu")]
    assert built["stream_interval"] == (wiring.STREAM_INTERVAL if bound else wiring.CROWDED_INTERVAL)
    assert os.sched_getaffinity(0) == set(cpus[:1] if bound else cpus)
    assert takes_every_core(1) is bound, "which is why it is looked at before"


# -- S2D's adaptive exit -----------------------------------------------------------------------------------


def exits_drafted(config: NestedDrafterConfig) -> int | None:
    drafter = load_nested(config, 4, 1, device="cpu").drafter
    drafter.open(SessionOpen(0, (5, 17, 200), 3, DraftSampling(key=1)))
    (draft,) = drafter.propose([DraftQuery(0, 1, 3)])
    assert len(draft.token_ids) == 3
    return draft.exit_depth


def test_thresholds_and_the_default_exit_reach_the_drafter(base: Path, tmp_path: Path) -> None:
    def nested(**fields: object) -> NestedDrafterConfig:
        return NestedDrafterConfig.model_validate(
            {"source": str(base), "exits": [1, 3], "dtype": "float32", "kv_blocks": 16, **fields}
        )

    assert exits_drafted(nested()) == 1
    assert exits_drafted(nested(default_exit=3)) == 3
    assert exits_drafted(nested(thresholds=[0.0])) == 1
    assert exits_drafted(nested(thresholds=[1.0])) == 3
    toy_draft(tmp_path / "d.safetensors", base)  # whose exits only its card knows
    artifact = {"source": str(base), "artifact": str(tmp_path / "d.safetensors"), "kv_blocks": 16}
    for wrong in ({"thresholds": [0.1, 0.2, 0.3]}, {"default_exit": 9}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            load_nested(NestedDrafterConfig.model_validate(artifact | wrong), 4, 1, device="cpu")


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"thresholds": [0.5]}, "thresholds"),
        ({"thresholds": [0.5, 0.5, 0.5]}, "thresholds"),
        ({"thresholds": [0.5, 1.5]}, "thresholds"),
        ({"thresholds": [-0.5, 0.5]}, "thresholds"),
        ({"default_exit": 3}, "default_exit"),
        ({"default_exit": 2, "thresholds": [0.5, 0.5]}, "default_exit"),
    ],
)
def test_exits_that_do_not_fit_are_refused(fields: dict[str, object], key: str) -> None:
    valid: dict[str, Sequence[int] | str] = {"source": "x", "exits": (1, 2, 4)}
    NestedDrafterConfig.model_validate({**valid, "thresholds": [0.5, 0.25]})
    NestedDrafterConfig.model_validate({**valid, "default_exit": 4})
    with pytest.raises(ValidationError, match=key):
        NestedDrafterConfig.model_validate({**valid, **fields})


def test_the_router_and_thresholds_do_not_both_choose_exits() -> None:
    pool = {"drafters": ["nested"], "nested": {"source": "x", "exits": [1, 2], "thresholds": [0.5]}}
    with pytest.raises(ValidationError, match=r"draft_pool\.nested\.thresholds: the router"):
        cluster({}, draft_pool=pool)
    assert cluster({}, draft_pool=pool, router={"enabled": False}).routed is None
    assert cluster({}, draft_pool={**pool, "replicas": 0}).routed is None


# -- on a GPU ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(NO_CUDA, reason="needs CUDA")
def test_a_target_and_a_draft_on_a_gpu(base: Path, tmp_path: Path) -> None:
    config = ModelConfig(name="m", source=str(base), num_gpus=1)
    loaded = load_runner(str(base), device=config.torch_device, dtype=config.dtype, kv_blocks=8)
    assert loaded.runner.info.device.type == "cuda"
    toy_draft(tmp_path / "d.safetensors", base)
    nested = NestedDrafterConfig(
        source=str(base), artifact=str(tmp_path / "d.safetensors"), dtype="int8", kv_blocks=16
    )
    draft = load_nested(nested, 4, 1, device="cuda")
    assert draft.cores.cpus == frozenset()
    assert draft.cores.apart_from(cores_of("cpu")), "it prepares drafts for targets on CPUs"
    draft.drafter.open(SessionOpen(0, (5, 17, 200), 3, DraftSampling(key=1)))
    (proposal,) = draft.drafter.propose([DraftQuery(0, 1, 3)])
    assert len(proposal.token_ids) == 3
    with pytest.raises(ValueError, match="int8"):
        load_runner(str(base), device="cuda", dtype="int8")


@pytest.mark.skipif(NO_CUDA, reason="needs CUDA")
def test_a_copy_computes_on_its_targets_gpu(base: Path, tmp_path: Path) -> None:
    toy_draft(tmp_path / "d.safetensors", base)
    nested = NestedDrafterConfig(source=str(base), artifact=str(tmp_path / "d.safetensors"), kv_blocks=16)
    pool = DraftPoolConfig(replicas=0, drafters=("nested",), nested=nested)
    tokenizer = TextTokenizer(base)
    identity = TargetIdentity("t", "m", tokenizer.vocab_size, tokenizer.vocab_hash)
    source = wiring.draft_source(pool, list, 4, 1, identity, "cuda")
    assert source.drafters == ("nested",)
    source.close()
