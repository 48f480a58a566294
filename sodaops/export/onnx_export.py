"""ONNX models for a bundle, each compared with the model that it replaces on real texts before it is kept."""

import contextlib
import io
import logging
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from sodaops.bundle import layout, reference
from sodaops.bundle.save import Loaded, load_bundle
from sodaops.data.preprocess import read_manifest, read_split
from sodaops.data.tokens import batch_inputs, plan_batches, tokenise
from sodaops.errors import ModelError, reason_of
from sodaops.export.drift_reference import make_reference
from sodaops.export.packing import pack
from sodaops.export.quantization import quantize
from sodaops.inference.predictor import Predictor
from sodaops.io import storage
from sodaops.io.progress import progress
from sodaops.tasks.base import Metric, Task

MAX_GAP = 1e-4  # largest difference of a probability, float32 against torch
MAX_LOSS = 0.005  # largest loss of the task's first metric on val, int8 against float32
_BATCH_TOKENS = 2048

log = logging.getLogger(__name__)
Rows = list[np.ndarray]  # token ids of each text
Predict = Callable[[Rows], np.ndarray]  # one padded batch -> probabilities, float32 [n_texts, n_labels]


@dataclass(frozen=True)
class Gate:
    """What a variant was measured at, against the model that it replaces: float32 against torch, int8 against float32."""

    metric: Metric  # the task's first one
    unit: str  # of differences of answers
    score: float  # on val
    score_change: float
    agreement: float  # share of val with equal answers
    mean_gap: float  # mean difference of an answer on val
    max_gap: float  # largest one, on val and on texts of every length, alone and in padded batches
    n_texts: int  # rows of val

    def as_text(self) -> str:
        """The numbers in one line."""
        return (
            f"{self.metric.title} on val {self.score:.4f} ({self.score_change:+.4f}), {self.agreement:.1%} of answers equal, "
            f"differences of {self.unit}: {self.mean_gap:.1e} on average, at most {self.max_gap:.1e}"
        )

    def fields(self) -> dict[str, float]:
        """The numbers for bundle.json."""
        name = self.metric.name
        numbers = {name: self.score, f"{name}_change": self.score_change, "agreement": self.agreement}
        numbers |= {"mean_gap": self.mean_gap, "max_gap": self.max_gap, "n_texts": self.n_texts}
        return {key: float(f"{value:.4g}") for key, value in numbers.items()}


@dataclass(frozen=True)
class Exported:
    """The exported bundle, and what its variants were measured at."""

    info: layout.BundleInfo
    gates: dict[str, Gate]  # of every variant; one that is not in info.onnx failed


@dataclass(frozen=True)
class _Texts:
    val: Rows
    truth: np.ndarray  # of val, as the task reads it
    every_length: Rows  # one text of each length in train and val; of those in several windows, one of each number


def export_onnx(path: str | Path, splits_dir: str | Path, variants: Sequence[str]) -> Exported:
    """Replaces the ONNX models and the drift reference of a bundle; the folder is replaced as a whole.

    float32 must give torch's probabilities within 1e-4: on val, and on texts of every length in train and val, alone and
    in padded batches. int8 may lose at most 0.005 of float32's score, such as macro-F1, on val; else it is not written.

    Args:
        path: the bundle.
        splits_dir: the splits that it was trained with; test is not read.
        variants: of ``float32`` and ``int8``, the latter only with the former.

    Raises:
        BundleError: missing or damaged.
        ConfigError: splits with other labels or another cleaning.
        ModelError: the encoder cannot be exported, or its float32 graph does not give torch's probabilities.
    """
    path, bundle = Path(path), load_bundle(path)
    texts = _read_texts(bundle, Path(splits_dir))
    with storage.atomic_folder(path, layout.NAMES) as folder:
        for name in layout.FILES_OF[bundle.info.format]:
            shutil.copyfile(path / name, folder / name)
        fields, gates = _add_variants(str(path), folder, bundle, variants, texts)
        for variant in gates.keys() - fields["onnx"].keys():
            log.warning("%s: %s is not written: %s", path, variant, gates[variant].as_text())
        if fields["onnx"]:
            layout.write_info(folder, **fields)
            reference.write_reference(folder, _reference(folder, bundle, Path(splits_dir)))
        info = layout.write_info(folder, **fields)
    return Exported(info, gates)


