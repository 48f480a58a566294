import pytest

from sodaops.config.extensions import build, load
from sodaops.errors import ConfigError


@pytest.mark.parametrize(
    ("section", "more", "named"),
    [
        ({"_target_": "no.such.Module"}, {}, r"head\._target_=no\.such\.Module: .*No module named 'no'"),
        ({"_target_": "fractions.Fractoin"}, {}, r"head\._target_=fractions\.Fractoin: .*did you mean Fraction"),
        ({"_target_": "math.pi"}, {}, r"head\._target_=math\.pi: .*float"),
        ({"_target_": "fractions.Fraction", "denominator": 0}, {}, "head: .*ZeroDivisionError"),
        ({"_target_": "fractions.Fraction", "numerater": 1}, {}, r"head\.numerater .*did you mean numerator"),
        ({"_target_": "fractions.Fraction", "numerator": 1}, {"numerator": 2}, r"head\.numerator"),
        ({"_target_": "collections.Counter"}, {}, r"head\._target_=collections\.Counter: .*Fraction, got Counter"),
    ],
)
def test_an_extension_that_cannot_be_built(section, more, named):
    from fractions import Fraction

    with pytest.raises(ConfigError, match=named):
        build("head", section, kind=Fraction, **more)


def test_objects_reach_a_class_as_they_are(tmp_path, monkeypatch):
    """Hydra would copy arguments, and so the parameters that an optimizer is to train."""
    (tmp_path / "mine.py").write_text("import fractions\nclass Kept:\n    def __init__(self, it, lists, inner, **more):\n"
                                      "        self.__dict__.update(locals())\n")  # fmt: skip
    monkeypatch.syspath_prepend(tmp_path)
    it, section = [object()], {"lists": [1, [2]], "inner": {"_target_": "fractions.Fraction", "numerator": 3}, "any": {"a": 1}}
    kept = build("x", {"_target_": "mine.Kept", **section}, it, other=it)
    assert kept.it is it and kept.more["other"] is it and kept.lists == [1, [2]] and type(kept.lists) is list
    assert kept.inner == 3 and kept.more["any"] == {"a": 1}


def test_a_module_that_fails_while_it_is_imported(tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("raise AttributeError('on purpose')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"loss\._target_=broken\.Loss: .*AttributeError: on purpose"):
        load("loss._target_", "broken.Loss")
