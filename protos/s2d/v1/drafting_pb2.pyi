from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ResetScope(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RESET_SCOPE_UNSPECIFIED: _ClassVar[ResetScope]
    RESET_SCOPE_ALL: _ClassVar[ResetScope]
    RESET_SCOPE_CACHES: _ClassVar[ResetScope]

class DraftError(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DRAFT_ERROR_UNSPECIFIED: _ClassVar[DraftError]
    DRAFT_ERROR_UNKNOWN_SESSION: _ClassVar[DraftError]
    DRAFT_ERROR_STALE_EPOCH: _ClassVar[DraftError]
    DRAFT_ERROR_CAPACITY: _ClassVar[DraftError]
    DRAFT_ERROR_UNSUPPORTED: _ClassVar[DraftError]
    DRAFT_ERROR_INTERNAL: _ClassVar[DraftError]
RESET_SCOPE_UNSPECIFIED: ResetScope
RESET_SCOPE_ALL: ResetScope
RESET_SCOPE_CACHES: ResetScope
DRAFT_ERROR_UNSPECIFIED: DraftError
DRAFT_ERROR_UNKNOWN_SESSION: DraftError
DRAFT_ERROR_STALE_EPOCH: DraftError
DRAFT_ERROR_CAPACITY: DraftError
DRAFT_ERROR_UNSUPPORTED: DraftError
DRAFT_ERROR_INTERNAL: DraftError

class Hello(_message.Message):
    __slots__ = ("target_id", "model", "vocab_size", "tokenizer_hash", "host", "cpus", "weight")
    TARGET_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_HASH_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    CPUS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    target_id: str
    model: str
    vocab_size: int
    tokenizer_hash: str
    host: str
    cpus: _containers.RepeatedScalarFieldContainer[int]
    weight: float
    def __init__(self, target_id: _Optional[str] = ..., model: _Optional[str] = ..., vocab_size: _Optional[int] = ..., tokenizer_hash: _Optional[str] = ..., host: _Optional[str] = ..., cpus: _Optional[_Iterable[int]] = ..., weight: _Optional[float] = ...) -> None: ...

class TokenizerChunk(_message.Message):
    __slots__ = ("tokenizer_hash", "vocab_size", "special_token_ids", "eos_token_ids", "data")
    TOKENIZER_HASH_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    SPECIAL_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    tokenizer_hash: str
    vocab_size: int
    special_token_ids: _containers.RepeatedScalarFieldContainer[int]
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    def __init__(self, tokenizer_hash: _Optional[str] = ..., vocab_size: _Optional[int] = ..., special_token_ids: _Optional[_Iterable[int]] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ...) -> None: ...

class TokenizerReceipt(_message.Message):
    __slots__ = ("shared_tokens", "draft_vocab_size")
    SHARED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DRAFT_VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    shared_tokens: int
    draft_vocab_size: int
    def __init__(self, shared_tokens: _Optional[int] = ..., draft_vocab_size: _Optional[int] = ...) -> None: ...

class DraftSampling(_message.Message):
    __slots__ = ("key", "temperature", "top_k", "top_p", "min_p", "rule")
    KEY_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    RULE_FIELD_NUMBER: _ClassVar[int]
    key: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    rule: str
    def __init__(self, key: _Optional[int] = ..., temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., rule: _Optional[str] = ...) -> None: ...

class SessionOpen(_message.Message):
    __slots__ = ("session_id", "token_ids", "prompt_len", "sampling", "epoch", "trees")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LEN_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TREES_FIELD_NUMBER: _ClassVar[int]
    session_id: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    prompt_len: int
    sampling: DraftSampling
    epoch: int
    trees: bool
    def __init__(self, session_id: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., prompt_len: _Optional[int] = ..., sampling: _Optional[_Union[DraftSampling, _Mapping]] = ..., epoch: _Optional[int] = ..., trees: _Optional[bool] = ...) -> None: ...

class Candidates(_message.Message):
    __slots__ = ("token_id", "next_ids")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    NEXT_IDS_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    next_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, token_id: _Optional[int] = ..., next_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class NestedWish(_message.Message):
    __slots__ = ("exit", "cap", "shadow_exit", "shadow_length")
    EXIT_FIELD_NUMBER: _ClassVar[int]
    CAP_FIELD_NUMBER: _ClassVar[int]
    SHADOW_EXIT_FIELD_NUMBER: _ClassVar[int]
    SHADOW_LENGTH_FIELD_NUMBER: _ClassVar[int]
    exit: int
    cap: int
    shadow_exit: int
    shadow_length: int
    def __init__(self, exit: _Optional[int] = ..., cap: _Optional[int] = ..., shadow_exit: _Optional[int] = ..., shadow_length: _Optional[int] = ...) -> None: ...

class SessionUpdate(_message.Message):
    __slots__ = ("session_id", "epoch", "new_token_ids", "drafted", "candidates", "budget", "drafter", "exit_depth", "nested", "chain")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NEW_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    DRAFTED_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    DRAFTER_FIELD_NUMBER: _ClassVar[int]
    EXIT_DEPTH_FIELD_NUMBER: _ClassVar[int]
    NESTED_FIELD_NUMBER: _ClassVar[int]
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    session_id: int
    epoch: int
    new_token_ids: _containers.RepeatedScalarFieldContainer[int]
    drafted: int
    candidates: _containers.RepeatedCompositeFieldContainer[Candidates]
    budget: int
    drafter: str
    exit_depth: int
    nested: NestedWish
    chain: bool
    def __init__(self, session_id: _Optional[int] = ..., epoch: _Optional[int] = ..., new_token_ids: _Optional[_Iterable[int]] = ..., drafted: _Optional[int] = ..., candidates: _Optional[_Iterable[_Union[Candidates, _Mapping]]] = ..., budget: _Optional[int] = ..., drafter: _Optional[str] = ..., exit_depth: _Optional[int] = ..., nested: _Optional[_Union[NestedWish, _Mapping]] = ..., chain: _Optional[bool] = ...) -> None: ...

class DraftRound(_message.Message):
    __slots__ = ("round_id", "hello", "opens", "closes", "updates", "deadline_us", "reset_shared_state")
    ROUND_ID_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    OPENS_FIELD_NUMBER: _ClassVar[int]
    CLOSES_FIELD_NUMBER: _ClassVar[int]
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_US_FIELD_NUMBER: _ClassVar[int]
    RESET_SHARED_STATE_FIELD_NUMBER: _ClassVar[int]
    round_id: int
    hello: Hello
    opens: _containers.RepeatedCompositeFieldContainer[SessionOpen]
    closes: _containers.RepeatedScalarFieldContainer[int]
    updates: _containers.RepeatedCompositeFieldContainer[SessionUpdate]
    deadline_us: int
    reset_shared_state: ResetScope
    def __init__(self, round_id: _Optional[int] = ..., hello: _Optional[_Union[Hello, _Mapping]] = ..., opens: _Optional[_Iterable[_Union[SessionOpen, _Mapping]]] = ..., closes: _Optional[_Iterable[int]] = ..., updates: _Optional[_Iterable[_Union[SessionUpdate, _Mapping]]] = ..., deadline_us: _Optional[int] = ..., reset_shared_state: _Optional[_Union[ResetScope, str]] = ...) -> None: ...

class DraftDistribution(_message.Message):
    __slots__ = ("token_ids", "probabilities")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PROBABILITIES_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    probabilities: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., probabilities: _Optional[_Iterable[float]] = ...) -> None: ...

class SessionDraft(_message.Message):
    __slots__ = ("session_id", "epoch", "token_ids", "parents", "drafter", "exit_depth", "confidence", "q", "error", "error_message", "sources")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PARENTS_FIELD_NUMBER: _ClassVar[int]
    DRAFTER_FIELD_NUMBER: _ClassVar[int]
    EXIT_DEPTH_FIELD_NUMBER: _ClassVar[int]
    CONFIDENCE_FIELD_NUMBER: _ClassVar[int]
    Q_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    ERROR_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    session_id: int
    epoch: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    parents: _containers.RepeatedScalarFieldContainer[int]
    drafter: str
    exit_depth: int
    confidence: _containers.RepeatedScalarFieldContainer[float]
    q: _containers.RepeatedCompositeFieldContainer[DraftDistribution]
    error: DraftError
    error_message: str
    sources: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, session_id: _Optional[int] = ..., epoch: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., parents: _Optional[_Iterable[int]] = ..., drafter: _Optional[str] = ..., exit_depth: _Optional[int] = ..., confidence: _Optional[_Iterable[float]] = ..., q: _Optional[_Iterable[_Union[DraftDistribution, _Mapping]]] = ..., error: _Optional[_Union[DraftError, str]] = ..., error_message: _Optional[str] = ..., sources: _Optional[_Iterable[str]] = ...) -> None: ...

