"""The examples in docstrings run and print what they say."""

import doctest
import importlib

import pytest

from tests.helpers import ROOT

PATHS = sorted(path for path in (ROOT / "rs_consistency").rglob("*.py") if ">>> " in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in PATHS])
def test_examples_in_docstrings(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0 and result.failed == 0
