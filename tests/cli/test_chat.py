"""`max-ray chat`: the REPL against the real routes over a fake engine."""

from __future__ import annotations

import asyncio
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from max_ray.cli import main as cli
from max_ray.cli.chat.client import Client, Piece, ServerError
from max_ray.cli.chat.conversation import Conversation
from max_ray.cli.chat.display import Display, Speed
from max_ray.cli.chat.repl import Repl
from max_ray.errors import InputError, WorkerGroupError
from max_ray.interfaces import TextContext
from max_ray.serve.api.engine import ApiOptions
from max_ray.serve.api.structured_output_fields import close_checker
from max_ray.tokenization.tokenizer import TextTokenizer
from tests.byte_tokenizer import write_byte_level
from tests.cli.servers import Server, serving
from tests.http.fake_engine import FakeEngine


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer(write_byte_level(tmp_path_factory.mktemp("chat-tokenizer")), max_length=4000)


@pytest.fixture(scope="module", autouse=True)
def _no_process_is_left() -> Iterator[None]:
    yield
    close_checker()


@pytest.fixture
def engine(tokenizer: TextTokenizer) -> FakeEngine:
    """Says how many answers it has given."""
    made = FakeEngine(tokenizer, lambda context: "")
    made.script = lambda context: f"answer {len(made.contexts)}"
    return made


@pytest.fixture
def server(engine: FakeEngine) -> Iterator[Server]:
    with serving(engine) as server:
        yield server


class Terminal(io.StringIO):
    """An output that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def typed(*lines: str | type[BaseException]) -> Callable[[str], str]:
    """A reader of these lines; classes are raised. The input ends behind them."""
    left = iter(lines)

    def read(prompt: str) -> str:
        line = next(left, EOFError)
        if isinstance(line, str):
            return line
        raise line

    return read


def chat(
    server: Server, *lines: str | type[BaseException], stream: io.StringIO | None = None
) -> tuple[str, Conversation]:
    """What is written for these lines, and the conversation."""
    stream = stream or io.StringIO()
    conversation = Conversation("fake")
    Repl(Client(server.url), conversation, Display(stream), typed(*lines)).run()
    return stream.getvalue(), conversation


def text_of(engine: FakeEngine, context: TextContext) -> str:
    pieces = [engine.tokenizer.token_piece(token) for token in context.tokens.prompt.tolist()]
    return "".join(pieces).replace("\u0120", " ")


def test_turns_carry_what_was_said(server: Server, engine: FakeEngine) -> None:
    said, conversation = chat(server, "one", "two")
    assert re.search(r"^answer 1\n\[8 tokens.*\]\nanswer 2\n\[", said.replace("9 tokens", "8 tokens"))
    assert [one["content"] for one in conversation.messages] == ["one", "answer 1", "two", "answer 2"]
    second = text_of(engine, engine.contexts[1])
    assert second.index("one") < second.index("two")


def test_system_and_parameters_have_their_effect(server: Server, engine: FakeEngine) -> None:
    lines = [
        "/system Be brief.",
        "/set temperature 0.5",
        "/set stop wer",
        "/set max_tokens 50",
        "hi",
        "/set stop",
        "hi",
    ]
    said, conversation = chat(server, *lines)
    assert "ans\n" in said
    assert said.endswith("]\n")
    assert conversation.messages[1]["content"] == "ans"
    assert conversation.messages[3]["content"] == "answer 2"
    assert engine.contexts[0].sampling_params.temperature == 0.5
    assert engine.contexts[0].sampling_params.max_new_tokens == 50
    _, conversation = chat(server, "/system Be brief.", "/system", "hi")
    assert conversation.body()["messages"][0]["role"] == "user"


def test_several_lines_are_one_message(server: Server) -> None:
    _, conversation = chat(server, '"""first', "  second", '/help"""', "third", '"""', "a", '"""', '"""b"""')
    asked = [one["content"] for one in conversation.messages if one["role"] == "user"]
    assert asked == ["first\n  second\n/help", "third", "a", "b"]
    _, conversation = chat(server, '"""never closed', "x")
    assert conversation.messages == []


def test_regen_clear_and_mistakes(server: Server, engine: FakeEngine) -> None:
    said, conversation = chat(server, "hi", "/regen", "/regen")
    assert [one["content"] for one in conversation.messages] == ["hi", "answer 3"]
    assert len({context.tokens.prompt.tobytes() for context in engine.contexts}) == 1
    said, conversation = chat(server, "hi", "/clear", "/regen", "/sytem x", "/", "/set model x", "/image", "/save", "")
    assert conversation.messages == []
    for sentence in (
        "There is no message to answer.",
        "There is no command /sytem. Did you mean 'system'?",
        "model cannot be set here.",
        "A file is missing: /image FILE.",
        "A file is missing: /save FILE.",
    ):
        assert f"error: {sentence}" in said
    assert "/system [TEXT]" in chat(server, "/help")[0]


