# SPDX-License-Identifier: Apache-2.0
"""A headless Chromium, driven through WebDriver without a library."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_ARGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]


class Browser:
    """One page at a time."""

    def __init__(self, port: int) -> None:
        self._base = f"http://127.0.0.1:{port}"
        options = {"args": _ARGS}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        made = self._call("/session", {"capabilities": {"alwaysMatch": wanted}})
        self._base += f"/session/{made['sessionId']}"

    def _call(self, path: str, body: dict[str, Any] | None, method: str = "POST") -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._base + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, page: Path, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        """Loads a file and waits until it is loaded and drawn."""
        self._cdp("Emulation.setEmulatedMedia", media="", features=[{"name": "prefers-color-scheme", "value": scheme}])
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._cdp("Emulation.setDeviceMetricsOverride", **metrics)
        self._call("/url", {"url": page.as_uri()})
        self.drawn()

    def drawn(self) -> None:
        """Waits for two animation frames."""
        script = "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() => done()))"
        self._call("/execute/async", {"script": script, "args": []})

    def run(self, script: str) -> Any:
        """The value of a script's `return`."""
        return self._call("/execute/sync", {"script": script, "args": []})

    def complaints(self) -> list[str]:
        """The messages in the browser's console since the last call."""
        return [entry["message"] for entry in self._call("/se/log", {"type": "browser"})]

    def move(self, x: float, y: float) -> None:
        """Moves the mouse, in px from the left and the top of what is in view."""
        self._cdp("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        self.drawn()

    def press(self, key: str) -> None:
        """Presses and releases a key, named as in DOM events."""
        text = {"text": key} if len(key) == 1 else {}
        self._cdp("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self._cdp("Input.dispatchKeyEvent", type="keyUp", key=key)
        self.drawn()

    def paper(self) -> None:
        """From now on the page is as on paper, with the events of printing."""
        self.run("window.dispatchEvent(new Event('beforeprint'))")
        self._cdp("Emulation.setEmulatedMedia", media="print")
        self.drawn()

    def violations(self, axe: Path) -> list[str]:
        """What axe-core, a script, finds wrong with the page: the rule and an element."""
        self.run(axe.read_text())
        script = """const done = arguments[0];
            axe.run(document).then((found) => done(found.violations.map((v) => v.id + ": " + v.nodes[0].html)))"""
        found: list[str] = self._call("/execute/async", {"script": script, "args": []})
        return found

    def screenshot(self, file: Path) -> None:
        """A PNG of what is in view."""
        file.write_bytes(base64.b64decode(self._call("/screenshot", None, "GET")))

    def close(self) -> None:
        """Ends the browser."""
        self._call("", None, "DELETE")

    def _cdp(self, command: str, **params: Any) -> Any:
        return self._call("/goog/cdp/execute", {"cmd": command, "params": params})


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A browser, which is closed afterwards."""
    driver = subprocess.Popen(
        ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert driver.stdout is not None
        port = next(
            int(found[1]) for line in driver.stdout if (found := re.search(r"successfully on port (\d+)", line))
        )
        session = Browser(port)
        try:
            yield session
        finally:
            session.close()
    finally:
        driver.terminate()
        driver.communicate()
