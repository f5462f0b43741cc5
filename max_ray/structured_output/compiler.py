"""GrammarCompiler: grammars compiled once a process, and the matchers of requests that go on from run to run."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from functools import partial
from typing import TypeVar

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from max_ray.errors import InputError, StructuredOutputError
from max_ray.interfaces.grammar import GrammarSpec
from max_ray.structured_output.grammar_text import grammar_text
from max_ray.structured_output.matcher import GrammarMatcher, error_line
from max_ray.structured_output.reasoning import KIND, MarkerTokens, Reasoning, ReasoningMatcher
from max_ray.structured_output.vocabulary import TokenVocabulary

T = TypeVar("T")
Matcher = GrammarMatcher | ReasoningMatcher
COMPILE_SECONDS = 10.0
MAX_COMPILED = 128
MAX_MATCHERS = 1024
_ANY_TEXT = GrammarSpec("regex", r"(?s:.*)")


def parser_limits() -> LLParserLimits:
    """What compiling a grammar and making a mask may cost; the library's defaults but for its long messages."""
    return LLParserLimits(verbose_errors=False)


class GrammarCompiler:
    """Compiles grammars for one vocabulary, in threads of its own. Thread-safe but for `matcher`.

    Args:
        load_vocabulary: Gives the vocabulary; called once, in a thread. What it raises is raised by each later call of
            `matcher`.
        starts_at_once: Whether it is called right away, so that no request waits for it and no stream stalls meanwhile;
            otherwise with the first grammar.
    """

    def __init__(self, load_vocabulary: Callable[[], TokenVocabulary], *, starts_at_once: bool = True) -> None:
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="grammars")
        self._mask_thread = ThreadPoolExecutor(1, thread_name_prefix="grammar-masks")
        self._load = load_vocabulary
        self._loading: tuple[Future[TokenVocabulary], Future[LLTokenizer]] | None = None
        self._markers: MarkerTokens | None = None
        self._lock = threading.Lock()
        self._compiled: OrderedDict[bytes, Future[LLMatcher]] = OrderedDict()
        self._matchers: OrderedDict[str, tuple[bytes, Matcher]] = OrderedDict()
        if starts_at_once:
            self._vocabulary()

    def _vocabulary(self) -> tuple[Future[TokenVocabulary], Future[LLTokenizer]]:
        """The vocabulary, and the library's tokenizer of it; the first call starts to make them."""
        with self._lock:
            if self._loading is None:
                vocabulary = self._threads.submit(self._load)
                self._loading = vocabulary, self._threads.submit(lambda: vocabulary.result().build())
            return self._loading

    def start(self, spec: GrammarSpec) -> Future[LLMatcher]:
        """Begins to compile a grammar unless that was done before; returns at once. Of reasoning, the answer's."""
        if spec.kind == KIND:
            return self.start(Reasoning.of(spec).answer or _ANY_TEXT)
        self._vocabulary()  # before what waits for it takes the threads
        with self._lock:
            future = self._compiled.get(spec.digest)
            if future is None or (future.done() and future.exception() is not None):
                future = self._threads.submit(self._compile, spec)
                self._compiled[spec.digest] = future
            self._compiled.move_to_end(spec.digest)
            while len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        return future

    def matcher(
        self, spec: GrammarSpec, stop_ids: Iterable[int], generated: Sequence[int], request_id: str | None = None
    ) -> Matcher:
        """The matcher of a request that has generated these tokens. Waits for the grammar.

        Args:
            spec: The grammar.
            stop_ids: Tokens that end the text.
            generated: Tokens so far. A matcher is made anew from them, or the one of the last call goes on.
            request_id: Finds the matcher of the last call.

        Raises:
            StructuredOutputError: The grammar does not compile in time or within its limits.
        """
        known = None if request_id is None else self._known(request_id, spec, generated)
        matcher = known or self._new(spec, stop_ids)
        matcher.advance(generated[len(matcher.tokens) :])
        if request_id is not None:
            self._matchers[request_id] = (spec.digest, matcher)
            while len(self._matchers) > MAX_MATCHERS:
                self._matchers.popitem(last=False)
        return matcher

    def forced_tokens(self, request_id: str, spec: GrammarSpec, generated: Sequence[int]) -> list[int]:
        """What must come next in a request for which `matcher` was called; empty for others."""
        matcher = self._known(request_id, spec, generated)
        if matcher is None:
            return []
        self._matchers[request_id] = (spec.digest, matcher)
        return matcher.forced_tokens() if len(matcher.tokens) == len(generated) else []

    def in_mask_thread(self, work: Callable[[], T]) -> Future[T]:
        """Runs `work` in the one thread for masks, after all that was given before. Matchers are used there only."""
        return self._mask_thread.submit(work)

    def close(self) -> None:
        """Ends the threads once they are idle."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._mask_thread.shutdown(wait=False, cancel_futures=True)

    def _known(self, request_id: str, spec: GrammarSpec, generated: Sequence[int]) -> Matcher | None:
        digest, matcher = self._matchers.pop(request_id, (b"", None))
        if matcher is None or digest != spec.digest or list(generated[: len(matcher.tokens)]) != matcher.tokens:
            return None
        return matcher

    def _new(self, spec: GrammarSpec, stop_ids: Iterable[int]) -> Matcher:
        if spec.kind != KIND:
            return self._new_grammar(spec, stop_ids)
        if self._markers is None:
            self._markers = MarkerTokens(self._vocabulary()[0].result())
        make_answer = partial(self._new_grammar, stop_ids=stop_ids)
        return ReasoningMatcher(Reasoning.of(spec), make_answer, self._markers, stop_ids)

    def _new_grammar(self, spec: GrammarSpec, stop_ids: Iterable[int]) -> GrammarMatcher:
        prototype = self._prototype(spec)
        return GrammarMatcher(prototype.deep_copy(), stop_ids, self._vocabulary()[1].result().vocab_size)

    def _prototype(self, spec: GrammarSpec) -> LLMatcher:
        future = self.start(spec)
        try:
            error = future.exception(COMPILE_SECONDS)
        except FutureTimeoutError:
            raise StructuredOutputError(f"The grammar was not compiled within {COMPILE_SECONDS:.0f} s.") from None
        if error is not None:  # whatever it is, it ends this request alone
            raise StructuredOutputError(str(error)) from error
        return future.result()

    def _compile(self, spec: GrammarSpec) -> LLMatcher:
        return compile_grammar(self._vocabulary()[1].result(), spec)


def compile_grammar(tokenizer: LLTokenizer, spec: GrammarSpec) -> LLMatcher:
    """A matcher at the beginning of the grammar; to be copied. Raises InputError for a grammar that cannot be."""
    matcher = LLMatcher(tokenizer, grammar_text(spec), log_level=0, limits=parser_limits())
    if matcher.is_error():
        raise InputError(f"The grammar cannot be compiled: {error_line(matcher.get_error())}")
    return matcher
