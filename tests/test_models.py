"""Names of models as clients write them, the choice of the upstream dialect, estimates of tokens
(section 9)."""
from __future__ import annotations

import time
import unittest
from typing import Any

from support import cp
from wire import (CATALOGUE, user, chat_of as chat, message_of as message,
                  response_of as response)

MODELS, LIST = CATALOGUE, list(CATALOGUE.values())
GPT, MINI, CODEX = MODELS["gpt-4.1"], MODELS["gpt-5-mini"], MODELS["gpt-5.3-codex"]
SONNET, HAIKU, OPUS7 = (MODELS["claude-" + n] for n in ("sonnet-4.6", "haiku-4.5", "opus-4.7"))
GEMINI = MODELS["gemini-3.1-pro-preview"]
SOURCE = {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}


def entry(model_id: str, vendor: str = "Anthropic", **more: Any) -> Any:
    made = {"id": model_id, "vendor": vendor, "model_picker_enabled": True, "preview": False,
            "capabilities": {"type": "chat"}}
    made.update(more)
    return cp.Model.from_entry(made)


class ModelNames(unittest.TestCase):

    def found(self, asked: str, models: Any = None, aliases: Any = None) -> str:
        model = cp.resolve_model(asked, LIST if models is None else models, aliases or {})
        return model.id if model else ""

    def test_spellings_of_the_listed(self) -> None:
        for asked, want in (
                ("claude-sonnet-4.6", "claude-sonnet-4.6"), ("gpt-4.1", "gpt-4.1"),
                ("claude-opus-4-6[1m]", "claude-opus-4.6"),
                ("claude-opus-4-6[1m][1m]", "claude-opus-4.6"),
                ("anthropic/claude-sonnet-4.6", "claude-sonnet-4.6"),
                ("anthropic.claude-sonnet-4-6-v1:0", "claude-sonnet-4.6"),
                ("us.anthropic.claude-haiku-4-5-20251001-v1:0", "claude-haiku-4.5"),
                ("claude-haiku-4-5@20251001", "claude-haiku-4.5"),
                ("claude-haiku-4-5-latest", "claude-haiku-4.5"),
                ("claude-haiku-4-5-20251001", "claude-haiku-4.5"),
                ("claude-haiku-4-5", "claude-haiku-4.5"), ("Claude-Haiku-4.5", "claude-haiku-4.5"),
                ("openai/gpt-5.3-codex", "gpt-5.3-codex"), ("gpt-4.1-2025-04-14", "gpt-4.1"),
                (" gpt-4o ", "gpt-4o"), ("text-embedding-3-small", "text-embedding-3-small"),
                ("gpt-5.2", "gpt-5.2"), ("gpt-3.5-turbo", "gpt-3.5-turbo"), ("auto", "gpt-4.1")):
            with self.subTest(asked=asked):
                self.assertEqual(self.found(asked), want)

    def test_old_names_and_bare_families_find_the_newest(self) -> None:
        for asked, want in (
                ("claude-3-5-haiku-20241022", "claude-haiku-4.5"),
                ("claude-3-5-haiku-latest", "claude-haiku-4.5"),
                ("claude-3-5-sonnet@20241022", "claude-sonnet-4.6"),
                ("claude-3-7-sonnet-20250219", "claude-sonnet-4.6"),
                ("claude-3-opus-20240229", "claude-opus-4.7"),
                ("opus", "claude-opus-4.7"), ("sonnet", "claude-sonnet-4.6"),
                ("haiku", "claude-haiku-4.5"), ("claude-opus-4", "claude-opus-4.7"),
                ("sonnet[1m]", "claude-sonnet-4.6"),
                ("claude-sonnet-4-20250514", "claude-sonnet-4.6")):
            with self.subTest(asked=asked):
                self.assertEqual(self.found(asked), want)

    def test_unknown_newer_names_find_the_nearest_of_the_family(self) -> None:
        for asked, want in (
                ("claude-opus-4-8", "claude-opus-4.7"), ("claude-sonnet-5", "claude-sonnet-4.6"),
                ("claude-haiku-5-20270101", "claude-haiku-4.5"), ("gpt-5.5", "gpt-5.4"),
                ("gpt-5.9-codex", "gpt-5.3-codex"), ("claude-opus-4-8[1m]", "claude-opus-4.7")):
            with self.subTest(asked=asked):
                self.assertEqual(self.found(asked), want)

    def test_bare_family_takes_no_preview_no_hidden_no_suffix(self) -> None:
        models = [entry("claude-opus-4.6"), entry("claude-opus-4.7-high"),
                  entry("claude-opus-4.8", preview=True), entry("claude-opus-4.6-1m"),
                  entry("claude-opus-4.9", model_picker_enabled=False),
                  entry("claude-opus-5", policy={"state": "disabled"})]
        for asked in ("opus", "claude-opus-4"):
            self.assertEqual(self.found(asked, models), "claude-opus-4.6", asked)

    def test_1m_wish_takes_the_1m_id_where_it_is_listed(self) -> None:
        for extra in ("claude-opus-4.6-1m", "claude-opus-4.6-1m-internal"):
            models = LIST + [entry(extra)]
            self.assertEqual(self.found("claude-opus-4-6[1m]", models), extra)
            self.assertEqual(self.found("claude-opus-4-6", models), "claude-opus-4.6")

    def test_fast_is_kept_only_where_listed(self) -> None:
        self.assertEqual(self.found("claude-opus-4-6-fast"), "claude-opus-4.6")
        self.assertEqual(self.found("claude-opus-4-6-fast", LIST + [entry("claude-opus-4.6-fast")]),
                         "claude-opus-4.6-fast")

    def test_aliases_come_first(self) -> None:
        self.assertEqual(self.found("gpt-4.1", None, {"gpt-4.1": "claude-haiku-4-5"}),
                         "claude-haiku-4.5")
        self.assertEqual(self.found("codex-auto-review", None,
                                    {"codex-auto-review": "gpt-5-mini"}), "gpt-5-mini")

    def test_what_fits_nothing_finds_nothing(self) -> None:
        for asked in ("", " ", "llama-3", "gpt-4.2-turbo-x", "gpt", "claude", "[1m]", "/", "-",
                      "opus/", "\x00", "magnum-opus-7b", "\u20ac"):
            with self.subTest(asked=asked):
                self.assertEqual(self.found(asked), "")
        self.assertEqual(self.found("opus", []), "")
        self.assertEqual(self.found("auto", []), "")

    def test_endless_names_are_refused_quickly(self) -> None:
        """A regular expression that backtracks would stop every thread of the proxy."""
        for name in ("-latest" * 9000 + "x", "[1m]" * 9000 + "x", "-20250101" * 9000 + "x",
                     "-v1" * 20000 + "x", "@a" * 30000 + "!", "1-" * 30000, "a/" * 30000,
                     "claude-opus-" + "4-" * 30000):
            started = time.perf_counter()
            self.found(name)
            cp.nearest_ids(name, LIST)
            self.assertLess(time.perf_counter() - started, 0.5, name[:20])

    def test_nearest_ids_are_three_listed_ones(self) -> None:
        self.assertEqual(cp.nearest_ids("gpt-5.3-codx", LIST)[0], "gpt-5.3-codex")
        self.assertEqual(cp.nearest_ids("claude-haiku", LIST)[0], "claude-haiku-4.5")
        for asked in ("", "llama", "\ud800", "gpt"):
            near = cp.nearest_ids(asked, LIST)
            self.assertEqual(len(set(near)), 3)
            self.assertTrue(all(MODELS[name].is_listed for name in near))
        self.assertEqual(cp.nearest_ids("a", []), [])

    def test_a_model_is_asked_in_its_clients_dialect_where_it_can(self) -> None:
        both, none = MODELS["gpt-5-mini"], frozenset()
        for client, model, path in (
                (cp.CHAT, GPT, "/chat/completions"), (cp.CHAT, CODEX, "/responses"),
                (cp.RESPONSES, GPT, "/chat/completions"), (cp.RESPONSES, both, "/responses"),
                (cp.MESSAGES, both, "/responses"), (cp.MESSAGES, GPT, "/chat/completions"),
                (cp.MESSAGES, SONNET, "/v1/messages"), (cp.RESPONSES, SONNET, "/chat/completions"),
                (cp.CHAT, cp.Model("m", endpoints=("/v1/messages",)), "/v1/messages")):
            with self.subTest(client=client.name, model=model.id):
                self.assertEqual(cp.choose_upstream(client, model, none).path, path)

    def test_what_the_upstream_refused_is_not_asked_again(self) -> None:
        refused = {(GPT.id, "/chat/completions")}
        self.assertIs(cp.choose_upstream(cp.CHAT, GPT, refused), cp.RESPONSES)
        self.assertIs(cp.choose_upstream(cp.MESSAGES, GPT, refused), cp.RESPONSES)
        refused.add((GPT.id, "/responses"))
        self.assertIs(cp.choose_upstream(cp.CHAT, GPT, refused), cp.MESSAGES)
        self.assertIs(cp.choose_upstream(cp.CHAT, MODELS["gpt-4o"], refused), cp.CHAT)

    def test_a_model_without_any_dialect_is_refused(self) -> None:
        for client in cp.DIALECTS.values():
            with self.assertRaises(cp.BadRequest) as caught:
                cp.choose_upstream(client, MODELS["text-embedding-3-small"], frozenset())
            self.assertEqual(caught.exception.code, "unsupported_api_for_model")
            self.assertIn(client.path, str(caught.exception))
            self.assertIn("/embeddings", str(caught.exception))

    def test_entries_are_read_as_the_catalogue_means_them(self) -> None:
        self.assertEqual(GPT.endpoints, ("/chat/completions",))
        self.assertEqual(CODEX.endpoints[0], "/responses")
        self.assertEqual(MODELS["text-embedding-3-small"].endpoints, ("/embeddings",))
        self.assertEqual([(m.version, m.is_claude, m.is_openai) for m in (SONNET, CODEX, GEMINI)],
                         [((4, 6), True, False), ((5, 3), False, True), ((3, 1), False, False)])
        self.assertEqual((SONNET.output_cap(True), SONNET.output_cap(False)), (32000, 16000))
        listed = {name for name, model in MODELS.items() if model.is_listed}
        self.assertNotIn("gpt-5.2", listed)             # switched off by policy
        self.assertNotIn("gpt-3.5-turbo", listed)       # not meant for users
        self.assertIn("text-embedding-3-small", listed)


