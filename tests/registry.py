"""Bundles that differ, for the registry's tests, and the places where a registry can be."""

import shutil
from dataclasses import asdict
from pathlib import Path

from sodaops.bundle import layout


def another(bundle: Path, folder: Path, number: int) -> Path:
    """A copy of a bundle that answers the same under another id, since its configuration's file differs."""
    shutil.copytree(bundle, folder)
    with (folder / layout.CONFIG).open("a", encoding="utf-8") as file:
        file.write(f"# copy {number}\n")
    info = layout.read_info(bundle)
    kept = {key: value for key, value in asdict(info).items() if key not in ("files", "bundle_id", "format")}
    layout.write_info(folder, **kept)
    return folder
