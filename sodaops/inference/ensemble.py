"""Several bundles that answer as one, and how fast bundles answer."""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sodaops.inference.predictor import Output, Predictor

_N_WARM_UP = 8  # texts that are predicted before the time is measured
_N_TIMED = 120  # texts on which it is measured


class Ensemble:
    """Bundles with the same labels, cleaning and task, whose answers are averaged.

    Args:
        paths: their folders.
        variant: as for :class:`~sodaops.inference.predictor.Predictor`.
        n_threads: likewise.

    Raises:
        BundleError: missing, incomplete or damaged, or without that variant.
    """

    def __init__(self, paths: Sequence[Path], variant: str | None = None, n_threads: int = 0) -> None:
        self.predictors = [Predictor(path, variant, n_threads) for path in paths]
        self.task = self.predictors[0].task
        self.ids = [predictor.info.bundle_id for predictor in self.predictors]

    def probs_of_cleaned(self, cleaned: Sequence[str]) -> np.ndarray:
        """The mean answers for cleaned texts, float32 [n_texts, n_labels]; NaN where a text has no tokens for one of them."""
        return np.mean([predictor.probs_of_cleaned(cleaned) for predictor in self.predictors], axis=0)

    @property
    def widths(self) -> list[int]:
        """The sizes of their embeddings."""
        return [one.run([one.encode("a")]).embeddings.shape[1] for one in self.predictors]

    def outputs_of_cleaned(self, cleaned: Sequence[str]) -> Output:
        """As :meth:`probs_of_cleaned`, and the mean embeddings, which must have one size."""
        width, n_labels = self.widths[0], len(self.predictors[0].info.labels)
        total = Output(np.zeros((len(cleaned), n_labels), np.float32), np.zeros((len(cleaned), width), np.float32))
        for predictor in self.predictors:
            has_tokens = np.zeros(len(cleaned), bool)
            for places, output in predictor.batches(cleaned):
                has_tokens[places] = True
                for sums, values in zip(total, output, strict=True):
                    sums[places] += values / len(self.predictors)
            for sums in total:
                sums[~has_tokens] = np.nan
        return total


def median_times_s(sides: Sequence[Sequence[Predictor]], texts: Sequence[str]) -> tuple[list[float], int]:
    """The median time in which all predictors of each side answer one cleaned text, in seconds; and the number of texts."""
    timed = [texts[i] for i in np.linspace(0, len(texts) - 1, min(_N_TIMED, len(texts))).astype(int)]
    times_s: list[list[float]] = [[] for _ in sides]
    # The sides alternate, so that other load on the machine affects all.
    for text in timed[:_N_WARM_UP] + timed:
        for side, elapsed_s in zip(sides, times_s, strict=True):
            start_s = time.perf_counter()
            for predictor in side:
                predictor.run([predictor.encode(text)])
            elapsed_s.append(time.perf_counter() - start_s)
    return [float(np.median(elapsed_s[_N_WARM_UP:])) for elapsed_s in times_s], len(timed)
