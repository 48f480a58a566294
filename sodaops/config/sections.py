"""What every section of the configuration is, and the kinds of values in it."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError


def _here(path: str) -> str:
    if "://" in path:
        raise PydanticCustomError("here", "expected a path on this machine, not an address")
    return path


Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Here = Annotated[str, AfterValidator(_here)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Section(BaseModel):
    """A part of the tree: frozen, strict in types, without unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", defer_build=True)
