"""Puts a torch engine together from a loaded model and its configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from actors.costs import CostModel
from actors.drafting.interface import DraftSource
from actors.engine.controller import Controller
from actors.engine.scheduler import Scheduler, SchedulerLimits
from actors.engine.speculator import DraftTimeouts, Speculator
from actors.engine.torch_engine import SpeculationDefaults, TorchEngine
from actors.kv.block_pool import BlockPool
from actors.models.runner import BLOCK_SIZE, ModelRunner
from actors.sampling.grammar import GrammarMatcher
from actors.sampling.params import GrammarSpec

if TYPE_CHECKING:
    from cluster.config import EngineConfig, SpeculationConfig


def build_engine(
    runner: ModelRunner,
    engine: EngineConfig,
    speculation: SpeculationConfig,
    source: DraftSource,
    compile_grammar: Callable[[GrammarSpec], GrammarMatcher],
) -> TorchEngine:
    """An engine that has measured its costs and is ready for requests.

    Raises ValueError when the KV pool cannot hold one sequence of the model's length.
    """
    pool = BlockPool(runner.num_blocks, BLOCK_SIZE, prefix_caching=engine.prefix_caching)
    limits = SchedulerLimits(engine.max_num_seqs, engine.max_batched_tokens, engine.prefill_chunk)
    timeouts = DraftTimeouts(speculation.draft_timeout_ms / 1e3, speculation.forced_draft_timeout_ms / 1e3)
    max_model_len, vocab_size = runner.info.max_model_len, runner.info.vocab_size
    speculator = Speculator(source, Controller(CostModel()), timeouts, max_model_len, vocab_size)
    defaults = SpeculationDefaults(
        speculation.enabled, speculation.max_draft_tokens, speculation.verification, speculation.tree
    )
    built = TorchEngine(runner, Scheduler(pool, limits), speculator, defaults, max_model_len, compile_grammar)
    built.profile()
    return built
