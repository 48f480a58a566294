"""The bundle that answers, the one before it, and how one takes the other's place while requests run."""

import asyncio
import logging

from sodaops.bundle import layout
from sodaops.errors import BundleError, SodaOpsError
from sodaops.inference.predictor import Predictor
from sodaops.registry.bundles import answering, bundle_at
from sodaops.serving.metrics import Metrics

log = logging.getLogger("sodaops.serving")


class Models:
    """Loads from a folder, gs:// or a registry, looks for a new bundle there, and keeps the one before for a roll back.

    Args:
        source: a folder, gs://BUCKET/FOLDER, or an alias in a registry: REGISTRY@champion.
        variant: of the ONNX models; None is the bundle's choice.
        metrics: told which bundle answers, and how loads ended.

    Raises:
        BundleError, RegistryError, StorageError: the first bundle cannot be loaded.
    """

    def __init__(self, source: str, variant: str | None, metrics: Metrics) -> None:
        self.source, self._variant, self._metrics = source, variant, metrics
        self._lock = asyncio.Lock()
        self._rolled_back: set[str] = set()  # ids that do not come back by themselves
        self.previous: Predictor | None = None
        self.current = self._load()
        self._metrics.serves(self.current.info.bundle_id, self.current.variant)

    async def reload(self, anyway: bool = False) -> bool:
        """Loads what the source holds now, warms it up, and lets it answer from the next request on.

        Args:
            anyway: also a bundle that was rolled back before.

        Returns:
            Whether another bundle answers now.

        Raises:
            BundleError, StorageError: what is there cannot answer; the bundle that answered goes on.
        """
        async with self._lock:
            try:
                found = await asyncio.to_thread(self._bundle_id)
                if found == self.current.info.bundle_id or (found in self._rolled_back and not anyway):
                    return False
                fresh = await asyncio.to_thread(self._load)
            except SodaOpsError:
                self._metrics.loads.labels("refused").inc()
                raise
            self._rolled_back.discard(fresh.info.bundle_id)
            self._exchange(fresh)
            self._metrics.loads.labels("loaded").inc()
            return True

    async def roll_back(self) -> None:
        """Lets the bundle before answer again; the one that answered is not loaded again by itself, nor by a second call.

        Raises:
            BundleError: there was none before, or it answers already.
        """
        async with self._lock:
            if self.previous is None:
                raise BundleError("no bundle was loaded before this one since the start; nothing to roll back to.")
            self._rolled_back.add(self.current.info.bundle_id)
            self._exchange(self.previous)
            self.previous = None
            self._metrics.loads.labels("rolled_back").inc()

    async def watch(self, every_s: float) -> None:
        """Reloads whenever the source holds another bundle, until cancelled.

        One that is refused may be half copied as yet, so it is tried again, each time after twice the wait.
        """
        said, wait_s = "", every_s
        while True:
            await asyncio.sleep(wait_s)
            try:
                if await self.reload():
                    log.info("another bundle answers", extra={"bundle_id": self.current.info.bundle_id})
                said, wait_s = "", every_s
            except Exception as error:  # whatever a bundle may bring about, the watch goes on
                if str(error) != said:  # once, not each time
                    log.error("new bundle refused; %s goes on", self.current.info.bundle_id, extra={"reason": str(error)})
                said, wait_s = str(error), min(2 * wait_s, 30 * every_s)

    def _exchange(self, fresh: Predictor) -> None:
        self.previous, self.current = self.current, fresh
        self._metrics.serves(fresh.info.bundle_id, fresh.variant)

    def _bundle_id(self) -> str:
        """The id of what the source holds, before anything else of it is read."""
        with bundle_at(self.source, lambda info: ()) as folder:
            return layout.read_info(folder).bundle_id

    def _load(self) -> Predictor:
        with bundle_at(self.source, answering(self._variant)) as folder:
            predictor = Predictor(folder, self._variant, n_threads=1)
        warm_up(predictor)
        return predictor


def warm_up(predictor: Predictor) -> None:
    """Answers a short and a longer text, so that the first request finds things allocated, and checks the answers.

    Raises:
        BundleError: the model does not answer with a probability for each label.
    """
    shape = (2, len(predictor.info.labels))
    try:
        probs = predictor.run([predictor.encode(predictor.clean(text)) for text in ("a word", "word " * 20)]).probs
    except Exception as error:  # a cleaning that is not known here, a graph that fails, and whatever else
        raise BundleError(f"{predictor.info.bundle_id}: does not answer ({str(error)[:200]}).") from error
    if probs.shape != shape or not (abs(probs.sum(axis=1) - 1) < 1e-3).all():
        raise BundleError(f"{predictor.info.bundle_id}: answers {probs.shape} in place of {shape}, or no probabilities.")
