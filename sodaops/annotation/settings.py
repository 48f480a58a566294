"""Environment variables of the annotation service; `sodaops annotate serve` sets them from conf/annotate."""

from typing import ClassVar

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from sodaops.config.schema import AnnotateConfig
from sodaops.web.settings import EnvironmentSettings

PREFIX = "SODAOPS_ANNOTATE_"


class AnnotateSettings(EnvironmentSettings, AnnotateConfig):
    """Settings of the annotation service: ``SODAOPS_ANNOTATE_STORE=…``, ``SODAOPS_ANNOTATE_PORT=…``."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, strict=False, extra="forbid", env_parse_none_str="null")
    prefix: ClassVar[str] = PREFIX

    store: str = Field(description="folder with the tasks and the answers")
