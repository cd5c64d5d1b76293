"""Let a model that is at hand answer prompts, on the ranks of this command.

    et-align generate --model DIR --input PROMPTS.jsonl --output RESPONSES.jsonl [--samples N]

Under torchrun the ranks hold the model by the flags of training; the answers are the same on any
number of them. For a model behind an address there is `et-align annotate --generate`.
"""

import argparse
import sys
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import torch.distributed as dist

from alignment.commands import training_flags as flags
from alignment.data.chat_prompts import prompt_ids, warn_of_template
from alignment.data.model_tokenizer import load_tokenizer
from alignment.judges.kinds.local_judge import model_digest
from alignment.output_file import OutputFile
from alignment.ranks import map_over_data_ranks
from alignment.record_files import read_all
from alignment.records import Prompt, Response
from alignment.rl.judge_rewards import text_of
from alignment.seeds import derive_seed
from megatron_ext.errors import TooFewResults, ToolParser, UserError
from megatron_ext.inference.sampling import Sampling
from megatron_ext.progress import Progress
from megatron_ext.recipes import expand_recipes


def main(argv: Sequence[str]) -> int:
    options = _parse(argv)
    prompts = read_all(Path(options.input), Prompt)
    chat_template = Path(options.chat_template) if options.chat_template else None
    tokenizer = load_tokenizer(Path(options.model), chat_template)
    template = flags.template_kwargs(options)
    if prompts:
        warn_of_template("generate", tokenizer, prompts[0].messages, template, trains=False)
    engine = flags.engine_of(options, 0)
    sampling = Sampling(
        options.max_new_tokens, options.temperature or 1.0, options.top_k, options.top_p,
        greedy=options.temperature == 0,
    )  # fmt: skip
    depends = [sampling, tokenizer.chat_template, sorted(template.items()), options.seed]
    identity = sha256(f"{model_digest(options.model)}{depends}".encode()).hexdigest()
    output = OutputFile(
        Path(options.output), Path(options.input), options.overwrite, samples=options.samples
    )
    output.check_or_create(
        identity, "model"
    )  # on all ranks, of which none then waits for one that refuses

    def answers(part: Sequence[tuple[Prompt, int]]) -> list[str]:
        ids = [prompt_ids(tokenizer, prompt.messages, **template) for prompt, _ in part]
        seeds = [derive_seed(options.seed, prompt.id, sample) for prompt, sample in part]
        return [text_of(tokenizer, found) for found in engine.generate(ids, sampling, seeds)]

    asked = [(prompt, sample) for prompt in prompts for sample in range(options.samples)]
    rows, at_once = [], options.rows * engine.data_size
    with Progress("generating", len(asked), "responses") as progress:
        for begin in range(0, len(asked), at_once):
            part = asked[begin : begin + at_once]
            for (prompt, sample), text in zip(part, map_over_data_ranks(engine, part, answers)):
                # `evaluate` takes files of several policies, whose ids must differ.
                name = f"{prompt.id}-{sample}-{identity[:8]}"
                rows.append(Response(name, prompt, text, options.source or options.model))
            if dist.get_rank() == 0:
                progress.update(len(rows))
    if dist.get_rank() == 0:
        output.write(rows, {"model": options.model})
        print(f"{len(rows):,} responses; wrote {options.output}", file=sys.stdout)
    dist.barrier()  # rank 0 has written before any rank ends the command
    if not any(row.text.strip() for row in rows):
        raise TooFewResults(
            f"all {len(rows):,} responses are empty: --model {options.model} ends every one at its "
            "first token"
        )
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = ToolParser(
        prog="et-align generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    # fmt: off
    add = parser.add_argument_group("responses").add_argument
    add("--input", required=True, metavar="FILE", help="prompts")
    add("--output", required=True, metavar="FILE", help="responses to write")
    add("--overwrite", action="store_true", help="replace an --output that was made otherwise")
    add("--samples", type=int, default=1, metavar="N", help="responses a prompt (%(default)s)")
    add("--source", metavar="NAME", help="of the responses (the model's folder)")
    add("--seed", type=int, default=0)
    add("--max-new-tokens", type=int, default=2048, metavar="N", help="(%(default)s)")
    add("--temperature", type=float, default=0.7, help="0 takes the likeliest (%(default)s)")
    add("--top-k", type=int, default=0, help="(%(default)s)")
    add("--top-p", type=float, default=1.0, help="(%(default)s)")
    add("--rows", type=int, default=64, metavar="N", help="at a time on a rank (%(default)s)")
    # fmt: on
    flags.add_engine_flags(parser)
    options = parser.parse_args(expand_recipes(argv, parser))
    flags.check(options)
    if options.samples < 1 or options.rows < 1:
        raise UserError("--samples and --rows must be at least 1")
    if options.samples > 1 and options.temperature == 0:
        raise UserError(f"--samples {options.samples} would give the same responses again")
    return options
