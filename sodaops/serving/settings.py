"""Settings of the predictor as environment variables; `sodaops serve` turns conf/serve into these."""

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from sodaops.config.schema import ServeConfig
from sodaops.errors import ConfigError, StorageError
from sodaops.request_log.journal import Journal, JournalMetrics
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


def open_journal(settings: ServeSettings, metrics: JournalMetrics, place: Callable[[str], str] = str) -> Journal | None:
    """The journal of the request log, or of the log at the places that ``place`` makes of its own; None without one."""
    if settings.journal is None:
        return None
    folder, sizes = Path(place(str(settings.journal))), (settings.part_s, settings.part_bytes, settings.max_journal_bytes)
    try:
        return Journal(folder, place(str(settings.request_log)), *sizes, metrics, settings.keep_days)
    except OSError as error:
        raise StorageError(f"{folder}: cannot write the journal ({error.strerror}); set SODAOPS_JOURNAL_DIR.") from error
