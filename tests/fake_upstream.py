"""A stand-in for GitHub and the GitHub Copilot API on one loopback port, for the tests.

    with FakeUpstream() as fake:
        ... drive the proxy with --github-url fake.url ...
        fake.wait_for(lambda: fake.count("/chat/completions") == 1)

It is a real HTTP/1.1 server and as strict as the live service is known to be: what a request may
not carry is refused with the text the service uses. What it says is deterministic (section 7).

Map: 1 Constants | 2 Refusals | 3 What a test sees and sets | 4 Catalogue | 5 Requests | 6 Headers |
7 The model | 8 Chat | 9 Responses | 10 Messages | 11 Embeddings, models | 12 GitHub |
13 FakeUpstream | 14 Server and handler | 15 Main

Steering, in rising order of bluntness: attributes of FakeUpstream (plan, lifetime_s, models, ...);
`fake.lenient` (names of checks to skip) and `fake.quirks` (oddities of answers to show); markers in
the last user text, `@@events=50 delay_ms=5 cut=10@@` (see Markers); `fake.script(path, Answer())`.
"""
from __future__ import annotations

import argparse
import base64
import collections
import functools
import gzip
import hashlib
import hmac
import http.server
import json
import re
import selectors
import socket
import socketserver
import struct
import sys
import threading
import time
import traceback
import urllib.parse
from dataclasses import dataclass, field, fields
from typing import (Any, Callable, Deque, Dict, Iterable, Iterator, List, NamedTuple, Optional, Set,
                    Tuple)

# ==== 1. Constants ================================================================================

Json = Dict[str, Any]
DEVICE_CODE, DEVICE_POLL = "/login/device/code", "/login/oauth/access_token"
AUTO, AUTO_PAIR = "/auto", "/models/session"
UPLOAD = "/copilot/chat/attachments"
EXCHANGE, USAGE, USER = "/copilot_internal/v2/token", "/copilot_internal/user", "/user"
MODELS, EMBEDDINGS = "/models", "/embeddings"
CHAT, RESPONSES = "/chat/completions", "/responses"
MESSAGES, COUNT_TOKENS = "/v1/messages", "/v1/messages/count_tokens"
GRANT_TYPE = "urn:ietf:params:oauth:grant-type:device_code"
REST_VERSION = "2025-04-01"  # X-GitHub-Api-Version of /copilot_internal/*
CREATED = 1790000000         # unix time given in every answer
OPENAI_FIELDS = ("logit_bias", "logprobs", "top_logprobs", "prediction", "metadata",
                 "prompt_cache_key", "safety_identifier", "web_search_options")
REQUIRED_HEADERS = ("copilot-integration-id", "editor-plugin-version", "user-agent",
                    "x-github-api-version", "x-request-id", "openai-intent")
MACHINE_PREFIXES = ("github_pat_", "ghs_")
FORBIDDEN_HEADERS = re.compile(
    r"(x-api-key|api-key|x-goog-api-key|cookie|origin|referer|x-app|session_id|conversation_id"
    r"|originator|openai-beta|openai-organization|anthropic-dangerous-direct-browser-access"
    r"|x-stainless-.*|x-codex-.*)$")
BETA_PREFIXES = ("interleaved-thinking-", "context-management-", "advanced-tool-use-",
                 "mid-conversation-system-")
ATTACHMENTS = "https://github.com/github-copilot/chat/attachments/"  # the one image URL let through
QUOTA_HEADER = "ent=300&ov=0.0&ovPerm=false&rem=75.5&rst=2026-12-01T00%3A00%3A00Z"
NOISE_HEADERS = {  # a relay must not pass these on
    "set-cookie": "_octo=GH1.1.1.1; path=/", "strict-transport-security": "max-age=31536000",
    "content-security-policy": "default-src 'none'"}
PREFILL = ("This model does not support assistant message prefill. "
           "The conversation must end with a user message.")
ENABLED_REFUSED = ('"thinking.type.enabled" is not supported for this model. Use '
                   '"thinking.type.adaptive" and "output_config.effort" to control thinking '
                   'behavior.')
#: oddities of answers, all seen live; shown unless removed from `fake.quirks`
QUIRKS = frozenset((
    "split_choices",         # chat, Claude: text and each call in a choice of its own, no index
    "empty_first_chunk",     # chat, others: first chunk has choices [], id "", created 0, model ""
    "changing_ids",          # responses: every event has another id of 400 characters for an item
    "changing_response_id",  # responses: created, in_progress, completed differ
    "early_done",            # responses: [DONE] before response.completed
    "no_total_tokens", "empty_output", "no_sequence_numbers"))  # responses: what completed lacks
#: further oddities, off by default: "obfuscation" (a field beside each delta), "cipher_deltas"
#: (argument deltas are ciphertext, only .done is plain), "plain_ids" (short ids), "late_names" (a
#: call's name comes after its id), "empty_usage" (chat: usage {} behind the real one)
#: codes of failures inside an answer, by the marker `code`; the first is each dialect's usual one
TOLD_CODES = ("", "rate_limited", "user_model_rate_limited:this", "model_overloaded",
              "quota_exceeded", "session_quota_exceeded", "server_error")
POLLER = getattr(selectors, "PollSelector", selectors.SelectSelector)


# ==== 2. Refusals =================================================================================

class Refuse(Exception):
    """An error answer. `body`: dict -> JSON, str -> text/plain (or HTML when it starts with <)."""

    def __init__(self, status: int, body: Any, headers: Optional[Dict[str, str]] = None) -> None:
        super().__init__(status, body)
        self.status, self.body, self.headers = status, body, headers or {}


class Gone(Exception):
    """The client hung up."""


class Drop(Exception):
    """The fake hangs up; `reset` sends RST instead of FIN."""

    def __init__(self, reset: bool = False) -> None:
        super().__init__(reset)
        self.reset = reset


def bad(message: str, code: str = "invalid_request_body", param: Optional[str] = None) -> Refuse:
    """400 in the OpenAI shape: `{"error": {"message", "code", "param"?}}`."""
    error: Json = {"message": message, "code": code}
    if param:
        error["param"] = param
    return Refuse(400, {"error": error})


def bad_message(message: str, status: int = 400, kind: str = "invalid_request_error") -> Refuse:
    """An error in the Anthropic shape, as /v1/messages answers it."""
    return Refuse(status, {"type": "error", "error": {"type": kind, "message": message},
                           "request_id": "req_vrtx_011CFake"})


def extra(path: str) -> Refuse:
    """The validator's refusal of a field it does not know, e.g. `tools.0.custom.strict: ...`."""
    return bad_message(path + ": Extra inputs are not permitted")


# ==== 3. What a test sees and sets ================================================================

@dataclass
class Recorded:
    """One request as it arrived. `headers` lower-cased; `json` None unless the body was JSON."""

    method: str
    path: str
    query: str
    headers: Dict[str, str]
    body: bytes
    json: Any
    connection: int  # number of the TCP connection, from 1


@dataclass
class Answer:
    """A scripted answer, consumed by the next request on its path.

    `status` 0 with nothing else set = go on with the normal behaviour (useful with `hold`).
    `body`: bytes, str, or any JSON value. `chunks`: raw pieces sent chunked as an event stream.
    """

    status: int = 200
    headers: Dict[str, str] = field(default_factory=dict)
    body: Any = b""
    chunks: Optional[List[bytes]] = None
    end: bool = True      # with chunks: False hangs up without the chunked terminator
    drop: str = ""        # "before": hang up after the head, body unread; "after": once all is read
    reset: bool = False   # with drop: RST instead of FIN
    hold: bool = False    # wait for fake.release() (or close) before acting; see fake.holding
    stale: bool = False   # close the connection after the answer without announcing it
    short_by: int = 0     # announce so many bytes more than are sent, then hang up

    @staticmethod
    def redirect(location: str, status: int = 302) -> Answer:
        """A redirect, which no client of this service should follow with its token."""
        return Answer(status=status, headers={"location": location})


@dataclass
class Device:
    """Settings and state of the device flow. When `outcomes` runs dry every poll is granted."""

    interval: float = 0
    expires_in: float = 900
    token: str = "ghu_fake"
    #: any of pending, slow_down, expired, denied, network, html, granted
    outcomes: Deque[str] = field(default_factory=lambda: collections.deque(["pending"]))
    strict_interval: bool = False  # True: a poll before `interval` has passed gets slow_down
    slow_down_step: float = 5      # added to `interval` by each slow_down
    codes: Dict[str, str] = field(default_factory=dict)  # device code -> client id, open ones
    issued: int = 0
    last_poll: float = 0.0


@dataclass
class Token:
    """A Copilot token this fake issued: bound to one host, one GitHub login, one span of time."""

    url: str
    github_token: str
    expires_at: float
    number: int
    revoked: bool = False


@dataclass
class Markers:
    """Behaviour asked for in the last user text: `@@name=number ...@@`. K counts text events."""

    events: int = 0      # so many text events instead of the echo
    size: int = 12       # characters in each text event
    delay_ms: int = 0    # pause before each text event
    think_ms: int = 0    # pause before the head of the answer
    cut: int = -1        # hang up after K text events (0: right after the head)
    rst: int = 0         # 1: cut with RST instead of FIN
    stall: int = -1      # silent after K text events until fake.release(), then go on
    error: int = -1      # the dialect's in-stream error after K text events, then a clean end
    fail: int = 0        # 1: error= uses response.failed / finish_reason "error" instead
    code: int = 0        # of error= and told=: a place in TOLD_CODES
    told: int = 0        # 1: the answer without stream is that error, with status 200
    noend: int = 0       # 1: end the body cleanly without the terminal events
    split: int = 0       # 1: each event goes out in two TCP sends, cut in the middle
    bytewise: int = 0    # 1: one byte in each chunk and TCP send
    crlf: int = 0        # 1: CRLF line ends
    odd: int = 0         # 1: comment lines, and `data:` without the space
    flood: int = 0       # so many CR LF TAB in the tool arguments, or one more text of that length
    length: int = 0      # 1: stop for length (finish_reason length, max_tokens, incomplete)
    reasoning: int = 1   # 0: no reasoning even where the model has it
    searches: int = 0    # so many calls of a tool named web_search, one behind the other's result
    beside: int = 0      # with searches=: 1: the first tool that is another is called beside it

    @staticmethod
    def parse(text: str) -> Markers:
        """Read the markers out of a text; an unknown name is refused, so typos do not hide."""
        known = {item.name for item in fields(Markers)}
        markers = Markers()
        for block in re.findall(r"@@(.*?)@@", text, re.S):
            for name, value in re.findall(r"(\w+)=(-?\d+)", block):
                if name not in known:
                    raise Refuse(400, "fake upstream: unknown marker " + name)
                setattr(markers, name, int(value))
        return markers


# ==== 4. Catalogue ================================================================================

GPT_EFFORT = ("low", "medium", "high", "xhigh")
IMAGE_TYPES = ["image/jpeg", "image/png", "image/webp", "image/gif"]


def make_model(model_id: str, vendor: str = "OpenAI", endpoints: Iterable[str] = (),
               window: int = 128000, prompt: int = 128000, output: int = 16384,
               multiplier: float = 1, category: str = "versatile", picker: bool = True,
               policy: str = "", efforts: Iterable[str] = (), images: int = 1,
               limits: Optional[Json] = None, **supports: Any) -> Json:
    """One entry of GET /models. No `endpoints` = the field is left out, as on older models."""
    entry: Json = {
        "id": model_id, "name": model_id.replace("-", " ").title(), "object": "model",
        "vendor": vendor, "version": model_id, "preview": "preview" in model_id,
        "model_picker_enabled": picker, "model_picker_category": category,
        "is_chat_default": model_id == "gpt-4.1", "is_chat_fallback": model_id == "gpt-4.1",
        "billing": {"is_premium": multiplier > 0, "multiplier": multiplier},
        "capabilities": {
            "type": "chat", "family": model_id, "object": "model_capabilities",
            "tokenizer": "o200k_base",
            "limits": dict({
                "max_context_window_tokens": window, "max_prompt_tokens": prompt,
                "max_output_tokens": output,
                "vision": {"max_prompt_image_size": 3145728, "max_prompt_images": images,
                           "supported_media_types": list(IMAGE_TYPES)}}, **(limits or {})),
            "supports": dict(streaming=True, tool_calls=True, parallel_tool_calls=True,
                             vision=True, structured_outputs=True, **supports)}}
    if list(endpoints):
        entry["supported_endpoints"] = list(endpoints)
    if list(efforts):
        entry["capabilities"]["supports"]["reasoning_effort"] = list(efforts)
    if policy:
        entry["policy"] = {"state": policy, "terms": "Enable access to the latest model."}
    return entry


def make_claude(model_id: str, endpoints: Iterable[str] = (CHAT, MESSAGES), output: int = 32000,
                efforts: Iterable[str] = ("low", "medium", "high"), **supports: Any) -> Json:
    """A Claude entry: non-streamed answers are capped at 16000 tokens."""
    return make_model(model_id, "Anthropic", endpoints, window=200000, prompt=168000, output=output,
                      policy="enabled", efforts=efforts, images=5,
                      limits={"max_non_streaming_output_tokens": 16000}, **supports)


def make_embedding(model_id: str) -> Json:
    """An embeddings entry: no endpoints, no picker, at most 512 inputs."""
    return {"id": model_id, "name": "Embedding V3 small", "object": "model",
            "vendor": "Azure OpenAI", "version": model_id, "preview": False,
            "model_picker_enabled": False,
            "capabilities": {"type": "embeddings", "family": model_id,
                             "object": "model_capabilities", "tokenizer": "cl100k_base",
                             "limits": {"max_inputs": 512}, "supports": {"dimensions": True}}}


