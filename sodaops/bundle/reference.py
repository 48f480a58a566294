"""The drift reference of a bundle (drift.npz): numbers about its own texts, with which requests are compared.

A row of the reference is a text of the train or the val split. The descriptors of a request's text (length, letters, word
pieces) and its predicted label are compared with both splits, other answers and its embedding with val alone: a model is more
confident on texts that it was trained on, so that every new text would look like drift. No text is kept.
"""

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sodaops.bundle import layout
from sodaops.bundle.files import parsing
from sodaops.errors import BundleError

FORMAT = 1
MAX_CELL_CHARS = 64  # of a cell of a slice column, and of a request's value for it
_MAX_BYTES = 2**30  # uncompressed
_KINDS = {  # array -> kind of its numbers, and its number of axes
    "descriptors": ("f", 2), "seen": ("b", 1), "label_ids": ("i", 1), "scores": ("f", 1), "sketches": ("f", 2),
    "center": ("f", 1), "axes": ("f", 2), "answers": ("f", 2),
    "truth": ("i", 1), "segments": ("U", 2),
}  # fmt: skip


class Descriptors(NamedTuple):
    """Numbers about a cleaned text, from which the text cannot be recovered."""

    n_chars: int
    letters: float  # share of the characters that are letters, of any script
    non_ascii: float  # share of the characters outside ASCII
    pieces_per_word: float  # word pieces per word: near 1 for words that the tokenizer knows, more for others
    unknown: float  # share of the word pieces that are the unknown token


def describe_text(cleaned: str, n_pieces: int, n_unknown: int, n_words: int) -> Descriptors:
    """Computes the descriptors of a text.

    Args:
        cleaned: not empty.
        n_pieces: word pieces, special tokens not counted.
        n_unknown: how many of them are the unknown token.
        n_words: words that the pieces were made from.

    >>> describe_text("so gut!", 4, 1, 2)
    Descriptors(n_chars=7, letters=0.7143, non_ascii=0.0, pieces_per_word=2.0, unknown=0.25)
    """
    n_letters = sum(map(str.isalpha, cleaned))
    n_ascii = len(cleaned.encode("ascii", "ignore"))
    shares = (n_letters / len(cleaned), 1 - n_ascii / len(cleaned), n_pieces / max(1, n_words), n_unknown / max(1, n_pieces))
    return Descriptors(len(cleaned), *(round(share, 4) for share in shares))


@dataclass(frozen=True)
class Axes:
    """A projection of embeddings to a few numbers, their sketch: the principal axes of train, each scaled to variance 1."""

    center: np.ndarray  # float32 [hidden_size]
    axes: np.ndarray  # float32 [hidden_size, n_axes]

    def sketch(self, embeddings: np.ndarray) -> np.ndarray:
        """Sketches of embeddings float32 [n, hidden_size], float32 [n, n_axes]."""
        return (embeddings - self.center) @ self.axes


@dataclass(frozen=True)
class Reference:
    """The rows of the reference, as arrays of one length, and the axes of their sketches."""

    descriptors: np.ndarray  # float32 [n_rows, 5], in the order of Descriptors
    seen: np.ndarray  # bool [n_rows]: whether the text is of train
    label_ids: np.ndarray  # int16 [n_rows]: predicted; or another task's groups of texts
    scores: np.ndarray  # float32 [n_rows]: probabilities of these
    sketches: np.ndarray  # float16 [n_rows, n_axes]
    center: np.ndarray  # as in Axes
    axes: np.ndarray  # as in Axes
    answers: np.ndarray | None = None  # float32 [n_rows, n_labels], if the task keeps them or estimates its quality
    truth: np.ndarray | None = None  # int16 [n_rows]: label ids of val, -1 for train; older bundles lack it and the next
    segments: np.ndarray | None = None  # str [n_rows, n_columns]: cells of the slice columns, in the bundle's order


def write_reference(folder: Path, reference: Reference) -> None:
    """Writes drift.npz; equal references give equal bytes."""
    arrays = {name: array for name, array in vars(reference).items() if array is not None}
    np.savez_compressed(folder / layout.DRIFT, format=np.int64(FORMAT), **arrays)


def read_reference(path: str | Path, info: layout.BundleInfo) -> Reference:
    """Reads a bundle's reference, checked against its hash.

    Raises:
        BundleError: there is none, or it cannot be read.
    """
    optional = [field.name for field in fields(Reference) if field.default is None]
    return Reference(**_arrays(path, info, [field.name for field in fields(Reference)], optional))


def read_axes(path: str | Path, info: layout.BundleInfo) -> Axes:
    """Reads the projection of embeddings alone, which is all that serving needs.

    Raises:
        BundleError: there is none, or it cannot be read.
    """
    return Axes(**_arrays(path, info, ["center", "axes"]))


def _arrays(
    path: str | Path, info: layout.BundleInfo, names: Sequence[str], optional: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    if layout.DRIFT not in info.files:
        raise BundleError(f"{path}: has no drift reference; `sodaops export {path}` adds it.")
    content = layout.read_file(path, info, layout.DRIFT)
    with parsing(Path(path) / layout.DRIFT, f"`sodaops export {path}` writes it again."):
        n_bytes = sum(entry.file_size for entry in zipfile.ZipFile(io.BytesIO(content)).infolist())
        if n_bytes > _MAX_BYTES:
            raise ValueError(f"{n_bytes} bytes; expected at most {_MAX_BYTES}")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            if int(arrays["format"]) != FORMAT:
                raise ValueError(f"format {arrays['format']}; this version reads {FORMAT}")
            return {name: _checked(name, arrays[name]) for name in names if name in arrays or name not in optional}


def _checked(name: str, array: np.ndarray) -> np.ndarray:
    kinds, n_axes = _KINDS[name]
    if array.dtype.kind not in kinds or array.ndim != n_axes or (array.dtype.kind == "f" and not np.isfinite(array).all()):
        raise ValueError(f"{name} is {array.dtype}{list(array.shape)}, or has numbers that are not finite")
    return array
