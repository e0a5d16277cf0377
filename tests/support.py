"""What the tests share: a proxy in this process, the command line as a subprocess, a raw client.

Every test imports this module first; it puts the root of the repository on the path.  Bases of
test cases and doubles stand in cases.py, bodies and streams of the dialects in wire.py, a client
of WebSockets in socket_client.py, the make-believe service in fake_upstream.py
(test_fake_upstream.py), figures of the file in gauges.py; what a process of the command line does
first, in forked.py.

Section of copilot_proxy.py and the test_*.py that hold it (new ones: see their docstring):

     1 Imports          layers old_pythons
     2 Constants        layers page_texts terminal
     3 Errors           helpers answers
     4 Helpers          helpers escapes numbers json_bounds patterns redaction
     5 Vocabulary       laws small_requests
     6 Framing          framing websocket fuzz any_order bursts
     7 Dialects         requests whole_answers streams laws matrix translate clients normalise
                        answers tools wishes capabilities gemini ollama bounds fuzz client_fuzz
                        hostile sdk sessions any_order bursts cache_marks early_exits mixtures
                        placed_parts search_loop sdk_doors splice tool_search
     8 Transcript care  transcript tools cache_marks early_exits looked_at_once mixtures
                        placed_parts same_head uploads
     9 Planning         models estimator today prices early_exits looked_at_once mixtures
                        search_loop small_requests
    10 Repairs          repairs bounds mixtures placed_parts
    11 Settings         settings start_checks
    12 Storage          auth doors arrival
    13 Upstream HTTP    pool network cli upstream_heads waiting tls_sessions loop_faults
    14 GitHub           auth machine_tokens refused_login login_prompt uploads
    15 Copilot          copilot calls auto identity limits refused_login uploads
    16 History          history looks sums
    17 Policy           admission budget deferred doors ledger limits record approval_words arrival
                        console login_prompt redaction small_requests
    18 HTTP server      server websocket relay loop waiting attacks freezing let_go hosts doors fuzz
                        hostile arrival loop_faults memory rounds same_head turns
    19 Page             browser page_texts page_routes
    20 Endpoints        endpoints translate server websocket gemini ollama azure search
                        looked_at_once loop_faults page_routes sdk_doors search_loop splice uploads
    21 Demo             cli demo
    22 Setup            setup setups readme merging newcomer
    23 Commands         cli auth network output today console login_prompt merging newcomer
                        redaction reports terminal
    24 Main             cli output scaleout memory
"""
from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import copy
import functools
import http.client
import importlib.util
import io
import itertools
import json
import logging
import marshal
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import unittest
import unittest.mock
from multiprocessing.connection import Connection
from typing import Any, Callable, Iterable, Iterator

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
for _folder in (HERE, ROOT):
    if _folder not in sys.path:
        sys.path.insert(0, _folder)

import copilot_proxy as cp  # noqa: E402
from fake_upstream import CHAT, MESSAGES, RESPONSES, FakeUpstream  # noqa: E402
from forked import PAUSES, load_impatient, run_command as run_forked  # noqa: E402

SCRIPT = os.path.join(ROOT, "copilot_proxy.py")
DEADLINE_S = 10.0            # for anything that should happen at once
SLOW = os.environ.get("COPILOT_PROXY_SLOW_TESTS") == "1"      # the long run, as in .ci/run
#: decorates what is long, or is a variant of what the plain run has
long_run = unittest.skipUnless(SLOW, "COPILOT_PROXY_SLOW_TESTS=1 only")
JSON_TYPE = {"Content-Type": "application/json"}

# Client, proxy and fake are threads of one process here, and hand over to each other all the time.
sys.setswitchinterval(0.0005)

# The product's logger has no handler as a library; the tests keep it quiet and look at records.
logging.getLogger("copilot_proxy").addHandler(logging.NullHandler())
logging.getLogger("copilot_proxy").propagate = False