class Estimates(unittest.TestCase):

    def test_estimate_is_on_the_high_side_and_grows(self) -> None:
        english = "The quick brown fox jumps over the lazy dog. " * 100     # 10 tokens each
        chinese = "\u4f60\u597d\u4e16\u754c" * 100                          # 250 pieces or so
        for make in (chat, message):
            self.assertTrue(1000 <= cp.estimate_tokens(make(user(english))) < 1200)
            self.assertGreaterEqual(cp.estimate_tokens(make(user(chinese))), 250)
            one, two = (cp.estimate_tokens(make(*[user("hello")] * n)) for n in (1, 2))
            self.assertGreater(two, one)
        self.assertGreaterEqual(cp.estimate_tokens(response(input=english)), 1000)

    def test_images_count_by_piece_and_not_by_byte(self) -> None:
        big = "A" * 3000000
        for body in (message(user([{"type": "image", "source": dict(SOURCE, data=big)}])),
                     chat(user([{"type": "image_url", "image_url": {
                         "url": "data:image/png;base64," + big}}])),
                     response(user([{"type": "input_image",
                                     "image_url": "data:image/png;base64," + big}]))):
            with self.subTest(keys=sorted(body)):
                self.assertTrue(1500 < cp.estimate_tokens(body) < 5000, cp.estimate_tokens(body))

    def test_tools_and_system_count(self) -> None:
        bare = cp.estimate_tokens(message())
        with_tool = cp.estimate_tokens(message(tools=[{"name": "a"}]), True)
        self.assertGreaterEqual(with_tool, bare + 346)
        self.assertGreater(cp.estimate_tokens(message(system="xy " * 300)), bare + 250)


if __name__ == "__main__":
    unittest.main()
