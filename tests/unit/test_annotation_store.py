import hashlib
import json
import stat
import subprocess
import sys
import textwrap

import pytest

from sodaops.annotation.agreement import cohen_kappa, majority, raw_agreement
from sodaops.annotation.journal import Clock
from sodaops.annotation.state import SKIP
from sodaops.annotation.store import Store
from sodaops.errors import DataError, StorageError
from tests.annotation import CODE, LABELS, store_of, task


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "store"


def names(store):
    return [one.task for one in store.state().tasks]


def only_file(folder):
    (file,) = (folder / "answers").iterdir()
    return file


def line(name, label, time, annotator="ann", **more):
    return json.dumps({"time": time, "annotator": annotator, "task": name, "label": label, "source": "page", **more}) + "\n"


def test_a_store_is_made_once_and_opened_with_its_labels_alone(folder):
    Store.create(folder, LABELS)
    assert json.loads((folder / "store.json").read_text()) == {"format": 1, "labels": LABELS}
    assert Store(folder).labels == Store.create(folder, LABELS).labels == LABELS
    for labels in (["bad", "good"], LABELS[::-1]):
        with pytest.raises(DataError, match=rf"has the labels {', '.join(LABELS)}; asked for were {', '.join(labels)}"):
            Store.create(folder, labels)


@pytest.mark.parametrize("labels", [[], ["one"], ["a", "a"], ["a", " "]])
def test_labels_that_are_none(folder, labels):
    with pytest.raises(DataError, match="expected at least two"):
        Store.create(folder, labels)
    assert not folder.exists()


def test_a_folder_that_is_no_store(folder, tmp_path):
    with pytest.raises(DataError, match=r"no annotation store, no such folder; `sodaops annotate pick`"):
        Store(folder)
    folder.mkdir()
    (folder / "letter.txt").write_text("dear")
    with pytest.raises(DataError, match=r"no annotation store, there is no store.json"):
        Store(folder)
    with pytest.raises(DataError, match=r"holds other things \(letter.txt\)"):
        Store.create(folder, LABELS)
    for content in ("[]", "{", '{"format": 1}', '{"format": 9, "labels": ["a", "b"]}', '{"format": 1, "labels": [1]}'):
        (folder / "store.json").write_text(content)
        with pytest.raises(DataError, match=r"store.json: (not readable|format=)"):
            Store(folder)


def test_a_text_is_a_task_once(folder):
    store = Store.create(folder, LABELS)
    assert store.add_tasks("b", [task("one"), task("two"), task("one")]) == 2
    assert store.add_tasks("a", [task("two"), task("three", why="uncertain", label="neutral", probs={"neutral": 0.4})]) == 1
    assert store.add_tasks("b", [task("four"), task("two")]) == 1
    assert store.add_tasks("c", [task("four")]) == 0
    assert [one.text for one in store.state().tasks] == ["three", "one", "two", "four"]  # by the files' names
    assert sorted(file.name for file in (folder / "tasks").iterdir()) == ["a.jsonl", "b.jsonl"]
    first = json.loads((folder / "tasks/a.jsonl").read_text())
    assert first == {
        "task": task("three")["text_sha256"][:16], "text": "three", "text_sha256": task("three")["text_sha256"],
        "why": "uncertain", "label": "neutral", "score": None, "probs": {"neutral": 0.4}, "request_id": None, "place": None,
        "bundle_id": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": " "}, "text=' '; expected a text with something in it"),
        ({"text": "half \ud800"}, "lone surrogate"),
        ({"text_sha256": "AB"}, "expected 64 hexadecimal digits"),
        ({"task": "0" * 16}, "task='0000000000000000'; expected"),
        ({"why": "uncertian"}, r"why='uncertian'.*did you mean uncertain\?"),
        ({"label": "positve"}, r"label='positve'; expected one of negative, neutral, positive \(did you mean positive\?\)"),
        ({"probs": {"good": 1.0}}, "label='good'"),
        ({"lable": "positive"}, r"'lable' is no field of a task \(did you mean label\?\)"),
    ],
)
def test_a_task_that_cannot_be_one(folder, changes, message):
    store = Store.create(folder, LABELS)
    with pytest.raises(DataError, match=f"task 2 of some: .*{message}"):
        store.add_tasks("some", [task("one"), {**task("two"), **changes}])
    assert names(store) == []


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "a b"])
def test_a_name_for_tasks_that_is_none(folder, name):
    with pytest.raises(DataError, match="no name for a file of tasks"):
        Store.create(folder, LABELS).add_tasks(name, [])


