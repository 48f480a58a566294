"""Predictions from a bundle: raw texts in, probabilities out, with onnxruntime, tokenizers and numpy alone."""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

from sodaops.bundle import layout, reference
from sodaops.bundle.files import parsing
from sodaops.data.pairs import PartsTokenizer
from sodaops.data.tokens import Tokens, batch_inputs, ids_of, padded_lengths, plan_batches, set_limit, tokenise
from sodaops.errors import BundleError, ConfigError, DataError, nearest, some
from sodaops.io.progress import progress
from sodaops.tasks.abstention import Abstainer
from sodaops.tasks.base import Prediction
from sodaops.text import cleaning, columns

log = logging.getLogger(__name__)
_UNKNOWN = ("[UNK]", "<unk>")


class Output(NamedTuple):
    """The model's output for a batch."""

    probs: np.ndarray  # float32 [n_texts, n_labels], as the task makes them of logits
    embeddings: np.ndarray  # float32 [n_texts, hidden_size]


class Predictor:
    """Predicts with a bundle; cleaning, tokenizer, token limit and labels are the bundle's.

    It reads bundle.json, the tokenizer, one ONNX model and, if there is one, drift.npz, and checks them against their
    hashes.

    Args:
        path: the bundle's folder.
        variant: ``float32`` or ``int8``; None takes the bundle's default, int8 if it passed its check.
        n_threads: threads that share one batch; 0 is ONNX Runtime's default, one per core. Several Python threads may
            call :meth:`run` at once.
        batch_tokens: tokens of a batch of :meth:`probs`, padding included.

    Raises:
        BundleError: missing, incomplete or damaged, or without that variant.
    """

    def __init__(self, path: str | Path, variant: str | None = None, n_threads: int = 0, batch_tokens: int = 2048) -> None:
        self.info = layout.read_info(path)
        self.task, self.limit = layout.task_of(path, self.info), self.info.limit
        self._clean = _cleaner(path, self.info)
        self.variant = _choose_variant(path, self.info, variant)
        self.abstainer = Abstainer(self.info.abstention, self.variant) if self.info.abstention else None
        content = layout.read_file(path, self.info, layout.TOKENIZER)
        # Whether some texts may take very long: the bundle has its own regular expressions, or a user's cleaning.
        self.has_patterns = b'"Regex"' in content or self.info.cleaning not in cleaning.POLICIES
        self._tokenizer_name = f"{path}/{layout.TOKENIZER}"
        with parsing(self._tokenizer_name):
            self._tokenizer = Tokenizer.from_buffer(content)
            n_columns = self._n_columns = len(self.info.text_columns)
            self._parts = PartsTokenizer(self._tokenizer, n_columns, self.limit.max_tokens) if n_columns > 1 else None
            set_limit(self._tokenizer, self.limit)
        self._n_special = len(self.encode(""))
        model = layout.ONNX[self.variant]
        with parsing(Path(path) / model, "export it again."):
            names = ["input_ids", "attention_mask", *(["windows"] if self.limit.max_windows else [])]
            self._session = _session(layout.read_file(path, self.info, model), n_threads, names)
        self._budget = max(batch_tokens, self.info.max_tokens)
        self._unknown_id = next((i for i in map(self._tokenizer.token_to_id, _UNKNOWN) if i is not None), -1)
        self._axes = reference.read_axes(path, self.info) if layout.DRIFT in self.info.files else None

    def clean(self, text: str) -> str:
        """One raw text, cleaned as the training texts were; for several columns see :mod:`sodaops.text.columns`.

        Raises:
            BundleError: a user's cleaning fails on this text.
            DataError: it does not have as many parts as the bundle has text columns.
        """
        try:
            return self._clean(text) if self._parts is None else columns.clean_parts(text, self._n_columns, self._clean)
        except ConfigError as error:  # its message may quote the text
            cause = type(error.__cause__ or error).__name__
            raise BundleError(
                f"{self.info.cleaning}: failed on a text ({cause}); expected a function from any str to a str."
            ) from None

    def encode(self, cleaned: str) -> np.ndarray:
        """Token ids of one cleaned text within the bundle's token limit, int64 [n_tokens]; its windows one after the other.

        Raises:
            BundleError: the tokenizer fails on this text.
        """
        try:
            if self._parts:
                return np.array(next(self._parts.encode([cleaned]))[0], dtype=np.int64)
            if self.has_patterns:  # it may take long; unlike encode, this releases the GIL
                return np.array(ids_of(self._tokenizer.encode_batch_fast([cleaned])[0], self.limit), dtype=np.int64)
            return np.array(ids_of(self._tokenizer.encode(cleaned), self.limit), dtype=np.int64)
        except BaseException:  # the tokenizer's Rust code may panic, which is no Exception
            with parsing(self._tokenizer_name):
                raise

    def is_empty(self, row: np.ndarray) -> bool:
        """Whether a text gave no tokens but special ones: it has no characters, or none that the tokenizer knows."""
        return len(row) <= self._n_special

    def tokenise(self, cleaned: Sequence[str]) -> Tokens:
        """Token ids of cleaned texts, cut at the bundle's token limit; empty ones have no prediction."""
        with parsing(self._tokenizer_name):
            return tokenise(self._tokenizer, cleaned, self.limit)

    def run(self, rows: Sequence[np.ndarray]) -> Output:
        """Computes one batch of token ids, padded to the longest; no ids at all count as one token of padding."""
        rows = [row if len(row) else np.array([self.info.pad_token_id]) for row in rows]
        inputs = batch_inputs(rows, self.info.pad_token_id, self.limit)
        logits, embeddings = self._session.run(["logits", "embeddings"], inputs)
        return Output(self.task.probs(logits), embeddings)

    def descriptors(self, cleaned: str, row: np.ndarray) -> reference.Descriptors:
        """The descriptors of a cleaned text, given its token ids; of a truncated one, those of words within the limit."""
        within_limit, limit = cleaned, self.limit
        if len(row) >= limit.max_tokens and self._parts:
            within_limit = self._parts.within_limit(cleaned)
        elif len(row) >= limit.max_tokens:
            first = self._tokenizer.encode_batch([cleaned])[0]
            windows = [first, *(first.overflowing[: limit.max_windows - 1] if limit.max_windows else [])]
            within_limit = cleaned[: max(end for window in windows for _, end in window.offsets)]
        n_pieces, n_unknown = len(row) - self._n_special, int((row == self._unknown_id).sum())
        if (n_windows := limit.n_windows(len(row))) > 1:
            n_read = len(row) - n_windows * self._n_special
            n_pieces = n_read - (n_windows - 1) * limit.stride  # without those that windows share
            n_unknown = round(n_unknown * n_pieces / max(1, n_read))
        return reference.describe_text(cleaned, n_pieces, n_unknown, len(within_limit.split()))

    def sketch(self, embeddings: np.ndarray) -> np.ndarray | None:
        """Sketches of embeddings, float32 [n, n_axes]; None if the bundle has no drift reference."""
        return None if self._axes is None else self._axes.sketch(embeddings)

    def probs(self, texts: Sequence[str]) -> np.ndarray:
        """Probabilities of raw texts, in their order.

        Args:
            texts: raw; cleaned here.

        Returns:
            float32 [n_texts, n_labels].

        Raises:
            DataError: a text that is empty after cleaning, or has no tokens.
        """
        probs = self.probs_of_cleaned([self.clean(text) for text in texts])
        empty = (np.flatnonzero(np.isnan(probs).any(axis=1)) + 1).tolist()
        if empty:
            raise DataError(
                f"text {some(empty)}: empty after cleaning ({self.info.cleaning}) or without tokens; give a text with words."
            )
        return probs

    def probs_of_cleaned(self, cleaned: Sequence[str]) -> np.ndarray:
        """Probabilities of texts that are cleaned already, float32 [n_texts, n_labels]; NaN for those without tokens."""
        probs = np.full((len(cleaned), len(self.info.labels)), np.nan, dtype=np.float32)
        for places, output in self.batches(cleaned):
            probs[places] = output.probs
        return probs

    def batches(self, cleaned: Sequence[str]) -> Iterator[tuple[np.ndarray, Output]]:
        """Computes cleaned texts as :meth:`plan` groups them; yields the indices of each batch, int64 [n], and its output."""
        with progress(total=len(cleaned), desc="predicting", unit="text") as bar:
            for places, rows in self.plan(cleaned):
                yield places, self.run(rows)
                bar.update(len(places))

    def plan(self, cleaned: Sequence[str]) -> list[tuple[np.ndarray, list[np.ndarray]]]:
        """Tokenises cleaned texts and groups those of similar length into batches for :meth:`run`, the longest last.

        Texts without tokens are in no batch.

        Returns:
            For each batch the indices of its texts, int64 [n], and their token ids, int32 [n_tokens] each.
        """
        tokens = self.tokenise(cleaned)
        rows, kept = tokens.rows, tokens.kept
        lengths = padded_lengths(tokens.offsets, self.limit)[kept]
        batches = [kept[places] for places in plan_batches(lengths, self._budget, None)]
        return [(places, [rows[i] for i in places]) for places in batches]

    def prediction(self, row: np.ndarray) -> Prediction:
        """The prediction for a row of probabilities, float32 [n_labels]."""
        return self.task.prediction(row.tolist(), self.info.labels)

    @property
    def has_thresholds(self) -> bool:
        """Whether the bundle abstains from some predictions."""
        return self.abstainer is not None and bool(self.abstainer.levels["thresholds"])

    def require_thresholds(self, key: str) -> None:
        """Raises a ConfigError that names ``key`` if the bundle abstains from nothing."""
        if not self.has_thresholds:
            raise ConfigError(
                f"{key}: bundle {self.info.bundle_id} has no thresholds; `sodaops export BUNDLE evaluate.target_accuracy=0.95` "
                "adds them."
            )

    def reason(self, prediction: Prediction) -> str | None:
        """Why the bundle abstains from a prediction; None: it does not, or has no thresholds."""
        return self.abstainer.reason(*self.task.logged(prediction)) if self.abstainer else None

    def predict(self, texts: Sequence[str]) -> list[Prediction]:
        """The predictions for raw texts, in their order."""
        return [self.prediction(row) for row in self.probs(texts)]


