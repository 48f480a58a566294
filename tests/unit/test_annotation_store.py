import json
import shutil
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest

from sodaops.annotation.state import SKIP
from sodaops.annotation.store import Store
from sodaops.errors import DataError, StorageError
from sodaops.tasks.agreement import cohen_kappa, majority_label, raw_agreement
from tests.annotation import CODE, LABELS, store_of, task
from tests.conftest import REPO, file_size_limit

V1 = REPO / "tests/fixtures/annotation_store_v1"  # written by the code of commit 154efa3, before SQLite
V1_STATE = json.loads((REPO / "tests/fixtures/annotation_store_v1.json").read_text(encoding="utf-8"))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def old(folder):
    shutil.copytree(V1, folder)
    return folder


def names(store):
    return [one.task for one in store.state().tasks]


def bytes_of(folder):
    return b"".join(file.read_bytes() for file in folder.rglob("*") if file.is_file())


def test_a_store_is_made_once_and_opened_with_its_labels_alone(folder):
    Store.create(folder, LABELS)
    assert json.loads((folder / "store.json").read_text()) == {"format": 2, "labels": LABELS}
    assert Store(folder).labels == Store.create(folder, LABELS).labels == LABELS
    for labels in (["bad", "good"], LABELS[::-1]):
        with pytest.raises(DataError, match=f"{', '.join(LABELS)}.*{', '.join(labels)}"):
            Store.create(folder, labels)


@pytest.mark.parametrize("labels", [[], ["one"], ["a", "a"], ["a", " "]])
def test_labels_that_are_not_valid(folder, labels):
    with pytest.raises(DataError, match="labels="):
        Store.create(folder, labels)
    assert not folder.exists()


def test_a_folder_that_is_no_store(folder):
    with pytest.raises(DataError, match=str(folder)):
        Store(folder)
    folder.mkdir()
    (folder / "letter.txt").write_text("dear")
    with pytest.raises(DataError, match=r"store\.json"):
        Store(folder)
    with pytest.raises(DataError, match=r"letter\.txt"):
        Store.create(folder, LABELS)


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"format": 1}', '{"format": 9, "labels": ["a", "b"]}', '{"format": 1, "labels": [1]}']
)
def test_a_damaged_info_file(folder, content):
    folder.mkdir()
    (folder / "store.json").write_text(content)
    with pytest.raises(DataError, match=r"store\.json"):
        Store(folder)


@pytest.mark.parametrize("content", [b"", b"this is no database\n" * 300, None])
def test_a_damaged_or_missing_database(folder, content):
    store_of(folder, 1)
    (folder / "annotations.sqlite").unlink()
    if content is not None:
        (folder / "annotations.sqlite").write_bytes(content)
    with pytest.raises(StorageError, match=r"annotations\.sqlite"):
        Store(folder)


def test_a_text_is_a_task_once(folder):
    store = Store.create(folder, LABELS)
    assert store.add_tasks("b", [task("one"), task("two"), task("one")]) == 2
    more = {"why": "uncertain", "label": "neutral", "probs": {"neutral": 0.4}, "request_id": "r", "place": 0}
    assert store.add_tasks("a", [task("two"), task("three", **more)]) == 1
    assert store.add_tasks("b", [task("four"), task("two")]) == 1
    assert store.add_tasks("c", [task("four")]) == store.add_tasks("c", []) == 0
    tasks = Store(folder).state().tasks
    assert [one.text for one in tasks] == ["three", "one", "two", "four"]  # by the names of the batches
    three = {**task("three", **more), "task": task("three")["text_sha256"][:16], "score": None, "bundle_id": None}
    assert vars(tasks[0]) == three


@pytest.mark.parametrize(("changes", "named"), [
    ({"text": " "}, "text="),
    ({"text": "half \ud800"}, "surrogate"),
    ({"text_sha256": "AB"}, "text_sha256="),
    ({"task": "0" * 16}, "task='0000000000000000'"),
    ({"why": "uncertian"}, r"why='uncertian'.*uncertain\?"),
    ({"label": "positve"}, r"label='positve'.*positive\?"),
    ({"probs": {"good": 1.0}}, "label='good'"),
    ({"lable": "positive"}, r"'lable'.*label\?"),
])  # fmt: skip
def test_a_task_that_is_not_valid(folder, changes, named):
    store = Store.create(folder, LABELS)
    with pytest.raises(DataError, match=f"task 2 of some: .*{named}"):
        store.add_tasks("some", [task("one"), {**task("two"), **changes}])
    assert names(store) == []


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
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in folder.glob("annotations.sqlite*")}
    assert modes == dict.fromkeys(["annotations.sqlite", "annotations.sqlite-wal", "annotations.sqlite-shm"], 0o600)


def test_undo_takes_back_one_answer_after_another(folder):
    store = store_of(folder, 3)
    one, two, three = names(store)
    session = store.session("ann", CODE)
    for name in (one, two, three, three):  # the last call is repeated, since its response was lost
        session.answer(name, "neutral")
    assert session.undo(three) == three and session.undo(three) == three  # repeated as well
    assert store.state().answers == {one: {"ann": "neutral"}, two: {"ann": "neutral"}}
    with pytest.raises(DataError, match=f"{one}.*{two}"):
        session.undo(one)
    with pytest.raises(DataError, match="task='none'"):
        session.undo("none")
    assert [session.undo(), session.undo()] == [two, one]
    with pytest.raises(DataError):
        session.undo()
    assert store.state().answers == {}


