"""The page's Markdown in Chromium: what it renders, what it never lets through, and that it stays fast."""

from __future__ import annotations

import json
import random

import pytest

from tests.browser.chromium import Page
from tests.http.fake_engine import FakeEngine

RENDER = """(async (text) => {
  const { markdown } = await import('./page/markdown.js');
  const box = document.createElement('div');
  box.append(markdown(text));
  document.body.append(box);
  const tags = new Set([...box.querySelectorAll('*')].map((node) => node.tagName.toLowerCase()));
  const names = new Set([...box.querySelectorAll('*')].flatMap((node) => node.getAttributeNames()));
  const links = [...box.querySelectorAll('a')].map((node) => node.getAttribute('href'));
  for (const button of box.querySelectorAll('figure .code-head')) button.remove();
  const html = box.innerHTML;
  box.remove();
  return { html, tags: [...tags], names: [...names], links };
})"""
ALLOWED_TAGS = {
    *("p", "br", "em", "strong", "s", "code", "pre", "a", "span", "ul", "ol", "li", "blockquote", "hr", "figure"),
    *("h3", "h4", "h5", "h6", "table", "thead", "tbody", "tr", "th", "td", "div", "button", "svg", "path"),
}
ALLOWED_NAMES = {
    *("class", "href", "target", "rel", "title", "start", "type", "aria-label", "aria-hidden", "tabindex"),
    *("viewBox", "d"),
}
ATTACKS = [
    "<script>window.hit = 1</script>",
    "<img src=x onerror='window.hit = 1'>",
    "<svg onload='window.hit = 1'>",
    "[a](javascript:window.hit=1)",
    "[a](JaVaScRiPt:window.hit=1)",
    "[a]( \tjavascript:window.hit=1)",
    "[a](data:text/html,<script>window.hit=1</script>)",
    "[a](vbscript:x)",
    "![a](http://127.0.0.1:9/x.png)",
    "![a](x' onerror='window.hit=1)",
    "[<img src=x onerror=window.hit=1>](https://example.org)",
    '[a](https://example.org" onmouseover="window.hit=1)',
    "`<img src=x onerror=window.hit=1>`",
    "```html\n<img src=x onerror=window.hit=1>\n```",
    '```"><script>window.hit=1</script>\nx\n```',
    "| <img src=x onerror=window.hit=1> |\n|---|\n| <script>window.hit=1</script> |",
    "# <iframe srcdoc='<script>parent.hit=1</script>'>",
    "> - <a href='javascript:window.hit=1'>x</a>",
    'https://example.org/"onmouseover="window.hit=1',
    "<!-- --><base href='//127.0.0.1:9/'><meta http-equiv=refresh content='0;url=//127.0.0.1:9/'>",
    "**<style>*{display:none}</style>**",
]


