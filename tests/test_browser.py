"""The page at / and /auth/device in a real browser, headless.

Skips itself where there is none, and without COPILOT_PROXY_BROWSER_TESTS=1: it takes a while.

PAGE_SHOTS=folder in the environment makes it leave a picture of each state there.
"""
from __future__ import annotations

import collections
import os
import sys
import unittest
from typing import Any
from urllib.parse import urlsplit

if sys.platform == "win32":
    raise unittest.SkipTest("the debugging pipe is used as on POSIX only")

from browser import Browser, Page, find_chromium
from fake_upstream import MODELS, Answer, FakeUpstream
from support import Proxy, ProxyCase

NARROW_PX = 360
MANY = 100000               # polls that answer "pending" until the test says otherwise

#: [ratio, wanted, text] of every piece of text on the page, by WCAG 2 (AA: 4.5, large text 3)
CONTRAST = r"""
(() => {
  const parse = text => { const n = text.match(/[\d.]+/g).map(Number);
                          return n.length < 4 ? [...n, 1] : n; };
  const over = (top, below) => [0, 1, 2].map(
    i => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const light = c => c.slice(0, 3).map(v => v / 255).map(
    v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4
  ).reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const probe = document.createElement('div');
  probe.style.backgroundColor = 'Canvas';
  document.body.append(probe);
  const canvas = parse(getComputedStyle(probe).backgroundColor);
  probe.remove();
  const found = [];
  for (const element of document.querySelectorAll('body *')) {
    const own = [...element.childNodes].filter(n => n.nodeType == 3 && n.data.trim());
    if (!own.length || !element.checkVisibility() || element.matches('script, style')) continue;
    const layers = [];
    for (let e = element; e; e = e.parentElement)
      layers.unshift(parse(getComputedStyle(e).backgroundColor));
    const back = layers.reduce((below, top) => over(top, below), canvas);
    const style = getComputedStyle(element), front = over(parse(style.color), back);
    const size = parseFloat(style.fontSize), bold = Number(style.fontWeight) >= 700;
    const [a, b] = [light(front), light(back)].sort((x, y) => y - x);
    found.push([(a + .05) / (b + .05), size >= 24 || bold && size >= 18.66 ? 3 : 4.5,
                own[0].data.trim()]);
  }
  return found;
})()
"""


class PageCase(ProxyCase):
    browser: Browser

    @classmethod
    def setUpClass(cls) -> None:
        if os.environ.get("COPILOT_PROXY_BROWSER_TESTS") != "1":
            raise unittest.SkipTest("set COPILOT_PROXY_BROWSER_TESTS=1 to drive a browser")
        if find_chromium() is None:
            raise unittest.SkipTest("no chromium is installed")
        cls.browser = Browser()
        cls.browser.__enter__()
        super().setUpClass()

    @classmethod
    def tearDownClass(cls) -> None:
        cls.browser.__exit__()
        super().tearDownClass()

    def open(self, path: str = "/", proxy: Proxy | None = None, **more: Any) -> Page:
        page = self.browser.open((proxy or self.proxy).url + path, **more)
        self.addCleanup(page.close)
        return page

    def shoot(self, page: Page, name: str) -> None:
        folder = os.environ.get("PAGE_SHOTS")
        if folder:
            page.screenshot(os.path.join(folder, name + ".png"))

    def wait_for_text(self, page: Page, text: str) -> None:
        page.wait_for("document.body.innerText.includes(%r)" % text)

    def wait_until_shown(self, page: Page) -> None:
        """Models and quota are on the page."""
        self.wait_for_text(page, "gpt-5.3-codex")
        self.wait_for_text(page, "premium_interactions")

    def logged_out(self) -> tuple[FakeUpstream, Proxy]:
        """A proxy that nobody is logged in at; each poll is "pending" until `outcomes.clear()`."""
        fake = self.enter(FakeUpstream())
        fake.device.outcomes = collections.deque(["pending"] * MANY)
        return fake, self.enter(Proxy(fake, login=False))

    def check_quiet(self, page: Page, proxy: Proxy | None = None) -> None:
        """No complaint of the browser, no request to another host."""
        self.assertEqual(page.complaints(), [])
        here = urlsplit((proxy or self.proxy).url).netloc
        self.assertTrue(page.urls())
        self.assertEqual([url for url in page.urls() if urlsplit(url).netloc != here], [])

    def check_fits(self, page: Page) -> None:
        """The page can be read at this width without scrolling sideways."""
        widths = page.run("[innerWidth, document.scrollingElement.scrollWidth, "
                          "document.body.scrollWidth]")
        self.assertEqual(widths[0], NARROW_PX)
        self.assertLessEqual(max(widths), NARROW_PX)

    def check_contrast(self, page: Page) -> None:
        found = page.run(CONTRAST)
        self.assertGreater(len(found), 5)
        self.assertEqual([entry for entry in found if entry[0] < entry[1]], [])


