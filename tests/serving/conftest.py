"""A trained model that a process serves, and its clients."""

import pytest

from tests.inference.checkpoint import run_dir  # noqa: F401
from tests.serving.client import Server, write_template


@pytest.fixture(scope="package")
def start_server(run_dir, tmp_path_factory):  # noqa: F811
    """Return a function that starts a server of the model."""
    template = write_template(tmp_path_factory.mktemp("template"))
    flags = ["--load", run_dir, "--max-batch-size", 8, "--max-waiting", 250, "--max-tokens", 48]
    flags += ["--max-choices", 128, "--chat-template", template, "--model-name", "tiny"]
    return lambda: Server(*flags)


@pytest.fixture(scope="package")
def server(start_server):
    server = start_server()
    yield server
    server.stop()


@pytest.fixture(scope="package")
def client(server):
    with server.openai() as client:
        yield client


@pytest.fixture(scope="package")
def http(server):
    with server.http() as client:
        yield client
