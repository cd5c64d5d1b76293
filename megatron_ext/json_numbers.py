"""JSON with numbers that are not finite.

JSON has no such numbers: Python's `NaN` and `Infinity` are rejected by other readers. They are
written as the strings "NaN", "Infinity" and "-Infinity", as in the JSON format of protocol buffers,
which `float()` and NumPy read. `null` remains for values that are not defined.
"""

import json
import math
from typing import Any

_NAMES = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def dump_json(value: Any, **options: Any) -> str:
    """Return a value as JSON, in which floats that are not finite are strings.

    Args:
        value: Value to write.
        **options: Options of `json.dumps`.
    """
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_with_names(value), allow_nan=False, **options)


def load_json(text: str | bytes) -> Any:
    """Return the value of a JSON text of numbers, in which the three strings are floats.

    Raises:
        ValueError: The text is not JSON.
    """
    return _with_floats(json.loads(text))


def _with_names(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return _map(_with_names, value)


def _with_floats(value: Any) -> Any:
    if isinstance(value, str):
        return _NAMES.get(value, value)
    return _map(_with_floats, value)


def _map(function: Any, value: Any) -> Any:
    if isinstance(value, dict):
        return {name: function(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [function(item) for item in value]
    return value
