"""Tests of a real quantized model in a GGUF file, converted to transformers and to Megatron."""

import itertools
import json
import subprocess
from types import SimpleNamespace
from typing import Any

import pytest
import regex
import torch

from megatron_ext.errors import UserError
from megatron_ext.hf.gguf import GGUFModel
from megatron_ext.hf.gguf_source import open_gguf
from tests.closeness import rounding
from tests.distributed import run_ranks
from tests.hf.smollm import QUESTION, gguf_file

TEXTS = [
    "In 1984, 12345 pipes cost $67.89 -- don't they?\n\n\tThey'll see.",
    "  Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich,   日本語 ½ Ⅷ ٣٤.",
    "def f(x):\n    return x**2  # of 10_000\n",
]
TOKENS = torch.arange(40).unsqueeze(0) * 7919 % 49152


def convert(source, target, load, save, *more):
    from tools import convert_checkpoint

    flags = ["--from", source, "--to", target, "--load", str(load), "--save", str(save)]
    convert_checkpoint.main([*flags, *more])


def there_and_back(folder, file):
    """Convert, on a rank, GGUF to Hugging Face, to Megatron and back; return Megatron's results."""
    from transformers import AutoTokenizer

    from megatron_ext.inference.forward import full_logits
    from megatron_ext.inference.loading import load_model

    convert("gguf", "hf", file, folder / "hf")
    convert("gguf", "megatron", file, folder / "megatron")
    convert("megatron", "hf", folder / "megatron", folder / "back")
    trained = load_model(folder / "megatron")
    logits = full_logits(trained, TOKENS)
    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    turns = [{"role": "user", "content": QUESTION}]
    return SimpleNamespace(
        logits=logits,
        prompt=tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True),
        eod=trained.tokenizer.eod,
        ids=[trained.tokenizer.tokenize(text) for text in TEXTS],
        text=[trained.tokenizer.detokenize(trained.tokenizer.tokenize(text)) for text in TEXTS],
    )


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("smollm")


@pytest.fixture(scope="session")
def reader():
    from gguf import GGUFReader

    return GGUFReader(gguf_file())  # which takes seconds


@pytest.fixture(scope="session")
def megatron(folder):
    [facts] = run_ranks(there_and_back, 1, folder, gguf_file(), timeout=200)
    return facts


@pytest.fixture(scope="session")
def model(megatron, folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32).eval()


