"""The dashboard and the login page in a real browser, headless.

Skips itself where there is none, and without COPILOT_PROXY_BROWSER_TESTS=1: it takes a while.

PAGE_SHOTS=folder in the environment makes it leave a picture of each state there, PAGE_PICTURE=1
makes it write .github/page.png, which the README shows.
"""
from __future__ import annotations

import collections
import os
import sys
import threading
import time
import unittest
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

if sys.platform == "win32":
    raise unittest.SkipTest("the debugging pipe is used as on POSIX only")

from browser import Browser, Page, find_chromium
from fake_upstream import CHAT, MODELS, USAGE, Answer, FakeUpstream
from support import REQUESTS, Proxy, ProxyCase, Reply, chat, cp, message, response, wait_until
from cases import ManualCase

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


#: [tag, text] of what can be operated or is a landmark and has no name for a screen reader
NAMELESS = """
[...document.querySelectorAll('button, input, select, a, section, nav, [role=region]')].filter(e =>
  e.checkVisibility() && !(e.getAttribute('aria-label') || (e.labels || []).length
    || !e.matches('section, nav, div') && e.innerText.trim())).map(e => [e.tagName, e.innerText])
"""
#: the width in percent of each part of the first bar of the list entry that begins with a name
BAR = """
(name => [...[...document.querySelectorAll('li')].find(e => e.innerText.startsWith(name))
  .querySelectorAll('rect')].map(e => parseFloat(e.getAttribute('width'))))(%r)
"""
#: the cells of the first row of the requests that holds a text
ROW = """
[...([...document.querySelectorAll('#requests tbody tr')].find(e => e.innerText.includes(%r))
  || { cells: [] }).cells].map(e => e.innerText.replace(/\\s+/g, ' '))
"""
#: what axe-core would say of roles, names and order: [rule, tag, text] of what breaks one
FAULTS = r"""
(() => {
  const faults = [], all = [...document.querySelectorAll('body *')].filter(
    e => e.checkVisibility() && !e.matches('script, style'));
  const say = (rule, e) => faults.push([rule, e.tagName, (e.innerText || e.id || '').slice(0, 60)]);
  let level = 0;
  for (const e of all) {
    const role = e.getAttribute('role'), parent = e.parentElement;
    const inside = e.closest('dialog');
    if (/^H[1-6]$/.test(e.tagName) && !inside) {
      if (+e.tagName[1] > level + 1) say('heading-order', e);
      level = +e.tagName[1]; }
    for (const name of ['aria-labelledby', 'aria-controls', 'aria-describedby'])
      if (e.hasAttribute(name) && !document.getElementById(e.getAttribute(name))) say(name, e);
    if (e.tabIndex > 0) say('tabindex', e);
    if (/^[UO]L$/.test(e.tagName) && [...e.children].some(c => c.tagName != 'LI')) say('list', e);
    if (e.tagName == 'LI' && !/^[UO]L$/.test(parent.tagName)) say('listitem', e);
    if (e.tagName == 'DL' && [...e.children].some(c => !/^(DT|DD|DIV)$/.test(c.tagName)))
      say('definition-list', e);
    if (/^D[TD]$/.test(e.tagName) && !e.closest('dl')) say('dlitem', e);
    if (role == 'cell' && !e.closest('[role=row], tr')) say('cell', e);
    if (role == 'row' && !e.closest('[role=table], table')) say('row', e);
    if (role == 'img' && !e.getAttribute('aria-label')) say('image-alt', e);
    if (e.tagName == 'DIALOG' && !e.getAttribute('aria-labelledby')) say('dialog-name', e);
    if (e.matches('button, select, input') && !e.matches('.link, [type=checkbox]')
        && e.getBoundingClientRect().height < 24) say('target-size', e);
    if (e.matches('button, a, input, select, textarea') && e.closest('[aria-hidden=true]'))
      say('hidden-focus', e);
    if (e.matches('button') && e.querySelector('button, a')) say('nested-interactive', e);
    if (e.matches('pre, [role=region]') && e.scrollHeight > e.clientHeight + 1 && e.tabIndex < 0)
      say('scrollable-region-focusable', e); }
  if (document.querySelectorAll('main').length != 1) faults.push(['landmark-one-main']);
  if (!document.documentElement.lang || !document.title) faults.push(['document']);
  return faults;
})()
"""
VIEWS = ("overview", "requests", "usage", "connect", "models", "account")
BACKGROUND = "getComputedStyle(document.body).backgroundColor"


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

    def setUp(self) -> None:
        super().setUp()
        self.pages: list[Page] = []

    def open(self, path: str = "/", proxy: Proxy | None = None, view: str = "",
             **more: Any) -> Page:
        page = self.browser.open((proxy or self.proxy).url + path + (view and "#" + view), **more)
        self.pages.append(page)
        return page

    def go(self, page: Page, view: str) -> None:
        """To another view, as a click on its link does."""
        page.run("document.querySelector('nav a[href=\"#%s\"]').click()" % view)
        page.wait_for("view === %r" % view)

    def close(self, page: Page) -> None:
        self.pages.remove(page)
        page.close()

    def tearDown(self) -> None:
        for page in list(self.pages):
            self.close(page)
        super().tearDown()

    def shoot(self, page: Page, name: str) -> None:
        folder = os.environ.get("PAGE_SHOTS")
        if folder:
            page.screenshot(os.path.join(folder, name + ".png"))

    def wait_for_text(self, page: Page, text: str) -> None:
        page.wait_for("document.body.innerText.includes(%r)" % text)

    def wait_until_shown(self, page: Page) -> None:
        """Models and quota are on the page, each in its view; it stays in the view it has."""
        before = page.run("view")
        page.wait_for("$('quota').textContent.includes('unlimited')")
        self.go(page, "models")
        self.wait_for_text(page, "gpt-5.3-codex")
        self.go(page, before)

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
        self.assertEqual(page.run(FAULTS), [])