def wait_until(condition: Callable[[], Any], what: str = "", timeout_s: float = DEADLINE_S) -> Any:
    """The first true value of `condition()`.  Raises AssertionError after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    pause_s = 0.0005                            # most of them are a moment away
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError("did not happen in time: %s" % (what or condition))
        time.sleep(pause_s)
        pause_s = min(1.5 * pause_s, 0.005)


def stand_still(read: Callable[[], Any], what: str, for_s: float = 0.15) -> None:
    """Wait until `read()` has given the same for a while."""
    state = [read(), time.monotonic()]

    def is_still() -> bool:
        value = read()
        if value != state[0]:
            state[:] = [value, time.monotonic()]
        return bool(time.monotonic() - state[1] >= for_s)

    wait_until(is_still, what)


def side_by_side(work: Callable[[Any], Any], rows: Iterable[Any]) -> list[Any]:
    """What `work` makes of each row, all at one time: they wait together."""
    rows = list(rows)
    with concurrent.futures.ThreadPoolExecutor(len(rows)) as pool:
        return list(pool.map(work, rows))


def pass_time(seconds: float) -> None:
    """Time itself is what the test is about."""
    until = time.monotonic() + seconds
    wait_until(lambda: time.monotonic() >= until)


@contextlib.contextmanager
def interrupts_on() -> Iterator[None]:
    """Processes started inside obey Ctrl-C, even where the tests themselves ignore it.

    A shell starts background jobs of a script, and `nohup` its command, with SIGINT ignored;
    children inherit that.  A handler, unlike "ignore", is not inherited.
    """
    ignored = (threading.current_thread() is threading.main_thread()
               and signal.getsignal(signal.SIGINT) is signal.SIG_IGN)
    if ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def patient(test: Callable[[Any], None]) -> Callable[[Any], None]:
    """For a test whose subject is time: it has three tries.

    Other work may spoil one, a fault spoils all.  A test whose times are those of the machine, not
    of the law, multiplies them by `self.slower`: 1, then 4 and 16.
    """
    @functools.wraps(test)
    def run(self: Any) -> None:
        for self.slower in (1, 4, 16):
            try:
                with unittest.mock.patch.object(self, "subTest", no_subtest):
                    return test(self)
            except AssertionError:
                if self.slower == 16:
                    raise
    return run


@contextlib.contextmanager
def no_subtest(*args: Any, **names: Any) -> Iterator[None]:
    """In place of subTest, which would report a failure at once."""
    yield


def need_files(count: int) -> None:
    """Raise the limit of open files, or skip the test where the system allows fewer."""
    cp.raise_file_limit()
    if cp.file_limit() < count:
        raise unittest.SkipTest("this system allows %d open files only" % cp.file_limit())


def memory_bytes() -> int:
    """What this process holds in memory (Linux)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "worker"]


class TestClock:
    """A clock that tests move; reads (monotonic, wall)."""

    __test__ = False          # not a test case for pytest

    def __init__(self) -> None:
        self.monotonic_offset_s = 0.0
        self.wall_offset_s = 0.0

    def __call__(self) -> tuple[float, float]:
        return (time.monotonic() + self.monotonic_offset_s, time.time() + self.wall_offset_s)


class StillClock:
    """A clock that stands still until it is moved; reads (monotonic, wall)."""

    def __init__(self, wall: float) -> None:
        self.monotonic, self.wall = 1000.0, wall

    def __call__(self) -> tuple[float, float]:
        return self.monotonic, self.wall

    def move(self, seconds: float) -> None:
        self.monotonic += seconds
        self.wall += seconds


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands inside a JSON value: ("messages", 0, "content")."""
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(
        value if isinstance(value, list) else ())
    for key, item in inner:
        yield from places(item, path + (key,))


def with_value(body: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of the body with another value at this place."""
    changed = copy.deepcopy(body)
    target = changed
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return changed


def combinations(*factors: Iterable[Any], seed: int = 5) -> Iterator[tuple[Any, ...]]:
    """Every combination of one value of each factor, in the long run.  In the plain run as many
    of them as hold every two values of two factors together at least once."""
    values = [list(factor) for factor in factors]
    rows = list(itertools.product(*map(range, map(len, values))))
    if not SLOW:
        random.Random(seed).shuffle(rows)
    seen: set[Any] = set()
    for row in rows:
        pairs = set(itertools.combinations(enumerate(row), 2))
        if SLOW or not pairs <= seen:
            seen |= pairs
            yield tuple(have[at] for have, at in zip(values, row))


