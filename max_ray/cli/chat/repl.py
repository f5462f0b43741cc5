"""Repl: reads lines, runs commands that begin with a slash, asks the server for answers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from max_ray import settings
from max_ray.cli.chat.client import Client, ServerError
from max_ray.cli.chat.conversation import Conversation
from max_ray.cli.chat.display import Display
from max_ray.errors import InputError, nearest

_QUOTES = '"""'
_HISTORY_LINES = 1000
HELP = """\
/system [TEXT]      set the system prompt; without TEXT, remove it
/set [NAME VALUE]   set a parameter, as in /set temperature 0.7; without VALUE, remove it; alone, list all
/image FILE         send a picture with the next message
/regen              answer the last message again
/clear              forget the messages
/save FILE          write the chat to a file
/load FILE          go on with a saved chat
/model [NAME]       use another model of the server; alone, list them
/help               this list
\"\"\"                 begins and ends a message of several lines
Ctrl-C              stops an answer
Ctrl-D              ends the chat"""


class Repl:
    """A chat with one server.

    Args:
        client: Of the server.
        conversation: To go on with.
        display: For answers and notes.
        read: Gives a line for a prompt, as `input` does: EOFError at the end, KeyboardInterrupt for Ctrl-C.
    """

    def __init__(
        self, client: Client, conversation: Conversation, display: Display, read: Callable[[str], str] = input
    ) -> None:
        self._client = client
        self._conversation = conversation
        self._display = display
        self._read = read
        self._commands: dict[str, Callable[[str], None]] = {
            "system": self._system,
            "set": self._set,
            "image": self._image,
            "regen": self._regenerate,
            "clear": self._clear,
            "save": self._save,
            "load": self._load,
            "model": self._model,
            "help": lambda _: display.note(HELP),
        }

    def run(self) -> None:
        """Until the end of the input."""
        while True:
            try:
                text = self._message()
            except EOFError:
                return
            except KeyboardInterrupt:
                self._display.note("\n(Ctrl-D ends the chat.)")
                continue
            if text.strip():
                self._take(text)

    def ask(self, text: str) -> None:
        """Sends a message and writes the answer. Raises ServerError; the message is taken back then."""
        self._conversation.ask(text)
        self._answer()

    def _message(self) -> str:
        """The next line; several between quotes. Quotes that are never closed end with the input."""
        line = self._read(">>> ")
        if not line.lstrip().startswith(_QUOTES):
            return line
        lines = [line.lstrip().removeprefix(_QUOTES)]
        while not lines[-1].rstrip().endswith(_QUOTES):
            lines.append(self._read("... "))
        lines[-1] = lines[-1].rstrip().removesuffix(_QUOTES)
        return "\n".join(lines).strip("\n")

    def _take(self, text: str) -> None:
        try:
            if text.startswith("/") and "\n" not in text:
                self._command(text)
            else:
                self.ask(text)
        except (InputError, ServerError) as error:
            self._display.note(f"error: {error}")

    def _command(self, text: str) -> None:
        name, _, rest = text[1:].partition(" ")
        if name not in self._commands:
            raise InputError(f"There is no command /{name}.{nearest(name, list(self._commands))} /help lists them.")
        self._commands[name](rest.strip())

    def _answer(self) -> None:
        """Ctrl-C stops the answer; what has come of it stays in the conversation."""
        said: list[str] = []
        try:
            with closing(self._client.stream(self._conversation.body())) as pieces:
                note = self._display.answer(pieces, said)
        except KeyboardInterrupt:
            self._stopped("".join(said))
            return
        except ServerError:
            self._conversation.take_back()
            raise
        self._conversation.answer("".join(said))
        self._display.note(note)

    def _stopped(self, said: str) -> None:
        if said:
            self._conversation.answer(said)
        else:
            self._conversation.take_back()
        self._display.note("\n[stopped]")

    def _system(self, text: str) -> None:
        self._conversation.system = text
        self._display.note("The system prompt is set." if text else "There is no system prompt.")

    def _set(self, text: str) -> None:
        name, _, value = text.partition(" ")
        if name:
            self._conversation.set(name, value.strip())
        shown = ", ".join(f"{name}={value!r}" for name, value in self._conversation.parameters.items())
        self._display.note(shown or "All parameters have the model's defaults.")

    def _image(self, text: str) -> None:
        self._conversation.attach(_path(text, "/image FILE"))
        self._display.note(f"The next message has {len(self._conversation.images)} picture(s).")

    def _regenerate(self, _: str) -> None:
        before = list(self._conversation.messages)
        if not self._conversation.drop_answer():
            raise InputError("There is no message to answer.")
        try:
            self._answer()
        except ServerError:
            self._conversation.messages, self._conversation.images = before, []
            raise

    def _clear(self, _: str) -> None:
        self._conversation.clear()
        self._display.note("The messages are forgotten.")

    def _save(self, text: str) -> None:
        path = _path(text, "/save FILE")
        self._conversation.save(path)
        self._display.note(f"Saved to {path}.")

    def _load(self, text: str) -> None:
        self._conversation.load(_path(text, "/load FILE"))
        self._display.note(f"The chat goes on after {len(self._conversation.messages)} messages.")

    def _model(self, name: str) -> None:
        if name:
            self._conversation.model = name
        names = [one if one != self._conversation.model else f"{one} (in use)" for one in self._client.models()]
        self._display.note("\n".join(names))


def _path(text: str, usage: str) -> Path:
    if not text:
        raise InputError(f"A file is missing: {usage}.")
    try:
        path = Path(text).expanduser()
    except RuntimeError:  # ~name of a user that is not there
        path = Path(text)
    if "\0" in text:
        raise InputError("A file's name has no null character.")
    return path


@contextmanager
def line_history() -> Iterator[None]:
    """Arrow keys and lines of earlier chats, where the input is a terminal. The file is readable by its owner alone."""
    if not sys.stdin.isatty():
        yield
        return
    import readline

    file = settings.cache_dir() / "chat_history"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch(mode=0o600)
    readline.read_history_file(file)
    readline.set_history_length(_HISTORY_LINES)
    try:
        yield
    finally:
        readline.write_history_file(file)


def plain_reader(_prompt: str) -> str:
    """A line of an input that is no terminal: no prompt is written."""
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\r\n")
