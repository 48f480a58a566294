"""The bundle in use, the previous one, and replacing one by the other while requests run."""

import asyncio
import contextlib
import logging

from sodaops.bundle import layout
from sodaops.errors import BundleError, SodaOpsError
from sodaops.inference.predictor import Predictor
from sodaops.registry.bundles import bundle_at, predictor_files
from sodaops.serving import trial
from sodaops.serving.abstention import KEY
from sodaops.serving.metrics import Metrics

log = logging.getLogger(__name__)


class Models:
    """Loads bundles, watches their source for a new one, and keeps the previous one for a rollback.

    Args:
        source: a folder, gs://BUCKET/FOLDER, or an alias in a registry: REGISTRY@champion.
        variant: of the ONNX models; None: the one that the bundle names.
        metrics: count loads and name the bundle in use.
        abstains: whether bundles need thresholds.

    Raises:
        BundleError, ConfigError, RegistryError, StorageError: the first bundle cannot be loaded, or has no thresholds.
    """

    def __init__(self, source: str, variant: str | None, metrics: Metrics, abstains: bool = False) -> None:
        self.source, self._variant, self._metrics, self._abstains = source, variant, metrics, abstains
        self._lock = asyncio.Lock()
        self._rolled_back: set[str] = set()  # bundle ids that watch() does not load again
        self.previous: Predictor | None = None
        self.current = self._load()
        self._check_thresholds(self.current)
        self._announce()

    async def reload(self, force: bool = False) -> bool:
        """Loads and warms up the source's bundle, if it is not the current one; it answers from the next request on.

        Args:
            force: also load a bundle that was rolled back before.

        Returns:
            Whether the bundle has changed.

        Raises:
            BundleError, RegistryError, StorageError: the bundle cannot be used; the current one stays.
        """
        async with self._lock:
            try:
                bundle_id = await asyncio.to_thread(self._read_id)
                if bundle_id == self.current.info.bundle_id or (bundle_id in self._rolled_back and not force):
                    return False
                fresh = await self._try_and_load()
                self._check(fresh)
            except (asyncio.CancelledError, KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # whatever a bundle brings about
                self._metrics.loads.labels("refused").inc()
                if force:  # watch() logs its own
                    log.error("new bundle refused; keeping %s", self.current.info.bundle_id, extra={"reason": str(error)})
                if isinstance(error, SodaOpsError):
                    raise
                raise BundleError(f"{self.source}: cannot be loaded ({type(error).__name__}: {error}).") from error
            self._rolled_back.discard(fresh.info.bundle_id)
            self._switch_to(fresh)
            self._metrics.loads.labels("loaded").inc()
            return True

    async def roll_back(self) -> None:
        """Switches back to the previous bundle; :meth:`watch` does not load the current one again.

        Raises:
            BundleError: there is no previous bundle, or this was called twice.
        """
        async with self._lock:
            if self.previous is None:
                raise BundleError(
                    "there is no previous bundle to roll back to: none was loaded since the start or last rollback."
                )
            self._rolled_back.add(self.current.info.bundle_id)
            self._switch_to(self.previous)
            self.previous = None
            self._metrics.loads.labels("rolled_back").inc()

    async def watch(self, every_s: float) -> None:
        """Reloads whenever the source has a new bundle, until cancelled.

        A refused bundle may still be being copied, so it is tried again, each time after twice the wait.
        """
        last_reason, wait_s = "", every_s
        while True:
            await asyncio.sleep(wait_s)
            try:
                if await self.reload():
                    log.info("new bundle in use", extra={"bundle_id": self.current.info.bundle_id, "source": self.source})
                last_reason, wait_s = "", every_s
            except Exception as error:  # the watch goes on
                if str(error) != last_reason:  # logged once rather than at each try
                    log.error("new bundle refused; keeping %s", self.current.info.bundle_id, extra={"reason": str(error)})
                last_reason, wait_s = str(error), min(2 * wait_s, 30 * every_s)

    def _switch_to(self, fresh: Predictor) -> None:
        self.previous, self.current = self.current, fresh
        self._announce()

    def _announce(self) -> None:
        self._metrics.set_bundle(self.current.info.bundle_id, self.current.variant)

    def _check(self, fresh: Predictor) -> None:
        self._check_thresholds(fresh)
        new, old = fresh.info.text_columns, self.current.info.text_columns
        if new != old and (len(new) > 1 or len(old) > 1):  # the service's schema names them
            raise BundleError(f"{self.source}: texts of {', '.join(new)}, not of {', '.join(old)}; restart the service.")

    def _check_thresholds(self, fresh: Predictor) -> None:
        if self._abstains:
            fresh.require_thresholds(KEY)

    def _read_id(self) -> str:
        """Id of the source's bundle, from bundle.json alone."""
        with bundle_at(self.source, lambda info: ()) as folder:
            return layout.read_info(folder).bundle_id

    def _load(self) -> Predictor:
        with bundle_at(self.source, predictor_files(self._variant)) as folder:
            return trial.load(folder, self._variant)

    async def _try_and_load(self) -> Predictor:
        """Loads the source's bundle after another process has loaded it, whose end is not that of the service."""
        choose = predictor_files(self._variant)
        with contextlib.ExitStack() as stack:
            folder = await asyncio.to_thread(stack.enter_context, bundle_at(self.source, choose))
            info = layout.read_info(folder)
            await asyncio.to_thread(layout.verify, folder, info, choose(info))
            await trial.try_bundle(folder, self._variant)
            return await asyncio.to_thread(trial.load, folder, self._variant)
