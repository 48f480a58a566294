"""Settings of the predictor as environment variables; `sodaops serve` turns conf/serve into these."""

from pathlib import Path
from typing import ClassVar

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from sodaops.config.schema import ServeConfig
from sodaops.errors import ConfigError
from sodaops.web.settings import PREFIX, EnvironmentSettings


class ServeSettings(EnvironmentSettings, ServeConfig):
    """``SODAOPS_BUNDLE=…``, ``SODAOPS_MAX_QUEUE=…``, and so on."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, strict=False, extra="forbid", env_parse_none_str="null")
    prefix: ClassVar[str] = PREFIX

    bundle: str = Field(description="the bundle to serve: a folder, gs://BUCKET/FOLDER, or REGISTRY@ALIAS")

    @property
    def max_request_texts(self) -> int:
        """Largest number of texts in a request; one that exceeds the queue could never be answered."""
        return min(self.max_texts, self.max_queue)

    @property
    def journal(self) -> Path | None:
        """Folder of the journal; None without a request log.

        Raises:
            ConfigError: the request log is remote and no local folder is set for its journal.
        """
        if self.request_log is None:
            return None
        if self.journal_dir is None and "://" in self.request_log:
            raise ConfigError(
                f"{PREFIX}JOURNAL_DIR is missing; {PREFIX}REQUEST_LOG={self.request_log} is remote, so its journal needs a "
                "local folder. Set it to one on a disk that outlives the process."
            )
        return Path(self.journal_dir or Path(self.request_log) / "journal")