class LoggedIn(PageCase):
    def test_models_and_quota(self) -> None:
        for path in ("/", "/dashboard"):
            with self.subTest(path=path):
                page = self.open(path)
                self.wait_until_shown(page)
                self.wait_for_text(page, "ready")
                text = page.text()
                for part in ("claude-sonnet-4.6", "/v1/messages", "text-embedding-3-small",
                             self.proxy.url + "/v1", "unlimited"):
                    self.assertIn(part, text)
                self.assertNotIn("gpt-3.5-turbo", text)
                self.assertNotIn("Login", text)
                self.check_quiet(page)
                self.shoot(page, "ready")

    def test_title_language_and_landmarks(self) -> None:
        page = self.open()
        self.wait_until_shown(page)
        self.assertEqual(page.run("document.documentElement.lang"), "en")
        self.assertTrue(page.run("document.title"))
        self.assertEqual(page.run("document.querySelectorAll('main h1').length"), 1)
        self.assertEqual(page.run("document.querySelector('[role=status]').innerText"), "ready")

    def test_narrow(self) -> None:
        page = self.open(width=NARROW_PX, height=740)
        self.wait_until_shown(page)
        self.check_fits(page)
        self.check_quiet(page)
        self.shoot(page, "narrow")

    def test_contrast(self) -> None:
        for dark in (False, True):
            with self.subTest(dark=dark):
                page = self.open(dark=dark)
                self.wait_until_shown(page)
                self.assertEqual(page.run("matchMedia('(prefers-color-scheme: dark)').matches"),
                                 dark)
                self.check_contrast(page)
                self.shoot(page, "dark" if dark else "light")

    def test_contrast_of_a_problem(self) -> None:
        refusal = Answer(status=403, body={"error": {"message": "no models for you"}})
        for dark in (False, True):
            with self.subTest(dark=dark):
                fake = self.enter(FakeUpstream())
                fake.script(MODELS, *[refusal] * 50)
                page = self.open(dark=dark, proxy=self.enter(Proxy(fake)))
                page.wait_for("document.getElementById('problem').innerText")
                self.check_contrast(page)
                self.shoot(page, "problem dark" if dark else "problem light")

    def test_server_gone(self) -> None:
        page = self.open()
        self.wait_until_shown(page)
        self.check_quiet(page)
        self.proxy.server.finish(0.2)
        self.wait_for_text(page, "the server is gone")
        self.check_contrast(page)
        self.shoot(page, "gone")
        self.assertEqual([c for c in page.complaints() if "Failed to load" not in c], [])

    def test_text_of_the_upstream_is_no_markup(self) -> None:
        evil = "<img src=x onerror=alert(1)>"
        self.fake.models[0] = dict(self.fake.models[0], id=evil)
        page = self.open()
        self.wait_for_text(page, evil)
        self.assertEqual(page.run("document.images.length"), 0)
        self.check_quiet(page)