def cuts(data: bytes, rounds: int = 12, seed: int = 7) -> list[list[bytes]]:
    """Ways to hand over `data`: whole, byte by byte, in few or many pieces at random."""
    chance = random.Random(seed)
    ways = [[data], [data[at:at + 1] for at in range(len(data))]]
    for _ in range(rounds):
        marks = sorted(chance.randrange(len(data) + 1) for _ in range(chance.choice((1, 2, 9, 20))))
        ends = [0] + marks + [len(data)]
        ways.append([data[a:b] for a, b in zip(ends, ends[1:])])
    return ways


class Proxy:
    """The product's own App and Server in this process, over real loopback sockets.

    `with Proxy(fake) as proxy:` logs in with "ghu_fake"; `login=False` does not; keyword arguments
    set fields of Settings (short intervals are the default here).
    """

    def __init__(self, fake: FakeUpstream, login: bool = True, clock: Any = None,
                 environ: dict[str, str] | None = None, **settings: Any) -> None:
        self._folder = tempfile.TemporaryDirectory()
        values: dict[str, Any] = dict(
            PAUSES, github_url=fake.url, data_dir=self._folder.name, grace=0.5, port=0,
            no_history=True)
        if login:
            values["github_token"] = "ghu_fake"
        values.update(settings)
        self.settings = cp.Settings(**values).check()
        self.app = cp.App(self.settings, environ or {}, clock or cp.read_clock)
        self.server = cp.Server(self.app, cp.ROUTES, "127.0.0.1", self.settings.port)
        loop = self.server.loop                 # looks at its deadlines once a second, else
        loop._tick_s = min(loop._tick_s, 0.02)
        self.logs: list[logging.LogRecord] = []
        self._handler = _ListHandler(self.logs)

    def __enter__(self) -> Proxy:
        for handler in list(self.app.log.handlers):      # of a command that ran in this process
            if not isinstance(handler, _ListHandler):
                self.app.log.removeHandler(handler)
        self.app.log.addHandler(self._handler)
        self.app.log.setLevel(logging.DEBUG)
        self.server.start()
        token = self.app.login.load()
        if token:
            self.app.login.use(token)
        return self

    def __exit__(self, *exc: Any) -> None:
        self.server.finish(0.2)
        self.app.close()
        self.app.log.removeHandler(self._handler)
        self._folder.cleanup()

    @property
    def port(self) -> int:
        return int(self.server.server_port)

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def data_dir(self) -> str:
        return self._folder.name

    def settle(self) -> None:
        """What was answered is recorded, too: the loop ends it in the rounds that follow, and
        records it a moment later."""
        for work in (lambda: None, lambda: None, self.app.ledger.settle):
            done = threading.Event()
            self.server.loop.post(lambda work=work, done=done: (work(), done.set()))
            if self.server.loop.is_running:
                done.wait(DEADLINE_S)

    def log_text(self) -> str:
        self.settle()
        return "\n".join(record.getMessage() for record in list(self.logs))

    def request(self, method: str, path: str, body: Any = None,
                headers: dict[str, str] | None = None) -> Reply:
        """One request on its own connection; a body that is not bytes is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            return send(connection, method, path, body, headers)
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Reply:
        return self.request("GET", path, None, headers)

    def post(self, path: str, body: Any, **headers: str) -> Reply:
        return self.request("POST", path, body, headers)

    def stream(self, path: str, body: Any, **headers: str) -> Reply:
        """POST with stream set; the reply's `events` are its frames."""
        return self.post(path, dict(body, stream=True), **headers)

    def connect(self) -> socket.socket:
        """A raw socket to the server."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=DEADLINE_S)


class _ListHandler(logging.Handler):
    def __init__(self, records: list[logging.LogRecord]) -> None:
        super().__init__()
        self._records = records

    def emit(self, record: logging.LogRecord) -> None:
        self._records.append(record)


class Reply:
    """status, headers (lower case), body bytes; `json` and `events` look into the body."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def frames(self) -> list[cp.Frame]:
        """Every server-sent event, comments left out."""
        decoder = cp.SSEDecoder()
        return decoder.feed(self.body) + decoder.close()

    @property
    def events(self) -> list[Any]:
        """The JSON of every event but [DONE]."""
        return [json.loads(frame.data) for frame in self.frames if frame.data != b"[DONE]"]

    @property
    def is_done(self) -> bool:
        return any(frame.data == b"[DONE]" for frame in self.frames)

    def __repr__(self) -> str:
        return "<Reply %d %r>" % (self.status, self.body[:2000])


