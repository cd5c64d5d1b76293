"""Tests of the job scripts of judges on a real Slurm: an interrupted training, a served judge."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.alignment.chat_model import BRIEF, gold, make_model, responses, write_rows
from tests.cluster.slurm import Cluster, missing
from tests.cluster.test_slurm import slurm as slurm
from tests.cluster.test_slurm import steps, submit, wait_until

STEPS = 60
SCRIPTS = "examples/alignment/slurm"

# A server like vLLM, whose score is the number of times that a text contains "good".
SERVER = """#!{python}
import http.server, json, os, sys
command, model, _, port = sys.argv[1:5]
print(json.dumps([*sys.argv[1:], os.environ.get("VLLM_API_KEY")]), flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({{}} if self.path == "/health" else None)
    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with open({log!r}, "a") as file:
            print(json.dumps([request, self.headers["Authorization"]]), file=file)
        question = request["messages"][-1]["content"]
        score = min(9, question.split("<item>")[-1].split("</item>")[0].split().count("good"))
        message = {{"role": "assistant", "content": str(score), "reasoning": "counted"}}
        self.answer({{"choices": [{{"index": 0, "finish_reason": "stop", "message": message}}]}})
    def answer(self, body):
        text = json.dumps(body).encode()
        self.send_response(200 if body is not None else 404)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
    def log_message(self, *_):
        pass
http.server.ThreadingHTTPServer(("", int(port)), Handler).serve_forever()
"""

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.mark.slow
def test_training_that_is_cut_short_resumes(slurm: Cluster, tmp_path: Path) -> None:
    run, model = tmp_path / "run", tmp_path / "model"
    make_model(model)
    (tmp_path / "pointwise-brief.txt").write_text(BRIEF)
    items = responses(64)
    flags = {
        "--recipe": "examples/alignment/judges/base.yaml",
        "--model": model,
        "--template": tmp_path / "pointwise-brief.txt",
        "--input": write_rows(tmp_path / "items.jsonl", items),
        "--gold": write_rows(tmp_path / "gold.jsonl", gold(items)),
        "--steps": STEPS,
        "--batch-size": 8,
        "--seq-length": 256,
        "--save-interval": 1000,
    }
    words = [str(word) for pair in flags.items() for word in pair]
    script = f"{SCRIPTS}/train-judge.sbatch"
    job = submit(slurm, tmp_path, "--nodes=2", script, str(run), *words)
    wait_until(lambda: steps(run) >= 3)
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    slurm.wait_for(job, ("PENDING",), 240)
    cut = steps(run)
    assert 3 <= cut < STEPS
    assert [f.name for f in run.glob("checkpoints/iter_*")] == [f"iter_{cut:07d}"]
    assert not (run / "best").exists()

    ended = slurm.wait_for(job, ("COMPLETED", "FAILED"), 240)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
    record = json.loads((run / "run.json").read_text())
    assert (len(record["commands"]), record["world_size"]) == (2, 2)
    assert (run / "best" / "config.json").is_file()
    assert (run / "logs" / f"environment-{job}-1.txt").is_file()


@pytest.fixture
def served(slurm: Cluster, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Return a judge's job and the file of its address."""
    vllm = tmp_path / "vllm"
    vllm.write_text(SERVER.format(python=sys.executable, log=str(tmp_path / "requests.jsonl")))
    vllm.chmod(0o755)
    exported = f"--export=ALL,VLLM={vllm},MEGATRON_ET_JUDGE_API_KEY=secret"
    address = tmp_path / "gold.url"
    script = f"{SCRIPTS}/serve.sbatch"
    job = submit(slurm, tmp_path, exported, script, str(address), "--max-num-seqs", "64")
    yield job, address
    slurm.run("scancel", job)


@pytest.mark.slow
def test_served_judge_labels_and_is_released(
    slurm: Cluster, served: tuple[str, Path], tmp_path: Path
) -> None:
    server, address = served
    items = responses(12)
    for item in items:
        object.__setattr__(item, "text", f"<item> {item.text} </item>")
    verdicts = tmp_path / "verdicts.jsonl"
    exported = f"--export=ALL,SERVER_JOB={server},MEGATRON_ET_JUDGE_API_KEY=secret"
    words = [str(address), str(write_rows(tmp_path / "items.jsonl", items)), str(verdicts)]
    job = submit(slurm, tmp_path, exported, f"{SCRIPTS}/annotate.sbatch", *words)
    ended = slurm.wait_for(job, ("COMPLETED", "FAILED"), 240)
    logs = "".join(log.read_text() for log in tmp_path.glob("*.log"))
    assert ended["JobState"] == "COMPLETED", logs
    verdict_rows = [json.loads(line) for line in verdicts.read_text().splitlines()]
    assert [row["score"] for row in verdict_rows] == [v.score for v in gold(items)]
    assert {row["thinking"] for row in verdict_rows} == {"counted"}
    for line in (tmp_path / "requests.jsonl").read_text().splitlines():
        body, key = json.loads(line)
        assert (body["model"], key) == ("openai/gpt-oss-120b", "Bearer secret")
        expected = ("high", 0.0, 8192)
        assert (body["reasoning_effort"], body["temperature"], body["max_tokens"]) == expected
    slurm.wait_for(server, ("CANCELLED", "COMPLETED", "FAILED"), 240)
    wait_until(lambda: not address.exists())
    started = json.loads(next(tmp_path.glob("serve-*.log")).read_text().splitlines()[0])
    assert started[:3] == ["serve", "openai/gpt-oss-120b", "--port"]
    assert started[4:] == ["--tensor-parallel-size", "1", "--max-num-seqs", "64", "secret"]


@pytest.mark.slow
def test_missing_vllm_is_reported(slurm: Cluster, tmp_path: Path) -> None:
    script = f"{SCRIPTS}/serve.sbatch"
    for exported, message in (
        ("VLLM=no-such-vllm", "there is no no-such-vllm"),
        ("REPLICAS=3,SLURM_GPUS_ON_NODE=8", "REPLICAS=3 must divide the node's"),
    ):
        words = [f"--export=ALL,{exported}", script, str(tmp_path / "gold.url")]
        job = submit(slurm, tmp_path, *words)
        assert slurm.wait_for(job, ("COMPLETED", "FAILED"), 240)["ExitCode"] == "2:0"
        assert message in next(tmp_path.glob(f"serve-{job}-*.log")).read_text()


@pytest.mark.slow
def test_lost_server_is_reported(slurm: Cluster, tmp_path: Path) -> None:
    server = submit(slurm, tmp_path, "--wrap=true")
    slurm.wait_for(server, ("COMPLETED", "FAILED"), 240)
    address, items = tmp_path / "gold.url", write_rows(tmp_path / "items.jsonl", responses(1))
    words = [f"--export=ALL,SERVER_JOB={server}", f"{SCRIPTS}/annotate.sbatch"]
    words += [str(address), str(items), str(tmp_path / "verdicts.jsonl")]
    job = submit(slurm, tmp_path, *words)
    assert slurm.wait_for(job, ("COMPLETED", "FAILED"), 240)["ExitCode"] == "2:0"
    log = next(tmp_path.glob(f"annotate-{job}-*.log")).read_text()
    assert f"the server's job {server} has ended" in log
