"""Three steps of training with rollouts of servers with vLLM's protocol, for tests."""

import json
import os
import signal
import threading
import time


def drawn(place, step):
    """Return the number of responses that were sampled ahead for a step."""
    files = place.glob(f"rollouts/step_{step:06d}/ahead_*.jsonl")
    return sum(file.read_bytes().count(b"\n") for file in files)


def learn(
    folder, place, url, patience, ahead=False, waits=16, stops=False, context=64, make_transfer=None
):
    """Return the rows of three steps with rollouts of a server, and the signal that ended the run.

    Args:
        folder: Folder of the model.
        place: Run directory.
        url: Addresses of the servers, separated by spaces.
        patience: Seconds to wait for a lost server.
        ahead: Whether the next step is sampled during training.
        waits: Number of responses of the next step before which there are no rewards.
        stops: Whether a signal comes with the rewards.
        context: Context length of the servers.
        make_transfer: Function from the engine to the transfer of weights. Default: by folders.
    """
    from alignment.engines.megatron import MegatronEngine, MegatronLayout
    from alignment.engines.protocol import Optimization
    from alignment.ranks import all_reduce_max
    from alignment.rl import vllm_rollouts as served
    from alignment.rl import vllm_servers
    from alignment.rl.algorithms import algorithm_by_name
    from alignment.rl.async_rollouts import AsyncRollouts
    from alignment.rl.rollouts import RewardResult
    from alignment.rl.tasks import PromptTask, RLSettings
    from alignment.rl.train import RLComponents, train
    from alignment.training.loop import TrainingSchedule
    from alignment.training.training_run import TrainingRun
    from megatron_ext.inference.sampling import Sampling

    vllm_servers._WAIT = 0.05
    engine = MegatronEngine(folder, Optimization(lr=1e-2, steps=9), MegatronLayout(micro_batch=4))
    rollouts = served.VLLMRollouts(
        engine, url.split(), "policy", place / "served", frozenset([0]), patience,
        context=context, transfer=make_transfer and make_transfer(engine),
    )  # fmt: skip
    tasks = [PromptTask(str(n), [5, n, 7], None) for n in range(12)]

    def reward(groups, check):
        # Ranks may see different numbers of them, and must look at signals equally often.
        while ahead and run.step < 2 and all_reduce_max(int(drawn(place, run.step + 1) < waits)):
            time.sleep(0.05)
            check()
        if stops:
            os.kill(os.getpid(), signal.SIGTERM)
        return [
            [RewardResult(sum(t % 2 for t in r.tokens) / 6, "score") for r in rollouts_]
            for _, rollouts_ in groups
        ]

    algorithm = algorithm_by_name("grpo", rollout_bound=2.0)
    settings = RLSettings(algorithm, 4, 4, 1, 64, Sampling(6, temperature=0.8))
    with TrainingRun(place, engine, {}) as run:
        rl = RLComponents(
            run=run, engine=engine, tasks=tasks, reward=reward, settings=settings, seed=0,
            generate=rollouts.generate,
            async_rollouts=AsyncRollouts(rollouts, 3) if ahead else None,
        )  # fmt: skip
        ended = train(rl, TrainingSchedule(3, 100, 100))
    lines = (place / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert not [t for t in threading.enumerate() if t.name.startswith("rollouts of step")]
    return rows, ended
