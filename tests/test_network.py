"""Company networks and odd platforms: every fault ends in the sentence with its remedy."""
from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import signal
import socket
import socketserver
import ssl
import subprocess
import sys
import tempfile
import threading
import types
import unittest
import unittest.mock
from typing import Any, Iterator

from support import SCRIPT, SLOW, clean_environment, run_command, run_main
import copilot_proxy as cp
from fake_upstream import FakeUpstream
from cases import MappingProxy

TENANT = "octo.ghe.com"
POSIX = os.name == "posix"


def refusal(*logins: str, status: str = "407 Proxy Authentication Required") -> bytes:
    """A proxy's answer to CONNECT."""
    return ("HTTP/1.1 %s\r\n%sContent-Length: 0\r\n\r\n" % (
        status, "".join("Proxy-Authenticate: %s\r\n" % login for login in logins))).encode()


class WebPage(socketserver.ThreadingTCPServer):
    """Something that answers every request with a page, as a captive portal does."""

    daemon_threads = True

    def __init__(self, status: str = "200 OK", more: str = "") -> None:
        page = b"<html><body>Please accept our terms</body></html>"
        self.answer = ("HTTP/1.1 %s\r\nContent-Type: text/html\r\n%sContent-Length: %d\r\n"
                       "Connection: close\r\n\r\n" % (status, more, len(page))).encode() + page
        super().__init__(("127.0.0.1", 0), _Page)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        self.url = "http://127.0.0.1:%d" % self.server_address[1]

    def close(self) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are no event."""


class _Page(socketserver.StreamRequestHandler):
    server: WebPage

    def handle(self) -> None:
        while self.rfile.readline().strip():
            pass
        self.wfile.write(self.server.answer)


def run_openssl(*args: str) -> None:
    subprocess.run(["openssl", *args], check=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@unittest.skipUnless(shutil.which("openssl"), "no openssl at hand to make certificates with")
@contextlib.contextmanager
def silent_port() -> Iterator[int]:
    """A port whose queue is full: the system answers no further connection, as firewalls do."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.socket())
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(5):
            one = stack.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(server.getsockname())
        yield server.getsockname()[1]


