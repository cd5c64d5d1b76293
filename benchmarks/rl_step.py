"""Compare a step of reinforcement learning and of supervised fine-tuning with TRL.

A Llama of 28 million parameters with random weights, in fp32 on CPU cores, samples 64 responses of
64 tokens to prompts of 32 tokens, rewards them by a function, and takes one optimizer step of GRPO.
TRL does the same with the same weights, prompts, group size, micro-batches and clipping. The two
run in turn, `--pairs` times, so that other load on the machine affects both. Every pair also times
a step of supervised fine-tuning on 64 samples of the same lengths.

    rollout, judging, training   seconds of a step, median over the steps of all pairs
    step                         seconds of the whole step, median
    cpu                          processor seconds of the step on rank 0, median; other load on the
                             machine affects them much less than seconds
    ratio                        step of TRL over that of this project, median over pairs; above 1
                             this project is faster
    cpu ratio                    the same ratio of processor seconds

TRL requires a separate Python environment:

    python -m venv runs/trl
    runs/trl/bin/pip install trl==1.16.0 torch==2.13.0 transformers==5.23.0

    python benchmarks/rl_step.py --trl-python runs/trl/bin/python [--engine deepspeed] [--ranks 2]
        [--pairs 3] [--steps 3] [--seq-length 96] [--micro-batch 8]

Without --trl-python it times this project alone.

    python benchmarks/rl_step.py --kinds weights --vllm-python .venv-vllm/bin/python [--steps 3]

times each --weight-transfer of a policy of 163 million parameters to a vLLM server on this machine:

    prepare   seconds in which the training writes or packs the weights, while the server answers
    update    seconds from the pause of the server until it answers again, with the new weights
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, os.fspath(ROOT))

from benchmarks._weight_transfer import weight_rows  # noqa: E402

VOCAB = 32000
PARTS = ("rollout", "judging", "training", "seconds", "cpu")


def make_inputs(folder: Path, options: argparse.Namespace) -> None:
    """Write the model, its tokenizer (a word per token), prompts, and samples to fine-tune on."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocab = {f"w{number}": number for number in range(VOCAB - 1)} | {"<end>": VOCAB - 1}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<end>", pad_token="<end>"
    )
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=384,
        intermediate_size=1152,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=VOCAB - 1,
        bos_token_id=None,
        pad_token_id=VOCAB - 1,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    draw = random.Random(0)
    size = options.prompt_tokens
    prompts = [[draw.randrange(VOCAB - 1) for _ in range(size)] for _ in range(256)]
    (folder / "prompts.json").write_text(json.dumps(prompts))
    length = size + options.new_tokens
    samples = [[draw.randrange(VOCAB - 1) for _ in range(length)] for _ in range(256)]
    (folder / "sft.json").write_text(json.dumps(samples))


