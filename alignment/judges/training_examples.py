"""What a judge is trained on: items with the labels, and perhaps the thinking, of a gold judge."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from alignment.data.chat_prompts import example
from alignment.engines.batch import TokenSample
from alignment.judges.formats.labels import answer_text, label_of
from alignment.judges.formats.scale import read_verdicts
from alignment.judges.kinds.local_judge import TokenizedJudgeFormat
from alignment.judges.questions import Judgeable, Question
from alignment.judges.results import commonest, reasons_of, require_usable
from alignment.record_files import read_all
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


def read_labelled(
    items: Sequence[str],
    gold: Sequence[str],
    mirror: bool,
    scale: Sequence[float] | None = None,
    max_left_out: float = 1.0,
) -> list[Labelled]:
    """Items of files with the judgements of others; what gold could not judge is left out.

    Args:
        items: files of responses, or of pairs.
        gold: files of verdicts on them.
        mirror: a pair that was judged in one order has the same judgement in the other.
        scale: of gold's scores, which are mapped to 0 to 9; 0 to 9 by default.
        max_left_out: share of the verdicts that may be no judgement.

    Raises:
        UserError: a file cannot be used, a score is outside of the scale, a verdict is of no item,
            or there is one label alone.
        TooFewResults: more verdicts than that are no judgement.
    """
    known: dict[str, Judgeable] = {}
    for file in items:
        rows: list[Judgeable] = read_all(Path(file), Response, Pair)
        for item in rows:
            if known.setdefault(item.id, item) is not item:
                raise UserError(f"{file} has the item {item.id!r}, which was there before")
    if len({type(item) for item in known.values()}) > 1:
        raise UserError("--input must hold responses alone, or pairs alone")
    verdicts = [v for file in gold for v in read_verdicts(Path(file), scale, "--gold-scale")]
    strange = next((v.item for v in verdicts if v.item not in known), None)
    if strange is not None:
        raise UserError(f"--gold judges the item {strange!r}, which is not in --input")
    found = [
        Labelled(Question(known[v.item], v.swapped, v.sample), v) for v in verdicts if v.judged
    ]
    limit = min(max_left_out, 1 - 1 / len(verdicts))  # one judgement at least
    require_usable(reasons_of(verdicts), len(verdicts), limit, "verdicts of --gold")
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
    """Samples for supervised training, and how many examples were left out.

    Attributes:
        too_long: answers with their questions beyond the length.
        too_much_thinking: answers beyond the limit of thinking that the user set.
        without_thinking: judgements without the thinking that is to be learned.
        rounded: samples of scores between two labels, which are taught as the nearest one.
    """

    samples: Sequence[TokenSample]
    too_long: int
    too_much_thinking: int
    without_thinking: int
    rounded: int

    def told(self) -> str:
        """In words."""
        counts = {
            "too long": self.too_long,
            "beyond --max-thinking-tokens": self.too_much_thinking,
            "without thinking": self.without_thinking,
            "of a score between two labels, taught as the nearest (halves up)": self.rounded,
        }
        parts = [f"{count:,} {what}" for what, count in counts.items() if count]
        return ", ".join([f"{len(self.samples):,} examples", *parts])


def encode(
    rows: Sequence[Labelled],
    judge_format: TokenizedJudgeFormat,
    length: int,
    most_thinking: int | None,
    max_left_out: float = 1.0,
) -> Encoded:
    """Encode questions and answers as token ids, with a loss on the answer alone.

    Args:
        length: the most tokens of both.
        most_thinking: tokens of an answer beyond which it is left out: effort, by what is imitated.
        max_left_out: share of the examples that may be left out otherwise.

    Raises:
        UserError: nothing is left.
        TooFewResults: more than that share is left out.
    """
    samples, lacking, too_long, too_much, rounded = [], [], 0, 0, 0
    for row in rows:
        thinking = row.gold.thinking if judge_format.parser.thinks else None
        if thinking == "":
            lacking.append("--gold has no thinking")
            continue
        made = example(
            judge_format.tokenizer,
            judge_format.messages(row.question.item, row.question.swapped),
            answer_text(row.label, thinking),
            **judge_format.chat_template_kwargs,
        )
        tokens = [*made.prompt, *made.completion]
        if most_thinking is not None and len(made.completion) > most_thinking:
            too_much += 1
        elif len(tokens) > length:
            lacking.append(f"longer than --seq-length {length}: raise it")
            too_long += 1
        else:
            samples.append(TokenSample(tokens, len(made.prompt)))
            rounded += row.gold.score is not None and row.gold.score != float(row.label)
    require_usable(lacking, len(rows), max_left_out, "examples of --input and --gold")
    if not samples:
        reason = commonest(lacking) if lacking else "raise --max-thinking-tokens"
        raise UserError(f"no example is left of {len(rows):,}: {reason}")
    return Encoded(samples, too_long, too_much, len(lacking) - too_long, rounded)
