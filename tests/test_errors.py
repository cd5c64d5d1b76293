"""Tests that unusable arguments of any command end in one sentence."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext.errors import ToolParser, UserError
from tests.distributed import ROOT

# Tools whose flags are parsed before torch is imported.
TOOLS = """
    calibrate_thresholds convert_checkpoint eval_core generate inspect_routing ngram_baseline
    preflight preprocess_data report serve train_tokenizer upcycle validation_loss
"""


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
    with pytest.raises(UserError, match=r"^--pattern \[0, is not valid\.$"):
        parser.parse_args(["--pattern", "[0,"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lod", "x"], "--lod is not a flag of tools.name. Did you mean --load?"),
        (["--loa=x"], "--loa is not a flag of tools.name. Did you mean --load?"),  # no abbreviation
        (["--zzz"], "--zzz is not a flag of tools.name. See python -m tools.name --help."),
        (["--steps", "3"], "tools.name requires --load. See python -m tools.name --help."),
        (["--load"], "--load requires one value. See python -m tools.name --help."),
        (["--dtype", "bf61"], "--dtype bf61 is not one of fp32, bf16. Did you mean bf16?"),
        (["--dtype", "xy"], "--dtype xy is not one of fp32, bf16."),
        (["--steps", "3.5"], "--steps 3.5 is not a whole number."),
        (["--load", "x", "y"], "Unrecognized arguments: y. See python -m tools.name --help."),
    ],
)  # fmt: skip
def test_wrong_flag_or_value_is_answered_with_the_nearest(words: list[str], message: str) -> None:
    parser = ToolParser(prog="python -m tools.name")
    parser.add_argument("--load", required=True)
    parser.add_argument("--dtype", choices=("fp32", "bf16"))
    parser.add_argument("--steps", type=int)
    with pytest.raises(UserError) as error:
        parser.parse_args(words)
    assert str(error.value) == message


def test_words_after_two_hyphens_are_not_flags() -> None:
    parser = ToolParser(prog="tool")
    parser.add_argument("words", nargs="*")
    assert parser.parse_args(["--", "--lod"]).words == ["--lod"]


def test_tool_refuses_a_wrong_flag_before_torch_is_imported() -> None:
    program = f"""
import importlib, sys
for tool in {TOOLS.split()}:
    try:
        importlib.import_module(f"tools.{{tool}}").main(["--loadd", "x"])
    except ValueError as error:
        assert "--loadd is not a flag of" in str(error), error
    else:
        raise AssertionError(tool)
    assert not {{"torch", "megatron"}} & {{*sys.modules}}, tool
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


@pytest.mark.parametrize("words", [["--list"], ["--help"], []])
@pytest.mark.parametrize("run", ["run_tool", "run_on_ranks"])
def test_reader_that_ends_early_ends_the_command_without_a_trace(
    run: str, words: list[str]
) -> None:
    """`--list` prints more than a pipe holds, the others less than Python buffers."""
    program = f"""
import sys
from pathlib import Path
from megatron_ext.errors import ToolParser, {run}

def main():
    parser = ToolParser(prog="tool")
    parser.add_argument("--list", action="store_true")
    for _ in range(100_000 if parser.parse_args().list else 1):
        print("x" * 99)

sys.stdin.read()
{run}(main)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program, *words],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # argparse ignores the error where Python does not buffer.
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
    )  # fmt: skip
    assert process.stdout is not None and process.stdin is not None and process.stderr is not None
    process.stdout.close()  # the program writes only after this
    process.stdin.close()
    message = process.stderr.read()
    assert (process.wait(60), message) == (141, "")


@pytest.mark.parametrize(
    "error, cause",
    [
        ("UserError('--lr is missing')", "-c: --lr is missing"),
        ("KeyError('lr')", "KeyError: 'lr' (stack trace above)"),
    ],
)
def test_torchrun_receives_the_cause_of_a_failure(error: str, cause: str, tmp_path: Path) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    program = f"""
from megatron_ext.errors import UserError, run_on_ranks

def main():
    raise {error}

run_on_ranks(main)
"""
    file = tmp_path / "error.json"
    environment = {**os.environ, "TORCHELASTIC_ERROR_FILE": str(file)}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment)
    failure = ProcessFailure(0, 1, done.returncode, str(file))
    assert done.returncode != 0 and failure.message["extraInfo"]["py_callstack"] == cause  # type: ignore[index]


def test_broken_pipe_of_another_file_is_not_hidden() -> None:
    program = """
import os
from megatron_ext.errors import run_tool

def main():
    reading, writing = os.pipe()
    os.close(reading)
    os.write(writing, b"x")

run_tool(main)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and "BrokenPipeError" in done.stderr
