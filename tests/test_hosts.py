"""Under which names this server is served, whose pages may call it, and which hosts it believes."""
from __future__ import annotations

import unittest

from support import ProxyCase, RawClient, chat, cp, message, second_proxy
from cases import SharedCase

FOREIGN_HOSTS = (
    "evil:80@localhost", "localhost:evil", "localhost@evil", "evil@localhost",
    "user:pw@localhost:80",
    "localhost, evil.example", "evil.example, localhost", "localhost evil.example",
    "localhost#evil",
    "localhost/evil", "localhost?evil", "localhost\\evil", "localhost%2eevil", "localhost;evil",
    "localhost:80:80", "localhost:-1", "localhost:+80", "localhost:0", "localhost:65536",
    "localhost:999999", "localhost:\u0668\u0660".encode().decode("latin-1"), "localhost..",
    ".localhost", "..", ".", ":", ":80", "", "http://localhost", "[::1", "::1", "[::1]evil",
    "[::1]:evil", "[localhost]", "[]", "[::1%25lo]", "[::2]", "[::ffff:10.0.0.1]",
    "127.0.0.1.evil.example", "0177.0.0.1", "2130706433", "0x7f000001", "127.1", "*",
    "evil.example.", "localhost.evil.example", "xn--localhost", "localhost\x1b[2J", "localhost\x7f",
    "l\u00f6calhost", "a" * 60000)
SERVED_HOSTS = (
    "localhost", "LOCALHOST", "LocalHost:4399", "localhost:", "localhost.", "localhost.:80",
    "localhost:65535", "127.0.0.1", "127.255.255.254:1", "[::1]", "[::1]:4399", "[0:0:0:0:0:0:0:1]",
    "[0000:0000:0000:0000:0000:0000:0000:0001]:80", "[::FFFF:127.0.0.1]", "[::ffff:7f00:1]",
    "app.localhost", "proxy.lan", "PROXY.lan.:8443", "[fd00::7]:80", "[FD00:0::7]")


class HostTest(SharedCase):
    settings = dict(allow_host=("Proxy.LAN", "fd00::7"))

    def test_a_host_that_is_not_ours_is_refused_however_it_is_written(self) -> None:
        self.proxy.get("/v1/models")
        sent = self.new_sent()
        for host in FOREIGN_HOSTS:
            with self.subTest(host=host[:60]):
                head = "GET /v1/models HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n" % host
                with RawClient(self.proxy.port) as client:
                    answer = client.ask(head.encode("latin-1"))
                self.assertIn(answer.status, (400, 403), answer.body)
        self.assertEqual(sent(), [])

    def test_our_own_names_are_served_however_they_are_written(self) -> None:
        for host in SERVED_HOSTS:
            with self.subTest(host=host):
                reply = self.proxy.get("/health", Host=host)
                self.assertEqual(reply.status, 200, reply.body)

    def test_a_host_that_nothing_can_allow_is_told_no_flag(self) -> None:
        self.assertIn(b"--allow-host", self.proxy.get("/health", Host="box.example").body)
        for host in ("evil:80@localhost", "localhost:evil", "a b"):
            reply = self.proxy.get("/health", Host=host)
            self.assertEqual(reply.status, 403)
            self.assertNotIn(b"--allow-host", reply.body)

    def ask(self, target: str, host: str = "localhost") -> int:
        head = "GET %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n" % (target, host)
        with RawClient(self.proxy.port) as client:
            return int(client.ask(head.encode()).status)

    def test_a_request_line_with_a_foreign_url_is_refused(self) -> None:
        self.proxy.get("/v1/models")
        sent = self.new_sent()
        for target in ("http://evil.example/v1/models", "https://evil.example/v1/models",
                       "HTTP://EVIL.example/v1/models",
                       "http://evil.example:80@localhost/v1/models",
                       "http://localhost@evil.example/v1/models", "http:///v1/models",
                       "http://localhost:evil/v1/models", "http://evil.example?/v1/models",
                       "http://evil.example#/v1/models", "http://localhost\\.evil/v1/models",
                       "http://:80/v1/models", "http://10.0.0.1/v1/models"):
            with self.subTest(target=target):
                self.assertEqual(self.ask(target), 403)
        self.assertEqual(self.ask("http://localhost/v1/models", "evil.example"), 403)
        self.assertEqual(sent(), [])

    def test_a_request_line_with_our_own_url_is_served(self) -> None:
        for target in ("http://localhost/health", "http://LOCALHOST:%d/health?a=http://b"
                       % self.proxy.port, "HTTP://[::1]:80//v1/health", "http://proxy.lan/health",
                       "http://localhost?a=b", "http://localhost"):
            with self.subTest(target=target):
                self.assertEqual(self.ask(target), 200)

    def test_values_of_allow_host_are_checked_at_the_start(self) -> None:
        self.assertEqual(self.proxy.settings.allow_host, ("proxy.lan", "fd00::7"))
        for value in ("*", "*.lan", "http://proxy.lan", "proxy.lan:80", "a b", "[::1", "a/b",
                      "user@box"):
            with self.subTest(value=value), self.assertRaises(cp.ConfigError) as caught:
                cp.Settings(allow_host=(value,)).check()
            self.assertIn("--allow-host", str(caught.exception))