def send(connection: http.client.HTTPConnection, method: str, path: str, body: Any = None,
         headers: dict[str, str] | None = None) -> Reply:
    """One request on a kept connection."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method, path, data, dict(JSON_TYPE if data is not None else {},
                                                **(headers or {})))
    answer = connection.getresponse()
    return Reply(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())


def raw_exchange(port: int, data: bytes, shut: bool = False, timeout_s: float = 5.0) -> bytes:
    """Send raw bytes, read until the server closes (or `timeout_s` passes without a byte)."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as sock:
        with contextlib.suppress(OSError):
            sock.sendall(data)
        if shut:
            sock.shutdown(socket.SHUT_WR)
        parts = []
        with contextlib.suppress(OSError):
            while True:
                part = sock.recv(65536)
                if not part:
                    break
                parts.append(part)
        return b"".join(parts)


PATHS = {"/v1/chat/completions": CHAT, "/v1/responses": RESPONSES, "/v1/messages": MESSAGES}


class _KeptFile:
    """A reader that http.client may close without losing what is behind the answer."""

    def __init__(self, reader: io.BufferedReader) -> None:
        self._reader = reader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def close(self) -> None:
        pass

    flush = close


class _Readable:
    def __init__(self, reader: io.BufferedReader) -> None:
        self._reader = reader

    def makefile(self, mode: str) -> Any:
        return _KeptFile(self._reader)


class RawAnswer:
    """One answer of a raw connection: version (10 or 11), status, headers, body."""

    def __init__(self, answer: http.client.HTTPResponse) -> None:
        self.status, self.version, self.reason = answer.status, answer.version, answer.reason
        self.headers = {name.lower(): value for name, value in answer.getheaders()}
        self.body = answer.read()

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Connected:
    """A connection to a server on this machine, to be closed; wrap: what makes it a TLS one."""

    def __init__(self, port: int, timeout_s: float = DEADLINE_S, wrap: Any = None) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=timeout_s)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if wrap is not None:
            self.sock = wrap(self.sock)
        self.reader = self.sock.makefile("rb")

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.reader.close()
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)


class RawClient(Connected):
    """A connection that sends bytes as they are; `answer()` reads the next answer."""

    def begin(self, method: str = "GET") -> http.client.HTTPResponse:
        """The next answer, its body unread."""
        answer = http.client.HTTPResponse(_Readable(self.reader), method=method)  # type: ignore
        answer.begin()
        return answer

    def answer(self, method: str = "GET") -> RawAnswer:
        return RawAnswer(self.begin(method))

    def ask(self, data: bytes, method: str = "GET") -> RawAnswer:
        self.send(data)
        return self.answer(method)

    def is_closed(self) -> bool:
        """The server has closed; waits for it.  A time-out is a failure, not a False."""
        try:
            return self.reader.read(1) == b""
        except ConnectionError:
            return True


