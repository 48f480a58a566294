"""Bodies of requests and responses, as the OpenAPI schema shows them."""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, create_model, model_validator
from typing_extensions import TypedDict

from sodaops.bundle.reference import MAX_CELL_CHARS


def query(columns: Sequence[str]) -> list[dict[str, Any]]:
    """The parameters of GET /predict: the text, or its parts."""
    cleaned = "raw; the bundle's own cleaning is applied."
    of_all = {"in": "query", "required": True, "example": "I love this", "description": cleaned}
    if len(columns) == 1:
        description = f"{cleaned} It may also be named review."
        return [{"name": "text", **of_all, "schema": {"type": "string"}, "description": description}]
    return [{"name": name, **of_all, "schema": {"type": "string"}} for name in columns]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _limit_keys(cls, body: Any) -> Any:
        if isinstance(body, dict) and len(body) > 8:  # before pydantic reports an error for each unknown key
            raise ValueError(f"{len(body)} keys; expected only {', '.join(cls.model_fields)}")
        return body


_Value = Annotated[str, Field(max_length=MAX_CELL_CHARS)]


def _limit_values(context: Any) -> Any:
    if isinstance(context, dict) and len(context) > 16:  # as above, for each value
        raise ValueError(f"{len(context)} values; at most 16")
    return context


class _TextsRequest(_Request):
    context: Annotated[dict[str, _Value] | None, BeforeValidator(_limit_values)] = None


_RawText = Annotated[str, Field(description="raw; the bundle's own cleaning is applied", examples=["I love this"])]


class _PredictionRequest(_TextsRequest):
    abstain: Annotated[
        bool | None,
        Field(description="whether the answer says if it is below the bundle's threshold; by default as configured"),
    ] = None
    sets: Annotated[bool, Field(description="whether the answer has a label set")] = False


class TextRequest(_PredictionRequest):
    """One text."""

    text: _RawText


class ExplanationRequest(_TextsRequest):
    """One text, and what is explained."""

    text: _RawText
    label: Annotated[
        str | None, Field(description="the label whose probability is explained; by default that of the answer")
    ] = None


class BatchRequest(_PredictionRequest):
    """Several texts."""

    texts: Annotated[list[str], FailFast(), Field(min_length=1, examples=[["I love this", "the train is late again"]])]


def request_models(columns: Sequence[str]) -> tuple[Any, Any, Any]:
    """The requests for a text, an explanation and several texts; a text of several columns is an object of strings."""
    if len(columns) == 1:
        return TextRequest, ExplanationRequest, BatchRequest
    typed: Any = TypedDict
    parts = typed("Text", dict.fromkeys(columns, str))
    parts.__pydantic_config__ = ConfigDict(extra="forbid", strict=True)
    example = {name: f"some {name}" for name in columns}
    one: Any = Annotated[parts, Field(description="raw; one of them may be empty", examples=[example])]
    several: Any = Annotated[list[one], FailFast(), Field(min_length=1, examples=[[example]])]
    of_one, of_explanation = (
        create_model(base.__name__, __base__=base, text=one) for base in (TextRequest, ExplanationRequest)
    )
    return of_one, of_explanation, create_model("BatchRequest", __base__=BatchRequest, texts=several)


class FeedbackRequest(_Request):
    """The right answer for a text: its label; or a list of labels, or a number, if the bundle predicts that."""

    request_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$", description="of the response", examples=["a1b2c3"])]
    label: Annotated[Any, Field(description="one of the bundle's labels")]
    place: Annotated[
        int,
        Field(ge=0, le=1_000_000, description="position of the text in its request, from 0"),
        BeforeValidator(lambda value: int(value) if isinstance(value, float) and value.is_integer() else value),  # as in JSON
    ] = 0


class FeedbackResponse(BaseModel):
    """Whether the feedback is stored."""

    noted: bool


class LabelResponse(BaseModel):
    """The prediction for one text. Its other fields are those of the bundle's task."""

    abstain: Annotated[bool, Field(description="if asked for: whether the bundle abstains from this answer")] = False
    reason: Annotated[str | None, Field(description="why it abstains")] = None
    label_set: Annotated[list[str], Field(description="if asked for: holds the right label as often as the bundle states")] = []


class TextResponse(LabelResponse):
    """Prediction for one text."""

    bundle_version: Annotated[str, Field(description="id of the bundle that answered")]
    request_id: str


class BatchResponse(BaseModel):
    """Predictions for several texts, in their order."""

    predictions: list[LabelResponse]
    bundle_version: str
    request_id: str


class Span(BaseModel):
    """A piece of the text, and its effect."""

    text: str
    effect: Annotated[float, Field(description="how much lower the probability of the label, or the value, is without it")]
    column: Annotated[str, Field(description="of a text of several columns: where the piece stands")] = ""


class Explanation(TextResponse):
    """A prediction, and the effect of each piece of the text on it."""

    spans: list[Span]


class Readiness(BaseModel):
    """Whether the service can answer, and with which bundle."""

    ready: bool
    bundle_version: str


class RecentLatency(BaseModel):
    """Latency of the last 500 requests that were answered."""

    n_requests: int
    p50_ms: float | None
    p95_ms: float | None


class ModelCard(BaseModel):
    """The bundle in use and the limits of the service."""

    bundle_version: str
    variant: Annotated[str, Field(description="float32 or int8")]
    labels: list[str]
    cleaning: str
    text_columns: Annotated[list[str], Field(description="the parts of a text; mostly one")]
    max_tokens: Annotated[int, Field(description="of a text, or of a window of a long one")]
    max_windows: Annotated[int | None, Field(description="windows of a text; null: it is cut at max_tokens")]
    stride: Annotated[int, Field(description="tokens that neighbouring windows share")]
    metrics: Annotated[dict[str, dict[str, float]], Field(description="split -> metric -> value, at training")]
    onnx: Annotated[dict[str, dict[str, Any]], Field(description="variant -> what its export check measured")]
    data: Annotated[dict[str, Any], Field(description="name and fingerprint of the training data")]
    created: str
    git_commit: str | None
    versions: dict[str, str]
    previous: Annotated[str | None, Field(description="the bundle to which a rollback would switch")]
    recent: RecentLatency
    max_chars: int
    max_texts: int


class BundleChange(BaseModel):
    """Whether the bundle in use has changed."""

    changed: bool
    bundle_version: str


class CanaryShare(_Request):
    """The share of requests that the challenger answers, until the process ends."""

    share: Annotated[float, Field(ge=0, le=1, description="0 ends the canary", examples=[0.1])]


class Problem(BaseModel):
    """An error (RFC 9457)."""

    title: str
    status: int
    detail: str
    request_id: str


def faults(errors: Sequence[Any]) -> str:
    """The first five of pydantic's errors, without the values."""
    return "; ".join(f"{'.'.join(str(part)[:40] for part in error['loc']) or 'body'}: {error['msg']}" for error in errors[:5])
