"""Conversations mixed of everything that clients send: known, old, foreign and made-up kinds
(sections 7 to 10).

A model that is switched in mid-session, an alias or a sloppy client brings any item to any route.
Whatever the mixture: the request is understood or refused with 400, the upstream takes what is
sent, and a text that did not go up is named as a loss.
"""
from __future__ import annotations

import copy
import json
import random
import unittest
from typing import Any, Iterator

from support import SLOW, cp
from fake_upstream import DIALECTS as CHECKED
from fake_upstream import Ask, FakeUpstream, Recorded, Refuse, default_models, read_prompt, \
    run_checks

ROUNDS = 20_000 if SLOW else 300
PNG = "iVBORw0KGgo="
URL = "data:image/png;base64," + PNG
IMAGE: Any = {"type": "base64", "media_type": "image/png", "data": PNG}
MODELS = ("claude-opus-4.7", "claude-sonnet-4.6", "claude-haiku-4.5", "gpt-4.1", "gpt-5-mini",
          "gpt-5.3-codex", "gemini-3.1-pro-preview", "grok-code-fast-1")
CLIENTS: Any = (cp.CHAT, cp.RESPONSES, cp.MESSAGES, cp.GEMINI, cp.OLLAMA)
ENTRIES = {entry["id"]: entry for entry in reversed(default_models())}
SEALS = FakeUpstream.__new__(FakeUpstream)      # its key alone: no port is opened
SEALS.key = b"fake sealing key"


class Checks:
    """The fake's checks of a body, without its server."""

    #: repaired when the upstream refuses it: nobody else can tell a signature's maker
    lenient = {"signatures"}
    compacts = gemini_needs_opaque = False
    is_sealed, seal, key = FakeUpstream.is_sealed, FakeUpstream.seal, SEALS.key

    def refusal(self, plan: Any) -> Any:
        """Why the service would refuse the plan's body, an UpstreamError; None when it takes it."""
        body, path = json.loads(cp.dumps(plan.edit.body)), plan.upstream.path
        headers = {"anthropic-version": "x", "anthropic-beta": ",".join(
            plan.upstream.betas(body)) or "interleaved-thinking-"}
        record = Recorded("POST", path, "", headers, b"", body, 1)
        ask = Ask(self, record, body, ENTRIES[body["model"]])  # type: ignore[arg-type]
        try:
            run_checks(CHECKED[path].checks, ask)
            read_prompt(CHECKED[path], body)
        except Refuse as refusal:
            about = refusal.body["error"] if isinstance(refusal.body, dict) else {}
            error = cp.UpstreamError(str(about.get("message", refusal.body)), refusal.status,
                                     about.get("code"), about.get("param"))
            error.answered = True
            return error
        return None

    def last_refusal(self, plan: Any) -> str:
        """Why the service refuses it in the end, after the repairs; "" when it takes it."""
        memory = cp.LearnedRepairs()
        memory.prepare(plan)
        for _ in range(cp.MAX_REPAIRS):
            error = self.refusal(plan)
            if error is None or str(error).endswith(UNCERTAIN):
                return ""
            try:
                if not memory.repair(plan, error):
                    return str(error)
            except cp.BadRequest:         # what is dropped was demanded
                return ""
        return ""


