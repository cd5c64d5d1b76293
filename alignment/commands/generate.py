"""Command `et-align generate`; its help is in `generate_config`."""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import torch.distributed as dist

from alignment.commands.generate_config import GenerateConfig, parse
from alignment.commands.training_setup import start_engine
from alignment.data.chat_prompts import prompt_ids, warn_of_template
from alignment.data.model_tokenizer import load_tokenizer
from alignment.judges.kinds.local_judge import model_digest
from alignment.output_file import OutputFile
from alignment.ranks import map_over_data_ranks
from alignment.record_files import read_all
from alignment.records import Prompt, Response
from alignment.rl.judge_rewards import text_of
from alignment.seeds import derive_seed
from megatron_ext.errors import TooFewResults
from megatron_ext.inference.sampling import Sampling
from megatron_ext.progress import Progress


def main(argv: Sequence[str]) -> int:
    """Parse the flags and run the command."""
    return run(parse(argv))


def run(config: GenerateConfig) -> int:
    """Generate the responses and write them; return the exit status.

    Raises:
        UserError: The input, the output or the model cannot be used.
        TooFewResults: All responses are empty.
    """
    files, model = config.files, config.model.model
    prompts = read_all(Path(files.input), Prompt, options=config.rows.options)
    tokenizer = load_tokenizer(config.model.model_folder, config.model.chat_template_file)
    template = config.model.template_variables
    if prompts:
        warn_of_template("generate", tokenizer, prompts[0].messages, template, trains=False)
    engine = start_engine(model, config.engine)
    sampling = Sampling(
        config.sampling.max_new_tokens,
        config.sampling.temperature or 1.0,
        config.sampling.top_k,
        config.sampling.top_p,
        greedy=config.sampling.temperature == 0,
    )
    depends = [sampling, tokenizer.chat_template, sorted(template.items()), config.seed]
    identity = sha256(f"{model_digest(model)}{depends}".encode()).hexdigest()
    output = OutputFile(
        Path(files.output), Path(files.input), files.overwrite, samples=config.samples
    )
    # On all ranks, so that none waits for one that refuses.
    output.check_or_create(identity, "model")

    def generate(part: Sequence[tuple[Prompt, int]]) -> list[str]:
        ids = [prompt_ids(tokenizer, prompt.messages, **template) for prompt, _ in part]
        seeds = [derive_seed(config.seed, prompt.id, sample) for prompt, sample in part]
        return [text_of(tokenizer, rollout) for rollout in engine.generate(ids, sampling, seeds)]

    questions = [(prompt, sample) for prompt in prompts for sample in range(config.samples)]
    responses: list[Response] = []
    at_once = config.sampling.generation_batch_size * engine.data_size
    with Progress("generating", len(questions), "responses") as progress:
        for begin in range(0, len(questions), at_once):
            part = questions[begin : begin + at_once]
            for (prompt, sample), text in zip(part, map_over_data_ranks(engine, part, generate)):
                # `evaluate` takes files of several policies, whose ids must differ.
                name = f"{prompt.id}-{sample}-{identity[:8]}"
                responses.append(Response(name, prompt, text, config.source or model))
            if dist.get_rank() == 0:
                progress.update(len(responses))
    if dist.get_rank() == 0:
        output.write(responses, {"model": model})
        print(f"Wrote {len(responses):,} responses to {files.output}.")
    dist.barrier()  # rank 0 has written before any rank ends the command
    if not any(response.text.strip() for response in responses):
        raise TooFewResults(
            f"All {len(responses):,} responses are empty: --model {model} ends each of them at its "
            "first token. Check the model and its chat template."
        )
    return 0
