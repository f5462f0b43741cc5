"""The tokenizer contract: between text and token ids, and from a request to its context."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

UnboundContextT = TypeVar("UnboundContextT", covariant=True)
RequestT = TypeVar("RequestT", contravariant=True)


class PipelineTokenizer(Protocol[UnboundContextT, RequestT]):
    @property
    def eos(self) -> int:
        """The end-of-sequence id (the first one where there are several)."""

    @property
    def expects_content_wrapping(self) -> bool:
        """True when the chat template wants message content as a list of typed parts."""

    async def new_context(self, request: RequestT) -> UnboundContextT:
        """Renders the chat template, encodes, checks the length. Raises InputError. Encodes off the event loop."""

    async def encode(self, prompt: str, add_special_tokens: bool = True) -> npt.NDArray[np.int64]:
        """Token ids, [n]."""

    async def decode(self, encoded: Any, **kwargs: Any) -> str:
        """Text of one token id or a sequence of them; `skip_special_tokens=True` leaves special tokens out."""
