"""Tests of the depths of multi-token prediction against their definition in plain torch."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests import megatron
from tests.distributed import run_ranks

SCALE, DEPTHS, CAP = 0.3, 2, 15.0


def _normalized(x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=1e-5)


def _shifted(ids: torch.Tensor, places: int) -> torch.Tensor:
    """Return ids `[batch, sequence]` moved to the left, with zeros at the end."""
    return F.pad(ids[:, places:], (0, places))


def _losses_and_gradients() -> dict[str, Any]:
    flags = ("--mtp-num-layers", str(DEPTHS), "--mtp-loss-scaling-factor", str(SCALE))
    args, config, [model] = megatron.start(*flags)
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    torch.manual_seed(0)
    length = args.seq_length
    text = torch.randint(0, 127, (3, length + 1))
    tokens, labels = text[:, :-1], text[:, 1:]
    positions = torch.arange(length).expand(3, -1)
    inputs: dict[int, torch.Tensor] = {}
    outputs: dict[int, torch.Tensor] = {}

    def keep(depth: int) -> Any:
        def hook(_: Any, __: Any, given: dict[str, Any], result: Any) -> None:
            inputs[depth], outputs[depth] = given["hidden_states"], result[0]

        return hook

    hidden: list[torch.Tensor] = []
    model.decoder.register_forward_hook(lambda _, __, output: hidden.append(output))
    for depth, layer in enumerate(model.mtp.layers, 1):
        layer.mtp_model_layer.register_forward_hook(keep(depth), with_kwargs=True)
    losses = model(tokens, positions, None, labels=labels, loss_mask=torch.ones(3, length))

    result: dict[str, Any] = {"inputs": [], "losses": [], "expected_losses": []}
    result["losses"] = MTPLossLoggingHelper.tracker["loss_values"].tolist()
    previous, total = hidden[0], torch.zeros(())
    table = model.embedding.word_embeddings.weight
    for depth, layer in enumerate(model.mtp.layers, 1):
        embedded = _normalized(table[_shifted(tokens, depth)]).transpose(0, 1)
        both = torch.cat((_normalized(embedded), _normalized(previous)), dim=-1)
        projected = both @ layer.eh_proj.weight.T
        result["inputs"].append((projected - inputs[depth]).abs().max().item())
        previous = _normalized(outputs[depth])
        logits = CAP * torch.tanh(previous @ model.output_layer.weight.T / CAP)
        logits = logits[: length - depth, :, :127].flatten(0, 1)
        targets = labels[:, depth:].T.flatten()  # the last `depth` positions have no target
        loss = F.cross_entropy(logits, targets)
        result["expected_losses"].append(loss.item())
        tokens_in_sum = 3 * length if config.calculate_per_token_loss else 1
        total = total + SCALE / DEPTHS * loss * tokens_in_sum
    weights = [layer.eh_proj.weight for layer in model.mtp.layers]
    expected = torch.autograd.grad(total, weights, retain_graph=True)
    given = torch.autograd.grad(losses.sum(), weights)
    result["gradients"] = [
        (float((a - b).abs().max()), float(b.abs().max())) for a, b in zip(given, expected)
    ]
    numbers = [
        layer.mtp_model_layer.layers[1].mlp.router.layer_number for layer in model.mtp.layers
    ]
    result["numbers"] = numbers
    return result


def test_depths_equal_their_definition() -> None:
    [result] = run_ranks(_losses_and_gradients, 1, timeout=200)
    assert max(result["inputs"]) < 1e-5
    assert result["losses"] == pytest.approx(result["expected_losses"], abs=1e-5)
    for error, size in result["gradients"]:
        assert error < 1e-5 * size and size > 0
    assert result["numbers"] == [3, 4]  # after the decoder's two layers