class LoggedIn(PageCase):
    def test_models_and_quota(self) -> None:
        for path in ("/", "/dashboard"):
            with self.subTest(path=path):
                page = self.open(path)
                self.wait_until_shown(page)
                self.wait_for_text(page, "ready")
                text = page.text()
                for view in ("models", "account"):
                    self.go(page, view)
                    text += page.text()
                for part in ("claude-sonnet-4.6", "/v1/messages", "text-embedding-3-small",
                             self.proxy.url + "/v1", "unlimited"):
                    self.assertIn(part, text)
                self.assertNotIn("gpt-3.5-turbo", text)
                self.assertNotIn("Log in", text)
                self.check_quiet(page)
                self.shoot(page, "ready")

    def test_title_language_and_landmarks(self) -> None:
        page = self.open()
        self.wait_until_shown(page)
        self.assertEqual(page.run("document.documentElement.lang"), "en")
        self.assertTrue(page.run("document.title"))
        self.assertEqual(page.run("document.querySelectorAll('header h1').length"), 1)
        self.assertEqual(page.run("document.querySelector('[role=status]').innerText"), "ready")
        self.assertEqual(page.run(NAMELESS), [])
        self.assertEqual(page.run("[...document.querySelectorAll('table')].filter("
                                  "e => !e.caption.textContent.trim()).length"), 0)
        self.assertEqual(page.run("[...document.querySelectorAll('[id]')].map(e => e.id).filter("
                                  "(id, at, all) => all.indexOf(id) != at)"), [])

    def test_narrow(self) -> None:
        page = self.open(width=NARROW_PX, height=740)
        self.wait_until_shown(page)
        for view in VIEWS:
            self.go(page, view)
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
                for view in VIEWS:
                    self.go(page, view)
                    self.check_contrast(page)
                    self.assertEqual(page.run(NAMELESS), [], view)
                    self.shoot(page, view + (" dark" if dark else " light"))

    def test_contrast_of_a_problem(self) -> None:
        refusal = Answer(status=403, body={"error": {"message": "no models for you"}})
        for dark in (False, True):
            with self.subTest(dark=dark):
                fake = self.enter(FakeUpstream())
                fake.script(MODELS, *[refusal] * 50)
                page = self.open(view="models", dark=dark, proxy=self.enter(Proxy(fake)))
                page.wait_for("document.getElementById('problem').innerText")
                self.check_contrast(page)
                self.shoot(page, "problem dark" if dark else "problem light")

    def test_server_gone_and_there_again(self) -> None:
        page = self.open(view="models")
        self.wait_until_shown(page)
        self.check_quiet(page)
        port = self.proxy.port
        self.proxy.server.finish(0.2)
        self.wait_for_text(page, "the server is gone")
        self.wait_for_text(page, "No answer since")
        self.assertIn("gpt-5.3-codex", page.text())
        self.check_contrast(page)
        self.shoot(page, "gone")
        again = self.enter(Proxy(self.fake, port=port))
        self.wait_for_text(page, "ready")
        self.assertNotIn("No answer since", page.text())
        again.post("/v1/chat/completions", chat("back"), **{"User-Agent": "returned/1.0"})
        self.go(page, "overview")
        self.wait_for_text(page, "returned")              # events are read again, too
        self.assertEqual([c for c in page.complaints() if "Failed to load" not in c], [])

    def test_text_of_the_upstream_is_no_markup(self) -> None:
        evil = "<img src=x onerror=alert(1)>"
        self.fake.models[0] = dict(self.fake.models[0], id=evil)
        page = self.open(view="models")
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
        page.run("document.querySelector('#login button').click()")
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
        proxy.app.login.begin()
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
        proxy.app.login.begin()
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
        page.run("document.querySelector('#login button').click()")
        self.wait_for_text(page, "cancelled on GitHub")
        page.run("document.querySelector('#login button').click()")
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
            page.wait_for("!$('lock').hidden")
            self.check_fits(page)
            self.check_contrast(page)
            self.shoot(page, "login key dark" if dark else "login key")
        page.run("$('key').value = 'made-up-operator-key';"
                 "$('lock').querySelector('button').click()")
        page.wait_for("$('lock').hidden && ready && live")
        self.assertEqual(page.run("view"), "account")
        page.run("$('add').click()")
        code = page.wait_for("(document.querySelector('#once .code') || {}).innerText")
        self.assertEqual(code, "FAKE-0001")
        self.assertTrue(page.run("document.querySelector('#once a').href").startswith(
            self.fake.url))
        page.wait_for("/good for 1?\\d:\\d\\d more/.test($('once').innerText)")
        self.check_fits(page)
        self.check_contrast(page)
        self.shoot(page, "login code")
        self.assertEqual(page.run("Object.values(localStorage).join()"), "auto")
        self.assertEqual(page.run("document.cookie"), "")
        self.fake.device.outcomes.clear()
        self.wait_for_text(page, "Logged in as hubot")
        self.check_fits(page)
        self.shoot(page, "login done")
        key = page.run("document.querySelector('#once code').innerText")
        self.assertEqual(self.proxy.get("/usage", Authorization="Bearer " + key).json["login"],
                         "hubot")
        self.wait_for_text(page, "hubot\n127.0.0.1")       # in the list of keys, by its id
        here = urlsplit(self.proxy.url).netloc
        self.assertEqual([url for url in page.urls() if urlsplit(url).netloc != here
                          or key in url], [])
        self.assertEqual([c for c in page.complaints() if "401" not in c], [])

    def test_a_denied_login_can_be_begun_again(self) -> None:
        fake, proxy = self.logged_out()
        fake.device.interval = 0.02
        fake.device.outcomes = collections.deque(["denied"] + ["pending"] * MANY)
        page = self.open("/auth/device", proxy)
        start = page.wait_for("(document.querySelector('#login button') || {}).innerText")
        self.assertEqual(start, "Get a login code")
        page.run("document.querySelector('#login button').click()")
        self.wait_for_text(page, "cancelled")
        page.run("document.querySelector('#login button').click()")
        page.wait_for("(document.querySelector('#login .code') || {}).innerText")
        fake.device.outcomes.clear()
        page.wait_for("$('login').hidden")
        page.wait_for("$('accounts').innerText.includes('octocat')")
        self.assertEqual(page.complaints(), [])

    def test_keys_are_made_shown_once_and_removed(self) -> None:
        page = self.open(view="account")
        page.wait_for("!$('lock').hidden")
        page.run("$('key').value = 'made-up-operator-key';"
                 "$('lock').querySelector('button').click()")
        self.wait_for_text(page, "by --api-key")
        make = "[...document.querySelectorAll('button')].find(e => e.ariaLabel == '%s').click()"
        page.run(make % "Make a new key of the operator")
        self.wait_for_text(page, "Really?")
        self.assertEqual(len(self.proxy.app.accounts.keys.all()), 1)
        page.run(make % "Make a new key of the operator")
        key = page.wait_for("(document.querySelector('#once code') || {}).innerText")
        self.assertEqual(self.proxy.get("/models", Authorization="Bearer " + key).status, 200)
        page.wait_for("$('keys').rows.length == 3")
        self.shoot(page, "keys")
        self.assertEqual(page.run(NAMELESS), [])
        page.run("document.querySelector('#keys button').click()")
        page.run("document.querySelector('#keys button').click()")
        page.wait_for("$('keys').rows.length == 2")
        self.assertEqual(self.proxy.get("/models", Authorization="Bearer " + key).status, 401)

    def test_the_default_account_is_logged_out_after_a_second_click(self) -> None:
        fake = self.enter(FakeUpstream())
        fake.device.outcomes = collections.deque(["pending"] * MANY)
        proxy = self.enter(Proxy(fake))
        proxy.app.login.file.save("ghu_stored")
        proxy.settings.github_token = ""
        page = self.open(view="account", proxy=proxy)
        page.wait_for("ready && live")
        out = "[...document.querySelectorAll('button')].find(e => e.ariaLabel == '%s').click()"
        page.run(out % "Log out of the default account")
        self.assertTrue(page.run("ready"))
        page.run(out % "Log out of the default account")
        self.wait_for_text(page, "login required")
        self.assertEqual(proxy.app.login.file.load(), "")
        self.assertEqual([c for c in page.complaints() if "401" not in c], [])