def default_models() -> List[Json]:
    """A small catalogue with every kind of entry, one id twice, as live lists have.  The account
    still lists models that GitHub has retired for others; `today_models` is one that does not."""
    ws = "ws:/responses"
    budget: Json = {"min_thinking_budget": 1024, "max_thinking_budget": 32000}
    codex = make_model("gpt-5.3-codex", "OpenAI", (RESPONSES, ws), 400000, 272000, 128000,
                       category="powerful", policy="enabled", efforts=GPT_EFFORT)
    codex["billing"].update(restricted_to=["pro", "pro_plus", "max", "business", "enterprise"],
                            token_prices={"batch_size": 1000000, "default": {
                                "input_price": 175, "cache_price": 17, "output_price": 1400}})
    return [
        make_model("gpt-4.1", "Azure OpenAI", multiplier=0),
        make_model("gpt-4o", "Azure OpenAI", multiplier=0),
        codex,
        make_model("gpt-5.4", "OpenAI", (RESPONSES, ws), 400000, 272000, 128000,
                   category="powerful", policy="enabled", efforts=GPT_EFFORT),
        make_model("gpt-5-mini", "Azure OpenAI", (CHAT, RESPONSES, ws), 264000, 128000, 64000,
                   multiplier=0, category="lightweight", efforts=GPT_EFFORT[:3]),
        make_claude("claude-sonnet-4.6", adaptive_thinking=True, **budget),
        make_claude("claude-opus-4.6", adaptive_thinking=True, **budget),
        make_claude("claude-haiku-4.5", output=64000, efforts=(), **budget),
        make_claude("claude-opus-4.7", (MESSAGES,), adaptive_thinking=True),
        make_model("gemini-3.1-pro-preview", "Google", (CHAT,), output=64000, category="powerful",
                   policy="enabled", efforts=("low", "high"), images=10, min_thinking_budget=256,
                   max_thinking_budget=32000),
        make_model("grok-code-fast-1", "xAI", (CHAT,), output=64000),
        make_model("gpt-3.5-turbo", "Azure OpenAI", window=16384, prompt=12288, output=4096,
                   multiplier=0, picker=False),
        make_model("gpt-5.2", "OpenAI", (CHAT, RESPONSES, ws), policy="disabled",
                   efforts=GPT_EFFORT),
        make_embedding("text-embedding-3-small"),
        make_model("gpt-4.1", "Azure OpenAI", multiplier=0, picker=False),
    ]


def today_models() -> List[Json]:
    """What an account lists in late 2026: every family, no retired model."""
    ws = "ws:/responses"
    gpt: Json = dict(window=400000, prompt=272000, output=128000, efforts=GPT_EFFORT)
    mini = make_model("gpt-5-mini", "Azure OpenAI", (CHAT, RESPONSES, ws), 264000, 128000, 64000,
                      multiplier=0, category="lightweight", efforts=GPT_EFFORT[:3])
    mini.update(is_chat_default=True, is_chat_fallback=True)
    return [
        mini,
        make_model("gpt-5.3-codex", "OpenAI", (RESPONSES, ws), **gpt),
        make_model("gpt-5.4", "OpenAI", (RESPONSES, ws), **gpt),
        make_model("gpt-5.4-mini", "OpenAI", (RESPONSES, ws), **gpt),
        make_model("gpt-5.5", "OpenAI", (RESPONSES, ws), multiplier=7.5, **gpt),
        make_model("gpt-5.6-luna", "OpenAI", (RESPONSES, ws), **gpt),
        make_model("gpt-5.6-terra", "OpenAI", (RESPONSES, ws), **gpt),
        make_claude("claude-haiku-4.5", output=64000, efforts=()),
        make_claude("claude-sonnet-4.6", adaptive_thinking=True),
        make_claude("claude-sonnet-5", (MESSAGES,), adaptive_thinking=True),
        make_claude("claude-opus-4.8", (MESSAGES,), adaptive_thinking=True),
        make_claude("claude-opus-5", (MESSAGES,), adaptive_thinking=True),
        make_model("gemini-3.1-pro-preview", "Google", (CHAT,), output=64000, images=10),
        make_model("gemini-3.6-flash", "Google", (CHAT,), output=64000, images=10),
        make_model("grok-4.5", "xAI", (CHAT,), output=64000),
        make_model("kimi-k3", "Moonshot AI", (CHAT,), output=64000),
        make_model("mai-code-1-flash-picker", "Microsoft", (RESPONSES, ws)),
        make_embedding("text-embedding-3-small"),
    ]


# ==== 5. Requests =================================================================================
# What the checks look at. A check raises Refuse or returns; its name in the table can be put into
# `fake.lenient` to skip it.

@dataclass
class Ask:
    """A request to the Copilot API: the record, its JSON object, and the model's entry ({})."""

    fake: FakeUpstream
    record: Recorded
    body: Json
    model: Json

    @property
    def headers(self) -> Dict[str, str]:
        """Lower-cased request headers."""
        return self.record.headers

    @property
    def vendor(self) -> str:
        """Vendor as the catalogue names it."""
        return str(self.model.get("vendor", ""))

    @property
    def is_openai(self) -> bool:
        """True for OpenAI and Azure OpenAI models."""
        return "OpenAI" in self.vendor

    @property
    def supports(self) -> Json:
        """capabilities.supports of the model."""
        return dict(self.model["capabilities"].get("supports", {}))

    @property
    def limits(self) -> Json:
        """capabilities.limits of the model."""
        return dict(self.model["capabilities"].get("limits", {}))

    @property
    def name(self) -> str:
        """The model's id."""
        return str(self.model.get("id", ""))

    def is_newer_claude(self) -> bool:
        """Claude from 4.6 on: adaptive thinking, no prefill."""
        return bool(self.vendor == "Anthropic" and self.supports.get("adaptive_thinking"))

    def is_given(self, name: str) -> bool:
        """The body has the field and it is not null."""
        return self.body.get(name) is not None


Check = Callable[[Ask], None]
Checks = Tuple[Tuple[str, Check], ...]


def run_checks(checks: Checks, ask: Ask) -> None:
    """Apply a table of checks; a body of the wrong shape is a 400, not a crash of the fake."""
    for name, check in checks:
        if name in ask.fake.lenient:
            continue
        try:
            check(ask)
        except (TypeError, AttributeError, KeyError, IndexError) as error:
            raise bad("failed to parse request: %s in %s" % (type(error).__name__, name))


def forbid(*names: str) -> Check:
    """A check that none of these top-level fields is given."""
    def check(ask: Ask) -> None:
        for name in names:
            if ask.is_given(name):
                raise bad(name + " is not supported", "unsupported_value", name)
    return check


def walk(node: Any) -> Iterator[Json]:
    """Every JSON object of a conversation, tool results included, tool arguments not."""
    if isinstance(node, list):
        for item in node:
            yield from walk(item)
    elif isinstance(node, dict):
        yield node
        for key, value in node.items():
            if not (node.get("type") == "tool_use" and key == "input"):
                yield from walk(value)


def conversation(body: Json) -> List[Json]:
    """All objects of messages, input and system."""
    return list(walk([body.get("messages"), body.get("input"), body.get("system")]))


def image_urls(body: Json) -> Iterator[str]:
    """URLs of all chat and responses images."""
    for node in conversation(body):
        if node.get("type") in ("image_url", "input_image", "computer_screenshot"):
            url = node.get("image_url")
            yield str(url.get("url") if isinstance(url, dict) else url)


def text_of(content: Any) -> str:
    """The text of a content string or list of parts, reminders of Claude Code left out."""
    if isinstance(content, str):
        return content
    texts = [part.get("text", "") for part in (content if isinstance(content, list) else [])
             if part.get("type") in ("text", "input_text", "output_text")]
    return "\n".join(text for text in texts if not text.startswith("<system-reminder>"))


def check_image_urls(ask: Ask) -> None:
    """Only data: URLs, at most 20 images."""
    urls = list(image_urls(ask.body))
    if any(not url.startswith(("data:", ATTACHMENTS)) for url in urls):
        raise Refuse(400, "external image URLs are not supported")
    if len(urls) > 20:
        raise Refuse(400, "too many URL images in request (max 20)")


def check_sampling(ask: Ask) -> None:
    """OpenAI reasoning models take no temperature or top_p but 1."""
    for name in ("temperature", "top_p"):
        if ask.is_openai and ask.supports.get("reasoning_effort") \
                and ask.body.get(name) not in (None, 1):
            raise bad("Unsupported parameter: '%s' is not supported with this model." % name,
                      param=name)


def check_effort(ask: Ask) -> None:
    """`reasoning_effort` (chat) or `reasoning.effort` (responses) against the model's list."""
    effort = ask.body.get("reasoning_effort") or (ask.body.get("reasoning") or {}).get("effort")
    listed = ask.supports.get("reasoning_effort", [])
    if effort is not None and effort not in listed:
        raise bad("Unsupported value: '%s' is not supported with the '%s' model. Supported values "
                  "are: %s." % (effort, ask.name, ", ".join(map(repr, listed)) or "none"),
                  "invalid_reasoning_effort", "reasoning_effort")


# ==== 6. Headers ==================================================================================

def check_version(ask: Ask) -> None:
    """466 for API versions in `fake.refused_versions`."""
    if ask.headers.get("x-github-api-version") in ask.fake.refused_versions:
        raise Refuse(466, "bad request: the specified API version is no longer supported. You may "
                          "need to update your client to a newer version.")


def check_present(ask: Ask) -> None:
    """Headers the service asks for; a GitHub token as bearer needs no editor identity."""
    bearer = ask.fake.bearer(ask.record)
    direct = (ask.fake.direct and bearer in ask.fake.github_tokens
              or bearer.startswith(MACHINE_PREFIXES))
    if "editor-version" not in ask.headers and not direct:
        raise Refuse(400, "bad request: missing Editor-Version header for IDE auth")
    for name in REQUIRED_HEADERS:
        if not ask.headers.get(name) and not (direct and name.startswith(("copilot", "editor"))):
            raise Refuse(400, "bad request: missing %s header" % name)


def check_foreign(ask: Ask) -> None:
    """Client credentials and client identity must not come through a proxy."""
    for name in ask.headers:
        if FORBIDDEN_HEADERS.match(name):
            raise Refuse(400, "bad request: unexpected header " + name)


def check_values(ask: Ask) -> None:
    """Values of X-Initiator, Content-Type and anthropic-beta."""
    if ask.headers.get("x-initiator", "user") not in ("user", "agent"):
        raise Refuse(400, "bad request: invalid X-Initiator")
    if ask.record.method == "POST" \
            and not ask.headers.get("content-type", "").startswith("application/json"):
        raise Refuse(400, "bad request: Content-Type must be application/json")
    for value in ask.headers.get("anthropic-beta", BETA_PREFIXES[0]).split(","):
        if not value.strip().startswith(BETA_PREFIXES):
            raise bad_message("Unexpected value(s) `%s` for the `anthropic-beta` header."
                              % value.strip())


def check_machine_token(ask: Ask, text: str) -> None:
    """Tokens for programs work with the command line's identity, and with the permission."""
    is_cli = ask.headers.get("copilot-integration-id") == "copilot-developer-cli"
    if text.startswith("ghp_") or not is_cli:
        raise Refuse(400, "Personal Access Tokens are not supported for this endpoint")
    if text not in ask.fake.machine_tokens:
        raise Refuse(401, "unauthorized: invalid token")
    refusal = ask.fake.machine_tokens[text]
    if refusal:
        raise Refuse(401, refusal)


def check_bearer(ask: Ask) -> None:
    """401 unless the bearer is a live Copilot token of this fake, 421 if bound to another host."""
    fake, text = ask.fake, ask.fake.bearer(ask.record)
    if text.startswith(("ghp_", *MACHINE_PREFIXES)):
        check_machine_token(ask, text)
        return
    if fake.takes_github_token(ask.record) and text in fake.github_tokens:
        return
    token = fake.tokens.get(text)
    if token is None or token.revoked:
        raise Refuse(401, "unauthorized: invalid token")
    if token.expires_at <= fake.now():
        raise Refuse(401, "IDE token expired: unauthorized: token expired")
    if token.url != fake.url or token.number < fake.misdirect_until_exchanges:
        raise Refuse(421, "Misdirected Request")


def check_vision(ask: Ask) -> None:
    """Copilot-Vision-Request is `true` exactly when the request holds an image."""
    kinds = {str(node.get("type")) for node in conversation(ask.body)}
    has_image = bool(kinds & {"image", "image_url", "input_image", "computer_screenshot"})
    header = ask.headers.get("copilot-vision-request")
    if header != ("true" if has_image else None):
        raise Refuse(400, "bad request: %s Copilot-Vision-Request header"
                     % ("missing" if has_image else "unexpected"))


HEADER_CHECKS: Checks = (
    ("version", check_version), ("present", check_present), ("foreign", check_foreign),
    ("values", check_values), ("bearer", check_bearer))


def find_model(fake: FakeUpstream, body: Json, path: str) -> Json:
    """The entry a body names, or the refusals for an unknown model and a wrong endpoint."""
    wanted = body.get("model")
    for entry in list(fake.models):
        if entry["id"] == wanted and entry.get("policy", {}).get("state") != "disabled":
            break
    else:
        raise bad("The requested model is not supported.", "model_not_supported", "model")
    chat_only = [] if entry["capabilities"]["type"] == "embeddings" else [CHAT]
    served = entry.get("supported_endpoints", chat_only)
    if entry["capabilities"]["type"] == "embeddings":
        served = [EMBEDDINGS]
    if path.replace("/count_tokens", "") not in served:
        raise bad('model "%s" is not accessible via the %s endpoint' % (wanted, path),
                  "unsupported_api_for_model")
    return dict(entry)


# ==== 7. The model ================================================================================
# Text: "Echo: " + last user text, and " (tool result: ...)" when the last turn is one.
# Tools offered and the text has the word "tool", or a tool is demanded: one call of the first tool
# with {"city": "Paris"}, two when the text has "parallel". A custom tool gets "city: Paris".
# Claude says "Let me look." before a call.

class Prompt(NamedTuple):
    """What matters of a request: last user text, tool result if it is the last turn, tools."""

    text: str
    result: Optional[str]
    tools: List[Tuple[str, bool]]  # (name, is custom)


class Call(NamedTuple):
    """A tool call; `arguments` is JSON text, or free text for a custom tool."""

    call_id: str
    name: str
    arguments: str
    custom: bool


class Frame(NamedTuple):
    """One server-sent event; `text` = counts for the K of cut, stall and error."""

    data: bytes
    text: bool = False


