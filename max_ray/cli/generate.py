"""`max-ray generate`: answers one prompt in this process."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from max_ray.config import PipelineConfig
from max_ray.errors import InputError

if TYPE_CHECKING:
    from max_ray.interfaces import TextGenerationRequest

_SAMPLING_FLAGS: dict[str, tuple[type, str]] = {
    "max_new_tokens": (int, "Most tokens to generate (default: up to the model's length)."),
    "temperature": (float, "0 is greedy (default: the model's generation_config.json)."),
    "top_k": (int, "Draw from the k most likely tokens."),
    "top_p": (float, "Draw from the most likely tokens that have this probability together."),
    "min_p": (float, "Leave out tokens less likely than this share of the most likely one."),
    "frequency_penalty": (float, "Lower tokens by how often the answer has them, from -2 to 2."),
    "presence_penalty": (float, "Lower tokens that the answer has, from -2 to 2."),
    "repetition_penalty": (float, "Lower tokens that prompt or answer have; 1 is off."),
    "seed": (int, "Makes the draws repeatable."),
}
_OTHER_NAMES = {"max_new_tokens": "--max-tokens"}
FLAGS = ("prompt", "chat", "raw", "system", "stop", *_SAMPLING_FLAGS)
"""What a command line has beside the settings."""
_REFRESH_S = 0.5


def add_generate_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the prompt and the sampling parameters to a parser."""
    prompt = parser.add_argument_group("prompt")
    prompt.add_argument("--prompt", help="Text to answer, or to continue.")
    prompt.add_argument("--system", metavar="TEXT", help="System prompt, for the chat template.")
    form = prompt.add_mutually_exclusive_group()
    form.add_argument(
        "--raw", action="store_true", help="Continue the prompt as it is. Default without a chat template."
    )
    form.add_argument("--chat", action="store_true", help="Insist on the chat template. Default with one.")
    sampling = parser.add_argument_group("sampling")
    for name, (kind, text) in _SAMPLING_FLAGS.items():
        flags = ["--" + name.replace("_", "-"), *([_OTHER_NAMES[name]] if name in _OTHER_NAMES else [])]
        sampling.add_argument(*flags, dest=name, type=kind, default=None, metavar=kind.__name__.upper(), help=text)
    sampling.add_argument(
        "--stop", action="append", metavar="TEXT", help="End before this text; may be given several times."
    )


def run_generate(config: PipelineConfig, given: dict[str, Any]) -> None:
    """Loads the model, and prints the answer as it comes. Raises MaxRayError."""
    from max_ray.interfaces import PipelineTask, RequestID, TextGenerationRequest
    from max_ray.pipelines import PIPELINE_REGISTRY

    names = (*_SAMPLING_FLAGS, "stop")
    sampling = {name: given[name] for name in names}
    check_sampling(sampling)
    with loading_progress(config.served_model_name, sys.stderr):
        tokenizer, pipeline = PIPELINE_REGISTRY.retrieve(config, PipelineTask.TEXT_GENERATION)
    text = _prompt(given, has_template=getattr(tokenizer, "chat_template", None) is not None)
    request = TextGenerationRequest(RequestID(), config.served_model_name, sampling_params=sampling, **text)
    for piece in generated_text(tokenizer, pipeline, request):
        print(piece, end="", flush=True)
    print()


def check_sampling(sampling: dict[str, Any]) -> None:
    """Raises InputError for a value out of range, before anything is loaded."""
    from max_ray.interfaces import SamplingParams

    SamplingParams.from_input_and_generation_config(sampling, {})


def _prompt(given: dict[str, Any], has_template: bool) -> dict[str, Any]:
    """The fields of a request. Raises InputError for a chat without a template."""
    if (given["chat"] or given["system"]) and not has_template:
        raise InputError("This model has no chat template: leave --chat and --system out.")
    if given["raw"] or not has_template:
        if given["system"]:
            raise InputError("--system has no place in a raw prompt: leave --raw or --system out.")
        return {"prompt": given["prompt"]}
    system = [{"role": "system", "content": given["system"]}] if given["system"] else []
    return {"messages": [*system, {"role": "user", "content": given["prompt"]}]}


def generated_text(tokenizer: Any, pipeline: Any, request: TextGenerationRequest) -> Iterator[str]:
    """Runs one request in this process; text as it comes, without the stop string. Raises MaxRayError."""
    from max_ray.interfaces import TextContext, TextGenerationInputs
    from max_ray.tokenization.token_bytes import token_text_of

    context = asyncio.run(tokenizer.new_context(request))
    tokens = token_text_of(tokenizer)
    detokenizer, matcher = tokens.detokenizer(context.tokens.prompt), tokens.stop_matcher(context.sampling_params.stop)
    try:
        while not context.is_done:
            inputs = TextGenerationInputs[TextContext](batches=[{context.request_id: context}], num_steps=1)
            yield matcher.push(detokenizer.push(pipeline.execute(inputs)[context.request_id].tokens))
            if matcher.matched is not None:
                return
    finally:
        pipeline.release(context.request_id)
    yield matcher.push(detokenizer.flush())
    if matcher.matched is None:
        yield matcher.flush()


@contextmanager
def loading_progress(name: str, stream: TextIO) -> Iterator[None]:
    """Says what loading does and for how long: on a terminal one line that changes and goes, elsewhere a line."""
    if not stream.isatty():
        print(f"Loading {name} ...", file=stream, flush=True)
        yield
        return
    progress = _Progress(name, stream)
    loggers = [logging.getLogger(root) for root in ("max_ray", "architectures")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        for handler in logger.handlers:  # they print no more than before
            handler.setLevel(max(handler.level, logger.level))
        logger.setLevel(min(logger.level, logging.INFO))
        logger.addHandler(progress)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(progress)
            logger.setLevel(level)
        progress.end()


class _Progress(logging.Handler):
    """Shows the seconds, and the last phase that the log told."""

    def __init__(self, name: str, stream: TextIO) -> None:
        super().__init__(logging.INFO)
        self._name = name
        self._stream = stream
        self._started = time.monotonic()
        self._phase = ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._show, daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Takes a record of the log."""
        self._phase = record.getMessage().partition("\n")[0]

    def end(self) -> None:
        """Removes the line."""
        self._ended.set()
        self._thread.join()
        self._stream.write("\r\x1b[K")
        self._stream.flush()

    def _show(self) -> None:
        while not self._ended.wait(_REFRESH_S):
            seconds = time.monotonic() - self._started
            phase = f"  {self._phase[:60]}" if self._phase else ""
            self._stream.write(f"\r\x1b[KLoading {self._name}: {seconds:.0f} s{phase}")
            self._stream.flush()
