"""The drafting service of one draft worker, on its asyncio loop."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import grpc

from actors.draft_worker.batcher import DraftBatcher, Round
from actors.draft_worker.vocabularies import (
    DraftVocabulary,
    TargetVocabularies,
    TokenizerWantedError,
    VocabularyRefusedError,
)
from actors.drafting import codec
from actors.drafting.interface import SCOPE_SHIFT, SessionDraft, SessionOpen
from actors.models.cores import Cores
from protos.s2d.v1 import drafting_pb2 as pb
from protos.s2d.v1 import drafting_pb2_grpc as pb_grpc

if TYPE_CHECKING:
    from actors.drafting.foreign import ForeignTarget

logger = logging.getLogger(__name__)

HELLO_TIMEOUT_S = 10.0
MAX_UNANSWERED = 64
"""Rounds of one stream that may wait for their replies to be taken; then the stream is no longer read."""


@dataclass(frozen=True, slots=True)
class AheadPolicy:
    """For which targets drafts are prepared while they verify: all, none, or (`always` None) those known to
    compute on other cores than the draft's, `cores`."""

    always: bool | None = None
    cores: Cores = field(default_factory=Cores)

    def holds_for(self, hello: pb.Hello) -> bool:
        if self.always is not None:
            return self.always
        return self.cores.apart_from(Cores(hello.host, frozenset(hello.cpus)))


