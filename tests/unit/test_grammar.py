"""Grammars: what may follow, where a block ends, and what is refused."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher

from actors.sampling.grammar import GrammarCompiler, GrammarError, GrammarMatcher
from actors.sampling.params import GrammarSpec, ParameterError
from tests.toy import toy_tokenizer

TOKENIZER = toy_tokenizer()
VOCAB = len(TOKENIZER) + 13
EOS = (0, 1)
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"x": {"type": "integer"}, "ok": {"type": "boolean"}},
        "required": ["x", "ok"],
        "additionalProperties": False,
    }
)


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(TOKENIZER, VOCAB, EOS)


def ids(text: str) -> list[int]:
    encoded: list[int] = TOKENIZER.encode(text, add_special_tokens=False)
    return encoded


def allowed(matcher: GrammarMatcher) -> list[int]:
    found: list[int] = matcher.mask().nonzero().flatten().tolist()
    return found


@pytest.mark.parametrize(
    "text",
    [
        '{"x": 1, "ok": true}',
        '{"x":-12,"ok":false}',
        '{\n  "x": 1,\n  "ok": true\n}',
        '{ "x" : 0 , "ok" : true }',
    ],
)
def test_schema_accepts_valid_json_and_then_only_end_ids(compiler: GrammarCompiler, text: str) -> None:
    matcher = compiler.compile(GrammarSpec("json_schema", SCHEMA))
    tokens = ids(text)
    assert matcher.admissible(tokens) == len(tokens)
    for token in tokens:
        assert not matcher.finished
        mask = matcher.mask()
        assert mask.shape == (VOCAB,)
        assert mask.dtype == torch.bool
        assert bool(mask[token])
        assert not bool(mask[list(EOS)].any())
        matcher.advance(token)
    assert matcher.finished
    assert allowed(matcher) == list(EOS)


def test_padding_ids_are_never_allowed(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(GrammarSpec("regex", "(?s:.*)"))
    mask = matcher.mask()
    assert int(mask.sum()) > 100
    assert not bool(mask[len(TOKENIZER) :].any())
    assert matcher.admissible([VOCAB - 1]) == 0
    with pytest.raises(GrammarError):
        matcher.advance(VOCAB - 1)


def test_a_wrong_draft_ends_the_block(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(GrammarSpec("json_schema", SCHEMA))
    good, wrong = ids('{"x": 1'), ids("fox")
    assert matcher.admissible(good + wrong) == len(good)
    assert matcher.admissible(wrong) == 0
    assert matcher.admissible([]) == 0
    assert matcher.admissible(good) == len(good)


def test_end_ids_in_drafts(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(GrammarSpec("regex", "ab?"))
    a, b = ids("a"), ids("b")
    assert matcher.admissible([EOS[0]]) == 0
    assert matcher.admissible([*a, EOS[1]]) == 2
    assert matcher.admissible([*a, EOS[1], *b]) == 2
    assert matcher.admissible([*a, *b, EOS[0], EOS[1], *a]) == 4
    assert matcher.admissible([*a, *a]) == 1
    matcher.advance(a[0])
    assert sorted(allowed(matcher)) == sorted([*EOS, *b])
    assert not matcher.finished


def test_rollback_over_end_ids(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(GrammarSpec("regex", "ab?"))
    start = allowed(matcher)
    for token in (*ids("a"), *ids("b"), EOS[1], EOS[0]):
        matcher.advance(token)
    assert matcher.finished
    assert allowed(matcher) == list(EOS)
    matcher.rollback(3)
    assert sorted(allowed(matcher)) == sorted([*EOS, *ids("b")])
    matcher.rollback(1)
    assert allowed(matcher) == start
    with pytest.raises(GrammarError):
        matcher.rollback(1)


def test_a_refused_token_leaves_the_state(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(GrammarSpec("json_object"))
    before = allowed(matcher)
    for token in (ids("x")[0], EOS[0], VOCAB + 5):
        with pytest.raises(GrammarError):
            matcher.advance(token)
    assert allowed(matcher) == before
    matcher.advance(ids("{")[0])


def test_whitespace_between_json_tokens_is_bounded(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(GrammarSpec("json_object"))
    matcher.advance(ids("{")[0])
    newline, space = ids("\n")[0], ids(" ")[0]
    steps = 0
    for token in (newline, *[space] * 200):
        if not bool(matcher.mask()[token]):
            break
        matcher.advance(token)
        steps += 1
    assert 2 < steps <= 33
    assert bool(matcher.mask().any())


def test_json_object_refuses_other_values(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(GrammarSpec("json_object"))
    for text in ("[", "1", '"', "true", " ", "\n"):
        assert matcher.admissible(ids(text)) == 0, text


@pytest.mark.parametrize(
    ("spec", "needle"),
    [
        (GrammarSpec("json_schema", '{"type": "foo"}'), "Invalid type"),
        (GrammarSpec("json_schema", "{nope"), "not JSON"),
        (GrammarSpec("json_schema", "[1]"), "object or a boolean"),
        (GrammarSpec("json_schema", '{"properties": {"a": {"$ref": "#/gone"}}}'), "/gone"),
        (GrammarSpec("json_schema", '{"type": "string", "format": "idn-hostname"}'), "idn-hostname"),
        (
            GrammarSpec(
                "json_schema", '{"x-guidance": {"lenient": true}, "type": "string", "format": "idn-hostname"}'
            ),
            "idn-hostname",
        ),
        (GrammarSpec("json_schema", '{"type": "object", "dependentSchemas": {}}'), "dependentSchemas"),
        (GrammarSpec("regex", "(a"), "unclosed group"),
        (GrammarSpec("lark", "start: missing"), "missing"),
        (GrammarSpec("json_schema", "[" * 100_000), "nested too deeply"),
        (GrammarSpec("json_schema", '{"not":' * 3000 + "{}" + "}" * 3000), "nested too deeply"),
        (GrammarSpec("json_schema", '{"const": "\ud800"}'), "Unicode"),
        (GrammarSpec("regex", "(a|\ud800)"), "Unicode"),
        (GrammarSpec("lark", 'start: "\udc00"'), "Unicode"),
    ],
)
def test_invalid_grammars_are_named(compiler: GrammarCompiler, spec: GrammarSpec, needle: str) -> None:
    with pytest.raises(ParameterError, match=needle) as caught:
        compiler.compile(spec)
    assert caught.value.param == "response_format"
    assert "<state>" not in str(caught.value)


def test_a_grammar_that_explodes_is_stopped(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(GrammarSpec("lark", 'start: a\na: a a | "a" | "b" | a a a\n'))

    def write(count: int) -> None:
        for _ in range(count):
            matcher.mask()
            matcher.advance(ids("a")[0])

    with pytest.raises(GrammarError, match="items"):
        write(500)
    with pytest.raises(GrammarError, match="items"):  # and stays stopped
        matcher.mask()


def test_a_schema_too_large_from_the_start_is_refused(compiler: GrammarCompiler) -> None:
    schema = {"type": "object", "properties": {f"p{i}": {"type": ["string", "null"]} for i in range(1000)}}
    with pytest.raises(ParameterError, match="items") as caught:
        compiler.compile(GrammarSpec("json_schema", json.dumps(schema)))
    assert caught.value.param == "response_format"


def test_lark_grammars(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(GrammarSpec("lark", 'start: "yes" | "no"'))
    assert matcher.admissible(ids("yes")) == len(ids("yes"))
    assert matcher.admissible(ids("maybe")) == 0


def test_matchers_of_one_grammar_are_independent_and_the_cache_is_bounded() -> None:
    compiler = GrammarCompiler(TOKENIZER, VOCAB, EOS[0], cache_size=2)
    first = compiler.compile(GrammarSpec("regex", "ab"))
    second = compiler.compile(GrammarSpec("regex", "ab"))
    first.advance(ids("a")[0])
    assert allowed(first) == ids("b")
    assert set(ids("a")) <= set(allowed(second))
    for text in ("x", "y", "z"):
        compiler.compile(GrammarSpec("regex", text))
    assert len(compiler._cache) == 2


class HeldCompiler(GrammarCompiler):
    """A build whose text is not "free" waits until it is let through."""

    def __init__(self, cache_size: int = 64) -> None:
        super().__init__(TOKENIZER, VOCAB, EOS, cache_size)
        self.building = threading.Semaphore(0)
        """Builds that have begun."""
        self.let_through = threading.Event()
        self.built: list[str] = []

    def _build(self, spec: GrammarSpec) -> LLMatcher:
        self.built.append(spec.text)
        if spec.text != "free":
            self.building.release()
            assert self.let_through.wait(20.0)
        return super()._build(spec)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as threads:
        yield threads


@pytest.mark.timeout(60)
def test_a_grammar_that_is_known_waits_for_no_build(threads: ThreadPoolExecutor) -> None:
    compiler, free, held = HeldCompiler(), GrammarSpec("regex", "free"), GrammarSpec("regex", "held")
    assert not compiler.ready(free)
    compiler.compile(free)
    slow = threads.submit(compiler.compile, held)
    try:
        assert compiler.building.acquire(timeout=20.0)
        assert compiler.ready(free)
        assert not compiler.ready(held)
        assert threads.submit(compiler.compile, free).result(20.0).admissible(ids("free")) == len(ids("free"))
        assert not slow.done()
    finally:
        compiler.let_through.set()
    assert slow.result(20.0).admissible(ids("held")) == len(ids("held"))
    assert compiler.ready(held)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("text", ["held", "(held"])
def test_what_several_ask_for_is_built_once(threads: ThreadPoolExecutor, text: str) -> None:
    """And a refusal is told to all, but not kept."""
    compiler, spec = HeldCompiler(), GrammarSpec("regex", text)
    asked = [threads.submit(compiler.compile, spec)]
    try:
        assert compiler.building.acquire(timeout=20.0)
        waiting = threading.Semaphore(0)

        def ask() -> GrammarMatcher:
            waiting.release()
            return compiler.compile(spec)

        asked += [threads.submit(ask) for _ in range(3)]
        assert all(waiting.acquire(timeout=20.0) for _ in range(3))
        assert not compiler.building.acquire(timeout=0.1)
    finally:
        compiler.let_through.set()
    failed = [isinstance(future.exception(20.0), ParameterError) for future in asked]
    if text == "held":
        assert compiler.built == ["held"]
        assert not any(failed)
        first, second = asked[0].result(), asked[1].result()
        first.advance(ids("h")[0])
        assert second.admissible(ids("held")) == len(ids("held")), "matchers are independent"
    else:
        assert all(failed)
        assert not compiler._cache


def test_a_panic_of_the_library_refuses_the_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no Exception, and would end the thread that asks."""
    compiler, spec = GrammarCompiler(TOKENIZER, VOCAB, EOS), GrammarSpec("regex", "ab")
    monkeypatch.setattr(compiler, "_build", mock.Mock(side_effect=BaseException("panicked")))
    with pytest.raises(ParameterError, match="the regex could not be compiled"):
        compiler.compile(spec)
    failed: Future[LLMatcher] = Future()
    failed.set_exception(ParameterError("response_format", "no"))
    compiler._cache[spec] = failed  # as it is until who built it takes it out
    assert not compiler.ready(spec)


