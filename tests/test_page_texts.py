"""The page in Chinese (sections 2 and 19): every text of the page has its other text, and no other
text is left over."""
from __future__ import annotations

import json
import re
import sys
import unittest

from support import ProxyCase, cp, second_proxy

SCRIPT = cp.PAGE_SCRIPT
BODY = cp.PAGE.partition("<body>")[2].replace(SCRIPT, "")
#: a literal of the script with what is added to it on the next line
LITERAL = re.compile(r"'((?:[^'\\\n]|\\.)*)'")
#: names and code that are the same in every language
SAME = {"copilot_proxy", "CSV", "JSON", "Chat Completions", "Responses", "Messages", "curl",
        "Python", "JavaScript", "Say hello in one sentence.", "WORDS"}


def literals(script: str) -> list[str]:
    """Every text in quotes, those that are added up as one."""
    joined = re.sub(r"'\s*\n?\s*\+ '", "", script)
    return [text.replace("\\u2019", "’") for text in LITERAL.findall(joined)]


class Texts(unittest.TestCase):
    def test_every_text_that_the_script_looks_up_is_there(self) -> None:
        joined = re.sub(r"'\s*\n?\s*\+ '", "", SCRIPT)
        asked = re.findall(r"\bt\('((?:[^'\\\n]|\\.)*)'[,)]", joined)
        self.assertGreater(len(asked), 60)
        self.assertEqual([text for text in asked
                          if text.replace("\\u2019", "’") not in cp.CHINESE], [])

    def test_every_text_that_stands_in_the_page_is_there(self) -> None:
        texts = [re.sub(r"\s+", " ", text).strip() for text in re.findall(r">([^<]+)", BODY)]
        texts += re.findall(r'(?:aria-label|placeholder)="([^"]+)"', BODY)
        words = {text for text in texts if re.search("[A-Za-z]{2}", text)} - SAME
        self.assertGreater(len(words), 60)
        self.assertEqual(sorted(words - set(cp.CHINESE)), [])

    def test_no_text_is_left_over(self) -> None:
        known = set(literals(SCRIPT))
        page = re.sub(r"\s+", " ", BODY)
        composed = {prefix + end for prefix in ("Requests", "Credits", "Tokens", "Cache hits",
                                                "First byte") for end in (" today", " since start")}
        composed |= {prefix + theme for prefix in (" ", "Theme: ")
                     for theme in ("light", "dark", "auto")}
        composed |= {word + " %s to ask %s" for word in ("Allow", "Deny")}
        for line in cp.PAGE_CHINESE.splitlines():
            english = line.partition(" => ")[0]
            with self.subTest(english):
                of_the_server = english.replace(" ", "_").lower()  # codes, lanes and states
                self.assertTrue(english in known or english in composed or english in page
                                or of_the_server.isidentifier())

    def test_each_has_another_text_that_a_chinese_console_can_show(self) -> None:
        for english, other in cp.CHINESE.items():
            self.assertTrue(other.strip() and other != english, english)
            other.encode("gbk")


class Served(ProxyCase):
    def test_the_page_is_served_in_the_language_of_the_setting(self) -> None:
        for lang, word in (("", None), ("en", None), ("zh", "概览")):
            with second_proxy(self, lang=lang) as proxy:
                reply = proxy.get("/dashboard")
                page = reply.body.decode()
                self.assertIn('<html lang="%s">' % (lang or "en"), page)
                words = page.partition('id="words">')[2].partition("</script>")[0]
                self.assertEqual(json.loads(words).get("Overview"), word)
                script = page.partition("<script>")[2].partition("</script>")[0]
                self.assertIn(cp.csp_hash(script), reply.headers["content-security-policy"])


if __name__ == "__main__":
    sys.exit(unittest.main())
