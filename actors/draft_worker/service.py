"""The drafting service of one draft worker, on its asyncio loop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc

from actors.draft_worker.batcher import DraftBatcher, Round
from actors.drafting import codec
from actors.drafting.interface import SessionDraft
from protos.s2d.v1 import drafting_pb2 as pb
from protos.s2d.v1 import drafting_pb2_grpc as pb_grpc

logger = logging.getLogger(__name__)

HELLO_TIMEOUT_S = 10.0
MAX_UNANSWERED = 64
"""Rounds of one stream that may wait for their replies to be taken; then the stream is no longer read."""


@dataclass(frozen=True, slots=True)
class DraftVocabulary:
    """What a drafter with a model of its own speaks. `tokenizer_hash` is empty when unknown."""

    vocab_size: int
    tokenizer_hash: str = ""


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
    ) -> None:
        self._batcher = batcher
        self._worker_id = worker_id
        self._incarnation = incarnation
        self._vocabulary = vocabulary

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
        await self._check(first.hello, context)
        stream = _Stream(self._batcher, self._incarnation)
        logger.info("target worker %s (%s) connected", first.hello.target_id, first.hello.model)
        reader = asyncio.create_task(stream.read(first, request_iterator))
        try:
            greeted = False
            while (reply := await stream.next_reply()) is not None:
                if not greeted:
                    reply.drafters.extend(self._batcher.pool.drafters)
                    greeted = True
                yield reply
                stream.taken()
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
        )

    async def _check(self, hello: pb.Hello, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Refuse targets whose token ids mean something else here."""
        ours = self._vocabulary
        if ours is None:
            return
        problem = ""
        if hello.vocab_size != ours.vocab_size:
            problem = f"the target has {hello.vocab_size} tokens, the nested drafter {ours.vocab_size}"
        elif ours.tokenizer_hash and hello.tokenizer_hash and hello.tokenizer_hash != ours.tokenizer_hash:
            problem = f"the target's tokenizer is {hello.tokenizer_hash}, the drafter's {ours.tokenizer_hash}"
        if problem:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, problem)


class _Stream:
    """Moves rounds from the loop to the drafting thread, and replies back."""

    def __init__(self, batcher: DraftBatcher, incarnation: str) -> None:
        self._batcher = batcher
        self._incarnation = incarnation
        self._id = batcher.attach()
        self._scope = self._id << codec.SCOPE_SHIFT
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

    def taken(self) -> None:
        """A reply was written: its round no longer counts."""
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

        deadline = received + message.deadline_us * 1e-6 if message.deadline_us else float("inf")
        self._batcher.submit(
            Round(
                stream_id=self._id,
                reply=reply,
                opens=tuple(codec.open_from_proto(session, self._scope) for session in message.opens),
                closes=tuple(self._scope + session_id for session_id in message.closes),
                updates=tuple(codec.update_from_proto(update, self._scope) for update in message.updates),
                reset=message.reset_shared_state,
                deadline=deadline,
            )
        )
