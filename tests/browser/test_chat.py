"""The chat of the page in Chromium: what a user does with mouse and keyboard, and what the server is then asked."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from max_ray.errors import QueueFullError
from max_ray.interfaces import TextContext
from max_ray.serve.api.engine import ApiOptions
from max_ray.serve.api.model_parsers import ModelParsers
from tests.browser.chromium import Page, open_page
from tests.browser.conftest import served
from tests.http.fake_engine import FakeEngine

ANSWER = ".message.assistant .text"
DONE = "document.querySelector('#stop').hidden && document.querySelector('.message.assistant') !== null"


def prompts(engine: FakeEngine) -> list[str]:
    """What the model was given, in the template's form."""
    return [engine.tokenizer.decode_ids(context.tokens.prompt.tolist()) for context in engine.contexts]


async def ask(page: Page, text: str) -> str:
    """Sends a message, and waits for the end of its answer. Its text."""
    await page.say(text)
    await page.until(f"document.querySelectorAll('.message.user').length > 0 && {DONE}")
    return await page.text(ANSWER)


async def test_a_chat_has_several_turns_with_a_system_prompt(page: Page, engine: FakeEngine) -> None:
    engine.script = lambda context: f"answer {len(engine.contexts)}"
    await page.click("#open-parameters")
    await page.click("#system")
    await page.write("Be short.")
    await page.click("[aria-label='Close the parameters']")
    assert await ask(page, "One?") == "answer 1"
    assert await ask(page, "Two?") == "answer 2"
    turns = "<|system|>Be short.<|user|>One?<|assistant|>answer 1<|user|>Two?<|assistant|>"
    assert prompts(engine)[-1] == turns
    speed = await page.text(".speed")
    assert speed.startswith("9 tokens")
    assert "first token" in speed


async def test_an_answer_streams_and_stops(page: Page, engine: FakeEngine) -> None:
    engine.gate = asyncio.Event()
    engine.script = lambda context: "a long answer"
    await page.say("Go on.")
    await page.until(f"document.querySelector('{ANSWER}')?.innerText === 'a'")
    assert await page.run("document.querySelector('#messages').getAttribute('aria-busy')") == "true"
    await page.click("#stop")
    await page.until(DONE)
    assert await page.text(ANSWER) == "a"
    assert "stopped" in await page.text(".speed")
    while not engine.cancelled:
        await asyncio.sleep(0.01)


async def test_escape_stops_an_answer(page: Page, engine: FakeEngine) -> None:
    engine.gate = asyncio.Event()
    await page.say("Go on.")
    await page.until(f"document.querySelector('{ANSWER}') !== null")
    await page.press("Escape")
    await page.until(DONE)
    assert "stopped" in await page.text(".speed")


async def test_regenerate_and_edit(page: Page, engine: FakeEngine) -> None:
    engine.script = lambda context: f"answer {len(engine.contexts)}"
    await ask(page, "One?")
    await page.click(".message.assistant [aria-label='Answer again']")
    await page.until(f"document.querySelector('{ANSWER}')?.innerText === 'answer 2' && {DONE}")
    await page.click(".message.user [aria-label='Edit and send again']")
    await page.run("document.querySelector('.editor textarea').select()")
    await page.write("Two?")
    await page.press("Enter")
    await page.until(f"document.querySelector('{ANSWER}')?.innerText === 'answer 3' && {DONE}")
    first, again, edited = prompts(engine)
    assert first == again
    assert edited == first.replace("One?", "Two?")
    assert await page.run("document.querySelectorAll('.message').length") == 2


async def test_parameters_are_sent_and_empty_ones_are_not(page: Page, engine: FakeEngine) -> None:
    await ask(page, "Plain.")
    await page.click("#open-parameters")
    for name, value in (("temperature", "0.3"), ("max_tokens", "2"), ("seed", "7"), ("stop", "xyz")):
        await page.run(f"document.querySelector('[data-parameter={name}]').focus()")
        await page.write(value)
    await page.click("[aria-label='Close the parameters']")
    assert await ask(page, "Changed.") == "he"
    assert "cut by the length limit" in await page.text(".speed")
    plain, changed = (context.sampling_params for context in engine.contexts)
    assert (plain.max_new_tokens, plain.seed) != (changed.max_new_tokens, changed.seed)
    assert (changed.temperature, changed.max_new_tokens, changed.seed, list(changed.stop)) == (0.3, 2, 7, ["xyz"])
    assert await page.run("localStorage.getItem('max_ray.parameters')")