def blocks(w: str, c: str) -> list[Any]:
    """Every kind of content part, of all dialects, with the text `w` and the call id `c`."""
    return [
        {"type": "text", "text": w}, {"type": "input_text", "text": w},
        {"type": "output_text", "text": w, "annotations": []},
        {"type": "text", "text": w, "cache_control": {"type": "ephemeral", "scope": "global"}},
        {"type": "text", "text": w, "citations": [{"type": "char_location", "cited_text": "x"}]},
        {"type": "refusal", "refusal": w}, w, {"text": w},
        {"type": "image_url", "image_url": {"url": URL, "detail": "original"}},
        {"type": "image_url", "image_url": URL}, {"type": "input_image", "image_url": URL},
        {"type": "input_image", "image_url": URL, "detail": "original"},
        {"type": "image", "source": IMAGE},
        {"type": "image", "data": PNG, "mimeType": "image/png"},
        {"type": "file", "file": {"filename": "a.txt", "file_data": "data:text/plain;base64,eA=="}},
        {"type": "input_file", "filename": "a.pdf",
         "file_data": "data:application/pdf;base64,JVBERi0="},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": w}},
        {"type": "document", "source": {"type": "content", "content": w}},
        {"type": "document", "source": {"type": "content",
                                        "content": [{"type": "text", "text": w}]}},
        {"type": "document", "title": "t", "source": {
            "type": "base64", "media_type": "application/pdf", "data": "JVBERi0="}},
        {"type": "search_result", "source": "s", "title": w,
         "content": [{"type": "text", "text": "x" * 3000 + w}]},
        {"type": "tool_reference", "tool_name": w}, {"type": "container_upload", "file_id": w},
        {"type": "mcp_tool_use", "id": c, "name": "n", "server_name": "s", "input": {"a": w}},
        {"type": "mcp_tool_result", "tool_use_id": c, "content": [{"type": "text", "text": w}]},
        {"type": "server_tool_use", "id": c, "name": "web_search", "input": {"query": w}},
        {"type": "web_search_tool_result", "tool_use_id": c, "content": [
            {"type": "web_search_result", "title": w, "url": "u", "encrypted_content": "e"}]},
        {"type": "code_execution_tool_result", "tool_use_id": c, "content": {"stdout": w}},
        {"type": "compaction", "content": w}, {"type": "fallback", "from": w},
        {"type": "made_up", "stuff": {"deep": [w]}}, {"kind": w}, {},
        {"type": "tool_use", "id": c, "name": "f", "input": {"a": w}},
        {"type": "tool_use", "id": c, "name": "f", "input": {}, "caller": {"type": "direct"}},
        {"type": "tool_result", "tool_use_id": c, "content": w},
        {"type": "tool_result", "tool_use_id": c}, {"type": "tool_result", "content": w},
        {"type": "tool_result", "tool_use_id": c, "is_error": True, "content": [
            {"type": "text", "text": w, "cache_control": {"type": "ephemeral"}},
            {"type": "image", "source": IMAGE}, {"type": "tool_reference", "tool_name": "t"}]},
        {"type": "thinking", "thinking": "hm", "signature": ""},
        {"type": "thinking", "thinking": "", "signature": SEALS.seal("thinking", "")},
        {"type": "redacted_thinking", "data": "e"},
        {"type": "summary_text", "text": w}, {"type": "reasoning_text", "text": w},
        {"type": "text", "text": ""}, {"type": "text", "text": " \n"},
        {"type": "text", "text": None},
    ]


def own_items(w: str, c: str) -> list[Any]:
    """Items that no message holds: those of Responses, old and invented ones."""
    call, result = {"call_id": c}, {"call_id": c, "output": w}
    sealed = SEALS.seal("reasoning", "s")
    return [
        dict(call, type="function_call", name="f", arguments='{"a": "%s"}' % w, id="fc_1"),
        dict(call, type="function_call", name="f", namespace="mcp__db", arguments="{"),
        dict(result, type="function_call_output", id="x"),
        dict(call, type="function_call_output", output=[{"type": "input_text", "text": w},
                                                        {"type": "input_image", "image_url": URL}]),
        dict(call, type="function_call_output", output=[]), dict(call, type="function_call_output"),
        dict(call, type="custom_tool_call", name="g", input=w),
        dict(result, type="custom_tool_call_output"),
        dict(call, type="local_shell_call", action={"type": "exec", "command": [w]}),
        {"type": "local_shell_call", "id": c, "action": {"type": "exec", "command": [w]}},
        dict(result, type="local_shell_call_output"),
        {"type": "local_shell_call_output", "id": c, "output": w},
        dict(call, type="shell_call", action={"commands": [w]}),
        dict(call, type="shell_call_output", output=[{"stdout": w, "stderr": ""}]),
        dict(call, type="apply_patch_call", operation={"type": "delete_file", "path": w}),
        dict(call, type="apply_patch_call_output", status="completed", output=w),
        dict(call, type="computer_call", action={"type": "type", "text": w}),
        dict(call, type="computer_call_output", output={"type": "computer_screenshot",
                                                        "image_url": URL}),
        dict(call, type="tool_search_call", execution="client", arguments={"query": w}),
        dict(call, type="tool_search_output", execution="client", tools=[
            {"type": "function", "name": w, "parameters": {"type": "object"}}]),
        {"type": "reasoning", "id": "rs", "summary": [{"type": "summary_text", "text": "hm"}],
         "encrypted_content": sealed},
        {"type": "reasoning", "summary": [], "encrypted_content": sealed},
        {"type": "reasoning", "summary": []}, {"type": "reasoning"},
        {"type": "item_reference", "id": "x"},
        {"type": "web_search_call", "id": "ws", "status": "completed", "action": {
            "type": "search", "query": w}},
        {"type": "file_search_call", "id": "fs", "queries": [w], "results": None},
        {"type": "code_interpreter_call", "id": "ci", "code": w},
        {"type": "image_generation_call", "id": "ig", "result": PNG},
        {"type": "mcp_list_tools", "id": "m", "server_label": w, "tools": []},
        {"type": "mcp_approval_request", "id": "m", "name": w, "arguments": "{}"},
        {"type": "mcp_approval_response", "approval_request_id": "m", "approve": True, "reason": w},
        {"type": "mcp_call", "id": "m", "name": "n", "server_label": "s", "output": w},
        {"type": "ghost_snapshot", "ghost_commit": {"id": w}},
        {"type": "additional_tools", "role": "developer", "tools": [
            {"type": "namespace", "name": "functions", "tools": [
                {"type": "custom", "name": w}, {"type": "function", "name": "h" + w}]}]},
        {"type": "compaction", "encrypted_content": sealed},
        {"type": "made_up", "body": w}, {"type": "made_up_call", "call_id": c, "input": w},
        {"type": "made_up_output", "call_id": c, "output": [w]}, w,
    ]


