"""Request bodies of the OpenAI-compatible API. Unknown fields and wrong types are refused by name.

Validation is strict (no "5" for 5). What a field's value may be is said in one place, by
`actors.sampling.params`; here only its type and OpenAI's own rules are checked.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from cluster.gateway.errors import REFUSED_FIELDS

MAX_CHOICES = 128
MAX_PROMPTS = 512
MAX_STOPS = 16
MAX_BAD_WORDS = 128
MAX_MESSAGES = 4096
MAX_TOKEN_ID = 2**31 - 1
_NULL_MESSAGE_FIELDS = frozenset(
    {"refusal", "annotations", "audio", "function_call", "tool_calls", "name", "reasoning_content"}
)


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        """An explicit null for a field that is refused asks for nothing."""
        if not isinstance(data, dict):
            return data
        return {k: v for k, v in data.items() if v is not None or k not in REFUSED_FIELDS}


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _text(value: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("is not valid Unicode (lone surrogate)") from error
    return value


def _token_ids(value: list[Any]) -> tuple[int, ...]:
    if not value:
        raise ValueError("must not be empty")
    if not all(_is_int(v) and 0 <= v <= MAX_TOKEN_ID for v in value):
        raise ValueError("token ids must be non-negative integers")
    return tuple(value)


def _prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    """Text, token ids, or a list of either; always returns a tuple of prompts."""
    if isinstance(value, str):
        return (_text(value),)
    if not isinstance(value, list) or not value:
        raise ValueError("must be a string, a list of token ids, or a non-empty list of either")
    if _is_int(value[0]):
        return (_token_ids(value),)
    if len(value) > MAX_PROMPTS:
        raise ValueError(f"must hold at most {MAX_PROMPTS} prompts")
    prompts: list[str | tuple[int, ...]] = []
    for item in value:
        if isinstance(item, str):
            prompts.append(_text(item))
        elif isinstance(item, list):
            prompts.append(_token_ids(item))
        else:
            raise ValueError("must be a string, a list of token ids, or a non-empty list of either")
    return tuple(prompts)


def _stops(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(s, str) for s in stops):
        raise ValueError("must be a string or a list of strings")
    if len(stops) > MAX_STOPS:
        raise ValueError(f"must hold at most {MAX_STOPS} strings")
    if not all(stops):
        raise ValueError("must not hold empty strings")
    return tuple(_text(s) for s in stops)


def _bad_words(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(w, str) for w in value):
        raise ValueError("must be a list of strings")
    if len(value) > MAX_BAD_WORDS:
        raise ValueError(f"must hold at most {MAX_BAD_WORDS} strings")
    if not all(word.strip() for word in value):
        raise ValueError("must not hold blank strings")
    return tuple(_text(word) for word in value)


def _logit_bias(value: Any) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError("must map token ids to numbers")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if not (isinstance(key, str) and key.isascii() and key.isdigit() and int(key) <= MAX_TOKEN_ID):
            raise ValueError("keys must be token ids")
        if isinstance(bias, bool) or not isinstance(bias, int | float):
            raise ValueError("values must be numbers")
        try:
            biases[int(key)] = float(bias)
        except OverflowError as error:  # JSON's integers have any size
            raise ValueError("values are too large") from error
    return biases


def _content(value: Any) -> str:
    if isinstance(value, str):
        return _text(value)
    if not isinstance(value, list) or not value:
        raise ValueError("must be a string or a non-empty list of text parts")
    texts: list[str] = []
    for part in value:
        if not isinstance(part, dict) or set(part) != {"type", "text"} or part["type"] != "text":
            raise ValueError('parts must have the form {"type": "text", "text": "..."}')
        if not isinstance(part["text"], str):
            raise ValueError("text of a part must be a string")
        texts.append(_text(part["text"]))
    return "\n".join(texts)


Prompts = Annotated[tuple[str | tuple[int, ...], ...], BeforeValidator(_prompts), Field(strict=False)]
Stops = Annotated[tuple[str, ...], BeforeValidator(_stops), Field(strict=False)]
BadWords = Annotated[tuple[str, ...], BeforeValidator(_bad_words), Field(strict=False)]
LogitBias = Annotated[dict[int, float], BeforeValidator(_logit_bias), Field(strict=False)]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]


class MessageBody(Body):
    """One chat message. `developer` is OpenAI's newer name of `system`. Text parts join with a newline."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_content)]

    @model_validator(mode="before")
    @classmethod
    def _echoed_nulls(cls, data: Any) -> Any:
        """Clients send an answer's message back with its null fields."""
        if not isinstance(data, dict):
            return data
        return {k: v for k, v in data.items() if v is not None or k not in _NULL_MESSAGE_FIELDS}


