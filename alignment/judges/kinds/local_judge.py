"""Judge whose model is resident on the ranks of the command."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from alignment.data.chat_prompts import decode_ids, prompt_ids
from alignment.engines.batch import TokenBatch, TokenSample
from alignment.engines.protocol import AlignmentEngine, GeneratedResponse
from alignment.judges.formats.judge_format import JudgeFormat
from alignment.judges.formats.labels import SCORES, SIDES, LabelTokens
from alignment.judges.formats.parsing import CLOSE
from alignment.judges.questions import Question
from alignment.ranks import all_reduce_max
from alignment.records import Outcome, Verdict
from alignment.rounding import model_error
from alignment.seeds import derive_seed
from megatron_ext.inference.sampling import Sampling

# Sampling of the thinking of the paper's reasoning judges.
THINKING = Sampling(max_new_tokens=4096, temperature=0.7, top_k=20, top_p=0.95)


@dataclass(frozen=True)
class TokenizedJudgeFormat(JudgeFormat):
    """Judge format for a model that receives and generates token ids.

    Attributes:
        tokenizer: The tokenizer of the model, from transformers.
        chat_template_kwargs: The variables of the chat template.
    """

    tokenizer: Any
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_format(
        cls, judge_format: JudgeFormat, tokenizer: Any, chat_template_kwargs: Mapping[str, Any]
    ) -> "TokenizedJudgeFormat":
        """Combine a judge format with the tokenizer of the model."""
        return cls(judge_format.prompt, judge_format.parser, tokenizer, chat_template_kwargs)

    @property
    def label_tokens(self) -> LabelTokens:
        """Return the tokens of the labels of this judge.

        Raises:
            UserError: If the tokenizer does not encode each label as a token that can be read.
        """
        labels = SIDES if self.parser.pairwise else SCORES
        return LabelTokens.of(self.tokenizer, labels, self.parser.thinks, self.chat_template_kwargs)

    def prompt_ids(self, question: Question) -> list[int]:
        """Return the token ids that ask a question."""
        messages = self.messages(question.item, question.swapped)
        return prompt_ids(self.tokenizer, messages, **self.chat_template_kwargs)

    def decode(self, answer: GeneratedResponse) -> str:
        """Return the text of an answer, without its end token."""
        tokens = answer.tokens[:-1] if answer.ended else answer.tokens
        return decode_ids(self.tokenizer, tokens)

    @property
    def identity(self) -> str:
        """Return a hash of the prompt template, the parser and the chat template's variables."""
        depends = [self.prompt.identity, self.parser.identity, dict(self.chat_template_kwargs)]
        return sha256(json.dumps(depends).encode()).hexdigest()


