"""Opens an HTML page in headless Chromium, wide and narrow, light and dark, and saves a screenshot of each.

    python tools/report_screens.py runs/own-data/report.html runs/screens

Fails if the page loads anything from elsewhere, writes to the console, lacks an image or is wider than the screen.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WIDTHS = {"wide": 1100, "phone": 390}
LOOK = """({missing: [...document.images].filter(i => !i.naturalWidth).length,
    wide: document.documentElement.scrollWidth, high: document.documentElement.scrollHeight})"""


class Browser:
    """Chromium, controlled through pipes with its DevTools protocol: JSON messages that end with a zero byte.

    `events` holds the messages that Chromium sent on its own.
    """

    def __init__(self, profile: str):
        chromium = shutil.which("chromium") or shutil.which("google-chrome") or sys.exit("no chromium on this machine")
        (theirs_in, out), (into, theirs_out) = os.pipe(), os.pipe()
        options = f"--headless=new --remote-debugging-pipe --user-data-dir={profile} --disable-gpu --hide-scrollbars"
        sandbox = "--no-sandbox" if os.geteuid() == 0 else ""
        line = f"exec {chromium} {options} {sandbox} 3<&{theirs_in} 4>&{theirs_out}"  # the two that Chromium reads and writes
        self.process = subprocess.Popen(
            ["bash", "-c", line], pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL
        )
        os.close(theirs_in), os.close(theirs_out)
        self.out, self.answers = os.fdopen(out, "wb", 0), self._read(os.fdopen(into, "rb", 0))
        self.events: list[dict[str, Any]] = []
        self.session: dict[str, str] = {}
        self.sent = 0
        page = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.ask("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]}

    def _read(self, pipe: Any) -> Iterator[dict[str, Any]]:
        rest = b""
        while part := pipe.read(2**20):
            *whole, rest = (rest + part).split(b"\0")
            yield from map(json.loads, whole)
        sys.exit("chromium ended")

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        self.sent += 1
        self.out.write(
            json.dumps({"id": self.sent, "method": method, "params": params} | self.session).encode() + b"\0"
        )
        while (answer := next(self.answers)).get("id") != self.sent:
            self.events.append(answer)
        return answer["result"]

    def wait_for(self, event: str) -> None:
        while all(e["method"] != event for e in self.events):
            self.events.append(next(self.answers))


def look(browser: Browser, url: str, width: int, scheme: str, picture: Path) -> list[str]:
    """Saves a screenshot at this width and colour scheme; returns what is wrong with the page."""
    browser.events.clear()
    browser.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    browser.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    browser.ask("Page.navigate", url=url)
    browser.wait_for("Page.loadEventFired")
    found = browser.ask("Runtime.evaluate", expression=LOOK, returnByValue=True)["result"]["value"]
    clip = {"x": 0, "y": 0, "width": width, "height": found["high"], "scale": 1}
    shot = browser.ask("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
    picture.write_bytes(base64.b64decode(shot["data"]))
    asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    said = [e["params"] for e in browser.events if e["method"] in ("Log.entryAdded", "Runtime.consoleAPICalled")]
    wrong = [f"asks for {other}" for other in asked if other != url and not other.startswith("data:")]
    wrong += [f"console: {json.dumps(message)[:300]}" for message in said]
    wrong += [f"{found['missing']} pictures are missing"] * bool(found["missing"])
    return wrong + [f"is {found['wide']} pixels wide"] * (found["wide"] > width)


def main(page: str, out: str) -> None:
    Path(out).mkdir(parents=True, exist_ok=True)
    url, wrong = Path(page).resolve().as_uri(), []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(profile)
        for domain in ("Page", "Network", "Log", "Runtime"):
            browser.ask(f"{domain}.enable")
        for (name, width), scheme in ((w, s) for w in WIDTHS.items() for s in ("light", "dark")):
            picture = Path(out) / f"{Path(page).stem}-{name}-{scheme}.png"
            wrong += [f"{name}, {scheme}: {line}" for line in look(browser, url, width, scheme, picture)]
        browser.process.terminate()
        browser.process.wait()
    sys.exit("\n".join(wrong) or None)


if __name__ == "__main__":
    main(*sys.argv[1:])