class ForwardedHostTest(ProxyCase):
    settings = dict(allow_host=("proxy.lan",))

    def test_x_forwarded_host_counts_only_from_a_trusted_proxy(self) -> None:
        foreign, ours = {"X-Forwarded-Host": "evil.example"}, {"X-Forwarded-Host": "proxy.lan"}
        self.assertEqual(self.proxy.get("/health", **foreign).status, 200)
        self.assertEqual(self.proxy.get("/health", Host="evil.example", **ours).status, 403)
        with second_proxy(self, trusted_proxy=("127.0.0.1",), allow_host=("proxy.lan",)) as proxy:
            self.assertEqual(proxy.get("/health", **foreign).status, 403)
            self.assertEqual(proxy.get("/health", Host="inside", **ours).status, 200)
            for host in ("evil:80@proxy.lan", "proxy.lan:evil", "proxy.lan, evil.example"):
                with self.subTest(host=host):
                    reply = proxy.get("/health", **{"X-Forwarded-Host": host})
                    self.assertEqual(reply.status, 403)

    def test_the_own_origin_has_no_default_port(self) -> None:
        told = {"X-Forwarded-Host": "proxy.lan:443", "X-Forwarded-Proto": "https"}
        with second_proxy(self, trusted_proxy=("127.0.0.1",), allow_host=("proxy.lan",)) as proxy:
            self.assertEqual(proxy.get("/stats", Origin="https://proxy.lan", **told).status, 200)
            self.assertEqual(proxy.get("/stats", Origin="http://proxy.lan", **told).status, 403)


class ApiHostTest(unittest.TestCase):
    """The host that GitHub names: a bearer token goes there."""

    def test_whatever_is_more_than_a_host_of_the_service_is_ignored(self) -> None:
        settings = cp.Settings().check()
        for url in ("https://user@api.githubcopilot.com", "https://user:pw@api.githubcopilot.com",
                    "https://@api.githubcopilot.com",
                    "https://evil.example\\@api.githubcopilot.com",
                    "https://api.githubcopilot.com\\.evil.example",
                    "https://api.githubcopilot.com/v1",
                    "https://api.githubcopilot.com/../x", "https://api.githubcopilot.com//",
                    "https://api.githubcopilot.com/%2e%2e", "https://api.githubcopilot.com?a=b",
                    "https://api.githubcopilot.com#a", "https://api.githubcopilot.com:port",
                    "https://api.githubcopilot.com:0", "https://api.githubcopilot.com:99999",
                    " https://api.githubcopilot.com", "https://api.githubcopilot.com ",
                    "https://api.githubcopilot.com\n", "https://api.github\tcopilot.com",
                    "https:// api.githubcopilot.com", "https:/api.githubcopilot.com",
                    "https:api.githubcopilot.com", "//api.githubcopilot.com",
                    "wss://api.githubcopilot.com", "javascript://api.githubcopilot.com",
                    "https://evil.example%2f.githubcopilot.com", "https://.githubcopilot.com",
                    "https://a..githubcopilot.com", "https://evil.example\x00.githubcopilot.com",
                    "https://evil.example\u3002githubcopilot.com",
                    "https://ap\u0131.githubcopilot.com", "https://[::1].githubcopilot.com",
                    "https://127.0.0.1", "https://localhost", "https://a.localhost"):
            with self.subTest(url=url):
                self.assertEqual(settings.accept_copilot_url(url), "")
        self.assertEqual(settings.accept_copilot_url("https://API.githubcopilot.com:443/"),
                         "https://API.githubcopilot.com:443")


