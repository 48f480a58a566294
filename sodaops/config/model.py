"""The sections of the model (conf/model), of distillation, of the check of the labels, and of the promises of a bundle."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainValidator
from pydantic_core import PydanticCustomError

from sodaops.config.extensions import Extension
from sodaops.config.sections import Count, Fraction, FromJson, Positive, Section
from sodaops.text.limit import Limit

Targets = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value), Field(min_length=1)]


def _target(value: Any) -> float | dict[str, float]:
    shares = value if isinstance(value, dict) else {"": value}
    if not shares or not all(isinstance(share, float) and 0 < share < 1 for share in shares.values()):
        raise PydanticCustomError("target", "expected a number between 0 and 1, or such numbers by label")
    return {str(label): share for label, share in shares.items()} if isinstance(value, dict) else value


Target = Annotated[float | dict[str, float], FromJson, PlainValidator(_target, json_schema_input_type=float | dict[str, float])]


class LoraConfig(Section):
    """Adapters of low rank, which are trained in place of the encoder's weights and merged into the bundle's."""

    r: Count = Field(8, description="rank; by default 8")
    alpha: Positive = Field(16.0, description="an adapter's output is multiplied by alpha / r; by default 16")
    target_modules: Targets | None = Field(
        None, description="names of layers, or all-linear; null: the attention's projections that peft chooses, else all-linear"
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="before an adapter; by default 0")


class ModelConfig(Section):
    """The pretrained encoder (conf/model)."""

    name_or_path: str = Field(description="a folder, a hub name, or package:NAME for weights inside a Python package")
    revision: str | None = Field(description="commit or tag of a hub model")
    random_weights: bool = Field(description="architecture and tokenizer only, weights drawn at random (for tests)")
    overrides: dict[str, Any] | None = Field(description="changes to the encoder's own configuration")
    layers: Annotated[int, Field(ge=1)] | list[Annotated[int, Field(ge=0)]] | None = Field(
        None, description="the encoder's first layers, by number, or those with these indices, from 0; null: all"
    )
    encoder: Extension | None = Field(None, description="an encoder class of your own, with the tokenizer of name_or_path")
    pooling: Literal["mean", "cls"]
    dropout: Annotated[float, Field(ge=0, lt=1)]
    max_tokens: Annotated[int, Field(ge=3)] = Field(description="most tokens of a text, or of a window of it")
    long_texts: Literal["truncate", "windows"] = Field(
        "truncate", description="texts above max_tokens: the rest is cut, or they are read in windows"
    )
    stride: Annotated[int, Field(ge=0)] | None = Field(None, description="tokens that neighbouring windows share; null: 0")
    max_windows: Count | None = Field(None, description="windows of a text, beyond which it is cut; null: 8")
    lora: LoraConfig | None = Field(None, description="train only adapters and the head; {} for the defaults; null: all")
    gradient_checkpointing: bool = Field(False, description="less memory for a slower step: activations are computed twice")
    attention: Literal["eager", "sdpa", "flash_attention_2"] | None = Field(
        None, description="implementation in training; null: what transformers chooses"
    )

    @property
    def limit(self) -> Limit:
        """How much of a text is read."""
        if self.long_texts == "truncate":
            return Limit(self.max_tokens)
        return Limit(self.max_tokens, self.stride or 0, self.max_windows or 8)


class DistillConfig(Section):
    """How a model learns from ``teacher``."""

    weight: Fraction = Field(0.5, description="target = weight * the teachers' mean answer + (1 - weight) * label and votes")
    hidden: Annotated[float, Field(ge=0)] = Field(
        0.0, description="weight in the loss of 1 - cosine of the embedding and the teachers' mean one; 0: not used"
    )
    near: Fraction = Field(0.7, description="similarity to a val or test text at which a text of data.unlabelled is left out")


class LabelsConfig(Section):
    """The check of the labels (conf/config.yaml)."""

    folds: Annotated[int, Field(ge=3)] = Field(4, description="trainings, each of which answers the rows that it has not seen")
    near: Fraction = Field(0.7, description="similarity of near duplicates")
    test: bool = Field(False, description="also annotate and merge test rows, which makes scores not comparable")
    output_dir: str = Field("outputs/labels", description="folder or gs:// of the page and the CSV, which hold texts")


class PromiseConfig(Section):
    """The part of conf/evaluate for which training and export choose thresholds and label sets, on val."""

    target_accuracy: Target | None = Field(
        None, description="of the answers above a threshold on confidence, or for some labels of the answers with this label"
    )
    set_coverage: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="share of the texts of each label whose label set has it"
    )

    @property
    def promises(self) -> dict[str, Any]:
        """The targets that are set."""
        return self.model_dump(include=set(PromiseConfig.model_fields), exclude_none=True)
