r"""Exact numbers in text: separators, fractions, percent, powers of ten and LaTeX.

Nothing is rounded and nothing is guessed: a number that these rules cannot read is no number.
"""

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

Decimal = Literal["point", "comma"]

_MOST_DIGITS = 1000
_MOST_EXPONENT = 1000

_SPACES = "\u00a0\u2007\u2009\u202f"  # of one width or narrow, as between groups of digits
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_SIGNS = str.maketrans({"−": "-", "﹣": "-", "－": "-", "＋": "+", "⁄": "/", "∕": "/", "％": "%",
                        "٪": "%", "٫": ".", "٬": ",", "’": "'"})  # fmt: skip
_LATEX = (
    (re.compile(r"\\[dt]?frac\s*\{\s*(-?[^{}]*?)\s*\}\s*\{\s*([^{}]*?)\s*\}"), r" \1/\2 "),
    (re.compile(r"\\[dt]?frac\s*(\d)\s*(\d)"), r" \1/\2 "),
    (re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?"), " "),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"(?<=\d)\\[,!:; ](?=\d{3}(?!\d))"), _SPACES[0]),
    (re.compile(r"\\(?:times|cdot)(?![A-Za-z])"), "×"),
    (re.compile(r"\\(?:left|right|displaystyle|quad|approx)(?![A-Za-z])|\\[,!:; ]"), " "),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\\?\$|\\[()\[\]]"), " "),
)
_GROUPED = rf"[1-9]\d{{0,2}}(?:(?P<separator>[SEPARATORS_'{_SPACES}])\d{{3}})" \
    r"(?:(?P=separator)\d{3})*(?:DECIMAL\d+)?"  # fmt: skip
_PLAIN = r"\d+(?:DECIMAL\d+)?|DECIMAL\d+"
_BODY = {
    "point": re.compile(
        _GROUPED.replace("SEPARATORS", ",").replace("DECIMAL", r"\.")
        + "|" + _PLAIN.replace("DECIMAL", r"\.")
    ),
    "comma": re.compile(
        _GROUPED.replace("SEPARATORS", ".").replace("DECIMAL", ",")
        + "|" + _PLAIN.replace("DECIMAL", ",")
    ),
}  # fmt: skip
_DIGITS = rf"(?:\d(?:[\d.,_'{_SPACES}]*\d)?)"
_TOKEN = re.compile(
    rf"""
    (?P<sign>(?<![\w)\]}}.,%])[-+]\s?)?
    (?: (?P<whole>\d{{1,9}})\s+(?P<over>\d{{1,9}})\s?/\s?(?P<under>\d{{1,9}})   # 1 3/4
      | (?P<body>[.,]?{_DIGITS})
        (?P<exponent>[eE][-+]?\d+)?
        (?:\s?(?:[×*·]|[xX](?=\s?10))\s?10\s?\^\s?\{{?(?P<power>[-+]?\d+)\}}?)?
        (?:\s?/\s?(?P<divisor>{_DIGITS}))?
    )
    (?P<percent>\s?%|\s+(?:percent|per\s?cent)\b)?
    """,
    re.VERBOSE | re.IGNORECASE,
)
# Letters that follow a number at once are a unit; a single one may be a variable instead.
_ONE_LETTER_UNITS = frozenset("mgshlLWVAJNKCF€£¥°%")
# Words that change the value of the number in front of them.
_SCALES = re.compile(
    r"\s*(?:hundred|thousand|million|billion|trillion|dozen|pi|sqrt|π|√)s?\b", re.IGNORECASE
)
_JOINED = re.compile(r"(?<=[^\W\d_])[/-](?=[^\W\d_])")
_OPERATORS = re.compile(r"[\\^*×·÷+√π<>≠±/%-]|(?<!\d)[xX](?=\s?\d)")


@dataclass(frozen=True)
class Number:
    """Number of a text.

    Attributes:
        value: The exact value; a percentage is a hundredth of what is written.
        percent: Whether a percent sign or the word follows it.
    """

    value: Fraction
    percent: bool = False


def find_numbers(text: str, decimal: Decimal = "point") -> list[Number | None]:
    """Return the numbers of a text in order, None for each that cannot be read.

    Args:
        text: The text.
        decimal: Whether a point or a comma begins the decimals; the other one groups thousands.
    """
    text = _simplify(text)
    return [_read(text, match, decimal) for match in _TOKEN.finditer(text)]


def read_number(text: str, decimal: Decimal = "point") -> Number | None:
    """Return the number of a text that states one number, perhaps with a unit or "x =".

    Returns:
        None if there is no number, more than one, one that cannot be read, or an operator.
    """
    text = _simplify(text)
    matches = list(_TOKEN.finditer(text))
    if len(matches) != 1:
        return None
    [match] = matches
    before, after = text[: match.start()], text[match.end() :]
    # Letters may be joined, as in m/s and kilowatt-hours; any other sign makes a formula.
    if any(_OPERATORS.search(_JOINED.sub("", part)) for part in (before, after)):
        return None
    variable = re.match(r"\s([^\W\d_])(?!\w)", after)
    if variable and variable[1] not in _ONE_LETTER_UNITS:
        return None
    return _read(text, match, decimal)


def _simplify(text: str) -> str:
    """Return a text with digits, signs, fractions and LaTeX in one form."""
    characters = []
    for character in text:
        if character.isascii():
            characters.append(character)
        elif unicodedata.category(character) == "Nd":
            characters.append(str(unicodedata.decimal(character)))
        elif unicodedata.decomposition(character).startswith("<fraction>"):
            characters.append(f" {unicodedata.normalize('NFKC', character)} ")
        else:
            characters.append(character)
    text = "".join(characters)
    text = re.sub(r"[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda m: "^" + m[0].translate(_SUPERSCRIPTS), text)
    text = text.translate(_SIGNS)
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    return text


def _read(text: str, match: "re.Match[str]", decimal: Decimal) -> Number | None:
    """Return the number of a match, or None if what surrounds it makes it none."""
    before, after = text[: match.start()][-1:], text[match.end() :][:40]
    if before.isalnum() or before in ("^", "_", ".", "/"):
        return None
    if after[:1] in ("^", "_") or re.match(r"\s?/\s?\d|[.,]\d|:\d", after) or _SCALES.match(after):
        return None
    letters = re.match(r"[^\W\d_]*", after)
    if letters and len(letters[0]) == 1 and letters[0] not in _ONE_LETTER_UNITS:
        return None
    value = _value(match, decimal)
    if value is None:
        return None
    if (match["sign"] or "").startswith("-"):
        value = -value
    percent = match["percent"] is not None
    return Number(value / 100 if percent else value, percent)


def _value(match: "re.Match[str]", decimal: Decimal) -> Fraction | None:
    if match["whole"]:
        over, under = int(match["over"]), int(match["under"])
        return int(match["whole"]) + Fraction(over, under) if over < under else None
    value = _decimal(match["body"], decimal)
    exponents = [int(e.lstrip("eE")) for e in (match["exponent"], match["power"]) if _is_small(e)]
    if value is None or len(exponents) < sum(map(bool, (match["exponent"], match["power"]))):
        return None
    if any(abs(exponent) > _MOST_EXPONENT for exponent in exponents):
        return None
    value *= Fraction(10) ** sum(exponents)
    if match["divisor"] is None:
        return value
    divisor = _decimal(match["divisor"], decimal)
    return value / divisor if divisor else None


def _is_small(exponent: str | None) -> bool:
    return bool(exponent) and len(exponent or "") < 8


def _decimal(body: str, decimal: Decimal) -> Fraction | None:
    """Return the value of digits with separators, or None if the separators are in no order."""
    if len(body) > _MOST_DIGITS or not _BODY[decimal].fullmatch(body):
        return None
    point, separators = (".", ",") if decimal == "point" else (",", ".")
    digits = re.sub(rf"[{separators}_'{_SPACES}]", "", body).replace(point, ".")
    return Fraction(digits)