def turns(w: str, c: str, chance: random.Random) -> list[Any]:
    """Messages of all dialects whose parts are chosen by chance."""
    def some() -> Any:
        return chance.sample(blocks(w, c), chance.choice((1, 1, 2, 3)))
    rules = [block for block in some() if "refusal" not in block]     # a model's word
    function = {"name": "f", "arguments": '{"a": "%s"}' % w}
    call = {"id": c, "type": "function", "function": function}
    custom = {"id": c, "type": "custom", "custom": {"name": "g", "input": w}}
    return [
        {"role": "user", "content": w}, {"role": "user", "content": some()},
        {"role": "user", "content": some()}, {"role": "assistant", "content": some()},
        {"role": "assistant", "content": some()}, {"role": "assistant", "content": w},
        {"role": "system", "content": w}, {"role": "developer", "content": rules},
        {"role": "system", "content": rules}, {"role": "system", "content": []},
        {"role": "user", "content": []}, {"role": "user", "content": ""},
        {"role": "user", "content": " \n"}, {"role": "assistant", "content": None},
        {"role": "user", "content": some()[0]}, {"role": "user"},
        {"role": "assistant", "content": [], "tool_calls": [call]},
        {"role": "assistant", "content": w, "refusal": None,
         "tool_calls": [call, dict(custom, id=c + "b")]},
        {"role": "assistant", "content": None, "tool_calls": [call, dict(call)]},
        {"role": "assistant", "content": None, "tool_calls": [custom]},
        {"role": "assistant", "content": some(), "tool_calls": [call]},
        {"role": "assistant", "content": w, "tool_calls": [], "annotations": []},
        {"role": "assistant", "content": None, "function_call": function},
        {"role": "function", "name": "f", "content": w},
        {"role": "tool", "tool_call_id": c, "content": w}, {"role": "tool", "content": w},
        {"role": "tool", "tool_call_id": c, "content": [
            block for block in some() if "tool_use" not in str(block)
            and "tool_result" not in str(block)]},               # no result holds a result
        {"role": "tool", "tool_call_id": c, "content": []},
        {"role": "assistant", "content": w, "reasoning_content": "hm", "reasoning_opaque": "e"},
        {"role": "assistant", "refusal": w, "content": None},
        {"type": "message", "role": "assistant", "id": "m", "content": some(), "status": "x"},
        {"type": "message", "role": "user", "content": some()},
        {"type": "message", "role": "developer", "content": w},
        {"role": "assistant", "phase": "final", "content": [{"type": "output_text", "text": w}]},
    ]