def lane(total: float, left: float, **more: Any) -> dict[str, Any]:
    """A quota as GitHub tells it."""
    return dict(dict(entitlement=total, remaining=int(left), quota_remaining=left, unlimited=False,
                     percent_remaining=100 * left / total if total else 100), **more)


USAGE_ANSWER = {
    "login": "octocat", "copilot_plan": "individual",
    "quota_reset_date_utc": "2099-12-01T00:00:00.000Z", "quota_snapshots": {
        "chat": lane(0, 0, unlimited=True), "premium_interactions": lane(300, 72),
        "agent_minutes": lane(100, -25), "mystery": {"unlimited": False}}}


class Busy(PageCase):
    """A proxy with traffic: what the page shows is what the proxy tells."""
    settings = dict(no_history=False, budget=1000.0)

    def setUp(self) -> None:
        super().setUp()
        self.fake.script(USAGE, *[Answer(body=USAGE_ANSWER)] * 50)
        self.proxy.get("/v1/models")              # its quota header first, then that answer

    def play(self) -> None:
        """Requests of each kind, one that fails, one that costs nobody knows what."""
        for client, path, body in (
                ("curl/8.5", "/v1/chat/completions", chat("one " * 500)),
                ("claude-cli/2.1.0", "/v1/messages", message("two " * 900)),
                ("codex_cli_rs/0.91", "/v1/responses", response("three " * 700)),
                ("codex_cli_rs/0.91", "/v1/responses", response("four", "claude-sonnet-4.6")),
                ("aider/0.86", "/v1/chat/completions", chat("five", "no-such-model-at-all"))):
            for stream in (False, True):
                self.proxy.post(path, dict(body, stream=stream), **{"User-Agent": client})
        self.fake.quirks |= {"no_credits"}
        self.proxy.post("/v1/chat/completions", chat("six"), **{"User-Agent": "nobody/0"})
        self.fake.quirks -= {"no_credits"}

    def stream(self, text: str, **headers: str) -> threading.Thread:
        """A stream in the background; its text may hold markers."""
        thread = threading.Thread(target=lambda: self.proxy.stream(
            "/v1/messages", message(text), **headers))
        thread.start()
        self.addCleanup(thread.join, 10)
        return thread

    def open_busy(self, view: str = "requests", **more: Any) -> Page:
        page = self.open(**more)
        self.wait_until_shown(page)
        page.wait_for("document.querySelectorAll('#quota li').length > 4")
        self.go(page, "usage")
        page.wait_for("document.querySelectorAll('#days g').length == 30")
        self.go(page, "requests")
        page.wait_for("document.querySelectorAll('#requests tbody tr').length > 5")
        self.go(page, view)
        return page

    def test_quota_bars(self) -> None:
        page = self.open()
        self.wait_for_text(page, "76 % used")
        self.assertEqual(page.text().count("Premium interactions"), 1)
        self.assertEqual([round(width, 3) for width in page.run(BAR % "Premium interactions")],
                         [76.0, 0.0])
        self.assertEqual([round(width, 3) for width in page.run(BAR % "Agent minutes")],
                         [80.0, 20.0])                    # 125 %: the part above 100 stands out
        self.assertEqual(page.run(BAR % "Chat"), [])
        text = page.text()
        for part in ("76 % used", "228 of 300, 72 left", "125 % used", "125 of 100, 25 over",
                     "resets ", "2099", "Mystery\nunknown", "Chat\nunlimited", "Budget"):
            self.assertIn(part, text)
        self.check_quiet(page)

    def test_usage_is_what_the_proxy_tells(self) -> None:
        self.play()
        page = self.open_busy("usage")
        told = self.proxy.get("/history/summary?days=30").json
        for metric, figure in (
                ("tokens", lambda c: sum(c[f] or 0 for f in (
                    "input", "cache_read", "cache_write", "output"))),
                ("requests", lambda c: c["requests"]),
                ("credits", lambda c: (c["credits"] or 0) + (c["estimated_credits"] or 0))):
            page.run("$('metric').value = %r; $('metric').onchange()" % metric)
            for field in ("model", "client"):
                figures = {str(c[field] or "unknown"): figure(c) for c in told["by_" + field]}
                most = max(figures.values())
                shown = page.run("Object.fromEntries([...document.querySelectorAll('#by-%s li')]"
                                 ".map(e => [e.querySelector('b').innerText, [...e.querySelectorAll"
                                 "('rect')].reduce((sum, r) => sum + parseFloat(r.getAttribute("
                                 "'width')), 0)]))" % field)
                self.assertEqual(set(shown), set(figures))
                for name, width in shown.items():
                    self.assertAlmostEqual(width, 100 * figures[name] / most, 3, (metric, name))
            highest = page.run("Math.max(...[...document.querySelectorAll('#days g')].map(g => [..."
                               "g.querySelectorAll('rect:not(.clear)')].reduce((sum, r) => sum + "
                               "parseFloat(r.getAttribute('height')), 0)))")
            steps = page.run("document.querySelectorAll('#days line').length") - 1
            labels = page.run("[...document.querySelectorAll('#days text')].map(e => e.innerHTML)")
            step = page.run("axisStep(Math.max(...lastDays(summary.days).map(height)))")
            self.assertAlmostEqual(highest, 140 * figure(told["total"]) / (step * steps), 3)
            self.assertGreaterEqual(step * steps, figure(told["total"]))
            self.assertLess(step * (steps - 1), figure(told["total"]))
            self.assertEqual(labels[0], "0")
            self.assertRegex(page.run("document.querySelector('#days svg').getAttribute("
                                      "'aria-label')"), r"^%s by day: \d{4}-.* [\d.]+" % metric)
        self.go(page, "overview")
        text = page.text()
        self.assertIn("%d\n" % told["total"]["requests"], text[text.index("Requests today"):])
        self.assertEqual(page.run("document.querySelectorAll('#days g').length"), 30)
        self.check_quiet(page)

    def test_rows_say_what_happened(self) -> None:
        self.play()
        page = self.open_busy()
        row = page.run(ROW % "nobody")
        self.assertIn("gpt-4.1", row[0])
        self.assertEqual((row[1], row[2]), ("done", "passthrough chat"))
        self.assertRegex(row[3], r"[\d.]+ m?s .*in all")
        self.assertRegex(row[4], r"\d+ in, \d+ out")
        self.assertEqual(row[5], "unknown")               # not 0
        row = page.run(ROW % "aider")
        self.assertIn("no-such-model-at-all", row[0])
        self.assertRegex(row[1], r"^[A-Z][\w ]+ .*no-such-model-at-all")
        self.assertEqual((row[4], row[5]), ("unknown", "unknown"))
        self.assertTrue(page.run(
            "[...document.querySelectorAll('#requests tr')].some(e => "
            "e.innerText.includes('translated') && e.innerText.includes('streamed'))"))
        self.check_quiet(page)

    def test_a_running_stream_appears_and_ends(self) -> None:
        page = self.open(view="requests")
        self.wait_until_shown(page)
        thread = self.stream("@@stall=2@@ hello " * 3, **{"User-Agent": "slow/1.0"})
        self.wait_for_text(page, "streaming")
        row = page.run(ROW % "slow")
        self.assertEqual((row[1], row[5]), ("streaming Stop", "…"))
        page.wait_for("/ KB so far| bytes so far/.test((%s)[4])" % (ROW % "slow"))
        self.assertRegex(row[3], r"^\d+ m?s ")             # the first byte's time stands already
        self.go(page, "overview")
        self.assertRegex(page.text(), r"Running now\s+1\b")
        self.go(page, "requests")
        page.wait_for("parseFloat((%s)[3].split(' s so far')[0].split(' ').pop()) >= 1" % (
            ROW % "slow"))                            # its time goes on
        self.shoot(page, "running")
        self.fake.release()
        thread.join(10)
        page.wait_for("(%s)[1] == 'done'" % (ROW % "slow"))
        row = page.run(ROW % "slow")
        told = next(row for row in self.proxy.get("/stats").json["recent"]
                    if row["client"] == "slow/1.0")
        prompt = told["input"] + (told["cache_read"] or 0) + (told["cache_write"] or 0)
        self.assertTrue(row[4].startswith("%d in, %d out" % (prompt, told["output"])), row)
        self.assertIn("%.2g" % told["credits"], row[5])
        self.go(page, "overview")
        self.wait_for_text(page, "Running now\n0")
        self.check_quiet(page)

    def test_under_load_it_follows(self) -> None:
        page = self.open()
        self.wait_until_shown(page)

        def load(number: int) -> None:
            for at in range(25):
                path, make = REQUESTS[(number + at) % 3]
                self.proxy.post(path, make("hello", stream=bool(at % 2)),
                                **{"User-Agent": "load-%d/1" % number})
        threads = [threading.Thread(target=load, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        self.wait_for_text(page, "Requests today\n200\n0 failed")
        self.wait_for_text(page, "Running now\n0")
        self.go(page, "requests")
        self.assertEqual(page.run("document.querySelectorAll('#requests tbody tr').length"), 15)
        page.run("$('more').click()")
        page.wait_for("document.querySelectorAll('#requests tbody tr').length == 65")
        self.go(page, "overview")
        told = self.proxy.get("/history/summary?days=1").json["total"]
        prompt = told["input"] + told["cache_read"] + told["cache_write"]
        self.assertIn("%s in, %s out" % tuple(page.run("[count(%d), count(%d)]" % (
            prompt, told["output"]))), page.text())
        self.assertIn(page.run("cost({credits: %r})" % told["credits"]), page.text())
        self.check_quiet(page)

    def test_themes_and_widths(self) -> None:
        self.play()
        self.stream("@@stall=1@@ hello there, you", **{"User-Agent": "slow/1.0"})
        for dark in (False, True):
            for width in (NARROW_PX, 768, 1440):
                with self.subTest(dark=dark, width=width):
                    page = self.open_busy(dark=dark, width=width, height=900)
                    self.wait_for_text(page, "streaming")
                    for view in VIEWS:
                        self.go(page, view)
                        self.check_contrast(page)
                        self.assertEqual(page.run(NAMELESS), [], view)
                        self.assertLessEqual(
                            page.run("document.scrollingElement.scrollWidth"), width, view)
                        self.shoot(page, "busy %s %s %d" % (
                            view, "dark" if dark else "light", width))
                    self.check_quiet(page)
                    self.close(page)              # each holds one of six connections to a host
        for width in (600, 760, 900, 1000):
            page = self.open_busy(width=width)
            self.assertLessEqual(page.run("document.scrollingElement.scrollWidth"), width)
            self.close(page)
        self.fake.release()

    def test_theme_by_hand_is_kept(self) -> None:
        page = self.open()
        seen = [page.run(BACKGROUND)]
        for _ in range(3):
            page.run("$('theme').click()")
            seen += page.run("[$('theme').getAttribute('aria-label'), %s]" % BACKGROUND)
        light, dark = seen[0], seen[4]
        self.assertNotEqual(light, dark)
        self.assertEqual(seen[1:], ["Theme: light", light, "Theme: dark", dark,
                                    "Theme: auto", light])
        page.run("$('theme').click(); $('theme').click()")
        page = self.open()
        self.assertEqual(page.run(BACKGROUND), dark)
        page.run("$('theme').click()")

    def test_text_of_clients_is_no_markup(self) -> None:
        evil = "<img src=x onerror=alert(1)>"
        page = self.open(view="requests")
        self.wait_until_shown(page)
        self.proxy.post("/v1/chat/completions", chat("a", evil), **{"User-Agent": evil})
        self.wait_for_text(page, evil)
        self.assertEqual(page.run("document.images.length"), 0)
        self.check_quiet(page)

    def test_nothing_from_outside_is_markup_or_breaks_the_layout(self) -> None:
        evil = "<img/src=x/onerror=alert(1)>"
        long = evil + "w" * 170
        self.fake.logins["ghu_evil"] = evil
        self.fake.script(USAGE, *[Answer(body=dict(USAGE_ANSWER, quota_snapshots={
            long: lane(300, 72)}))] * 50)
        self.fake.models.append(dict(self.fake.models[0], id=long, name=long))
        proxy = self.enter(Proxy(self.fake, no_history=False, github_token="ghu_evil",
                                 model_alias=("%s=gpt-4.1" % evil.replace("=", ""),)))
        proxy.get("/usage")
        for model, answer in ((long, Answer(0)), ("gpt-4.1", Answer(400, {
                "x-github-request-id": evil}, {"error": {"message": long, "code": evil}}))):
            self.fake.script(CHAT, answer)
            proxy.post("/v1/chat/completions", chat("a", model, prompt_cache_key=evil),
                       **{"User-Agent": long})
        proxy.app.accounts.issue_key("made-up-key-of-evil", evil, "ghu_evil")
        key = {"Authorization": "Bearer made-up-key-of-evil"}
        self.assertEqual(proxy.get("/health", **key).status, 200)
        for width in (NARROW_PX, 768, 1440):
            with mock.patch.object(proxy.app.accounts, "identify", return_value=cp.Caller(
                    "127.0.0.1", True, True)):
                page = self.open(proxy=proxy, width=width, height=900, view="requests")
                page.wait_for("document.querySelectorAll('#requests tbody tr').length == 2")
                seen = ""
                for view in VIEWS:
                    self.go(page, view)
                    page.run("new Promise(done => setTimeout(done, 400))")
                    page.run("document.querySelectorAll('details').forEach(e => { e.open = 1; })")
                    self.assertLessEqual(
                        page.run("document.scrollingElement.scrollWidth"), width, view)
                    seen += page.text()
                self.go(page, "requests")
                for at in (0, 1):
                    page.run("document.querySelectorAll('#requests tbody .link')[%d].click()" % at)
                    seen += page.wait_for("$('drawer').innerText")
                    self.assertLessEqual(page.run("$('drawer').scrollWidth"), width)
                    page.run("$('drawer').close()")
                self.assertGreater(seen.count("<img"), 8)
                self.assertEqual(page.run("document.images.length"), 0)
                self.check_quiet(page, proxy)
                self.close(page)

    def test_who_wants_no_motion_sees_none(self) -> None:
        page = self.open(view="connect")
        page.wait_for("!!document.querySelector('#called .run')")
        name = "getComputedStyle(document.querySelector('#called .run'), '::before').animationName"
        self.assertEqual(page.run(name), "beat")
        page.send("Emulation.setEmulatedMedia", features=[
            {"name": "prefers-reduced-motion", "value": "reduce"}])
        self.assertEqual(page.run(name), "none")

    def test_without_history(self) -> None:
        proxy = self.enter(Proxy(self.fake, no_history=True))
        proxy.post("/v1/chat/completions", chat("a"), **{"User-Agent": "one/1"})
        page = self.open(proxy=proxy)
        self.wait_for_text(page, "Requests since start\n1\n")
        self.wait_for_text(page, "one · ")
        self.go(page, "usage")
        self.wait_for_text(page, "The history is off")
        page.wait_for("$('charts').hidden")
        self.go(page, "overview")
        proxy.post("/v1/chat/completions", chat("b"))
        self.wait_for_text(page, "Requests since start\n2\n")
        self.check_quiet(page, proxy)

    def test_without_live_updates_it_says_so(self) -> None:
        with mock.patch.object(cp, "MAX_READERS", 0):
            page = self.open()
            self.wait_for_text(page, "No live updates: ")
        page.wait_for("!document.body.innerText.includes('No live updates')")
        self.assertEqual([c for c in page.complaints() if "503" not in c], [])

    def test_budget_warns_and_says_when_it_is_spent(self) -> None:
        proxy = self.enter(Proxy(self.fake, no_history=False, budget=0.25))
        page = self.open(proxy=proxy)
        self.wait_for_text(page, "0 of 0.25 credits")
        text = "much " * 950
        self.assertEqual(proxy.post("/v1/chat/completions", chat(text)).status, 200)
        self.wait_for_text(page, "nearly spent; starts anew")
        proxy.post("/v1/chat/completions", chat(text))
        self.wait_for_text(page, "spent: requests are refused until")
        self.assertEqual(proxy.post("/v1/chat/completions", chat(text)).status, 429)
        page.wait_for("(%s)[0] != 's0'" % BAR.replace("parseFloat(e.getAttribute('width'))",
                                                       "e.getAttribute('class')") % "Budget")
        self.wait_for_text(page, "today's budget is spent")
        self.check_quiet(page, proxy)

    def test_a_running_request_is_stopped_from_its_row_and_tells_why(self) -> None:
        page = self.open(view="requests")
        self.wait_until_shown(page)
        thread = self.stream("@@stall=2@@ hello " * 3, **{"User-Agent": "slow/1.0"})
        self.wait_for_text(page, "streaming")
        page.run("document.querySelector('#requests tbody .link').click()")
        page.wait_for("$('drawer').open && /Received\\n.* so far/.test($('drawer').innerText)")
        self.shoot(page, "story running")
        page.run("$('drawer').close(); [...document.querySelectorAll('#requests button')].find("
                 "e => e.ariaLabel.startsWith('Stop the request to')).click()")
        thread.join(10)
        page.wait_for("(%s)[1].includes('Request stopped')" % (ROW % "slow"))
        self.assertIn("a person stopped this request", page.run(ROW % "slow")[1])
        self.fake.release()
        self.check_quiet(page)

    def test_the_focus_stays_where_it_is_while_rows_are_made_anew(self) -> None:
        page = self.open(view="requests")
        self.wait_until_shown(page)
        self.stream("@@stall=2@@ hello " * 3, **{"User-Agent": "slow/1.0"})
        self.wait_for_text(page, "streaming")
        page.run("[...document.querySelectorAll('#requests button')].find("
                 "e => e.ariaLabel.startsWith('Stop the request to')).focus()")
        page.wait_for("parseFloat((%s)[3].split(' s so far')[0].split(' ').pop()) >= 2" % (
            ROW % "slow"))
        self.assertTrue(page.run("document.activeElement.ariaLabel").startswith("Stop"))
        self.fake.release()


class Manual(PageCase, ManualCase):
    settings = ManualCase.settings

    def ask(self, text: str) -> tuple[threading.Thread, list[Reply]]:
        return self.begin(text, "asker/1.0")

    def test_allow_and_deny_by_mouse_and_keyboard(self) -> None:
        page = self.open()
        self.wait_until_shown(page)
        for at, (word, press, status) in enumerate((
                ("Allow", False, 200), ("Deny", False, 403), ("Allow", True, 200))):
            with self.subTest(word=word, keyboard=press):
                before = self.fake.count(CHAT)
                thread, replies = self.ask("may I <b>%d</b>?" % at)
                self.wait_for_text(page, "may I <b>%d</b>?" % at)
                self.assertIn("asker/1.0 wants to ask gpt-4.1", page.text())
                self.assertEqual(page.run("document.title"), "(1) copilot_proxy")
                self.assertEqual(self.fake.count(CHAT), before)
                self.check_contrast(page)
                self.shoot(page, "approval")
                selector = "[aria-label=\"%s asker/1.0 to ask gpt-4.1\"]" % word
                if press:
                    page.run("document.querySelector('%s').focus()" % selector)
                    for kind in ("keyDown", "keyUp"):
                        page.send("Input.dispatchKeyEvent", type=kind, key="Enter", text="\r",
                                  windowsVirtualKeyCode=13)
                else:
                    page.run("document.querySelector('%s').click()" % selector)
                thread.join(10)
                self.assertEqual(replies[0].status, status)
                self.assertEqual(self.fake.count(CHAT), before + (status == 200))
                page.wait_for("$('asks').hidden && document.title == 'copilot_proxy'")
        self.check_quiet(page)

    def test_two_wait_and_one_is_decided_elsewhere(self) -> None:
        page = self.open(width=NARROW_PX, height=740)
        self.wait_until_shown(page)
        asked = [self.ask("number %d" % at) for at in range(2)]
        page.wait_for("document.title == '(2) copilot_proxy'")
        self.check_fits(page)
        found = self.proxy.get("/approvals").json["approvals"]
        self.proxy.post("/approvals/" + found[0]["id"], {"allow": False})
        page.wait_for("document.title == '(1) copilot_proxy'")
        self.assertIn(found[1]["text"], page.text())
        self.assertNotIn(found[0]["text"], page.text())
        page.run("document.querySelector('#asks button').click()")
        for thread, _ in asked:
            thread.join(10)
        self.assertEqual(sorted(replies[0].status for _, replies in asked), [200, 403])
        self.check_quiet(page)

    def test_always_asks_no_more_until_it_is_taken_back(self) -> None:
        page = self.open()
        self.wait_until_shown(page)
        thread, replies = self.ask("question one")
        self.wait_for_text(page, "question one")
        page.run("document.querySelector('[aria-label=\"Always allow asker/1.0\"]').click()")
        thread.join(10)
        self.assertEqual(replies[0].status, 200)
        self.go(page, "account")
        self.wait_for_text(page, "Allowed without a question: asker (127.0.0.1)")
        thread, replies = self.ask("question two")
        thread.join(10)
        self.assertEqual(replies[0].status, 200)
        again = "document.querySelector('[aria-label=\"Ask again about every program\"]').click()"
        page.run(again + ";" + again)
        page.wait_for("!$('standing').innerText")
        thread, replies = self.ask("question three")
        self.wait_for_text(page, "question three")
        page.run("document.querySelector('[aria-label^=Deny]').click()")
        thread.join(10)
        self.assertEqual(replies[0].status, 403)
        self.check_quiet(page)


class Limited(PageCase):
    """What rests is shown beside the quota, with the next probe and a button that ends the rest."""

    def test_limits_are_shown_and_cleared_one_by_one(self) -> None:
        page = self.open(width=NARROW_PX, height=740)
        self.wait_until_shown(page)
        page.wait_for("$('raw').textContent")          # room that /usage reports would end a rest
        self.assertEqual(page.run("$('limits').children.length"), 0)
        for model in ("gpt-4.1", "gpt-4o"):
            self.fake.script(CHAT, Answer(402, {"retry-after": "2592000"}, {
                "message": "You have no quota", "code": "quota_exceeded"}))
            self.proxy.post("/v1/chat/completions", chat("a", model))
        page.wait_for("$('limits').children.length === 2")
        self.assertRegex(page.run("$('limits').children[0].innerText").replace("\n", " "),
                         r"gpt-4\.1 limited by GitHub \(402 quota_exceeded\) until .*, "
                         r"in 30 days\. Next probe: in (60\.0|[45][0-9]\.[0-9]) s\. Clear")
        self.check_fits(page)
        self.check_contrast(page)
        self.assertEqual(page.run(NAMELESS), [])
        self.shoot(page, "limits")
        page.run("$('limits').querySelector('button').click()")
        page.wait_for("$('limits').children.length === 1")
        self.assertEqual(self.proxy.post("/v1/chat/completions", chat("a", "gpt-4.1")).status, 200)
        self.assertEqual(self.proxy.post("/v1/chat/completions", chat("a", "gpt-4o")).status, 402)
        self.check_quiet(page)


class Locked(PageCase):
    """Where a key is needed the page asks for it, sends it as header, and keeps it in the tab."""
    KEY = "made-up-operator-key"
    settings = dict(api_key=(KEY,))

    def enter_key(self, page: Page, key: str) -> None:
        page.wait_for("!$('lock').hidden && document.activeElement === $('key')")
        page.send("Input.insertText", text=key)
        page.run("$('lock').querySelector('button').click()")

    def test_the_key_is_asked_for_and_kept_in_the_tab(self) -> None:
        page = self.open()
        self.wait_for_text(page, "This server asks for a key")
        self.assertNotIn("gpt-5.3-codex", page.text())
        self.check_contrast(page)
        self.shoot(page, "key")
        self.enter_key(page, "wrong")
        self.wait_for_text(page, "This key is not the right one")
        self.enter_key(page, self.KEY)
        self.wait_until_shown(page)
        self.proxy.post("/v1/chat/completions", chat("a"), **{
            "User-Agent": "one/1", "Authorization": "Bearer " + self.KEY})
        self.wait_for_text(page, "one · ")                # by events, with the key
        self.assertTrue(page.run("$('lock').hidden"))
        page.send("Page.reload")
        page.wait_for("document.readyState == 'complete' && performance.now() < 30000")
        self.wait_until_shown(page)
        self.assertTrue(page.run("$('lock').hidden"))
        self.assertNotIn(self.KEY, page.run("document.documentElement.outerHTML"))
        self.assertEqual(page.run("Object.values(localStorage).join() + document.cookie"), "auto")
        self.assertEqual([url for url in page.urls() if self.KEY in url], [])
        self.assertEqual([c for c in page.complaints() if "401" not in c], [])


PICTURE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
                       ".github", "page.png")
PICTURE_BYTES = 200000
#: what the page would give to the clipboard or save as a file
CATCH = """
window.copied = []; window.saved = [];
Object.defineProperty(navigator, 'clipboard', { value: { writeText: text => {
  window.copied.push(text); return Promise.resolve(); } } });
URL.createObjectURL = blob => { blob.text().then(text => window.saved.push(text)); return '#'; };
HTMLAnchorElement.prototype.click = (click => function () {
  return this.download ? undefined : click.call(this); })(HTMLAnchorElement.prototype.click);
"""


class DemoPage(PageCase):
    def setUp(self) -> None:
        super().setUp()
        upstream = cp.start_demo(cp.Settings(demo=True))
        self.addCleanup(upstream.app.close)
        self.addCleanup(upstream.finish, 0.0)

        class Fake:
            url = upstream.url
        fake: Any = Fake()
        self.demo = self.enter(Proxy(
            fake, demo=True, no_history=False, github_token="ghu_demo"))
        cp.seed_demo(self.demo.app.ledger.history, time.time())
        wait_until(lambda: self.demo.get("/history/summary").json["total"]["requests"] > 300)
        self.demo.get("/usage")

    def view(self, view: str = "", **more: Any) -> Page:
        page = self.open(proxy=self.demo, view=view, **more)
        page.run(CATCH)
        page.wait_for("live && $('tiles').children.length > 5")
        return page

    def key(self, page: Page, name: str) -> None:
        for kind in ("keyDown", "keyUp"):
            page.send("Input.dispatchKeyEvent", type=kind, key=name, code=name,
                      windowsVirtualKeyCode={"Enter": 13, "Escape": 27, "ArrowLeft": 37}[name],
                      **({"text": "\r"} if name == "Enter" and kind == "keyDown" else {}))


class Overview(DemoPage):
    def test_one_look_tells_credits_and_the_forecast(self) -> None:
        for model in ("gpt-5-mini", "gpt-5.3-codex", "claude-sonnet-4.6"):
            self.demo.post("/v1/chat/completions", chat("please think " * 400, model),
                           **{"User-Agent": "opencode/1.4.2"})
        wait_until(lambda: "demo-" not in self.demo.get("/history").json["rows"][2]["id"])
        since = "/history/summary?days=1"       # the demo's made-up ones of today, and these
        wait_until(lambda: self.demo.get(since).json["total"]["requests"] >= 3)
        count = self.demo.get(since).json["total"]["requests"]
        page = self.view(width=1280, height=1020)
        page.wait_for("/Requests today\\n%d\\n[^]* a day, /.test($('tiles').innerText)" % count)
        self.assertRegex(page.run("$('newest').innerText"), r"(?m)^.* ms · [\d.,]+ credits$")
        text = page.run("$('tiles').innerText")
        for part in ("Requests today", "Credits today", "Credits left", "Cache hits today",
                     "First byte today", "as GitHub reports them"):
            self.assertIn(part, text)
        self.assertNotIn("unknown", text)
        self.assertRegex(text, r"at [\d.]+ a day, ([\d.]+ will be left at the reset|used up in)")
        self.wait_for_text(page, "This is the demo")
        path = PICTURE if os.environ.get("PAGE_PICTURE") == "1" else os.path.join(
            self.demo.data_dir, "page.png")
        self.go(page, "usage")
        page.wait_for("document.querySelectorAll('#days g').length == 30")
        page.run("$('range').value = '7'; $('range').onchange(); $('metric').value = 'tokens';"
                 "$('metric').onchange()")
        self.shoot(page, "demo usage")
        self.go(page, "overview")
        page.screenshot(path)
        self.assertLess(os.path.getsize(path), PICTURE_BYTES)
        self.check_quiet(page, self.demo)

    def test_every_view_at_every_width_light_and_dark(self) -> None:
        for dark in (False, True):
            for width in (NARROW_PX, 768, 1440):
                page = self.view(width=width, height=900, dark=dark)
                for view in VIEWS:
                    self.go(page, view)
                    page.run("new Promise(done => setTimeout(done, 300))")
                    self.check_contrast(page)
                    self.assertEqual(page.run(NAMELESS), [], view)
                    self.assertLessEqual(
                        page.run("document.scrollingElement.scrollWidth"), width, view)
                    self.shoot(page, "demo %s %s %d" % (view, "dark" if dark else "light", width))
                self.check_quiet(page, self.demo)
                self.close(page)


class Chinese(DemoPage):
    def test_every_view_is_in_chinese_and_works(self) -> None:
        with mock.patch.object(self.demo.settings, "lang", "zh"):
            page = self.view(width=NARROW_PX, height=900)
        self.assertEqual(page.run("document.documentElement.lang"), "zh")
        english = [text for text in cp.CHINESE if len(text) > 3 and text[0].isupper()
                   and text not in ("API key", "Chat") and "%" not in text]
        for view in VIEWS:
            self.go(page, view)
            page.run("new Promise(done => setTimeout(done, 400))")
            shown = page.run("[...document.querySelectorAll('body *')].flatMap(e => e.matches("
                             "'script, style, pre, code') ? [] : [...e.childNodes].filter("
                             "n => n.nodeType == 3).map(n => n.data.trim()))")
            self.assertEqual([text for text in shown if text in english], [], view)
            self.assertEqual(page.run(NAMELESS), [], view)
            self.assertLessEqual(page.run("document.scrollingElement.scrollWidth"), NARROW_PX)
        self.go(page, "models")
        self.assertIn("auto", page.run("[...$('catalogue').rows].map(e => e.innerText.split("
                                       "'\\n')[0])"))       # a name stays what it is
        self.go(page, "usage")
        page.run("$('metric').value = 'tokens'; $('metric').onchange()")
        self.assertIn("今日请求", page.run("$('tiles').textContent"))
        self.check_quiet(page, self.demo)


class Fortnight(DemoPage):
    def test_the_opening_view_shows_each_day_and_its_values(self) -> None:
        page = self.view(width=1280, height=900)
        page.wait_for("document.querySelectorAll('#fortnight g').length == 15")
        told = self.demo.get("/history/summary?days=15").json["by_day"]
        titles = page.run("[...document.querySelectorAll('#fortnight title')].map("
                          "e => e.textContent)")
        self.assertTrue(titles[0].startswith(told[0]["day"] + ": "))
        page.wait_for("today !== null")
        page.run("showFortnight()")
        self.assertNotIn("Invalid", page.run("$('fortnight').textContent"))
        self.assertEqual(page.run("$('fortnight-readout').innerText"), "credits of each day")
        seen = page.run("const chart = document.querySelector('#fortnight svg'); chart.focus();"
                        "chart.dispatchEvent(new KeyboardEvent('keydown', { key: 'End' }));"
                        "chart.dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowLeft' }));"
                        "$('fortnight-readout').innerText")
        self.assertRegex(seen,
                         r"^%s: [\d.]+ credits, \d+ requests" % told[-2]["day"])
        self.check_quiet(page, self.demo)

    def test_tokens_stand_where_no_credits_are_known(self) -> None:
        page = self.view()
        page.wait_for("document.querySelectorAll('#fortnight g').length == 15 && today !== null")
        seen = page.run("fortnight.forEach(c => { c.credits = c.estimated_credits = null; });"
                        "today.credits = today.estimated_credits = null; showFortnight();"
                        "$('fortnight-readout').innerText")
        self.assertEqual(seen, "tokens of each day")
        self.assertEqual(page.run("$('metric').value"), "credits")


class Stories(DemoPage):
    def test_a_request_opens_by_keyboard_tells_all_and_gives_the_focus_back(self) -> None:
        self.demo.post("/v1/messages", message("tell me", "gpt-5.3-codex"),
                       **{"User-Agent": "claude-cli/2.1.9"})
        page = self.view("requests")
        page.wait_for("document.querySelector('#requests tbody .link').innerText "
                      "== 'gpt-5.3-codex'")
        page.run("document.querySelector('#requests tbody .link').focus()")
        self.key(page, "Enter")
        page.wait_for("$('drawer').open")
        page.wait_for("$('drawer').innerText.includes('a million')")
        page.run("openStory([...rows.values()].sort((a, b) => b.at - a.at)[0].id)")
        text = page.run("$('drawer').innerText")
        for part in ("Stages", "until the first byte", "claude-cli/2.1.9", "translated",
                     "has no endpoint for messages", "/responses", "as GitHub reports",
                     "Request id"):
            self.assertIn(part, text)
        self.check_contrast(page)
        self.assertEqual(page.run(NAMELESS), [])
        self.shoot(page, "story")
        page.run("[...document.querySelectorAll('#drawer button')].find("
                 "e => e.innerText == 'Copy for a bug report').click()")
        report = page.wait_for("window.copied[0]")
        for part in ("copilot_proxy ", "route: translated", "status: 200"):
            self.assertIn(part, report)
        for part in ("session", "account", "tell me"):
            self.assertNotIn(part, report)
        self.key(page, "Escape")
        page.wait_for("!$('drawer').open && document.activeElement.className == 'link'")
        self.check_quiet(page, self.demo)

    def test_an_error_stands_in_words_with_what_to_do(self) -> None:
        self.demo.post("/v1/messages", message("rate limit", "claude-haiku-4.5"))
        page = self.view("requests", width=NARROW_PX, height=740)
        page.wait_for("document.querySelector('#requests tbody .link').innerText "
                      "== 'claude-haiku-4.5'")
        page.run("document.querySelector('#requests tbody .link').click()")
        text = page.wait_for("$('drawer').innerText")
        self.assertIn("since the prompt says so", text)
        self.assertIn("Wait as long as the answer says", text)
        self.check_fits(page)
        self.shoot(page, "story narrow")

    def test_filters_reach_the_whole_history(self) -> None:
        page = self.view("requests")
        page.wait_for("$('by-one-client').options.length > 4")
        page.run("$('by-one-client').value = 'Codex'; $('by-one-client').onchange()")
        page.wait_for("older === null || filtered().length >= 15")
        shown = page.run("[...document.querySelectorAll('#requests tbody tr')].map("
                         "e => e.innerText)")
        self.assertTrue(shown)
        self.assertEqual([text for text in shown if "Codex" not in text], [])
        page.run("$('rows-csv').click()")
        saved = page.wait_for("window.saved[0]")
        self.assertIn('"codex_cli_rs/0.91.0"', saved)
        self.assertNotIn("claude-cli", saved)
        page.run("$('by-one-client').value = ''; $('by-state').value = 'failed';"
                 "$('by-state').onchange()")
        told = self.demo.get("/history?state=failed&limit=500").json["rows"]
        page.wait_for("filtered().length == %d" % len(told))
        page.run("$('by-state').value = ''; $('by-text').value = 'demo-7'; $('by-text').oninput()")
        told = self.demo.get("/history?text=demo-7&limit=200").json["rows"]
        page.wait_for("filtered().length == %d" % len(told))
        page.run("$('by-text').value = 'nothing like it'; $('by-text').oninput()")
        self.wait_for_text(page, "Nothing fits this filter.")
        self.check_quiet(page, self.demo)

    def test_prices_are_compared_and_names_that_are_gone_are_told(self) -> None:
        for model in ("gpt-5-mini", "o3-mini"):
            self.demo.post("/v1/chat/completions", chat("hello " * 300, model),
                           **{"User-Agent": "codex_cli_rs/0.9"})
        page = self.view("usage")
        page.wait_for("$('prices').rows.length > 1")
        told = self.demo.get("/stats").json["price_check"][0]
        cells = page.run("[...$('prices').rows[1].cells].map(e => e.innerText)")
        self.assertEqual(cells[:2], [told["model"], str(told["requests"])])
        self.assertIn("%", cells[4])
        self.check_contrast(page)
        self.go(page, "models")
        self.wait_for_text(page, "o3-mini, 1 time by codex_cli_rs/0.9: GitHub retired it")
        page.run("document.querySelector('#names').closest('details').open = true")
        self.assertGreater(page.run("$('names').rows.length"), 30)
        self.check_contrast(page)
        self.assertEqual(page.run(NAMELESS), [])
        self.shoot(page, "retired")
        self.check_quiet(page, self.demo)


class Charts(DemoPage):
    def test_values_by_keyboard_by_hour_and_week_and_as_files(self) -> None:
        page = self.view("usage", width=1280, height=900)
        page.wait_for("document.querySelectorAll('#days g').length == 30")
        page.run("document.querySelector('#days svg').focus()")
        newest = page.run("$('readout').innerText")
        self.assertIn("requests", newest)
        self.key(page, "ArrowLeft")
        before = page.run("$('readout').innerText")
        self.assertNotEqual(newest, before)
        self.assertRegex(before, r"^\d{4}-\d\d-\d\d: [\d.]+ credits, \d+ requests")
        for grain, bars in (("hour", 48), ("week", 5), ("day", 30)):
            page.run("$('grain').value = %r; $('grain').onchange()" % grain)
            self.assertEqual(page.run("document.querySelectorAll('#days g').length"), bars)
        for field in ("model", "client", "account", "session"):
            self.assertGreater(page.run("$('by-%s').children.length" % field), 0, field)
        for line in ("cache-line", "first-line"):
            self.assertGreater(page.run(
                "document.querySelectorAll('#%s circle').length" % line), 10)
        page.run("$('csv').click(); $('json').click()")
        page.wait_for("window.saved.length == 2")
        self.assertEqual(len(page.run("window.saved[0]").split("\r\n")), 32)
        self.assertIn('"by_session"', page.run("window.saved[1]"))
        self.shoot(page, "charts")
        self.check_quiet(page, self.demo)

    def test_a_cell_is_never_a_formula(self) -> None:
        page = self.view()
        self.assertEqual(page.run("csv([{ a: '=1+1', b: 'x\"y' }, { a: 3 }])"),
                         "\"a\",\"b\"\r\n\"'=1+1\",\"x\"\"y\"\r\n3,\r\n")


class Connect(DemoPage):
    def test_the_steps_of_each_client_and_the_first_call(self) -> None:
        page = self.view("connect")
        page.wait_for("$('steps').innerText.includes('ANTHROPIC_BASE_URL')")
        self.assertIn(self.demo.url, page.run("$('steps').innerText"))
        self.assertNotIn("YOUR-KEY", page.run("$('steps').innerText"))
        for name in cp.CLIENTS:
            page.run("$('client').value = %r; $('client').onchange()" % name)
            page.wait_for("told.about === %r && $('steps').innerText.length > 20"
                          % cp.CLIENTS[name].about)
        self.wait_for_text(page, "Waiting for its first request")
        page.run("document.querySelector('#steps button').click()")
        self.assertIn("curl", page.wait_for("window.copied[0]"))
        self.demo.post("/v1/messages", message("hi", "claude-haiku-4.5"),
                       **{"User-Agent": "claude-cli/2.1.9"})
        self.wait_for_text(page, "Claude Code asked claude-haiku-4.5")
        self.check_quiet(page, self.demo)

    def test_the_endpoint_refuses_what_it_does_not_know(self) -> None:
        self.assertEqual(self.demo.get("/connect/nothing").status, 404)
        self.assertEqual(self.demo.get("/connect/codex?shell=tcsh").status, 400)


class TryIt(DemoPage):
    def test_each_api_streamed_and_whole_with_and_without_a_tool(self) -> None:
        page = self.view("connect")
        page.wait_for("$('try-model').options.length > 5")
        for dialect in ("chat", "responses", "messages"):
            for stream in ("true", "false"):
                for tool in ("false", "true"):
                    with self.subTest(dialect=dialect, stream=stream, tool=tool):
                        page.run("show('try-state', ''); $('try-dialect').value = %r;"
                                 "$('try-stream').checked = %s; $('try-tool').checked = %s;"
                                 "$('try-text').value = 'use the tool'; $('try').requestSubmit()"
                                 % (dialect, stream, tool))
                        page.wait_for("$('try-state').innerText == 'done'")
                        said = page.run("$('try-answer').innerText")
                        if tool == "false":
                            self.assertIn("You said: use the tool", said)
                        else:
                            self.assertIn("{}", said)
                        self.assertIn("tokens", page.run("$('try-facts').innerText"))
                        self.assertTrue(page.run("$('try-raw').innerText"))
        self.check_quiet(page, self.demo)

    def test_code_follows_the_form_and_an_error_stands_there(self) -> None:
        page = self.view("connect")
        page.wait_for("$('try-model').options.length > 5")
        for kind, part in (("curl", "curl -N"), ("Python", "from openai import OpenAI"),
                           ("JavaScript", "import OpenAI from 'openai'")):
            page.run("$('try-kind').value = %r; $('try-kind').onchange()" % kind)
            self.assertIn(part, page.run("$('try-code').innerText"))
        page.run("$('try-text').value = 'please fail'; $('try').requestSubmit()")
        self.wait_for_text(page, "since the prompt says so")
        page.run("$('try-text').value = 'slow ' + 'word '.repeat(200); $('try').requestSubmit()")
        page.wait_for("$('try-answer').innerText.length > 5")
        page.run("$('try-stop').click()")
        self.wait_for_text(page, "stopped")


if __name__ == "__main__":
    sys.exit(unittest.main())
