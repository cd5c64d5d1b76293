"""Tests of the DeepSpeed engine: masks of packed rows, checkpoints, and no optimizer."""

import pytest
import torch

from alignment.engines.batch import TokenBatch, TokenSample
from tests.alignment.engines.engine_runs import (
    OPTIMIZATION,
    TOLERANCE,
    brute_force,
    error_message_of,
    generate,
    saved,
    scores,
    train,
)
from tests.alignment.engines.test_engines import HYBRID, make_expert_threshold
from tests.closeness import rounding
from tests.distributed import run_ranks
from tests.hf.models import make


def save_with_a_slow_rank(folder, place):
    """Return the tracker of the newest checkpoint before the last rank's write and at the end."""
    import time

    import torch.distributed as dist

    from alignment.engines.deepspeed import DeepSpeedEngine

    engine = DeepSpeedEngine(folder, OPTIMIZATION)
    engine.save(place)
    write, observed = engine._engine._save_zero_checkpoint, []

    def write_late(*args):
        if dist.get_rank() == 1:
            time.sleep(1)
            observed.append((place / "latest").read_text())
        write(*args)

    engine._engine._save_zero_checkpoint = write_late
    engine.step = 1
    engine.save(place)
    return observed, (place / "latest").read_text()


@pytest.mark.slow
def test_deepspeed_marks_a_checkpoint_newest_after_all_ranks_have_written(tmp_path):
    make("llama", tmp_path / "model", vocab_size=128, num_hidden_layers=1)
    ranks = run_ranks(save_with_a_slow_rank, 2, tmp_path / "model", tmp_path / "checkpoints")
    assert ranks == [([], "step_1"), (["step_0"], "step_1")]


