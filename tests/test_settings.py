"""Options: flag over environment over default, what is refused, which hosts follow (section 11)."""
from __future__ import annotations

import os
import tempfile
import unittest
from typing import Any

from support import cp


class SettingsRules(unittest.TestCase):

    def test_flag_over_environment_over_default(self) -> None:
        merge = cp.Settings.merge
        self.assertEqual(merge({}, {}).port, cp.DEFAULT_PORT)
        self.assertEqual(merge({}, {"PORT": "1"}).port, 1)
        self.assertEqual(merge({}, {"PORT": "1", "COPILOT_PROXY_PORT": "2"}).port, 2)
        self.assertEqual(merge({"port": 3}, {"PORT": "1", "COPILOT_PROXY_PORT": "2"}).port, 3)
        self.assertEqual(merge({"port": 0}, {"PORT": "1"}).port, 0)
        self.assertEqual(merge({"port": None}, {"PORT": ""}).port, cp.DEFAULT_PORT)
        self.assertEqual(merge({}, {"GH_TOKEN": "a", "GITHUB_TOKEN": "b"}).github_token, "a")
        self.assertEqual(merge({}, {"GITHUB_TOKEN": "b"}).github_token, "b")
        self.assertIs(merge({"verbose": False}, {"COPILOT_PROXY_VERBOSE": "1"}).verbose, False)
        self.assertEqual(merge({}, {"COPILOT_PROXY_RATE_LIMIT": "2.5"}).rate_limit, 2.5)
        self.assertEqual(merge({}, {"COPILOT_PROXY_MODEL_ALIAS": "a=b, c=d"}).aliases,
                         {"a": "b", "c": "d"})

    def test_switches_in_words(self) -> None:
        for word, want in (("1", True), ("true", True), ("YES", True), ("on", True), ("0", False),
                           ("false", False), ("No", False), ("off", False)):
            got = cp.Settings.merge({}, {"COPILOT_PROXY_WAIT": word})
            self.assertIs(got.wait, want, word)

    def refused(self, word: str, flags: Any, environ: Any = None) -> str:
        with self.assertRaises(cp.ConfigError) as caught:
            cp.Settings.merge(flags, environ or {})
        self.assertIn(word, str(caught.exception))
        return str(caught.exception)

    def test_bad_values_name_their_source(self) -> None:
        for name, value in (("PORT", "abc"), ("COPILOT_PROXY_PORT", "1.5"),
                            ("COPILOT_PROXY_RATE_LIMIT", "soon"), ("COPILOT_PROXY_GRACE", "x"),
                            ("COPILOT_PROXY_VERBOSE", "maybe"), ("COPILOT_PROXY_DEMO", "2"),
                            ("PORT", "70000"), ("COPILOT_PROXY_PORT", "-1"),
                            ("COPILOT_PROXY_ACCOUNT_TYPE", "gold"),
                            ("COPILOT_PROXY_API_KEY", "short"), ("COPILOT_PROXY_BUDGET", "-1")):
            with self.subTest(name=name):
                self.refused(name, {}, {name: value})
        for flags, word in (({"port": -1}, "--port"), ({"port": 65536}, "--port"),
                            ({"rate_limit": -1.0}, "--rate-limit"),
                            ({"rate_limit": float("nan")}, "--rate-limit"),
                            ({"grace": float("inf")}, "--grace"),
                            ({"account_type": "gold"}, "--account-type"),
                            ({"model_alias": ["a"]}, "--model-alias"),
                            ({"model_alias": ["=b"]}, "--model-alias"),
                            ({"header": ["X"]}, "--header"), ({"header": ["X="]}, "--header")):
            with self.subTest(flags=flags):
                self.refused(word, flags)

    def test_hosts_beyond_loopback_are_refused_without_a_key(self) -> None:
        for host in ("127.0.0.1", "localhost", "::1", "[::1]", "127.1.2.3", "LOCALHOST"):
            self.assertEqual(cp.Settings.merge({"host": host}, {}).host, host)
        folder = tempfile.mkdtemp()
        self.addCleanup(os.rmdir, folder)
        for host in ("0.0.0.0", "::", "", "192.168.1.5", "127.evil.example", "example.com",
                     "localhost.example.com", "127.0.0.1.example.com", "127.0.0.1\n", "128.0.0.1"):
            with self.subTest(host=host):
                app = cp.App(cp.Settings(host=host, data_dir=folder).check(), {})
                with self.assertRaises(cp.ConfigError) as caught:
                    cp.ensure_api_key(app)
                self.assertIn("--host", str(caught.exception))
                self.assertIn("--api-key", str(caught.exception))

    def test_urls_are_https_or_loopback(self) -> None:
        for flag, field in (("--github-url", "github_url"), ("--copilot-url", "copilot_url")):
            for url in ("http://github.com", "http://127.evil.example", "ftp://github.com",
                        "github.com", "https://", "https://user:pw@github.com", "https://a/?b=c",
                        "https://[::1", "file:///etc", "//github.com", "http://localhost.evil.io",
                        "javascript:alert(1)"):
                with self.subTest(flag=flag, url=url):
                    text = self.refused(flag, {field: url})
                    self.assertNotIn("pw@", text)
            for url, want in (("https://x.ghe.com/", "https://x.ghe.com"),
                              ("http://127.0.0.1:99", "http://127.0.0.1:99"),
                              ("http://localhost:1/a/", "http://localhost:1/a")):
                self.assertEqual(getattr(cp.Settings.merge({field: url}, {}), field), want)

    def test_guarded_headers_cannot_be_set(self) -> None:
        good = cp.Settings.merge({"header": ["Editor-Version=vscode/9", "X-A = b=c "]}, {})
        self.assertEqual(good.headers, {"Editor-Version": "vscode/9", "X-A": "b=c"})
        for header in ("Authorization=Bearer x", "AUTHORIZATION=x", "Host=x", "Cookie=x",
                       "Content-Length=5", "Transfer-Encoding=chunked", "Connection=close",
                       "X A=b", "X:A=b", "X\nY=b", "X=a\r\nHost: b", "X=caf\u00e9", "X=\x7f",
                       "\u20ac=b", "Accept-Encoding=br", "Content-Type=x"):
            with self.subTest(header=header):
                self.refused("--header", {"header": [header]})

    def test_rest_and_copilot_hosts_follow_the_login_host(self) -> None:
        for url, kind, rest, copilot in (
                ("https://github.com", "individual", "https://api.github.com",
                 "https://api.githubcopilot.com"),
                ("https://GitHub.com/", "business", "https://api.github.com",
                 "https://api.business.githubcopilot.com"),
                ("https://github.com", "enterprise", "https://api.github.com",
                 "https://api.enterprise.githubcopilot.com"),
                ("https://octo.ghe.com", "individual", "https://api.octo.ghe.com",
                 "https://copilot-api.octo.ghe.com"),
                ("https://git.example.com", "individual", "https://git.example.com/api/v3",
                 "https://api.githubcopilot.com"),
                ("http://127.0.0.1:8080", "individual", "http://127.0.0.1:8080",
                 "http://127.0.0.1:8080")):
            settings = cp.Settings.merge({"github_url": url, "account_type": kind}, {})
            self.assertEqual((settings.rest_url, settings.usual_copilot_url), (rest, copilot), url)

    def test_bearers_go_to_known_hosts_only(self) -> None:
        github = cp.Settings.merge({}, {})
        tenant = cp.Settings.merge({"github_url": "https://octo.ghe.com"}, {})
        own = cp.Settings.merge({"github_url": "https://git.example.com"}, {})
        local = cp.Settings.merge({"github_url": "http://127.0.0.1:1"}, {})
        good = "https://api.individual.githubcopilot.com"
        for settings, url, want in (
                (github, good + "/", good), (tenant, "https://copilot-api.octo.ghe.com",
                                             "https://copilot-api.octo.ghe.com"),
                (own, "https://copilot.git.example.com", "https://copilot.git.example.com"),
                (local, "http://127.0.0.1:2", "http://127.0.0.1:2"),
                (github, "http://api.githubcopilot.com", ""), (github, "http://127.0.0.1:2", ""),
                (github, "https://notgithubcopilot.com", ""), (github, "https://a.github.com", ""),
                (github, "https://api.githubcopilot.com.evil.io", ""),
                (github, "https://api.githubcopilot.com@evil.io", ""),
                (github, "https://evil.io/.githubcopilot.com", ""),
                (github, "https://evil.io?.githubcopilot.com", ""),
                (github, "https://evil.io#.ghe.com", ""), (github, "https://[::1", ""),
                (github, None, ""), (github, 5, ""), (github, "", ""), (github, ["x"], "")):
            with self.subTest(url=url):
                self.assertEqual(settings.accept_copilot_url(url), want)


