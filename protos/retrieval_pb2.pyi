from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RetrieveRequest(_message.Message):
    __slots__ = ("query", "entity_type", "k", "filter", "exclude_ids", "min_score", "language", "country", "min_recall", "release_id", "embedding", "space_id", "diversity", "collapse_above", "exact", "attributes", "request_id", "fusion", "min_probability")
    QUERY_FIELD_NUMBER: _ClassVar[int]
    ENTITY_TYPE_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    FILTER_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_IDS_FIELD_NUMBER: _ClassVar[int]
    MIN_SCORE_FIELD_NUMBER: _ClassVar[int]
    LANGUAGE_FIELD_NUMBER: _ClassVar[int]
    COUNTRY_FIELD_NUMBER: _ClassVar[int]
    MIN_RECALL_FIELD_NUMBER: _ClassVar[int]
    RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_FIELD_NUMBER: _ClassVar[int]
    SPACE_ID_FIELD_NUMBER: _ClassVar[int]
    DIVERSITY_FIELD_NUMBER: _ClassVar[int]
    COLLAPSE_ABOVE_FIELD_NUMBER: _ClassVar[int]
    EXACT_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    FUSION_FIELD_NUMBER: _ClassVar[int]
    MIN_PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    query: str
    entity_type: str
    k: int
    filter: str
    exclude_ids: _containers.RepeatedScalarFieldContainer[str]
    min_score: float
    language: str
    country: str
    min_recall: float
    release_id: str
    embedding: bytes
    space_id: str
    diversity: float
    collapse_above: float
    exact: bool
    attributes: _containers.RepeatedScalarFieldContainer[str]
    request_id: str
    fusion: Fusion
    min_probability: float
    def __init__(self, query: _Optional[str] = ..., entity_type: _Optional[str] = ..., k: _Optional[int] = ..., filter: _Optional[str] = ..., exclude_ids: _Optional[_Iterable[str]] = ..., min_score: _Optional[float] = ..., language: _Optional[str] = ..., country: _Optional[str] = ..., min_recall: _Optional[float] = ..., release_id: _Optional[str] = ..., embedding: _Optional[bytes] = ..., space_id: _Optional[str] = ..., diversity: _Optional[float] = ..., collapse_above: _Optional[float] = ..., exact: _Optional[bool] = ..., attributes: _Optional[_Iterable[str]] = ..., request_id: _Optional[str] = ..., fusion: _Optional[_Union[Fusion, _Mapping]] = ..., min_probability: _Optional[float] = ...) -> None: ...

class Fusion(_message.Message):
    __slots__ = ("enabled", "weights", "gate")
    ENABLED_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    GATE_FIELD_NUMBER: _ClassVar[int]
    enabled: bool
    weights: _containers.RepeatedScalarFieldContainer[float]
    gate: bool
    def __init__(self, enabled: _Optional[bool] = ..., weights: _Optional[_Iterable[float]] = ..., gate: _Optional[bool] = ...) -> None: ...

class RetrieveResponse(_message.Message):
    __slots__ = ("hits", "release_id", "space_id", "cache_hit", "plan", "ef", "estimated_recall", "selectivity", "timings", "request_id", "query_space_id", "answer_cached", "legs", "unknown_share")
    HITS_FIELD_NUMBER: _ClassVar[int]
    RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    SPACE_ID_FIELD_NUMBER: _ClassVar[int]
    CACHE_HIT_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    EF_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_RECALL_FIELD_NUMBER: _ClassVar[int]
    SELECTIVITY_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    QUERY_SPACE_ID_FIELD_NUMBER: _ClassVar[int]
    ANSWER_CACHED_FIELD_NUMBER: _ClassVar[int]
    LEGS_FIELD_NUMBER: _ClassVar[int]
    UNKNOWN_SHARE_FIELD_NUMBER: _ClassVar[int]
    hits: _containers.RepeatedCompositeFieldContainer[Hit]
    release_id: str
    space_id: str
    cache_hit: bool
    plan: str
    ef: int
    estimated_recall: float
    selectivity: float
    timings: Timings
    request_id: str
    query_space_id: str
    answer_cached: bool
    legs: _containers.RepeatedScalarFieldContainer[str]
    unknown_share: float
    def __init__(self, hits: _Optional[_Iterable[_Union[Hit, _Mapping]]] = ..., release_id: _Optional[str] = ..., space_id: _Optional[str] = ..., cache_hit: _Optional[bool] = ..., plan: _Optional[str] = ..., ef: _Optional[int] = ..., estimated_recall: _Optional[float] = ..., selectivity: _Optional[float] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., request_id: _Optional[str] = ..., query_space_id: _Optional[str] = ..., answer_cached: _Optional[bool] = ..., legs: _Optional[_Iterable[str]] = ..., unknown_share: _Optional[float] = ...) -> None: ...

