"""tools/debian_table.py on a package index of a few stanzas."""

import gzip

import pyarrow.parquet as pq
import pytest

from tools.debian_table import main, make_table, plain_text, read_packages

SHARED = "Foo is a toolkit for many purposes, with version 1.2 of everything that a program may need, and of everything else"
PACKAGES = [  # name, source, tags, description
    ("alpha", None, "role::program, use::editing,\n interface::x11", "An editor\n Edits\n texts.\n .\n  * fast\n  * small"),
    ("beta", "beta-source (1.2)", "role::program", "A player\n Plays."),
    ("beta-data", "beta-source", "role::app-data", "Data of a player\n Is played."),
    ("foo-1", None, "use::editing, role::program", f"Foo\n {SHARED}\n .\n With a manual."),
    ("foo-2", None, "use::editing", f"Foo\n {SHARED.replace('1.2', '2.0')}"),
    ("gamma", None, "rare::tag", "Something else\n Does it."),
    ("untagged", None, None, "Nobody described it\n So."),
    ("short", None, "role::program", "No long form"),
]


@pytest.fixture
def lists(tmp_path):
    """A folder as /var/lib/apt/lists, one of whose lists is compressed."""
    folder = tmp_path / "lists"
    folder.mkdir()
    packages, translations = [], []
    for name, source, tags, description in PACKAGES:
        fields = {"Package": name, "Source": source, "Section": "misc", "Description-md5": f"md5{name}", "Tag": tags}
        packages.append("".join(f"{field}: {value}\n" for field, value in fields.items() if value))
        translations.append(f"Package: {name}\nDescription-md5: md5{name}\nDescription-en: {description}\n")
    (folder / "host_main_binary-amd64_Packages").write_text("\n".join(packages), encoding="utf-8")
    (folder / "host_main_i18n_Translation-en.gz").write_bytes(gzip.compress("\n".join(translations).encode()))
    return folder


def test_a_row_is_a_package_of_each_group(lists, tmp_path, capsys):
    output = tmp_path / "new/table.parquet"
    assert main([f"--lists={lists}", f"--output={output}"]) == 0 and str(output) in capsys.readouterr().out
    rows = {row["name"]: row for row in pq.read_table(output).to_pylist()}
    assert set(rows) - {"beta", "beta-data", "foo-1", "foo-2"} == {"alpha", "gamma"}
    assert len(rows) == 4  # one of the two of a source, and one of the two that share a paragraph but for numbers
    assert rows["alpha"] == {
        "name": "alpha", "source": "alpha", "section": "misc", "title": "An editor",
        "description": "Edits texts.\n\n* fast\n* small", "facets": ["interface::x11", "role::program", "use::editing"],
    }  # fmt: skip


def test_the_most_frequent_facets_are_kept(lists):
    packages = read_packages(lists)
    rows = make_table(packages, n_facets=1).to_pylist()
    assert {row["name"]: row["facets"] for row in rows}["gamma"] == [] and {len(row["facets"]) for row in rows} == {0, 1}
    reversed_packages = dict(reversed(packages.items()))
    assert make_table(reversed_packages, n_facets=1).to_pylist() == rows
    assert make_table(packages, max_rows=2, n_facets=30).num_rows == 2


def test_lines_of_a_paragraph_are_joined():
    assert plain_text("T\n a\n b\n .\n c\n   d") == ("T", "a b\n\nc\nd")


@pytest.mark.parametrize("missing", ["Packages", "Translation-en"])
def test_no_lists(lists, tmp_path, capsys, missing):
    for path in lists.glob(f"*_{missing}*"):
        path.unlink()
    output = tmp_path / "table.parquet"
    assert main([f"--lists={lists}", f"--output={output}"]) == 2 and not output.exists()
    error = capsys.readouterr().err
    assert str(lists) in error and missing in error and "apt-get update" in error
