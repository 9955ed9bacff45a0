"""Messages between target and draft worker, and the ledger that builds them."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest

from actors.drafting import codec, session_ledger
from actors.drafting.interface import (
    DraftErrorCode,
    NestedWish,
    SessionDraft,
    SessionUpdate,
)
from actors.drafting.session_ledger import RETRY_S, SessionLedger
from protos.s2d.v1 import drafting_pb2 as pb
from tests.draft_rig import session, wish


def test_messages_survive_the_wire() -> None:
    opened = replace(session(2**63, [1, 2**31], epoch=9), trees=True)
    assert codec.open_from_proto(_again(codec.open_to_proto(opened))) == opened
    many = replace(opened, sampling=replace(opened.sampling, top_k=2**40))
    assert codec.open_from_proto(_again(codec.open_to_proto(many))).sampling.top_k == 2**32 - 1
    update = SessionUpdate(4, 7, (1, 2), 5, 3, ((8, (9, 10)), (11, ())), "nested", 12, chain=True)
    assert codec.update_from_proto(_again(codec.update_to_proto(update))) == update
    assert codec.update_from_proto(codec.update_to_proto(wish(0, 1))) == wish(0, 1)
    assigned = wish(0, 1, nested=NestedWish(4, 0, 8, 2))
    assert codec.update_from_proto(_again(codec.update_to_proto(assigned))) == assigned
    q = (((1,), (1.0,)), ((2, 3), (0.5, 0.5)))
    draft = SessionDraft(4, 7, (1, 2), (-1, -1), "tree", 6, (0.5, 0.25), ("nested", "x"), q)
    assert codec.draft_from_proto(_again(codec.draft_to_proto(draft))) == draft


@pytest.mark.parametrize("code", get_args(DraftErrorCode))
def test_every_error_survives_the_wire(code: DraftErrorCode) -> None:
    draft = SessionDraft(1, 2, error=code, error_message="why")
    assert codec.draft_from_proto(_again(codec.draft_to_proto(draft))) == draft


@pytest.mark.parametrize(
    "broken",
    [
        {"token_ids": []},
        {"prompt_len": 9},
        {"sampling": pb.DraftSampling(temperature=float("nan"), top_p=1.0)},
        {"sampling": pb.DraftSampling(temperature=1.0, top_p=0.0)},
    ],
)
def test_nonsense_is_refused(broken: dict[str, object]) -> None:
    fields = {"session_id": 1, "token_ids": [1], "prompt_len": 1, "sampling": pb.DraftSampling(top_p=1.0)}
    codec.open_from_proto(pb.SessionOpen(**fields))
    with pytest.raises(ValueError, match=r"token_ids|sampling"):
        codec.open_from_proto(pb.SessionOpen(**(fields | broken)))


def _again(message):  # type: ignore[no-untyped-def]
    return type(message).FromString(message.SerializeToString())


def reply(ledger: SessionLedger, draft: SessionDraft, now: float = 0.0) -> SessionDraft | None:
    return ledger.answer(codec.draft_to_proto(draft), now)


def test_ledger_opens_lazily_and_accumulates() -> None:
    ledger = SessionLedger(flush_tokens=3)
    ledger.open(session(5, [1, 2]))
    assert ledger.round([wish(5, 1, [3], budget=0)], 0.0) is None
    message = ledger.round([wish(5, 2, [4])], 0.0)
    assert message is not None
    assert list(message.opens[0].token_ids) == [1, 2, 3, 4]
    assert (message.opens[0].prompt_len, message.updates[0].epoch) == (2, 1)
    assert ledger.awaits(5, 2)
    assert reply(ledger, SessionDraft(5, 1, (9,))) == SessionDraft(5, 2, (9,))
    assert not ledger.awaits(5, 2)
    assert reply(ledger, SessionDraft(5, 1, (9,))) is None, "an answer counts once"
    assert ledger.round([wish(5, 3, [5], budget=0)], 0.0) is None
    assert ledger.round([wish(5, 4, [6], budget=0)], 0.0) is None
    flushed = ledger.round([wish(5, 5, [7], budget=0)], 0.0)
    assert flushed is not None
    assert (list(flushed.updates[0].new_token_ids), flushed.updates[0].epoch) == ([5, 6, 7], 2)
    ledger.close(5)
    closing = ledger.flush()
    assert closing is not None
    assert list(closing.closes) == [5]
    assert ledger.flush() is None


def test_ledger_tells_the_verdict_on_what_the_worker_proposed() -> None:
    """Not that of drafts which others made meanwhile."""
    ledger = SessionLedger()
    ledger.open(session(5, [1]))
    told = []
    # (verified, wanted of the worker): it proposes, somebody else does twice, then it does again.
    for epoch, (drafted, budget) in enumerate(((9, 2), (1, 0), (4, 0), (3, 2), (2, 2)), start=1):
        message = ledger.round([wish(5, epoch, [epoch], budget, drafted=drafted)], 0.0)
        told += [update.drafted for update in message.updates] if message is not None else []
    assert told == [0, 1, 2], "what was verified before it knew the session was not its own"


def test_ledger_holds_the_last_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_ledger, "MAX_HELD_CANDIDATES", 2)
    ledger = SessionLedger()
    ledger.open(session(5, [1]))
    for epoch in (1, 2, 3):
        ledger.round([wish(5, epoch, [2], budget=0, candidates=((epoch, (9,)),))], 0.0)
    message = ledger.round([wish(5, 4, [2], candidates=((4, (9,)),))], 0.0)
    assert message is not None
    assert [c.token_id for c in message.updates[0].candidates] == [3, 4]


def test_ledger_opens_sessions_of_so_many_tokens_in_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_ledger, "MAX_OPEN_TOKENS", 2)
    ledger = SessionLedger()
    lengths = {1: 3, 2: 1, 3: 1, 4: 1}  # the first is longer than what fits
    for sid, length in lengths.items():
        ledger.open(session(sid, [7] * length))
    opened = []
    for epoch in (1, 2, 3):
        message = ledger.round([wish(sid, epoch) for sid in lengths], 0.0)
        assert message is not None
        opened.append([o.session_id for o in message.opens])
        known = {sid for sids in opened for sid in sids}
        assert {u.session_id for u in message.updates} == known
        assert {sid for sid in lengths if ledger.awaits(sid, epoch)} == known
    assert opened == [[1], [2, 3], [4]]


def test_ledger_opens_again_after_errors_and_ignores_a_former_life() -> None:
    ledger = SessionLedger()
    ledger.open(session(5, [1]))
    ledger.round([wish(5, 1, [2])], 0.0)
    answer = reply(ledger, SessionDraft(5, 1, error="unknown_session"))
    assert answer is not None
    assert answer.error == "unknown_session"
    again = ledger.round([wish(5, 2, [3])], 0.0)
    assert again is not None
    assert (list(again.opens[0].token_ids), again.opens[0].epoch, again.updates[0].epoch) == ([1, 2, 3], 1, 2)
    assert reply(ledger, SessionDraft(5, 1, error="stale_epoch")) is None
    assert ledger.awaits(5, 2)
    reply(ledger, SessionDraft(5, 2, error="capacity"), 10.0)
    assert ledger.round([wish(5, 3, [4])], 10.0 + RETRY_S / 2) is None
    retry = ledger.round([wish(5, 4, [5])], 10.0 + RETRY_S)
    assert retry is not None
    assert list(retry.updates[0].new_token_ids) == [4, 5]


def test_a_draft_that_makes_no_sense_is_one_that_failed() -> None:
    ledger = SessionLedger(flush_tokens=3)
    ledger.open(session(5, [1]))
    ledger.round([wish(5, 1)], 0.0)
    message = pb.SessionDraft(session_id=5, epoch=1, token_ids=[1, 2], parents=[1, 0])
    answer = ledger.answer(message, 0.0)
    assert answer is not None
    assert answer.error == "internal"
    assert "parent" in answer.error_message


def test_ledger_asks_for_shadow_drafts_and_takes_each_once() -> None:
    ledger = SessionLedger()
    ledger.open(session(5, [1]))
    asked = ledger.round([wish(5, 7, [2], budget=0, nested=NestedWish(shadow_exit=4, shadow_length=2))], 0.0)
    assert asked is not None
    assert len(asked.opens) == 1
    (update,) = asked.updates
    assert (update.budget, update.nested.shadow_exit, update.nested.shadow_length) == (0, 4, 2)
    assert not ledger.awaits(5, 7), "nobody waits for it"
    shadow = codec.draft_to_proto(SessionDraft(5, update.epoch, (8, 9), exit_depth=4))
    assert ledger.shadow(codec.draft_to_proto(SessionDraft(5, update.epoch + 1))) is None
    assert ledger.shadow(shadow) == SessionDraft(5, 7, (8, 9), exit_depth=4)
    assert ledger.shadow(shadow) is None
    ledger.round([wish(5, 8, [3], nested=NestedWish(shadow_exit=4, shadow_length=2))], 0.0)
    ledger.disconnected()
    shadow.epoch += 1
    assert ledger.shadow(shadow) is None, "the worker is another one"