class DraftReply(_message.Message):
    __slots__ = ("round_id", "incarnation", "drafts", "candidates_wanted", "drafters", "service_us", "shadows")
    ROUND_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    DRAFTS_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_WANTED_FIELD_NUMBER: _ClassVar[int]
    DRAFTERS_FIELD_NUMBER: _ClassVar[int]
    SERVICE_US_FIELD_NUMBER: _ClassVar[int]
    SHADOWS_FIELD_NUMBER: _ClassVar[int]
    round_id: int
    incarnation: str
    drafts: _containers.RepeatedCompositeFieldContainer[SessionDraft]
    candidates_wanted: int
    drafters: _containers.RepeatedScalarFieldContainer[str]
    service_us: int
    shadows: _containers.RepeatedCompositeFieldContainer[SessionDraft]
    def __init__(self, round_id: _Optional[int] = ..., incarnation: _Optional[str] = ..., drafts: _Optional[_Iterable[_Union[SessionDraft, _Mapping]]] = ..., candidates_wanted: _Optional[int] = ..., drafters: _Optional[_Iterable[str]] = ..., service_us: _Optional[int] = ..., shadows: _Optional[_Iterable[_Union[SessionDraft, _Mapping]]] = ...) -> None: ...

class GetDraftWorkerStateRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DraftWorkerState(_message.Message):
    __slots__ = ("worker_id", "incarnation", "sessions", "streams", "queued_rounds", "kv_blocks_used", "kv_blocks_free", "drafters", "exits", "rounds", "drafted_tokens", "ahead_foreseen", "ahead_partly", "ahead_missed", "ahead_steps")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    STREAMS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_ROUNDS_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_USED_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_FREE_FIELD_NUMBER: _ClassVar[int]
    DRAFTERS_FIELD_NUMBER: _ClassVar[int]
    EXITS_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    DRAFTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    AHEAD_FORESEEN_FIELD_NUMBER: _ClassVar[int]
    AHEAD_PARTLY_FIELD_NUMBER: _ClassVar[int]
    AHEAD_MISSED_FIELD_NUMBER: _ClassVar[int]
    AHEAD_STEPS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: str
    sessions: int
    streams: int
    queued_rounds: int
    kv_blocks_used: int
    kv_blocks_free: int
    drafters: _containers.RepeatedScalarFieldContainer[str]
    exits: _containers.RepeatedScalarFieldContainer[int]
    rounds: int
    drafted_tokens: int
    ahead_foreseen: int
    ahead_partly: int
    ahead_missed: int
    ahead_steps: int
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., sessions: _Optional[int] = ..., streams: _Optional[int] = ..., queued_rounds: _Optional[int] = ..., kv_blocks_used: _Optional[int] = ..., kv_blocks_free: _Optional[int] = ..., drafters: _Optional[_Iterable[str]] = ..., exits: _Optional[_Iterable[int]] = ..., rounds: _Optional[int] = ..., drafted_tokens: _Optional[int] = ..., ahead_foreseen: _Optional[int] = ..., ahead_partly: _Optional[int] = ..., ahead_missed: _Optional[int] = ..., ahead_steps: _Optional[int] = ...) -> None: ...