def test_a_refused_message_is_taken_back(server: Server) -> None:
    said, conversation = chat(server, "/set temprature 1", "hi", "/set temprature", "hi")
    assert "error: Unknown field 'temprature'. Did you mean 'temperature'?" in said
    assert [one["role"] for one in conversation.messages] == ["user", "assistant"]
    said, conversation = chat(server, "hi", "/set temprature 1", "/regen")
    assert "error: " in said
    assert [one["content"] for one in conversation.messages] == ["hi", "answer 2"], "the answer before stays"


def test_save_and_load(server: Server, engine: FakeEngine, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    chat(server, "/system Be brief.", "/set seed 7", "hi", f"/save {file}", f"/save {file}")
    assert file.stat().st_mode & 0o777 == 0o600
    _, conversation = chat(server, f"/load {file}", "more")
    assert (conversation.system, conversation.parameters) == ("Be brief.", {"seed": 7})
    assert [one["content"] for one in conversation.messages] == ["hi", "answer 1", "more", "answer 2"]
    assert engine.contexts[1].sampling_params.seed == 7


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"format": "max-ray chat"}', '{"format": "max-ray chat", "system": "", "parameters": {}, '
     '"messages": [{"role": "system", "content": ""}]}'],
)  # fmt: skip
def test_other_files_are_neither_loaded_nor_overwritten(server: Server, tmp_path: Path, text: str) -> None:
    file = tmp_path / "notes.txt"
    file.write_text(text)
    said, _ = chat(server, f"/load {file}", f"/save {file}", f"/load {tmp_path}", "/load /none")
    assert said.count("is no chat that /save wrote.") == 2
    assert said.count("cannot be read: ") == 2
    assert file.read_text() == text


