"""A headless Chromium driven by its DevTools protocol over a pipe: no package is needed.

https://chromedevtools.github.io/devtools-protocol; messages are JSON that ends in a null byte.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
TIMEOUT = 30.0  # seconds
CODES = {"Enter": 13, "Escape": 27, "ArrowUp": 38, "ArrowDown": 40, "Delete": 46}


def program():
    """Path of an installed browser, or None."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


class Browser:
    """One page. `errors` collects exceptions and console errors of its scripts."""

    def __init__(self, path, profile, size=(1280, 900)):
        read, self._write = os.pipe()
        self._read, write = os.pipe()
        options = [
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--no-first-run", "--remote-debugging-pipe", f"--user-data-dir={profile}"),
            *("--disable-background-networking", "--disable-component-update", "--lang=en-US"),
        ]
        # The protocol's ends are descriptors 3 and 4 of the browser.
        script = (
            "import fcntl, os, sys; "
            f"ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in ({read}, {write})]; "
            "os.dup2(ends[0], 3); os.dup2(ends[1], 4); os.execv(sys.argv[1], sys.argv[1:])"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-c", script, path, *options, "about:blank"],
            pass_fds=(read, write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(read)
        os.close(write)
        self._buffer, self._number, self._session = b"", 0, None
        self.errors = []
        try:
            self._attach()
        except BaseException:
            self.close()
            raise
        self.resize(*size)

    def _attach(self):
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        """Sends a command and returns its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _receive(self):
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], TIMEOUT)
            data = os.read(self._read, 1 << 20) if ready else b""
            if not data:
                raise OSError("the browser has ended" if ready else "the browser does not answer")
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(message)
        if message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(message["params"]["exceptionDetails"]))
        elif message.get("method") == "Log.entryAdded":
            entry = message["params"]["entry"]
            self.errors += [entry["text"]] if entry["level"] == "error" else []
        return message

    def open(self, url):
        self.call("Page.navigate", url=url)

    def value(self, expression):
        """Evaluates JavaScript in the page."""
        found = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, (expression, found["exceptionDetails"])
        return found["result"].get("value")

    def wait(self, expression):
        """Waits until JavaScript is true."""
        until = time.monotonic() + TIMEOUT
        while not self.value(expression):
            assert time.monotonic() < until, f"never true: {expression}"
            time.sleep(0.02)

    def text(self, selector):
        return self.value(f"document.querySelector({json.dumps(selector)})?.innerText")

    def press(self, key, *, shift=False):
        """Presses a key: a name of CODES, a digit, a letter or a sign."""
        code = key if len(key) > 1 else f"Digit{key}" if key.isdigit() else f"Key{key.upper()}"
        event = {"key": key, "code": code, "modifiers": 8 * shift,
                 "windowsVirtualKeyCode": CODES.get(key, ord(key[-1].upper()))}  # fmt: skip
        typed = {"text": "\r"} if key == "Enter" else {"text": key} if len(key) == 1 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **event, **typed)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def type(self, text):
        self.call("Input.insertText", text=text)

    def mouse(self, *points):
        """Presses at the first point, moves over the others and lets go at the last."""
        for kind, (x, y) in [("mousePressed", points[0]),
                             *(("mouseMoved", point) for point in points[1:]),
                             ("mouseReleased", points[-1])]:  # fmt: skip
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left",
                      buttons=1, clickCount=1)  # fmt: skip

    def box(self, selector):
        """left, top, width, height."""
        return self.value(
            f"(b => [b.left, b.top, b.width, b.height])"
            f"(document.querySelector({json.dumps(selector)}).getBoundingClientRect())"
        )

    def resize(self, width, height):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=False)  # fmt: skip

    def screenshot(self, path):
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def close(self):
        """Ends the browser."""
        self._process.terminate()
        self._process.wait(TIMEOUT)
        os.close(self._read)
        os.close(self._write)