class LocalJudge:
    """Judge whose model is in an engine.

    Its method `judge` is a collective of all ranks, in which each rank asks its own questions.
    """

    def __init__(
        self,
        engine: AlignmentEngine,
        judge_format: TokenizedJudgeFormat,
        length: int,
        sampling: Sampling = THINKING,
        generation_batch_size: int = 32,
        identity: str = "",
    ) -> None:
        """Create the judge.

        Args:
            engine: The engine of the model.
            judge_format: The prompt template, the parser and the tokenizer.
            length: Maximum number of tokens of a question and its answer.
            sampling: Sampling settings of the thinking.
            generation_batch_size: Number of questions per batch.
            identity: A hash of everything on which a verdict depends.
        """
        self.engine, self.format, self.length = engine, judge_format, length
        self.sampling, self.identity = sampling, identity
        self.generation_batch_size = generation_batch_size
        self.labels = judge_format.label_tokens

    @property
    def rounding_error(self) -> float:
        """Return the relative error of a score; see `alignment.rounding`."""
        return model_error(self.engine.dtype)

    def judge(
        self, questions: Sequence[Question], check: Callable[[], None] = lambda: None
    ) -> list[Verdict]:
        """Return the verdicts on questions, in their order.

        The verdict of a judge that does not think is computed from the probabilities of its labels.
        A judge that thinks generates text, and its score is the expectation at the position of the
        label. A question that is too long for the model is a failed call.

        Questions with the same tokens have the same verdict, because the model evaluates them
        once. Two evaluations would differ in the last digits, which depend on the other rows of a
        batch, so that equal responses would seem to differ.

        Args:
            questions: The questions of this rank.
            check: Function that is called on all ranks between batches and may raise an error.
        """
        prompts = [self.format.prompt_ids(question) for question in questions]
        room = self.sampling.max_new_tokens if self.format.parser.thinks else 1
        fits = [i for i, ids in enumerate(prompts) if len(ids) + room <= self.length]
        fields: dict[int, Mapping[str, Any]] = {
            i: {
                "outcome": Outcome.FAILED,
                "reason": f"the question has {len(ids)} tokens and needs {room} more for the "
                f"answer, but the judge takes {self.length}",
            }
            for i, ids in enumerate(prompts)
            if len(ids) + room > self.length
        }
        keys = {i: (questions[i].sample, questions[i].swapped, *prompts[i]) for i in fits}
        representative = {key: i for i, key in reversed(keys.items())}
        calls = sorted(representative.values(), key=lambda i: (len(prompts[i]), i))
        for begin in range(0, all_reduce_max(len(calls)), self.generation_batch_size):
            check()
            part = calls[begin : begin + self.generation_batch_size]
            ask = self._think if self.format.parser.thinks else self._label
            results = ask([questions[i] for i in part], [prompts[i] for i in part])
            fields |= zip(part, results)
        fields |= {i: fields[representative[key]] for i, key in keys.items()}
        return [
            Verdict.from_row(
                {
                    "item": question.item.id,
                    "swapped": question.swapped,
                    "sample": question.sample,
                    "judge": self.identity,
                    **fields[i],
                }
            )
            for i, question in enumerate(questions)
        ]

    def _label(
        self, questions: Sequence[Question], prompts: Sequence[Sequence[int]]
    ) -> list[Mapping[str, Any]]:
        log_probs = self._next(prompts)
        return [
            self.labels.judgment(row, question.swapped)
            for question, row in zip(questions, log_probs)
        ]

    def _think(
        self, questions: Sequence[Question], prompts: Sequence[Sequence[int]]
    ) -> list[Mapping[str, Any]]:
        # Seeds depend on tokens, not on names, so that a question has one answer on all ranks.
        seeds = [derive_seed(self.identity, q.sample, *ids) for q, ids in zip(questions, prompts)]
        answers = self.engine.generate(prompts, self.sampling, seeds)
        read: list[Mapping[str, Any]] = [
            self.read(question, answer) for question, answer in zip(questions, answers)
        ]
        if self.format.parser.pairwise:
            return read
        # The score is the expectation at the position of the label.
        scored = [i for i, fields in enumerate(read) if fields["outcome"] is Outcome.SCORE]
        places = {i: self._label_place(answers[i]) for i in scored}
        label_places = {i: place for i, place in places.items() if place is not None}
        before = [[*prompts[i], *answers[i].tokens[:place]] for i, place in label_places.items()]
        scores: dict[int, Mapping[str, Any]] = {
            i: {
                "outcome": Outcome.UNPARSEABLE,
                "reason": "the label is not one of the tokens from which scores are read",
            }
            for i in scored
        }
        scores |= {
            i: self.labels.judgment(log_probs)
            for i, log_probs in zip(label_places, self._next(before))
        }
        for i, fields in scores.items():
            written = {name: value for name, value in read[i].items() if name != "score"}
            read[i] = {**written, **fields}
        return read

    @staticmethod
    def answer(tokens: Sequence[int], ended: bool) -> GeneratedResponse:
        """Return the tokens that a model generated as an answer."""
        return GeneratedResponse(list(tokens), [], ended)

    def read(self, question: Question, answer: GeneratedResponse) -> dict[str, Any]:
        """Return the fields of the verdict in an answer."""
        text = self.format.decode(answer)
        fields = dict(self.format.parser.read(text, question.swapped))
        if fields["outcome"] is Outcome.UNPARSEABLE and not answer.ended:
            fields |= {
                "outcome": Outcome.FAILED,
                "reason": f"cut off after {len(answer.tokens)} tokens",
            }
        return {**fields, "answer": text}

    def _label_place(self, answer: GeneratedResponse) -> int | None:
        """Return the position of the label: the last token after the thinking that is a label."""
        for place in reversed(range(len(answer.tokens))):
            if CLOSE in decode_ids(self.format.tokenizer, answer.tokens[place:]):
                break  # thinking may contain such tokens too
            if answer.tokens[place] in self.labels.ids:
                return place
        return None

    def _next(self, before: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the log-probabilities of the labels after each row, `[rows][labels]`."""
        batch = TokenBatch.of([TokenSample(row, len(row)) for row in before])
        log_probs = self.engine.next_log_probs(batch, self.labels.ids)
        last = torch.tensor([len(row) - 1 for row in before], dtype=torch.int64)
        return log_probs[torch.arange(len(before)), last].tolist()


def local_judge_identity(model: str, judge_format: TokenizedJudgeFormat, sampling: Sampling) -> str:
    """Return a hash of everything on which the verdicts of a local judge depend.

    These are the files of the model, the format, the chat template, which may be a separate file,
    and the sampling of a judge that thinks.
    """
    digest = sha256(judge_format.identity.encode())
    digest.update(repr(judge_format.tokenizer.chat_template).encode())
    if judge_format.parser.thinks:
        temperature = 0.0 if sampling.greedy else sampling.temperature
        settings = [sampling.max_new_tokens, temperature, sampling.top_k, sampling.top_p]
        digest.update(repr(settings).encode())
    digest.update(model_digest(model).encode())
    return digest.hexdigest()


def model_digest(model: str) -> str:
    """Return a hash of the weights and settings in the folder of a model."""
    files = [
        file
        for file in sorted(Path(model).rglob("*"))
        if file.is_file() and file.suffix in (".safetensors", ".distcp", ".json")
    ]
    states = [file.stat() for file in files]
    return _digest(tuple((f, s.st_size, s.st_mtime_ns) for f, s in zip(files, states)))


@cache
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Return a hash of the content of files.

    The files of a large model take minutes to read, and their hash is needed more than once. Sizes
    and modification times are part of the arguments, so that a changed file is read again.
    """
    digest = sha256()
    for file, _, _ in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
