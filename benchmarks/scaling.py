"""Measures training steps by length of text, size of model and number of processes.

A step is forward, backward, clipping and AdamW on a batch of 1,024 tokens with soft targets, as in `fit`. The encoders have
BERT's architecture and random weights. Each round measures all points in turn.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import BertConfig, BertModel

from sodaops.config.compose import compose
from sodaops.modeling.encoder import TextEncoder
from sodaops.modeling.optim import make_optimizer, parameter_groups

BUDGET = 1024
MINILM = (6, 384, 12, 30522)
LENGTHS = (8, 16, 32, 64, 128, 256)
MODELS = {
    "tiny": (2, 64, 2, 2000),
    "MiniLM": MINILM,
    "DistilBERT's size": (6, 768, 12, 30522),
    "BERT base's": (12, 768, 12, 30522),
}
POOLS = [(1, 1), (1, 2), (2, 1)]  # processes, threads of each


class Training:
    """An encoder that takes steps on random tokens.

    Args:
        geometry: layers, width, heads, vocabulary.
        n_tokens: tokens of each text.
    """

    def __init__(self, geometry: tuple[int, int, int, int], n_tokens: int) -> None:
        layers, width, heads, vocabulary = geometry
        settings = BertConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
        )
        torch.manual_seed(0)
        self.model = TextEncoder(BertModel(settings, add_pooling_layer=False).train(), 3)
        self.module: torch.nn.Module = self.model
        optim = compose([]).optim
        self.optimizer = make_optimizer(parameter_groups(self.model, optim), optim)
        self.n_texts = BUDGET // n_tokens
        self.ids = torch.randint(vocabulary, (self.n_texts, n_tokens))
        self.targets = torch.softmax(torch.randn(self.n_texts, 3), -1)
        self.n_parameters = sum(parameter.numel() for parameter in self.model.parameters())

    def step(self) -> float:
        """Takes one step and returns its seconds."""
        start_s = time.perf_counter()
        F.cross_entropy(self.module(self.ids, torch.ones_like(self.ids)).logits, self.targets).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start_s


def run_process(rank: int, n_steps: int) -> None:
    """Runs one of several processes that torchrun started; the first prints the texts/s of all together."""
    torch.distributed.init_process_group("gloo")
    training = Training(MINILM, 32)
    if torch.distributed.get_world_size() > 1:
        training.module = torch.nn.parallel.DistributedDataParallel(training.model)
    seconds = [training.step() for _ in range(n_steps)][2:]
    if rank == 0:
        print(training.n_texts * torch.distributed.get_world_size() / statistics.median(seconds))
    torch.distributed.destroy_process_group()


def measure_processes(n_processes: int, n_threads: int, n_steps: int) -> float:
    """Starts processes on this machine and returns their texts/s together."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_processes}", __file__]
    done = subprocess.run(
        [*command, "--steps", str(n_steps)], env={**os.environ, "OMP_NUM_THREADS": str(n_threads)},
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return float(done.stdout.split()[-1])


def measure(rounds: int, n_steps: int) -> tuple[dict[object, list[float]], dict[object, Training]]:
    """The texts/s of each point in each round."""
    trainings: dict[object, Training] = {length: Training(MINILM, length) for length in LENGTHS}
    trainings |= {name: Training(geometry, 32) for name, geometry in MODELS.items()}
    rates: dict[object, list[float]] = {point: [] for point in [*trainings, *POOLS]}
    with tqdm(total=rounds * len(rates), unit="point") as bar:
        for _ in range(rounds):
            for point, training in trainings.items():
                training.step()
                rates[point].append(training.n_texts / statistics.median(training.step() for _ in range(n_steps)))
                bar.update()
            for pool in POOLS:
                rates[pool].append(measure_processes(*pool, n_steps))
                bar.update()
    return rates, trainings


def format_tables(rates: dict[object, list[float]], trainings: dict[object, Training], rounds: int) -> str:
    """The tables, as Markdown."""
    rate = {point: statistics.median(values) for point, values in rates.items()}
    method = " ".join(__doc__.split("\n\n")[1].split())
    lines = [
        "# Training, by length, size and processes", "",
        f"{method} Medians of {rounds} rounds; {os.cpu_count()} cores, Python {platform.python_version()}, torch "
        f"{torch.__version__}, float32. Written by `make bench-scaling`.", "",
        "![texts a second by tokens of a text and by parameters](bench_scaling.png)", "",
        "| tokens of a text | texts/s | tokens/s |", "| --- | --- | --- |",
        *(f"| {n} | {rate[n]:,.0f} | {rate[n] * n:,.0f} |" for n in LENGTHS), "",
        "| encoder, texts of 32 tokens | parameters | texts/s |", "| --- | --- | --- |",
        *(f"| {name} | {trainings[name].n_parameters / 1e6:,.1f} M | {rate[name]:,.0f} |" for name in MODELS), "",
        "| MiniLM, texts of 32 tokens, 1,024 tokens in each process | texts/s |", "| --- | --- |",
        *(f"| {n} process{'es' * (n > 1)}, {k} thread{'s' * (k > 1)} each | {rate[n, k]:,.0f} |" for n, k in POOLS),
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def draw(rates: dict[object, list[float]], trainings: dict[object, Training], path: Path) -> None:
    """Draws texts/s by length and by size."""
    from matplotlib.figure import Figure

    rate = {point: statistics.median(values) for point, values in rates.items()}
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.loglog(LENGTHS, [rate[n] for n in LENGTHS], marker="o", base=2)
    left.set(xlabel="tokens of a text (MiniLM)", ylabel="texts a second, training")
    left.set_xticks(LENGTHS, [str(n) for n in LENGTHS])
    sizes = [trainings[name].n_parameters / 1e6 for name in MODELS]
    right.loglog(sizes, [rate[name] for name in MODELS], marker="o")
    for name, size in zip(MODELS, sizes, strict=True):
        right.annotate(name, (size, rate[name]), textcoords="offset points", xytext=(6, 6))
    right.set(xlabel="million parameters (32 tokens)", xlim=(min(sizes) / 2, max(sizes) * 12))
    right.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    for axes in (left, right):
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.grid(True, which="major", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measures, prints the tables, and writes them with ``--write``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="in a round, of which the median counts")
    parser.add_argument("--write", type=Path, help="a Markdown file; a picture goes beside it")
    args = parser.parse_args()
    if "RANK" in os.environ:
        run_process(int(os.environ["RANK"]), args.steps)
        return
    rates, trainings = measure(args.rounds, args.steps)
    text = format_tables(rates, trainings, args.rounds)
    print(text)
    if args.write:
        args.write.write_text(text, encoding="utf-8")
        draw(rates, trainings, args.write.with_suffix(".png"))


if __name__ == "__main__":
    main()
