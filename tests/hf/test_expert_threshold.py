"""Tests of a trained Expert Threshold model as a Hugging Face folder: logits, tokens, tensors."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from megatron_ext.hf.torch_dist import TorchDistReader
from tests.closeness import rounding
from tests.distributed import run_ranks
from tests.inference.checkpoint import MODEL, run_dir  # noqa: F401
from tests.pretraining import train

TEXTS = torch.tensor([list(range(10, 40)), list(range(400, 430))])
PROMPTS = [[10, 11, 12], [200, 201, 202, 203, 204, 205, 206], [77], [40, 300, 20, 31, 32]]
NEW = 12
VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
WORDS = ["ba ké lo", " mü  ni\n", "</s>x", "日本 ba", ""]


def convert(source, target, load, save, *flags):
    from tools import convert_checkpoint

    command = ["--from", source, "--to", target, "--load", str(load), "--save", str(save)]
    convert_checkpoint.main([*command, *flags])


def there_and_back(run, folder):
    from megatron_ext.inference.forward import full_logits
    from megatron_ext.inference.generation import generate
    from megatron_ext.inference.loading import load_model
    from megatron_ext.inference.sampling import Sampling

    convert("megatron", "hf", run, folder / "hf", "--verify")
    convert("hf", "megatron", folder / "hf", folder / "back", "--verify")
    greedy = Sampling(max_new_tokens=NEW, greedy=True, stop_at_eod=False)
    trained = load_model(run)
    ours, again = full_logits(trained, TEXTS), full_logits(load_model(folder / "back"), TEXTS)
    assert ours is not None and again is not None
    generated = generate(trained, PROMPTS, greedy)
    return SimpleNamespace(
        logits=ours[..., : trained.vocab_size],
        tokens=[c.tokens for c in generated],
        log_probs=[c.log_probs for c in generated],
        ids=[trained.tokenizer.tokenize(text) for text in WORDS],
        eod=trained.tokenizer.eod,
        back=again[..., : trained.vocab_size],
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("converted")


@pytest.fixture(scope="module")
def megatron(run_dir, folder):  # noqa: F811
    [facts] = run_ranks(there_and_back, 1, run_dir, folder, timeout=240)
    return facts


@pytest.fixture(scope="module")
def model(megatron, folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder / "hf", trust_remote_code=True, dtype=torch.float32
    ).eval()


def test_hf_model_logits_equal_those_of_megatron(megatron, model):
    with torch.no_grad():
        logits = model(TEXTS).logits
    assert logits.std() > 1
    torch.testing.assert_close(logits, megatron.logits, atol=rounding(megatron.logits), rtol=0)


def test_hf_model_greedy_tokens_with_cache_equal_those_of_megatron(megatron, model):
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 3}
    width = max(map(len, PROMPTS))
    # Rows of unequal length are padded on the left, where a mask hides them.
    batch = torch.tensor([[3] * (width - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    together = model.generate(
        batch, attention_mask=mask, position_ids=positions, eos_token_id=-1, **options
    )
    assert together[:, width:].tolist() == megatron.tokens
    for prompt, tokens in zip(PROMPTS, megatron.tokens):
        for use_cache in (True, False):
            ids = torch.tensor([prompt])
            alone = model.generate(ids, use_cache=use_cache, eos_token_id=-1, **options)
            assert alone[0, len(prompt) :].tolist() == tokens


def test_hf_model_log_probs_of_generated_tokens_equal_those_of_megatron(megatron, model):
    for prompt, tokens, log_probs in zip(PROMPTS, megatron.tokens, megatron.log_probs):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        other = logits.log_softmax(-1).gather(1, torch.tensor(tokens).unsqueeze(1))
        assert other[:, 0].tolist() == pytest.approx(log_probs, abs=rounding(logits))


def test_hf_model_thresholds_stay_fp32_with_another_dtype(model, folder):
    from transformers import AutoModelForCausalLM

    low = AutoModelForCausalLM.from_pretrained(
        folder / "hf", trust_remote_code=True, dtype=torch.bfloat16
    )
    expected = model.state_dict()
    for key, value in low.state_dict().items():
        if "threshold" in key:
            assert value.dtype in (torch.float32, torch.int64)
            assert torch.equal(value, expected[key]) and value.count_nonzero()
        else:
            assert value.dtype == torch.bfloat16, key
    assert torch.equal(
        low.float().model.layers[1].mlp.gate.thresholds,
        expected["model.layers.1.mlp.gate.thresholds"],
    )


def test_exported_tokenizer_equals_that_of_the_run(megatron, folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "hf", trust_remote_code=True)
    for text, ids in zip(WORDS, megatron.ids):
        if "</s>" not in text:  # transformers reads special tokens in a text as such
            assert tokenizer(text).input_ids == ids
            assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == megatron.eod and len(tokenizer) == 500
    ids = [*megatron.ids[0], tokenizer.eos_token_id, *megatron.ids[1]]
    assert tokenizer.decode(ids) == f"{WORDS[0]}</s>{WORDS[1]}"
    assert tokenizer.decode(ids, skip_special_tokens=True) != tokenizer.decode(ids)


def test_expert_threshold_round_trip_is_bit_exact(megatron, run_dir, folder):  # noqa: F811
    old = TorchDistReader(run_dir / "checkpoints" / "iter_0000040")
    new = TorchDistReader(folder / "back" / "release")
    assert old.shapes.keys() == new.shapes.keys() and old.dtypes == new.dtypes
    for name in old.shapes:
        tensor = old.read(name)
        if name in VOCABULARY:
            tensor = tensor[:500]  # without Megatron's padding
        assert torch.equal(tensor, new.read(name)), name
    assert torch.equal(megatron.back, megatron.logits)


def test_exported_embedding_has_no_padding(megatron, folder):
    [file] = (folder / "hf").glob("*.safetensors")
    tensors = load_file(file)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert tensors[name].shape == (500, 64)


@pytest.mark.slow
def test_training_resumes_from_a_converted_checkpoint(megatron, folder, run_dir, tmp_path):  # noqa: F811
    train(
        [
            *("--load", folder / "back", "--run-dir", tmp_path),
            *("--mock-data", "--split", "90,5,5", "--tokenizer-type", "SentencePieceTokenizer"),
            *("--tokenizer-model", run_dir.parent / "tokenizer.model"),
            *MODEL,
            *("--micro-batch-size", "4", "--global-batch-size", "8", "--train-iters", "3"),
            *("--lr", "1e-4", "--lr-decay-style", "constant"),
            *("--et-warmup-iters", "0", "--et-ema-decay", "0.9"),
            *("--eval-iters", "1", "--eval-interval", "100", "--log-interval", "1"),
        ]
    )
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 3 and losses[0] < 1  # the loss of a new model is ln 500 = 6.2
