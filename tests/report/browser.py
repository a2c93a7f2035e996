"""A real Chromium, spoken to over its DevTools pipe: opens a page, and tells what it logged, fetched and looks like."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
_OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    "--remote-debugging-pipe",
)  # fmt: skip
_TIMEOUT_S = 60


class Browser:
    """One page of a running Chromium; `events` collects what it said, in order."""

    def __init__(self, requests: int, replies: int) -> None:
        self._requests, self._replies = requests, replies
        self._buffer, self._number, self._session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command, and its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._requests, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return dict(answer["result"])
            self.events.append(answer)

    def close(self) -> None:
        """Let Chromium end, so that nothing writes to its profile any more."""
        self._session = ""
        os.write(self._requests, json.dumps({"id": self._number + 1, "method": "Browser.close"}).encode() + b"\0")

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + _TIMEOUT_S
        while b"\0" not in self._buffer:
            ready = select.select([self._replies], [], [], deadline - time.monotonic())[0]
            chunk = os.read(self._replies, 1 << 20) if ready else b""
            assert chunk, "Chromium is silent or gone"
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(line))

    def open(self, page: Path, width: int = 1000, scheme: str = "light") -> None:
        """Show a file in a window so wide, in a colour scheme."""
        self.events.clear()
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500)
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.ask("Page.navigate", url=page.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives in the page."""
        return self.ask("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def complaints(self) -> list[str]:
        """Errors, warnings and exceptions that the page caused."""
        found = [e for e in self.events if e.get("method") in ("Log.entryAdded", "Runtime.consoleAPICalled")]
        found += [e for e in self.events if e.get("method") == "Runtime.exceptionThrown"]
        return [json.dumps(event["params"]) for event in found]

    def fetched(self) -> list[str]:
        """Addresses that the page asked for, itself included."""
        found = [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [url for url in found if not url.startswith("data:")]

    def picture(self, path: Path) -> Path:
        """An image of the whole page, not of the window alone."""
        size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(shot["data"]))
        return path

    def pdf(self, path: Path) -> Path:
        """The page printed."""
        printed = self.ask("Page.printToPDF", preferCSSPageSize=True, printBackground=True)
        path.write_bytes(base64.b64decode(printed["data"]))
        return path


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A Chromium with an empty profile folder, ended with the block."""
    assert CHROMIUM
    asked, requests = os.pipe()
    replies, told = os.pipe()
    # Chromium reads commands from descriptor 3 and answers on 4.
    line = f'exec "$0" "$@" 3<&{asked} 4>&{told}'
    with subprocess.Popen(
        ["bash", "-c", line, CHROMIUM, *_OPTIONS, f"--user-data-dir={profile}", "about:blank"],
        pass_fds=(asked, told),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        os.close(asked)
        os.close(told)
        try:
            page = Browser(requests, replies)
            yield page
            page.close()
            process.wait(_TIMEOUT_S)
        finally:
            with contextlib.suppress(ProcessLookupError):  # Its own session: helpers that outlive it go as well.
                os.killpg(process.pid, signal.SIGKILL)
            os.close(requests)
            os.close(replies)
