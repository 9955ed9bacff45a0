"""Conversations in bulk: every row of a fixed batch is a conversation, and a row that ends begins the next
one at once. Tokens are chosen, forced and recorded on the device, so that a GPU runs without the host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from actors.models.llama_weights import LlamaWeights
from actors.training.resident_decoder import ResidentDecoder

NOTHING, GIVEN, LABEL, LAST, DROPPED = range(5)
"""What is recorded of a row's step: nothing, a token of the prompt (forced, or of a user turn), one of the
answer, the last one of an answer, and one with which a conversation is given up."""
GREEDY = 8
"""Added to what is recorded when the row's answer is greedy."""
RECORDED_STEPS = 128
"""Steps between looks of the host."""
_TINY = 1e-20
Recorded = tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8], npt.NDArray[np.int32]]
"""Tokens, what they are, and the first token of the conversation that each belongs to."""


@dataclass(frozen=True, slots=True)
class Script:
    """What a conversation consists of, as token ids.

    prompts: given prompts, each up to where the answer begins; empty: the model writes the user's turn.
    before, ends, header: around a turn that the model writes: what precedes it, what ends it, and what the
    template puts between it and the answer (from the end token on). answer_ends: what ends an answer.
    """

    prompts: tuple[tuple[int, ...], ...]
    before: tuple[int, ...]
    ends: tuple[int, ...]
    header: tuple[int, ...]
    answer_ends: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Pace:
    """How tokens are drawn: temperatures of user turns and of sampled answers, share of greedy answers, and
    tokens of a user turn at most."""

    turn_temperature: float
    answer_temperature: float
    greedy_share: float
    turn_tokens: int


@dataclass(frozen=True, slots=True)
class Finished:
    """A conversation: ids int64, where its answer begins, whether it is greedy."""

    ids: npt.NDArray[np.int64]
    labels_from: int
    greedy: bool


class ResidentTalk:
    """Runs a script over all rows until told to stop, or until its prompts are used up.

    On a CUDA device the step is captured once as a graph. The outcome is a function of the device's seed
    (`torch.manual_seed`), the script and the number of rows.

    Raises ValueError for a prompt that leaves no room for an answer.
    """

    def __init__(self, weights: LlamaWeights, script: Script, pace: Pace, rows: int, length: int) -> None:
        texts = script.prompts or (script.before,)
        longest = max(map(len, texts))
        if longest + 1 >= length:
            raise ValueError(f"a prompt of {longest} tokens leaves no room in {length}")
        self.device = weights.embed.device
        self._decoder = ResidentDecoder(weights, rows, length)
        self._script, self._pace, self.rows, self._length = script, pace, rows, length
        self._shared = _common_prefix(texts)
        table = np.zeros((len(texts), longest), dtype=np.int32)
        for row, text in enumerate(texts):
            table[row, : len(text)] = text
        self._texts = torch.from_numpy(table).to(self.device)
        self._text_lengths = torch.tensor([len(t) for t in texts], device=self.device)
        self._header = torch.tensor(script.header, device=self.device)
        self._ends = torch.tensor(script.ends, device=self.device)
        self._answer_ends = torch.tensor(script.answer_ends, device=self.device)
        self._records = [
            torch.zeros(RECORDED_STEPS, rows, dtype=kind, device=self.device)
            for kind in (torch.int32, torch.uint8, torch.int32)
        ]
        self._at = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._begin()
        self._graph: torch.cuda.CUDAGraph | None = None

    def _begin(self) -> None:
        """Every row at the first token of its first text."""
        rows, device = self.rows, self.device
        numbers = torch.arange(rows, device=device)
        self._text = numbers if self._script.prompts else torch.zeros_like(numbers)
        self._next = torch.full((1,), rows, device=device)
        self._token = self._texts[self._text.clamp(max=len(self._texts) - 1), 0].long()
        self._position = torch.zeros_like(numbers)
        self._header_at = torch.full_like(numbers, -1)
        self._answering = torch.full((rows,), bool(self._script.prompts), device=device)
        self._greedy = torch.rand(rows, device=device) < self._pace.greedy_share

    @torch.inference_mode()
    def start(self) -> None:
        """Run what all texts begin with, so that a row that begins anew finds it in its KV."""
        for _ in range(self._shared - 1):
            self._advance()
        if self.device.type == "cuda":
            self._graph = self._capture()
        self._at.zero_()

    def _capture(self) -> torch.cuda.CUDAGraph:
        """The step as a graph. Capturing changes no state: it runs nothing."""
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._advance()
        return graph

    @torch.inference_mode()
    def record(self) -> Recorded:
        """Run `RECORDED_STEPS` steps: [steps, rows] each."""
        self._at.zero_()
        for _ in range(RECORDED_STEPS):
            if self._graph is not None:
                self._graph.replay()
            else:
                self._advance()
        tokens, kinds, firsts = (record.cpu().numpy() for record in self._records)
        # On a CPU these are the buffers themselves.
        return tokens.copy(), kinds.copy(), firsts.copy()

    @property
    def prefix(self) -> npt.NDArray[np.int64]:
        """The ids between a conversation's first one and what is recorded of it: the same for all."""
        text = (self._script.prompts or (self._script.before,))[0]
        return np.array(text[1 : self._shared], dtype=np.int64)

    def _advance(self) -> None:
        """One token a row. Everything is written in place: a graph's tensors stay where they are."""
        drawn = self._draw(self._decoder.step(self._token, self._position))
        following = self._position + 1
        text = self._text.clamp(max=len(self._texts) - 1)
        idle = self._text >= len(self._texts)
        scripted = following < self._text_lengths[text]
        heading = self._header_at >= 0
        free = ~scripted & ~heading & ~idle
        turn_ends = free & ~self._answering & torch.isin(drawn, self._ends)
        forced = self._texts[text, following.clamp(max=self._texts.shape[1] - 1)].long()
        token = torch.where(scripted, forced, torch.where(heading, self._header[self._header_at], drawn))
        token = torch.where(turn_ends, self._header[0], token)
        label = free & self._answering
        full = following == self._length - 1
        last = label & (full | torch.isin(drawn, self._answer_ends))
        written = following - len(self._script.before) + 1
        too_long = free & ~self._answering & ~turn_ends & (written >= self._pace.turn_tokens)
        dropped = ~idle & (too_long | (full & ~label))
        kind = torch.where(idle, NOTHING, GIVEN + label.long())
        self._record(token, kind, last, dropped, self._texts[text, 0])

        header_at = torch.where(heading, self._header_at + 1, torch.where(turn_ends, 1, -1))
        headed = header_at == len(self._header)
        again = last | dropped
        self._header_at.copy_(torch.where(headed | again, -1, header_at))
        # Prompts are dealt out one after another; rows that get none wait.
        if self._script.prompts:
            dealt = torch.cumsum(again, dim=0)
            self._text.copy_(torch.where(again, self._next + dealt - 1, self._text))
            self._next.add_(dealt[-1])
        first = self._texts[self._text.clamp(max=len(self._texts) - 1), self._shared - 1].long()
        self._token.copy_(torch.where(again, first, torch.where(idle, self._token, token)))
        start = self._shared - 1
        self._position.copy_(torch.where(again, start, torch.where(idle, self._position, following)))
        answering = (self._answering | headed) & ~again | bool(self._script.prompts)
        self._answering.copy_(answering)
        greedy = torch.rand(self.rows, device=self.device) < self._pace.greedy_share
        self._greedy.copy_(torch.where(again, greedy, self._greedy))

    def _draw(self, logits: Tensor) -> Tensor:
        """int64 [rows]: the likeliest token, or one drawn (Gumbel-max), at each row's temperature."""
        pace = self._pace
        answer = torch.where(self._greedy, 0.0, pace.answer_temperature)
        temperature = torch.where(self._answering, answer, pace.turn_temperature)
        noise = torch.empty(logits.shape, dtype=torch.float32, device=self.device).exponential_()
        return noise.clamp_(min=_TINY).log_().mul_(-temperature[:, None]).add_(logits).argmax(dim=-1)

    def _record(self, token: Tensor, kind: Tensor, last: Tensor, dropped: Tensor, first: Tensor) -> None:
        kind = torch.where(last, LAST, torch.where(dropped, DROPPED, kind))
        kind = torch.where(kind == NOTHING, kind, kind + GREEDY * self._greedy.long())
        at = self._at % RECORDED_STEPS
        for buffer, values in zip(self._records, (token, kind, first), strict=True):
            buffer.index_copy_(0, at, values[None].to(buffer.dtype))
        self._at.add_(1)


