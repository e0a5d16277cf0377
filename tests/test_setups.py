"""What editors, command lines and frameworks are set up and tried with (section 22)."""
from __future__ import annotations

import json
import os
import re
import sys
import unittest
import unittest.mock
from typing import Any

from support import document
from cases import SetupCase
import copilot_proxy as cp
from fake_upstream import MESSAGES, Answer

#: client -> the route that --check calls
ROUTES = {
    "vscode": "/v1/chat/completions", "vscode-ollama": "/api/chat",
    "copilot-cli": "/v1/responses", "xcode": "/v1/chat/completions",
    "jetbrains": "/v1/chat/completions", "zed": "/v1/chat/completions",
    "gemini-cli": "/v1beta/models/gemini-", "home-assistant": "/api/chat",
    "openai-agents": "/v1/responses", "langchain": "/v1/chat/completions",
    "claude-code": "/v1/messages", "codex": "/v1/responses", "curl": "/v1/chat/completions"}
NO_FILE = ("vscode-ollama", "xcode", "jetbrains", "home-assistant")


class CheckTest(SetupCase):
    def test_each_client_is_tried_by_its_own_route(self) -> None:
        for client, route in ROUTES.items():
            for model in ("", "claude-sonnet-4.6", "gpt-5.4", "gpt-5-mini"):
                with self.subTest(client=client, model=model):
                    words = ["--model", model] if model else []
                    output = self.setup(client, "--check", *words)
                    self.assertIn(self.proxy.url + route.replace("gemini-", model), output)
                    self.assertRegex(output, r"ok: \S+ answered .*: Echo: Say hello in one word\.")

    def test_what_goes_wrong_is_told_in_every_dialect(self) -> None:
        for client in ("home-assistant", "gemini-cli"):
            self.fake.script(MESSAGES, Answer(400, body={"error": {"message": "made up reason"}}))
            code, output = self.run_setup(client, "--check", "--model", "claude-sonnet-4.6")
            self.assertEqual(code, 1)
            self.assertIn("answered 400: made up reason", output)

    def test_an_answer_that_breaks_off_is_no_success(self) -> None:
        real = cp.TRIALS
        for client, dialect in (("home-assistant", "ollama"), ("gemini-cli", "gemini")):
            path, body, place = real[dialect]
            broken = body.replace("in one word.", "@@events=9 cut=3@@")
            self.assertNotEqual(broken, body)
            with unittest.mock.patch.dict(cp.TRIALS, {dialect: (path, broken, place)}):
                code, output = self.run_setup(client, "--check")
            self.assertEqual(code, 1, output)
            self.assertIn("error: ", output)


class TextTest(SetupCase):
    def test_a_client_without_a_settings_file_gets_a_few_lines(self) -> None:
        for client in NO_FILE:
            lines = self.setup(client, "--key", "made-up-key").strip().splitlines()
            self.assertLessEqual(len(lines), 4, client)
            self.assertIn("made-up-key", "\n".join(lines))
            code, output = self.run_setup(client, "--write", "--yes")
            self.assertEqual(code, 2, output)

    def test_other_names_of_clients_are_known(self) -> None:
        for name, client in (("roo", "cline"), ("kilo", "cline"), ("claude", "claude-code"),
                             ("gemini", "gemini-cli")):
            self.assertEqual(self.setup(name), self.setup(client))
        for name, client in cp.OTHER_NAMES.items():
            self.assertIn(client, cp.CLIENTS)
            self.assertNotIn(name, cp.CLIENTS)
        code, output = self.run_setup("cursor")
        self.assertEqual((code, "its own servers" in output), (2, True))

    def test_continue_is_told_what_a_model_can_do(self) -> None:
        lines = self.setup("continue").splitlines()
        chat = [line for line in lines if "roles: [chat" in line]
        self.assertTrue(chat)
        for line in chat:
            self.assertRegex(line, r"capabilities: \[tool_use(, image_input)?\]")
        blind = cp.places_of(cp.Model("m", supports={"vision": False}))
        self.assertEqual((blind["vision"], blind["images"]), ("false", ""))

    def test_the_page_is_told_what_setup_prints(self) -> None:
        listed = self.proxy.get("/connect").json["clients"]
        self.assertEqual([one["name"] for one in listed], list(cp.CLIENTS))
        for client in cp.CLIENTS:
            told = self.proxy.get("/connect/%s?shell=bash" % client).json
            output = self.setup(client, "--key", told["key"], "--url", self.proxy.url)
            for step in told["steps"]:
                self.assertIn(step["text"], output)
            self.assertIn(told["note"], output)
            self.assertTrue(told["steps"] or told["note"])

    def test_json_has_a_line_for_each_key(self) -> None:
        for client, recipe in cp.CLIENTS.items():
            if any(place.endswith(".json") for place, _, _ in recipe.files):
                text = self.setup(client)
                self.assertRegex(text, r'(?m)^ +"[^"]+": .*$')
                self.assertNotRegex(text, r'(?m)^ *"[^"]+": .*, "')

    def test_every_model_of_the_account_is_offered_with_its_limits(self) -> None:
        chat = {m["id"] for m in self.proxy.get("/v1/models").json["data"] if m["kind"] == "chat"}
        self.setup("vscode", "--write", "--yes")
        (group,) = json.loads(self.read(self.file_of("vscode")))
        self.assertEqual({m["id"] for m in group["models"]}, chat)
        model = next(m for m in group["models"] if m["id"] == "gpt-5.3-codex")
        self.assertEqual((model["maxInputTokens"], model["maxOutputTokens"], model["toolCalling"]),
                         (272000, 128000, True))
        self.assertEqual(model["url"], self.proxy.url + "/v1/chat/completions")
        self.assertEqual(model["requestHeaders"], {"Authorization": "Bearer dummy"})
        self.setup("zed", "--write", "--yes")
        zed = json.loads(self.read(self.file_of("zed")))
        provider = zed["language_models"]["openai_compatible"]["github_copilot_proxy"]
        self.assertEqual({m["name"] for m in provider["available_models"]}, chat)
        self.assertEqual(zed["agent"]["default_model"]["provider"], "github_copilot_proxy")

    def test_opencode_is_told_what_a_model_sees(self) -> None:
        self.setup("opencode", "--write", "--yes")
        made = json.loads(self.read(self.file_of("opencode")))
        for model in made["provider"]["copilot_proxy"]["models"].values():
            kinds = ["text", "image"] if model["attachment"] else ["text"]
            self.assertEqual(model["modalities"], {"input": kinds, "output": ["text"]})

    def test_zeds_key_has_no_name_that_this_program_reads(self) -> None:
        name = cp.CLIENTS["zed"].env.partition("=")[0]
        self.assertNotIn(name, [v for option in cp.OPTIONS for v in option.variables])

    def test_a_model_that_is_about_to_end_is_not_chosen(self) -> None:
        models = [cp.Model("gpt-5-mini", entry={"info_messages": [
            {"code": "retirement", "message": "ends on 1 May"}]}), cp.Model("gpt-5.4-mini")]
        recipe = cp.CLIENTS["curl"]
        self.assertEqual(cp.pick_model(models, *recipe.main), models[1])
        self.assertEqual(cp.pick_model(models[:1], *recipe.main), models[0])

    def test_curl_names_a_model_of_the_account(self) -> None:
        named = re.findall(r'"model": "([^"]+)"', self.setup("curl", "--shell", "bash"))
        self.assertEqual(named, ["gpt-5-mini"])