@dataclass
class Said:
    """What the model says, before a dialect puts it into its own words."""

    ask: Ask
    markers: Markers
    pieces: List[str]
    calls: List[Call]
    reasoning: str
    usage: Tuple[int, int, int]  # input (all), of it cached, output

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.pieces)

    def has(self, quirk: str) -> bool:
        """The fake shows this oddity."""
        return quirk in self.ask.fake.quirks

    def opaque(self, prefix: str = "") -> str:
        """A new id of about 400 characters, never the same twice."""
        seed = "%s%d" % (prefix, self.ask.fake.next_number())
        return base64.b64encode(hashlib.shake_256(seed.encode()).digest(300)).decode()


def sse(payload: Any, event: str = "", text: bool = False) -> Frame:
    """{"a": 1} -> Frame(b'data: {"a":1}\\n\\n'); a str payload goes out as it is."""
    data = payload if isinstance(payload, str) else json.dumps(
        payload, ensure_ascii=False, separators=(",", ":"))
    return Frame((("event: %s\n" % event if event else "") + "data: %s\n\n" % data).encode(), text)


def is_forced(choice: Any) -> bool:
    """tool_choice demands a call, in any dialect's spelling."""
    kind = choice.get("type") if isinstance(choice, dict) else choice
    return kind not in (None, "auto", "none")


def search_calls(ask: Ask, prompt: Prompt, markers: Markers) -> List[Call]:
    """Calls of the tool that searches, until as many results are there as the marker says."""
    names = [name for name, _ in prompt.tools]
    text = json.dumps(ask.body)
    results = sum(text.count(sign) for sign in (
        '"type": "tool_result"', '"type": "function_call_output"', '"role": "tool"'))
    if "web_search" not in names or results >= markers.searches:
        return []
    query = re.sub(r"\s*@@.*?@@", "", prompt.text, flags=re.S)
    found = [("web_search", json.dumps({"query": "%s %d" % (query, results + number)}))
             for number in range(1, 3 if "parallel" in prompt.text else 2)]
    if markers.beside:
        found.append((next(name for name in names if name != "web_search"), '{"city": "Paris"}'))
    return [Call("call_%06d" % ask.fake.next_number(), name, arguments, False)
            for name, arguments in found]


def make_calls(ask: Ask, prompt: Prompt, markers: Markers) -> List[Call]:
    """The tool calls of this turn, or none."""
    choice = ask.body.get("tool_choice")
    if markers.searches:
        return search_calls(ask, prompt, markers)
    wanted = is_forced(choice) or re.search(r"\btools?\b", prompt.text, re.I)
    if not prompt.tools or not wanted or prompt.result is not None \
            or choice in ("none", {"type": "none"}):
        return []
    name, custom = prompt.tools[0]
    arguments = "city: Paris" if custom else '{"city": "Paris"%s}' % ("\r\n\t" * markers.flood)
    prefix = "toolu_" if ask.vendor == "Anthropic" else "call_"
    return [Call("%s%06d" % (prefix, ask.fake.next_number()), name, arguments, custom)
            for _ in range(2 if "parallel" in prompt.text else 1)]