class LoggedOut(PageCase):
    def test_button_code_and_ready(self) -> None:
        fake, proxy = self.logged_out()
        page = self.open("/", proxy)
        self.wait_for_text(page, "Nobody is logged in")
        self.wait_for_text(page, "login required")
        self.shoot(page, "logged out")
        page.run("document.querySelector('button').click()")
        code = page.wait_for("(document.querySelector('.code') || {}).innerText")
        self.assertEqual(proxy.get("/health").json["login"]["user_code"], code)
        self.assertTrue(page.run("document.querySelector('#login a').href").startswith(fake.url))
        self.shoot(page, "code")
        self.check_quiet(page, proxy)
        fake.device.outcomes.clear()
        self.wait_until_shown(page)
        self.wait_for_text(page, "ready")
        self.assertNotIn(code, page.text())
        self.check_quiet(page, proxy)

    def test_login_that_runs_already(self) -> None:
        _, proxy = self.logged_out()
        proxy.app.begin_login()
        for path in ("/", "/dashboard"):
            page = self.open(path, proxy, width=NARROW_PX, height=740)
            page.wait_for("(document.querySelector('.code') || {}).innerText")
            self.check_fits(page)
            self.check_quiet(page, proxy)
            self.shoot(page, "narrow code")

    def test_contrast(self) -> None:
        _, proxy = self.logged_out()
        for dark in (False, True):
            with self.subTest(dark=dark):
                page = self.open("/", proxy, dark=dark)
                self.wait_for_text(page, "login required")
                self.check_contrast(page)
        proxy.app.begin_login()
        for dark in (False, True):
            with self.subTest(dark=dark, code=True):
                page = self.open("/", proxy, dark=dark)
                page.wait_for("(document.querySelector('.code') || {}).innerText")
                self.check_contrast(page)
                self.shoot(page, "code dark" if dark else "code light")

    def test_denied_login_offers_another(self) -> None:
        fake, proxy = self.logged_out()
        fake.device.outcomes = collections.deque(["denied"] + ["pending"] * MANY)
        page = self.open("/", proxy)
        self.wait_for_text(page, "Nobody is logged in")
        page.run("document.querySelector('button').click()")
        page.wait_for("document.querySelector('#login button') && "
                      "!document.body.innerText.includes('Nobody is logged in')")
        page.run("document.querySelector('button').click()")
        page.wait_for("(document.querySelector('.code') || {}).innerText")
        self.check_quiet(page, proxy)


class LoginPage(PageCase):
    """/auth/device: one more account, its key shown once."""

    settings = {"api_key": ("made-up-operator-key",)}

    def test_key_code_and_the_accounts_key(self) -> None:
        self.fake.device.token, self.fake.device.interval = "ghu_browser", 0.02
        self.fake.logins["ghu_browser"] = "hubot"
        self.fake.device.outcomes = collections.deque(["pending"] * MANY)
        for dark in (False, True):
            page = self.open("/auth/device", width=NARROW_PX, height=740, dark=dark)
            page.run("document.querySelector('#begin').click()")
            page.wait_for("!document.querySelector('#door').hidden")
            self.check_fits(page)
            self.shoot(page, "login key dark" if dark else "login key")
        page.run("document.querySelector('#key').value = 'made-up-operator-key';"
                 "document.querySelector('#door button').click()")
        code = page.wait_for("document.querySelector('#code').innerText")
        self.assertEqual(code, "FAKE-0001")
        self.assertTrue(page.run("document.querySelector('#link').href").startswith(self.fake.url))
        self.check_fits(page)
        self.shoot(page, "login code")
        self.assertEqual(page.run("localStorage.length"), 0)
        self.assertEqual(page.run("document.cookie"), "")
        self.fake.device.outcomes.clear()
        self.wait_for_text(page, "Logged in as hubot")
        self.check_fits(page)
        self.shoot(page, "login done")
        key = page.run("document.querySelector('#said').innerText").split()[-1]
        self.assertEqual(self.proxy.get("/usage", Authorization="Bearer " + key).json["login"],
                         "hubot")
        here = urlsplit(self.proxy.url).netloc
        self.assertEqual([url for url in page.urls() if urlsplit(url).netloc != here
                          or key in url], [])

    def test_a_denied_login_can_be_begun_again(self) -> None:
        fake, proxy = self.logged_out()
        fake.device.interval = 0.02
        fake.device.outcomes = collections.deque(["denied"] + ["pending"] * MANY)
        page = self.open("/auth/device", proxy)
        page.run("document.querySelector('#begin').click()")
        self.wait_for_text(page, "cancelled")
        page.run("document.querySelector('#begin').click()")
        page.wait_for("document.querySelector('#code').checkVisibility()")
        fake.device.outcomes.clear()
        self.wait_for_text(page, "Logged in as octocat")
        self.assertEqual(page.complaints(), [])


if __name__ == "__main__":
    sys.exit(unittest.main())
