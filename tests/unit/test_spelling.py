"""Labels and names of columns stay as they are spelled, in YAML files and on the command line."""

import shlex
from pathlib import Path

import pytest
import yaml

from sodaops.config.compose import compose, load_params
from sodaops.config.validation import build_config
from sodaops.errors import ConfigError
from sodaops.text.labels import label_map_override, same_labels
from tests.conftest import REPO, configured

ODD = ["true", "False", "NO", "yes", "on", "01", "0x1F", "1_000", "12:30", "1.0", "1e3", "+1", "-0", "null", "~", ".nan", "inf"]
MORE = [
    "so so", "café", "e\u0301", "$5-$10", "50%", "a/b", "_x", "<b>", "x.y", "None", "nan", "NA", "2024-01-01", "'t is", "a,b",
]  # fmt: skip


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    """params.yaml of a table."""
    tree = yaml.safe_load((REPO / "params.yaml").read_text(encoding="utf-8"))
    tree["data"] |= {"labels": None, "vote_columns": None, "label_map": None}
    path = tmp_path_factory.mktemp("params") / "params.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    return path


def composed(*overrides):
    return configured("data=csv", "data.path=t.csv", *overrides).data


def test_lists_on_the_command_line(params):
    plain = [label for label in [*ODD, *MORE] if not set(label) & set("',")]
    given = f"data.labels=[{','.join(plain)},'a,b',\"'t is\",10]"
    for data in (composed(given), load_params(params, [given]).data):
        assert data.labels == [*plain, "a,b", "'t is", "10"]


def test_mappings_on_the_command_line(params):
    given = "data.label_map={NO: no, true: yes, 1.0: 01, 2: good, café: \"so, so\", 'a:b': null}"
    expected = {"NO": "no", "true": "yes", "1.0": "01", "2": "good", "café": "so, so", "a:b": "null"}
    for data in (composed(given), load_params(params, [given]).data):
        assert data.label_map == expected
    assert composed("data.label_map={0: bad, 1: good}").label_map == {0: "bad", 1: "good"}


@pytest.mark.parametrize("name", ["1", "1.0", "true", "téxt", "my text"])
def test_names_of_columns_on_the_command_line(params, name):
    for data in (composed(f"data.label_column={name}"), load_params(params, [f"data.label_column={name}"]).data):
        assert data.label_column == name


def test_yaml_files(workdir, params):
    Path("mine/data").mkdir(parents=True)
    plain = [label for label in [*ODD, *MORE] if label not in ("'t is", "a,b")]
    preset = [
        "defaults: [base]", "name: p", "path: t.csv", "label_column: 1", f"labels: [{', '.join(plain)}, 10]",
        "label_map: {NO: yes, 1.0: 01, 2: NA}", "slice_columns: [2024, yes]",
    ]  # fmt: skip
    Path("mine/data/p.yaml").write_text("\n".join(preset), encoding="utf-8")
    tree = params.read_text(encoding="utf-8").replace("  labels: null", f"  labels: [{', '.join(plain)}, 10]")
    Path("params.yaml").write_text(tree, encoding="utf-8")
    data = compose(["data=p"], "mine").data
    assert data.labels == load_params("params.yaml").data.labels == [*plain, 10]
    assert data.label_map == {"NO": "yes", "1.0": "01", 2: "NA"}
    assert (data.label_column, data.slice_columns) == ("1", ["2024", "yes"])


def test_a_value_without_a_spelling_is_refused():
    tree = configured().model_dump()
    with pytest.raises(ConfigError, match=r'data.labels.0=True.*"true"'):
        build_config({**tree, "data": {**tree["data"], "labels": [True, False], "vote_columns": None}})


@pytest.mark.slow
@pytest.mark.parametrize(("labels", "same"), [
    (["Good", "good", "bad"], {"good": "Good"}),
    (["good", " good\u00a0", "GOOD"], {" good\u00a0": "good", "GOOD": "good"}),
    (["café", "cafe\u0301", "cafe"], {"cafe\u0301": "café"}),
    (["straße", "STRASSE", "'t is", "'T is"], {"STRASSE": "straße", "'T is": "'t is"}),
    (["1", "1.0", "01"], {}),
])  # fmt: skip
def test_the_suggested_label_map_is_read_as_it_was_meant(labels, same):
    assert same_labels(labels, labels) == same
    if same:
        [override] = shlex.split(label_map_override(same, None))
        assert composed(override).label_map == same
