"""The registry in a folder and in an emulated bucket: versions do not change, and concurrent changes are all kept."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sodaops.bundle import layout
from sodaops.cli import main
from sodaops.errors import BundleError, RegistryError, StorageError
from sodaops.registry import history
from sodaops.registry.history import State
from sodaops.registry.registry import Registry, address_of
from sodaops.registry.store import open_store
from tests.conftest import REPO
from tests.serving import copy_bundle


@pytest.fixture(params=["folder", pytest.param("bucket", marks=pytest.mark.slow)])
def root(request, tmp_path):
    """The address of an empty registry."""
    if request.param == "folder":
        return str(tmp_path / "registry")
    return f"{request.getfixturevalue('bucket')}/{tmp_path.name}/registry"


@pytest.fixture
def bundles(trained, tmp_path):
    return [copy_bundle(trained / "run/bundle", tmp_path / f"bundle{i}", f"{i}") for i in range(3)]


def test_register_promote_and_roll_back(root, bundles):
    registry = Registry(root)
    first, second, third = (registry.register(bundle, f"number {i}") for i, bundle in enumerate(bundles))
    assert len({first, second, third}) == 3 and registry.version("challenger") == third
    for before, version in ((None, first), (first, second), (second, third)):
        registry.move("champion", version, before, "better")
    assert registry.version("champion") == third == registry.version(third[:6])
    assert registry.resolve("champion") == f"{root}/versions/{third}"
    assert registry.roll_back("first failure") == second and registry.roll_back("second failure") == first
    with pytest.raises(RegistryError, match="^champion of "):
        registry.roll_back("again")
    events = [(entry["event"], entry.get("version"), entry["why"]) for entry in registry.history()]
    assert events[0] == ("register", first, "number 0") and events[5] == ("promote", third, "better")
    assert events[6:] == [("rollback", None, "first failure"), ("rollback", None, "second failure")]
    assert all("@" in entry["who"] and entry["when"].startswith("20") for entry in registry.history())


def test_a_registered_version_does_not_change(root, bundles, tmp_path):
    registry = Registry(root)
    version = registry.register(bundles[0])
    with registry.local(version) as folder:
        layout.verify(folder, layout.read_info(folder))
        card = (folder / "card.md").read_text(encoding="utf-8")
        assert layout.read_info(folder).bundle_id == version
    assert version in card and "macro-F1" in card and "`negative`, `neutral`, `positive`" in card and "ONNX int8" in card
    about = registry.state().versions[version]
    assert registry.register(bundles[0], "again") == version and registry.state().versions[version] == about
    (bundles[1] / "model.onnx").write_bytes(b"other")
    with pytest.raises(BundleError, match=r"model\.onnx"):
        registry.register(bundles[1])
    assert list(registry.state().versions) == [version]


def test_unknown_versions_and_invalid_aliases(root, bundles):
    registry = Registry(root)
    for name in ("champion", "challenger"):
        with pytest.raises(RegistryError, match=rf"^{name}: .*sodaops register"):
            registry.resolve(name)
    version = registry.register(bundles[0])
    with pytest.raises(RegistryError, match="^champion: .*sodaops promote"):
        registry.resolve("champion")
    with pytest.raises(RegistryError, match=r"^challengr: .*did you mean challenger"):
        registry.resolve("challengr")
    with pytest.raises(RegistryError, match="^0123456789ab: "):
        registry.move("champion", "0123456789ab", None, "")
    with pytest.raises(RegistryError, match=r"alias '\.\./champion'"):
        registry.move("../champion", version, None, "")
    assert registry.state().n == 1


def test_the_second_of_two_concurrent_promotions_fails(root, bundles):
    registry = Registry(root)
    first, second, third = (registry.register(bundle) for bundle in bundles)
    registry.move("champion", first, None, "")
    registry.move("champion", second, first, "the faster")
    with pytest.raises(RegistryError, match=f"^champion .*{first} to {second}"):
        registry.move("champion", third, first, "the slower")
    assert registry.version("champion") == second


def test_concurrent_moves_are_all_kept(root, bundles):
    version = Registry(root).register(bundles[0])

    def move(i):
        Registry(root).move(f"alias-{i}", version, None, f"writer {i}")

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(move, range(12)))
    registry = Registry(root)
    assert {name for name in registry.state().aliases if name.startswith("alias-")} == {f"alias-{i}" for i in range(12)}
    assert sorted(entry["why"] for entry in registry.history()[1:]) == sorted(f"writer {i}" for i in range(12))
    assert [entry["n"] for entry in registry.history()] == list(range(1, 14))


def test_only_one_of_many_concurrent_creates_succeeds(root):
    store = open_store(root)
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: store.create("history/1", b"%d" % i * 1000), range(16)))
    assert sum(won) == 1 and store.read("history/1") == b"%d" % won.index(True) * 1000
    assert store.names("history") == ["1"] and store.names("nowhere") == [] and store.read("nowhere") is None


def test_gc_deletes_only_unused_versions(root, bundles, trained, tmp_path):
    registry = Registry(root)
    more = [copy_bundle(trained / "run/bundle", tmp_path / f"more{i}", f"{10 + i}") for i in range(3)]
    versions = [registry.register(bundle) for bundle in [*bundles, *more]]
    for before, version in zip([None, *versions], versions[:4], strict=False):
        registry.move("champion", version, before, "")
    assert registry.gc(keep=9) == [] and registry.gc(keep=1, dry=True) == [versions[0], versions[1]]
    assert len(registry.state().versions) == 6
    assert set(registry.gc(keep=1)) == {versions[0], versions[1]}
    assert set(registry.state().versions) == set(versions[2:]), "champion and challenger, and the version before each"
    assert set(open_store(root).names("versions")) == set(versions[2:])
    assert registry.roll_back("this version was kept") == versions[2]
    with pytest.raises(RegistryError, match="^champion "):
        registry.roll_back("earlier versions were deleted")
    assert registry.register(bundles[0]) == versions[0], "a deleted version can be registered again"


def test_unused_versions_without_the_latest_ones():
    state = State(versions={key: {} for key in "abcde"}, aliases={"champion": "e"}, past={"champion": ["a", "b", "c", "d"]})
    assert [state.unused(keep) for keep in (0, 1, 3, 4, 5, 9)] == [["a", "b", "c", "d"], ["a", "b", "c"], ["a"], [], [], []]


def test_registering_a_version_while_gc_deletes_it(root, bundles, monkeypatch):
    registry = Registry(root)
    first, second = registry.register(bundles[0]), registry.register(bundles[1])
    delete = type(registry._store).delete

    def register_then_delete(store, name):
        monkeypatch.undo()
        assert Registry(root).register(bundles[0]) == first
        delete(store, name)

    monkeypatch.setattr(type(registry._store), "delete", register_then_delete)
    assert registry.gc(keep=0) == [first]
    assert registry.version("challenger") == first and registry.resolve("challenger") == f"{root}/versions/{first}-2"
    with registry.local(first) as folder:
        layout.verify(folder, layout.read_info(folder))
    assert second in registry.state().versions


def test_registering_again_restores_lost_files(workdir, bundles):
    registry = Registry("registry")
    version = registry.register(bundles[0])
    shutil.rmtree(f"registry/versions/{version}")
    assert registry.register(bundles[0]) == version and layout.read_info(registry.resolve(version)).bundle_id == version


def test_a_registry_of_an_earlier_version(workdir):
    version = {"when": "2026-01-01T00:00:00+00:00", "who": "me@here", "why": "", "folder": "b1-2", "metrics": {}, "data": {}}
    gate = {"passed": True, "against": "b0", "test": {"n_rows": 9, "sha256": "5"}, "rules": {"better": {"passed": True}}}
    state = {"versions": {"b1": version}, "aliases": {"champion": "b1"}, "past": {"champion": ["b0"]}, "collected": ["b1"]}
    event = {"format": 1, "n": 1, "event": "promote", "when": version["when"], "who": "me@here", "alias": "champion",
             "version": "b1", "before": "b0", "why": "", "gate": gate, "nonce": "0", "state": state}  # fmt: skip
    Path("models/history").mkdir(parents=True)
    Path("models/history/00000001.json").write_text(json.dumps(event))
    registry = Registry("models")
    assert registry.resolve("champion") == "models/versions/b1-2" and registry.history()[0]["gate"] == gate
    registry.move("stable", "b1", None, "")
    assert sorted(json.loads(Path("models/history/00000002.json").read_text())) == [
        "alias", "before", "event", "format", "n", "nonce", "state", "version", "when", "who", "why",
    ]  # fmt: skip


def test_a_damaged_history(workdir, bundles, capsys):
    registry = Registry("registry")
    registry.register(bundles[0])
    entry = workdir / "registry/history/00000001.json"
    for content in ("{", "[]", json.dumps({**json.loads(entry.read_text()), "format": 9}), ""):
        entry.write_text(content)
        assert main(["registry", "list"]) == 2
        assert "RegistryError: registry/history/00000001.json" in capsys.readouterr().err


DAMAGED = {  # of the newest file of the history
    "half": lambda entry: json.dumps(entry)[:99],
    "empty": lambda entry: "",
    "a list": lambda entry: "[]",
    "nested": lambda entry: "[" * 10**5,
    "not finite": lambda entry: json.dumps({**entry, "n": float("inf")}),
    "another number": lambda entry: json.dumps({**entry, "n": 7}),
    "no state": lambda entry: json.dumps({key: value for key, value in entry.items() if key != "state"}),
    "versions as a list": lambda entry: json.dumps({**entry, "state": {**entry["state"], "versions": []}}),
    "aliases of numbers": lambda entry: json.dumps({**entry, "state": {**entry["state"], "aliases": {"champion": 1}}}),
    "another key": lambda entry: json.dumps({**entry, "state": {**entry["state"], "locks": []}}),
    **{
        f"folder {folder!r}": lambda entry, folder=folder: json.dumps(entry).replace('"folder": "', f'"folder": "{folder}')
        for folder in ("../../", "/etc/", "x/", "gs://", ".", "-")
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("how", DAMAGED)
def test_damaged_and_stray_files_in_the_history_are_named_and_skipped(workdir, bundles, run, monkeypatch, how):
    logged = []
    monkeypatch.setattr(history, "_reported", set())  # a process logs each file once
    monkeypatch.setattr(history.log, "warning", logged.append)  # wherever the tests before let the log go
    registry = Registry("registry")
    first = registry.register(bundles[0])
    registry.register(bundles[1])
    path = workdir / "registry/history/00000002.json"
    content = path.read_text()
    path.write_text(DAMAGED[how](json.loads(content)))
    (path.parent / "notes.txt").write_text("stray")
    (path.parent / "99999999.json.bak").mkdir()
    os.mkfifo(path.parent / "00000099.json~")
    code, out, _ = run("resolve", "challenger")
    assert (code, out) == (0, f"registry/versions/{first}\n")
    for name in (path.name, "notes.txt", "99999999.json.bak", "00000099.json~"):
        assert any(line.startswith(f"registry/history/{name}: ") for line in logged), name
    assert [entry["n"] for entry in registry.history()] == [1]
    with pytest.raises(RegistryError, match=path.name):
        registry.move("champion", first, None, "")
    path.write_text(content)
    assert registry.version("challenger") != first


def test_a_newest_file_that_is_no_file(workdir, bundles):
    registry = Registry("registry")
    version = registry.register(bundles[0])
    os.mkfifo("registry/history/00000002.json")
    Path("registry/history/00000003.json").symlink_to("nowhere")
    assert registry.version("challenger") == version


def test_gc_deletes_what_killed_processes_left(root, bundles, tmp_path):
    registry = Registry(root)
    version, other = registry.register(bundles[0]), layout.read_info(bundles[1]).bundle_id
    store = open_store(root)
    with store.put(f"versions/{other}", {*layout.NAMES, layout.CARD}, layout.INFO) as folder:  # killed before its event
        shutil.copytree(bundles[1], folder, dirs_exist_ok=True)
    left = [f"versions/{other}"]
    if "://" not in root:
        folders = (f"versions/.{version}.abcd1234.tmp", f"versions/.{version}-2.abcd1234.old")
        for name in (*folders, "history/.00000099.json.abcd_123.tmp"):
            (Path(root) / name).mkdir()
            left.append(name)
        (Path(root) / "versions/notes").mkdir()
        (Path(root) / "versions/.keep").touch()
    assert registry.gc() == [], "they may belong to a running process"
    time.sleep(0.01)
    assert sorted(registry.gc(grace_s=0)) == sorted(left) and registry.gc(grace_s=0) == []
    assert {name for name in store.names("versions") if name != "notes"} == {version}
    assert registry.register(bundles[1]) == other and registry.resolve("challenger") == f"{root}/versions/{other}-2"
    with registry.local(other) as folder:
        layout.verify(folder, layout.read_info(folder))


def test_gc_goes_on_where_a_killed_gc_stopped(root, bundles, monkeypatch):
    registry = Registry(root)
    first, second = (registry.register(bundle) for bundle in bundles[:2])

    class KilledError(Exception):
        pass

    def kill(*_):
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(type(registry._store), "delete", kill)
        with pytest.raises(KilledError):
            registry.gc(keep=0)
    assert set(open_store(root).names("versions")) == {first, second}
    assert registry.gc(keep=0) == [f"versions/{first}"] and open_store(root).names("versions") == [second]


def test_a_folder_that_cannot_be_written_to(workdir, bundles, capsys):
    (workdir / "registry").write_text("a file in the way")
    with pytest.raises(StorageError, match="registry/versions/"):
        Registry("registry").register(bundles[0])
    assert main(["register", str(bundles[0])]) == 2 and "registry/versions/" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(
    os.name == "nt" or not os.path.exists("/usr/bin/setpriv"), reason="needs setpriv, to run as another user than root"
)
def test_a_read_only_registry(tmp_path, bundles):
    root = tmp_path / "registry"
    version = Registry(str(root)).register(bundles[0])
    for path in [tmp_path, *tmp_path.parents]:
        if path.stat().st_uid == os.getuid() and str(path) != "/":
            path.chmod(path.stat().st_mode | 0o055)
    root.chmod(0o555)
    (root / "history").chmod(0o555)
    code = f"from sodaops.registry.registry import Registry; r = Registry({str(root)!r}); print(r.version('challenger')); "
    code += f"r.move('champion', {version!r}, None, '')"
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.getuid() == 0 else []
    env = {**os.environ, "PYTHONPATH": str(REPO), "PYTHONDONTWRITEBYTECODE": "1", "USER": "nobody"}
    done = subprocess.run([*nobody, sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd="/")
    if "Permission denied" in done.stderr and "sodaops" in done.stderr.splitlines()[-1] and "StorageError" not in done.stderr:
        pytest.skip("this user cannot read the code")
    assert done.stdout.strip() == version and "StorageError" in done.stderr
    assert Registry(str(root)).state().aliases == {"challenger": version}


def test_addresses(workdir, bundles):
    version = Registry("models").register(bundles[0])
    assert address_of("models@challenger") == f"models/versions/{version}"
    assert address_of(f"models@{version}") == f"models/versions/{version}"
    (workdir / "a@b").mkdir()
    for plain in ("a@b", "gs://bucket/models", "me@host/models", "models"):
        assert address_of(plain) == plain
    with pytest.raises(RegistryError, match="^champion: "):
        address_of("models@champion")


@pytest.mark.slow
def test_the_commands(workdir, bundles, capsys):
    assert main(["registry", "list"]) == 0
    assert main(["registry", "history", "--json"]) == 0 and capsys.readouterr().out.endswith("[]\n")
    assert main(["register", str(bundles[0]), "--reason", "the first"]) == 0
    version = capsys.readouterr().out.partition(":")[0]
    assert main(["resolve", "challenger"]) == 0 and capsys.readouterr().out == f"registry/versions/{version}\n"
    assert main(["registry", "list"]) == 0 and re.search("challenger .* macro_f1 +0", capsys.readouterr().out)
    assert main(["registry", "list", "--json"]) == 0 and version in json.loads(capsys.readouterr().out)["versions"]
    assert main(["registry", "history"]) == 0 and "the first" in capsys.readouterr().out
    assert main(["registry", "gc", "--dry-run"]) == 0 and capsys.readouterr().out == ""
    assert main(["registry", "gc", "--keep=-1"]) == 2 and main(["resolve", "champion"]) == 2
    assert main(["rollback", "--reason", "x"]) == 2 and "RegistryError: champion" in capsys.readouterr().err
    assert main(["registry", "list", "registry.path=elsewhere"]) == 0 and "elsewhere" in capsys.readouterr().out
    assert main(["register", "nowhere"]) == 2 and "BundleError: nowhere" in capsys.readouterr().err
    for wrong in (["registry", "lst"], ["promote"], ["register", "a", "--typo"]):
        assert main(wrong) == 2