def gemini_turns(w: str, c: str, chance: random.Random) -> list[Any]:
    parts = [
        {"text": w}, {"text": "hm", "thought": True}, {"inlineData": {"mimeType": "image/png",
                                                                     "data": PNG}},
        {"inline_data": {"mime_type": "image/png", "data": PNG}},
        {"functionCall": {"name": "f", "args": {"a": w}, "id": c}},
        {"functionCall": {"name": "f", "args": {"a": w}}, "thoughtSignature": "eA=="},
        {"functionResponse": {"name": "f", "id": c, "response": {"output": w}}},
        {"function_response": {"name": "f", "response": {"result": w}}},
        {"functionResponse": {"name": "f", "response": w}},
        {"executableCode": {"language": "PYTHON", "code": w}},
        {"codeExecutionResult": {"outcome": "OUTCOME_OK", "output": w}},
        {"toolCall": {"id": c, "toolType": w}}, {"madeUp": w}, {"text": ""}, {}, {"text": None},
        {"fileData": {"fileUri": w}},
    ]
    some = chance.sample(parts, chance.choice((1, 1, 2, 3)))
    return [{"role": role, "parts": some} for role in ("user", "model", "function", "system")]


def ollama_turns(w: str, c: str, chance: random.Random) -> list[Any]:
    call = {"function": {"name": "f", "arguments": {"a": w}}}
    return [
        {"role": "user", "content": w}, {"role": "user", "content": w, "images": [PNG]},
        {"role": "system", "content": w}, {"role": "assistant", "content": w, "thinking": "hm"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "assistant", "tool_calls": [dict(call, id=c), call]},
        {"role": "tool", "tool_name": "f", "content": w},
        {"role": "tool", "content": w, "tool_call_id": c}, {"role": "made_up", "content": w},
        {"role": "user", "content": chance.sample(blocks(w, c), 2)},
        {"role": "user", "content": ""}, {"role": "user"},
    ]


SCHEMA: Any = {"type": "object", "properties": {"a": {"type": "string"}}, "$schema": "x"}
#: whether the service knows a document of parts, nobody has seen
UNCERTAIN = ".document.source: only base64 sources are supported"
TOOLS: Any = (
    {"type": "function", "function": {"name": "f", "parameters": SCHEMA, "strict": None}},
    {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True},
    {"name": "f", "input_schema": SCHEMA, "cache_control": {"type": "ephemeral"}},
    {"type": "custom", "name": "f", "input_schema": SCHEMA, "defer_loading": True},
    {"type": "custom", "custom": {"name": "g"}}, {"type": "function", "function": {"name": "h"}},
    {"type": "custom", "name": "g", "format": {"type": "grammar", "syntax": "lark",
                                              "definition": "start: x"}},
    {"type": "namespace", "name": "mcp__db", "tools": [{"type": "function", "name": "q"}]},
    {"type": "tool_search", "execution": "client"}, {"type": "tool_search"},
    {"type": "bash_20250124", "name": "bash"}, {"type": "memory_20250818", "name": "memory"},
    {"type": "text_editor_20250728", "name": "str_replace_based_edit_tool"},
    {"type": "computer_20250124", "name": "computer", "display_width_px": 1},
    {"type": "web_search"}, {"type": "web_search_20250305", "name": "web_search", "max_uses": 5},
    {"type": "code_execution_20250825", "name": "code_execution"}, {"type": "local_shell"},
    {"type": "image_generation"}, {"type": "mcp", "server_label": "x"}, {"type": "made_up"},
    {"type": "apply_patch"}, {"type": "shell"}, {"googleSearch": {}}, {"codeExecution": {}},
    {"functionDeclarations": [{"name": "f", "parameters": {"type": "OBJECT"}}]})
CHOICES: Any = ("auto", "none", "required", "any", {"type": "auto"}, {"type": "any"}, None,
                {"type": "tool", "name": "f"}, {"type": "function", "name": "f"},
                {"type": "function", "function": {"name": "f"}}, {"type": "none"},
                {"type": "custom", "name": "g"}, {"type": "code_execution"},
                {"type": "function", "name": "q", "namespace": "mcp__db"},
                {"type": "allowed_tools", "mode": "auto", "tools": [
                    {"type": "function", "name": "f"}]})
#: fields of all dialects
FIELDS: Any = (
    ("parallel_tool_calls", (True, False)), ("stop", ("x", ["\n"], list("abcde"))),
    ("stop_sequences", (["x"], [" "])), ("temperature", (0, 1, 2)), ("top_p", (0.5,)),
    ("max_tokens", (1, 100, 50_000, None)), ("max_completion_tokens", (100,)),
    ("max_output_tokens", (1,)), ("reasoning_effort", ("none", "high", "minimal", "max")),
    ("reasoning", ({"effort": "low", "summary": "auto"}, {"effort": "none"}, None)),
    ("thinking", ({"type": "enabled", "budget_tokens": 2000}, {"type": "disabled"},
                  {"type": "adaptive"})), ("output_config", ({"effort": "max"},)),
    ("system", ("s", [{"type": "text", "text": "s"}], [])), ("instructions", ("i", None)),
    ("response_format", ({"type": "json_object"}, {"type": "json_schema", "json_schema": {
        "name": "n", "schema": SCHEMA}})), ("verbosity", ("low",)), ("service_tier", ("auto",)),
    ("metadata", ({"user_id": "u"},)), ("context_management", ({"edits": []},)),
    ("logprobs", (True,)), ("user", ("u",)), ("store", (True,)), ("seed", (1,)), ("made_up", (1,)))


