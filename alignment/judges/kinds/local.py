"""Judge kind "local": a model on the ranks of the policy."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from alignment.judges.formats.judge_format import JudgeFormat
from alignment.judges.kinds.judge_kind import MAY_CHANGE, JudgeConfig, JudgeContext
from megatron_ext.errors import UserError

if TYPE_CHECKING:
    from alignment.judges.kinds.local_judge import LocalJudge


class LocalJudgeConfig(JudgeConfig):
    """Description of a judge whose model is resident on the ranks of a training run.

    Attributes:
        model: Folder of the model.
        template: Name or file of the prompt template. Default: the plain one.
        thinking: Whether the judge thinks: "none", "asked" in its prompt, or "opened" by the chat
            template of its model.
        temperature: Sampling temperature of the thinking; 0 selects the likeliest tokens.
        top_k: Number of likeliest tokens from which the thinking is sampled; 0 for all.
        top_p: Total probability of the likeliest tokens from which the thinking is sampled.
        max_new_tokens: Maximum number of tokens of the thinking with its label.
        length: Maximum number of tokens of a question and its answer.
        generation_batch_size: Number of questions per batch on a rank.
        chat_template: File of a chat template. Default: that of the model.
        chat_template_kwargs: Variables of the chat template.
    """

    kind: Literal["local"] = "local"
    model: Annotated[str, Field(min_length=1)]
    template: str | None = None
    thinking: Literal["none", "asked", "opened"] = "none"
    temperature: Annotated[float, Field(ge=0)] = 0.7
    top_k: Annotated[int, Field(ge=0)] = 20
    top_p: Annotated[float, Field(gt=0)] = 0.95
    max_new_tokens: Annotated[int, Field(ge=1)] = 4096
    length: Annotated[int, Field(ge=1)] = 8192
    generation_batch_size: Annotated[int, Field(ge=1), MAY_CHANGE] = 32
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    def open(self, context: JudgeContext) -> "LocalJudge":
        """Return the judge, whose model is loaded onto the ranks.

        Raises:
            UserError: If the model, its template or its tokenizer cannot be used, or the command
                has no ranks.
        """
        if context.load_engine is None:
            raise UserError(
                f"The judge {self.name} is a local model, which this command does not load. Run "
                "et-align judge instead, or serve the model and name its address."
            )
        from alignment.data.model_tokenizer import load_tokenizer
        from alignment.judges.kinds.local_judge import (
            LocalJudge,
            TokenizedJudgeFormat,
            local_judge_identity,
        )
        from megatron_ext.inference.sampling import Sampling

        source = f"The judge {self.name}: template"
        chat_template = Path(self.chat_template) if self.chat_template else None
        judge_format = TokenizedJudgeFormat.from_format(
            JudgeFormat.create(context.pairwise, self.template, self.thinking, source),
            load_tokenizer(Path(self.model), chat_template),
            self.chat_template_kwargs,
        )
        sampling = Sampling(
            self.max_new_tokens,
            self.temperature or 1.0,
            self.top_k,
            self.top_p,
            greedy=self.temperature == 0,
        )
        identity = local_judge_identity(self.model, judge_format, sampling)
        engine = context.load_engine(self.model)
        return LocalJudge(
            engine, judge_format, self.length, sampling, self.generation_batch_size, identity
        )

    def content_hashes(self) -> dict[str, Any]:
        """Return hashes of the model, its chat template and the prompt template."""
        from alignment.judges.kinds.local_judge import model_digest

        model_template = Path(self.model, "chat_template.jinja")
        chat_template = self.chat_template or (model_template if model_template.is_file() else None)
        return {
            "model": model_digest(self.model),
            "chat_template": chat_template and self.hash_file(chat_template),
            **self.hash_template(self.template),
        }

    @property
    def report_kind(self) -> str:
        """Return the word for this judge in reports, by whether it thinks."""
        return "label" if self.thinking == "none" else "thinking"