async def test_token_probabilities_with_pointer_and_keyboard(page: Page, engine: FakeEngine) -> None:
    engine.script = lambda context: "héllo"
    await page.click("#open-parameters")
    await page.click("#logprobs")
    await page.click("[aria-label='Close the parameters']")
    await page.say("Tokens.")
    await page.until(DONE + " && document.querySelector('.token') !== null")
    spans = await page.run("[...document.querySelectorAll('.token')].map((span) => span.innerText)")
    assert "".join(spans).replace("·", "") == "héllo"  # é is two tokens; it stands at the second
    await page.click(".token")
    await page.until("!document.querySelector('#probabilities').hidden")
    assert await page.run("document.querySelectorAll('#probabilities div').length") == 6  # five others, and the chosen
    assert "%" in await page.text("#probabilities .chosen")
    await page.run("document.querySelector('.tokens').focus()")
    await page.press("ArrowLeft")
    assert await page.run("document.querySelector('.token.current').dataset.number") == str(len(spans) - 2)
    await page.press("Escape")
    assert await page.run("document.querySelector('#probabilities').hidden")
    await page.click("[aria-label='Token probabilities']")
    assert await page.text(ANSWER) == "héllo"


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


async def test_reasoning_is_folded_and_tool_calls_are_cards(page: Page, engine: FakeEngine) -> None:
    engine.parsers = ModelParsers(tools="hermes", reasoning="think")

    def script(context: TextContext) -> str:
        return "It is mild." if len(engine.contexts) > 1 else "<think>I ask.</think>" + call("get_weather", city="Rome")

    engine.script = script
    await page.click("#open-parameters")
    await page.run("document.querySelector('[data-parameter=tools]').focus()")
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": parameters}}]
    await page.write(json.dumps(tools))
    await page.click("[aria-label='Close the parameters']")
    await page.say("How warm is Rome?")
    await page.until(DONE + " && document.querySelector('.card textarea') !== null")
    assert await page.text("details.reasoning summary") == "Thoughts"
    assert not await page.run("document.querySelector('details.reasoning').open")
    assert await page.run("document.querySelector('details.reasoning .text').textContent") == "I ask."
    assert "get_weather" in await page.text(".card header")
    assert json.loads(await page.text(".card pre")) == {"city": "Rome"}
    await page.click(".card textarea")
    await page.write("18 degrees")
    await page.click(".card .solid")
    await page.until(f"[...document.querySelectorAll('{ANSWER}')].at(-1)?.innerText === 'It is mild.'")
    assert "18 degrees" in prompts(engine)[-1]


async def test_errors_of_the_server_are_sentences(page: Page, engine: FakeEngine) -> None:
    engine.refuse = QueueFullError("32 requests are waiting already.", retry_after=3)
    await page.say("Hello?")
    await page.until("document.querySelector('[role=alert]') !== null")
    assert await page.text("[role=alert] span") == "32 requests are waiting already. Try again in 3 s."
    engine.refuse = None
    page.problems.clear()  # the console's note of a 429
    await page.click("[role=alert] button")
    await page.until(f"document.querySelector('{ANSWER}')?.innerText === 'hello' && {DONE}")


async def test_an_error_within_a_stream_is_a_sentence(page: Page, engine: FakeEngine) -> None:
    engine.failure, engine.fail_after = RuntimeError("boom"), 2
    await page.say("Hello?")
    await page.until("document.querySelector('[role=alert]') !== null")
    assert await page.text("[role=alert] span") == "The server failed to answer this request; its log says why."
    assert await page.text(ANSWER) == "he"


