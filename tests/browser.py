"""A headless Chromium driven through its remote-debugging pipe, standard library only.

    with Browser() as browser:
        page = browser.open("http://127.0.0.1:4399/")
        page.wait_for("document.title")

Commands and events are JSON texts that end in a NUL byte, on file descriptors 3 and 4 of the
browser (Chrome DevTools Protocol).
"""
from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--remote-debugging-pipe", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
         "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--disable-dev-shm-usage", "--no-proxy-server")
DEADLINE_S = 30.0
FIRST_FREE_FD = 10     # above the two numbers that the browser expects
#: puts the two pipe ends at 3 and 4, then becomes the browser
LAUNCH = ("import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); "
          "os.execv(sys.argv[3], sys.argv[3:])")
#: in every new document, before its own scripts: what its policy refused
WATCH = ("window.refusedByPolicy = []; document.addEventListener('securitypolicyviolation', "
         "e => window.refusedByPolicy.push(e.violatedDirective + ' ' + e.blockedURI));")


def find_chromium() -> str | None:
    """The path of an installed browser."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def _high_pipe() -> tuple[int, int]:
    """os.pipe() with numbers that are out of the way."""
    pair = os.pipe()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, FIRST_FREE_FD) for end in pair]
    for end in pair:
        os.close(end)
    return high[0], high[1]


class Browser:
    """One browser process with a fresh profile.  Thread-safe; a context manager."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self._changed = threading.Condition()      # guards events and answers
        self._answers: dict[int, dict[str, Any]] = {}
        self._last_id = 0
        self._closed = False
        self._profile = tempfile.mkdtemp(prefix="browser-")
        self._process: subprocess.Popen[bytes]

    def __enter__(self) -> Browser:
        path = find_chromium()
        assert path, "no browser"
        theirs, self._out = _high_pipe()
        self._in, their_out = _high_pipe()
        environ = dict(os.environ, HOME=self._profile, XDG_CONFIG_HOME=self._profile,
                       XDG_CACHE_HOME=self._profile)
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", LAUNCH, str(theirs), str(their_out), path, *FLAGS,
             "--user-data-dir=" + self._profile, "about:blank"],
            pass_fds=(theirs, their_out), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, env=environ)
        os.close(theirs)
        os.close(their_out)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        with contextlib.suppress(AssertionError, OSError):
            self.send("Browser.close")
        os.close(self._out)
        try:
            self._process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(DEADLINE_S)
        os.close(self._in)
        shutil.rmtree(self._profile, ignore_errors=True)

    def _read(self) -> None:
        rest = b""
        while True:
            data = os.read(self._in, 65536)
            *texts, rest = (rest + data).split(b"\0")
            with self._changed:
                for message in map(json.loads, texts):
                    if "id" in message:
                        self._answers[message["id"]] = message
                    else:
                        self.events.append(message)
                self._closed = not data
                self._changed.notify_all()
            if not data:
                return

    def send(self, method: str, session: str = "", **params: Any) -> dict[str, Any]:
        """One command -> its result.  AssertionError when it fails or the browser is gone."""
        with self._changed:
            self._last_id += 1
            number = self._last_id
            command = {"id": number, "method": method, "params": params}
            if session:
                command["sessionId"] = session
            data = json.dumps(command).encode() + b"\0"
            while data:
                data = data[os.write(self._out, data):]
            done = self._changed.wait_for(
                lambda: number in self._answers or self._closed, DEADLINE_S)
            answer = self._answers.pop(number, None)
        assert done and answer is not None, "the browser does not answer: " + method
        assert "error" not in answer, (method, answer["error"])
        result: dict[str, Any] = answer["result"]
        return result

    def open(self, url: str, width: int = 1000, height: int = 800, dark: bool = False) -> Page:
        """A new page on `url`, once its scripts have begun."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session, target)
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.send(domain + ".enable")
        page.send("Page.addScriptToEvaluateOnNewDocument", source=WATCH)
        page.send("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=width < 500)
        page.send("Emulation.setEmulatedMedia", features=[
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        page.send("Page.navigate", url=url)
        page.wait_for("location.href.startsWith('http') && document.readyState == 'complete'")
        return page


class Page:
    """One tab."""

    def __init__(self, browser: Browser, session: str, target: str) -> None:
        self.browser, self.session, self.target = browser, session, target

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        return self.browser.send(method, self.session, **params)

    def run(self, script: str) -> Any:
        """The JSON value of a script's last expression; promises are awaited."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True,
                           awaitPromise=True, userGesture=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, script: str) -> Any:
        """The first true value of a script."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            value = self.run(script)
            if value:
                return value
            assert time.monotonic() < deadline, (script, self.text())
            self.run("new Promise(done => setTimeout(done, 20))")

    def text(self) -> str:
        """What a reader sees."""
        return str(self.run("document.body.innerText"))

    def events(self, method: str) -> list[dict[str, Any]]:
        """The parameters of this page's events of one kind."""
        return [event["params"] for event in list(self.browser.events)
                if event.get("sessionId") == self.session and event["method"] == method]

    def complaints(self) -> list[str]:
        """Console errors and warnings, exceptions, failed loads, and what the policy refused."""
        found = [str(entry["entry"].get("text")) for entry in self.events("Log.entryAdded")]
        found += [json.dumps(call["args"]) for call in self.events("Runtime.consoleAPICalled")]
        found += [json.dumps(e["exceptionDetails"]) for e in self.events("Runtime.exceptionThrown")]
        return found + list(self.run("window.refusedByPolicy"))

    def urls(self) -> list[str]:
        """Every URL that the page asked for."""
        return [str(event["request"]["url"]) for event in self.events("Network.requestWillBeSent")]

    def screenshot(self, path: str) -> None:
        """A picture for a human's eyes."""
        data = self.send("Page.captureScreenshot", format="png")["data"]
        with open(path, "wb") as file:
            file.write(base64.b64decode(data))

    def close(self) -> None:
        self.browser.send("Target.closeTarget", targetId=self.target)
