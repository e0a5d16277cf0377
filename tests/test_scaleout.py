"""nginx before two replicas with a rolling restart, and the container's command line as its user
in a clean root: both as OPERATING.md has them."""
from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from typing import Any

from support import (JSON_TYPE, SCRIPT, SLOW, Command, chat, document, read_blocks, response,
                     run_command, wait_until)
import copilot_proxy as cp
from fake_upstream import FakeUpstream
from cases import CliCase
from socket_client import CLOSE, Socket, frame

BLOCKS = list(read_blocks(document(".github/OPERATING.md")))
NGINX = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin")


def free_ports(count: int) -> list[int]:
    """Ports that nobody uses just now; all are held until all are found."""
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in socks:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in socks]


@unittest.skipUnless(SLOW, "long: COPILOT_PROXY_SLOW_TESTS=1")
@unittest.skipUnless(NGINX, "no nginx here")
class RollingRestartTest(CliCase):
    """Streams and short calls go on while each replica is replaced."""

    def setUp(self) -> None:
        super().setUp()
        self.front, *self.ports = free_ports(3)
        self.replicas = [self.replica(port) for port in self.ports]
        self.nginx()
        self.failures: list[str] = []
        self.done: list[str] = []                       # one word for each call that went well
        self.calm = threading.Event()                   # set: begin no more calls

    def replica(self, port: int) -> Command:
        command = Command("start", "--port", str(port), "--grace", "60", "--github-url",
                          self.fake.url, "-g", "ghu_fake", home=self.home).__enter__()
        self.addCleanup(command.__exit__)
        code, output = run_command("debug", "--health", "http://127.0.0.1:%d" % port)
        self.assertEqual(code, 0, output + command.output())
        return command

    def nginx(self) -> None:
        """OPERATING.md's own configuration on the ports of this test."""
        block = next(block.text for block in BLOCKS if block.language == "nginx")
        for theirs, ours in ((4400, self.front), (4401, self.ports[0]), (4402, self.ports[1])):
            block = block.replace("127.0.0.1:%d" % theirs, "127.0.0.1:%d" % ours)
        path = os.path.join(self.home, "nginx.conf")
        with open(path, "w", encoding="ascii") as file:
            file.write("daemon off; pid %s/pid; error_log stderr;\nevents {}\nhttp {\n"
                       "access_log off;\n%s%s\n}\n" % (self.home, "".join(
                           "%s_temp_path %s/%s;\n" % (name, self.home, name) for name in (
                               "client_body", "proxy", "fastcgi", "uwsgi", "scgi")), block))
        self.errors = open(os.path.join(self.home, "errors"), "w+b")
        self.addCleanup(self.errors.close)
        process = subprocess.Popen([str(NGINX), "-p", self.home, "-c", path], stderr=self.errors)
        self.addCleanup(process.wait)
        self.addCleanup(process.terminate)
        wait_until(lambda: self.ask("GET", "/health")[0] == 200, "nginx")

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.front, timeout=60)
        try:
            connection.request(method, path, body and json.dumps(body), JSON_TYPE)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException) as error:
            return 0, repr(error).encode()
        finally:
            connection.close()

    def stream_on(self) -> None:
        """Streams of some three seconds, one behind the other."""
        while not self.calm.is_set():
            status, body = self.ask("POST", "/v1/chat/completions", chat(
                "@@events=60 delay_ms=50@@", stream=True))
            frames = cp.SSEDecoder().feed(body)
            if status == 200 and len(frames) > 60 and frames[-1].data == b"[DONE]":
                self.done.append("stream")
            else:
                self.failures.append("stream: %d %r" % (status, body[-300:]))

    def call_on(self) -> None:
        """Short calls, as fast as they go."""
        while not self.calm.is_set():
            status, body = self.ask("POST", "/v1/chat/completions", chat("hello"))
            if status == 200:
                self.done.append("call")
            else:
                self.failures.append("call: %d %r" % (status, body[-300:]))

    def test_no_stream_and_no_call_is_lost(self) -> None:
        threads = [threading.Thread(target=work, daemon=True)
                   for work in [self.stream_on] * 20 + [self.call_on] * 2]
        for thread in threads:
            thread.start()
        for at, port in enumerate(self.ports):
            wait_until(lambda: self.fake.open_streams >= 10, "streams", 30)
            old = self.replicas[at]
            old.process.send_signal(signal.SIGTERM)
            self.assertEqual(old.wait(60), 0, old.output())
            self.replicas[at] = self.replica(port)
            before = len(self.done)
            wait_until(lambda: self.done[before:].count("stream") >= 20, "more streams", 30)
        self.calm.set()
        for thread in threads:
            thread.join(30)
        self.assertEqual(self.failures, [])
        self.assertGreaterEqual(self.done.count("stream"), 40)
        self.assertGreaterEqual(self.done.count("call"), 40)

    def test_a_websocket_passes_nginx(self) -> None:
        with Socket(self.front, timeout_s=30) as opened:
            self.assertEqual(opened.status, 101)
            for text in ("hi", "@@events=20 delay_ms=20@@"):
                self.assertEqual(opened.turn(response(text))[-1]["type"], "response.completed")
            opened.send(frame(CLOSE, b"\x03\xe8"))
            self.assertEqual(opened.wait_closed().code, 1000)

    def test_events_pass_nginx_one_by_one(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.front, timeout=60)
        self.addCleanup(connection.close)
        began = time.monotonic()
        connection.request("POST", "/v1/chat/completions", json.dumps(chat(
            "@@events=20 delay_ms=200@@", stream=True)), JSON_TYPE)
        answer = connection.getresponse()
        answer.read1(100)
        self.assertLess(time.monotonic() - began, 3.0)      # the whole takes four seconds


