"""Arguments that no command can use end in one sentence."""

import os

import pytest

from megatron_ext.errors import ToolParser, UserError


def test_argument_of_another_encoding_is_named_with_its_flag() -> None:
    parser = ToolParser(prog="tool")
    parser.add_argument("--prompt")
    word = os.fsdecode(b"a\xff")
    with pytest.raises(UserError, match=r"^--prompt a\\xff is not UTF-8"):
        parser.parse_args(["--prompt", word])
    with pytest.raises(UserError, match=r"^--prompt=a\\xff is not UTF-8"):
        parser.parse_args([f"--prompt={word}"])
    assert parser.parse_args(["--prompt", "a\u00ff\U0001f600"]).prompt == "a\u00ff\U0001f600"


def test_converter_that_raises_anything_ends_in_one_sentence() -> None:
    parser = ToolParser(prog="tool")
    parser.add_argument("--pattern", type=eval)
    with pytest.raises(UserError, match=r"--pattern: invalid value: '\[0,'"):
        parser.parse_args(["--pattern", "[0,"])
