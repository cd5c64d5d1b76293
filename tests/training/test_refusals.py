"""Tests that each mistake of a user ends in one sentence that names the fix, and exit code 2."""

import contextlib
import io
import json
import runpy
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from tests.distributed import ROOT, run_ranks, torchrun
from tests.megatron import TINY
from tests.pretraining import start, train
from tests.warm import warm_python

TOKEN_CHOICE = ["--router-type", "token-choice", "--moe-router-pre-softmax"]
REAL_DATA = [flag for flag in TINY if flag != "--mock-data"]


def refusal(flags: list[str]) -> str:
    """Return the one error message of a run with these flags."""
    [(code, stderr)] = run_ranks(start, 1, flags)
    messages = [line for line in stderr.splitlines() if line.startswith("pretrain_et.py:")]
    lines = [line for line in messages if not line.startswith("pretrain_et.py: warning:")]
    assert code == 2, stderr[-2000:]
    assert len(lines) == 1, stderr[-2000:]
    assert "Traceback" not in stderr
    return lines[0]


def changed(dataset: Path, folder: Path) -> Path:
    for suffix in ("bin", "idx"):
        shutil.copy(f"{dataset}.{suffix}", folder)
    return folder / dataset.name


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--num-experts", "6", "--expert-model-parallel-size", "4"], "--num-experts 6 is not"),
        (["--moe-router-topk", "5"], "--moe-router-topk 5 must be above 0 and at most"),
        (["--et-mean-experts", "4.5"], "--et-mean-experts 4.5 must be above 0 and at most"),
        (["--et-mean-experts", "0"], "--et-mean-experts 0 must be above 0"),
        (["--et-mean-experts", "0.01"], "less than one of the 64 in a micro-batch"),
        (["--et-capacity", "1"], "--et-capacity 1.0 must be in [0, 1)"),
        (["--et-capacity", "-0.1"], "--et-capacity -0.1 must be in [0, 1)"),
        (["--et-ema-decay", "1"], "--et-ema-decay 1.0 must be in [0, 1)"),
        (["--et-warmup-iters", "-1"], "--et-warmup-iters -1 must not be negative"),
        (["--et-logit-buffer-mb", "-1"], "--et-logit-buffer-mb -1.0 must not be negative"),
        (
            ["--et-cutoff-pool", "step", "--et-logit-buffer-mb", "0.003"],
            "--et-logit-buffer-mb 0.003 has room for only 77% of them. Raise it, or use",
        ),
        (["--router-type", "expert"], "--router-type"),
        (["--moe-token-dispatcher-type", "flex"], "Use alltoall or allgather"),
        (["--moe-expert-capacity-factor", "1"], "--et-capacity limits"),
        (["--moe-router-enable-expert-bias"], "thresholds balance the load"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--recipe", "no_such_recipe.yaml"], "no_such_recipe.yaml: No such file"),
        (["--tensor-model-parallel-size", "3", "--sequence-parallel"], "1 rank cannot"),
        (["--global-batch-size", "7"], "--global-batch-size 7 is not divisible by"),
        (["--cuda-graph-impl", "local"], "Add --cuda-graph-modules attn"),
        (["--min-lr", "1"], "--min-lr 1 must not be above --lr 0.01"),
        (["--moe-aux-loss-coeff", "0.01"], "without an auxiliary loss"),
        (["--ckpt-format", "torch"], "use torch_dist"),
        (["--run-dir", "/dev/null/run"], "--run-dir /dev/null/run cannot be written"),
        (["--moe-layer-freq", "0"], "--moe-layer-freq 0 must be at least 1"),
        (["--kv-channels", "15"], "--kv-channels 15 is odd"),
        (["--main-params-dtype", "fp16"], "needs --use-precision-aware-optimizer"),
        (["--transformer-impl", "inference_optimized"], "Use local for training."),
        (["--reuse-grad-buf-for-mxfp8-param-ag"], "keeping params in MXFP8"),
        (["--fp16", "--et-warmup-iters", "0"], "Lower --initial-loss-scale, or use --bf16"),
        (["--skip-train"], "Train for at least one step"),
    ],
)
def test_pretrain_refuses_wrong_flags_in_one_sentence(flags: list[str], message: str) -> None:
    assert message in refusal([*TINY, *flags])


