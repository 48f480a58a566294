"""Quality estimated without labels."""

import numpy as np
import pytest

from sodaops.errors import DataError
from sodaops.tasks.estimate import Calibration, calibrate, estimate
from sodaops.tasks.metrics import confusion, summary


def texts(rng: np.random.Generator, n: int, sharpness: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """Calibrated probabilities of three labels, the first of which is frequent, and truths drawn from them."""
    powers = np.exp(sharpness * rng.normal(size=(n, 3)) + [1.5, 0, 0])
    probs = powers / powers.sum(axis=1, keepdims=True)
    return probs, (rng.random((n, 1)) > probs.cumsum(axis=1)).sum(axis=1)


def actual(probs: np.ndarray, truth: np.ndarray) -> list[float]:
    measured = summary(confusion(truth, probs.argmax(1), 3))
    return [float(measured[name]) for name in ("accuracy", "macro_f1")]


def test_calibrated_probabilities_give_the_metrics_that_labels_would():
    rng, errors, covered = np.random.default_rng(0), [], []
    for _ in range(200):
        probs, truth = texts(rng, 200)
        found = [*estimate(probs, probs.argmax(1), n_samples=200).values()]
        errors.append([metric.value - true for metric, true in zip(found, actual(probs, truth), strict=True)])
        covered.append([m.low <= true <= m.high for m, true in zip(found, actual(probs, truth), strict=True)])
    assert np.abs(np.mean(errors, axis=0)).max() < 0.005  # no bias
    assert np.abs(errors).mean(axis=0).max() < 0.022  # the noise of 200 labels
    assert np.mean(covered, axis=0).min() >= 0.95


def test_overconfidence_on_val_is_corrected_and_noise_is_not():
    rng = np.random.default_rng(1)
    sharp, truth = texts(rng, 8000)
    sharp = sharp**3 / (sharp**3).sum(axis=1, keepdims=True)  # overconfident
    val, window = np.arange(8000) < 4000, np.arange(8000) >= 4000
    calibration = calibrate(sharp[val], sharp[val].argmax(1), truth[val])
    raw, corrected = (
        np.array([metric.value for metric in estimate(sharp[window], sharp[window].argmax(1), *given).values()])
        for given in ((), (calibration,))
    )
    true = np.array(actual(sharp[window], truth[window]))
    assert (raw - true).min() > 0.04 > 0.02 > np.abs(corrected - true).max()
    shifts = []
    for _ in range(50):
        probs, truth = texts(rng, 400)
        shifts.append(calibrate(probs, probs.argmax(1), truth, n_samples=200))
    assert np.mean([shift.shift == 0 for shift in shifts]) > 0.6  # chance alone gives a gap of more than its error in a third
    assert np.mean([shift.error for shift in shifts], axis=0) == pytest.approx([0.016, 0.018], abs=0.003)


def test_the_calibrations_error_widens_the_interval():
    probs, _ = texts(np.random.default_rng(2), 5000)
    sure, unsure = (
        estimate(probs, probs.argmax(1), Calibration(np.zeros(2), np.full(2, error)))["accuracy"] for error in (0.0, 0.05)
    )
    assert unsure.high - unsure.low > 0.15 > 0.03 > sure.high - sure.low
    assert sure.value == unsure.value == pytest.approx(probs.max(1).mean())


def test_labels_that_a_window_has_not_count_as_in_the_metric_itself():
    probs = np.tile([0.89, 0.11, 1e-6], (100, 1))
    probs[50:] = probs[50:, [1, 0, 2]]
    assert estimate(probs, probs.argmax(1))["macro_f1"].value == pytest.approx(0.89, abs=0.001)


@pytest.mark.parametrize("probs, predicted", [
    (np.empty((0, 2)), np.empty(0, int)), (np.ones((2, 2)), np.zeros(3, int)), (np.full((2, 2), np.nan), np.zeros(2, int)),
])  # fmt: skip
def test_input_that_has_no_metrics(probs, predicted):
    with pytest.raises(DataError):
        estimate(probs, predicted)
    with pytest.raises(DataError):
        calibrate(probs, predicted, predicted)
