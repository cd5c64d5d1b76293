"""Tests of JSON with numbers that are not finite."""

import json
import math

import numpy as np
import pytest

from megatron_ext.json_numbers import dump_json, load_json


def refuse(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def test_numbers_that_are_not_finite_are_strings_and_undefined_ones_null() -> None:
    row = {"loss": math.nan, "list": [math.inf, -math.inf, 1.5], "mfu": None, "pair": (1, "x")}
    text = dump_json(row)
    read = json.loads(text, parse_constant=refuse)
    expected = {"loss": "NaN", "list": ["Infinity", "-Infinity", 1.5], "mfu": None}
    assert read == expected | {"pair": [1, "x"]}
    floats = load_json(text)
    assert math.isnan(floats["loss"]) and floats["list"] == [math.inf, -math.inf, 1.5]
    assert floats["mfu"] is None and floats["pair"] == [1, "x"]
    assert np.isnan(np.array([1.0, read["loss"]], dtype=float)).tolist() == [False, True]


def test_finite_values_are_written_as_by_the_standard_library() -> None:
    value = {"a": [1, 0.1, 1e300, True, None, "NaN of"], "é": {}}
    assert dump_json(value, ensure_ascii=False, indent=1) == json.dumps(
        value, ensure_ascii=False, indent=1
    )
    with pytest.raises(ValueError):
        load_json("{")