def test_gguf_round_trip_through_megatron_is_identical(megatron, folder):
    done = subprocess.run(
        ["diff", "-r", folder / "hf", folder / "back"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "")
    config = json.loads((folder / "hf" / "config.json").read_text())
    assert (config["model_type"], config["eos_token_id"]) == ("llama", 2)


def test_gguf_tensors_equal_an_independent_dequantization(model, reader):
    """The reference is transformers' dequantization, permuted as by llama.cpp's converter."""
    from transformers.integrations.gguf.dequant import dequantize

    ours = model.state_dict()
    for tensor in reader.tensors:
        name, shape = hf_name(tensor.name), [int(size) for size in reversed(tensor.shape)]
        raw = torch.from_numpy(tensor.data.copy())
        fp32 = raw.dtype == torch.float32
        stored = raw if fp32 else dequantize(raw.flatten(), int(tensor.tensor_type))
        expected = ours.pop(name)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = {"q": 9, "k": 3}[name.split(".")[-2][0]]
            halves = expected.view(heads, 2, shape[0] // heads // 2, shape[1])
            expected = halves.swapaxes(1, 2).reshape(shape)
        assert torch.equal(stored.view(shape), expected), name
    assert list(ours) == ["lm_head.weight"]  # tied


def hf_name(name):
    ends = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
    }
    parts = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"},
        "attn_output": "self_attn.o_proj",
        **{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
    }
    if name in ends:
        return ends[name]
    _, layer, part, _ = name.split(".")
    return f"model.layers.{layer}.{parts[part]}.weight"


def test_megatron_logits_of_gguf_model_equal_those_of_transformers(megatron, model):
    with torch.no_grad():
        logits = model(TOKENS).logits
    assert logits.std() > 1
    torch.testing.assert_close(megatron.logits, logits, atol=rounding(logits), rtol=0)


def test_gguf_model_answers_a_question_and_stops(megatron, model, folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    prompt = tokenizer(megatron.prompt, return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0]
    answer = ids[prompt.input_ids.shape[1] :].tolist()
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == megatron.eod == tokenizer.eos_token_id == 2
    [(tokens, text)] = run_ranks(generate, 1, folder / "megatron", megatron.prompt)
    assert tokens == answer and "Paris" in text


def generate(checkpoint, prompt):
    """Return, on a rank, the tokens and the text that tools.generate prints."""
    import contextlib
    import io

    from tools import generate

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        flags = ["--load", str(checkpoint), "--prompt", prompt, "--max-new-tokens", "16"]
        generate.main([*flags, "--greedy", "--json"])
    row = json.loads(out.getvalue())
    return row["tokens"], row["text"]


def test_gguf_tokenizer_merges_by_rank_within_words_and_single_digits(megatron, reader):
    """The reference is byte pair encoding with llama.cpp's rules for splitting a text."""
    fields = reader.fields
    tokens = {t: i for i, t in enumerate(fields["tokenizer.ggml.tokens"].contents())}
    merges = fields["tokenizer.ggml.merges"].contents()
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
    for text, ids, again in zip(TEXTS, megatron.ids, megatron.text):
        assert again == text
        assert ids == [tokens[piece] for word in words(text) for piece in merged(word, ranks)]


def words(text):
    gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    for part in regex.split(r"(\p{N})", text):
        yield from regex.findall(gpt2, part)


def merged(word, ranks):
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    pieces = [letters[byte] for byte in word.encode()]
    while len(pieces) > 1:
        pairs = list(itertools.pairwise(pieces))
        best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        at = pairs.index(best)
        pieces[at : at + 2] = ["".join(best)]
    return pieces


def write_gguf(file, architecture="llama", **extra):
    """Write a file with one tensor and some metadata."""
    import numpy as np
    from gguf import GGUFWriter

    writer = GGUFWriter(file, architecture)
    writer.add_block_count(1)
    writer.add_embedding_length(8)
    writer.add_head_count(2)
    writer.add_feed_forward_length(8)
    writer.add_context_length(8)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in extra.items():
        getattr(writer, key)(value)
    writer.add_tensor("token_embd.weight", np.zeros((16, 8), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_file_that_is_broken_or_unsupported_is_refused_and_nothing_is_written(tmp_path):
    pytest.importorskip("gguf")
    cases: dict[str, dict[str, Any]] = {
        "holds a model of architecture gemma3": {"architecture": "gemma3"},
        "has 8 experts": {"add_expert_count": 8},
        "rotates 2 of 4 channels": {"add_rope_dimension_count": 2},
        "has no tensor model.layers.0.input_layernorm.weight": {},
    }
    for number, extra in enumerate(cases.values()):
        write_gguf(tmp_path / f"{number}.gguf", **extra)
    (tmp_path / "other.gguf").write_bytes(b"not of this kind" * 20)
    half = (tmp_path / "0.gguf").read_bytes()[:-300]
    (tmp_path / "half.gguf").write_bytes(half)
    files = {f"{number}.gguf": text for number, text in enumerate(cases)}
    files |= dict.fromkeys(("other.gguf", "half.gguf"), "is not a GGUF file or is incomplete")
    files["none.gguf"] = "is not a file"
    files["new.gguf"] = "uses a quantization that the installed package gguf does not know"
    whole, name = (tmp_path / "0.gguf").read_bytes(), b"token_embd.weight"
    kind = whole.index(name) + len(name) + 4 + 2 * 8  # after the sizes of two dimensions
    code = (250).to_bytes(4, "little")
    (tmp_path / "new.gguf").write_bytes(whole[:kind] + code + whole[kind + 4 :])
    [messages] = run_ranks(refusals, 1, tmp_path, list(files))
    for expected, message in zip(files.values(), messages):
        assert expected in message
    assert not (tmp_path / "saved").exists() or not list((tmp_path / "saved").iterdir())


def refusals(folder, names):
    messages = []
    for name in names:
        with pytest.raises(UserError) as refused:
            convert("gguf", "hf", folder / name, folder / "saved" / "hf")
        messages.append(str(refused.value))
    return messages


def test_gguf_quantization_that_cannot_be_dequantized_is_named(tmp_path, monkeypatch):
    import gguf

    write_gguf(tmp_path / "small.gguf")
    with pytest.raises(UserError, match="no tensor"):
        open_gguf(tmp_path / "small.gguf")
    model = GGUFModel(tmp_path / "small.gguf")
    [name] = model.shapes
    stored = SimpleNamespace(data=b"", tensor_type=gguf.GGMLQuantizationType.Q8_K)
    monkeypatch.setitem(model._sources, name, stored)
    with pytest.raises(UserError, match="in the quantization Q8_K, which the package gguf cannot"):
        model.read(name)


def test_gguf_with_verify_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"not with a GGUF file\. Convert the file --to hf"):
        convert("gguf", "megatron", tmp_path, tmp_path / "save", "--verify")


class _WithTurns(GGUFModel):
    """Model of the file with metadata entries that other chat models have."""

    def get(self, key, default=None):
        ends = {"tokenizer.ggml.eot_token_id": 1, "tokenizer.ggml.eom_token_id": 2}
        return ends[key] if key in ends else super().get(key, default)


def test_gguf_end_tokens_include_those_of_turns_and_messages(tmp_path):
    from megatron_ext.hf.gguf_tokenizer import save_tokenizer

    plain, with_turns = (
        save_tokenizer(kind(gguf_file()), tmp_path) for kind in (GGUFModel, _WithTurns)
    )
    end = plain["eos_token_id"]
    assert isinstance(end, int)
    assert with_turns["eos_token_id"] == list(dict.fromkeys([end, 1, 2]))


SYNTHETIC = ["<s>", "</s>", "a", "b", "c", "d", "ab", "cd", "abcd"]


def ids_of_synthetic(folder, pre, **extra):
    """Return the ids of "abcd" with a vocabulary whose merges end before that word."""
    from gguf import TokenType
    from transformers import AutoTokenizer

    from megatron_ext.hf.gguf_tokenizer import save_tokenizer

    control = [TokenType.CONTROL] * 2
    metadata = {
        "add_tokenizer_model": "gpt2",
        "add_tokenizer_pre": pre,
        "add_token_list": SYNTHETIC,
        "add_token_types": control + [TokenType.NORMAL] * (len(SYNTHETIC) - len(control)),
        "add_token_merges": ["a b", "c d"],
        "add_bos_token_id": 0,
        "add_eos_token_id": 1,
    }
    folder.mkdir()
    write_gguf(folder / "model.gguf", **metadata | extra)
    save_tokenizer(GGUFModel(folder / "model.gguf"), folder)
    return AutoTokenizer.from_pretrained(folder)("abcd").input_ids


@pytest.mark.parametrize("pre", ["llama-bpe", "llama3", "falcon3", "pixtral", "lfm2", "tekken"])
def test_gguf_of_llama_3_and_tekken_takes_whole_words_after_bos(pre, tmp_path):
    """The rules are those of llama.cpp, which depend on tokenizer.ggml.pre."""
    word = [SYNTHETIC.index("abcd")]
    assert ids_of_synthetic(tmp_path / "default", pre) == [0, *word]
    for number, add in enumerate((True, False)):
        ids = ids_of_synthetic(tmp_path / str(number), pre, add_add_bos_token=add)
        assert ids == [0] * add + word


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "qwen2", "gpt-4o", "dbrx", "smaug-bpe"])
def test_gguf_of_other_kinds_merges_and_adds_bos_if_the_file_says_so(pre, tmp_path):
    pieces = [SYNTHETIC.index("ab"), SYNTHETIC.index("cd")]
    assert ids_of_synthetic(tmp_path / "default", pre) == pieces
    for number, add in enumerate((True, False)):
        ids = ids_of_synthetic(tmp_path / str(number), pre, add_add_bos_token=add)
        assert ids == [0] * add + pieces
