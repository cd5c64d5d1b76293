"""Tests of the command line of tools.serve; tests/serving has the tests of the server."""

import socket

import pytest

from megatron_ext.errors import UserError
from tools import serve


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "--load"),
        (["--load", "{folder}/nowhere"], "is not a folder"),
        (["--load", "{folder}"], "has no checkpoint"),
        (["--load", "{folder}", "--max-batch-size", "0"], "--max-batch-size"),
        (["--load", "{folder}", "--max-waiting", "-1"], "--max-waiting"),
        (["--load", "{folder}", "--max-tokens", "0"], "--max-tokens"),
        (["--load", "{folder}", "--timeout", "0"], "--timeout"),
        (["--load", "{folder}", "--port", "65536"], "--port 65536"),
        (["--load", "{folder}", "--api-key-file", "{folder}/none"], "--api-key-file"),
        (["--load", "{folder}", "--api-key-file", "{folder}/empty"], "empty"),
        (["--load", "{folder}", "--chat-template", "{folder}/none"], "--chat-template"),
    ],
    ids=str,
)
def test_serve_refuses_wrong_flags_before_loading(tmp_path, flags, message):
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(UserError, match=message):
        serve.main([flag.format(folder=tmp_path) for flag in flags])


def test_api_key_file_takes_precedence_over_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "key"
    file.write_text("from file\n")
    monkeypatch.delenv(serve.KEY, raising=False)
    assert serve._key(None) is None and serve._key(str(file)) == "from file"
    monkeypatch.setenv(serve.KEY, "from environment")
    assert serve._key(None) == "from environment" and serve._key(str(file)) == "from file"


def test_port_in_use_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}"):
            serve.listen("127.0.0.1", port)
