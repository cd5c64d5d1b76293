"""A judge whose model an engine holds, on the ranks of this process."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import torch

from alignment.data.chat_prompts import decoded, prompt_ids
from alignment.engines.batch import TokenBatch, TokenSample
from alignment.engines.protocol import AlignmentEngine, GeneratedResponse
from alignment.judges.formats.labels import SCORES, SIDES, LabelTokens
from alignment.judges.formats.parsing import CLOSE, Parser
from alignment.judges.formats.prompts import JudgePrompt
from alignment.judges.questions import Question
from alignment.ranks import all_reduce_max
from alignment.records import Message, Outcome, Verdict
from alignment.rounding import model_error
from alignment.seeds import derive_seed
from megatron_ext.inference.sampling import Sampling

# How the paper's reasoning judges think.
THINKING = Sampling(max_new_tokens=4096, temperature=0.7, top_k=20, top_p=0.95)


@dataclass(frozen=True)
class JudgeForm:
    """How a judge is asked and answers, in tokens.

    Attributes:
        prompt: what it is asked.
        parser: reads what it says.
        tokenizer: of transformers.
        template: variables of the chat template.
    """

    prompt: JudgePrompt
    parser: Parser
    tokenizer: Any
    template: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label_tokens(self) -> LabelTokens:
        """See `LabelTokens.of`."""
        labels = SIDES if self.parser.pairwise else SCORES
        return LabelTokens.of(self.tokenizer, labels, self.parser.thinks, self.template)

    def messages(self, question: Question) -> list[Message]:
        """What the judge is asked."""
        return self.prompt.messages(question.item, question.swapped)

    def ask(self, question: Question) -> list[int]:
        """The ids of what the judge is given."""
        return prompt_ids(self.tokenizer, self.messages(question), **self.template)

    def text(self, generated: GeneratedResponse) -> str:
        """What was generated, without the token that ended it."""
        tokens = generated.tokens[:-1] if generated.ended else generated.tokens
        return decoded(self.tokenizer, tokens)

    @property
    def identity(self) -> str:
        """A hash of the form."""
        depends = [self.prompt.identity, self.parser.identity, dict(self.template)]
        return sha256(json.dumps(depends).encode()).hexdigest()


class LocalJudge:
    """Gives verdicts; every method is a collective of all ranks, each with questions of its own."""

    def __init__(
        self,
        engine: AlignmentEngine,
        form: JudgeForm,
        length: int,
        sampling: Sampling = THINKING,
        rows: int = 32,
        identity: str = "",
    ) -> None:
        """See the class.

        Args:
            length: the most tokens that the model takes.
            sampling: of a judge that thinks.
            rows: questions that are asked at a time.
            identity: a hash of all that a verdict depends on.
        """
        self.engine, self.form, self.length = engine, form, length
        self.sampling, self.rows, self.identity = sampling, rows, identity
        self.labels = form.label_tokens

    @property
    def rounding_error(self) -> float:
        """Relative error of a score, see `alignment.rounding`."""
        return model_error(self.engine.dtype)

    def judge(
        self, questions: Sequence[Question], check: Callable[[], None] = lambda: None
    ) -> list[Verdict]:
        """Verdicts on the questions, in their order.

        A judge that does not think is read by the probabilities of its labels; one that does
        writes, and its score is read where it has put the label. A question too long for the model
        is a failed call.

        Questions of the same tokens have the same verdict: the model is asked once. Asked twice it
        would answer differently in the last digits, which depend on the other rows of a batch, and
        equal responses would seem to differ.

        Args:
            check: called on all ranks between calls; may raise.
        """
        asked = [self.form.ask(question) for question in questions]
        room = self.sampling.max_new_tokens if self.form.parser.thinks else 1
        fits = [i for i, ids in enumerate(asked) if len(ids) + room <= self.length]
        fields: dict[int, Mapping[str, Any]] = {
            i: {
                "outcome": Outcome.FAILED,
                "reason": f"the question has {len(ids)} tokens, and with {room} to answer the "
                f"judge takes {self.length}",
            }
            for i, ids in enumerate(asked)
            if len(ids) + room > self.length
        }
        keys = {i: (questions[i].sample, questions[i].swapped, *asked[i]) for i in fits}
        representative = {key: i for i, key in reversed(keys.items())}
        calls = sorted(representative.values(), key=lambda i: (len(asked[i]), i))
        for begin in range(0, all_reduce_max(len(calls)), self.rows):
            check()
            part = calls[begin : begin + self.rows]
            of = self._think if self.form.parser.thinks else self._label
            found = of([questions[i] for i in part], [asked[i] for i in part])
            fields |= zip(part, found)
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
        self, questions: Sequence[Question], asked: Sequence[Sequence[int]]
    ) -> list[Mapping[str, Any]]:
        log_probs = self._next(asked)
        return [
            self.labels.judgement(row, question.swapped)
            for question, row in zip(questions, log_probs)
        ]

    def _think(
        self, questions: Sequence[Question], asked: Sequence[Sequence[int]]
    ) -> list[Mapping[str, Any]]:
        # Not of items' names: the same question has the same answer on any rank, in any call.
        seeds = [derive_seed(self.identity, q.sample, *ids) for q, ids in zip(questions, asked)]
        answers = self.engine.generate(asked, self.sampling, seeds)
        read: list[Mapping[str, Any]] = [
            self.read(question, answer) for question, answer in zip(questions, answers)
        ]
        if self.form.parser.pairwise:
            return read
        # The score is the expectation at the place of the label.
        scored = [i for i, fields in enumerate(read) if fields["outcome"] is Outcome.SCORE]
        places = {i: self._label_place(answers[i]) for i in scored}
        there = {i: place for i, place in places.items() if place is not None}
        before = [[*asked[i], *answers[i].tokens[:place]] for i, place in there.items()]
        found: dict[int, Mapping[str, Any]] = {
            i: {
                "outcome": Outcome.UNPARSEABLE,
                "reason": "the label is in other tokens than those that scores are read from",
            }
            for i in scored
        }
        found |= {
            i: self.labels.judgement(log_probs) for i, log_probs in zip(there, self._next(before))
        }
        for i, fields in found.items():
            written = {name: value for name, value in read[i].items() if name != "score"}
            read[i] = {**written, **fields}
        return read

    @staticmethod
    def answer(tokens: Sequence[int], ended: bool) -> GeneratedResponse:
        """What a model wrote, to be read."""
        return GeneratedResponse(list(tokens), [], ended)

    def read(self, question: Question, answer: GeneratedResponse) -> dict[str, Any]:
        """The fields of a verdict in what was generated."""
        text = self.form.text(answer)
        fields = dict(self.form.parser.read(text, question.swapped))
        if fields["outcome"] is Outcome.UNPARSEABLE and not answer.ended:
            fields |= {
                "outcome": Outcome.FAILED,
                "reason": f"cut off after {len(answer.tokens)} tokens",
            }
        return {**fields, "answer": text}

    def _label_place(self, answer: GeneratedResponse) -> int | None:
        """Where an answer has its label: the last token after the thinking that is one."""
        for place in reversed(range(len(answer.tokens))):
            if CLOSE in decoded(self.form.tokenizer, answer.tokens[place:]):
                break  # thinking may hold such tokens too
            if answer.tokens[place] in self.labels.ids:
                return place
        return None

    def _next(self, before: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probabilities of the labels after each row."""
        batch = TokenBatch.of([TokenSample(row, len(row)) for row in before])
        found = self.engine.next_log_probs(batch, self.labels.ids)
        last = torch.tensor([len(row) - 1 for row in before], dtype=torch.int64)
        return found[torch.arange(len(before)), last].tolist()
