"""What a judge is trained on: items with the labels, and perhaps the thinking, of a gold judge."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from alignment.data.chat import example
from alignment.engines.batch import Sample
from alignment.judges.labels import answer_text, label_of
from alignment.judges.local import JudgeForm
from alignment.judges.questions import Judgeable, Question
from alignment.judges.rows import read_all
from alignment.records import Outcome, Pair, Response, Verdict
from megatron_ext.errors import UserError


@dataclass(frozen=True)
class Labelled:
    """A question and what gold says.

    Attributes:
        gold: a judgement, in the question's order.
    """

    question: Question
    gold: Verdict

    @property
    def label(self) -> str:
        return label_of(self.gold)


def read_labelled(items: Sequence[str], gold: Sequence[str], mirror: bool) -> list[Labelled]:
    """Items of files with the judgements of others; what gold could not judge is left out.

    Args:
        items: files of responses, or of pairs.
        gold: files of verdicts on them.
        mirror: a pair that was judged in one order has the same judgement in the other.

    Raises:
        UserError: a file cannot be used, a verdict is of no item, or there is one label alone.
    """
    known: dict[str, Judgeable] = {}
    for file in items:
        rows: list[Judgeable] = read_all(Path(file), Response, Pair)
        for item in rows:
            if known.setdefault(item.id, item) is not item:
                raise UserError(f"{file} has the item {item.id!r}, which was there before")
    if len({type(item) for item in known.values()}) > 1:
        raise UserError("--input must hold responses alone, or pairs alone")
    verdicts = [v for file in gold for v in read_all(Path(file), Verdict)]
    strange = next((v.item for v in verdicts if v.item not in known), None)
    if strange is not None:
        raise UserError(f"--gold judges the item {strange!r}, which is not in --input")
    found = [
        Labelled(Question(known[v.item], v.swapped, v.sample), v) for v in verdicts if v.judged
    ]
    if not found:
        raise UserError("--gold has no judgement on the items of --input: every verdict failed")
    pairwise = isinstance(found[0].question.item, Pair)
    wrong = next((row for row in found if (row.gold.outcome is Outcome.SCORE) == pairwise), None)
    if wrong is not None:
        raise UserError(
            f"--gold says {wrong.gold.outcome} of {wrong.gold.item!r}, and --input holds "
            f"{'pairs' if pairwise else 'responses'}: give the verdicts that belong to it"
        )
    labels = Counter(row.label for row in found)
    if len(labels) == 1 and not pairwise:
        raise UserError(
            f"all {len(found):,} labels of --gold are {next(iter(labels))}: a judge learns "
            "nothing from one label"
        )
    if mirror and pairwise:
        asked = {(row.gold.item, row.gold.swapped, row.gold.sample) for row in found}
        found += [
            _mirrored(row)
            for row in found
            if (row.gold.item, not row.gold.swapped, row.gold.sample) not in asked
        ]
    return found


def _mirrored(row: Labelled) -> Labelled:
    swapped = not row.gold.swapped
    gold = replace(row.gold, swapped=swapped, thinking="", answer="")
    return Labelled(replace(row.question, swapped=swapped), gold)


@dataclass(frozen=True)
class Encoded:
    """Samples for supervised training, and what was left out.

    Attributes:
        too_long: answers with their questions beyond the length.
        without_thinking: judgements whose thinking is not told.
    """

    samples: Sequence[Sample]
    too_long: int
    without_thinking: int

    def told(self) -> str:
        """In words."""
        parts = [f"{len(self.samples):,} examples"]
        if self.too_long:
            parts.append(f"{self.too_long:,} too long")
        if self.without_thinking:
            parts.append(f"{self.without_thinking:,} without thinking")
        return ", ".join(parts)


def encode(
    rows: Sequence[Labelled], form: JudgeForm, length: int, most_thinking: int | None
) -> Encoded:
    """Questions and answers as token ids, a loss on the answer alone.

    Args:
        length: the most tokens of both.
        most_thinking: tokens of an answer beyond which it is left out: effort, by what is imitated.

    Raises:
        UserError: nothing is left.
    """
    samples, too_long, unthought = [], 0, 0
    for row in rows:
        thinking = row.gold.thinking if form.parser.thinks else None
        if thinking == "":
            unthought += 1
            continue
        messages = form.messages(row.question)
        made = example(form.tokenizer, messages, answer_text(row.label, thinking), **form.template)
        tokens = [*made.prompt, *made.completion]
        too_much = most_thinking is not None and len(made.completion) > most_thinking
        if len(tokens) > length or too_much:
            too_long += 1
            continue
        samples.append(Sample(tokens, len(made.prompt)))
    if not samples:
        reason = "--gold tells no thinking" if unthought else "raise --seq-length"
        raise UserError(f"no example is left of {len(rows):,}: {reason}")
    return Encoded(samples, too_long, unthought)