def try_export(name: str, path: Path, variants: Sequence[str], rows: Rows) -> None:
    """Adds ONNX models to a bundle that is thrown away afterwards, so that an encoder is refused before its training.

    Args:
        name: of the encoder, for messages.
        path: the bundle; changed in place.
        variants: as in :func:`export_onnx`.
        rows: token ids of some texts.

    Raises:
        ModelError: as :func:`export_onnx`.
    """
    bundle = load_bundle(path)
    _add_variants(name, path, bundle, variants, _Texts(rows, bundle.task.any_truth(len(rows), len(bundle.info.labels)), rows))


def _add_variants(
    name: str, folder: Path, bundle: Loaded, variants: Sequence[str], texts: _Texts
) -> tuple[dict[str, Any], dict[str, Gate]]:
    """Writes and measures the models; returns the fields of bundle.json, and each variant's measurements."""
    fields = {key: value for key, value in asdict(bundle.info).items() if key not in ("files", "bundle_id", "abstention")}
    fields["onnx"], gates = {}, {}
    for variant in [variant for variant in layout.ONNX if variant in variants]:  # int8 is made from float32
        gates[variant] = gate = _add(variant, folder, bundle, fields, texts)
        if variant == "float32" and gate.max_gap > MAX_GAP:
            raise ModelError(
                f"{name}: the float32 ONNX graph does not give torch's probabilities: {gate.as_text()}; expected at most "
                f"{MAX_GAP:g}. Train with another model, or report this encoder."
            )
        if gate.score_change < -MAX_LOSS:
            (folder / layout.ONNX[variant]).unlink()
            del fields["onnx"][variant]
        else:
            fields["onnx"][variant] |= gate.fields()
    return fields, gates


def _add(variant: str, folder: Path, bundle: Loaded, fields: dict, texts: _Texts) -> Gate:
    """Writes the file of a variant, and measures it as it will be read."""
    file = folder / layout.ONNX[variant]
    if variant == "float32":
        _write_float32(bundle, file)
        expected = _predict_with_torch(bundle)
    else:
        expected = _predict_with_onnx(folder, "float32")
        onnx.save(quantize(onnx.load(folder / layout.ONNX["float32"])), file)
    opset = next(o.version for o in onnx.load(file).opset_import if o.domain == "")
    fields["onnx"][variant] = {"opset": opset}
    layout.write_info(folder, **fields)
    return _measure(variant, bundle.task, expected, _predict_with_onnx(folder, variant), texts)


def _read_texts(bundle: Loaded, splits_dir: Path) -> _Texts:
    layout.check_splits(bundle.info, read_manifest(splits_dir), splits_dir)
    val, train, limit = read_split(splits_dir, "val"), read_split(splits_dir, "train"), bundle.info.limit
    rows, truth = {}, {}
    for name, table in (("val", val), ("train", train)):
        tokens = tokenise(bundle.tokenizer, table["text"].to_pylist(), limit)
        kept = tokens.kept
        rows[name], truth[name] = [tokens.rows[i] for i in kept], bundle.task.truth(table.take(kept))
    all_rows = [*rows["val"], *rows["train"]]
    of_length = {min(len(row), limit.max_tokens + limit.n_windows(len(row))): row for row in all_rows}
    return _Texts(rows["val"], truth["val"], list(of_length.values()))


def _reference(folder: Path, bundle: Loaded, splits_dir: Path) -> reference.Reference:
    """The drift reference of the exported bundle."""
    tables = [read_split(splits_dir, split) for split in ("train", "val")]
    truth = bundle.task.truth(tables[1]) if bundle.task.estimates_quality else None
    names = [f"slice_{name}" for name in bundle.info.slice_columns]
    cells = [
        np.array([[(cell or "")[: reference.MAX_CELL_CHARS] for cell in table[name].to_pylist()] for name in names]).T
        for table in tables if {*names} <= {*table.column_names}
    ]  # fmt: skip
    train, val = (table["text"].to_pylist() for table in tables)
    return make_reference(Predictor(folder), train, val, truth, (cells[0], cells[1]) if names and cells else None)


