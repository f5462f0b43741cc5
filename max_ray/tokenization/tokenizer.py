"""TextTokenizer: text to token ids and back, and from a request to its context.

Text is encoded and decoded by the Rust tokenizer itself: its methods are thread-safe once truncation and padding are
off, and the `transformers` wrapper costs ten times as much a call.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from max_ray.errors import ConfigError, InputError, PromptTooLongError
from max_ray.gguf import huggingface_values, read_gguf
from max_ray.interfaces import PromptImage, SamplingParams, TextContext, TextGenerationRequest, TokenBuffer
from max_ray.tokenization.chat_template import (
    INLINE_SECONDS,
    RENDER_SECONDS,
    ROLES,
    Chat,
    ChatTemplate,
    is_short,
    shape_content,
    texts_of,
)
from max_ray.tokenization.control_tokens import ControlTokens, Marking, control_names, fold_of, strings_of
from max_ray.tokenization.loading import as_ids, is_gguf, load_tokenizer, local_folder, read_json, turn_end_ids
from max_ray.tokenization.loading.folder import text_config
from max_ray.tokenization.logit_texts import LogitTexts, is_long
from max_ray.tokenization.piece_encoder import PieceEncoder
from max_ray.tokenization.template_limits import TemplateTimeError

TokenArray = npt.NDArray[np.int64]
ArgumentT = TypeVar("ArgumentT")
ContextValidator = Callable[[TextContext], None]

# Encoding runs at about a character a microsecond; a hop to a thread and back costs about 100 us.
INLINE_CHARACTERS = 4096
# A longer text than so many characters a token of max_length is counted by its beginning first.
LONG_TOKEN_CHARACTERS = 16
MAX_TRUNCATED_CHARACTERS = 2**20
"""Of a text that is to be truncated: all of it is encoded, at about a character a microsecond."""
# Renders hold the interpreter: more of them at once would only keep the event loop waiting longer.
_RENDERS = ThreadPoolExecutor(2, thread_name_prefix="chat-templates")


class TextTokenizer:
    """Tokenizer of one model folder, .gguf file, or hub id (fetched at `revision`).

    max_length: prompt + generated tokens of one request.
    generation_config: defaults of the sampling parameters; None reads generation_config.json of the folder.
    eos_token_ids: None takes all that generation_config.json, config.json and the tokenizer name, and the token that
    ends the assistant's turn in the chat template.
    vocab_size: rows of the embedding; None takes config.json's.
    context_validators: called with each new context; each may raise InputError.
    allow_special_tokens_in_messages: whether names of special tokens in chat messages become these tokens; by default
    they are text.
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
        allow_special_tokens_in_messages: bool = False,
    ) -> None:
        folder = local_folder(str(model_path), revision)
        model_config = huggingface_values(read_gguf(folder)) if is_gguf(folder) else read_json(folder / "config.json")
        if generation_config is None:
            generation_config = read_json(folder / "generation_config.json")
        self.max_length = max_length
        self.context_validators = tuple(context_validators)
        self._allows_special_tokens = allow_special_tokens_in_messages
        self._hf = load_tokenizer(folder)
        self._backend = getattr(self._hf, "backend_tokenizer", None)
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
        self.vocab_size = vocab_size or text_config(model_config).get("vocab_size") or len(self._hf)
        self._generation_config = dict(generation_config)
        _check_defaults(self._generation_config, folder)
        self._bos_text: str | None = self._hf.bos_token
        self.special_ids = self._find_special_ids()
        self.special_names = {self.token_piece(i): i for i in self.special_ids if i < self.vocab_size}
        self.added_ids = frozenset(self._hf.added_tokens_decoder)
        configs = (generation_config, text_config(model_config), model_config)
        self._eos = self._find_ends(configs) if eos_token_ids is None else as_ids(list(eos_token_ids))
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
        return bool(self._hf.chat_template) and self._template.facts.content == "list"

    def describe_chat_template(self) -> dict[str, Any] | None:
        """What the chat template knows, as `GET /v1/models/{id}` tells it; None without a template.

        Takes milliseconds the first time; to be called before the first chat.
        """
        if not self._hf.chat_template:
            return None
        self._control.suspects("")
        return self._template.facts.public()

    @property
    def chat_template(self) -> ChatTemplate | None:
        """The chat template; None without one."""
        return self._template if self._hf.chat_template else None

    async def new_context(self, request: TextGenerationRequest) -> TextContext:
        """The context of a request. Long texts are encoded in a thread, short ones here.

        Raises PromptTooLongError, and InputError for an empty prompt, an id outside the vocabulary, text that is not
        Unicode, a chat template that refuses the messages, or sampling parameters out of range.
        """
        prompt, images = await self._prompt(request)
        is_slow = is_long(request.sampling_params)
        context = TextContext(
            request_id=request.request_id,
            tokens=TokenBuffer(prompt),
            max_length=self.max_length,
            eos_token_ids=self.eos_token_ids,
            sampling_params=(
                await asyncio.to_thread(self._sampling_params, request) if is_slow else self._sampling_params(request)
            ),
            model_name=request.model_name,
            cache_salt=request.cache_salt,
            priority=request.priority,
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

    def _find_ends(self, configs: Iterable[Mapping[str, Any]]) -> tuple[int, ...]:
        """What ends a text, each id once, that of the first of these configurations before the others."""
        named = [i for config in configs for i in as_ids(config.get("eos_token_id"))]
        turn = turn_end_ids(self.render_chat, self._hf.added_tokens_decoder.items()) if self._hf.chat_template else ()
        own = [i for i in (*as_ids(self._hf.eos_token_id), *turn) if i < self.vocab_size]  # the model has no others
        return tuple(dict.fromkeys([*named, *own]))

    def _find_special_ids(self) -> frozenset[int]:
        """Those that `decode_ids` leaves out: all that tokenizer.json calls special, not only the ones with a role."""
        if self._backend is None:
            return frozenset(self._hf.all_special_ids)
        return frozenset(i for i, token in self._backend.get_added_tokens_decoder().items() if token.special)

    def token_piece(self, token_id: int) -> str:
        """The vocabulary's own spelling of an id (byte-level alphabet, `<0x0A>`, ...); empty for an id without one."""
        if self._backend is not None:
            return self._backend.id_to_token(token_id) or ""
        return self._hf.convert_ids_to_tokens(token_id) or "" if token_id < len(self._hf) else ""

    def token_id(self, name: str) -> int | None:
        """The id of the token that is spelt so in the vocabulary; None where the model knows no such token."""
        if self._backend is not None:
            found = self._backend.token_to_id(name)
        else:
            found = self._hf.get_vocab().get(name)
        return found if found is not None and found < self.vocab_size else None

    def decoder_description(self) -> str:
        """The decoder as compact JSON (`{"type":"ByteLevel",...}`); empty where the tokenizer is written in Python."""
        decoder = self._backend.decoder if self._backend is not None else None
        return decoder.__getstate__().decode() if decoder is not None else ""

    def render_chat(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any] | None = None) -> str:
        """The chat template's text for these messages, ready to be continued by the assistant.

        `options` are variables for the template (`add_generation_prompt=False` among them). Raises InputError when
        there is no template, or it refuses.
        """
        return self._template.render(*self._chat(messages, options))

    def _chat(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any] | None) -> tuple[Chat, Any]:
        """Messages and options as the template takes them. Raises InputError for what it would leave out."""
        wrap = self.expects_content_wrapping
        prepared = self._template.prepare(messages)
        chat = [{**m, "content": self._content(m["content"], wrap)} if "content" in m else dict(m) for m in prepared]
        if options:
            self._template.check_options(options)
        return chat, {"add_generation_prompt": True, **(options or {})}

    def _content(self, content: Any, wrap: bool) -> Any:
        return shape_content(content, wrap)

    @cached_property
    def _template(self) -> ChatTemplate:
        if not self._hf.chat_template:
            raise InputError(
                "This model has no chat template. Use /v1/completions with a plain prompt.", param="messages"
            )
        return ChatTemplate(self._hf.chat_template, self._hf.special_tokens_map)

    @cached_property
    def _control(self) -> ControlTokens:
        """The tokens that only the chat template may write."""
        added = list(self._hf.added_tokens_decoder.values())
        names = control_names(added, self._hf.all_special_tokens, self._template.facts.turns)
        normalizer = getattr(self._backend, "normalizer", None)
        is_folded = normalizer is not None and any(token.normalized for token in added if token.content in names)
        fold = fold_of(normalizer.normalize_str) if is_folded and normalizer is not None else None
        return ControlTokens(names, self._template.constants, fold)

    async def _prompt(self, request: TextGenerationRequest) -> tuple[TokenArray, tuple[PromptImage, ...]]:
        """Token ids and images of a prompt, checked. A subclass for models that see images overrides this."""
        assert not request.images, "images for a tokenizer of texts"
        return self._check_prompt(await self._encode_prompt(request), request), ()

    async def _encode_prompt(self, request: TextGenerationRequest) -> TokenArray:
        if request.messages:
            return await self._encode_chat(request)
        if isinstance(request.prompt, str):
            encode = partial(self._text_ids, request=request)
            return await self._in_thread_if_long(len(request.prompt), encode, request.prompt)
        return id_array(() if request.prompt is None else request.prompt, "prompt")

    async def _encode_chat(self, request: TextGenerationRequest) -> TokenArray:
        """Here where that takes no time to speak of, else in one of few threads."""
        if (
            len(request.messages) > self.max_length and request.truncate_prompt_tokens is None
        ):  # a message has a token at least
            raise PromptTooLongError(len(request.messages), self.max_length, at_least=True)
        if is_short(request.messages, request.chat_template_options, INLINE_CHARACTERS):
            try:
                return self._chat_ids(request, INLINE_SECONDS)
            except TemplateTimeError:
                pass  # a template that does much with little
        return await asyncio.get_running_loop().run_in_executor(_RENDERS, self._long_chat_ids, request)

    def _check_prompt(self, ids: TokenArray, request: TextGenerationRequest) -> TokenArray:
        """`ids` again. Raises InputError where they are no prompt for this model."""
        param = "messages" if request.messages else "prompt"
        if not len(ids):
            raise InputError("The prompt is empty: it has no tokens. Give at least one.", param=param)
        self._check_range(ids, param)
        ids = self._truncated(ids, request)
        if len(ids) >= self.max_length:
            raise PromptTooLongError(len(ids), self.max_length)
        return ids

    def _truncated(self, ids: TokenArray, request: TextGenerationRequest) -> TokenArray:
        """The last tokens of a prompt (the first ones for the side "right"), as many as the request keeps."""
        limit = request.truncate_prompt_tokens
        if limit is None:
            return ids
        kept = self.max_length - 1 if limit == -1 else limit
        if len(ids) <= kept:
            return ids
        if self.takes_images and request.messages:
            raise InputError(
                "truncate_prompt_tokens works without images only: a cut could go through one.",
                param="truncate_prompt_tokens",
            )
        return ids[:kept] if request.truncation_side == "right" else ids[-kept:]

    async def _in_thread_if_long(
        self, num_characters: int, work: Callable[[ArgumentT], TokenArray], argument: ArgumentT
    ) -> TokenArray:
        if num_characters <= INLINE_CHARACTERS:
            return work(argument)
        return await asyncio.to_thread(work, argument)

    def _text_ids(self, text: str, request: TextGenerationRequest) -> TokenArray:
        if not text:
            return np.empty(0, dtype=np.int64)
        self._check_text(text, request, request.add_special_tokens)
        ids = self.encode_text(text, request.add_special_tokens)
        return self._with_one_bos(text, ids) if request.add_special_tokens else ids

    def _with_one_bos(self, text: str, ids: TokenArray) -> TokenArray:
        """A text that begins with the beginning-of-sequence token gets no second one."""
        if self._bos_text is None or not text.startswith(self._bos_text):
            return ids
        return ids[1:] if ids[:2].tolist() == [self._hf.bos_token_id] * 2 else ids

    def _chat_ids(self, request: TextGenerationRequest, seconds: float) -> TokenArray:
        """Ids of a chat; what its strings spell is text. seconds: what the template may take.

        Raises TemplateTimeError where it takes more and that was less than RENDER_SECONDS.
        """
        chat, options = self._chat(request.messages, request.chat_template_options)
        render = partial(self._template.render, seconds=seconds)
        if not self._allows_special_tokens:
            marking = Marking(self._control, lambda: strings_of([chat, options]))
            marked = [{key: marking.mark(m[key]) if _is_free(key, m[key]) else m[key] for key in m} for m in chat]
            marked_options = marking.mark(options)
            if marking.is_used:
                pieces, num_control = marking.pieces(render(marked, marked_options))
                if len(pieces) > 1:
                    return self._piece_ids(pieces, num_control, request)
        text = render(chat, options)
        self._check_text(text, request, add_special_tokens=False)
        return self.encode_text(text, add_special_tokens=False)

    def _long_chat_ids(self, request: TextGenerationRequest) -> TokenArray:
        if request.truncate_prompt_tokens is None:
            self._refuse_long_messages(request.messages)
        return self._chat_ids(request, RENDER_SECONDS)

    def _piece_ids(self, pieces: Sequence[str], num_control: int, request: TextGenerationRequest) -> TokenArray:
        """Ids of a text in pieces, between which no token may lie. num_control: the control tokens in it."""
        if len(pieces) > self.max_length and request.truncate_prompt_tokens is None:
            raise PromptTooLongError(len(pieces), self.max_length, at_least=True)
        self._check_text("".join(pieces), request, add_special_tokens=False)
        return self._piece_encoder.encode(pieces, num_control)

    @cached_property
    def _piece_encoder(self) -> PieceEncoder:
        control = [self._hf.convert_tokens_to_ids(name) for name in sorted(self._control.names - {self._hf.unk_token})]
        return PieceEncoder(partial(self.encode_text, add_special_tokens=False), self.decode_ids, control)

    def _refuse_long_messages(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Raises PromptTooLongError for megabytes that cannot fit, before any template works on them. What the
        assistant said does not count: a template may leave its thoughts out."""
        limit, head, length = LONG_TOKEN_CHARACTERS * self.max_length, [], 0
        for message in messages:
            for text in texts_of(message.get("content") if message.get("role") != "assistant" else None):
                head.append(text[: limit + 1 - length])
                length += len(head[-1])
                if length > limit:
                    return self._refuse_long_text("".join(head), add_special_tokens=False)

    def _refuse_long_text(self, text: str, add_special_tokens: bool) -> None:
        """Raises PromptTooLongError for a text whose beginning has twice the tokens of max_length: it has more than
        max_length of them however it goes on."""
        head = text[: LONG_TOKEN_CHARACTERS * self.max_length]
        if len(head) < len(text):
            num_tokens = len(self.encode_text(head, add_special_tokens))
            if num_tokens > 2 * self.max_length:
                raise PromptTooLongError(num_tokens, self.max_length, at_least=True)

    def _check_text(self, text: str, request: TextGenerationRequest, add_special_tokens: bool) -> None:
        """Raises InputError for megabytes that cannot fit, or are too many to truncate, before they are encoded."""
        if request.truncate_prompt_tokens is None:
            self._refuse_long_text(text, add_special_tokens)
        elif len(text) > MAX_TRUNCATED_CHARACTERS:
            raise InputError(
                f"The prompt has {len(text)} characters: a text that is to be truncated may have "
                f"{MAX_TRUNCATED_CHARACTERS}.",
                param="messages" if request.messages else "prompt",
            )

    def _sampling_params(self, request: TextGenerationRequest) -> SamplingParams:
        given = request.sampling_params
        if isinstance(given, SamplingParams):
            params = given
        else:
            resolved = self._logit_texts.resolved(given) if given else {}
            params = SamplingParams.from_input_and_generation_config(resolved, self._generation_config)
        if params.logit_controls is not None:
            params.logit_controls.check_vocabulary(self.vocab_size)
        self._check_range(id_array(params.stop_token_ids, "stop_token_ids"), "stop_token_ids")
        if params.max_new_tokens is not None and params.min_new_tokens > params.max_new_tokens:
            raise InputError(
                f"At least {params.min_new_tokens} and at most {params.max_new_tokens} new tokens are asked for: "
                f"lower the one or raise the other.",
                param="min_new_tokens",
            )
        ids = [self.special_names[s] for s in params.stop if s in self.special_names]  # these stop the model itself
        return replace(params, stop_token_ids=(*params.stop_token_ids, *ids)) if ids else params

    @cached_property
    def _logit_texts(self) -> LogitTexts:
        return LogitTexts(self)

    def _check_range(self, ids: TokenArray, param: str) -> None:
        outside = ids[(ids < 0) | (ids >= self.vocab_size)]
        if len(outside):
            raise InputError(
                f"Token id {outside[0]} is outside the model's vocabulary, 0 to {self.vocab_size - 1}.", param=param
            )


def _check_defaults(generation_config: Mapping[str, Any], folder: Path) -> None:
    try:
        SamplingParams.from_input_and_generation_config({}, generation_config)
    except (InputError, TypeError) as error:
        raise ConfigError(f"generation_config.json of {folder} gives unusable defaults: {error}") from error


def id_array(ids: Sequence[int], param: str) -> TokenArray:
    array = np.asarray(ids)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise InputError("Token ids must be a flat list of integers that fit 64 bits.", param=param)
    return array.astype(np.int64)


def _is_free(key: str, value: Any) -> bool:
    """Whether a field of a message is the client's own text, and not a role that templates compare."""
    return key != "role" or value not in ROLES
