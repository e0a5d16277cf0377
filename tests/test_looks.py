"""What people look at: sums and filters of the history, programs instead of versions, and an open
page that leaves log and counts alone.
"""
from __future__ import annotations

import os
import sqlite3
import sys
import tempfile
import time
import unittest
from typing import Any

from fake_upstream import FakeUpstream
from support import SLOW, Proxy, ProxyCase, chat, cp, wait_until


def a_row(at: float, **more: Any) -> dict[str, Any]:
    """A row of the history as the ledger writes it."""
    row = dict.fromkeys(cp.ROW_FIELDS)
    row.update(id="%032x" % int(at * 1000), at=at, account="octocat", client="curl/8.5",
               dialect="chat", path="/chat/completions", route="passthrough", asked="gpt-4.1",
               model="gpt-4.1", streamed=1, status=200, input=100, cache_read=50, output=20,
               nano_aiu=10 ** 9, estimate=10 ** 9, sent_ms=2.0, first_ms=300.0, total_ms=900.0)
    row.update(more)
    return row


class Programs(unittest.TestCase):
    def test_an_update_is_no_other_client(self) -> None:
        for agent, name in (("codex_cli_rs/0.88.0", "Codex"), ("codex_exec/0.91", "Codex"),
                            ("claude-cli/2.1.0", "Claude Code"), ("Claude-CLI/3", "Claude Code"),
                            ("OpenAI/Python", "OpenAI SDK (Python)"), ("curl/8.5.0", "curl"),
                            ("AsyncAnthropic/Python", "Anthropic SDK (Python)"),
                            ("own-tool", "own-tool"), ("/x", "/x"), (None, None), ("", None)):
            self.assertEqual(cp.client_name(agent), name, agent)


