"""Tests of the adapter of lm-evaluation-harness against transformers.

The references are a plain loop and, if accelerate is installed, the harness's own model.
"""

import json
import random
import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from tests.closeness import rounding
from tests.distributed import run_ranks
from tests.evaluation.conftest import texts
from tests.inference.checkpoint import MAX_LENGTH

TASKS = ["pick", "read", "say"]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Write local tasks of each kind of request, with local data."""
    folder = tmp_path_factory.mktemp("tasks")
    choose = random.Random(5)
    rows = [
        {
            "question": "" if i == 3 else texts(choose, 9),
            "choices": [texts(choose, 3) for _ in range(3)],
            "answer": choose.randrange(3),
            "text": texts(choose, 60 if i % 2 else 4),
        }
        for i in range(11)
    ]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common: dict[str, object] = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(folder / "data.jsonl")},
            "cache_dir": str(folder / "cache"),
        },
        "test_split": "test",
    }
    kinds: dict[str, dict[str, object]] = {
        "pick": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "read": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
        "say": {
            "output_type": "generate_until",
            "doc_to_text": "ba {{question}}",
            "doc_to_target": "{{text}}",
            "generation_kwargs": {"until": ["lo", "\n"], "max_gen_toks": 9},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, kind in kinds.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **kind}))
    return folder


def by_command(run, tasks, out, *model_args):
    """Run the command line of the harness."""
    import lm_eval.tasks

    from tools import eval_harness

    # Reading the harness's ten thousand task files takes longer than all the rest.
    lm_eval.tasks.TaskManager = partial(lm_eval.tasks.TaskManager, include_defaults=False)

    sys.argv = [
        *("eval_harness", "run", "--model", "megatron-et", "--model_args"),
        ",".join([f"load={run}", *model_args]),
        *("--tasks", ",".join(TASKS), "--include_path", str(tasks), "--batch_size", "2"),
        *("--output_path", str(out), "--log_samples"),
    ]
    eval_harness.main()


def read(out):
    [results] = out.rglob("results_*.json")
    samples = {}
    for name in TASKS:
        [file] = out.rglob(f"samples_{name}_*.jsonl")
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        samples[name] = {row["doc_id"]: row["filtered_resps"] for row in rows}
    return SimpleNamespace(results=json.loads(results.read_text())["results"], samples=samples)


def plain_lm(model, tokenizer):
    """Transformers, one request at a time."""
    from lm_eval.api.model import LM

    def log_probs(ids):
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)

    class Plain(LM):
        def loglikelihood(self, requests):
            answers = []
            for request in requests:
                context, continuation = request.args
                before = tokenizer(context).input_ids if context else [tokenizer.eos_token_id]
                ids = tokenizer(context + continuation).input_ids
                ids = ids if context else before + ids
                assert ids[: len(before)] == before and len(ids) <= MAX_LENGTH
                rows = log_probs(ids)[len(before) - 1 : -1]
                required = torch.tensor(ids[len(before) :])
                total = float(rows.gather(1, required.unsqueeze(1)).sum())
                answers.append((total, bool((rows.argmax(-1) == required).all())))
            return answers

        def loglikelihood_rolling(self, requests):
            answers = []
            for request in requests:
                ids = [tokenizer.eos_token_id, *tokenizer(request.args[0]).input_ids]
                # A token has at most the model's length as context; windows do not
                # overlap but for the last, which reaches back to be whole.
                total, done = 0.0, 1
                while done < len(ids):
                    end = min(done + MAX_LENGTH, len(ids))
                    start = max(0, end - MAX_LENGTH - 1)
                    rows = log_probs(ids[start : end - 1])
                    total += sum(float(rows[i - 1 - start, ids[i]]) for i in range(done, end))
                    done = end
                answers.append(total)
            return answers

        def generate_until(self, requests):
            answers = []
            for request in requests:
                context, options = request.args
                ids = tokenizer(context).input_ids[-MAX_LENGTH + options["max_gen_toks"] :]
                length = len(ids)
                for _ in range(options["max_gen_toks"]):
                    ids.append(int(log_probs(ids)[-1].argmax()))
                    if ids[-1] == tokenizer.eos_token_id:
                        ids.pop()
                        break
                text = tokenizer.decode(ids)[len(tokenizer.decode(ids[:length])) :]
                for stop in options["until"]:
                    text = text.split(stop)[0]
                answers.append(text)
            return answers

    return Plain()


@pytest.fixture(scope="module", params=["plain", "hf"])
def transformers(request, hf_model, hf_tokenizer, tasks):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    if request.param == "plain":
        lm = plain_lm(hf_model, hf_tokenizer)
    else:
        pytest.importorskip("accelerate")
        from lm_eval.models.huggingface import HFLM

        lm = HFLM(
            pretrained=hf_model,
            tokenizer=hf_tokenizer,
            batch_size=1,
            prefix_token_id=hf_tokenizer.eos_token_id,
        )
    done = simple_evaluate(
        lm,
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    samples = {
        name: {row["doc_id"]: row["filtered_resps"] for row in rows}
        for name, rows in done["samples"].items()
    }
    return SimpleNamespace(results=done["results"], samples=samples)


@pytest.fixture(scope="module")
def ours(run_dir, tasks, tmp_path_factory):
    out = tmp_path_factory.mktemp("harness")
    run_ranks(by_command, 2, run_dir, tasks, out, "expert_model_parallel_size=2")
    return read(out)


def test_harness_log_likelihoods_equal_those_of_transformers(ours, transformers):
    for name in ("pick", "read"):
        assert len(ours.samples[name]) == 11
        for doc, expected in transformers.samples[name].items():
            for answer, required in zip(ours.samples[name][doc], expected, strict=True):
                if name == "pick":
                    answer, greedy = answer
                    required, required_greedy = required
                    assert str(greedy) == str(required_greedy)
                assert float(answer) == pytest.approx(
                    float(required), abs=rounding([float(required)])
                )


def log_likelihoods(run, pairs):
    """Return, on a rank, the answers to pairs of context and continuation."""
    from lm_eval.api.instance import Instance

    from megatron_ext.evaluation.lm_eval_adapter import MegatronLM

    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    return MegatronLM(load=str(run)).loglikelihood(requests)


def test_context_of_white_space_belongs_to_the_continuation(run_dir):
    pairs = [(" ", "ba lo"), ("", " ba lo"), (" ", "ba"), ("", " ba"), ("", "lo")]
    [answers] = run_ranks(log_likelihoods, 1, run_dir, pairs)
    assert answers[0] == pytest.approx(answers[1])
    assert answers[2] == pytest.approx(answers[3])
    assert len({round(loss, 4) for loss, _ in answers}) == 3


def test_harness_continuations_equal_those_of_transformers(ours, transformers):
    """A space at the beginning may differ: the harness's model loses it with the context."""
    texts = {doc: answer[0].strip() for doc, answer in ours.samples["say"].items()}
    assert texts == {doc: a[0].strip() for doc, a in transformers.samples["say"].items()}
    assert len(set(texts.values())) > 3


