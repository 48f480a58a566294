"""store.json: what makes a folder an annotation store."""

import json
from pathlib import Path

from sodaops.errors import DataError

FORMAT = 1
INFO = "store.json"
_MEND = "`sodaops annotate pick` or `sodaops annotate import FILE` makes one, or name another with annotate.store"


def read_labels(folder: Path) -> list[str]:
    """The labels of the store in a folder, in order.

    Raises:
        DataError: no store, or a damaged one.
    """
    if not (folder / INFO).is_file():
        what = f"there is no {INFO}" if folder.is_dir() else "no such folder"
        raise DataError(f"{folder}: no annotation store, {what}; {_MEND}.")
    try:
        info = json.loads((folder / INFO).read_text(encoding="utf-8"))
        version, labels = info["format"], info["labels"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / INFO}: not readable ({error!r}); take it from a backup, or {_MEND}.") from None
    if version != FORMAT or not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise DataError(f"{folder / INFO}: format={version!r}, labels={labels!r}; expected format {FORMAT} and strings.")
    return labels
