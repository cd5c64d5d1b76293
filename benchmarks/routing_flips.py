"""Compare the routing of generation with that of training, for a small model and several routers.

A model with random weights answers prompts. The same responses then go through it as generation
takes them (a prompt, then one token at a time, with a cache) and as a training step does (rows
packed with several responses, micro-batches, padding), with the same weights:

    expert threshold    as alignment trains it: thresholds alone
    with capacity       expert threshold as in pre-training: an expert's share of a batch is bounded
    expert choice       an expert takes the top k of the batch; generation goes by thresholds
    token choice        a token's top k experts

Thresholds are those at which each expert takes its share of the responses, so that routers differ
in their selection and not in the number of experts.

    usage         experts per token in generation, over the intended number
    flips         share of all decisions (token, layer, expert) that differ
    of selected   share of the decisions in which either pass selected the expert
    tokens        share of tokens with a decision that differs
    log-prob gap  mean over response tokens of the absolute difference, nats; and the largest

    python benchmarks/routing_flips.py [--dtypes fp32 bf16] [--hidden-size 64] [--layers 4]
        [--experts 16] [--responses 32] [--new-tokens 48] [--seq-length 256]
"""

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, os.fspath(Path(__file__).resolve().parent.parent))

import torch

from tests.distributed import run_ranks

VOCAB = 512
ROUTERS = {
    "expert threshold": ("expert-threshold", True),
    "with capacity": ("expert-threshold", False),
    "expert choice": ("expert-choice", False),
    "token choice": ("token-choice", True),
}


def make_model(folder: Path, options: argparse.Namespace) -> None:
    """Save a model with random weights, large enough that tokens differ."""
    from megatron_ext.hf.remote.configuration_et import ExpertThresholdConfig
    from megatron_ext.hf.remote.modeling_et import ExpertThresholdForCausalLM, Router

    torch.manual_seed(0)
    config = ExpertThresholdConfig(
        vocab_size=VOCAB,
        hidden_size=options.hidden_size,
        intermediate_size=2 * options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden_size // 16,
        num_key_value_heads=options.hidden_size // 16,
        max_position_embeddings=options.seq_length,
        moe_layers=[1] * options.layers,
        num_experts=options.experts,
        num_experts_per_tok=options.topk,
        moe_intermediate_size=options.hidden_size,
        shared_expert_intermediate_size=options.hidden_size,
    )
    model = ExpertThresholdForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.15)
    for router in (m for m in model.modules() if isinstance(m, Router)):
        router.threshold_updates.fill_(1)
    model.save_pretrained(folder)


def answers(engine: Any, options: argparse.Namespace) -> list[Any]:
    """Return responses of the model with its present weights."""
    from alignment.engines.batch import TokenSample
    from megatron_ext.inference.sampling import Sampling

    draw = torch.Generator().manual_seed(1)
    prompts = [
        torch.randint(VOCAB, (4 + n % 13,), generator=draw).tolist()
        for n in range(options.responses)
    ]
    responses = engine.generate(prompts, Sampling(options.new_tokens, stop_at_eod=False))
    return [TokenSample([*p, *g.tokens], len(p)) for p, g in zip(prompts, responses)]


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare the routers on a rank, and return the rows of the table."""
    from alignment.engines.megatron import MegatronEngine, MegatronLayout
    from megatron_ext.inference.calibration import calibrate
    from megatron_ext.moe.router import routers_of
    from megatron_ext.moe.threshold_router import threshold_routers

    rows = []
    layout = MegatronLayout(micro_batch=options.micro_batch_size)
    with (
        tempfile.TemporaryDirectory(prefix="routing-") as place,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        make_model(Path(place), options)
        for dtype in options.dtypes:
            for name, (kind, frozen) in ROUTERS.items():
                engine: Any = MegatronEngine(
                    place,
                    layout=layout,
                    dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype],
                    flags=["--router-type", kind, "--et-capacity", "0.5"],
                    same_model=False,
                )
                routers = routers_of(engine._model)
                for router in routers:
                    router.freeze(frozen)
                # The second time, calibrate on the text that the model with these thresholds
                # generates.
                for _ in range(2 if threshold_routers(routers) else 0):
                    responses = [torch.tensor(s.tokens) for s in answers(engine, options)]
                    length = min(map(len, responses))
                    text = torch.stack([tokens[-length:] for tokens in responses])
                    calibrate(engine._sampling()._model, text)
                samples = answers(engine, options)
                decoded = engine._sampling().decode(samples, 1.0)
                chosen = torch.stack(list(decoded.maps.values())).sum(dim=-1).double()
                figures = engine.routing_gap(samples, options.seq_length)
                figures = {n.removeprefix("routing/"): v for n, v in figures.items()}
                usage = float(chosen.mean()) / options.topk
                rows.append({"router": name, "dtype": dtype, "usage": usage, **figures})
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    heads = ["usage", "decisions", "flips", "of selected", "tokens", "log-prob gap", "largest"]
    print(f"{'router':<18}{'dtype':<6}" + "".join(head.rjust(14) for head in heads))
    for row in rows:
        cells = [f"{row['usage']:.3f}", f"{row['decisions']:,}"]
        cells += [f"{row[n]:.3%}" for n in ("flip_rate", "flip_rate_selected", "tokens_flipped")]
        cells += [f"{row[n]:.2g}" for n in ("log_prob_gap", "log_prob_gap_max")]
        print(f"{row['router']:<18}{row['dtype']:<6}" + "".join(cell.rjust(14) for cell in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=["fp32", "bf16"],
        default=["fp32", "bf16"],
        help="Data types of the weights to compare. Default: fp32 bf16.",
    )
    parser.add_argument(
        "--hidden-size", type=int, default=64, help="Hidden size of the model. Default: 64."
    )
    parser.add_argument(
        "--layers", type=int, default=4, help="Number of layers of the model. Default: 4."
    )
    parser.add_argument(
        "--experts", type=int, default=16, help="Number of experts per layer. Default: 16."
    )
    parser.add_argument(
        "--topk", type=int, default=2, help="Mean number of experts per token. Default: 2."
    )
    parser.add_argument(
        "--responses", type=int, default=32, help="Number of responses to compare. Default: 32."
    )
    parser.add_argument(
        "--new-tokens", type=int, default=48, help="Length of a response in tokens. Default: 48."
    )
    parser.add_argument(
        "--seq-length",
        type=int,
        default=256,
        help="Length of a training row, in tokens. Default: 256.",
    )
    parser.add_argument(
        "--micro-batch-size", type=int, default=2, help="Rows of a micro-batch. Default: 2."
    )
    [rows] = run_ranks(compare, 1, parser.parse_args(), timeout=600)
    print_table(rows)
    print()
    for row in rows:
        print(json.dumps({"benchmark": "routing_flips", **row}))


if __name__ == "__main__":
    main()
