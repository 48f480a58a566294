"""The trial that a training belongs to, passed from the sweep to its jobs in an environment variable."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

TRIAL_VARIABLE = "SODAOPS_TRIAL"  # not a config key, so that a trial's configuration equals that of a single run


@dataclass(frozen=True)
class TrialContext:
    """The trial that a run belongs to."""

    storage: str
    study: str
    trial_id: int  # in the database
    number: int  # in the study
    n_seeds: int  # runs of this trial
    pruner: str | None  # None: nothing is reported, as for the seeds after the first
    pruner_options: dict[str, Any] | None

    def to_json(self) -> str:
        """The value of the environment variable."""
        return json.dumps(asdict(self))

    def as_dict(self) -> dict[str, Any]:
        """The part that is kept in the run's record."""
        return {"study": self.study, "number": self.number, "n_seeds": self.n_seeds}


def trial_of(environment: Mapping[str, str]) -> TrialContext | None:
    """The trial that this process runs, or None."""
    return TrialContext(**json.loads(environment[TRIAL_VARIABLE])) if TRIAL_VARIABLE in environment else None
