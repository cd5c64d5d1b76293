"""Tests of every family: converted to a checkpoint, run by Megatron, and converted back."""

import json
import shutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ext.errors import UserError
from tests.closeness import rounding
from tests.distributed import run_ranks
from tests.hf.models import CONFIGS, VOCAB, add_tokenizer, make

PROMPTS = [[3, 5, 7, 11], list(range(100, 120)), [42], [9, 8, 7, 6, 5, 4, 3]]
NEW = 10
TOKENS = torch.arange(60).reshape(2, 30) * 7919 % 450


def test_a_plain_family_is_one_entry(monkeypatch):
    """The entry of Mistral without a window maps its configuration and all of its tensors."""
    from transformers import MistralConfig, MistralForCausalLM

    from megatron_ext.hf import families, names

    mistral = families.Family(
        "mistral",
        {**families.PLAIN, "router": None, "qk_norm": False, "qkv_bias": False},
        {**families.COMMON, "head_dim": "head_dim", "intermediate_size": "ffn"},
        {**families.SILU, **families.WITHOUT_WINDOW},
        lambda model: names.DENSE,
    )
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, mistral))
    sizes: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 64, "head_dim": 16}
    config = MistralConfig(vocab_size=VOCAB, sliding_window=None, **sizes)
    with torch.device("meta"):
        state = MistralForCausalLM(config).state_dict()
    links = families.family_named("mistral").links(families.read_config(config))
    shapes = {name: shape for link in links for name, shape in link.parts}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in state.items()}
    with pytest.raises(UserError, match="sliding_window = 4096"):
        families.read_config(MistralConfig(vocab_size=VOCAB, **sizes))


def test_a_jitter_that_megatron_has_in_another_form_is_refused() -> None:
    """transformers jitters the input of the experts too, and only in training."""
    from transformers import MixtralConfig

    from megatron_ext.hf import families

    config = MixtralConfig(vocab_size=VOCAB, sliding_window=None)
    assert families.read_config(config).router == "token-choice"
    config.router_jitter_noise = 0.1
    with pytest.raises(UserError, match=r"router_jitter_noise = 0\.1\. Only mixtral models"):
        families.read_config(config)


def there_and_back(folder):
    """Convert both ways and run both models, on a rank whose global state may change."""
    from megatron_ext.hf.verify import hf_logits
    from megatron_ext.inference.forward import full_logits
    from megatron_ext.inference.generation import generate
    from megatron_ext.inference.loading import load_model
    from megatron_ext.inference.sampling import Sampling
    from tools import convert_checkpoint

    def convert(source, target, load, save):
        flags = ["--from", source, "--to", target, "--load", folder / load]
        convert_checkpoint.main([*map(str, flags), "--save", str(folder / save)])

    convert("hf", "megatron", "hf", "checkpoints")
    convert("megatron", "hf", "checkpoints", "back")
    trained = load_model(folder / "checkpoints")
    logits = full_logits(trained, TOKENS)
    assert logits is not None
    greedy = Sampling(max_new_tokens=NEW, greedy=True, stop_at_eod=False)
    stopping = Sampling(max_new_tokens=NEW, greedy=True)
    return SimpleNamespace(
        megatron=logits[..., :VOCAB],
        hf=hf_logits(folder / "hf", TOKENS),
        padded=logits.shape[-1],
        generated=[(c.tokens, c.log_probs) for c in generate(trained, PROMPTS, greedy)],
        stopped=generate(trained, PROMPTS, stopping),
    )


def generate_alone(model, prompt):
    """Return greedy tokens of transformers and their log-probabilities."""
    result = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = result.sequences[0, len(prompt) :].tolist()
    logits = torch.cat(result.logits)  # [NEW, vocabulary]
    return tokens, [float(row.log_softmax(-1)[t]) for row, t in zip(logits, tokens)]


