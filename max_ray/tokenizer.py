"""TextTokenizer: text to token ids and back, and from a request to its context.

Text is encoded and decoded by the Rust tokenizer itself: its methods are thread-safe once truncation and padding are
off, and the `transformers` wrapper costs ten times as much a call.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from jinja2 import TemplateError

from max_ray.errors import ConfigError, InputError, PromptTooLongError
from max_ray.gguf import huggingface_values, read_gguf
from max_ray.interfaces import PromptImage, SamplingParams, TextContext, TextGenerationRequest, TokenBuffer
from max_ray.tokenizer_files import is_gguf, load_tokenizer, local_folder, read_json, turn_end_ids

TokenArray = npt.NDArray[np.int64]
ArgumentT = TypeVar("ArgumentT")
ContextValidator = Callable[[TextContext], None]

# Encoding runs at about a character a microsecond; a hop to a thread and back costs about 100 us.
INLINE_CHARACTERS = 4096
# A longer text than so many characters a token of max_length is counted by its beginning first.
LONG_TOKEN_CHARACTERS = 16
_IMAGE_PARTS = ("image_url", "image", "input_image")
_NO_VISION = "This model takes text only and cannot see images: leave them out, or serve a vision-language model."


class TextTokenizer:
    """Tokenizer of one model folder, .gguf file, or hub id (fetched at `revision`).

    max_length: prompt + generated tokens of one request.
    generation_config: defaults of the sampling parameters; None reads generation_config.json of the folder.
    eos_token_ids: None takes all that generation_config.json, config.json and the tokenizer name, and the token that
    ends the assistant's turn in the chat template.
    vocab_size: rows of the embedding; None takes config.json's.
    context_validators: called with each new context; each may raise InputError.
    Raises ModelPathError without a folder or a tokenizer in it, ConfigError for defaults that cannot work.
    takes_images: whether chat messages may hold images.
    """

    takes_images = False

    def __init__(
        self,
        model_path: str | Path,
        *,
        max_length: int,
        revision: str | None = None,
        generation_config: Mapping[str, Any] | None = None,
        eos_token_ids: Iterable[int] | None = None,
        vocab_size: int | None = None,
        context_validators: Sequence[ContextValidator] = (),
    ) -> None:
        folder = local_folder(str(model_path), revision)
        model_config = huggingface_values(read_gguf(folder)) if is_gguf(folder) else read_json(folder / "config.json")
        if generation_config is None:
            generation_config = read_json(folder / "generation_config.json")
        self.max_length = max_length
        self.context_validators = tuple(context_validators)
        self._hf = load_tokenizer(folder)
        self._backend = getattr(self._hf, "backend_tokenizer", None)
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
        self.vocab_size = vocab_size or _text_config(model_config).get("vocab_size") or len(self._hf)
        self._generation_config = dict(generation_config)
        _check_defaults(self._generation_config, folder)
        self.special_ids = frozenset(self._hf.all_special_ids)
        self.added_ids = frozenset(self._hf.added_tokens_decoder)
        self._wraps_content: bool | None = None
        configs = (generation_config, _text_config(model_config))
        self._eos = self._find_ends(configs) if eos_token_ids is None else _ids(list(eos_token_ids))
        self.eos_token_ids = frozenset(self._eos)

    @property
    def eos(self) -> int:
        """The end-of-sequence id, the first one where there are several. Raises ConfigError when there is none."""
        if not self._eos:
            raise ConfigError("This model names no end-of-sequence token; set eos_token_id in its config.json.")
        return self._eos[0]

    @property
    def expects_content_wrapping(self) -> bool:
        """True when the chat template shows message content only as a list of typed parts."""
        if self._wraps_content is None:
            probe = "content-probe"
            as_text = self._probe(probe)
            as_parts = self._probe([{"type": "text", "text": probe}])
            self._wraps_content = as_text is False and as_parts
        return self._wraps_content

    async def new_context(self, request: TextGenerationRequest) -> TextContext:
        """The context of a request. Long texts are encoded in a thread, short ones here.

        Raises PromptTooLongError, and InputError for an empty prompt, an id outside the vocabulary, text that is not
        Unicode, a chat template that refuses the messages, or sampling parameters out of range.
        """
        prompt, images = await self._prompt(request)
        context = TextContext(
            request_id=request.request_id,
            tokens=TokenBuffer(prompt),
            max_length=self.max_length,
            eos_token_ids=self.eos_token_ids,
            sampling_params=self._sampling_params(request),
            model_name=request.model_name,
            log_probabilities=request.logprobs,
            log_probabilities_echo=request.echo and request.logprobs is not None,
            images=images,
        )
        for validate in self.context_validators:
            validate(context)
        return context

    async def encode(self, prompt: str, add_special_tokens: bool = True) -> TokenArray:
        """Token ids of a text, int64 [n]."""
        return await self._in_thread_if_long(
            len(prompt), partial(self.encode_text, add_special_tokens=add_special_tokens), prompt
        )

    async def decode(self, encoded: Any, *, skip_special_tokens: bool = False, **kwargs: Any) -> str:
        """Text of one token id or of a sequence of them."""
        if kwargs:
            raise TypeError(f"decode() takes skip_special_tokens and nothing else, not {sorted(kwargs)}.")
        ids = np.atleast_1d(np.asarray(encoded, dtype=np.int64)).tolist()
        return self.decode_ids(ids, skip_special_tokens)

    def encode_text(self, text: str, add_special_tokens: bool = True) -> TokenArray:
        """`encode`, blocking. Raises InputError for text that is not Unicode (lone surrogates)."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"The text is not valid Unicode: a lone surrogate at character {error.start}.", param="prompt"
            ) from None
        if self._backend is None:
            ids = self._hf.encode(text, add_special_tokens=add_special_tokens)
        elif len(text) <= INLINE_CHARACTERS:
            ids = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        else:  # unlike `encode`, the batch call lets other threads run meanwhile
            ids = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return np.asarray(ids, dtype=np.int64)

    def decode_ids(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """`decode` of a sequence of ids, synchronously: microseconds for a short one. Ids without text give none."""
        if self._backend is not None:
            return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))
        return str(
            self._hf.decode(list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
        )

    def token_piece(self, token_id: int) -> str:
        """The vocabulary's own spelling of an id (byte-level alphabet, `<0x0A>`, ...); empty for an id without one."""
        return self._hf.convert_ids_to_tokens(token_id) or "" if token_id < len(self._hf) else ""

    def decoder_description(self) -> str:
        """The decoder as compact JSON (`{"type":"ByteLevel",...}`); empty where the tokenizer is written in Python."""
        decoder = self._backend.decoder if self._backend is not None else None
        return decoder.__getstate__().decode() if decoder is not None else ""

    def render_chat(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any] | None = None) -> str:
        """The chat template's text for these messages, ready to be continued by the assistant.

        `options` are variables for the template (`add_generation_prompt=False` among them). Raises InputError when
        there is no template, or it refuses.
        """
        if not self._hf.chat_template:
            raise InputError(
                "This model has no chat template. Use /v1/completions with a plain prompt.", param="messages"
            )
        wrap = self.expects_content_wrapping
        chat = [{**m, "content": self._content(m.get("content"), wrap)} for m in messages]
        return self._apply_template(chat, {"add_generation_prompt": True, **(options or {}), "tokenize": False})

    def _content(self, content: Any, wrap: bool) -> Any:
        return _shape_content(content, wrap)

    def _apply_template(self, chat: list[dict[str, Any]], options: Mapping[str, Any]) -> str:
        try:
            return str(self._hf.apply_chat_template(chat, **options))
        except (TemplateError, TypeError, ValueError) as error:
            raise InputError(f"The chat template refuses these messages: {error}", param="messages") from error

    def _probe(self, content: Any) -> bool:
        try:
            text = self._apply_template([{"role": "user", "content": content}], {"tokenize": False})
        except InputError:
            return False
        return "content-probe" in text and "'text'" not in text

    def _find_ends(self, configs: Iterable[Mapping[str, Any]]) -> tuple[int, ...]:
        """What ends a text, each id once, that of the first of these configurations before the others."""
        named = [i for config in configs for i in _ids(config.get("eos_token_id"))]
        turn = turn_end_ids(self.render_chat, self._hf.added_tokens_decoder.items()) if self._hf.chat_template else ()
        own = [i for i in (*_ids(self._hf.eos_token_id), *turn) if i < self.vocab_size]  # the model has no others
        return tuple(dict.fromkeys([*named, *own]))

    async def _prompt(self, request: TextGenerationRequest) -> tuple[TokenArray, tuple[PromptImage, ...]]:
        """Token ids and images of a prompt, checked. A subclass for models that see images overrides this."""
        assert not request.images, "images for a tokenizer of texts"
        return self._check_prompt(await self._encode_prompt(request), request), ()

    async def _encode_prompt(self, request: TextGenerationRequest) -> TokenArray:
        if request.messages:
            num_characters = sum(len(str(m.get("content"))) for m in request.messages)
            return await self._in_thread_if_long(num_characters, self._chat_ids, request)
        if isinstance(request.prompt, str):
            return await self._in_thread_if_long(len(request.prompt), self._text_ids, request.prompt)
        return id_array(() if request.prompt is None else request.prompt, "prompt")

    def _check_prompt(self, ids: TokenArray, request: TextGenerationRequest) -> TokenArray:
        """`ids` again. Raises InputError where they are no prompt for this model."""
        param = "messages" if request.messages else "prompt"
        if not len(ids):
            raise InputError("The prompt is empty: it has no tokens. Give at least one.", param=param)
        self._check_range(ids, param)
        if len(ids) >= self.max_length:
            raise PromptTooLongError(len(ids), self.max_length)
        return ids

    async def _in_thread_if_long(
        self, num_characters: int, work: Callable[[ArgumentT], TokenArray], argument: ArgumentT
    ) -> TokenArray:
        if num_characters <= INLINE_CHARACTERS:
            return work(argument)
        return await asyncio.to_thread(work, argument)

    def _text_ids(self, text: str) -> TokenArray:
        return self._prompt_text_ids(text, add_special_tokens=True) if text else np.empty(0, dtype=np.int64)

    def _chat_ids(self, request: TextGenerationRequest) -> TokenArray:
        text = self.render_chat(request.messages, request.chat_template_options)
        return self._prompt_text_ids(text, add_special_tokens=False)

    def _prompt_text_ids(self, text: str, add_special_tokens: bool) -> TokenArray:
        """Ids of a prompt. Megabytes that cannot fit are refused without encoding them all: a beginning that has
        twice the tokens of max_length has more than max_length of them however the text goes on."""
        head = text[: LONG_TOKEN_CHARACTERS * self.max_length]
        if len(head) < len(text):
            num_tokens = len(self.encode_text(head, add_special_tokens))
            if num_tokens > 2 * self.max_length:
                raise PromptTooLongError(num_tokens, self.max_length, at_least=True)
        return self.encode_text(text, add_special_tokens)

    def _sampling_params(self, request: TextGenerationRequest) -> SamplingParams:
        given = request.sampling_params
        if isinstance(given, SamplingParams):
            params = given
        else:
            params = SamplingParams.from_input_and_generation_config(given or {}, self._generation_config)
        self._check_range(id_array(params.stop_token_ids, "stop_token_ids"), "stop_token_ids")
        if params.max_new_tokens is not None and params.min_new_tokens > params.max_new_tokens:
            raise InputError(
                f"At least {params.min_new_tokens} and at most {params.max_new_tokens} new tokens are asked for: "
                f"lower the one or raise the other.",
                param="min_new_tokens",
            )
        return params

    def _check_range(self, ids: TokenArray, param: str) -> None:
        outside = ids[(ids < 0) | (ids >= self.vocab_size)]
        if len(outside):
            raise InputError(
                f"Token id {outside[0]} is outside the model's vocabulary, 0 to {self.vocab_size - 1}.", param=param
            )


