"""The examples in docstrings of the package, all in one pass."""

import doctest
import importlib
import pkgutil

import sodaops


def test_the_examples_in_docstrings_hold():
    attempted = 0
    for module in pkgutil.walk_packages(sodaops.__path__, "sodaops."):
        if not module.name.endswith("__main__"):
            result = doctest.testmod(importlib.import_module(module.name))
            assert result.failed == 0, module.name
            attempted += result.attempted
    assert attempted > 50