@pytest.mark.skipif(
    find_spec("nvidia_resiliency_ext") is not None, reason="nvidia-resiliency-ext is installed"
)
def test_async_strategy_without_its_package() -> None:
    flags = ["--async-save", "--async-strategy", "nvrx"]
    assert "needs the package nvidia-resiliency-ext" in refusal([*TINY, *flags])


def test_pretrain_refuses_experts_with_biases() -> None:
    biased = [flag for flag in TINY if flag != "--disable-bias-linear"]
    assert "Add --disable-bias-linear" in refusal(biased)
    shared = biased.index("--moe-shared-expert-intermediate-size")
    del biased[shared : shared + 2]
    assert "--num-experts is incompatible with biases" in refusal(biased)


def test_pretrain_refuses_wrong_recipes_in_one_sentence(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    for text, message in (
        ("no_such_key: 1\n", "no_such_key is not a flag"),
        ("lr: [1\n", "is not YAML"),
        ("- 1\n", "must be a mapping"),
        ("squared_relu: 7\n", "must be true or false"),
        ("base: recipe.yaml\n", "has itself as a base"),
    ):
        recipe.write_text(text)
        assert message in refusal([*TINY, "--recipe", str(recipe)])


def test_pretrain_refuses_missing_empty_truncated_and_short_data(
    dataset: Path, tmp_path: Path
) -> None:
    assert "No data. Give --data-path" in refusal(REAL_DATA)
    missing = tmp_path / "missing"
    assert f"{missing}.idx does not exist" in refusal([*REAL_DATA, "--data-path", str(missing)])

    prefix = changed(dataset, tmp_path)
    whole = Path(f"{prefix}.bin").read_bytes()
    Path(f"{prefix}.bin").write_bytes(whole[:-10])
    assert "is truncated" in refusal([*REAL_DATA, "--data-path", str(prefix)])
    Path(f"{prefix}.bin").write_bytes(b"")
    assert ".bin is empty" in refusal([*REAL_DATA, "--data-path", str(prefix)])
    Path(f"{prefix}.bin").write_bytes(whole)
    index = Path(f"{prefix}.idx").read_bytes()
    for damaged in (index[:20], index[:-30], b"nonsense" * 20):
        Path(f"{prefix}.idx").write_bytes(damaged)
        assert ".idx is damaged" in refusal([*REAL_DATA, "--data-path", str(prefix)])
    Path(f"{prefix}.idx").write_bytes(index)
    longer = ["--seq-length", "4096", "--max-position-embeddings", "4096"]
    message = refusal([*REAL_DATA, *longer, "--data-path", str(prefix)])
    assert "has 2,400 tokens, fewer than" in message


def test_pretrain_refuses_a_tokenizer_that_does_not_match_the_data(
    dataset: Path, tmp_path: Path
) -> None:
    small = ["--vocab-size", "90", "--make-vocab-size-divisible-by", "1"]
    message = refusal([*REAL_DATA, *small, "--data-path", str(dataset)])
    assert "contains token id 98, outside the vocabulary of" in message

    prefix = changed(dataset, tmp_path)
    tokenizers = []
    for seed in (1, 2):
        text = tmp_path / f"{seed}.txt"
        letters = np.random.default_rng(seed).choice(list("abcdefgh    "), 20000)
        text.write_text("\n".join("".join(row) for row in letters.reshape(-1, 40)))
        tokenizers.append(tmp_path / f"{seed}.model")
        from tools import train_tokenizer

        sys_argv, sys.argv = sys.argv, ["train_tokenizer"]
        try:
            train_tokenizer.main(
                ["--input", str(text), "--vocab-size", "300", "--output", str(tokenizers[-1])]
            )
        finally:
            sys.argv = sys_argv
    import hashlib

    sha256 = hashlib.sha256(tokenizers[0].read_bytes()).hexdigest()
    (tmp_path / "text.json").write_text(json.dumps({"tokenizer": {"sha256": sha256}}))
    sentencepiece = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model"]
    flags = [*REAL_DATA, "--data-path", str(prefix), *sentencepiece]
    assert "made with another tokenizer" in refusal([*flags, str(tokenizers[1])])
    assert "--tokenizer-model" in refusal([*flags, str(tmp_path / "no.model")])

    run = [*flags, str(tokenizers[0]), "--run-dir", str(tmp_path / "run"), "--exit-interval", "1"]
    train(run, ranks=1)
    (tmp_path / "text.json").unlink()  # without it only the checkpoint names the tokenizer
    run[run.index(str(tokenizers[0]))] = str(tokenizers[1])
    assert "was trained with another tokenizer" in refusal(run)


def test_pretrain_refuses_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    run = [*TINY, "--run-dir", str(tmp_path)]
    train([*run, "--exit-interval", "2"], ranks=1)
    override = ["--override-opt-param-scheduler"]
    for flags, message in (
        (TOKEN_CHOICE, "cannot continue as token-choice"),
        (["--hidden-size", "64"], "hidden_size = 32, but the flags say 64"),
        (["--num-experts", "8"], "num_experts = 4, but the flags say 8"),
        (["--vocab-size", "120"], "vocab_size = 127, but the flags say 120"),
        (["--et-mean-experts", "0.5"], "1 experts per token on average, but the flags say 0.5"),
        (["--et-ema-decay", "0.9"], "et_ema_decay = 0.5, but the flags say 0.9"),
        (["--norm-epsilon", "0.1", *override], "layernorm_epsilon (--norm-epsilon) = 1e-05, but"),
        (["--adam-beta2", "0.9"], "adam_beta2 = 0.999, but the flags say 0.9"),
        (["--et-capacity", "none"], "et_capacity = 0.5, but the flags say None. Make them equal"),
    ):
        assert message in refusal([*run, *flags])
    other_flags, checkpoints = (
        [*TINY, "--run-dir", str(tmp_path / "other")],
        str(tmp_path / "checkpoints"),
    )
    flags = [*other_flags, "--pretrained-checkpoint", checkpoints, "--norm-epsilon", "0.1"]
    assert "layernorm_epsilon" in refusal(flags)
    flags = [*other_flags, "--finetune", "--load", checkpoints, "--rotary-percent", "0.5"]
    assert "rotary_percent = 1.0, but the flags say 0.5" in refusal(flags)
    assert "Use a folder of checkpoints" in refusal(
        [*other_flags, "--pretrained-checkpoint", str(tmp_path)]
    )
    newest = next((tmp_path / "checkpoints").glob("iter_*"))
    (newest / ".metadata").unlink()
    assert "is damaged: its file .metadata is missing" in refusal(run)


def test_refusal_under_torchrun_is_printed_by_one_rank() -> None:
    result = torchrun(["pretrain_et.py", *TINY, "--et-capacity", "2"], 2, python=warm_python())
    messages = [line for line in result.stderr.splitlines() if line.startswith("pretrain_et.py:")]
    assert len(messages) == 1
    assert "--et-capacity 2.0" in messages[0]
    assert result.returncode != 0
    *_, cause, _ = result.stderr.splitlines()  # torchrun's report ends with a rule
    assert cause.split(": ", 1) == ["  traceback ", messages[0]]


def _help() -> tuple[str, set[str]]:
    """Return the output of --help, and the names of this project's options."""
    from dataclasses import fields

    from megatron.core.transformer import TransformerConfig

    from megatron_ext.config import ETConfig

    sys.argv = [str(ROOT / "pretrain_et.py"), "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as stdout, contextlib.suppress(SystemExit):
        runpy.run_path(sys.argv[0], run_name="__main__")
    ours = {f.name for f in fields(ETConfig)} - {f.name for f in fields(TransformerConfig)}
    return stdout.getvalue(), ours


def test_help_lists_every_option() -> None:
    [(text, ours)] = run_ranks(_help, 1)
    assert {"router_type", "et_capacity"} <= ours
    for name in ours:
        flag = name.replace("_", "-")
        assert f"--{flag}" in text or f"--no-{flag}" in text
    assert "--recipe" in text
    assert "--tensor-model-parallel-size" in text
