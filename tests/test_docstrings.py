"""The examples in the docstrings of all five scripts are true."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize("script, fewest", [
    ("switchbert", 4),
    ("data", 3),
    ("train", 0),
    ("finetune", 0),
    ("extract_features", 0),
])
def test_every_example_in_a_docstring_prints_what_it_says(script, fewest):
    result = doctest.testmod(importlib.import_module(script))
    assert result.failed == 0
    assert result.attempted >= fewest
