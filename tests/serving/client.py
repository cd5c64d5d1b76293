"""A model that is served by a separate process, and its HTTP clients."""

import os
import re
import subprocess
import threading
import time
from pathlib import Path

import httpx
import psutil
from openai import OpenAI

from tests.distributed import ROOT, SINGLE_THREADED
from tests.warm import warm_python

KEY = "tests-only"
PROMPT = "ba ké lo mü"
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'witch' %}{{ raise_exception('which role?') }}{% endif %}"
    "{{ m.content }} {% endfor %}"
)


class Server:
    """Process of `tools.serve`, whose stderr is read continuously."""

    def __init__(self, *flags: object, key: str | None = KEY) -> None:
        environment = {**os.environ, **SINGLE_THREADED}
        if key is not None:
            environment["MEGATRON_ET_API_KEY"] = key
        self.process = subprocess.Popen(
            [warm_python(), "-m", "tools.serve", "--port", "0", *map(str, flags)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.stderr: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self.process.stdout is not None
        first = self.process.stdout.readline()
        result = re.fullmatch(r"serving (\S+) at (http://127\.0\.0\.1:\d+)\n", first)
        if result is None:
            self.stop()
            raise RuntimeError(f"{first}{''.join(self.stderr)}")
        self.model, self.url = result.groups()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.stderr.append(line)

    def openai(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=60)

    def http(self) -> httpx.Client:
        headers = {"Authorization": f"Bearer {KEY}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)

    def health(self) -> dict:
        return httpx.get(f"{self.url}/health", timeout=30).json()

    def threads(self) -> int:
        return psutil.Process(self.process.pid).num_threads()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(30)
        self._reader.join(30)


def write_template(folder: Path) -> Path:
    file = folder / "template.jinja"
    file.write_text(TEMPLATE)
    return file


def settled(server):
    """Return the server's counts when nothing runs."""
    for _ in range(200):
        health = server.health()
        if health["running"] == health["waiting"] == 0:
            return health
        time.sleep(0.05)
    raise AssertionError(health)
