"""Puts a target worker together: which loader, which engine, where drafts come from."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from actors.drafting.interface import NESTED, Drafter, DraftSource, TargetIdentity
from actors.drafting.local_source import LocalDraftSource
from actors.drafting.model_free import MODEL_FREE
from actors.drafting.placed_source import PlacedDraftSource
from actors.drafting.remote_link import LinkOptions
from actors.drafting.remote_source import RemoteDraftSource
from actors.drafting.selector import CANDIDATES_WANTED, DrafterPool
from actors.engine.build import build_engine
from actors.engine.interface import TargetEngine
from actors.models.cores import bind_threads
from actors.models.load import LoadedModel, choose_device, load_runner
from actors.models.threads import takes_every_core
from actors.sampling.grammar import GrammarCompiler
from actors.target_worker.generation import StreamInterval
from actors.target_worker.startup import StartupClock
from actors.target_worker.worker import TargetWorker
from cluster.config import DrafterName, DraftPoolConfig, ModelConfig, NestedDrafterConfig

logger = logging.getLogger(__name__)
STREAM_INTERVAL = StreamInterval(least_ms=20.0)
CROWDED_INTERVAL = StreamInterval(least_ms=100.0, per_stream_ms=25.0)
"""Where compute threads take every core. A chunk costs them some 7 ms of processor time on its way through
Ray Serve, so that 16 streams in chunks every 100 ms would take more than a core."""
OWN_CATCH_UP = 96
"""Waiting tokens that a target's own copy of the nested drafter runs in one pass, rather than in background
work that takes as long on the same thread: the context of the embedded draft, and what it is cut to."""
Leases = Callable[[], Sequence[Mapping[str, object]]]


def local_drafters(
    names: Sequence[DrafterName], max_sessions: int, nested: Drafter | None = None
) -> DrafterPool:
    """Those of the configured drafters that a target runs itself: what it falls back to, and all it has
    without a draft pool. None but those without a model where it holds no copy of the nested one."""
    drafters: list[Drafter] = []
    for name in names:
        if name in MODEL_FREE:
            drafters.append(MODEL_FREE[name](max_sessions))
        elif nested is not None and name == nested.name:
            drafters.append(nested)
    return DrafterPool(drafters, max_sessions)


def own_nested(
    config: NestedDrafterConfig, identity: TargetIdentity, max_sessions: int, threads: int, device: str
) -> Drafter | None:
    """A copy of the nested drafter for this process, on its target's device; None for a target with another
    tokenizer, which only a draft worker re-tokenises for."""
    import torch

    from actors.drafting.nested_load import load_nested

    targets_threads = torch.get_num_threads()
    loaded = load_nested(
        config,
        max_sessions,
        threads,
        device=device,
        target_hash=identity.states_hash,
        catch_up=OWN_CATCH_UP,
        absorb_from=OWN_CATCH_UP,
    )
    torch.set_num_threads(targets_threads)  # loading a model sets what it wants, of the whole process
    if loaded.tokenizer.vocab_hash != identity.tokenizer_hash:
        logger.info("%s has another tokenizer than the draft: a draft worker drafts for it", identity.model)
        return None
    return loaded.drafter


def draft_source(
    pool: DraftPoolConfig,
    leases: Leases,
    max_sessions: int,
    own_nested_threads: int | None,
    identity: TargetIdentity,
    device: str = "cpu",
) -> DraftSource:
    """The draft pool with a local fallback, or local drafters alone when the pool is empty: of
    `pool.drafters`, those that run here.

    `own_nested_threads`: compute threads of a copy of the nested drafter in this process, on `device`; None
    for no copy.
    """
    nested = None
    if own_nested_threads is not None and pool.nested is not None and NESTED in pool.drafters:
        nested = own_nested(pool.nested, identity, max_sessions, own_nested_threads, device)
    local = LocalDraftSource(local_drafters(pool.drafters, max_sessions, nested))
    if not pool.replicas:
        return local
    remote = RemoteDraftSource(
        leases,
        identity,
        LinkOptions(token=pool.token, tls=pool.tls),
        expected_drafters=pool.drafters,
        expected_candidates=CANDIDATES_WANTED if "token_recycling" in pool.drafters else 0,
    )
    return PlacedDraftSource(remote, local, adaptive=pool.local_drafting)


def engine(
    loaded: LoadedModel, config: ModelConfig, draft_source: DraftSource, grammar_compiler: GrammarCompiler
) -> TargetEngine:
    """A torch engine that has measured its costs."""
    return build_engine(
        loaded.runner, config.engine, config.speculation, draft_source, grammar_compiler.compile
    )


def build_target_worker(
    config: ModelConfig,
    pool: DraftPoolConfig,
    leases: Leases,
    *,
    replica_id: str,
    stream_interval_ms: float | None,
    clock: StartupClock | None = None,
) -> TargetWorker:
    """Load the model and connect to the draft pool. Blocking: seconds to minutes. Binds this process to the
    configured CPUs; raises ValueError for those that are not there, and what `load_runner` raises."""
    clock = clock or StartupClock()
    clock.mark("imports")
    max_sessions = config.engine.max_num_seqs + config.engine.max_queued
    device, threads = config.torch_device, config.engine.compute_threads
    crowded = choose_device(device).type == "cpu" and takes_every_core(threads)  # of all that others may use
    bind_threads(config.engine.cpus, "engine.cpus")
    if stream_interval_ms is not None:
        interval = StreamInterval(least_ms=stream_interval_ms)
    else:
        interval = CROWDED_INTERVAL if crowded else STREAM_INTERVAL
    nested = pool.nested if "nested" in pool.drafters else None
    copied = nested is not None and (
        crowded and pool.local_drafting if nested.in_target is None else nested.in_target
    )
    return TargetWorker(
        config,
        load=partial(load_runner, progress=logger.info),
        build_draft_source=partial(
            draft_source, pool, leases, max_sessions, threads if copied else None, device=device
        ),
        build_engine=engine,
        exits=nested.resolved_exits() if nested is not None and (pool.replicas or copied) else (),
        replica_id=replica_id,
        stream_interval=interval,
        clock=clock,
    )
