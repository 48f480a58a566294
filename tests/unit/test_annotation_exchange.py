import csv
import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from sodaops.annotation.exchange import export_file, import_file, labeling_config, read_import
from sodaops.annotation.state import SKIP
from sodaops.annotation.store import Store
from sodaops.errors import DataError
from sodaops.tasks.multi_label import MultiLabel
from tests.annotation import LABELS, store_of, task

ODD = 'He said "so, so"\nand <b>left</b> & 😀'


@pytest.fixture
def store(workdir):
    """Two annotators, a conflict, a skip, a task without an answer, and a text that needs quotes."""
    store = Store.create(workdir / "store", LABELS)
    guess = {"label": "neutral", "score": 0.4, "probs": {"neutral": 0.4}, "bundle_id": "b1"}
    store.add_tasks("some", [task(ODD, why="uncertain", **guess), task("two"), task("three"), task("four")])
    one, two, three, _ = (one.task for one in store.state().tasks)
    ann, ben = store.session("ann"), store.session("ben")
    for session, name, label in [(ann, one, "negative"), (ben, one, "positive"), (ann, two, "neutral"), (ann, three, SKIP)]:
        session.answer(name, label)
    return store


def rows_of(name):
    with open(name, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def answers_by_text(store):
    state = store.state()
    return {one.text: dict(state.answers.get(one.task, {})) for one in state.tasks}


EXPECTED = {ODD: {"ann": "negative", "ben": "positive"}, "two": {"ann": "neutral"}, "three": {"ann": SKIP}, "four": {}}


def test_label_studios_format(store):
    assert export_file(store, "out.json") == 4
    first, _, third, fourth = json.loads(Path("out.json").read_text(encoding="utf-8"))
    name = task(ODD)["text_sha256"][:16]
    assert first["data"] == {"text": ODD, "task": name, "why": "uncertain"}
    choice = {"type": "choices", "from_name": "label", "to_name": "text"}
    assert first["predictions"] == [
        {"model_version": "b1", "score": 0.4, "result": [{"id": f"{name[:10]}-p", **choice, "value": {"choices": ["neutral"]}}]}
    ]
    assert [one["result"] for one in first["annotations"]] == [
        [{"id": f"{name[:10]}-{n}", **choice, "value": {"choices": [label]}, "meta": {"annotator": who}}]
        for n, (who, label) in enumerate([("ann", "negative"), ("ben", "positive")], 1)
    ]
    assert not any("completed_by" in one for one in first["annotations"])  # Label Studio refuses strangers
    assert (third["annotations"][0]["was_cancelled"], third["annotations"][0]["result"]) == (True, [])
    assert fourth["annotations"] == fourth["predictions"] == []
    config = ET.parse("out.xml").getroot()
    assert config.find("Text").attrib == {"name": "text", "value": "$text"}
    assert config.find("Choices").attrib == {"name": "label", "toName": "text", "choice": "single"}
    assert [one.attrib for one in config.iter("Choice")] == [
        {"value": label, "hotkey": str(n)} for n, label in enumerate(LABELS, 1)
    ]


def test_an_export_to_another_format(store):
    with pytest.raises(DataError, match=r"out\.xls"):
        export_file(store, "out.xls")


def test_a_labeling_config_of_odd_and_many_labels():
    labels = ['<a> & "b"', *(str(n) for n in range(10))]
    choices = list(ET.fromstring(labeling_config(labels, {"kind": "choice"})).iter("Choice"))
    assert [one.get("value") for one in choices] == labels
    assert [one.get("hotkey") for one in choices] == [*map(str, range(1, 10)), None, None]


@pytest.mark.parametrize("name", ["out.json", "out.csv"])
def test_an_export_is_imported_by_another_store_and_by_its_own(store, workdir, name):
    assert export_file(store, name) == 4
    text = Path(name).read_text(encoding="utf-8")
    if name == "out.csv":  # without the ids of the tasks, which another store does not know
        rows = [[row[key] for key in ("text", "label", "annotator")] for row in rows_of(name)]
        with open("other.csv", "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("text", "label", "annotator"), *rows])
    else:
        items = [{**item, "data": {"text": item["data"]["text"]}} for item in json.loads(text)]
        Path("other.json").write_text(json.dumps(items), encoding="utf-8")
    other, file = Store.create(workdir / "other", LABELS), name.replace("out", "other")
    assert import_file(other, file) == (4, 4)
    assert answers_by_text(other) == EXPECTED and {one.why for one in other.state().tasks} == {"import"}
    assert import_file(other, file) == import_file(store, name) == (0, 0)  # existing answers are not written again
    with other._transaction("DEFERRED") as database:
        assert database.execute("SELECT DISTINCT source FROM answers").fetchall() == [(f"import:{file}",)]
    changed = text.replace('"negative"', '"positive"') if name == "out.json" else text.replace(",negative,", ",positive,")
    Path(name).write_text(changed, encoding="utf-8")
    assert import_file(store, name) == (0, 1)
    assert answers_by_text(store) == {**EXPECTED, ODD: {"ann": "positive", "ben": "positive"}}


def test_what_label_studio_itself_exports(store, write):
    def annotation(by, label, **more):
        part = {"id": "x1", "type": "choices", "value": {"choices": [label]}, "origin": "manual", "to_name": "text"}
        result = [{**part, "from_name": "sentiment"}]
        return {"id": 7, "completed_by": by, "result": result, "was_cancelled": False, "lead_time": 4.2, **more}

    two = [annotation(1, "positive"), annotation({"id": 2, "email": "cy@example.org"}, "neutral")]
    items = [
        {"id": 11, "data": {"text": "two"}, "predictions": [], "total_annotations": 2, "annotations": two},
        {"id": 12, "data": {"text": "new"}, "annotations": [annotation(1, "negative", was_cancelled=True)]},
    ]
    assert import_file(store, write("project-1.json", json.dumps(items))) == (1, 3)
    answers = answers_by_text(store)
    assert answers["two"] == {"ann": "neutral", "label-studio 1": "positive", "cy@example.org": "neutral"}
    assert answers["new"] == {"label-studio 1": SKIP}


@pytest.mark.parametrize(("table", "counts", "answers"), [
    (  # with and without an annotator; nothing is cleaned
        'text,label,annotator\ntext 0,neutral,ann\n" a, b ",positive,\nalone,,\n', (2, 2),
        {"text 0": {"ann": "neutral"}, " a, b ": {"import": "positive"}, "alone": {}},
    ),
    (  # an annotator who labels a text twice, and one who disagrees
        "text,label,annotator\ntext 0,neutral,ann\ntext 0,positive,ben\ntext 0,negative,ann\n", (0, 3),
        {"text 0": {"ann": "negative", "ben": "positive"}},
    ),
])  # fmt: skip
def test_a_table_of_texts_and_labels(workdir, write, table, counts, answers):
    store = store_of(workdir / "store", 1)
    assert import_file(store, write("t.csv", table)) == counts
    assert answers_by_text(store) == answers
    assert all(one.text_sha256 == task(one.text)["text_sha256"] for one in store.state().tasks)


def test_a_text_is_found_by_the_hash_of_what_it_was_cleaned_to(workdir, write):
    store = Store.create(workdir / "store", LABELS)
    store.add_tasks("some", [{**task("a &amp; b"), "text_sha256": task("a & b")["text_sha256"]}])
    assert import_file(store, write("t.csv", "text,label\na & b,neutral\na &amp; b,neutral\n")) == (0, 1)
    assert answers_by_text(store) == {"a &amp; b": {"import": "neutral"}}


def test_all_faults_of_a_table_at_once_and_nothing_written(store, write):
    before = answers_by_text(store)
    write(
        "bad.csv",
        "task,text,label,annotator\n,good one,neutral,ann\n,other,postive,ann\n,  ,neutral,ann\n,x,neutral,\x07\n"
        "0000000000000000,two,neutral,ann\n" + "".join(f",t{n},good,ann\n" for n in range(3)),
    )
    with pytest.raises(DataError) as caught:
        import_file(store, "bad.csv")
    first, *lines, last = str(caught.value).splitlines()
    assert first.startswith("bad.csv: 7 ") and " 2 " in last
    named = ["label='postive'", "text='  '", "annotator=", "task='0000000000000000'", "label='good'"]
    assert all(line.startswith(f"- row {n}: {name}") for n, (line, name) in enumerate(zip(lines, named, strict=True), 2))
    assert answers_by_text(store) == before


def test_a_task_with_another_text(store, write):
    name = store.state().tasks[1].task
    write("t.csv", f"task,text,label\n{name},two,neutral\n{name},not two,neutral\n")
    with pytest.raises(DataError, match=f"row 2: task='{name}'"):
        import_file(store, "t.csv")


@pytest.mark.parametrize(("name", "content", "message"), [
    ("t.csv", "text,lable\none,neutral\n", r"lable.*label\?"),
    ("t.csv", "label\nneutral\n", "column text"),
    ("t.csv", "text,label\none\n", r"t\.csv"),
    ("t.csv", b"text\n\xff\n", "UTF-8"),
    ("t.json", "{", r"t\.json"),
    ("t.json", '[{"text": "one", "label": "neutral"}]', "task 1: .*'data'"),
    ("t.json", '[{"data": {"text": 7}}, {"data": {}}]', "(?s)task 1: text=7.*task 2: text=None"),
    ("t.json", '[{"data": {"text": "one"}, "annotations": [{}]}]', "task 1 annotation 1: .*result"),
    ("t.json", '[{"data": {"text": "half \\ud800"}}]', "surrogate"),
    ("t.xls", "", r"t\.xls: "),
    (None, None, r"none\.json"),
])  # fmt: skip
def test_files_that_cannot_be_read(store, write, name, content, message):
    before = answers_by_text(store)
    if name is not None:
        write(name, content)
    with pytest.raises(DataError, match=message):
        import_file(store, name or "none.json")
    assert answers_by_text(store) == before


def studio_json(*items):
    """Label Studio's JSON: for each item the data, and control -> choice of its annotation."""

    def part(control, choice):
        return {"type": "choices", "from_name": control, "to_name": "text", "value": {"choices": [choice]}}

    def annotation(choices):
        return {"completed_by": 1, "result": [part(*one) for one in choices.items()]}

    return json.dumps([{"data": data, "annotations": [annotation(choices)]} for data, choices in items])


FLAT = "annotation_id,annotator,created_at,id,lead_time,{},updated_at\n7,1,2024,11,3.2,{},2024\n"
ONE = {"fine": {"label-studio 1": "good"}}
IMPORTS = {
    # name, content, more arguments; the answers by text, or what the error names
    "csv": ("l.csv", FLAT.format("sentiment,text", "good,fine"), [], ONE),
    "csv with JSON": ("l.csv", FLAT.format("sentiment,text", '"{""choices"":[""good""]}",fine'), [], ONE),
    "csv, two choices": ("l.csv", FLAT.format("s,text", '"{""choices"":[""good"",""bad""]}",fine'), [], ["row 1", "label="]),
    "csv, e-mail": ("l.tsv", FLAT.format("text,s", "fine,good").replace(",1,", ",a@b.org,").replace(",", "\t"), [],
                    {"fine": {"a@b.org": "good"}}),
    "csv, skipped": ("l.csv", FLAT.format("s,text", ",fine"), [], {"fine": {"label-studio 1": SKIP}}),
    "csv, controls": ("l.csv", FLAT.format("a,b,text", "good,x,fine"), [], ["annotate.label_key", "a, b"]),
    "csv, one of them": ("l.csv", FLAT.format("a,b,text", "good,x,fine"), ["annotate.label_key=a"], ONE),
    "csv, text in doubt": ("l.csv", FLAT.format("review,s", "fine,good"), [], ["annotate.text_key", "review, s"]),
    "csv, other text": ("l.csv", FLAT.format("review,s", "fine,good"), ["annotate.text_key=review"], ONE),
    "json-min": ("l.json", json.dumps([{"annotation_id": 7, "annotator": 1, "id": 2, "text": "fine", "s": "good"}]), [], ONE),
    "other key": ("l.json", studio_json(({"review": "fine", "n": 3}, {"s": "good"})), [], ONE),
    "keys": ("l.json", studio_json(({"a": "fine", "b": "x"}, {"s": "good"})), [], ["annotate.text_key", "a, b"]),
    "one of the keys": ("l.json", studio_json(({"a": "fine", "b": "x"}, {"s": "good"})), ["annotate.text_key=a"], ONE),
    "no such key": ("l.json", studio_json(({"a": "fine"}, {"s": "good"})), ["annotate.text_key=aa"], ["annotate.text_key=aa"]),
    "controls": ("l.json", studio_json(({"text": "fine"}, {"s": "good", "t": "x"})), [], ["annotate.label_key", "s, t"]),
    "one control": ("l.json", studio_json(({"text": "fine"}, {"s": "good", "t": "x"}), ({"text": "b"}, {"t": "x"})),
                    ["annotate.label_key=s"], {**ONE, "b": {"label-studio 1": SKIP}}),
    "case": ("l.json", studio_json(({"text": "fine"}, {"s": "Good"})), [], ["label='Good'", "data.label_map={Good: good}"]),
    "case, merged": ("l.json", studio_json(({"text": "fine"}, {"s": "Good"})), ["data.label_map={Good: good}"], ONE),
    "normal forms": ("t.csv", "text,label\ncaf\u00e9,good\ncafe\u0301,good\n", [], {"caf\u00e9": {"import": "good"}}),
    "own columns": ("t.csv", "id,review,stars\n7,fine,good\n", ["annotate.text_key=review", "annotate.label_key=stars"],
                    {"fine": {"import": "good"}}),
    "encoding": ("t.csv", "text|label\ncaf\u00e9|good\n".encode("latin-1"), ["data.encoding=latin-1", "data.delimiter='|'"],
                 {"caf\u00e9": {"import": "good"}}),
    "texts only": ("t.csv", "text\nfine\n", [], {"fine": {}}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", IMPORTS)
def test_a_store_is_made_only_of_a_file_that_passes(run, write, case):
    name, content, more, expected = IMPORTS[case]
    code, _, error = run("annotate", "import", write(name, content), "annotate.store=new", "data.labels=[bad,good]", *more)
    if isinstance(expected, dict):
        store = Store("new", ["bad", "good"])
        assert code == 0 and answers_by_text(store) == expected
    else:
        assert code == 2 and error.startswith(f"DataError: {name}: ") and all(text in error for text in expected)
        assert not Path("new").exists()


def test_labels_that_differ_from_those_of_the_store(run, write, store):
    write("t.csv", "text,label\nfine,neutral\n")
    code, _, error = run("annotate", "import", "t.csv", "annotate.store=store", "data.labels=[bad,good]")
    assert code == 2 and error.startswith("DataError: store: ") and "bad, good" in error
    assert run("annotate", "import", "t.csv", "annotate.store=store")[0] == 0  # the labels of the store
    assert run("annotate", "import", "t.csv", "annotate.store=new", "data=csv", "data.path=t.csv")[0] == 2
    assert not Path("new").exists()


def test_a_text_in_another_normal_form_is_not_picked(workdir):
    import pyarrow as pa

    from sodaops.annotation.pick import _first_of_each_text

    rows = pa.table({"text": ["caf\u00e9", "cafe\u0301", "tea", "te\u0301"], "text_sha256": ["a", "b", "c", "d"]})
    assert _first_of_each_text(rows, {"t\u00e9"})["text_sha256"].to_pylist() == ["a", "c"]


@pytest.mark.parametrize("choices", [["neutral", "positive"], [], None, "neutral"])
def test_an_annotation_without_exactly_one_choice(store, write, choices):
    result = [{"type": "choices", "from_name": "s", "to_name": "text", "value": {"choices": choices}}]
    with pytest.raises(DataError, match=r"task 1 annotation 1: .*\d choices"):
        import_file(store, write("t.json", json.dumps([{"data": {"text": "one"}, "annotations": [{"result": result}]}])))


def test_a_spreadsheet_keeps_the_order_and_the_odd_text(store):
    assert export_file(store, "out.csv") == 4
    rows = rows_of("out.csv")
    assert [(row["text"], row["label"], row["annotator"]) for row in rows] == [
        (ODD, "negative", "ann"), (ODD, "positive", "ben"), ("two", "neutral", "ann"), ("three", "", "ann"), ("four", "", ""),
    ]  # fmt: skip


FLAT = "annotation_id,annotator,text,label\n1,2,one,"


@pytest.mark.parametrize(
    ("name", "content", "kept"),
    [
        ("rows.jsonl", '{"text": "one", "label": ["b", "x"]}\n{"text": "two", "label": []}\n', ['["a", "b"]', "[]"]),
        ("rows.csv", 'text,label\none,"[""b"", ""x""]"\ntwo,b\n', ['["a", "b"]', '["b"]']),
        ("flat.csv", FLAT + '"{""choices"": [""b"", ""x""]}"\n', ['["a", "b"]']),
        ("flat.csv", FLAT + '"{""choices"": [""b"""\n', None),
        ("rows.csv", 'text,label\none,"[""b"""\n', None),
    ],
)
def test_lists_of_labels(write, name, content, kept):
    made = Store.create("lists", ["a", "b"], MultiLabel(allow_none=True))
    path = write(name, content)
    if kept is None:
        with pytest.raises(DataError, match="row 1: labels="):
            read_import(path, made.state())
        return
    read_import(path, made.state(), label_map={"x": "a"}).write(made)
    assert [label for given in made.state().answers.values() for label in given.values()] == kept