def test_refused_grammars_push_none_out_of_the_cache() -> None:
    compiler = GrammarCompiler(TOKENIZER, VOCAB, EOS, cache_size=1)
    compiler.compile(GrammarSpec("regex", "ab"))
    with pytest.raises(ParameterError):
        compiler.compile(GrammarSpec("regex", "(ab"))
    assert compiler.ready(GrammarSpec("regex", "ab"))


def test_a_model_without_end_ids_is_refused() -> None:
    with pytest.raises(ParameterError, match="end-of-sequence"):
        GrammarCompiler(TOKENIZER, VOCAB, [VOCAB + 1]).compile(GrammarSpec("json_object"))


COMPILER = GrammarCompiler(TOKENIZER, VOCAB, EOS)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_random_walks_agree_with_the_mask_and_roll_back(data: st.DataObject) -> None:
    matcher = COMPILER.compile(GrammarSpec("json_schema", SCHEMA))
    walk: list[int] = []
    masks = [allowed(matcher)]
    for _ in range(data.draw(st.integers(1, 12))):
        token = data.draw(st.sampled_from(masks[-1]))
        matcher.advance(token)
        walk.append(token)
        masks.append(allowed(matcher))
        assert masks[-1]
    back = data.draw(st.integers(1, len(walk)))
    matcher.rollback(back)
    kept = len(walk) - back
    assert allowed(matcher) == masks[kept]
    assert matcher.admissible(walk[kept:]) == back
    assert allowed(matcher) == masks[kept]
    wrong = next(token for token in range(VOCAB) if token not in set(masks[kept]))
    assert matcher.admissible([wrong]) == 0
