"""Which tokens end a text, where the chat template is found, and what the files beside tokenizer.json may say."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from max_ray.errors import ConfigError, ModelPathError
from max_ray.tokenization.tokenizer import TextTokenizer
from tests.byte_tokenizer import write_byte_level
from tests.tokenization.tokenizer_folders import byte_level

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TEMPLATES = {
    "ChatML": CHATML,
    "trimmed": "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }} {{ '<|im_' + 'end|>' }}{% endfor %}",
    "by its name": "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}",
    "parts": "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}<|im_end|>{% endfor %}",
    "last only": "{% for m in messages %}{{ m.content }}{{ '<|im_end|>' if loop.last else '<s>' }}{% endfor %}",
}
NO_ENDS = {
    "none": None,
    "nothing behind": "{% for m in messages %}<|im_end|>{{ m.role }}{{ m.content }}{% endfor %}",
    "text behind": "{% for m in messages %}{{ m.content }} end <|im_end|>{% endfor %}",
    "refuses": "{{ raise_exception('no') }}<|im_end|>",
    "does not parse": "{% if %}<|im_end|>",
    "shows no answer": "{{ messages[0].content }}<|im_end|>",
}
IM_END = 421


def write(folder: Path, settings: dict[str, Any], files: dict[str, Any] | None = None) -> Path:
    """Tokens: <s> 0, </s> 1, ..., <|im_start|> 420, <|im_end|> 421."""
    folder.mkdir(exist_ok=True)
    byte_level().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", **settings}))
    for name, content in (files or {}).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def named(text: str) -> str:
    """A template that writes a text before the messages."""
    return text + ":{% for m in messages %}{{ m.content }}{% endfor %}"


def ends_of(folder: Path, **options: Any) -> set[int]:
    return set(TextTokenizer(folder, max_length=64, **options).eos_token_ids)


def test_the_ends_are_those_of_all_files_together(tmp_path: Path) -> None:
    files = {"generation_config.json": {"eos_token_id": [3, 5]}, "config.json": {"eos_token_id": 2}}
    tokenizer = TextTokenizer(write(tmp_path, {"eos_token": "</s>", "chat_template": CHATML}, files), max_length=64)
    assert tokenizer.eos_token_ids == {1, 2, 3, 5, IM_END}
    assert tokenizer.eos == 3
    assert ends_of(tmp_path, eos_token_ids=[9]) == {9}
    assert ends_of(tmp_path, eos_token_ids=[]) == set()
    assert ends_of(tmp_path, generation_config={}) == {1, 2, IM_END}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_token_behind_an_answer_ends_a_turn(name: str, tmp_path: Path) -> None:
    base = {"generation_config.json": {"eos_token_id": 1}}
    settings = {"eos_token": "<|im_end|>" if name == "by its name" else "</s>", "chat_template": TEMPLATES[name]}
    assert ends_of(write(tmp_path, settings, base)) == {1, IM_END}


@pytest.mark.parametrize("name", NO_ENDS)
def test_a_template_that_names_no_end(name: str, tmp_path: Path) -> None:
    assert ends_of(write(tmp_path, {"eos_token": "</s>", "chat_template": NO_ENDS[name]})) == {1}


def test_an_end_that_the_model_has_no_row_for_is_none(tmp_path: Path) -> None:
    config = {"config.json": {"vocab_size": 422, "eos_token_id": 1}}
    folder = write(tmp_path, {"eos_token": "<|new|>", "additional_special_tokens": ["", "<s>"]}, config)
    assert ends_of(folder) == {1}


async def test_a_chat_stops_at_the_end_of_its_turn(tmp_path: Path) -> None:
    from max_ray.interfaces import RequestID, TextGenerationRequest

    tokenizer = TextTokenizer(write(tmp_path, {"eos_token": "</s>", "chat_template": CHATML}), max_length=64)
    context = await tokenizer.new_context(
        TextGenerationRequest(request_id=RequestID(), messages=[{"role": "user", "content": "x"}])
    )
    assert context.stop_ids >= {1, IM_END}


@pytest.mark.parametrize(
    ("settings", "files", "expected"),
    [
        ({}, {"chat_template.json": {"chat_template": named("json")}}, "json"),
        ({}, {"chat_template.jinja": named("jinja")}, "jinja"),
        ({"chat_template": named("own")}, {"chat_template.json": {"chat_template": named("json")}}, "own"),
        ({"chat_template": named("own")}, {"chat_template.jinja": named("jinja")}, "jinja"),
        ({"chat_template": [{"name": n, "template": named(n)} for n in ("rag", "default")]}, {}, "default"),
        ({}, {"chat_template.json": {"chat_template": [{"name": "default", "template": named("d")}]}}, "d"),
        ({}, {"chat_template.jinja": named("jinja"), "additional_chat_templates/tool_use.jinja": "t"}, "jinja"),
        ({"chat_template": named("{{ bos_token }}{{ eos_token }}"), "eos_token": {"content": "</s>"}}, {}, "<s></s>"),
    ],
)
def test_where_the_chat_template_stands(
    settings: dict[str, Any], files: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    tokenizer = TextTokenizer(write(tmp_path, settings, files), max_length=64)
    assert tokenizer.render_chat([{"role": "user", "content": "x"}]) == f"{expected}:x"


def test_tools_take_the_template_for_tools(tmp_path: Path) -> None:
    for_tools = named("{% for t in tools or [] %}{{ t | tojson }}{% endfor %}")
    files = {"chat_template.jinja": named("plain"), "additional_chat_templates/tool_use.jinja": for_tools}
    tokenizer = TextTokenizer(write(tmp_path, {}, files), max_length=64)
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
    text = tokenizer.render_chat([{"role": "user", "content": "x"}], {"tools": [tool]})
    assert text.endswith(":x")
    assert json.loads(text.removesuffix(":x")) == tool


@pytest.mark.parametrize("template", [5, ["x"], [{"name": "default"}], {"default": 3}])
def test_a_chat_template_that_is_no_text(template: object, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="chat_template must be a text"):
        TextTokenizer(write(tmp_path, {"chat_template": template}), max_length=64)


@pytest.mark.parametrize(
    ("settings", "files", "error", "words"),
    [
        ({"eos_token": 5}, {}, ConfigError, "names 5 as a token"),
        ({"eos_token": {"text": "x"}}, {}, ConfigError, "as a token; that must be a text"),
        ({"additional_special_tokens": [None]}, {}, ConfigError, "names None as a token"),
        ({"added_tokens_decoder": {"x": "y"}}, {}, ConfigError, "the id 'x'; that must be a number"),
        ({"added_tokens_decoder": {"-1": "y"}}, {}, ConfigError, "the id '-1'"),
        ({"added_tokens_decoder": {"9" * 5000: "y"}}, {}, ConfigError, "that must be a number"),
        ({"added_tokens_decoder": ["y"]}, {}, ConfigError, "added_tokens_decoder must be an object"),
        ({"additional_special_tokens": 3}, {}, ConfigError, "additional_special_tokens must be a list"),
        ({}, {"added_tokens.json": {"y": True}}, ConfigError, "the id True"),
        ({}, {"added_tokens.json": ["y"]}, ConfigError, "must hold a JSON object"),
        ({}, {"special_tokens_map.json": "{"}, ConfigError, "not valid JSON"),
        ({"added_tokens_decoder": {"300": "new"}}, {}, ModelPathError, r"has '.*' at the id 300, and .* 'new'"),
        ({"added_tokens_decoder": {"9999999": "new"}}, {}, ModelPathError, "ids up to 421, and .* the id 9999999"),
    ],
)
def test_files_that_contradict_or_are_malformed(
    settings: dict[str, Any], files: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        TextTokenizer(write(tmp_path, settings, files), max_length=64)


def test_an_id_that_contradicts_the_file_gives_way(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = TextTokenizer(write(tmp_path, {"added_tokens_decoder": {"420": "<|im_end|>"}}), max_length=64)
    assert tokenizer.encode_text("<|im_end|>").tolist() == [IM_END]
    assert "tokenizer.json gives '<|im_end|>' the id 421" in caplog.text


def test_flags_of_a_token_that_only_the_settings_name(tmp_path: Path) -> None:
    token = {"content": "<|x|>", "lstrip": True, "rstrip": True, "special": False, "normalized": False}
    tokenizer = TextTokenizer(write(tmp_path, {"added_tokens_decoder": {"422": token}}), max_length=64)
    assert tokenizer.encode_text("a  <|x|>  b").tolist() == [66, 422, 67]
    assert tokenizer.decode_ids([66, 422], True) == "a<|x|>"


def test_a_token_with_a_role_leaves_nothing_in_the_text(tmp_path: Path) -> None:
    folder = write(tmp_path, {"eos_token": "<|im_end|>"})
    stored = json.loads((folder / "tokenizer.json").read_text())
    for token in stored["added_tokens"]:
        token["special"] = False
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    tokenizer = TextTokenizer(folder, max_length=64)
    assert tokenizer.decode_ids([66, IM_END, 420], True) == "a<|im_start|>"
    assert tokenizer.special_ids == {0, IM_END}


def test_special_tokens_may_be_ordinary_text(tmp_path: Path) -> None:
    tokenizer = TextTokenizer(write(tmp_path, {"split_special_tokens": True}), max_length=64)
    assert 420 not in tokenizer.encode_text("<|im_start|>")


@pytest.mark.parametrize("post", ["none", "bytes", "begin", "both", "Roberta", "Bert", "two"])
def test_a_flag_adds_only_what_the_file_does_not(post: str, tmp_path: Path) -> None:
    begin = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    processor, expected = {
        "none": (None, [0, 66, 1]),
        "bytes": (processors.ByteLevel(), [0, 66, 1]),
        "begin": (begin, [0, 66, 1]),
        "both": (processors.TemplateProcessing(single="b $A e", special_tokens=[("b", 5), ("e", 6)]), [5, 66, 6]),
        "Roberta": (processors.RobertaProcessing(("e", 6), ("b", 5)), [5, 66, 6]),
        "two": (processors.Sequence([processors.ByteLevel(), begin]), [0, 66, 1]),
        "Bert": (processors.BertProcessing(("e", 6), ("b", 5)), [5, 66, 6]),
    }[post]
    folder = write(tmp_path, {"eos_token": "</s>", "add_bos_token": True, "add_eos_token": True})
    made = byte_level()
    if processor is not None:
        made.post_processor = processor
    made.save(str(folder / "tokenizer.json"))
    assert TextTokenizer(folder, max_length=64).encode_text("a").tolist() == expected


def test_a_beginning_whose_name_the_library_would_parse(tmp_path: Path) -> None:
    folder = write(tmp_path, {"bos_token": "$A:1", "add_bos_token": True})
    assert TextTokenizer(folder, max_length=64).encode_text("a").tolist() == [422, 66]


@pytest.mark.parametrize("content", ['{"version": "1.0"}', '{"model": {"type": "BPE", "vocab": 3, "merges": []}}', "7"])
def test_a_tokenizer_json_of_another_shape(content: str, tmp_path: Path) -> None:
    (write(tmp_path, {}) / "tokenizer.json").write_text(content)
    with pytest.raises(ModelPathError, match=r"^[^\n]*no tokenizer that can be loaded[^\n]* again\.$"):
        TextTokenizer(tmp_path, max_length=64)


def test_code_that_a_folder_names_is_not_needed(tmp_path: Path) -> None:
    folder = write(tmp_path, {"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}, "tokenizer_class": "X"})
    assert TextTokenizer(folder, max_length=64).encode_text("a").tolist() == [66]


def test_tokenizing_needs_no_transformers(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path / "model", chat_template=None)
    shutil.copytree(folder, tmp_path / "copy")
    code = (
        "import sys\nfrom max_ray.tokenization.tokenizer import TextTokenizer\n"
        f"TextTokenizer({str(tmp_path / 'copy')!r}, max_length=8).encode_text('a')\n"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