class SettingsTest(unittest.TestCase):
    """Flag over environment over default."""

    def test_flag_beats_variable_beats_default(self) -> None:
        merge = cp.Settings.merge
        self.assertEqual(merge({}, {}).port, cp.DEFAULT_PORT)
        self.assertEqual(merge({}, {"PORT": "1"}).port, 1)
        self.assertEqual(merge({}, {"PORT": "1", "COPILOT_PROXY_PORT": "2"}).port, 2)
        self.assertEqual(merge({"port": 0}, {"PORT": "1", "COPILOT_PROXY_PORT": "2"}).port, 0)
        self.assertEqual(merge({}, {"HOST": "localhost"}).host, "localhost")
        self.assertEqual(merge({}, {"PORT": "", "HOST": ""}).port, cp.DEFAULT_PORT)

    def test_every_setting_has_a_variable(self) -> None:
        samples = {"int": "7", "float": "7", "switch": "yes", "either": "no", "list": "A=b,C=d"}
        special = {"host": "127.0.0.2", "account_type": "business",
                   "github_url": "https://octo.ghe.com", "copilot_url": "https://relay.example",
                   "api_key": "made-up-key", "trusted_proxy": "10.0.0.0/8",
                   "allow_host": "proxy.lan", "cors_origin": "https://app.example", "lang": "zh"}
        for option in cp.OPTIONS:
            text = special.get(option.field, samples.get(option.kind, "some"))
            with self.subTest(option=option.name):
                for variable in option.variables:
                    environ = {"COPILOT_PROXY_TLS_CERT": "a.pem", variable: text}
                    value = getattr(cp.Settings.merge({}, environ), option.field)
                    self.assertNotEqual(value, option.default)

    def test_github_tokens_come_from_three_variables_in_order(self) -> None:
        environ = {"GITHUB_TOKEN": "ghu_c", "GH_TOKEN": "ghu_b",
                   "COPILOT_PROXY_GITHUB_TOKEN": "ghu_a"}
        for name in ("COPILOT_PROXY_GITHUB_TOKEN", "GH_TOKEN", "GITHUB_TOKEN"):
            self.assertEqual(cp.Settings.merge({}, environ).github_token, environ.pop(name))

    def test_settings_and_options_name_the_same_fields_and_defaults(self) -> None:
        for option in cp.OPTIONS:
            self.assertEqual(getattr(cp.Settings(), option.field), option.default, option.name)


if __name__ == "__main__":
    unittest.main()