def test_answers_skips_and_who_gave_them(folder):
    store = store_of(folder, 4)
    one, two, three, _ = names(store)
    ann, ben = store.session("ann"), store.session("Bén / QA")
    ann.answer(one, "positive")
    ann.answer(two, "neutral")
    ann.answer(three, SKIP)
    ben.answer(one, "negative")
    ben.answer(two, "neutral")
    state = store.state()
    assert state.answers == {
        one: {"ann": "positive", "Bén / QA": "negative"}, two: {"ann": "neutral", "Bén / QA": "neutral"}, three: {"ann": SKIP},
    }  # fmt: skip
    assert state.progress() == (4, 2, {"ann": 2, "Bén / QA": 2}, {"ann": 1})
    assert [conflict.task for conflict in state.conflicts()] == [one]
    assert state.next_for("ann").text == "text 3" and state.next_for("Bén / QA").text == "text 2"
    assert state.agreement("ann", "Bén / QA") == ("ann", "Bén / QA", 2, 0.5, pytest.approx(1 / 3))
    files = sorted((folder / "answers").iterdir(), key=lambda file: file.name)
    assert [stat.S_IMODE(file.stat().st_mode) for file in files] == [0o600, 0o600]
    assert {file.name.split("-")[1] for file in files} == {"ann", "B_n_QA"}


def test_the_last_answer_of_an_annotator_counts(folder):
    store = store_of(folder, 1)
    (one,) = names(store)
    store.session("ann").answer(one, "positive")
    store.session("ann").answer(one, "negative")
    assert store.state().answers == {one: {"ann": "negative"}} and store.state().conflicts() == []


def test_undo_takes_back_one_answer_after_another(folder):
    store = store_of(folder, 3)
    one, two, three = names(store)
    session = store.session("ann", CODE)
    for name in (one, two, three):
        session.answer(name, "neutral")
    session.answer(three, "neutral")  # a repeated call: the answer was not heard
    assert len(only_file(folder).read_text().splitlines()) == 3
    assert session.undo(three) == three and session.undo(three) == three  # a repeated call again
    assert store.state().answers == {one: {"ann": "neutral"}, two: {"ann": "neutral"}}
    with pytest.raises(DataError, match=f"not the last answer of this session, which was to {two}"):
        session.undo(one)
    assert [session.undo(), session.undo()] == [two, one]
    with pytest.raises(DataError, match="no answer in this session to take back"):
        session.undo()
    assert store.state().answers == {}


def test_undo_leaves_the_answers_of_other_sessions_and_people(folder):
    store = store_of(folder, 1)
    (one,) = names(store)
    store.session("ann").answer(one, "positive")
    store.session("ben").answer(one, "positive")
    session = store.session("ann", CODE)
    session.answer(one, "negative")
    assert session.undo() == one
    assert store.state().answers == {one: {"ann": "positive", "ben": "positive"}}
    with pytest.raises(DataError, match="to take back"):
        session.undo()


def test_a_session_goes_on_in_another_process(folder):
    first = store_of(folder, 2)
    one, two = names(first)
    first.session("ann", CODE).answer(one, "positive")
    second = Store(folder)
    second.session("ann", CODE).answer(two, "positive")
    assert len(list((folder / "answers").iterdir())) == 2
    third = Store(folder).session("ann", CODE)
    assert [third.undo(), third.undo()] == [two, one]
    assert first.state().answers == second.state().answers == {}


def test_two_stores_on_one_folder_read_each_other(folder):
    ours = store_of(folder, 2)
    theirs = Store(folder)
    one, two = names(theirs)
    ours.session("ann").answer(one, "positive")
    assert theirs.state().answers == {one: {"ann": "positive"}}
    theirs.session("ben").answer(two, "negative")
    ours.add_tasks("more", [task("late")])
    assert len(theirs.state().tasks) == len(ours.state().tasks) == 3
    assert ours.state().answers == theirs.state().answers == {one: {"ann": "positive"}, two: {"ben": "negative"}}


