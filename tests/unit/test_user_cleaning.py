"""A user's function as ``data.cleaning``: the same texts everywhere, and which functions a bundle may name."""

import logging
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from sodaops.data import parts, workers
from sodaops.data.preprocess import ensure_splits, preprocess, read_split
from sodaops.errors import BundleError, ConfigError
from sodaops.text import cleaning, trust
from sodaops.text.bulk_cleaning import clean_many
from sodaops.text.cleaning import clean
from tests.conftest import configured, lazy, make_rows, table
from tests.serving import refresh_info

predictor = lazy("sodaops.inference.predictor")
LINKS = "textlab.cleaning.without_links"
TEXTS = [*(f"{i} &amp;amp;  see http://t.co/{i}\x07 !" for i in range(9)), "", " \u200b", "http://t.co/x", "half \ud800 a pair"]


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Writes a module with the function ``own``, each time under a new name; gives its import path."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(trust, "configured", set())

    def make(body):
        name = f"cleaning{len(list(tmp_path.glob('cleaning*.py')))}_{abs(hash(str(tmp_path)))}"
        (tmp_path / f"{name}.py").write_text(f"def own(text):\n    {body}\n")
        return f"{name}.own"

    return make


def with_cleaning(bundle, name):
    refresh_info(bundle, cleaning=name, versions=cleaning.code_of(name))
    return bundle


def test_a_function_gets_and_gives_texts_as_tidy_as_those_of_minimal(extensions, own):
    cleaned = [clean(text, LINKS) for text in TEXTS]
    assert cleaned == [*(f"{i} &amp; see !" for i in range(9)), "", "", "", "half a pair"]
    assert clean_many(pa.array(TEXTS[:-1]), LINKS).to_pylist() == cleaned[:-1]
    assert clean("a", own(r"return text[0] + '\x07\ud800  b\n'")) == "a b"
    assert clean("\u200b", own("return text[0]")) == ""


def test_one_python_and_one_yaml_file_outside_the_package(run, extensions, small_tweets):
    code, _, error = run("preprocess", "--config-dir", extensions, "data=unlinked", f"data.path={small_tweets}")
    assert code == 0, error
    texts = read_split("data/processed/unlinked", "train")["text"].to_pylist()
    assert len(texts) > 300 and not any("http://" in text or "https://" in text for text in texts)


def test_splits_are_made_again_when_the_function_changes(own, write):
    name = own("return text.upper()")
    write("t.csv", table(make_rows()))
    config = configured("data=csv", "data.path=t.csv", f"data.cleaning={name}").data
    first = ensure_splits(config, "splits")
    assert first["cleaning"] == name
    assert all(text.isupper() for text in read_split("splits", "train")["text"].to_pylist())
    assert ensure_splits(config, "splits") == first
    Path(f"{name.partition('.')[0]}.py").write_text("def own(text): return text.lower()\n")
    assert ensure_splits(config, "splits")["fingerprint"] != first["fingerprint"]


@pytest.mark.slow
def test_worker_processes_clean_alike(extensions, write, monkeypatch):
    write("t.csv", table([(f"{text} http://t.co", label) for text, label in make_rows(300)]))
    config = configured("data=csv", "data.path=t.csv", f"data.cleaning={LINKS}").data
    expected = preprocess(config, "expected")
    monkeypatch.setattr(workers, "LOCAL_ROWS", 1)
    monkeypatch.setattr(workers, "_n_workers", lambda: 2)
    monkeypatch.setattr(parts, "PART_ROWS", 50)
    assert preprocess(config, "splits")["splits"] == expected["splits"]
    assert "http" not in str(read_split("splits", "train")["text"].to_pylist())


