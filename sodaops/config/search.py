"""The section of a sweep (conf/search)."""

from typing import Annotated, Any

from pydantic import Field

from sodaops.config.sections import Count, Section


class SearchConfig(Section):
    """A sweep: its space, sampler, pruner and storage (conf/search)."""

    study: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="the same name continues the study")]
    storage: str | None = Field(description="SQLAlchemy URL of a database; null: study.db in the sweep's folder")
    n_trials: Count = Field(description="trials of the study, by all processes")
    n_seeds: Count = Field(description="runs per trial, from seed on; its value is their mean")
    n_jobs: Count | None = Field(description="parallel trials; null: joblib's n_jobs, else 1")
    grace_s: Annotated[int, Field(ge=4)] = Field(description="seconds without a heartbeat after which a trial is run again")
    keep_checkpoints: bool
    sampler: str = Field(description="tpe, random, or a class such as optuna.samplers.GPSampler")
    sampler_options: dict[str, Any] | None = Field(description="its arguments; they override its defaults")
    pruner: str = Field(description="median, hyperband, none, or a class such as optuna.pruners.WilcoxonPruner")
    pruner_options: dict[str, Any] | None = Field(description="its arguments; they override its defaults")
    space: dict[str, Any] = Field(description="configuration keys, each with type, low, high, log, step, or with values")