class CompanyTest(unittest.TestCase):
    """A proxy that inspects, made-up hosts, and every way in which it goes wrong."""

    @classmethod
    def setUpClass(cls) -> None:
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.folder = folder.name
        names = "subjectAltName=%s\n" % ",".join(
            "DNS:" + prefix + TENANT for prefix in ("", "api.", "copilot-api."))
        cls.ca = cls.make("ca", "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign\n"
                          "subjectKeyIdentifier=hash\n")
        cls.good = cls.make("good", names + "authorityKeyIdentifier=keyid\n", "ca")
        cls.bare = cls.make("bare", names + "authorityKeyIdentifier=none\n", "ca")
        cls.other = cls.make("other", "subjectAltName=DNS:portal.example.test\n"
                             "authorityKeyIdentifier=keyid\n", "ca")

    @classmethod
    def make(cls, name: str, extensions: str, issuer: str = "") -> str:
        """A certificate with its key in one PEM file."""
        path = os.path.join(cls.folder, name)
        with open(path + ".cnf", "w", encoding="ascii") as file:
            file.write("[req]\ndistinguished_name=dn\nprompt=no\n[dn]\nCN=Made-up %s\n[v3]\n%s"
                       % (name, extensions))
        run_openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", path + ".key")
        run_openssl("req", "-new", "-key", path + ".key", "-config", path + ".cnf", "-out",
                    path + ".csr")
        signer = ["-CA", os.path.join(cls.folder, issuer + ".crt"), "-CAkey",
                  os.path.join(cls.folder, issuer + ".key"), "-set_serial", "7"] if issuer else [
                      "-signkey", path + ".key"]
        run_openssl("x509", "-req", "-in", path + ".csr", "-days", "2", "-extfile", path + ".cnf",
                    "-extensions", "v3", "-out", path + ".crt", *signer)
        with open(path, "w", encoding="ascii") as file:
            for part in (path + ".key", path + ".crt"):
                with open(part, encoding="ascii") as read:
                    file.write(read.read())
        return path + ".crt" if not issuer else path

    def setUp(self) -> None:
        self.fake = FakeUpstream().start()
        self.addCleanup(self.fake.close)
        self.plain_url = self.fake.url
        self.fake.url = self.fake.api_url = "https://copilot-api." + TENANT

    def proxy(self, upstream: str = "", **how: Any) -> MappingProxy:
        via = MappingProxy(upstream or self.plain_url, **how)
        via.__enter__()
        self.addCleanup(via.__exit__)
        return via

    def run_tenant(self, *args: str, strict: bool = False, light: bool = False, **env: str,
                   ) -> tuple[int, str]:
        """A command for the tenant; `strict`: as Python 3.13 and newer check certificates."""
        with tempfile.TemporaryDirectory() as home, contextlib.ExitStack() as stack:
            if light or strict:                      # without the 140 CAs of the system
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                context.verify_flags |= ssl.VERIFY_X509_STRICT if strict else 0
                for holder, name, value in (
                        (ssl, "create_default_context", lambda: context), (cp, "_CA_BUNDLES", ()),
                        (ssl, "get_default_verify_paths",
                         lambda: types.SimpleNamespace(openssl_cafile=""))):
                    stack.enter_context(unittest.mock.patch.object(holder, name, value))
            return run_main(home, *args, "--github-url", "https://" + TENANT, "-g", "ghu_fake",
                            **env)

    def told(self, *sentence: str, args: tuple[str, ...] = (), **how: Any) -> str:
        """The walk and, in the long run, an ordinary command fail with the same words."""
        walk = ""
        for command in (("debug", "--network"), ("models",))[:2 if SLOW else 1]:
            code, walk_or_error = self.run_tenant(*command, *args, **{"light": True, **how})
            self.assertEqual(code, 1, walk_or_error)
            for words in sentence:
                self.assertIn(words, walk_or_error)
            self.assertNotIn("Traceback", walk_or_error)
            walk = walk or walk_or_error
        return walk

    def test_all_is_well_through_a_proxy_with_a_login_and_an_inspecting_ca(self) -> None:
        via = self.proxy(login="user:pa ss", certificate=self.good)
        code, output = self.run_tenant("debug", "--network", "--ca-file", self.ca,
                                       HTTPS_PROXY=via.url("user:pa%20ss"))
        self.assertEqual(code, 0, output)
        for line in ("DNS   127.0.0.1 is 127.0.0.1",
                     "proxy 127.0.0.1 lets api.octo.ghe.com through",
                     "certificate by  / Made-up ca", "HTTP  404", "lists 14 models"):
            self.assertIn(line, output)
        self.assertNotIn("pa%20ss", output)
        self.assertNotIn("ghu_fake", output)

    @unittest.skipUnless(SLOW, "COPILOT_PROXY_SLOW_TESTS=1 only")
    def test_a_proxy_that_wants_a_login_says_how_to_give_it(self) -> None:
        via = self.proxy(login="user:pa ss", certificate=self.good)
        walk = self.told("write user:password@ before its host in HTTPS_PROXY",
                         args=("--ca-file", self.ca), HTTPS_PROXY=via.url("user:wrong"))
        self.assertIn("proxy FAILED: ", walk)
        self.assertIn("TCP   127.0.0.1 port", walk)
        self.assertNotIn("wrong", walk)

    @unittest.skipUnless(SLOW, "COPILOT_PROXY_SLOW_TESTS=1 only")
    def test_ntlm_and_negotiate_name_a_helper(self) -> None:
        words = ("only a Windows login", "run px or cntlm on this machine and set "
                 "HTTPS_PROXY=http://127.0.0.1:3128")
        via = self.proxy(garbage=refusal("Negotiate", "NTLM"))
        self.told(*words, HTTPS_PROXY=via.url())
        for logins, said in (("NTLM", words[0]), ("Negotiate, NTLM", words[1]),
                             ("Kerberos", words[0]), ("NTLM, Basic realm=x", "user:password@")):
            refused = cp.ProxyRefusal("407 No")
            refused.logins = logins
            self.assertIn(said, str(cp.explain_connect_error(refused, TENANT, True)))

    @unittest.skipUnless(SLOW, "COPILOT_PROXY_SLOW_TESTS=1 only")
    def test_a_proxy_that_forbids_the_host_or_is_none(self) -> None:
        via = self.proxy(garbage=refusal(status="403 Forbidden by policy"))
        self.told("403 Forbidden by policy", "ask for", HTTPS_PROXY=via.url())
        via = self.proxy(garbage=b"SSH-2.0-OpenSSH_9.6\r\n\r\n")
        self.told("no HTTP proxy answers there", "look at HTTPS_PROXY", HTTPS_PROXY=via.url())

    @unittest.skipUnless(SLOW, "COPILOT_PROXY_SLOW_TESTS=1 only")
    def test_an_unknown_ca_asks_for_its_file(self) -> None:
        via = self.proxy(certificate=self.good)
        walk = self.told("--ca-file FILE with your company's root certificate",
                         HTTPS_PROXY=via.url())
        self.assertIn("TLS   FAILED: ", walk)

    @unittest.skipUnless(SLOW, "COPILOT_PROXY_SLOW_TESTS=1 only")
    def test_a_ca_without_key_identifiers_asks_for_the_relaxed_check(self) -> None:
        via = self.proxy(certificate=self.bare)
        env = {"HTTPS_PROXY": via.url(), "SSL_CERT_FILE": self.ca}
        self.told("Missing Authority Key Identifier", "use --tls-relaxed", strict=True, **env)
        code, output = self.run_tenant("models", "--tls-relaxed", strict=True, **env)
        self.assertEqual(code, 0, output)
        code, output = self.run_tenant("models", "--ca-file", self.ca, strict=True,
                                       HTTPS_PROXY=via.url())
        self.assertEqual(code, 0, output)            # the user's own file is trusted as it is

    @unittest.skipIf(sys.version_info < (3, 13), "Python checks so strictly from 3.13 on")
    @unittest.skipUnless(SLOW, "COPILOT_PROXY_SLOW_TESTS=1 only")
    def test_python_itself_is_strict(self) -> None:
        via = self.proxy(certificate=self.bare)
        self.told("use --tls-relaxed", light=False, HTTPS_PROXY=via.url(), SSL_CERT_FILE=self.ca)

    @unittest.skipUnless(SLOW, "COPILOT_PROXY_SLOW_TESTS=1 only")
    def test_a_captive_portal_is_named_by_its_certificate_or_its_page(self) -> None:
        via = self.proxy(certificate=self.other)
        self.told("a captive portal or a filter answers", "sign in there",
                  args=("--ca-file", self.ca), HTTPS_PROXY=via.url())
        for status, more in (("200 OK", ""), ("302 Found", "Location: http://portal.test/\r\n")):
            portal = WebPage(status, more)
            self.addCleanup(portal.close)
            via = self.proxy(portal.url, certificate=self.good)
            self.told("answers with a web page", "captive portal", args=("--ca-file", self.ca),
                      HTTPS_PROXY=via.url())

    @unittest.skipUnless(SLOW, "COPILOT_PROXY_SLOW_TESTS=1 only")
    def test_an_error_page_of_github_is_not_taken_for_a_portal(self) -> None:
        portal = WebPage("503 Service Unavailable")
        self.addCleanup(portal.close)
        via = self.proxy(portal.url, certificate=self.good)
        code, output = self.run_tenant("models", "--ca-file", self.ca, light=True,
                                       HTTPS_PROXY=via.url())
        self.assertEqual(code, 1)
        self.assertIn("503", output)
        self.assertNotIn("portal", output)

    @unittest.skipUnless(SLOW, "COPILOT_PROXY_SLOW_TESTS=1 only")
    def test_unreachable_dns(self) -> None:
        with unittest.mock.patch.object(socket, "getaddrinfo", side_effect=socket.gaierror(
                -3, "Temporary failure in name resolution")):
            walk = self.told("no DNS or no network; behind a company proxy set HTTPS_PROXY")
        self.assertIn("DNS   FAILED: cannot find the host octo.ghe.com", walk)

    @unittest.skipUnless(SLOW, "COPILOT_PROXY_SLOW_TESTS=1 only")
    def test_a_port_that_nothing_serves(self) -> None:
        self.told("cannot connect to api.octo.ghe.com through the proxy",
                  HTTPS_PROXY="http://127.0.0.1:1")

    @unittest.skipUnless(SLOW and sys.platform == "linux", "COPILOT_PROXY_SLOW_TESTS=1, Linux only")
    def test_a_silent_firewall(self) -> None:
        with silent_port() as port, unittest.mock.patch.object(cp, "CONNECT_TIMEOUT_S", 0.3):
            walk = self.told("a firewall? Behind a company proxy set HTTPS_PROXY",
                             HTTPS_PROXY="http://127.0.0.1:%d" % port)
        self.assertIn("TCP   FAILED: ", walk)

    @unittest.skipUnless(SLOW, "COPILOT_PROXY_SLOW_TESTS=1 only")
    def test_a_pac_script_is_named_as_not_supported(self) -> None:
        for value in ("http://wpad.example.test/proxy.pac", "http://x.test/wpad.dat",
                      "pac+http://x.test/p"):
            code, output = self.run_tenant("models", HTTPS_PROXY=value)
            self.assertEqual(code, 2)
            self.assertIn("is a PAC script", output)
            self.assertIn("set HTTPS_PROXY=http://host:port", output)

    @unittest.skipUnless(SLOW, "COPILOT_PROXY_SLOW_TESTS=1 only")
    def test_windows_own_pac_setting_is_told(self) -> None:
        registry = types.SimpleNamespace(
            HKEY_CURRENT_USER=1, OpenKey=lambda *key: contextlib.nullcontext(key),
            QueryValueEx=lambda key, name: ("http://wpad.corp.test/proxy.pac", 1))
        with unittest.mock.patch.dict(sys.modules, winreg=registry), unittest.mock.patch.object(
                socket, "getaddrinfo", side_effect=socket.gaierror(-2, "unknown")):
            code, output = self.run_tenant("debug", "--network")
        self.assertIn("PAC script (http://wpad.corp.test/proxy.pac)", output)


