"""A headless Chromium over its DevTools pipe: enough to open a page and ask it questions, without a library."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage",
         "--remote-debugging-pipe"]  # fmt: skip


class Browser:
    """One tab.  `trouble` collects what must not happen: console errors, uncaught exceptions, network requests."""

    def __init__(self, binary: str):
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        (there, self.down), (self.up, back) = os.pipe(), os.pipe()
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 50) for fd in (there, back)]
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{high[0]} 4>&{high[1]}', "bash", binary, *FLAGS,
             f"--user-data-dir={self.profile.name}", "about:blank"],
            pass_fds=high, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for fd in (there, back, *high):
            os.close(fd)
        self.number, self.buffer, self.session = 0, b"", ""
        self.trouble: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.down)
        os.close(self.up)
        self.profile.cleanup()

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Sends a command and waits for its answer; events that come meanwhile are looked at."""
        self.number += 1
        where = {"sessionId": self.session} if self.session else {}
        os.write(
            self.down, json.dumps({"id": self.number, "method": method, "params": params, **where}).encode() + b"\0"
        )
        while True:
            message = self._next()
            if message.get("id") == self.number:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]
            self._event(message)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            part = os.read(self.up, 1 << 20)
            assert part, "the browser is gone"
            self.buffer += part
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def _event(self, message: dict[str, Any]) -> None:
        name, params = message.get("method", ""), message.get("params", {})
        if name == "Runtime.exceptionThrown":
            self.trouble.append(f"exception: {params['exceptionDetails']}")
        elif name == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.trouble.append(f"console: {params['args']}")
        elif name == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.trouble.append(f"log: {params['entry']['text']}")
        elif name == "Network.requestWillBeSent" and not params["request"]["url"].startswith(
            ("file:", "data:", "blob:")
        ):
            self.trouble.append(f"request: {params['request']['url']}")

    def open(self, path: Path, *, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """Opens a file and waits until it is drawn."""
        self.trouble.clear()
        self.resize(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=path.absolute().as_uri())
        self.settled()

    def resize(self, width: int, height: int = 900) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def settled(self) -> None:
        """Waits until the page is loaded and two frames were drawn."""
        self.ask("""new Promise((done) => {
            const drawn = () => requestAnimationFrame(() => requestAnimationFrame(() => done(1)));
            document.readyState === "complete" ? drawn() : addEventListener("load", drawn);
        })""")

    def ask(self, expression: str) -> Any:
        """The value of an expression in the page; promises are waited for."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def picture(self, path: Path) -> None:
        """A picture of the whole page."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


@pytest.fixture(scope="session")
def browser():
    """Chromium, once for all tests; skipped where there is none."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    found = Browser(CHROMIUM)
    yield found
    found.close()