def our_steps(settings: dict[str, Any]) -> None:
    """Run steps of this project on this rank; rank 0 prints one JSON object per step."""
    from megatron_ext.devices import activate

    activate()
    import torch

    torch.set_num_threads(settings["threads"])
    from alignment.engines.batch import TokenSample
    from alignment.engines.protocol import AlignmentEngine, Optimization
    from alignment.rl.algorithms import algorithm_by_name
    from alignment.rl.rollouts import RewardResult
    from alignment.rl.tasks import PromptTask, RLSettings
    from alignment.rl.train import RLComponents, train
    from alignment.training.loop import TrainingSchedule, fit
    from alignment.training.sft import SupervisedStep
    from alignment.training.training_run import TrainingRun
    from megatron_ext.inference.sampling import Sampling

    folder, steps = Path(settings["folder"]), settings["steps"]
    optimization = Optimization(lr=settings["lr"], steps=1000, weight_decay=0.0)
    engine: AlignmentEngine
    if settings["engine"] == "deepspeed":
        from alignment.engines.deepspeed import DeepSpeedEngine, ZeroSettings

        zero = ZeroSettings(1, micro_batch=settings["micro_batch"])
        engine = DeepSpeedEngine(folder / "model", optimization, zero)
    else:
        from alignment.engines.megatron import MegatronEngine, MegatronLayout

        layout = MegatronLayout(micro_batch=settings["micro_batch"])
        engine = MegatronEngine(folder / "model", optimization, layout)
    prompts = json.loads((folder / "prompts.json").read_text())
    schedule = TrainingSchedule(steps, 10**6, 10**6)
    with tempfile.TemporaryDirectory() as place:
        run_dir = Path(os.environ.get("RL_STEP_RUN", place))
        with TrainingRun(run_dir, engine, {}) as run:
            finish, ends = run.finish_step, [time.process_time()]

            def finish_step(metrics: Any) -> None:
                ends.append(time.process_time())
                finish(metrics)

            run.finish_step = finish_step  # type: ignore[method-assign]
            if settings["kind"] == "sft":
                tokens = json.loads((folder / "sft.json").read_text())
                samples = [TokenSample(row, settings["prompt_tokens"]) for row in tokens]
                step = SupervisedStep(
                    engine, samples, settings["responses"], settings["seq_length"], seed=0
                )
                engine.save = lambda folder: None  # type: ignore[method-assign]
                fit(run, schedule, step)
            else:

                def reward(groups: Any, check: Any) -> list[list[RewardResult]]:
                    return [
                        [
                            RewardResult(sum(t % 2 for t in r.tokens) / len(r.tokens), "score")
                            for r in rollouts
                        ]
                        for _, rollouts in groups
                    ]

                rl = RLComponents(
                    run=run, engine=engine, reward=reward, seed=0,
                    tasks=[PromptTask(str(n), prompt, None) for n, prompt in enumerate(prompts)],
                    settings=RLSettings(
                        algorithm_by_name("grpo"), settings["responses"] // settings["group_size"],
                        settings["group_size"], 1, settings["seq_length"],
                        Sampling(settings["new_tokens"]),
                    ),
                )  # fmt: skip
                engine.save = lambda folder: None  # type: ignore[method-assign]
                train(rl, schedule)
            if run.writes:
                lines = (run_dir / "metrics.jsonl").read_text().splitlines()
                for line, begin, end in zip(lines, ends, ends[1:]):
                    row = json.loads(line)
                    print(
                        json.dumps(
                            {
                                "seconds": row["seconds"],
                                "grad_norm": row["grad_norm"],
                                "cpu": end - begin,
                                **{n: row.get(f"time/{n}", 0.0) for n in ("rollout", "judging")},
                                "training": row.get("time/training", row["seconds"]),
                            }
                        )
                    )


def run_steps(command: Sequence[str], settings: dict[str, Any]) -> list[dict[str, float]]:
    """Return the steps of a worker, without the first, which compiles and allocates."""
    threads = str(settings["threads"])
    launch = [*command, json.dumps(settings)]
    env = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": os.fspath(ROOT)}
    env |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if settings["ranks"] > 1:
        python, *rest = launch
        port = random.randrange(20000, 40000)
        launch = [
            python, "-m", "torch.distributed.run", "--nproc-per-node", str(settings["ranks"]),
            "--master-port", str(port), *rest,
        ]  # fmt: skip
    result = subprocess.run(launch, env=env, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stderr[-3000:]}")
    lines = [line for line in result.stdout.splitlines() if line.startswith('{"seconds"')]
    return [json.loads(line) for line in lines][1:]


