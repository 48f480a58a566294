"""Answers from a bundle: raw text in, probabilities out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from tqdm import tqdm

from sodaops.bundle.layout import BundleInfo
from sodaops.bundle.save import load_bundle
from sodaops.config import FORMATS, table_format
from sodaops.data.batching import Tokenised, plan_batches, tokenise
from sodaops.data.sources import column_names, read_table, write_table
from sodaops.errors import DataError, some
from sodaops.storage import atomic_path
from sodaops.text import clean


@dataclass(frozen=True)
class Prediction:
    """One answer."""

    label: str
    score: float  # probability of the label, in [0, 1]
    probs: dict[str, float]  # label -> probability, in label order


class Predictor:
    """A bundle that answers; cleaning, tokenizer, token limit and labels are its own.

    Args:
        path: the bundle's folder.
        batch_tokens: token budget of a batch, padding included.
        device: a torch device name.

    Raises:
        BundleError: missing, incomplete or damaged.
    """

    def __init__(self, path: str | Path, batch_tokens: int = 8192, device: str = "cpu") -> None:
        bundle = load_bundle(path)
        self.info: BundleInfo = bundle.info
        self._model = bundle.model.to(device)
        self._tokenizer = bundle.tokenizer
        self._budget = max(batch_tokens, self.info.max_tokens)
        self._device = device

    def probs(self, texts: Sequence[str]) -> np.ndarray:
        """Probabilities of raw texts, in their order.

        Args:
            texts: raw; cleaned here.

        Returns:
            float32 [n_texts, n_labels], rows sum to 1.

        Raises:
            DataError: a text that is empty after cleaning.
        """
        cleaned = [clean(text, self.info.cleaning) for text in texts]
        empty = [i + 1 for i, text in enumerate(cleaned) if not text]
        if empty:
            raise DataError(f"text {some(empty)}: empty after cleaning ({self.info.cleaning}); give a text with words.")
        return self.probs_of_cleaned(cleaned)

    def probs_of_cleaned(self, cleaned: Sequence[str]) -> np.ndarray:
        """Probabilities of texts that the bundle's own policy has cleaned already, float32 [n_texts, n_labels]."""
        n_texts, n_labels = len(cleaned), len(self.info.labels)
        tokens, offsets = tokenise(self._tokenizer, cleaned, self.info.max_tokens)
        blank = np.zeros(n_texts, dtype=np.int64)
        split = Tokenised(tokens, offsets, blank, np.zeros((n_texts, 1), dtype=np.float32), self.info.pad_token_id)
        probs = np.empty((n_texts, n_labels), dtype=np.float32)
        with (
            torch.inference_mode(),
            tqdm(total=n_texts, desc="predicting", unit="text", delay=2, leave=False, disable=None) as bar,
        ):
            for places in plan_batches(split.lengths, self._budget, None):
                batch = split.batch(places)
                logits = self._model(batch["input_ids"].to(self._device), batch["attention_mask"].to(self._device)).logits
                probs[places] = torch.softmax(logits.float(), dim=-1).cpu().numpy()
                bar.update(len(places))
        return probs

    def predict(self, texts: Sequence[str]) -> list[Prediction]:
        """The label, its score and all probabilities of each raw text."""
        answers = []
        for row in self.probs(texts):
            best = int(row.argmax())
            probs = dict(zip(self.info.labels, map(float, row), strict=True))
            answers.append(Prediction(self.info.labels[best], float(row[best]), probs))
        return answers


def predict_table(predictor: Predictor, path: str, text_column: str, output: str) -> int:
    """Answers a table: its columns, cells as text, and label, score and prob_LABEL beside them.

    Rows whose text is empty after cleaning get empty answers.

    Args:
        predictor: the bundle that answers.
        path: .csv, .tsv, .jsonl or .parquet.
        text_column: the column with the raw texts.
        output: .csv, .tsv, .jsonl or .parquet; written whole or not at all.

    Returns:
        How many rows were written.

    Raises:
        DataError: a table that cannot be read, or an output format that is not known.
    """
    if table_format(output) is None or output.endswith(".gz"):
        raise DataError(f"--output {output}: expected a name that ends in {', '.join(FORMATS)}.")
    table = read_table(path, column_names(path, [text_column], "Set --text-column."))
    cleaned = [clean(text, predictor.info.cleaning) for text in table[text_column].to_pylist()]
    full = [i for i, text in enumerate(cleaned) if text]
    probs = predictor.probs_of_cleaned([cleaned[i] for i in full]) if full else np.empty((0, len(predictor.info.labels)))
    answers: dict[str, list] = {name: [None] * len(cleaned) for name in ("label", "score")}
    answers |= {f"prob_{label}": [None] * len(cleaned) for label in predictor.info.labels}
    for i, row in zip(full, probs, strict=True):
        answers["label"][i] = predictor.info.labels[int(row.argmax())]
        answers["score"][i] = float(row.max())
        for label, prob in zip(predictor.info.labels, row, strict=True):
            answers[f"prob_{label}"][i] = float(prob)
    for name, values in answers.items():
        shown = name if name not in table.column_names else f"predicted_{name}"
        table = table.append_column(shown, pa.array(values, pa.string() if name == "label" else pa.float64()))
    with atomic_path(output) as temporary:
        write_table(table, temporary, table_format(output))
    return table.num_rows