def answer(ask: Ask, prompt: Prompt, reasons: bool) -> Said:
    """Make up the model's answer to a request that passed all checks."""
    markers = Markers.parse(prompt.text)
    calls = make_calls(ask, prompt, markers)
    text = "Echo: " + re.sub(r"\s*@@.*?@@", "", prompt.text, flags=re.S)
    if prompt.result is not None:
        text += " (tool result: %s)" % prompt.result
    if calls:
        text = "Let me look." if ask.vendor == "Anthropic" else ""
    size = max(1, markers.size)
    pieces = [text[at:at + size] for at in range(0, len(text), size)]
    if markers.events:
        pieces = [("%d " % number).ljust(size, ".")[:size] for number in range(markers.events)]
    if markers.flood and not calls:
        pieces.append("~" * markers.flood)
    total = max(4, len(ask.record.body) // 4)
    output = max(1, sum(map(len, pieces)) // 4 + 10 * len(calls))
    reasoning = "The user wants an echo." if reasons and markers.reasoning else ""
    return Said(ask, markers, pieces, calls, reasoning, (total, total // 4, output))


def copilot_usage(said: Said) -> Json:
    """The billing extra of answers: 1e9 nano-AIU = 1 credit; {} with the quirk "no_credits"."""
    if said.has("no_credits"):
        return {}
    return {"token_details": [{"token_type": "input", "token_count": said.usage[0],
                               "batch_size": 1000000, "cost_per_batch": 175000000000}],
            "total_nano_aiu": nano_aiu(said)}


def nano_aiu(said: Said) -> int:
    """What an answer costs: an odd number, so that a rounded sum is seen."""
    return said.usage[0] * 175000 + 1


# ==== 8. Chat =====================================================================================

def check_chat_shape(ask: Ask) -> None:
    """messages is a list of objects with known roles, not empty."""
    messages = ask.body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise bad("messages must be a non-empty array", param="messages")
    for message in messages:
        if message["role"] not in ("system", "developer", "user", "assistant", "tool"):
            raise bad("Invalid value: '%s'." % message["role"], param="messages")
    if ask.is_given("stream_options") and not ask.body.get("stream"):
        raise bad("The 'stream_options' parameter is only allowed when 'stream' is enabled.")


def check_chat_limits(ask: Ask) -> None:
    """max_tokens is refused by GPT-5 and o models, max_completion_tokens by Claude and Gemini."""
    family = ask.model["capabilities"]["family"]
    if ask.is_openai and ask.is_given("max_tokens") and re.match(r"gpt-5|o\d", family):
        raise bad("Unsupported parameter: 'max_tokens' is not supported with this model. Use "
                  "'max_completion_tokens' instead.", param="max_tokens")
    if not ask.is_openai and ask.is_given("max_completion_tokens"):
        raise bad("Unsupported parameter: 'max_completion_tokens' is not supported with this "
                  "model.", param="max_completion_tokens")
    for name in ("max_tokens", "max_completion_tokens"):
        if ask.is_given(name) and (type(ask.body[name]) is not int or ask.body[name] < 1):
            raise bad("Invalid '%s': integer below minimum value." % name, param=name)


def check_chat_roles(ask: Ask) -> None:
    """`developer` is for the GPT-5 family; Claude refuses empty text and, from 4.6, prefill."""
    for message in ask.body["messages"]:
        if message["role"] == "developer" and (not ask.is_openai or ask.name.startswith("gpt-4")):
            raise bad("Unexpected role 'developer'.", param="messages")
        content = message.get("content")
        empty = content == "" and not message.get("tool_calls") or isinstance(content, list) \
            and any(part.get("type") == "text" and not part.get("text") for part in content)
        if ask.vendor == "Anthropic" and empty:
            raise bad("messages: text content blocks must be non-empty")
    if ask.is_newer_claude() and ask.body["messages"][-1]["role"] == "assistant":
        raise bad(PREFILL)


def check_chat_calls(ask: Ask) -> None:
    """Tool messages answer the calls directly before them, each once, none is left out; ids and
    names keep their patterns."""
    waiting: Set[str] = set()
    longest = 40 if ask.name == "gpt-5-mini" else 64
    for message in ask.body["messages"]:
        for call in message.get("tool_calls") or []:
            if ask.vendor == "Anthropic" and not re.match(r"[a-zA-Z0-9_-]+$", call["id"]):
                raise bad("tool_use.id: String should match pattern '^[a-zA-Z0-9_-]+$'")
            if ask.is_openai and len(call["id"]) > longest:
                raise bad("Invalid 'tool_calls[0].id': string too long. Expected a string with "
                          "maximum length %d" % longest, "string_above_max_length")
            check_name((call.get("custom") or call["function"])["name"])
        if message["role"] == "tool":
            if message.get("tool_call_id") not in waiting:
                raise bad("messages with role 'tool' must be a response to a preceding message "
                          "with 'tool_calls'.", param="messages")
            waiting.discard(message["tool_call_id"])
        elif waiting:
            break
        else:
            waiting = {call["id"] for call in message.get("tool_calls") or []}
        if message.get("tool_calls") == []:
            raise bad("[] is too short - 'messages.1.tool_calls'", param="messages")
        if ask.fake.gemini_needs_opaque and ask.vendor == "Google" \
                and message.get("tool_calls") and not message.get("reasoning_opaque"):
            raise bad("Function call is missing a thought_signature")
    if waiting:
        raise bad("An assistant message with 'tool_calls' must be followed by tool messages "
                  "responding to each 'tool_call_id'. The following tool_call_ids did not have "
                  "response messages: " + ", ".join(sorted(waiting)), param="messages")


def check_name(name: str) -> None:
    """The pattern of tools' names."""
    if not re.match(r"[a-zA-Z0-9_-]{1,64}\Z", name):
        raise bad("Invalid 'tools[0].function.name': string does not match pattern.")


def check_chat_nulls(ask: Ask) -> None:
    """A strict schema: no nulls but for `content`, none of OpenAI's own fields for others."""
    for message in ask.body["messages"]:
        inner = [node for node in walk(message.get("content"))]
        if any(value is None for node in inner for value in node.values()) or any(
                value is None for name, value in message.items() if name != "content"):
            raise bad("Invalid type for 'messages[0]': expected an object, but got null instead.")
    for name in OPENAI_FIELDS if not ask.is_openai else ():
        if name in ask.body:
            raise bad("Unknown name \"%s\": Cannot find field." % name, param=name)


def check_chat_cache(ask: Ask) -> None:
    """copilot_cache_control is exactly {"type": "ephemeral"}, at most 4 times; cache_control is
    another service's word."""
    marks = [node["copilot_cache_control"] for node in ask.body["messages"]
             + (ask.body.get("tools") or []) if "copilot_cache_control" in node]
    if len(marks) > 4 or any(mark != {"type": "ephemeral"} for mark in marks):
        raise bad("A maximum of 4 blocks with cache_control may be provided. Found %d."
                  % len(marks))
    if any("cache_control" in node for node in conversation(ask.body)):
        raise bad("Unrecognized field: cache_control")


def check_chat_tools(ask: Ask) -> None:
    """No empty list; names by pattern; no $schema for Claude and Gemini, which also refuses many
    other words, lists of types, numbers in enums, and arrays without items."""
    if ask.body.get("tools") == []:
        raise bad("Invalid 'tools': empty array.", "empty_array", "tools")
    refused = {"Anthropic": ("$schema",), "Google": (
        "$schema", "additionalProperties", "$ref", "$defs", "const", "oneOf", "allOf",
        "propertyNames", "exclusiveMinimum")}
    for tool in ask.body.get("tools") or []:
        if tool["type"] == "custom" and ask.is_openai and ask.name.startswith("gpt-5"):
            check_name(tool["custom"]["name"])
            continue
        if tool["type"] != "function":
            raise bad("Unsupported tool type: '%s'" % tool["type"], param="tools")
        function = tool["function"]
        check_name(function["name"])
        for node in walk(function.get("parameters")):
            if ask.vendor == "Google":
                check_gemini_node(node)
            for name in refused.get(ask.vendor, ()):
                if name in node:
                    raise bad("Invalid JSON payload received. Unknown name \"%s\" at 'parameters'"
                              % name)


def check_gemini_node(node: Json) -> None:
    """One piece of a schema; a `properties` object is none and is passed by."""
    kind = node.get("type")
    if isinstance(kind, dict) or not isinstance(node.get("enum"), (list, type(None))):
        return
    if isinstance(kind, list):
        raise bad("Invalid value at 'parameters' (type), Proto field is not repeating")
    if node.get("enum") and (kind != "string" or not all(
            isinstance(value, str) and value for value in node["enum"])):
        raise bad("Invalid value at 'parameters' (enum), only allowed for STRING type")
    if kind == "array" and not node.get("items"):
        raise bad("parameters.items: missing field.")
    if kind == "string" and node.get("format", "enum") not in ("enum", "date-time"):
        raise bad("only 'enum' and 'date-time' are supported for STRING type")
    if not set(node.get("required") or ()) <= set(node.get("properties") or ()):
        raise bad("parameters.required[0]: property is not defined")


CHAT_CHECKS: Checks = (
    ("shape", check_chat_shape), ("nulls", check_chat_nulls), ("cache", check_chat_cache),
    ("store", forbid("store")),
    ("service_tier", forbid("service_tier")), ("images", check_image_urls),
    ("limits", check_chat_limits), ("roles", check_chat_roles), ("calls", check_chat_calls),
    ("tools", check_chat_tools), ("sampling", check_sampling), ("effort", check_effort))


def chat_prompt(body: Json) -> Prompt:
    """Prompt of a chat body."""
    messages = body["messages"]
    users = [text_of(item.get("content")) for item in messages if item["role"] == "user"]
    last = messages[-1]
    result = text_of(last.get("content")) if last["role"] == "tool" else None
    tools = [((tool.get("custom") or tool["function"])["name"], "custom" in tool)
             for tool in body.get("tools") or []]
    return Prompt(users[-1] if users else "", result, tools)


def chat_calls(said: Said, first: int = 0) -> List[Json]:
    """tool_calls entries, `index` counted from `first`."""
    return [{"index": first + at, "id": call.call_id, "type": "custom",
             "custom": {"name": call.name, "input": call.arguments}} if call.custom else
            {"index": first + at, "id": call.call_id, "type": "function",
             "function": {"name": call.name, "arguments": call.arguments}}
            for at, call in enumerate(said.calls)]


def chat_finish(said: Said) -> str:
    """finish_reason."""
    return "length" if said.markers.length else "tool_calls" if said.calls else "stop"


def chat_usage(said: Said) -> Json:
    """usage, with cached tokens inside the prompt tokens."""
    total, cached, output = said.usage
    return {"prompt_tokens": total, "completion_tokens": output, "total_tokens": total + output,
            "prompt_tokens_details": {"cached_tokens": cached}}


def is_split(said: Said) -> bool:
    """Claude's habit of one choice per part applies."""
    return said.ask.vendor == "Anthropic" and said.has("split_choices")


def chat_reasoning(said: Said) -> Json:
    """reasoning_text and its signature, or nothing."""
    if not said.reasoning:
        return {}
    return {"reasoning_text": said.reasoning,
            "reasoning_opaque": said.ask.fake.seal("chat", said.reasoning)}


def chat_body(said: Said) -> Json:
    """The answer to a call without stream; Claude's has no object and no index."""
    calls = [dict(call) for call in chat_calls(said)]
    for call in calls:
        del call["index"]
    message: Json = dict({"role": "assistant", "content": said.text or None},
                         **chat_reasoning(said))
    body: Json = {"id": "msg_vrtx_01", "created": CREATED, "model": said.ask.name,
                  "usage": chat_usage(said), "copilot_usage": copilot_usage(said)}
    if is_split(said):
        split = [message] + [{"role": "assistant", "tool_calls": [call]} for call in calls]
        body["choices"] = [{"finish_reason": chat_finish(said), "message": item} for item in split]
        return body
    if calls:
        message["tool_calls"] = calls
    body.update(id="chatcmpl-fake", object="chat.completion", system_fingerprint="fp_fake",
                prompt_filter_results=[{"prompt_index": 0, "content_filter_results": {}}],
                choices=[{"index": 0, "message": message, "finish_reason": chat_finish(said),
                          "content_filter_results": {}}])
    return body


def chat_chunk(said: Said, delta: Json, index: int = 0, **more: Any) -> Json:
    """One streamed chunk with one choice."""
    chunk: Json = {"choices": [dict({"index": index, "delta": delta}, **more)],
                   "created": CREATED, "id": "msg_vrtx_01", "model": said.ask.name}
    if not is_split(said):
        chunk.update(id="chatcmpl-fake", object="chat.completion.chunk")
    return chunk


def chat_call_frames(said: Said) -> Iterator[Frame]:
    """Calls in two fragments each; Claude's sit under choice 1 and are numbered from 1."""
    split = is_split(said)
    for call in chat_calls(said, 1 if split else 0):
        kind, key = ("custom", "input") if "custom" in call else ("function", "arguments")
        arguments = call[kind].pop(key)
        if said.has("late_names"):
            nameless = {"index": call["index"], "id": call.pop("id"), "type": kind,
                        kind: {key: ""}}
            yield sse(chat_chunk(said, {"tool_calls": [nameless]}, int(split)))
        call[kind][key] = ""
        yield sse(chat_chunk(said, {"role": "assistant", "tool_calls": [call]}, int(split)))
        for part in (arguments[:8], arguments[8:]):
            later = {"index": call["index"], kind: {key: part}}
            yield sse(chat_chunk(said, {"tool_calls": [later]}, int(split)))


def chat_frames(said: Said) -> Iterator[Frame]:
    """The stream of a chat answer up to and with [DONE]."""
    split = is_split(said)
    if said.has("empty_first_chunk") and not split:
        yield sse({"choices": [], "created": 0, "id": "", "model": "", "prompt_filter_results": [
            {"prompt_index": 0, "content_filter_results": {"hate": {"filtered": False}}}]})
    reasoning = chat_reasoning(said)
    first: Json = {"role": "assistant", "content": ""}
    if reasoning:
        first["reasoning_text"] = reasoning["reasoning_text"]
    yield sse(chat_chunk(said, first))
    if reasoning:
        yield sse(chat_chunk(said, {"content": None,
                                    "reasoning_opaque": reasoning["reasoning_opaque"]}))
    for piece in said.pieces:
        yield sse(chat_chunk(said, {"content": piece}), text=True)
    yield from chat_call_frames(said)
    if said.markers.noend:
        return
    last = chat_chunk(said, {"content": None}, finish_reason=chat_finish(said))
    if split and said.calls:
        last["choices"].append({"index": 1, "delta": {}, "finish_reason": chat_finish(said)})
    wants_usage = (said.ask.body.get("stream_options") or {}).get("include_usage")
    if split and wants_usage:
        last.update(usage=chat_usage(said), copilot_usage=copilot_usage(said))
    yield sse(last)
    if wants_usage and not split:
        yield sse({"choices": [], "created": CREATED, "id": "chatcmpl-fake",
                   "model": said.ask.name, "usage": chat_usage(said),
                   "copilot_usage": copilot_usage(said)})
    if said.has("empty_usage"):
        yield sse({"choices": [], "created": CREATED, "id": "chatcmpl-fake", "usage": {}})
    yield sse("[DONE]")


def chat_error(said: Said) -> Frame:
    """An error inside the stream, in one of the two forms seen."""
    if said.markers.fail:
        return sse(chat_chunk(said, {}, finish_reason="error"))
    code = TOLD_CODES[said.markers.code] or "internal_error"
    return sse({"error": {"message": "fake stream error", "code": code}})


def reasons_in_chat(ask: Ask) -> bool:
    """Models with reasoning show it in chat."""
    return bool(ask.supports.get("reasoning_effort") or ask.supports.get("max_thinking_budget"))


# ==== 9. Responses ================================================================================

RESPONSES_REFUSED = ("service_tier", "background", "conversation", "prompt")


def check_store(ask: Ask) -> None:
    """`store` must be exactly false; nothing stored can be referred to."""
    if ask.body.get("store") is not False:
        raise bad("store is not supported", "unsupported_value", "store")
    if ask.is_given("previous_response_id"):
        raise bad("Previous response with id '%s' not found." % ask.body["previous_response_id"],
                  "previous_response_not_found", "previous_response_id")


def check_output_limit(ask: Ask) -> None:
    """max_output_tokens is 16 or more."""
    if ask.is_given("max_output_tokens") and ask.body["max_output_tokens"] < 16:
        raise bad("Invalid 'max_output_tokens': integer below minimum value. Expected a value >= "
                  "16.", "integer_below_min_value", "max_output_tokens")


def check_response_tools(ask: Ask) -> None:
    """Hosted tools the service does not have."""
    for tool in ask.body.get("tools") or []:
        if tool["type"] in ("image_generation", "code_interpreter"):
            raise bad("The requested tool %s is not supported." % tool["type"],
                      "unsupported_value", "tools")


def response_input(body: Json) -> List[Json]:
    """input as a list of items."""
    given = body.get("input")
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise bad("Missing required parameter: 'input'.", "missing_required_parameter", "input")
    return given


def check_item_id(ask: Ask, at: int, item: Json) -> None:
    """Ids are bound to a connection, so none is accepted on replay."""
    if item.get("type") == "item_reference":
        raise Refuse(404, {"error": {"message": "", "code": "not_found"}})
    for name in ("id", "call_id"):
        if len(item.get(name) or "") > 64:
            raise bad("Invalid 'input[%d].%s': string too long. Expected a string with maximum "
                      "length 64, but got a string with length %d instead."
                      % (at, name, len(item[name])), "string_above_max_length", "input")
    if item.get("id") and item.get("type") == "reasoning":
        raise bad("The encrypted content for item %s could not be verified. Reason: Encrypted "
                  "content item_id did not match the target item id." % item["id"],
                  "invalid_encrypted_content")
    if item.get("id"):
        raise Refuse(401, {"error": {"message": "input item ID does not belong to this connection",
                                     "code": "unauthorized"}})


def check_items(ask: Ask) -> None:
    """Ids, ciphertext and unknown fields of input items."""
    for at, item in enumerate(response_input(ask.body)):
        check_item_id(ask, at, item)
        if "internal_chat_message_metadata_passthrough" in item:
            raise bad("Unknown parameter: 'input[%d].internal_chat_message_metadata_passthrough'."
                      % at, "unknown_parameter")
        cipher = item.get("encrypted_content")
        if item.get("type") == "reasoning" and not cipher and not item.get("summary"):
            raise bad("Item 'input[%d]' of type 'reasoning' has no content." % at)
        if cipher and not ask.fake.is_sealed("reasoning", cipher):
            raise bad("The encrypted content %s... could not be verified. Reason: Encrypted content"
                      " could not be decrypted or parsed." % cipher[:8],
                      "invalid_encrypted_content")
    if any(node.get("detail") == "original" for node in conversation(ask.body)):
        raise bad("Invalid value: 'original'. Supported values are: 'low', 'high', and 'auto'.",
                  "invalid_value")


def check_outputs(ask: Ask) -> None:
    """Each tool output answers a call of the same input, and each call is answered."""
    waiting: Set[str] = set()
    vendor: Set[str] = set()         # of tools that have items of their own, like the shell
    for item in response_input(ask.body):
        kind = str(item.get("type"))
        if kind in ("function_call", "custom_tool_call"):
            waiting.add(item["call_id"])
            check_name(item["name"])
        elif kind.endswith("_call") and item.get("call_id"):
            vendor.add(item["call_id"])
        elif kind.endswith("_call_output") or kind == "tool_search_output":
            if item.get("call_id") not in waiting | vendor:
                raise bad("No tool call found for function call output with call_id %s."
                          % item.get("call_id"), param="input")
            waiting.discard(item["call_id"])
    if waiting:
        raise bad("No tool output found for function call %s." % sorted(waiting)[0], param="input")
    for tool in ask.body.get("tools") or []:
        check_name(tool.get("name", "hosted"))


def check_compaction(ask: Ask) -> None:
    """Only a service with remote compaction knows the trigger, and as the last item."""
    kinds = [item.get("type") for item in response_input(ask.body)]
    for at, kind in enumerate(kinds):
        if kind == "compaction_trigger" and not ask.fake.compacts:
            raise bad("Invalid value: 'compaction_trigger'. Supported values are: 'message', "
                      "'reasoning', 'function_call' and 'function_call_output'.", "invalid_value",
                      "input[%d].type" % at)
        if kind == "compaction_trigger" and at < len(kinds) - 1:
            raise bad("The 'compaction_trigger' item must be the final input item.")


RESPONSES_CHECKS: Checks = (
    ("store", check_store), ("fields", forbid(*RESPONSES_REFUSED)), ("items", check_items),
    ("outputs", check_outputs), ("compaction", check_compaction), ("images", check_image_urls),
    ("tools", check_response_tools), ("limits", check_output_limit),
    ("sampling", check_sampling), ("effort", check_effort))


def responses_prompt(body: Json) -> Prompt:
    """Prompt of a responses body; only function and custom tools can be called.  One of a
    namespace is called "space::name" here."""
    items = response_input(body)
    users = [text_of(item.get("content")) for item in items if item.get("role") == "user"]
    is_output = str(items[-1].get("type")).endswith("_call_output")
    result = text_of(items[-1].get("output")) if is_output else None
    given = [("", tool) for tool in body.get("tools") or []]
    given += [(space["name"] + "::", tool) for _, space in given if space["type"] == "namespace"
              for tool in space["tools"]]
    tools = [(space + tool["name"], tool["type"] == "custom") for space, tool in given
             if tool["type"] in ("function", "custom")]
    return Prompt(users[-1] if users else "", result, tools)


def response_items(said: Said) -> List[Json]:
    """The output items in order, without ids."""
    items: List[Json] = []
    last = response_input(said.ask.body)[-1]
    if last.get("type") == "compaction_trigger":
        return [{"type": "compaction", "encrypted_content": said.ask.fake.seal(
            "reasoning", "compacted %d items" % len(said.ask.body["input"]))}]
    if said.reasoning:
        summary = [{"type": "summary_text", "text": said.reasoning}]
        sealed = said.ask.fake.seal("reasoning", "state %d" % said.ask.fake.next_number())
        items.append({"type": "reasoning", "summary": summary, "encrypted_content": sealed})
    found = said.ask.fake.search_results
    searches = found is not None and any(
        tool.get("type") == "web_search" for tool in said.ask.body.get("tools") or [])
    if searches:
        items.append({"type": "web_search_call", "status": "completed",
                      "action": {"type": "search", "query": said.text}})
    if said.pieces:
        part = {"type": "output_text", "text": said.text, "logprobs": [], "annotations": [
            {"type": "url_citation", "url": url, "title": title, "start_index": 0, "end_index": 1}
            for title, url in (found or [] if searches else [])]}
        items.append({"type": "message", "role": "assistant", "status": "completed",
                      "content": [part]})
    for call in said.calls:
        kind, name = ("custom_tool_call", "input") if call.custom else ("function_call",
                                                                        "arguments")
        space, _, own = call.name.rpartition("::")
        item = {"type": kind, "call_id": call.call_id, "name": own, "status": "completed",
                name: call.arguments}
        items.append(dict(item, namespace=space) if space else item)
    return items


class ResponseStream:
    """One answer of /responses: the object and its events."""

    def __init__(self, said: Said) -> None:
        self.said = said
        self.items = response_items(said)
        self.sequence = 0
        self.first_ids: Dict[str, str] = {}  # without the quirk: one id per key

    def new_id(self, key: str, quirk: str) -> str:
        """An id for a response or item: another one each time while the quirk is on."""
        fresh = ("%s_%d" % (key, self.said.ask.fake.next_number())
                 if self.said.has("plain_ids") else self.said.opaque(key))
        return fresh if self.said.has(quirk) else self.first_ids.setdefault(key, fresh)

    def with_id(self, index: int, item: Json) -> Json:
        """A copy of an item with an id."""
        return dict(item, id=self.new_id("item_%d" % index, "changing_ids"))

    def body(self, status: str, output: Optional[List[Json]] = None) -> Json:
        """The response object; usage only at the end."""
        body: Json = {
            "id": self.new_id("resp", "changing_response_id"), "object": "response",
            "created_at": CREATED, "status": status, "model": self.said.ask.name, "error": None,
            "incomplete_details": None, "instructions": self.said.ask.body.get("instructions"),
            "output": output or [], "store": False,
            "parallel_tool_calls": self.said.ask.body.get("parallel_tool_calls") is not False,
            "tool_choice": "auto", "tools": self.said.ask.body.get("tools") or [], "usage": None}
        if status in ("completed", "incomplete"):
            total, cached, used = self.said.usage
            body["usage"] = {"input_tokens": total, "output_tokens": used,
                             "input_tokens_details": {"cached_tokens": cached},
                             "output_tokens_details": None}
            if not self.said.has("no_total_tokens"):
                body["usage"]["total_tokens"] = total + used
            body["copilot_usage"] = copilot_usage(self.said)
        if status == "incomplete":
            body["incomplete_details"] = {"reason": "max_output_tokens"}
        return body

    def final(self, output: List[Json]) -> Json:
        """The response object at its end."""
        return self.body("incomplete" if self.said.markers.length else "completed", output)

    def event(self, kind: str, counts: bool = False, **more: Any) -> Frame:
        """One event, numbered unless the quirk is on."""
        payload: Json = dict({"type": kind}, **more)
        if not self.said.has("no_sequence_numbers"):
            payload["sequence_number"] = self.sequence
            self.sequence += 1
        if kind.endswith(".delta") and self.said.has("obfuscation"):
            payload["obfuscation"] = "xK9f"
        return sse(payload, kind, counts)

    def at(self, index: int, **more: Any) -> Json:
        """item_id and output_index of an event about an item."""
        return dict({"item_id": self.new_id("item_%d" % index, "changing_ids"),
                     "output_index": index}, **more)

    def frames(self) -> Iterator[Frame]:
        """The stream of the answer."""
        for state in ("created", "in_progress"):
            yield self.event("response." + state, response=self.body("in_progress"))
        parts = {"reasoning": self.reasoning, "message": self.message,
                 "web_search_call": self.search}
        for index, item in enumerate(self.items):
            hollow: Json = {"summary": [], "content": [], "arguments": "", "input": ""}
            started = {name: hollow.get(name, value) for name, value in item.items()
                       if name != "encrypted_content"}
            if self.said.has("late_names") and "name" in started:
                started["name"] = ""
            yield self.event("response.output_item.added", output_index=index,
                             item=self.with_id(index, dict(started, status="in_progress")))
            yield from parts.get(item["type"], self.call)(index, item)
            yield self.event("response.output_item.done", output_index=index,
                             item=self.with_id(index, item))
        if self.said.markers.noend:
            return
        if self.said.has("early_done"):
            yield sse("[DONE]")
        output = [] if self.said.has("empty_output") else [
            self.with_id(index, item) for index, item in enumerate(self.items)]
        final = self.final(output)
        yield self.event("response." + final["status"], response=final, copilot_quota_snapshots={
            "premium_interactions": {"entitlement": "300", "percent_remaining": "75.4"}})

    def reasoning(self, index: int, item: Json) -> Iterator[Frame]:
        """A reasoning summary."""
        name = "response.reasoning_summary_"
        at = functools.partial(self.at, index, summary_index=0)
        empty = {"type": "summary_text", "text": ""}
        yield self.event(name + "part.added", **at(part=empty))
        yield self.event(name + "text.delta", **at(delta=self.said.reasoning))
        yield self.event(name + "text.done", **at(text=self.said.reasoning))
        yield self.event(name + "part.done", **at(part=item["summary"][0]))

    def message(self, index: int, item: Json) -> Iterator[Frame]:
        """A message of one text part."""
        part, at = item["content"][0], functools.partial(self.at, index, content_index=0)
        yield self.event("response.content_part.added", **at(
            part=dict(part, text="", annotations=[])))
        for piece in self.said.pieces:
            yield self.event("response.output_text.delta", True, **at(delta=piece, logprobs=[]))
        for number, note in enumerate(part["annotations"]):
            yield self.event("response.output_text.annotation.added", **at(
                annotation_index=number, annotation=note))
        yield self.event("response.output_text.done", **at(text=part["text"], logprobs=[]))
        yield self.event("response.content_part.done", **at(part=part))

    def search(self, index: int, item: Json) -> Iterator[Frame]:
        """A hosted search."""
        for state in ("in_progress", "searching", "completed"):
            yield self.event("response.web_search_call." + state, **self.at(index))

    def call(self, index: int, item: Json) -> Iterator[Frame]:
        """A function or custom tool call, its arguments in two deltas."""
        field_name = "input" if item["type"] == "custom_tool_call" else "arguments"
        name = "response.custom_tool_call_input" if field_name == "input" \
            else "response.function_call_arguments"
        whole = item[field_name]
        for piece in (whole[:8], whole[8:]):
            delta = self.said.opaque() if self.said.has("cipher_deltas") else piece
            yield self.event(name + ".delta", **self.at(index, delta=delta))
        yield self.event(name + ".done", **self.at(index, **{field_name: whole}))


def responses_body(said: Said) -> Json:
    """The answer to a call without stream."""
    stream = ResponseStream(said)
    return stream.final([stream.with_id(at, item) for at, item in enumerate(stream.items)])


def responses_error(said: Said) -> Frame:
    """`error` event, or response.failed."""
    code = TOLD_CODES[said.markers.code] or "internal_error"
    error = {"code": code, "message": "fake stream error"}
    if said.markers.fail or said.markers.code:
        failed = dict(ResponseStream(said).body("failed"), error=error)
        return sse({"type": "response.failed", "response": failed}, "response.failed")
    return sse(dict(error, type="error"), "error")


# ==== 10. Messages ================================================================================

TOP_FIELDS = frozenset((
    "model", "messages", "max_tokens", "system", "metadata", "stop_sequences", "stream",
    "temperature", "top_p", "top_k", "tools", "tool_choice", "thinking", "output_config"))
COUNT_FIELDS = frozenset(("model", "messages", "system", "tools", "tool_choice"))
TOOL_FIELDS = frozenset(("type", "name", "description", "input_schema", "cache_control"))
INNER_FIELDS = {"metadata": {"user_id"}, "thinking": {"type", "budget_tokens", "display"},
                "output_config": {"effort", "format"},
                "tool_choice": {"type", "name", "disable_parallel_tool_use"}}
BLOCK_FIELDS = {
    "text": {"text", "cache_control", "citations"},
    "image": {"source", "cache_control"},
    "document": {"source", "title", "context", "citations", "cache_control"},
    "tool_use": {"id", "name", "input", "cache_control"},
    "tool_result": {"tool_use_id", "content", "is_error", "cache_control"},
    "thinking": {"thinking", "signature"}, "redacted_thinking": {"data"}}
#: those of a model that finds tools
FOUND_FIELDS = {
    "tool_reference": {"tool_name"}, "server_tool_use": {"id", "name", "input"},
    "tool_search_tool_result": {"tool_use_id", "content"}}


def only(node: Json, allowed: Iterable[str], path: str) -> None:
    """Refuse a field outside the whitelist with the validator's text."""
    for name in node:
        if name not in allowed:
            raise extra(path + name)


def blocks_in(content: Any, path: str) -> Iterator[Tuple[str, Json]]:
    """(path, block) of a content list, the content of tool results included."""
    for at, block in enumerate(content if isinstance(content, list) else []):
        yield "%s.%d" % (path, at), block
        if block.get("type") == "tool_result":
            yield from blocks_in(block.get("content"), "%s.%d.tool_result.content" % (path, at))


def all_blocks(body: Json) -> Iterator[Tuple[str, Json]]:
    """(path, block) of system and all messages."""
    yield from blocks_in(body.get("system"), "system")
    for at, message in enumerate(body["messages"]):
        yield from blocks_in(message.get("content"), "messages.%d.content" % at)


def check_fields(ask: Ask) -> None:
    """Whitelists: top level, tools, and the small objects."""
    counting = ask.record.path == COUNT_TOKENS
    allowed_fields = COUNT_FIELDS if counting else TOP_FIELDS
    if ask.supports.get("context_editing") and not counting:
        allowed_fields |= {"context_management"}
    only(ask.body, allowed_fields, "")
    if "context_management" in ask.body and "context-management-" not in ask.headers.get(
            "anthropic-beta", ""):
        raise extra("context_management")
    for name, allowed in INNER_FIELDS.items():
        only(ask.body.get(name) or {}, allowed, name + ".")
    if "anthropic-version" not in ask.headers:
        raise bad_message("anthropic-version: header is required")


def check_message_shape(ask: Ask) -> None:
    """Roles and contents; `system` inside messages needs its beta."""
    beta = "mid-conversation-system-" in ask.headers.get("anthropic-beta", "")
    messages = ask.body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise bad_message("messages: at least one message is required")
    for at, message in enumerate(messages):
        only(message, ("role", "content"), "messages.%d." % at)
        if message["role"] not in ("user", "assistant") + (("system",) if beta else ()):
            raise bad_message("messages.%d.role: Input should be 'user' or 'assistant'" % at)
        if not isinstance(message.get("content"), (str, list)) or not message["content"]:
            raise bad_message("messages.%d: all messages must have non-empty content" % at)
    if not isinstance(ask.body.get("system", ""), (str, list)):
        raise bad_message("system: Input should be a valid list")
    if ask.is_newer_claude() and messages[-1]["role"] == "assistant":
        raise bad_message(PREFILL)


def check_blocks(ask: Ask) -> None:
    """Known block types with known fields; base64 sources only; no empty text."""
    for path, block in all_blocks(ask.body):
        kind = block.get("type")
        if ask.supports.get("tool_search") and kind in FOUND_FIELDS:
            check_found(ask, path, block)
            continue
        if kind not in BLOCK_FIELDS:
            raise bad_message("%s: Input tag '%s' found using 'type' does not match any of the "
                              "expected tags" % (path, kind))
        only(block, BLOCK_FIELDS[kind] | {"type"}, "%s.%s." % (path, kind))
        if kind == "text" and not block["text"]:
            raise bad_message("messages: text content blocks must be non-empty")
        is_stored = kind == "image" and str(block["source"].get("url")).startswith(ATTACHMENTS)
        if kind in ("image", "document") and not is_stored and block["source"].get(
                "type") not in ("base64", "text"):
            raise bad_message("%s.%s.source: only base64 sources are supported" % (path, kind))


def check_found(ask: Ask, path: str, block: Json) -> None:
    """What a history says of tools that are loaded later: in its place, of tools that are there."""
    kind = block["type"]
    only(block, FOUND_FIELDS[kind] | {"type"}, "%s.%s." % (path, kind))
    if (kind == "tool_reference") != (".tool_result.content" in path):
        raise bad_message("%s: Input tag '%s' found using 'type' does not match any of the "
                          "expected tags" % (path, kind))
    if "advanced-tool-use-" not in ask.headers.get("anthropic-beta", ""):
        raise extra(path)
    deferred = [tool["name"] for tool in ask.body.get("tools") or [] if tool.get("defer_loading")]
    for node in walk(block):
        if node.get("type") == "tool_reference" and node["tool_name"] not in deferred:
            raise bad_message("Tool reference '%s' not found in available tools"
                              % node["tool_name"])


def check_cache(ask: Ask) -> None:
    """cache_control is {"type": "ephemeral"}, perhaps with a time, at most 4 times."""
    tools = [("tools.%d.custom" % at, tool) for at, tool in enumerate(ask.body.get("tools") or [])]
    marks = 0
    for path, node in list(all_blocks(ask.body)) + tools:
        mark = node.get("cache_control")
        if mark is None:
            continue
        marks += 1
        only(mark, ("type", "ttl"), path + ".cache_control.ephemeral.")
        if mark.get("type") != "ephemeral" or mark.get("ttl") not in (None, "5m", "1h"):
            raise bad_message(path + ".cache_control.type: Input should be 'ephemeral'")
    if marks > 4:
        raise bad_message("A maximum of 4 blocks with cache_control may be provided. Found %d."
                          % marks)


def check_message_tools(ask: Ask) -> None:
    """Client tools only, whitelisted fields, no $schema."""
    for at, tool in enumerate(ask.body.get("tools") or []):
        finds = ask.supports.get("tool_search") is True
        if finds and str(tool.get("type")).startswith("tool_search_tool_"):
            continue
        if tool.get("type") not in (None, "custom"):
            raise bad_message("tools.%d: Input tag '%s' found using 'type' does not match any of "
                              "the expected tags: 'custom'" % (at, tool["type"]))
        more = {"defer_loading"} if finds else set()
        only(tool, TOOL_FIELDS | more, "tools.%d.custom." % at)
        if "$schema" in tool["input_schema"]:
            raise extra("tools.%d.custom.input_schema.$schema" % at)


def check_message_limits(ask: Ask) -> None:
    """max_tokens is required, within the model's limit, and lower without a stream."""
    given = ask.body.get("max_tokens")
    if given is None:
        raise bad_message("max_tokens: Field required")
    if type(given) is not int or given < 1:
        raise bad_message("max_tokens: Input should be greater than or equal to 1")
    if given > ask.limits["max_output_tokens"]:
        raise bad_message("max_tokens: %d > %d, which is the maximum allowed number of output "
                          "tokens for %s" % (given, ask.limits["max_output_tokens"], ask.name))
    cap = ask.limits.get("max_non_streaming_output_tokens", given)
    if given > cap and not ask.body.get("stream"):
        raise bad_message("max_tokens: %d > %d, streaming is required for this many output tokens"
                          % (given, cap))


def is_thinking(body: Json) -> bool:
    """Thinking is switched on."""
    return (body.get("thinking") or {}).get("type") in ("enabled", "adaptive")


def check_thinking(ask: Ask) -> None:
    """Which form of thinking the model takes, its budget, and what may stand beside it."""
    thinking = ask.body.get("thinking") or {}
    adaptive, largest = ask.supports.get("adaptive_thinking"), ask.supports.get(
        "max_thinking_budget")
    if thinking.get("type") == "adaptive" and not adaptive:
        raise bad_message("adaptive thinking is not supported on this model")
    if thinking.get("type") == "enabled":
        if not largest:
            raise bad_message(ENABLED_REFUSED if adaptive else "thinking is not supported")
        budget = thinking.get("budget_tokens", 0)
        if not ask.supports["min_thinking_budget"] <= budget <= largest:
            raise bad_message("thinking.enabled.budget_tokens: Input should be greater than or "
                              "equal to 1024")
        if budget >= ask.body.get("max_tokens", 0):
            raise bad_message("`max_tokens` must be greater than `thinking.budget_tokens`.")
    sampling = [name for name in ("temperature", "top_p", "top_k")
                if ask.is_given(name) and not (name != "top_k" and ask.body[name] == 1)]
    if is_thinking(ask.body) and sampling:
        raise bad_message("`%s` may only be set to 1 when thinking is enabled." % sampling[0])
    if ask.is_newer_claude() and ask.is_given("temperature") and ask.is_given("top_p"):
        raise bad_message("`temperature` and `top_p` cannot both be specified for this model.")


def check_output_effort(ask: Ask) -> None:
    """output_config.effort against the model's list."""
    effort = (ask.body.get("output_config") or {}).get("effort")
    listed = ask.supports.get("reasoning_effort") or []
    if effort is not None and not listed:
        raise bad_message("This model does not support the effort parameter.")
    if effort is not None and effort not in listed:
        raise bad("output_config.effort: '%s' is not supported. Supported values: %s"
                  % (effort, ", ".join(listed)), "invalid_reasoning_effort")


def check_signatures(ask: Ask) -> None:
    """Thinking blocks carry the signature this service made for that text."""
    for path, block in all_blocks(ask.body):
        if block["type"] == "thinking" and not ask.fake.is_sealed(
                "thinking", block.get("signature") or "", block["thinking"]):
            raise bad_message("%s: Invalid `signature` in `thinking` block. "
                              "Invalid signature in thinking block" % path)


def check_tool_results(ask: Ask) -> None:
    """A tool_result answers a tool_use of the turn before, and each tool_use is answered, before
    anything else is said; ids are unique and keep their pattern."""
    open_calls: Set[str] = set()
    known: List[str] = []
    for at, message in enumerate(ask.body["messages"]):
        blocks = message["content"] if isinstance(message["content"], list) else []
        kinds = [block["type"] == "tool_result" for block in blocks]
        if sorted(kinds, reverse=True) != kinds or sum(kinds) > len(open_calls) > 0:
            raise bad_message("messages.%d: `tool_use` ids were found without `tool_result` blocks "
                              "immediately after" % (at - 1))
        known += [block["id"] for block in blocks if block["type"] == "tool_use"]
        for block in blocks:
            if block["type"] == "tool_use":
                check_name(block["name"])
        results = {block["tool_use_id"] for block in blocks if block["type"] == "tool_result"}
        for name in sorted(results - open_calls):
            raise bad_message("messages.%d.content.0: unexpected `tool_use_id` found in "
                              "`tool_result` blocks: %s" % (at, name))
        for name in sorted(open_calls - results):
            raise bad_message("messages.%d: `tool_use` ids were found without `tool_result` blocks "
                              "immediately after: %s" % (at - 1, name))
        open_calls = {block["id"] for block in blocks if block["type"] == "tool_use"}
    if open_calls:
        raise bad_message("messages: `tool_use` ids were found without `tool_result` blocks "
                          "immediately after: %s" % ", ".join(open_calls))
    if len(set(known)) < len(known):
        raise bad_message("messages: `tool_use` ids must be unique")
    for name in known:
        if not re.match(r"[a-zA-Z0-9_-]+\Z", name):
            raise bad_message("tool_use.id: String should match pattern '^[a-zA-Z0-9_-]+$'")


COUNT_CHECKS: Checks = (
    ("fields", check_fields), ("shape", check_message_shape), ("tools", check_message_tools),
    ("blocks", check_blocks), ("cache", check_cache), ("signatures", check_signatures),
    ("results", check_tool_results))
MESSAGES_CHECKS: Checks = COUNT_CHECKS + (
    ("limits", check_message_limits), ("thinking", check_thinking),
    ("effort", check_output_effort))


def messages_prompt(body: Json) -> Prompt:
    """Prompt of a messages body; text beside tool results does not hide them.  Tools that are
    loaded later can be called once they were found."""
    users = [item["content"] for item in body["messages"] if item["role"] == "user"]
    texts = [text for text in map(text_of, users) if text]
    last = body["messages"][-1]["content"]
    results = [text_of(block.get("content")) for block in last
               if block["type"] == "tool_result"] if isinstance(last, list) else []
    found = {node["tool_name"] for node in walk(body["messages"])
             if node.get("type") == "tool_reference"}
    tools = [(tool["name"], False) for tool in body.get("tools") or []
             if tool["name"] in found or not tool.get("defer_loading")]
    return Prompt(texts[-1] if texts else "", " ".join(results) if results else None, tools)


def message_blocks(said: Said) -> List[Json]:
    """The content blocks; 4.7 hides its thinking unless a summary is asked for."""
    blocks: List[Json] = []
    if said.reasoning:
        thinking = said.ask.body.get("thinking") or {}
        shown = said.ask.supports.get("max_thinking_budget") \
            or thinking.get("display") == "summarized"
        text = said.reasoning if shown else ""
        blocks.append({"type": "thinking", "thinking": text,
                       "signature": said.ask.fake.seal("thinking", text)})
    if said.pieces:
        blocks.append({"type": "text", "text": said.text})
    return blocks + [{"type": "tool_use", "id": call.call_id, "name": call.name,
                      "input": json.loads(call.arguments)} for call in said.calls]


def message_usage(said: Said, output: int) -> Json:
    """usage: cached tokens stand beside input_tokens."""
    total, cached, _ = said.usage
    return {"input_tokens": total - cached, "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0, "output_tokens": output}


def message_stop(said: Said) -> str:
    """stop_reason."""
    return "max_tokens" if said.markers.length else "tool_use" if said.calls else "end_turn"


def messages_body(said: Said) -> Json:
    """The answer to a call without stream."""
    return {"id": "msg_%06d" % said.ask.fake.next_number(), "type": "message",
            "role": "assistant", "model": said.ask.name, "content": message_blocks(said),
            "stop_reason": message_stop(said), "stop_sequence": None,
            "usage": message_usage(said, said.usage[2]), "copilot_usage": copilot_usage(said)}


def block_deltas(said: Said, block: Json) -> Iterator[Tuple[str, str, str]]:
    """(delta type, field, value) of one block, in order."""
    if block["type"] == "thinking":
        if block["thinking"]:
            yield "thinking_delta", "thinking", block["thinking"]
        yield "signature_delta", "signature", block["signature"]
    elif block["type"] == "text":
        for piece in said.pieces:
            yield "text_delta", "text", piece
    else:
        arguments = next(call.arguments for call in said.calls if call.call_id == block["id"])
        for piece in ("", arguments[:8], arguments[8:]):
            yield "input_json_delta", "partial_json", piece


def messages_frames(said: Said) -> Iterator[Frame]:
    """The stream of a messages answer."""
    def event(kind: str, counts: bool = False, **more: Any) -> Frame:
        return sse(dict({"type": kind}, **more), kind, counts)

    start = dict(messages_body(said), content=[], stop_reason=None,
                 usage=message_usage(said, 1))
    blocks = message_blocks(said)
    del start["copilot_usage"]
    yield event("message_start", message=start)
    yield event("ping")
    hollow: Json = {"thinking": "", "signature": "", "text": "", "input": {}}
    for index, block in enumerate(blocks):
        yield event("content_block_start", index=index, content_block={
            name: hollow.get(name, value) for name, value in block.items()})
        for kind, name, value in block_deltas(said, block):
            yield event("content_block_delta", kind == "text_delta", index=index,
                        delta={"type": kind, name: value})
        yield event("content_block_stop", index=index)
    if said.markers.noend:
        return
    yield event("message_delta", delta={"stop_reason": message_stop(said), "stop_sequence": None},
                usage=message_usage(said, said.usage[2]), copilot_usage=copilot_usage(said))
    yield sse({"type": "message_stop", "amazon-bedrock-invocationMetrics": {
        "inputTokenCount": said.usage[0]}}, "message_stop")


def messages_error(said: Said) -> Frame:
    """`event: error`."""
    code = TOLD_CODES[said.markers.code] or "overloaded_error"
    return sse({"type": "error", "error": {"type": code, "message": "fake stream error"}}, "error")


class Dialect(NamedTuple):
    """One way to ask a model."""

    checks: Checks
    prompt: Callable[[Json], Prompt]
    reasons: Callable[[Ask], bool]
    body: Callable[[Said], Json]
    frames: Callable[[Said], Iterator[Frame]]
    error: Callable[[Said], Frame]


def told_failure(frame: Frame) -> Json:
    """The failure that an event tells, as a whole answer."""
    event: Json = json.loads(frame.data.partition(b"data: ")[2])
    return event.get("response", event)  # type: ignore[no-any-return]


def read_prompt(dialect: Dialect, body: Json) -> Prompt:
    """The prompt; what no check looked at may still have the wrong shape."""
    try:
        return dialect.prompt(body)
    except (TypeError, AttributeError, KeyError, IndexError):
        raise bad("failed to parse request")


DIALECTS = {
    CHAT: Dialect(CHAT_CHECKS, chat_prompt, reasons_in_chat, chat_body, chat_frames, chat_error),
    RESPONSES: Dialect(RESPONSES_CHECKS, responses_prompt,
                       lambda ask: bool(ask.supports.get("reasoning_effort")), responses_body,
                       lambda said: ResponseStream(said).frames(), responses_error),
    MESSAGES: Dialect(MESSAGES_CHECKS, messages_prompt, lambda ask: is_thinking(ask.body),
                      messages_body, messages_frames, messages_error)}


# ==== 11. Embeddings, models, token count =========================================================

def count_tokens(ask: Ask) -> Json:
    """A simple count: a quarter of the characters."""
    if ask.fake.count_tokens_fails:
        raise Refuse(500, "Internal Server Error")
    run_checks(COUNT_CHECKS, ask)
    return {"input_tokens": len(json.dumps(ask.body["messages"])) // 4 + 1}


def make_vector(text: str, length: int) -> List[float]:
    """Floats made from the text, each exact in 32 bits."""
    return [byte / 256.0 - 0.5 for byte in hashlib.shake_256(text.encode()).digest(length)]


def embeddings(ask: Ask) -> Json:
    """Strings in an array, floats back whatever encoding_format says; no object, no model."""
    texts = ask.body.get("input")
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        raise Refuse(400, "Bad Request")
    if len(texts) > ask.limits["max_inputs"]:
        raise bad("Too many inputs. The max number of inputs is %d." % ask.limits["max_inputs"])
    length = ask.body.get("dimensions", 16)
    if type(length) is not int or length < 1:
        raise bad("Invalid 'dimensions'.", param="dimensions")
    used = sum(len(text) // 4 + 1 for text in texts)
    return {"data": [{"embedding": make_vector(text, length), "index": at}
                     for at, text in enumerate(texts)],
            "usage": {"prompt_tokens": used, "total_tokens": used}}


def list_models(ask: Ask) -> Json:
    """The catalogue, or the notice about billing for the editor's identity."""
    fake = ask.fake
    is_cli = ask.headers.get("copilot-integration-id") == "copilot-developer-cli"
    if fake.billing_notice and not (is_cli and fake.bearer(ask.record) in fake.github_tokens):
        raise Refuse(403, {"error": {"code": "forbidden", "message":
                                     "Your plan has moved to usage-based billing. Update your "
                                     "client to continue using GitHub Copilot."}})
    fake.add(model_fetches=1)
    return {"data": list(fake.models), "object": "list"}


# ==== 12. GitHub ==================================================================================

NO_SUBSCRIPTION = {
    "can_signup_for_limited": True, "message": "Resource not accessible by integration",
    "error_details": {
        "message": "No access to GitHub Copilot found. You are currently logged in as octocat.",
        "notification_id": "no_copilot_access", "title": "Signup for GitHub Copilot",
        "url": "https://github.com/github-copilot/signup?editor={EDITOR}"}}


def github_error(status: int, message: str) -> Refuse:
    """An error of the REST API."""
    return Refuse(status, {"message": message, "status": str(status),
                           "documentation_url": "https://docs.github.com/rest"})


#: values of fake.exchange_mode -> the refusal ("ok" is not here)
EXCHANGE_MODES: Dict[str, Callable[[], Refuse]] = {
    "no_subscription": lambda: Refuse(403, NO_SUBSCRIPTION),
    "rate_limit": lambda: github_error(403, "API rate limit exceeded for user ID 583231."),
    "forbidden": lambda: github_error(403, "Resource not accessible by integration"),
    "not_found": lambda: github_error(404, "Not Found"),
    "unavailable": lambda: Refuse(503, "<html><body>Unicorn!</body></html>")}


def github_token(fake: FakeUpstream, record: Recorded) -> str:
    """The known GitHub token of a REST call, `Authorization: token X` or `Bearer X`."""
    kind, _, text = record.headers.get("authorization", "").partition(" ")
    if not record.headers.get("user-agent"):
        raise github_error(403, "Request forbidden by administrative rules.")
    if text in fake.machine_tokens and record.path in (USAGE, USER):
        if text.startswith("ghs_"):
            raise github_error(403, "Resource not accessible by integration")
        return text
    if kind.lower() not in ("token", "bearer") or text not in fake.github_tokens:
        is_known = text in fake.machine_tokens or text.startswith("ghp_")
        if not is_known or record.path == USER:
            raise github_error(401, "Bad credentials")
        raise github_error(403, "Resource not accessible by personal access token")
    if record.path.startswith("/copilot_internal/"):
        for name in ("editor-version", "editor-plugin-version"):
            if name not in record.headers:
                raise github_error(400, "missing header " + name)
        if record.headers.get("x-github-api-version") != REST_VERSION:
            raise github_error(400, "invalid apiVersion")
    return text


def exchange(fake: FakeUpstream, record: Recorded) -> Json:
    """GET /copilot_internal/v2/token: a new Copilot token and the host it is good for."""
    login = github_token(fake, record)
    mode = "not_found" if fake.direct else fake.exchange_mode
    if mode in EXCHANGE_MODES:
        raise EXCHANGE_MODES[mode]()
    fake.add(exchanges=1)
    token = fake.mint_token(login)
    given: Json = {
        "token": token, "expires_at": int(fake.tokens[token].expires_at),
        "refresh_in": fake.refresh_in, "sku": "monthly_subscriber_quota", "individual": True,
        "chat_enabled": True, "annotations_enabled": True, "public_suggestions": "enabled",
        "telemetry": "disabled", "tracking_id": "0123abcd", "endpoints": endpoints(fake),
        "enterprise_list": [], "organization_list": [], "limited_user_quotas": None,
        "limited_user_reset_date": None}
    if fake.plan == "free":
        given.update(sku="free_limited_copilot", limited_user_reset_date=1796428800,
                     limited_user_quotas={"chat": 42, "completions": 1875})
    given.update(fake.exchange_extra)
    return given


def endpoints(fake: FakeUpstream) -> Json:
    """The hosts; only `api` is ever contacted."""
    rest = {name: "https://%s.individual.githubcopilot.com" % name
            for name in ("origin-tracker", "proxy", "telemetry")}
    return dict(rest, api=fake.api_url)


def snapshot(name: str, entitlement: int, remaining: float, unlimited: bool) -> Json:
    """One quota of /copilot_internal/user."""
    percent = 100.0 if unlimited else round(remaining * 100 / entitlement, 1)
    return {"quota_id": name, "entitlement": entitlement, "remaining": int(remaining),
            "quota_remaining": remaining, "percent_remaining": percent, "unlimited": unlimited,
            "overage_count": 0, "overage_permitted": False,
            "timestamp_utc": "2026-11-20T12:00:00.000Z"}


def usage(fake: FakeUpstream, record: Recorded) -> Json:
    """GET /copilot_internal/user: quotas of a paid plan, or the free plan's shape."""
    login = fake.logins.get(github_token(fake, record), "octocat")
    given: Json = {"login": login, "access_type_sku": "free_limited_copilot",
                   "copilot_plan": "individual", "chat_enabled": True, "endpoints": endpoints(fake)}
    if fake.plan == "free":
        given.update(limited_user_quotas={"chat": 42, "completions": 1875},
                     monthly_quotas={"chat": 50, "completions": 2000},
                     limited_user_reset_date="2026-12-05")
    else:
        given.update(
            access_type_sku="monthly_subscriber_quota", copilot_plan=fake.plan,
            assigned_date=None, can_upgrade_plan=True, organization_login_list=[],
            quota_reset_date="2026-12-01", quota_reset_date_utc="2026-12-01T00:00:00.000Z",
            token_based_billing=False, quota_snapshots={
                "chat": snapshot("chat", 0, 0.0, True),
                "completions": snapshot("completions", 0, 0.0, True),
                "premium_interactions": snapshot("premium_interactions", 300, 226.33, False)})
    given.update(fake.usage_extra)
    return given


def user(fake: FakeUpstream, record: Recorded) -> Json:
    """GET /user."""
    login = fake.logins.get(github_token(fake, record), "octocat")
    return {"login": login, "id": 583231, "type": "User", "name": login.title()}


def form(record: Recorded) -> Json:
    """A login request's fields, from JSON or a form body."""
    if isinstance(record.json, dict):
        return dict(record.json)
    return dict(urllib.parse.parse_qsl(record.body.decode("utf-8", "replace")))


def device_code(fake: FakeUpstream, record: Recorded) -> Json:
    """POST /login/device/code."""
    client = form(record).get("client_id")
    if not client:
        raise github_error(404, "Not Found")
    device = fake.device
    with fake.changed:
        device.issued += 1
        code = hashlib.sha1(b"device %d" % device.issued).hexdigest()
        device.codes[code] = client
        device.last_poll = time.monotonic()
    return {"device_code": code, "user_code": "FAKE-%04d" % device.issued,
            "verification_uri": fake.url + "/login/device", "expires_in": device.expires_in,
            "interval": device.interval}


def device_outcome(fake: FakeUpstream, fields_: Json) -> str:
    """Name of what this poll meets."""
    device, code = fake.device, str(fields_.get("device_code"))
    if fields_.get("grant_type") != GRANT_TYPE:
        return "unsupported_grant_type"
    if code not in device.codes:
        return "incorrect_device_code"
    if device.codes[code] != fields_.get("client_id"):
        return "incorrect_client_credentials"
    waited, device.last_poll = time.monotonic() - device.last_poll, time.monotonic()
    if device.strict_interval and waited < device.interval:
        return "slow_down"
    return device.outcomes.popleft() if device.outcomes else "granted"


def device_poll(fake: FakeUpstream, record: Recorded) -> Json:
    """POST /login/oauth/access_token: errors come with status 200."""
    given, device = form(record), fake.device
    with fake.changed:
        outcome = device_outcome(fake, given)
        if outcome in ("granted", "expired", "denied"):
            device.codes.pop(given["device_code"])
        if outcome == "slow_down":
            device.interval += device.slow_down_step
        if outcome == "granted":
            fake.github_tokens.add(device.token)
    if outcome == "network":
        raise Drop()
    if outcome == "html":
        raise Refuse(502, "<html><body>Bad Gateway</body></html>")
    if outcome == "granted":
        return {"access_token": device.token, "token_type": "bearer", "scope": ""}
    error = {"pending": "authorization_pending", "expired": "expired_token",
             "denied": "access_denied"}.get(outcome, outcome)
    given = {"error": error, "error_description": "fake: " + error}
    return dict(given, interval=device.interval) if outcome == "slow_down" else given


def upload(fake: FakeUpstream, record: Recorded) -> Json:
    """POST to uploads.github.com: an image becomes a URL."""
    github_token(fake, record)
    asked = dict(urllib.parse.parse_qsl(record.query))
    kind = asked.get("content_type", "")
    if not fake.takes_uploads:
        raise github_error(403, "Resource not accessible")
    if record.headers.get("content-type") != "application/octet-stream" or not record.body \
            or asked.get("name") != kind.replace("image/", "image."):
        raise github_error(422, "Validation Failed")
    url = "%s%06d" % (ATTACHMENTS, fake.next_number())
    fake.attachments[url] = record.body
    return {"url": url}


#: (method, path) -> function(fake, record) -> JSON
GITHUB_ROUTES: Dict[Tuple[str, str], Callable[[FakeUpstream, Recorded], Json]] = {
    ("POST", DEVICE_CODE): device_code, ("POST", DEVICE_POLL): device_poll, ("GET", USER): user,
    ("GET", EXCHANGE): exchange, ("GET", USAGE): usage, ("POST", UPLOAD): upload}
def auto(ask: Ask) -> Json:
    """POST /auto: a model, and a token that is good for it and for this account."""
    fake = ask.fake
    if not fake.auto_models or "auto" not in fake.auto_ways:
        raise Refuse(404, {"error": "not_found"})
    if ask.headers.get("x-github-api-version") != "2026-08-01":
        raise Refuse(404, {"error": "invalid apiVersion"})
    allowed = {"prompt": str, "tier": str, "has_image": bool}
    for name, value in ask.body.items():
        if not value or not isinstance(value, allowed.get(name, type(None))):
            raise bad("invalid " + name)
    if not ask.body.get("prompt") or ask.body["prompt"] != ask.body["prompt"].strip():
        raise bad("prompt is required")
    if ask.body.get("tier", "balance") not in ("efficiency", "balance", "intelligence", "fast"):
        raise bad("unknown tier")
    chosen = fake.auto_models[min(fake.count(AUTO), len(fake.auto_models)) - 1]
    entry = next((e for e in fake.models if e["id"] == chosen), make_model(chosen))
    return dict(mint_selector(ask, chosen), selected_model=entry)


def auto_pair(ask: Ask) -> Json:
    """POST /models/session, what /auto replaced: ids only."""
    fake = ask.fake
    if not fake.auto_models or "pair" not in fake.auto_ways:
        raise Refuse(404, "404 page not found")
    if ask.headers.get("x-github-api-version") > "2026-06-01":
        raise Refuse(404, {"error": "invalid apiVersion"})
    if ask.body != {"auto_mode": {"model_hints": ["auto"]}}:
        raise bad("Invalid request body")
    chosen = fake.auto_models[0]
    return dict(mint_selector(ask, chosen), selected_model=chosen,
                available_models=list(fake.auto_models))


def account_of(ask: Ask) -> str:
    """The GitHub token behind a request's bearer."""
    text = ask.fake.bearer(ask.record)
    token = ask.fake.tokens.get(text)
    return token.github_token if token else text


def mint_selector(ask: Ask, chosen: str) -> Json:
    """A new session token."""
    fake = ask.fake
    text = "selector_%d" % fake.next_number()
    fake.selectors[text] = (chosen, account_of(ask))
    return {"session_token": text, "expires_at": int(fake.now() + fake.selector_s),
            "discounted_costs": {chosen: fake.auto_discount}}


def check_selector(ask: Ask) -> None:
    """A session token must be this account's and for this model; a Free plan's calls need one."""
    fake, text = ask.fake, ask.headers.get("copilot-session-token")
    if text is None:
        if fake.auto_only:
            raise bad("The requested model is not supported.", "model_not_supported", "model")
        return
    if fake.selectors.get(text) != (ask.body.get("model"), account_of(ask)):
        raise Refuse(401, "Invalid auto-mode selector\n")


#: path -> function(ask) -> JSON, after the header checks
COPILOT_ROUTES: Dict[Tuple[str, str], Callable[[Ask], Json]] = {
    ("GET", MODELS): list_models, ("POST", EMBEDDINGS): embeddings,
    ("POST", COUNT_TOKENS): count_tokens, ("POST", AUTO): auto, ("POST", AUTO_PAIR): auto_pair}


# ==== 13. FakeUpstream ============================================================================

class FakeUpstream:
    """The server, its settings and its records. Thread-safe; use as a context manager.

    `share`: another fake whose logins, tokens and sealing key this one uses as well, so that a
    token minted there with `api_url` of this one is good here and only here.
    """

    def __init__(self, port: int = 0, direct: bool = False,
                 share: Optional[FakeUpstream] = None) -> None:
        #: notified on each request, connection, stream start and end, hold, abort
        self.changed = threading.Condition()
        # -- GitHub side
        self.github_tokens: Set[str] = share.github_tokens if share else {"ghu_fake"}
        #: github_pat_ and ghs_ tokens -> why the API refuses them, "" when it does not
        self.machine_tokens: Dict[str, str] = {}
        self.logins: Dict[str, str] = {}   # GitHub token -> login; else "octocat"
        self.device = Device()
        self.exchange_mode = "ok"          # or a key of EXCHANGE_MODES
        self.exchange_extra: Json = {}     # merged over the answer of the exchange
        self.usage_extra: Json = {}        # merged over the answer of /copilot_internal/user
        self.plan = "individual"           # copilot_plan; "free" = that plan's other shape
        self.direct = direct               # exchange answers 404, a gho_/ghu_ token is a bearer
        # -- tokens
        self.tokens: Dict[str, Token] = share.tokens if share else {}
        self.lifetime_s = 1800.0
        self.refresh_in = 1500
        self.clock_offset_s = 0.0          # the fake's clock = wall clock + this
        self.misdirect_until_exchanges = 0  # tokens of exchanges before the Nth get 421
        # -- Copilot side
        self.models: List[Json] = default_models()
        #: what auto chooses, the first time, the second time, ...; [] where there is none
        self.auto_models: List[str] = []
        self.auto_ways: Set[str] = {"auto"}      # and "pair": what /auto replaced
        self.auto_only = False             # a Free plan: models are for auto only
        self.auto_discount = 0.1
        self.selector_s = 86400.0          # life of a choice
        self.selectors: Dict[str, Tuple[str, str]] = {}  # token -> (model, login)
        self.refused_versions: Set[str] = set()  # X-GitHub-Api-Version values that get 466
        #: (title, url) that hosted searches cite; None: models do not search
        self.search_results: Optional[List[Tuple[str, str]]] = None
        self.takes_uploads = True          # images become URLs of its store
        self.attachments: Dict[str, bytes] = {}  # URL -> the image
        self.compacts = False              # /responses makes a compaction item for a trigger
        self.billing_notice = False        # /models refuses all but the developer CLI identity
        self.count_tokens_fails = False
        self.gemini_needs_opaque = False   # refuse Gemini tool calls without reasoning_opaque
        self.lenient: Set[str] = set()     # names of checks to skip
        #: called with each Ask before the checks; may raise Refuse: a backend stricter than usual
        self.refusals: List[Callable[[Ask], None]] = []
        self.quirks: Set[str] = set(QUIRKS)
        self.key: bytes = share.key if share else b"fake sealing key"
        # -- records
        self.requests: List[Recorded] = []
        self.connections = 0               # TCP connections accepted
        self.open_streams = 0              # streamed answers running, thinking included
        self.aborted = 0                   # answers the client did not wait for
        self.holding = 0                   # requests in a hold or stall now
        self.exchanges = 0                 # successful exchanges
        self.model_fetches = 0             # catalogues given out
        self.crashes: List[str] = []       # tracebacks of bugs in the fake
        #: (model, prompt tokens, cached of them, output, nano-AIU, login) of each whole answer
        self.told: List[Tuple[str, int, int, int, int, str]] = []
        # -- machinery
        self.closed = False
        self._number = 0
        self._scripts: Dict[str, Deque[Answer]] = {}
        self._live: Set[socket.socket] = set()
        self._wakers: List[Tuple[socket.socket, socket.socket]] = [socket.socketpair()]
        self._server = Server(("127.0.0.1", port), self)
        self.url = "http://127.0.0.1:%d" % self._server.server_address[1]
        self.api_url = self.url            # endpoints.api of the exchange
        self._thread = threading.Thread(target=self._accept, name="fake-upstream", daemon=True)

    # -- life

    def start(self) -> FakeUpstream:
        """Serve in a thread."""
        self._thread.start()
        return self

    def _accept(self) -> None:
        """One connection after the other until close() makes the last one."""
        while not self.closed:
            self._server.handle_request()

    def close(self) -> None:
        """Stop serving, wake and close every connection, wait for the threads."""
        self.closed = True
        if self._thread.is_alive():
            with socket.create_connection(self._server.server_address):
                self._thread.join()
        self._server.server_close()
        self.release()
        self.hang_up()
        self.wait_for(lambda: not self._live, 2)
        for pair in self._wakers:
            for end in pair:
                end.close()

    def __enter__(self) -> FakeUpstream:
        return self.start()

    def __exit__(self, *error: Any) -> None:
        self.close()

    # -- steering

    def script(self, path: str, *answers: Answer) -> None:
        """Queue answers for the next requests on this path (no query), before normal behaviour."""
        with self.changed:
            self._scripts.setdefault(path, collections.deque()).extend(answers)

    def release(self) -> None:
        """Let everything that is held or stalled now go on."""
        with self.changed:
            self._wakers[-1][1].close()
            self._wakers.append(socket.socketpair())

    def hang_up(self) -> None:
        """Close all connections now, idle ones too, without a word."""
        with self.changed:
            for connection in list(self._live):
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass  # already gone

    def mint_token(self, login: str = "ghu_fake") -> str:
        """Issue a Copilot token without an exchange, bound to `api_url`."""
        with self.changed:
            number = self.next_number()
            expires = self.now() + self.lifetime_s
            text = ("tid=%08x;exp=%d;sku=monthly_subscriber_quota;"
                    "proxy-ep=proxy.individual.githubcopilot.com;st=dotcom;chat=1:%s"
                    % (number, expires, hashlib.sha256(
                        ("%s %d" % (self.url, number)).encode()).hexdigest()))
            self.tokens[text] = Token(self.api_url, login, expires, self.exchanges)
        return text

    def revoke_tokens(self) -> None:
        """All Copilot tokens issued so far answer 401; new ones are good."""
        with self.changed:
            for token in self.tokens.values():
                token.revoked = True

    def move_to(self, url: str) -> None:
        """The account moves to another host: issued tokens get 421 here, new exchanges name it."""
        with self.changed:
            self.api_url = url
            for token in self.tokens.values():
                token.url = url

    def rotate_key(self) -> None:
        """Make every signature and ciphertext handed out so far invalid."""
        self.key += b"+"

    # -- records

    def count(self, path: str) -> int:
        """Requests on a path so far, refused ones included."""
        with self.changed:
            return sum(record.path == path for record in self.requests)

    def last(self, path: str = "") -> Recorded:
        """The newest request (on a path); IndexError if there is none."""
        with self.changed:
            return [record for record in self.requests if path in ("", record.path)][-1]

    def wait_for(self, predicate: Callable[[], Any], timeout: float = 5.0) -> bool:
        """Wait until the predicate holds; False after `timeout` seconds."""
        with self.changed:
            return bool(self.changed.wait_for(predicate, timeout))

    def add(self, **amounts: int) -> None:
        """Change counters and tell waiters."""
        with self.changed:
            for name, amount in amounts.items():
                setattr(self, name, getattr(self, name) + amount)
            self.changed.notify_all()

    # -- used by the sections above

    def now(self) -> float:
        """The fake's clock."""
        return time.time() + self.clock_offset_s

    def next_number(self) -> int:
        """A counter for ids."""
        with self.changed:
            self._number += 1
            return self._number

    def bearer(self, record: Recorded) -> str:
        """The bearer of a request, or ""."""
        kind, _, text = record.headers.get("authorization", "").partition(" ")
        return text if kind == "Bearer" else ""

    def takes_github_token(self, record: Recorded) -> bool:
        """A GitHub token is good as bearer: direct mode, or the CLI's identity asking the list."""
        is_cli = record.headers.get("copilot-integration-id") == "copilot-developer-cli"
        return self.direct or (record.path == MODELS and is_cli)

    def seal(self, purpose: str, text: str) -> str:
        """Signature or ciphertext: `<text in base64>.<MAC>`."""
        mac = hmac.new(self.key, (purpose + text).encode(), "sha256").digest()
        return "%s.%s" % (base64.b64encode(text.encode()).decode(), base64.b64encode(mac).decode())

    def is_sealed(self, purpose: str, sealed: str, text: Optional[str] = None) -> bool:
        """This fake made the seal (for this text)."""
        try:
            inner = base64.b64decode(sealed.partition(".")[0]).decode()
        except ValueError:
            return False
        return sealed == self.seal(purpose, inner) and text in (None, inner)

    # -- used by the handler

    def opened(self, connection: socket.socket) -> int:
        """Note a new connection; its number."""
        with self.changed:
            self._live.add(connection)
            self.connections += 1
            self.changed.notify_all()
            return self.connections

    def ended(self, connection: socket.socket) -> None:
        """Note the end of a connection."""
        with self.changed:
            self._live.discard(connection)
            self.changed.notify_all()

    def record(self, record: Recorded) -> None:
        """Keep a request."""
        with self.changed:
            self.requests.append(record)
            self.changed.notify_all()

    def next_answer(self, path: str) -> Optional[Answer]:
        """The next scripted answer for a path."""
        with self.changed:
            queue = self._scripts.get(path)
            return queue.popleft() if queue else None

    def waker(self) -> socket.socket:
        """A socket that turns readable at the next release() or close()."""
        with self.changed:
            return self._wakers[-1][0]


# ==== 14. Server and handler ======================================================================

class Server(http.server.ThreadingHTTPServer):
    """One thread per connection, no DNS at bind, quiet about clients that hang up."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: Tuple[str, int], fake: FakeUpstream) -> None:
        self.fake = fake
        super().__init__(address, Handler)

    def server_bind(self) -> None:
        """Bind without looking up the host's name."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "localhost", self.server_address[1]

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Not the connection by which close() wakes the accepting thread."""
        return not self.fake.closed

    def shutdown_request(self, request: Any) -> None:
        """Close; the connection is no longer live."""
        super().shutdown_request(request)
        self.fake.ended(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep tracebacks of real bugs for `fake.crashes`."""
        if not isinstance(sys.exc_info()[1], OSError):
            self.fake.crashes.append(traceback.format_exc())
            sys.stderr.write(self.fake.crashes[-1])


class Handler(http.server.BaseHTTPRequestHandler):
    """Reads a request, records it, and plays the scripted, refused or normal answer."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def setup(self) -> None:
        """Number the connection."""
        super().setup()
        self.fake = self.server.fake
        self.number = self.fake.opened(self.connection)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """One request of any method."""
        try:
            self._serve()
        except Gone:
            self.close_connection = True
            self.fake.add(aborted=1)
        except Drop as drop:
            self.close_connection = True
            if drop.reset:  # closing with linger 0 sends RST
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                           struct.pack("hh" if sys.platform == "win32" else "ii",
                                                       1, 0))
                self.rfile.close()
                self.connection.close()

    do_POST = do_HEAD = do_DELETE = do_PUT = do_GET

    # -- reading

    def _serve(self) -> None:
        """Script first, then the routes."""
        path, _, query = self.path.partition("?")
        script = self.fake.next_answer(path)
        is_early = script is not None and script.drop == "before"
        body = b"" if is_early else self._read_body()
        headers = {name.lower(): value for name, value in self.headers.items()}
        try:
            parsed = json.loads(body.decode("utf-8"))
        except ValueError:
            parsed = None
        record = Recorded(self.command, path, query, headers, body, parsed, self.number)
        self.fake.record(record)
        if script is not None and self._play(script):
            return
        try:
            self._route(record)
        except Refuse as refusal:
            self._reply(refusal.status, refusal.body, refusal.headers)

    def _read_body(self) -> bytes:
        """The body by its length; the service is not known to take chunked requests."""
        if "transfer-encoding" in self.headers:
            self._reply(411, "Length Required")
            raise Drop()
        length = int(self.headers.get("content-length") or 0)
        body = self.rfile.read(length)
        if len(body) < length:
            raise Gone()
        return body

    def _route(self, record: Recorded) -> None:
        """The normal behaviour."""
        key = (record.method, record.path)
        if key in GITHUB_ROUTES:
            given = GITHUB_ROUTES[key](self.fake, record)
            wants_json = "json" in record.headers.get("accept", "") or record.method == "GET"
            if wants_json:
                self._reply(201 if record.path == UPLOAD else 200, given)
            else:
                self._reply(200, urllib.parse.urlencode(given),
                            {"content-type": "application/x-www-form-urlencoded"})
            return
        is_known = key in COPILOT_ROUTES or record.method == "POST" and record.path in DIALECTS
        if not is_known:
            raise Refuse(404, "404 page not found")
        ask = Ask(self.fake, record, {}, {})
        run_checks(HEADER_CHECKS, ask)
        if record.method == "POST":
            if not isinstance(record.json, dict):
                raise bad("failed to parse request")
            ask.body = record.json
            if record.path in (AUTO, AUTO_PAIR):
                self._reply(200, COPILOT_ROUTES[key](ask))
                return
            check_selector(ask)
            ask.model = find_model(self.fake, ask.body, record.path)
            run_checks((("vision", check_vision),), ask)
        if key in COPILOT_ROUTES:
            self._reply(200, COPILOT_ROUTES[key](ask))
        else:
            self._speak(DIALECTS[record.path], ask)

    # -- answering

    def _play(self, script: Answer) -> bool:
        """Play a scripted answer; False when the normal behaviour shall follow."""
        if script.hold:
            self._hold()
        if script.drop:
            raise Drop(script.reset)
        if script.chunks is not None:
            self._send(self._head(script.status, dict(
                {"content-type": "text/event-stream", "transfer-encoding": "chunked"},
                **script.headers)))
            for chunk in script.chunks:
                self._send_chunk(chunk)
            if not script.end:
                raise Drop(script.reset)
            self._send(b"0\r\n\r\n")
        elif script.status:
            self._reply(script.status, script.body, script.headers, script.short_by)
        else:
            return False
        if script.stale:
            raise Drop()
        return True

    def _head(self, status: int, headers: Dict[str, str]) -> bytes:
        """Status line and headers, with those every answer has."""
        every = {"x-request-id": self.headers.get("x-request-id", "fake-request"),
                 "x-github-request-id": "FA4E:%06d" % self.fake.next_number(),
                 "x-quota-snapshot-premium_interactions": QUOTA_HEADER}
        every.update(NOISE_HEADERS)
        every.update(headers)
        lines = ["HTTP/1.1 %d Fake" % status] + ["%s: %s" % pair for pair in every.items()]
        return "\r\n".join(lines + ["", ""]).encode("latin-1")

    def _reply(self, status: int, body: Any, headers: Optional[Dict[str, str]] = None,
               short_by: int = 0) -> None:
        """A whole answer in one write; gzip only for who asked."""
        kind = "text/plain; charset=utf-8"
        if not isinstance(body, (bytes, str)):
            kind, body = "application/json", json.dumps(body, ensure_ascii=False)
        elif isinstance(body, str) and body.startswith("<"):
            kind = "text/html"
        data = body.encode("utf-8") if isinstance(body, str) else body
        more = dict({"content-type": kind}, **(headers or {}))
        if "gzip" in self.headers.get("accept-encoding", "") and data:
            data, more["content-encoding"] = gzip.compress(data), "gzip"
        more["content-length"] = str(len(data) + short_by)
        self._send(self._head(status, more) + (b"" if self.command == "HEAD" else data))
        if short_by:
            raise Drop()

    def _speak(self, dialect: Dialect, ask: Ask) -> None:
        """Check a request to a model and answer it."""
        for refuse in self.fake.refusals:
            refuse(ask)
        run_checks(dialect.checks, ask)
        said = answer(ask, read_prompt(dialect, ask.body), dialect.reasons(ask))
        streams = int(bool(ask.body.get("stream")))
        self.fake.add(open_streams=streams)
        try:
            self._wait(said.markers.think_ms / 1000)
            if streams:
                self._stream(dialect, said)
            else:
                self._note(said)
                self._reply(200, told_failure(dialect.error(said)) if said.markers.told
                            else dialect.body(said))
        finally:
            self.fake.add(open_streams=-streams)

    def _stream(self, dialect: Dialect, said: Said) -> None:
        """Send the events, with the incidents the markers ask for."""
        self._send(self._head(200, {"content-type": "text/event-stream; charset=utf-8",
                                    "transfer-encoding": "chunked"}))
        sent, ended = 0, self._incident(dialect, said, 0)
        for frame in () if ended else dialect.frames(said):
            if frame.text and said.markers.delay_ms:
                self._wait(said.markers.delay_ms / 1000)
            self._send_frame(frame, said.markers)
            sent += frame.text
            if frame.text and self._incident(dialect, said, sent):
                break
        else:
            self._note(said)
        self._send(b"0\r\n\r\n")

    def _note(self, said: Said) -> None:
        """Remember what an answer tells of its cost, and for whose token."""
        token = self.fake.tokens.get(self.fake.bearer(said.ask.record))
        self.fake.told.append((said.ask.name, *said.usage, nano_aiu(said),
                               token.github_token if token else ""))

    def _incident(self, dialect: Dialect, said: Said, sent: int) -> bool:
        """What happens after so many text events; True when the stream is to end here."""
        markers = said.markers
        if sent == markers.cut:
            raise Drop(bool(markers.rst))
        if sent == markers.stall:
            self._hold()
        if sent == markers.error:
            self._send_frame(dialect.error(said), markers)
            return True
        return False

    # -- the wire

    def _send(self, data: bytes) -> None:
        """Send all or find the client gone."""
        try:
            self.connection.sendall(data)
        except OSError:
            raise Gone()

    def _send_chunk(self, data: bytes) -> None:
        """One chunk in one send."""
        if data:
            self._send(b"%x\r\n%s\r\n" % (len(data), data))

    def _send_frame(self, frame: Frame, markers: Markers) -> None:
        """One event in the shape the markers ask for."""
        data = frame.data
        if markers.odd:
            data = b": a comment\n" + data.replace(b"data: ", b"data:", 1)
        if markers.crlf:
            data = data.replace(b"\n", b"\r\n")
        size = 1 if markers.bytewise else (len(data) + 1) // 2 if markers.split else len(data)
        for at in range(0, len(data), size):
            self._send_chunk(data[at:at + size])

    def _hold(self) -> None:
        """Wait for fake.release(); one that comes when `holding` has risen is not lost."""
        wake = self.fake.waker()
        self.fake.add(holding=1)
        try:
            self._wait(None, wake)
        finally:
            self.fake.add(holding=-1)

    def _wait(self, seconds: Optional[float], wake: Optional[socket.socket] = None) -> None:
        """Let time pass (None: until release) with an eye on client and fake.

        Raises Gone as soon as the client hangs up, Drop when the fake closes.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        wake = wake or self.fake.waker()
        with POLLER() as poller:
            poller.register(self.connection, selectors.EVENT_READ)
            poller.register(wake, selectors.EVENT_READ)
            while not self.fake.closed:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return
                for key, _ in poller.select(left):
                    if key.fileobj is wake and seconds is None and not self.fake.closed:
                        return
                    if key.fileobj is self.connection:
                        self._look()
                    poller.unregister(key.fileobj)  # a pipelined request, or not our release
        raise Drop()

    def _look(self) -> None:
        """The client's side is readable: an end, or the next request?"""
        try:
            if self.connection.recv(1, socket.MSG_PEEK):
                return
        except OSError:
            pass
        raise Gone()


# ==== 15. Main ====================================================================================

def main(argv: Optional[List[str]] = None) -> int:
    """Run the fake by hand: prints its URL and serves until Ctrl-C."""
    parser = argparse.ArgumentParser(description="A stand-in for GitHub and GitHub Copilot.")
    parser.add_argument("--port", type=int, default=0, help="default: any free port")
    parser.add_argument("--direct", action="store_true", help="no token exchange")
    args = parser.parse_args(argv)
    with FakeUpstream(args.port, args.direct) as fake:
        print(fake.url, flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