def get(path: str, *fields: str, version: str = "1.1", method: str = "GET") -> bytes:
    """A raw request without a body."""
    lines = ["%s %s HTTP/%s" % (method, path, version), "Host: localhost"] + list(fields)
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def post(path: str, body: Any, *fields: str, version: str = "1.1") -> bytes:
    """A raw request with a body; what is not bytes is sent as JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = get(path, "Content-Type: application/json", "Content-Length: %d" % len(data), *fields,
               version=version, method="POST")
    return head + data


def chunked_post(path: str, pieces: list[bytes], *fields: str) -> bytes:
    """A raw request with a chunked body, with a chunk extension and a trailer."""
    head = get(path, "Content-Type: application/json", "Transfer-Encoding: chunked", *fields,
               method="POST")
    chunks = [b"%x;note=1\r\n%s\r\n" % (len(piece), piece) for piece in pieces]
    return head + b"".join(chunks) + b"0\r\nX-Trailer: a\r\n\r\n"


def said(answer: Any) -> str:
    """The text of a chat answer."""
    return str(answer.json["choices"][0]["message"]["content"])


def release(fake: FakeUpstream, holding: int = 1) -> None:
    """Let go what the fake holds, once it holds so many: an earlier release would be lost."""
    if not fake.wait_for(lambda: fake.holding == holding):
        raise AssertionError("the fake holds %d, not %d" % (fake.holding, holding))
    fake.release()
    while not fake.wait_for(lambda: fake.holding == 0, 0.1):
        fake.release()               # of what came behind it


KEY, OTHER_KEY = "made-up-operator-key", "made-up-second-key"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": "Bearer " + key}


def clean_environment(home: str, **more: str) -> dict[str, str]:
    """An environment that knows nothing of this machine's user, proxies or tokens."""
    keep = ("PATH", "SYSTEMROOT", "TEMP", "TMP", "LANG", "LD_LIBRARY_PATH")
    environ = {name: os.environ[name] for name in keep if name in os.environ}
    environ.update(HOME=home, USERPROFILE=home, LOCALAPPDATA=home,
                   PYTHONDONTWRITEBYTECODE="1", **more)
    return environ


