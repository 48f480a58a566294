"""The result of a drift check, as it is stored in drift.json."""

from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from sodaops.drift.causes import Cause
from sodaops.drift.features import Feature
from sodaops.drift.quality import Quality
from sodaops.drift.segments import Segment


@dataclass(frozen=True)
class Example:
    """A current text with a high drift score."""

    text: str | None  # None where only hashes are logged
    text_sha256: str
    label: str
    score: float
    request_id: str


@dataclass(frozen=True)
class DriftResult:
    """The verdict on a window of requests, and what it is based on."""

    bundle_id: str
    judged: bool  # whether there were enough requests for a verdict
    drifted: bool
    message: Annotated[str, Field(alias="said")]  # the verdict in one line; the alias is the name in drift.json
    causes: list[Cause]
    features: list[Feature]
    level: float  # a p-value below it is significant
    n_rows: int  # requests of this bundle, those with empty texts included
    n_texts: int  # distinct texts that were compared
    n_found: int  # requests in the whole window; n_rows may be a sample of them
    first: str | None  # time of the oldest request, ISO 8601
    last: str | None
    empty: float  # share of empty texts
    repeated: float  # share of the most frequent text
    repeated_text: str | None
    examples: list[Example]
    others: dict[str, dict[str, Any]]  # other bundle -> n_rows, and drifted: names of the features that need no model
    ahead: int  # rows left out since their time is in the future
    skipped: dict[str, str]  # part of the log that could not be read -> reason
    reference_age_days: float
    created: str
    quality: Quality = field(default_factory=Quality)  # as of older checks: nothing
    segments: list[Segment] = field(default_factory=list)


def to_json_fields(result: DriftResult) -> dict[str, Any]:
    """The content of drift.json."""
    return TypeAdapter(DriftResult).dump_python(result, by_alias=True)
