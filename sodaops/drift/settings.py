"""Settings of the drift service from environment variables; `sodaops watch` sets them from conf/."""

from typing import ClassVar

from pydantic import Field, field_validator
from pydantic_settings import SettingsConfigDict

from sodaops.config.schema import DriftConfig
from sodaops.request_log.window import parse_time
from sodaops.web.settings import EnvironmentSettings

PREFIX = "SODAOPS_DRIFT_"


class WatchSettings(EnvironmentSettings, DriftConfig):
    """Settings of the drift service: ``SODAOPS_DRIFT_BUNDLE=…``, ``SODAOPS_DRIFT_EVERY_S=…``, and so on."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, strict=False, extra="forbid", env_parse_none_str="null")
    prefix: ClassVar[str] = PREFIX

    bundle: str = Field(description="has the reference: a folder, gs://BUCKET/FOLDER, or REGISTRY@ALIAS")
    request_log: str = Field(description="folder or gs:// of the request log's parts")

    @field_validator("since", "until")
    @classmethod
    def _parses_as_time(cls, value: str | None) -> str | None:
        parse_time(value)
        return value
