"""TextTokenizer: contexts, errors, defaults, parity with Hugging Face; and that torch stays out."""

from __future__ import annotations

import asyncio
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from max_ray.errors import ConfigError, InputError, ModelPathError, PromptTooLongError
from max_ray.interfaces import RequestID, SamplingParams, TextContext, TextGenerationRequest
from max_ray.tokenization.token_bytes import TokenText
from max_ray.tokenization.tokenizer import TextTokenizer
from tests.byte_tokenizer import BOS_ID, EOS_ID, VOCAB_SIZE, write_byte_fallback, write_byte_level

DEMO = Path(__file__).parents[2] / "deployments/demo/shakespeare"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_level(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> TextTokenizer:
    return TextTokenizer(folder, max_length=32)


def request(**fields: Any) -> TextGenerationRequest:
    return TextGenerationRequest(request_id=RequestID(), **fields)


async def test_text_prompt(tokenizer: TextTokenizer) -> None:
    context = await tokenizer.new_context(request(prompt="hi", model_name="m", logprobs=3, echo=True))
    assert context.tokens.all.tolist() == [BOS_ID, *tokenizer.encode_text("hi", False)]
    assert (context.model_name, context.log_probabilities, context.log_probabilities_echo) == ("m", 3, True)
    assert context.max_length == 32
    assert context.eos_token_ids == {EOS_ID}


async def test_token_ids_are_taken_as_they_are(tokenizer: TextTokenizer) -> None:
    context = await tokenizer.new_context(request(prompt=[7, 8, 260]))
    assert context.tokens.all.tolist() == [7, 8, 260]
    context = await tokenizer.new_context(request(prompt=np.array([7, 8])))
    assert context.tokens.all.tolist() == [7, 8]


async def test_chat_is_rendered_and_special_tokens_are_not_doubled(tokenizer: TextTokenizer) -> None:
    context = await tokenizer.new_context(request(messages=[{"role": "user", "content": "hi", "name": "Ann"}]))
    assert await tokenizer.decode(context.tokens.all) == "<|user|>hi@Ann<|assistant|>"
    assert await tokenizer.decode(context.tokens.all, skip_special_tokens=True) == "hi@Ann"


async def test_text_parts_are_joined_for_a_template_that_wants_text(tokenizer: TextTokenizer) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    context = await tokenizer.new_context(request(messages=[{"role": "user", "content": parts}]))
    assert not tokenizer.expects_content_wrapping
    assert await tokenizer.decode(context.tokens.all) == "<|user|>a\nb<|assistant|>"


async def test_strings_are_wrapped_for_a_template_that_wants_parts(tmp_path: Path) -> None:
    template = "{% for m in messages %}{% for p in m['content'] %}[{{ p['text'] }}]{% endfor %}{% endfor %}"
    wrapping = TextTokenizer(write_byte_level(tmp_path, chat_template=template), max_length=32)
    assert wrapping.expects_content_wrapping
    assert wrapping.render_chat([{"role": "user", "content": "a"}]) == "[a]"


async def test_a_developer_is_a_system_message(tokenizer: TextTokenizer) -> None:
    context = await tokenizer.new_context(request(messages=[{"role": "developer", "content": "x", "name": "Ann"}]))
    assert await tokenizer.decode(context.tokens.all) == "<|system|>x@Ann<|assistant|>"


def test_template_options(tokenizer: TextTokenizer) -> None:
    chat = [{"role": "user", "content": "a"}]
    assert tokenizer.render_chat(chat, {"add_generation_prompt": False}) == "<|user|>a"


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": [0, VOCAB_SIZE]}, "prompt", f"{VOCAB_SIZE} is outside"),
        ({"prompt": [-1]}, "prompt", "-1 is outside"),
        ({"prompt": [10**30]}, "prompt", "64 bits"),
        ({"prompt": [1.5]}, "prompt", "integers"),
        ({"prompt": "a\ud800"}, "prompt", "surrogate at character 1"),
        ({"messages": [{"role": "critic", "content": "x"}]}, "messages[0].role", "Only system, user"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages", "cannot see images"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "messages", "list of"),
        ({"prompt": "a", "sampling_params": {"top_p": 0.0}}, "top_p", "in (0, 1]"),
        ({"prompt": "a", "sampling_params": {"stop_token_ids": (999,)}}, "stop_token_ids", "999 is outside"),
        (
            {"prompt": "a", "sampling_params": {"min_new_tokens": 3, "max_new_tokens": 2}},
            "min_new_tokens",
            "lower the one",
        ),
        ({"prompt": "a", "sampling_params": {"min_new_tokens": 10**19}}, "min_new_tokens", "from 0 to"),
        ({"prompt": "a", "sampling_params": {"top_k": 5.0}}, "top_k", "whole number"),
    ],
)
async def test_bad_requests(tokenizer: TextTokenizer, fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        await tokenizer.new_context(request(**fields))
    assert caught.value.param == param
    assert words in str(caught.value)


async def test_length_border(tokenizer: TextTokenizer) -> None:
    context = await tokenizer.new_context(request(prompt=[7] * 31))
    assert context.remaining_new_tokens == 1
    with pytest.raises(PromptTooLongError) as caught:
        await tokenizer.new_context(request(prompt=[7] * 32))
    assert (caught.value.num_tokens, caught.value.max_length) == (32, 32)


async def test_a_hopeless_prompt_is_refused_by_its_beginning(tokenizer: TextTokenizer) -> None:
    for fields in ({"prompt": "x" * 10**6}, {"messages": [{"role": "user", "content": "x" * 10**6}]}):
        with pytest.raises(PromptTooLongError, match=r"at least 5\d\d") as caught:
            await tokenizer.new_context(request(**fields))
        assert caught.value.num_tokens <= 16 * 32 + 1


def test_too_long_errors_travel_between_processes() -> None:
    error = pickle.loads(pickle.dumps(PromptTooLongError(9, 8, at_least=True)))
    assert (str(error), error.param) == (str(PromptTooLongError(9, 8, at_least=True)), "prompt")
    assert (error.num_tokens, error.max_length) == (9, 8)


async def test_long_text_encodes_in_a_thread_to_the_same_ids(folder: Path) -> None:
    roomy = TextTokenizer(folder, max_length=100_000)
    text = "word " * 5000
    piecewise = [roomy.encode_text(text[i : i + 1000], False) for i in range(0, len(text), 1000)]
    assert (await roomy.encode(text, add_special_tokens=False)).tolist() == np.concatenate(piecewise).tolist()
    chat = await roomy.new_context(request(messages=[{"role": "user", "content": text}]))
    assert await roomy.decode(chat.tokens.all, skip_special_tokens=True) == text


async def test_the_event_loop_runs_on_while_a_long_text_is_encoded(folder: Path) -> None:
    roomy = TextTokenizer(folder, max_length=100_000)
    encoding = asyncio.create_task(roomy.encode("some words " * 50_000))
    num_turns = 0
    while not encoding.done():
        await asyncio.sleep(0.001)
        num_turns += 1
    assert num_turns > 10


async def test_sampling_defaults_come_from_the_model(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path, do_sample=True, temperature=0.6, top_p=0.9, eos_token_id=[4, 2])
    tokenizer = TextTokenizer(folder, max_length=32)
    assert (tokenizer.eos, tokenizer.eos_token_ids) == (4, {2, 4})
    merged = (await tokenizer.new_context(request(prompt="a", sampling_params={"temperature": 0.1}))).sampling_params
    assert (merged.temperature, merged.top_p) == (0.1, 0.9)
    fixed = SamplingParams(top_k=3)
    assert (await tokenizer.new_context(request(prompt="a", sampling_params=fixed))).sampling_params is fixed


def test_eos_of_the_tokenizer_is_the_last_resort(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path)
    (folder / "config.json").write_text("{}")
    assert TextTokenizer(folder, max_length=8).eos == EOS_ID
    assert TextTokenizer(folder, max_length=8, eos_token_ids=[9]).eos == 9


async def test_context_validators_run(folder: Path) -> None:
    def refuse(context: TextContext) -> None:
        raise InputError(f"{len(context.tokens)} tokens are not liked")

    strict = TextTokenizer(folder, max_length=32, context_validators=[refuse])
    with pytest.raises(InputError, match="3 tokens"):
        await strict.new_context(request(prompt="ab"))


async def test_decode_takes_one_token_as_on_the_seed_page(tokenizer: TextTokenizer) -> None:
    token = tokenizer.encode_text("x", False)[0]
    assert await tokenizer.decode(token) == "x"
    assert await tokenizer.decode(EOS_ID, skip_special_tokens=True) == ""
    with pytest.raises(TypeError, match="skip_specials"):
        await tokenizer.decode(token, skip_specials=True)


async def test_no_chat_template(tmp_path: Path) -> None:
    plain = TextTokenizer(write_byte_level(tmp_path, chat_template=None), max_length=32)
    with pytest.raises(InputError, match="no chat template"):
        await plain.new_context(request(messages=[{"role": "user", "content": "x"}]))


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(ModelPathError, match="neither a folder nor"):
        TextTokenizer(tmp_path / "nothing", max_length=8)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelPathError, match=r"put the model's tokenizer\.json and .* beside config\.json\.$"):
        TextTokenizer(tmp_path, max_length=8)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelPathError, match=r"^[^\n]* again\.$"):
        TextTokenizer(tmp_path, max_length=8)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        TextTokenizer(tmp_path, max_length=8)
    bad = write_byte_level(tmp_path / "bad", top_p=0)
    with pytest.raises(ConfigError, match="unusable defaults"):
        TextTokenizer(bad, max_length=8)


