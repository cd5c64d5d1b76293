"""Serve a trained model over HTTP with an OpenAI-compatible API.

    python -m tools.serve --load RUN_DIR

The server responds to /v1/completions, /v1/chat/completions, /v1/models and /health at
http://127.0.0.1:8000. Concurrent requests are batched continuously: they join and leave between
forward passes. SIGTERM or Ctrl-C stops the server after the accepted requests are finished. A model
that needs several ranks runs under torchrun with the same flags.
"""

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_ext.devices import activate
from megatron_ext.errors import ToolParser, UserError, run_tool_or_ranks
from megatron_ext.inference.loading_flags import (
    LoadingFlags,
    add_loading_flags,
    check_at_least_one,
    is_first_rank,
)
from megatron_ext.model_location import announce_model
from megatron_ext.quiet import quiet_megatron

KEY = "MEGATRON_ET_API_KEY"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class ServeFlags(LoadingFlags):
    """Values of the command line."""

    load: str
    model_name: str | None
    host: str
    port: int
    api_key_file: str | None
    max_batch_size: int
    max_waiting: int
    max_choices: int
    max_tokens: int | None
    max_prompt_tokens: int | None
    timeout: float
    chat_template: str | None


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    flags = _parser().parse_args(argv, ServeFlags())
    _check(flags)
    key = _key(flags.api_key_file)
    template = _read("--chat-template", flags.chat_template) if flags.chat_template else None
    checkpoint = announce_model(flags.load)
    listening = listen(flags.host, flags.port) if is_first_rank() else None
    with quiet_megatron():
        activate()  # before anything of Megatron is imported, which takes seconds
        from megatron_ext.inference.loading import load_model
        from megatron_ext.serving.app import Api, make_app
        from megatron_ext.serving.openai_protocol import RequestLimits, RequestParser
        from megatron_ext.serving.replicas import ModelReplicas
        from megatron_ext.serving.scheduler import Scheduler
        from megatron_ext.serving.server import serve

        layout, others = flags.load_model_options()
        trained = load_model(checkpoint, layout, **others)
        replicas = ModelReplicas(trained, flags.max_batch_size)
    if listening is None:
        replicas.follow()
        return
    limits = RequestLimits(flags.max_choices, flags.max_tokens, flags.max_prompt_tokens)
    name = flags.model_name or Path(flags.load).resolve().name
    scheduler = Scheduler(replicas, flags.max_waiting)
    api = Api(scheduler, RequestParser(trained, name, limits, template), flags.timeout)
    host, port = listening.getsockname()[:2]
    address = f"[{host}]" if ":" in host else host
    print(f"serving {name} at http://{address}:{port}", flush=True)
    if key is None and flags.host not in _LOOPBACK:
        print(
            f"serve: warning: {flags.host} is reachable by others and no API key is set. Set "
            f"--api-key-file or {KEY}.",
            file=sys.stderr,
        )
    serve(scheduler, make_app(api, key), listening)


def _parser() -> argparse.ArgumentParser:
    parser = ToolParser(prog="python -m tools.serve", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--load", required=True, metavar="DIR", help="Run directory or Hugging Face folder.")
    # fmt: off
    add("--model-name", metavar="NAME",
        help="Name of the model in requests and responses. Default: the name of the --load "
             "folder.")
    add("--host", default="127.0.0.1", metavar="ADDRESS",
        help="Address to listen on. Default: %(default)s.")
    add("--port", type=int, default=8000, metavar="N",
        help="Port to listen on; 0 for any free port. Default: %(default)s.")
    add("--api-key-file", metavar="FILE",
        help="File with the API key that clients must send. Default: the environment variable "
             f"{KEY}, or no key.")
    add("--max-batch-size", type=int, default=32, metavar="N",
        help="Maximum number of continuations generated at a time, per replica of the model. "
             "Default: %(default)s.")
    add("--max-waiting", type=int, default=256, metavar="N",
        help="Maximum number of queued continuations; further requests get status 429. "
             "Default: %(default)s.")
    add("--max-choices", type=int, default=32, metavar="N",
        help="Maximum number of choices (prompts times n) of a request. Default: %(default)s.")
    add("--max-tokens", type=int, metavar="N",
        help="Maximum number of new tokens of a continuation. Default: limited by the context "
             "length of the model.")
    add("--max-prompt-tokens", type=int, metavar="N",
        help="Maximum length of a prompt, in tokens. Default: limited by the context length of "
             "the model.")
    add("--timeout", type=float, default=600, metavar="SECONDS",
        help="Time limit of a request in seconds, from its arrival to its last token. "
             "Default: %(default)s.")
    add("--chat-template", metavar="FILE",
        help="Jinja chat template. Default: the tokenizer's own.")
    # fmt: on
    add_loading_flags(parser)
    return parser


def _check(flags: ServeFlags) -> None:
    check_at_least_one(
        max_batch_size=flags.max_batch_size,
        max_choices=flags.max_choices,
        max_tokens=flags.max_tokens,
        max_prompt_tokens=flags.max_prompt_tokens,
    )
    if flags.max_waiting < 0:
        raise UserError(f"--max-waiting {flags.max_waiting} is negative. Set it to 0 or more.")
    if not flags.timeout > 0:
        raise UserError(f"--timeout {flags.timeout:g} is not above 0. Set a time in seconds.")
    if not 0 <= flags.port < 2**16:
        raise UserError(f"--port {flags.port} is out of range. Choose a port from 0 to 65535.")


def _key(file: str | None) -> str | None:
    """Return the API key from a file or the environment, which other users cannot read."""
    key = os.environ.get(KEY) if file is None else _read("--api-key-file", file)
    if key is None:
        return None
    if not key.strip() or not key.isascii():
        raise UserError(
            f"The API key in {file or KEY} is empty or contains characters outside ASCII. Choose "
            "another key."
        )
    return key.strip()


def _read(flag: str, file: str) -> str:
    try:
        return Path(file).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} {file} cannot be read: {error}. Give a text file.") from error


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket for the server.

    Args:
        host: IPv4 or IPv6 address, or host name.
        port: Port; 0 for any free port.

    Raises:
        UserError: The address is not available.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise UserError(
            f"The server cannot listen on --host {host} --port {port}: {error.strerror}. Choose "
            "another address or port."
        ) from error


if __name__ == "__main__":
    run_tool_or_ranks(main)
