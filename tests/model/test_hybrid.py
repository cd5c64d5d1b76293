"""The model against Megatron's deprecated `GPTModel` of the same layers, bit for bit."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import megatron
from tests.distributed import run_ranks
from tests.model.gpt_model import gpt_model, train_gpt_model
from tests.training.layouts import (
    CP2,
    EP2,
    FULL,
    INTERLEAVED,
    ONE_RANK,
    PP2,
    SHARDED,
    TP2,
    WHOLE_EXPERTS,
    Difference,
    Layout,
    difference,
    train,
)

EQUAL = Difference(0, 0, True)
LAYERS = ("--num-layers", "4", "--moe-layer-freq", "[0,1,1,1]")
TIED = [flag for flag in megatron.TINY if flag != "--untie-embeddings-and-output-weights"]


def build_both(flags: tuple[str, ...]) -> tuple[Any, list[Any], list[Any]]:
    """On a rank: the arguments, this project's pipeline stages, and those of `GPTModel`."""
    args, config, ours = megatron.start(*flags)
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_ext.model.language_model import language_model_config

    settings = language_model_config(args, config)
    with gpt_model():
        theirs = settings.get_builder_cls()(settings).build_distributed_models(
            ProcessGroupCollection.use_mpu_process_groups(), wrap_with_ddp=False
        )
    return args, ours, theirs


def saved_names(flags: tuple[str, ...], metadata: dict[str, Any]) -> None:
    """On a rank: both models save the same parts of the same tensors, and the same values."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    def saved(stage: Any) -> dict[Any, Any]:
        state = stage.sharded_state_dict(metadata=metadata)
        apply_factories(state)
        parts = {}
        for part in nested_values(state):
            place: tuple[Any, ...] = (
                part.key,
                part.global_shape,
                part.global_offset,
                part.replica_id,
            )
            if isinstance(part, ShardedTensor):
                place += (part.axis_fragmentations, part.dtype)
                assert part.data is not None
            assert place not in parts
            parts[place] = part.data
        return parts

    _, ours, theirs = build_both(flags)
    assert len(ours) == len(theirs)
    for stage, expected_stage in zip(ours, theirs):
        parts, expected = saved(stage), saved(expected_stage)
        assert parts.keys() == expected.keys()
        for place, value in parts.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, expected[place]), place


STACKED: dict[str, Any] = {"non_homogeneous_layers": False}


@pytest.mark.parametrize(
    "ranks, flags, metadata",
    [
        (1, LAYERS, {}),
        (1, ("--moe-layer-freq", "1"), STACKED),
        (1, ("--moe-layer-freq", "1"), {"singleton_local_shards": True}),
        (2, (*LAYERS, *PP2, *INTERLEAVED), {}),
        (2, (*PP2, "--num-layers", "2", "--moe-layer-freq", "1"), STACKED),
        (2, (*LAYERS, *PP2, "--decoder-first-pipeline-num-layers", "1"), {}),
        (2, (*LAYERS, *PP2, "--pipeline-model-parallel-layout", "Et|ttt|L|"), {}),
        (
            2,
            (
                *LAYERS,
                *PP2,
                "--account-for-embedding-in-pipeline-split",
                "--account-for-loss-in-pipeline-split",
            ),
            {},
        ),
        (2, (*LAYERS, *TP2, *EP2, *WHOLE_EXPERTS, "--et-norm-scale"), {}),
    ],
)
def test_checkpoints_have_the_tensors_of_gpt_model(
    ranks: int, flags: tuple[str, ...], metadata: dict[str, Any]
) -> None:
    run_ranks(saved_names, ranks, flags, metadata)


def losses_and_gradients(base: list[str], flags: tuple[str, ...]) -> None:
    """On a rank: both models compute the same losses, gradients and scores."""
    megatron.TINY = base
    _, [ours], [theirs] = build_both(flags)
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.utils import unwrap_model

    tokens = torch.randint(0, 127, (3, 32), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(32).expand(3, 32)
    skipped = tokens < 9

    def score(hidden_states: Any, output_layer: Any, output_weight: Any, **_: Any) -> Any:
        return output_layer(hidden_states, weight=output_weight)[0].sum(-1)

    results = []
    for model in (ours, theirs):
        model_parallel_cuda_manual_seed(7)
        loss = model(tokens, positions, None, labels=tokens.roll(-1, 1), padding_mask=skipped)
        loss.sum().backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        with torch.no_grad():
            scores = model(tokens, positions, None, output_processor=score)
            logits = model(tokens, positions, None)
        assert unwrap_model(model).post_process
        results.append([loss, scores, logits, *gradients])
    for value, expected in zip(*results, strict=True):
        assert torch.equal(value, expected)


DROPOUT = ("--hidden-dropout", "0.1", "--attention-dropout", "0.1")


@pytest.mark.parametrize(
    "base, flags",
    [
        (megatron.TINY, DROPOUT),
        (TIED, ("--et-norm-scale", "--bf16")),
        (megatron.TINY, ("--rotary-interleaved", "--rotary-percent", "0.5", *FULL,
                         "--recompute-num-layers", "1")),
        (megatron.TINY, ("--position-embedding-type",
                         "learned_absolute")),
    ],
)  # fmt: skip
def test_losses_and_gradients_are_those_of_gpt_model(
    base: list[str], flags: tuple[str, ...]
) -> None:
    run_ranks(losses_and_gradients, 1, base, flags)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        ONE_RANK["fp32"],
        Layout("all layers alike, distributed optimizer", 2, 2,
               (*EP2, *SHARDED, "--moe-layer-freq", "1")),
        Layout("TP 2, EP 2, dropout", 2, 1, (*TP2, *EP2, *WHOLE_EXPERTS, *SHARDED, *DROPOUT)),
        Layout("optimizer saved by its buckets", 2, 2,
               (*SHARDED, "--no-dist-ckpt-optim-fully-reshardable")),
        Layout("PP 2, interleaved", 2, 1, (*PP2, *INTERLEAVED)),
        Layout("PP 2, CP 2", 4, 1, (*PP2, *CP2)),
    ],
    ids=lambda layout: layout.name,
)  # fmt: skip
def test_run_of_gpt_model_resumes_as_it_would_have_continued(
    layout: Layout, tmp_path: Path
) -> None:
    rows = train_gpt_model(tmp_path, layout, "--save-interval", "10")
    assert difference(train(tmp_path / "new", layout), rows) == EQUAL
    load = ("--load", str(tmp_path / "checkpoints"), "--ckpt-step", "10")
    assert difference(train(tmp_path / "resumed", layout, *load), rows[10:]) == EQUAL


def warnings_of_megatron(flags: tuple[str, ...]) -> list[str]:
    """On a rank: what Megatron warns of while the model is built and used."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron").addHandler(handler)
    megatron.start(*flags)
    return messages


@pytest.mark.parametrize("ranks, flags", [(1, ()), (2, PP2)])
def test_no_part_of_the_model_is_deprecated(ranks: int, flags: tuple[str, ...]) -> None:
    for messages in run_ranks(warnings_of_megatron, ranks, flags):
        assert not [message for message in messages if "deprecat" in message.lower()]
