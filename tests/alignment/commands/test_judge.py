"""Tests of local judges, whose label probabilities equal those of transformers, and of messages."""

import math
from dataclasses import replace

import pytest

from alignment.judges.formats.labels import SCORES, LabelTokens
from alignment.judges.questions import Question
from alignment.records import Message, Outcome, Pair, Prompt, Side, Verdict
from tests.alignment.chat_model import BRIEF, gold, make_model, responses, write_rows
from tests.distributed import run_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    make_model(folder / "model", num_hidden_layers=1, max_position_embeddings=320)
    items = responses(7, 1)
    write_rows(folder / "items.jsonl", items)
    write_rows(folder / "gold.jsonl", gold(items))
    write_rows(folder / "one.jsonl", [replace(v, score=3.0) for v in gold(items)])
    write_rows(folder / "others.jsonl", gold(responses(3, 5)))
    silent = [Verdict(i.id, Outcome.FAILED, reason="no answer") for i in items]
    write_rows(folder / "silent.jsonl", silent)
    prompt = Prompt("p", (Message("user", "say good"),))
    pair = Pair("pair", prompt, "good", "bad", Side.FIRST)
    write_rows(folder / "pairs.jsonl", [pair])
    (folder / "pointwise-brief.txt").write_text(BRIEF)
    return folder


def judged(folder, sizes, thinks):
    """Return the verdicts on this rank's questions; a thinking answer has little room."""
    from alignment.data.model_tokenizer import load_tokenizer
    from alignment.engines.megatron import MegatronEngine, MegatronLayout
    from alignment.engines.protocol import GeneratedResponse
    from alignment.judges.formats.parsing import Parser
    from alignment.judges.formats.prompts import judge_prompt
    from alignment.judges.kinds.local_judge import LocalJudge, TokenizedJudgeFormat
    from megatron_ext.inference.sampling import Sampling

    tokenizer = load_tokenizer(folder / "model")
    prompt = judge_prompt(str(folder / "pointwise-brief.txt"), thinks)
    form = TokenizedJudgeFormat(prompt, Parser(thinks=thinks), tokenizer)
    engine = MegatronEngine(folder / "model", layout=MegatronLayout(micro_batch=2, **sizes))
    if thinks:
        # An untrained model does not follow the format, so the test sets its answers.
        ids = tokenizer("<think>\nthree good\n</think>\n3", add_special_tokens=False)["input_ids"]
        written = [*ids, tokenizer.eos_token_id]
        response = GeneratedResponse(written, [], True)
        setattr(engine, "generate", lambda prompts, *_: [response for _ in prompts])  # noqa: B010
    judge = LocalJudge(engine, form, 320, Sampling(32), generation_batch_size=3)
    items = responses(7, 1)
    items[2] = replace(items[2], text="river " * 300)
    questions = [Question(item) for item in items]
    share = questions[engine.data_rank :: engine.data_size]
    encoded = {q.item.id: form.prompt_ids(q) for q in questions}
    return judge.judge(share), encoded, written[:-2] if thinks else []


@pytest.mark.parametrize("thinks", [False, True])
def test_the_score_is_the_expectation_over_the_labels(place, thinks):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    labels = LabelTokens.of(tokenizer, SCORES, thinks, {})
    for ranks, sizes in ((1, {}), (2, {}), (2, {"tensor": 2})):
        result = run_ranks(judged, ranks, place, sizes, thinks)
        verdicts = {v.item: v for verdicts, _, _ in result for v in verdicts}
        _, prompts, before = result[0]
        assert len(verdicts) == 7
        assert verdicts.pop("r1-2").reason.startswith("the question has")
        for item, verdict in verdicts.items():
            with torch.no_grad():
                logits = model(torch.tensor([[*prompts[item], *before]])).logits[0, -1]
            weights = logits.softmax(-1)[list(labels.ids)]
            expected = float((weights * torch.arange(10.0)).sum() / weights.sum())
            assert verdict.score == pytest.approx(expected, abs=1e-4), (ranks, sizes)


def test_labels_without_probability_are_no_judgement():
    tokens = LabelTokens(SCORES, list(range(10)))
    assert tokens.judgment([-20.0] * 10)["outcome"] is Outcome.UNPARSEABLE
    fields = tokens.judgment([math.log(0.05)] * 5 + [-50.0] * 5)
    assert fields["score"] == pytest.approx(2.0)


def refusals(folder):
    """Return the error message of each wrong command."""
    from alignment.commands.train_judge import main
    from megatron_ext.errors import UserError

    base = {
        "--stage": "sft",
        "--model": folder / "model",
        "--run-dir": folder / "run",
        "--input": folder / "items.jsonl",
        "--gold": folder / "gold.jsonl",
        "--template": folder / "pointwise-brief.txt",
        "--seq-length": 192,
    }
    results = []
    for name, value in REFUSED:
        of_folder = name == "--model" or "." in str(value)
        flags = {**base, name: folder / value if of_folder else value}
        words = [str(word) for pair in flags.items() for word in pair]
        try:
            main(words)
            results.append("")
        except UserError as error:
            results.append(str(error))
    assert not (folder / "run").exists()
    return results


REFUSED = {
    ("--gold", "others.jsonl"): "--gold has no verdict on an item of --input",
    ("--gold", "one.jsonl"): "All 7 labels of --gold are 3, and a judge learns nothing",
    (
        "--gold",
        "silent.jsonl",
    ): "7 of 7 verdicts of --gold are left out, more than --max-left-out 0.2",
    ("--gold", "none.jsonl"): "none.jsonl does not exist. Give the path of a file",
    ("--input", "pairs.jsonl"): "--gold has no verdict on an item of --input",
    ("--model", "nowhere"): "is not a folder",
    ("--stage", "rl"): "--stage rl requires a judge that thinks",
    ("--seq-length", 8): "most often: longer than --seq-length 8, which can be raised (7 times)",
    ("--lr", -1): "--lr -1.0 must be above 0",
    ("--chat-template-kwargs", "[]"): "--chat-template-kwargs [] is not a JSON object",
    ("--tensor-model-parallel-size", 3): "--tensor-model-parallel-size",
    (
        "--template",
        "pairwise",
    ): "--template pairwise is a pairwise template, but the judge receives responses",
}


def test_wrong_commands_are_refused_in_a_sentence(place):
    [result] = run_ranks(refusals, 1, place)
    for sentence, expected in zip(result, REFUSED.values()):
        assert expected in sentence, sentence


def letters(normalizer=None):
    """Return a tokenizer of single letters, whose ids are their code points."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from tests.alignment.chat_model import TEMPLATE

    tokenizer = Tokenizer(models.BPE({chr(code): code for code in (10, *range(32, 127))}, []))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", chat_template=TEMPLATE
    )


def test_label_tokens_of_a_label_that_the_tokenizer_splits_are_refused():
    from tokenizers import normalizers

    from megatron_ext.errors import UserError

    assert LabelTokens.of(letters(), SCORES, False, {}).ids == tuple(map(ord, SCORES))
    assert LabelTokens.of(letters(), ("A", "B", "tie"), False, {}).ids == (65, 66, ord("t"))
    with pytest.raises(UserError, match="splits the label '9' into several tokens"):
        LabelTokens.of(letters(normalizers.Replace("9", "xx")), SCORES, False, {})
