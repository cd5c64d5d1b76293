"""Judge format: the prompt template of a judge together with the parser of its answer."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from alignment.judges.formats.parsing import Parser
from alignment.judges.formats.prompts import JudgePrompt, judge_prompt
from alignment.records import Message, Pair, Prompt, Response
from megatron_ext.errors import UserError

THINKING_MODES = ("none", "asked", "opened")
"""How a judge thinks before its label: not at all, as its prompt requests, or after the opening tag
that the chat template of its model has written."""


@dataclass(frozen=True)
class JudgeFormat:
    """Prompt template of a judge together with the parser of its answer.

    Attributes:
        prompt: The template of the messages that the judge receives.
        parser: The parser of its answers.
    """

    prompt: JudgePrompt
    parser: Parser

    @classmethod
    def create(
        cls,
        pairwise: bool,
        template: str | None = None,
        thinking: str = "none",
        source: str = "--template",
    ) -> "JudgeFormat":
        """Create the format of a judge of responses or of pairs.

        Args:
            pairwise: Whether the judge compares pairs instead of scoring responses.
            template: Name or path of the prompt template. Default: the plain template.
            thinking: One of `THINKING_MODES`.
            source: The flag or file that names the template, for the error message.

        Raises:
            UserError: If the template does not exist, is invalid, or is of the other kind.
        """
        kind = "pairwise" if pairwise else "pointwise"
        thinks = thinking != "none"
        prompt = judge_prompt(template or kind, thinks)
        if prompt.kind != kind:
            items = "pairs" if pairwise else "responses"
            raise UserError(
                f"{source} {template} is a {prompt.kind} template, but the judge receives {items}. "
                f"Choose a {kind} template."
            )
        return cls(prompt, Parser(pairwise, thinks, thinking == "opened"))

    @property
    def identity(self) -> str:
        """Return a hash of everything on which the messages and their parsing depend."""
        return sha256(json.dumps([self.prompt.identity, self.parser.identity]).encode()).hexdigest()

    def messages(self, item: Prompt | Response | Pair, swapped: bool = False) -> list[Message]:
        """Return the messages that ask about an item.

        Args:
            item: The response or the pair.
            swapped: Whether to show the second response of a pair first.
        """
        return self.prompt.messages(item, swapped)

    def read(
        self, text: str, swapped: bool = False, thinking_is_separate: bool = False
    ) -> Mapping[str, Any]:
        """Return the fields of the verdict in an answer, such as its outcome and score.

        Args:
            text: The answer.
            swapped: Whether the second response of the pair was shown first. The preferred side is
                returned in the order of the pair.
            thinking_is_separate: Whether the endpoint returned the thinking in a separate field, so
                that the text is the label alone.
        """
        parser = Parser(self.parser.pairwise) if thinking_is_separate else self.parser
        return parser.read(text, swapped)
