"""gpt-oss: the harmony format, messages in channels between control tokens."""

from __future__ import annotations

import re

from max_ray.output_parsers.base import GeneratorParser, ParserInput
from max_ray.output_parsers.reader import Sink, Steps, UndecidedError, Words

_START, _CHANNEL, _MESSAGE, _END = "<|start|>", "<|channel|>", "<|message|>", "<|end|>"
_CALL, _RETURN, _CONSTRAIN = "<|call|>", "<|return|>", "<|constrain|>"
_CHANNEL_NAME = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_ENDS = Words([_END, _CALL, _RETURN, _START, _CHANNEL])
_HEADER_END = Words([_MESSAGE, _END, _CALL, _RETURN])


class HarmonyParser(GeneratorParser):
    """Reads messages such as `<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>`.

    Channel `analysis` is reasoning. A message to `functions.name` is a tool call, whose recipient may stand before or
    behind the channel. All others are content: channel `final`, and what `commentary` says to the user. Messages to
    functions that the request does not have are reasoning. Messages of the same kind are joined by a line break.

    Args:
        given: What is known of the request. The prompt may end inside of a message.
    """

    markers = frozenset([_START, _CHANNEL, _MESSAGE, _END, _CALL, _RETURN, _CONSTRAIN])

    def __init__(self, given: ParserInput | None = None) -> None:
        self._has_content = self._has_reasoning = self._has_arguments = False
        super().__init__(given)
        _, _, begun = self._given.prompt_end.rpartition(f"{_START}assistant")
        if begun:
            self.push(begun)
            self._writer.settle()
            self._writer.taken()

    def _run(self) -> Steps[None]:
        marker: str | None = ""
        while marker is not None:
            header = yield from self._header(marker)
            sink = self._writer.content if header is None else self._begin_message(header)
            marker = yield from self._reader.until(_ENDS, sink)
            if sink == self._arguments and not self._has_arguments:
                self._writer.arguments("{}")
            self._writer.end_call()

    def _header(self, marker: str) -> Steps[str | None]:
        """Reads the header of a message. None where text follows that is none.

        Args:
            marker: What ended the message before.
        """
        start = marker if marker in (_START, _CHANNEL) else ""
        if not start and not (yield from self._is_header()):
            return None
        place = self._reader.hold()
        try:
            header, word = yield from self._reader.text_until(_HEADER_END)
        except UndecidedError:
            header, word = "", _END
        is_cut = word is None and _CHANNEL in start + header  # by the end of the output
        is_header = is_cut or word == _MESSAGE
        if not is_header:
            self._reader.rewind(place)
            self._writer.content(start)
        self._reader.release(place)
        return start + header if is_header else None

    def _is_header(self) -> Steps[bool]:
        """Whether a header begins here: a marker, or a recipient."""
        place = self._reader.hold()
        yield from self._reader.skip_space()
        is_header = False
        for word in (_CHANNEL, _START, "to="):
            is_header = is_header or (yield from self._reader.take_if(word))
        self._reader.rewind(place)
        self._reader.release(place)
        return is_header

    def _begin_message(self, header: str) -> Sink:
        """Where the text of a message goes."""
        channel, recipient = _CHANNEL_NAME.search(header), _RECIPIENT.search(header)
        to = "" if recipient is None else recipient[1]
        name = to.removeprefix("functions.")
        if name in self._given.tools:
            self._writer.start_call(name)
            self._has_arguments = False
            return self._arguments
        if to not in ("", "assistant", "user") or (channel is not None and channel[1] == "analysis"):
            if self._has_reasoning:
                self._writer.reasoning("\n")
            self._has_reasoning = True
            return self._writer.reasoning
        if self._has_content:
            self._writer.content("\n")
        self._has_content = True
        return self._writer.content

    def _arguments(self, text: str) -> None:
        self._has_arguments = True
        self._writer.arguments(text)