class OriginSettingTest(unittest.TestCase):
    def test_case_a_final_slash_and_a_default_port_are_forgiven(self) -> None:
        for value, want in (
                ("https://app.example", "https://app.example"),
                ("https://app.example/", "https://app.example"),
                ("HTTPS://App.Example", "https://app.example"),
                ("https://app.example:443", "https://app.example"),
                ("http://app.example:80/", "http://app.example"),
                ("http://localhost:3000/", "http://localhost:3000"),
                ("http://[::1]:3000", "http://[::1]:3000"),
                ("http://[0:0::1]:3000", "http://[::1]:3000"),
                ("vscode-webview://*", "vscode-webview://*"),
                ("chrome-extension://AbcDef", "chrome-extension://abcdef"),
                ("app://obsidian.md", "app://obsidian.md"), ("file://", "file://"),
                ("tauri://localhost", "tauri://localhost")):
            with self.subTest(value=value):
                self.assertEqual(cp.Settings(cors_origin=(value,)).check().cors_origin, (want,))

    def test_what_no_browser_sends_is_refused_with_the_reason(self) -> None:
        for value, reason in (
                ("*", "every web page"), ("null", "sandboxed"), ("https://*", "patterns"),
                ("https://*.example", "patterns"), ("http://*:3000", "patterns"),
                ("https://app.example/chat", "https://app.example"),
                ("localhost:3000", "http://localhost:3000"), ("foo", "http://foo"),
                ("app.example", "https://app.example"), ("https://", "origin"),
                ("https://user@app.example", "origin"), ("https://a b", "origin"),
                ("https://app.example:port", "origin"), ("https://app.example:99999", "origin"),
                ("https://app.example?a", "origin"), ("https:app.example", "origin"),
                ("://app.example", "origin"), ("https://m\u00fcller.example", "origin"),
                ("vscode-webview://*.x", "origin")):
            with self.subTest(value=value), self.assertRaises(cp.ConfigError) as caught:
                cp.Settings(cors_origin=(value,)).check()
            self.assertIn("--cors-origin", str(caught.exception))
            self.assertIn(reason, str(caught.exception))


class OriginTest(SharedCase):
    settings = dict(cors_origin=("HTTPS://App.Example/", "vscode-webview://*", "file://"))

    def test_allowed_origins_and_schemes_may_call_and_are_named(self) -> None:
        for origin in ("https://app.example", "vscode-webview://1a2b-3c", "file://",
                       "vscode-webview://0pq/"):
            with self.subTest(origin=origin):
                reply = self.proxy.post("/v1/messages", message("a"), Origin=origin)
                self.assertEqual(reply.status, 200, reply.body)
                self.assertEqual(reply.headers["access-control-allow-origin"], origin)

    def test_other_origins_are_refused_and_the_flag_is_named_where_it_helps(self) -> None:
        for origin, helps in (
                ("https://app.example:444", True), ("http://app.example", True),
                ("vscode-file://vscode-app", True), ("https://evil.example", True),
                ("null", False), ("", False), ("https://app.example, https://evil.example", False),
                ("https://app.example@evil.example", False), ("vscode-webview:", False),
                ("https://app.example https://evil.example", False), ("*", False)):
            with self.subTest(origin=origin):
                reply = self.proxy.post("/v1/chat/completions", chat("a"), Origin=origin)
                self.assertEqual(reply.status, 403)
                self.assertNotIn("access-control-allow-origin", reply.headers)
                text = reply.json["error"]["message"]
                self.assertEqual("--cors-origin" in text, helps, text)
                if helps:
                    value = text.split("--cors-origin ")[1]
                    self.assertEqual(cp.Settings(cors_origin=(value,)).check().cors_origin,
                                     (origin,))

    def test_a_fetch_without_an_origin_is_told_no_flag(self) -> None:
        reply = self.proxy.get("/v1/models", **{"Sec-Fetch-Site": "cross-site"})
        self.assertEqual(reply.status, 403)
        self.assertNotIn(b"--cors-origin", reply.body)

    def test_our_own_headers_can_be_read_by_the_page(self) -> None:
        more = {"Origin": "https://app.example"}
        for reply in (self.proxy.post("/v1/messages", message("a", stop_nonsense=1), **more),
                      self.proxy.stream("/v1/chat/completions", chat("a"), **more),
                      self.proxy.post("/v1/chat/completions", {}, **more),
                      self.proxy.get("/nowhere", **more)):
            exposed = reply.headers["access-control-expose-headers"].split(", ")
            own = [name for name in reply.headers if name.startswith("x-")]
            self.assertEqual([name for name in own if name not in exposed], [])
            for name in ("x-request-id", "retry-after", "x-copilot-proxy-lossy",
                         "x-copilot-proxy-repaired", "x-copilot-proxy-credits"):
                self.assertIn(name, exposed)
        self.assertNotIn("access-control-expose-headers", self.proxy.get("/health").headers)


if __name__ == "__main__":
    unittest.main()