@functools.lru_cache(maxsize=None)
def compiled() -> str:
    """The program as byte code, made once: a subprocess then starts in half the time."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, True)
    assert cp.__spec__ is not None and cp.__spec__.loader is not None
    code = cp.__spec__.loader.get_code("copilot_proxy")  # type: ignore[attr-defined]
    path = os.path.join(folder, "copilot_proxy.pyc")
    with open(path, "wb") as file:
        file.write(importlib.util.MAGIC_NUMBER + bytes(12) + marshal.dumps(code))
    return path


class Forked:
    """A process that is forked off a server in which the program is imported: it begins in a
    tenth of the time.  As far as the tests need it, it is used like subprocess.Popen.

    The long run has true processes instead, and so have tests whose subject is how a process
    begins or how the interpreter ends.
    """

    def __init__(self, words: tuple[str, ...], environ: dict[str, str], folder: str,
                 ends: list[int], *rest: Any) -> None:
        context = self._server()
        copies = [os.open(os.devnull, os.O_RDWR) if end == subprocess.DEVNULL else os.dup(end)
                  for end in ends]
        self._process = context.Process(target=run_forked, daemon=True, args=(
            words, environ, folder, list(map(Connection, copies)), *rest))
        with self._unprepared():
            self._process.start()
        self.pid = int(self._process.pid)

    @classmethod
    @functools.lru_cache(maxsize=None)
    def _server(cls) -> Any:
        """The context whose processes are forked; its server ends with this process."""
        from multiprocessing import forkserver
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["forked"])
        places = os.pathsep.join((os.path.dirname(compiled()), HERE))
        with cls._unprepared(), interrupts_on(), \
                unittest.mock.patch.dict(os.environ, PYTHONPATH=places):
            forkserver.ensure_running()
        return context

    @staticmethod
    def _unprepared() -> Any:
        """Else the process would run the main module of the tests, and get their folder."""
        return unittest.mock.patch("multiprocessing.spawn.get_preparation_data", lambda name: {})

    def poll(self) -> int | None:
        code: int | None = self._process.exitcode
        return code

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired("copilot_proxy.py", timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start_process(*words: str, home: str, environ: dict[str, str], ends: tuple[int, int, int],
                  has_session: bool = False, has_terminal: bool = False,
                  signals: tuple[tuple[int, Any], ...] = ()) -> Any:
    """The command line as a process with an isolated home.

    ends: standard input, output and errors; has_session: a session of its own; has_terminal: and
    standard input is its terminal; signals: how it handles some from the start.
    """
    if not SLOW and sys.platform == "linux":        # elsewhere there is no fork, or no safe one
        return Forked(words, environ, home, list(ends), has_session, has_terminal, signals)

    def prepare() -> None:
        if has_terminal:
            import fcntl
            import termios
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        for number, handling in signals:
            signal.signal(number, handling)

    with interrupts_on():
        return subprocess.Popen(
            [sys.executable, "-I", "-S", SCRIPT if SLOW else compiled(), *words], env=environ,
            cwd=home, stdin=ends[0], stdout=ends[1], stderr=ends[2],
            start_new_session=has_session,
            preexec_fn=prepare if has_terminal or signals else None)


class Command:
    """The command line as a process with an isolated home, from source in the long run only.

    `Command("start", "--demo").wait_for_url()`; `stop()` ends it and returns the exit code;
    `output()` is everything it printed.
    """

    def __init__(self, *args: str, home: str, stdin: bytes | None = None, **env: str) -> None:
        self._lines: list[str] = []
        printed, writer = os.pipe()
        with tempfile.TemporaryFile() as typed:
            typed.write(stdin or b"")
            typed.seek(0)
            try:
                self.process = start_process(
                    *args, home=home, environ=clean_environment(home, **env),
                    ends=(typed.fileno(), writer, writer))
            finally:
                os.close(writer)
        self._reader = threading.Thread(target=self._read, args=(printed,), daemon=True)
        self._reader.start()

    def _read(self, printed: int) -> None:
        with open(printed, "rb") as lines:
            for line in lines:
                self._lines.append(line.decode("utf-8", "replace"))

    def output(self) -> str:
        return "".join(self._lines)

    def wait_for(self, text: str) -> str:
        """The first line that holds `text`."""
        return str(wait_until(lambda: next((ln for ln in list(self._lines) if text in ln), None),
                              "output %r, have %s" % (text, self.output())))

    def wait_for_url(self) -> str:
        """The server's base URL, from its first lines."""
        line = self.wait_for("Anthropic clients")
        return line.partition("Anthropic clients")[2].split()[0].rstrip('",')

    def wait(self, timeout_s: float = 20.0) -> int:
        self._reader.join(timeout_s)          # its output ends with it, and is noticed at once
        return int(self.process.wait(timeout_s))

    def stop(self, signal_number: int = 15) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal_number)
        return self.wait()

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *exc: Any) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.wait()


def run_command(*args: str, stdin: bytes | None = None, **env: str) -> tuple[int, str]:
    """(exit code, everything printed) of a command that ends by itself."""
    with tempfile.TemporaryDirectory() as home:
        with Command(*args, home=home, stdin=stdin, **env) as command:
            return command.wait(), command.output()


#: the parsers of the command line, which read nothing but their words: made once
make_parser = functools.lru_cache(maxsize=None)(cp.make_parser)


class Typed(io.StringIO):
    """A terminal's standard input, as far as the program asks."""

    def isatty(self) -> bool:
        return bool(self.getvalue())


def run_main(home: str, *args: str, typed: str = "", **env: str) -> tuple[int, str]:
    """A command in this process -> (exit code, everything printed); cheaper than a subprocess.
    typed: what a person answers on a terminal; "" for none."""
    log = logging.getLogger("copilot_proxy")
    kept = log.handlers[:], log.level, log.propagate
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    printed, made, make = io.StringIO(), [], cp.Upstream

    def noted(*given: Any) -> cp.Upstream:
        made.append(make(*given))
        return made[-1]

    try:
        with unittest.mock.patch.object(cp, "Upstream", noted), \
                unittest.mock.patch.object(cp, "make_parser", make_parser), \
                unittest.mock.patch.object(cp, "load_settings", load_impatient), \
                contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), \
                unittest.mock.patch.object(sys, "stdin", Typed(typed)), \
                unittest.mock.patch.dict(os.environ, clean_environment(home, **env), clear=True):
            return cp.main(list(args)), printed.getvalue()
    finally:
        for upstream in made:                         # a process would simply end
            upstream.pool.clear()
        log.handlers[:], log.level, log.propagate = kept
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)


