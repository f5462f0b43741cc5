"""Conversation: messages, system prompt, parameters and pictures of a chat; saved as JSON."""

from __future__ import annotations

import base64
import json
import mimetypes
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from max_ray.errors import InputError

_RESERVED = ("model", "messages", "stream", "stream_options", "n", "tools", "tool_choice", "functions")
_FORMAT = "max-ray chat"
_MAX_IMAGE_BYTES = 64 << 20


@dataclass
class Conversation:
    """What a request is made from.

    Args:
        model: Name of the model.
        system: System prompt; "" for none.
        parameters: Sampling parameters by their names in the API.
        messages: Messages of user and assistant, by turns, as the API takes them.
        images: Pictures of the next message, as data URLs.
    """

    model: str
    system: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, Any]] = field(default_factory=list)
    images: list[str] = field(default_factory=list)

    def body(self) -> dict[str, Any]:
        """The fields of a request for the next answer."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return {"model": self.model, "messages": [*system, *self.messages], **self.parameters}

    def ask(self, text: str) -> None:
        """Adds a user's message with the pictures that wait for it."""
        if not self.images:
            self.messages.append({"role": "user", "content": text})
            return
        pictures = [{"type": "image_url", "image_url": {"url": url}} for url in self.images]
        self.messages.append({"role": "user", "content": [*pictures, {"type": "text", "text": text}]})
        self.images = []

    def answer(self, text: str) -> None:
        """Adds the assistant's answer, whole or cut short."""
        self.messages.append({"role": "assistant", "content": text})

    def take_back(self) -> None:
        """Removes a user's message that got no answer; its pictures wait for the next one."""
        content = self.messages.pop()["content"]
        if isinstance(content, list):
            self.images = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]

    def drop_answer(self) -> bool:
        """Removes the last answer, so that its question is the last message; False without a question."""
        if self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        return bool(self.messages)

    def clear(self) -> None:
        """Removes messages and pictures; system prompt and parameters stay."""
        self.messages, self.images = [], []

    def set(self, name: str, text: str) -> None:
        """Sets a parameter; "" removes it.

        Raises:
            InputError: The name is of a field that the chat itself sends.
        """
        if name in _RESERVED:
            raise InputError(f"{name} cannot be set here.")
        if not text:
            self.parameters.pop(name, None)
            return
        try:
            self.parameters[name] = json.loads(text)
        except ValueError:
            self.parameters[name] = text

    def attach(self, path: Path) -> None:
        """Reads a picture for the next message. Raises InputError for a file that cannot be read or is no picture."""
        kind = mimetypes.guess_type(path.name)[0] or ""
        if not kind.startswith("image/"):
            raise InputError(f"{path} has no suffix of a picture, such as .png or .jpg.")
        try:
            if path.stat().st_size > _MAX_IMAGE_BYTES:
                raise InputError(f"{path} is larger than {_MAX_IMAGE_BYTES >> 20} MiB.")
            data = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}.") from None
        self.images.append(f"data:{kind};base64,{base64.b64encode(data).decode()}")

    def save(self, path: Path) -> None:
        """Writes the conversation, readable by its owner alone.

        Raises:
            InputError: The file is there and is no saved chat, or cannot be written.
        """
        if path.exists():
            _read(path)
        saved = {"format": _FORMAT, "model": self.model, "system": self.system}
        text = json.dumps(saved | {"parameters": self.parameters, "messages": self.messages}, indent=1)
        try:
            path.touch(mode=0o600)
            path.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror}.") from None

    def load(self, path: Path) -> None:
        """Goes on with a saved conversation; the model stays. Raises InputError for a file that is no saved chat."""
        saved = _read(path)
        self.system, self.parameters, self.messages = saved["system"], saved["parameters"], saved["messages"]
        self.images = []


def _read(path: Path) -> dict[str, Any]:
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError:
        saved = None
    if not isinstance(saved, dict) or saved.get("format") != _FORMAT or not _is_whole(saved):
        raise InputError(f"{path} is no chat that /save wrote.")
    return saved


def _is_whole(saved: dict[str, Any]) -> bool:
    messages = saved.get("messages")
    return (
        isinstance(saved.get("system"), str)
        and isinstance(saved.get("parameters"), dict)
        and isinstance(messages, list)
        and all(map(_is_message, messages))
    )


def _is_message(one: Any) -> bool:
    return isinstance(one, dict) and one.get("role") in ("user", "assistant") and "content" in one