def test_token_bytes(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    level = TokenText(tokenizer)
    ids = tokenizer.encode_text("\u00e9 ", False).tolist()
    assert [level.bytes_of(i) for i in ids] == [b"\xc3", b"\xa9", b" "]
    assert [level.text_of(i) for i in ids] == ["bytes:\\xc3", "bytes:\\xa9", " "]
    assert (level.text_of(EOS_ID), level.is_special(EOS_ID), level.is_special(ids[0])) == ("</s>", True, False)
    assert level.text_of(10**6) == ""
    fallback = TextTokenizer(write_byte_fallback(tmp_path), max_length=32)
    texts = TokenText(fallback)
    pieces = fallback.encode_text("a\u00e9", False).tolist()
    assert b"".join(texts.bytes_of(i) for i in pieces) == " a\u00e9".encode()


def test_every_byte_has_its_token(tokenizer: TextTokenizer) -> None:
    table = TokenText(tokenizer)
    assert sorted(table.bytes_of(i) for i in range(5, VOCAB_SIZE)) == [bytes([b]) for b in range(256)]


def test_equal_to_hugging_face_on_the_demo_model() -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(DEMO)
    ours = TextTokenizer(DEMO, max_length=2048)
    for text in ("To be, or not to be", " \n\nROMEO:\n  caf\u00e9 \U0001f600", "<|user|>x<|end|>"):
        ids = theirs(text)["input_ids"]
        assert ours.encode_text(text).tolist() == ids
        assert ours.decode_ids(ids, True) == theirs.decode(ids, skip_special_tokens=True)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}]
    assert ours.render_chat(chat) == theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


