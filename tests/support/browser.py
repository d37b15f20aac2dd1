"""A headless Chromium, driven over the DevTools protocol on a pipe, so that it needs no package and no port."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SECONDS = 60  # for any one answer: the machine may be busy

# Chromium reads from descriptor 3 and writes to 4; copies above 10 first, since either may be 3 or 4 already.
LAUNCH = """
import fcntl, os, sys
for place, end in [(p, fcntl.fcntl(int(e), fcntl.F_DUPFD, 10)) for p, e in zip((3, 4), sys.argv[1:3])]:
    os.dup2(end, place)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Page:
    """One open page. `events` holds everything that the browser reported of it."""

    def __init__(self, reading: int, writing: int) -> None:
        self.reading, self.writing = reading, writing
        self.buffer, self.number, self.session = b"", 0, None
        self.events: list[dict[str, Any]] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log", "Audits"):
            self.ask(f"{domain}.enable")

    def _receive(self, until: float) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.reading], [], [], max(0.0, until - time.monotonic()))
            read = os.read(self.reading, 1 << 20) if ready else b""
            if not read:
                raise TimeoutError("Chromium did not answer")
            self.buffer += read
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.writing, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + SECONDS
        while True:
            answer = self._receive(until)
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def open(self, file: Path, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Opens a file in a viewport of this size, and waits until its script says that it is ready."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.ask("Page.navigate", url=file.absolute().as_uri())
        until = time.monotonic() + SECONDS
        while not self.run("location.href !== 'about:blank' && document.documentElement?.dataset.ready === 'true'"):
            assert time.monotonic() < until, f"the page's script did not finish: {self.complaints()}"
            time.sleep(0.05)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; an exception in it fails the test."""
        result = self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def press(self, key: str, code: int, text: str = "") -> None:
        for kind in ("keyDown", "keyUp"):
            given = {"text": text} if text and kind == "keyDown" else {}
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **given)

    def requests(self) -> list[str]:
        """Addresses of everything that the page asked for, also where the browser refused."""
        sent = [event["params"] for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return [request["request"]["url"] for request in sent]

    def complaints(self) -> list[dict[str, Any]]:
        """Exceptions, console messages, and issues such as violations of the Content-Security-Policy."""
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded", "Audits.issueAdded")
        return [event for event in self.events if event.get("method") in kinds]

    def screenshot(self, file: Path, whole: bool = False) -> None:
        shot = self.ask("Page.captureScreenshot", captureBeyondViewport=whole, format="png", **self._clip(whole))
        file.write_bytes(base64.b64decode(shot["data"]))

    def _clip(self, whole: bool) -> dict[str, Any]:
        if not whole:
            return {}
        size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}


@contextmanager
def chromium(profile: Path) -> Iterator[Page]:
    """Starts Chromium with an own profile folder, and ends it."""
    assert CHROMIUM is not None
    to_browser, from_browser = os.pipe(), os.pipe()

    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    command = [
        sys.executable,
        "-c",
        LAUNCH,
        str(to_browser[0]),
        str(from_browser[1]),
        CHROMIUM,
        *options,
        f"--user-data-dir={profile}",
        "--remote-debugging-pipe",
    ]
    process = subprocess.Popen(
        command,
        pass_fds=(to_browser[0], from_browser[1]),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_browser[0])
    os.close(from_browser[1])
    try:
        yield Page(from_browser[0], to_browser[1])
    finally:
        process.terminate()
        try:
            process.wait(SECONDS)
        finally:
            os.close(to_browser[1])
            os.close(from_browser[0])
