"""A headless Chromium that a test drives: pages, keys, pointer, and what the page complained of."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import websocket

KEYS = {"Enter": ("\r", 13), "Tab": ("", 9), "ArrowRight": ("", 39), "ArrowLeft": ("", 37),
        "ArrowUp": ("", 38), "ArrowDown": ("", 40), "Home": ("", 36), "End": ("", 35)}


class Page:
    """One page over the Chrome DevTools Protocol."""

    def __init__(self, address: str) -> None:
        self._socket = websocket.create_connection(address, suppress_origin=True, timeout=120)
        self._last = 0
        self.complaints: list[str] = []
        """Errors and warnings of the console, exceptions, and requests that failed."""
        self.requests: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.command(f"{domain}.enable")

    def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        """What the browser answers to one command."""
        self._last += 1
        self._socket.send(json.dumps({"id": self._last, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv())
            if message.get("id") == self._last:
                assert "error" not in message, f"{method}: {message['error']}"
                return dict(message["result"])
            self._heard(message.get("method"), message.get("params", {}))

    def _heard(self, event: str | None, told: dict[str, Any]) -> None:
        if event == "Runtime.exceptionThrown":
            details = told["exceptionDetails"]
            self.complaints.append(details.get("exception", {}).get("description", details["text"]))
        elif event == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.complaints.append(told["entry"]["text"])
        elif event == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning"):
            self.complaints.append(str([each.get("value") for each in told["args"]]))
        elif event == "Network.loadingFailed" and not told.get("canceled"):
            self.complaints.append(told["errorText"])
        elif event == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])

    def visit(self, address: str) -> None:
        """Open an address and wait until it is loaded."""
        self.command("Page.navigate", url=address)
        self.until("document.readyState === 'complete'")

    def see(self, expression: str) -> Any:
        """The value of a JavaScript expression; a promise is awaited."""
        found = self.command("Runtime.evaluate", expression=expression, returnByValue=True,
                             awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, expression: str, seconds: float = 120) -> Any:
        """Wait for an expression to be true; its value."""
        end = time.monotonic() + seconds
        while not (value := self.see(f"({expression}) || false")):
            assert time.monotonic() < end, f"{expression} was not true after {seconds} s"
            time.sleep(0.05)
        return value

    def press(self, *keys: str) -> None:
        """Keys by name (`KEYS`), or text that is typed."""
        for key in keys:
            if key not in KEYS:
                self.command("Input.insertText", text=key)
                continue
            text, code = KEYS[key]
            for kind in ("keyDown", "keyUp"):
                self.command("Input.dispatchKeyEvent", type=kind, key=key, code=key,
                             windowsVirtualKeyCode=code, **({"text": text} if text else {}))

    def click(self, selector: str) -> None:
        """The pointer on the middle of the first element of a selector."""
        x, y = self.see(f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
                        "e.scrollIntoView({block: 'center', behavior: 'instant'});"
                        "const r = e.getBoundingClientRect();"
                        "return [r.x + r.width / 2, r.y + r.height / 2]; })()")
        for kind in ("mousePressed", "mouseReleased"):
            self.command("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left",
                         clickCount=1)

    def size(self, width: int, height: int) -> None:
        """The size of the window, in pixels."""
        self.command("Emulation.setDeviceMetricsOverride", width=width, height=height,
                     deviceScaleFactor=1, mobile=width < 600)

    def choose_file(self, selector: str, path: Path) -> None:
        """Give a file to an input of files."""
        root = self.command("DOM.getDocument")["root"]["nodeId"]
        node = self.command("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.command("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def picture(self, path: Path) -> None:
        """What is to be seen, as PNG."""
        path.write_bytes(base64.b64decode(
            self.command("Page.captureScreenshot", format="png")["data"]))


@contextmanager
def page(program: str, folder: Path) -> Iterator[Page]:
    """A page of a fresh browser, which keeps what it must in `folder`."""
    command = [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
               "--disable-background-networking", "--remote-debugging-port=0",
               f"--user-data-dir={folder}", "about:blank"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if found := re.search(r"DevTools listening on ws://([^/]+)/", line):
                    break
            else:
                raise AssertionError(f"{program} did not start")
            with urllib.request.urlopen(f"http://{found[1]}/json/list") as answer:
                pages = [each for each in json.load(answer) if each["type"] == "page"]
            yield Page(pages[0]["webSocketDebuggerUrl"])
        finally:
            process.terminate()