def docker_words() -> list[str]:
    """OPERATING.md's docker command as words."""
    for block in BLOCKS:
        for line in block.commands:
            if line.startswith("docker run"):
                return shlex.split(line)
    raise AssertionError("OPERATING.md has no docker command")


class ContainerTest(unittest.TestCase):
    """OPERATING.md's docker line: its own words, and that command in a clean root."""

    def test_compose_says_the_same_as_docker_run(self) -> None:
        words = docker_words()
        compose = next(block.text for block in BLOCKS if "services:" in block.text)
        image = words.index("python:3.13-slim")
        self.assertIn("image: " + words[image], compose)
        self.assertIn("command: " + " ".join(words[image + 1:]), compose)
        self.assertIn("test: " + words[words.index("--health-cmd") + 1], compose)
        self.assertIn("working_dir: %s\n" % words[words.index("-w") + 1], compose)
        for word in words:
            name, _, value = word.partition("=")
            if name.isupper() and value:
                self.assertIn("%s: %s\n" % (name, value), compose)

    def test_it_starts_as_a_module_whose_byte_code_is_kept(self) -> None:
        words = docker_words()
        image = words.index("python:3.13-slim")
        self.assertEqual(words[image + 1:image + 5], ["python", "-m", "copilot_proxy", "start"])
        self.assertIn("PYTHONPYCACHEPREFIX=/data/bytecode", words)
        self.assertTrue(any(word.endswith(":/data") for word in words))
        folder = words[words.index("-w") + 1]              # Python cannot keep what lies in /
        self.assertTrue(any(":%s/copilot_proxy.py:" % folder in word for word in words))
        self.assertGreater(len(folder), 1)

    @unittest.skipUnless(SLOW, "long: COPILOT_PROXY_SLOW_TESTS=1")
    @unittest.skipUnless(sys.platform == "linux" and os.geteuid() == 0, "needs root on Linux")
    def test_the_command_serves_as_a_plain_user_in_a_root_with_python_and_the_file(self) -> None:
        words = docker_words()
        command = words[words.index("python:3.13-slim") + 1:]
        health = words[words.index("--health-cmd") + 1].split()
        with FakeUpstream() as fake, tempfile.TemporaryDirectory() as root:
            make_root(root)
            port = free_ports(1)[0]
            environ = {"COPILOT_PROXY_HOME": "/data", "GH_TOKEN": "ghu_fake", "PATH": "/bin",
                       "COPILOT_PROXY_GITHUB_URL": fake.url, "PORT": str(port),
                       "PYTHONPYCACHEPREFIX": "/data/bytecode"}

            def as_user() -> None:
                os.chroot(root)
                os.chdir(words[words.index("-w") + 1])
                os.setgid(54321)
                os.setuid(54321)

            def run(given: list[str]) -> subprocess.Popen[bytes]:
                return subprocess.Popen(["/bin/python", *given[1:]], env=environ, cwd="/",
                                        preexec_fn=as_user, stdin=subprocess.DEVNULL,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

            server = run(command)
            try:
                check = run([re.sub("4399", str(port), word) for word in health])
                said = check.communicate(timeout=30)[0]
                self.assertEqual(check.returncode, 0, said)
                self.assertIn(b"/health: ok", said)
            finally:
                server.terminate()
                output = server.communicate(timeout=30)[0].decode()
            self.assertEqual(server.returncode, 0, output)
            self.assertNotIn("ghu_fake", output)
            kept = [name for _, _, names in os.walk(os.path.join(root, "data", "bytecode"))
                    for name in names]
            self.assertTrue(any(name.startswith("copilot_proxy.") for name in kept), kept)


def make_root(root: str) -> None:
    """A folder that holds this Python with its libraries, the file, and nothing else."""
    for name in ("app", "bin", "data", "tmp", "dev"):
        os.mkdir(os.path.join(root, name))
    os.chmod(root, 0o755)
    os.chown(os.path.join(root, "data"), 54321, 54321)
    os.chmod(os.path.join(root, "tmp"), 0o1777)
    shutil.copy(SCRIPT, os.path.join(root, "app", "copilot_proxy.py"))
    os.chmod(os.path.join(root, "app", "copilot_proxy.py"), 0o644)
    binary = os.path.realpath(sys.executable)
    library = os.path.dirname(os.__file__)
    shutil.copytree(library, root + library, ignore=shutil.ignore_patterns(
        "site-packages", "test", "tests", "__pycache__", "idlelib", "config-*", "ensurepip"))
    target = root + binary
    os.makedirs(os.path.dirname(target), exist_ok=True)
    shutil.copy(binary, target)
    os.symlink(binary, os.path.join(root, "bin", "python"))
    modules = os.path.join(root + library, "lib-dynload")
    for path in [target] + [os.path.join(modules, name) for name in os.listdir(modules)]:
        done = subprocess.run(["ldd", path], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for found in re.findall(r"(?:=> )?(/\S+)", done.stdout.decode()):
            if not os.path.exists(root + found) and os.path.exists(found):
                os.makedirs(os.path.dirname(root + found), exist_ok=True)
                shutil.copy(found, root + found)
    for folder, folders, _ in os.walk(root):
        for name in folders:
            os.chmod(os.path.join(folder, name), 0o755 if name != "tmp" else 0o1777)
    os.mknod(os.path.join(root, "dev", "null"), 0o20666, os.makedev(1, 3))
    os.chmod(os.path.join(root, "dev", "null"), 0o666)
    os.mknod(os.path.join(root, "dev", "urandom"), 0o20666, os.makedev(1, 9))


if __name__ == "__main__":
    unittest.main()
