"""Tests of tools.generate: output, streaming, and refusals."""

import json
import os
import pty
import subprocess

import pytest

from megatron_ext.errors import UserError
from tests.distributed import ROOT, SINGLE_THREADED, torchrun
from tests.inference.checkpoint import MAX_LENGTH, run_dir  # noqa: F401
from tests.warm import warm_python
from tools import generate

PROMPTS = ["ba ké lo", "mü"]


def tool(*flags, **options):
    return subprocess.run(
        [warm_python(), "-m", "tools.generate", *map(str, flags)],
        cwd=ROOT,
        env={**os.environ, **SINGLE_THREADED},
        text=True,
        timeout=240,
        **options,
    )


def loading_message(run):
    """Return the line that names the checkpoint of the last step with its validation loss."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    loss = [row["val_loss"] for row in rows if row["step"] == 40 and "val_loss" in row][-1]
    folder = run / "checkpoints" / "iter_0000040"
    return f"model: {folder} (step 40, validation loss {loss:.4f})\n"


@pytest.fixture(scope="module")
def rows(run_dir):  # noqa: F811
    """Return the tool's JSON for two prompts with two samples each."""
    flags = ["--load", run_dir, "--json", "--logprobs", "--num-samples", 2, "--seed", 3]
    flags += ["--prompt", PROMPTS[0], "--max-new-tokens", 8, "--batch-size", 3]
    file = run_dir.parent / "prompts.txt"
    file.write_text(PROMPTS[1] + "\n")
    done = tool(*flags, "--prompt-file", file, capture_output=True)
    assert (done.returncode, done.stderr) == (0, loading_message(run_dir))
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_json_output_has_every_sample_and_nothing_else(rows):
    assert [(row["prompt"], row["seed"]) for row in rows] == [
        (prompt, seed) for prompt in PROMPTS for seed in (3, 4)
    ]
    for row in rows:
        assert list(row) == ["prompt", "seed", "text", "finish", "tokens", "log_probs"]
        assert 1 <= len(row["tokens"]) == len(row["log_probs"]) <= 8
        assert all(log_prob < 0 for log_prob in row["log_probs"])


def test_terminal_shows_the_streamed_text(run_dir, rows):  # noqa: F811
    ours, other = pty.openpty()
    flags = ["--load", run_dir, "--prompt", PROMPTS[0], "--seed", 3, "--max-new-tokens", 8]
    done = tool(*flags, stdout=other, stderr=subprocess.PIPE)
    os.close(other)
    observed = b""
    try:
        while piece := os.read(ours, 4096):
            observed += piece
    except OSError:  # Linux's report that the other side is closed
        pass
    os.close(ours)
    assert (done.returncode, done.stderr) == (0, loading_message(run_dir))
    assert observed.decode().replace("\r\n", "\n") == f"{PROMPTS[0]}{rows[0]['text']}\n"


def test_generate_on_two_ranks_prints_once(run_dir, rows):  # noqa: F811
    flags = ["--load", run_dir, "--json", "--prompt", PROMPTS[0], "--seed", "3"]
    flags += ["--max-new-tokens", "8", "--expert-model-parallel-size", "2"]
    done = torchrun(["-m", "tools.generate", *flags], nproc=2, python=warm_python())
    assert done.returncode == 0, done.stderr
    [row] = [json.loads(line) for line in done.stdout.splitlines()]
    assert row == {name: rows[0][name] for name in row}


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_prompt_file_lines_end_at_newlines_only(tmp_path, end):
    lines = ["a\u2028b", "c\x0bd\x0ce\x1cf\x85g", "h\u2029 i"]
    file = tmp_path / "prompts.txt"
    file.write_bytes("".join(line + end for line in lines).encode("utf-8-sig"))
    assert generate.read_prompts([], str(file)) == lines


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--prompt", "a"], "--load"),
        (["--load", "{run}"], "--prompt"),
        (["--load", "{run}", "--prompt", ""], "empty"),
        (["--load", "{run}", "--prompt-file", "{run}/none.txt"], "none.txt"),
        (["--load", "{run}", "--prompt", "a", "--temperature", "0"], "--temperature 0.0"),
        (["--load", "{run}", "--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens 0"),
        (["--load", "{run}", "--prompt", "a", "--num-samples", "0"], "--num-samples"),
        (["--load", "{run}", "--prompt", "a", "--batch-size", "0"], "--batch-size"),
        (["--load", "{run}", "--prompt", "a", "--dtype", "fp4"], "--dtype"),
        (["--load", "{run}/nowhere", "--prompt", "a"], "is not a folder"),
        (["--load", "{run}", "--prompt", "a", "--seed", str(2**64)], "does not fit in 64 bits"),
        (["--load", "{run}", "--prompt", "a", "--seed", str(-(2**63) - 1)], "does not fit in 64"),
        (["--load", "{run}/tensorboard", "--prompt", "a"], "has no checkpoint"),
    ],
)
def test_generate_refuses_wrong_flags_before_loading(run_dir, flags, message):  # noqa: F811
    with pytest.raises(UserError, match=message):
        generate.main([flag.format(run=run_dir) for flag in flags])


def test_generate_refusal_is_one_line_and_exit_code_2(run_dir):  # noqa: F811
    done = tool("--load", run_dir, "--prompt", "ba " * 100, capture_output=True)
    assert (done.returncode, done.stdout) == (2, "")
    message = done.stderr.removeprefix(loading_message(run_dir))
    assert message.startswith("generate: A prompt has ") and message.count("\n") == 1
    assert f"--max-position-embeddings {MAX_LENGTH}" in done.stderr