def _write_float32(bundle: Loaded, file: Path) -> None:
    model = bundle.model
    if hasattr(model.transformer, "set_attn_implementation"):
        model.transformer.set_attn_implementation("eager")  # gives a smaller and faster graph than fused attention
    # The example is padded: from a mask of ones, an exporter may conclude that there is never any padding.
    rows, limit = [np.full(n, bundle.info.pad_token_id + 1) for n in (9, 5, 3)], bundle.info.limit
    if limit.max_windows is not None:
        limit = limit._replace(max_tokens=4)  # so that the example has windows
    inputs = {name: torch.from_numpy(x) for name, x in batch_inputs(rows, bundle.info.pad_token_id, limit).items()}
    for name in ("torch.onnx", "torch.fx", "torch.export", "torch.fx.experimental.symbolic_shapes", "onnx_ir", "onnxscript"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # they report their own progress, and print whole graphs
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens", max=max(9, bundle.info.max_tokens))
    shapes = {name: {0: batch, 1: tokens} for name in inputs}
    if "windows" in shapes:
        shapes["windows"] = {0: torch.export.Dim("texts"), 1: torch.export.Dim("windows")}
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model, tuple(inputs.values()), input_names=[*inputs], output_names=["logits", "embeddings"],
                dynamic_shapes=shapes, verbose=False,
            )  # fmt: skip
    except (torch.onnx.OnnxExporterError, RuntimeError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ModelError(
            f"{type(model.transformer).__name__} cannot be exported to ONNX ({reason_of(cause)}); choose another model, or "
            "keep this one out of service with export.variants=[] evaluate.split=none."
        ) from error
    onnx.save(_without_metadata(pack(program.model_proto)), file)


def _without_metadata(model: onnx.ModelProto) -> onnx.ModelProto:
    """Removes what the exporter records about this machine: stack traces with the paths of source files."""
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.initializer, *graph.value_info, *graph.input, *graph.output):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    return model


def _predict_with_torch(bundle: Loaded) -> Predict:
    def predict(rows: Rows) -> np.ndarray:
        inputs = batch_inputs(rows, bundle.info.pad_token_id, bundle.info.limit)
        with torch.inference_mode():
            return bundle.task.torch_probs(
                bundle.model(**{name: torch.from_numpy(x) for name, x in inputs.items()}).logits
            ).numpy()

    return predict


def _predict_with_onnx(folder: Path, variant: str) -> Predict:
    predictor = Predictor(folder, variant)
    return lambda rows: predictor.run(rows).probs


def _measure(variant: str, task: Task, expected: Predict, candidate: Predict, texts: _Texts) -> Gate:
    # On val, in batches of similar length: the labels and the mean difference.
    before, after = (_in_batches(f"measuring {variant}", predict, texts.val) for predict in (expected, candidate))
    # On one text of every length: each alone, and in batches of 8 random lengths, which are mostly padding.
    lengths = texts.every_length
    alone = np.concatenate([expected([row]) for row in lengths])
    padded = np.empty_like(alone)
    for places in np.array_split(np.random.default_rng(0).permutation(len(lengths)), -(-len(lengths) // 8)):
        padded[places] = candidate([lengths[i] for i in places])
    gaps = [
        task.gap(before, after),
        task.gap(alone, padded),
        task.gap(alone, np.concatenate([candidate([row]) for row in lengths])),
    ]
    score_before, score_after = (task.score(probs, texts.truth) for probs in (before, after))
    return Gate(
        metric=task.metrics[0],
        unit=task.gap_unit,
        score=score_after,
        score_change=score_after - score_before,
        agreement=task.agreement(before, after),
        mean_gap=float(gaps[0].mean()),
        max_gap=float(max(gap.max() for gap in gaps)),
        n_texts=len(texts.val),
    )


def _in_batches(title: str, predict: Predict, rows: Rows) -> np.ndarray:
    """Probabilities of all rows, float32 [n_texts, n_labels], computed in batches of similar length."""
    probs_of: dict[int, np.ndarray] = {}
    with progress(total=len(rows), desc=title, unit="text") as bar:
        for places in plan_batches(np.array([len(row) for row in rows]), _BATCH_TOKENS, None):
            probs_of |= zip(places.tolist(), predict([rows[i] for i in places]), strict=True)
            bar.update(len(places))
    return np.stack([probs_of[i] for i in range(len(rows))])
