"""Tests of text, stop strings and parts of tokens of a row, against decoding all tokens."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.distributed import run_ranks

KINDS = ["sentencepiece", "byte-level", "byte-fallback"]
WORDS = ["foo", "bar", " ", "\n", "→", "x→", "é", "👍", "漢字", "caf", "Q", "\ufffd", "naïve", "ab"]
STOPS = ["→", "x→", "fo", "oo", "ab", "b", " ", "👍", "\ufffd", "字f", "a→", "o b", "é👍", "\n\n"]
SPECIAL = ["<s>", "</s>", "<|end|>"]
BYTES = [0x41, 0x80, 0x86, 0x92, 0xA9, 0xC3, 0xE2, 0xEF, 0xF0, 0x9F, 0xFF]


def build(kind, folder):
    """Return a tokenizer of Megatron with byte pieces or byte-level BPE, and ids of some bytes."""
    from megatron.core.tokenizers import MegatronTokenizer
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    text = ["foo bar caf naive ab Q ab foo bar", "foo x bar ab caf"] * 20
    if kind == "sentencepiece":
        import sentencepiece

        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text), model_prefix=str(folder / "sp"), vocab_size=290,
            byte_fallback=True, character_coverage=1.0, hard_vocab_limit=False, minloglevel=2,
            normalization_rule_name="identity", remove_extra_whitespaces=False,
        )  # fmt: skip
        path, library = folder / "sp.model", "sentencepiece"
    else:
        path, library = folder / "hf", "huggingface"
        if kind == "byte-level":
            made = Tokenizer(models.BPE())
            made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            made.decoder = decoders.ByteLevel()
            alphabet = pre_tokenizers.ByteLevel.alphabet()
            trainer = trainers.BpeTrainer(
                vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet
            )
            made.train_from_iterator([*text, "x→ é👍 x→ é👍"], trainer)
        else:
            pieces = [*SPECIAL, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
            pieces += [*"abcfonrQx"]
            vocab = {piece: number for number, piece in enumerate(pieces)}
            model = models.BPE(vocab, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
            made = Tokenizer(model)
            made.normalizer = normalizers.Sequence(
                [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            )
            steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
            made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
        PreTrainedTokenizerFast(
            tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="</s>",
            additional_special_tokens=["<|end|>"],
        ).save_pretrained(path)  # fmt: skip
    tokenizer = MegatronTokenizer.from_pretrained(
        tokenizer_path=str(path), metadata_path={"library": library}
    )
    inner = tokenizer._tokenizer.tokenizer
    if kind == "byte-level":
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        ids = [inner.convert_tokens_to_ids(bytes_to_unicode()[byte]) for byte in BYTES]
    else:
        id_of = inner.piece_to_id if kind == "sentencepiece" else inner.convert_tokens_to_ids
        ids = [id_of(f"<0x{byte:02X}>") for byte in BYTES]
    return tokenizer, dict(zip(BYTES, ids))


class Oracle:
    """Reference that decodes whole sequences and uses no code under test."""

    def __init__(self, kind, tokenizer, of_byte):
        self._inner = tokenizer._tokenizer.tokenizer
        self._kind = kind
        a = of_byte[0x41]
        if kind != "byte-level":
            a = self.encode("Q")[-1]
        more = [[of_byte[byte]] * n for byte in (0x80, 0x92) for n in (1, 2, 3)]
        self._continuations = [[], [a], [of_byte[0xFF]], *more]

    def encode(self, text):
        if self._kind == "sentencepiece":
            return self._inner.encode(text)
        return self._inner.encode(text, add_special_tokens=False)

    def decode(self, ids):
        if self._kind == "sentencepiece":
            return self._inner.decode(ids)
        return self._inner.decode(ids, skip_special_tokens=True)

    def certain(self, ids):
        """Return what a text shares with all of its continuations."""
        texts = [self.decode([*ids, *more]) for more in self._continuations]
        size = min(map(len, texts))
        while any(text[:size] != texts[0][:size] for text in texts):
            size -= 1
        return texts[0][:size]

    def text(self, prompt, ids, stops, min_tokens):
        """Return the number of tokens that are used, and the text."""
        start = len(self.certain(prompt))
        exempt = start
        for count in range(1, len(ids) + 1):
            so_far = [*prompt, *ids[:count]]
            text = self.decode(so_far) if count == len(ids) else self.certain(so_far)
            if count <= min_tokens:
                exempt = len(text)
            # Every place of a stop string, one character after the other.
            result = [
                place
                for place in range(start, len(text))
                for stop in stops
                if text.startswith(stop, place) and place + len(stop) > exempt
            ]
            if result:
                return count, text[start : min(result)], "stop"
        return len(ids), text[start:], "length"


def draw(choose, oracle, of_byte, special):
    """Draw token ids of words, single bytes and special tokens."""
    ids = []
    for _ in range(choose.randint(1, 8)):
        kind = choose.random()
        if kind < 0.65:
            ids += oracle.encode("".join(choose.choices(WORDS, k=2)))
        elif kind < 0.9:
            ids += [of_byte[byte] for byte in choose.choices(BYTES, k=choose.randint(1, 3))]
        else:
            ids.append(special)
    return ids


def differences(kind, folder):
    """Return, on a rank, the differences of a row from the reference, and the number of stops."""
    from megatron_ext.inference.row import GenerationRow, TokenScore
    from megatron_ext.inference.sampling import Sampling

    tokenizer, of_byte = build(kind, folder)
    oracle, choose = Oracle(kind, tokenizer, of_byte), random.Random(1)
    trained: Any = SimpleNamespace(
        tokenizer=tokenizer, max_length=10_000, vocab_size=tokenizer.vocab_size
    )
    special = oracle._inner.bos_id() if kind == "sentencepiece" else 2
    wrong, finishes, broken = [], [], 0
    for number in range(200):
        prompt, ids = (draw(choose, oracle, of_byte, special) for _ in range(2))
        if kind == "byte-fallback":  # whether a run of bytes is whole depends on both sides
            prompt = oracle.encode("foo Q")
        stops = choose.sample(STOPS, choose.randint(0, 3))
        if kind == "byte-fallback":  # a broken run is certain when it ends, not before
            stops = [stop for stop in stops if stop != "\ufffd"]
        least = choose.choice([0, 0, 3])
        sampling = Sampling(
            len(ids), greedy=True, stop=tuple(stops), stop_at_eod=False,
            min_tokens=min(least, len(ids)),
        )  # fmt: skip
        echo = number % 2 == 1
        row, pieces, parts = GenerationRow(trained, prompt, sampling, 0, scores_prompt=echo), [], []
        if echo:
            row.prompt_scores = [TokenScore(token, -1.0) for token in prompt[1:]]
        for token in ids:
            pieces.append(row.add(TokenScore(token, -1.0)))
            parts += row.released
            if row.completion.finish:
                break
        completion = row.completion
        actual = (len(pieces), completion.text, completion.finish)
        expected = oracle.text(prompt, ids, stops, sampling.min_tokens)
        texts = [entry.part.text for entry in parts]
        data = b"".join(entry.part.data for entry in parts)
        whole = oracle.certain(prompt) * echo + completion.text
        tokens = prompt * echo + completion.tokens
        if (
            actual != expected
            or "".join(pieces) != whole
            or "".join(texts) != whole
            or data != whole.encode()
            or [entry.part.token for entry in parts] != tokens
            or [entry.score.token for entry in parts if entry.score] != tokens[echo:]
        ):
            wrong.append((prompt, ids, stops, least, expected, actual, pieces, texts, data))
        finishes.append(completion.finish)
        broken += "\ufffd" in completion.text
    return wrong[:3], finishes.count("stop"), broken


@pytest.mark.parametrize("kind", KINDS)
def test_row_text_equals_the_decoding_of_all_tokens(kind, tmp_path):
    [(wrong, stopped, broken)] = run_ranks(differences, 1, kind, tmp_path)
    assert wrong == []
    assert 30 < stopped < 170 and broken > 50


def special_tokens(folder):
    """Return, on a rank, text, parts and reasons of end of rows with special tokens."""
    from megatron_ext.inference.row import GenerationRow, TokenScore
    from megatron_ext.inference.sampling import Sampling, adjust

    result = {}
    for kind in ("sentencepiece", "byte-level"):
        (folder / kind).mkdir()
        tokenizer, _ = build(kind, folder / kind)
        trained: Any = SimpleNamespace(tokenizer=tokenizer, max_length=99, vocab_size=270)
        encode = Oracle(kind, tokenizer, dict.fromkeys(BYTES, 5)).encode
        special, end = (1, 2) if kind == "sentencepiece" else (0, 1)
        ids = [*encode("foo bar")[-2:], special, *encode("Q ab")[-2:], end]

        def run(ids, trained=trained, special=special, **fields):
            row, parts = GenerationRow(trained, [ids[0]], Sampling(len(ids) + 1, **fields), 0), []
            for token in ids:
                row.add(TokenScore(token, -1.0, ((token, -1.0), (special, -2.0))))
                parts += row.released
                if row.completion.finish:
                    break
            return row.completion.text, row.completion.finish, parts

        tokenizer._tokenizer.eos_token = "</s>"
        own = run(ids)
        with_special = run(ids, skip_special_tokens=False)
        further = run(ids, stop_token_ids=(ids[3],))
        tokenizer.end_tokens = frozenset([end, special])
        several, ignored = run(ids), run(ids, stop_at_eod=False)[1]
        # A damaged folder may name an end that its tokenizer lacks.
        tokenizer.end_tokens = frozenset([end, 270])
        row = GenerationRow(trained, [ids[0]], Sampling(9, min_tokens=2), 0)
        logits = adjust(torch.zeros(270), row.sampling, row.prompt, [], row.ends)
        impossible = logits.isinf().nonzero().flatten().tolist()
        result[kind] = own, with_special, further, several, ignored, (impossible, [end])
    return result


def test_row_omits_special_tokens_unless_requested(tmp_path):
    [result] = run_ranks(special_tokens, 1, tmp_path)
    for own, with_special, further, several, ignored, (impossible, end) in result.values():
        assert impossible == end
        assert own[1] == with_special[1] == "eod" and "<s>" not in own[0] and ignored is None
        assert with_special[0].replace("<s>", "") == own[0] and with_special[0].count("<s>") == 1
        assert [entry.part.text for entry in own[2]][-1] == ""  # the end token
        assert (further[1], len(further[2])) == ("stop", 4)
        assert "".join(entry.part.text for entry in further[2]) == further[0]
        assert (several[1], len(several[2])) == ("eod", 3)
        for entry in own[2]:  # a token is written alike among the likeliest
            assert entry.likeliest[0] == (entry.part.text, entry.part.data)
        assert own[2][0].likeliest[1] == ("<s>", b"<s>")