def make_with_windows(folder):
    """Write models with attention windows in all layers, in some, and with chunks."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    size = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    torch.manual_seed(0)
    for name, changes in {
        "mistral": {"sliding_window": 8},
        "gemma2": {"sliding_window": 8},
        "gpt_oss": {"sliding_window": 8, **experts},
        "llama4_text": {"attention_chunk_size": 8, "intermediate_size_mlp": 64, **experts},
    }.items():
        config = CONFIG_MAPPING[name](**(size | changes))
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)


def packed_and_alone(folder):
    """Return log-probabilities of each model for samples in one row and in separate rows."""
    from alignment.engines.deepspeed import DeepSpeedEngine

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 128, (2, 24), generator=generator).tolist()
    rows = [TokenSample(sample) for sample in tokens]
    result = {}
    for place in sorted(folder.iterdir()):
        engine = DeepSpeedEngine(place)
        packed = engine.log_probs(TokenBatch.packed(rows, 52)).log_probs[0, :48]
        result[place.name] = packed, engine.log_probs(TokenBatch.of(rows)).log_probs.flatten()
    return result


@pytest.mark.slow
def test_packed_samples_have_separate_attention_windows(tmp_path):
    make_with_windows(tmp_path)
    [result] = run_ranks(packed_and_alone, 1, tmp_path)
    assert len(result) == 4
    for name, (packed, alone) in result.items():
        assert packed.tolist() == pytest.approx(alone.tolist(), abs=rounding(alone, 1e-5)), name


HYBRID_ROWS = [list(range(1, 100, 9)), list(range(5, 126, 8))]


def hybrid_alone_and_packed(folder):
    """Return scores of padded rows of one sample, and the messages for rows of several samples."""
    from alignment.engines.deepspeed import DeepSpeedEngine

    engine = DeepSpeedEngine(folder)
    rows = [TokenSample(row) for row in HYBRID_ROWS]
    alone = engine.log_probs(TokenBatch.of(rows)).log_probs
    return alone, [
        error_message_of(lambda: engine.log_probs(TokenBatch.packed(rows, 32))),
        error_message_of(lambda: DeepSpeedEngine(folder, OPTIMIZATION)),
    ]


@pytest.mark.slow
def test_deepspeed_scores_a_hybrid_model_but_refuses_several_samples_per_row(tmp_path):
    from megatron_ext.hf.remote.modeling_et import ExpertThresholdForCausalLM

    make_expert_threshold(tmp_path, **HYBRID)
    [(alone, messages)] = run_ranks(hybrid_alone_and_packed, 1, tmp_path)
    model = ExpertThresholdForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for row, values in zip(HYBRID_ROWS, alone):
        tokens = torch.tensor([row])
        with torch.no_grad():
            table = model(tokens).logits[0, :-1].log_softmax(-1)
        expected = table.gather(1, tokens[0, 1:, None]).squeeze(1)
        assert values[1 : len(row)].tolist() == pytest.approx(expected.tolist(), abs=TOLERANCE)
    assert messages == 2 * [
        "Several samples per row of a model with linear attention (layer_types in config.json) are "
        "not supported by the DeepSpeed engine, which would mix them. Use the Megatron engine."
    ]


def save_on_ranks(folder, place):
    from alignment.engines.deepspeed import DeepSpeedEngine

    DeepSpeedEngine(folder, OPTIMIZATION).save(place)


def error_on_loading(folder, place, stage=2):
    from alignment.engines.deepspeed import DeepSpeedEngine, ZeroSettings

    engine = DeepSpeedEngine(folder, OPTIMIZATION, ZeroSettings(stage))
    return error_message_of(lambda: engine.load(place))


@pytest.mark.slow
def test_deepspeed_load_errors_are_raised_on_all_ranks(tmp_path):
    make("llama", tmp_path / "model", vocab_size=128, num_hidden_layers=1)
    model, place = tmp_path / "model", tmp_path / "checkpoints"
    run_ranks(save_on_ranks, 2, model, place)
    [message] = run_ranks(error_on_loading, 1, model, place)
    assert message == (
        f"The checkpoint in {place} cannot be loaded: DeepSpeed resumes with as many ranks as "
        "saved it. Start 2 ranks, not 1."
    )
    first, second = run_ranks(error_on_loading, 2, model, place, 3)
    assert first == second and first.startswith(f"The checkpoint in {place} cannot be loaded (")
    assert "saved with ZeRO stage 3 if it is loaded with stage 3" in first
    assert run_ranks(error_on_loading, 2, model, place) == [None, None]
    # The second rank's alone: the first would wait for it.
    [torn] = place.glob("step_0/*pp_rank_1_*_optim_states.pt")
    whole = torn.read_bytes()
    changed = whole[: len(whole) // 2] + b"damaged" + whole[len(whole) // 2 + 7 :]
    for damaged in (whole[:-1000], changed):
        torn.write_bytes(damaged)
        message = f"The checkpoint in {place} is incomplete or damaged: {torn.name}."
        assert run_ranks(error_on_loading, 2, model, place) == [message, message]


def untrained(folder, stage, dtype):
    """Return the messages of an engine without an optimizer, and its number of fp32 elements."""
    import gc

    from alignment.engines.deepspeed import DeepSpeedEngine, ZeroSettings

    engine = DeepSpeedEngine(folder, None, ZeroSettings(stage, micro_batch=2), dtype=dtype)
    with pytest.raises(ValueError, match="created without an optimization"):
        train(engine, [0])
    before = scores(engine)
    engine.load_parameters(saved(folder).items())
    assert scores(engine) == before and generate(engine)
    assert dict(engine.parameters()).keys() == saved(folder).keys()
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    return before, sum(tensor.numel() for tensor in tensors if tensor.dtype == torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeed_engine_without_optimization_has_no_optimizer(tmp_path, stage):
    model = make("llama", tmp_path, vocab_size=128, num_hidden_layers=2)
    reference = brute_force(tmp_path).scores
    for result, _ in run_ranks(untrained, 2, tmp_path, stage, torch.float32):
        for tokens, (log_probs, entropies) in result.items():
            assert log_probs == pytest.approx(reference[tokens][0], abs=TOLERANCE)
            assert entropies == pytest.approx(reference[tokens][1], abs=TOLERANCE)
    for _, memory in run_ranks(untrained, 2, tmp_path, stage, torch.bfloat16):
        assert memory < model.num_parameters() / 100
