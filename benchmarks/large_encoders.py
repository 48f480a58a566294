"""Memory and speed of training large encoders: all weights, the head alone, and LoRA adapters.

    python benchmarks/large_encoders.py [--steps N] [--quality] [--encoder NAME]... [--method NAME]... [KEY=VALUE]...

Each row is a training in a process of its own, in float32, on the same batches of up to `optim.batch_tokens` tokens. The memory
is the process's resident memory at its peak, and what training added to that before the first step. With --quality the
encoders with pretrained weights are trained for three epochs, and the best macro-F1 on val is shown. `make model-mpnet` makes
the encoder of 110 M parameters; the one of 400 M has random weights.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import lightning as L
from tqdm import tqdm

from sodaops.config.compose import compose

LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 5504}
ENCODERS = {"22 M": ["model=minilm"], "110 M": ["model=mpnet", "optim.lr=5e-5"], "400 M": []}
LAYERS = {"22 M": 6, "110 M": 12, "400 M": 24}
LORA = ["model.lora={{}}", "optim.lr=1e-3", "optim.layer_decay=1.0"]
METHODS = {"full": [], "frozen": ["optim.frozen_layers={}"], "LoRA": LORA}
N_WARMUP = 2  # steps that are not timed


def resident_mb(field: str) -> float:
    """Resident memory of this process in MB: VmRSS now, VmHWM at its peak."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024 / 1e6


class Meter(L.Callback):
    """Measures time and memory of the training, and keeps the best macro-F1 on val."""

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far, of reading the weights, is forgotten
        self.before_mb, self.n_texts, self.peak_mb, self.macro_f1 = resident_mb("VmRSS"), 0, 0.0, 0.0

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: object, batch: dict, i: int) -> None:
        self.n_texts += len(batch["targets"]) if trainer.global_step > N_WARMUP else 0
        if trainer.global_step == N_WARMUP:
            self.start_s = time.perf_counter()
        self.end_s, self.peak_mb = time.perf_counter(), resident_mb("VmHWM")

    def on_validation_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.macro_f1 = max(self.macro_f1, float(trainer.callback_metrics.get("val/macro_f1", 0)))


def make_large(folder: str) -> None:
    """Saves BERT's architecture with random weights and MiniLM's tokenizer."""
    from transformers import AutoModel, AutoTokenizer, BertConfig

    from sodaops.modeling.pretrained import _locate

    _, source = _locate(compose([]).model)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    AutoModel.from_config(BertConfig(**LARGE), add_pooling_layer=False).save_pretrained(folder)


def train(overrides: list[str]) -> None:
    """Trains in this process, and prints what was measured as JSON."""
    from sodaops.training.fit import fit

    meter = Meter()
    fit(compose(overrides), callbacks=[meter])
    rate = meter.n_texts / (meter.end_s - meter.start_s)
    print(json.dumps([rate, meter.peak_mb, meter.peak_mb - meter.before_mb, meter.macro_f1]))


def child(*arguments: str) -> str:
    """The last line that this program prints in a process of its own."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return (done.stdout.strip().splitlines() or [""])[-1]


def main() -> None:
    """Prints a Markdown table with a row for each encoder and method."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10, help=f"of each training; the first {N_WARMUP} are not timed")
    parser.add_argument("--quality", action="store_true", help="train for three epochs instead of so many steps")
    parser.add_argument("--encoder", action="append", choices=ENCODERS, help="may be repeated; by default all")
    parser.add_argument("--method", action="append", choices=METHODS, help="may be repeated; by default all")
    args, more = parser.parse_known_args()
    if more[:1] == ["train"]:
        train(more[1:])
        return
    if more[:1] == ["make"]:
        make_large(more[1])
        return
    encoders = [name for name in args.encoder or ENCODERS if not args.quality or name != "400 M"]
    print("| encoder | trained | examples/s | peak MB | added by training | val macro-F1 |\n|" + " --- |" * 6)
    with tempfile.TemporaryDirectory() as folder:
        if "400 M" in encoders:
            child("make", f"{folder}/encoder")
        for encoder, method in tqdm([(e, m) for e in encoders for m in args.method or METHODS], leave=False):
            own = [text.format(LAYERS[encoder]) for text in METHODS[method]]
            base = ENCODERS[encoder] or [f"model.name_or_path={folder}/encoder"]
            limits = ["trainer.max_epochs=3"]
            if not args.quality:
                limits = ["trainer.max_epochs=1", f"trainer.limit_train_batches={args.steps}", "trainer.limit_val_batches=1"]
            common = ["trainer.precision=32-true", "trainer.enable_checkpointing=false", "logger=none", f"run_dir={folder}/run"]
            rate, peak, added, macro_f1 = json.loads(child("train", *base, *common, *limits, *own, *more))
            quality = f"{macro_f1:.3f}" if args.quality else "-"
            tqdm.write(f"| {encoder} | {method} | {rate:.1f} | {peak:,.0f} | {added:,.0f} | {quality} |", file=sys.stdout)


if __name__ == "__main__":
    main()
