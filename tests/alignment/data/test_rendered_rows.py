"""Tests of rendered rows: the tokens are those of training, and control tokens are marked."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from alignment.commands.data import main
from alignment.data.chat_prompts import example
from alignment.data.rendered_rows import printable, segments_of, write_segments
from alignment.records import Message
from megatron_ext.errors import UserError
from tests.alignment.chat_model import make_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_tokenizer(folder)
    (folder / "config.json").write_text('{"model_type": "llama", "eos_token_id": 0}')
    return folder


MESSAGES = [Message("system", "Be <|end|> brief."), Message("user", "Zwei 漢字 🙂?")]


def test_text_of_segments_is_that_of_transformers_and_marks_what_is_trained(model: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    plain = [Message("system", "Be brief."), MESSAGES[1]]
    chat = [{"role": m.role, "content": m.content} for m in plain]
    whole = example(tokenizer, plain, "Drei <|user|> é")
    segments = segments_of(tokenizer, whole.prompt, whole.completion)
    expected = tokenizer.apply_chat_template(
        [*chat, {"role": "assistant", "content": "Drei <|user|> é"}], tokenize=False
    )
    assert "".join(segment.text for segment in segments) == expected
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert "".join(s.text for s in segments if not s.is_trained) == prompt
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert whole.prompt == ids
    assert [s.text for s in segments if s.is_control] == [
        "<|system|>", "<|user|>", "<|assistant|>", "<|end|>",
    ]  # fmt: skip


def test_names_of_control_tokens_in_messages_are_not_marked(model: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    whole = example(tokenizer, MESSAGES, "Ja.")
    segments = segments_of(tokenizer, whole.prompt, whole.completion)
    assert write_segments(segments, color=False) == (
        "[<|system|>]Be <|end|> brief.[<|user|>]Zwei 漢字 🙂?[<|assistant|>]"
        "[trained:Ja.[<|end|>]:trained]"
    )
    colored = write_segments(segments, color=True)
    assert re.sub(r"\x1b\[[0-9;]*m", "", colored) == (
        "<|system|>Be <|end|> brief.<|user|>Zwei 漢字 🙂?<|assistant|>Ja.<|end|>"
    )
    assert "\x1b[32mJa." in colored


def test_text_cannot_control_the_terminal() -> None:
    assert printable("a\x1b[31mb\r\u202ec\n\t") == "a\\x1b[31mb\\r\\u202ec\n\t"


@pytest.mark.parametrize(
    "flag", [("--chat-template", "x"), ("--chat-template-kwargs", "x"), ("--seq-length", "9")]
)
def test_flags_without_a_model_are_refused(flag: tuple[str, str]) -> None:
    with pytest.raises(UserError, match=f"^{flag[0]} requires --model"):
        main(["show", "rows.jsonl", *flag])


def show(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    main(["show", *map(str, words)])
    return capsys.readouterr().out


def test_show_without_a_usable_row_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "q.csv"
    file.write_text('question,answer\n,x\n"  ",y\na,b\n')
    with pytest.raises(UserError, match=r"q\.csv has no row that can be used among those shown"):
        show(capsys, file, "--limit", 2)
    assert "0 records" in capsys.readouterr().out
    assert "1 records" in show(capsys, file)


def test_show_prints_rows_with_counts_metadata_and_what_is_left_out(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "q.csv"
    file.write_text('question,explanation,level\n"a\nb",c,easy\none,two,\n,x,\n')
    printed = show(capsys, file, "--columns", "response=explanation", "--model", model,
                   "--seq-length", 6)  # fmt: skip
    assert "[<|user|>]a\nb[<|assistant|>][trained:c[<|end|>]:trained]" in printed
    assert re.search(r"\(7 tokens: 5 of the prompt, 2 trained; 1 more than --seq-length 6", printed)
    assert "metadata: level='easy'" in printed
    assert f"{file}, row 5: question is empty. No command can use this row." in printed
    assert "(prompt=question, response=explanation): 2 records; metadata: level" in printed
    assert "row 4" not in show(capsys, file, "-n", 1)


def test_show_prints_what_a_judge_receives_with_the_label_of_people(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "arena.jsonl"
    row = {"prompt": "Q", "response_a": "x", "response_b": "y", "winner": "b", "reference": "z"}
    file.write_text(json.dumps(row))
    printed = show(capsys, file, "--model", model, "--template", "pairwise-reference")
    assert "<<< reference" in printed and "[trained:B[<|end|>]:trained]" in printed
    assert "labels of people: second by people" in printed
    both = show(capsys, file)
    assert "first response\n[user]\nQ\n[assistant, trained]\nx" in both
    assert "second response (preferred)" in both
    with pytest.raises(UserError, match="pointwise template, but the judge receives pairs"):
        show(capsys, file, "--template", "pointwise")
