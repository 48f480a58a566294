"""The base class of the configuration's sections, and the types of their values."""

import json
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from sodaops.config.extensions import IMPORT_PATH
from sodaops.text.columns import MAX_COLUMNS
from sodaops.text.policies import POLICIES


def _local_path(path: str) -> str:
    if "://" in path:
        raise PydanticCustomError("local_path", "expected a local path, not an address")
    return path


def check_delimiter(name: str) -> str:
    """The character that ``tab`` or the character itself stands for; a ValueError for anything else."""
    character = {"tab": "\t", "\\t": "\t"}.get(name, name)
    if len(character) != 1 or not character.isascii() or character in '"\r\n':
        raise PydanticCustomError("delimiter", "expected one ASCII character, such as ';', or tab")
    return character


def check_encoding(name: str) -> str:
    """The name of an encoding of text; a ValueError for anything else."""
    try:
        "a".encode(name)  # refuses codecs that are no encodings of text
    except LookupError:
        raise PydanticCustomError("encoding", "expected an encoding, such as windows-1252, latin-1 or utf-16") from None
    return name


def _collection(value: Any) -> Any:
    """The list or mapping of a text with JSON, as :func:`sodaops.config.spelling.keep_spelling` writes it."""
    try:
        return json.loads(value) if isinstance(value, str) and value[:1] in ("[", "{") else value
    except ValueError:
        return value


def _name(value: Any) -> Any:
    return str(value) if type(value) is int else value


def _cleaning(name: str) -> str:
    if name not in POLICIES and not IMPORT_PATH.fullmatch(name):
        names = ", ".join(f"'{policy}'" for policy in POLICIES)
        raise PydanticCustomError("cleaning", f"expected {names}, or the import path of a function")
    return name


def _text_column(value: Any) -> str | list[str]:
    """The name of one column, or the names of several, each once."""
    value = _collection(value)
    names = [_name(name) for name in value] if isinstance(value, list) else [_name(value)]
    if not isinstance(value, list) and not isinstance(names[0], str):
        raise PydanticCustomError("string_type", "expected a column, or a list of columns")
    if not all(isinstance(name, str) for name in names) or not 0 < len(set(names)) == len(names) <= MAX_COLUMNS:
        raise PydanticCustomError("text_column", f"expected a column, or a list of 1 to {MAX_COLUMNS} columns, each once")
    return names[0] if len(names) == 1 else names


FromJson = BeforeValidator(_collection)
Name = Annotated[str, BeforeValidator(_name)]  # a label or the name of a column, which may be a number
TextColumn = Annotated[str | list[str], PlainValidator(_text_column, json_schema_input_type=str | list[str])]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
LocalPath = Annotated[str, AfterValidator(_local_path)]
Cleaning = Annotated[str, AfterValidator(_cleaning), WithJsonSchema({"anyOf": [{"enum": list(POLICIES)}, {"type": "string"}]})]
Port = Annotated[int, Field(ge=0, le=65535)]
Delimiter = Annotated[str, AfterValidator(check_delimiter)]
Encoding = Annotated[str, AfterValidator(check_encoding)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Section(BaseModel):
    """A part of the configuration: frozen, strict types, no unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", defer_build=True)


class ServerSection(Section):
    """Where a service listens, and who may reach it."""

    host: str = "127.0.0.1"
    port: Port
    root_path: Annotated[str, Field(pattern=r"^(/[\w.~-]+)*$")] = ""
    allowed_hosts: list[str] = Field([], description="host names that requests may name, also *.example.org; empty: any")
    trusted_proxies: list[str] = []
