"""What cannot be validated is refused before a model is loaded."""

from pathlib import Path

import pytest

from megatron_ext.errors import UserError
from tests.alignment.chat_model import BRIEF, gold, make_model, responses, write_rows


def test_validation_without_room_for_an_answer_is_refused(tmp_path: Path) -> None:
    from alignment.judges.train import main

    make_model(tmp_path)
    (tmp_path / "pointwise-brief.txt").write_text(BRIEF)
    flags = ["--stage", "sft", "--thinking", "asked", "--model", str(tmp_path)]
    flags += ["--template", str(tmp_path / "pointwise-brief.txt"), "--run-dir", str(tmp_path / "r")]
    for seed, name in enumerate(("", "validation-")):
        items = responses(8, seed)
        flags += [f"--{name}input", str(write_rows(tmp_path / f"{name}items.jsonl", items))]
        flags += [f"--{name}gold", str(write_rows(tmp_path / f"{name}gold.jsonl", gold(items)))]
    with pytest.raises(UserError, match=r"every question .* the 0 tokens that --seq-length 64"):
        main([*flags, "--seq-length", "64", "--max-new-tokens", "96"])
