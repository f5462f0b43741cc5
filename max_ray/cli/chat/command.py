"""`max-ray chat` and `max-ray run`: flags, and the server that `run` starts."""

from __future__ import annotations

import argparse
import ctypes
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from max_ray.cli.chat.client import DEFAULT_URL, Client, ServerError
from max_ray.cli.chat.conversation import Conversation
from max_ray.cli.chat.display import Display
from max_ray.cli.chat.repl import Repl, line_history, plain_reader
from max_ray.config import ServeConfig
from max_ray.config.models import is_loopback
from max_ray.errors import ConfigError

_STOPS_WITHIN_S = 20.0
_PERIOD_S = 0.2
_SERVE = (sys.executable, "-m", "max_ray.cli.main", "serve")
_PR_SET_PDEATHSIG = 1


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """Which server, for commands that call one."""
    parser.add_argument(
        "--url", default=DEFAULT_URL, metavar="URL", help=f"Address of the server. Default: {DEFAULT_URL}."
    )
    _add_key_flag(parser)


def _add_key_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help="Default: the first of MAX_RAY_API_KEYS for a server of this machine, OPENAI_API_KEY for another. "
        "`ps` shows a key that is given here.",
    )


def add_chat_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `max-ray chat`."""
    add_server_flags(parser)
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="Answer this and end.")
    parser.add_argument("--model", metavar="NAME", help="A model of the server. Default: its first.")
    parser.add_argument("--system", default="", metavar="TEXT", help="System prompt.")


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `max-ray run`; the settings of `max-ray serve` are added by the caller."""
    _add_key_flag(parser)
    parser.add_argument("model_path", metavar="MODEL", help="A folder, a GGUF file, or a Hugging Face repository id.")
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="Answer this and end.")
    parser.add_argument("--system", default="", metavar="TEXT", help="System prompt.")


def run_chat(options: dict[str, Any]) -> None:
    """Chats with a server. Raises ServerError when it does not answer."""
    client = Client(options["url"], options["api_key"])
    model = options["model"] or _first_model(client)
    _chat(client, model, options["system"], options["prompt"])


def run_model(
    config: ServeConfig, flags: Sequence[str], system: str, prompt: str | None, api_key: str | None = None
) -> None:
    """Serves the model of a configuration unless its port has a server of it, chats, and ends what it started.

    Args:
        config: Of the server.
        flags: The command line of `max-ray serve` that gives this configuration.
        system: System prompt.
        prompt: The one message; None for a chat.
        api_key: Of the server; by default the first of MAX_RAY_API_KEYS.

    Raises:
        ConfigError: The port has a server of another model.
        ServerError: The server does not start.
    """
    client = _client_of(config, api_key)
    try:
        names = client.models()
    except ServerError as error:
        if error.status is not None:
            raise
        with _server(client, flags):
            return _chat(client, config.served_model_name, system, prompt)
    wanted = next((name for name in (config.served_model_name, *config.served_model_aliases) if name in names), None)
    if wanted is None:
        raise ConfigError(
            f"Port {config.port} has a server of {', '.join(names)}. Give another --port, or chat with that one: "
            f"max-ray chat --url {client.root}"
        )
    _chat(client, wanted, system, prompt)


@contextmanager
def _server(client: Client, flags: Sequence[str]) -> Iterator[None]:
    """`max-ray serve` as a process of its own; its few lines go to stderr.

    Ctrl-C of the terminal does not reach it. It gets SIGTERM at the end, and also when this process is killed.
    """
    process = subprocess.Popen(
        [*_SERVE, *flags],
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr.fileno(),
        start_new_session=True,
        preexec_fn=_end_with_parent,
    )
    try:
        while not client.is_up():
            if process.poll() is not None:
                raise ServerError("The server did not start.")
            time.sleep(_PERIOD_S)
        yield
    finally:
        _end(process)


def _end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOPS_WITHIN_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _client_of(config: ServeConfig, api_key: str | None) -> Client:
    host = "127.0.0.1" if config.host in ("0.0.0.0", "::") else config.host
    address = f"{f'[{host}]' if ':' in host else host}:{config.port}"
    if config.ssl_certfile is None:
        return Client(f"http://{address}", api_key)
    return Client(f"https://{address}", api_key, config.ssl_certfile if is_loopback(host) else None)


def _first_model(client: Client) -> str:
    names = client.models()
    if not names:
        raise ServerError(f"{client.root} serves no model.")
    return names[0]


def _chat(client: Client, model: str, system: str, prompt: str | None) -> None:
    display = Display(sys.stdout)
    is_interactive = sys.stdin.isatty()
    repl = Repl(client, Conversation(model, system), display, input if is_interactive else plain_reader)
    if prompt is not None:
        return repl.ask(prompt)
    if is_interactive:
        display.note(f"Chat with {model} at {client.root}. /help lists the commands.")
    with line_history():
        repl.run()


def serve_flags(options: dict[str, Any]) -> list[str]:
    """The flags of a command line that gave these settings; what files and the environment say is found again."""
    flags: list[str] = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, list):
            flags += [part for item in value for part in (flag, str(item))]
        elif value is not None:
            flags += [flag, str(value)]
    return flags
