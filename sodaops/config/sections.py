"""The base class of the configuration's sections, and the types of their values."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError


def _local_path(path: str) -> str:
    if "://" in path:
        raise PydanticCustomError("local_path", "expected a local path, not an address")
    return path


Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
LocalPath = Annotated[str, AfterValidator(_local_path)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Section(BaseModel):
    """A part of the configuration: frozen, strict types, no unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", defer_build=True)
