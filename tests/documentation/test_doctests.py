"""The examples in docstrings run and print what they say, and no function that users call lacks one."""

import doctest
import importlib
import inspect

import pytest

import rs_consistency
from rs_consistency import losses
from rs_consistency.statistics import bounds
from tests.helpers import ROOT

PATHS = sorted(path for path in (ROOT / "rs_consistency").rglob("*.py") if ">>> " in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in PATHS])
def test_examples_in_docstrings(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0 and result.failed == 0


def public_functions(module):
    return [
        value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    ]


def test_what_users_call_has_an_example():
    wanted = [rs_consistency.certify, rs_consistency.decide, rs_consistency.predict, rs_consistency.attack]
    wanted += public_functions(losses)
    wanted += [one for one in public_functions(bounds) if "bound" in one.__name__ or "radius" in one.__name__]
    assert len(wanted) >= 17
    assert not [one.__qualname__ for one in wanted if ">>> " not in one.__doc__]