class Sums(ProxyCase):
    settings = dict(no_history=False)

    def put(self, *rows: dict[str, Any], proxy: Proxy | None = None) -> None:
        """Rows, until they can be read."""
        app = (proxy or self.proxy).app
        before = len((proxy or self.proxy).get("/history?limit=500").json["rows"])
        for row in rows:
            app.ledger.history.put(row)
        wait_until(lambda: len((proxy or self.proxy).get("/history?limit=500").json["rows"])
                   == before + len(rows))

    def test_versions_of_a_client_are_one_line(self) -> None:
        now = time.time()
        self.put(a_row(now, client="codex_cli_rs/0.88.0"), a_row(now, client="codex_exec/0.91"),
                 a_row(now, client="claude-cli/2.1", first_ms=None), a_row(now, client=None))
        told = self.proxy.get("/history/summary").json
        found = {line["client"]: line for line in told["by_client"]}
        self.assertEqual({name: line["requests"] for name, line in found.items()},
                         {"Codex": 2, "Claude Code": 1, None: 1})
        self.assertEqual(found["Codex"]["credits"], 2.0)
        self.assertEqual((found["Codex"]["first_ms"], found["Codex"]["timed"]), (300.0, 2))
        self.assertEqual((found["Claude Code"]["first_ms"], found["Claude Code"]["timed"]),
                         (None, 0))
        rows = self.proxy.get("/history").json["rows"]
        self.assertEqual({row["program"] for row in rows}, {"Codex", "Claude Code", None})
        self.assertIn("codex_cli_rs/0.88.0", {row["client"] for row in rows})

    def test_by_hour_account_and_session_and_each_adds_up(self) -> None:
        noon = time.mktime(time.localtime()[:3] + (0, 0, 0, 0, 0, -1))
        self.put(*[a_row(noon + 60 * at, session="s%d" % (at % 3), account="a%d" % (at % 2),
                         first_ms=100.0 * at) for at in range(0, 6)])
        told = self.proxy.get("/history/summary?days=2&sessions=1").json
        for name in ("by_day", "by_hour", "by_model", "by_client", "by_account", "by_session"):
            self.assertEqual(sum(line["requests"] for line in told[name]), 6, name)
            self.assertEqual(sum(line["input"] for line in told[name]), 600, name)
        self.assertEqual(told["total"]["first_ms"], 250.0)
        self.assertEqual(told["by_hour"][0]["hour"], time.strftime("%Y-%m-%d 00"))
        self.assertEqual({line["session"] for line in told["by_session"]}, {"s0", "s1", "s2"})
        self.assertEqual(self.proxy.get("/history/summary").json["by_session"], [])

    def test_a_404_is_no_failure(self) -> None:
        self.proxy.post("/v1/chat/completions", chat("a", "no-such-model-at-all"))
        self.proxy.post("/v1/chat/completions", b"{")
        wait_until(lambda: len(self.proxy.get("/history").json["rows"]) == 2)
        self.assertEqual(self.proxy.get("/stats").json["totals"]["errors"], 1)
        self.assertEqual(self.proxy.get("/history/summary").json["total"]["errors"], 1)
        for state, count in (("failed", 1), ("not_found", 1), ("done", 0), ("left", 0)):
            rows = self.proxy.get("/history?state=" + state).json["rows"]
            self.assertEqual(len(rows), count, state)

    def test_filters_and_paging_go_together(self) -> None:
        now = time.time()
        self.put(*[a_row(now + at, client="codex_cli_rs/0.%d" % at,
                         model="gpt-5" if at % 2 else "claude", session="sess%d" % at)
                   for at in range(10)])

        def ask(query: str) -> Any:
            return self.proxy.get("/history?" + query).json
        self.assertEqual(len(ask("model=gpt-5")["rows"]), 5)
        self.assertEqual(len(ask("client=Codex&model=gpt-5")["rows"]), 5)
        self.assertEqual(len(ask("client=curl")["rows"]), 0)
        self.assertEqual([row["session"] for row in ask("text=SESS7")["rows"]], ["sess7"])
        first = ask("model=gpt-5&limit=2")
        second = ask("model=gpt-5&limit=2&before=%d" % first["next"])
        self.assertEqual([row["session"] for row in first["rows"] + second["rows"]],
                         ["sess9", "sess7", "sess5", "sess3"])
        self.assertEqual(ask("text=%25")["rows"], [])     # no pattern, only text
        self.assertEqual(ask("text='")["rows"], [])
        for query in ("state=gone", "text=" + "a" * 201, "client=" + "a" * 201):
            self.assertEqual(self.proxy.get("/history?" + query).status, 400, query)

    def test_200000_rows_are_summed_within_a_second_and_today_at_once(self) -> None:
        now, many = time.time(), 200_000 if SLOW else 20_000
        link = sqlite3.connect(":memory:")
        self.addCleanup(link.close)
        cp.make_tables(link)
        names = ", ".join(cp.ROW_FIELDS)
        places = ", ".join("?" * len(cp.ROW_FIELDS))
        rows = (list(a_row(now - 14 * 86400 * (1 - at / many), session="s%d" % (at // 50),
                           model="m%d" % (at % 4)).values()) for at in range(many))
        link.executemany("INSERT INTO requests (%s) VALUES (%s)" % (names, places), rows)
        took = []
        for _ in range(3):                                # a loaded machine may be slow once
            began = time.thread_time()
            told = cp.summarise(link, now - 15 * 86400, False)
            took.append(time.thread_time() - began)
        self.assertEqual(told["total"][0]["requests"], many)
        self.assertLess(min(took), many / 200_000)
        began = time.thread_time()
        cp.summarise(link, now - 3600, True)
        self.assertLess(time.thread_time() - began, 0.3)


class Quiet(ProxyCase):
    def test_an_open_page_neither_fills_the_log_nor_counts_as_requests(self) -> None:
        page = {"X-Copilot-Proxy-Page": "1"}
        for path in ("/", "/health", "/stats", "/history", "/history/summary", "/metrics"):
            self.assertEqual(self.proxy.get(path).status, 200, path)
        for path in ("/models", "/usage"):
            self.assertEqual(self.proxy.get(path, **page).status, 200, path)
        text = self.proxy.get("/metrics").body.decode()
        self.assertNotRegex(text, r"(?m)^copilot_proxy_requests_total\{")
        self.assertRegex(text, r'copilot_proxy_looks_total\{route="local",status="200"\} [89]')
        levels = {record.levelname for record in self.proxy.logs if hasattr(record, "row")}
        self.assertEqual(levels, {"DEBUG"})

    def test_a_look_that_fails_and_a_real_request_are_told(self) -> None:
        page = {"X-Copilot-Proxy-Page": "1"}
        self.proxy.get("/history?limit=x")
        self.proxy.post("/v1/chat/completions", chat("hi"), **page)
        wait_until(lambda: self.proxy.get("/stats").json["totals"]["requests"] == 1)
        infos = [record for record in self.proxy.logs
                 if hasattr(record, "row") and record.levelname == "INFO"]
        self.assertEqual(len(infos), 2)


class Older(unittest.TestCase):
    def test_a_file_of_an_earlier_version_gets_the_new_columns(self) -> None:
        kept = ", ".join(column for column in map(str.strip, cp.COLUMNS.split(","))
                         if column.split()[0] not in cp.LATER_COLUMNS)
        with tempfile.TemporaryDirectory() as folder, FakeUpstream() as fake:
            link = sqlite3.connect(os.path.join(folder, "history.sqlite3"))
            link.execute("CREATE TABLE requests (n INTEGER PRIMARY KEY, %s)" % kept)
            link.close()
            with Proxy(fake, no_history=False, data_dir=folder) as again:
                again.post("/v1/chat/completions", chat("hi"))
                rows = wait_until(lambda: again.get("/history").json["rows"])
            self.assertIsInstance(rows[0]["sent_ms"], float)
            self.assertLess(rows[0]["sent_ms"], rows[0]["first_ms"])


if __name__ == "__main__":
    sys.exit(unittest.main())