def test_pictures_go_with_the_next_message_alone(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    conversation = Conversation("m")
    conversation.attach(tmp_path / "a.png")
    conversation.ask("what is it?")
    picture, text = conversation.messages[0]["content"]
    assert picture["image_url"]["url"] == "data:image/png;base64,iVBORw=="
    assert text == {"type": "text", "text": "what is it?"}
    conversation.take_back()
    assert len(conversation.images) == 1
    conversation.ask("again")
    conversation.answer("a dot")
    conversation.ask("and?")
    assert conversation.messages[2]["content"] == "and?"
    with pytest.raises(InputError, match="no suffix of a picture"):
        conversation.attach(tmp_path / "a.txt")
    with pytest.raises(InputError, match="cannot be read"):
        conversation.attach(tmp_path / "none.jpg")


def test_a_picture_for_a_model_without_eyes_is_refused_in_a_sentence(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    said, conversation = chat(server, f"/image {tmp_path / 'a.png'}", "what is it?")
    assert "The next message has 1 picture(s)." in said
    assert "error: " in said
    assert conversation.messages == []
    assert len(conversation.images) == 1


def test_models(server: Server, engine: FakeEngine) -> None:
    engine.model_aliases = ("other",)
    said, conversation = chat(server, "/model", "/model other", "hi", "/model wrong", "hi")
    assert said.startswith("fake (in use)\n")
    assert "error: The model 'wrong' is not served here." in said
    assert len(conversation.messages) == 2


@pytest.fixture
def can_be_interrupted() -> Iterator[None]:
    """A shell starts background jobs with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_stops_the_answer_alone(server: Server, engine: FakeEngine, can_be_interrupted: None) -> None:
    """A real signal while the stream waits: the request ends, the chat goes on with what was said."""
    engine.script = lambda context: "a long answer"
    conversation = Conversation("fake")
    stream = io.StringIO()

    def interrupt() -> None:
        while not stream.getvalue():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    async def close_gate() -> None:
        engine.gate = asyncio.Event()

    asyncio.run_coroutine_threadsafe(close_gate(), server.loop).result(5)
    repl = Repl(Client(server.url), conversation, Display(stream))
    thread = threading.Thread(target=interrupt)
    thread.start()
    repl.ask("hi")
    thread.join()
    assert stream.getvalue().endswith("[stopped]\n")
    assert conversation.messages[1] == {"role": "assistant", "content": "a"}
    deadline = time.monotonic() + 5
    while not engine.cancelled and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.cancelled == [engine.contexts[0].request_id]


def test_ctrl_c_at_the_prompt_goes_on(server: Server) -> None:
    said, conversation = chat(server, KeyboardInterrupt, "hi")
    assert "(Ctrl-D ends the chat.)" in said
    assert len(conversation.messages) == 2


def test_an_error_within_the_stream(server: Server, engine: FakeEngine) -> None:
    engine.failure, engine.fail_after = WorkerGroupError("The workers are gone."), 2
    said, conversation = chat(server, "hi")
    assert "error: The workers are gone." in said
    assert conversation.messages == []


def test_reasoning_is_dimmed_and_control_characters_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    pieces = [
        Piece(reasoning="hm"),
        Piece(reasoning=" yes"),
        Piece("a\x1b[2Jb\tc\n"),
        Piece("\x9bd", finish_reason="length"),
    ]
    terminal, so_far = Terminal(), []
    note = Display(terminal).answer(pieces, so_far)
    assert terminal.getvalue() == "\x1b[2mhm\x1b[0m\x1b[2m yes\x1b[0m\n\na[2Jb\tc\nd\n"
    assert "".join(so_far) == "a\x1b[2Jb\tc\n\x9bd"
    assert "cut off" in note
    monkeypatch.setenv("NO_COLOR", "1")
    plain = Terminal()
    Display(plain).answer(pieces[:1], [])
    assert plain.getvalue() == "hm\n"
    file = io.StringIO()
    Display(file).answer([Piece("a\x1bb")], [])
    assert file.getvalue() == "a\x1bb\n", "a file gets the text as it is"


def test_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    speed = Speed()
    assert speed.line() == "[no text]"
    for moment in (100.5, 101.0, 102.5):
        now = moment
        speed.count(Piece("x"))
    assert speed.line() == "[3 pieces, 1.0 pieces/s, first token 0.50 s]"
    speed.count(Piece(num_tokens=21, finish_reason=None))
    assert speed.line() == "[21 tokens, 10.0 tokens/s, first token 0.50 s]"


def test_random_lines_never_break_the_chat(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    draw = random.Random(7)
    words = [
        "/set",
        "/save",
        "/load",
        "/image",
        "/regen",
        "/system",
        "/model",
        '"""',
        "hi",
        "\x00",
        "é",
        "",
        str(tmp_path),
    ]
    for _ in range(30):
        lines = [" ".join(draw.choices(words, k=draw.randint(1, 3))) for _ in range(6)]
        _, conversation = chat(server, *lines)
        roles = [one["role"] for one in conversation.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2), lines


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_the_command_answers_one_prompt(
    server: Server, suffix: str, capsys: pytest.CaptureFixture[str], engine: FakeEngine
) -> None:
    assert cli.main(["chat", "--url", server.url + suffix, "--system", "Be brief.", "hello there"]) == 0
    assert capsys.readouterr().out.startswith("answer 1\n[")
    assert "hello there" in text_of(engine, engine.contexts[0])
    assert "Be brief." in text_of(engine, engine.contexts[0])


def test_the_command_reads_lines_of_a_pipe(server: Server) -> None:
    command = [sys.executable, "-m", "max_ray.cli.main", "chat", "--url", server.url]
    done = subprocess.run(command, input="one\n/regen\n", capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.match(r"answer 1\n\[.*\]\nanswer 2\n\[.*\]\n$", done.stdout)


def test_keys(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("MAX_RAY_API_KEYS", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "of-another-service")
    with serving(engine, ApiOptions(api_keys=("right",))) as server:
        assert cli.main(["chat", "--url", server.url, "hi"]) == 2
        assert "Give --api-key" in capsys.readouterr().err
        assert cli.main(["chat", "--url", server.url, "--api-key", "right", "hi"]) == 0
        monkeypatch.setenv("MAX_RAY_API_KEYS", " right , other")
        assert cli.main(["chat", "--url", server.url, "hi"]) == 0
    assert Client("https://api.example.org")._headers["Authorization"] == "Bearer of-another-service"
    monkeypatch.delenv("MAX_RAY_API_KEYS")
    assert "Authorization" not in Client("http://127.0.0.1:1")._headers, "a foreign key stays here"


def test_servers_that_are_none(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    for url, sentence in {"http://127.0.0.1:1": "does not answer", "ftp://x": "no address of a server"}.items():
        assert cli.main(["chat", "--url", url, "hi"]) == 2
        error = capsys.readouterr().err
        assert sentence in error
        assert error.count("\n") == 1


def test_events_of_other_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ollama's and vLLM's names for reasoning, comments, an event without choices, an error as text."""
    events: list[Any] = [
        {"choices": [{"delta": {"role": "assistant", "reasoning": "r"}}]},
        {"choices": []},
        {"choices": [{"delta": {"content": None}, "finish_reason": "stop"}], "usage": None},
        {"choices": [], "usage": {"completion_tokens": 3}},
        {"error": "out of memory"},
    ]
    lines = [b": ping\n", b"\n", *(b"data: " + json.dumps(event).encode() + b"\n" for event in events)]
    client = Client("http://127.0.0.1:1")

    class Answer:
        def __enter__(self) -> list[bytes]:
            return lines

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(client, "_answer", lambda *_: Answer())
    pieces = client.stream({})
    found = [next(pieces) for _ in range(4)]
    with pytest.raises(ServerError, match="out of memory"):
        next(pieces)
    assert found == [Piece(reasoning="r"), Piece(), Piece(finish_reason="stop"), Piece(num_tokens=3)]
