"""Flags of `et-align data show`."""

from dataclasses import dataclass

from alignment.commands.config_groups import JudgeFormatConfig
from alignment.commands.rows_config import RowsConfig
from megatron_ext.errors import UserError
from megatron_ext.typed_flags import flag, group


@dataclass(frozen=True, kw_only=True)
class ShowConfig:
    """Flags of `et-align data show`: print rows as a model sees them."""

    file: str = flag(positional=True, metavar="FILE")
    """File or folder of prompts, responses or pairs, of this project or of a known schema."""
    model: str | None = flag(None, metavar="DIR")
    """Folder of the model whose tokenizer and chat template are applied to the rows. Default: none;
    messages are printed without a template, and tokens are not counted."""
    chat_template: str | None = flag(None, metavar="FILE")
    """Jinja file of the chat template. Default: the tokenizer's own."""
    chat_template_kwargs: str = flag("{}", metavar="JSON")
    """Variables of the chat template as a JSON object, such as {"enable_thinking": false}."""
    seq_length: int | None = flag(None, metavar="TOKENS", at_least=1)
    """Length in tokens above which training leaves a row out. Default: none."""
    judge: bool = flag(False)
    """Print what a judge receives, with the label of people as its answer. Implied by
    --template."""
    format: JudgeFormatConfig = group()
    rows: RowsConfig = group(limit=3)

    def __post_init__(self) -> None:
        if self.model is None:
            for option, is_set in (
                ("--chat-template", self.chat_template is not None),
                ("--chat-template-kwargs", self.chat_template_kwargs != "{}"),
                ("--seq-length", self.seq_length is not None),
            ):
                if is_set:
                    raise UserError(f"{option} requires --model. Add it, or leave {option} out.")
