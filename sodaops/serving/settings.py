"""What the predictor can be told, by environment variables; `sodaops serve` turns conf/serve into these."""

from pathlib import Path
from typing import ClassVar

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from sodaops.config.schema import ServeConfig
from sodaops.errors import ConfigError
from sodaops.web.settings import PREFIX, EnvironmentSettings


class ServeSettings(EnvironmentSettings, ServeConfig):
    """Settings of the predictor: ``SODAOPS_BUNDLE=…``, ``SODAOPS_MAX_QUEUE=…``, and so on."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, strict=False, extra="forbid", env_parse_none_str="null")
    prefix: ClassVar[str] = PREFIX

    bundle: str = Field(description="the bundle to serve: a folder, gs://BUCKET/FOLDER, or REGISTRY@ALIAS")

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
