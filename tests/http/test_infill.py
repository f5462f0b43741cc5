"""Fill-in-the-middle: `suffix` for the vocabularies of five families, and a 400 for one without its tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import AddedToken, Tokenizer

from max_ray.serve.api.routes import build_api
from max_ray.tokenization.tokenizer import TextTokenizer
from tests.byte_tokenizer import BOS_ID, write_byte_level
from tests.http.fake_engine import FakeEngine
from tests.http.test_errors import error_of

URL = "/v1/completions"
BARS = "\uff5cfim\u2581{}\uff5c"


def coder(folder: Path, *names: str, special: bool = True) -> FakeEngine:
    """An engine whose vocabulary has these tokens behind the bytes."""
    write_byte_level(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(name, special=special, normalized=False) for name in names])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": tokenizer.get_vocab_size()}))
    return FakeEngine(TextTokenizer(folder, max_length=200), lambda context: "mid")


async def post(engine: FakeEngine, **fields: Any) -> httpx.Response:
    transport = httpx.ASGITransport(build_api(engine), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.post(URL, json={"prompt": "pre", "suffix": "suf", **fields})


def written(engine: FakeEngine) -> list[str | int]:
    """The prompt: its marks by their names, its bytes as letters."""
    ids = engine.contexts[-1].tokens.prompt.tolist()
    return ["".join(engine.tokenizer.token_piece(i) for i in ids)]


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>"], "0pre1suf2"),
        (["<fim_prefix>", "<fim_suffix>", "<fim_middle>"], "0pre1suf2"),
        ([f"<{BARS.format(name)}>" for name in ("begin", "hole", "end")], "0pre1suf2"),
        (["\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>", "\u2581<EOT>"], "0pre1suf2"),
        (["[SUFFIX]", "[PREFIX]"], "0suf1pre"),
    ],
)
async def test_each_familys_order(tmp_path: Path, names: list[str], order: str, special: bool) -> None:
    engine = coder(tmp_path, *names, special=special)
    reply = await post(engine)
    assert reply.json()["choices"][0]["text"] == "mid"
    expected = "<s>" + "".join(names[int(c)] if c.isdigit() else c for c in order)
    assert written(engine) == [expected]
    stops = [engine.tokenizer.token_piece(i) for i in engine.contexts[-1].sampling_params.stop_token_ids]
    assert stops == names[3:]


async def test_borders(tmp_path: Path) -> None:
    engine = coder(tmp_path, "[SUFFIX]", "[PREFIX]")
    await post(engine, prompt=["a", ""], suffix="\u00e9", add_special_tokens=False)
    first, second = (context.tokens.prompt.tolist() for context in engine.contexts)
    assert second == first[:-1]
    assert BOS_ID not in first
    await post(engine, suffix="")
    assert written(engine) == ["<s>pre"]
    await post(engine, prompt=[7, 8], suffix="s", stop_token_ids=[9])
    assert engine.contexts[-1].tokens.prompt.tolist()[-2:] == [7, 8]
    assert engine.contexts[-1].sampling_params.stop_token_ids == (9,)
    for fields in ({"echo": True}, {"truncate_prompt_tokens": 3}):
        assert error_of(await post(engine, **fields), 400)["param"] == "suffix"
    assert error_of(await post(engine, suffix="s" * 200), 400)["param"] == "prompt"


async def test_a_model_without_the_tokens(engine: FakeEngine) -> None:
    error = error_of(await post(engine), 400)
    assert (error["param"], "no tokens for a suffix" in error["message"]) == ("suffix", True)
    assert not engine.contexts