#: a Python that lacks modules, or whose standard streams are closed, running the script
PRELUDE = ("import runpy, sys\n"
           "for name in %r: sys.modules[name] = None\n"
           "for name in %r: setattr(sys, name, None)\n"
           "sys.argv = sys.argv[1:]\n"
           "runpy.run_path(sys.argv[0], run_name='__main__')\n")


class PlatformTest(unittest.TestCase):
    """Minimal Pythons, odd consoles, no home, no room."""

    def run_python(self, *args: str, without: tuple[str, ...] = (), closed: tuple[str, ...] = (),
                   **env: str) -> tuple[int, str]:
        with tempfile.TemporaryDirectory() as home:
            done = subprocess.run(
                [sys.executable, "-c", PRELUDE % (without, closed), SCRIPT, *args], cwd=home,
                env=clean_environment(home, **env), stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=30)
            return done.returncode, done.stdout.decode("utf-8", "replace")

    @unittest.skipUnless(SLOW, "COPILOT_PROXY_SLOW_TESTS=1 only")
    def test_without_ssl_it_says_so_and_plain_http_works(self) -> None:
        code, output = self.run_python("models", "-g", "ghu_fake", without=("ssl", "_ssl"))
        self.assertEqual(code, 2, output)
        self.assertIn("built without its ssl module", output)
        self.assertNotIn("Traceback", output)
        with FakeUpstream() as fake:
            code, output = self.run_python("models", "-g", "ghu_fake", "--github-url", fake.url,
                                           without=("ssl", "_ssl", "sqlite3", "_sqlite3"))
        self.assertEqual(code, 0, output)
        self.assertIn("gpt-4.1", output)

    @unittest.skipUnless(SLOW, "long: COPILOT_PROXY_SLOW_TESTS=1")
    def test_without_standard_streams_as_under_pythonw(self) -> None:
        code, output = self.run_python("debug", closed=("stdin", "stdout", "stderr"))
        self.assertEqual((code, output), (0, ""))

    def test_consoles_of_any_encoding(self) -> None:
        for env in ({"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
                    {"PYTHONIOENCODING": "cp1252"},
                    {"PYTHONIOENCODING": "ascii"})[:3 if SLOW else 1]:
            code, output = run_command("debug", **env)
            self.assertEqual(code, 0, output)
            self.assertTrue(output.isascii())

    def test_a_name_outside_ascii_is_printed_on_an_old_console(self) -> None:
        with FakeUpstream() as fake:
            fake.models[0]["name"] = "Modell \u00fc\u6a21"
            fake.models[0]["id"] = "modell-\u6a21"
            console = io.TextIOWrapper(io.BytesIO(), "cp1252")
            with tempfile.TemporaryDirectory() as home, contextlib.redirect_stdout(console):
                environ = clean_environment(home)
                with unittest.mock.patch.dict(os.environ, environ, clear=True):
                    code = cp.main(["models", "--all", "-g", "ghu_fake", "--github-url", fake.url])
        console.flush()
        self.assertIn(b"modell-?", console.buffer.getvalue())          # type: ignore[attr-defined]
        self.assertEqual(code, 0)

    def test_a_port_that_windows_keeps_for_itself(self) -> None:
        refused = OSError(errno.EACCES, "access forbidden")
        refused.winerror = 10013                                      # type: ignore[attr-defined]
        with FakeUpstream() as fake, tempfile.TemporaryDirectory() as home, \
                unittest.mock.patch.object(cp, "Server", side_effect=refused):
            code, output = run_main(home, "start", "--github-url", fake.url)
        self.assertEqual(code, 1)
        self.assertIn("--port", output)
        self.assertIn("excludedportrange", output)

    def test_a_system_without_sigterm_has_ctrl_c(self) -> None:
        noted: list[int] = []
        windows = types.SimpleNamespace(SIGINT=2, SIGBREAK=21,
                                        signal=lambda number, call: noted.append(number))
        with unittest.mock.patch.object(cp, "signal", windows):
            cp.catch_signals()
        self.assertEqual(noted, [2, 21])
        self.assertTrue(hasattr(signal, "SIGINT"))

    @unittest.skipUnless(POSIX, "Windows has %LOCALAPPDATA%")
    def test_without_a_home_nothing_is_put_into_the_folder_at_hand(self) -> None:
        with unittest.mock.patch.object(os.path, "expanduser", lambda path: path):
            self.assertEqual(cp.default_data_dir({}), "/.local/share/copilot-proxy")

    @unittest.skipUnless(SLOW, "long: COPILOT_PROXY_SLOW_TESTS=1")
    @unittest.skipUnless(POSIX and hasattr(os, "geteuid") and os.geteuid() == 0, "needs root")
    def test_a_user_without_home_and_name_is_served_and_told_where_to_put_the_login(self) -> None:
        with FakeUpstream() as fake, self.as_nobody() as run:
            code, output = run("models", "-g", "ghu_fake", "--github-url", fake.url)
            self.assertEqual(code, 0, output)
            code, output = run("auth", "-g", "ghu_fake", "--github-url", fake.url)
            self.assertEqual(code, 2, output)
            self.assertIn("--data-dir", output)

    @contextlib.contextmanager
    def as_nobody(self) -> Iterator[Any]:
        """Commands as a user that the system does not know, in an empty folder of root's."""
        with tempfile.TemporaryDirectory() as folder:
            os.chmod(folder, 0o755)
            script = shutil.copy(SCRIPT, folder)
            os.chmod(script, 0o755)
            python = sys.executable if os.stat(os.path.expanduser("~")).st_mode & 1 \
                else "/usr/bin/python3"              # a pyenv below /root is not for others
            if not os.path.exists(python):
                self.skipTest("no Python here that others may run")

            def run(*args: str) -> tuple[int, str]:
                done = subprocess.run([python, "-B", script, *args], cwd=folder, env={
                    "PATH": os.environ.get("PATH", "")}, preexec_fn=lambda: os.setuid(54321),
                    stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
                return done.returncode, done.stdout.decode()

            yield run
            self.assertEqual(os.listdir(folder), [os.path.basename(script)])

    def test_a_full_disk_keeps_the_old_login_and_says_so(self) -> None:
        with tempfile.TemporaryDirectory() as home:
            login = cp.LoginFile(home, cp.GITHUB_URL)
            login.save("ghu_old")
            full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            with unittest.mock.patch.object(os, "fsync", side_effect=full):
                with self.assertRaisesRegex(cp.ConfigError, "No space left.*--data-dir"):
                    login.save("ghu_new")
            self.assertEqual((login.load(), os.listdir(home)), ("ghu_old", ["github_token"]))

    def test_a_read_only_home_is_served_with_a_token_of_the_environment(self) -> None:
        with FakeUpstream() as fake, tempfile.TemporaryDirectory() as home, \
                unittest.mock.patch.object(os, "makedirs", side_effect=OSError(
                    errno.EROFS, os.strerror(errno.EROFS))), \
                contextlib.redirect_stdout(io.StringIO()):
            code, output = run_main(home, "models", "-g", "ghu_fake", "--github-url", fake.url)
            self.assertEqual(code, 0, output)
            code, output = run_main(home, "auth", "-g", "ghu_fake", "--github-url", fake.url)
            self.assertEqual(code, 2, output)
            self.assertIn("Read-only file system", output)


if __name__ == "__main__":
    unittest.main()