class MergeTest(SetupCase):
    def test_other_providers_of_vs_code_stay_and_so_does_a_key_that_it_stored(self) -> None:
        path = self.file_of("vscode")
        other = {"name": "Mine", "vendor": "openai", "apiKey": "${input:chat.lm.secret.1}"}
        kept = {"name": "copilot_proxy", "apiKey": "${input:chat.lm.secret.2}", "models": []}
        self.put(path, json.dumps([other, kept]))
        self.setup("vscode", "--write", "--yes")
        first, second = json.loads(self.read(path))
        self.assertEqual(first, other)
        self.assertEqual(second["apiKey"], kept["apiKey"])
        self.assertTrue(second["models"])

    def test_gemini_cli_keeps_other_variables(self) -> None:
        path = self.file_of("gemini-cli", 1)
        self.put(path, "# mine\nGEMINI_API_KEY=real\nOTHER=1\n")
        self.setup("gemini-cli", "--write", "--yes")
        lines = self.read(path).splitlines()
        self.assertIn("OTHER=1", lines)
        self.assertEqual([line for line in lines if line.startswith("GEMINI_API_KEY")],
                         ['GEMINI_API_KEY="dummy"'])

    def test_a_retired_model_in_zeds_settings_is_found(self) -> None:
        self.setup("zed", "--write", "--yes")
        environ = {"HOME": self.home}
        path = self.file_of("zed")
        text = re.sub(r'"model": "[^"]+"', '"model": "gpt-99"', self.read(path))
        self.put(path, text)
        with unittest.mock.patch.dict(os.environ, {"HOME": self.home, "APPDATA": ""}):
            found = list(cp.models_in_settings(cp.CLIENTS["zed"], environ))
        self.assertEqual([name for _, name in found], ["gpt-99"])


def table_row(name: str, recipe: Any) -> str:
    """A client's row in the README, made of what `setup` knows of it."""
    files = [place.rpartition(":")[2].replace("//", "/") for place, _, _ in recipe.files]
    written = ", ".join("`%s`" % file for file in files)
    if not files and recipe.env:
        written = "nothing: prints variables"
    elif not files and recipe.run:
        written = "nothing: prints a request"
    elif not files:
        written = "nothing: says what to enter"
    return "| %s | `setup %s` | %s |" % (recipe.about, name, written)


@unittest.skipUnless(sys.platform == "linux", "the README names the paths of Linux")
class ReadmeTest(unittest.TestCase):
    def test_the_table_of_clients_is_what_setup_knows(self) -> None:
        text = document("README.md").split("\n## Clients\n")[1].split("\n### ")[0]
        shown = [line for line in text.splitlines() if "| `setup " in line]
        self.assertEqual(shown, [table_row(*one) for one in cp.CLIENTS.items()])


if __name__ == "__main__":
    unittest.main()
