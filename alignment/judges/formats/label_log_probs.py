"""Log-probabilities of the labels in a chat answer, and the expected score under them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from alignment.judges.formats.labels import LEAST_MASS, SCORES

# For each token that is a label: the label, the log-probabilities of the labels that are listed
# there, and the probability of all tokens that are not listed.
LabelLogProbs = list[tuple[str, dict[str, float], float]]

_IMPOSSIBLE = -700.0  # a log-probability whose exponential is 0; vLLM writes -inf as -9999
_ROUNDING = 1e-2  # rounding error by which a log-probability may exceed 0


def read_label_log_probs(value: Any) -> LabelLogProbs:
    """Read the `logprobs` of a choice.

    Args:
        value: The `logprobs` as parsed from JSON.

    Raises:
        ValueError: If there are none, or those of a label cannot be read, with the reason.
    """
    if value is None or value == {}:
        raise ValueError("the answer has no logprobs")
    content = value.get("content") if isinstance(value, Mapping) else None
    if not isinstance(content, list) or not content:
        raise ValueError("the answer's logprobs have no list of tokens as content")
    labels: LabelLogProbs = []
    for position in content:
        label = _label(position)
        if label is None:
            continue
        log_probs, unlisted = _distribution(position)
        if label in log_probs:
            labels.append((label, log_probs, unlisted))
    return labels


def expected_score(labels: LabelLogProbs, label: float) -> float:
    """Return the sum of x p(x) over labels 0 to 9, renormalized among themselves.

    Args:
        labels: The labels among the tokens of an answer.
        label: The label in the text; its position is that of the last token that is this digit
        alone.

    Raises:
        LookupError: If no token is the label alone, or the listed labels are too unlikely to
            represent all.
    """
    for digit, log_probs, unlisted in reversed(labels):
        if digit == f"{label:.0f}":
            mass = sum(map(math.exp, log_probs.values()))
            if mass < LEAST_MASS or mass < unlisted:
                raise LookupError(
                    f"the labels listed have a probability of {mass:.2g}, and tokens that are not "
                    f"listed of {unlisted:.2g}"
                )
            score = sum(int(x) * math.exp(p) for x, p in log_probs.items()) / mass
            return min(score, 9.0)  # rounding may exceed the scale
    raise LookupError("no token of the answer is the label alone")


def _label(position: Any) -> str | None:
    """Return the label that a token is, apart from surrounding space, or None."""
    text = _text(position)
    return text if text in SCORES else None


def _text(token: Any) -> str:
    """Return a token's text without surrounding space.

    The bytes of a token determine its text exactly; names such as `<0x37>` do not.
    """
    if not isinstance(token, Mapping):
        return ""
    text, raw = token.get("token"), token.get("bytes")
    if isinstance(raw, Sequence) and raw and all(type(b) is int and 0 <= b < 256 for b in raw):
        text = bytes(raw).decode(errors="replace")
    # Some servers give tokens as the vocabulary writes them, with a mark for a space.
    return text.strip().lstrip("▁Ġ").rstrip("Ċ") if isinstance(text, str) else ""


def _distribution(position: Mapping[str, Any]) -> tuple[dict[str, float], float]:
    """Return the log-probability of each label at a position, and the probability not listed.

    " 7" and "7" are the same label, and their probabilities add up. A token that is listed twice
    counts once, with its largest value: servers repeat the sampled token. The sampled token's own
    value counts if it is not listed.
    """
    listed = position.get("top_logprobs")
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"top_logprobs of the label is {_format_value(listed)}")
    values: dict[str, float] = {}
    texts: dict[str, str] = {}
    for entry in (*listed, position):
        if not isinstance(entry, Mapping) or not isinstance(entry.get("token"), str):
            raise ValueError(f"an entry of top_logprobs is {_format_value(entry)}")
        token, value = entry["token"], entry.get("logprob")
        if isinstance(value, bool) or not isinstance(value, int | float) or not value < _ROUNDING:
            raise ValueError(f"the logprob of the token {token!r} is {_format_value(value)}")
        if entry is position and token in values:
            continue
        values[token] = max(value, values.get(token, -math.inf))
        texts[token] = _text(entry)
    log_probs: dict[str, float] = {}
    for token, value in sorted(values.items()):
        if texts[token] in SCORES and value > _IMPOSSIBLE:
            label = texts[token]
            log_probs[label] = math.log(math.exp(log_probs.get(label, -math.inf)) + math.exp(value))
    return log_probs, max(0.0, 1.0 - sum(math.exp(value) for value in values.values()))


def _format_value(value: Any) -> str:
    return "missing or null" if value is None else f"{value!r:.40}"