def of_client(client: Any, w: str, c: str, chance: random.Random) -> list[Any]:
    """All items that could stand in this client's conversation."""
    if client is cp.GEMINI:
        return gemini_turns(w, c, chance)
    if client is cp.OLLAMA:
        return ollama_turns(w, c, chance)
    return turns(w, c, chance) + own_items(w, c)


def turns_key(client: Any) -> str:
    return "contents" if client is cp.GEMINI else str(client.turns_key or "messages")


def mixture(client: Any, chance: random.Random) -> tuple[dict[str, Any], list[str]]:
    """(a body, the texts in it)"""
    words: list[str] = []
    items = []
    for at in range(chance.choice((1, 2, 3, 5, 9))):
        words.append("word%dx" % at)
        call_id = chance.choice(("c1", "c1", "c2", "call|odd id", "c" * 80))
        items.append(chance.choice(of_client(client, words[-1], call_id, chance)))
    body: dict[str, Any] = {"model": "m", "stream": chance.random() < 0.5, turns_key(client): items}
    if client is cp.MESSAGES and chance.random() < 0.9:
        body["max_tokens"] = 1000
    if chance.random() < 0.5:
        body["tools"] = copy.deepcopy(chance.sample(TOOLS, chance.choice((0, 1, 2, 4))))
    if chance.random() < 0.3:
        body["tool_choice"] = copy.deepcopy(chance.choice(CHOICES))
    for name, values in chance.sample(FIELDS, chance.choice((0, 0, 1, 2))):
        body.setdefault(name, copy.deepcopy(chance.choice(values)))
    return copy.deepcopy(body), words


def ways(client: Any, model: Any) -> Iterator[Any]:
    """The dialects in which this client's requests may go to the model."""
    for upstream in cp.DIALECTS.values():
        if upstream.path in model.endpoints and upstream.path:
            yield upstream


class MixtureCase(unittest.TestCase):
    checks = Checks()

    def plan(self, client: Any, upstream: Any, model: Any, body: Any, by_hub: bool = False) -> Any:
        """The plan, None for a request that is refused; any other exception is a crash."""
        body["model"] = model.id
        client.interaction(body)
        client.has_images(body)
        try:
            return cp.Plan.make(client, upstream, body, model, 1, "k", by_hub)
        except cp.ProxyError as error:
            self.assertEqual(error.status, 400, error)
            return None

    def look(self, client: Any, upstream: Any, model: Any, body: Any, words: list[str],
             by_hub: bool = False) -> bool:
        """Check one request on one way; was it sent?"""
        plan = self.plan(client, upstream, model, copy.deepcopy(body), by_hub)
        if plan is None:
            return False
        refusal = self.checks.last_refusal(plan)
        text = json.dumps(plan.edit.body)
        self.assertEqual(refusal, "", "sent: " + text)
        gone = [word for word in words if word in json.dumps(body) and word not in text]
        narrows = isinstance(body.get("tool_choice"), dict) and "tools" in body["tool_choice"]
        if gone and not narrows:                # the other tools go because the client says so
            self.assertTrue(plan.edit.losses, "%s went, sent: %s" % (gone, text))
        return True


