"""Headless Chromium, driven by its DevTools protocol: enough of a browser for the tests of the page."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import websockets

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_KEYS = {
    "Enter": {"code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"},
    "Escape": {"code": "Escape", "windowsVirtualKeyCode": 27},
    "Tab": {"code": "Tab", "windowsVirtualKeyCode": 9},
    "ArrowRight": {"code": "ArrowRight", "windowsVirtualKeyCode": 39},
    "ArrowLeft": {"code": "ArrowLeft", "windowsVirtualKeyCode": 37},
}


class PageError(AssertionError):
    """The page's script failed, or something did not happen in time."""


class Page:
    """One tab.

    Attributes:
        problems: Errors of scripts, of the console and of the content security policy, in order.
        requested: URLs that the page asked for.
    """

    def __init__(self, socket: websockets.ClientConnection) -> None:
        self._socket = socket
        self._session: str | None = None
        self._number = 0
        self._replies: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._reading = asyncio.create_task(self._read())
        self.problems: list[str] = []
        self.requested: list[str] = []

    async def start(self) -> None:
        """Opens the tab."""
        target = await self.send("Target.createTarget", url="about:blank")
        attached = await self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._target, self._session = target["targetId"], attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.send(f"{domain}.enable")
        await self.resize(1280, 800)

    async def close(self) -> None:
        """Closes the tab."""
        self._session = None
        await self.send("Target.closeTarget", targetId=self._target)
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)

    async def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command, with its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        reply = self._replies[self._number] = asyncio.get_running_loop().create_future()
        await self._socket.send(json.dumps(message))
        return await asyncio.wait_for(reply, 30)

    async def goto(self, url: str) -> None:
        """Loads a page, and waits for its script."""
        await self.send("Page.navigate", url=url)
        await self.until("document.readyState === 'complete' && document.querySelector('#messages > *') !== null")

    async def run(self, script: str) -> Any:
        """The value of an expression; promises are waited for."""
        reply = await self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in reply:
            raise PageError(f"{script}: {reply['exceptionDetails'].get('exception', {}).get('description')}")
        return reply["result"].get("value")

    async def until(self, condition: str, within_s: float = 15.0) -> Any:
        """Waits until an expression is true. The value."""
        deadline = time.monotonic() + within_s
        while not (value := await self.run(condition)):
            if time.monotonic() > deadline:
                text = await self.run("document.body.innerText")
                raise PageError(f"not within {within_s} s: {condition}\n{self.problems}\n{text}")
            await asyncio.sleep(0.03)
        return value

    async def text(self, selector: str) -> str:
        """Visible text of the last element that matches; empty without one."""
        return str(await self.run(f"[...document.querySelectorAll({selector!r})].at(-1)?.innerText ?? ''"))

    async def click(self, selector: str) -> None:
        """Clicks the middle of the last element that matches, as a mouse does."""
        find = f"[...document.querySelectorAll({selector!r})].at(-1)"
        await self.until(f"{find} !== undefined")
        box = await self.run(
            f"(() => {{ const node = {find}; node.scrollIntoView({{block: 'nearest'}});"
            " const {x, y, width, height} = node.getBoundingClientRect(); return [x + width / 2, y + height / 2] })()"
        )
        await self.mouse("mouseMoved", box)
        for kind in ("mousePressed", "mouseReleased"):
            await self.mouse(kind, box, button="left", clickCount=1)

    async def mouse(self, kind: str, place: list[float], **more: Any) -> None:
        await self.send("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], **more)

    async def write(self, text: str) -> None:
        """Text into what has the focus."""
        await self.send("Input.insertText", text=text)

    async def press(self, key: str) -> None:
        """One key, without modifiers."""
        await self.send("Input.dispatchKeyEvent", type="keyDown", key=key, **_KEYS[key])
        await self.send("Input.dispatchKeyEvent", type="keyUp", key=key, **_KEYS[key])

    async def say(self, text: str) -> None:
        """Sends a chat message by keyboard."""
        await self.run("document.getElementById('input').focus()")
        await self.write(text)
        await self.press("Enter")

    async def resize(self, width: int, height: int, *, is_dark: bool = False, scale: float = 1) -> None:
        """The size of the window, in CSS pixels, and the system's theme."""
        await self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 600,
        )
        theme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        await self.send("Emulation.setEmulatedMedia", features=[theme])

    async def screenshot(self, path: Path) -> None:
        """What the window shows, as PNG."""
        shot = await self.send("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(shot["data"]))

    async def _read(self) -> None:
        async for text in self._socket:
            message = json.loads(text)
            if "id" in message:
                self._settle(message)
            else:
                self._note(message["method"], message.get("params", {}))

    def _settle(self, message: dict[str, Any]) -> None:
        reply = self._replies.pop(message["id"])
        if reply.done():
            return
        if "error" in message:
            reply.set_exception(PageError(str(message["error"])))
        else:
            reply.set_result(message["result"])

    def _note(self, method: str, parameters: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.problems.append(str(parameters["exceptionDetails"].get("exception", {}).get("description")))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.problems.append(parameters["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requested.append(parameters["request"]["url"])


@contextmanager
def chromium(profile: Path) -> Iterator[str]:
    """A running Chromium without a window: the address of its DevTools."""
    assert CHROMIUM is not None
    switches = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
    quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-proxy-server")
    command = [CHROMIUM, *switches, *quiet, "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]
    environment = {**os.environ, "HOME": str(profile)}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    try:
        yield _address(profile / "DevToolsActivePort", process)
    finally:
        process.terminate()
        process.wait(20)


def _address(path: Path, process: subprocess.Popen[bytes]) -> str:
    deadline = time.monotonic() + 60
    while not path.is_file() or path.read_text().count("\n") < 1:
        assert process.poll() is None, f"Chromium ended with {process.returncode}"
        assert time.monotonic() < deadline, "Chromium did not start within 60 s"
        time.sleep(0.05)
    port, place = path.read_text().split("\n")[:2]
    return f"ws://127.0.0.1:{port}{place}"


@asynccontextmanager
async def open_page(address: str) -> AsyncIterator[Page]:
    """A new tab, with storage of its own only as far as its origin is its own."""
    async with websockets.connect(address, max_size=64 * 1024 * 1024, proxy=None) as socket:
        page = Page(socket)
        await page.start()
        try:
            yield page
        finally:
            await page.close()