def ask(url: str, method: str, path: str, body: Any = None, **headers: str) -> Reply:
    """One request to a server by its URL."""
    connection = http.client.HTTPConnection(url.split("//")[1], timeout=30)
    try:
        return send(connection, method, path, body, headers)
    finally:
        connection.close()


def accepts(url: str) -> bool:
    """Does the port still take connections?"""
    try:
        socket.create_connection(("127.0.0.1", int(url.split(":")[-1])), timeout=5).close()
        return True
    except OSError:
        return False


class EnterCase(unittest.TestCase):
    def enter(self, manager: Any) -> Any:
        """Like enterContext of newer Pythons."""
        value = manager.__enter__()
        self.addCleanup(manager.__exit__, None, None, None)
        return value


class ProxyCase(EnterCase):
    """A fake upstream and a proxy for each test; `settings` are fields of Settings."""

    settings: dict[str, Any] = {}

    def setUp(self) -> None:
        self.fake = self.enter(FakeUpstream())
        self.proxy = self.enter(Proxy(self.fake, **self.settings))

    def tearDown(self) -> None:
        self.assertEqual(self.fake.crashes, [])


@contextlib.contextmanager
def second_proxy(case: ProxyCase, **settings: Any) -> Iterator[Proxy]:
    """Another proxy on the same fake, with other settings."""
    with Proxy(case.fake, **settings) as proxy:
        yield proxy


def chat(text: str, model: str = "gpt-4.1", **more: Any) -> dict[str, Any]:
    """A minimal chat request."""
    return dict({"model": model, "messages": [{"role": "user", "content": text}]}, **more)


def response(text: str, model: str = "gpt-5.3-codex", **more: Any) -> dict[str, Any]:
    """A minimal responses request."""
    return dict({"model": model, "input": text}, **more)


def message(text: str, model: str = "claude-sonnet-4.6", **more: Any) -> dict[str, Any]:
    """A minimal messages request."""
    return dict({"model": model, "max_tokens": 1000,
                 "messages": [{"role": "user", "content": text}]}, **more)


REQUESTS = (("/v1/chat/completions", chat), ("/v1/responses", response),
            ("/v1/messages", message))


class Block:
    """A fenced block: its language, text, and the heading above it."""

    def __init__(self, language: str, text: str, heading: str) -> None:
        self.language, self.text, self.heading = language, text, heading

    @property
    def commands(self) -> list[str]:
        return [ln for ln in self.text.replace("\\\n", " ").splitlines() if ln.strip()]


def read_blocks(text: str) -> Iterator[Block]:
    """Every fenced block, without the indentation that a list gives it."""
    heading = language = ""
    lines: list[str] | None = None
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            if lines is None:
                language, lines = line.strip()[3:].strip(), []
            else:
                yield Block(language, textwrap.dedent("\n".join(lines)), heading)
                lines = None
        elif lines is not None:
            lines.append(line)
        elif line.startswith("#"):
            heading = line.strip("# ")


#: what people read, by the folders of the repository
DOCUMENTS = ("README.md", ".github/OPERATING.md", ".github/CONTRIBUTING.md")


def document(name: str) -> str:
    """The text of one of DOCUMENTS."""
    with open(os.path.join(ROOT, *name.split("/")), encoding="utf-8") as file:
        return file.read()


def translated(client: str, upstream: str, body: dict[str, Any], model: cp.Model) -> Any:
    """(the upstream's Edit, the neutral Request) of a client's body, normalised first."""
    edit = cp.BodyEdit(body)
    cp.normalise(edit, cp.DIALECTS[client], model)
    return cp.translate_request(cp.DIALECTS[client], cp.DIALECTS[upstream], edit, model)