async def test_chats_are_kept_opened_and_deleted(page: Page, engine: FakeEngine) -> None:
    await ask(page, "First chat")
    await page.click("#new-chat")
    await ask(page, "Second chat")
    url = await page.run("location.href")
    await page.goto(url)
    titles = "[...document.querySelectorAll('#chats .title')].map((node) => node.innerText)"
    assert await page.run(titles) == ["Second chat", "First chat"]
    await page.click("#chats li:last-child .title")
    assert await page.text(".message.user .text") == "First chat"
    assert await page.text(ANSWER) == "hello"
    await page.click("#chats li:last-child [aria-label^='Delete']")
    assert await page.run(titles) == ["Second chat"]
    assert await page.run("Object.keys(localStorage).filter((key) => key.includes('chat.')).length") == 1


async def test_a_key_is_asked_for_once_and_kept_by_choice(devtools: str, engine: FakeEngine) -> None:
    async with served(engine, ApiOptions(api_keys=("secret",))) as url, open_page(devtools) as page:
        await page.goto(url)
        await page.until("document.querySelector('#key-dialog').open")
        for given, is_open in (("wrong", True), ("secret", False)):
            await page.run("document.querySelector('#key').focus()")
            await page.write(given)
            await page.press("Enter")
            await asyncio.sleep(0.3)
            await page.until(f"document.querySelector('#key-dialog').open === {json.dumps(is_open)}")
        await page.until("document.querySelector('#model option') !== null")
        assert await ask(page, "Hello?") == "hello"
        assert await page.run("[sessionStorage.getItem('max_ray.key'), localStorage.getItem('max_ray.key')]") == [
            "secret",
            None,
        ]
        await page.goto(url)
        await page.until("document.querySelector('#model option') !== null")
        await page.click("#change-key")
        await page.run("document.querySelector('#key').focus()")
        await page.write("secret")
        await page.click("#keep-key")
        await page.press("Enter")
        await page.until("localStorage.getItem('max_ray.key') === 'secret'")
        assert await page.run("sessionStorage.getItem('max_ray.key')") is None
        await page.click("#change-key")
        await page.click("#forget-key")
        await page.until("localStorage.getItem('max_ray.key') === null")


async def test_the_keyboard_reaches_everything(page: Page) -> None:
    await page.run("document.querySelector('.skip').focus()")
    found = []
    for _ in range(14):
        await page.press("Tab")
        found.append(await page.run("document.activeElement.id || document.activeElement.innerText"))
    assert {"Chat", "Server", "new-chat", "theme", "change-key", "model", "open-parameters", "input", "send"} <= set(
        found
    )


async def test_below_a_prefix(devtools: str, engine: FakeEngine) -> None:
    async with served(engine, prefix="/llm") as url, open_page(devtools) as page:
        await page.goto(url)  # without the slash: a redirect
        await page.until("document.querySelector('#model option') !== null")
        assert await page.run("location.pathname") == "/llm/"
        assert await ask(page, "Hello?") == "hello"
        assert page.problems == []


async def test_phone_width(page: Page) -> None:
    await page.resize(390, 844)
    await ask(page, "Hello on a phone, with a word that is " + "very" * 40 + " long.")
    assert await page.run("document.documentElement.scrollWidth <= innerWidth")
    assert not await page.run("document.querySelector('#sidebar').checkVisibility({visibilityProperty: true})")
    await page.click("#open-sidebar")
    await page.until("document.querySelector('#sidebar').getBoundingClientRect().left === 0")
    await page.click(".tabs a[data-view=server]")
    await page.until("document.querySelector('.tile') !== null")
    assert await page.run("document.documentElement.scrollWidth <= innerWidth")


async def test_themes(page: Page) -> None:
    back = "getComputedStyle(document.body).backgroundColor"
    await page.resize(1280, 800, is_dark=True)
    dark = await page.run(back)
    await page.run("document.querySelector('#theme').value = 'light'")
    await page.run("document.querySelector('#theme').dispatchEvent(new Event('change'))")
    assert await page.run(back) == "rgb(255, 255, 255)" != dark
    await page.goto(await page.run("location.href"))
    assert await page.run(back) == "rgb(255, 255, 255)"