def _cleaner(path: str | Path, info: layout.BundleInfo) -> Callable[[str], str]:
    """The bundle's cleaning; a user's function only if it is allowed."""
    if not cleaning.is_allowed(info.cleaning):
        raise BundleError(
            f"{path}: cleans texts with {info.cleaning}, which bundles may not run here. If you trust it, set "
            f"{cleaning.VARIABLE}={info.cleaning}, or install a package with this entry point in the group {cleaning.GROUP}."
        )
    try:
        if not cleaning.code_of(info.cleaning).items() <= info.versions.items():
            log.warning(
                "%s: the code of %s has changed since the training; train again if it cleans otherwise", path, info.cleaning
            )
        return cleaning.cleaner(info.cleaning)
    except ConfigError as error:
        raise BundleError(f"{path}: {error}") from error


def _choose_variant(path: str | Path, info: layout.BundleInfo, variant: str | None) -> str:
    if not info.onnx:
        raise BundleError(f"{path}: has no ONNX model; make one with `sodaops export {path}`.")
    if variant is not None and variant not in info.onnx:
        known = "" if variant in layout.ONNX else nearest(variant, info.onnx)
        raise BundleError(f"{path}: has no variant {variant}{known}; it has {', '.join(info.onnx)}.")
    return variant or info.default_variant


def _names_other_files(model: bytes) -> bool:
    """Whether a tensor of an ONNX model lies in another file, which the bundle does not hash.

    Such a tensor has a key "location"; in a protobuf its length stands before it: 8, or 0 as the end of a longer spelling of 8.
    """
    place = model.find(b"location")
    while place > 0 and model[place - 1] not in (0, 8):
        place = model.find(b"location", place + 1)
    return place > 0


def _session(model: bytes, n_threads: int, inputs: list[str]) -> onnxruntime.InferenceSession:
    if _names_other_files(model):
        raise ValueError("weights in another file")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = n_threads
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False  # it helps with shapes that repeat; texts have many
    options.log_severity_level = 3
    options.add_session_config_entry("session.load_model_format", "ONNX")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    session._model_bytes = None  # kept for a change of providers; as large as the model
    names = ([node.name for node in session.get_inputs()], [node.name for node in session.get_outputs()])
    if names != (inputs, ["logits", "embeddings"]):
        raise ValueError(f"other inputs and outputs: {names}")
    return session