def _text_config(model_config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of config.json that speaks of text: multimodal models nest it."""
    nested = model_config.get("text_config")
    return nested if isinstance(nested, dict) else model_config


def _check_defaults(generation_config: Mapping[str, Any], folder: Path) -> None:
    try:
        SamplingParams.from_input_and_generation_config({}, generation_config)
    except (InputError, TypeError) as error:
        raise ConfigError(f"generation_config.json of {folder} gives unusable defaults: {error}") from error


def _ids(value: Any) -> tuple[int, ...]:
    """eos_token_id as it is found: nothing, one id, or several."""
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) for i in ids):
        raise ConfigError(f"eos_token_id must be a token id or a list of token ids, not {value!r}.")
    return tuple(ids)


def id_array(ids: Sequence[int], param: str) -> TokenArray:
    array = np.asarray(ids)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise InputError("Token ids must be a flat list of integers that fit 64 bits.", param=param)
    return array.astype(np.int64)


def _shape_content(content: Any, wrap: bool) -> Any:
    """Message content as the template wants it: one string, or a list of typed parts."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if wrap else content
    if content is None:
        return content
    if wrap:
        return [{"type": "text", "text": _part_text(part)} for part in content]
    return "\n".join(_part_text(part) for part in content)


def _part_text(part: Any) -> str:
    if isinstance(part, Mapping) and part.get("type") in _IMAGE_PARTS:
        raise InputError(_NO_VISION, param="messages")
    if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise InputError(
            'Message content must be a string or a list of {"type": "text", "text": ...}.', param="messages"
        )
    return str(part["text"])