@pytest.mark.parametrize(("name", "label"), [("0" * 16, "neutral"), (None, "positve")])
def test_an_answer_that_cannot_be_one(folder, name, label):
    store = store_of(folder, 1)
    with pytest.raises(DataError, match=r"no such task|label='positve'.*did you mean positive"):
        store.session("ann").answer(name or names(store)[0], label)
    assert not (folder / "answers").exists()


@pytest.mark.parametrize("name", ["", "  ", "a\nb", "x" * 61, None])
def test_an_annotator_that_is_none(folder, name):
    with pytest.raises(DataError, match="expected a name of 1 to 60 characters"):
        store_of(folder, 1).session(name)


def test_a_half_line_is_ignored_until_it_is_whole(folder):
    store = store_of(folder, 2)
    one, two = names(store)
    whole = line(one, "positive", "2026-01-01T00:00:00.000Z") + line(two, "positive", "2026-01-01T00:00:01.000Z")
    (folder / "answers").mkdir()
    file = folder / f"answers/20260101T000000Z-ann-{CODE}.jsonl"
    for cut in range(len(whole.splitlines()[0]) + 1, len(whole)):
        file.write_text(whole[:cut])
        state = Store(folder).state()
        assert state.answers == {one: {"ann": "positive"}} and state.damaged == []
    assert store.state().answers == {one: {"ann": "positive"}}
    with file.open("a") as opened:
        opened.write(whole[-1:])
    assert store.state().answers == {one: {"ann": "positive"}, two: {"ann": "positive"}}


def test_a_write_that_broke_off_does_not_spoil_the_next(folder):
    """The limit of a file's size stops a write in the middle of a line, as a full disk does."""
    one, two = names(store_of(folder, 2))
    code = f"""
        import resource
        from pathlib import Path
        from sodaops.annotation.store import Store
        from sodaops.errors import StorageError
        session = Store({str(folder)!r}).session("ann")
        session.answer({one!r}, "positive")
        n_bytes = next(Path({str(folder / "answers")!r}).iterdir()).stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes + 20, resource.RLIM_INFINITY))
        try:
            session.answer({two!r}, "negative")
        except StorageError as error:
            print("refused", error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        session.answer({two!r}, "neutral")
        """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("refused") and "make room there" in done.stdout
    state = Store(folder).state()
    assert state.answers == {one: {"ann": "positive"}, two: {"ann": "neutral"}}
    assert state.damaged == [f"answers/{only_file(folder).name} line 2"]


def test_damaged_lines_are_named_and_left_out(folder):
    one, two = names(store_of(folder, 2))
    (folder / "answers").mkdir()
    good = [line(one, "positive", "2026-01-01T00:00:00.000Z"), line(two, "neutral", "2026-01-01T00:00:09.000Z")]
    bad = [
        '{"time": "2026-01-01T00:00:01.000Z", "annot\n',
        "[1]\n",
        line(two, "good", "2026-01-01T00:00:01.000Z"),
        line(two, None, "2026-01-01T00:00:01.000Z"),  # neither a label nor a skip
        line(two, "neutral", "yesterday"),
        line(two, "neutral", "2026-13-01T00:00:01.000Z"),
        line(two, "neutral", None),
        line(2, "neutral", "2026-01-01T00:00:01.000Z"),
        line(two, "neutral", "2026-01-01T00:00:01.000Z", annotator=""),
        line(["x"], "neutral", "2026-01-01T00:00:01.000Z", source="feedback"),
    ]
    (folder / "answers/a.jsonl").write_bytes("".join([good[0], *bad, "\n", good[1]]).encode() + b"\xff\n")
    with (folder / "tasks/some.jsonl").open("a") as file:
        file.write('{"task": "x"}\n')
    store = Store(folder)
    for _ in range(2):  # noted once
        state = store.state()
        assert state.answers == {one: {"ann": "positive"}, two: {"ann": "neutral"}}
        places = [f"answers/a.jsonl line {n}" for n in [*range(2, 12), 14]]
        assert state.damaged == ["tasks/some.jsonl line 3", *places]


def test_answers_to_texts_that_are_gone_are_counted(folder):
    store = store_of(folder, 2)
    one, two = names(store)
    store.session("ann").answer(one, "positive")
    store.session("ann").answer(two, "positive")
    first, _ = (folder / "tasks/some.jsonl").read_text().splitlines(keepends=True)
    (folder / "tasks/some.jsonl").write_text(first)
    assert (store.state().answers, store.state().n_strays) == ({one: {"ann": "positive"}}, 1)


