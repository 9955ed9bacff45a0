"""The drafters without a model, by the names that configurations have for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from actors.drafting.interface import Drafter
from actors.drafting.prompt_lookup import PromptLookupDrafter
from actors.drafting.token_recycling import TokenRecyclingDrafter

MODEL_FREE: Mapping[str, Callable[[int], Drafter]] = {
    "prompt_lookup": lambda max_sessions: PromptLookupDrafter(max_sessions=max_sessions),
    "token_recycling": lambda max_sessions: TokenRecyclingDrafter(max_sessions=max_sessions),
}
"""Each from the sessions that it may hold."""
