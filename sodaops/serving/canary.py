"""The challenger of ``serve.shadow``, and the share of requests that it answers (``serve.canary``)."""

import hashlib

from sodaops.errors import BundleError, ConfigError, SodaOpsError
from sodaops.inference.predictor import Predictor
from sodaops.serving.abstention import PLAIN, Asked, can_answer
from sodaops.serving.metrics import Metrics
from sodaops.serving.models import Models
from sodaops.serving.settings import ServeSettings

CANARY_HEADER = "x-canary-key"


class Challenger(Models):
    """The bundle of ``serve.shadow``, which is watched and reloaded as the bundle in use is.

    While it is the bundle in use itself, as after its promotion, or after a reload to other labels, it answers nothing.

    Attributes:
        share: of the requests that it answers, from 0 to 1; a new challenger takes it over.

    Raises:
        ConfigError: it cannot be loaded, or has another task, other labels or other text columns than the bundle in use.
    """

    def __init__(self, settings: ServeSettings, live: Models, metrics: Metrics) -> None:
        self._live, self.share = live, settings.canary
        try:
            super().__init__(str(settings.shadow), settings.variant, metrics, settings.abstain)
            self._check(self.current)
        except SodaOpsError as error:
            raise ConfigError(f"SODAOPS_SHADOW={settings.shadow} (serve.shadow): {error}") from error

    def choose(self, key: str, asked: Asked = PLAIN) -> Predictor:
        """The bundle that answers the requests with a key: always the same one for a share and a pair of bundles.

        What the challenger has no thresholds or label sets for is left to the bundle in use.
        """
        live, is_chosen = self._live.current, self.share and position(key) < self.share
        return self.current if is_chosen and self.stands_in(live) and can_answer(self.current, asked) else live

    def stands_in(self, live: Predictor) -> bool:
        """Whether it is another bundle than this one, with the same task, labels and text columns."""
        return live.info.bundle_id != self.current.info.bundle_id and _like(live) == _like(self.current)

    def set_share(self, share: float) -> None:
        """Changes the share; 0 ends the canary.

        Raises:
            BundleError: the challenger cannot answer for the bundle in use.
        """
        if share and not self.stands_in(self._live.current):
            raise BundleError(f"{self.source}: the bundle in use is the same one, or has other labels; the share stays.")
        self.share = share

    def _check(self, fresh: Predictor) -> None:
        self._check_thresholds(fresh)
        if (own := _like(fresh)) != (other := _like(self._live.current)):
            raise BundleError(f"{self.source}: task, labels and text columns are {own}; the bundle in use has {other}.")

    def _announce(self) -> None:
        self.previous = None  # there is no rollback, and the gauge is of the bundle in use


def _like(predictor: Predictor) -> tuple[str, list[str], list[str]]:
    """What bundles share that can answer for each other; the name of a single column does not matter."""
    columns = predictor.info.text_columns
    return predictor.task.name, predictor.info.labels, columns if len(columns) > 1 else ["text"]


def position(key: str) -> float:
    """A number from 0 to below 1 that depends only on the key.

    >>> round(position("one"), 3), round(position("two"), 3)
    (0.463, 0.249)
    """
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6]) / 2**48
