"""Settings of the services as environment variables; `sodaops serve` and `watch` turn conf/ into these."""

import json
import os
from collections.abc import Collection, Sequence
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, NoDecode
from pydantic_settings.exceptions import SettingsError

from sodaops.errors import ConfigError, nearest, some
from sodaops.tasks.make import VARIABLE as TASKS
from sodaops.text import cleaning

PREFIX = "SODAOPS_"
_KEYS = ("api_keys", "admin_keys")  # of every service, under PREFIX
_READ_ELSEWHERE = ("SODAOPS_TRACEBACK", "SODAOPS_DRIFT_", "SODAOPS_ANNOTATE_", "SODAOPS_ALERT_", cleaning.VARIABLE, TASKS)
Keys = Annotated[list[SecretStr], NoDecode]


class EnvironmentSettings(BaseSettings):
    """Settings of a service, read from variables named by its prefix and the names of its fields.

    API keys and admin keys come only from SODAOPS_API_KEYS and SODAOPS_ADMIN_KEYS, separated by commas. PORT, which Cloud
    Run sets, is the port unless the service's own variable gives one.

    Raises:
        ConfigError: a variable is unknown, missing or not allowed; the message lists all faults.
    """

    prefix: ClassVar[str]
    api_keys: Keys = Field([], description="from the environment only", repr=False)  # never shown in a message
    admin_keys: Keys = Field([], description="from the environment only", repr=False)

    def __init__(self, **values: Any) -> None:
        known = set(self.variables()) | {PREFIX + name.upper() for name in _KEYS}
        other = _READ_ELSEWHERE if self.prefix == PREFIX else ()
        unknown = [name for name in sorted(os.environ.keys() - known) if name.startswith(self.prefix)]
        unknown = [name for name in unknown if not name.startswith(other)]
        if unknown:
            hint = nearest(unknown[0], self.variables())
            raise ConfigError(
                f"{unknown[0]} is not a setting of this service{hint}; its settings are {some(self.variables(), 40)}."
            )
        for name in _KEYS:
            if name not in values:
                values[name] = [key for key in map(str.strip, os.environ.get(PREFIX + name.upper(), "").split(",")) if key]
        if self._port() == "PORT":
            values.setdefault("port", os.environ["PORT"])
        try:
            super().__init__(**values)
        except SettingsError as error:  # a list that is not JSON
            field = next(name for name in type(self).model_fields if f'"{name}"' in str(error))
            raise ConfigError(f'{self.prefix}{field.upper()}: expected JSON, ["a", "b"] for a list.') from None
        except ValidationError as error:
            raise ConfigError("\n".join(self._fault(detail) for detail in error.errors(include_input=False))) from None

    @classmethod
    def from_environment(cls, arguments: Sequence[str]) -> Self:
        """Settings of ``python -m`` a service, which takes no arguments.

        Raises:
            ConfigError: as above, or there are arguments, which would be ignored.
        """
        if arguments:
            raise ConfigError(
                f"{arguments[0]!r}: the service takes no arguments; its settings are environment variables: "
                f"{cls.prefix}PORT=8000."
            )
        return cls()

    @classmethod
    def variables(cls) -> list[str]:
        """Names of the variables, the keys' aside."""
        return [cls.prefix + name.upper() for name in cls.model_fields if name not in _KEYS]

    @classmethod
    def _port(cls) -> str:
        """Name of the variable that gives the port."""
        own = cls.prefix + "PORT"
        return "PORT" if "PORT" in os.environ and own not in os.environ else own

    @classmethod
    def _fault(cls, detail: Any) -> str:
        """Message for one of pydantic's validation errors: variable, value, what is allowed."""
        field = str(detail["loc"][0])
        name = cls._port() if field == "port" else (PREFIX if field in _KEYS else cls.prefix) + field.upper()
        key = ".".join(str(part) for part in detail["loc"][1:])
        if detail["type"] == "missing":
            return f"{name}: {key} is missing." if key else f"{name} is missing; give it as {name}=VALUE."
        if detail["type"] == "model_type":
            return f"{name}: expected a JSON object."
        value = os.environ.get(name)
        shown = f"={value}" if value is not None and cls.model_fields[field].repr else ""
        shown += f": {key}" if key else ""
        return f"{name}{shown}: {detail['msg'][0].lower()}{detail['msg'][1:]}."


def as_environment(section: BaseModel, explicit: Collection[str], prefix: str = PREFIX) -> dict[str, str]:
    """A section of conf/ as environment variables. Those already set are left out, unless their key was given explicitly.

    >>> from sodaops.config.schema import ServeConfig
    >>> as_environment(ServeConfig(max_queue=9), ["max_queue"])["SODAOPS_MAX_QUEUE"]
    '9'
    """
    variables = {}
    for key, value in section.model_dump(mode="json").items():
        name = prefix + key.upper()
        if key in explicit or name not in os.environ:
            variables[name] = value if isinstance(value, str) else json.dumps(value)
    return variables
