"""Values of settings: lists that are given as text, and the choice of devices."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, SecretStr

_DEVICES = re.compile(r"auto|cpu|gpu|gpu:(\d+(?:,\d+)*)")


@dataclass(frozen=True)
class DeviceChoice:
    """`devices` taken apart. kind: "auto", "cpu" or "gpu"; ids: the GPUs named, empty for any."""

    kind: str
    ids: tuple[int, ...] = ()

    @classmethod
    def parse(cls, text: str) -> DeviceChoice:
        match = _DEVICES.fullmatch(text)
        if match is None:
            raise ValueError(f"'auto', 'cpu', 'gpu' or GPU numbers like 'gpu:0,1', not {text!r}")
        ids = tuple(int(number) for number in match[1].split(",")) if match[1] else ()
        if len(set(ids)) != len(ids):
            raise ValueError(f"a list of different GPUs, not {text!r}")
        return cls(text.partition(":")[0], ids)


def split(value: Any) -> Any:
    """ "a,b" -> ["a", "b"]; other values pass."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def split_all(value: Any) -> Any:
    """The same for each text of a list: a flag may be given several times, each time with several values."""
    if isinstance(value, (list, tuple)):
        return [part for item in value for part in (split(item) if isinstance(item, str) else [item])]
    return split(value)


TextList = Annotated[tuple[str, ...], BeforeValidator(split_all)]
SecretList = Annotated[tuple[SecretStr, ...], BeforeValidator(split)]
