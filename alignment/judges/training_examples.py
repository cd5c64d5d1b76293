"""Training examples of a judge: items with the labels, and possibly the thinking, of gold."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from alignment.data.chat_prompts import example
from alignment.data.read_options import ReadOptions
from alignment.engines.batch import TokenSample
from alignment.judges.formats.labels import answer_text, label_of
from alignment.judges.formats.scale import read_verdicts
from alignment.judges.kinds.local_judge import TokenizedJudgeFormat
from alignment.judges.questions import Judgeable, Question
from alignment.judges.results import commonest, reasons_of, require_usable
from alignment.record_files import read_all
from alignment.records import Outcome, Pair, Response, Verdict
from megatron_ext.console import console
from megatron_ext.errors import UserError


@dataclass(frozen=True)
class LabeledQuestion:
    """Question with its gold verdict.

    Attributes:
        question: The question.
        gold: The judgment of gold, in the order of the question.
    """

    question: Question
    gold: Verdict

    @property
    def label(self) -> str:
        """Return the label that agrees with gold."""
        return label_of(self.gold)


def read_labeled_questions(
    items: Sequence[str],
    gold: Sequence[str],
    mirror: bool,
    scale: Sequence[float] | None = None,
    max_left_out: float = 1.0,
    options: ReadOptions | None = None,
) -> list[LabeledQuestion]:
    """Return the items of files with their gold verdicts, except those without a judgment.

    A line on the console says how many items have no verdict, and how many verdicts no judgment.

    Args:
        items: Files of responses, or of pairs.
        gold: Files of verdicts on them, or with labels of people. Verdicts on other items are not
            used.
        mirror: Whether a pair that was judged in one order has the same judgment in the other.
        scale: The lowest and the highest score of gold's scale. Default: 0 and 9.
        max_left_out: Share that may be left out: items without a verdict, and verdicts without a
            judgment.
        options: How files of other projects are read. A limit counts the items.

    Raises:
        UserError: If a file cannot be used, a score is outside of the scale, no verdict is about an
            item, or there is only one label.
        TooFewResults: If more are left out.
    """
    items_by_id: dict[str, Judgeable] = {}
    options = options or ReadOptions()
    for file in items:
        if options.limit is not None and len(items_by_id) >= options.limit:
            break
        rest = None if options.limit is None else options.limit - len(items_by_id)
        judged_items: list[Judgeable] = read_all(
            Path(file), Response, Pair, options=replace(options, limit=rest)
        )
        for item in judged_items:
            if items_by_id.setdefault(item.id, item) is not item:
                raise UserError(
                    f"{file} has the item {item.id!r}, which an earlier file has. Remove one."
                )
    if len({type(item) for item in items_by_id.values()}) > 1:
        raise UserError(
            "--input must contain either only responses or only pairs. Pass one kind of files."
        )
    verdicts = [
        v for file in gold for v in read_verdicts(Path(file), scale, "--gold-scale", options)
    ]
    # Labels of people may stay in one file after its items have been split.
    verdicts = [v for v in verdicts if v.item in items_by_id]
    if not verdicts and options.limit is not None:
        raise UserError(
            f"--gold has no verdict on the first {options.limit:,} items of --input. Raise --limit."
        )
    if not verdicts:
        raise UserError(
            "--gold has no verdict on an item of --input. Pass the verdicts that belong to it."
        )
    rows = [
        LabeledQuestion(Question(items_by_id[v.item], v.swapped, v.sample), v)
        for v in verdicts
        if v.judged
    ]
    missing = len(items_by_id) - len({v.item for v in verdicts})
    reasons, total = reasons_of(verdicts), len(verdicts) + missing
    if (missing or reasons) and os.environ.get("RANK", "0") == "0":
        console.line(
            f"{missing:,} of {len(items_by_id):,} items of {', '.join(map(str, items))} have no "
            f"verdict in --gold, and {len(reasons):,} of {len(verdicts):,} verdicts have no "
            "judgment. They are left out."
        )
    limit = min(max_left_out, 1 - 1 / total)  # at least one judgment
    reasons += ["no verdict in --gold"] * missing
    what = "examples of --input and --gold" if missing else "verdicts of --gold"
    require_usable(reasons, total, limit, what)
    pairwise = isinstance(rows[0].question.item, Pair)
    wrong = next((row for row in rows if (row.gold.outcome is Outcome.SCORE) == pairwise), None)
    if wrong is not None:
        raise UserError(
            f"--gold has the outcome {wrong.gold.outcome} for {wrong.gold.item!r}, and --input "
            f"holds {'pairs' if pairwise else 'responses'}. Pass the verdicts that belong to it."
        )
    labels = Counter(row.label for row in rows)
    if len(labels) == 1 and not pairwise:
        raise UserError(
            f"All {len(rows):,} labels of --gold are {next(iter(labels))}, and a judge learns "
            "nothing from one label. Pass verdicts with several."
        )
    if mirror and pairwise:
        judged = {(row.gold.item, row.gold.swapped, row.gold.sample) for row in rows}
        rows += [
            _mirrored(row)
            for row in rows
            if (row.gold.item, not row.gold.swapped, row.gold.sample) not in judged
        ]
    return rows


def _mirrored(row: LabeledQuestion) -> LabeledQuestion:
    swapped = not row.gold.swapped
    gold = replace(row.gold, swapped=swapped, thinking="", answer="")
    return LabeledQuestion(replace(row.question, swapped=swapped), gold)


@dataclass(frozen=True)
class Encoded:
    """Samples for supervised training, with the number of examples that were left out.

    Attributes:
        samples: The samples.
        too_long: Number of answers that are too long together with their question.
        too_much_thinking: Number of answers whose thinking exceeds the limit of the user.
        without_thinking: Number of judgments without thinking, where thinking must be learned.
        rounded: Number of samples whose score lies between two labels, trained with the nearest.
    """

    samples: Sequence[TokenSample]
    too_long: int
    too_much_thinking: int
    without_thinking: int
    rounded: int

    def summary(self) -> str:
        """Return the counts as text."""
        counts = {
            "too long": self.too_long,
            "beyond --max-thinking-tokens": self.too_much_thinking,
            "without thinking": self.without_thinking,
            "of a score between two labels, trained with the nearest (halves up)": self.rounded,
        }
        parts = [f"{count:,} {description}" for description, count in counts.items() if count]
        return ", ".join([f"{len(self.samples):,} examples", *parts])


def encode(
    rows: Sequence[LabeledQuestion],
    judge_format: TokenizedJudgeFormat,
    length: int,
    most_thinking: int | None,
    max_left_out: float = 1.0,
) -> Encoded:
    """Encode questions and answers as token ids, with a loss on the answer alone.

    Args:
        rows: The labeled questions.
        judge_format: The format of the judge.
        length: Maximum number of tokens of a question and its answer.
        most_thinking: Maximum number of tokens of an answer, or None; longer ones are left out.
        max_left_out: Share of the examples that may be left out for other reasons.

    Raises:
        UserError: If no example remains.
        TooFewResults: If a larger share is left out.
    """
    samples, lacking, too_long, too_much, rounded = [], [], 0, 0, 0
    for row in rows:
        thinking = row.gold.thinking if judge_format.parser.thinks else None
        if thinking == "":
            lacking.append("--gold has no thinking")
            continue
        tokens_of = example(
            judge_format.tokenizer,
            judge_format.messages(row.question.item, row.question.swapped),
            answer_text(row.label, thinking),
            **judge_format.chat_template_kwargs,
        )
        tokens = [*tokens_of.prompt, *tokens_of.completion]
        if most_thinking is not None and len(tokens_of.completion) > most_thinking:
            too_much += 1
        elif len(tokens) > length:
            lacking.append(f"longer than --seq-length {length}, which can be raised")
            too_long += 1
        else:
            samples.append(TokenSample(tokens, len(tokens_of.prompt)))
            rounded += row.gold.score is not None and row.gold.score != float(row.label)
    require_usable(lacking, len(rows), max_left_out, "examples of --input and --gold")
    if not samples:
        reason = (
            f"because of: {commonest(lacking)}" if lacking else "so raise --max-thinking-tokens"
        )
        raise UserError(f"No example of {len(rows):,} remains, {reason}.")
    return Encoded(samples, too_long, too_much, len(lacking) - too_long, rounded)