class StreamOptions(Body):
    """`continuous_usage_stats` is vLLM's: usage so far in every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None

    @field_validator("include_obfuscation")
    @classmethod
    def _nothing_is_obfuscated(cls, include_obfuscation: bool | None) -> bool | None:
        if include_obfuscation:
            raise ValueError("obfuscation is not supported")
        return include_obfuscation


class JsonSchemaBody(Body):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """`strict: false` is enforced like true: the output always follows the schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaBody | None = None

    @model_validator(mode="after")
    def _schema_belongs(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema is required by, and only allowed with, type json_schema")
        return self


class StructuredOutputs(Body):
    """vLLM's field: exactly one of these. `grammar` is in Lark's notation."""

    json_: dict[str, Any] | str | bool | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = Field(None, min_length=1)
    grammar: str | None = None
    json_object: bool | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> StructuredOutputs:
        given = [v for v in (self.json_, self.regex, self.choice, self.grammar) if v is not None]
        if len(given) + bool(self.json_object) != 1:
            raise ValueError("exactly one of json, regex, choice, grammar and json_object is required")
        return self


class SpeculationBody(Body):
    enabled: bool | None = None
    max_draft_tokens: int | None = None
    force: bool | None = None
    drafter: str | None = Field(None, min_length=1)
    exit_depth: int | None = None
    verification: str | None = None
    tree: bool | None = None


class SamplingBody(Body):
    """What chat and plain completions share."""

    model: str = Field(min_length=1)
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: Stops = ()
    stop_token_ids: list[TokenId] | None = Field(None, max_length=64)
    include_stop_str_in_output: bool | None = None
    bad_words: BadWords = ()
    allowed_token_ids: list[TokenId] | None = Field(None, min_length=1)
    ignore_eos: bool | None = None
    logit_bias: LogitBias = Field(default_factory=dict)
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    prompt_logprobs: int | None = None
    return_token_ids: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    speculation: SpeculationBody | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: Literal["auto", "default"] | None = None

    @field_validator("store")
    @classmethod
    def _nothing_is_stored(cls, store: bool | None) -> bool | None:
        if store:
            raise ValueError("storing completions is not supported")
        return store

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> SamplingBody:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed when stream is true")
        return self

    @property
    def choices(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)


class ChatBody(SamplingBody):
    """POST /v1/chat/completions."""

    messages: list[MessageBody] = Field(min_length=1, max_length=MAX_MESSAGES)
    logprobs: bool | None = None
    top_logprobs: int | None = None
    modalities: list[str] | None = None

    @field_validator("modalities")
    @classmethod
    def _text_only(cls, modalities: list[str] | None) -> list[str] | None:
        if modalities not in (None, ["text"]):
            raise ValueError('only ["text"] is supported')
        return modalities


class CompletionBody(SamplingBody):
    """POST /v1/completions."""

    prompt: Prompts
    logprobs: int | None = None
    echo: bool | None = None


class TokenizeBody(Body):
    """POST /tokenize: a prompt, or messages rendered with the model's chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: list[MessageBody] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    add_special_tokens: bool = True
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def _exactly_one(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("exactly one of prompt and messages is required")
        return self


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[TokenId]