def test_the_last_answer_counts_and_undo_brings_back_the_one_before(folder):
    store = store_of(folder, 1)
    (one,) = names(store)
    store.session("ann").answer(one, "positive")
    store.session("ben").answer(one, "positive")
    session = store.session("ann", CODE)
    session.answer(one, "negative")
    session.answer(one, "neutral")
    for label in ("neutral", "negative", "positive"):
        assert store.state().answers == {one: {"ann": label, "ben": "positive"}}
        if label == "positive":  # of another session
            with pytest.raises(DataError):
                session.undo()
        else:
            assert session.undo() == one


def test_stores_on_one_folder_share_tasks_answers_and_sessions(folder):
    first = store_of(folder, 2)
    second = Store(folder)
    one, two = names(second)
    first.session("ann", CODE).answer(one, "positive")
    assert second.state().answers == {one: {"ann": "positive"}}
    second.session("ann", CODE).answer(two, "negative")
    first.add_tasks("more", [task("late")])
    assert len(second.state().tasks) == len(first.state().tasks) == 3
    third = Store(folder).session("ann", CODE)
    assert [third.undo(), third.undo()] == [two, one]
    assert first.state().answers == second.state().answers == {}


@pytest.mark.parametrize(("call", "named"), [
    *[(lambda store, name=name: store.add_tasks(name, []), "batch=") for name in ("", "../up", "a/b", ".hidden", "a b")],
    *[(lambda store, name=name: store.session(name), "annotator=") for name in ("", "  ", "a\nb", "x" * 61, None)],
    (lambda store: store.session("ann", "../../x"), "session="),
    (lambda store: store.session("ann").answer("0" * 16, "neutral"), "task='0000000000000000'"),
    (lambda store: store.session("ann").answer(names(store)[0], "positve"), r"label='positve'.*positive\?"),
    (lambda store: store.append_feedback("r1", 0, "bad"), "label='bad'"),
    (lambda store: store.append_feedback("r1", 0, "neutral", ""), "annotator="),
])  # fmt: skip
def test_arguments_that_are_not_valid(folder, call, named):
    store = store_of(folder, 1)
    with pytest.raises(DataError, match=named):
        call(store)
    assert store.state().answers == {} and store.feedback_without_task() == set()


def test_a_write_that_fails_is_refused_and_the_next_one_succeeds(folder):
    one, two = names(store_of(folder, 2))
    session = Store(folder).session("ann")
    session.answer(one, "positive")
    n_bytes = (folder / "annotations.sqlite-wal").stat().st_size
    with file_size_limit(n_bytes + 20), pytest.raises(StorageError, match=str(folder / "annotations.sqlite")):
        session.answer(two, "negative")
    session.answer(two, "neutral")
    assert Store(folder).state().answers == {one: {"ann": "positive"}, two: {"ann": "neutral"}}


def test_a_store_that_is_locked_for_too_long(folder, monkeypatch):
    monkeypatch.setattr("sodaops.annotation.database._BUSY_TIMEOUT_S", 0.01)
    store, other = store_of(folder, 1), Store(folder)
    with store._transaction(), pytest.raises(StorageError, match=r"annotations\.sqlite"):
        other.session("ann").answer(names(other)[0], "neutral")
    other.session("ann").answer(names(other)[0], "neutral")


def test_threads_and_stores_that_write_at_once_lose_nothing(folder):
    """Three connections of two threads each, as three servers would do."""
    tasks = names(store_of(folder, 10))

    def work(store, name):
        for one in tasks:
            store.session(name, CODE).answer(one, "neutral")

    stores = [Store(folder) for _ in range(3)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, stores * 2, [f"a{n}" for n in range(6)]))
    assert stores[0].state().answers == {one: {f"a{n}": "neutral" for n in range(6)} for one in tasks}


def test_feedback_counts_for_a_task_of_its_request_alone(folder):
    service, store = Store.create(folder, LABELS), Store(folder)
    service.append_feedback("r1", 0, "negative")
    service.append_feedback("r1", 1, "positive", annotator="ann")
    assert store.state().progress() == (0, 0, {}, {}) and store.state().n_strays == 0
    assert store.feedback_without_task() == {("r1", 0), ("r1", 1)}
    store.add_tasks("some", [task("one", request_id="r1", place=1), task("two", request_id="r2", place=0)])
    one, _ = names(store)
    assert store.state().answers == {one: {"ann": "positive"}} and store.feedback_without_task() == {("r1", 0)}
    service.append_feedback("r1", 1, "neutral")
    assert store.state().answers == {one: {"ann": "positive", "feedback": "neutral"}}
    assert [conflict.task for conflict in store.state().conflicts()] == [one]