def main() -> None:
    options = parse()
    if "weights" in options.kinds:
        options.kinds.remove("weights")
        print_weights(weight_rows(options.vllm_python, options.steps))
    if not options.kinds:
        return
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_inputs(folder, options)
        settings = {**vars(options), "folder": place, "steps": options.steps + 1, "lr": 1e-5}
        # The responses are divided among the ranks; the micro-batch is per rank on both sides.
        for kind in options.kinds:
            times: dict[str, list[list[dict[str, float]]]] = {"ours": [], "trl": []}
            for _ in range(options.pairs):
                own = [sys.executable, __file__, "--worker"]
                times["ours"].append(run_steps(own, {**settings, "kind": kind}))
                if options.trl_python:
                    trl = [options.trl_python, os.fspath(ROOT / "benchmarks" / "_trl_step.py")]
                    times["trl"].append(run_steps(trl, {**settings, "kind": kind}))
            for name, pairs in times.items():
                if not pairs:
                    continue
                steps = [step for pair in pairs for step in pair]
                row: dict[str, Any] = {"kind": kind, "by": name, "ranks": options.ranks}
                row["engine"] = options.engine if name == "ours" else "torch"
                row |= {part: median(step.get(part, 0.0) for step in steps) for part in PARTS}
                row["grad_norm"] = steps[0]["grad_norm"]
                if name == "trl":
                    for part, label in (("seconds", "ratio"), ("cpu", "cpu ratio")):
                        ratios = [
                            median(s[part] for s in theirs) / median(s[part] for s in ours)
                            for ours, theirs in zip(times["ours"], times["trl"])
                        ]
                        row |= {label: median(ratios), f"{label}s": ratios}
                rows.append(row)
    print_table(rows, os.getloadavg()[0])
    for row in rows:
        print(json.dumps(row))


def print_weights(rows: Sequence[dict[str, Any]]) -> None:
    print("".join(f"{head:>10}" for head in rows[0]))
    for row in rows:
        print("".join(f"{cell:>10}" for cell in row.values()))
    for row in rows:
        print(json.dumps(row))


def print_table(rows: Sequence[dict[str, Any]], load: float) -> None:
    print(f"load average {load:.1f} on {os.cpu_count()} cores")
    heads = ["kind", "by", "engine", "ranks", "rollout", "judging", "training", "step", "cpu"]
    heads += ["ratio", "cpu ratio"]
    print("".join(f"{head:>10}" for head in heads))
    for row in rows:
        cells = [row["kind"], row["by"], row["engine"], str(row["ranks"])]
        cells += [f"{row[part]:.2f}" for part in PARTS]
        cells += [f"{row[n]:.2f}" if n in row else "" for n in ("ratio", "cpu ratio")]
        print("".join(f"{cell:>10}" for cell in cells))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--trl-python",
        metavar="FILE",
        help="Python interpreter of an environment with TRL. Default: none.",
    )
    add("--engine", choices=["megatron", "deepspeed"], default="megatron",
        help="Engine of this project. Default: %(default)s.")  # fmt: skip
    add("--ranks", type=int, default=1, help="Number of processes. Default: %(default)s.")
    add("--threads", type=int, default=1, help="Threads per process. Default: %(default)s.")
    add("--kinds", nargs="+", choices=["rl", "sft", "weights"], default=["rl", "sft"],
        help="Kinds of steps to time, and transfers of weights. Default: %(default)s.")  # fmt: skip
    add(
        "--vllm-python",
        metavar="FILE",
        help="Python of an environment with vLLM and the plug-in, for --kinds weights.",
    )
    add(
        "--pairs",
        type=int,
        default=1,
        help="Number of runs of each library, in turn. Default: %(default)s.",
    )
    add("--steps", type=int, default=2, help="Number of timed steps per run. Default: %(default)s.")
    add(
        "--responses",
        type=int,
        default=64,
        help="Number of responses per step. Default: %(default)s.",
    )
    add(
        "--group-size",
        type=int,
        default=8,
        help="Number of responses per prompt. Default: %(default)s.",
    )
    add(
        "--prompt-tokens",
        type=int,
        default=32,
        help="Length of a prompt in tokens. Default: %(default)s.",
    )
    add(
        "--new-tokens",
        type=int,
        default=64,
        help="Length of a response in tokens. Default: %(default)s.",
    )
    add("--seq-length", type=int, default=96,
        help="Length in tokens of packed rows of this project. Default: %(default)s.")  # fmt: skip
    add("--micro-batch", type=int, default=8,
        help="Rows of a micro-batch. Default: %(default)s.")  # fmt: skip
    options = parser.parse_args()
    if "weights" in options.kinds and not options.vllm_python:
        parser.error("--kinds weights requires --vllm-python. Name the Python of vLLM.")
    return options


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        our_steps(json.loads(sys.argv[2]))
    else:
        main()
