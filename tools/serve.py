"""Serve a trained model over HTTP, in the manner of OpenAI's API.

    python -m tools.serve --load RUN_DIR

Answers /v1/completions, /v1/chat/completions, /v1/models and /health at http://127.0.0.1:8000.
Requests share the model's passes as they come and go. SIGTERM or Ctrl-C ends the server once the
accepted requests are answered. A model that needs several ranks runs the same way under torchrun.
"""

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_ext.checkpoint import find_model
from megatron_ext.devices import activate
from megatron_ext.errors import ToolParser, UserError, run_tool_or_ranks
from megatron_ext.inference.loading_flags import (
    add_model_flags,
    check_at_least_one,
    is_first_rank,
    loading_options,
)
from megatron_ext.quiet import quiet_megatron

KEY = "MEGATRON_ET_API_KEY"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def main(argv: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    _check(options)
    key = _key(options.api_key_file)
    template = _read("--chat-template", options.chat_template) if options.chat_template else None
    checkpoint = find_model(options.load)
    listening = listen(options.host, options.port) if is_first_rank() else None
    with quiet_megatron():
        activate()  # before anything of Megatron is imported, which takes seconds
        from megatron_ext.inference.loading import load_model
        from megatron_ext.serving.app import Api, make_app
        from megatron_ext.serving.openai_protocol import Reader, RequestLimits
        from megatron_ext.serving.replicas import ModelReplicas
        from megatron_ext.serving.scheduler import Scheduler
        from megatron_ext.serving.server import serve

        layout, others = loading_options(options)
        trained = load_model(checkpoint, layout, **others)
        replicas = ModelReplicas(trained, options.max_batch_size)
    if listening is None:
        replicas.follow()
        return
    limits = RequestLimits(options.max_choices, options.max_tokens, options.max_prompt_tokens)
    name = options.model_name or Path(options.load).resolve().name
    scheduler = Scheduler(replicas, options.max_waiting)
    api = Api(scheduler, Reader(trained, name, limits, template), options.timeout)
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"serving {name} at http://{shown}:{port}", flush=True)
    if key is None and options.host not in _LOOPBACK:
        print("serve: anyone who reaches this address may use it: set a key", file=sys.stderr)
    serve(scheduler, make_app(api, key), listening)


def _parser() -> argparse.ArgumentParser:
    parser = ToolParser(prog="python -m tools.serve", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--load", required=True, metavar="DIR", help="Run directory or Hugging Face folder.")
    add("--model-name", metavar="NAME", help="in requests and answers (the folder's name)")
    add("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    add("--port", type=int, default=8000, help="0 for any free one (%(default)s)")
    add("--api-key-file", metavar="FILE", help=f"holds the key to ask for (or set {KEY})")
    add("--max-batch-size", type=int, default=32, help="continuations at a time (%(default)s)")
    add("--max-waiting", type=int, default=256, help="continuations that wait (%(default)s)")
    add("--max-choices", type=int, default=32, help="prompts times n of a request (%(default)s)")
    add("--max-tokens", type=int, help="the most new tokens (the model's length)")
    add("--max-prompt-tokens", type=int, help="the longest prompt (the model's length)")
    add("--timeout", type=float, default=600, help="seconds for a request (%(default)s)")
    add("--chat-template", metavar="FILE", help="Jinja template, if the tokenizer has none")
    add_model_flags(parser)
    return parser


def _check(options: argparse.Namespace) -> None:
    flags = ("max_batch_size", "max_choices", "max_tokens", "max_prompt_tokens")
    check_at_least_one(options, *flags)
    if options.max_waiting < 0:
        raise UserError("--max-waiting must not be negative")
    if not options.timeout > 0:
        raise UserError("--timeout must be above 0")
    if not 0 <= options.port < 2**16:
        raise UserError(f"--port {options.port} must be from 0 to 65535")


def _key(file: str | None) -> str | None:
    """The API key, of a file or the environment: a command line can be read by other users."""
    key = os.environ.get(KEY) if file is None else _read("--api-key-file", file)
    if key is None:
        return None
    if not key.strip() or not key.isascii():
        raise UserError(f"the API key in {file or KEY} is empty or not ASCII: give another")
    return key.strip()


def _read(flag: str, file: str) -> str:
    try:
        return Path(file).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} {file}: {error}") from error


def listen(host: str, port: int) -> socket.socket:
    """A socket for the server; port 0 is any free one.

    Raises:
        UserError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port} cannot be listened on ({error.strerror}): choose another"
        ) from error


if __name__ == "__main__":
    run_tool_or_ranks(main)