@pytest.mark.parametrize(("body", "named"), [
    ("raise ValueError('on purpose')", "ValueError: on purpose"),
    ("return None", "NoneType"),
    ("return text.encode()", "bytes"),
])  # fmt: skip
def test_a_faulty_function(own, write, body, named):
    name = own(body)
    write("t.csv", table(make_rows()))
    config = configured("data=csv", "data.path=t.csv", f"data.cleaning={name}").data
    with pytest.raises(ConfigError, match=rf"data.cleaning={name}: .*{named}"):
        preprocess(config, "splits")
    assert not Path("splits").exists()


@pytest.mark.parametrize(("name", "command"), [
    ("no.such.function", "preprocess"),
    ("textlab.cleaning.without_link", "preprocess"),
    ("math.pi", "preprocess"),
    pytest.param("no.such.function", "train", marks=pytest.mark.slow),
])  # fmt: skip
def test_what_is_no_function_is_found_before_the_training(extensions, write, run, name, command):
    write("t.csv", table(make_rows()))
    code, _, error = run(command, "data=csv", "data.path=t.csv", f"data.cleaning={name}", "model=tiny", "run_dir=run")
    assert code == 2 and error.startswith("ConfigError: ") and name in error and "data.cleaning=" in error
    assert not list(Path().rglob("*.parquet"))


def test_a_bundle_cleans_with_an_installed_packages_function(extensions, bundle, monkeypatch, caplog):
    monkeypatch.setattr(trust, "configured", set())
    expected = predictor.Predictor(bundle).probs(["so good"])
    model = predictor.Predictor(with_cleaning(bundle, LINKS))
    assert model.info.cleaning == LINKS and model.clean("so http://t.co/x good") == "so good"
    assert (model.probs(["so http://t.co/x good"]) == expected).all()
    assert not caplog.records


def test_a_bundle_runs_and_imports_nothing_that_is_not_allowed(own, bundle, tmp_path, monkeypatch):
    name = own("return text.upper()")
    module = tmp_path / f"{name.partition('.')[0]}.py"
    with_cleaning(bundle, name)
    module.write_text("__import__('pathlib').Path('imported').touch()\n" + module.read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, module.stem)
    for refused in (name, "os.system"):
        refresh_info(bundle, cleaning=refused)
        with pytest.raises(BundleError, match=rf"{bundle}: .*{refused}.*SODAOPS_CLEANING={refused}"):
            predictor.Predictor(bundle)
    assert not Path("imported").exists()
    refresh_info(bundle, cleaning=name)
    monkeypatch.setenv("SODAOPS_CLEANING", f"some.other,{name}")
    assert predictor.Predictor(bundle).clean("a") == "A" and Path("imported").exists()


def test_a_bundle_of_this_processes_configuration_is_allowed(own, bundle):
    name = own("return text.upper()")
    configured(f"data.cleaning={name}")
    assert predictor.Predictor(with_cleaning(bundle, name)).clean("a") == "A"


def test_a_function_that_is_missing_or_was_changed(own, bundle, monkeypatch, caplog):
    name = own("return text.upper()")
    with_cleaning(bundle, name)
    monkeypatch.setenv("SODAOPS_CLEANING", f"no.such.function,{name}")
    refresh_info(bundle, versions={name: "0"})
    with caplog.at_level(logging.WARNING):
        predictor.Predictor(bundle)
    assert name in caplog.text and "changed" in caplog.text
    refresh_info(bundle, cleaning="no.such.function")
    with pytest.raises(BundleError, match=rf"{bundle}: .*no\.such\.function.*PYTHONPATH"):
        predictor.Predictor(bundle)


def test_a_text_on_which_a_function_fails_is_not_shown(own, bundle, monkeypatch):
    name = own("return {'A word': text}[text]")
    monkeypatch.setenv("SODAOPS_CLEANING", name)
    model = predictor.Predictor(with_cleaning(bundle, name))
    with pytest.raises(BundleError, match=f"{name}: .*KeyError") as caught:
        model.predict(["A word", "private"])
    assert "private" not in str(caught.value) and caught.value.__suppress_context__
