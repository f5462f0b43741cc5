"""The base of tool parsers: content up to a marker, calls behind it, and back to the marker where no call begins."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, ClassVar

from max_ray.output_parsers.base import GeneratorParser
from max_ray.output_parsers.reader import Steps, UndecidedError, Words

NAME = re.compile(r"[\w.\-]+")
_MAX_NAME = 256


class ToolParser(GeneratorParser):
    """Reads content, and calls behind markers.

    A marker with no call behind it is content, and the text behind it is read again: another marker may follow.

    Attributes:
        openers: Markers behind which calls may begin.
        checks_names: Whether only functions of the request count. So it is where a call has no marker of its own.
    """

    openers: ClassVar[tuple[str, ...]] = ()
    checks_names: ClassVar[bool] = False

    def _run(self) -> Steps[None]:
        openers = Words(self.openers)
        yield from self._begin()
        while True:
            marker = yield from self._reader.until(openers, self._writer.content)
            if marker is None:
                return
            if not (yield from self._attempt(self._body(marker))):
                self._writer.content(marker)

    def _begin(self) -> Steps[None]:
        """Reads calls without a marker at the beginning of the text."""
        yield from ()

    @abstractmethod
    def _body(self, marker: str) -> Steps[None]:
        """Reads calls, and the marker that ends them, behind an opening marker."""

    def _attempt(self, part: Steps[None]) -> Steps[bool]:
        """Reads a part of the text and goes back to its beginning where no call begins in it.

        Returns:
            Whether a call began.
        """
        place, before = self._reader.hold(), self._writer.num_calls
        with suppress(UndecidedError):
            yield from part
        is_call = self._writer.num_calls > before
        if is_call:
            self._writer.end_call()
        else:
            self._reader.rewind(place)
        self._reader.release(place)
        return is_call

    def _start(self, name: str, call_id: str | None = None) -> None:
        """Begins a call: what was read so far is certain now."""
        self._reader.decide()
        self._writer.start_call(name, call_id)

    def _is_name(self, name: str | None) -> bool:
        if not name or len(name) > _MAX_NAME:
            return False
        return not self.checks_names or name in self._given.tools

    def _name(self) -> Steps[str]:
        """A name of letters, digits and `_.-`; empty without one."""
        pieces: list[str] = []
        yield from self._reader.run(NAME, pieces.append)
        return "".join(pieces)

    def _property(self, name: str, key: str) -> Mapping[str, Any]:
        """The schema of a parameter; empty where it is not known."""
        properties = self._given.tools.get(name, {}).get("properties")
        schema = properties.get(key) if isinstance(properties, Mapping) else None
        return schema if isinstance(schema, Mapping) else {}