class Hit(_message.Message):
    __slots__ = ("id", "score", "attributes", "fused_score", "lexical_score", "vote_score", "probability")
    class AttributesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Value
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Value, _Mapping]] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    FUSED_SCORE_FIELD_NUMBER: _ClassVar[int]
    LEXICAL_SCORE_FIELD_NUMBER: _ClassVar[int]
    VOTE_SCORE_FIELD_NUMBER: _ClassVar[int]
    PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    id: str
    score: float
    attributes: _containers.MessageMap[str, Value]
    fused_score: float
    lexical_score: float
    vote_score: float
    probability: float
    def __init__(self, id: _Optional[str] = ..., score: _Optional[float] = ..., attributes: _Optional[_Mapping[str, Value]] = ..., fused_score: _Optional[float] = ..., lexical_score: _Optional[float] = ..., vote_score: _Optional[float] = ..., probability: _Optional[float] = ...) -> None: ...

class Value(_message.Message):
    __slots__ = ("string_value", "int_value", "double_value", "bool_value", "list_value")
    STRING_VALUE_FIELD_NUMBER: _ClassVar[int]
    INT_VALUE_FIELD_NUMBER: _ClassVar[int]
    DOUBLE_VALUE_FIELD_NUMBER: _ClassVar[int]
    BOOL_VALUE_FIELD_NUMBER: _ClassVar[int]
    LIST_VALUE_FIELD_NUMBER: _ClassVar[int]
    string_value: str
    int_value: int
    double_value: float
    bool_value: bool
    list_value: ValueList
    def __init__(self, string_value: _Optional[str] = ..., int_value: _Optional[int] = ..., double_value: _Optional[float] = ..., bool_value: _Optional[bool] = ..., list_value: _Optional[_Union[ValueList, _Mapping]] = ...) -> None: ...