def test_harness_metrics_equal_those_of_transformers(ours, transformers):
    for name in TASKS:
        for metric, value in transformers.results[name].items():
            if isinstance(value, float) and "stderr" not in metric:
                assert ours.results[name][metric] == pytest.approx(value, abs=1e-5), metric


REQUESTS: dict[str, list[Any]] = {
    "loglikelihood": [
        ("<s>the city", " of"), ("<s>", " of"), ("the", "</s>"), ("", " ba"), ("ba ", "lo"),
        ("<|im_end|>", "ba"), ("ba" * 90, " lo"), ("é", "👍"),
    ],
    "loglikelihood_rolling": [("<s>the city",), ("the city",), ("ba " * 90,), ("x</s>y",)],
    "generate_until": [
        (text, {"until": until, "max_gen_toks": 9})
        for text in ("ba lo", "<s>the", "x</s>", "ni" * 90) for until in (["\n\n"], ["a"])
    ],
}  # fmt: skip
CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def adapter_and_harness(folder):
    """Return, on a rank, answers of the adapter and of the harness's model to the same requests."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from megatron_ext.errors import UserError
    from megatron_ext.evaluation.lm_eval_adapter import MegatronLM
    from tools import convert_checkpoint

    flags = ["--from", "hf", "--to", "megatron", "--load", folder / "hf", "--save", folder / "m"]
    convert_checkpoint.main([*map(str, flags)])
    ours = MegatronLM(load=str(folder / "m"), batch_size=3)
    other = HFLM(pretrained=str(folder / "hf"), dtype="float32", batch_size=1, device="cpu")

    def ask(model, kind):
        requests = [Instance(kind, {}, arguments, 0) for arguments in REQUESTS[kind]]
        return getattr(model, kind)(requests, disable_tqdm=True)

    def refusal(call):
        try:
            return call()
        except UserError as error:
            return str(error)

    turns = [{"role": "user", "content": "hi"}]
    chats = [
        model.apply_chat_template(turns, begin)
        for model in (ours, other)
        for begin in (True, False)
    ]
    too_long = [Instance("loglikelihood", {}, ("a", "b " * 200), 0)]
    assert ours.tokenizer is not None
    ours.tokenizer.chat_template = None
    return SimpleNamespace(
        answers={kind: (ask(ours, kind), ask(other, kind)) for kind in REQUESTS},
        chats=chats,
        too_long=refusal(lambda: ours.loglikelihood(too_long, disable_tqdm=True)),
        without=refusal(lambda: ours.apply_chat_template(turns)),
    )


@pytest.mark.slow
def test_harness_control_tokens_are_parsed_as_by_the_hf_model(tmp_path):
    pytest.importorskip("accelerate")
    from tests.hf.models import make
    from tests.hf.test_tokenizers import byte_level

    tokenizer = byte_level(tmp_path / "hf", chat_template=CHAT)
    make("llama", tmp_path / "hf", vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=[1, 2])
    [result] = run_ranks(adapter_and_harness, 1, tmp_path)
    for kind in ("loglikelihood", "loglikelihood_rolling"):
        for request, own, required in zip(REQUESTS[kind], *result.answers[kind], strict=True):
            own, required = (a[0] if isinstance(a, tuple) else a for a in (own, required))
            assert own == pytest.approx(required, rel=1e-5), request
    ours, other = result.answers["generate_until"]
    assert [text.lstrip() for text in ours] == [text.lstrip() for text in other]
    assert result.chats[:2] == result.chats[2:] and result.chats[0].endswith("<|im_end|>assistant:")
    assert "A continuation has 4" in result.too_long and "scores 1 to 64" in result.too_long
    assert "has no chat template. Remove --apply_chat_template" in result.without
