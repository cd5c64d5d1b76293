"""Judges whose model runs on the ranks, made from the configuration of a command."""

from alignment.commands.config_groups import JudgeAnswerConfig, JudgeFormatConfig, ModelConfig
from alignment.data.model_tokenizer import load_tokenizer
from alignment.engines.protocol import AlignmentEngine
from alignment.judges.formats.judge_format import JudgeFormat
from alignment.judges.kinds.local_judge import (
    LocalJudge,
    TokenizedJudgeFormat,
    local_judge_identity,
)
from megatron_ext.inference.sampling import Sampling


def load_judge_format(
    model: ModelConfig, config: JudgeFormatConfig, pairwise: bool
) -> TokenizedJudgeFormat:
    """Return the format of a judge, with the tokenizer of its model.

    Raises:
        UserError: The template is of the other kind, or the tokenizer has no chat template.
    """
    judge_format = JudgeFormat.create(pairwise, config.template, config.thinking)
    tokenizer = load_tokenizer(model.model_folder, model.chat_template_file)
    return TokenizedJudgeFormat.from_format(judge_format, tokenizer, model.template_variables)


def make_local_judge(
    model: str,
    config: JudgeAnswerConfig,
    engine: AlignmentEngine,
    judge_format: TokenizedJudgeFormat,
    seq_length: int,
    identity: str | None = None,
) -> LocalJudge:
    """Return the judge whose model the engine holds.

    Args:
        model: Folder of the model.
        config: Flags of the answers.
        engine: Engine of the model.
        judge_format: Format of the judge.
        seq_length: Longest question with its answer, in tokens.
        identity: Hash of all that verdicts depend on. Default: computed from the model's files.
    """
    sampling = Sampling(
        max_new_tokens=config.max_new_tokens,
        temperature=config.judging_temperature or 1.0,
        greedy=config.judging_temperature == 0,
        top_k=config.judging_top_k,
        top_p=config.judging_top_p,
    )
    if identity is None:
        identity = local_judge_identity(model, judge_format, sampling)
    rows = config.generation_batch_size
    return LocalJudge(engine, judge_format, seq_length, sampling, rows, identity)