def test_kappa_against_scikit_learn():
    from sklearn.metrics import cohen_kappa_score

    pairs = [("a", "a"), ("a", "b"), ("c", "b"), ("b", "b"), ("c", "c"), ("a", "c"), ("a", "a")]
    assert cohen_kappa(pairs) == pytest.approx(cohen_kappa_score(*zip(*pairs, strict=True)), abs=1e-12)
    assert raw_agreement(pairs) == pytest.approx(4 / 7)
    assert cohen_kappa([]) is None and raw_agreement([]) is None and majority_label([]) is None
    assert majority_label(["a", "b", "b", "a", "c"]) is None


def test_a_forgotten_text_is_in_no_file(folder):
    store = Store.create(folder, LABELS)
    texts = [f"secret\u2028number {n} " + n % 7 * "and a longer text " * 40 for n in range(60)]
    store.add_tasks("t", [task(text, request_id=f"r{n}", place=0) for n, text in enumerate(texts)])
    kept, deleted = (store.state().tasks[n] for n in (0, 5))
    for one in (kept, deleted):
        store.session("ann").answer(one.task, "neutral")
    assert deleted.text.encode() in bytes_of(folder)
    assert store.forget(["r6"], [deleted.text_sha256]) == 2
    assert not any(text.encode() in bytes_of(folder) for text in ("number 5 ", "number 6 "))
    state = store.state()
    assert len(state.tasks) == 58 and state.answers == {kept.task: {"ann": "neutral"}} and state.n_strays == 1
    assert store.forget(["r6"], []) == 0


def test_a_forgotten_text_that_another_process_reads(folder, monkeypatch):
    monkeypatch.setattr("sodaops.annotation.database._BUSY_TIMEOUT_S", 0.01)
    store, other = store_of(folder, 2), Store(folder)
    digest = store.state().tasks[0].text_sha256
    with other._transaction("DEFERRED") as database:
        database.execute("SELECT * FROM tasks").fetchone()
        with pytest.raises(StorageError, match="-wal"):
            store.forget([], [digest])
    assert store.forget([], [digest]) == 0 and b"text 0" not in bytes_of(folder)


def check_converted(folder):
    store = Store(folder)
    state, expected = store.state(), V1_STATE
    assert [vars(task) for task in state.tasks] == expected["tasks"]
    assert state.answers == expected["answers"] and state.n_strays == expected["n_strays"] == 1
    assert store.feedback_without_task() == {tuple(key) for key in expected["feedback_without_task"]}
    return store


def test_a_store_of_format_1_is_converted_once(old, caplog):
    before = {file.name: file.read_bytes() for file in old.rglob("*.jsonl")}
    check_converted(old)
    (record,) = caplog.records
    assert record.levelname == "WARNING" and all(place in record.getMessage() for place in V1_STATE["damaged"])
    assert json.loads((old / "store.json").read_text()) == {"format": 2, "labels": LABELS}
    assert stat.S_IMODE((old / "annotations.sqlite").stat().st_mode) == 0o600
    assert {file.name: file.read_bytes() for file in (old / "format-1").rglob("*.jsonl")} == before
    assert (old / "tasks").is_file() and (old / "answers").is_file()  # an older server can write nothing more
    store = check_converted(old)
    assert len(caplog.records) == 1
    for who, tasks in V1_STATE["standing"].items():  # a page that was open goes on, and may undo
        session = store.session(*who.rsplit(" ", 1))
        assert [session.undo() for _ in tasks] == tasks[::-1]
    assert store.forget([], [V1_STATE["tasks"][0]["text_sha256"]]) == 1
    assert b"an earlier batch" not in bytes_of(old)  # nor in the old files


@pytest.mark.parametrize("step", ["sodaops.annotation.convert.create_database", "sodaops.annotation.store.write_store_info"])
def test_a_conversion_that_is_interrupted_starts_again(old, monkeypatch, step):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(step, stop)
        Store(old)
    assert json.loads((old / "store.json").read_text())["format"] == 1
    check_converted(old)


def test_stores_that_are_opened_at_once_convert_once(old, caplog):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(Store, [old] * 4))
    check_converted(old)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("changes", [
    {"label": "good"}, {"label": None}, {"time": "yesterday"}, {"time": "2026-13-01T00:00:01.000Z"}, {"time": None},
    {"task": 2}, {"annotator": ""}, {"source": "feedback"}, {"source": "feedback", "request_id": "r", "place": "0"},
])  # fmt: skip
def test_a_damaged_line_is_not_converted(old, caplog, changes):
    file = old / "answers/20990101T000000.000000Z-zoe-aaaaaaaabbbbbbbb.jsonl"
    answer = {"time": "2026-11-29T10:00:00.000Z", "annotator": "zoe", "task": V1_STATE["tasks"][0]["task"], "label": "neutral"}
    file.write_bytes(
        f"{json.dumps({**answer, **changes})}\n\n{json.dumps(answer | {'label': 'positive'})}\n".encode() + b"\xff\n"
    )
    answers = Store(old).state().answers
    assert answers[answer["task"]].pop("zoe") == "positive" and answers == V1_STATE["answers"]
    assert all(f"{file.name} line {n}" in caplog.text for n in (1, 4)) and f"{file.name} line 3" not in caplog.text