class Assembler:
    """Cuts what rows recorded into conversations.

    Args:
        prefix: int64 ids between the first id of each and what is recorded of it.
    """

    def __init__(self, rows: int, prefix: npt.NDArray[np.int64]) -> None:
        self._prefix = prefix
        self._open: list[list[Recorded]] = [[] for _ in range(rows)]

    def add(self, recorded: Recorded) -> list[Finished]:
        """Conversations that end within these steps ([steps, rows] each), row by row."""
        finished: list[Finished] = []
        tokens, kinds, firsts = recorded
        what = kinds % GREEDY
        ends = (what == LAST) | (what == DROPPED)
        for row, parts in enumerate(self._open):
            start = 0
            for end in np.flatnonzero(ends[:, row]).tolist():
                here = slice(start, end + 1)
                parts.append((tokens[here, row], kinds[here, row], firsts[here, row]))
                if what[end, row] == LAST:
                    finished.append(self._join(parts))
                parts.clear()
                start = end + 1
            if start < len(tokens) and kinds[-1, row] != NOTHING:
                parts.append((tokens[start:, row], kinds[start:, row], firsts[start:, row]))
        return finished

    def _join(self, parts: Sequence[Recorded]) -> Finished:
        tokens, kinds, firsts = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        what = kinds % GREEDY
        given = int(np.count_nonzero(what == GIVEN))
        ids = np.concatenate((firsts[:1], self._prefix, tokens), dtype=np.int64)
        return Finished(ids, 1 + len(self._prefix) + given, bool(kinds[-1] >= GREEDY))


def talk(run: ResidentTalk, wanted: int) -> Iterator[tuple[list[Finished], int]]:
    """The first `wanted` conversations that end, as they do, and the number of tokens that were run for them.
    Ends early when all given prompts are answered."""
    run.start()
    assembler = Assembler(run.rows, run.prefix)
    while wanted > 0:
        recorded = run.record()
        kinds = recorded[1]
        made = assembler.add(recorded)[:wanted]
        wanted -= len(made)
        yield made, int(np.count_nonzero(kinds))
        if not kinds[-1].any():
            return


def _common_prefix(texts: Sequence[Sequence[int]]) -> int:
    """How many ids all texts begin with, less than the shortest unless there is one text; at least 1, though
    the first may differ: a row is given it."""
    if len(texts) == 1:
        return len(texts[0])
    shortest = min(map(len, texts))
    table = np.array([text[: shortest - 1] for text in texts])
    differs = np.flatnonzero((table != table[0]).any(axis=0))
    return max(1, int(differs[0]) if len(differs) else shortest - 1)