class ConversationTest(MixtureCase):
    """What the mixtures found, each by itself."""

    def sent(self, client: str, upstream: str, model: str, *items: Any, **more: Any) -> Any:
        """(the upstream's body, the losses)"""
        dialect = cp.DIALECTS[client]
        body = dict({"max_tokens": 1000, dialect.turns_key: list(items)}, **more)
        plan = self.plan(dialect, cp.DIALECTS[upstream], cp.Model.from_entry(ENTRIES[model]),
                         copy.deepcopy(body))
        self.assertIsNotNone(plan)
        self.assertEqual(self.checks.last_refusal(plan), "")
        self.assertEqual(plan.repairs.names, [])
        return plan.edit.body, plan.edit.losses

    def test_an_empty_conversation_is_refused_here(self) -> None:
        for client, upstream, model in (
                ("messages", "messages", "claude-opus-4.7"),
                ("chat", "messages", "claude-opus-4.7"),
                ("responses", "responses", "gpt-5.3-codex"), ("chat", "responses", "gpt-5.3-codex"),
                ("chat", "chat", "claude-haiku-4.5"), ("messages", "chat", "claude-haiku-4.5")):
            for item in ({"role": "user", "content": []}, {"role": "user", "content": " \n"},
                         {"role": "assistant", "content": [{"type": "thinking", "thinking": "x"}]}):
                with self.subTest(client=client, upstream=upstream, item=item):
                    dialect = cp.DIALECTS[client]
                    plan = self.plan(dialect, cp.DIALECTS[upstream],
                                     cp.Model.from_entry(ENTRIES[model]),
                                     {"max_tokens": 9, dialect.turns_key: [copy.deepcopy(item)]})
                    if plan is not None:           # white space is something to some
                        self.assertEqual(self.checks.last_refusal(plan), "")

    def test_calls_and_results_in_a_turn_of_the_wrong_role(self) -> None:
        call = {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}}
        result = {"type": "tool_result", "tool_use_id": "c1", "content": "found"}
        for client in ("chat", "responses", "messages"):
            for upstream, model in (("messages", "claude-opus-4.7"), ("chat", "gpt-4.1"),
                                    ("responses", "gpt-5.3-codex")):
                for roles in (("user", "user"), ("assistant", "assistant"), ("user", "assistant"),
                              ("assistant", "user")):
                    with self.subTest(client=client, upstream=upstream, roles=roles):
                        body, losses = self.sent(
                            client, upstream, model, {"role": "user", "content": "go"},
                            {"role": roles[0], "content": [call]},
                            {"role": roles[1], "content": [result]},
                            {"role": "user", "content": "on"})
                        self.assertIn("found", json.dumps(body))
                        self.assertNotIn("interrupted", json.dumps(body))
                        self.assertNotIn("not part of", json.dumps(body))

    def test_an_answer_of_messages_that_is_replayed_whole(self) -> None:
        answer = {"id": "msg_1", "type": "message", "role": "assistant", "model": "m",
                  "content": [{"type": "text", "text": "hello"}], "stop_reason": "end_turn",
                  "stop_sequence": None, "usage": {"input_tokens": 1, "output_tokens": 1}}
        body, losses = self.sent("messages", "messages", "claude-opus-4.7",
                                 {"role": "user", "content": "go"}, answer,
                                 {"role": "user", "content": "on"})
        self.assertEqual(set(body["messages"][1]), {"role", "content"})
        self.assertEqual(losses, [])

    def test_a_developer_turn_for_claude(self) -> None:
        for upstream, model in (("messages", "claude-opus-4.7"), ("chat", "gpt-4.1")):
            body, _ = self.sent("messages", upstream, model, {"role": "user", "content": "go"},
                                {"role": "developer", "content": "be brief"})
            self.assertIn("be brief", json.dumps(body))

    def test_a_refusal_in_a_history_goes_to_every_model(self) -> None:
        for client in ("chat", "responses", "messages"):
            for upstream, model in (("messages", "claude-opus-4.7"), ("chat", "grok-code-fast-1"),
                                    ("responses", "gpt-5.3-codex"), ("chat", "gpt-4.1")):
                with self.subTest(client=client, upstream=upstream, model=model):
                    body, _ = self.sent(
                        client, upstream, model, {"role": "user", "content": "go"},
                        {"role": "assistant", "content": None, "refusal": "I may not"},
                        {"role": "user", "content": "on"})
                    self.assertIn("I may not", json.dumps(body))

    def test_an_image_in_the_shape_of_mcp(self) -> None:
        image = {"type": "image", "data": PNG, "mimeType": "image/png"}
        for client in ("chat", "responses", "messages"):
            for upstream, model in (("messages", "claude-opus-4.7"), ("chat", "gpt-4.1"),
                                    ("responses", "gpt-5.3-codex")):
                with self.subTest(client=client, upstream=upstream):
                    body, _ = self.sent(client, upstream, model,
                                        {"role": "user", "content": [image]})
                    self.assertIn(PNG, json.dumps(body))
                    self.assertNotIn("mimeType", json.dumps(body))

    def test_a_file_in_a_turn_of_the_models_is_named_as_a_loss(self) -> None:
        for block in ({"type": "image", "source": IMAGE}, {"type": "document", "source": {
                "type": "text", "media_type": "text/plain", "data": "notes"}}):
            for upstream, model in (("chat", "gpt-4.1"), ("responses", "gpt-5.3-codex")):
                body, losses = self.sent(
                    "messages", upstream, model, {"role": "user", "content": "go"},
                    {"role": "assistant", "content": [block]}, {"role": "user", "content": "on"})
                self.assertNotIn({}, body.get("input") or body.get("messages"))
                self.assertIn("file", dict(losses))

    def test_gemini_tools_for_other_routes(self) -> None:
        for client, model in (("chat", "gpt-4.1"), ("responses", "gpt-5.3-codex"),
                              ("messages", "claude-opus-4.7")):
            body, losses = self.sent(client, client, model, {"role": "user", "content": "go"},
                                     tools=[{"googleSearch": {}}])
            self.assertNotIn("tools", body)
            self.assertIn("tools", dict(losses))

    def test_two_calls_of_one_chat_message_with_one_id(self) -> None:
        call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        body, _ = self.sent("chat", "chat", "gpt-4.1", {"role": "user", "content": "go"},
                            {"role": "assistant", "content": None,
                             "tool_calls": [call, copy.deepcopy(call)]},
                            {"role": "tool", "tool_call_id": "c1", "content": "first"},
                            {"role": "tool", "tool_call_id": "c1", "content": "second"})
        ids = [made["id"] for made in body["messages"][1]["tool_calls"]]
        self.assertEqual(len(set(ids)), 2)
        self.assertEqual([(item["tool_call_id"], item["content"]) for item in body["messages"][2:]],
                         list(zip(ids, ("first", "second"))))

    def test_an_odd_id_of_a_call_whose_result_has_another_shape(self) -> None:
        body, _ = self.sent("messages", "messages", "claude-opus-4.7",
                            {"role": "user", "content": "go"},
                            {"role": "assistant", "content": [
                                {"type": "tool_use", "id": "call|odd", "name": "f", "input": {}}]},
                            {"role": "tool", "tool_call_id": "call|odd", "content": "found"})
        self.assertEqual(len(body["messages"]), 3)
        self.assertNotIn("interrupted", json.dumps(body))

    def test_a_local_shell_call_with_an_id_alone(self) -> None:
        action = {"type": "exec", "command": ["ls"]}
        body, _ = self.sent("responses", "responses", "gpt-5.3-codex",
                            {"role": "user", "content": "go"},
                            {"type": "local_shell_call", "id": "ls_1", "action": action},
                            {"type": "local_shell_call_output", "id": "ls_1", "output": "found"})
        self.assertEqual([item.get("call_id") for item in body["input"][1:]], ["ls_1", "ls_1"])


