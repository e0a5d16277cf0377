"""What can be checked at the start is checked at the start, and no value ends in a traceback."""
from __future__ import annotations

import json
import os
import signal
import unittest
import unittest.mock

from support import Proxy, ProxyCase, ask, chat, cp, run_main, wait_until
from cases import CliCase, offer_claude_code

NOT_URLS = (
    "foo", "http://", "http://x:99999", "http://x:port", "http://[::1", "file:///etc/passwd",
    "http://a b", "ftp://localhost", "99999", "user@localhost:1", "http://user@localhost",
    "http://localhost?a", "http://localhost#a", "http://localhost\\x", "", " ",
    "javascript:alert(1)", "http://\u00fc", "http://" + "a" * 64 + ".example")


class UrlTest(CliCase):
    def test_what_is_no_url_is_one_line_and_no_traceback(self) -> None:
        for value in NOT_URLS:
            for args in (("debug", "--health", value), ("setup", "claude-code", "--url", value)):
                if args[0] == "setup" and not value:
                    continue                           # as if it were not given
                with self.subTest(args=args):
                    code, output = run_main(self.home, *args)
                    self.assertEqual((code, output.count("\n")), (2, 1), output)
                    self.assertIn(args[-2], output)

    def test_a_port_or_a_host_is_enough_of_a_url(self) -> None:
        with Proxy(self.fake) as proxy:
            port = proxy.port
            for value in ("%d" % port, "127.0.0.1:%d" % port, "localhost:%d" % port,
                          "http://127.0.0.1:%d/" % port, "http://127.0.0.1:%d/health" % port,
                          "HTTP://127.0.0.1:%d" % port):
                with self.subTest(value=value):
                    code, output = run_main(self.home, "debug", "--health", value)
                    self.assertEqual(code, 0, output)
                    code, output = run_main(self.home, "setup", "curl", "--url", value.replace(
                        "/health", "/v1"))
                    self.assertEqual(code, 0, output)
        self.assertEqual(cp.check_own_url("4399", "--health"), "http://127.0.0.1:4399")


class ValueTest(CliCase):
    def refused(self, *args: str) -> str:
        served = unittest.mock.patch.object(cp, "open_server", side_effect=AssertionError("served"))
        with served:
            code, output = run_main(self.home, "start", "--github-url", self.fake.url, *args)
        self.assertEqual((code, output.count("error: ")), (2, 1), output)
        self.assertIn(args[0], output)
        self.assertNotIn("Traceback", output)
        return output

    def test_origins_hosts_and_folders_are_looked_at_before_the_port_opens(self) -> None:
        plain = os.path.join(self.home, "plain")
        with open(plain, "w", encoding="ascii"):
            pass
        for args in (("--cors-origin", "foo"), ("--cors-origin", "*"), ("--allow-host", "*"),
                     ("--allow-host", "http://box"), ("--host", "[::1"), ("--host", "http://a"),
                     ("--host", "localhost:80"), ("--host", "a" * 64), ("--host", "a b"),
                     ("--host", "a b", "--api-key", "auto"),
                     ("--log-bodies", plain), ("--log-bodies", os.path.join(plain, "below"))):
            with self.subTest(args=args):
                self.refused(*args)

    def test_a_bind_address_may_have_brackets_or_a_zone(self) -> None:
        for value in ("[::1]", "::1", "fe80::1%lo", "localhost", "127.0.0.2"):
            self.assertTrue(cp.check_host_name("--host", value.partition("%")[0]))
        with self.start("--host", "[::1]") as server:
            if "cannot serve" not in server.wait_for(":"):        # a machine without IPv6
                self.assertEqual(ask(server.wait_for_url(), "GET", "/health").status, 200)

    def test_setup_names_a_host_that_cannot_be_one(self) -> None:
        for value in ("http://a", "[::1", "a" * 64):
            code, output = run_main(self.home, "setup", "curl", "--host", value)
            self.assertEqual((code, output.count("\n")), (2, 1), output)
            self.assertIn("--host", output)


class ModelNameTest(ProxyCase):
    def test_a_fallback_that_does_not_exist_is_in_the_log_before_the_first_request(self) -> None:
        for flags in ({"fallback": "nope-9000"}, {"model_alias": ("a=nope-9000",)}):
            with Proxy(self.fake, **flags) as proxy:
                cp.look_up_models(proxy.app)
                wait_until(lambda: "nope-9000" in proxy.log_text(), proxy.log_text())
        with Proxy(self.fake, fallback="gpt-5-mini") as proxy:
            cp.look_up_models(proxy.app)
            self.assertNotIn("gpt-5-mini", proxy.log_text())


class StartLogTest(CliCase):
    def test_a_server_warns_of_its_fallback_by_itself(self) -> None:
        with self.start("--fallback", "nope-9000") as server:
            server.wait_for_url()
            server.wait_for("nope-9000")

    def test_with_log_json_every_line_is_json(self) -> None:
        with self.start("--log-json", "-v", "--api-key", "auto", "--host", "127.0.0.1") as server:
            url = server.wait_for_url()
            ask(url, "GET", "/health")
            self.assertEqual(server.stop(signal.SIGTERM), 0)
            lines = [json.loads(line) for line in server.output().splitlines()]
        banner = next(line for line in lines if "Anthropic clients" in line["message"])
        self.assertEqual((banner["url"], banner["level"], banner["demo"]), (url, "info", False))
        self.assertIn("sk-copilot-", banner["notice"])

    def test_a_verbose_log_is_in_words(self) -> None:
        with Proxy(self.fake) as proxy:
            proxy.post("/v1/chat/completions", chat("a", "claude-haiku-4.5", logit_bias={"1": 2}))
            line = wait_until(lambda: next((record.getMessage() for record in list(proxy.logs)
                                            if " lossy: " in record.getMessage()), None))
        self.assertNotRegex(line, r"\[\(|\('|\{'|set\(")
        self.assertIn("logit_bias (", line)


class PickerTest(ProxyCase):
    def test_a_wrong_number_or_name_is_asked_again(self) -> None:
        for wrong in ("999", "0", "no-such-model", "-1", "\u00b2", "9" * 40):
            with self.subTest(wrong=wrong):
                output = offer_claude_code(self.proxy, wrong + "\ngpt-5-mini\n\n")
                self.assertIn("there is no ", output)
                self.assertIn("ANTHROPIC_MODEL=gpt-5-mini ", output)


class BundleFileTest(CliCase):
    def bundle(self, path: str) -> tuple[int, str]:
        return run_main(self.home, "debug", "--bundle", path, "--github-url", self.fake.url)

    def test_a_bundle_replaces_no_file_and_makes_no_folder(self) -> None:
        path = os.path.join(self.home, "report.json")
        with open(path, "w", encoding="ascii") as file:
            file.write("mine")
        below = os.path.join(self.home, "new", "report.json")
        for wrong in (path, below, self.home):
            with self.subTest(wrong=wrong):
                code, output = self.bundle(wrong)
                self.assertEqual((code, output.count("\n")), (1, 1), output)
        with open(path, encoding="ascii") as file:
            self.assertEqual(file.read(), "mine")
        self.assertFalse(os.path.exists(os.path.dirname(below)))
        self.assertEqual(self.bundle(os.path.join(self.home, "other.json"))[0], 0)


if __name__ == "__main__":
    unittest.main()
