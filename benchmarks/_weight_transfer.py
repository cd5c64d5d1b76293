"""Seconds in which a vLLM server gets the weights of a policy, for `benchmarks/rl_step.py`."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

TRANSFERS = ("folder", "gloo", "ipc")


def make_llama(folder: Path) -> None:
    """Write a Llama of SmolLM2-135M's shape with random weights and an untied output layer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.hf.models import add_tokenizer

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    add_tokenizer(folder, config.vocab_size)


def time_transfers(folder: Path, url: str, rounds: int) -> list[dict[str, Any]]:
    """Return the row of each transfer, whose rounds take turns.

    Args:
        folder: Folder of the model, from which the server was started.
        url: Address of the server, with /v1.
        rounds: Number of updates by each transfer after one that is not counted.
    """
    from megatron_ext.devices import activate

    activate()
    from alignment.engines.megatron import MegatronEngine, MegatronLayout
    from alignment.engines.protocol import Optimization
    from alignment.rl.stream_transfer import StreamTransfer
    from alignment.rl.vllm_rollouts import VLLMRollouts
    from alignment.rl.weight_transfer import FolderTransfer, WeightTransfer

    engine = MegatronEngine(folder, Optimization(steps=9), MegatronLayout(micro_batch=1))
    gigabytes = sum(tensor.nbytes for _, tensor in engine.parameters()) / 1e9
    times: dict[str, list[dict[str, float]]] = {name: [] for name in TRANSFERS}
    with tempfile.TemporaryDirectory() as place:
        transfers: dict[str, WeightTransfer] = {
            name: StreamTransfer(engine, name) for name in TRANSFERS[1:]
        }
        transfers["folder"] = FolderTransfer(engine, Path(place))
        for transfer in transfers.values():
            transfer.prepare = _Timed(transfer.prepare)  # type: ignore[method-assign, assignment]
        for _ in range(rounds + 1):
            for name in TRANSFERS:
                transfer = transfers[name]
                rollouts = VLLMRollouts(
                    engine, [url], "policy", Path(place), frozenset([1]), transfer=transfer
                )
                update = _Timed(rollouts.refresh)
                update()
                prepare = transfer.prepare.seconds  # type: ignore[attr-defined]
                times[name].append({"prepare": prepare, "update": update.seconds - prepare})
    return [
        {"kind": "weights", "by": name, "gigabytes": round(gigabytes, 3)}
        | {
            part: round(median(row[part] for row in times[name][1:]), 3)
            for part in ("prepare", "update")
        }
        for name in TRANSFERS
    ]


class _Timed:
    """Function with the duration of its last call, in seconds."""

    def __init__(self, function: Callable[..., None]) -> None:
        self._function, self.seconds = function, 0.0

    def __call__(self, *arguments: Any) -> None:
        begin = time.perf_counter()
        self._function(*arguments)
        self.seconds = time.perf_counter() - begin


def weight_rows(vllm_python: str, rounds: int) -> list[dict[str, Any]]:
    """Start a server and return the row of each transfer.

    Args:
        vllm_python: Python of an environment with vLLM and the plug-in.
        rounds: Number of counted updates by each transfer.
    """
    from megatron_ext.vllm import TRANSFER_BACK_END
    from tests.vllm.servers import serve

    os.environ["VLLM_PYTHON"] = vllm_python
    back_end = ["--weight-transfer-config", json.dumps({"backend": TRANSFER_BACK_END})]
    root = os.fspath(Path(__file__).resolve().parent.parent)
    with tempfile.TemporaryDirectory() as place:
        folder, log = Path(place) / "model", Path(place) / "log"
        make_llama(folder)
        flags = ["--max-model-len", "512", *back_end]
        with serve(folder, *flags, log=log, PYTHONPATH=root) as url:
            command = [sys.executable, __file__, os.fspath(folder), f"{url}/v1", str(rounds)]
            environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
            result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stderr[-3000:]}")
    rows: list[dict[str, Any]] = json.loads(result.stdout.splitlines()[-1])
    return rows


if __name__ == "__main__":
    print(json.dumps(time_transfers(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))))