async def render(page: Page, text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = await page.run(f"{RENDER}({json.dumps(text)})")
    assert set(found["tags"]) <= ALLOWED_TAGS, text
    assert set(found["names"]) <= ALLOWED_NAMES, text
    assert all(link.lower().startswith(("http://", "https://", "mailto:")) for link in found["links"]), text
    return found


CODE = '<figure class="code"><pre tabindex="0"><code>{}</code></pre></figure>'
CASES = [
    ("a *b* **c** ~~d~~ `e*f*`", "<p>a <em>b</em> <strong>c</strong> <s>d</s> <code>e*f*</code></p>"),
    ("***a***", "<p><strong><em>a</em></strong></p>"),
    ("snake_case_name and 2 * 3 * 4", "<p>snake_case_name and 2 * 3 * 4</p>"),
    ("**open", "<p>**open</p>"),
    (r"\*no\* \`no\`", "<p>*no* `no`</p>"),
    ("one\ntwo\n\nthree", "<p>one<br>two</p><p>three</p>"),
    ("# A\n## B ##\n###### C", "<h3>A</h3><h4>B</h4><h6>C</h6>"),
    ("- a\n- b\n  - c\n- d", "<ul><li>a</li><li><p>b</p><ul><li>c</li></ul></li><li>d</li></ul>"),
    ("3. a\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'),
    ("- a\n\n- b\n\ntext", "<ul><li>a</li><li>b</li></ul><p>text</p>"),
    ("> a\n> b", "<blockquote><p>a<br>b</p></blockquote>"),
    ("---", "<hr>"),
    ("```js\nlet a = '<b>';", CODE.format("let a = '&lt;b&gt;';")),
    ("````\n```\n````", CODE.format("```")),
    (
        "a | b\n--|:-:\n1 | 2 | 3",
        '<div class="table" tabindex="0"><table>'
        '<thead><tr><th class="left">a</th><th class="center">b</th></tr></thead>'
        '<tbody><tr><td class="left">1</td><td class="center">2</td></tr></tbody></table></div>',
    ),
    ("", ""),
]


async def test_what_it_renders(page: Page) -> None:
    for text, html in CASES:
        assert (await render(page, text))["html"] == html, text


async def test_links(page: Page) -> None:
    good = ["https://example.org/x?y=1", "https://example.org/z", "mailto:a@b.c", "http://h/i.png"]
    text = f"[a]({good[0]}) {good[1]}. [m]({good[2]}) [l](/local) ![i]({good[3]})"
    found = await render(page, text)
    assert found["links"] == good
    assert 'rel="noopener noreferrer nofollow"' in found["html"]


async def test_attacks_stay_text(page: Page, engine: FakeEngine) -> None:
    for text in ATTACKS:
        await render(page, text)
    assert await page.run("window.hit") is None


async def test_attacks_in_a_real_answer_and_in_a_question(page: Page, engine: FakeEngine) -> None:
    """By the whole way: the stream, the reasoning, the storage, the list of chats."""
    text = "\n\n".join(ATTACKS)
    engine.script = lambda context: text
    await page.say(ATTACKS[1])
    await page.until(
        "document.querySelector('#stop').hidden && document.querySelector('.message.assistant .speed') !== null"
    )
    await page.goto(await page.run("location.href"))
    await page.click("#chats .title")
    assert "onerror" in await page.text(".message.assistant .text")
    assert await page.run("document.querySelectorAll('#messages script, #messages img, #messages iframe').length") == 0
    assert await page.run("window.hit") is None


async def test_the_policy_refuses_markup(page: Page) -> None:
    """Should a line of the page ever use innerHTML, the browser refuses it."""
    attempt = "try { document.body.innerHTML = '<b>x</b>'; return false } catch (error) { return error.name }"
    refused = f"(() => {{ {attempt} }})() === 'TypeError'"
    assert await page.run(refused)
    page.problems.clear()


async def test_random_texts(page: Page) -> None:
    """No text makes it fail or lets a tag through."""
    rng = random.Random(7)
    marks = ("*", "**", "_", "`", "```", "[", "](", ")", "!", "<b>", "&amp;", "\\", "~~", "https://a.b/c", "|", "|-|")
    pieces = [*marks, "\n", "\n\n", "- ", "1. ", "> ", "# ", "  "]
    for number in range(300):
        text = "".join(
            rng.choice(pieces) if rng.random() < 0.6 else f"w{rng.randrange(99)} " for _ in range(rng.randrange(1, 60))
        )
        found = await render(page, text)
        assert "<b>" not in found["html"], (number, text)


LONG = (
    "*",
    "**a",
    "[",
    "[a](",
    "`",
    "> ",
    "- ",
    "  - a\n",
    "|",
    "a|b\n-|-\n",
    "\\",
    "_a_",
    "~~",
    "http://a.",
    "\n",
    "#",
    " ",
)


@pytest.mark.parametrize("piece", LONG)
async def test_long_texts_are_fast(page: Page, piece: str) -> None:
    text = f"{json.dumps(piece)}.repeat({100_000 // len(piece)})"
    timed = "const begin = performance.now(); markdown(text); return performance.now() - begin"
    load = "const { markdown } = await import('./page/markdown.js')"
    took = await page.run(f"(async () => {{ {load}; const text = {text}; {timed} }})()")
    assert took < 3000, f"{took:.0f} ms"
