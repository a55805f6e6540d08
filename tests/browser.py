"""A real browser for tests of pages: Chromium without a window, spoken to over two pipes, no package needed.

python tests/browser.py PAGE FOLDER      pictures of a page, as a desk's screen and a phone show it, light and dark
"""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
ADVICE = "no chromium is found on the path: install one, as by `apt-get install chromium`"
DESK, PHONE = 1200, 390
"""Widths of screens, in CSS pixels."""
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-dev-shm-usage",
)


def find_browser() -> str | None:
    """The program of a Chromium, None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page at a time, by Chrome's DevTools protocol: JSON that ends in a zero byte, read at descriptor 3, written at 4."""

    def __init__(self, program: str, profile: Path, *, patience_seconds: float = 90) -> None:
        hears, self._says = os.pipe()
        self._hears, says = os.pipe()

        def place() -> None:
            high = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (hears, says)]  # either may be 3 or 4 itself
            for end, number in zip(high, (3, 4), strict=True):
                os.dup2(end, number)

        command = [program, *OPTIONS, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, pass_fds=(3, 4), preexec_fn=place, start_new_session=True, **quiet)
        os.close(hears)
        os.close(says)
        self.patience_seconds, self._rest, self._number, self._session = patience_seconds, b"", 0, ""
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(each["targetId"] for each in targets if each["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        self.call("Page.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self.process.pid, 9)
        self.process.wait()
        os.close(self._says)
        os.close(self._hears)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command's result. Raises RuntimeError where the browser refuses it, ends or is silent."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._says, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._number:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            if not select.select([self._hears], [], [], self.patience_seconds)[0]:
                raise RuntimeError(f"the browser was silent for {self.patience_seconds:g} s")
            piece = os.read(self._hears, 1 << 20)
            if not piece:
                raise RuntimeError("the browser ended")
            self._rest += piece
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def open(self, page: Path, *, width: int = DESK, height: int = 900, is_dark: bool = False) -> None:
        """Show a file as a screen of this width does; a narrow one as a phone."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width <= 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=page.resolve().as_uri())
        while self._read().get("method") != "Page.loadEventFired":
            pass

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression on the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(str(result["exceptionDetails"]))
        return result["result"].get("value")

    def picture(self, to: Path, *, top: int = 0, height: int = 1500) -> Path:
        """A PNG of the page from `top` on."""
        width, whole = self.evaluate("[innerWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": top, "width": width, "height": min(height, whole - top), "scale": 1}
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)["data"]
        to.write_bytes(base64.b64decode(data))
        return to


def take_pictures(page: Path, folder: Path) -> None:
    """Pictures of every part of a page."""
    program = find_browser()
    if program is None:
        sys.exit(ADVICE)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, Browser(program, Path(profile)) as browser:
        for width in (DESK, PHONE):
            for is_dark in (False, True):
                browser.open(page, width=width, is_dark=is_dark)
                whole = browser.evaluate("document.documentElement.scrollHeight")
                browser.open(
                    page, width=width, height=whole, is_dark=is_dark
                )  # what is not in sight may stay unpainted
                for number, top in enumerate(range(0, whole, 1500)):
                    name = f"{page.stem}-{width}{'-dark' if is_dark else ''}-{number}.png"
                    print(browser.picture(folder / name, top=top))


if __name__ == "__main__":
    take_pictures(Path(sys.argv[1]), Path(sys.argv[2]))
