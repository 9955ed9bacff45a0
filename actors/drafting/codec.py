"""Between the drafting dataclasses and their protobuf messages. Decoding raises ValueError on nonsense.

A worker tells apart the sessions of its streams by `scope`: an integer above 64 bits that is added to the ids
of one stream when they come in, and dropped when they go out. So scoping costs no second copy of a message.
"""

from __future__ import annotations

from typing import get_args

from actors.drafting.interface import (
    DraftErrorCode,
    NestedWish,
    ResetScope,
    SessionDraft,
    SessionOpen,
    SessionUpdate,
)
from actors.sampling.params import DraftSampling
from protos.s2d.v1 import drafting_pb2 as pb

_UINT32, _UINT64 = (1 << 32) - 1, (1 << 64) - 1
_TO_WIRE: dict[DraftErrorCode, pb.DraftError] = {
    "unknown_session": pb.DRAFT_ERROR_UNKNOWN_SESSION,
    "stale_epoch": pb.DRAFT_ERROR_STALE_EPOCH,
    "capacity": pb.DRAFT_ERROR_CAPACITY,
    "unsupported": pb.DRAFT_ERROR_UNSUPPORTED,
    "internal": pb.DRAFT_ERROR_INTERNAL,
}
_FROM_WIRE: dict[int, DraftErrorCode] = {int(wire): code for code, wire in _TO_WIRE.items()}
assert set(_TO_WIRE) == set(get_args(DraftErrorCode))
RESET_SCOPES: dict[ResetScope, pb.ResetScope] = {
    "all": pb.RESET_SCOPE_ALL,
    "caches": pb.RESET_SCOPE_CACHES,
}
assert set(RESET_SCOPES) == set(get_args(ResetScope))


def reset_from_proto(scope: int) -> ResetScope | None:
    """None for nothing; all for a scope that is not known here, which may be of a newer target."""
    if scope == pb.RESET_SCOPE_UNSPECIFIED:
        return None
    return "caches" if scope == pb.RESET_SCOPE_CACHES else "all"


def open_to_proto(session: SessionOpen) -> pb.SessionOpen:
    s = session.sampling
    return pb.SessionOpen(
        session_id=session.session_id,
        token_ids=session.token_ids,
        prompt_len=session.prompt_len,
        sampling=pb.DraftSampling(
            key=s.key & _UINT64,
            temperature=s.temperature,
            top_k=min(s.top_k, _UINT32),  # more tokens than any vocabulary has: no limit, as asked for
            top_p=s.top_p,
            min_p=s.min_p,
            rule=s.rule,
        ),
        epoch=session.epoch,
        trees=session.trees,
    )


def open_from_proto(message: pb.SessionOpen, scope: int = 0) -> SessionOpen:
    s = message.sampling
    if not message.token_ids:
        raise ValueError("token_ids must not be empty")
    if message.prompt_len > len(message.token_ids):
        raise ValueError("prompt_len exceeds token_ids")
    if not (s.temperature >= 0.0 and 0.0 < s.top_p <= 1.0 and 0.0 <= s.min_p <= 1.0):
        raise ValueError("sampling is out of range")
    return SessionOpen(
        session_id=scope + message.session_id,
        token_ids=tuple(message.token_ids),
        prompt_len=message.prompt_len,
        sampling=DraftSampling(
            key=s.key,
            temperature=s.temperature,
            top_k=s.top_k,
            top_p=s.top_p,
            min_p=s.min_p,
            rule=s.rule or "coupled",
        ),
        epoch=message.epoch,
        trees=message.trees,
    )


def update_to_proto(update: SessionUpdate) -> pb.SessionUpdate:
    return pb.SessionUpdate(
        session_id=update.session_id,
        epoch=update.epoch,
        new_token_ids=update.new_tokens,
        drafted=update.drafted,
        candidates=[pb.Candidates(token_id=t, next_ids=ids) for t, ids in update.candidates],
        budget=update.budget,
        drafter=update.drafter or "",
        exit_depth=update.exit_depth or 0,
        nested=_nested_to_proto(update.nested),
        chain=update.chain,
    )


def update_from_proto(message: pb.SessionUpdate, scope: int = 0) -> SessionUpdate:
    return SessionUpdate(
        session_id=scope + message.session_id,
        epoch=message.epoch,
        new_tokens=tuple(message.new_token_ids),
        budget=message.budget,
        drafted=message.drafted,
        candidates=tuple((c.token_id, tuple(c.next_ids)) for c in message.candidates),
        drafter=message.drafter or None,
        exit_depth=message.exit_depth or None,
        nested=_nested_from_proto(message.nested) if message.HasField("nested") else None,
        chain=message.chain,
    )


def _nested_to_proto(wish: NestedWish | None) -> pb.NestedWish | None:
    if wish is None:
        return None
    return pb.NestedWish(
        exit=wish.exit or 0,
        cap=wish.cap,
        shadow_exit=wish.shadow_exit or 0,
        shadow_length=wish.shadow_length,
    )


def _nested_from_proto(message: pb.NestedWish) -> NestedWish:
    return NestedWish(
        exit=message.exit or None,
        cap=message.cap if message.HasField("cap") else None,
        shadow_exit=message.shadow_exit or None,
        shadow_length=message.shadow_length,
    )


def draft_to_proto(draft: SessionDraft) -> pb.SessionDraft:
    return pb.SessionDraft(
        session_id=draft.session_id & _UINT64,
        epoch=draft.epoch,
        token_ids=draft.token_ids,
        parents=draft.parents,
        drafter=draft.drafter,
        exit_depth=draft.exit_depth or 0,
        confidence=draft.confidence,
        sources=draft.sources,
        q=[pb.DraftDistribution(token_ids=ids, probabilities=p) for ids, p in draft.q],
        error=_TO_WIRE[draft.error] if draft.error is not None else pb.DRAFT_ERROR_UNSPECIFIED,
        error_message=draft.error_message,
    )


def draft_from_proto(message: pb.SessionDraft, epoch: int | None = None) -> SessionDraft:
    """`epoch` replaces the message's where the caller counts its own."""
    error: DraftErrorCode | None = None
    if message.error != pb.DRAFT_ERROR_UNSPECIFIED:
        # A code of a newer worker: all that matters is that there is no draft.
        error = _FROM_WIRE.get(int(message.error), "internal")
    return SessionDraft(
        session_id=message.session_id,
        epoch=message.epoch if epoch is None else epoch,
        token_ids=tuple(message.token_ids),
        parents=tuple(message.parents),
        drafter=message.drafter,
        exit_depth=message.exit_depth or None,
        confidence=tuple(message.confidence),
        sources=tuple(message.sources),
        q=tuple((tuple(d.token_ids), tuple(d.probabilities)) for d in message.q),
        error=error,
        error_message=message.error_message,
    )
