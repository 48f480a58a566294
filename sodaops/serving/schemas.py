"""What goes in and out of the service, as OpenAPI shows it."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, FailFast, Field, model_validator

Label = Annotated[str, Field(examples=["positive"])]
Probability = Annotated[float, Field(ge=0, le=1.0001, examples=[0.93])]


QUERY = [  # of GET /predict: one of them
    {"name": name, "in": "query", "description": said, "schema": {"type": "string"}, "example": "I love this"}
    for name, said in (("text", "raw; the bundle's own cleaning is applied"), ("review", "in place of text"))
]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _few_keys(cls, given: Any) -> Any:
        if isinstance(given, dict) and len(given) > 8:  # each unknown one would become a fault of its own
            raise ValueError(f"{len(given)} keys; expected {', '.join(cls.model_fields)} alone")
        return given


class TextRequest(_Request):
    """One text."""

    text: Annotated[str, Field(description="raw; the bundle's own cleaning is applied", examples=["I love this"])]


class BatchRequest(_Request):
    """Several texts."""

    texts: Annotated[list[str], FailFast(), Field(min_length=1, examples=[["I love this", "the train is late again"]])]


class FeedbackRequest(_Request):
    """What the answer to a text should have been."""

    request_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$", description="of the answer", examples=["a1b2c3"])]
    label: Annotated[str, Field(description="one of the bundle's", examples=["negative"])]
    place: Annotated[int, Field(ge=0, le=1_000_000, description="of the text in its request, from 0")] = 0


class Noted(BaseModel):
    """That the feedback is on the disk."""

    noted: bool


class Answer(BaseModel):
    """The most probable label, and all of them."""

    label: Label
    score: Annotated[Probability, Field(description="probability of the label")]
    probs: Annotated[dict[str, float], Field(description="label -> probability, in label order")]


class TextAnswer(Answer):
    """The answer to one text."""

    bundle_version: Annotated[str, Field(description="id of the bundle that answered")]
    request_id: str


class BatchAnswer(BaseModel):
    """The answers to several texts, in their order."""

    predictions: list[Answer]
    bundle_version: str
    request_id: str


class Span(BaseModel):
    """A piece of the text, and what it did."""

    text: str
    effect: Annotated[float, Field(description="how much less probable the label is without this piece; in [-1, 1]")]


class Explanation(TextAnswer):
    """An answer, and how much each piece of the text did for it."""

    spans: list[Span]


class Ready(BaseModel):
    """That the service answers, and with what."""

    ready: bool
    bundle_version: str


class Recent(BaseModel):
    """Latency of the last requests that were answered."""

    n_requests: int
    p50_ms: float | None
    p95_ms: float | None


class Info(BaseModel):
    """The model card of the bundle that answers."""

    bundle_version: str
    variant: Annotated[str, Field(description="float32 or int8")]
    labels: list[str]
    cleaning: str
    max_tokens: int
    metrics: Annotated[dict[str, dict[str, float]], Field(description="split -> metric -> value, when it was trained")]
    onnx: Annotated[dict[str, dict[str, Any]], Field(description="variant -> what its gate measured")]
    data: Annotated[dict[str, Any], Field(description="name and fingerprint of the training data")]
    created: str
    git_commit: str | None
    versions: dict[str, str]
    previous: Annotated[str | None, Field(description="the bundle that a roll back would bring")]
    recent: Recent
    max_chars: int
    max_texts: int


class Changed(BaseModel):
    """Whether another bundle answers now."""

    changed: bool
    bundle_version: str


class Problem(BaseModel):
    """What went wrong (RFC 9457)."""

    title: str
    status: int
    detail: str
    request_id: str
