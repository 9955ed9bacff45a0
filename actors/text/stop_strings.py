"""Cut a streamed text at its first stop string, without ever showing a part of one."""

from __future__ import annotations

from collections.abc import Sequence


class _Automaton:
    """Knuth, Morris and Pratt 1977: `length` is the longest suffix of the text that begins `stop`."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.length = 0
        self._fail = [0] * (len(stop) + 1)
        k = 0
        for i in range(1, len(stop)):
            while k and stop[i] != stop[k]:
                k = self._fail[k]
            k += stop[i] == stop[k]
            self._fail[i + 1] = k

    def advance(self, char: str) -> bool:
        """True when `stop` ends with this character."""
        k = self.length
        if k == len(self.stop):
            k = self._fail[k]
        while k and self.stop[k] != char:
            k = self._fail[k]
        self.length = k + (self.stop[k] == char)
        return self.length == len(self.stop)

    @property
    def undecided(self) -> int:
        """Characters at the end of the text that may still become part of a match."""
        return self._fail[self.length] if self.length == len(self.stop) else self.length


class StopStringMatcher:
    """Streaming search for the first of several stop strings.

    The first match is the one that completes first; of several completing together, the longest. The text is
    cut before it. This does not depend on how the text is split into `feed` calls. Text that may be the
    beginning of a stop string is held back until that is decided.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not stop for stop in stops):
            raise ValueError("stop strings must not be empty")
        self._automata = [_Automaton(stop) for stop in dict.fromkeys(stops)]
        self._held = ""

    @property
    def held(self) -> str:
        """Text held back: a proper beginning of a stop string."""
        return self._held

    def feed(self, text: str, active: bool = True) -> tuple[str, str | None]:
        """Add text, get the text that may be shown and the stop string that ended it, if any.

        With `active` false, stop strings that complete inside `text` are not matches (min_tokens); ones that
        begin in it still count when they complete later. After a match nothing may be fed.
        """
        if not self._automata or not text:
            return text, None
        buffer = self._held + text
        for index, char in enumerate(text):
            done = [a.stop for a in self._automata if a.advance(char)]
            if done and active:
                stop = max(done, key=len)
                end = len(self._held) + index + 1
                self._held = ""
                return buffer[: end - len(stop)], stop
        keep = max(a.undecided for a in self._automata)
        cut = len(buffer) - keep
        self._held = buffer[cut:]
        return buffer[:cut], None

    def flush(self) -> str:
        """The held text, when the text has ended without a match."""
        text, self._held = self._held, ""
        return text