class ValueList(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedCompositeFieldContainer[Value]
    def __init__(self, values: _Optional[_Iterable[_Union[Value, _Mapping]]] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("total_ns", "queue_ns", "encode_ns", "search_ns", "rerank_ns")
    TOTAL_NS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_NS_FIELD_NUMBER: _ClassVar[int]
    ENCODE_NS_FIELD_NUMBER: _ClassVar[int]
    SEARCH_NS_FIELD_NUMBER: _ClassVar[int]
    RERANK_NS_FIELD_NUMBER: _ClassVar[int]
    total_ns: int
    queue_ns: int
    encode_ns: int
    search_ns: int
    rerank_ns: int
    def __init__(self, total_ns: _Optional[int] = ..., queue_ns: _Optional[int] = ..., encode_ns: _Optional[int] = ..., search_ns: _Optional[int] = ..., rerank_ns: _Optional[int] = ...) -> None: ...

class Target(_message.Message):
    __slots__ = ("entity_type", "k", "filter", "exclude_ids", "min_score", "min_recall", "diversity", "collapse_above", "exact", "attributes", "fusion", "min_probability")
    ENTITY_TYPE_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    FILTER_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_IDS_FIELD_NUMBER: _ClassVar[int]
    MIN_SCORE_FIELD_NUMBER: _ClassVar[int]
    MIN_RECALL_FIELD_NUMBER: _ClassVar[int]
    DIVERSITY_FIELD_NUMBER: _ClassVar[int]
    COLLAPSE_ABOVE_FIELD_NUMBER: _ClassVar[int]
    EXACT_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    FUSION_FIELD_NUMBER: _ClassVar[int]
    MIN_PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    entity_type: str
    k: int
    filter: str
    exclude_ids: _containers.RepeatedScalarFieldContainer[str]
    min_score: float
    min_recall: float
    diversity: float
    collapse_above: float
    exact: bool
    attributes: _containers.RepeatedScalarFieldContainer[str]
    fusion: Fusion
    min_probability: float
    def __init__(self, entity_type: _Optional[str] = ..., k: _Optional[int] = ..., filter: _Optional[str] = ..., exclude_ids: _Optional[_Iterable[str]] = ..., min_score: _Optional[float] = ..., min_recall: _Optional[float] = ..., diversity: _Optional[float] = ..., collapse_above: _Optional[float] = ..., exact: _Optional[bool] = ..., attributes: _Optional[_Iterable[str]] = ..., fusion: _Optional[_Union[Fusion, _Mapping]] = ..., min_probability: _Optional[float] = ...) -> None: ...

class Answer(_message.Message):
    __slots__ = ("hits", "entity_type", "cache_hit", "plan", "ef", "estimated_recall", "selectivity", "search_ns", "answer_cached", "legs", "unknown_share")
    HITS_FIELD_NUMBER: _ClassVar[int]
    ENTITY_TYPE_FIELD_NUMBER: _ClassVar[int]
    CACHE_HIT_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    EF_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_RECALL_FIELD_NUMBER: _ClassVar[int]
    SELECTIVITY_FIELD_NUMBER: _ClassVar[int]
    SEARCH_NS_FIELD_NUMBER: _ClassVar[int]
    ANSWER_CACHED_FIELD_NUMBER: _ClassVar[int]
    LEGS_FIELD_NUMBER: _ClassVar[int]
    UNKNOWN_SHARE_FIELD_NUMBER: _ClassVar[int]
    hits: _containers.RepeatedCompositeFieldContainer[Hit]
    entity_type: str
    cache_hit: bool
    plan: str
    ef: int
    estimated_recall: float
    selectivity: float
    search_ns: int
    answer_cached: bool
    legs: _containers.RepeatedScalarFieldContainer[str]
    unknown_share: float
    def __init__(self, hits: _Optional[_Iterable[_Union[Hit, _Mapping]]] = ..., entity_type: _Optional[str] = ..., cache_hit: _Optional[bool] = ..., plan: _Optional[str] = ..., ef: _Optional[int] = ..., estimated_recall: _Optional[float] = ..., selectivity: _Optional[float] = ..., search_ns: _Optional[int] = ..., answer_cached: _Optional[bool] = ..., legs: _Optional[_Iterable[str]] = ..., unknown_share: _Optional[float] = ...) -> None: ...

class RetrieveMultiRequest(_message.Message):
    __slots__ = ("query", "embedding", "space_id", "targets", "release_id", "language", "country", "request_id")
    QUERY_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_FIELD_NUMBER: _ClassVar[int]
    SPACE_ID_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    LANGUAGE_FIELD_NUMBER: _ClassVar[int]
    COUNTRY_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    query: str
    embedding: bytes
    space_id: str
    targets: _containers.RepeatedCompositeFieldContainer[Target]
    release_id: str
    language: str
    country: str
    request_id: str
    def __init__(self, query: _Optional[str] = ..., embedding: _Optional[bytes] = ..., space_id: _Optional[str] = ..., targets: _Optional[_Iterable[_Union[Target, _Mapping]]] = ..., release_id: _Optional[str] = ..., language: _Optional[str] = ..., country: _Optional[str] = ..., request_id: _Optional[str] = ...) -> None: ...

class RetrieveMultiResponse(_message.Message):
    __slots__ = ("answers", "release_id", "space_id", "cache_hit", "timings", "request_id", "query_space_id", "unknown_share")
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    SPACE_ID_FIELD_NUMBER: _ClassVar[int]
    CACHE_HIT_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    QUERY_SPACE_ID_FIELD_NUMBER: _ClassVar[int]
    UNKNOWN_SHARE_FIELD_NUMBER: _ClassVar[int]
    answers: _containers.RepeatedCompositeFieldContainer[Answer]
    release_id: str
    space_id: str
    cache_hit: bool
    timings: Timings
    request_id: str
    query_space_id: str
    unknown_share: float
    def __init__(self, answers: _Optional[_Iterable[_Union[Answer, _Mapping]]] = ..., release_id: _Optional[str] = ..., space_id: _Optional[str] = ..., cache_hit: _Optional[bool] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., request_id: _Optional[str] = ..., query_space_id: _Optional[str] = ..., unknown_share: _Optional[float] = ...) -> None: ...

class RetrieveBatchRequest(_message.Message):
    __slots__ = ("queries", "embeddings", "space_id", "target", "release_id", "language", "country", "request_id")
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    SPACE_ID_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    LANGUAGE_FIELD_NUMBER: _ClassVar[int]
    COUNTRY_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    queries: _containers.RepeatedScalarFieldContainer[str]
    embeddings: bytes
    space_id: str
    target: Target
    release_id: str
    language: str
    country: str
    request_id: str
    def __init__(self, queries: _Optional[_Iterable[str]] = ..., embeddings: _Optional[bytes] = ..., space_id: _Optional[str] = ..., target: _Optional[_Union[Target, _Mapping]] = ..., release_id: _Optional[str] = ..., language: _Optional[str] = ..., country: _Optional[str] = ..., request_id: _Optional[str] = ...) -> None: ...

class RetrieveBatchResponse(_message.Message):
    __slots__ = ("answers", "release_id", "space_id", "timings", "request_id", "query_space_id")
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    SPACE_ID_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    QUERY_SPACE_ID_FIELD_NUMBER: _ClassVar[int]
    answers: _containers.RepeatedCompositeFieldContainer[Answer]
    release_id: str
    space_id: str
    timings: Timings
    request_id: str
    query_space_id: str
    def __init__(self, answers: _Optional[_Iterable[_Union[Answer, _Mapping]]] = ..., release_id: _Optional[str] = ..., space_id: _Optional[str] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., request_id: _Optional[str] = ..., query_space_id: _Optional[str] = ...) -> None: ...

class EmbedRequest(_message.Message):
    __slots__ = ("queries", "release_id")
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    queries: _containers.RepeatedScalarFieldContainer[str]
    release_id: str
    def __init__(self, queries: _Optional[_Iterable[str]] = ..., release_id: _Optional[str] = ...) -> None: ...

class EmbedResponse(_message.Message):
    __slots__ = ("embeddings", "dimension", "release_id", "space_id", "form_id", "cache_hits", "timings", "query_space_id")
    EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    DIMENSION_FIELD_NUMBER: _ClassVar[int]
    RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    SPACE_ID_FIELD_NUMBER: _ClassVar[int]
    FORM_ID_FIELD_NUMBER: _ClassVar[int]
    CACHE_HITS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    QUERY_SPACE_ID_FIELD_NUMBER: _ClassVar[int]
    embeddings: bytes
    dimension: int
    release_id: str
    space_id: str
    form_id: str
    cache_hits: _containers.RepeatedScalarFieldContainer[bool]
    timings: Timings
    query_space_id: str
    def __init__(self, embeddings: _Optional[bytes] = ..., dimension: _Optional[int] = ..., release_id: _Optional[str] = ..., space_id: _Optional[str] = ..., form_id: _Optional[str] = ..., cache_hits: _Optional[_Iterable[bool]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., query_space_id: _Optional[str] = ...) -> None: ...

class ScoreRequest(_message.Message):
    __slots__ = ("query", "embedding", "space_id", "entity_type", "ids", "release_id")
    QUERY_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_FIELD_NUMBER: _ClassVar[int]
    SPACE_ID_FIELD_NUMBER: _ClassVar[int]
    ENTITY_TYPE_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    query: str
    embedding: bytes
    space_id: str
    entity_type: str
    ids: _containers.RepeatedScalarFieldContainer[str]
    release_id: str
    def __init__(self, query: _Optional[str] = ..., embedding: _Optional[bytes] = ..., space_id: _Optional[str] = ..., entity_type: _Optional[str] = ..., ids: _Optional[_Iterable[str]] = ..., release_id: _Optional[str] = ...) -> None: ...

class ScoreResponse(_message.Message):
    __slots__ = ("scores", "missing", "release_id", "space_id", "cache_hit", "timings", "query_space_id")
    SCORES_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    SPACE_ID_FIELD_NUMBER: _ClassVar[int]
    CACHE_HIT_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    QUERY_SPACE_ID_FIELD_NUMBER: _ClassVar[int]
    scores: _containers.RepeatedScalarFieldContainer[float]
    missing: int
    release_id: str
    space_id: str
    cache_hit: bool
    timings: Timings
    query_space_id: str
    def __init__(self, scores: _Optional[_Iterable[float]] = ..., missing: _Optional[int] = ..., release_id: _Optional[str] = ..., space_id: _Optional[str] = ..., cache_hit: _Optional[bool] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., query_space_id: _Optional[str] = ...) -> None: ...

class DescribeReleaseRequest(_message.Message):
    __slots__ = ("release_id",)
    RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    release_id: str
    def __init__(self, release_id: _Optional[str] = ...) -> None: ...

class DescribeReleaseResponse(_message.Message):
    __slots__ = ("release_id", "parent_release_id", "created", "space_id", "form_id", "dimension", "entities", "limits", "loaded_release_ids", "server_version", "manifest_json", "query_space_id")
    RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    PARENT_RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    SPACE_ID_FIELD_NUMBER: _ClassVar[int]
    FORM_ID_FIELD_NUMBER: _ClassVar[int]
    DIMENSION_FIELD_NUMBER: _ClassVar[int]
    ENTITIES_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    LOADED_RELEASE_IDS_FIELD_NUMBER: _ClassVar[int]
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_JSON_FIELD_NUMBER: _ClassVar[int]
    QUERY_SPACE_ID_FIELD_NUMBER: _ClassVar[int]
    release_id: str
    parent_release_id: str
    created: str
    space_id: str
    form_id: str
    dimension: int
    entities: _containers.RepeatedCompositeFieldContainer[EntityDescription]
    limits: Limits
    loaded_release_ids: _containers.RepeatedScalarFieldContainer[str]
    server_version: str
    manifest_json: str
    query_space_id: str
    def __init__(self, release_id: _Optional[str] = ..., parent_release_id: _Optional[str] = ..., created: _Optional[str] = ..., space_id: _Optional[str] = ..., form_id: _Optional[str] = ..., dimension: _Optional[int] = ..., entities: _Optional[_Iterable[_Union[EntityDescription, _Mapping]]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., loaded_release_ids: _Optional[_Iterable[str]] = ..., server_version: _Optional[str] = ..., manifest_json: _Optional[str] = ..., query_space_id: _Optional[str] = ...) -> None: ...

class EntityDescription(_message.Message):
    __slots__ = ("entity_type", "count", "index_kind", "ann_recall_at_10", "ann_recall_low", "ann_recall_high", "live_sequence", "attributes")
    ENTITY_TYPE_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    INDEX_KIND_FIELD_NUMBER: _ClassVar[int]
    ANN_RECALL_AT_10_FIELD_NUMBER: _ClassVar[int]
    ANN_RECALL_LOW_FIELD_NUMBER: _ClassVar[int]
    ANN_RECALL_HIGH_FIELD_NUMBER: _ClassVar[int]
    LIVE_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    entity_type: str
    count: int
    index_kind: str
    ann_recall_at_10: float
    ann_recall_low: float
    ann_recall_high: float
    live_sequence: int
    attributes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, entity_type: _Optional[str] = ..., count: _Optional[int] = ..., index_kind: _Optional[str] = ..., ann_recall_at_10: _Optional[float] = ..., ann_recall_low: _Optional[float] = ..., ann_recall_high: _Optional[float] = ..., live_sequence: _Optional[int] = ..., attributes: _Optional[_Iterable[str]] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_k", "max_batch", "max_query_bytes", "max_message_bytes", "max_score_ids", "max_filter_bytes", "max_exclude_ids", "max_label_bytes", "max_attributes", "max_answer_values")
    MAX_K_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_FIELD_NUMBER: _ClassVar[int]
    MAX_QUERY_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_SCORE_IDS_FIELD_NUMBER: _ClassVar[int]
    MAX_FILTER_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_EXCLUDE_IDS_FIELD_NUMBER: _ClassVar[int]
    MAX_LABEL_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    MAX_ANSWER_VALUES_FIELD_NUMBER: _ClassVar[int]
    max_k: int
    max_batch: int
    max_query_bytes: int
    max_message_bytes: int
    max_score_ids: int
    max_filter_bytes: int
    max_exclude_ids: int
    max_label_bytes: int
    max_attributes: int
    max_answer_values: int
    def __init__(self, max_k: _Optional[int] = ..., max_batch: _Optional[int] = ..., max_query_bytes: _Optional[int] = ..., max_message_bytes: _Optional[int] = ..., max_score_ids: _Optional[int] = ..., max_filter_bytes: _Optional[int] = ..., max_exclude_ids: _Optional[int] = ..., max_label_bytes: _Optional[int] = ..., max_attributes: _Optional[int] = ..., max_answer_values: _Optional[int] = ...) -> None: ...

class ActivateRequest(_message.Message):
    __slots__ = ("release_id",)
    RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    release_id: str
    def __init__(self, release_id: _Optional[str] = ...) -> None: ...

class RollbackRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ActivateResponse(_message.Message):
    __slots__ = ("release_id", "previous_release_id", "total_ns")
    RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    TOTAL_NS_FIELD_NUMBER: _ClassVar[int]
    release_id: str
    previous_release_id: str
    total_ns: int
    def __init__(self, release_id: _Optional[str] = ..., previous_release_id: _Optional[str] = ..., total_ns: _Optional[int] = ...) -> None: ...

class Entity(_message.Message):
    __slots__ = ("id", "embedding", "attributes")
    class AttributesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Value
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Value, _Mapping]] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    id: str
    embedding: bytes
    attributes: _containers.MessageMap[str, Value]
    def __init__(self, id: _Optional[str] = ..., embedding: _Optional[bytes] = ..., attributes: _Optional[_Mapping[str, Value]] = ...) -> None: ...

class UpsertRequest(_message.Message):
    __slots__ = ("entity_type", "space_id", "entities")
    ENTITY_TYPE_FIELD_NUMBER: _ClassVar[int]
    SPACE_ID_FIELD_NUMBER: _ClassVar[int]
    ENTITIES_FIELD_NUMBER: _ClassVar[int]
    entity_type: str
    space_id: str
    entities: _containers.RepeatedCompositeFieldContainer[Entity]
    def __init__(self, entity_type: _Optional[str] = ..., space_id: _Optional[str] = ..., entities: _Optional[_Iterable[_Union[Entity, _Mapping]]] = ...) -> None: ...

class DeleteRequest(_message.Message):
    __slots__ = ("entity_type", "ids")
    ENTITY_TYPE_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    entity_type: str
    ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, entity_type: _Optional[str] = ..., ids: _Optional[_Iterable[str]] = ...) -> None: ...

class WriteResponse(_message.Message):
    __slots__ = ("sequence", "applied")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    applied: int
    def __init__(self, sequence: _Optional[int] = ..., applied: _Optional[int] = ...) -> None: ...