class MixtureTest(MixtureCase):
    def test_mixtures(self) -> None:
        chance, sent, asked = random.Random(20261127), 0, 0
        models = [cp.Model.from_entry(ENTRIES[name]) for name in MODELS]
        for number in range(ROUNDS):
            client, model = chance.choice(CLIENTS), chance.choice(models)
            body, words = mixture(client, chance)
            for upstream in ways(client, model):
                with self.subTest(number=number, client=client.name, upstream=upstream.name,
                                  model=model.id, body=body):
                    asked += 1
                    sent += self.look(client, upstream, model, body, words,
                                      chance.random() < 0.2)
        self.assertGreater(sent, asked * 0.5)

    def test_each_kind_alone(self) -> None:
        chance = random.Random(5)
        models = [cp.Model.from_entry(ENTRIES[name]) for name in MODELS[1::2]]
        for client in CLIENTS:
            items = of_client(client, "word0x", "c1", chance)
            if client.path:
                items += [{"role": role, "content": [block]} for role in ("user", "assistant")
                          for block in blocks("word0x", "c1")]
            for item in items:
                body = {"model": "m", "max_tokens": 1000, turns_key(client): [item]}
                for model in models:
                    for upstream in ways(client, model):
                        with self.subTest(client=client.name, upstream=upstream.name,
                                          model=model.id, item=item):
                            self.look(client, upstream, model, body, ["word0x"])


if __name__ == "__main__":
    unittest.main()