def test_feedback_counts_for_a_task_of_its_request_alone(folder):
    service, store = Store.create(folder, LABELS), Store(folder)
    service.append_feedback("r1", 0, "negative")
    service.append_feedback("r1", 1, "positive", annotator="ann")
    assert store.state().progress() == (0, 0, {}, {}) and store.state().n_strays == 0
    assert len(list((folder / "answers").iterdir())) == 1
    entry = json.loads(only_file(folder).read_text().splitlines()[0])
    assert entry.pop("time") and entry == {
        "request_id": "r1", "place": 0, "label": "negative", "annotator": "feedback", "source": "feedback",
    }  # fmt: skip
    store.add_tasks("some", [task("one", request_id="r1", place=1), task("two", request_id="r2", place=0)])
    one, _ = names(store)
    assert store.state().answers == {one: {"ann": "positive"}}
    service.append_feedback("r1", 1, "neutral")
    assert store.state().answers == {one: {"ann": "positive", "feedback": "neutral"}}
    assert [conflict.task for conflict in store.state().conflicts()] == [one]
    with pytest.raises(DataError, match="label='bad'"):
        service.append_feedback("r1", 0, "bad")


def test_a_folder_that_cannot_be_written_to(folder):
    store = store_of(folder, 1)
    (folder / "answers").write_text("a file in its place")
    with pytest.raises(StorageError, match="could not be written"):
        store.session("ann").answer(names(store)[0], "neutral")


def test_times_go_forward_whatever_the_clock_says():
    clock = Clock()
    times = [clock.now() for _ in range(50)]
    clock.see("2999-01-01T00:00:00.000Z")
    times += [clock.now(), clock.now()]
    assert times == sorted(set(times)) and times[-2:] == ["2999-01-01T00:00:00.001Z", "2999-01-01T00:00:00.002Z"]


def test_kappa_against_scikit_learn():
    from sklearn.metrics import cohen_kappa_score

    said = [("a", "a"), ("a", "b"), ("c", "b"), ("b", "b"), ("c", "c"), ("a", "c"), ("a", "a")]
    assert cohen_kappa(said) == pytest.approx(cohen_kappa_score(*zip(*said, strict=True)), abs=1e-12)
    assert raw_agreement(said) == pytest.approx(4 / 7)
    assert cohen_kappa([]) is None and raw_agreement([]) is None and majority([]) is None
    assert majority(["a", "b", "b", "a", "c"]) is None


def test_a_text_is_forgotten_with_its_file_rewritten(tmp_path):
    store = Store.create(tmp_path / "store", ["bad", "good"])
    digests = [hashlib.sha256(text.encode()).hexdigest() for text in ("one", "two", "three")]
    tasks = [{"text": text, "text_sha256": digest, "why": "random", "request_id": f"r{text}", "place": 0}
             for text, digest in zip(("one", "two", "three"), digests, strict=True)]  # fmt: skip
    store.add_tasks("t", tasks)
    store.session("ann").answer(digests[0][:16], "good")
    assert store.forget(["rone"], [digests[2]]) == {str(tmp_path / "store/tasks/t.jsonl"): 2}
    assert [task.text for task in store.state().tasks] == ["two"] and store.state().n_strays == 1
    assert "one" not in (tmp_path / "store/tasks/t.jsonl").read_text() and store.forget(["rone"], []) == {}


def test_a_text_with_odd_line_separators_is_forgotten_and_files_are_private(tmp_path):
    store = Store.create(tmp_path / "store", ["bad", "good"])
    text = "one\u2028two\u2029three\u0085four"
    digest = hashlib.sha256(text.encode()).hexdigest()
    store.add_tasks("t", [{"text": text, "text_sha256": digest, "why": "random"}])
    assert stat.S_IMODE((tmp_path / "store/tasks/t.jsonl").stat().st_mode) == 0o600
    assert store.forget([], [digest]) == {str(tmp_path / "store/tasks/t.jsonl"): 1} and not store.state().tasks
    assert stat.S_IMODE((tmp_path / "store/tasks/t.jsonl").stat().st_mode) == 0o600
