"""Builds data/tables/debian.parquet from Debian's package index: descriptions with their facets; `make data-debian` runs it.

It reads the lists that `apt-get update` has written, and no network. A row is a package with the columns name, source, section,
title (the short description), description (plain text) and facets (list<string>, sorted).

- Packages without `Tag:` are left out: nobody described them, so an empty list would be wrong.
- Packages of one source, or with a long paragraph in common, are one group, of which one package is kept. So no description
  has a near copy in another split, and rows are independent.
- The facets are the 30 most frequent ones of the kept packages. A package that has only other facets keeps an empty list.
"""

import argparse
import bz2
import gzip
import hashlib
import lzma
import re
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sodaops.errors import DataError

LISTS = Path("/var/lib/apt/lists")
FIX = "run `sudo apt-get update -o Acquire::Languages=en` on Debian, or name a folder with its lists by --lists"
N_FACETS, MAX_ROWS = 30, 20_000
_LONG = 100  # characters of a paragraph that two packages do not share by chance
_READ = {
    "": Path.read_bytes,
    ".gz": lambda path: gzip.decompress(path.read_bytes()),
    ".xz": lambda path: lzma.decompress(path.read_bytes()),
    ".bz2": lambda path: bz2.decompress(path.read_bytes()),
    ".lz4": lambda path: pa.CompressedInputStream(pa.OSFile(str(path)), "lz4").read(),
}


def stanzas(folder: Path, suffix: str) -> Iterator[dict[str, str]]:
    """The stanzas of all lists in a folder whose name ends so: field -> value, whose further lines start with a space."""
    files = sorted(path for path in folder.glob(f"*_{suffix}*") if path.name.rpartition(suffix)[2] in _READ)
    if not files:
        raise DataError(f"{folder}: no list *_{suffix}; {FIX}.")
    for path in files:
        for stanza in _READ[path.name.rpartition(suffix)[2]](path).decode().split("\n\n"):
            if fields := dict(re.findall(r"^([\w-]+):[ \t]*(.*(?:\n[ \t].*)*)", stanza, re.MULTILINE)):
                yield fields


def plain_text(description: str) -> tuple[str, str]:
    r"""The title and the text of a ``Description`` field.

    >>> plain_text("An editor\n It edits\n text.\n .\n  * fast\n  * small")
    ('An editor', 'It edits text.\n\n* fast\n* small')
    """
    title, *lines = description.split("\n")
    text = "\n".join("" if line.strip() == "." else line.removeprefix(" ").rstrip() for line in lines)
    # Lines of a paragraph are joined, but not those that are indented by more than a space: they are set as they are.
    return title.strip(), re.sub(r"\n[ \t]+", "\n", re.sub(r"(?<=\S)\n(?=\S)", " ", text)).strip()


def read_packages(lists: Path) -> dict[str, dict[str, Any]]:
    """Name -> the row of each package that has facets and a description."""
    descriptions = {fields["Description-md5"]: fields["Description-en"] for fields in stanzas(lists, "Translation-en")}
    packages: dict[str, dict[str, Any]] = {}
    for fields in stanzas(lists, "Packages"):
        name, description = fields["Package"], descriptions.get(fields.get("Description-md5", ""))
        if name in packages or "Tag" not in fields or description is None:
            continue
        title, text = plain_text(description)
        if text:
            packages[name] = {
                "name": name,
                "source": fields.get("Source", name).split()[0],
                "section": fields.get("Section", ""),
                "title": title,
                "description": text,
                "facets": sorted(set(re.split(r",\s*", fields["Tag"].strip()))),
            }
    return packages


def groups(packages: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Names of packages that have the source, the description or a long paragraph of it in common; digits do not count."""
    parent = {name: name for name in packages}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = name = parent[parent[name]]
        return name

    sharing: dict[str, list[str]] = {}
    for name, row in packages.items():
        sharing.setdefault(f"source {row['source']}", []).append(name)
        for paragraph in {row["description"], *row["description"].split("\n\n")}:
            words = re.sub(r"[\W\d_]+", " ", paragraph.lower())
            if len(words) >= _LONG or paragraph == row["description"]:
                sharing.setdefault(words, []).append(name)
    for names in sharing.values():
        for one, other in pairwise(names):
            parent[root(one)] = root(other)
    members: dict[str, list[str]] = {}
    for name in packages:
        members.setdefault(root(name), []).append(name)
    return list(members.values())


def make_table(packages: dict[str, dict[str, Any]], max_rows: int = MAX_ROWS, n_facets: int = N_FACETS) -> pa.Table:
    """A package of each group with the most frequent facets; which ones depends on the hashes of their names."""

    def place(name: str) -> str:
        return hashlib.sha256(name.encode()).hexdigest()

    kept = sorted((min(names, key=place) for names in groups(packages)), key=place)[:max_rows]
    counts = Counter(facet for name in kept for facet in packages[name]["facets"])
    frequent = set(sorted(counts, key=lambda facet: (-counts[facet], facet))[:n_facets])
    rows = [packages[name] | {"facets": [one for one in packages[name]["facets"] if one in frequent]} for name in kept]
    return pa.Table.from_pylist(rows)


def main(argv: list[str] | None = None) -> int:
    """Writes the table, and returns the exit code: 2 if there are no lists."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lists", type=Path, default=LISTS, help="folder with the package index; default %(default)s")
    parser.add_argument("--output", type=Path, default=Path("data/tables/debian.parquet"))
    args = parser.parse_args(argv)
    try:
        packages = read_packages(args.lists)
        if not packages:
            raise DataError(f"{args.lists}: no package has facets and a description; {FIX}.")
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    table = make_table(packages)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, args.output, compression="zstd")
    empty = sum(not facets for facets in table["facets"].to_pylist())
    print(f"{args.output}: {len(table):,} of {len(packages):,} packages with facets; {empty:,} have none of the {N_FACETS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
