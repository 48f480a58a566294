"""What the service can be told, by environment variables; ``sodaops serve`` turns conf/serve into these."""

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError

from sodaops.config import ServeConfig
from sodaops.errors import ConfigError, nearest, some

PREFIX = "SODAOPS_"
_OTHERS = {"SODAOPS_TRACEBACK"}  # read elsewhere
Keys = Annotated[list[SecretStr], NoDecode]


class ServeSettings(BaseSettings, ServeConfig):
    """Settings of the service: ``SODAOPS_BUNDLE=…``, ``SODAOPS_MAX_QUEUE=…``, and so on.

    Keys of the API and of its administrator come from the environment alone, several apart by commas.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, strict=False, extra="forbid", env_parse_none_str="null")

    bundle: str = Field(description="the bundle to serve: a folder, or gs://BUCKET/FOLDER")
    api_keys: Keys = Field([], description="from the environment only")
    admin_keys: Keys = Field([], description="from the environment only")

    def __init__(self, **values: Any) -> None:
        unknown = [name for name in os.environ if name.startswith(PREFIX) and name not in _OTHERS | set(environment_names())]
        if unknown:
            hint = nearest(unknown[0], environment_names())
            raise ConfigError(f"{unknown[0]} is no setting of the service{hint}; it has: {some(environment_names(), 40)}.")
        for name in ("api_keys", "admin_keys"):
            if name not in values:
                values[name] = [key for key in map(str.strip, os.environ.get(PREFIX + name.upper(), "").split(",")) if key]
        try:
            super().__init__(**values)
        except SettingsError as error:  # a list that is no JSON
            field = next(name for name in ServeConfig.model_fields if f'"{name}"' in str(error))
            raise ConfigError(f'{PREFIX}{field.upper()}: expected a JSON list, ["http://a.example"] for example.') from None
        except ValidationError as error:
            raise ConfigError("\n".join(_fault(detail) for detail in error.errors(include_input=False))) from None

    @property
    def texts_of_a_request(self) -> int:
        """At most: what the queue cannot hold would be refused for ever."""
        return min(self.max_texts, self.max_queue)

    @property
    def journal(self) -> Path | None:
        """Where the journal lies; None without a request log.

        Raises:
            ConfigError: a request log on gs:// without a folder for its journal.
        """
        if self.request_log is None:
            return None
        if self.journal_dir is None and "://" in self.request_log:
            raise ConfigError(
                f"{PREFIX}JOURNAL_DIR is missing; {PREFIX}REQUEST_LOG={self.request_log} needs a local folder for what it has "
                "not received yet. Give one on a disk that outlives the process."
            )
        return Path(self.journal_dir or Path(self.request_log) / "journal")


def environment(serve: ServeConfig, explicit: Collection[str]) -> dict[str, str]:
    """conf/serve as environment variables; one that is set already stays, unless its key was given explicitly.

    >>> environment(ServeConfig(max_queue=9), ["max_queue"])["SODAOPS_MAX_QUEUE"]
    '9'
    """
    found = {}
    for key, value in serve.model_dump().items():
        name = PREFIX + key.upper()
        if key in explicit or name not in os.environ:
            found[name] = value if isinstance(value, str) else json.dumps(value)
    return found


def environment_names() -> list[str]:
    """The variables that are settings."""
    return [PREFIX + name.upper() for name in ServeSettings.model_fields]


def _fault(detail: Any) -> str:
    name = PREFIX + str(detail["loc"][0]).upper()
    if detail["type"] == "missing":
        return f"{name} is missing; give it as {name}=VALUE."
    given = os.environ.get(name)
    shown = f"={given}" if given is not None and not name.endswith("_KEYS") else ""
    return f"{name}{shown}: {detail['msg'][0].lower()}{detail['msg'][1:]}."
