"""Steps of TRL's GRPOTrainer and SFTTrainer, one JSON object per step; see rl_step.py.

It runs in a separate Python environment of TRL, and imports nothing from this project.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch


class Clock:
    """Seconds of calls by name, read once per step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def wrap(self, owner: Any, name: str, label: str) -> None:
        """Time a method."""
        call = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                took = time.perf_counter() - begin
                self.seconds[label] = self.seconds.get(label, 0.0) + took

        setattr(owner, name, timed)


def main() -> None:
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    folder = Path(settings["folder"])
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    clock = Clock()
    rows: list[dict[str, float]] = []

    class Steps(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.seconds.clear()
            self.begin, self.cpu = time.perf_counter(), time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds, cpu = time.perf_counter() - self.begin, time.process_time() - self.cpu
            rows.append({"seconds": seconds, "cpu": cpu, **clock.seconds})

    ranks = settings["ranks"]
    common: dict[str, Any] = {
        "output_dir": str(folder / "trl"), "max_steps": settings["steps"], "use_cpu": True,
        "bf16": False, "gradient_checkpointing": False, "learning_rate": settings["lr"],
        "lr_scheduler_type": "constant", "weight_decay": 0.0, "max_grad_norm": 1.0,
        "logging_steps": 1, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "seed": 0,
        "per_device_train_batch_size": settings["micro_batch"],
        "gradient_accumulation_steps": settings["responses"] // ranks // settings["micro_batch"],
    }  # fmt: skip
    prompts = json.loads((folder / "prompts.json").read_text())
    texts = [" ".join(f"w{token}" for token in prompt) for prompt in prompts]
    if settings["kind"] == "sft":
        trainer = sft_trainer(model, tokenizer, common, prompts, settings, [Steps()])
    else:
        trainer = grpo_trainer(model, tokenizer, common, texts, settings, [Steps()])
        clock.wrap(trainer, "_generate", "rollout")
        clock.wrap(trainer, "_calculate_rewards", "judging")
    trainer.train()
    norms = [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log]
    if trainer.accelerator.is_main_process:
        for row, norm in zip(rows, norms):
            parts = row.get("rollout", 0.0) + row.get("judging", 0.0)
            print(json.dumps({**row, "training": row["seconds"] - parts, "grad_norm": norm}))


def grpo_trainer(
    model: Any, tokenizer: Any, common: Any, texts: Any, settings: Any, callbacks: Any
) -> Any:
    """Return a trainer with the settings of `--algorithm grpo`."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def reward(completion_ids: Any, **_: Any) -> list[float]:
        return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]

    config = GRPOConfig(
        **common, num_generations=settings["group_size"], beta=0.0, loss_type="grpo",
        max_completion_length=settings["new_tokens"], temperature=1.0, top_k=0, epsilon=0.2,
        epsilon_high=0.3,
    )  # fmt: skip
    data = Dataset.from_dict({"prompt": texts})
    return GRPOTrainer(
        model, reward, config, data, processing_class=tokenizer, callbacks=callbacks
    )  # fmt: skip


def sft_trainer(
    model: Any, tokenizer: Any, common: Any, prompts: Any, settings: Any, callbacks: Any
) -> Any:
    """Return a trainer of completions with a loss on the completions alone."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    size, new = len(prompts[0]), settings["new_tokens"]
    tokens = json.loads((settings["folder"] and Path(settings["folder"]) / "sft.json").read_text())
    data = Dataset.from_dict(
        {"input_ids": tokens, "completion_mask": [[0] * size + [1] * new for _ in tokens]}
    )
    config = SFTConfig(**common, completion_only_loss=True, max_length=size + new)
    return SFTTrainer(
        model, config, train_dataset=data, processing_class=tokenizer, callbacks=callbacks
    )


if __name__ == "__main__":
    main()
