"""Command `et-align data show`; its help is in `data_show_config`."""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from alignment.commands.config_groups import ModelConfig
from alignment.commands.data_show_config import ShowConfig
from alignment.data.chat_prompts import example, prompt_ids
from alignment.data.dataset_schemas import RecordFile
from alignment.data.model_tokenizer import load_tokenizer
from alignment.data.people_labels import PersonLabel
from alignment.data.rendered_rows import printable, segments_of, write_segments
from alignment.data.source_row import LabeledRecord
from alignment.judges.formats.judge_format import JudgeFormat
from alignment.judges.formats.labels import answer_text, label_of
from alignment.record_files import describe
from alignment.records import Message, Outcome, Pair, Prompt, Response, Side, Verdict
from megatron_ext.data.row_files import MalformedRow, expand_row_files
from megatron_ext.errors import UserError

_METADATA_CHARACTERS = 60


def show_rows(config: ShowConfig) -> None:
    """Print the first rows of a file as a model sees them.

    Raises:
        UserError: The file or the model cannot be used, or no row that is shown.
    """
    tokenizer, variables = None, {}
    if config.model is not None:
        model = ModelConfig(
            model=config.model,
            chat_template=config.chat_template,
            chat_template_kwargs=config.chat_template_kwargs,
        )
        tokenizer = load_tokenizer(model.model_folder, model.chat_template_file)
        variables = model.template_variables
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    printer = _Printer(config, tokenizer, variables, color)
    if tokenizer is not None:
        print(_legend(color))
    left, usable = config.rows.limit, 0
    for path in expand_row_files([config.file], "FILE"):
        file, count, malformed = RecordFile(path, options=config.rows.options), 0, 0
        for item in islice(file.read(), left):
            if isinstance(item, MalformedRow):
                print(f"\n{path}, {item}. No command can use this row.")
                malformed += 1
            else:
                printer.show(item)
            count += 1
        left = None if left is None else left - count
        usable += count - malformed
        if file.schema is not None:
            print(f"\n{describe(file, count - malformed)}")
    if not usable:
        raise UserError(
            f"{config.file} has no row that can be used among those shown. Correct the rows, or "
            "name their columns with --columns."
        )


def _legend(color: bool) -> str:
    if color:
        return (
            "Control tokens are \x1b[35;1mmagenta\x1b[0m, and tokens that are trained on are "
            "\x1b[32mgreen\x1b[0m."
        )
    return (
        "Control tokens are in [brackets], and tokens that are trained on between [trained: and "
        ":trained]."
    )


@dataclass
class _Printer:
    """Printer of rows.

    Attributes:
        config: Flags of the command.
        tokenizer: Tokenizer of the model; None without one.
        variables: Variables of the chat template.
        color: Whether the output has colors.
    """

    config: ShowConfig
    tokenizer: Any
    variables: dict[str, Any]
    color: bool
    _formats: dict[bool, JudgeFormat] = field(default_factory=dict)

    def show(self, item: LabeledRecord) -> None:
        """Print a record.

        Raises:
            UserError: The template of the judge or of the chat cannot be used for it.
        """
        record = item.record
        if isinstance(record, Verdict):
            raise UserError(
                f"{self.config.file} has verdicts, which no model sees. Show the items that were "
                "judged."
            )
        for title, messages, answer in self._views(item):
            name = type(record).__name__.lower()
            print(f"\n--- row {item.number:,}: {name} {record.id}{title}")
            if self.tokenizer is None:
                self._print_messages(messages, answer)
            else:
                self._print_tokens(messages, answer)
        prompt = record if isinstance(record, Prompt) else record.prompt
        if prompt.metadata:
            columns = (f"{k}={_short(v)}" for k, v in prompt.metadata.items())
            print(f"metadata: {', '.join(columns)}")
        if item.labels:
            print(f"labels of people: {', '.join(map(_label, item.labels))}")

    def _views(self, item: LabeledRecord) -> Iterator[tuple[str, Sequence[Message], str | None]]:
        """Yield a title, the messages and the trained answer of each text made from a record."""
        record = item.record
        assert not isinstance(record, Verdict)
        if self.config.judge or self.config.format.template:
            if isinstance(record, Prompt):
                raise UserError(
                    f"{self.config.file} has prompts, and a judge receives responses or pairs. "
                    "Leave out --template and --judge."
                )
            judge_format = self._format(isinstance(record, Pair))
            yield ", as a judge sees it", judge_format.messages(record), self._label(item)
        elif isinstance(record, Prompt):
            yield "", record.messages, None
        elif isinstance(record, Response):
            yield "", record.prompt.messages, record.text
        else:
            for side, text in ((Side.FIRST, record.first), (Side.SECOND, record.second)):
                preferred = " (preferred)" if record.preferred is side else ""
                yield f", {side} response{preferred}", record.prompt.messages, text

    def _format(self, pairwise: bool) -> JudgeFormat:
        if pairwise not in self._formats:
            settings = self.config.format
            self._formats[pairwise] = JudgeFormat.create(
                pairwise, settings.template, settings.thinking
            )
        return self._formats[pairwise]

    def _label(self, item: LabeledRecord) -> str | None:
        """Return the answer that a judge learns from the first label of an item, if any."""
        usable = [x for x in item.labels if x.outcome is not Outcome.SCORE or x.is_scaled]
        if not usable or self.config.format.thinking != "none":
            return None
        label = usable[0]
        verdict = Verdict("item", label.outcome, label.score, label.preferred)
        return answer_text(label_of(verdict), None)

    def _print_messages(self, messages: Sequence[Message], answer: str | None) -> None:
        for message in messages:
            print(f"[{message.role}]\n{printable(message.content)}")
        if answer is not None:
            print(f"[assistant, trained]\n{printable(answer)}")

    def _print_tokens(self, messages: Sequence[Message], answer: str | None) -> None:
        prompt, completion = [], []
        if answer is None:
            prompt = prompt_ids(self.tokenizer, messages, **self.variables)
        else:
            whole = example(self.tokenizer, messages, answer, **self.variables)
            prompt, completion = whole.prompt, whole.completion
        print(write_segments(segments_of(self.tokenizer, prompt, completion), self.color))
        total = len(prompt) + len(completion)
        counts = f"{total:,} tokens: {len(prompt):,} of the prompt, {len(completion):,} trained"
        limit = self.config.seq_length
        if limit is not None and total > limit:
            counts += (
                f"; {total - limit:,} more than --seq-length {limit}, so training leaves it out"
            )
        print(f"({counts})")


def _short(value: Any) -> str:
    text = printable(repr(value))
    if len(text) <= _METADATA_CHARACTERS:
        return text
    return f"{text[:_METADATA_CHARACTERS]}... ({len(text):,} characters)"


def _label(label: PersonLabel) -> str:
    value = label.preferred or label.outcome
    if label.score is not None:
        value = f"{label.score:g}"  # type: ignore[assignment]
    return f"{value} by {label.annotator}"
