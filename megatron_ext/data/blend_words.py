"""Lists of datasets with weights, as flags contain them. Megatron is not imported."""

import math
from collections.abc import Sequence
from pathlib import Path

from megatron_ext.errors import UserError


def parse_blend(words: Sequence[str], flag: str) -> tuple[list[str], list[float] | None]:
    """Return prefixes and weights of a list such as `0.3 A 0.7 B` or `A B`.

    Args:
        words: Words of the list.
        flag: Flag with the list, for messages.

    Raises:
        UserError: Some datasets have a weight and others do not, or a weight is not a positive
            number.
    """
    numbers = [number_of(word) for word in words]
    if all(number is None for number in numbers):
        return [word.strip() for word in words], None
    for index, number in enumerate(numbers):
        if index % 2 and number is not None:
            raise UserError(
                f"{flag}: {words[index]} is a number where a dataset is expected. Give a weight "
                "before every dataset."
            )
        if index % 2 == 0 and number is None:
            raise UserError(
                f"{flag}: {words[index]} has no weight. Give a weight before every dataset, or "
                "none."
            )
        if number is not None and not (number > 0 and math.isfinite(number)):
            name = words[index + 1] if index + 1 < len(words) else "no dataset"
            raise UserError(
                f"{flag}: the weight {words[index]} of {name} must be above 0. Leave the dataset "
                "out, or give it another weight."
            )
    if len(words) % 2:
        raise UserError(f"{flag}: the weight {words[-1]} has no dataset. Give one after it.")
    weights = [number for number in numbers if number is not None]
    return [word.strip() for word in words[1::2]], weights


def number_of(word: str) -> float | None:
    """Return a word as a number, or None for the name of a dataset, which may be numeric."""
    try:
        return None if Path(f"{word}.idx").is_file() else float(word)
    except ValueError:
        return None
