"""Tests of recurrent layers in a model: samples of a row, and sizes that are refused."""

import pytest
import torch

from megatron_ext.errors import UserError
from tests import megatron
from tests.distributed import run_ranks
from tests.megatron import DELTA_NET, MAMBA

LINEAR = ("--experimental-attention-variant", "gated_delta_net", *DELTA_NET)
HYBRID = ("--hybrid-layer-pattern", "G-GE", *DELTA_NET, "--init-method-std", "0.3")


def packed_and_alone(*flags: str) -> None:
    """On a rank: samples of a row have the logits and the gradients that they have alone."""
    _, _, [model] = megatron.start(*flags)
    for _ in range(2):
        model.decoder.layers[-1].mlp.router.thresholds.update(torch.tensor([0.5, 0.0, -0.5, 1.0]))
    model.eval()  # thresholds treat each token alone
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 127, (2, 32), generator=random)
    samples = torch.tensor([[0] * 5 + [1] * 20 + [-1] * 7, [0] * 31 + [1]])
    parts = [(0, slice(0, 5)), (0, slice(5, 25)), (1, slice(0, 31)), (1, slice(31, 32))]
    weights = torch.randn(2, 32, 128, generator=random)

    def run(ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        logits = model(ids, torch.arange(ids.shape[1]).expand(ids.shape), mask)
        return logits[..., :127]

    results = []
    for packed in (True, False):
        model.zero_grad()
        whole = run(tokens, samples) if packed else None
        logits = [
            whole[row, place] if whole is not None else run(tokens[row : row + 1, place], None)[0]
            for row, place in parts
        ]
        loss = torch.zeros(()) + sum(
            (part * weights[row, place, :127]).sum() for part, (row, place) in zip(logits, parts)
        )
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([*(part.detach() for part in logits), *gradients])
    for ours, expected in zip(*results, strict=True):
        # Gradients are sums over all tokens, whose rounding errors follow the largest elements.
        largest = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(ours, expected, atol=1e-5 * largest, rtol=1e-4)
    with torch.no_grad():  # the mask matters
        assert (run(tokens, None)[0, 5:25] - results[0][1]).abs().max() > 1e-3


@pytest.mark.parametrize("pattern", ["G-GE", "M-ME", "M-GE"])
def test_samples_of_a_row_do_not_mix(pattern: str) -> None:
    run_ranks(packed_and_alone, 1, *HYBRID, *MAMBA, "--hybrid-layer-pattern", pattern)


def refusals(base: tuple[str, ...], cases: list[tuple[str, ...]]) -> list[str]:
    """Return, on a rank, the sentences that refuse flags next to those of a model."""
    from megatron_ext.devices import activate

    activate()
    from megatron.training.global_vars import unset_global_variables

    from megatron_ext.arguments import parse_args

    messages = []
    for flags in cases:
        unset_global_variables()
        try:
            words = [*megatron.TINY, *(() if "gated_delta_net" in flags else base), *flags]
            parse_args(words, writes=False, world_size=4)
        except UserError as error:
            messages.append(str(error))
        else:
            messages.append("")
    return messages


TP2 = ("--tensor-model-parallel-size", "2")
REFUSED = {
    ("--linear-num-key-heads", "0"): "--linear-num-key-heads 0 must be at least 1",
    ("--linear-num-value-heads", "6"): "--linear-num-value-heads 6 is not divisible by "
    "--linear-num-key-heads 4. Choose a multiple of 4.",
    (*TP2, "--sequence-parallel", "--linear-num-key-heads", "1"): "--linear-num-key-heads 1 is not "
    "divisible by --tensor-model-parallel-size 2",
    (*TP2, "--sequence-parallel", "--context-parallel-size", "2", "--linear-num-key-heads", "2"):
    "--tensor-model-parallel-size 2 times --context-parallel-size 2: the ranks share",
    ("--linear-attention-freq", "[1,0]"): "in other layers than --linear-attention-freq [1, 0]",
    ("--recompute-granularity", "selective", "--recompute-modules", "gdn_norm_out"):
    "--recompute-modules gdn_norm_out needs the package transformer-engine",
    LINEAR: "gated_delta_net requires --linear-attention-freq. Add it",
    (*LINEAR, "--linear-attention-freq", "0"): "freq 0 must be at least 1. Use n",
    (*LINEAR, "--linear-attention-freq", "[1]"): "is a list of 1, but --num-layers is 2. Use one",
    ("--reset-attention-mask",): "--reset-attention-mask is not supported",
}  # fmt: skip


@pytest.mark.slow
def test_sizes_and_layouts_that_do_not_fit_are_refused() -> None:
    [messages] = run_ranks(refusals, 1, HYBRID, list(REFUSED))
    for message, expected in zip(messages, REFUSED.values(), strict=True):
        assert expected in message
