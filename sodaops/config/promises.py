"""Settings of what a bundle promises about its answers: part of conf/evaluate."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from pydantic import Field

from sodaops.config.sections import FromJson, Name, Section

_Share = Annotated[float, Field(gt=0, lt=1)]


class PromiseConfig(Section):
    """The targets that training and export choose thresholds for, on val."""

    target_accuracy: _Share | None = Field(None, description="accuracy of the answers above a threshold on confidence")
    target_precision: Annotated[dict[Name, _Share] | None, FromJson] = Field(
        None, description="label -> precision of its answers above a threshold of its own, in place of target_accuracy"
    )
    set_coverage: _Share | None = Field(None, description="share of the texts of each label whose label set has it")

    @property
    def promises(self) -> dict[str, Any]:
        """The targets that are set."""
        values = {name: getattr(self, name) for name in PromiseConfig.model_fields}
        return {name: value for name, value in values.items() if value is not None}

    def promise_faults(self, variants: Sequence[str]) -> Iterator[str]:
        """Contradictions, given ``export.variants``."""
        if self.target_accuracy is not None and self.target_precision is not None:
            yield "evaluate.target_accuracy and evaluate.target_precision: set one of them."
        if self.target_precision == {}:
            yield "evaluate.target_precision={}: expected {LABEL: PRECISION}, or null."
        if self.promises and not variants:
            yield f"evaluate.{next(iter(self.promises))} is measured with an ONNX model; export.variants is empty."
