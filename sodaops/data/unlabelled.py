"""Texts without labels (``data.unlabelled``), for a teacher to label."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from sodaops.config.schema import DataConfig, table_format
from sodaops.data.parts import clean_texts
from sodaops.data.sources import read_batches
from sodaops.data.text_files import Layout
from sodaops.errors import DataError
from sodaops.io.progress import progress
from sodaops.io.remote import local_copy
from sodaops.text.near import NearTexts


def unlabelled_tables(config: DataConfig) -> list[str]:
    """The tables of ``data.unlabelled``: itself, or those in the folder and the folders below it, sorted by name.

    Raises:
        DataError: no such file, or a folder without tables.
    """
    if config.unlabelled is None:
        return []
    if not local_copy(config.unlabelled).exists():
        raise DataError(f"data.unlabelled={config.unlabelled}: no such file or folder; check the path.")
    if not Path(config.unlabelled).is_dir():
        return [config.unlabelled]
    tables = sorted(str(path) for path in Path(config.unlabelled).rglob("*") if path.is_file() and table_format(path.name))
    if not tables:
        raise DataError(f"data.unlabelled={config.unlabelled}: has no tables; expected files such as .csv or .parquet.")
    return tables


def check_unlabelled(config: DataConfig) -> None:
    """Reads the first rows of each table.

    Raises:
        DataError: it cannot be read, or lacks a text column.
    """
    for path in unlabelled_tables(config):
        next(_batches(config, path), None)


def read_unlabelled(config: DataConfig, splits: Mapping[str, Sequence[str]], near: float) -> tuple[list[str], dict[str, int]]:
    """The texts to learn from, cleaned, each once.

    Args:
        config: conf/data.
        splits: train, val and test -> their cleaned texts.
        near: a text whose similarity to a text of val or test is at least this is left out (:class:`NearTexts`).

    Returns:
        The texts, and reason -> number of rows that are left out.

    Raises:
        DataError: a table that cannot be read, or lacks a text column.
    """
    seen, held_out = set(splits["train"]), NearTexts([*splits["val"], *splits["test"]], near)
    texts: list[str] = []
    dropped = Counter[str]()
    with progress(desc="reading texts without labels", unit="row") as bar:
        for table in unlabelled_tables(config):
            for batch in _batches(config, table):
                for text in clean_texts(batch, config)[0].to_pylist():
                    if not text:
                        dropped["empty or too long"] += 1
                    elif text in seen:
                        dropped["repeated or in train"] += 1
                    elif held_out.find(text) is not None:
                        dropped["like a text of val or test"] += 1
                    else:
                        seen.add(text)
                        texts.append(text)
                    bar.update(1)
    return texts, dict(dropped)


def _batches(config: DataConfig, table: str) -> Iterator:
    keys = dict.fromkeys(config.text_columns, "data.text_column")
    layout = Layout(config.delimiter, config.encoding) if table == config.unlabelled else Layout()
    return read_batches(table, config.text_columns, layout, keys)
