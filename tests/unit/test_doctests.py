"""The examples in docstrings of the package, all in one pass, in a folder where outputs/first is a finished run."""

import doctest
import importlib
import pkgutil
import shutil

import pytest

import sodaops


@pytest.mark.slow
def test_the_examples_in_docstrings_hold(trained, workdir):
    shutil.copytree(trained / "run", "outputs/first")
    attempted = 0
    for module in pkgutil.walk_packages(sodaops.__path__, "sodaops."):
        if not module.name.endswith("__main__"):
            result = doctest.testmod(importlib.import_module(module.name))
            assert result.failed == 0, module.name
            attempted += result.attempted
    assert attempted > 50