class DraftService(pb_grpc.DraftServiceServicer):
    """Args:
    vocabulary: of the nested drafter; None when every drafter takes any vocabulary.
    incarnation: unique to this process, so that a target notices a replacement.
    """

    def __init__(
        self,
        batcher: DraftBatcher,
        worker_id: str,
        incarnation: str,
        vocabulary: DraftVocabulary | None = None,
        draft_ahead: AheadPolicy | None = None,
    ) -> None:
        self._batcher = batcher
        self._worker_id = worker_id
        self._incarnation = incarnation
        self._vocabularies = TargetVocabularies(vocabulary)
        self._draft_ahead = draft_ahead or AheadPolicy(False)

    async def Draft(
        self, request_iterator: AsyncIterator[pb.DraftRound], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.DraftReply]:
        """One target worker's stream."""
        try:
            first = await asyncio.wait_for(anext(request_iterator, None), HELLO_TIMEOUT_S)
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "no hello came")
        if first is None or not first.HasField("hello"):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first round of a stream carries hello")
        if not 0.0 <= first.hello.weight < math.inf:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "hello.weight must be positive and finite")
        foreign = await self._find(first.hello, context)
        ahead = self._draft_ahead.holds_for(first.hello)
        vocabulary = first.hello.tokenizer_hash or f"{first.hello.vocab_size} tokens"
        weight = first.hello.weight or 1.0
        stream = _Stream(self._batcher, self._incarnation, vocabulary, foreign, ahead, weight)
        logger.info("target worker %s (%s) connected", first.hello.target_id, first.hello.model)
        reader = asyncio.create_task(stream.read(first, request_iterator))
        try:
            greeted = False
            while (reply := await stream.next_reply()) is not None:
                if not greeted:
                    reply.drafters.extend(self._batcher.pool.drafters)
                    greeted = True
                yield reply
                stream.taken(reply)
            if stream.violation:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, stream.violation)
        finally:
            reader.cancel()
            stream.end()
            logger.info("target worker %s disconnected", first.hello.target_id)

    async def GetDraftWorkerState(
        self, request: pb.GetDraftWorkerStateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.DraftWorkerState:
        state = self._batcher.state()
        return pb.DraftWorkerState(
            worker_id=self._worker_id,
            incarnation=self._incarnation,
            sessions=state.sessions,
            streams=state.streams,
            queued_rounds=state.queued_rounds,
            kv_blocks_used=state.kv_blocks_used,
            kv_blocks_free=state.kv_blocks_free,
            drafters=self._batcher.pool.drafters,
            exits=self._batcher.pool.exits,
            rounds=state.rounds,
            drafted_tokens=state.drafted_tokens,
            ahead_foreseen=state.ahead.foreseen,
            ahead_partly=state.ahead.partly,
            ahead_missed=state.ahead.missed,
            ahead_steps=state.ahead.steps,
        )

    async def SendTokenizer(
        self, request_iterator: AsyncIterator[pb.TokenizerChunk], context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.TokenizerReceipt:
        from actors.text.tokenizer_file import MAX_PACKED_BYTES, TokenizerFile

        first: pb.TokenizerChunk | None = None
        packed = bytearray()
        async for chunk in request_iterator:
            first = first or chunk
            packed += chunk.data
            if len(packed) > MAX_PACKED_BYTES:
                problem = f"the tokenizer takes more than {MAX_PACKED_BYTES} bytes"
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, problem)
        if first is None:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no tokenizer came")
        file = TokenizerFile(
            first.tokenizer_hash, bytes(packed), tuple(first.special_token_ids), tuple(first.eos_token_ids)
        )
        try:
            shared = await self._vocabularies.add(first.vocab_size, file)
        except VocabularyRefusedError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        return pb.TokenizerReceipt(shared_tokens=shared, draft_vocab_size=self._vocabularies.draft_size)

    async def _find(
        self, hello: pb.Hello, context: grpc.aio.ServicerContext[Any, Any]
    ) -> ForeignTarget | None:
        """How to read the target's tokens; refuses those that mean nothing here."""
        try:
            return self._vocabularies.find(hello.vocab_size, hello.tokenizer_hash)
        except VocabularyRefusedError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except TokenizerWantedError as error:
            await context.abort(grpc.StatusCode.NOT_FOUND, str(error))


class _Stream:
    """Moves rounds from the loop to the drafting thread, and replies back."""

    def __init__(
        self,
        batcher: DraftBatcher,
        incarnation: str,
        vocabulary: str,
        foreign: ForeignTarget | None,
        ahead: bool,
        weight: float,
    ) -> None:
        self._batcher = batcher
        self._incarnation = incarnation
        self._vocabulary = vocabulary
        self._foreign = foreign
        self._ahead = ahead
        self._id = batcher.attach(weight)
        self._scope = self._id << SCOPE_SHIFT
        self._loop = asyncio.get_running_loop()
        self._replies: asyncio.Queue[pb.DraftReply | None] = asyncio.Queue()
        self._room = asyncio.Semaphore(MAX_UNANSWERED)
        self.violation = ""

    async def read(self, first: pb.DraftRound, rounds: AsyncIterator[pb.DraftRound]) -> None:
        """Submit rounds until the target ends the stream; what came before the end is still answered."""
        try:
            await self._submit(first)
            async for message in rounds:
                await self._submit(message)
            for _ in range(MAX_UNANSWERED):
                await self._room.acquire()
        except ValueError as error:
            self.violation = str(error)
        finally:
            self._replies.put_nowait(None)

    async def next_reply(self) -> pb.DraftReply | None:
        return await self._replies.get()

    def taken(self, reply: pb.DraftReply) -> None:
        """A reply was written: its round no longer counts."""
        if not reply.shadows:
            self._room.release()

    def end(self) -> None:
        self._batcher.detach(self._id)

    async def _submit(self, message: pb.DraftRound) -> None:
        received = time.monotonic()
        await self._room.acquire()
        round_id = message.round_id

        def reply(drafts: list[SessionDraft]) -> None:
            encoded = pb.DraftReply(
                round_id=round_id,
                incarnation=self._incarnation,
                drafts=[codec.draft_to_proto(draft) for draft in drafts],
                candidates_wanted=self._batcher.pool.wants_candidates,
                service_us=int((time.monotonic() - received) * 1e6),
            )
            try:
                self._loop.call_soon_threadsafe(self._replies.put_nowait, encoded)
            except RuntimeError:
                logger.debug("round %d was answered after its loop had closed", round_id)

        def shadow_reply(drafts: list[SessionDraft]) -> None:
            shadows = [codec.draft_to_proto(draft) for draft in drafts]
            encoded = pb.DraftReply(
                round_id=round_id,
                incarnation=self._incarnation,
                candidates_wanted=self._batcher.pool.wants_candidates,
                shadows=shadows,
            )
            try:
                self._loop.call_soon_threadsafe(self._put_shadow, encoded)
            except RuntimeError:
                logger.debug("a draft for scoring came after its loop had closed")

        deadline = received + message.deadline_us * 1e-6 if message.deadline_us else float("inf")
        self._batcher.submit(
            Round(
                stream_id=self._id,
                reply=reply,
                opens=tuple(self._open(session) for session in message.opens),
                closes=tuple(self._scope + session_id for session_id in message.closes),
                updates=tuple(codec.update_from_proto(update, self._scope) for update in message.updates),
                reset=codec.reset_from_proto(message.reset_shared_state),
                deadline=deadline,
                shadow_reply=shadow_reply,
            )
        )

    def _put_shadow(self, reply: pb.DraftReply) -> None:
        # Never in the way of drafts: a target that does not take its replies gets none.
        if self._replies.qsize() < MAX_UNANSWERED:
            self._replies.put_nowait(reply)

    def _open(self, message: pb.SessionOpen) -> SessionOpen:
        session = codec.open_from_proto(message, self._scope)
        return replace(session, vocabulary=self._vocabulary, foreign=self._foreign, ahead=self._ahead)
