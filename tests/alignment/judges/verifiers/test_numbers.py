"""Tests of numbers in text: every notation that is read, and those that are refused."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.judges.verifiers.numbers import find_numbers, read_number


def value(text, decimal="point"):
    number = read_number(text, decimal)
    return None if number is None else number.value


@pytest.mark.parametrize(
    "text, expected",
    [
        ("42", 42), ("-42", -42), ("\u221242", -42), ("+7", 7), ("42.", 42), ("0.50", "1/2"),
        (".5", "1/2"), ("007", 7), ("1,234,567.5", "2469135/2"), ("1{,}234", 1234),
        (r"1\,234", 1234), ("1\u202f234\u202f567", 1234567), ("1_000", 1000), ("12’345", 12345),
        ("3/4", "3/4"), ("-3/4", "-3/4"), ("1 3/4", "7/4"), ("-1 1/2", "-3/2"), ("1½", "3/2"),
        (r"\frac{3}{4}", "3/4"), (r"-\dfrac{1}{2}", "-1/2"), (r"\frac12", "1/2"),
        (r"2\frac{1}{3}", "7/3"), ("50%", "1/2"), (r"12.5\%", "1/8"), ("50 percent", "1/2"),
        ("$1,000", 1000), (r"\$5.25", "21/4"), ("€5", 5), ("x = 5", 5), ("42 cm", 42),
        ("42cm", 42), ("9.8 m/s", "49/5"), (r"42\text{ apples}", 42), (r"90^\circ", 90), ("5 m", 5),
        ("1e3", 1000), ("2.5E-2", "1/40"), ("3 × 10^8", 3 * 10**8), (r"3 \times 10^{-2}", "3/100"),
        ("10⁸", None), ("3 x 10⁸", 3 * 10**8), ("1e400", 10**400), ("٤٢", 42), ("４２", 42),
        ("४२", 42), (r"\left(5\right)", 5), (r"\(42\)", 42), (r"\[ x = 42 \]", 42),
        (r"\(5\) apples", 5),
    ],
)  # fmt: skip
def test_notations_that_are_read(text, expected):
    assert value(text) == (None if expected is None else Fraction(expected))


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "none", "nan", "inf", "-", "%", "1,5", "0,123", "1.2.3", "12,34,567", "1,2345",
        "1,234.567,8", "2+3", "2 + 3", "10-20", "3 to 5", "5x", "5 x", "x2", "2^10", "5²", "2_1",
        r"2\sqrt{3}", r"\sqrt{2}", r"5\pi", "5π", "5 pi", "5 million", "1/0", "1/2/3", "3:30",
        "0x1F", "1e9999", "1e99999999999", "3 × 10^99999", "±5", "2*3", "x/2", "²", "1e",
        r"\frac{x}{2}", "9" * 1001, "5 ≠ 6", "2**3", r"\(2\)\(3\)", r"\(2 + 3\)",
    ],
)  # fmt: skip
def test_text_without_exactly_one_number_is_none(text):
    assert read_number(text) is None


def test_decimal_comma_swaps_the_separators():
    assert value("1,5", "comma") == Fraction(3, 2)
    assert value("1.234,5", "comma") == Fraction(2469, 2)
    assert value("1.234", "comma") == 1234 and value("1.234") == Fraction(1234, 1000)
    assert value("1,234.5", "comma") is None


def test_numbers_of_a_text_are_in_order_and_unreadable_ones_are_none():
    assert [n and n.value for n in find_numbers("From 1,200 to 5x, and then 3.5 (or 1,5).")] == [
        1200, None, Fraction(7, 2), None,
    ]  # fmt: skip
    assert [n and n.value for n in find_numbers("7 * 6 = 42")][-1] == 42
    assert find_numbers("") == []


def test_reading_takes_time_linear_in_the_text():
    assert find_numbers("1," * 200_000)[-1] is None
    assert len(find_numbers("12 " * 100_000)) == 100_000


@settings(max_examples=50)
@given(
    st.fractions(max_denominator=10**6).map(lambda f: f.limit_denominator(1000)),
    st.sampled_from(["{n}/{d}", r"\frac{{{n}}}{{{d}}}", r"\boxed is {n}/{d} cm"]),
)
def test_fractions_are_read_back(fraction, form):
    text = form.format(n=fraction.numerator, d=fraction.denominator).removeprefix(r"\boxed is ")
    assert value(text) == fraction


@settings(max_examples=50)
@given(
    st.decimals(
        allow_nan=False, allow_infinity=False, places=4, min_value=-(10**9), max_value=10**9
    )
)
def test_decimals_are_read_back_with_and_without_groups(decimal):
    assert value(f"{decimal:f}") == value(f"{decimal:,f}") == Fraction(decimal)


@settings(max_examples=50)
@given(st.text(max_size=60))
def test_any_text_is_read_without_an_error(text):
    find_numbers(text)
    read_number(text)