def test_neither_the_tokenizer_nor_the_routes_import_torch_or_ray(folder: Path) -> None:
    code = (
        "import sys, max_ray.serve.api.routes\n"
        "from max_ray.tokenization.tokenizer import TextTokenizer\n"
        f"TextTokenizer({str(folder)!r}, max_length=8).render_chat([{{'role': 'user', 'content': 'x'}}])\n"
        "print([m for m in ('torch', 'ray') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


async def test_a_default_gives_way_where_it_contradicts_the_request(folder: Path) -> None:
    defaults = {"min_new_tokens": 5, "max_new_tokens": 8}
    model = TextTokenizer(folder, max_length=32, generation_config=defaults)

    async def limits(**given: int) -> tuple[int, int | None]:
        params = (await model.new_context(request(prompt="a", sampling_params=given))).sampling_params
        return params.min_new_tokens, params.max_new_tokens

    assert await limits() == (5, 8)
    assert await limits(max_new_tokens=4) == (0, 4)
    assert await limits(max_new_tokens=5) == (5, 5)
    assert await limits(min_new_tokens=9) == (9, None)


@pytest.mark.parametrize("defaults", [{"top_k": 50.5}, {"max_new_tokens": 20.0}, {"min_new_tokens": 10**19}])
def test_defaults_that_are_no_counts_are_refused_at_the_start(folder: Path, defaults: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"generation_config\.json of .* unusable"):
        TextTokenizer(folder, max_length=32, generation_config=defaults)


@pytest.mark.parametrize("ids", [1.5, "x", [None], ["2"], {}])
def test_an_end_of_sequence_that_is_no_token_id(folder: Path, ids: object) -> None:
    with pytest.raises(ConfigError, match="eos_token_id must be a token id"):
        TextTokenizer(folder, max_length=32, generation_config={"eos_token_id": ids})


@pytest.mark.parametrize("content", ["null", "[]", "{}", "1", "{", "[" * 100_000])
def test_a_tokenizer_file_that_is_none(folder: Path, tmp_path: Path, content: str) -> None:
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text(content)
    with pytest.raises(ModelPathError, match="no tokenizer that can be loaded"):
        TextTokenizer(tmp_path / "model", max_length=32)


def test_all_tokens_that_decoding_leaves_out_are_special(tokenizer: TextTokenizer) -> None:
    """Also those without a role, as the control tokens of most chat templates are."""
    left_out = {i for i in range(tokenizer.vocab_size) if not tokenizer.decode_ids([i], skip_special_tokens=True)}
    assert tokenizer.special_ids == left_out == set(range(5))
