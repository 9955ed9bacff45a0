"""Stop strings, against a naive search of the whole text."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.text.stop_strings import StopStringMatcher

letters = st.sampled_from("aab")
texts = st.text(letters, max_size=30)
stop_lists = st.lists(st.text(letters, min_size=1, max_size=5), max_size=4)


def naive(text: str, stops: list[str], first_end: int = 0) -> tuple[str, str | None]:
    """Cut at the match that completes first (after `first_end` characters at the earliest)."""
    for end in range(first_end + 1, len(text) + 1):
        done = [s for s in stops if text[:end].endswith(s)]
        if done:
            stop = max(done, key=len)
            return text[: end - len(stop)], stop
    return text, None


def stream(parts: list[str], stops: list[str], inactive_parts: int = 0) -> tuple[list[str], str | None]:
    matcher = StopStringMatcher(stops)
    shown = []
    for number, part in enumerate(parts):
        text, stop = matcher.feed(part, active=number >= inactive_parts)
        shown.append(text)
        if stop is not None:
            return shown, stop
    return [*shown, matcher.flush()], None


def split(text: str, cuts: list[int]) -> list[str]:
    bounds = [0, *sorted(c % (len(text) + 1) for c in cuts), len(text)]
    return [text[a:b] for a, b in pairwise(bounds)]


@settings(deadline=None)
@given(text=texts, stops=stop_lists, cuts=st.lists(st.integers(0, 40), max_size=10))
def test_equals_the_naive_search_for_every_split(text: str, stops: list[str], cuts: list[int]) -> None:
    shown, stop = stream(split(text, cuts), stops)
    assert ("".join(shown), stop) == naive(text, stops)


@settings(deadline=None)
@given(
    text=texts, stops=stop_lists, cuts=st.lists(st.integers(0, 40), max_size=6), inactive=st.integers(0, 7)
)
def test_inactive_parts_do_not_match(text: str, stops: list[str], cuts: list[int], inactive: int) -> None:
    parts = split(text, cuts)
    shown, stop = stream(parts, stops, inactive)
    assert ("".join(shown), stop) == naive(text, stops, len("".join(parts[:inactive])))


@settings(deadline=None)
@given(text=texts, stops=stop_lists)
def test_shows_all_that_is_decided(text: str, stops: list[str]) -> None:
    """After every character: shown text is a prefix of the result, and what is held could begin a stop."""
    matcher = StopStringMatcher(stops)
    result, _ = naive(text, stops)
    shown = ""
    for char in text:
        delta, stop = matcher.feed(char)
        shown += delta
        assert result.startswith(shown)
        if stop is not None:
            break
        assert not matcher.held or any(s.startswith(matcher.held) and s != matcher.held for s in stops)


def test_without_stops_nothing_is_held() -> None:
    matcher = StopStringMatcher([])
    assert matcher.feed("abc") == ("abc", None)
    assert matcher.flush() == ""


def test_an_inactive_match_is_shown_at_once() -> None:
    matcher = StopStringMatcher(["abc", "bca"])
    assert matcher.feed("abc", active=False) == ("a", None)  # "bc" may still begin "bca"
    assert matcher.feed("b") == ("bc", None)
    assert matcher.held == "b"
    assert StopStringMatcher(["xy"]).feed("xy", active=False) == ("xy", None)


def test_the_longest_of_those_that_complete_together_wins() -> None:
    assert stream(list("x</s>"), [">", "</s>"]) == (["x", "", "", "", ""], "</s>")


def test_empty_stop_strings_are_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopStringMatcher(["a", ""])
