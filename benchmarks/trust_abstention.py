"""Whether thresholds on confidence keep their target accuracy, and label sets their coverage, on other rows than those of val.

    python benchmarks/trust_abstention.py RUN/bundle --splits data/processed/tweets

The bundle answers the rows of val and test once. Then these rows are divided at random into a val and a test of the same sizes,
200 times; each time thresholds and cutoffs are chosen on val, as an export does, and measured on test. Prints two tables.
"""

import argparse
from pathlib import Path

import numpy as np

from sodaops.data.preprocess import read_split
from sodaops.inference.predictor import Predictor
from sodaops.tasks.abstention import choose_cutoff, choose_threshold, share


def read_answers(bundle: str, variant: str | None, splits: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str], int]:
    """Probabilities, predicted and true label ids of the rows of val and test, the labels, and the number of rows of val."""
    predictor = Predictor(bundle, variant)
    probs, truth, n_rows = [], [], []
    for split in ("val", "test"):
        table = read_split(Path(splits), split)
        answers = predictor.probs_of_cleaned(table["text"].to_pylist())
        kept = ~np.isnan(answers).any(axis=1)
        probs.append(answers[kept])
        truth.append(predictor.task.truth(table)[kept])
        n_rows.append(int(kept.sum()))
    every = np.concatenate(probs)
    return every, predictor.task.groups(every), np.concatenate(truth), predictor.info.labels, n_rows[0]


def lowest_on_val(confidence: np.ndarray, is_right: np.ndarray, target: float) -> float | None:
    """The lowest threshold at which the accuracy on val itself is the target: without any bound."""
    order = np.argsort(-confidence)
    kept = np.flatnonzero(np.cumsum(is_right[order]) / np.arange(1, len(order) + 1) >= target)
    if not len(kept):
        return None
    return float(confidence[order][kept[-1] + 1]) if kept[-1] + 1 < len(order) else 0.0


def threshold_rows(
    confidence: np.ndarray, is_right: np.ndarray, redraws: list[tuple[np.ndarray, np.ndarray]], targets: list[float]
) -> list[str]:
    """A row of the first table for each way to choose and each target."""
    rows = []
    for target in targets:
        for title, choose in (("with the bound", choose_threshold), ("without it", lowest_on_val)):
            measured = []
            for val, test in redraws:
                threshold = choose(confidence[val], is_right[val], target)
                if threshold is not None:
                    stays = confidence[test] > threshold
                    measured.append((stays.mean(), share(is_right[test][stays])))
            if not measured:
                rows.append(f"| {target:g} | {title} | {len(redraws)} | – | – | – | – |")
                continue
            held = np.mean([of["high"] >= target for _, of in measured])
            reached = np.mean([of["n"] == 0 or of["share"] >= target for _, of in measured])
            accuracy = np.mean([of["share"] for _, of in measured if of["n"]])
            rows.append(
                f"| {target:g} | {title} | {len(redraws) - len(measured)} | {held:.1%} | {reached:.1%} | {accuracy:.3f} | "
                f"{np.mean([coverage for coverage, _ in measured]):.1%} |"
            )
    return rows


def set_rows(
    probs: np.ndarray, truth: np.ndarray, redraws: list[tuple[np.ndarray, np.ndarray]], labels: list[str], coverage: float
) -> list[str]:
    """A row of the second table for each label."""
    rows, sizes = [], []
    cutoffs = [[choose_cutoff(probs[val][truth[val] == i, i], coverage) for i in range(len(labels))] for val, _ in redraws]
    for (_, test), of_labels in zip(redraws, cutoffs, strict=True):
        sizes.append((probs[test] >= np.array(of_labels)).sum(1).mean())
    for i, label in enumerate(labels):
        covered = [
            share(probs[test][truth[test] == i, i] >= of_labels[i])
            for (_, test), of_labels in zip(redraws, cutoffs, strict=True)
        ]
        held = np.mean([of["high"] >= coverage for of in covered])
        rows.append(f"| {label} | {coverage:g} | {np.mean([of['share'] for of in covered]):.3f} | {held:.1%} |")
    return [*rows, "", f"{np.mean(sizes):.2f} labels in a set on average."]


def main() -> None:
    """Measures and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--splits", required=True, help="the folder of the splits")
    parser.add_argument("--variant", choices=["float32", "int8"])
    parser.add_argument("--redraws", type=int, default=200)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.9, 0.95])
    parser.add_argument("--coverage", type=float, default=0.9)
    options = parser.parse_args()
    probs, decided, truth, labels, n_val = read_answers(options.bundle, options.variant, options.splits)
    confidence, is_right = probs[np.arange(len(probs)), decided], decided == truth
    rng = np.random.default_rng(0)
    redraws = [(order[:n_val], order[n_val:]) for order in (rng.permutation(len(probs)) for _ in range(options.redraws))]
    print(f"{len(redraws)} redraws of {n_val} rows of val and {len(probs) - n_val} of test; accuracy {is_right.mean():.3f}\n")
    print("| target | threshold | redraws without one | its interval on test reaches it | accuracy on test reaches it "
          "| mean accuracy | mean coverage |\n| --- | --- | --- | --- | --- | --- | --- |")  # fmt: skip
    print("\n".join(threshold_rows(confidence, is_right, redraws, options.targets)))
    print("\n| label | stated coverage | mean coverage on test | its interval on test reaches it |\n| --- | --- | --- | --- |")
    print("\n".join(set_rows(probs, truth, redraws, labels, options.coverage)))


if __name__ == "__main__":
    main()