def tensors(folder):
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_family_has_equal_logits_in_megatron_and_a_lossless_round_trip(name, tmp_path):
    model = make(name, tmp_path / "hf", eos_token_id=[VOCAB - 1, VOCAB - 2])
    [facts] = run_ranks(there_and_back, 1, tmp_path)
    assert facts.hf.std() > 0.5 and facts.padded == VOCAB
    torch.testing.assert_close(facts.megatron, facts.hf, atol=rounding(facts.hf), rtol=0)
    for prompt, (tokens, log_probs) in zip(PROMPTS, facts.generated):  # ours, in a batch
        other, their_log_probs = generate_alone(model, prompt)
        assert tokens == other
        assert log_probs == pytest.approx(their_log_probs, abs=rounding(facts.hf))
    before, after = tensors(tmp_path / "hf"), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key]) and tensor.dtype == after[key].dtype, key
    old, new = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("hf", "back"))
    ignored = {"initializer_range", "layer_types"}
    assert {k: v for k, v in new.items() if k not in ignored} == {
        k: v for k, v in old.items() if k not in ignored
    }
    settings = [(tmp_path / f / "generation_config.json").read_text() for f in ("hf", "back")]
    assert settings[0] == settings[1]


def test_rows_beyond_the_tokenizer_and_its_files_survive_a_round_trip(tmp_path):
    """Qwen's embeddings have more rows than its tokenizer has entries."""
    make("qwen3", tmp_path / "hf")
    add_tokenizer(tmp_path / "hf", vocab_size := 450)
    [facts] = run_ranks(there_and_back, 1, tmp_path)
    torch.testing.assert_close(facts.megatron, facts.hf, atol=rounding(facts.hf), rtol=0)
    sampled = [token for tokens, _ in facts.generated for token in tokens]
    assert sampled and max(sampled) < vocab_size
    before, after = tensors(tmp_path / "hf"), tensors(tmp_path / "back")
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file, copy = tmp_path / "hf" / name, tmp_path / "back" / name
        assert file.read_bytes() == copy.read_bytes()


def test_verify_is_relative_to_the_largest_logit(tmp_path):
    """A model with small logits and small differences is a different model, too."""
    make("llama", tmp_path / "hf")
    _scale(tmp_path / "hf", "lm_head.weight", 1e-5)
    changed = shutil.copytree(tmp_path / "hf", tmp_path / "changed")
    _scale(changed, "model.norm.weight", 1.01)
    [(share, message)] = run_ranks(verify_both, 1, tmp_path)
    assert share < 5e-5
    assert "differ by up to" in message and "where the largest logit is" in message


def _scale(folder, name, factor):
    for file in folder.glob("*.safetensors"):
        loaded = load_file(file)
        if name in loaded:
            save_file(loaded | {name: loaded[name] * factor}, file, {"format": "pt"})


def verify_both(folder):
    """Compare, on a rank, a conversion with its source folder and with a changed one."""
    from megatron_ext.hf.verify import largest_difference
    from tools import convert_checkpoint

    flags = ["--from", "hf", "--to", "megatron", "--load", str(folder / "hf")]
    convert_checkpoint.main([*flags, "--save", str(folder / "checkpoints")])
    share = largest_difference(folder / "checkpoints", folder / "hf")
    with pytest.raises(UserError) as refused:
        largest_difference(folder / "checkpoints", folder / "changed")
    return share, str(refused.value)


def test_all_end_tokens_of_the_generation_config_end_a_text(tmp_path):
    """End tokens of chat models end turns; the tokenizer names only the end of a document."""
    model = make("llama", tmp_path / "hf")
    add_tokenizer(tmp_path / "hf", VOCAB)
    tokens = [generate_alone(model, prompt)[0] for prompt in PROMPTS]
    ends = [1, tokens[0][4], tokens[1][2]]
    config = {"eos_token_id": ends, "temperature": 0.6, "do_sample": True}
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps(config))
    [facts] = run_ranks(there_and_back, 1, tmp_path)
    for full, stopped in zip(tokens, facts.stopped):
        places = [place for place, token in enumerate(full) if token in ends]
        assert stopped.tokens == (full[: places[0] + 1] if places else full)
        assert stopped.finish == ("eod" if places else "length")
        visible = stopped.tokens[:-1] if places else stopped.tokens
        assert stopped.text.split() == [f"w{token}" for token in visible]
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text()) == config
    assert json.loads((tmp_path / "back" / "config.json").read_text())["eos_token_id"] == ends
