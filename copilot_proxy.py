#!/usr/bin/env python3
"""copilot_proxy.py - your own GitHub Copilot subscription as a local OpenAI and Anthropic API.

One file, standard library only, Python 3.8 or newer.  Copy it anywhere and run:

    python copilot_proxy.py start          log in once, then serve http://127.0.0.1:4399/v1
    python copilot_proxy.py start --demo   the same with no account and no network
    python copilot_proxy.py check-usage    what is left of the quota

Map of the file.  A section uses only names from sections above it; 2 to 11 are pure: no socket,
file, thread, clock or random number, so they can be read and tested by themselves.

     1 Imports             what of the standard library is used
     2 Constants           every number and header value, with unit and source
     3 Errors              one class per kind of failure, one table of their names on the wire
     4 Helpers             JSON, redaction, unwrapping of upstream errors
     5 Vocabulary          Usage, Model, Request, Response, events: common to all dialects
     6 Framing             HTTP heads, bodies and server-sent events, bytes in, values out
     7 Dialects            ChatCompletions, Responses, Messages: rules, streams, translation;
                           Gemini and Ollama: for clients alone
     8 Transcript care     histories mended, prompt cache marked, images, compaction
     9 Planning            which model is meant, which way to ask it, token estimate
    10 Repairs             what the upstream refuses, and how it is asked again
    11 Settings            flag > environment > default
    12 Storage             the folder with logins and keys
    13 Upstream HTTP       how a coroutine waits; one urllib opener with a keep-alive pool
    14 GitHub              device flow, token exchange, usage
    15 Copilot             the short-lived token, the model catalogue, a call and its retries
    16 History             the table of requests, lanes of quotas, events for the page
    17 Policy              keys and accounts, limits, approval by hand, budget, counts
    18 HTTP server         the event loop, connections, requests, answers, streams
    19 Page                what a browser shows
    20 Endpoints           Job, one short function per route, the table of routes
    21 Demo                a make-believe GitHub and Copilot inside this process
    22 Setup               clients, services, what is in the way: tables and their text
    23 Commands            start, auth, check-usage, debug, models, setup
    24 Main

The way of a request:

    Server.serve -> Handler -> ROUTES -> Job: read, identify, resolve, expand, plan, admit,
                                              send -> Attempts -> Upstream -> GitHub Copilot
                                                                                    |
    client socket <- chunk <- StreamRelay.feed(bytes) -> bytes <--- upstream socket

All of this is one coroutine for each connection (`async def`, without asyncio).  The EventLoop
drives them in one thread; what may block goes to a few others.  Who waits for what, and who owns a
connection, is drawn at EventLoop, HttpConnection and ClientConnection; what is tried again, at
Attempts; the stages of a request, at Job.

Where client and model speak the same dialect a StreamRelay mends bytes; else it is made of a
StreamDecoder (upstream bytes to neutral events) and a StreamEncoder (events to client bytes).

Hosts contacted: github.com and api.github.com (login, token exchange, usage), and the Copilot API
host that GitHub names together with the token (*.githubcopilot.com).  With --github-url and
--copilot-url: those instead.  With --fetch-images the hosts of images that clients name by URL.
Nothing else, ever: no telemetry, no update check.

Files written (mode 0600) in the data folder, see the section Storage: `github_token`,
`proxy_accounts.json`, and what was asked when at what cost, never its words, in
`history.sqlite3` (--no-history).  Nothing else, but what --log-bodies and debug --bundle are told
to write.

Secrets held: the GitHub tokens (in those files and in memory), the Copilot tokens made from them
(in memory only, about 30 minutes) and the keys of clients (as hashes).  Tokens go to the hosts
they belong to, and none of all this to a log, an error text or another host.

As a library: `from copilot_proxy import App, DIALECTS` has no side effect; the names in
`__all__` are the promise, everything else may change.
"""

# ==== 1. Imports ==================================================================================
# Python 3.7 stops at the check.  Older ones stop at the first line that they cannot read, and print
# it: Python 3.6 at the first of these, Python 2 at OLDEST_PYTHON.
from __future__ import annotations  # copilot_proxy.py needs Python 3.8 or newer  # fmt: skip

import sys

OLDEST_PYTHON: tuple[int, int] = (3, 8)  # copilot_proxy.py needs Python 3.8 or newer  # fmt: skip
if sys.version_info < OLDEST_PYTHON:
    TOO_OLD = "copilot_proxy.py needs Python %d.%d or newer, this is Python %d.%d" % (
        OLDEST_PYTHON + sys.version_info[:2]
    )
    if __name__ == "__main__":
        sys.exit(TOO_OLD)
    raise ImportError(TOO_OLD)

import argparse
import base64
import collections
import contextlib
import datetime
import email.utils
import errno
import functools
import hashlib
import heapq
import hmac
import html
import http.client
import json
import logging
import math
import os
import platform
import queue
import re
import secrets
import select
import selectors
import signal
import socket
import socketserver
import struct
import tempfile
import threading
import time
import types
import urllib.error
import urllib.parse
import urllib.request
import zlib
from dataclasses import dataclass, field, replace
from http.server import ThreadingHTTPServer
from typing import (
    Any,
    Callable,
    ClassVar,
    Container,
    Coroutine,
    Dict,
    Generator,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
)

__version__ = "0.1.0"
__all__ = [
    "CLIENT_DIALECTS",
    "DIALECTS",
    "App",
    "BodyDecoder",
    "Model",
    "ProxyError",
    "SSEDecoder",
    "Settings",
    "Usage",
    "__version__",
    "main",
]

Json = Dict[str, Any]  # a JSON object
Headers = Dict[str, str]  # header names in lower case, doubled ones joined by ", "

# ==== 2. Constants ================================================================================
# Every number has its unit in the name.  Version values age: each is overridable by --header.

GITHUB_URL = "https://github.com"
COPILOT_URLS = {  # used only when neither the exchange nor a flag names a host
    "individual": "https://api.githubcopilot.com",
    "business": "https://api.business.githubcopilot.com",
    "enterprise": "https://api.enterprise.githubcopilot.com",
}
COPILOT_HOSTS = (
    ".githubcopilot.com",
    ".ghe.com",
)  # a server-given API host must end so
CLIENT_ID = "Iv1.b507a08c87ecfe98"  # the editor's Copilot app: tokens ghu_...
SCOPE = "read:user"
DEVICE_GRANT = "urn:ietf:params:oauth:grant-type:device_code"
REFUSED_PREFIX = "ghp_"  # classic tokens: never accepted by Copilot
MACHINE_PREFIXES = ("github_pat_", "ghs_")  # fine-grained ones, those of workflows

API_VERSIONS = (
    "2026-08-01",
    "2026-06-01",
    "2025-05-01",
)  # first one is sent, rest after a 466
AUTO_API_VERSION, PAIR_API_VERSION = (
    "2026-08-01",
    "2026-06-01",
)  # /auto; what it replaced
INTERNAL_API_VERSION = "2025-04-01"  # for /copilot_internal/*
EDITOR_HEADERS = {
    "Copilot-Integration-Id": "vscode-chat",
    "Editor-Version": "vscode/1.138.0",
    "Editor-Plugin-Version": "copilot-chat/0.66.0",
    "User-Agent": "GitHubCopilotChat/0.66.0",
}
CLI_INTEGRATION = (
    "copilot-developer-cli"  # identity for /models with the GitHub token itself
)
CLI_HEADERS = {  # the command line's: the only one that tokens of machines may have
    "Copilot-Integration-Id": CLI_INTEGRATION,
    "Copilot-Harness-Id": "copilot-sdk",
    "Editor-Version": "copilot/1.0.80",
    "User-Agent": "copilot/1.0.80",
}
INTENT, MODEL_INTENT = "conversation-agent", "model-access"
ANTHROPIC_VERSION = "2023-06-01"
CONTEXT_BETA = "context-management-2025-06-27"
TOOL_BETA = "advanced-tool-use-2025-11-20"
BETA_PREFIXES = (
    "interleaved-thinking-",
    "advanced-tool-use-",
)  # others are refused upstream
PASSED_HEADERS = (
    "retry-after",
    "retry-after-ms",
    "x-should-retry",
    "x-github-request-id",
    "x-copilot-service-request-id",
    "openai-processing-ms",
)
QUOTA_PREFIXES = ("x-quota-snapshot-", "x-usage-ratelimit-")
PASSED_PREFIXES = ("x-ratelimit-", "anthropic-ratelimit-", *QUOTA_PREFIXES)
EXPOSED_HEADERS = (  # that pages of --cors-origin may read, beside those of the answer
    "x-request-id",
    "request-id",
    "retry-after",
    "retry-after-ms",
    "x-should-retry",
    "x-copilot-proxy-search",
    "x-copilot-proxy-auto",
    "x-copilot-proxy-credits",
    "x-copilot-proxy-fallback",
    "x-copilot-proxy-lossy",
    "x-copilot-proxy-model",
    "x-copilot-proxy-repaired",
)

DEFAULT_PORT = 4399
BACKLOG = 1024
MAX_HEAD_BYTES = 64 * 1024
MAX_TARGET_BYTES = 16 * 1024
MAX_HEADER_FIELDS = 128
MAX_BODY_BYTES = 32 * 1024 * 1024  # as the upstream's own services use
JSON_CHECK_BYTES = 1024 * 1024  # smaller bodies are parsed without a look
JSON_ROOM_BYTES = 64 * 1024 * 1024  # of values beside their texts: 1.8 million numbers
VECTORS_ROOM_BYTES = 256 * 1024 * 1024  # of one batch of embeddings
JSON_PIECE_BYTES = 128 * 1024  # looked at in one piece
MAX_PATH_STEPS = 16  # of a field that an upstream's error names
MAX_JSON_DEPTH = 200  # some functions call themselves for each level
MAX_INT_DIGITS = 4000  # of an integer in JSON; Python's own limit is 4300
MAX_ERROR_BYTES = 64 * 1024
MAX_ERROR_TEXT = 2000  # characters of an upstream message that are passed on
MAX_LOGGED_CHARS = 1000  # of what is listed in one line of the log
MAX_SAID = 700  # of it are looked through for what can be repaired
MAX_ANSWER_BYTES = 256 * 1024 * 1024  # a whole body that must be looked at
MAX_FRAME_BYTES = 32 * 1024 * 1024  # one server-sent event
MAX_CHUNK_LINE_BYTES = 1024
MAX_ID_CHARS = 64  # of item and call ids, OpenAI's own validator
MAX_WHITESPACE_RUN = 2000  # in streamed tool arguments: a model gone astray
MAX_UNNAMED_CHARS = 64 * 1024  # of arguments before the name of their tool
READ_BYTES = 64 * 1024  # of one look at a socket
RECORD_BYTES = 16 * 1024  # of a TLS record, at most
NAME_AGE_S = 60.0  # of the addresses of a host

HANDSHAKE_S = 10.0  # of TLS, from the connection's beginning
HEAD_TIMEOUT_S = 30.0  # a request head, from its first byte
IDLE_CLIENT_S = 75.0  # between two requests of one connection
BODY_STALL_S = 30.0  # a request body without any progress
BODY_BYTES_PER_S = 16 * 1024  # and the slowest whole that is waited for
SEND_TIMEOUT_S = 60.0  # a client that takes nothing
WORKER_IDLE_S = 10.0  # then an idle worker thread ends
MAX_WORKERS, WORKER_QUEUE = 6, 256  # threads for what may block; what may wait for one
INLINE_BYTES = 128 * 1024  # a larger body is parsed in a thread
HEADS_KEPT = 200  # beginnings of upstream requests
DEFER_S = (
    0.001  # what a request leaves to be recorded waits no longer for a quiet moment
)
LOG_TIME = "%H:%M:%S"
SLICE_S, MAX_SLICE_S = 0.001, 0.008  # of computing between two looks at the streams
ACCEPTED_AT_ONCE = 16  # connections in one round of the loop
SPARE_FILES = 32  # kept free for logins, history, the pool
FIRST_REQUEST_S = 0.1  # at shutdown, for a connection that has just come
DRAIN_S = 0.5  # for the last chunk behind a terminal event
MAX_OUT_BYTES = 256 * 1024  # not taken by a slow client: its upstream is paused
LINGER_S = 2.0  # reading on after a refusal, so that it can be read
CONNECT_TIMEOUT_S = 30.0
ANSWER_TIMEOUT_S = 900.0  # until the head, and between bytes: long silent reasoning
GITHUB_TIMEOUT_S = 30.0
CODE_LIFE_S, MAX_CODE_LIFE_S = 900.0, 86400.0  # of a login code: GitHub's, the longest
POLL_S, MAX_POLL_S = 5.0, 3600.0  # between two questions whether a login was granted
CODE_PAUSE_S = 5.0  # between two login codes, however soon the first expires
KEEPALIVE_S = 15.0  # of silence, then a ping to the client
POOL_IDLE_S = 50.0
POOL_SIZE = 1024
TOKEN_MARGIN_S, TOKEN_FALLBACK_S = 60.0, 1500.0
TOKEN_RETRY_S = (
    1.0,
    5.0,
    15.0,
    60.0,
)  # pauses after failed refreshes, the last one repeats
CODE_WAIT_S, CODE_LOOK_S = (
    5.0,
    0.005,
)  # a refused call waits so long for the code to name
REACTIVE_PAUSE_S = 60.0  # after a refresh that did not cure an opaque 403
LOGIN_RETRY_S = 180.0  # between tries of a login that GitHub has refused
CATALOGUE_AGE_S, CATALOGUE_RETRY_S = 600.0, 60.0
HEALTH_WAIT_S = 10.0  # that `debug --health` gives a starting server
MODELS_WAIT_S = 5.0  # that `debug` gives the list of models
MAX_MODEL_CHARS = 200
MAX_COMPARED, COMPARED_CHARS = 200, 64  # ids of models, for the text of a 404
MAX_HOST_CHARS, MAX_LABEL_CHARS = (
    300,
    63,
)  # of a Host header, and of a part of a DNS name
SESSION_HEADERS = (
    "session_id",
    "session-id",
    "x-session-id",
    "x-claude-code-session-id",
    "x-session-affinity",
    "conversation_id",
)
MAX_SESSIONS = 1000  # whose last model and spendings are remembered
MAX_SPELLINGS = 1000  # of model names that are remembered
RATE_QUEUE = 100  # callers that may wait for --rate-limit or --manual
WAITING_MAX = 256  # callers that may wait for --max-concurrency
WRONG_KEYS_PER_MINUTE = 60  # of one address, then 429
KEY_HEADERS = ("x-api-key", "api-key", "x-goog-api-key")  # and Authorization: Bearer
KEY_PREFIX, KEY_MIN_CHARS = "sk-copilot-", 8
STALE_FILE_S = 600.0  # then a half-written one is swept away
MAX_ACCOUNTS = 1000  # in memory; as many keys are kept in the file
KEYS_LISTED = 50  # in the log at the start
MAX_LOGINS, LOGIN_AGE_S = 32, 1800.0  # begun by browsers
BUDGET_WAIT_S, BUDGET_LOOK_S = 2.0, 0.02  # for the history at the start
HICCUP_STATUS = (500, 502, 503, 504, 529)
MAX_CALLS, MAX_REPAIRS = 5, 3  # upstream calls of one request; repairs among them
MAX_LEARNED, MAX_MARKS = 500, 5000  # remembered: models with repairs, refused state
MAX_LESSONS = 50  # of facts, and of refused values, of one model
MAX_MARKED_IMAGES, MARKED_CHARS = 50, 200  # of one refusal; of each end of a value
LIMIT_S, QUOTA_LIMIT_S = 7 * 86400.0, 32 * 86400.0  # the longest rest that is believed
LIMIT_PAUSE_S, QUOTA_PAUSE_S = 10.0, 3600.0  # a rest whose length nobody said
LIMIT_PAUSE_MAX_S = 300.0  # the first doubles up to this while the limit repeats
PROBE_S, PROBE_MAX_S = (
    60.0,
    300.0,
)  # the first pause between two probes, and the longest
LONG_REST_S, LONG_PROBE_MAX_S = 86400.0, 900.0  # the longest one in a rest beyond a day
TRIAL_S = 5.0  # after a rest the first request is alone for so long
MAX_DEAD_PROBES = 5  # in a row, then the next one waits its pause
MAX_SCOPES = 200  # that can rest at once, for each account
OVERLOAD_PAUSE_S = 1.0  # after an overload that was told inside an answer
EMBEDDING_BATCH = 512  # upstream's max_inputs
MAX_EMBEDDINGS = 2048  # of one request, as OpenAI takes them
MAX_PROMPTS = 128  # of one completion
CALLS_WAIT_S = 30.0  # a request of several calls waits so long for --rate-limit
MAX_NAMES = 1000
MAX_SETTINGS_CHARS = 1024 * 1024  # of a client's file that are looked through
MAX_LOSSES, MAX_LOSS_CHARS = 200, 60  # recorded for one request; of a field's name
MAX_NOTE_CHARS = 2048  # of the headers that list losses and repairs
STORE_COUNT, STORE_BYTES = (
    2000,
    64 * 1024 * 1024,
)  # of answers that clients may name later
STORE_AGE_S = 6 * 3600.0
MAX_REFERENCES, MAX_KEPT_IDS = (
    4096,
    5000,
)  # to kept items in one request; of items of an answer
IMAGE_BYTES, IMAGE_TIMEOUT_S = 5 * 1024 * 1024, 15.0  # of a fetched image
IMAGE_CACHE_BYTES = 16 * 1024 * 1024  # of fetched images, as base64
AUTO_TIMEOUT_S = 5.0  # for the choice of a model by `auto`
AUTO_LIFE_S, AUTO_LIFE_MAX_S = 1800.0, 86400.0  # of a choice that names no end; at most
AUTO_RENEW_S, AUTO_ABSENT_S = 300.0, 600.0  # before its end; where there is no auto
MAX_AUTO_CHARS = 8000  # of a user's words that auto chooses by
AUTO_PROMPT_TOKENS, AUTO_OUTPUT_TOKENS = (
    128000,
    16000,
)  # of auto, where nothing is listed
MAX_QUERY_CHARS, MAX_QUERIES = 4000, 20  # of a search of the web; of one request
MAX_SOURCES = 50  # of a search
MAX_IMAGES, MAX_GEMINI_IMAGES = 20, 10  # the upstream's own limits
ATTACHMENTS_URL = "https://github.com/github-copilot/chat/attachments/"
NANO, MILLION = 10**9, 10**6  # nano-AIU of a credit (USD 0.01)
MAX_COUNT = 2**53  # larger is no count
MAX_NUMBER_CHARS = 24  # of a number that is written as text
MAX_DATE_CHARS = 64
LAST_MOMENT_S = 253402300799.0  # the end of the year 9999, in Unix seconds
#: what is known of an answer's cost: tokens, those of the prompt disjoint, and nano-AIU
USAGE_FIELDS = ("input", "cache_read", "cache_write", "output", "reasoning")
PRICED = (
    "input",
    "cache_read",
    "cache_write",
    "cache_write_1h",
    "output",
)  # kinds with a price
COUNTS = (*USAGE_FIELDS, "nano_aiu")
MAX_FILTER_CHARS = 200  # of each wish of GET /history
HISTORY_ROWS, HISTORY_AGE_S = 200000, 400 * 86400.0
HISTORY_QUEUE = 5000  # rows that wait while the file cannot be written
HISTORY_PAUSE_S, HISTORY_RETRY_S = 0.25, 5.0  # between two writes; after a failed one
HISTORY_BUSY_S, HISTORY_WAIT_S = 1.0, 2.0  # for other processes' locks; for an answer
MAX_READERS, READER_QUEUE = 32, 500  # of /history/events
RECENT, BODIES_KEPT = (
    50,
    3000,
)  # requests in memory; files in the folder of --log-bodies
BUDGET_WARNING = 0.8  # of the budget
OUTPUT_QUEUE_CHARS = 512 * 1024  # of log and terminal, while nobody takes them
OUTPUT_PAUSE_S = 0.02  # between two writes: many lines are one write then
OUTPUT_LOOK_S, OUTPUT_END_S = 0.1, 0.5  # how often a full pipe is looked at; at the end

# ==== 3. Errors ===================================================================================
# Whose fault it is decides the class; the status decides the name on the wire.  An error is raised
# where the fact is known and rendered once, by the dialect of the route that was called.

#: status -> (type in OpenAI's shape, type in Anthropic's shape, status in Google's shape)
ERROR_TYPES = {
    400: ("invalid_request_error", "invalid_request_error", "INVALID_ARGUMENT"),
    401: ("authentication_error", "authentication_error", "UNAUTHENTICATED"),
    402: ("insufficient_quota", "permission_error", "RESOURCE_EXHAUSTED"),
    403: ("permission_error", "permission_error", "PERMISSION_DENIED"),
    404: ("invalid_request_error", "not_found_error", "NOT_FOUND"),
    413: ("invalid_request_error", "request_too_large", "INVALID_ARGUMENT"),
    429: ("rate_limit_error", "rate_limit_error", "RESOURCE_EXHAUSTED"),
    503: ("server_error", "overloaded_error", "UNAVAILABLE"),
    504: ("server_error", "api_error", "DEADLINE_EXCEEDED"),
    529: ("server_error", "overloaded_error", "UNAVAILABLE"),
}


class ErrorClass(NamedTuple):
    """A kind of failure: its HTTP status, the code of it in a failed Responses object ("": the
    upstream's own code stays), and how its names end: codes, types and statuses of upstreams."""

    status: int
    response_code: str
    endings: tuple[str, ...]


#: The one table of failures that have a name.  A limit or a used-up quota makes the model rest.
#: Codex acts on the codes of the second column.
ERROR_CLASSES = (
    ErrorClass(
        402,
        "insufficient_quota",
        (
            "quota_exceeded",
            "insufficient_quota",
            "overage_limit_reached",
            "billing_not_configured",
            "billing_error",
            "payment_required",
        ),
    ),
    ErrorClass(
        429,
        "rate_limit_exceeded",
        (
            "rate_limited",
            "rate_limit_exceeded",
            "rate_limit_error",
            "mode_limit_exceeded",
            "resource_exhausted",
            "too_many_requests",
            "extension_blocked",
        ),
    ),
    ErrorClass(
        529, "server_is_overloaded", ("overloaded", "overloaded_error", "slow_down")
    ),
    ErrorClass(503, "server_is_overloaded", ("unavailable", "unavailable_error")),
    ErrorClass(504, "", ("timeout", "timeout_error", "deadline_exceeded")),
    ErrorClass(500, "", ("server_error", "internal_error", "internal", "api_error")),
    ErrorClass(413, "", ("request_too_large",)),
    ErrorClass(404, "", ("not_found_error", "not_found")),
    ErrorClass(403, "", ("permission_error", "permission_denied")),
    ErrorClass(401, "", ("authentication_error", "unauthenticated")),
    ErrorClass(
        400,
        "",
        (
            "invalid_request_error",
            "invalid_request",
            "invalid_request_body",
            "invalid_argument",
            "invalid_prompt",
            "failed_precondition",
            "content_filter",
            "policy",
            "policy_violation",
            "context_length_exceeded",
            "model_not_supported",
            "unsupported_value",
        ),
    ),
)


def status_of(name: Any) -> int:
    """The HTTP status that an upstream's code, type or status means, 0 for what has no meaning.
    'user_model_rate_limited:gpt-5-mini' -> 429, 'overloaded_error' -> 529, 503 -> 503"""
    if isinstance(name, int) and 400 <= name < 600:
        return name
    if not isinstance(name, str) or not name:
        return 0
    stem = name[:MAX_ERROR_TEXT].partition(":")[0].strip().lower()
    if re.fullmatch("[45][0-9][0-9]", stem):
        return int(stem)
    for row in ERROR_CLASSES:
        if stem.endswith(row.endings):
            return row.status
    return 0


def true_status(status: int, names: Iterable[Any]) -> int:
    """The status of a failure by its names; a limit, a quota or an overload counts whatever the
    status it was sent with.  (400, ["rate_limited"]) -> 429, (404, ["not_found"]) -> 404"""
    named = next(filter(None, map(status_of, names)), 0)
    is_limit = status in (402, 429)
    if (
        named in (402, 429)
        and not is_limit
        or named == 529
        and status in (400, 500, 502)
    ):
        return named
    return status


class ProxyError(Exception):
    """A failure that the caller is told about; `str(error)` says what happened and what to do.
    status: HTTP status; code, param: OpenAI's fields, None when unknown; headers: to be added to
    the answer; details: Anthropic's `error.details`, None when there are none.
    overflow: (tokens, limit) of too long a prompt, both 0 when nobody said; else None."""

    status = 500
    overflow: tuple[int, int] | None = None

    def __init__(
        self,
        message: str,
        status: int | None = None,
        code: str | None = None,
        param: str | None = None,
        headers: Headers | None = None,
        details: Json | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status or self.status
        self.code, self.param, self.details = code, param, details
        self.headers: Headers = headers or {}

    def types(self) -> tuple[str, str, str]:
        """(OpenAI's type, Anthropic's type, Google's status) for this HTTP status."""
        if self.status in ERROR_TYPES:
            return ERROR_TYPES[self.status]
        if self.status < 500:
            return ERROR_TYPES[400]
        return "server_error", "api_error", "INTERNAL"

    @property
    def response_code(self) -> str:
        """The code in a failed Responses object."""
        for row in ERROR_CLASSES:
            if row.status == self.status and row.response_code:
                return row.response_code
        return self.code or self.types()[0]


class ConfigError(ProxyError):
    """A flag, variable or file that cannot be used; ends a command with exit code 2."""


class BadRequest(ProxyError):
    """The client's request cannot be served as it is."""

    status = 400


class AuthError(ProxyError):
    """Nobody is logged in, or GitHub refuses the login."""

    status = 401


class RateLimited(ProxyError):
    """Too early; `Retry-After` is among the headers."""

    status = 429


#: what upstreams say of too long a prompt; two numbers are its tokens and the limit, in any order
_OVERFLOW = re.compile(
    r"token count of (\d{1,15}) exceeds the limit of (\d{1,15})"
    r"|prompt is too long(?:: (\d{1,15}) tokens > (\d{1,15}))?"
    r"|context limit: (\d{1,15} \+ \d{1,15}) > (\d{1,15})"
    r"|too large for model context window|input is too long"
    r"|maximum context length is (\d{1,15}) tokens(?:.*?(?:resulted in|requested) (\d{1,15}))?"
    r"|exceeds? (?:the|this) (?:model'?s? )?context (?:window|length|limit)",
    re.DOTALL,
)
_OVERFLOW_CODE = "context_length_exceeded"


class UpstreamError(ProxyError):
    """GitHub or Copilot could not be reached, or answered with an error.  Too long a prompt gets
    the status and code that clients act on, whatever the upstream's were."""

    status = 502
    answered = False  # the status is the upstream's own
    unsent = False  # the whole request cannot have been seen by the upstream
    opaque = False  # a 403 without any reason: perhaps the token
    showed_nothing = False  # a stream that failed before a user saw something of it

    def __init__(
        self,
        message: str,
        status: int | None = None,
        code: str | None = None,
        param: str | None = None,
        headers: Headers | None = None,
    ) -> None:
        super().__init__(message, status, code, param, headers)
        found = _OVERFLOW.search(message.lower())

        if found or code in (_OVERFLOW_CODE, "model_max_prompt_tokens_exceeded"):
            self.status, self.code = 400, _OVERFLOW_CODE
            counts = sorted(
                sum(map(int, text.split(" + ")))
                for text in (found.groups() if found else ())
                if text
            )
            if len(counts) == 2:
                self.overflow = (counts[1], counts[0])
            else:
                self.overflow = (0, 0)

    def mark_early(self) -> None:
        """It ended a stream that had shown nothing yet; after a long silence nobody asks again."""
        self.showed_nothing = self.status != 504


class StreamCut(UpstreamError):
    """The upstream's body ended before its end."""


class StaleConnection(UpstreamError):
    """A kept-alive connection turned out to be closed before a byte of the answer came."""


def forget_frames(error: ProxyError) -> ProxyError:
    """An error that is caught for good.  Its traceback and those behind it lead to the variables of
    all that was going on, the body among them, and back to itself: they would stay in memory."""
    error.__context__ = error.__cause__ = None
    return error.with_traceback(None)


class ClientGone(Exception):
    """The client has hung up: nobody is left to answer."""


# ==== 4. Helpers ==================================================================================
# Small pure functions that several sections need.


def _no_constant(name: str) -> Any:
    raise ValueError("%s is not JSON" % name)


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError("%s is too large a number" % text[:20])
    return value


def _short_int(text: str) -> int:
    if len(text) > MAX_INT_DIGITS:
        raise ValueError("a number has more than %d digits" % MAX_INT_DIGITS)
    return int(text)


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_decode = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite).decode
_decode_digits = json.JSONDecoder(
    parse_constant=_no_constant, parse_float=_finite, parse_int=_short_int
).decode
#: for long lists of floats, which may hold NaN: three times as fast
decode_vectors = json.JSONDecoder().decode


class TooManyValues(ValueError):
    """A JSON text whose values would fill the memory."""


def dumps(value: Any) -> bytes:
    """Compact UTF-8 JSON; key order is kept.  A lone surrogate falls back to ASCII escapes."""
    try:
        return _encode(value).encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":")).encode()


_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_ESCAPES = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"  # a pair
    rb"|(u[dD][89a-fA-F][0-9a-fA-F]{2})|.)",
    re.DOTALL,
)  # half of one; others


def valid_text(data: bytes) -> bytes:
    """JSON whose texts are valid Unicode: half of a surrogate pair becomes U+FFFD, as clients cut
    texts in the middle of an emoji.  The same object where there is none.

    No upstream takes such a text, and a history that holds one would be refused for ever."""
    if not _SURROGATE.search(data):
        return data
    mended = _ESCAPES.sub(
        lambda found: b"\\ufffd" if found.group(1) else found.group(), data
    )
    if mended == data:
        return data
    return mended


def _has_long_digits(data: bytes) -> bool:
    """Are there so many digits in a row?  Python before 3.8.14 takes the square of their number
    to make an integer of them.  Looks at pieces so short that one lies in any such row."""
    step = MAX_INT_DIGITS // 2
    return any(data[at : at + step].isdigit() for at in range(0, len(data), step))


def _is_deep(value: Any, data: bytes) -> bool:
    """Is the value nested more deeply than may be walked by functions that call themselves?"""
    if data.count(b"[") + data.count(b"{") <= MAX_JSON_DEPTH:
        return False
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer)
            if type(inner) in (dict, list)
        ]
        if not level:
            return False
    return True


def _room_of(data: bytes) -> int:
    """About how many bytes the values between these marks take in a 64-bit Python, beside the
    characters of texts: lists, objects, their entries, and what stands in them."""
    return (
        data.count(b"[") * 72
        + data.count(b"{") * 232
        + data.count(b":") * 100
        + data.count(b",") * 36
        + data.count(b'"') * 14
    )


def _outside_texts(data: bytes) -> Iterator[bytes]:
    """A JSON text without its texts, piece by piece: of `{"a": "b[", "c": 1}` remains
    `{"":"","":1}`."""
    start, is_inside = 0, False
    while start < len(data):
        end = start + JSON_PIECE_BYTES
        while data[end - 1 : end] == b"\\":  # an escape is not cut
            end += 1
        piece = data[start:end].replace(b"\\\\", b"").replace(b'\\"', b"")
        parts = piece.split(b'"')
        yield b'""'.join(parts[is_inside::2])
        is_inside ^= len(parts) % 2 == 0
        start = end


def _check_marks(data: bytes, room_bytes: int) -> None:
    """Refuse a JSON text by the marks between its values: first by all, also those inside texts,
    which takes no time; then by those that count.  Raises ValueError, see `loads`."""
    if _room_of(data) <= room_bytes:
        return
    room = depth = 0
    for piece in _outside_texts(data):
        depth += piece.count(b"[") + piece.count(b"{")
        depth -= piece.count(b"]") + piece.count(b"}")
        if depth > MAX_JSON_DEPTH:
            raise ValueError("nested too deeply")
        room += _room_of(piece)
        if room > room_bytes:
            raise TooManyValues("it holds too many values")


def loads(
    data: bytes,
    decode: Callable[[str], Any] = _decode,
    room_bytes: int = JSON_ROOM_BYTES,
) -> Any:
    """A JSON value.  Raises ValueError for everything malformed, also for too deep a nesting, and
    TooManyValues for one that would take far more than `room_bytes` beside its texts."""
    if len(data) > JSON_CHECK_BYTES:
        _check_marks(data, room_bytes)
    if decode is _decode and len(data) > MAX_INT_DIGITS and _has_long_digits(data):
        decode = _decode_digits

    try:
        value = decode(data.decode("utf-8-sig" if data[:1] == b"\xef" else "utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if len(data) > MAX_JSON_DEPTH and _is_deep(value, data):
        raise ValueError("nested too deeply")
    return value


def as_object(value: Any) -> Json:
    """`value` if it is a JSON object, else an empty one: for reading answers leniently."""
    if isinstance(value, dict):
        return value
    return {}


def as_list(value: Any) -> list[Any]:
    """`value` if it is a JSON array, else an empty one."""
    if isinstance(value, list):
        return value
    return []


def dicts_in(body: Json, key: str) -> list[Json]:
    """The objects in the list `body[key]`; [] where there is no list."""
    return [item for item in as_list(body.get(key)) if isinstance(item, dict)]


# Numbers from outside, from a client, the upstream, a header, a file or the environment, pass one
# of these: what comes out is finite and bounded, so that it can be compared, added, divided and
# slept for.  The names say what nonsense becomes.  Booleans are no numbers here.


def number_or_none(
    value: Any, least: float = -MAX_COUNT, most: float = MAX_COUNT
) -> float | None:
    """A JSON number from `least` to `most` as it is; None for everything else."""
    if (
        type(value) in (int, float) and least <= value <= most
    ):  # false for what is no number
        return value  # type: ignore[no-any-return]
    return None


def number_or(
    value: Any, default: float, least: float = 0, most: float = MAX_COUNT
) -> float:
    """A JSON number from `least` to `most`, else `default`."""
    number = number_or_none(value, least, most)
    if number is None:
        return default
    return number


def count_or_none(value: Any) -> int | None:
    """A whole JSON number that can be a count, also one that is written 5.0; else None."""
    if type(value) is int and 0 <= value < MAX_COUNT:
        return value
    number = number_or_none(value, 0, MAX_COUNT - 1)
    if number is not None and number == int(number):
        return int(number)
    return None


def count_or_zero(value: Any) -> int:
    """A whole JSON number that can be a count, else 0."""
    return count_or_none(value) or 0


def text_number_or_none(
    value: Any, least: float = -MAX_COUNT, most: float = MAX_COUNT
) -> float | None:
    """A number that may be written as text: '75.5' -> 75.5, '1e400' -> None"""
    if isinstance(value, str):
        text, value = value.strip(), None
        if len(text) <= MAX_NUMBER_CHARS and text.isascii() and "_" not in text:
            with contextlib.suppress(ValueError):
                value = float(text)
    return number_or_none(value, least, most)


def digits_or_none(text: str | None, most: int = MAX_COUNT) -> int | None:
    """A whole number of ASCII digits and nothing else, as HTTP writes it: '+5', '²' -> None"""
    if (
        not text
        or len(text) > MAX_NUMBER_CHARS
        or not text.isascii()
        or not text.isdigit()
    ):
        return None
    number = int(text)
    if number <= most:
        return number
    return None


_MOMENT = re.compile(r"(\d{4})-(\d\d)-(\d\d)(?:[Tt ](\d\d):(\d\d):(\d\d))?", re.ASCII)


def moment_or_none(value: Any) -> float | None:
    """Unix seconds of a moment in UTC: '2026-12-01', '2026-12-01T08:00:00Z', 1796083200, or the
    milliseconds 1796083200000; None for what is no moment from 1970 to 9999: '2026-02-30'."""
    number = text_number_or_none(value, 1)
    if number is not None:
        if number > LAST_MOMENT_S / 2:
            seconds = number / 1000
        else:
            seconds = number
        if seconds <= LAST_MOMENT_S:
            return seconds
        return None

    if isinstance(value, str):
        found = _MOMENT.match(value)
    else:
        found = None
    if not found:
        return None
    parts = [int(part) for part in found.groups("0")]
    with contextlib.suppress(ValueError):  # the 30th of February
        moment = datetime.datetime(*parts, tzinfo=datetime.timezone.utc)  # type: ignore
        if moment.year >= 1970:
            return moment.timestamp()
        return None
    return None


def http_moment_or_none(text: str) -> float | None:
    """Unix seconds of a date as HTTP writes it, 'Fri, 27 Nov 2026 07:00:00 GMT'; else None."""
    if len(text) <= MAX_DATE_CHARS:
        parts = email.utils.parsedate_tz(text)
    else:
        parts = None
    if parts is None:
        return None
    try:
        return moment_or_none(email.utils.mktime_tz(parts))
    except (ValueError, OverflowError):  # in the year 99999
        return None


_SECRET = re.compile(
    r"gh[oprstu]_[A-Za-z0-9_]{4,}|github_pat_\w{4,}|sk-copilot-[\w-]{4,}|tid=[^\s\"']+"
    r"|(?<=[Bb]earer )[^\s\"',]+|(?<=[Tt]oken )(?=[\w.]*[_\d])[\w.~+/=:;-]{8,}"
    r"|(?<=://)[^/\s\"']+(?=@)"
)

#: one of these is in every secret: a look before the pattern is tried
_SECRET_SIGNS = (
    "ghu_",
    "gho_",
    "ghp_",
    "ghr_",
    "ghs_",
    "ght_",
    "github_pat_",
    "sk-copilot-",
    "tid=",
    "earer ",
    "oken ",
    "://",
)


def redact(text: str) -> str:
    """`text` without tokens and URL passwords.  'Bearer ghu_abcd' -> 'Bearer [redacted]'."""
    for sign in _SECRET_SIGNS:
        if sign in text:
            return _SECRET.sub("[redacted]", text)
    return text


#: Python counts these as printable, but they show nothing: fillers, variation selectors
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164"
    "\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)


def visible(text: str, keep: str = "") -> str:
    """`text` with all escaped that a terminal would obey or not show: control characters, C1,
    bidi overrides, zero width.  keep: those of them that stay.  'a\\x1b[2J' -> 'a\\\\x1b[2J'"""
    if text.isprintable() and not _INVISIBLE.search(text):
        return text
    return "".join(
        [
            char
            if char in keep or char.isprintable() and not _INVISIBLE.match(char)
            else char.encode("unicode_escape").decode()
            for char in text
        ]
    )


def printable(text: str, limit: int = 200) -> str:
    """`text` on one ASCII line, safe for any console: control and other characters escaped."""
    return ascii(text[:limit])[1:-1]


def host_of(url: str) -> str:
    """'https://X.GHE.com:8443/a' -> 'x.ghe.com' ('' when there is none)."""
    try:
        return (urllib.parse.urlsplit(url).hostname or "").lower()
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    """Is `host` this machine by name or address?  '127.8.0.1' -> True, '127.evil.com' -> False."""
    host = host.lower().strip("[]")
    return (
        host in ("localhost", "::1", "::ffff:127.0.0.1")
        or host.endswith(".localhost")
        or bool(re.fullmatch(r"127\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}", host))
    )


_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z_.-]+)(?::([0-9]{0,5}))?\Z")
_NO_HOST = ("", 0)


@functools.lru_cache(maxsize=256)
def split_host(text: str) -> tuple[str, int]:
    """Name and port of a Host header: the name in lower case and without its final dot, an IPv6
    address in its shortest form, the port 0 where none is written; ('', 0) for whatever could be
    read in two ways.  '[0:0::1]:80' -> ('::1', 80), 'evil:80@localhost' -> ('', 0)"""
    match = _HOST.match(text)
    if not match or len(text) > MAX_HOST_CHARS:
        return _NO_HOST

    name, port = match.group(1).lower(), int(match.group(2) or 0)
    if port > 65535 or match.group(2) and not port:
        return _NO_HOST

    if name[0] == "[":
        name = short_ipv6(name[1:-1])
    elif name[-1] == ".":
        name = name[:-1]
    labels = name.split(".")
    if not all(labels) or max(map(len, labels)) > MAX_LABEL_CHARS:
        return _NO_HOST
    return name, port


def short_ipv6(text: str) -> str:
    """'0:0::1' -> '::1', '::ffff:127.0.0.1' -> '127.0.0.1', '' for what is no IPv6 address."""
    if text == "::1":
        return text
    import ipaddress

    try:
        address = ipaddress.IPv6Address(text)
    except ValueError:
        return ""
    return str(address.ipv4_mapped or address)


_ORIGIN = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/]*)/?\Z")
_DEFAULT_PORTS = {"http": 80, "https": 443}


def origin_of(text: str) -> str:
    """An origin as browsers write it, '' for what is none.  Schemes of programs may have any host,
    or * for all of them.  'HTTPS://A.example:443/' -> 'https://a.example'"""
    match = _ORIGIN.match(text)
    if not match:
        return ""

    scheme, rest = match.group(1).lower(), match.group(2)
    if scheme not in _DEFAULT_PORTS and rest in ("", "*"):
        return "%s://%s" % (scheme, rest)

    name, port = split_host(rest)
    if not name:
        return ""
    if ":" in name:
        name = "[%s]" % name
    if port in (0, _DEFAULT_PORTS.get(scheme)):
        return "%s://%s" % (scheme, name)
    return "%s://%s:%d" % (scheme, name, port)


class ErrorText(NamedTuple):
    """What an error body says.  names: its codes, types and statuses, the innermost first."""

    message: str
    code: str | None
    param: str | None
    names: tuple[Any, ...]


def read_error_text(body: bytes, phrase: str) -> ErrorText:
    """Read any error body that the upstream is known to send; phrase: where it has no words.
    Shapes: {"error":{message,code,param,type}}, {"error":"text"}, {"message","code"}, plain text,
    HTML, nothing, and JSON inside `message`."""
    text = body[:MAX_ERROR_BYTES].decode("utf-8", "replace").strip()
    code, param = None, None
    names: list[Any] = []
    for _ in range(4):
        try:
            if text[:1] == "{":
                value = loads(text.encode("utf-8", "replace"))
            else:
                value = None
        except ValueError:
            value = None
        if not isinstance(value, dict):
            break

        inner = value.get("error")
        if isinstance(inner, dict):
            source = inner
        else:
            source = value
        code = source.get("code") or code
        param = source.get("param") or param
        names = [source.get("code"), source.get("type"), source.get("status"), *names]

        details = as_object(value.get("error_details"))
        text = (
            details.get("message")
            or source.get("message")
            or (inner if isinstance(inner, str) else "")
        )
        if isinstance(text, str):
            text = text.strip()
        else:
            text = dumps(text).decode()
        if details.get("url"):
            text += " (%s)" % details["url"]

    if not text or text[:1] == "<":
        text = phrase
    return ErrorText(
        redact(text[:MAX_ERROR_TEXT]),
        code[:200] if isinstance(code, str) else None,
        param if isinstance(param, str) else None,
        tuple(names),
    )


def unwrap_error(
    status: int, body: bytes, phrase: str
) -> tuple[str, str | None, str | None]:
    """(message, code, param) out of any error body.  -> ("no quota", "quota_exceeded", None)"""
    return read_error_text(body, status_phrase(status, phrase))[:3]


def status_phrase(status: int, phrase: str = "") -> str:
    """The words for an error without any: (503, "") -> '503 Service Unavailable'."""
    return "%d %s" % (status, phrase or http.client.responses.get(status, "error"))


def told_error(answer: Json) -> UpstreamError:
    """The failure that an event, or a whole answer with status 200, tells in any dialect's shape.
    {"error": {"code": "rate_limited", "message": "slow down"}} -> one with status 429"""
    found = read_error_text(dumps(answer), "the model failed")
    status = next(filter(None, map(status_of, found.names)), 502)
    error = UpstreamError(found.message, status, found.code, found.param)
    error.answered = True
    if error.status in (503, 529):
        error.headers["retry-after"] = "%d" % OVERLOAD_PAUSE_S
    return error


def stable_id(prefix: str, text: str) -> str:
    """A short id made from a long one, always the same: 'rs_' + 32 hex digits."""
    return prefix + hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:32]


def floats_to_base64(vector: list[float]) -> str:
    """Little-endian float32 in base64, as the OpenAI SDKs ask for.  Raises UpstreamError."""
    try:
        return base64.b64encode(struct.pack("<%df" % len(vector), *vector)).decode()
    except (struct.error, OverflowError):
        raise UpstreamError(
            "the upstream's embedding holds something that is no number"
        ) from None


# ==== 5. Vocabulary ===============================================================================
# What the dialects have in common, in neutral words.  Glossary: dialect = one of the five API
# shapes; model = an entry of the upstream's catalogue; asked = the model id that the client wrote;
# loss = something of the request that did not go upstream, and why.


@dataclass
class Usage:
    """Token counts of one answer.  The three input counts are disjoint and add up to the prompt."""

    input: int = 0
    cache_read: int = 0
    cache_write: int = 0
    output: int = 0
    reasoning: int = 0

    @classmethod
    def of(cls, counts: Mapping[str, int]) -> Usage:
        """From counts by the names of `read_usage`; those that are absent are 0."""
        return cls(*(counts.get(name, 0) for name in USAGE_FIELDS))


def read_usage(usage: Json) -> dict[str, int]:
    """Read a `usage` object of any dialect; the only place where that is done.

    {"prompt_tokens": 100, "prompt_tokens_details": {"cached_tokens": 30}} ->
    {"input": 70, "cache_read": 30}: what was not reported is absent.  OpenAI counts cached tokens
    inside the prompt, Anthropic beside it.  cache_write_1h is a part of cache_write."""
    prompt_details = as_object(
        usage.get("prompt_tokens_details", usage.get("input_tokens_details"))
    )
    answer_details = as_object(
        usage.get("completion_tokens_details", usage.get("output_tokens_details"))
    )
    cached = count_or_none(prompt_details.get("cached_tokens"))
    written = count_or_none(prompt_details.get("cache_write_tokens"))
    prompt = count_or_none(usage.get("prompt_tokens", usage.get("input_tokens")))
    if prompt is not None:
        prompt = max(prompt - (cached or 0) - (written or 0), 0)
    if cached is None:
        cached = count_or_none(usage.get("cache_read_input_tokens"))
    if written is None:
        written = count_or_none(usage.get("cache_creation_input_tokens"))
    created = as_object(usage.get("cache_creation"))
    for_an_hour = count_or_none(created.get("ephemeral_1h_input_tokens"))

    written_out = usage.get("completion_tokens", usage.get("output_tokens"))
    counts = {
        "input": prompt,
        "cache_read": cached,
        "cache_write": written,
        "cache_write_1h": for_an_hour,
        "output": count_or_none(written_out),
        "reasoning": count_or_none(answer_details.get("reasoning_tokens")),
    }
    return {name: count for name, count in counts.items() if count is not None}


def parts_of(share: float) -> int:
    """0.1 -> 100000 of a million; what is no share is 0."""
    if 0 < share < 1:
        return round(share * MILLION)
    return 0


class PriceTier(NamedTuple):
    """Prices of prompts up to a length.  most_tokens: of such a prompt; nano: kind of token ->
    nano-AIU for `Prices.batch` of them."""

    most_tokens: int
    nano: dict[str, int]

    @classmethod
    def read(cls, listed: Json) -> PriceTier:
        """One object of `token_prices`.  The names changed with the API version 2026-08-01:
        context_max became max_prompt_tokens, cache_price became cache_read_price."""
        newer = count_or_zero(listed.get("max_prompt_tokens"))
        most = newer or count_or_zero(listed.get("context_max"))
        nano: dict[str, int] = {}
        for kind in PRICED:
            price = text_number_or_none(listed.get(kind + "_price"))
            if price is None and kind == "cache_read":
                price = text_number_or_none(listed.get("cache_price"))
            if price is not None and price >= 0:
                nano[kind] = round(price * NANO)
        return cls(most if most > 0 else MAX_COUNT, nano)

    def price_of(self, kind: str) -> int:
        """A kind without a price of its own costs what the next plainer kind does."""
        plainer = {"cache_write_1h": "cache_write"}.get(kind, "input")
        if kind in self.nano:
            return self.nano[kind]
        return self.nano.get(plainer, self.nano["input"])


@dataclass
class Prices:
    """Listed prices of a model; whole numbers, so that sums are exact.

    batch: tokens that a price is for; tiers: by the length of the prompt, the shortest first, []
    where the account lists none; promo: (parts of a million that a promotion takes off, unix time
    of its end); auto_discount: parts of a million that the choice by `auto` takes off."""

    batch: int
    tiers: list[PriceTier]
    promo: tuple[int, float] = (0, 0.0)
    auto_discount: int = 0

    @classmethod
    def read(cls, billing: Json) -> Prices:
        """From the entry's `billing`.  A tier that leaves a price out has the usual one."""
        listed = as_object(billing.get("token_prices"))
        batch = count_or_zero(listed.get("batch_size"))
        usual = as_object(listed.get("default"))
        tiers = [PriceTier.read(usual)]
        for name, value in listed.items():
            if name != "default" and isinstance(value, dict):
                more = PriceTier.read(value)
                tiers.append(
                    PriceTier(more.most_tokens, {**tiers[0].nano, **more.nano})
                )

        tiers = sorted(tiers, key=lambda tier: tier.most_tokens)
        if batch <= 0 or any({"input", "output"} - set(tier.nano) for tier in tiers):
            tiers = []
        promo = as_object(billing.get("promo"))
        percent = text_number_or_none(promo.get("discount_percent")) or 0.0
        ends_at = moment_or_none(promo.get("ends_at")) or math.inf
        discount = text_number_or_none(billing.get("auto_discount")) or 0.0
        return cls(batch, tiers, (parts_of(percent / 100), ends_at), parts_of(discount))

    def cost(
        self, counts: Mapping[str, int], now: float = 0.0, by_auto: bool = False
    ) -> int | None:
        """What one answer costs, in nano-AIU; None when that is unknown.  now: unix seconds."""
        if not self.tiers or "input" not in counts:
            return None
        prompt = sum(
            counts.get(kind, 0) for kind in ("input", "cache_read", "cache_write")
        )
        fits = [tier for tier in self.tiers if prompt <= tier.most_tokens]
        tier = (fits or self.tiers[-1:])[0]

        amounts = {kind: counts.get(kind, 0) for kind in PRICED}
        amounts["cache_write_1h"] = min(
            amounts["cache_write_1h"], amounts["cache_write"]
        )
        amounts["cache_write"] -= amounts["cache_write_1h"]
        cost = sum(amount * tier.price_of(kind) for kind, amount in amounts.items())

        divisor = self.batch
        promo, ends_at = self.promo
        for discount in (
            promo if now < ends_at else 0,
            self.auto_discount if by_auto else 0,
        ):
            cost *= MILLION - discount
            divisor *= MILLION
        return count_or_none((2 * cost + divisor) // (2 * divisor))

    def per_million(self) -> dict[str, float]:
        """Kind of token -> credits for a million of them in a short prompt; {} if unknown."""
        if not self.tiers:
            return {}
        return {
            kind: price * MILLION / self.batch / NANO
            for kind, price in self.tiers[0].nano.items()
        }


#: by these words a notice of the upstream is known to announce the end of a model
_ENDING_WORDS = re.compile(
    "deprecat|retir|sunset|clos(?:e|es|ing|ed) down|end[- ]of[- ]life|"
    "discontinu|remov|replac|no longer|go(?:es|ing) away|shut",
    re.IGNORECASE,
)


@dataclass
class Model:
    """One entry of the catalogue, read leniently: every field may be missing upstream."""

    id: str
    name: str = ""
    vendor: str = ""
    kind: str = "chat"  # chat, embeddings, completion
    endpoints: tuple[str, ...] = ()  # /chat/completions, /responses, /v1/messages
    limits: Json = field(default_factory=dict)
    supports: Json = field(default_factory=dict)
    picker: bool = False  # meant to be shown to users
    state: str = "enabled"  # enabled, disabled, unconfigured, ...
    entry: Json = field(default_factory=dict)  # as the upstream sent it
    selector: str = field(
        default="", repr=False
    )  # Copilot-Session-Token, where auto chose it

    @classmethod
    def from_entry(cls, entry: Json) -> Model:
        """Absent `supported_endpoints` means chat only (older models) or embeddings."""
        about = as_object(entry.get("capabilities"))
        kind = str(about.get("type") or "chat")
        usual = {"chat": ("/chat/completions",), "embeddings": ("/embeddings",)}.get(
            kind, ()
        )
        listed = tuple(
            e for e in as_list(entry.get("supported_endpoints")) if isinstance(e, str)
        )

        return cls(
            str(entry.get("id")),
            str(entry.get("name") or entry.get("id")),
            str(entry.get("vendor") or ""),
            kind,
            listed or usual,
            as_object(about.get("limits")),
            as_object(about.get("supports")),
            entry.get("model_picker_enabled") is True,
            str(as_object(entry.get("policy")).get("state") or "enabled"),
            entry,
        )

    @property
    def is_openai(self) -> bool:
        return "openai" in self.vendor.lower()

    @property
    def is_claude(self) -> bool:
        return self.vendor == "Anthropic" or self.id.startswith("claude")

    @property
    def is_gemini(self) -> bool:
        return self.vendor == "Google" or self.id.startswith("gemini")

    @property
    def is_listed(self) -> bool:
        """Shown by default: embeddings, and chat models that are meant for users and allowed."""
        return self.kind == "embeddings" or (
            self.kind == "chat" and self.picker and self.state != "disabled"
        )

    @property
    def efforts(self) -> list[str]:
        """Reasoning efforts that the model lists, in its own order."""
        return [
            e
            for e in as_list(self.supports.get("reasoning_effort"))
            if isinstance(e, str)
        ]

    def can(self, ability: str) -> bool:
        """Is this among what the upstream says that the model supports?"""
        return self.supports.get(ability) is True

    @property
    def is_kimi(self) -> bool:
        return self.vendor.startswith("Moonshot") or self.id.startswith("kimi")

    @property
    def most_images(self) -> int:
        """Of one request, 0 where no limit is known.  The list's own numbers are unreliable."""
        if self.is_claude:
            return MAX_IMAGES
        if self.is_gemini:
            return MAX_GEMINI_IMAGES
        return 0

    @property
    def version(self) -> tuple[int, ...]:
        """'claude-opus-4.6' -> (4, 6); () when the id has no number."""
        found = re.search(r"(\d{1,9})(?:\.(\d{1,9}))?", self.id)
        if found:
            return tuple(int(n) for n in found.groups() if n)
        return ()

    @property
    def notice(self) -> str:
        """What the upstream says about the model's coming end, "" when it says nothing.
        Entries also carry notices about billing, which are not meant here."""
        notices: list[tuple[Any, Any]] = []
        for name in ("warning_text", "warning_message"):
            notices.append(("", self.entry.get(name)))
        for name in ("warning_messages", "info_messages"):
            for message in map(as_object, as_list(self.entry.get(name))):
                notices.append((message.get("code"), message.get("message")))

        for code, text in notices:
            text = str(text or "")[:MAX_ERROR_TEXT]
            if _ENDING_WORDS.search(text):
                return text
            if _ENDING_WORDS.search(str(code)[:MAX_ERROR_TEXT]):
                return "%s: %s" % (str(code)[:MAX_ERROR_TEXT], text)

        return ""

    @property
    def promo(self) -> str:
        """What the upstream says of a promotion, "" where there is none."""
        promo = as_object(as_object(self.entry.get("billing")).get("promo"))
        percent = number_or(promo.get("discount_percent"), 0, most=100)
        told = str(promo.get("message") or "")[:MAX_ERROR_TEXT]
        return told or (f"{percent:g} % off" if percent else "")

    def limit(self, name: str) -> int:
        """A limit in tokens, 0 when the upstream gives none."""
        return count_or_zero(self.limits.get(name))

    @functools.cached_property
    def prices(self) -> Prices:
        """What the account pays for this model's tokens, as far as it is listed."""
        return Prices.read(as_object(self.entry.get("billing")))

    def output_cap(self, stream: bool) -> int:
        """The largest max_tokens that the upstream takes for such a call, 0 when unknown."""
        most, whole = (
            self.limit("max_output_tokens"),
            self.limit("max_non_streaming_output_tokens"),
        )
        if whole and not stream:
            return min(most or whole, whole)
        return most


class Losses(List[Tuple[str, str]]):
    """What of a request did not go upstream: (field, reason), each once.

    Clients make up names of fields, so at most MAX_LOSSES are recorded, with names of at most
    MAX_LOSS_CHARS in printable ASCII; `more` counts those beyond."""

    def __init__(self) -> None:
        super().__init__()
        self.more = 0
        self._known: set[tuple[str, str]] = set()

    def add(self, name: str, reason: str) -> None:
        """Record one; the time for it does not depend on how many there are."""
        loss = (printable(name, MAX_LOSS_CHARS).replace(",", ";"), reason)
        if loss in self._known:
            return
        if len(self) >= MAX_LOSSES:
            self.more += 1
            return
        self._known.add(loss)
        self.append(loss)


class Edit:
    """A request body that is being made fit for the upstream, and the record of what was done.
    As long as `changed` is False the bytes that the client sent go upstream as they are."""

    def __init__(self, body: Json, losses: Losses | None = None) -> None:
        self.body = body
        self.changed = False
        if losses is None:
            self.losses = Losses()
        else:
            self.losses = losses
        self.is_words = False  # a conversation of roles and texts, nothing else
        self.names: dict[
            bytes, bytes
        ] = {}  # a shortened tool's name as JSON -> the client's

    def set(self, target: Json, key: str, value: Any) -> None:
        """Set `key` where it is not `value` already; its place among the keys stays."""
        if (
            key not in target
            or target[key] != value
            or type(target[key]) is not type(value)
        ):
            target[key] = value
            self.changed = True

    def drop(self, target: Json, key: str, reason: str = "") -> Any:
        """Remove `key` if it is there; with a reason the loss is recorded."""
        if key not in target:
            return None
        self.changed = True
        if reason:
            self.lose(key, reason)
        return target.pop(key)

    def replace(self, target: Json, key: str, items: list[Any]) -> None:
        """Put another list in the place of the old value unless it holds the very same items."""
        old = target[key]
        is_same = isinstance(old, list) and len(old) == len(items)
        if not is_same or any(a is not b for a, b in zip(items, old)):
            target[key] = items
            self.changed = True

    def lose(self, name: str, reason: str) -> None:
        """Record that something the client said did not go upstream."""
        self.changed = True
        self.losses.add(name, reason)


class Part:
    """A piece of a turn or of an answer: one of the classes below."""

    cache: bool = (
        False  # True: the prompt cache may end here; a field of those that can say it
    )


@dataclass
class Citation:
    """Where words of an answer come from.  start, end: which characters of the text are meant, None
    when nobody said; quote: the words of the source."""

    url: str = ""
    title: str | None = None
    start: int | None = None
    end: int | None = None
    quote: str | None = None


@dataclass
class Text(Part):
    """Words.  `refusal`: the model says why it will not answer.  Of an answer: its citations, and
    the log probabilities of its tokens as both of OpenAI's dialects write them."""

    text: str
    refusal: bool = False
    cache: bool = False
    citations: tuple[Citation, ...] = ()
    logprobs: tuple[Json, ...] = ()


@dataclass
class Image(Part):
    """Either base64 `data` of a `media_type`, or a `url`.  `detail`: low, high, auto."""

    media_type: str = ""
    data: str = ""
    url: str = ""
    detail: str | None = None
    cache: bool = False


@dataclass
class Document(Part):
    """One of base64 `data`, `url` or plain `text`."""

    media_type: str = ""
    data: str = ""
    url: str = ""
    text: str = ""
    title: str | None = None
    cache: bool = False


@dataclass
class Reasoning(Part):
    """Readable thinking and the opaque state that lets a model go on with it.
    signature: Messages' signature, Responses' encrypted content or Copilot's reasoning_opaque, as
    `minted_by` (a dialect's name) says; it means nothing to any other.  redacted: no text at all.
    """

    text: str = ""
    signature: str | None = None
    id: str | None = None
    minted_by: str | None = None
    redacted: bool = False


@dataclass
class ToolCall(Part):
    """`arguments` stay JSON text, parsed only where a dialect demands an object."""

    id: str
    name: str
    arguments: str = "{}"
    cache: bool = False


@dataclass
class ToolResult(Part):
    """What a tool gave back; always in a user turn.  name: of the tool, for clients whose calls
    have no ids, see `pair_by_order`."""

    call_id: str
    parts: list[Part]
    is_error: bool = False
    cache: bool = False
    name: str = field(default="", compare=False)


@dataclass
class Turn:
    """role: system (OpenAI's developer, too), user or assistant."""

    role: str
    parts: list[Part]
    is_all_results: bool = field(default=False, compare=False)  # of tools, see add_turn


@dataclass
class Tool:
    """A function that the client runs.  `parameters`: a JSON schema, None when there is none.
    kind: how its client knows it, which decides the form of its calls: "function", "custom"
    (freeform: the client gives and gets bare text) or a type of CLIENT_TOOLS.  namespace,
    short_name: of a tool that its client knows under two names."""

    name: str
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None
    kind: str = "function"
    namespace: str = ""
    short_name: str = ""
    cache: bool = False


@dataclass
class Named:
    """tool_choice: this tool and no other."""

    name: str


@dataclass
class Request:
    """A request in neutral words.  None means that the client did not say; it is never sent.

    model: as the client wrote it; now: unix seconds; key: of no other request.  tool_choice: None,
    "auto", "none", "required" or Named.  effort: a word of EFFORT_BUDGETS, "minimal" or "none".
    output_schema: as in Responses' text.format.  openai: fields that both of OpenAI's shapes have.
    wants_usage: a chat client asked for usage.  echo: what a response object repeats of it.
    prompt_tokens: an estimate, 0 where nobody needs it.
    output_tool: set when a forced call stands for `output_schema`, see `Unwrapper`.
    cut_at: stop sequences that the upstream cannot watch for, see `StopCutter`.
    hides_thinking: the client wants none, or has no place for it, see `ThinkingFilter`.
    wants_thoughts: a Gemini client wants to read the thinking; its state it gets in any case.
    elapsed_ns: gives the time since the request came, for clients that are told how long it took.
    """

    model: str
    dialect: str = field(default="", compare=False)
    turns_key: str = field(default="messages", compare=False)  # in the client's body
    now: int = field(default=0, compare=False)
    key: str = field(default="", compare=False)
    turns: list[Turn] = field(default_factory=list)
    tools: list[Tool] = field(default_factory=list)
    tool_names: set[str] = field(default_factory=set, compare=False)
    tool_choice: str | Named | None = None
    parallel_tool_calls: bool | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: float | None = None
    seed: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stop: list[str] = field(default_factory=list)
    effort: str | None = None
    thinking_budget: int | None = None
    output_schema: Json | None = None
    stream: bool | None = None
    user: str | None = None
    openai: Json = field(default_factory=dict)
    wants_usage: bool = field(default=False, compare=False)
    echo: Json = field(default_factory=dict, compare=False)
    prompt_tokens: int = field(default=0, compare=False)
    output_tool: str = field(default="", compare=False)
    cut_at: list[str] = field(default_factory=list, compare=False)
    hides_thinking: bool = field(default=False, compare=False)
    wants_thoughts: bool = field(default=False, compare=False)
    elapsed_ns: Callable[[], int] = field(default=lambda: 0, compare=False)
    losses: Losses = field(default_factory=Losses, compare=False)

    def measure(self, elapsed_ns: Callable[[], int]) -> None:
        """Take the time with this from now on."""
        self.elapsed_ns = elapsed_ns

    def foresee(self, prompt_tokens: int) -> None:
        """Note the estimate of the prompt."""
        self.prompt_tokens = prompt_tokens

    def lose(self, name: str, reason: str) -> None:
        """Record that something the client said does not go upstream."""
        self.losses.add(name, reason)

    def add_turn(self, role: str, parts: list[Part]) -> None:
        """Results of one round of tools belong into one user turn, a model's parts into one."""
        last = self.turns[-1] if self.turns else None
        is_all_results = bool(parts) and all(
            isinstance(part, ToolResult) for part in parts
        )
        joins = (
            role == "assistant"
            or is_all_results
            and last is not None
            and last.is_all_results
        )
        if last is not None and parts and last.role == role and joins:
            last.parts += parts
        else:
            self.turns.append(Turn(role, parts, is_all_results))


@dataclass
class Response:
    """A whole answer.  stop: stop, length, tool_use, stop_sequence, refusal or pause.  created:
    unix seconds, 0 when unknown; fingerprint, tier: OpenAI's system_fingerprint, service_tier."""

    id: str
    model: str
    parts: list[Part] = field(default_factory=list)
    stop: str = "stop"
    usage: Usage | None = None
    created: int = 0
    stop_sequence: str | None = None
    fingerprint: str | None = None
    tier: str | None = None


class Event:
    """A piece of a streamed answer.  Legal order: ResponseStart, then for each index PartStart
    (PartDelta | PartCitation | PartSignature)* PartEnd, then ResponseEnd; StreamError ends all.
    Parts may interleave; their indexes rise in the order of their starts."""


@dataclass
class ResponseStart(Event):
    """For the fields see Response."""

    id: str
    model: str
    created: int = 0
    fingerprint: str | None = None
    tier: str | None = None


@dataclass
class PartStart(Event):
    """`part`: a skeleton; its text or arguments come as deltas."""

    index: int
    part: Part


@dataclass
class PartDelta(Event):
    """More of the text, the readable thinking, or the arguments: as the started part says.
    logprobs: of the tokens of this piece of a text, None where nobody asked for them."""

    index: int
    text: str
    logprobs: list[Json] | None = None


@dataclass
class PartCitation(Event):
    """Where words of a text come from."""

    index: int
    citation: Citation


@dataclass
class PartSignature(Event):
    """The opaque state of a Reasoning, at most once and behind its text."""

    index: int
    signature: str
    minted_by: str
    id: str | None


@dataclass
class PartEnd(Event):
    index: int


@dataclass
class ResponseEnd(Event):
    """`stop`: see Response."""

    stop: str
    usage: Usage | None = None
    stop_sequence: str | None = None


@dataclass
class StreamError(Event):
    error: UpstreamError


def shows(event: Event) -> bool:
    """Is this an event of which a user sees something?"""
    if isinstance(event, PartStart):
        return not isinstance(event.part, (Text, Reasoning))
    return isinstance(event, (PartDelta, PartCitation, ResponseEnd))


CUT_SHORT = "the upstream ended the stream before its end"
_TEXT_FIELDS = {Text: "text", Reasoning: "text", ToolCall: "arguments"}


def text_in(part: Part) -> str:
    """What of a part comes as deltas."""
    return str(getattr(part, _TEXT_FIELDS.get(type(part), ""), ""))


def with_text(part: Part, text: str) -> Part:
    """The part with other words, as far as it has any."""
    name = _TEXT_FIELDS.get(type(part))
    return replace(part, **{name: text}) if name else part  # type: ignore[type-var]


def skeleton(part: Part) -> Part:
    """The part without what comes as deltas and signature."""
    if isinstance(part, Reasoning):
        if part.redacted:
            return part
        return replace(part, text="", signature=None)
    if isinstance(part, Text):
        return replace(part, text="", citations=(), logprobs=())
    return with_text(part, "")


def unfold(response: Response) -> Iterator[Event]:
    """The events that tell a whole answer: fold(unfold(r)) == r."""
    yield ResponseStart(
        response.id,
        response.model,
        response.created,
        response.fingerprint,
        response.tier,
    )

    for index, part in enumerate(response.parts):
        yield PartStart(index, skeleton(part))
        if isinstance(part, Text):
            logprobs = list(part.logprobs)
        else:
            logprobs = []
        if text_in(part) or logprobs:
            yield PartDelta(index, text_in(part), logprobs or None)
        if isinstance(part, Text):
            for citation in part.citations:
                yield PartCitation(index, citation)

        if (
            isinstance(part, Reasoning)
            and part.signature is not None
            and not part.redacted
        ):
            yield PartSignature(index, part.signature, part.minted_by or "", part.id)

        yield PartEnd(index)

    yield ResponseEnd(response.stop, response.usage, response.stop_sequence)


class PartBuilder:
    """A part of an answer that is put together from its events."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.texts: list[str] = []
        self.logprobs: list[Json] = []
        self.citations: list[Citation] = []

    def add(self, event: Event) -> None:
        """One more event of this part."""
        if isinstance(event, PartDelta):
            self.texts.append(event.text)
            self.logprobs += event.logprobs or ()
        elif isinstance(event, PartCitation):
            self.citations.append(event.citation)
        elif isinstance(event, PartSignature) and isinstance(self.part, Reasoning):
            self.part = replace(
                self.part,
                signature=event.signature,
                id=event.id,
                minted_by=event.minted_by or None,
            )

    def build(self) -> Part:
        """The part with all that was added."""
        part = with_text(self.part, text_in(self.part) + "".join(self.texts))
        if isinstance(part, Text) and (self.logprobs or self.citations):
            return replace(
                part, logprobs=tuple(self.logprobs), citations=tuple(self.citations)
            )
        return part


def fold(events: Iterable[Event]) -> Response:
    """The whole answer that events tell.  Raises UpstreamError for a StreamError or no end."""
    start = ResponseStart("", "")
    parts: dict[int, PartBuilder] = {}

    for event in events:
        if isinstance(event, PartStart):
            parts[event.index] = PartBuilder(event.part)
        elif isinstance(event, (PartDelta, PartCitation, PartSignature)):
            parts[event.index].add(event)
        elif isinstance(event, ResponseStart):
            start = event
        elif isinstance(event, StreamError):
            raise event.error
        elif isinstance(event, ResponseEnd):
            built = [part.build() for part in parts.values()]
            return Response(
                start.id,
                start.model,
                built,
                event.stop,
                event.usage,
                start.created,
                event.stop_sequence,
                start.fingerprint,
                start.tier,
            )

    raise UpstreamError(CUT_SHORT)


# ==== 6. Framing ==================================================================================
# HTTP heads, bodies and server-sent events: bytes in, values out.  No socket is known here, so
# every reader is tested whole, cut anywhere, and one byte at a time.  Strict where a lenient
# reading would let two parties see two different requests.

_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+\Z")
_FIELD = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\x00\r\n]*"
_FIELDS = re.compile(rb"(?:" + _FIELD + rb"(?:\r\n" + _FIELD + rb")*)?\Z")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\x00\r\n]*)?\Z")
_TARGET = re.compile(rb"[\x21-\x7e]+\Z")
_SINGLE_FIELDS = ("host", "content-length", "transfer-encoding", "content-type")


@dataclass
class RequestHead:
    """`POST /v1/messages?beta=true HTTP/1.1` and the header fields."""

    method: str
    target: str
    minor: int  # 1 for HTTP/1.1, 0 for HTTP/1.0
    headers: Headers

    @property
    def keep_alive(self) -> bool:
        wish = self.headers.get("connection", "").lower()
        return "close" not in wish and (self.minor == 1 or "keep-alive" in wish)

    def body_form(self) -> tuple[int, bool]:
        """(length, is chunked); every form that could be read in two ways is a 400."""
        coding, length = (
            self.headers.get("transfer-encoding"),
            self.headers.get("content-length"),
        )

        if coding is not None:
            if length is not None or self.minor == 0:
                raise BadRequest(
                    "Transfer-Encoding beside Content-Length or in HTTP/1.0"
                )
            if coding.lower() != "chunked":
                raise BadRequest(
                    "Transfer-Encoding %r is not known here" % coding[:40], 501
                )
            return 0, True

        if length is None:
            return 0, False
        size = digits_or_none(length)
        if size is None:
            raise BadRequest("Content-Length is not a number")
        return size, False


def _parse_fields(raw: bytes) -> Headers:
    if not _FIELDS.match(raw):
        raise BadRequest("malformed header field")
    headers: Headers = {}
    if raw:
        lines = raw.decode("latin-1").split("\r\n")
    else:
        lines = []
    if len(lines) > MAX_HEADER_FIELDS:
        raise BadRequest("more than %d header fields" % MAX_HEADER_FIELDS, 431)
    for line in lines:
        name, _, value = line.partition(":")
        name, value = name.lower(), value.strip(" \t")
        if name in headers:
            if name in _SINGLE_FIELDS:
                raise BadRequest("header field %s is given twice" % name)
            value = headers[name] + ", " + value
        headers[name] = value
    return headers


def parse_request_head(raw: bytes) -> RequestHead:
    """A request head without its closing empty line.  Raises BadRequest (400, 414, 431, 505).
    b"GET / HTTP/1.1\\r\\nHost: a" -> RequestHead("GET", "/", 1, {"host": "a"})"""
    line, _, rest = raw.partition(b"\r\n")
    words = line.split(b" ")
    if len(words) != 3 or not _TOKEN.match(words[0]) or not words[1]:
        raise BadRequest("malformed request line")
    method, target, version = words
    if version not in (b"HTTP/1.1", b"HTTP/1.0"):
        raise BadRequest(
            "only HTTP/1.0 and HTTP/1.1 are spoken here",
            505 if version.startswith(b"HTTP/") else 400,
        )

    if len(target) > MAX_TARGET_BYTES:
        raise BadRequest("the URL is longer than %d bytes" % MAX_TARGET_BYTES, 414)
    if not _TARGET.match(target):
        raise BadRequest("the URL holds control or non-ASCII characters")
    head = RequestHead(
        method.decode(), target.decode(), int(version[-1:]), _parse_fields(rest)
    )
    if head.minor == 1 and "host" not in head.headers:
        raise BadRequest("the Host header is missing")
    return head


_STATUS_LINE = re.compile(r"HTTP/1\.[0-9] ([0-9]{3})(?: (.*))?\r?\Z", re.DOTALL)
_CONTROLS = re.compile(r"[\x00-\x1f\x7f]+")
_RESPONSE_STATUS = range(100, 600)
_PLAIN_FIELD = re.compile(r"(?m)^([!#$%&'*+.^_`|~0-9A-Za-z-]+):([^\x00-\x1f\x7f]*)\r?$")


def parse_response_head(raw: bytes) -> tuple[int, str, Headers]:
    """(status, phrase, headers).  Lenient: the upstream is trusted not to smuggle, but may fold
    lines, repeat fields or send what is no field, which is left out.  Control characters become
    spaces, because the values go on to clients.  Raises UpstreamError when it is no HTTP head."""
    line, _, rest = raw.decode("latin-1").partition("\n")
    match = _STATUS_LINE.match(line)
    if not match:
        raise UpstreamError("the upstream's answer is not HTTP/1.x")
    status = int(match.group(1))
    if status not in _RESPONSE_STATUS:
        raise UpstreamError(
            "the upstream answered with the status %d, which HTTP does not have"
            % status
        )

    reason = _CONTROLS.sub(" ", match.group(2) or "").strip()
    fields_ = _PLAIN_FIELD.findall(rest)
    headers: Headers = {name.lower(): value.strip() for name, value in fields_}
    if len(headers) == rest.count("\n") + bool(
        rest
    ):  # nearly always: each line is a field
        return status, reason, headers

    headers = {}
    name = ""
    for line in rest.split("\n"):
        before, colon, value = line.partition(":")
        if line[:1] in (" ", "\t"):
            before, value = "", line  # goes on with the line above
        elif not colon or not _TOKEN.match(before.encode("latin-1")):
            name = ""
            continue
        value = _CONTROLS.sub(" ", value).strip()
        if not before:
            headers.update({name: headers[name] + " " + value} if name else {})
            continue
        name = before.lower()
        headers[name] = headers[name] + ", " + value if name in headers else value
    return status, reason, headers


def answer_length(headers: Headers) -> int | None:
    """The length of an upstream's body, None where its end tells it.  One that stands there twice
    counts once.  Raises UpstreamError for what is no number."""
    text = headers.get("content-length")
    if text is None or "chunked" in headers.get("transfer-encoding", "").lower():
        return None

    lengths = {digits_or_none(part.strip()) for part in text.split(",")}
    length = lengths.pop()
    if length is None or lengths:
        raise UpstreamError(
            "the upstream's Content-Length is not a number: " + printable(text, 40)
        )
    return length


def render_head(start: str, fields_: Iterable[tuple[str, str]]) -> bytes:
    """A head as bytes, with its empty line.  Whatever is not printable ASCII is escaped: nothing
    can split the head, or reach the terminal of who looks at it."""
    lines = [start]
    lines += [name + ": " + value for name, value in fields_]
    if not ("".join(lines).isprintable() and "".join(lines).isascii()):
        lines = [
            visible(line).encode("ascii", "backslashreplace").decode() for line in lines
        ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


#: the usual chunk sizes as they are written: a look-up beats a check and a conversion
_CHUNK_SIZES = {b"%x" % size: size for size in range(1, 2048)}


class BodyDecoder:
    """A message body: of a known length, chunked, or ending with the connection (length None).
    `feed(data)` gives the payload bytes found so far; `done` is True at the end, `rest` then holds
    what came behind it.  Raises BadRequest on malformed framing; never blocks, holds back at most
    one chunk line.  b"3\\r\\nabc\\r\\n0\\r\\n\\r\\n" -> b"abc", done"""

    def __init__(self, length: int | None = None, chunked: bool = False) -> None:
        self.chunked = chunked
        self.delimited = chunked or length is not None
        self.done = length == 0 and not chunked
        self.rest = b""
        self._left = length or 0  # payload bytes of the body or of the open chunk
        self._tail = b""  # an incomplete chunk line
        self._state = "size"  # size, data, end (of a chunk), trailer
        self._trailer_bytes = 0

    def feed(self, data: bytes) -> bytes:
        """The payload bytes in `data`; what follows the body's end goes to `rest`."""
        if self.done:
            self.rest += data
            return b""
        if self.chunked:
            return self._feed_chunked(data)
        if not self.delimited:
            return data
        taken = data[: self._left]
        self._left -= len(taken)
        if not self._left:
            self.done, self.rest = True, data[len(taken) :]
        return taken

    def _feed_chunked(self, data: bytes) -> bytes:
        data = self._tail + data if self._tail else data
        out: list[bytes] = []
        if self._state == "size":
            at = self._whole_chunks(data, 0, out)
        else:
            at = 0
        end = len(data)

        while at < end and not self.done:
            if self._state == "data":
                taken = data[at : at + self._left]
                out.append(taken)
                at += len(taken)
                self._left -= len(taken)
                if not self._left:
                    self._state = "end"
                continue

            line_end = data.find(b"\r\n", at, at + MAX_CHUNK_LINE_BYTES)
            if line_end < 0:
                if end - at >= MAX_CHUNK_LINE_BYTES or b"\n" in data[at:]:
                    raise BadRequest("malformed chunked body")
                break

            self._take_line(data[at:line_end])
            at = line_end + 2
            if self._state == "size":
                at = self._whole_chunks(data, at, out)

        self._tail = b"" if self.done else data[at:]
        self.rest = data[at:] if self.done else b""
        if len(out) == 1:
            return out[0]
        return b"".join(out)

    @staticmethod
    def _whole_chunks(data: bytes, at: int, out: list[bytes]) -> int:
        """The hot path: chunks that are here whole -> where the first other thing begins."""
        find, add, size_of = data.find, out.append, _CHUNK_SIZES.get
        while True:
            line_end = find(b"\r\n", at, at + 8)
            if line_end > at:
                size = size_of(data[at:line_end])
            else:
                size = None
            if size is None:
                return at
            stop = line_end + 2 + size
            if data[stop : stop + 2] != b"\r\n":
                return at
            add(data[line_end + 2 : stop])
            at = stop + 2

    def _take_line(self, line: bytes) -> None:
        if self._state == "end":
            if line:
                raise BadRequest(
                    "malformed chunked body: a chunk is longer than its size"
                )

            self._state = "size"
        elif self._state == "trailer":
            self._trailer_bytes += len(line)
            if b"\n" in line or b"\r" in line:
                raise BadRequest("malformed trailer of a chunked body")
            if self._trailer_bytes > MAX_HEAD_BYTES:
                raise BadRequest(
                    "trailer fields larger than %d bytes" % MAX_HEAD_BYTES, 431
                )

            self.done = not line
        else:
            found = _CHUNK_SIZE.match(line)
            if not found:
                raise BadRequest("malformed chunked body: no chunk size")
            self._left = int(found.group(1), 16)
            self._state = "data" if self._left else "trailer"


def chunk(data: bytes) -> bytes:
    """b"abc" -> b"3\\r\\nabc\\r\\n"; nothing for b"", which would be the end of the body."""
    if data:
        return b"%x\r\n%b\r\n" % (len(data), data)
    return b""


LAST_CHUNK = b"0\r\n\r\n"


def inflate(data: bytes, coding: str) -> bytes:
    """Undo a Content-Encoding of a request.  Raises BadRequest: 415 unknown, 413 a bomb, 400."""
    bits = {"gzip": 31, "x-gzip": 31, "deflate": 15}.get(coding.strip().lower())
    if coding.strip().lower() in ("", "identity"):
        return data
    if bits is None:
        raise BadRequest(
            "Content-Encoding %s is not understood here: send gzip or plain JSON"
            % printable(coding, 20),
            415,
        )

    try:
        machine = zlib.decompressobj(bits)
        plain = machine.decompress(data, MAX_BODY_BYTES + 1)
    except zlib.error:
        raise BadRequest("the body is not valid %s" % coding) from None

    if len(plain) > MAX_BODY_BYTES:
        raise BadRequest(
            "the unpacked body is larger than %d bytes" % MAX_BODY_BYTES, 413
        )

    if not machine.eof:
        raise BadRequest("the %s body is cut short" % coding)
    return plain


class FrameCutter:
    """Cuts a byte stream into whole server-sent events without looking into them.
    `feed` gives zero or more whole frames, each ending in b"\\n\\n" (other line ends are
    normalised); the incomplete rest is kept, at most MAX_FRAME_BYTES of it."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0
        self._last = b""  # the last byte kept: a frame end may straddle two reads
        self._carry = b""  # a CR whose LF may be in the next read

    def feed(self, data: bytes) -> bytes:
        """Whole frames as one block, b'' while there is none."""
        if (
            data[-2:] == b"\n\n"
            and not self._size
            and not self._carry
            and b"\r" not in data
        ):
            return data  # nearly always

        if b"\r" in data or self._carry:
            data = self._carry + data
            if data.endswith(b"\r"):
                self._carry = b"\r"
            else:
                self._carry = b""
            data = (
                (data[:-1] if self._carry else data)
                .replace(b"\r\n", b"\n")
                .replace(b"\r", b"\n")
            )

        end = data.rfind(b"\n\n") + 2
        if end < 2:
            if not (self._last == b"\n" and data[:1] == b"\n"):
                self._keep(data)
                return b""
            end = 1

        block = b"".join(self._parts) + data[:end]
        self._parts, self._size, self._last = [], 0, b""
        self._keep(data[end:])
        return block

    def flush(self) -> bytes:
        """What is left at the end of the stream, closed as a frame; b"" when there is nothing."""
        rest = b"".join(self._parts).strip(b"\n")
        self._parts, self._size, self._last, self._carry = [], 0, b"", b""
        if rest:
            return rest + b"\n\n"
        return b""

    def _keep(self, data: bytes) -> None:
        if data:
            self._parts.append(data)
            self._size += len(data)
            self._last = data[-1:]
        if self._size > MAX_FRAME_BYTES:
            raise UpstreamError(
                "an event of the stream is larger than %d bytes" % MAX_FRAME_BYTES
            )


@dataclass
class Frame:
    """One server-sent event.  Raw b'event: a\\ndata: {}\\n\\n' -> Frame('a', b'{}')"""

    event: str
    data: bytes

    @classmethod
    def parse(cls, raw: bytes) -> Frame:
        """Several data lines are joined by a line end; comments and other fields are left out."""
        if raw.startswith(b"data: ") and raw.find(b"\n") >= len(raw.rstrip(b"\n")):
            return cls("", raw[6:].rstrip(b"\n"))
        event, data = "", []
        for line in raw.split(b"\n"):
            name, _, value = line.partition(b":")
            value = value[1:] if value[:1] == b" " else value
            if name == b"data":
                data.append(value)
            elif name == b"event":
                event = value.decode("utf-8", "replace")
        return cls(event, b"\n".join(data))

    def encode(self) -> bytes:
        """The frame as it goes over the wire: `event:`, `data:` and an empty line."""
        if self.event:
            head = b"event: %b\n" % self.event.encode()
        else:
            head = b""
        return b"%bdata: %b\n\n" % (head, self.data.replace(b"\n", b"\ndata: "))


def split_frames(block: bytes) -> list[bytes]:
    """Whole frames, each still ending in its empty line."""
    return [raw + b"\n\n" for raw in block.split(b"\n\n") if raw.strip(b"\n")]


class SSEDecoder:
    """`feed(bytes) -> list[Frame]`: the events that are complete by now, without empty ones.
    b'data: {"a":1}\\n\\n' -> [Frame('', b'{"a":1}')]"""

    def __init__(self) -> None:
        self._cutter = FrameCutter()

    def feed(self, data: bytes) -> list[Frame]:
        return self._frames(self._cutter.feed(data))

    def close(self) -> list[Frame]:
        """The last event when the stream ended without an empty line."""
        return self._frames(self._cutter.flush())

    @staticmethod
    def _frames(block: bytes) -> list[Frame]:
        frames = [Frame.parse(raw) for raw in split_frames(block)]
        return [frame for frame in frames if frame.data]


# ==== 7. Dialects =================================================================================
# One class per API shape.  A dialect knows how a request of its shape is made fit for the upstream
# (`prepare`), what in it decides the headers (`initiator`, `has_images`), how an answer is mended
# (`mend`, `stream`), and how an error looks.  On the diagonal - client and model speak the same
# dialect - nothing is translated: bytes go through and only what must change is touched.  Off it a
# request goes through neutral words and an answer through neutral events, see section 5.

NOT_JSON = "the upstream sent an event that is not JSON"


def is_whole_event(raw: bytes) -> bool:
    """Is the last event of a stream, whose empty line is missing, there to its end?"""
    data = Frame.parse(raw).data.strip()
    try:
        return data == b"[DONE]" or isinstance(loads(data), dict)
    except ValueError:
        return False


_SHORT_NAME = re.compile(
    rb'"[A-Za-z0-9_-]{0,31}_[0-9a-f]{32}"'
)  # as `fit_names` makes them


def restore_names(data: bytes, names: Mapping[bytes, bytes]) -> bytes:
    """Whole frames or a whole answer with the names of tools as the client wrote them."""
    if not names:
        return data
    return _SHORT_NAME.sub(lambda found: names.get(found.group(), found.group()), data)


_REPORT_FIELDS = ("usage", "copilot_usage", "copilot_quota_snapshots")


class Meter:
    """Usage and quotas that the upstream reported for one answer; what it did not is absent.
    counts: by the names of COUNTS; quotas: lane -> snapshot."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.quotas: Json = {}

    @property
    def usage(self) -> Usage | None:
        """None while nothing was reported."""
        if self.counts:
            return Usage.of(self.counts)
        return None

    def take(self, answer: Json) -> None:
        """Record what an answer or event reports; later values replace earlier ones, but a report
        without a count wipes nothing."""
        for holder in (answer, answer.get("response"), answer.get("message")):
            if not isinstance(holder, dict) or holder.keys().isdisjoint(_REPORT_FIELDS):
                continue
            reported = read_usage(as_object(holder.get("usage")))
            if any(reported.values()) or not self.counts:
                self.counts.update(reported)
            copilot_usage = as_object(holder.get("copilot_usage"))
            cost = count_or_none(copilot_usage.get("total_nano_aiu"))
            if cost is not None:
                self.counts["nano_aiu"] = cost
            self.quotas.update(as_object(holder.get("copilot_quota_snapshots")))


_JSON_TEXT = re.compile(rb'(?:[^"\\]|\\.)*\Z')  # the inside of one JSON string


class DeltaTemplate:
    """What stands around the text of a frequent event.  It is learned from one of them: an event
    that differs from it in nothing but the text needs no JSON parser."""

    def __init__(self) -> None:
        self._before = self._behind = b""

    def learn(self, raw: bytes, text: str, keys: tuple[bytes, ...] = (b"",)) -> bool:
        """Take `raw`, which holds `text` behind one of `keys`, as the pattern for the next ones.
        False: it holds the text in two places, or none."""
        quoted = dumps(text)
        before, _, behind = raw.partition(quoted)
        if raw.count(quoted) != 1 or not before.endswith(keys):
            return False
        self._before, self._behind = before + b'"', b'"' + behind
        return True

    def forget(self) -> None:
        """Nothing matches any more."""
        self._before = b""

    def match(self, raw: bytes) -> bytes | None:
        """The text of such an event, still as JSON without its quotes; None: it is another."""
        before, behind = self._before, self._behind
        if not before or not raw.startswith(before) or not raw.endswith(behind):
            return None
        start, stop = len(before), len(raw) - len(behind)
        if raw.find(b'"', start) == stop or _JSON_TEXT.match(raw, start, stop):
            return raw[start:stop]
        return None


class StreamRelay:
    """A pure pipeline for one streamed answer: upstream bytes in, client bytes out.

    `feed(data)` may be called with any cut of the stream and gives the same bytes in all;
    `close(error)` gives the last bytes: nothing after a proper end, else the dialect's error
    event, so that a cut stream never ends politely.  `ended` is True once the terminal event went
    through; `error` then holds the failure, if it was one.

    Until `has_content` is True the bytes so far show nothing to a user.  Who keeps them back may
    drop them when the stream fails, and ask again or answer with the status of `error`.

    A finished thinking comes out together with what follows it: Claude Code starts a failed turn
    again by itself as long as no block of it is closed, and Codex keeps what is done."""

    def __init__(
        self, dialect: Dialect, asked: str, body: Json, request: Request | None = None
    ) -> None:
        self.dialect = dialect
        self.request = request or Request(asked)  # for a client of `dialect`
        self.ended = self.has_content = False
        self.error: ProxyError | None = None
        self.on_final: Callable[[str, bytes], None] | None = (
            None  # (id, frame of the whole)
        )
        self.names: Mapping[bytes, bytes] = {}  # see Edit
        self.meter = Meter()
        self._options = {"stream_options": body.get("stream_options")}
        self._cutter = FrameCutter()
        self._held = b""  # the end of a thinking

    def restart(self) -> StreamRelay:
        """A new one for the same client, for another try of the upstream."""
        fresh = self._copy()
        fresh.serve_like(self)
        return fresh

    def serve_like(self, other: StreamRelay) -> None:
        """Do for the client what another one was to do."""
        self.on_final = other.on_final
        self.names = other.names

    def _copy(self) -> StreamRelay:
        return type(self)(self.dialect, self.asked, self._options, self.request)

    @property
    def asked(self) -> str:
        """The model as the client wrote it."""
        return self.request.model

    @property
    def failure(self) -> str | None:
        """What the client was told of a failure, None when there was none."""
        if self.error:
            return str(self.error)
        return None

    def feed(self, data: bytes) -> bytes:
        """Client bytes for these upstream bytes, b'' while no event is whole."""
        if self.ended:
            return b""
        block = self._cutter.feed(data)
        if self.names:
            block = restore_names(block, self.names)
        if block:
            return self._quick(block) or self._block(block)
        return b""

    def close(self, error: ProxyError | None = None) -> bytes:
        """The end of the upstream's body; `error` says that it was no regular one."""
        if self.ended:
            return b""
        out = b""
        if error is None:
            rest = self._cutter.flush()
            if is_whole_event(rest):
                out = self._block(restore_names(rest, self.names))
        if error is None and not self.ended:
            out += self._finish()
        if not self.ended:
            out += self._fail(
                error or StreamCut(CUT_SHORT, code="upstream_stream_ended")
            )
        return out

    def _block(self, block: bytes) -> bytes:
        """Whole frames: those that need no look pass as they are."""
        out: list[bytes] = []
        for raw in split_frames(block):
            if not self.ended:
                out.append(self._quick(raw) or self._mend(raw))
        return b"".join(out)

    def _quick(self, block: bytes) -> bytes:
        """Client bytes for frames that need no parser, b'' for all others."""
        return b""

    def _mend(self, raw: bytes) -> bytes:
        """One frame, looked into."""
        frame = Frame.parse(raw)
        if not frame.data:
            return raw  # a comment
        if frame.data.strip() == b"[DONE]":
            return self._done()
        try:
            event = as_object(loads(frame.data))
        except ValueError:
            return self._fail(UpstreamError(NOT_JSON))
        self.meter.take(event)
        return self._mend_event(event, raw)

    def _mend_event(self, event: Json, raw: bytes) -> bytes:
        raise NotImplementedError

    def _hold(self, out: bytes) -> bytes:
        """Keep the end of a thinking back until the next event."""
        self._held += out
        return b""

    def _release(self) -> bytes:
        """What was kept back, as the next event is there."""
        held, self._held = self._held, b""
        return held

    def _done(self) -> bytes:
        """The upstream said [DONE]; for most dialects that means nothing."""
        return b""

    def _finish(self) -> bytes:
        """At a regular end of the body: may still set `ended`."""
        return b""

    def _error(self, error: ProxyError) -> bytes:
        return self.dialect.error_frame(error)

    def _fail(self, error: ProxyError, out: bytes = b"") -> bytes:
        """The end; out: the error as it came, where it is good enough for the client."""
        self.ended, self.error = True, forget_frames(error)
        return out or self._error(error)


#: fields that both of OpenAI's shapes have under the same name
OPENAI_FIELDS = (
    "metadata",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "top_logprobs",
)

INTERRUPTED = "The tool call was interrupted: there is no result."
ORPHAN = "[result of a tool call that is not part of this conversation]\n"

_PLAIN_ROLES = ("system", "user", "assistant")


def is_words(item: Any) -> bool:
    """Is this a turn with a role and a text, and nothing else?  Most turns of most clients are."""
    if type(item) is not dict or len(item) != 2 or item.get("role") not in _PLAIN_ROLES:
        return False
    content = item.get("content")
    return type(content) is str and not content.isspace() and content != ""


class ToolStep(NamedTuple):
    """One piece of a conversation, as far as tool calls and their results are concerned.
    calls: ids of the calls in it; answers: id of the call whose result it is; may_stand_between:
    such a piece may come between a call and its result."""

    item: Json
    calls: Sequence[str] = ()
    answers: str | None = None
    may_stand_between: bool = False


class Dialect:
    """What all dialects have in common.  Stateless: a stream's state lives in its StreamRelay."""

    name = ""
    path = ""  # as in `supported_endpoints`; "": for clients alone
    turns_key = "messages"  # where a request's body holds the conversation
    unique_call_ids = False  # True: the id of a tool call may not come twice
    cache_mark = ""  # the field that marks where the prompt cache may end
    schema_key = "parameters"  # of a tool: where its schema is
    stop_key = ""  # of the body: where stop sequences are; "": it has none
    system_key = ""  # of the body: where the system text is; "": in the turns
    own_parts: frozenset[str] = frozenset()  # the kinds of its content parts
    shared_fields: tuple[str, ...] = (
        OPENAI_FIELDS  # top-level, the same in OpenAI's dialects
    )
    substitutes: tuple[
        str, ...
    ] = ()  # dialects to ask in when a model lacks this one, best first
    takes_files = True  # False: the upstream's endpoint refuses PDFs and the like
    counts_tokens = False  # True: the upstream counts a prompt in this dialect
    reads_compactions = False  # True: the upstream's own compaction items may go up
    has_freeform_tools = False  # True: of OpenAI's, for its own models only
    knows_allowed_tools = False  # True: OpenAI's models take such a tool_choice here
    tells_prompt_first = False  # True: a stream begins with the tokens of its prompt
    has_whole_answer_limit = (
        True  # True: longer answers must be streamed, see Model.output_cap
    )
    keepalive = b": keepalive\n\n"  # an event that clients of this dialect ignore
    stream_type = "text/event-stream"
    STOP_REASONS: tuple[
        tuple[str, str], ...
    ] = ()  # (wire, neutral), first of a word wins
    TO_NEUTRAL: ClassVar[dict[str, str]]  # both made of it
    TO_WIRE: ClassVar[dict[str, str]]

    def __init_subclass__(cls) -> None:
        pairs = tuple(reversed(cls.STOP_REASONS))
        cls.TO_NEUTRAL, cls.TO_WIRE = (
            dict(pairs),
            {neutral: wire for wire, neutral in pairs},
        )

    def error_body(self, error: ProxyError, request_id: str) -> Json:
        """OpenAI's shape: {"error":{"message","type","param","code"}}"""
        return {
            "error": {
                "message": str(error),
                "type": error.types()[0],
                "param": error.param,
                "code": error.code,
            }
        }

    def error_frame(self, error: ProxyError) -> bytes:
        """The same as an event that ends a stream."""
        return b"data: %b\n\n" % dumps(self.error_body(error, ""))

    # `prepare` makes a body fit for the upstream in place, raising BadRequest.  The others serve
    # clients of models in another dialect: both ways between a body and neutral words, unknown
    # fields are losses.
    prepare: Callable[[Edit, Model], None]
    decode_request: Callable[[Json], Request]
    read_tool: Callable[[Json, Request], None]
    read_turn: Callable[
        [Request, Json, str], None
    ]  # one item of the conversation; its place
    write_turns: Callable[[list[Turn], Request, Model], list[Json]]
    encode_request: Callable[[Request, Model], Json]
    encode_response: Callable[[Response, Request], Json]

    def __init__(
        self,
        relay: type[StreamRelay],
        decoder: type[StreamDecoder],
        encoder: type[StreamEncoder],
    ) -> None:
        self._relay, self._decoder, self._encoder = relay, decoder, encoder

    def stream(
        self, asked: str, body: Json, request: Request | None = None
    ) -> StreamRelay:
        """The pipeline of a streamed answer; `body`: the request before `prepare`."""
        return self._relay(self, asked, body, request)

    def mend(self, answer: Json, asked: str, request: Request | None = None) -> bool:
        """Mend a whole answer in place -> was it changed?  asked: the model in the client's words;
        request: what the answer repeats of it."""
        raise NotImplementedError

    def check_answer(self, answer: Json) -> None:
        """Raises UpstreamError for a failure that is told in a whole answer with status 200."""
        if answer.get("error") or answer.get("type") == "error":
            raise told_error(answer)

    def stream_decoder(self) -> StreamDecoder:
        return self._decoder(self)

    def stream_encoder(self, request: Request) -> StreamEncoder:
        return self._encoder(self, request)

    def echo_of(self, body: Json) -> Json:
        """What of a request its answer repeats."""
        return {}

    def initiator(self, body: Json) -> str:
        """ "user" for a human turn, "agent" for a follow-up of the tool loop."""
        if self.interaction(body) == "user":
            return "user"
        return "agent"

    def interaction(self, body: Json) -> str:
        """What made the client ask: "user", "agent" or a kind of SIDE_REQUESTS."""
        turns = list(map(as_object, as_list(body.get("messages", body.get("input")))))
        leading = [
            turn.get("content")
            for turn in turns[:1]
            if turn.get("role") in SYSTEM_ROLES
        ]

        system = [body.get("system"), body.get("instructions"), *leading]
        said = [turn for turn in turns if turn.get("role") not in SYSTEM_ROLES] or [
            {"role": "user" if "input" in body else ""}
        ]
        content = said[-1].get("content")

        if isinstance(content, list):
            content = [
                part
                for part in content
                if as_object(part).get("type") != "tool_result"
                and not is_reminder(text_of([part]))
            ]
        if said[-1].get("type") == "compaction_trigger":
            return "compaction"
        if said[-1].get("role") != "user" or content == []:
            return "agent"
        system_text = "\n".join(filter(None, map(text_of, system)))
        return side_request(text_of(content), system_text) or "user"

    @staticmethod
    def has_images(body: Json) -> bool:
        """Is there an image anywhere, also inside a tool's result?"""
        return any(part.get("type") in IMAGE_TYPES for part in content_parts(body))

    def betas(self, body: Json) -> list[str]:
        """Values of `anthropic-beta` that a body needs which is about to go up."""
        return []

    def has_files(self, body: Json) -> bool:
        """Are there files that this dialect's own endpoint refuses?"""
        return not self.takes_files and any(
            part.get("type") in FILE_TYPES for part in content_parts(body)
        )

    # What section 8 has to know of requests in this dialect.

    def own_tool(self, tool: Json) -> Json:
        """A tool of any dialect in the shape of this one; the same object where it is already."""
        raise NotImplementedError

    def own_choice(self, choice: Any) -> Any:
        """`tool_choice` of any dialect in the shape of this one."""
        raise NotImplementedError

    def is_own_item(self, item: Json) -> bool:
        """Is this an item of a conversation that the dialect knows, whatever parts it has?"""
        return item.get("role") is not None

    def is_in_shape(self, item: Any) -> bool:
        """Is there nothing in this item that normalising would change?  A quick look, which may
        say False of an item that is."""
        return False

    def write_part(self, part: Part, by_model: bool) -> Json:
        """A content part in this dialect.  by_model: in a turn of the assistant."""
        raise NotImplementedError

    def takes_stops(self, stops: list[str], model: Model) -> bool:
        """Does the upstream watch for these stop sequences itself?"""
        return not stops

    def tool_steps(self, item: Json) -> list[ToolStep]:
        """The steps of one message or item.  Raises AttributeError or TypeError for an odd one."""
        raise NotImplementedError

    def missing_result(self, item: Json, call_id: str) -> Json:
        """An error as the result of a call in `item` that has none; {} where only the client can
        know what such a result looks like."""
        raise NotImplementedError

    def result_content(self, item: Json) -> Any:
        """What a result holds: a string or a list of parts."""
        return item.get("content")

    def join_user_turns(self, items: Iterable[Json]) -> list[Json]:
        """The conversation without empty items, joined where the dialect wants one user turn."""
        return [item for item in items if item]

    def drop_foreign_fields(self, edit: Edit, model: Model) -> None:
        """Drop top-level fields that this model's vendor refuses."""

    def tidy_item(self, edit: Edit, item: Json, model: Model) -> bool:
        """Make one item fit for strict upstreams.  False: nothing is left in it."""
        return True

    def calls_in(self, item: Json) -> list[Json]:
        """The objects in an item that hold the name of a called tool, beside blocks."""
        return []

    def fit_cache(self, edit: Edit, model: Model) -> None:
        """Help the prompt cache: set marks, or a key, where the client has set none."""

    def tool_schemas(self, body: Json) -> list[tuple[Json, str]]:
        """(object, key) of each schema of a tool's arguments that is there and not empty."""
        holders = self.function_tools(body)
        return [
            (holder, self.schema_key)
            for holder in holders
            if as_object(holder.get(self.schema_key))
        ]

    def function_tools(self, body: Json) -> list[Json]:
        """The objects in `tools` that hold a function's name and schema."""
        return dicts_in(body, "tools")


def _has_parts(content: Any, kinds: Container[Any]) -> bool:
    """Is this a text, or a list of parts of these kinds alone?"""
    if type(content) is str:
        return True
    if type(content) is not list:
        return False
    for part in content:
        if type(part) is dict:
            kind = part.get("type")
        else:
            kind = None
        if type(kind) is not str or kind not in kinds:
            return False
    return True


IMAGE_TYPES = ("image", "image_url", "input_image")
FILE_TYPES = ("file", "input_file", "document")


def content_parts(body: Json) -> Iterator[Json]:
    """Every part of a conversation in any dialect, in order, also those of tools' results."""
    for item in as_list(body.get("messages")) + as_list(body.get("input")):
        for key in ("content", "output") if isinstance(item, dict) else ():
            for part in as_list(item.get(key)):
                if isinstance(part, dict):
                    yield part
                    yield from filter(as_object, as_list(part.get("content")))


def check_list(body: Json, key: str) -> list[Json]:
    """`body[key]` as a list of objects.  Raises BadRequest naming the place."""
    items = body.get(key)
    if not isinstance(items, list):
        raise BadRequest("'%s' must be an array" % key, param=key)
    for at, item in enumerate(items):
        if not isinstance(item, dict):
            raise BadRequest(
                "'%s[%d]' must be an object" % (key, at), param="%s[%d]" % (key, at)
            )
    return items


def walk_objects(value: Any) -> Iterator[Json]:
    """Every JSON object inside `value`, outermost first, without recursion."""
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, dict):
            yield item
            todo.extend(reversed(list(item.values())))
        elif isinstance(item, list):
            todo.extend(reversed(item))


#: what only OpenAI's models know
_OPENAI_ONLY = (
    "logit_bias",
    "logprobs",
    "top_logprobs",
    "metadata",
    "prediction",
    "verbosity",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "web_search_options",
)


def strings_in(value: Any) -> Iterator[str]:
    """Every text and every key inside `value`, without recursion."""
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            yield from item
            todo.extend(item.values())
        elif isinstance(item, list):
            todo.extend(item)


SYSTEM_ROLES = ("system", "developer")
REMINDER_START, REMINDER_END = "<system-reminder>", "</system-reminder>"


class SideRequest(NamedTuple):
    """How to know a request that a client makes by itself.  marks: all must be there; how: the
    text "starts" with it, it "begins" a line, stands anywhere ("holds"), or "is" the text.
    kind: of interaction, as the upstream's header names it behind "conversation-"."""

    client: str
    place: str  # system, user
    how: str
    marks: tuple[str, ...]
    kind: str = "background"


COMPACTIONS = ("compaction", "compaction_summary", "context_compaction")
CONTINUED = "This session is being continued from a previous conversation that ran out of context."
SUMMARY_PROMPT = (
    "Somebody will continue this conversation who knows nothing of it but what you write now. Give "
    "them a summary as plain text: what the user wants, in their words where these matter; what "
    "was decided and why; what was done and found out, with exact names of files, commands, values "
    "and errors; what is open and the next step. Do not call tools and add nothing else."
)

#: requests that no human wrote: compaction, continuation, titles, topics, safety checks
SIDE_REQUESTS = (
    SideRequest(
        "Claude Code",
        "user",
        "holds",
        (
            "CRITICAL: Respond with TEXT ONLY. Do NOT call any tools.",
            "Your task is to create a detailed summary of the conversation so far",
            "Pending Tasks:",
        ),
        "compaction",
    ),
    SideRequest(
        "Claude Code",
        "user",
        "holds",
        (
            "CRITICAL: Respond with TEXT ONLY. Do NOT call any tools.",
            "Your task is to create a detailed summary of the conversation so far",
            "Current Work:",
        ),
        "compaction",
    ),
    SideRequest("Claude Code", "user", "starts", (CONTINUED,), "agent"),
    SideRequest(
        "Claude Code", "user", "starts", ("Please write a 5-10 word title for",)
    ),
    SideRequest(
        "Claude Code",
        "system",
        "begins",
        ("You are a helpful AI assistant tasked with summarizing conversations",),
        "compaction",
    ),
    SideRequest(
        "Claude Code",
        "system",
        "begins",
        ("You are a security monitor for autonomous AI coding agents",),
    ),
    SideRequest(
        "Claude Code",
        "system",
        "begins",
        ("Analyze if this message indicates a new conversation topic",),
    ),
    SideRequest(
        "Claude Code", "system", "begins", ("Generate a concise, sentence-case title",)
    ),
    SideRequest(
        "Claude Code", "system", "begins", ("Summarize this coding conversation in",)
    ),
    SideRequest(
        "opencode",
        "user",
        "starts",
        ("The previous request exceeded the provider's size limit",),
        "agent",
    ),
    SideRequest(
        "opencode",
        "user",
        "is",
        ("Continue if you have next steps, or stop and ask for clarification",),
        "agent",
    ),
    SideRequest(
        "opencode",
        "system",
        "begins",
        ("You are an anchored context summarization assistant for coding sessions.",),
        "compaction",
    ),
    SideRequest("opencode", "system", "begins", ("You are a title generator.",)),
    SideRequest("Open WebUI", "user", "starts", ("### Task:\nGenerate a concise",)),
    SideRequest(
        "Open WebUI", "user", "starts", ("### Task:\nGenerate 1-3 broad tags",)
    ),
    SideRequest(
        "Open WebUI", "user", "starts", ("### Task:\nSuggest 3-5 relevant follow-up",)
    ),
    SideRequest("this proxy", "user", "is", (SUMMARY_PROMPT,), "compaction"),
)


def _has_mark(text: str, mark: str, how: str) -> bool:
    if how == "is":
        return text == mark
    if how == "starts":
        return text.startswith(mark)
    if how == "begins":
        return text.startswith(mark) or "\n" + mark in text
    return mark in text


def is_reminder(text: str) -> bool:
    """Is this one reminder or several, and nothing else?  Claude Code puts such texts beside tool
    results; no human wrote them."""
    *reminders, rest = text.split(REMINDER_END)
    return (
        bool(reminders)
        and not rest.strip()
        and all(reminder.lstrip().startswith(REMINDER_START) for reminder in reminders)
    )


def side_request(user_text: str, system_text: str) -> str:
    """The kind of a request that the client made by itself, "" for others.  See SIDE_REQUESTS."""
    texts = {"user": user_text.strip(), "system": system_text.strip()}
    for row in SIDE_REQUESTS:
        text = texts[row.place]
        if _has_mark(text, row.marks[0], row.how) and all(
            _has_mark(text, mark, row.how) for mark in row.marks
        ):
            return row.kind
    return ""


def text_of(content: Any) -> str:
    """The text of a content field in any dialect: a string, or parts with a `text`."""
    if isinstance(content, str):
        return content
    return "\n".join(
        part["text"]
        for part in as_list(content)
        if isinstance(part, dict) and isinstance(part.get("text"), str)
    )


def prepare_tools(
    edit: Edit, is_offered: Callable[[Json], bool], *refused: str
) -> None:
    """Leave out tools that nobody runs upstream, and of the others what some backend refuses and
    no model needs.  Raises BadRequest when a tool that must be called was left out."""
    body = edit.body
    kept: list[Json] = []

    for tool in check_list(body, "tools") if body.get("tools") else ():
        if not is_offered(tool):
            kind = printable(str(tool.get("type")), 60)
            edit.lose("tools", "the tool %s is not offered upstream" % kind)
            refuse_forced_tool(body, tool)
            continue
        kept.append(tool)
        for key in refused:
            edit.drop(tool, key)
        for holder in (tool, as_object(tool.get("function"))):
            for key in ("parameters", "input_schema"):
                edit.drop(as_object(holder.get(key)), "$schema")

    if kept:
        edit.replace(body, "tools", kept)
    else:
        drop_tool_fields(edit)


def refuse_forced_tool(body: Json, tool: Json) -> None:
    """Raises BadRequest when `tool_choice` demands the tool that was just left out."""
    choice = as_object(body.get("tool_choice"))
    names = [
        name for name in (tool.get("name"), tool.get("type")) if isinstance(name, str)
    ]
    if (
        choice
        and names
        and (choice.get("name") in names or choice.get("type") in names)
    ):
        raise BadRequest(
            "'tool_choice' demands the tool %s, which is not offered upstream"
            % printable(names[0], 60),
            param="tool_choice",
        )


def drop_tool_fields(edit: Edit) -> None:
    """Without tools every field about them is refused: an empty list, too."""
    body = edit.body
    for key in ("tools", "parallel_tool_calls"):
        edit.drop(body, key)
    choice = edit.drop(body, "tool_choice")
    if isinstance(choice, dict):
        wish = choice.get("type")
    else:
        wish = choice
    if wish not in (None, "auto", "none"):
        edit.lose("tool_choice", "there are no tools")


def is_inline_image(url: str) -> bool:
    """The upstream takes data: URLs and its own attachments only."""
    return url[:5].lower() == "data:" or url.startswith(ATTACHMENTS_URL)


def refuse_image_urls(content: Any, place: str) -> None:
    """Raises BadRequest for an image that the upstream would have to fetch."""
    for part in map(as_object, as_list(content)):
        image = part.get("image_url")
        if isinstance(image, dict):
            url = image.get("url")
        else:
            url = image

        if part.get("type") == "image_url" and not isinstance(url, str):
            raise BadRequest("'image_url.url' must be a string", param=place)
        if (
            part.get("type") in ("image_url", "input_image")
            and isinstance(url, str)
            and not is_inline_image(url)
        ):
            raise BadRequest(
                "images by URL are not supported by the upstream: send the image "
                "itself as base64 (data:image/png;base64,...), or start the proxy "
                "with --fetch-images",
                param=place,
            )


# ---- From one dialect to another: what all share ----

OPAQUE_TAG = "cpx1."  # marks state that this proxy packed; a dot never is in base64
FOREIGN_STATE = "minted by another dialect"
NO_COUNTERPART = "no counterpart in the model's dialect"
OUTPUT_TOOL = "structured_output"
ERROR_PREFIX = "Error: "  # tells of is_error where the dialect has no field for it
FALLBACK_MAX_TOKENS = 8192  # Messages demands a limit; for models that list none
MAX_STOP_SEQUENCES = 4  # of OpenAI's models
MAX_WATCHED_STOPS, MAX_STOP_CHARS = 32, 256  # that the proxy itself watches for
EPHEMERAL = {"type": "ephemeral"}
#: fields of one dialect whose absence in another changes nothing
HARMLESS = frozenset(
    (
        "stream_options",
        "store",
        "service_tier",
        "include",
        "client_metadata",
        "truncation",
        "type",
        "format",
        "id",
        "status",
        "phase",
        "annotations",
        "logprobs",
        "role",
        "thinking",
        "reasoning",
        "citations",
        "caller",
        "index",
        "eager_input_streaming",
        "prediction",
        "background",
        "internal_chat_message_metadata_passthrough",
        "previous_response_id",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
    )
)
_DATA_URL = re.compile(
    r"data:([\w.+/-]+)(?:;[^,;]*)*;base64,(.*)\Z", re.DOTALL | re.IGNORECASE
)
_CALL_ID = re.compile(
    r"[A-Za-z0-9_-]{1,40}\Z"
)  # 40: the least that a model was seen to take
_encode_text = json.JSONEncoder(ensure_ascii=False).encode


def word(value: Any) -> str | None:
    """A string that says something; clients also send null and ""."""
    if isinstance(value, str) and value:
        return value
    return None


def words(value: Any) -> list[str]:
    return list(filter(word, [value] if isinstance(value, str) else as_list(value)))


def positive(value: Any) -> int | None:
    """A limit in tokens; some clients say null or -1 for none."""
    return count_or_none(value) or None


def flag(value: Any) -> bool | None:
    """`value` where it is a boolean, else None."""
    if isinstance(value, bool):
        return value
    return None


def given(**fields: Any) -> Json:
    """The fields that have a value.  (a=1, b=None) -> {"a": 1}"""
    return {name: value for name, value in fields.items() if value is not None}


def pack_opaque(dialect: str, state_id: str | None, blob: str) -> str:
    """Foreign state for a client's own slot: '<tag><base64 of [dialect, id, blob]>'."""
    if state_id and len(state_id) <= MAX_ID_CHARS:
        kept = state_id
    else:
        kept = None
    return OPAQUE_TAG + base64.b64encode(dumps([dialect, kept, blob])).decode()


def is_packed(state: Any) -> bool:
    return isinstance(state, str) and state.startswith(OPAQUE_TAG)


def unpack_opaque(text: Any) -> list[tuple[str, str | None, str]]:
    """[(dialect, id, blob)] of one packed state, or of several that a client has joined; [] for
    anything that was not packed here."""
    found = []
    for piece in text.split(OPAQUE_TAG)[1:] if is_packed(text) else ():
        try:
            dialect, state_id, blob = loads(base64.b64decode(piece))
            found.append((str(dialect), word(state_id), str(blob)))
        except (TypeError, ValueError):
            found.append(("", None, ""))
    return found


def reasoning_parts(
    dialect: str, text: str, state: Any, state_id: Any = None
) -> list[Part]:
    """What a slot of `dialect` holds: its own state, or packed ones of others.
    Anthropic signs the text, so states of several blocks whose texts were joined are worthless."""
    packed = unpack_opaque(state)

    if not packed:
        own = word(state)
        if text or own:
            return [Reasoning(text, own, word(state_id), dialect if own else None)]
        return []

    parts: list[Part] = []
    for minted_by, kept, blob in packed:
        redacted = kept == "redacted"
        if blob and (minted_by != "messages" or len(packed) == 1 or redacted):
            parts.append(
                Reasoning(
                    "" if redacted else text,
                    blob,
                    None if redacted else kept,
                    minted_by,
                    redacted,
                )
            )
            text = text if redacted else ""

    if text:
        return parts + [Reasoning(text)]
    return parts


def client_state(part: Reasoning, dialect: str) -> str | None:
    """The opaque state as it goes into a client's slot: bare when it is of that dialect."""
    if part.signature is None or part.minted_by == dialect:
        return part.signature
    return pack_opaque(
        part.minted_by or "", "redacted" if part.redacted else part.id, part.signature
    )


def split_system(turns: list[Turn]) -> tuple[list[Turn], list[Turn]]:
    """(the system turns at the head of a conversation, all other turns: at least one)."""
    roles = [turn.role for turn in turns[:-1]] + ["end"]
    head = next(at for at, role in enumerate(roles) if role != "system")
    return turns[:head], turns[head:]


def join_states(states: list[str]) -> str | None:
    """Several states for the one slot that Chat has.  Packed ones can be told apart again; of the
    others the last one counts, as it does upstream."""
    if not states:
        return None
    if is_packed(states[0]):
        return "".join(states)
    return states[-1]


def usable_parts(turn: Turn, request: Request, dialect: str) -> list[Part]:
    """The parts of a turn that may go upstream: foreign reasoning never does."""
    kept: list[Part] = []
    for part in turn.parts:
        if not isinstance(part, Reasoning) or (
            part.signature and part.minted_by == dialect
        ):
            kept.append(part)
        elif part.signature:
            request.lose("reasoning", FOREIGN_STATE)
    return kept


def arguments_object(text: str) -> Json:
    """'' -> {}, '{"a":1}' -> {"a": 1}; anything else is kept whole: '[1' -> {"_raw": "[1"}."""
    try:
        if text.strip():
            value = loads(text.encode("utf-8", "surrogatepass"))
        else:
            value = {}
    except ValueError:
        value = None
    if isinstance(value, dict):
        return value
    return {"_raw": text}


def fit_call_id(text: str) -> str:
    """A call id that every upstream takes; the same for a call and its result."""
    if _CALL_ID.match(text):
        return text
    return stable_id("call_", text)


def drop_nulls(edit: Edit, target: Json, *keep: str) -> None:
    """Nulls mean nothing, and strict schemas refuse them."""
    for key in [k for k, value in target.items() if value is None and k not in keep]:
        edit.drop(target, key)


def fit_id(edit: Edit, target: Any, name: str) -> None:
    """A call's id, in the call or in its result, as every upstream takes it."""
    if isinstance(target, dict) and not _CALL_ID.match(str(target.get(name) or "")):
        edit.set(target, name, fit_call_id(str(target.get(name))))


def last_user_turns(messages: list[Json]) -> list[Json]:
    """The last two turns of the user; a run of results of tools counts once, as its last."""
    turns: list[Json] = []
    after: Any = None
    for message in reversed(messages):
        role = message.get("role")
        if role == "user" or (role == "tool" and after not in ("user", "tool")):
            turns.append(message)
        if len(turns) == 2:
            break
        after = role
    return turns[::-1]


def drop_surplus_marks(edit: Edit, marked: list[Json], mark: str) -> None:
    """The upstream takes four cache marks; the last ones save most."""
    for target in marked[:-4]:
        edit.drop(target, mark, "more than four marks")


def input_items(body: Json) -> list[Json]:
    """The `input` of a request as items.  'a' -> [{"role": "user", "content": "a"}]"""
    text = body.get("input")
    if isinstance(text, str):
        return [{"type": "message", "role": "user", "content": text}]
    return [item for item in as_list(text) if isinstance(item, dict)]


def conversation_key(body: Json, model: Model) -> str:
    """The same for all requests of a conversation: made of what stays at its head."""
    heads = [
        next(
            (
                text_of(item.get("content"))
                for item in input_items(body)
                if item.get("role") in roles
            ),
            "",
        )
        for roles in (("system", "developer"), ("user",))
    ]
    return stable_id("", dumps([model.id, body.get("instructions"), *heads]).decode())


def client_id(prefix: str, text: str, request: Request) -> str:
    """The upstream's response id if it fits the client's dialect, else a short one of our own."""
    fits = text.startswith(prefix) and len(prefix) < len(text) <= MAX_ID_CHARS
    if fits:
        return text
    return stable_id(prefix, request.key + text)


#: how the base64 of an image begins
_IMAGE_MARKS = (
    ("iVBORw0KGgo", "image/png"),
    ("/9j/", "image/jpeg"),
    ("R0lGOD", "image/gif"),
    ("UklGR", "image/webp"),
)


def image_type(data: str, label: str) -> str:
    """The media type of base64 `data`: by its first bytes, else by its label, spelt as usual."""
    for mark, kind in _IMAGE_MARKS:
        if data.startswith(mark):
            return kind
    label = label.strip().lower()
    return {"image/jpg": "image/jpeg", "image/x-png": "image/png"}.get(label, label)


def data_url(part: Image | Document) -> str:
    return part.url or "data:%s;base64,%s" % (part.media_type, part.data)


def document_from_file(source: Any, place: str) -> Document:
    """OpenAI's file part: `file_data` (a data: URL) or `file_url`; ids name what nobody stores."""
    source = as_object(source)
    found = _DATA_URL.match(str(source.get("file_data") or ""))
    if not found and not source.get("file_url"):
        raise BadRequest(
            "'%s': a file must come as file_data, a base64 data: URL" % place,
            param=place,
        )
    media, data = found.groups() if found else ("", "")
    return Document(
        media,
        data,
        str(source.get("file_url") or ""),
        title=word(source.get("filename")),
    )


def plain_text(part: Part) -> str:
    """The words of a text, or of a document that is text; '' for everything else."""
    if isinstance(part, Document) and part.text:
        if part.title:
            return "%s:\n%s" % (part.title, part.text)
        return part.text
    if isinstance(part, Text):
        return part.text
    return ""


def join_texts(parts: Iterable[Part]) -> str:
    return "\n\n".join(filter(None, map(plain_text, parts)))


# ---- One lenient reader of content ----
# A client writes its parts in the shape that it thinks the model's vendor wants, so each dialect
# reads the parts of all three.


def block_as_text(block: Json, request: Request) -> Text:
    """A block or item that the model's dialect has no word for, whole and in JSON: a session must
    not end because its history holds one."""
    kind = printable(str(block.get("type")), 60)
    request.lose(kind, "sent as text")
    shown = {
        key: value
        for key, value in block.items()
        if key not in ("type", "id", "status")
    }
    return Text("[%s] %s" % (kind, dumps(shown).decode("utf-8", "replace")))


_MEDIA_KINDS = (
    "input_audio",
    "audio",
    "input_video",
    "video",
    "video_url",
)  # no text is in them


def _read_unknown(part: Json, place: str, request: Request) -> list[Part]:
    kind = str(part.get("type"))
    if kind in _MEDIA_KINDS:
        raise BadRequest(
            "content of type '%s' cannot be given to this model" % kind,
            param=request.turns_key,
        )
    return [block_as_text(part, request)]


def read_content(content: Any, place: str, request: Request) -> list[Part]:
    """The parts of a content field in any dialect: a string, a part, or an array of both."""
    parts: list[Part] = []
    for piece in content if isinstance(content, list) else [content]:
        if isinstance(piece, str):
            parts += [Text(piece)] if piece else []
        elif isinstance(piece, dict):
            parts += read_part(piece, place, request)
    return parts


def read_part(part: Json, place: str, request: Request) -> list[Part]:
    """One part in any dialect; one of an unknown kind becomes text.  Raises BadRequest."""
    reader = _PART_READERS.get(str(part.get("type")), _read_unknown)
    found = reader(part, place, request)
    if found and (part.get("cache_control") or part.get("copilot_cache_control")):
        found[-1].cache = True
    return found


def _read_text(part: Json, place: str, request: Request) -> list[Part]:
    if part.get("text"):
        return [Text(str(part["text"]))]
    return []


def _read_refusal(part: Json, place: str, request: Request) -> list[Part]:
    if part.get("refusal"):
        return [Text(str(part["refusal"]), refusal=True)]
    return []


def _read_image_url(part: Json, place: str, request: Request) -> list[Part]:
    """OpenAI's image: `image_url` is an object in Chat, a string in Responses."""
    image = part.get("image_url")
    if isinstance(image, dict):
        about = image
    else:
        about = dict(part, url=image)
    url, detail = about.get("url"), word(about.get("detail"))
    if not isinstance(url, str) or not url:
        raise BadRequest("'%s': the image must be a data: URL" % place, param=place)
    split = _DATA_URL.match(url)
    if split:
        return [Image(split.group(1), split.group(2), "", detail)]
    return [Image(url=url, detail=detail)]


def _read_file(part: Json, place: str, request: Request) -> list[Part]:
    return [document_from_file(part.get("file", part), place)]


def _read_source(part: Json, place: str, request: Request) -> list[Part]:
    """Anthropic's image or document: base64, a URL, plain text, or parts of its own."""
    kind, source = part.get("type"), as_object(part.get("source"))
    if source.get("type") == "content":
        title = word(part.get("title"))
        if title:
            heading: list[Part] = [Text(title + ":")]
        else:
            heading = []
        return heading + read_content(source.get("content"), place, request)
    if source.get("type") not in ("base64", "url", "text"):
        raise BadRequest(
            "'%s': %ss must be sent as base64" % (place, kind), param=place
        )

    media, data, url = (
        str(source.get(key) or "") for key in ("media_type", "data", "url")
    )
    if kind == "image":
        return [Image(media, data, url)]
    title = word(part.get("title"))
    if source["type"] == "text":
        return [Document(media, "", url, data, title)]
    return [Document(media, data, url, "", title)]


def _read_tool_use(part: Json, place: str, request: Request) -> list[Part]:
    arguments = dumps(as_object(part.get("input"))).decode("utf-8", "surrogatepass")
    return [ToolCall(str(part.get("id") or ""), str(part.get("name") or ""), arguments)]


def _read_tool_result(part: Json, place: str, request: Request) -> list[Part]:
    content = read_content(part.get("content"), place, request)
    return [
        ToolResult(
            str(part.get("tool_use_id") or ""), content, part.get("is_error") is True
        )
    ]


def _read_thinking(part: Json, place: str, request: Request) -> list[Part]:
    thought = str(part.get("thinking") or "")
    return reasoning_parts("messages", thought, part.get("signature"))


def _read_redacted_thinking(part: Json, place: str, request: Request) -> list[Part]:
    return [Reasoning("", word(part.get("data")), None, "messages", True)]


_PART_READERS: dict[str, Callable[[Json, str, Request], list[Part]]] = {
    "text": _read_text,
    "input_text": _read_text,
    "output_text": _read_text,
    "refusal": _read_refusal,
    "image_url": _read_image_url,
    "input_image": _read_image_url,
    "image": _read_source,
    "file": _read_file,
    "input_file": _read_file,
    "document": _read_source,
    "tool_use": _read_tool_use,
    "tool_result": _read_tool_result,
    "thinking": _read_thinking,
    "redacted_thinking": _read_redacted_thinking,
}

# ---- Tools that the client runs under a type of its vendor's ----
# Other vendors' models know no such types: to them they are functions, and a call comes back in
# the form in which the client knows it.


class ClientTool(NamedTuple):
    """arguments: the field of a call's item that holds the arguments; fixed: what else is in the
    item, or, where it has the arguments' name, beside them."""

    arguments: str
    description: str
    schema: Json
    fixed: Mapping[str, Any] = types.MappingProxyType({})


def _schema_of(required: str, **properties: Any) -> Json:
    """'a b', a="string", c=["string"] -> an object schema; a list stands for an array of it."""
    shown: Json = {}
    for name, kind in properties.items():
        if isinstance(kind, list):
            shown[name] = {"type": "array", "items": {"type": kind[0]}}
        else:
            shown[name] = kind if isinstance(kind, dict) else {"type": kind}
    return {"type": "object", "properties": shown, "required": required.split()}


def _one_of(*words: str) -> Json:
    return {"type": "string", "enum": list(words)}


#: type of a tool in Responses -> how it becomes a function (OpenAI's API reference, tool types)
CLIENT_TOOLS: dict[str, ClientTool] = {
    "tool_search": ClientTool(
        "arguments",
        "Find tools that are not loaded yet, by what they do.",
        _schema_of("query", query="string", limit="integer"),
        {"execution": "client"},
    ),
    "local_shell": ClientTool(
        "action",
        "Run a command on the user's machine.",
        _schema_of(
            "command",
            command=["string"],
            working_directory="string",
            timeout_ms="integer",
            env={"type": "object"},
            user="string",
        ),
        {"action": {"type": "exec", "env": {}}},
    ),
    "shell": ClientTool(
        "action",
        "Run shell commands on the user's machine, one after the other.",
        _schema_of(
            "commands",
            commands=["string"],
            timeout_ms="integer",
            max_output_length="integer",
        ),
    ),
    "apply_patch": ClientTool(
        "operation",
        "Create, update or delete one file.  `diff` is a V4A diff.",
        _schema_of(
            "type path",
            type=_one_of("create_file", "update_file", "delete_file"),
            path="string",
            diff="string",
        ),
    ),
    "computer_use_preview": ClientTool(
        "action",
        "Use the mouse, the keyboard and the screen of a computer.",
        _schema_of(
            "type",
            type=_one_of(
                "click",
                "double_click",
                "drag",
                "keypress",
                "move",
                "screenshot",
                "scroll",
                "type",
                "wait",
            ),
            x="integer",
            y="integer",
            button="string",
            text="string",
            keys=["string"],
            scroll_x="integer",
            scroll_y="integer",
            path={"type": "array"},
        ),
        {"pending_safety_checks": []},
    ),
}
#: type of the item of a call -> type of the tool
CALL_ITEMS = {
    "tool_search_call": "tool_search",
    "local_shell_call": "local_shell",
    "shell_call": "shell",
    "apply_patch_call": "apply_patch",
    "computer_call": "computer_use_preview",
}
_ITEM_OF = {tool: item for item, tool in CALL_ITEMS.items()}

_EDIT_COMMANDS = ("view", "create", "str_replace", "insert")
_COORDINATE: Json = {"type": "array", "items": {"type": "integer"}}
#: how the type of a tool of Messages begins, what it does, its schema (Anthropic's tool reference)
ANTHROPIC_TOOLS: tuple[tuple[str, str, Json], ...] = (
    (
        "bash_",
        "Run a command in a bash session that stays open; `restart` begins a new one.",
        _schema_of("", command="string", restart="boolean"),
    ),
    (
        "text_editor_",
        "View, create and edit files.",
        _schema_of(
            "command path",
            command=_one_of(*_EDIT_COMMANDS, "undo_edit"),
            path="string",
            file_text="string",
            old_str="string",
            new_str="string",
            insert_line="integer",
            insert_text="string",
            view_range=["integer"],
        ),
    ),
    (
        "memory_",
        "Keep notes in files below /memories that last beyond this conversation.",
        _schema_of(
            "command",
            command=_one_of(*_EDIT_COMMANDS, "delete", "rename"),
            path="string",
            file_text="string",
            old_str="string",
            new_str="string",
            insert_line="integer",
            insert_text="string",
            view_range=["integer"],
            old_path="string",
            new_path="string",
        ),
    ),
    (
        "computer_",
        "Use the mouse, the keyboard and the screen of a computer.",
        _schema_of(
            "action",
            action="string",
            coordinate=_COORDINATE,
            start_coordinate=_COORDINATE,
            text="string",
            duration="number",
            scroll_amount="integer",
            scroll_direction=_one_of("up", "down", "left", "right"),
        ),
    ),
)

FREEFORM_SCHEMA = _schema_of("input", input="string")


def freeform_description(tool: Json) -> str:
    """What a freeform tool does, with the grammar of its input."""
    grammar = as_object(tool.get("format")).get("definition")
    about = str(tool.get("description") or "")
    if grammar:
        return f"{about}\n\n`input` must follow this grammar:\n{grammar}"
    return about


def freeform_input(arguments: str) -> str:
    """'{"input": "a"}' -> 'a'; arguments of another shape stay as they are."""
    found = arguments_object(arguments)
    text = found.get("input", found.get("_raw"))
    if isinstance(text, str):
        return text
    return arguments


def flat_name(namespace: str, name: str) -> str:
    """A tool of a namespace as a function of its own: ('fs', 'read') -> 'fs__read'."""
    if namespace:
        return "%s__%s" % (namespace, name)
    return name


def function_of(tool: Json) -> Json | None:
    """{name, description, parameters, strict} of a function in any dialect; None for others."""
    kind = tool.get("type")
    if isinstance(tool.get("function"), dict):
        tool = tool["function"]
    elif kind not in (None, "function", "custom") or not isinstance(
        tool.get("name"), str
    ):
        return None
    elif kind == "custom" and "input_schema" not in tool:
        return None  # OpenAI's freeform tool
    return given(
        name=tool.get("name"),
        description=tool.get("description"),
        parameters=tool.get("parameters", tool.get("input_schema")),
        strict=tool.get("strict"),
    )


def freeform_of(tool: Json) -> Json | None:
    """{name, description, format} of a freeform tool in either of OpenAI's dialects, else None."""
    if tool.get("type") != "custom" or "input_schema" in tool:
        return None
    source = as_object(tool.get("custom")) or tool
    return given(
        name=source.get("name"),
        description=source.get("description"),
        format=source.get("format"),
    )


def choice_of(choice: Any) -> str | Named | None:
    """ "auto", "none", "required" or a named function, in any dialect's shape; None for others."""
    if isinstance(choice, dict) and choice.get("type") in ("function", "tool"):
        name = as_object(choice.get("function")).get("name") or choice.get("name")
        if isinstance(name, str):
            return Named(name)
        return None
    if isinstance(choice, dict):
        word_of = choice.get("type")
    else:
        word_of = choice
    return {
        "auto": "auto",
        "none": "none",
        "required": "required",
        "any": "required",
    }.get(str(word_of))


def write_part(part: Part, prefix: str) -> Json:
    """A content part in Chat's words (no prefix) or in those of Responses ("input_")."""
    if isinstance(part, Image) and prefix:
        return {
            "type": "input_image",
            "image_url": data_url(part),
            "detail": part.detail or "auto",
        }
    if isinstance(part, Image):
        return {
            "type": "image_url",
            "image_url": given(url=data_url(part), detail=part.detail),
        }
    if isinstance(part, Document) and not part.text:
        file = {"filename": part.title or "document.pdf", "file_data": data_url(part)}
        if prefix:
            return dict(file, type="input_file")
        return {"type": "file", "file": file}
    return {"type": prefix + "text", "text": plain_text(part)}


def result_text(result: ToolResult, request: Request) -> str:
    """The text of a tool's result, with the error told in words."""
    if result.is_error:
        request.lose("is_error", "told in the text")
    return (ERROR_PREFIX if result.is_error else "") + "\n".join(
        filter(None, map(plain_text, result.parts))
    )


def add_tool(request: Request, tool: Json, schema_key: str, **more: Any) -> None:
    """A function that the client offers, unless one of its name is there; more: of Tool."""
    note_unknown(
        request,
        tool,
        "name",
        "description",
        "strict",
        "type",
        schema_key,
        "cache_control",
        "defer_loading",
    )

    name = str(tool.get("name"))

    if name not in request.tool_names:
        request.tool_names.add(name)
        request.tools.append(
            Tool(
                name,
                tool.get("description"),
                tool.get(schema_key),
                tool.get("strict"),
                **more,
            )
        )


def drop_hosted_tool(request: Request, tool: Json) -> None:
    """Leave out a tool that its vendor's servers run.  Raises BadRequest where it must be used."""
    kind = printable(str(tool.get("type")), 60)
    request.lose("tools", "the hosted tool %s has no counterpart" % kind)
    choice = request.tool_choice
    if isinstance(choice, Named) and choice.name in (
        tool.get("name"),
        tool.get("type"),
    ):
        raise BadRequest(
            "'tool_choice' demands the tool %s, which the model's upstream does not "
            "run" % kind,
            param="tool_choice",
        )


def note_unknown(request: Request, source: Json, *known: str) -> None:
    """Record the fields that no other dialect has; nulls mean nothing."""
    for name in source.keys() - HARMLESS - set(known):
        if source[name] is not None:
            request.lose(name[:60], NO_COUNTERPART)


def _joined_run(run: list[Reasoning]) -> list[Part]:
    """Words without state belong to the first state, unless the states have words of their own."""
    loose = "".join(part.text for part in run if not part.signature)
    states: list[Part] = [part for part in run if part.signature]
    if not loose or any(map(text_in, states)):
        return states
    for at, part in enumerate(states):
        if isinstance(part, Reasoning) and not part.redacted:
            states[at] = replace(part, text=loose)
            return states
    return [Reasoning(loose), *states]


def join_thoughts(turns: list[Turn]) -> None:
    """Thinking that came in pieces, with its state behind the last one, becomes one part again."""
    for turn in turns:
        joined: list[Part] = []
        run: list[Reasoning] = []
        for part in turn.parts:
            if isinstance(part, Reasoning):
                run.append(part)
            else:
                joined += [*_joined_run(run), part]
                run = []
        turn.parts[:] = joined + _joined_run(run)


class UnansweredCalls:
    """The calls of one round that wait for their results, for clients that write no ids."""

    def __init__(self) -> None:
        self._waiting: dict[str, None] = {}  # ids, in order
        self._by_name: dict[str, collections.deque[str]] = {}

    def add(self, call: ToolCall) -> None:
        self._waiting[call.id] = None
        self._by_name.setdefault(call.name, collections.deque()).append(call.id)

    def take(self, result: ToolResult) -> str:
        """The id of the call that a result answers: by its id, else the first one of its name, or
        the very first where it names none; "" when there is no such call."""
        call_id = result.call_id
        if call_id not in self._waiting:
            call_id = self._first_of(result.name)
        self._waiting.pop(call_id, None)
        return call_id

    def _first_of(self, name: str) -> str:
        if not name:
            return next(iter(self._waiting), "")
        ids = self._by_name.get(name, collections.deque())
        while ids:
            call_id = ids.popleft()
            if call_id in self._waiting:
                return call_id
        return ""


def pair_by_order(turns: list[Turn]) -> None:
    """Give each call and result an id: calls without one get theirs by their place, so that it is
    the same in each request of a conversation; a result gets that of its call."""
    parts = [part for turn in turns for part in turn.parts]
    used = {part.id for part in parts if isinstance(part, ToolCall)}
    used.update(part.call_id for part in parts if isinstance(part, ToolResult))
    fresh = (
        name
        for name in map("call_{}".format, range(len(parts) + len(used) + 1))
        if name not in used
    )

    waiting = UnansweredCalls()

    for turn in turns:
        if turn.role == "assistant":
            waiting = UnansweredCalls()
        for at, part in enumerate(turn.parts):
            if isinstance(part, ToolCall):
                turn.parts[at] = call = replace(part, id=part.id or next(fresh))
                waiting.add(call)
            elif isinstance(part, ToolResult):
                call_id = waiting.take(part) or part.call_id or next(fresh)
                turn.parts[at] = replace(part, call_id=call_id)


def preflight(request: Request, model: Model) -> None:
    """Refuse images for a model without eyes, leave fields of OpenAI's own to its models."""
    if not model.is_openai:
        for key in (
            request.openai.keys() - HARMLESS | {"logprobs"} & request.openai.keys()
        ):
            request.lose(key, "the model is not OpenAI's")
        request.openai = {}
    elif model.id.startswith(("gpt-4", "gpt-3")) and request.openai.pop(
        "verbosity", None
    ):
        request.lose("verbosity", "models before gpt-5 refuse it")
    parts = [part for turn in request.turns for part in turn.parts]
    parts += [p for r in parts if isinstance(r, ToolResult) for p in r.parts]
    if model.supports.get("vision") is False and any(
        isinstance(p, Image) for p in parts
    ):
        raise BadRequest("model %s takes no images" % model.id, param=request.turns_key)


def fit_effort(request: Request, model: Model) -> str | None:
    """The wish for reasoning as an effort that the model lists; None: say nothing, which is a
    loss if there was a wish."""
    wish = request.effort or (
        budget_to_effort(request.thinking_budget) if request.thinking_budget else None
    )
    if wish is None or not model.efforts:
        if wish:
            request.lose("effort", "the model lists none")
        return None
    if wish in ("none", "minimal") and wish not in model.efforts:
        wish = EFFORT_BUDGETS[0][0]
    return clamp_effort(wish, model.efforts)


def fit_budget(wish: int | None, room: int | None, model: Model) -> int | None:
    """A thinking budget in tokens as the model takes it, `room` for all of the answer; None when
    it takes none or there is no room."""
    least, most = (
        count_or_zero(model.supports.get(k))
        for k in ("min_thinking_budget", "max_thinking_budget")
    )
    least, room = max(least, 1024), room or most + 1
    if wish and most and room > least:
        return max(least, min(wish, most, room - 1))
    return None


def offered_tools(
    request: Request, model: Model, bare: bool
) -> tuple[list[Tool], str | Named | None, Json | None]:
    """(tools, tool_choice, output schema) that go upstream.  A schema that the model cannot keep
    to by itself becomes a tool that must be called.  bare: the dialect has JSON without a schema.
    """
    tools, choice, schema = (
        list(request.tools),
        request.tool_choice,
        request.output_schema,
    )

    if isinstance(choice, Named) and choice.name not in [tool.name for tool in tools]:
        raise BadRequest(
            "'tool_choice' demands the tool %s, which is not among the tools"
            % printable(choice.name, 60),
            param="tool_choice",
        )

    if schema is None or (
        bare
        if schema["type"] == "json_object"
        else model.supports.get("structured_outputs") is True
    ):
        return tools, choice if tools else None, schema

    request.output_tool = OUTPUT_TOOL
    about = schema.get("description") or "Give the final answer with this tool."
    tools.append(
        Tool(OUTPUT_TOOL, about, as_object(schema.get("schema")) or {"type": "object"})
    )
    alone = len(tools) == 1 or choice == "none"
    return (
        tools,
        choice
        if isinstance(choice, Named)
        else (Named(OUTPUT_TOOL) if alone else "required"),
        None,
    )


def watch_stops(request: Request) -> None:
    """The proxy itself is to end the answer at the stop sequences.  Every piece of the answer is
    looked through for all of them, so their number and length are bounded."""
    fitting = [stop for stop in request.stop if len(stop) <= MAX_STOP_CHARS]
    request.cut_at = fitting[:MAX_WATCHED_STOPS]
    if len(request.cut_at) < len(request.stop):
        request.lose(
            "stop",
            "more than %d sequences, or one of more than %d characters"
            % (MAX_WATCHED_STOPS, MAX_STOP_CHARS),
        )


def upstream_stops(dialect: Dialect, request: Request, model: Model) -> list[str]:
    """The stop sequences that go upstream: all or none, since an upstream that stops at one of them
    may not say at which.  The proxy watches for the others itself."""
    tells_which = (
        dialect.name == request.dialect or "stop_sequence" in dialect.TO_NEUTRAL
    )
    wants_to_know = request.dialect == "messages"
    if dialect.takes_stops(request.stop, model) and (tells_which or not wants_to_know):
        return request.stop
    watch_stops(request)
    return []


def openai_choice(choice: Any, request: Request) -> str | Named | None:
    """tool_choice of either OpenAI shape."""
    if isinstance(choice, str):
        if choice in ("auto", "none", "required"):
            return choice
        return None
    source = as_object(choice)
    kind = str(source.get("type"))
    inner = (
        as_object(source.get("function")) or as_object(source.get("custom")) or source
    )
    name = inner.get("name")
    if isinstance(name, str):
        return Named(flat_name(str(source.get("namespace") or ""), name))
    # a vendor's tool has its type as name
    if source:
        return Named(kind)
    return None


def read_schema(layout: Any) -> Json | None:
    """A `response_format` or `format` if it is one of JSON, its inner object flattened:
    {type, name, schema, strict, description}."""
    layout = as_object(layout)
    if "json_schema" in layout:
        layout = dict(as_object(layout["json_schema"]), type=layout.get("type"))
    if layout.get("type") in ("json_schema", "json_object"):
        return given(**layout)
    return None


#: a field of Request, what makes sense of it, and its place in a body of each dialect
FIELDS = (
    ("", None, "chat", "responses", "messages", "gemini", "ollama"),
    ("stream", flag, "stream", "stream", "stream", "stream", "stream"),
    (
        "temperature",
        number_or_none,
        "temperature",
        "temperature",
        "temperature",
        "generationConfig.temperature",
        "options.temperature",
    ),
    (
        "top_p",
        number_or_none,
        "top_p",
        "top_p",
        "top_p",
        "generationConfig.topP",
        "options.top_p",
    ),
    (
        "top_k",
        number_or_none,
        "",
        "",
        "top_k",
        "generationConfig.topK",
        "options.top_k",
    ),
    ("seed", number_or_none, "seed", "", "", "generationConfig.seed", "options.seed"),
    (
        "presence_penalty",
        number_or_none,
        "presence_penalty",
        "",
        "",
        "generationConfig.presencePenalty",
        "options.presence_penalty",
    ),
    (
        "frequency_penalty",
        number_or_none,
        "frequency_penalty",
        "",
        "",
        "generationConfig.frequencyPenalty",
        "options.frequency_penalty",
    ),
    (
        "parallel_tool_calls",
        flag,
        "parallel_tool_calls",
        "parallel_tool_calls",
        "",
        "",
        "",
    ),
    (
        "max_output_tokens",
        positive,
        "max_tokens",
        "max_output_tokens",
        "max_tokens",
        "generationConfig.maxOutputTokens",
        "options.num_predict",
    ),
    (
        "stop",
        words,
        "stop",
        "",
        "stop_sequences",
        "generationConfig.stopSequences",
        "options.stop",
    ),
    ("user", word, "user", "user", "metadata.user_id", "", ""),
    (
        "effort",
        word,
        "reasoning_effort",
        "reasoning.effort",
        "output_config.effort",
        "generationConfig.thinkingConfig.thinkingLevel",
        "think",
    ),
    (
        "thinking_budget",
        positive,
        "thinking_budget",
        "",
        "thinking.budget_tokens",
        "generationConfig.thinkingConfig.thinkingBudget",
        "",
    ),
    (
        "output_schema",
        read_schema,
        "response_format",
        "text.format",
        "output_config.format",
        "",
        "",
    ),
)
#: fields of FIELDS that not every dialect has and whose absence is a loss
SAMPLING_FIELDS = ("top_k", "seed", "presence_penalty", "frequency_penalty")


def fields_of(dialect: str) -> list[tuple[str, Callable[[Any], Any], list[str]]]:
    """[(field, what makes sense of it, path to it)]"""
    column = FIELDS[0].index(dialect)
    return [
        (row[0], row[1], str(row[column]).split("."))
        for row in FIELDS[1:]
        if row[column]
    ]


def read_fields(dialect: Dialect, body: Json, known: str) -> Request:
    """The fields of FIELDS, those that OpenAI's two share, and the tools.  All others but
    the `known` ones are losses."""
    request = Request(str(body.get("model") or ""), dialect.name, dialect.turns_key)
    fields = fields_of(dialect.name)

    for name, reader, path in fields:
        value: Any = body
        for key in path:
            value = as_object(value).get(key)
        setattr(request, name, reader(value))

    shared = dialect.shared_fields
    if shared:
        request.openai.update(
            {name: body[name] for name in shared if body.get(name) is not None}
        )
        request.tool_choice = openai_choice(body.get("tool_choice"), request)

    request.hides_thinking = request.effort == "none"
    for tool in check_list(body, "tools") if body.get("tools") else ():
        dialect.read_tool(tool, request)
    note_unknown(
        request,
        body,
        "model",
        "tools",
        "tool_choice",
        *shared,
        *known.split(),
        *(path[0] for _, _, path in fields),
    )

    return request


def write_fields(
    dialect: Dialect, request: Request, model: Model, **fitted: Any
) -> Json:
    """The way back, for fields that were said; `fitted`: those that the model takes otherwise."""
    body: Json = {"model": model.id}
    if dialect.shared_fields:
        fitted["user"] = request.user and request.user[:MAX_ID_CHARS]
        body.update(request.openai)

    fields = fields_of(dialect.name)
    for name in set(SAMPLING_FIELDS) - {row[0] for row in fields}:
        if getattr(request, name) is not None:
            request.lose(name, NO_COUNTERPART)

    for name, _, (*outer, last) in fields:
        if name in fitted:
            value = fitted[name]
        else:
            value = getattr(request, name)
        if value is not None and value != []:
            target = functools.reduce(
                lambda inner, key: inner.setdefault(key, {}), outer, body
            )
            target[last] = value

    return body


def openai_usage(usage: Usage | None, asked: str, made: str) -> Json:
    """`usage` in the words of Chat ("prompt", "completion") or Responses ("input", "output")."""
    usage = usage or Usage()
    prompt = usage.input + usage.cache_read + usage.cache_write
    return {
        asked + "_tokens": prompt,
        made + "_tokens": usage.output,
        "total_tokens": prompt + usage.output,
        asked + "_tokens_details": {
            "cached_tokens": usage.cache_read,
            "cache_write_tokens": usage.cache_write,
        },
        made + "_tokens_details": {"reasoning_tokens": usage.reasoning},
    }


ASTRAY = "the model sent endless white space as tool arguments"


def is_astray(blanks: dict[int, int], index: int, text: str) -> bool:
    """Has call `index` with this piece got nothing but white space for too long?"""
    blank = len(text) - len(text.rstrip("\r\n\t "))
    run = blanks[index] = blank + (blanks.get(index, 0) if blank == len(text) else 0)
    return run > MAX_WHITESPACE_RUN


class StreamDecoder:
    """Upstream events in, neutral events out: `read(data of a frame)`, then `close()`.
    `ended` is True behind a ResponseEnd or StreamError.  `close` never is polite on its own: a
    stream without its terminal event becomes a StreamError.

    The end of a Reasoning is told together with the next event: see StreamRelay."""

    TEXT_KEYS: tuple[bytes, ...] = ()  # JSON keys of the text of a delta

    def __init__(self, dialect: Any) -> None:
        self.dialect = dialect
        self.ended = False
        self.meter = Meter()
        self._started = False
        self._events: list[Event] = []
        self._held: list[Event] = []  # the end of a Reasoning
        self._next = 0
        self._slots: dict[Any, int] = {}  # the upstream's name of a part -> our index
        self._open: dict[int, Part] = {}  # index -> skeleton
        self._empty: set[int] = set()  # parts without any delta so far
        self._blanks: dict[int, int] = {}  # index -> run of white space in arguments
        self._stop_word = "stop"  # why it stopped, as the parts so far tell it
        self._template = DeltaTemplate()  # of the last delta
        self._template_index = -1  # ... and its part

    def read(self, data: bytes) -> list[Event]:
        """Events of one frame's data.  A frame that equals the last delta but for one JSON string
        is not parsed: the rest of it means the same as last time."""
        steady = self._steady(data)
        text = self._template.match(steady)
        if text:
            quick = self._read_text(text)
            if quick:
                return quick

        self._events = []
        if self.ended or not data:
            return self._events
        if data.strip() == b"[DONE]":
            self._done()
            return self._events
        try:
            event = as_object(loads(data))
        except ValueError:
            self._fail(UpstreamError(NOT_JSON))
            return self._events

        self.meter.take(event)
        self._read_event(event)
        if len(self._events) == 1 and isinstance(self._events[0], PartDelta):
            self._learn(self._events[0], steady)
        return self._events

    def _read_text(self, text: bytes) -> list[Event]:
        """A delta of the part that the last one was of; [] for what must be looked into."""
        try:
            if b"\\" not in text:
                plain = text.decode()
            else:
                plain = _decode('"%s"' % text.decode())
        except ValueError:
            return []
        if plain.isspace():
            return []
        self._blanks.pop(self._template_index, None)
        return [PartDelta(self._template_index, plain)]

    def _learn(self, event: PartDelta, steady: bytes) -> None:
        if event.logprobs is None and self._template.learn(
            steady, event.text, self.TEXT_KEYS
        ):
            self._template_index = event.index

    def _steady(self, data: bytes) -> bytes:
        """The frame without what differs from delta to delta but means nothing."""
        return data

    def read_whole(self, body: Json) -> list[Event]:
        """The events of an answer that is no stream."""
        self._events = []
        self.meter.take(body)
        self._read_event(body)
        return self._events + (self.close() if not self.ended else [])

    def close(self) -> list[Event]:
        """The upstream's body has ended, without an error of the transport."""
        self._events = []
        if not self.ended:
            self._finish()
        if not self.ended:
            self._fail(UpstreamError(CUT_SHORT, code="upstream_stream_ended"))
        return self._events

    def _read_event(self, event: Json) -> None:
        raise NotImplementedError

    def _done(self) -> None:
        """The upstream said [DONE]; for most dialects that means nothing."""

    def _finish(self) -> None:
        """A regular end of the body: may still give a ResponseEnd."""

    # -- events

    def _emit(self, event: Event) -> None:
        """Tell an event, behind what was held for it."""
        if self._held:
            self._events += self._held
            self._held = []
        self._events.append(event)

    def _start(self, answer: Json) -> None:
        if self._started:
            return
        self._started = True
        self._emit(
            ResponseStart(
                str(answer.get("id") or ""),
                str(answer.get("model") or ""),
                count_or_zero(answer.get("created", answer.get("created_at"))),
                word(answer.get("system_fingerprint")),
                word(answer.get("service_tier")),
            )
        )

    def _begin(self, part: Part) -> int:
        """A part begins -> its index."""
        if isinstance(part, ToolCall):
            self._stop_word = "tool_use"
        elif isinstance(part, Text) and part.refusal and self._stop_word == "stop":
            self._stop_word = "refusal"
        self._start({})
        index, self._next = self._next, self._next + 1
        self._template.forget()
        self._open[index] = part
        self._empty.add(index)
        self._emit(PartStart(index, part))
        return index

    def _slot(self, key: Any, part: Part) -> int:
        """Our index of what the upstream calls `key`; it begins here if it has not yet."""
        if key not in self._slots:
            self._slots[key] = self._begin(part)
        return self._slots[key]

    def _delta(self, index: int, text: Any, logprobs: Any = None) -> None:
        """More of a part; nothing for one that is not open."""
        part = self._open.get(index)
        tokens = [token for token in as_list(logprobs) if isinstance(token, dict)]
        text = text if isinstance(text, str) else ""
        if part is None or not (text or tokens):
            return
        self._empty.discard(index)
        if isinstance(part, ToolCall) and is_astray(self._blanks, index, text):
            self._fail(UpstreamError(ASTRAY))
        else:
            self._emit(PartDelta(index, text, tokens or None))

    def _cite(self, index: int, citations: Iterable[Citation]) -> None:
        """Sources of a text that is open."""
        if isinstance(self._open.get(index), Text):
            for citation in citations:
                self._emit(PartCitation(index, citation))

    def _end(
        self, index: int, signature: str | None = None, minted_by: str = ""
    ) -> None:
        """A part ends; signature: of a Reasoning, made by the dialect `minted_by`."""
        part = self._open.pop(index, None)
        if part is None or self.ended:
            return
        self._template.forget()
        if isinstance(part, ToolCall) and index in self._empty:
            self._emit(PartDelta(index, "{}"))
        if not isinstance(part, Reasoning):
            self._emit(PartEnd(index))
            return

        if signature:
            state_id, packed = (
                None,
                unpack_opaque(signature),
            )  # a proxy behind this proxy
            if packed:
                minted_by, state_id, signature = packed[0]
            self._held.append(PartSignature(index, signature, minted_by, state_id))
        self._held.append(PartEnd(index))

    def _stop(self, raw: str, stop_sequence: str | None = None) -> None:
        """`raw`: why, in the dialect's word; a plain stop may be more, as the parts tell it."""
        self._start({})
        for index in sorted(self._open):
            self._end(index)
        self.ended = True
        stop = self.dialect.TO_NEUTRAL.get(raw, "stop")
        if stop == "stop":
            stop = self._stop_word
        self._emit(ResponseEnd(stop, self.meter.usage, stop_sequence))

    def _fail(self, error: UpstreamError) -> None:
        """The end; what was held is not told."""
        self.ended = True
        self._held = []
        self._template.forget()
        forget_frames(error)
        self._events.append(StreamError(error))


def citation_of(annotation: Any) -> list[Citation]:
    """The citation that an annotation of OpenAI's or a citation of Anthropic's stands for; [] for
    one that names no source."""
    source = as_object(annotation)
    source = as_object(source.get("url_citation")) or source
    title = (
        source.get("title") or source.get("document_title") or source.get("filename")
    )
    url = source.get("url") or source.get("source")
    start = source.get("start_index", source.get("start_char_index"))
    end = source.get("end_index", source.get("end_char_index"))
    if not word(url) and not word(title):
        return []

    return [
        Citation(
            word(url) or "",
            word(title),
            count_or_none(start),
            count_or_none(end),
            word(source.get("cited_text")),
        )
    ]


def citations_of(annotations: Any) -> list[Citation]:
    """Those that a list stands for."""
    return [citation for one in as_list(annotations) for citation in citation_of(one)]


def url_citation(citation: Citation) -> Json:
    """As OpenAI writes it: its SDKs want every field."""
    return {
        "url": citation.url,
        "title": citation.title or "",
        "end_index": citation.end or 0,
        "start_index": citation.start or 0,
    }


class StreamEncoder:
    """Neutral events in, bytes of the client's dialect out: `feed(event)`; `ended` is True behind
    the terminal event.  A delta is the part's frame, cut where the text belongs."""

    MARK, QUOTED_MARK = "\0", dumps("\0")
    METHODS = (
        (ResponseStart, "_start"),
        (PartStart, "_begin"),
        (PartDelta, "_delta"),
        (PartCitation, "_cite"),
        (PartSignature, "_sign"),
        (PartEnd, "_end"),
        (ResponseEnd, "_stop"),
        (StreamError, "_fail"),
    )

    def __init__(self, dialect: Any, request: Request) -> None:
        self.dialect, self.request = dialect, request
        self.ended = False
        self.final: (
            tuple[()] | tuple[str, bytes]
        ) = ()  # id and frame of a whole response
        self._frames: dict[int, list[bytes]] = {}  # index -> what stands around a text
        self._on: dict[type[Event], Callable[[Any], bytes]] = {
            kind: getattr(self, name) for kind, name in self.METHODS
        }

    def feed(self, event: Event) -> bytes:
        """The bytes of one event, b"" behind the end."""
        if self.ended:
            return b""
        return self._on[type(event)](event)

    def _delta(self, event: PartDelta) -> bytes:
        return dumps(event.text).join(self._frames[event.index])

    def _end(self, event: PartEnd) -> bytes:
        return b""

    def _cite(self, event: PartCitation) -> bytes:
        return b""

    def _fail(self, event: StreamError) -> bytes:
        self.ended = True
        return bytes(self.dialect.error_frame(event.error))


# ---- Chat Completions ----


@dataclass
class ChatCall:
    """A tool call of a streamed turn.  number: ours, in the order in which the calls were named,
    -1 before; waiting: its delta so far, while it has no name."""

    id: str = ""
    name: str = ""
    number: int = -1
    waiting: Json = field(default_factory=dict)

    @staticmethod
    def function_of(delta: Json) -> Json:
        """Where a delta of a call has name and arguments."""
        return as_object(delta.get("function")) or as_object(delta.get("custom"))

    def take_names(self, delta: Json, call_id: str) -> None:
        """Note id and name; what was said before goes out of the delta."""
        if call_id and self.id == call_id:
            del delta["id"]
        self.id = self.id or call_id

        function = self.function_of(delta)
        if function.get("name") and function["name"] == self.name:
            del function["name"]
        self.name = self.name or str(function.get("name") or "")

    def begin(self, number: int, delta: Json) -> None:
        """The first delta that clients get has all that they look for."""
        self.number = number
        if self.id:
            delta["id"] = self.id
        delta.setdefault("type", "function")  # openai's Node SDK insists

    def add(self, delta: Json) -> Json:
        """A delta joined to what waits, {} while there is still no name to begin with."""
        if self.number >= 0:
            return delta
        if not self.waiting:
            self.waiting = delta
        else:
            self._append(delta)
        size = len(str(self.function_of(self.waiting).get("arguments") or ""))
        if self.name or size > MAX_UNNAMED_CHARS:
            return self.waiting
        return {}

    def _append(self, delta: Json) -> None:
        inner, more = self.function_of(self.waiting), self.function_of(delta)
        for key in ("arguments", "input"):
            if isinstance(more.get(key), str):
                inner[key] = str(inner.get(key) or "") + more[key]
        if more.get("name"):
            inner["name"] = more["name"]
        if "custom" in delta or "custom" in self.waiting:
            kind = "custom"
        else:
            kind = "function"
        self.waiting[kind] = inner
        for key, value in delta.items():
            self.waiting.setdefault(key, value)


class ChatChunks:
    """Chat's chunks made uniform: Claude's turns come split over several choices, so the deltas of
    all are one, tool calls are numbered from 0 by first appearance, and the finish reason waits
    for the end: a client stops reading tool calls at the first one it sees.

    A call begins when its name is known: clients take the name of its first delta only."""

    def __init__(self) -> None:
        self.reason = ""
        self.usage: Json | None = None
        self.logprobs: Json | None = None  # of the delta read last
        self._calls: dict[tuple[int, int, str], ChatCall] = {}  # (choice, index, id)
        self._open: dict[tuple[int, int], ChatCall] = {}  # (choice, index)
        self._count = 0  # calls that have begun

    def read(self, answer: Json) -> Json | None:
        """The delta of a chunk or the message of an answer, None without choices.
        Raises UpstreamError for an error told in it."""
        usage = answer.get("usage")
        if isinstance(usage, dict) and (
            self.usage is None or any(read_usage(usage).values())
        ):
            self.usage = usage or None
        if answer.get("error"):
            raise told_error(answer)

        merged: Json | None = None
        self.logprobs = None
        for choice in as_list(answer.get("choices")):
            if isinstance(choice, dict):
                merged = merged or {}
                self._read_choice(choice, merged)
        if merged and isinstance(merged.get("reasoning_text"), str):
            merged.setdefault("reasoning_content", merged["reasoning_text"])
        return merged

    def _read_choice(self, choice: Json, merged: Json) -> None:
        """Join the delta of a choice to those before it."""
        reason = choice.get("finish_reason")
        if reason == "error":
            raise told_error({})
        self.reason = word(reason) or self.reason

        place = count_or_zero(choice.get("index"))
        for name, value in as_object(
            choice.get("delta") or choice.get("message")
        ).items():
            if name == "tool_calls":
                self._read_calls(place, value, merged)
            else:
                self._join(merged, name, value)
        for name, tokens in as_object(choice.get("logprobs")).items():
            self.logprobs = self.logprobs or {}
            self._join(self.logprobs, name, tokens)

    @staticmethod
    def _join(target: Json, name: str, value: Any) -> None:
        """Texts and lists of several choices become one; of the rest the last one counts."""
        old: Any = target.get(name)
        are_texts = isinstance(old, str) and isinstance(value, str)
        are_lists = isinstance(old, list) and isinstance(value, list)
        if are_lists or are_texts and name not in ("role", "reasoning_opaque"):
            target[name] = old + value
        elif value is not None:
            target[name] = value

    def _read_calls(self, choice: int, deltas: Any, merged: Json) -> None:
        for place, delta in enumerate(as_list(deltas)):
            if isinstance(delta, dict):
                found = self._read_call(choice, place, delta)
            else:
                found = {}
            if found:
                merged.setdefault("tool_calls", []).append(found)

    def _read_call(self, choice: int, place: int, delta: Json) -> Json:
        """A delta of a call as clients get it, {} while its name is not known."""
        index, call_id = (
            count_or_zero(delta.get("index", place)),
            str(delta.get("id") or ""),
        )
        call = self._find_call(choice, index, call_id)
        call.take_names(delta, call_id)
        found = call.add(delta)
        if found:
            return self._begin(call, found)
        return {}

    def _find_call(self, choice: int, index: int, call_id: str) -> ChatCall:
        """The call that a delta belongs to; a new one for an id that was not seen in its place,
        unless the call there has had none so far."""
        slot, key = (choice, index), (choice, index, call_id)
        before = self._open.get(slot)
        if call_id and key in self._calls:
            call = self._calls[key]
        elif before is not None and not (call_id and before.id):
            call = before
        else:
            call = ChatCall()
        self._open[slot] = self._calls[key] = call
        return call

    def _begin(self, call: ChatCall, delta: Json) -> Json:
        """Number a delta; the first one has all that clients look for."""
        if call.number < 0:
            call.begin(self._count, delta)
            self._count += 1
        delta["index"] = call.number
        return delta

    def rest(self) -> list[Json]:
        """At the end: calls that were never named."""
        nameless = [
            call for call in self._open.values() if call.number < 0 and call.waiting
        ]
        return [self._begin(call, call.waiting) for call in nameless]

    def end(self) -> str:
        """The finish reason, at the end."""
        reason = self.reason or "stop"
        if self._calls and reason == "stop":
            return "tool_calls"
        return reason


class ChatStream(StreamRelay):
    """Chunks with one choice of index 0, `object`, `id` and `model` filled, one finish chunk, and
    usage only for a client that asked for it."""

    HEAD_FIELDS = ("id", "created", "system_fingerprint", "service_tier")

    def __init__(
        self, dialect: Dialect, asked: str, body: Json, request: Request | None = None
    ) -> None:
        super().__init__(dialect, asked, body, request)
        options = as_object(body.get("stream_options"))
        self._wants_usage = options.get("include_usage") is True
        self._head: Json = {}  # of HEAD_FIELDS, what every chunk repeats
        self._chunks = ChatChunks()
        self._started = False
        self._template = DeltaTemplate()  # of text chunks
        self._around = [b"", b""]  # the text in such a chunk as it goes out
        self._blanks: dict[int, int] = {}  # index of a call -> run of white space

    def _quick(self, block: bytes) -> bytes:
        text = self._template.match(block)
        if text is None:
            return b""
        before, behind = self._around
        return before + text + behind

    def _learn(self, raw: bytes, out: bytes, text: str) -> None:
        """A mended text chunk is the pattern for the next ones."""
        around = out.split(dumps(text))
        if len(around) == 2 and self._template.learn(raw, text):
            self._around = [around[0] + b'"', b'"' + around[1]]

    def _mend_event(self, answer: Json, raw: bytes) -> bytes:
        try:
            delta = self._chunks.read(answer)
        except UpstreamError as error:
            return self._fail(error)
        if delta is None:
            return b""

        for key in self.HEAD_FIELDS:
            if answer.get(key):
                self._head.setdefault(key, answer[key])
        for call in delta.get("tool_calls", ()):
            text = as_object(call.get("function")).get("arguments")
            if (
                isinstance(text, str)
                and text
                and is_astray(self._blanks, call["index"], text)
            ):
                return self._fail(UpstreamError(ASTRAY))

        delta.pop("role", None)
        if not delta and self._started and not self._chunks.logprobs:
            return b""
        out = self._chunk(delta)
        if list(delta) == ["content"] and delta["content"] and not self._chunks.reason:
            self._learn(raw, out, delta["content"])
        return out

    def _chunk(self, delta: Json) -> bytes:
        """A chunk with this delta.  The first one has role and content; no other has the role,
        since SDKs join what chunks repeat."""
        if self._chunks.reason or any(
            value for key, value in delta.items() if key != "reasoning_opaque"
        ):
            self.has_content = True
        if not self._started:
            delta = dict({"role": "assistant", "content": ""}, **delta)
        self._started = True
        choice = {"index": 0, "delta": delta, "finish_reason": None}
        if self._chunks.logprobs:
            choice["logprobs"] = self._chunks.logprobs
        return self._render([choice])

    def _finish(self) -> bytes:
        if self._chunks.reason:
            return self._done()
        return b""

    def _done(self) -> bytes:
        if not self._started:
            return b""
        rest = self._chunks.rest()
        self._chunks.read({})
        if rest:
            out = self._chunk({"tool_calls": rest})
        else:
            out = b""

        self.ended = self.has_content = True
        out += self._render(
            [{"index": 0, "delta": {}, "finish_reason": self._chunks.end()}]
        )
        if self._wants_usage and self._chunks.usage is not None:
            out += self._render([], usage=self._chunks.usage)
        return out + b"data: [DONE]\n\n"

    def _render(self, choices: list[Json], **more: Json) -> bytes:
        head = {
            "id": client_id("chatcmpl-", "", self.request),
            "object": "chat.completion.chunk",
            "created": self.request.now,
            "model": self.asked,
        }
        return b"data: %b\n\n" % dumps(
            dict(head, **self._head, choices=choices, **more)
        )


_CHAT_ROLES = ("system", "developer", "user", "assistant", "tool")


class ChatCompletions(Dialect):
    """POST /chat/completions, OpenAI's older shape and the one that most models speak."""

    name, path = "chat", "/chat/completions"
    cache_mark = "copilot_cache_control"
    takes_files = False
    stop_key = "stop"
    own_parts = frozenset(("text", "image_url", "input_audio", "file", "refusal"))
    knows_allowed_tools = True
    has_freeform_tools = True
    substitutes = ("responses", "messages")
    STOP_REASONS = (
        ("stop", "stop"),
        ("length", "length"),
        ("tool_calls", "tool_use"),
        ("content_filter", "refusal"),
        ("function_call", "tool_use"),
        ("stop", "stop_sequence"),
        ("stop", "pause"),
    )

    def prepare(self, edit: Edit, model: Model) -> None:
        body = edit.body
        messages = check_list(body, "messages")
        if not messages:
            raise BadRequest("'messages' must not be empty", param="messages")
        if count_or_zero(body.get("n")) > 1:
            raise BadRequest(
                "'n' above 1 is not offered: the upstream gives one answer a request",
                param="n",
            )

        for key in ("store", "service_tier"):
            edit.drop(body, key)
        if body.get("stream") is True:
            options = dict(as_object(body.get("stream_options")), include_usage=True)
            edit.set(body, "stream_options", options)

        if not model.is_openai and all(m.get("role") in SYSTEM_ROLES for m in messages):
            edit.set(messages[-1], "role", "user")  # Claude and Gemini want a turn
        if not edit.is_words:
            for at, message in enumerate(messages):
                self._prepare_message(edit, model, message, "messages[%d]" % at)
            self._move_tool_images(edit)

        prepare_tools(edit, lambda tool: True)
        self._prepare_max_tokens(edit, model)

    @staticmethod
    def _prepare_message(edit: Edit, model: Model, message: Json, place: str) -> None:
        takes_developer = model.is_openai and not model.id.startswith(
            ("gpt-4", "gpt-3")
        )
        if message.get("role") == "developer" and not takes_developer:
            edit.set(message, "role", "system")
        if message.get("role") == "assistant":
            edit.drop(
                message, "reasoning_content"
            )  # ours, beside the native reasoning_text
            if is_packed(message.get("reasoning_opaque")):
                edit.drop(message, "reasoning_opaque", FOREIGN_STATE)
                edit.drop(message, "reasoning_text")

        if type(message.get("content")) is not list:
            return
        refuse_image_urls(message["content"], place)
        for part in message["content"]:
            image = as_object(as_object(part).get("image_url"))
            if image.get("detail") == "original":  # a word of Responses alone
                edit.set(image, "detail", "high")

    @staticmethod
    def _move_tool_images(edit: Edit) -> None:
        """Messages of tools take text only: their images and files move into a message of the user
        behind the results of the round."""
        messages = edit.body["messages"]
        if not any(
            message.get("role") == "tool" and type(message.get("content")) is list
            for message in messages
        ):
            return

        moved: list[Json] = []
        shaped: list[Json] = []
        for message in messages:
            if moved and message.get("role") != "tool":
                shaped.append({"role": "user", "content": moved})
                moved = []
            shaped.append(message)
            parts = as_list(message.get("content"))
            files = [
                part
                for part in parts
                if as_object(part).get("type") in ("image_url", "file")
            ]
            if message.get("role") == "tool" and files:
                call_id = message.get("tool_call_id")
                moved += [
                    {"type": "text", "text": "[files of tool result %s]" % call_id},
                    *files,
                ]
                texts = [part for part in parts if part not in files]
                edit.set(message, "content", texts or "[see the files below]")
        if moved:
            shaped.append({"role": "user", "content": moved})
        edit.replace(edit.body, "messages", shaped)

    @staticmethod
    def _prepare_max_tokens(edit: Edit, model: Model) -> None:
        body = edit.body
        for key in ("max_tokens", "max_completion_tokens"):
            if key in body and (body[key] is None or body[key] == -1):
                edit.drop(body, key)  # how some clients say: no limit
        reasons = model.is_openai and bool(
            model.efforts or re.match(r"gpt-5|o\d", model.id)
        )
        old, new = "max_tokens", "max_completion_tokens"
        if not model.is_openai:
            old, new = new, old
        if old in body and (reasons or not model.is_openai):
            limit = edit.drop(body, old)
            edit.set(body, new, body.get(new, limit))
        cap = model.output_cap(body.get("stream") is True)
        if not model.is_openai and cap and "max_tokens" not in body:
            edit.set(body, "max_tokens", cap)  # Claude and Gemini stop early without

    def is_in_shape(self, item: Any) -> bool:
        if type(item) is not dict or "type" in item or "function_call" in item:
            return False
        content = item.get("content")
        return (content is None or type(content) is str) and item.get(
            "role"
        ) in _CHAT_ROLES

    def own_tool(self, tool: Json) -> Json:
        if isinstance(tool.get("function"), dict) and tool.get("type") == "function":
            return tool
        freeform, function = freeform_of(tool), function_of(tool)
        if freeform:
            if "custom" in tool:
                return tool
            return {"type": "custom", "custom": freeform}
        if not function:
            return tool
        shaped: Json = {"type": "function", "function": function}
        mark = tool.get("cache_control") or tool.get(self.cache_mark)
        if mark:
            return dict(shaped, copilot_cache_control=mark)
        return shaped

    def own_choice(self, choice: Any) -> Any:
        wish = choice_of(choice)
        if wish is None:
            return choice
        if isinstance(wish, Named):
            return {"type": "function", "function": {"name": wish.name}}
        return wish

    def write_part(self, part: Part, by_model: bool) -> Json:
        return write_part(part, "")

    def takes_stops(self, stops: list[str], model: Model) -> bool:
        refuses = re.match(r"gpt-[5-9]|o\d", model.id)  # OpenAI's reasoning models do
        return len(stops) <= MAX_STOP_SEQUENCES and not (stops and refuses)

    def tool_steps(self, item: Json) -> list[ToolStep]:
        calls = [str(call.get("id")) for call in item.get("tool_calls") or ()]
        is_result = item.get("role") == "tool"
        return [
            ToolStep(item, calls, str(item.get("tool_call_id")) if is_result else None)
        ]

    def missing_result(self, item: Json, call_id: str) -> Json:
        return {"role": "tool", "tool_call_id": call_id, "content": INTERRUPTED}

    def drop_foreign_fields(self, edit: Edit, model: Model) -> None:
        if model.is_openai:
            return
        for name in _OPENAI_ONLY:
            edit.drop(
                edit.body, name, "" if name in HARMLESS else "the model is not OpenAI's"
            )

    def tidy_item(self, edit: Edit, item: Json, model: Model) -> bool:
        if (
            "annotations" in item and not item["annotations"]
        ):  # [], as SDKs write answers down
            edit.drop(item, "annotations")
        if "tool_calls" in item:
            if item["tool_calls"] == []:
                edit.drop(item, "tool_calls")
            for call in as_list(item.get("tool_calls")):
                fit_id(edit, call, "id")
        if item.get("role") == "tool":
            fit_id(edit, item, "tool_call_id")
        if type(item.get("content")) is str and item["content"]:
            return True
        had_content = item.get("content") is not None
        if isinstance(item.get("content"), list):
            self._tidy_parts(edit, item, model)
            if not item["content"]:
                edit.set(item, "content", None)

        if (
            item.get("content")
            or item.get("tool_calls")
            or item.get("reasoning_opaque")
        ):
            return True
        is_result = item.get("role") == "tool"
        if is_result and not model.is_openai:
            edit.set(
                item, "content", "(no output)"
            )  # Claude and Gemini refuse empty results
        elif is_result or had_content:
            edit.set(item, "content", "")
        return is_result or model.is_openai

    def _tidy_parts(self, edit: Edit, message: Json, model: Model) -> None:
        """Drop empty texts, turn Anthropic's cache marks on parts into Copilot's on the message."""
        parts = message["content"]
        for part in parts:
            if isinstance(part, dict) and "cache_control" in part:
                edit.drop(part, "cache_control")
                if model.is_claude:
                    edit.set(message, self.cache_mark, EPHEMERAL)

        def is_empty(part: Any) -> bool:
            return (
                isinstance(part, dict)
                and part.get("type") == "text"
                and not part.get("text")
            )

        edit.replace(message, "content", [part for part in parts if not is_empty(part)])

    def calls_in(self, item: Json) -> list[Json]:
        return as_list(item.get("tool_calls"))

    def function_tools(self, body: Json) -> list[Json]:
        return [as_object(tool.get("function")) for tool in dicts_in(body, "tools")]

    def fit_cache(self, edit: Edit, model: Model) -> None:
        if not model.is_claude:
            return
        messages = dicts_in(edit.body, "messages")
        tools = dicts_in(edit.body, "tools")
        marked = [target for target in [*tools, *messages] if self.cache_mark in target]
        if marked:
            drop_surplus_marks(edit, marked, self.cache_mark)
            return

        is_system = [message.get("role") in SYSTEM_ROLES for message in messages]
        head = messages[: (is_system + [False]).index(False)]
        for target in [*tools[-1:], *head[-1:], *last_user_turns(messages)]:
            edit.set(target, self.cache_mark, EPHEMERAL)

    def mend(self, answer: Json, asked: str, request: Request | None = None) -> bool:
        choices = dicts_in(answer, "choices")
        is_whole = (
            len(choices) == 1
            and self._is_whole(choices[0])
            and answer.get("model") == asked
            and all(answer.get(key) for key in ("id", "object", "created"))
        )
        if choices and not is_whole:
            answer["choices"] = [self._join_choices(answer, choices[0])]

        request = request or Request(asked)
        answer["id"] = answer.get("id") or client_id("chatcmpl-", "", request)
        answer["object"] = answer.get("object") or "chat.completion"
        answer["created"] = answer.get("created") or request.now
        answer["model"] = asked
        return not is_whole

    @staticmethod
    def _join_choices(answer: Json, first: Json) -> Json:
        """All choices of an answer as one."""
        chunks = ChatChunks()
        message = dict(
            {"role": "assistant", "content": None}, **chunks.read(answer) or {}
        )
        rest = chunks.rest()
        if rest:
            message.setdefault("tool_calls", []).extend(rest)
        for call in message.get("tool_calls", ()):
            del call["index"]  # for chunks only
        joined = {key: value for key, value in first.items() if key != "delta"}
        if chunks.logprobs:
            joined["logprobs"] = chunks.logprobs
        return dict(joined, index=0, message=message, finish_reason=chunks.end())

    def check_answer(self, answer: Json) -> None:
        super().check_answer(answer)
        if any(
            choice.get("finish_reason") == "error"
            for choice in dicts_in(answer, "choices")
        ):
            raise told_error({})

    @staticmethod
    def _is_whole(choice: Json) -> bool:
        """Has it all that clients insist on, and nothing that they would not see?"""
        message = as_object(choice.get("message"))
        called = choice.get("finish_reason") == "tool_calls"
        return (
            choice.get("index") == 0
            and bool(choice.get("finish_reason"))
            and "role" in message
            and "content" in message
            and "reasoning_text" not in message
            and bool(message.get("tool_calls")) == called
        )

    # -- to and from neutral words.  One text, one reasoning and a list of calls in a message: the
    # -- order among them is lost in bodies, streams keep it.

    def decode_request(self, body: Json) -> Request:
        if count_or_zero(body.get("n")) > 1:
            raise BadRequest("'n' is not supported above 1", param="n")
        limit = positive(body.get("max_completion_tokens")) or body.get("max_tokens")
        request = read_fields(
            self,
            dict(body, max_tokens=limit),
            "messages max_completion_tokens n verbosity functions function_call",
        )
        options = as_object(body.get("stream_options"))
        request.wants_usage = options.get("include_usage") is True
        request.openai.update(given(verbosity=body.get("verbosity") or None))
        if body.get("logprobs") is True:
            request.openai["logprobs"] = True
        for at, message in enumerate(check_list(body, "messages")):
            self.read_turn(request, message, "messages[%d]" % at)
        return request

    def read_tool(self, tool: Json, request: Request) -> None:
        function = tool.get("function")
        freeform = freeform_of(tool)
        if isinstance(function, dict):
            add_tool(
                request, function, "parameters", cache=bool(tool.get(self.cache_mark))
            )
        elif freeform:
            shown = {
                "name": freeform.get("name"),
                "description": freeform_description(freeform),
                "parameters": FREEFORM_SCHEMA,
            }
            add_tool(request, shown, "parameters", kind="custom")
        else:
            drop_hosted_tool(request, tool)

    def read_turn(self, request: Request, item: Json, place: str) -> None:
        message, role = item, str(item.get("role"))
        note_unknown(
            request,
            message,
            "content",
            "tool_calls",
            "tool_call_id",
            "refusal",
            "reasoning_text",
            "reasoning_content",
            "reasoning_opaque",
            "audio",
            "copilot_cache_control",
            "function_call",
        )

        if role in ("system", "developer"):
            parts: list[Part] = [Text(text_of(message.get("content")))]
        elif role == "assistant":
            parts = self._read_assistant(message)
        elif role in ("user", "tool"):
            parts = read_content(message.get("content"), place, request)
            if role == "tool":
                parts = [ToolResult(str(message.get("tool_call_id") or ""), parts)]
        else:
            raise BadRequest(
                "'%s.role' must be system, developer, user, assistant or tool" % place,
                param=place,
            )

        if message.get("copilot_cache_control") and parts:
            parts[-1].cache = True
        request.add_turn({"developer": "system", "tool": "user"}.get(role, role), parts)

    def _read_assistant(self, message: Json) -> list[Part]:
        thought = (
            word(message.get("reasoning_text"))
            or word(message.get("reasoning_content"))
            or word(message.get("reasoning"))
            or ""
        )

        parts = reasoning_parts(self.name, thought, message.get("reasoning_opaque"))
        content = message.get("content")
        refusals = [p.get("refusal") for p in as_list(content) if isinstance(p, dict)]
        said, refusal = (
            text_of(content),
            message.get("refusal") or next(filter(None, refusals), ""),
        )
        parts += [Text(said)] if said else []
        parts += [Text(str(refusal), refusal=True)] if refusal else []

        for call in map(as_object, as_list(message.get("tool_calls"))):
            function = as_object(call.get("function")) or as_object(call.get("custom"))
            arguments = str(function.get("arguments") or "{}")

            if "input" in function:
                arguments = dumps({"input": str(function["input"])}).decode(
                    "utf-8", "replace"
                )

            parts.append(
                ToolCall(
                    str(call.get("id") or ""),
                    str(function.get("name") or ""),
                    arguments,
                )
            )

        return parts

    def encode_request(self, request: Request, model: Model) -> Json:
        preflight(request, model)
        tools, choice, schema = offered_tools(request, model, True)
        stops = upstream_stops(self, request, model)
        if model.efforts:
            budget = None
        else:
            budget = fit_budget(
                request.thinking_budget
                or dict(EFFORT_BUDGETS).get(request.effort or ""),
                request.max_output_tokens,
                model,
            )

        if schema:
            kind, inner = schema["type"], dict({"name": "output"}, **schema)
            del inner["type"]
            if kind == "json_object":
                schema = {"type": kind}
            else:
                schema = {"type": kind, kind: inner}

        body = write_fields(
            self,
            request,
            model,
            stop=stops,
            thinking_budget=budget,
            output_schema=schema,
            effort=None if budget else fit_effort(request, model),
        )

        body["messages"] = self.write_turns(request.turns, request, model)

        if tools:
            body["tools"] = [
                given(
                    type="function",
                    copilot_cache_control=EPHEMERAL
                    if tool.cache and model.is_claude
                    else None,
                    function=given(
                        name=tool.name,
                        description=tool.description,
                        parameters=tool.parameters,
                        strict=tool.strict,
                    ),
                )
                for tool in tools
            ]

            body.update(
                given(
                    tool_choice={"type": "function", "function": {"name": choice.name}}
                    if isinstance(choice, Named)
                    else choice
                )
            )

        return body

    def write_turns(
        self, turns: list[Turn], request: Request, model: Model
    ) -> list[Json]:
        return [
            message
            for turn in turns
            for message in self._write_turn(turn, request, model)
        ]

    def _write_turn(self, turn: Turn, request: Request, model: Model) -> list[Json]:
        if turn.role == "system":
            messages: list[Json] = [
                {"role": "system", "content": join_texts(turn.parts)}
            ]
        elif turn.role == "assistant":
            message = self._write_assistant(
                usable_parts(turn, request, self.name), request
            )
            if len(message) > 2 or message["content"]:
                messages = [message]
            else:
                messages = []
        else:
            messages = self._write_user(turn, request)
        if messages and model.is_claude and any(part.cache for part in turn.parts):
            messages[-1]["copilot_cache_control"] = EPHEMERAL
        return messages

    def _write_user(self, turn: Turn, request: Request) -> list[Json]:
        """All tool messages first; they take text only, so their images move behind them."""
        messages: list[Json] = []
        content: list[Json] = []

        for result in [p for p in turn.parts if isinstance(p, ToolResult)]:
            call_id = fit_call_id(result.call_id)
            moved = [
                p
                for p in result.parts
                if isinstance(p, (Image, Document)) and not plain_text(p)
            ]

            if moved:
                content.append(
                    {"type": "text", "text": "[files of tool result %s]" % call_id}
                )
                content += [write_part(part, "") for part in moved]

            messages.append(
                {
                    "role": "tool",
                    "tool_call_id": call_id,
                    "content": result_text(result, request)
                    or ("[see the files below]" if moved else ""),
                }
            )

        content += [
            write_part(part, "")
            for part in turn.parts
            if isinstance(part, (Text, Image, Document))
        ]

        if len(content) == 1 and content[0]["type"] == "text":
            messages.append({"role": "user", "content": content[0]["text"]})
        elif content:
            messages.append({"role": "user", "content": content})

        return messages

    def _write_assistant(
        self, parts: list[Part], request: Request | None, freeform: Container[str] = ()
    ) -> Json:
        """One message: for the upstream with a request, for a client without, then with the names
        of its freeform tools."""
        thoughts = [p for p in parts if isinstance(p, Reasoning)]
        texts = [p for p in parts if isinstance(p, Text)]
        said = "".join(p.text for p in texts if not p.refusal)
        refusal = "".join(p.text for p in texts if p.refusal)
        thought = "".join(p.text for p in thoughts)
        states = [client_state(p, self.name) for p in thoughts]
        message: Json = {"role": "assistant", "content": said or None}
        message.update(
            given(
                refusal=refusal or None,
                reasoning_text=thought or None,
                reasoning_opaque=join_states(list(filter(None, states))),
            )
        )
        if request is None and thought:
            message["reasoning_content"] = thought

        calls = [p for p in parts if isinstance(p, ToolCall)]
        if calls:
            if request:
                calls = [replace(call, id=fit_call_id(call.id)) for call in calls]
            message["tool_calls"] = [
                self.call(call, call.name in freeform) for call in calls
            ]
        return message

    @staticmethod
    def call(call: ToolCall, is_freeform: bool) -> Json:
        """A call of a function or of a freeform tool, as its client knows it."""
        if is_freeform:
            custom = {"name": call.name, "input": freeform_input(call.arguments)}
            return {"id": call.id, "type": "custom", "custom": custom}
        function = {"name": call.name, "arguments": call.arguments or "{}"}
        return {"id": call.id, "type": "function", "function": function}

    def encode_response(self, response: Response, request: Request) -> Json:
        freeform = {tool.name for tool in request.tools if tool.kind == "custom"}
        message = self._write_assistant(response.parts, None, freeform)
        reason = self.finish_reason(response.stop, "refusal" in message)
        message.setdefault("refusal", None)
        texts = [part for part in response.parts if isinstance(part, Text)]
        notes = [
            self.annotation(citation) for text in texts for citation in text.citations
        ]
        if notes:
            message["annotations"] = notes
        choice = {
            "index": 0,
            "message": message,
            "logprobs": self._logprobs(texts),
            "finish_reason": reason,
        }

        answer = {
            "id": client_id("chatcmpl-", response.id, request),
            "object": "chat.completion",
            "created": response.created or request.now,
            "model": request.model,
            "choices": [choice],
            "usage": openai_usage(response.usage, "prompt", "completion"),
        }

        return dict(
            answer,
            **given(
                system_fingerprint=response.fingerprint, service_tier=response.tier
            ),
        )

    @staticmethod
    def annotation(citation: Citation) -> Json:
        return {"type": "url_citation", "url_citation": url_citation(citation)}

    @staticmethod
    def _logprobs(texts: list[Text]) -> Json | None:
        content = [
            token for text in texts if not text.refusal for token in text.logprobs
        ]
        refusal = [token for text in texts if text.refusal for token in text.logprobs]
        if not content and not refusal:
            return None
        return {"content": content or None, "refusal": refusal or None}

    def finish_reason(self, stop: str, refused: bool) -> str:
        """A refusal that was put into words ends with `stop`, as OpenAI's own do."""
        if stop == "refusal" and refused:
            return "stop"
        return self.TO_WIRE.get(stop, "stop")


class ChatDecoder(StreamDecoder):
    """A text and a thinking may be open, and calls, which end with the answer.  A thinking ends
    where a text begins.  One that comes later goes on beside the text: deltas that alternate must
    not cut the words into pieces."""

    TEXT_KEYS = (b'"content":', b'"reasoning_text":', b'"arguments":')

    def __init__(self, dialect: Any) -> None:
        super().__init__(dialect)
        self._chunks = ChatChunks()
        self._places: dict[str, int] = {}  # field of a delta -> index of its open part
        self._state = ""  # reasoning_opaque so far

    def _read_event(self, event: Json) -> None:
        try:
            delta = self._chunks.read(event)
        except UpstreamError as error:
            self._fail(error)
            return
        if delta is None:
            return

        self._start(event)
        self._read_thinking(delta)
        logprobs = self._chunks.logprobs or {}
        for key in ("content", "refusal"):
            if delta.get(key) or logprobs.get(key):
                self._read_words(key, delta.get(key), logprobs.get(key))
        citations = citations_of(delta.get("annotations"))
        if citations:
            self._read_words("content", "", None)
            self._cite(self._places["content"], citations)
        for call in delta.get("tool_calls", ()):
            self._read_call(call)

    def _read_thinking(self, delta: Json) -> None:
        state = word(delta.get("reasoning_opaque"))
        thought = delta.get("reasoning_text") or delta.get("reasoning_content")
        if not thought and not state:
            return
        if "reasoning" not in self._places:
            self._places["reasoning"] = self._begin(Reasoning())
        self._delta(self._places["reasoning"], thought)
        self._state = state or self._state  # the last one counts

    def _read_words(self, key: str, text: Any, logprobs: Any) -> None:
        if key not in self._places:
            self._close()
            self._places[key] = self._begin(Text("", key == "refusal"))
        self._delta(self._places[key], text, logprobs)

    def _read_call(self, call: Json) -> None:
        if self.ended:
            return
        number = call["index"]
        function = as_object(call.get("function"))
        if number not in self._slots:
            self._close()
            call_id = str(call.get("id") or "call_%d" % self._next)
            name = str(function.get("name") or "")
            self._slots[number] = self._begin(ToolCall(call_id, name, ""))
        self._delta(self._slots[number], function.get("arguments"))

    def _close(self) -> None:
        """End text and thinking, in the order in which they began."""
        for key in sorted(self._places, key=self._places.__getitem__):
            self._end(self._places[key], self._state, "chat")
        self._places = {}
        self._state = ""

    def _done(self) -> None:
        if not self._started:
            return  # _finish makes an error of it
        for call in self._chunks.rest():
            self._read_call(call)
        self._close()
        self._stop(self._chunks.reason)

    def _finish(self) -> None:
        if self._chunks.reason:
            self._done()


class ChatEncoder(StreamEncoder):
    """Chunks with everything that strict clients look for; usage only for who asked."""

    def __init__(self, dialect: ChatCompletions, request: Request) -> None:
        super().__init__(dialect, request)
        self._head: Json = {}
        self._calls = 0
        self._refused = False
        self._words: dict[int, str] = {}  # index of a text -> its field
        self._freeform = {tool.name for tool in request.tools if tool.kind == "custom"}
        self._inputs: dict[
            int, tuple[ToolCall, list[str]]
        ] = {}  # of open freeform calls

    def _chunk(
        self, delta: Json, reason: str | None = None, logprobs: Json | None = None
    ) -> bytes:
        choice = {
            "index": 0,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": reason,
        }
        return b"data: %b\n\n" % dumps(dict(self._head, choices=[choice]))

    def _start(self, event: ResponseStart) -> bytes:
        request = self.request
        self._head = {
            "id": client_id("chatcmpl-", event.id, request),
            "object": "chat.completion.chunk",
            "created": event.created or request.now,
            "model": request.model,
        }
        self._head.update(
            given(system_fingerprint=event.fingerprint, service_tier=event.tier)
        )
        return self._chunk({"role": "assistant", "content": ""})

    def _begin(self, event: PartStart) -> bytes:
        part, out, mark = event.part, b"", self.MARK
        delta: Json = {"content": mark}

        if isinstance(part, Text):
            self._refused = self._refused or part.refusal
            key = self._words[event.index] = "refusal" if part.refusal else "content"
            delta = {key: mark}
        elif isinstance(part, Reasoning):
            delta = {"reasoning_content": mark, "reasoning_text": mark}
            if part.redacted:
                out = self._chunk(
                    {"reasoning_opaque": client_state(part, self.dialect.name)}
                )
        elif isinstance(part, ToolCall) and part.name in self._freeform:
            self._inputs[event.index] = part, []  # its text is known at its end only
            return b""
        elif isinstance(part, ToolCall):
            out = self._chunk(
                {
                    "tool_calls": [
                        {
                            "index": self._calls,
                            "id": part.id,
                            "type": "function",
                            "function": {"name": part.name, "arguments": ""},
                        }
                    ]
                }
            )

            delta = {
                "tool_calls": [{"index": self._calls, "function": {"arguments": mark}}]
            }
            self._calls += 1

        self._frames[event.index] = self._chunk(delta).split(self.QUOTED_MARK)
        return out

    def _delta(self, event: PartDelta) -> bytes:
        if event.index in self._inputs:
            self._inputs[event.index][1].append(event.text)
            return b""
        if event.logprobs is None:
            return super()._delta(event)
        key = self._words[event.index]
        logprobs = dict({"content": None, "refusal": None}, **{key: event.logprobs})
        return self._chunk({key: event.text}, None, logprobs)

    def _cite(self, event: PartCitation) -> bytes:
        return self._chunk({"annotations": [self.dialect.annotation(event.citation)]})

    def _end(self, event: PartEnd) -> bytes:
        if event.index not in self._inputs:
            return b""
        part, texts = self._inputs.pop(event.index)
        call = dict(
            self.dialect.call(replace(part, arguments="".join(texts)), True),
            index=self._calls,
        )
        self._calls += 1
        return self._chunk({"tool_calls": [call]})

    def _sign(self, event: PartSignature) -> bytes:
        part = Reasoning("", event.signature, event.id, event.minted_by)
        return self._chunk({"reasoning_opaque": client_state(part, self.dialect.name)})

    def _stop(self, event: ResponseEnd) -> bytes:
        self.ended = True
        out = self._chunk({}, self.dialect.finish_reason(event.stop, self._refused))
        if self.request.wants_usage and event.usage is not None:
            out += b"data: %b\n\n" % dumps(
                dict(
                    self._head,
                    choices=[],
                    usage=openai_usage(event.usage, "prompt", "completion"),
                )
            )
        return out + b"data: [DONE]\n\n"


# ---- Responses ----

_ITEM_PREFIXES = {
    "message": "msg_",
    "reasoning": "rs_",
    "function_call": "fc_",
    "custom_tool_call": "ctc_",
    "web_search_call": "ws_",
    "compaction": "cmp_",
    "tool_search_call": "tsc_",
    "local_shell_call": "lsh_",
    "shell_call": "sh_",
    "apply_patch_call": "apc_",
    "computer_call": "cu_",
}
_ITEM_ID = re.compile(rb'"item_id":\s*"((?:[^"\\]|\\.)*)"')
_SEQUENCE = re.compile(rb'"sequence_number":\s*(\d{1,15})(?!\d)')
_OUTPUT_INDEX = re.compile(rb'"output_index":\s*(\d{1,15})(?!\d)')
_TERMINAL = (
    "response.completed",
    "response.incomplete",
    "response.failed",
    "response.cancelled",
    "error",
)
_REFUSED_TOOLS = ("image_generation", "code_interpreter")
_SHAPED_ITEMS = (
    "function_call",
    "function_call_output",
    "reasoning",
    "custom_tool_call",
    "custom_tool_call_output",
)
_SHAPED_PARTS = frozenset(("input_text", "output_text", "refusal"))
#: the items that hold the result of a tool which the client ran
_RESULT_ITEMS = (
    "function_call_output",
    "custom_tool_call_output",
    "tool_search_output",
    "local_shell_call_output",
    "shell_call_output",
    "apply_patch_call_output",
    "computer_call_output",
)
#: the items that /responses itself has, beside messages
_OWN_ITEMS = frozenset(
    (
        "reasoning",
        "item_reference",
        "compaction",
        "compaction_summary",
        "context_compaction",
        "compaction_trigger",
        "function_call",
        "function_call_output",
        "custom_tool_call",
        "custom_tool_call_output",
        "local_shell_call",
        "local_shell_call_output",
        "shell_call",
        "shell_call_output",
        "apply_patch_call",
        "apply_patch_call_output",
        "computer_call",
        "computer_call_output",
        "tool_search_call",
        "tool_search_output",
        "additional_tools",
        "web_search_call",
        "file_search_call",
        "code_interpreter_call",
        "image_generation_call",
    )
)
LOGPROBS = "message.output_text.logprobs"  # of `include`
_TEXT_EVENTS = (
    "response.output_text.delta",
    "response.output_text.done",
    "response.refusal.delta",
    "response.refusal.done",
)
_ARGUMENT_EVENTS = (
    "response.function_call_arguments",
    "response.custom_tool_call_input",
)


def item_id(item: Json, place: int) -> str:
    """The id under which a client sees an output item: the upstream's first one if it is short."""
    given = str(item.get("id") or "")
    if given and len(given) <= MAX_ID_CHARS:
        return given
    return stable_id(
        _ITEM_PREFIXES.get(str(item.get("type")), "item_"), given or str(place)
    )


def response_id(given: Any, key: str = "") -> str:
    """The upstream's id if it is short, else one of our own; key: makes it differ from others."""
    text = str(given or "")
    if 0 < len(text) <= MAX_ID_CHARS:
        return text
    return stable_id("resp_", key + text)


def is_blank(value: Any) -> bool:
    """Does a field of a response object say nothing?  0 and False do."""
    return value is None or value == "" or value == [] or value == {}


def mend_item(item: Json, new_id: str) -> None:
    """Give an output item the id that the client knows."""
    item["id"] = new_id
    if item.get("type") == "reasoning" and not isinstance(item.get("summary"), list):
        item["summary"] = []  # without it some clients show "thinking" for ever


def drop_copilot_fields(answer: Json) -> None:
    for key in [k for k in answer if k.startswith("copilot_")]:
        del answer[key]


def mend_response_usage(answer: Json) -> None:
    """Fill what strict clients need (Codex: total_tokens)."""
    if not isinstance(answer.get("usage"), dict):
        if answer.get("status") not in ("completed", "incomplete"):
            return
        answer["usage"] = {"input_tokens": 0, "output_tokens": 0}
    usage = answer["usage"]
    reported = Usage.of(read_usage(usage))
    for key, usual in openai_usage(reported, "input", "output").items():
        if not isinstance(usage.get(key), type(usual)):
            usage[key] = usual
    usage["input_tokens_details"].setdefault(
        "cache_write_tokens", 0
    )  # openai 3.52 insists


def _vendor_output(output: Any) -> Any:
    """The output of a vendor's tool as content: a screenshot as an image, the runs of a shell as
    JSON, text as it is."""
    picture = as_object(output)
    if picture.get("type") == "computer_screenshot":
        return [{"type": "input_image", "image_url": picture.get("image_url")}]
    if output is None or isinstance(output, str):
        return output
    return dumps(output).decode("utf-8", "replace")


#: events that show nothing to a user; of an item: if it is one of the second row
_SILENT_EVENTS = (
    "response.created",
    "response.queued",
    "response.in_progress",
    "response.content_part.added",
    "response.reasoning_summary_part.added",
)
_SILENT_ITEMS = ("message", "reasoning")
#: fields of a request that its response object repeats, with what they are when they were not said
ECHOED_FIELDS: Mapping[str, Any] = {
    "background": False,
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "prompt_cache_key": None,
    "reasoning": {"effort": None, "summary": None},
    "safety_identifier": None,
    "service_tier": None,
    "store": False,
    "temperature": None,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": None,
    "top_p": None,
    "truncation": "disabled",
    "user": None,
}
_UNSAID_FIELDS = (
    "max_tool_calls",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "top_logprobs",
)  # left out where they were not said
_KEPT_BACK = ("background", "store", "service_tier")  # not as the client asked


def empty_response(request: Request, response_id: str, created_at: int) -> Json:
    """A response object of which nothing is known but its request."""
    fields_ = {
        name: value
        for name, value in ECHOED_FIELDS.items()
        if name not in _UNSAID_FIELDS
    }

    return dict(
        fields_,
        **request.echo,
        id=response_id,
        object="response",
        created_at=created_at or request.now,
        status="in_progress",
        error=None,
        incomplete_details=None,
        model=request.model,
        output=[],
        usage=None,
    )


class ResponsesStream(StreamRelay):
    """Response events with ids that stay: the upstream gives one item another id in every event,
    and strict clients give up on a mismatch.  The first id per `output_index` is kept.

    Argument deltas that come with `obfuscation` may be ciphertext: they are held until the `.done`
    event, whose text is the truth, and then sent as one delta.  A call without a name is held
    until an event names it."""

    def __init__(
        self, dialect: Dialect, asked: str, body: Json, request: Request | None = None
    ) -> None:
        super().__init__(dialect, asked, body, request)
        self._response: Json = {}  # id and created_at, once known
        self._ids: dict[int, str] = {}  # output_index -> the id that the client knows
        self._items: dict[int, Json] = {}  # output_index -> the finished item
        self._ciphered: dict[
            int, str
        ] = {}  # output_index -> obfuscated argument deltas
        self._nameless: dict[
            int, list[Json]
        ] = {}  # output_index -> events of such a call
        self._sequence = 0  # the next number
        self._marker = b""  # what every frame of the open item must hold

    # -- without a parser

    def _quick(self, block: bytes) -> bytes:
        if (
            not self.has_content
            or self._held
            or self._nameless
            or b'"obfuscation"' in block
        ):
            return b""
        if self._is_plain(block):
            return block
        return self._with_known_id(block)

    def _is_plain(self, block: bytes) -> bool:
        """Are these all events of the open item, under its one id?"""
        count = block.count(b"\n\n")
        return bool(
            self._marker
            and block.count(self._marker) == count
            and block.count(b'"sequence_number":') == count
            and not self._ciphered
            and self._count_on(block)
        )

    def _count_on(self, block: bytes) -> bool:
        """Do these frames go on with higher sequence numbers than those that went out?"""
        first, last = (
            _SEQUENCE.search(block),
            _SEQUENCE.search(block, block.rfind(b'"sequence_n')),
        )
        if not first or not last or int(first.group(1)) < self._sequence:
            return False
        self._sequence = int(last.group(1)) + 1
        return True

    def _with_known_id(self, raw: bytes) -> bytes:
        """One delta: only the id is exchanged, in the bytes.  b'': it must be looked into."""
        name_end = raw.find(b".delta\ndata: ")
        if name_end < 0 or raw.count(b"\n") != 3 or not raw.startswith(b"event: "):
            return b""
        found, index = _ITEM_ID.search(raw), _OUTPUT_INDEX.search(raw)
        if index:
            known = self._ids.get(int(index.group(1)))
        else:
            known = None
        if not found or known is None or not self._count_on(raw):
            return b""
        return raw[: found.start(1)] + known.encode() + raw[found.end(1) :]

    # -- with one

    def _mend_event(self, event: Json, raw: bytes) -> bytes:
        kind, index = str(event.get("type")), count_or_zero(event.get("output_index"))
        drop_copilot_fields(event)
        is_ciphered = event.pop("obfuscation", None) is not None
        self._mend_ids(event, kind, index)
        if isinstance(event.get("response"), dict):
            self.mend_response(event["response"], kind)

        if kind in ("error", "response.failed", "response.cancelled"):
            return self._told_failure(event, kind)
        if self._is_nameless(event, kind, index):
            return b""
        if kind == "response.output_item.done" and _is_reasoning(event.get("item")):
            return self._hold(self._render(event))

        out = self._release()
        self.has_content = self.has_content or self._shows(event, kind)
        stem, _, last = kind.rpartition(".")
        if stem in _ARGUMENT_EVENTS:
            return out + self._mend_arguments(event, stem, last, is_ciphered)
        final = self._render(event)
        if kind in _TERMINAL:
            self.ended = True
            if self.on_final:
                self.on_final(str(self._response.get("id")), final)
        return out + final

    @staticmethod
    def _shows(event: Json, kind: str) -> bool:
        """Is this an event of which a user sees something?"""
        item = as_object(event.get("item"))
        if kind == "response.output_item.added":
            return item.get("type") not in _SILENT_ITEMS
        return kind not in _SILENT_EVENTS

    def _mend_ids(self, event: Json, kind: str, index: int) -> None:
        """The ids that the client knows, in an event about an item."""
        item = event.get("item")
        if isinstance(item, dict):
            known = self._ids.setdefault(index, item_id(item, index))
            if kind == "response.output_item.added":
                is_same = item.get("id") == known
                if is_same:
                    self._marker = b'"item_id":' + dumps(known)
                else:
                    self._marker = b""
            elif kind == "response.output_item.done":
                self._items[index] = item
            mend_item(item, known)
        if "item_id" in event:
            event["item_id"] = self._ids.setdefault(
                index, item_id({"id": event["item_id"]}, index)
            )

    def _is_nameless(self, event: Json, kind: str, index: int) -> bool:
        """Is this an event of a call whose name is not known?  Then it waits; with its name they
        all come out, in their order."""
        item = as_object(event.get("item"))
        is_call = item.get("type") in ("function_call", "custom_tool_call")
        if kind == "response.output_item.added" and is_call and not item.get("name"):
            self._nameless[index] = []
        waiting = self._nameless.get(index)
        if waiting is None:
            return False
        name = item.get("name") or event.get("name")
        if not name and kind != "response.output_item.done":
            waiting.append(event)
            return True

        del self._nameless[index]
        for held in waiting:
            if isinstance(held.get("item"), dict):
                held["item"]["name"] = name or ""
            self._held += self._render(held)
        return False

    def _mend_arguments(
        self, event: Json, stem: str, last: str, is_ciphered: bool
    ) -> bytes:
        """An event about a call's arguments; a ciphered delta waits for the whole."""
        index = count_or_zero(event.get("output_index"))
        if last == "delta" and (is_ciphered or index in self._ciphered):
            held = self._ciphered.get(index, "")
            self._ciphered[index] = held + str(event.get("delta") or "")
            return b""
        if last != "done" or index not in self._ciphered:
            return self._render(event)

        held = self._ciphered.pop(index)
        text = event.get("arguments", event.get("input"))
        delta = {
            "type": stem + ".delta",
            "sequence_number": self._sequence,
            "item_id": event.get("item_id"),
            "output_index": index,
            "delta": text if isinstance(text, str) else held,
        }
        return self._render(delta) + self._render(event)

    def _told_failure(self, event: Json, kind: str) -> bytes:
        """A failure that the upstream tells: in its own words, under the code that Codex knows."""
        answer = as_object(event.get("response"))
        error = told_error(answer or event)
        if error.overflow:  # as the event and code that clients act on
            return self._fail(error)
        if isinstance(answer.get("error"), dict):
            answer["error"]["code"] = error.response_code
        return self._fail(error, self._render(event))

    def mend_response(self, answer: Json, kind: str = "") -> None:
        """The whole, inside an event of this kind or by itself."""
        if not self._response:
            created_at = count_or_zero(answer.get("created_at")) or self.request.now
            self._response = {
                "created_at": created_at,
                "id": response_id(answer.get("id"), self.request.key),
            }
        answer["id"], answer["model"] = self._response["id"], self.asked
        answer["created_at"] = answer.get("created_at") or self._response["created_at"]
        for name, value in self.request.echo.items():
            if is_blank(answer.get(name)):
                answer[name] = value

        drop_copilot_fields(answer)
        output = as_list(answer.get("output"))
        if kind in _TERMINAL and not output and self._items:
            answer["output"] = [self._items[at] for at in sorted(self._items)]
        for at, item in enumerate(output):
            if isinstance(item, dict):
                mend_item(item, self._ids.get(at) or item_id(item, at))
        if not as_object(answer.get("usage")) and self.meter.usage:
            answer["usage"] = openai_usage(self.meter.usage, "input", "output")
        mend_response_usage(answer)

    def _render(self, event: Json) -> bytes:
        given = event.get("sequence_number")
        if isinstance(given, int):
            number = max(given, self._sequence)
        else:
            number = self._sequence
        event["sequence_number"], self._sequence = number, number + 1
        return Frame(str(event.get("type")), dumps(event)).encode()

    def _error(self, error: ProxyError) -> bytes:
        answer = empty_response(self.request, response_id(None, self.request.key), 0)
        answer.update(self._response)
        answer.update(
            status="failed", error={"code": error.response_code, "message": str(error)}
        )
        return self._render({"type": "response.failed", "response": answer})


def _is_reasoning(item: Any) -> bool:
    return as_object(item).get("type") == "reasoning"


class Responses(Dialect):
    """POST /responses, OpenAI's newer shape.  Upstream it is stateless: nothing is stored."""

    name, path = "responses", "/responses"
    turns_key = "input"
    system_key = "instructions"
    own_parts = frozenset(
        (
            "input_text",
            "output_text",
            "input_image",
            "input_file",
            "input_audio",
            "refusal",
            "summary_text",
            "reasoning_text",
            "encrypted_content",
            "computer_screenshot",
        )
    )
    substitutes = ("chat", "messages")
    reads_compactions = True
    knows_allowed_tools = True
    has_freeform_tools = True
    has_whole_answer_limit = False
    #: incomplete_details.reason (for whole answers "completed") and the neutral word
    STOP_REASONS = (
        ("completed", "stop"),
        ("max_output_tokens", "length"),
        ("content_filter", "refusal"),
        ("completed", "tool_use"),
        ("completed", "stop_sequence"),
        ("completed", "pause"),
    )

    def prepare(self, edit: Edit, model: Model) -> None:
        body = edit.body
        self._refuse_state(body)
        edit.set(body, "store", False)
        edit.drop(body, "service_tier")
        limit = body.get("max_output_tokens")
        if isinstance(limit, int) and limit < 16:
            edit.set(body, "max_output_tokens", 16)  # OpenAI's own minimum
        wanted, include = "reasoning.encrypted_content", as_list(body.get("include"))
        if model.efforts and wanted not in include:  # needed to go on without a store
            edit.set(body, "include", include + [wanted])
        prepare_tools(edit, lambda tool: tool.get("type") not in _REFUSED_TOOLS)

        if not isinstance(body.get("input"), str):
            items = check_list(body, "input")
            kept = [
                item
                for at, item in enumerate(items)
                if self._prepare_item(edit, item, at)
            ]
            edit.replace(body, "input", kept)

    def echo_of(self, body: Json) -> Json:
        echo = {
            name: body[name]
            for name in ECHOED_FIELDS
            if body.get(name) is not None and name not in _KEPT_BACK
        }
        for name in ("reasoning", "text"):
            if name in echo:
                echo[name] = dict(ECHOED_FIELDS[name], **as_object(echo[name]))
        return echo

    @staticmethod
    def _refuse_state(body: Json) -> None:
        for key in ("background", "conversation", "prompt"):
            if body.get(key):
                raise BadRequest(
                    "'%s' is not supported: the upstream stores nothing" % key,
                    code="unsupported_parameter",
                    param=key,
                )
        if body.get("previous_response_id"):
            raise BadRequest(
                "Previous response with id '%s' not found: the upstream stores "
                "nothing, send the whole input"
                % printable(str(body["previous_response_id"]), 80),
                code="previous_response_not_found",
                param="previous_response_id",
            )

    @staticmethod
    def _prepare_item(edit: Edit, item: Json, at: int) -> bool:
        """Ids are bound to a connection upstream and refused later: they go.  False: drop it."""
        kind = item.get("type")
        if kind == "item_reference":
            edit.lose("input[%d]" % at, "the upstream stores no items")
            return False

        if (
            kind == "reasoning"
            and not item.get("encrypted_content")
            and not text_of(item.get("summary")).strip()
        ):
            edit.changed = True
            return False

        if is_packed(item.get("encrypted_content")):
            edit.lose("reasoning", FOREIGN_STATE)
            return False

        for key in ("id", "internal_chat_message_metadata_passthrough"):
            edit.drop(item, key)
        if isinstance(item.get("call_id"), str) and len(item["call_id"]) > MAX_ID_CHARS:
            edit.set(item, "call_id", stable_id("call_", item["call_id"]))
        for key in ("content", "output"):
            refuse_image_urls(item.get(key), "input[%d]" % at)
            for part in map(as_object, as_list(item.get(key))):
                if part.get("type") == "input_image":  # refused without a detail
                    detail = part.get("detail") or "auto"
                    edit.set(part, "detail", "high" if detail == "original" else detail)

        return True

    def is_in_shape(self, item: Any) -> bool:
        if type(item) is not dict:
            return False
        if item.get("role") is None:
            return (
                item.get("type") in _SHAPED_ITEMS
                and type(item.get("output", "")) is str
            )
        if "tool_calls" in item or item["role"] == "tool":
            return False
        return _has_parts(item.get("content"), _SHAPED_PARTS)

    def own_tool(self, tool: Json) -> Json:
        freeform, function = freeform_of(tool), function_of(tool)
        if freeform:
            if "custom" in tool:
                return dict({"type": "custom"}, **freeform)
            return tool
        is_flat = tool.get("type") == "function" and "function" not in tool
        if function and not (is_flat and "input_schema" not in tool):
            return dict({"type": "function"}, **function)
        return tool

    def own_choice(self, choice: Any) -> Any:
        wish = choice_of(choice)
        if (
            isinstance(wish, Named)
            and "function" not in choice
            and choice["type"] == "function"
        ):
            return choice  # perhaps with a namespace
        if wish is None:
            return choice
        if isinstance(wish, Named):
            return {"type": "function", "name": wish.name}
        return wish

    def is_own_item(self, item: Json) -> bool:
        if item.get("role") is not None:
            return item.get("type") in (None, "message")
        return str(item.get("type")) in _OWN_ITEMS

    def write_part(self, part: Part, by_model: bool) -> Json:
        if by_model and isinstance(part, Text):
            return {"type": "output_text", "text": part.text}
        return write_part(part, "input_")

    def tool_steps(self, item: Json) -> list[ToolStep]:
        call_id = item.get("call_id")
        kind = str(item.get("type"))
        if isinstance(call_id, str) and kind.endswith("_call"):
            return [ToolStep(item, [call_id], None, True)]
        if isinstance(call_id, str) and kind.endswith("_output"):
            return [ToolStep(item, (), call_id)]
        return [ToolStep(item, (), None, True)]

    def missing_result(self, item: Json, call_id: str) -> Json:
        kind = str(item["type"]).replace("local_shell", "function") + "_output"
        if kind in ("function_call_output", "custom_tool_call_output"):
            return {"type": kind, "call_id": call_id, "output": INTERRUPTED}
        return {}

    def result_content(self, item: Json) -> Any:
        return item.get("output")

    def calls_in(self, item: Json) -> list[Json]:
        if "call_id" in item:
            return [item]
        return []

    def fit_cache(self, edit: Edit, model: Model) -> None:
        if not edit.body.get("prompt_cache_key"):
            edit.set(edit.body, "prompt_cache_key", conversation_key(edit.body, model))

    def mend(self, answer: Json, asked: str, request: Request | None = None) -> bool:
        ResponsesStream(self, asked, {}, request).mend_response(answer)
        return True

    def check_answer(self, answer: Json) -> None:
        super().check_answer(answer)
        if answer.get("status") in ("failed", "cancelled"):
            raise told_error(answer)

    # -- to and from neutral words.  A turn of the assistant is a run of items, each text a message
    # -- item of its own; system turns at the head are `instructions`.

    def decode_request(self, body: Json) -> Request:
        self._refuse_state(body)
        request = read_fields(self, body, "input instructions")
        verbosity = as_object(body.get("text")).get("verbosity")
        request.openai.update(given(verbosity=verbosity or None))
        if LOGPROBS in as_list(body.get("include")) or body.get("top_logprobs"):
            request.openai["logprobs"] = True
        if body.get("instructions"):
            request.add_turn("system", [Text(str(body["instructions"]))])
        if isinstance(body.get("input"), str):
            items = [{"role": "user", "content": body["input"]}]
        else:
            items = check_list(body, "input")
        for at, item in enumerate(items):
            self.read_turn(request, item, "input[%d]" % at)
        return request

    def read_tool(self, tool: Json, request: Request, namespace: str = "") -> None:
        """One entry of `tools`; a namespace holds several, which are flattened.  A tool that is no
        function becomes one, see `item` for the way back."""
        kind, name = str(tool.get("type")), str(tool.get("name") or "")
        if kind == "namespace":
            for inner in as_list(tool.get("tools")):
                self.read_tool(as_object(inner), request, name)
            return

        shown = dict(tool, name=flat_name(namespace, name))
        more: Json = {}
        if namespace:
            more = {"namespace": namespace, "short_name": name}
        if kind == "custom":
            shown = {
                "name": shown["name"],
                "description": freeform_description(tool),
                "parameters": FREEFORM_SCHEMA,
            }
        elif kind in CLIENT_TOOLS and tool.get("execution") != "server":
            row = CLIENT_TOOLS[kind]
            shown = {
                "name": kind,
                "description": tool.get("description") or row.description,
                "parameters": as_object(tool.get("parameters")) or row.schema,
            }
        elif kind != "function":
            drop_hosted_tool(request, tool)
            return
        add_tool(request, shown, "parameters", kind=kind, **more)

    def read_turn(self, request: Request, item: Json, place: str) -> None:
        kind = str(item.get("type") or "message")

        if kind in _RESULT_ITEMS:
            request.add_turn("user", [self._read_result(request, item, place)])
        elif kind == "message" and item.get("role") in ("user", "system", "developer"):
            note_unknown(request, item, "content")
            if item["role"] == "user":
                request.add_turn(
                    "user", read_content(item.get("content"), place, request)
                )
            else:
                request.add_turn("system", [Text(text_of(item.get("content")))])
        elif kind == "item_reference":
            request.lose(kind, "no such item is known here")
        elif kind in ("message", "reasoning", "function_call", "custom_tool_call") or (
            kind in CALL_ITEMS and (item.get("call_id") or item.get("id"))
        ):
            parts = self.read_output(item)
            if parts:
                request.add_turn("assistant", parts)
        else:
            request.add_turn(
                "user" if kind.endswith("_output") else "assistant",
                [block_as_text(item, request)],
            )

    def read_output(self, item: Json) -> list[Part]:
        """The parts of one item that a model made, in an answer or in a history; hosted tools'
        items have none."""
        kind = item.get("type") or "message"

        if kind == "message":
            content = item.get("content")
            if isinstance(content, str):
                parts = [{"text": content}]
            else:
                parts = as_list(content)
            return [
                self._read_words(p)
                for p in parts
                if isinstance(p, dict) and (p.get("refusal") or p.get("text"))
            ]

        if kind == "reasoning":
            text = "\n\n".join(
                str(p.get("text") or "")
                for key in ("summary", "content")
                for p in as_list(item.get(key))
                if isinstance(p, dict)
            )
            return reasoning_parts(
                self.name, text, item.get("encrypted_content"), item.get("id")
            )

        if kind not in ("function_call", "custom_tool_call", *CALL_ITEMS):
            return []
        name = flat_name(str(item.get("namespace") or ""), str(item.get("name") or ""))
        arguments = item.get("arguments")

        if kind == "custom_tool_call":
            arguments = dumps({"input": str(item.get("input") or "")}).decode(
                "utf-8", "replace"
            )
        elif kind in CALL_ITEMS:
            name = CALL_ITEMS[kind]
            given_arguments = as_object(item.get(CLIENT_TOOLS[name].arguments))
            arguments = dumps(given_arguments).decode("utf-8", "replace")

        call_id = item.get("call_id") or item.get(
            "id"
        )  # local_shell once had ids alone
        return [ToolCall(str(call_id or ""), name, str(arguments or "{}"))]

    @staticmethod
    def _read_words(block: Json) -> Text:
        """A text or a refusal that a model wrote."""
        citations = tuple(citations_of(block.get("annotations")))
        logprobs = tuple(dicts_in(block, "logprobs"))
        if block.get("refusal"):
            return Text(str(block["refusal"]), True)
        return Text(
            str(block.get("text") or ""), citations=citations, logprobs=logprobs
        )

    def _read_result(self, request: Request, item: Json, place: str) -> ToolResult:
        """The result of a tool; what a search found becomes callable."""
        call_id = str(item.get("call_id") or item.get("id") or "")
        known = len(request.tools)
        for tool in dicts_in(item, "tools"):
            self.read_tool(tool, request)
        if "tools" in item:
            names = [tool.name for tool in request.tools[known:]]
            return ToolResult(
                call_id, [Text("These tools are loaded now: " + ", ".join(names))]
            )

        output = item.get("output")
        if item["type"] not in ("function_call_output", "custom_tool_call_output"):
            output = _vendor_output(output)
        return ToolResult(call_id, read_content(output, place, request))

    def encode_request(self, request: Request, model: Model) -> Json:
        preflight(request, model)
        tools, choice, schema = offered_tools(request, model, True)
        system, turns = split_system(request.turns)
        instructions = [join_texts(turn.parts) for turn in system]
        watch_stops(request)
        body = write_fields(
            self,
            request,
            model,
            effort=fit_effort(request, model),
            output_schema=schema and dict({"name": "output"}, **schema),
        )

        body["input"] = self.write_turns(turns, request, model)
        body.update(given(instructions="\n\n".join(instructions) or None))
        if "verbosity" in body:
            body.setdefault("text", {})["verbosity"] = body.pop("verbosity")
        if body.pop("logprobs", None):
            body["include"] = [LOGPROBS]
        if model.efforts and not request.hides_thinking:
            # other dialects' clients have no word for the summary and want to see the thinking
            body.setdefault("reasoning", {})["summary"] = "auto"

        if tools:
            # `strict` is always said: what its absence means differs from Chat
            body["tools"] = [
                dict(
                    given(description=tool.description),
                    type="function",
                    name=tool.name,
                    strict=bool(tool.strict),
                    parameters=(
                        tool.parameters or {"type": "object", "properties": {}}
                    ),
                )
                for tool in tools
            ]

            body.update(
                given(
                    tool_choice={"type": "function", "name": choice.name}
                    if isinstance(choice, Named)
                    else choice
                )
            )

        return body

    def write_turns(
        self, turns: list[Turn], request: Request, model: Model
    ) -> list[Json]:
        return [item for turn in turns for item in self._write_turn(turn, request)]

    def _write_turn(self, turn: Turn, request: Request) -> list[Json]:
        """Items of a history; without ids, which are bound to a connection upstream."""
        if turn.role == "assistant":
            parts = [
                replace(p, id=fit_call_id(p.id)) if isinstance(p, ToolCall) else p
                for p in usable_parts(turn, request, self.name)
            ]
            return [self.item(part, None, {}) for part in parts]

        if turn.role == "system":
            return [
                {
                    "type": "message",
                    "role": "developer",
                    "content": [{"type": "input_text", "text": join_texts(turn.parts)}],
                }
            ]

        items = [
            self._write_result(part, request)
            for part in turn.parts
            if isinstance(part, ToolResult)
        ]

        content = [
            write_part(part, "input_")
            for part in turn.parts
            if not isinstance(part, ToolResult)
        ]

        if content:
            return items + [{"type": "message", "role": "user", "content": content}]
        return items

    def _write_result(self, result: ToolResult, request: Request) -> Json:
        output: Any = result_text(result, request)
        if not all(isinstance(part, Text) for part in result.parts):
            if result.is_error:
                prefix: list[Part] = [Text(ERROR_PREFIX)]
            else:
                prefix = []
            output = [write_part(part, "input_") for part in prefix + result.parts]
        return {
            "type": "function_call_output",
            "call_id": fit_call_id(result.call_id),
            "output": output,
        }

    def item(self, part: Part, given_id: str | None, tools: dict[str, Tool]) -> Json:
        """An output item.  given_id: None in a history; tools: those of the request, for calls
        whose client side is a freeform tool or one of a namespace."""
        head = {} if given_id is None else {"id": given_id}
        if given_id is None:
            status = {}
        else:
            status = {"status": "completed"}

        if isinstance(part, Text):
            notes = [self.annotation(citation) for citation in part.citations]
            block: Json = {
                "type": "output_text",
                "text": part.text,
                "annotations": notes,
                "logprobs": list(part.logprobs),
            }
            if part.refusal:
                block = {"type": "refusal", "refusal": part.text}
            return dict(
                head, type="message", **status, role="assistant", content=[block]
            )

        if isinstance(part, Reasoning):
            if part.text:
                summary = [{"type": "summary_text", "text": part.text}]
            else:
                summary = []
            return dict(
                head,
                type="reasoning",
                summary=summary,
                **given(encrypted_content=client_state(part, self.name)),
            )

        if not isinstance(part, ToolCall):
            return {}
        return self._call_item(
            part, dict(head, **status), tools.get(part.name, Tool(part.name))
        )

    @staticmethod
    def annotation(citation: Citation) -> Json:
        return dict({"type": "url_citation"}, **url_citation(citation))

    @staticmethod
    def _call_item(call: ToolCall, head: Json, tool: Tool) -> Json:
        """A call in the form in which the client knows its tool."""
        names = given(
            name=tool.short_name or call.name, namespace=tool.namespace or None
        )

        if tool.kind == "function":
            return dict(
                head,
                type="function_call",
                call_id=call.id,
                **names,
                arguments=call.arguments or "{}",
            )

        if tool.kind == "custom":
            return dict(
                head,
                type="custom_tool_call",
                call_id=call.id,
                **names,
                input=freeform_input(call.arguments),
            )

        row = CLIENT_TOOLS[tool.kind]
        fixed = as_object(row.fixed.get(row.arguments))
        arguments = dict(fixed, **arguments_object(call.arguments))
        item = dict(head, type=_ITEM_OF[tool.kind], call_id=call.id, **row.fixed)
        item[row.arguments] = arguments
        return item

    def encode_response(self, response: Response, request: Request) -> Json:
        """What the stream encoder would say at its end."""
        encoder = ResponsesEncoder(self, request)
        for event in unfold(response):
            encoder.feed(event)
        return encoder.answer


class ResponsesDecoder(StreamDecoder):
    """Events of /responses.  Items are known by `output_index`: their ids change in every event.
    Argument deltas with `obfuscation` may be ciphertext, the text of `.done` counts."""

    TEXT_KEYS = (b'"delta":',)

    def __init__(self, dialect: Any) -> None:
        super().__init__(dialect)
        self._obscured: set[int] = set()  # calls whose deltas may be ciphertext
        self._cited: dict[
            int, int
        ] = {}  # index of a text -> how many sources were told

    def read_whole(self, body: Json) -> list[Event]:
        if body.get("status") == "incomplete":
            status = "incomplete"
        else:
            status = "completed"
        if (
            body.get("error")
            or body.get("status") in ("failed", "cancelled")
            or ("output" not in body)
        ):
            status = "failed"
        return super().read_whole({"type": "response." + status, "response": body})

    def _read_event(self, event: Json) -> None:
        kind, at = str(event.get("type")), count_or_zero(event.get("output_index"))
        key = at, count_or_zero(event.get("content_index"))
        answer = as_object(event.get("response"))

        if kind in _TEXT_EVENTS:
            self._read_words(kind, self._slot(key, Text("", "refusal" in kind)), event)
        elif kind == "response.output_text.annotation.added":
            self._cite(self._slot(key, Text("")), citation_of(event.get("annotation")))
        elif kind in (
            "response.reasoning_summary_text.delta",
            "response.reasoning_text.delta",
        ):
            self._delta(self._slot((at, 0), Reasoning()), event.get("delta"))
        elif kind == "response.reasoning_summary_part.added" and count_or_zero(
            event.get("summary_index")
        ):
            self._delta(self._slots.get((at, 0), -1), "\n\n")
        elif kind.startswith(_ARGUMENT_EVENTS):
            self._read_arguments(kind, self._slots.get((at, 0), -1), event)
        elif kind == "response.output_item.added":
            self._read_item(key, as_object(event.get("item")))
        elif kind == "response.content_part.done":
            self._read_part_end(key, as_object(event.get("part")))
        elif kind == "response.output_item.done":
            self._read_item_end(at, as_object(event.get("item")))
        elif kind in ("response.created", "response.in_progress"):
            self._start(answer)
        elif kind in ("response.completed", "response.incomplete"):
            self._read_end(kind, answer)
        elif kind in ("response.failed", "response.cancelled", "error"):
            self._fail(told_error(answer or event))

    def _steady(self, data: bytes) -> bytes:
        """An unescaped quote cannot be inside a text, so what is found here are the keys."""
        before, key, behind = data.partition(b'"item_id":"')
        if key:
            data = before + key + behind[behind.find(b'"') :]
        before, key, behind = data.partition(b'"sequence_number":')
        if key:
            data = before + key + behind.lstrip(b"0123456789")
        return data

    def _read_words(self, kind: str, index: int, event: Json) -> None:
        if kind.endswith(".delta"):
            self._delta(index, event.get("delta"), event.get("logprobs"))
        elif index in self._empty:
            text = event.get("refusal" if "refusal" in kind else "text")
            self._delta(index, text, event.get("logprobs"))

    def _read_arguments(self, kind: str, index: int, event: Json) -> None:
        if kind.endswith(".delta"):
            if "obfuscation" in event or "custom" in kind:
                self._obscured.add(index)
            if index not in self._obscured:
                self._delta(index, event.get("delta"))
        elif index in self._empty:
            text = event.get("arguments")
            if "custom" in kind:
                text = dumps({"input": str(event.get("input") or "")}).decode()
            self._delta(index, text)

    def _read_item(self, key: tuple[int, int], item: Json) -> None:
        """An item begins; a call without a name waits for its end, which has one."""
        if item.get("type") == "reasoning":
            self._slot(key, Reasoning())
        elif item.get("type") in ("function_call", "custom_tool_call") and item.get(
            "name"
        ):
            self._slot(key, skeleton(self.dialect.read_output(item)[0]))

    def _read_part_end(self, key: tuple[int, int], part: Json) -> None:
        index = self._slots.get(key, -1)
        self._cite_rest(index, citations_of(part.get("annotations")))
        self._end(index)

    def _cite_rest(self, index: int, citations: Sequence[Citation]) -> None:
        """Sources that no event of their own has told."""
        if index in self._open:
            self._cite(index, citations[self._cited.get(index, 0) :])

    def _cite(self, index: int, citations: Iterable[Citation]) -> None:
        told = list(citations)
        self._cited[index] = self._cited.get(index, 0) + len(told)
        super()._cite(index, told)

    def _read_item_end(self, at: int, item: Json) -> None:
        """The whole item: what of it was not told by deltas is told now."""
        parts = self.dialect.read_output(item)
        if not parts:
            self._end(self._slots.get((at, 0), -1))
        for place, part in enumerate(parts):
            index = self._slot((at, place), skeleton(part))
            self._read_rest(index, part)
            if isinstance(part, Reasoning):
                self._end(index, part.signature, part.minted_by or "")
            else:
                self._end(index)

    def _read_rest(self, index: int, part: Part) -> None:
        if isinstance(part, Text):
            if index in self._empty:
                self._delta(index, part.text, list(part.logprobs))
            self._cite_rest(index, part.citations)
        elif index in self._empty:
            self._delta(index, text_in(part))

    def _read_end(self, kind: str, answer: Json) -> None:
        self._start(answer)
        if not self._slots:  # nothing was streamed: take the whole
            for at, item in enumerate(as_list(answer.get("output"))):
                self._read_item_end(at, as_object(item))
        reason = (
            as_object(answer.get("incomplete_details")).get("reason")
            or "max_output_tokens"
        )
        self._stop(str(reason) if kind == "response.incomplete" else "completed")


class ItemKind(NamedTuple):
    """How the events of an item, or of its block, are called.  stem: of its deltas; field: of the
    whole text in `.done`; around: the stem of the events around them, "" for none."""

    stem: str
    field: str
    around: str


_NO_KIND = ItemKind("", "", "")


class ResponseItem(NamedTuple):
    """An output item while it is open.  place: item_id, output_index and the index of the block."""

    builder: PartBuilder
    place: Json
    kind: ItemKind


class ResponsesEncoder(StreamEncoder):
    """The whole choreography: created, in_progress, for each item added, its deltas and dones,
    item done, and completed with the full output.  One id for each item, one for the response."""

    KINDS: ClassVar = {
        "output_text": ItemKind(
            "response.output_text", "text", "response.content_part"
        ),
        "refusal": ItemKind("response.refusal", "refusal", "response.content_part"),
        "reasoning": ItemKind(
            "response.reasoning_summary_text", "text", "response.reasoning_summary_part"
        ),
        "function_call": ItemKind("response.function_call_arguments", "arguments", ""),
        "custom_tool_call": ItemKind("response.custom_tool_call_input", "input", ""),
    }

    def __init__(self, dialect: Responses, request: Request) -> None:
        super().__init__(dialect, request)
        self.answer: Json = {}  # the response object so far
        self._tools = {tool.name: tool for tool in request.tools}
        self._sequence = 0  # the next number
        self._items: dict[int, ResponseItem] = {}  # of each part
        self._output: dict[int, Json] = {}  # output_index -> finished item

    def _event(self, kind: str, **fields: Any) -> bytes:
        event = dict({"type": kind, "sequence_number": self._sequence}, **fields)
        self._sequence += 1
        return Frame(kind, dumps(event)).encode()

    def _start(self, event: ResponseStart) -> bytes:
        response_id = client_id("resp_", event.id, self.request)
        self.answer = empty_response(self.request, response_id, event.created)
        self.answer.update(given(service_tier=event.tier))
        return self._event("response.created", response=self.answer) + self._event(
            "response.in_progress", response=self.answer
        )

    def _begin(self, event: PartStart) -> bytes:
        part, index, at = event.part, event.index, len(self._items)
        item = self.dialect.item(part, "", self._tools)
        prefix = _ITEM_PREFIXES.get(item["type"], "item_")
        item["id"] = stable_id(prefix, "%s %d" % (self.answer["id"], index))
        (block,) = item.get("content", [item])
        place = {"item_id": item["id"], "output_index": at}
        begun = self._items[index] = ResponseItem(
            PartBuilder(part), place, self.KINDS.get(block["type"], _NO_KIND)
        )

        hollow = {
            "content": [],
            "arguments": "",
            "input": "",
            "summary": [],
            "status": "in_progress",
        }
        shown = {key: hollow.get(key, value) for key, value in item.items()}
        out = self._event("response.output_item.added", output_index=at, item=shown)
        if isinstance(part, Text):
            place["content_index"] = 0
            out += self._event(begun.kind.around + ".added", part=block, **place)
        elif isinstance(part, Reasoning):
            place["summary_index"] = 0
        if begun.kind.stem and item["type"] != "custom_tool_call":
            self._frames[index] = self._delta_frame(begun, block.get("logprobs"))
        return out

    def _delta_frame(self, item: ResponseItem, logprobs: Any) -> list[bytes]:
        """A delta of this item, cut where number and text belong."""
        kind = item.kind.stem + ".delta"
        delta = dict(
            {"type": kind, "sequence_number": self.MARK},
            **item.place,
            delta=self.MARK,
            **given(logprobs=logprobs),
        )
        return Frame(kind, dumps(delta)).encode().split(self.QUOTED_MARK)

    def _delta(self, event: PartDelta) -> bytes:
        item = self._items[event.index]
        is_first = not item.builder.texts
        item.builder.add(event)
        frame = self._frames.get(event.index)
        if frame is None:
            return b""  # a freeform input: whole at its end
        if event.logprobs is not None:
            return self._event(
                item.kind.stem + ".delta",
                **item.place,
                delta=event.text,
                logprobs=event.logprobs,
            )

        out = b""
        if is_first and isinstance(item.builder.part, Reasoning):
            out = self._event(
                "response.reasoning_summary_part.added",
                part={"type": "summary_text", "text": ""},
                **item.place,
            )
        number, self._sequence = self._sequence, self._sequence + 1
        return b"%b%b%d%b%b%b" % (
            out,
            frame[0],
            number,
            frame[1],
            dumps(event.text),
            frame[2],
        )

    def _cite(self, event: PartCitation) -> bytes:
        item = self._items[event.index]
        number = len(item.builder.citations)
        item.builder.add(event)
        return self._event(
            "response.output_text.annotation.added",
            **item.place,
            annotation_index=number,
            annotation=self.dialect.annotation(event.citation),
        )

    def _sign(self, event: PartSignature) -> bytes:
        self._items[event.index].builder.add(event)
        return b""

    def _end(self, event: PartEnd) -> bytes:
        begun = self._items[event.index]
        kind, place, out = begun.kind, begun.place, b""
        item = self.dialect.item(begun.builder.build(), place["item_id"], self._tools)
        (block,) = item.get("content") or item.get("summary") or [item]
        if item["type"] == "custom_tool_call":
            out = self._event(kind.stem + ".delta", delta=item["input"], **place)
        if kind.field in block:
            if item["type"] == "function_call":
                name = item["name"]
            else:
                name = None
            whole = {kind.field: block[kind.field]}
            out += self._event(
                kind.stem + ".done",
                **whole,
                **place,
                **given(logprobs=block.get("logprobs"), name=name),
            )
            if kind.around:
                out += self._event(kind.around + ".done", part=block, **place)

        self._output[place["output_index"]] = item
        return out + self._event(
            "response.output_item.done", item=item, output_index=place["output_index"]
        )

    def whole_item(self, item: Json) -> bytes:
        """The events of an output item that no part stands for."""
        at = len(self._output)
        self._output[at] = item
        return b"".join(
            self._event("response.output_item." + kind, output_index=at, item=item)
            for kind in ("added", "done")
        )

    def _stop(self, event: ResponseEnd) -> bytes:
        self.ended = True
        output = [self._output[at] for at in sorted(self._output)]
        raw = self.dialect.TO_WIRE.get(event.stop, "completed")
        parts = [item.builder.part for item in self._items.values()]
        if event.stop == "refusal" and any(
            isinstance(p, Text) and p.refusal for p in parts
        ):
            raw = "completed"  # said in words, as OpenAI's own do
        whole = raw == "completed"
        self.answer.update(
            output=output,
            status="completed" if whole else "incomplete",
            incomplete_details=None if whole else {"reason": raw},
            usage=openai_usage(event.usage, "input", "output"),
        )
        out = self._event("response." + self.answer["status"], response=self.answer)
        self.final = self.answer["id"], out
        return out

    def _fail(self, event: StreamError) -> bytes:
        if self.answer:
            out = b""
        else:
            out = self._start(ResponseStart("", ""))
        self.ended = True
        self.answer.update(
            status="failed",
            error={"code": event.error.response_code, "message": str(event.error)},
        )
        return out + self._event("response.failed", response=self.answer)


# ---- Messages ----

#: the effort words in order, and the thinking budget in tokens that each stands for
EFFORT_BUDGETS = (
    ("low", 2048),
    ("medium", 8192),
    ("high", 16384),
    ("xhigh", 24576),
    ("max", 32000),
)
_REFUSED_FIELDS = (
    "context_management",
    "inference_geo",
    "speed",
    "container",
    "mcp_servers",
    "betas",
    "contextTier",
    "service_tier",
    "cache_control",
)
_REFUSED_TOOL_FIELDS = (
    "eager_input_streaming",
    "defer_loading",
    "input_examples",
    "strict",
)
_RESULT_PARTS = ("text", "image", "document")
TOOL_SEARCH = "tool_search_tool_"  # ... and those of the tool that finds other tools
SEARCH_TOOLS = "web_search_"  # how the types of Anthropic's hosted search begin
CACHE_TIMES = ("5m", "1h")  # how long the prompt cache may be kept
_COUNTED_FIELDS = ("model", "messages", "system", "tools", "tool_choice")


def budget_to_effort(budget: int) -> str:
    """A thinking budget in tokens -> an effort: below 4k low, below 16k medium, else high."""
    if budget < 4096:
        return "low"
    if budget < 16384:
        return "medium"
    return "high"


def clamp_effort(effort: str, listed: list[str]) -> str:
    """The listed effort nearest to the wish, the lower one where both are as near."""
    order = [name for name, _ in EFFORT_BUDGETS]
    if effort in listed or not listed:
        return effort
    if effort in order:
        place = order.index(effort)
    else:
        place = 1
    return min(
        listed,
        key=lambda name: abs((order.index(name) if name in order else -1) - place),
    )


def think_adaptively(edit: Edit) -> bool:
    """Thinking with a budget as adaptive thinking with an effort -> was there any?"""
    body, thinking = edit.body, as_object(edit.body.get("thinking"))
    config = as_object(body.get("output_config"))
    budget = count_or_zero(thinking.get("budget_tokens"))
    effort = config.get("effort") or budget_to_effort(budget)
    if thinking.get("type") == "enabled":
        edit.set(
            body, "thinking", given(type="adaptive", display=thinking.get("display"))
        )
        edit.set(body, "output_config", dict(config, effort=effort))
    return thinking.get("type") == "enabled"


def think_within_budget(edit: Edit, model: Model) -> bool:
    """Thinking with a budget that fits the model and max_tokens, else none -> a change?"""
    body, thinking = edit.body, as_object(edit.body.get("thinking"))
    effort = str(as_object(body.get("output_config")).get("effort"))
    wish = thinking.get("budget_tokens") or dict(EFFORT_BUDGETS).get(effort, 8192)
    room = count_or_zero(body.get("max_tokens"))
    fitting = fit_budget(count_or_zero(wish), room, model)
    if fitting is None:
        edit.drop(body, "thinking", "max_tokens leaves no room for it")
    elif thinking:
        edit.set(
            body,
            "thinking",
            given(
                type="enabled", budget_tokens=fitting, display=thinking.get("display")
            ),
        )
    return as_object(body.get("thinking")) != thinking


def end_with_user(edit: Edit, key: str = "messages") -> bool:
    """An answer begun by the client (prefill) becomes a request to go on -> was there one?"""
    turns = edit.body.get(key)

    if isinstance(turns, list) and turns:
        last = as_object(turns[-1])
    else:
        last = {}

    if last.get("role") != "assistant":
        return False
    edit.replace(
        edit.body,
        key,
        as_list(turns)
        + [
            {
                "role": "user",
                "content": "Continue your answer exactly where it stopped.",
            }
        ],
    )

    edit.lose(key, "an answer begun by the client became a request to go on")
    return True


def client_tool(tool: Json) -> Json | None:
    """Anthropic's tool that the client runs as a function with its published schema: a call of it
    looks the same, since it goes by the name.  None for others."""
    kind = str(tool.get("type"))
    for prefix, description, schema in ANTHROPIC_TOOLS:
        if kind.startswith(prefix):
            return given(
                name=tool.get("name"),
                description=description,
                input_schema=schema,
                cache_control=tool.get("cache_control"),
            )
    return None


_SHAPED_BLOCKS = frozenset(
    ("text", "tool_use", "tool_result", "thinking", "redacted_thinking")
)


class MessagesStream(StreamRelay):
    """Anthropic's events as they come.  Exchanged are the model's name in `message_start`, counts
    that SDKs cannot do without, and the names of errors that Anthropic does not have."""

    def __init__(
        self, dialect: Dialect, asked: str, body: Json, request: Request | None = None
    ) -> None:
        super().__init__(dialect, asked, body, request)
        self._kind = ""  # of the open block

    def _quick(self, block: bytes) -> bytes:
        if (
            self.has_content
            and b'"content_block_s' not in block
            and (b'"message_' not in block and b'"error"' not in block)
        ):
            return block
        return b""

    def _mend_event(self, event: Json, raw: bytes) -> bytes:
        kind = str(event.get("type"))
        if kind == "error" or isinstance(event.get("error"), dict):
            return self._told_failure(event, raw)
        if kind == "ping":
            return raw
        if kind == "content_block_stop" and "thinking" in self._kind:
            return self._hold(raw)

        held = self._release()
        self.has_content = self.has_content or self._shows(kind, event)
        if kind == "content_block_start":
            self._kind = str(as_object(event.get("content_block")).get("type"))
        elif kind in ("message_start", "message_delta") and self._complete(kind, event):
            raw = Frame(kind, dumps(event)).encode()
        elif kind == "message_stop":
            self.ended = True
        return held + raw

    @staticmethod
    def _shows(kind: str, event: Json) -> bool:
        """Is this an event of which a user sees something?"""
        if kind == "content_block_start":
            block = as_object(event.get("content_block"))
            words = block.get("text") or block.get("thinking")
            return bool(words) or block.get("type") not in (
                "text",
                "thinking",
                "redacted_thinking",
            )
        if kind == "content_block_delta":
            delta = as_object(event.get("delta"))
            return delta.get("type") != "signature_delta" and any(
                value for key, value in delta.items() if key != "type"
            )
        return kind in ("message_delta", "message_stop")

    def _complete(self, kind: str, event: Json) -> bool:
        """Exchange the model's name, fill counts that are missing -> was there anything to do?"""
        if kind == "message_start":
            holder = as_object(event.get("message"))
        else:
            holder = event
        before = holder.get("model"), holder.get("usage")
        if kind == "message_start":
            holder["model"] = self.asked
        usage = as_object(holder.get("usage"))
        if count_or_none(usage.get("output_tokens")) is None:
            known = self.meter.usage or Usage()
            holder["usage"] = dict(given(**usage), output_tokens=known.output)
            if kind == "message_start":
                holder["usage"].setdefault("input_tokens", known.input)
        return before != (holder.get("model"), holder.get("usage"))

    def _told_failure(self, event: Json, raw: bytes) -> bytes:
        """The upstream's own words stay where its type is the one of Anthropic."""
        error = told_error(event)
        inner = as_object(event.get("error"))
        is_own = event.get("type") == "error" and inner.get("type") == error.types()[1]
        return self._fail(error, raw if is_own and not error.overflow else b"")


class Messages(Dialect):
    """POST /v1/messages, Anthropic's shape.  The backend behind a model changes from request to
    request and differs in strictness, so everything that one of them refuses is left out."""

    name, path = "messages", "/v1/messages"
    counts_tokens = True
    tells_prompt_first = True
    unique_call_ids = True
    stop_key = "stop_sequences"
    system_key = "system"
    own_parts = frozenset(
        (
            "text",
            "image",
            "document",
            "tool_use",
            "tool_result",
            "thinking",
            "redacted_thinking",
            "server_tool_use",
            "web_search_tool_result",
        )
    )
    cache_mark = "cache_control"
    schema_key = "input_schema"
    shared_fields = ()
    substitutes = ("responses", "chat")
    STOP_REASONS = (
        ("end_turn", "stop"),
        ("max_tokens", "length"),
        ("tool_use", "tool_use"),
        ("stop_sequence", "stop_sequence"),
        ("refusal", "refusal"),
        ("pause_turn", "pause"),
        ("model_context_window_exceeded", "length"),
    )
    keepalive = b'event: ping\ndata: {"type":"ping"}\n\n'

    def error_body(self, error: ProxyError, request_id: str) -> Json:
        text = str(error)
        if error.overflow:  # Claude Code compacts at these words
            if error.overflow[0]:
                text = "prompt is too long: %d tokens > %d maximum" % error.overflow
            else:
                text = "prompt is too long (%s)" % text
        inner: Json = {"type": error.types()[1], "message": text}
        if error.details:
            inner["details"] = error.details
        body: Json = {"type": "error", "error": inner}
        if request_id:
            body["request_id"] = request_id
        return body

    def error_frame(self, error: ProxyError) -> bytes:
        return Frame("error", dumps(self.error_body(error, ""))).encode()

    def prepare(self, edit: Edit, model: Model) -> None:
        body = edit.body
        if "thread" in body:
            raise BadRequest(
                "threads are not supported: send the full history",
                details={"error_code": "thread_unsupported_request"},
            )

        for key in _REFUSED_FIELDS:
            if key != "context_management" or not model.can("context_editing"):
                edit.drop(body, key, "refused upstream" if body.get(key) else "")
        messages = check_list(body, "messages")
        self._prepare_system(edit)
        if any(m.get("role") == "system" for m in messages):
            edit.replace(body, "messages", self._fold_system_turns(messages))
        for at, message in enumerate(body["messages"]):
            if isinstance(message.get("content"), list):
                blocks = [self._fit_block(edit, b, at) for b in message["content"]]
                edit.replace(message, "content", [b for b in blocks if b is not None])

        self._drop_empty_turns(edit)
        offered: tuple[str, ...] = ("custom", SEARCH_TOOLS)
        refused: tuple[str, ...] = _REFUSED_TOOL_FIELDS
        if model.can("tool_search"):
            offered += (TOOL_SEARCH,)
            refused = tuple(key for key in refused if key != "defer_loading")
        prepare_tools(
            edit,
            lambda tool: str(tool.get("type") or "custom").startswith(offered),
            *refused,
        )  # no search upstream: that is told

        self._prepare_cache_marks(edit)
        self._prepare_max_tokens(edit, model)
        self._prepare_thinking(edit, model)
        self._prepare_sampling(edit, model)
        if model.version >= (4, 6):  # these refuse prefill
            end_with_user(edit)

    def betas(self, body: Json) -> list[str]:
        tools = dicts_in(body, "tools")
        if "context_management" in body:
            needed = [CONTEXT_BETA]
        else:
            needed = []
        if any("defer_loading" in tool for tool in tools):
            needed.append(TOOL_BETA)
        return needed

    @staticmethod
    def cache_marks(body: Json) -> list[Json]:
        """All `cache_control` objects that are there."""
        holders = [*dicts_in(body, "tools"), *dicts_in(body, "system")]
        holders += content_parts(body)
        return [as_object(holder.get("cache_control")) for holder in holders]

    @staticmethod
    def prepare_count(edit: Edit) -> None:
        """What prepare has made, for count_tokens: it takes fewer fields."""
        for key in [k for k in edit.body if k not in _COUNTED_FIELDS]:
            edit.drop(edit.body, key)

    @staticmethod
    def _prepare_system(edit: Edit) -> None:
        body = edit.body
        if isinstance(body.get("system"), str):
            edit.set(body, "system", [{"type": "text", "text": body["system"]}])
        if body.get("system") is None:
            blocks = []
        else:
            blocks = check_list(body, "system")
        kept = [b for b in blocks if text_of([b]).strip()]
        if kept:
            edit.replace(body, "system", kept)
        else:
            edit.drop(body, "system")

    @staticmethod
    def _drop_empty_turns(edit: Edit) -> None:
        """Claude refuses turns without a word.  A system text alone becomes the user's turn."""
        body = edit.body
        kept: list[Json] = []
        for message in body["messages"]:
            content = message.get("content")
            is_blank = isinstance(content, str) and not content.strip()
            if content and not is_blank:
                kept.append(message)
        if not kept and body.get("system"):
            system = edit.drop(body, "system")
        else:
            system = None
        if system:
            kept.append({"role": "user", "content": system})
        if kept:
            edit.replace(body, "messages", kept)

    @staticmethod
    def _as_reminder(block: Any) -> Any:
        """A system text between turns, marked so that it is not taken for the user's own words."""
        text = as_object(block).get("text")
        if not isinstance(text, str) or text.lstrip().startswith("<system-reminder>"):
            return block
        return dict(block, text="<system-reminder>\n%s\n</system-reminder>" % text)

    @staticmethod
    def _fold_system_turns(messages: list[Json]) -> list[Json]:
        """Newer Claude Code writes system turns between the others: they become part of the next
        user turn, behind its tool results, or a user turn of their own."""
        folded: list[Json] = []
        waiting: list[Json] = []
        for message in messages + [{"role": "end"}]:
            blocks = _as_blocks(message.get("content"))
            if message.get("role") == "system":
                waiting += [Messages._as_reminder(block) for block in blocks]
                continue
            if waiting and message.get("role") == "user":
                message = dict(message, content=blocks + waiting)
            elif waiting:
                folded.append({"role": "user", "content": waiting})
            folded.append(message)
            waiting = []
        return folded[:-1]

    @staticmethod
    def _fit_block(edit: Edit, block: Any, at: int) -> Json | None:
        """The block as every backend takes it, None for one that says nothing."""
        place = "messages[%d].content" % at
        if not isinstance(block, dict):
            raise BadRequest("'%s' must hold objects" % place, param=place)
        kind = str(block.get("type"))
        if kind == "text":
            if str(block.get("text") or "").strip():
                return block
            return None
        if kind == "thinking":
            signature, text = block.get("signature"), block.get("thinking")
            if is_packed(signature):
                edit.lose("reasoning", FOREIGN_STATE)
            native = isinstance(signature, str) and signature and "@" not in signature
            # newer models sign thinking whose text they do not show
            if native and text != "Thinking..." and not is_packed(signature):
                return block
            return None

        for inner in (
            walk_objects(block) if kind in ("image", "document", "tool_result") else ()
        ):
            if inner.get("type") in ("url", "file") and (
                "url" in inner or "file_id" in inner
            ):
                raise BadRequest(
                    "images and documents by URL or file id are not supported by the "
                    "upstream: send them as base64, or start the proxy with "
                    "--fetch-images (images only)",
                    param=place,
                )

        if kind == "server_tool_use" or kind.endswith("_tool_result"):
            edit.lose(kind, "sent as text")
            shown = dumps(block.get("input", block.get("content"))).decode(
                "utf-8", "replace"
            )
            return {"type": "text", "text": "[%s] %s" % (kind, shown)}

        if kind == "tool_result" and isinstance(block.get("content"), list):
            Messages._fit_result(edit, block)
        return block

    @staticmethod
    def _fit_result(edit: Edit, block: Json) -> None:
        """Parts of a result: without empty texts, and a cache mark only on the whole result."""
        kept: list[Any] = []
        for part in block["content"]:
            if not isinstance(part, dict):
                continue
            mark = edit.drop(part, "cache_control")
            if mark:
                edit.set(block, "cache_control", mark)
            if part.get("type") != "text" or part.get("text"):
                kept.append(part)
        edit.replace(block, "content", kept)

    @staticmethod
    def _prepare_cache_marks(edit: Edit) -> None:
        """Every mark plain, none on thinking, the last four only: more is refused."""
        said = [b for m in edit.body["messages"] for b in as_list(m.get("content"))]
        said = [inner for b in said for inner in [b] + as_list(b.get("content"))]
        marked = [
            b
            for b in as_list(edit.body.get("tools"))
            + as_list(edit.body.get("system"))
            + said
            if "cache_control" in as_object(b)
        ]

        for block in marked:
            mark = block["cache_control"]
            ttl = as_object(mark).get("ttl")
            plain = given(**EPHEMERAL, ttl=ttl if ttl in CACHE_TIMES else None)
            edit.set(block, "cache_control", plain if isinstance(mark, dict) else None)
            if block["cache_control"] is None or "thinking" in str(block.get("type")):
                edit.drop(block, "cache_control")

        for block in [b for b in marked if "cache_control" in b][:-4]:
            edit.drop(block, "cache_control", "more than four marks")

    def _prepare_thinking(self, edit: Edit, model: Model) -> None:
        """Adaptive or with a budget, as the model takes it; see also `EFFORT_BUDGETS`."""
        body = edit.body
        thinking = as_object(body.get("thinking"))
        kind = thinking.get("type")
        edit.drop(thinking, "budget_tokens_max")
        adaptive = model.supports.get("adaptive_thinking") is True
        most = count_or_zero(model.supports.get("max_thinking_budget"))
        only_adaptive = adaptive and (model.version >= (4, 7) or not most)

        if not (adaptive or most):
            edit.drop(body, "thinking", "the model does not think" if thinking else "")
        elif kind == "enabled" and only_adaptive:
            think_adaptively(edit)
        elif kind in ("enabled", "adaptive") and not (kind == "adaptive" and adaptive):
            think_within_budget(edit, model)

        config = as_object(body.get("output_config"))
        if "effort" in config and model.efforts:
            edit.set(
                config, "effort", clamp_effort(str(config["effort"]), model.efforts)
            )
        elif "effort" in config:
            edit.drop(config, "effort", "the model has no efforts")
            if not config:
                edit.drop(body, "output_config")

    @staticmethod
    def _prepare_max_tokens(edit: Edit, model: Model) -> None:
        body = edit.body
        most = model.limit("max_output_tokens")
        wish = body.get("max_tokens")
        if wish is None and most:
            edit.set(body, "max_tokens", model.output_cap(body.get("stream") is True))
        elif isinstance(wish, int) and most and wish > most:
            edit.set(body, "max_tokens", most)

    @staticmethod
    def _prepare_sampling(edit: Edit, model: Model) -> None:
        body = edit.body
        if as_object(body.get("thinking")).get("type") in ("enabled", "adaptive"):
            if body.get("temperature") != 1:
                edit.drop(body, "temperature", "not with thinking")
            edit.drop(body, "top_p", "not with thinking")
            edit.drop(body, "top_k", "not with thinking")
        elif "temperature" in body and "top_p" in body and model.version >= (4, 5):
            edit.drop(body, "top_p", "not beside temperature")

    def own_tool(self, tool: Json) -> Json:
        freeform, function = freeform_of(tool), function_of(tool)
        if freeform:
            return given(
                name=freeform.get("name"),
                input_schema=FREEFORM_SCHEMA,
                description=freeform_description(freeform) or None,
            )
        if not function or "input_schema" in tool:
            return client_tool(tool) or tool
        return given(
            name=function.get("name"),
            description=function.get("description"),
            input_schema=function.get("parameters") or {"type": "object"},
            cache_control=tool.get("cache_control"),
        )

    def own_choice(self, choice: Any) -> Any:
        wish = choice_of(choice)
        is_own = isinstance(choice, dict) and choice.get("type") not in (
            "function",
            "required",
        )
        if wish is None or is_own:
            return choice
        if isinstance(wish, Named):
            return {"type": "tool", "name": wish.name}
        return {"type": "any" if wish == "required" else wish}

    def is_in_shape(self, item: Any) -> bool:
        if (
            type(item) is not dict
            or "tool_calls" in item
            or item.get("role") not in _PLAIN_ROLES
        ):
            return False
        content = item.get("content")
        if not _has_parts(content, _SHAPED_BLOCKS):
            return False
        results = [
            block for block in as_list(content) if block["type"] == "tool_result"
        ]
        return all(
            _has_parts(result.get("content", ""), ("text",)) for result in results
        )

    def takes_stops(self, stops: list[str], model: Model) -> bool:
        return all(stop.strip() for stop in stops)  # white space alone is refused

    def write_part(self, part: Part, by_model: bool) -> Json:
        block = self.block(part)
        if part.cache:
            return dict(block, cache_control=EPHEMERAL)
        return block

    def tool_steps(self, item: Json) -> list[ToolStep]:
        role, content = item.get("role"), item.get("content")
        if isinstance(content, list):
            blocks = content
        else:
            blocks = []
        has_results = any(block.get("type") == "tool_result" for block in blocks)
        if role != "user" or not has_results:
            calls = [
                str(block.get("id"))
                for block in blocks
                if block.get("type") == "tool_use"
            ]
            return [ToolStep(item, calls, None, role == "system")]

        # Each block of a turn with results is a step, and so is the end of the turn: all results
        # of one round must be in one turn.
        steps = [
            ToolStep({"role": role, "content": [block]}, (), self._answered_call(block))
            for block in blocks
        ]
        return steps + [ToolStep({})]

    @staticmethod
    def _answered_call(block: Json) -> str | None:
        """The id of the call whose result a block is."""
        if block.get("type") == "tool_result":
            return str(block.get("tool_use_id"))
        return None

    def missing_result(self, item: Json, call_id: str) -> Json:
        result = {
            "type": "tool_result",
            "tool_use_id": call_id,
            "content": INTERRUPTED,
            "is_error": True,
        }
        return {"role": "user", "content": [result]}

    def result_content(self, item: Json) -> Any:
        return item["content"][0].get("content")

    def join_user_turns(self, items: Iterable[Json]) -> list[Json]:
        joined: list[Json] = []
        is_ours = False  # the last one: not the client's own list
        for item in items:
            if (
                joined
                and item.get("role") == "user"
                and joined[-1].get("role") == "user"
            ):
                if not is_ours:
                    blocks = list(_as_blocks(joined[-1].get("content")))
                    joined[-1] = {"role": "user", "content": blocks}
                    is_ours = True
                joined[-1]["content"] += _as_blocks(item.get("content"))
            elif item:
                joined.append(item)
                is_ours = False
        return joined

    def fit_cache(self, edit: Edit, model: Model) -> None:
        if not model.is_claude:
            return
        messages = dicts_in(edit.body, "messages")
        tools = [  # those that are found later may have no mark
            tool for tool in dicts_in(edit.body, "tools") if "defer_loading" not in tool
        ]
        system = dicts_in(edit.body, "system")
        marked = [
            target
            for target in [*tools, *system, *messages]
            if self.cache_mark in target
        ]
        latest_first = {"messages": messages[::-1]}  # clients mark the end
        if marked or any(
            self.cache_mark in part for part in content_parts(latest_first)
        ):
            drop_surplus_marks(edit, marked, self.cache_mark)
            return

        turns = last_user_turns(messages)
        for turn in turns:
            edit.set(turn, "content", _as_blocks(turn.get("content")))
        ends = [block for turn in turns for block in turn["content"][-1:]]
        for target in [*tools[-1:], *system[-1:], *ends]:
            edit.set(target, self.cache_mark, EPHEMERAL)

    def mend(self, answer: Json, asked: str, request: Request | None = None) -> bool:
        changed = answer.get("model") != asked
        answer["model"] = asked
        return changed

    # -- to and from neutral words.  System turns at the head become `system`; `prepare` folds later
    # -- ones into the next user turn.

    def decode_request(self, body: Json) -> Request:
        if "thread" in body:
            self.prepare(Edit(body), Model(""))  # refuses it as clients want
        request = read_fields(self, body, "messages system")
        thinking = as_object(body.get("thinking")).get("type")
        request.hides_thinking = thinking in (None, "disabled")
        if thinking == "disabled":
            request.effort = "none"
        choice = as_object(body.get("tool_choice"))
        if choice.get("type") == "tool":
            request.tool_choice = Named(str(choice.get("name")))
        else:
            request.tool_choice = {
                "auto": "auto",
                "any": "required",
                "none": "none",
            }.get(str(choice.get("type")))

        if choice.get("disable_parallel_tool_use"):
            request.parallel_tool_calls = False
        system = read_content(body.get("system"), "system", request)
        if system:
            request.add_turn("system", system)
        for at, message in enumerate(check_list(body, "messages")):
            self.read_turn(request, message, "messages[%d]" % at)
        return request

    def read_turn(self, request: Request, item: Json, place: str) -> None:
        role = item.get("role")
        if role not in ("user", "assistant", "system"):
            raise BadRequest("'%s.role' must be user or assistant" % place, param=place)
        request.add_turn(role, read_content(item.get("content"), place, request))

    def read_tool(self, tool: Json, request: Request) -> None:
        shown = client_tool(tool) or tool
        if shown.get("type") in (None, "custom"):
            add_tool(
                request, shown, "input_schema", cache=bool(tool.get("cache_control"))
            )
        else:
            drop_hosted_tool(request, tool)

    def read_answer_block(self, block: Json) -> list[Part]:
        """The parts of one block of an answer; unknown ones have none."""
        if block.get("type") not in (
            "text",
            "thinking",
            "redacted_thinking",
            "tool_use",
        ):
            return []
        if block.get("type") == "text":  # also an empty one, which deltas fill
            citations = tuple(citations_of(block.get("citations")))
            return [Text(str(block.get("text") or ""), citations=citations)]
        return read_part(block, "content", Request(""))

    def encode_request(self, request: Request, model: Model) -> Json:
        preflight(request, model)
        tools, choice, schema = offered_tools(request, model, False)
        leading, turns = split_system(request.turns)
        system = [
            block
            for turn in leading
            for block in self._write_blocks(turn.parts, request)
        ]

        cap = model.output_cap(request.stream is True) or FALLBACK_MAX_TOKENS
        temperature = request.temperature
        if temperature is not None and temperature > 1:
            request.lose("temperature", "above 1")
            temperature = 1

        thinking = self._write_thinking(request, model, choice)
        body = write_fields(
            self,
            request,
            model,
            temperature=temperature,
            thinking_budget=None,
            stop=upstream_stops(self, request, model),
            max_output_tokens=request.max_output_tokens or cap,
            output_schema=schema
            and {"type": "json_schema", "schema": schema.get("schema")},
            effort=fit_effort(request, model) if thinking and model.efforts else None,
        )

        body.update(
            given(system=system or None, thinking=thinking or None),
            messages=self.write_turns(turns, request, model),
        )

        if tools:
            body["tools"] = [
                given(
                    name=tool.name,
                    description=tool.description,
                    cache_control=EPHEMERAL if tool.cache else None,
                    input_schema=tool.parameters
                    or {"type": "object", "properties": {}},
                )
                for tool in tools
            ]

            written = {"type": {"required": "any"}.get(str(choice), choice or "auto")}
            if isinstance(choice, Named):
                written = {"type": "tool", "name": choice.name}
            if request.parallel_tool_calls is False and choice != "none":
                body["tool_choice"] = dict(written, disable_parallel_tool_use=True)
            elif choice:
                body["tool_choice"] = written

        return body

    @staticmethod
    def _write_thinking(
        request: Request, model: Model, choice: str | Named | None
    ) -> Json:
        """As the wish was; `prepare` makes it adaptive or a budget, as the model takes it."""
        thinking: Json = {}
        if request.thinking_budget:
            thinking = {"type": "enabled", "budget_tokens": request.thinking_budget}
        elif request.effort not in (None, "none", "minimal"):
            thinking = {"type": "adaptive"}
            if model.version >= (4, 7):
                thinking["display"] = "summarized"  # hidden otherwise
        if thinking and (isinstance(choice, Named) or choice == "required"):
            request.lose("thinking", "not while a tool call is demanded")
            return {}
        return thinking

    def write_turns(
        self, turns: list[Turn], request: Request, model: Model
    ) -> list[Json]:
        """Turns of one role in a row become one message."""
        messages: list[Json] = []
        for turn in turns:
            content = self._write_blocks(
                usable_parts(turn, request, self.name), request
            )
            if messages and messages[-1]["role"] == turn.role:
                messages[-1]["content"] += content
            elif content:
                messages.append({"role": turn.role, "content": content})
        return messages

    def _write_blocks(self, parts: Iterable[Part], request: Request) -> list[Json]:
        blocks = []
        for part in parts:
            block = self.block(part, request)
            if block.get("text") != "":
                if part.cache:
                    block["cache_control"] = EPHEMERAL
                blocks.append(block)
        return blocks

    def block(self, part: Part, request: Request | None = None) -> Json:
        """One content block: for the upstream with a request, for a client without."""
        if isinstance(part, ToolCall):
            return {
                "type": "tool_use",
                "id": fit_call_id(part.id) if request else part.id,
                "name": part.name,
                "input": arguments_object(part.arguments),
            }

        if isinstance(part, Reasoning):
            state = client_state(part, self.name)
            if part.redacted and part.minted_by == self.name:
                return {"type": "redacted_thinking", "data": state}
            return {
                "type": "thinking",
                "thinking": part.text,
                "signature": state or pack_opaque("", None, ""),
            }

        if isinstance(part, ToolResult) and request:
            content = self._write_blocks(part.parts, request)
            return given(
                type="tool_result",
                tool_use_id=fit_call_id(part.call_id),
                content=content or None,
                is_error=part.is_error or None,
            )

        if not isinstance(part, (Image, Document)):
            if isinstance(part, Text):
                citations = part.citations
            else:
                citations = ()
            return given(
                type="text",
                text=plain_text(part),
                citations=[self.citation(one) for one in citations] or None,
            )

        source = {"type": "base64", "media_type": part.media_type, "data": part.data}
        if part.url:
            source = {"type": "url", "url": part.url}
        if isinstance(part, Image):
            return {"type": "image", "source": source}
        if part.text:
            source = {"type": "text", "media_type": "text/plain", "data": part.text}
        return given(type="document", source=source, title=part.title)

    def encode_response(self, response: Response, request: Request) -> Json:
        return {
            "id": client_id("msg_", response.id, request),
            "type": "message",
            "role": "assistant",
            "model": request.model,
            "content": [self.block(part) for part in response.parts],
            "stop_reason": self.TO_WIRE.get(response.stop, "end_turn"),
            "stop_sequence": response.stop_sequence,
            "usage": self.usage(response.usage or Usage()),
        }

    @staticmethod
    def citation(citation: Citation) -> Json:
        """As the upstream's own search would cite it."""
        return {
            "type": "web_search_result_location",
            "url": citation.url,
            "encrypted_index": "",
            "title": citation.title,
            "cited_text": citation.quote or "",
        }

    @staticmethod
    def usage(usage: Usage) -> Json:
        """Token counts in the words of Messages."""
        return {
            "input_tokens": usage.input,
            "cache_read_input_tokens": usage.cache_read,
            "cache_creation_input_tokens": usage.cache_write,
            "output_tokens": usage.output,
        }


class MessagesDecoder(StreamDecoder):
    """Anthropic's events.  Usage is cumulative: later counts replace earlier ones."""

    TEXT_KEYS = (b'"text":', b'"thinking":', b'"partial_json":')
    DELTAS: ClassVar = {
        "text_delta": "text",
        "thinking_delta": "thinking",
        "input_json_delta": "partial_json",
    }

    def __init__(self, dialect: Any) -> None:
        super().__init__(dialect)
        self._states: dict[int, list[str]] = {}  # our index -> pieces of the signature
        self._ending: Json = {}  # stop_reason and stop_sequence

    def _read_event(self, event: Json) -> None:
        kind, at = event.get("type"), count_or_zero(event.get("index"))
        if kind == "content_block_delta":
            self._read_delta(self._slots.get(at, -1), as_object(event.get("delta")))
        elif kind == "content_block_start":
            self._read_block(at, as_object(event.get("content_block")))
        elif kind == "content_block_stop":
            self._read_block_end(at)
        elif kind == "message_start":
            self._read_message(as_object(event.get("message")))
        elif kind == "message_delta":
            self._ending = as_object(event.get("delta"))
        elif kind == "message":  # a whole answer
            self._read_message(event)
            self._read_end()
        elif kind == "message_stop":
            self._read_end()
        elif kind == "error" or isinstance(event.get("error"), dict):
            self._fail(told_error(event))

    def _read_message(self, message: Json) -> None:
        self._start(message)
        for at, block in enumerate(as_list(message.get("content"))):
            self._read_block(at, as_object(block))
            self._read_block_end(at)
        self._ending = message

    def _read_delta(self, index: int, delta: Json) -> None:
        kind = delta.get("type")
        if index not in self._open:
            return
        if kind == "signature_delta":
            self._states[index].append(str(delta.get("signature")))
        elif kind == "citations_delta":
            self._cite(index, citation_of(delta.get("citation")))
        else:
            self._delta(index, delta.get(self.DELTAS.get(str(kind), "")))

    def _read_block(self, at: int, block: Json) -> None:
        """A block begins; one that neither text nor thinking nor call is has no part."""
        parts = self.dialect.read_answer_block(block)
        if block.get("type") == "thinking":  # also an empty one, which deltas fill
            parts = [Reasoning(str(block.get("thinking") or ""))]
        self._slots[at] = index = self._begin(skeleton(parts[0])) if parts else -1
        self._states[index] = [str(block.get("signature") or "")]
        if not parts:
            return

        has_words = block.get("type") != "tool_use" or block.get("input")
        self._delta(index, text_in(parts[0]) if has_words else "")
        if isinstance(parts[0], Text):
            self._cite(index, parts[0].citations)

    def _read_block_end(self, at: int) -> None:
        index = self._slots.get(at, -1)
        self._end(index, "".join(self._states.get(index, ())), "messages")

    def _read_end(self) -> None:
        self._stop(
            str(self._ending.get("stop_reason")),
            word(self._ending.get("stop_sequence")),
        )


class MessagesEncoder(StreamEncoder):
    """One block after another: while one is open the events of others wait.  A thinking block has
    exactly one signature, behind its text."""

    def __init__(self, dialect: Messages, request: Request) -> None:
        super().__init__(dialect, request)
        self._active = -1  # the part whose block is open
        self._count = 0  # blocks so far
        self._waiting: dict[
            int, list[Event]
        ] = {}  # held back, in the order of their starts
        self._thinking: Reasoning | None = None  # the open block, if it is one

    def _event(self, kind: str, **fields: Any) -> bytes:
        return Frame(kind, dumps(dict({"type": kind}, **fields))).encode()

    def _start(self, event: ResponseStart) -> bytes:
        return self._event(
            "message_start",
            message={
                "id": client_id("msg_", event.id, self.request),
                "type": "message",
                "role": "assistant",
                "model": self.request.model,
                "content": [],
                "stop_reason": None,
                "stop_sequence": None,
                "usage": self.dialect.usage(self._usage(None)),
            },
        )

    def _usage(self, reported: Usage | None) -> Usage:
        """What was reported, else what can be foreseen: Claude Code shows it from the start."""
        return reported or Usage(input=self.request.prompt_tokens)

    def feed(self, event: Event) -> bytes:
        """Bytes for an event, none while it has to wait."""
        index = getattr(event, "index", self._active)
        if isinstance(event, PartStart) and self._active >= 0:
            self._waiting[index] = []
        if index in self._waiting:
            self._waiting[index].append(event)
            return b""
        out = [super().feed(event)]
        while (
            self._waiting and self._active < 0
        ):  # the next part, those behind it if whole
            out += map(super().feed, self._waiting.pop(next(iter(self._waiting))))
        if len(out) == 1:
            return out[0]
        return b"".join(out)

    def _begin(self, event: PartStart) -> bytes:
        part, block = event.part, self.dialect.block(event.part)
        self._active, at = event.index, self._count
        self._count += 1
        self._thinking = None
        kind, key = "text_delta", "text"
        if block["type"] == "thinking" and isinstance(part, Reasoning):
            kind, key, self._thinking = "thinking_delta", "thinking", part
            block["signature"] = ""
        elif block["type"] == "tool_use":
            kind, key, block["input"] = "input_json_delta", "partial_json", {}
        delta = self._event(
            "content_block_delta", index=at, delta={"type": kind, key: self.MARK}
        )
        self._frames[event.index] = delta.split(self.QUOTED_MARK)
        return self._event("content_block_start", index=at, content_block=block)

    def _cite(self, event: PartCitation) -> bytes:
        return self._event(
            "content_block_delta",
            index=self._count - 1,
            delta={
                "type": "citations_delta",
                "citation": self.dialect.citation(event.citation),
            },
        )

    def _sign(self, event: PartSignature) -> bytes:
        self._thinking = Reasoning("", event.signature, event.id, event.minted_by)
        return b""

    def _end(self, event: PartEnd) -> bytes:
        at, out = self._count - 1, b""
        if self._thinking is not None:
            signature = self.dialect.block(self._thinking)["signature"]
            out = self._event(
                "content_block_delta",
                index=at,
                delta={"type": "signature_delta", "signature": signature},
            )
        self._active = -1
        return out + self._event("content_block_stop", index=at)

    def _stop(self, event: ResponseEnd) -> bytes:
        self.ended = True
        delta = {
            "stop_reason": self.dialect.TO_WIRE.get(event.stop, "end_turn"),
            "stop_sequence": event.stop_sequence,
        }
        usage = self.dialect.usage(self._usage(event.usage))
        return self._event("message_delta", delta=delta, usage=usage) + self._event(
            "message_stop"
        )


def _as_blocks(content: Any) -> list[Any]:
    """'a' -> [{"type": "text", "text": "a"}]; a list stays."""
    if isinstance(content, str):
        if content:
            return [{"type": "text", "text": content}]
        return []
    return as_list(content)


def filter_betas(value: str) -> str:
    """The `anthropic-beta` values that the upstream knows.  'a-1,interleaved-thinking-2' -> ..."""
    wanted = [beta.strip() for beta in value.split(",")]
    return ",".join(beta for beta in wanted if beta.startswith(BETA_PREFIXES))


# ---- Gemini and Ollama: dialects of clients alone ----
# No upstream speaks them: they read requests and write answers, and the hub does the rest.


class ClientDialect(Dialect):
    """What the dialects of clients alone have in common."""

    shared_fields = ()
    substitutes = ("messages", "responses", "chat")

    def __init__(self, encoder: type[StreamEncoder]) -> None:
        super().__init__(StreamRelay, StreamDecoder, encoder)


class WholeCalls:
    """Calls whose arguments come in pieces, for clients that read them in one piece: they are
    given out in the order of their beginnings."""

    def __init__(self) -> None:
        self._calls: dict[int, ToolCall] = {}
        self._pieces: dict[int, list[str]] = {}
        self._is_open: set[int] = set()

    def __bool__(self) -> bool:
        return bool(self._calls)

    def __contains__(self, index: int) -> bool:
        return index in self._calls

    def begin(self, index: int, call: ToolCall) -> None:
        self._calls[index], self._pieces[index] = call, []
        self._is_open.add(index)

    def add(self, index: int, text: str) -> None:
        self._pieces[index].append(text)

    def end(self, index: int) -> list[ToolCall]:
        """The calls that are whole by now and behind no open one."""
        self._is_open.discard(index)
        whole: list[ToolCall] = []
        while self._calls:
            first = next(iter(self._calls))
            if first in self._is_open:
                break
            call, pieces = self._calls.pop(first), self._pieces.pop(first)
            whole.append(replace(call, arguments="".join(pieces)))
        return whole


def standard_base64(text: str) -> str:
    """Base64 of the alphabet for URLs, which Google's SDKs write, in the usual one, and padded."""
    text = text.strip().rstrip("=").replace("-", "+").replace("_", "/")
    return text + "=" * (-len(text) % 4)


def decode_base64(text: str, place: str) -> str:
    """The text inside.  Raises BadRequest."""
    try:
        return base64.b64decode(standard_base64(text)).decode("utf-8", "replace")
    except ValueError:
        raise BadRequest("'%s' is not valid base64" % place, param=place) from None


def media_parts(
    media_type: str, data: str, title: str | None, place: str
) -> list[Part]:
    """An image or a document that came as base64.  Raises BadRequest for sound and film."""
    data = standard_base64(data)
    kind = image_type(data, media_type)

    if not data or not kind:
        raise BadRequest(
            "'%s' must hold a media type and base64 data" % place, param=place
        )

    if kind.startswith("image/"):
        return [Image(kind, data)]
    if kind.startswith(("audio/", "video/")):
        raise BadRequest(
            "'%s': content of type '%s' cannot be given to this model"
            % (place, printable(kind, 60)),
            param=place,
        )

    if kind.startswith("text/") or kind == "application/json":
        return [Document(kind, text=decode_base64(data, place), title=title)]
    return [Document(kind, data, title=title)]


def text_parts(text: Any) -> list[Part]:
    """One text, none for '' and what is no text."""
    words_ = word(text)
    if words_ is None:
        return []
    return [Text(words_)]


def camel_case(name: str) -> str:
    """'generation_config' -> 'generationConfig'"""
    if "_" not in name or name.startswith("_"):
        return name
    head, *rest = name.split("_")
    return head + "".join(piece[:1].upper() + piece[1:] for piece in rest)


#: fields of Gemini's requests whose keys are the client's own
_OWN_KEYS = frozenset(
    (
        "args",
        "response",
        "parameters",
        "parametersJsonSchema",
        "responseSchema",
        "responseJsonSchema",
        "labels",
    )
)


def camel_keys(body: Json) -> Json:
    """A copy with keys in camelCase: Google's API takes them in snake_case, too."""
    whole: Json = {}
    todo: list[tuple[Any, Any]] = [(body, whole)]

    def copy_of(value: Any) -> Any:
        if not isinstance(value, (dict, list)):
            return value
        made = type(value)()
        todo.append((value, made))
        return made

    while todo:
        source, target = todo.pop()
        if isinstance(source, list):
            target.extend(map(copy_of, source))
            continue
        for key, value in source.items():
            name = camel_case(key)
            if name in _OWN_KEYS:
                target.setdefault(name, value)
            elif name not in target:
                target[name] = copy_of(value)
    return whole


_SCHEMA_COUNTS = (
    "minItems",
    "maxItems",
    "minLength",
    "maxLength",
    "minProperties",
    "maxProperties",
)


def _schema_type(value: Any) -> Any:
    """'STRING' -> 'string'; None for the type that says nothing."""
    if isinstance(value, list):
        return [str(kind).lower() for kind in value]
    kind = str(value).lower()
    if kind == "type_unspecified":
        return None
    return kind


def _allow_null(schema: Json) -> None:
    if isinstance(schema.get("type"), str):
        schema["type"] = [schema["type"], "null"]
    elif isinstance(schema.get("anyOf"), list):
        schema["anyOf"].append({"type": "null"})
    if isinstance(schema.get("enum"), list):
        schema["enum"] = [*schema["enum"], None]


def json_schema_of(schema: Json) -> Json:
    """Google's schema, a piece of OpenAPI, as a JSON schema: types in lower case, `nullable` as a
    type, counts as numbers.  {"type": "STRING", "nullable": true} -> {"type": ["string", "null"]}
    """
    whole: Json = {}
    todo: list[tuple[Json, Json]] = [(schema, whole)]

    def convert(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        made: Json = {}
        todo.append((value, made))
        return made

    while todo:
        source, target = todo.pop()
        for key, value in source.items():
            name = camel_case(key)
            if name in ("nullable", "propertyOrdering", "example") or value is None:
                continue
            if name == "type":
                target.update(given(type=_schema_type(value)))
            elif name in ("properties", "defs", "$defs") and isinstance(value, dict):
                target[name] = {own: convert(inner) for own, inner in value.items()}
            elif name in ("anyOf", "oneOf", "allOf", "prefixItems"):
                target[name] = [convert(inner) for inner in as_list(value)]
            elif name in ("items", "additionalProperties", "not"):
                target[name] = convert(value)
            elif name in _SCHEMA_COUNTS and isinstance(value, str):
                target.update(given(**{name: digits_or_none(value)}))
            elif (name, value) != ("format", "enum"):
                target[name] = value
        if source.get("nullable") is True:
            _allow_null(target)
    return whole


# ---- Gemini ----

NO_SIGNATURE = (
    "skip_thought_signature_validator"  # what Google has clients write for: none
)
SIGNED_TEXT = "text"  # in a packed state: the words that the state before it signs
_UPSTREAM_NAMES = ("chat", "responses", "messages")  # of the dialects that mint state
_GEMINI_ROLES = {
    "user": "user",
    "function": "user",
    "tool": "user",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_GEMINI_CONFIG = (
    "temperature",
    "topP",
    "topK",
    "maxOutputTokens",
    "stopSequences",
    "candidateCount",
    "responseMimeType",
    "responseSchema",
    "responseJsonSchema",
    "seed",
    "presencePenalty",
    "frequencyPenalty",
    "thinkingConfig",
    "responseModalities",
)
_GEMINI_BESIDE = frozenset(
    ("thought", "thoughtSignature", "videoMetadata", "mediaResolution", "partMetadata")
)  # in a part, beside what it holds
_GEMINI_LEVELS = ("minimal", *(name for name, _ in EFFORT_BUDGETS))
USUAL_EFFORT = "medium"  # for a client that wants thinking and does not say how much


def gemini_parts(content: Any) -> list[Any]:
    """The parts of a content: an object with `parts`, a list of parts, one part or a text."""
    if isinstance(content, dict):
        usual = [content]
        if content.keys() <= {"role"}:
            usual = []
        content = content.get("parts", usual)
    if not isinstance(content, list):
        content = [content]
    parts: list[Any] = []
    for piece in content:
        if isinstance(piece, str):
            parts.append({"text": piece})
        elif piece is not None:
            parts.append(piece)
    return parts


def _read_inline(blob: Json, place: str, request: Request) -> list[Part]:
    return media_parts(
        str(blob.get("mimeType") or ""),
        str(blob.get("data") or ""),
        word(blob.get("displayName")),
        place + ".inlineData",
    )


def is_image_address(address: str, kind: str) -> bool:
    """Can this be fetched as an image?  Files that Google stores cannot."""
    is_linked = address.lower().startswith(("https://", "http://"))
    is_stored = "generativelanguage" in address[:MAX_HOST_CHARS]
    return is_linked and not is_stored and kind.lower().startswith("image/")


def _read_linked(file: Json, place: str, request: Request) -> list[Part]:
    """A file by its address.  Only images can be fetched, and only if the user allows that."""
    address = str(file.get("fileUri") or "")
    inline = _DATA_URL.match(address)
    if inline:
        return media_parts(inline.group(1), inline.group(2), None, place + ".fileData")
    if not is_image_address(address, str(file.get("mimeType") or "image/")):
        raise BadRequest(
            "'%s.fileData': files that are stored elsewhere cannot be read: send the file "
            "itself as inlineData" % place,
            param=place,
        )
    return [Image(url=address)]


def _read_function_call(call: Json, place: str, request: Request) -> list[Part]:
    arguments = dumps(as_object(call.get("args"))).decode("utf-8", "surrogatepass")
    return [ToolCall(str(call.get("id") or ""), str(call.get("name") or ""), arguments)]


def _read_function_response(answer: Json, place: str, request: Request) -> list[Part]:
    """A result stands under `output`, a failure under `error`; many tools give another object."""
    value, is_error = answer.get("response"), False
    if isinstance(value, dict) and len(value) == 1:
        ((key, inner),) = value.items()
        if key in ("output", "result", "error"):
            value, is_error = inner, key == "error"
    text = value or ""
    if not isinstance(text, str):
        text = dumps(text).decode("utf-8", "surrogatepass")

    parts = text_parts(text)
    for part in dicts_in(answer, "parts"):
        if isinstance(part.get("inlineData"), dict):
            parts += _read_inline(part["inlineData"], place, request)
        if isinstance(part.get("fileData"), dict):
            parts += _read_linked(part["fileData"], place, request)
    return [
        ToolResult(
            str(answer.get("id") or ""),
            parts,
            is_error,
            name=str(answer.get("name") or ""),
        )
    ]


def _read_code(code: Json, place: str, request: Request) -> list[Part]:
    """Code that Google has run, or what came out: no other vendor knows such parts."""
    request.lose("executableCode", "sent as text")
    text = word(code.get("code", code.get("output")))
    if text is None:
        return []
    return [Text("```\n%s\n```" % text)]


_GEMINI_READERS: dict[str, Callable[[Json, str, Request], list[Part]]] = {
    "inlineData": _read_inline,
    "fileData": _read_linked,
    "functionCall": _read_function_call,
    "functionResponse": _read_function_response,
    "executableCode": _read_code,
    "codeExecutionResult": _read_code,
}

#: what can be asked of a model, as its path names it
GEMINI_METHODS = (
    "generateContent",
    "streamGenerateContent",
    "countTokens",
    "embedContent",
    "batchEmbedContents",
)


class Gemini(ClientDialect):
    """generateContent, Google's shape.

    A model's opaque state goes into the `thoughtSignature` of the part behind the thinking, where
    Google has it: clients drop the thinking itself, and most never ask for it."""

    name, turns_key = "gemini", "contents"
    STOP_REASONS = (
        ("STOP", "stop"),
        ("MAX_TOKENS", "length"),
        ("STOP", "tool_use"),
        ("STOP", "stop_sequence"),
        ("SAFETY", "refusal"),
        ("STOP", "pause"),
    )
    keepalive = b"\n"  # google-genai takes a comment for a broken event

    def error_body(self, error: ProxyError, request_id: str) -> Json:
        """{"error":{"code":429,"message","status":"RESOURCE_EXHAUSTED","details"?}}"""
        text = str(error)

        if error.overflow and error.overflow[0]:
            text = (
                "The input token count (%d) exceeds the maximum number of tokens allowed "
                "(%d)." % error.overflow
            )

        inner: Json = {
            "code": error.status,
            "message": text,
            "status": error.types()[2],
        }

        wait_s = digits_or_none(error.headers.get("retry-after"))

        if wait_s is not None:
            inner["details"] = [
                {
                    "@type": "type.googleapis.com/google.rpc.RetryInfo",
                    "retryDelay": "%ds" % wait_s,
                }
            ]

        return {"error": inner}

    def error_frame(self, error: ProxyError) -> bytes:
        return self.frame(dumps(self.error_body(error, "")))

    def frame(self, data: bytes) -> bytes:
        """One piece of a stream."""
        return b"data: %b\n\n" % data

    def interaction(self, body: Json) -> str:
        last = next(reversed(self._contents(body)), None)
        role = as_object(last).get("role") or "user"
        blocks: list[Json] = []
        for part in map(as_object, gemini_parts(last)):
            block = {"type": "text", "text": part.get("text")}
            if "functionResponse" in part or "function_response" in part:
                block = {"type": "tool_result"}
            blocks.append(block)
        system = body.get("systemInstruction", body.get("system_instruction"))
        return super().interaction(
            {
                "system": gemini_parts(system),
                "messages": [{"role": role, "content": blocks}],
            }
        )

    @staticmethod
    def _contents(body: Json) -> list[Any]:
        """The conversation; one text or one content alone will do, too."""
        contents = body.get("contents")
        if isinstance(contents, (str, dict)):
            return [contents]
        return as_list(contents)

    @staticmethod
    def has_images(body: Json) -> bool:
        for content in Gemini._contents(body):
            for part in map(as_object, gemini_parts(content)):
                result = as_object(
                    part.get("functionResponse", part.get("function_response"))
                )
                for holder in [part, *dicts_in(result, "parts")]:
                    if not holder.keys().isdisjoint(
                        ("inlineData", "inline_data", "fileData", "file_data")
                    ):
                        return True
        return False

    # -- requests

    def decode_request(self, body: Json) -> Request:
        body = camel_keys(body)
        config = as_object(body.get("generationConfig"))
        if body.get("cachedContent"):
            raise BadRequest(
                "'cachedContent' names what is not stored here: send the whole "
                "conversation",
                param="cachedContent",
            )
        if count_or_zero(config.get("candidateCount")) > 1:
            raise BadRequest(
                "'candidateCount' above 1 is not offered: the upstream gives one "
                "answer a request",
                param="candidateCount",
            )
        if any(
            str(kind).upper() != "TEXT"
            for kind in as_list(config.get("responseModalities"))
        ):
            raise BadRequest(
                "'responseModalities': only TEXT is offered", param="responseModalities"
            )
        if isinstance(body.get("tools"), dict):
            body["tools"] = [body["tools"]]

        request = read_fields(
            self, body, "contents systemInstruction toolConfig generationConfig"
        )
        note_unknown(request, config, *_GEMINI_CONFIG)
        thinking = self._thinking(as_object(config.get("thinkingConfig")), request)
        tools, choice = self._choice(as_object(body.get("toolConfig")), request)
        request = replace(
            request,
            tools=tools,
            tool_choice=choice,
            hides_thinking=False,
            output_schema=self._format(config, request),
            **thinking,
        )
        self._read_turns(body, request)
        return request

    def _read_turns(self, body: Json, request: Request) -> None:
        system: list[Part] = []
        for part in gemini_parts(body.get("systemInstruction")):
            system += self._read_part(part, "systemInstruction", request)
        if system:
            request.add_turn("system", system)

        contents = self._contents(body)
        if not contents:
            raise BadRequest("'contents' must be a non-empty array", param="contents")
        for at, item in enumerate(contents):
            place = "contents[%d]" % at
            if isinstance(item, str):
                item = {"parts": [item]}
            if not isinstance(item, dict):
                raise BadRequest("'%s' must be an object" % place, param=place)
            self.read_turn(request, item, place)
        join_thoughts(request.turns)
        pair_by_order(request.turns)

    @staticmethod
    def _thinking(config: Json, request: Request) -> Json:
        """The fields about it.  -1 as budget leaves it to the model, 0 forbids it."""
        effort: str | None = (request.effort or "").lower()
        wants_thoughts = config.get("includeThoughts") is True
        if effort not in _GEMINI_LEVELS:
            effort = None
        if config.get("thinkingBudget") == 0:
            effort = "none"
        elif wants_thoughts and not (effort or request.thinking_budget):
            effort = USUAL_EFFORT
        return {"effort": effort, "wants_thoughts": wants_thoughts}

    @staticmethod
    def _format(config: Json, request: Request) -> Json | None:
        """The schema of the answer, if it is to be JSON."""
        kind = str(config.get("responseMimeType") or "text/plain").lower()
        if kind != "application/json":
            if kind != "text/plain":
                request.lose("responseMimeType", NO_COUNTERPART)
            return None
        schema = config.get("responseJsonSchema")
        if not isinstance(schema, dict) and isinstance(
            config.get("responseSchema"), dict
        ):
            schema = json_schema_of(config["responseSchema"])
        if not isinstance(schema, dict):
            return {"type": "json_object"}
        return {"type": "json_schema", "name": "output", "schema": schema}

    @staticmethod
    def _choice(
        config: Json, request: Request
    ) -> tuple[list[Tool], str | Named | None]:
        """(tools, tool_choice).  A list of allowed functions leaves the others out: it must not
        widen to all."""
        note_unknown(request, config, "functionCallingConfig")
        wish = as_object(config.get("functionCallingConfig"))
        mode = str(wish.get("mode") or "").upper()
        allowed = set(words(wish.get("allowedFunctionNames")))
        choice: str | Named | None = {
            "ANY": "required",
            "NONE": "none",
            "AUTO": "auto",
            "VALIDATED": "auto",
        }.get(mode)
        if mode == "ANY" and not request.tools:
            request.lose("toolConfig", "there are no tools")
        if not allowed or mode == "NONE":
            return request.tools, choice

        tools = [tool for tool in request.tools if tool.name in allowed]
        if not tools:
            raise BadRequest(
                "'allowedFunctionNames' names none of the functions",
                param="allowedFunctionNames",
            )
        if mode == "ANY" and len(tools) == 1:
            choice = Named(tools[0].name)
        return tools, choice

    def read_tool(self, tool: Json, request: Request) -> None:
        for declaration in dicts_in(tool, "functionDeclarations"):
            shown = dict(declaration)
            schema = shown.pop("parametersJsonSchema", None)
            if not isinstance(schema, dict) and isinstance(
                shown.get("parameters"), dict
            ):
                schema = json_schema_of(shown["parameters"])
            shown["parameters"] = as_object(schema) or None
            add_tool(request, shown, "parameters")
        for kind in tool:
            if kind != "functionDeclarations":
                drop_hosted_tool(request, {"type": kind})

    def read_turn(self, request: Request, item: Json, place: str) -> None:
        role = _GEMINI_ROLES.get(str(item.get("role") or "user"))
        if role is None:
            raise BadRequest("'%s.role' must be user or model" % place, param=place)
        turns: list[Turn] = []
        for piece in gemini_parts(item):
            for part in self._read_part(piece, place, request):
                side = role
                if isinstance(part, (ToolCall, Reasoning)):
                    side = "assistant"
                elif isinstance(part, ToolResult):
                    side = "user"
                if not turns or turns[-1].role != side:
                    turns.append(Turn(side, []))
                turns[-1].parts.append(part)
        for turn in turns:
            request.add_turn(turn.role, turn.parts)

    def _read_part(self, part: Any, place: str, request: Request) -> list[Part]:
        """Of a part that is thinking the words; of another the state behind the thinking, then
        what it holds."""
        if not isinstance(part, dict):
            raise BadRequest("'%s.parts' must hold objects" % place, param=place)
        texts = text_parts(part.get("text"))
        state = self._read_signature(part.get("thoughtSignature"), request)
        if part.get("thought") is True:
            return [Reasoning(text_in(text)) for text in texts] + state

        found = state + texts
        for key, value in part.items():
            if key == "text" or key in _GEMINI_BESIDE:
                continue
            if key in _GEMINI_READERS and isinstance(value, dict):
                found += _GEMINI_READERS[key](value, place, request)
            elif value is not None:
                found.append(block_as_text({"type": key, key: value}, request))
        return found

    @staticmethod
    def _read_signature(value: Any, request: Request) -> list[Part]:
        """What `pack` has packed; a signature of Google's own is of no use to anybody here."""
        signature = word(value)
        if signature is None or signature == NO_SIGNATURE:
            return []
        try:
            packed = base64.b64decode(standard_base64(signature)).decode("ascii")
        except ValueError:
            packed = ""

        parts: list[Part] = []
        for minted_by, state_id, blob in unpack_opaque(packed):
            last = next(reversed(parts), None)
            if minted_by == SIGNED_TEXT and isinstance(last, Reasoning):
                parts[-1] = replace(last, text=blob)
            elif blob and state_id == "redacted":
                parts.append(Reasoning("", blob, None, minted_by, True))
            elif blob and minted_by in _UPSTREAM_NAMES:
                parts.append(Reasoning("", blob, state_id, minted_by))

        if not parts and packed != NO_SIGNATURE:
            request.lose("thoughtSignature", FOREIGN_STATE)
        return parts

    # -- answers

    def pack(self, part: Reasoning) -> str:
        """The state of a thinking, "" when it has none.  Anthropic's signs the words, which a
        client may drop, so they go with it."""
        packed = client_state(part, self.name) or ""
        if packed and part.minted_by == "messages" and part.text and not part.redacted:
            packed += pack_opaque(SIGNED_TEXT, None, part.text)
        return packed

    def block(self, part: Part, packed: str = "") -> Json:
        """A part of the answer, with the state that is behind the thinking before it."""
        if isinstance(part, ToolCall):
            call = {
                "id": part.id,
                "name": part.name,
                "args": arguments_object(part.arguments),
            }
            block: Json = {"functionCall": call}
        else:
            block = {"text": plain_text(part)}
        if packed:
            # a dot is no base64, which strict SDKs want to decode
            block["thoughtSignature"] = base64.b64encode(packed.encode()).decode()
        return block

    def answer(
        self,
        blocks: list[Json],
        request: Request,
        answer_id: str,
        reason: str = "",
        usage: Usage | None = None,
    ) -> Json:
        """A whole answer, or a piece of one."""
        candidate: Json = {"content": {"role": "model", "parts": blocks}}
        if reason:
            candidate["finishReason"] = reason
        candidate["index"] = 0
        answer: Json = {"candidates": [candidate]}
        if usage is not None:
            answer["usageMetadata"] = self.usage(usage)
        answer.update(modelVersion=request.model, responseId=answer_id)
        return answer

    @staticmethod
    def usage(usage: Usage) -> Json:
        """`usageMetadata`: the candidates' count is without the thoughts."""
        prompt = usage.input + usage.cache_read + usage.cache_write
        thoughts = min(usage.reasoning, usage.output)
        return {
            "promptTokenCount": prompt,
            "cachedContentTokenCount": usage.cache_read,
            "candidatesTokenCount": usage.output - thoughts,
            "thoughtsTokenCount": thoughts,
            "totalTokenCount": prompt + usage.output,
        }

    def encode_response(self, response: Response, request: Request) -> Json:
        blocks: list[Json] = []
        packed = ""

        for part in response.parts:
            if isinstance(part, Reasoning):
                packed += self.pack(part)
                if part.text and request.wants_thoughts:
                    blocks.append({"text": part.text, "thought": True})
            else:
                blocks.append(self.block(part, packed))
                packed = ""

        if packed or not blocks:
            blocks.append(self.block(Text(""), packed))
        return self.answer(
            blocks,
            request,
            client_id("", response.id, request),
            self.TO_WIRE.get(response.stop, "STOP"),
            response.usage or Usage(),
        )


class GeminiEncoder(StreamEncoder):
    """Calls go out whole, the reason of the end with the last piece alone: clients take it for the
    end.  The state of a thinking waits for the part behind it."""

    def __init__(self, dialect: Gemini, request: Request) -> None:
        super().__init__(dialect, request)
        self._id = ""
        self._packed = ""  # state that no part has carried yet
        self._thoughts: dict[
            int, list[str]
        ] = {}  # index of an open thinking -> its words
        self._calls = WholeCalls()

    def _piece(
        self, blocks: list[Json], reason: str = "", usage: Usage | None = None
    ) -> bytes:
        answer = self.dialect.answer(blocks, self.request, self._id, reason, usage)
        return bytes(self.dialect.frame(dumps(answer)))

    def _block(self, part: Part) -> Json:
        packed, self._packed = self._packed, ""
        block: Json = self.dialect.block(part, packed)
        return block

    def _start(self, event: ResponseStart) -> bytes:
        self._id = client_id("", event.id, self.request)
        return b""

    def _begin(self, event: PartStart) -> bytes:
        part = event.part
        if isinstance(part, ToolCall):
            self._calls.begin(event.index, part)
            return b""
        block: Json = {"text": self.MARK}
        if isinstance(part, Reasoning):
            block["thought"] = True
            self._thoughts[event.index] = []
            if part.redacted:
                self._packed += self.dialect.pack(part)
        self._frames[event.index] = self._piece([block]).split(self.QUOTED_MARK)
        return b""

    def _delta(self, event: PartDelta) -> bytes:
        index = event.index
        if self._calls and index in self._calls:
            self._calls.add(index, event.text)
            return b""
        if self._thoughts and index in self._thoughts:
            self._thoughts[index].append(event.text)
            if not self.request.wants_thoughts:
                return b""
        elif self._packed:
            return self._piece([self._block(Text(event.text))])
        return dumps(event.text).join(self._frames[index])

    def _sign(self, event: PartSignature) -> bytes:
        text = "".join(self._thoughts.get(event.index, ()))
        self._packed += self.dialect.pack(
            Reasoning(text, event.signature, event.id, event.minted_by)
        )
        return b""

    def _end(self, event: PartEnd) -> bytes:
        self._thoughts.pop(event.index, None)
        if event.index not in self._calls:
            return b""
        calls = self._calls.end(event.index)
        if not calls:
            return b""
        return self._piece([self._block(call) for call in calls])

    def _stop(self, event: ResponseEnd) -> bytes:
        self.ended = True
        return self._piece(
            [self._block(Text(""))],
            self.dialect.TO_WIRE.get(event.stop, "STOP"),
            event.usage or Usage(),
        )


class GeminiArray(Gemini):
    """A stream without `alt=sse`: one JSON array, element by element."""

    stream_type = "application/json"

    def frame(self, data: bytes) -> bytes:
        return b",%b\n" % data


class GeminiArrayEncoder(GeminiEncoder):
    """Opens the array with the first element and closes it behind the last."""

    def __init__(self, dialect: GeminiArray, request: Request) -> None:
        super().__init__(dialect, request)
        self._is_open = False

    def feed(self, event: Event) -> bytes:
        """Bytes for an event, with the brackets around them all."""
        was_ended = self.ended
        out = super().feed(event)
        if out and not self._is_open:
            self._is_open = True
            out = b"[" + out[1:]
        if self.ended and not was_ended:
            out += b"]\n"
        return out


# ---- Ollama ----

#: options about the machine that a model runs on, which mean nothing here
_OLLAMA_MACHINE = (
    "num_ctx",
    "num_gpu",
    "num_thread",
    "num_keep",
    "num_batch",
    "main_gpu",
    "low_vram",
    "use_mmap",
    "use_mlock",
    "numa",
    "f16_kv",
    "vocab_only",
    "logits_all",
    "embedding_only",
)
_OLLAMA_OPTIONS = (
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "presence_penalty",
    "num_predict",
    "frequency_penalty",
    "stop",
)


def utc_time(second: int) -> str:
    """1790000000 -> '2026-09-21T14:13:20Z'"""
    at = datetime.datetime.fromtimestamp(second, datetime.timezone.utc)
    return at.strftime("%Y-%m-%dT%H:%M:%SZ")


class Ollama(ClientDialect):
    """/api/chat.  Its calls have no ids, or ids that its SDKs drop: results are paired by order."""

    name = "ollama"
    STOP_REASONS = (
        ("stop", "stop"),
        ("length", "length"),
        ("stop", "tool_use"),
        ("stop", "stop_sequence"),
        ("stop", "refusal"),
        ("stop", "pause"),
    )
    keepalive = b" "  # before a line: JSON parsers skip it
    stream_type = "application/x-ndjson"

    def error_body(self, error: ProxyError, request_id: str) -> Json:
        text = str(error)
        if error.code == "model_not_found":  # the words that its clients look for
            text = text.replace("does not exist here", "not found")
        return {"error": text}

    def error_frame(self, error: ProxyError) -> bytes:
        return dumps(self.error_body(error, "")) + b"\n"

    @staticmethod
    def has_images(body: Json) -> bool:
        return bool(body.get("images")) or any(
            message.get("images") for message in dicts_in(body, "messages")
        )

    # -- requests

    def decode_request(self, body: Json) -> Request:
        think = {True: USUAL_EFFORT, False: "none"}
        if isinstance(body.get("think"), bool):  # else a word for how much
            body = dict(body, think=think[body["think"]])
        request = read_fields(
            self, body, "messages options format keep_alive truncate shift"
        )
        options = as_object(body.get("options"))
        note_unknown(request, options, *_OLLAMA_OPTIONS, *_OLLAMA_MACHINE)
        request = replace(request, output_schema=self._format(body.get("format")))
        for at, message in enumerate(check_list(body, "messages")):
            self.read_turn(request, message, "messages[%d]" % at)
        pair_by_order(request.turns)
        return request

    @staticmethod
    def _format(layout: Any) -> Json | None:
        """ "json", or a JSON schema.  Raises BadRequest."""
        if isinstance(layout, dict):
            return {"type": "json_schema", "name": "output", "schema": layout}
        if layout not in (None, "", "json"):
            raise BadRequest(
                "'format' must be \"json\" or a JSON schema", param="format"
            )
        if layout:
            return {"type": "json_object"}
        return None

    def read_tool(self, tool: Json, request: Request) -> None:
        function = tool.get("function")
        if isinstance(function, dict):
            add_tool(request, function, "parameters")
        else:
            drop_hosted_tool(request, tool)

    def read_turn(self, request: Request, item: Json, place: str) -> None:
        role = str(item.get("role"))
        if role not in ("system", "user", "assistant", "tool"):
            raise BadRequest(
                "'%s.role' must be system, user, assistant or tool" % place, param=place
            )
        note_unknown(
            request,
            item,
            "content",
            "images",
            "tool_calls",
            "tool_name",
            "name",
            "tool_call_id",
        )
        parts: list[Part] = [
            Reasoning(thought) for thought in words(item.get("thinking"))
        ]
        parts += read_content(item.get("content"), place, request)
        for data in as_list(item.get("images")):
            parts += self._read_image(data, place)
        for call in dicts_in(item, "tool_calls"):
            parts.append(self._read_call(call))

        if role == "tool":
            name = word(item.get("tool_name")) or word(item.get("name")) or ""
            parts = [ToolResult(str(item.get("tool_call_id") or ""), parts, name=name)]
            role = "user"
        if parts:
            request.add_turn(role, parts)

    @staticmethod
    def _read_image(data: Any, place: str) -> list[Part]:
        """Base64 without a label, or a data: URL."""
        text, label = str(data), ""
        split = _DATA_URL.match(text)
        if split:
            label, text = split.groups()
        text = standard_base64(text)
        kind = image_type(text, label)
        if not kind:
            raise BadRequest(
                "'%s.images' must hold PNG, JPEG, GIF or WebP images as base64" % place,
                param=place,
            )
        return [Image(kind, text)]

    @staticmethod
    def _read_call(call: Json) -> ToolCall:
        function = as_object(call.get("function"))
        arguments = function.get("arguments")
        if not isinstance(arguments, str):
            arguments = dumps(as_object(arguments)).decode("utf-8", "surrogatepass")
        return ToolCall(
            str(call.get("id") or ""),
            str(function.get("name") or ""),
            arguments or "{}",
        )

    # -- answers

    def line(self, message: Json, request: Request, **more: Any) -> Json:
        """One object of a stream, or the whole answer."""
        return {
            "model": request.model,
            "created_at": utc_time(request.now),
            "message": dict({"role": "assistant"}, **message),
            "done": False,
            **more,
        }

    @staticmethod
    def call(call: ToolCall) -> Json:
        """A call as Ollama writes it: arguments are an object, there is no id."""
        return {
            "id": call.id,
            "function": {
                "name": call.name,
                "arguments": arguments_object(call.arguments),
            },
        }

    def ending(
        self, stop: str, usage: Usage | None, request: Request, first_ns: int
    ) -> Json:
        """What the last object has.  first_ns: until the first piece of the answer."""
        usage = usage or Usage()
        total_ns = max(request.elapsed_ns(), first_ns)
        return {
            "done": True,
            "done_reason": self.TO_WIRE.get(stop, "stop"),
            "total_duration": total_ns,
            "load_duration": 0,
            "prompt_eval_count": usage.input + usage.cache_read + usage.cache_write,
            "prompt_eval_duration": first_ns,
            "eval_count": usage.output,
            "eval_duration": total_ns - first_ns,
        }

    def encode_response(self, response: Response, request: Request) -> Json:
        texts: dict[type[Part], str] = {Text: "", Reasoning: ""}
        calls = []
        for part in response.parts:
            if isinstance(part, ToolCall):
                calls.append(self.call(part))
            elif type(part) in texts:
                texts[type(part)] += text_in(part)
        message = given(
            content=texts[Text],
            thinking=texts[Reasoning] or None,
            tool_calls=calls or None,
        )
        return self.line(
            message, request, **self.ending(response.stop, response.usage, request, 0)
        )


class OllamaGenerate(Ollama):
    """/api/generate: a prompt instead of messages, a text instead of a message."""

    def as_chat(self, body: Json) -> Json:
        """The same request as /api/chat has it.  Raises BadRequest."""
        if body.get("suffix"):
            raise BadRequest(
                "'suffix' is not supported: no chat model can do it", param="suffix"
            )

        left = {
            key: value
            for key, value in body.items()
            if key not in ("prompt", "system", "images", "suffix")
            and (value or key not in ("template", "raw", "context"))
        }

        left["messages"] = [
            {"role": "system", "content": system}
            for system in words(body.get("system"))
        ]
        left["messages"].append(
            given(
                role="user", content=body.get("prompt") or "", images=body.get("images")
            )
        )

        return left

    def interaction(self, body: Json) -> str:
        system = word(body.get("system")) or ""
        return super().interaction(
            {
                "system": system,
                "messages": [
                    {"role": "user", "content": word(body.get("prompt")) or ""}
                ],
            }
        )

    def decode_request(self, body: Json) -> Request:
        return super().decode_request(self.as_chat(body))

    def line(self, message: Json, request: Request, **more: Any) -> Json:
        shown = dict(message)
        text = shown.pop("content")
        return {
            "model": request.model,
            "created_at": utc_time(request.now),
            "response": text,
            **shown,
            "done": False,
            **more,
        }


class OllamaEncoder(StreamEncoder):
    """One JSON object a line; calls go out whole."""

    def __init__(self, dialect: Ollama, request: Request) -> None:
        super().__init__(dialect, request)
        self._calls = WholeCalls()
        self._first_ns = -1  # -1: no piece of the answer so far

    def _line(self, message: Json, **more: Any) -> bytes:
        return dumps(self.dialect.line(message, self.request, **more)) + b"\n"

    def _start(self, event: ResponseStart) -> bytes:
        return b""

    def _begin(self, event: PartStart) -> bytes:
        if self._first_ns < 0:
            self._first_ns = self.request.elapsed_ns()
        if isinstance(event.part, ToolCall):
            self._calls.begin(event.index, event.part)
            return b""
        message = {"content": self.MARK}
        if isinstance(event.part, Reasoning):
            message = {"content": "", "thinking": self.MARK}
        self._frames[event.index] = self._line(message).split(self.QUOTED_MARK)
        return b""

    def _delta(self, event: PartDelta) -> bytes:
        if self._calls and event.index in self._calls:
            self._calls.add(event.index, event.text)
            return b""
        return dumps(event.text).join(self._frames[event.index])

    def _sign(self, event: PartSignature) -> bytes:
        return b""  # there is no place for it

    def _end(self, event: PartEnd) -> bytes:
        if event.index not in self._calls:
            return b""
        calls = [self.dialect.call(call) for call in self._calls.end(event.index)]
        if not calls:
            return b""
        return self._line({"content": "", "tool_calls": calls})

    def _stop(self, event: ResponseEnd) -> bytes:
        self.ended = True
        return self._line(
            {"content": ""},
            **self.dialect.ending(
                event.stop, event.usage, self.request, max(self._first_ns, 0)
            ),
        )


CHAT = ChatCompletions(ChatStream, ChatDecoder, ChatEncoder)
RESPONSES = Responses(ResponsesStream, ResponsesDecoder, ResponsesEncoder)
MESSAGES = Messages(MessagesStream, MessagesDecoder, MessagesEncoder)
GEMINI = Gemini(GeminiEncoder)
GEMINI_ARRAY = GeminiArray(GeminiArrayEncoder)
OLLAMA = Ollama(OllamaEncoder)
OLLAMA_GENERATE = OllamaGenerate(OllamaEncoder)
#: those that models are asked in, and all that clients speak
DIALECTS: dict[str, Dialect] = {d.name: d for d in (CHAT, RESPONSES, MESSAGES)}
CLIENT_DIALECTS: dict[str, Dialect] = {
    **DIALECTS,
    GEMINI.name: GEMINI,
    OLLAMA.name: OLLAMA,
}


class Unwrapper:
    """Turns the forced call of OUTPUT_TOOL back into the text that the client asked for.  Other
    texts are held: beside such a call they are chatter, without one they are the answer."""

    def __init__(self) -> None:
        self._held: list[Event] = []
        self._texts: set[int] = set()
        self._calls: set[str] = set()

    def feed(self, event: Event) -> list[Event]:
        """The events that may be told by now."""
        if isinstance(event, PartStart) and isinstance(event.part, ToolCall):
            self._calls.add(event.part.name)
            if event.part.name == OUTPUT_TOOL:
                return [PartStart(event.index, Text(""))]
        elif isinstance(event, PartStart) and isinstance(event.part, Text):
            self._texts.add(event.index)
        is_of_part = isinstance(event, (PartStart, PartDelta, PartCitation, PartEnd))
        if is_of_part and getattr(event, "index", -1) in self._texts:
            self._held.append(event)
            return []
        if not isinstance(event, ResponseEnd):
            return [event]
        if event.stop == "tool_use" and self._calls == {OUTPUT_TOOL}:
            event = replace(event, stop="stop")
        if OUTPUT_TOOL in self._calls:
            return [event]
        return [*self._held, event]


class ThinkingFilter:
    """Leaves out the model's thinking for a client that wants none."""

    def __init__(self) -> None:
        self._hidden: set[int] = set()

    def feed(self, event: Event) -> list[Event]:
        """The events that may go on."""
        if isinstance(event, PartStart) and isinstance(event.part, Reasoning):
            self._hidden.add(event.index)
        if isinstance(event, (PartStart, PartDelta, PartSignature, PartEnd)):
            if event.index in self._hidden:
                return []
            return [event]
        return [event]


class StopCutter:
    """Ends an answer at a stop sequence where the upstream cannot.

    A sequence may come in several deltas, so the end of a text that could be the beginning of one
    is held back until it is known to be none.  Sequences are looked for in texts alone."""

    def __init__(self, sequences: list[str], meter: Meter) -> None:
        self._sequences = [sequence for sequence in sequences if sequence]
        self._meter = meter
        self._held: dict[int, str] = {}  # index of an open text -> its end that waits
        self._open: list[int] = []  # parts that have begun, in order
        self._is_cut = False

    def feed(self, event: Event) -> list[Event]:
        """The events that may go on by now; nothing follows the one that ends the answer."""
        if self._is_cut:
            return []
        if isinstance(event, PartStart):
            self._open.append(event.index)
            if isinstance(event.part, Text):
                self._held[event.index] = ""
        elif isinstance(event, PartDelta) and event.index in self._held:
            return self._read(event)
        elif isinstance(event, PartEnd):
            self._open.remove(event.index)
            rest = self._held.pop(event.index, "")
            if rest:
                return [PartDelta(event.index, rest), event]
            return [event]
        return [event]

    def _read(self, event: PartDelta) -> list[Event]:
        text = self._held[event.index] + event.text
        places = [(text.find(sequence), sequence) for sequence in self._sequences]
        hits = [place for place in places if place[0] >= 0]
        if hits:
            return self._cut(event.index, text, *min(hits))

        waiting = self._waiting(text)
        self._held[event.index] = text[len(text) - waiting :]
        ready = text[: len(text) - waiting]
        if ready:
            return [PartDelta(event.index, ready)]
        return []

    def _waiting(self, text: str) -> int:
        """How many characters at the end of the text may be the beginning of a sequence."""
        most = 0
        for sequence in self._sequences:
            at = text.find(sequence[0], max(0, len(text) - len(sequence) + 1))
            while at >= 0 and not sequence.startswith(text[at:]):
                at = text.find(sequence[0], at + 1)
            if at >= 0:
                most = max(most, len(text) - at)
        return most

    def _cut(self, index: int, text: str, place: int, sequence: str) -> list[Event]:
        self._is_cut = True
        if place:
            events: list[Event] = [PartDelta(index, text[:place])]
        else:
            events = []
        events += [PartEnd(at) for at in self._open]
        return [*events, ResponseEnd("stop_sequence", self._meter.usage, sequence)]


def event_filters(
    request: Request, meter: Meter
) -> list[Callable[[Event], list[Event]]]:
    """What stands between decoder and encoder: the client's wishes that the proxy fulfils."""
    filters: list[Callable[[Event], list[Event]]] = []
    if request.output_tool:
        filters.append(Unwrapper().feed)
    if request.hides_thinking:
        filters.append(ThinkingFilter().feed)
    if request.cut_at:
        filters.append(StopCutter(request.cut_at, meter).feed)
    return filters


def pass_through(
    filters: list[Callable[[Event], list[Event]]], events: Iterable[Event]
) -> list[Event]:
    """The events that come out behind all filters."""
    passed = list(events)
    for change in filters:
        passed = [out for event in passed for out in change(event)]
    return passed


class TranslatedStream(StreamRelay):
    """StreamRelay's interface off the diagonal: upstream bytes of one dialect in, client bytes of
    another out."""

    def __init__(self, client: Dialect, upstream: Dialect, request: Request) -> None:
        super().__init__(client, request.model, {}, request)
        self._decoder, self._encoder = (
            upstream.stream_decoder(),
            client.stream_encoder(request),
        )
        self.meter = self._decoder.meter
        self._filters = event_filters(request, self.meter)

    def _copy(self) -> StreamRelay:
        return TranslatedStream(self.dialect, self._decoder.dialect, self.request)

    def tell(self, events: Iterable[Event]) -> bytes:
        """Client bytes for neutral events."""
        encoder = self._encoder
        if self._filters:
            events = pass_through(self._filters, events)
        out: list[bytes] = []
        for event in events:
            if not self.has_content:
                self.has_content = shows(event)
            out.append(encoder.feed(event))
            if isinstance(event, StreamError):
                self.error = event.error
        if encoder.ended:
            self._end()
        return b"".join(out)

    def _end(self) -> None:
        self.ended = True
        if self.on_final and self._encoder.final:
            self.on_final(*self._encoder.final)
            self._encoder.final = ()

    def _block(self, block: bytes) -> bytes:
        out: list[Event] = []
        for raw in block.split(b"\n\n"):
            at = raw.find(b"\n") + 1  # behind the event's name, if there is one
            is_usual = (
                raw.startswith(b"data: ", at)
                and raw.find(b"\n", at) < 0
                and (not at or raw.startswith(b"event: "))
            )
            if is_usual:
                data = raw[at + 6 :]
            else:
                data = Frame.parse(raw).data
            if data:
                out += self._decoder.read(data)
        return self.tell(out)

    def _finish(self) -> bytes:
        events = self._decoder.close()  # an error among them is made by close()
        if any(isinstance(e, StreamError) for e in events):
            return b""
        return self.tell(events)

    def _error(self, error: ProxyError) -> bytes:
        told = UpstreamError(str(error), error.status, error.code)
        told.overflow = error.overflow
        return self.tell([StreamError(told)])


def read_answer(
    upstream: Dialect,
    data: bytes,
    is_stream: bool,
    request: Request,
    meter: Meter | None = None,
) -> Response:
    """A whole answer of the upstream, or one that it streamed.  Raises UpstreamError."""
    decoder = upstream.stream_decoder()
    decoder.meter = meter or decoder.meter

    if is_stream:
        splitter = SSEDecoder()
        events = [
            event
            for frame in splitter.feed(data) + splitter.close()
            for event in decoder.read(frame.data)
        ] + decoder.close()
    else:
        events = decoder.read_whole(parse_answer(data))

    events = pass_through(event_filters(request, decoder.meter), events)
    return fold(events)


def as_completion(answer: Json, echo: str, at: int = 0) -> Json:
    """A chat answer or chunk in the shape of the old /completions; `at`: which prompt's it is."""
    choices = [
        {
            "text": echo
            + (as_object(c.get("message") or c.get("delta")).get("content") or ""),
            "index": at,
            "logprobs": None,
            "finish_reason": c.get("finish_reason"),
        }
        for c in as_list(answer.get("choices"))
    ]
    return dict(
        answer,
        id=str(answer.get("id")).replace("chatcmpl", "cmpl"),
        object="text_completion",
        choices=choices,
    )


class CompletionStream(StreamRelay):
    """A chat client's stream in the shape of /completions.  `echo`: to stand before the text."""

    def __init__(self, inner: StreamRelay, echo: str) -> None:
        super().__init__(inner.dialect, inner.asked, {})
        self._inner, self._echo, self.meter = inner, echo, inner.meter

    def feed(self, data: bytes) -> bytes:
        return self.reshape(self._inner.feed(data))

    def close(self, error: ProxyError | None = None) -> bytes:
        return self.reshape(self._inner.close(error))

    def reshape(self, data: bytes) -> bytes:
        """What the chat client's stream gave, for this client."""
        inner, out = self._inner, []
        self.ended, self.error, self.has_content = (
            inner.ended,
            inner.error,
            inner.has_content,
        )
        for raw in split_frames(data):
            if raw.startswith(b"data: {"):
                value = loads(Frame.parse(raw).data)
            else:
                value = {}
            if "choices" in value:
                raw = b"data: %b\n\n" % dumps(as_completion(value, self._echo))
                self._echo = ""
            out.append(raw)
        return b"".join(out)


def parse_answer(data: bytes) -> Json:
    """An upstream's whole body.  Raises UpstreamError."""
    try:
        value = loads(data)
    except ValueError:
        raise UpstreamError("the upstream's answer is not JSON") from None
    if not isinstance(value, dict):
        raise UpstreamError("the upstream's answer is no JSON object")
    return value


# ==== 8. Transcript care ==========================================================================
# What becomes of a request on its way up, beside the rules of its dialect: a history that the
# upstream would refuse is mended, a conversation's head is kept steady for the prompt cache.  It is
# done to the body in the upstream's dialect, so that translated requests get the same care.  What
# needs nothing is looked at once and left alone.

SHED_IMAGE = "[an image was left out: the upstream takes no more]"
MAX_SENT_BYTES = 5_000_000  # with images; larger bodies were met with 413
_NONCE_LINE = "x-anthropic-billing-header:"
_TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")
# ---- Normalising: one shape for what clients write in many ----
# It runs first for every request, whatever its model and its way.  Clients choose their shapes by
# the name of a model, so an alias, or a model changed in mid-session, brings the shapes of one
# vendor to the models of another; and each vendor has older spellings that its clients still send.
# A step changes what it must and nothing else: a body that no step changes goes up as the client's
# own bytes.  Each step says why it is there.

_FORMAT_KEYS = ("name", "schema", "strict", "description")


def _as_chat_format(layout: Any) -> Any:
    """{"type": "json_schema", "schema": {}} -> {"type": "json_schema", "json_schema": {...}}"""
    if as_object(layout).get("type") != "json_schema" or "json_schema" in layout:
        return layout
    inner = {key: layout[key] for key in _FORMAT_KEYS if key in layout}
    inner.setdefault("name", "output")
    return {"type": "json_schema", "json_schema": inner}


def _as_flat_format(layout: Any) -> Any:
    """The way back, as Responses and Messages have it."""
    if "json_schema" not in as_object(layout):
        return layout
    return dict({"type": "json_schema"}, **as_object(layout["json_schema"]))


def _as_stop_list(stop: Any) -> Any:
    if isinstance(stop, str):
        return [stop]
    return stop


def _unchanged(value: Any) -> Any:
    return value


#: dialect -> (old or foreign field, the dialect's own, how its value changes).  The own one wins.
OLD_FIELDS: dict[str, tuple[tuple[str, str, Callable[[Any], Any]], ...]] = {
    "chat": (
        ("max_output_tokens", "max_completion_tokens", _unchanged),
        ("stop_sequences", "stop", _unchanged),
        ("reasoning.effort", "reasoning_effort", _unchanged),
        ("output_config.effort", "reasoning_effort", _unchanged),
        ("response_format", "response_format", _as_chat_format),
        ("text.format", "response_format", _as_chat_format),
        ("output_config.format", "response_format", _as_chat_format),
        ("output_format", "response_format", _as_chat_format),
        ("text.verbosity", "verbosity", _unchanged),
    ),
    "responses": (
        ("max_tokens", "max_output_tokens", _unchanged),
        ("max_completion_tokens", "max_output_tokens", _unchanged),
        ("reasoning_effort", "reasoning.effort", _unchanged),
        ("output_config.effort", "reasoning.effort", _unchanged),
        ("text.format", "text.format", _as_flat_format),
        ("response_format", "text.format", _as_flat_format),
        ("output_config.format", "text.format", _as_flat_format),
        ("output_format", "text.format", _as_flat_format),
        ("verbosity", "text.verbosity", _unchanged),
    ),
    "messages": (
        ("max_tokens_to_sample", "max_tokens", _unchanged),
        ("max_completion_tokens", "max_tokens", _unchanged),
        ("max_output_tokens", "max_tokens", _unchanged),
        ("stop", "stop_sequences", _as_stop_list),
        ("reasoning_effort", "output_config.effort", _unchanged),
        ("reasoning.effort", "output_config.effort", _unchanged),
        ("output_config.format", "output_config.format", _as_flat_format),
        ("output_format", "output_config.format", _as_flat_format),
        ("response_format", "output_config.format", _as_flat_format),
        ("text.format", "output_config.format", _as_flat_format),
    ),
}


def _place_of(body: Json, path: str, make: bool = False) -> tuple[Json, str]:
    """(object, key) of a dotted path of at most two steps; make: also create the object."""
    outer, _, inner = path.rpartition(".")
    if not outer:
        return body, inner
    if make and not isinstance(body.get(outer), dict):
        body[outer] = {}
    return as_object(body.get(outer)), inner


_OLD_NAMES = {
    dialect: frozenset(old.partition(".")[0] for old, _, _ in rows)
    for dialect, rows in OLD_FIELDS.items()
}


def rename_old_fields(edit: Edit, client: Dialect, model: Model) -> None:
    """Older spellings, fields that were betas once, and the sister dialects' names of a field."""
    if _OLD_NAMES[client.name].isdisjoint(edit.body):
        return
    for old, own, convert in OLD_FIELDS[client.name]:
        holder, key = _place_of(edit.body, old)
        if holder.get(key) is None:
            continue
        value = convert(holder[key])
        if old == own:
            edit.set(holder, key, value)
            continue

        edit.drop(holder, key)
        target, name = _place_of(edit.body, own, make=True)
        if target.get(name) is None:
            edit.set(target, name, value)
        outer = old.partition(".")[0]
        if edit.body.get(outer) == {}:
            edit.drop(edit.body, outer)


def name_the_turns(edit: Edit, client: Dialect, model: Model) -> None:
    """`messages` sent to a route that wants `input`, or the reverse, and a system text by the
    sister dialect's name."""
    body, own = edit.body, client.turns_key
    if own == "messages":
        other = "input"
    else:
        other = "messages"
    if body.get(own) is None and body.get(other) is not None:
        turns = edit.drop(body, other)
        edit.set(body, own, turns)
    if own == "messages" and isinstance(body.get(own), str):
        edit.set(body, own, [{"role": "user", "content": body[own]}])

    for key in ("system", "instructions"):
        if key == client.system_key or body.get(key) is None:
            continue
        text = text_of(edit.drop(body, key))
        if client.system_key and not body.get(client.system_key):
            edit.set(body, client.system_key, text)
        elif text and isinstance(body.get(own), list):
            edit.set(body, own, [{"role": "system", "content": text}] + body[own])


def convert_functions(edit: Edit, client: Dialect, model: Model) -> None:
    """`functions` and `function_call`, OpenAI's words before there were tools."""
    body = edit.body
    if isinstance(body.get("functions"), list):
        functions = edit.drop(body, "functions")
        tools = [{"type": "function", "function": function} for function in functions]
        if not body.get("tools"):
            edit.set(body, "tools", tools)
    if body.get("function_call") is not None:
        choice = edit.drop(body, "function_call")
        if isinstance(choice, dict):
            choice = {"type": "function", "function": {"name": choice.get("name")}}
        if body.get("tool_choice") is None:
            edit.set(body, "tool_choice", choice)


def convert_function_turns(edit: Edit, client: Dialect, model: Model) -> None:
    """Calls and results of `functions`: they have names, tools have ids."""
    called: dict[str, list[str]] = {}  # name of a function -> ids of its open calls
    for at, item in enumerate(as_list(edit.body.get(client.turns_key))):
        if not isinstance(item, dict):
            continue
        if isinstance(item.get("function_call"), dict):
            function = edit.drop(item, "function_call")
            call_id = "call_function_%d" % at
            called.setdefault(str(function.get("name")), []).append(call_id)
            if not item.get("tool_calls"):
                call = {"id": call_id, "type": "function", "function": function}
                edit.set(item, "tool_calls", [call])
        elif item.get("role") == "function":
            name = str(edit.drop(item, "name"))
            open_calls = called.get(name) or ["call_function_%d" % at]
            edit.set(item, "role", "tool")
            edit.set(item, "tool_call_id", open_calls.pop(0))


def shape_tools(edit: Edit, client: Dialect, model: Model) -> None:
    """Tools in the shape of another dialect, and nulls beside a schema, which strict models
    refuse."""
    tools = edit.body.get("tools")
    if not isinstance(tools, list):
        return
    shaped = [
        client.own_tool(tool) if isinstance(tool, dict) else tool for tool in tools
    ]
    edit.replace(edit.body, "tools", shaped)
    for tool in shaped:
        if isinstance(tool, dict):
            drop_nulls(edit, tool)
            drop_nulls(edit, as_object(tool.get("function")))


def _tool_key(tool: Json) -> tuple[str, str]:
    """What makes two entries of `tools` the same tool."""
    function = as_object(tool.get("function")) or as_object(tool.get("custom"))
    return str(tool.get("type")), str(function.get("name") or tool.get("name"))


def merge_tools(tools: Iterable[Json]) -> list[Json]:
    """The tools without doubles; those of a namespace that comes more than once are joined."""
    merged: dict[tuple[str, str], Json] = {}
    joined: dict[tuple[str, str], list[Json]] = {}  # the tools of such a namespace
    for tool in tools:
        key = _tool_key(tool)
        known = merged.setdefault(key, tool)
        if known is not tool and tool.get("type") == "namespace":
            inner = joined.setdefault(key, dicts_in(known, "tools"))
            inner += dicts_in(tool, "tools")
    for key, inner in joined.items():
        merged[key] = dict(merged[key], tools=merge_tools(inner))
    return list(merged.values())


def hoist_tools(edit: Edit, client: Dialect, model: Model) -> None:
    """Codex sends the tools of newer models as an item, which it replays for ever; after a switch
    of the model both forms come."""
    items = edit.body.get(client.turns_key)
    carriers = [
        item
        for item in as_list(items)
        if isinstance(item, dict) and item.get("type") == "additional_tools"
    ]
    if not carriers:
        return
    tools = [
        tool for holder in [edit.body, *carriers] for tool in dicts_in(holder, "tools")
    ]
    edit.set(edit.body, "tools", merge_tools(tools))
    hoisted = set(map(id, carriers))
    kept = [item for item in as_list(items) if id(item) not in hoisted]
    edit.replace(edit.body, client.turns_key, kept)


def narrow_tools(edit: Edit, client: Dialect, model: Model) -> None:
    """`allowed_tools` must not widen to all tools where the upstream does not know it."""
    choice = as_object(edit.body.get("tool_choice"))
    if choice.get("type") != "allowed_tools":
        return
    if (
        model.is_openai
        and client.knows_allowed_tools
        and client.path in model.endpoints
    ):
        return

    inner = as_object(choice.get("allowed_tools")) or choice
    allowed = {_tool_key(tool) for tool in dicts_in(inner, "tools")}
    tools = [
        tool for tool in dicts_in(edit.body, "tools") if _tool_key(tool) in allowed
    ]
    edit.set(edit.body, "tools", tools)

    if inner.get("mode") == "required":
        mode = "required"
    else:
        mode = "auto"

    edit.set(edit.body, "tool_choice", client.own_choice(mode))


def shape_choice(edit: Edit, client: Dialect, model: Model) -> None:
    """`tool_choice` in the shape of another dialect."""
    choice = edit.body.get("tool_choice")
    if choice is not None:
        edit.set(edit.body, "tool_choice", client.own_choice(choice))


_ANTHROPIC_PARTS = ("tool_use", "tool_result", "thinking", "redacted_thinking")


def _reader_of(item: Json, client: Dialect) -> Dialect:
    """The dialect in whose shape an item of a conversation is written."""
    if item.get("role") == "tool" or item.get("tool_calls"):
        return CHAT
    if item.get("role") is None and item.get("type") is not None:
        return RESPONSES
    if client.turns_key == "messages" or item.get("role") == "user":
        parts = as_list(item.get("content"))
        if any(as_object(part).get("type") in _ANTHROPIC_PARTS for part in parts):
            return MESSAGES
    return client


_LONGEST_LABEL = 200  # characters of a data: URL before its data


def label_image(edit: Edit, part: Json) -> None:
    """Give an image the label that its first bytes tell: every vendor refuses a wrong one."""
    source = part.get("source")
    if isinstance(source, dict):
        data = source.get("data")
        if isinstance(data, str):
            edit.set(
                source,
                "media_type",
                image_type(data, str(source.get("media_type") or "")),
            )
        return

    holder, key = part, "image_url"
    if isinstance(part.get("image_url"), dict):
        holder, key = part["image_url"], "url"
    url = holder.get(key)
    if not isinstance(url, str):
        return
    if url[:5].lower() != "data:":
        if image_type(url, ""):  # bare base64
            edit.set(holder, key, "data:%s;base64,%s" % (image_type(url, ""), url))
        return
    comma = url.find(",", 0, _LONGEST_LABEL)
    label = url[5 : max(comma, 5)].split(";")[0]
    kind = image_type(url[comma + 1 : comma + 16], label)
    if comma > 0 and kind and kind != label:
        edit.set(holder, key, "data:%s;base64,%s" % (kind, url[comma + 1 :]))


def rewrite_part(
    edit: Edit, client: Dialect, item: Json, part: Any, place: str
) -> list[Json]:
    """Read a part of any dialect and write it in the client's own."""
    request = Request("", client.name, client.turns_key)
    parts = read_content([part], place, request)
    for name, reason in request.losses:
        edit.lose(name, reason)
    return [
        client.write_part(found, item.get("role") == "assistant") for found in parts
    ]


def shape_content(edit: Edit, client: Dialect, item: Json, place: str) -> None:
    """The parts of one item, each in the client's own shape."""
    for key in ("content", "output"):
        parts = item.get(key)
        if isinstance(parts, dict):
            parts = [parts]
        if not isinstance(parts, list):
            continue
        shaped: list[Any] = []
        for part in parts:
            if isinstance(part, dict) and str(part.get("type")) in client.own_parts:
                if part.get("type") == "tool_result":
                    shape_content(edit, client, part, place)
                elif part.get("type") in IMAGE_TYPES:
                    label_image(edit, part)
                shaped.append(part)
            elif isinstance(part, (dict, str)):
                shaped += rewrite_part(edit, client, item, part, place)
            else:
                shaped.append(part)

        edit.replace(item, key, shaped)


def rewrite_item(
    edit: Edit, client: Dialect, item: Json, model: Model, place: str
) -> list[Json]:
    """Read an item by the dialect in whose shape it is, write it in the client's own."""
    request = Request("", client.name, client.turns_key)
    _reader_of(item, client).read_turn(request, item, place)
    for name, reason in request.losses:
        edit.lose(name, reason)
    return client.write_turns(request.turns, request, model)


def shape_turns(edit: Edit, client: Dialect, model: Model) -> None:
    """Items and parts in the shape of another dialect, and those that no dialect knows: their text
    stays, since a session must not end because its history holds one."""
    key = client.turns_key
    items = edit.body.get(key)
    if not isinstance(items, list):
        return
    shaped: list[Any] = []
    for at, item in enumerate(items):
        place = "%s[%d]" % (key, at)
        if isinstance(item, str):
            item = {"role": "user", "content": item}
        if not isinstance(item, dict):
            shaped.append(item)  # the dialect's own rules name it
        elif _reader_of(item, client) is client and client.is_own_item(item):
            shape_content(edit, client, item, place)
            shaped.append(item)
        else:
            shaped += rewrite_item(edit, client, item, model, place)

    edit.replace(edit.body, key, shaped)


#: what is done to every request, in this order: to its fields, then to its turns
FIELD_STEPS: tuple[Callable[[Edit, Dialect, Model], None], ...] = (
    name_the_turns,
    rename_old_fields,
    convert_functions,
    hoist_tools,
    shape_tools,
    narrow_tools,
    shape_choice,
)
TURN_STEPS: tuple[Callable[[Edit, Dialect, Model], None], ...] = (
    convert_function_turns,
    shape_turns,
)


def normalise(edit: Edit, client: Dialect, model: Model) -> None:
    """Make a request uniform in its own dialect.  Raises BadRequest.

    Most conversations are in shape and are looked at once; those of words alone need no care
    behind it either.  A dialect of clients alone is translated in any case, by a reader that is
    lenient enough."""
    if not client.path:
        return
    for step in FIELD_STEPS:
        step(edit, client, model)
    turns = edit.body.get(client.turns_key)
    if not isinstance(turns, list):
        return
    edit.is_words = all(map(is_words, turns))
    if not edit.is_words and not all(map(client.is_in_shape, turns)):
        for step in TURN_STEPS:
            step(edit, client, model)


# ---- Each call and its result ----


def is_paired(steps: Iterable[ToolStep], once: bool) -> bool:
    """Has each call one result, directly behind it but for what may stand between, and each result
    its call?  once: no id may come again."""
    waiting: set[str] = set()
    seen: set[str] = set()
    for _, calls, answers, is_loose in steps:
        if answers is not None:
            if answers not in waiting:
                return False
            waiting.remove(answers)
        elif waiting and not is_loose:
            return False
        if calls:
            size = len(waiting) + len(calls)
            waiting.update(calls)
            if len(waiting) != size or once and not seen.isdisjoint(calls):
                return False
            seen.update(calls)
    return not waiting


def pair_calls(edit: Edit, dialect: Dialect) -> None:
    """Put each result directly behind its call: a missing one is told as an error, one without a
    call as text, one that comes twice is told once."""
    if edit.is_words:
        return
    key = dialect.turns_key
    try:  # nothing is kept of what is read: thousands of pieces would wake the collector
        if is_paired(
            (step for item in edit.body[key] for step in dialect.tool_steps(item)),
            dialect.unique_call_ids,
        ):
            return
        steps = [step for item in edit.body[key] for step in dialect.tool_steps(item)]
    except (AttributeError, KeyError, TypeError):
        return  # `prepare` says what is wrong with it
    edit.replace(
        edit.body, key, dialect.join_user_turns(_in_order(steps, dialect, edit))
    )


class OpenCalls:
    """Finds the call that each tool result belongs to: the latest one of its id that has none."""

    def __init__(self) -> None:
        #: id -> (step, numbers of the calls in it), for calls without a result
        self._places: dict[str, list[tuple[int, collections.deque[int]]]] = {}
        self._results: dict[str, list[Json]] = {}  # id -> those not in _digests yet
        self._digests: dict[str, set[str]] = {}  # id -> of results that were taken

    def open(self, at: int, calls: Sequence[str]) -> None:
        """Step `at` makes these calls."""
        for number, call_id in enumerate(calls):
            groups = self._places.setdefault(call_id, [])
            if not groups or groups[-1][0] != at:
                groups.append((at, collections.deque()))
            groups[-1][1].append(number)

    def take(self, item: Json, call_id: str) -> tuple[int, int] | None:
        """(step, number) of the call whose result `item` is; None when no such call is open."""
        groups = self._places.get(call_id)
        if not groups:
            return None
        at, numbers = groups[-1]
        number = numbers.popleft()
        if not numbers:
            groups.pop()
        self.note(item, call_id)
        return at, number

    def note(self, item: Json, call_id: str) -> None:
        """This result is in the conversation now."""
        self._results.setdefault(call_id, []).append(item)

    def is_repeat(self, item: Json, call_id: str) -> bool:
        """Is the very same result in the conversation already?"""
        if call_id not in self._results:
            return False
        digests = self._digests.setdefault(call_id, set())
        digests.update(map(self._digest, self._results[call_id]))
        self._results[call_id].clear()
        return self._digest(item) in digests

    @staticmethod
    def _digest(item: Json) -> str:
        return stable_id("", json.dumps(item, sort_keys=True))


def rename_repeated_calls(step: ToolStep, results: list[Json], seen: set[str]) -> None:
    """Give each call whose id was there before an id of its own, and its result, too.
    seen: ids of earlier steps; those of this one are added."""
    blocks: list[Json] = []
    for number, call_id in enumerate(step.calls):
        if call_id in seen:
            blocks = blocks or [
                b for b in step.item["content"] if b.get("type") == "tool_use"
            ]
            call_id = stable_id("call_", "%s %d" % (call_id, len(seen)))
            blocks[number]["id"] = results[number]["content"][0]["tool_use_id"] = (
                call_id
            )
        seen.add(call_id)


def _in_order(steps: list[ToolStep], dialect: Dialect, edit: Edit) -> Iterator[Json]:
    """A result belongs to the latest open call of its id before it, else to one behind it."""
    calls, results, orphans = OpenCalls(), {}, set()
    early: list[tuple[Json, str]] = []
    for at, step in enumerate(steps):
        calls.open(at, step.calls)
        if step.answers is None:
            continue
        place = calls.take(step.item, step.answers)
        if place is not None:
            results[place] = step.item
        elif not calls.is_repeat(step.item, step.answers):
            early.append((step.item, step.answers))

    for item, call_id in early:
        place = calls.take(item, call_id)
        if place is not None:
            results[place] = item
        elif not calls.is_repeat(item, call_id):
            orphans.add(id(item))
            calls.note(item, call_id)

    seen: set[str] = set()
    for at, step in enumerate(steps):
        if id(step.item) in orphans:
            edit.lose("tool result", "its call is not there: told as text")
            yield orphan_as_text(step.item, dialect)
        elif step.answers is None:
            yield step.item
        made = [
            results.get((at, number)) or dialect.missing_result(step.item, call_id)
            for number, call_id in enumerate(step.calls)
        ]
        if dialect.unique_call_ids:
            rename_repeated_calls(step, made, seen)
        yield from made


def orphan_as_text(item: Json, dialect: Dialect) -> Json:
    """A user turn with the text of a result whose call is not there."""
    content = dialect.result_content(item)
    text = text_of(content)
    if content and not text:
        text = dumps(content).decode("utf-8", "replace")[:MAX_ERROR_TEXT]
    return {"role": "user", "content": ORPHAN + text}


# ---- What strict upstreams refuse: nulls, emptiness, ids, names, schemas ----


def tidy_history(edit: Edit, dialect: Dialect, model: Model) -> None:
    """Make all parts of a conversation, and the names of tools, fit for strict upstreams."""
    body, key = edit.body, dialect.turns_key
    drop_nulls(edit, body)
    dialect.drop_foreign_fields(edit, model)

    if edit.is_words:
        fit_names(edit, [])
        return

    calls: list[Json] = []
    kept: list[Json] = []
    for item in as_list(body.get(key)):
        if None in item.values():
            drop_nulls(edit, item, "content", "output")
        content = item.get("content") or item.get("output")
        if isinstance(content, list):
            calls += tidy_parts(edit, content)
        if dialect.tidy_item(edit, item, model):
            calls += dialect.calls_in(item)
            kept.append(item)

    if kept:
        edit.replace(body, key, kept)
    fit_names(edit, calls)


def tidy_parts(edit: Edit, parts: list[Any]) -> list[Json]:
    """Make the parts of one item fit for strict upstreams; returns the tool calls among them."""
    calls: list[Json] = []
    for part in parts:
        if not isinstance(part, dict):
            continue
        if None in part.values():
            drop_nulls(edit, part)
        kind = part.get("type")
        if kind == "tool_use":
            calls.append(part)
            fit_id(edit, part, "id")
            if not isinstance(part.get("input"), dict):
                edit.set(part, "input", arguments_object(str(part.get("input") or "")))
        elif kind == "tool_result":
            fit_id(edit, part, "tool_use_id")
        elif kind == "image_url":
            drop_nulls(edit, as_object(part.get("image_url")))
    return calls


def fit_names(edit: Edit, calls: list[Json]) -> None:
    """Names of tools that the upstream would refuse become short ones everywhere alike, which
    `restore_names` turns back in the answer."""
    tools = list(
        map(as_object, as_list(edit.body.get("tools")) + [edit.body.get("tool_choice")])
    )
    tools += [
        inner
        for tool in tools
        for inner in as_list(
            tool.get("tools") or as_object(tool.get("allowed_tools")).get("tools")
        )
    ]

    for tool in map(as_object, tools + calls):
        tool = as_object(tool.get("function")) or tool
        name = tool.get("name")
        if isinstance(name, str) and not _TOOL_NAME.match(name):
            short = stable_id(re.sub(r"[^A-Za-z0-9_-]", "_", name)[:31] + "_", name)
            edit.names[dumps(short)] = dumps(name)
            edit.set(tool, "name", short)


# ---- Schemas of tools for OpenAI ----


def fit_openai_schema(edit: Edit, schema: Json) -> bool:
    """Give objects their `properties` and arrays their `items`, which OpenAI's validator demands.
    Returns False when not every property is required, as strict tools must have it."""
    is_strict = True
    for node in schema_nodes(schema):
        kind = node.get("type")
        if kind == "array" and "items" not in node:
            edit.set(node, "items", {})
        if kind != "object":
            continue
        if not isinstance(node.get("properties"), dict):
            edit.set(node, "properties", {})
        if len(as_list(node.get("required"))) < len(node["properties"]):
            is_strict = False
    return is_strict


def schema_nodes(schema: Json) -> Iterator[Json]:
    """Every schema inside a schema, itself first.  A property may have any name, also that of a
    word of JSON Schema."""
    todo: list[Any] = [schema]
    while todo:
        node = todo.pop()
        if not isinstance(node, dict):
            continue
        yield node
        for word_ in ("items", "additionalProperties", "not"):
            todo.append(node.get(word_))
        for word_ in ("anyOf", "oneOf", "allOf", "prefixItems"):
            todo.extend(as_list(node.get(word_)))
        for word_ in ("properties", "$defs", "definitions"):
            todo.extend(as_object(node.get(word_)).values())


def fit_openai_tools(edit: Edit, upstream: Dialect) -> None:
    """Tools as OpenAI's models take them."""
    for tool in upstream.function_tools(edit.body):
        schema = tool.get(upstream.schema_key)
        if not isinstance(schema, dict):
            continue
        is_strict = fit_openai_schema(edit, schema)
        if tool.get("strict") is True and not is_strict:
            edit.set(tool, "strict", False)
            edit.lose("strict", "not every property of the tool is required")


# ---- Schemas of tools for Gemini ----

_GEMINI_WORDS = (
    "type",
    "description",
    "title",
    "nullable",
    "enum",
    "items",
    "properties",
    "format",
    "required",
    "minimum",
    "maximum",
    "minItems",
    "maxItems",
    "minLength",
    "maxLength",
    "pattern",
)
_GEMINI_FORMATS = ("date-time", "enum", "int32", "int64", "float", "double")
_JSON_TYPES = {int: "integer", float: "number", bool: "boolean"}
MAX_SCHEMA_DEPTH = 40
#: what references may copy into all schemas of a request: they may refer to themselves
MAX_COPIED_NODES, MAX_COPIED_CHARS = 20_000, 1_000_000
_KEY_CHARS = 8  # that a key counts for


class GeminiSchema:
    """Rewrites the JSON schemas of a request's tools in the words that Gemini knows.

    Gemini takes a subset of OpenAPI: no `$ref`, `allOf`, `oneOf`, `const` or lists of types, and
    `enum` for strings only.  What it has no word for is expressed with the words it has, or goes
    into the description.  Schemas may be recursive, so their depth and what references copy is
    bounded; what lies beyond becomes an empty object."""

    def __init__(self) -> None:
        self._root: Json = {}  # where references point to
        self._nodes_left = MAX_COPIED_NODES
        self._chars_left = MAX_COPIED_CHARS

    def convert(self, schema: Json) -> Json:
        """{"$ref": "#/$defs/a"} -> {"type": "string", ...}; `schema` itself stays as it is."""
        self._root = schema
        return self._convert(schema, 0, False)

    def _convert(self, schema: Any, depth: int, is_copy: bool) -> Json:
        """One node.  is_copy: a reference has led here."""
        node = as_object(schema)
        if "$ref" in node:
            node, is_copy = self._resolve(node), True
        if is_copy:
            self._count_copy(node)
        if depth > MAX_SCHEMA_DEPTH or self._nodes_left <= 0 or self._chars_left <= 0:
            return {"type": "object", "properties": {}}

        listed = node.get("anyOf") or node.get("oneOf")
        choices = [
            self._convert(choice, depth + 1, is_copy)
            for choice in as_list(listed)
            if as_object(choice).get("type") != "null"
        ]
        merged = [
            self._convert(part, depth + 1, is_copy)
            for part in as_list(node.get("allOf"))
        ]
        out = self._plain_words(node, is_nullable=len(choices) < len(as_list(listed)))
        out = self._merge(out, merged + (choices if len(choices) == 1 else []))

        # beside properties, the choices only vary what is required
        if len(choices) > 1 and "properties" not in out:
            about: Json = {
                key: out[key] for key in ("description", "nullable") if key in out
            }
            return dict(about, anyOf=choices)

        self._list_values(node, out)
        if out.get("format") not in _GEMINI_FORMATS:
            out.pop("format", None)
        self._fill(out, depth, is_copy)
        return out

    def _count_copy(self, node: Json) -> None:
        """A node's own words are written once more; nodes inside it are counted when it is their
        turn."""
        words = [
            value
            for key, value in node.items()
            if key in _GEMINI_WORDS or key == "const"
        ]
        self._nodes_left -= 1
        self._chars_left -= sum(len(word) for word in words if isinstance(word, str))
        for key in ("enum", "const", "required"):
            if isinstance(node.get(key), (list, dict)):
                self._chars_left -= len(dumps(node[key]))

    def _resolve(self, node: Json) -> Json:
        """The node with its reference replaced by what it points to; its own words win."""
        for _ in range(MAX_SCHEMA_DEPTH):
            reference = node.get("$ref")
            if not isinstance(reference, str) or self._chars_left <= 0:
                break
            target = self._root
            for name in reference.strip("#/").split("/"):
                target = as_object(target.get(name))
            self._chars_left -= len(reference) + _KEY_CHARS * (len(target) + len(node))
            own = {key: value for key, value in node.items() if key != "$ref"}
            node = dict(target, **own)
        return node

    @staticmethod
    def _plain_words(node: Json, is_nullable: bool) -> Json:
        """The words that Gemini knows; of a list of types the first that is not null."""
        out = {
            key: value
            for key, value in node.items()
            if key in _GEMINI_WORDS and key != "type"
        }
        kinds = as_list(node.get("type")) or [node.get("type")]
        named = [kind for kind in kinds if isinstance(kind, str) and kind != "null"]
        if named:
            out["type"] = named[0]
        if is_nullable or "null" in kinds:
            out["nullable"] = True
        return out

    @staticmethod
    def _merge(out: Json, parts: list[Json]) -> Json:
        """All of these schemas at once; where they differ `out` wins, else an earlier one."""
        merged: Json = {}
        properties: Json = {}
        required: list[Any] = []
        for part in [*reversed(parts), out]:
            merged.update(part)
            properties.update(as_object(part.get("properties")))
            required += as_list(part.get("required"))
        if parts and properties:
            merged.update(properties=properties, required=required)
        return merged

    @staticmethod
    def _list_values(node: Json, out: Json) -> None:
        """Only strings can be listed; other values are named in the description."""
        options = as_list(out.pop("enum", None))
        if "const" in node:
            options = [node["const"]]
        if "type" not in out:
            out["type"] = GeminiSchema._guess_type(out, options)
        if not options:
            return

        words = [option for option in options if isinstance(option, str) and option]
        if words and out["type"] == "string":
            out["enum"] = words
        else:
            about = out.get("description") or ""
            out["description"] = f"{about} One of {dumps(options).decode()}.".lstrip()

    @staticmethod
    def _guess_type(out: Json, options: list[Any]) -> str:
        """The type that a schema without one must mean."""
        if "properties" in out:
            return "object"
        if "items" in out:
            return "array"
        if options:
            return _JSON_TYPES.get(type(options[0]), "string")
        return "string"

    def _fill(self, out: Json, depth: int, is_copy: bool) -> None:
        """Convert what an array or object holds; Gemini insists on `items` and `properties`."""
        items = out.pop("items", None)
        properties = out.pop("properties", None)
        required = out.pop("required", None)

        if out["type"] == "array":
            if isinstance(items, list) and items:  # a tuple: one schema must do for all
                items = items[0]
            is_given = bool(as_object(items))
            out["items"] = {"type": "string"}
            if is_given:
                out["items"] = self._convert(items, depth + 1, is_copy)
        elif out["type"] == "object":
            inner = {
                name: self._convert(value, depth + 1, is_copy)
                for name, value in as_object(properties).items()
            }
            out["properties"] = inner
            named = [
                name
                for name in as_list(required)
                if isinstance(name, str) and name in inner
            ]
            if named:
                out["required"] = list(dict.fromkeys(named))


def gemini_schema(schema: Json) -> Json:
    """A tool's schema in the words that Gemini knows, references put in."""
    return GeminiSchema().convert(schema)


# ---- The prompt cache, images ----


def drop_nonce(edit: Edit) -> None:
    """Claude Code's first system line is another in each request and defeats the prompt cache."""
    body = edit.body
    first = (as_list(body.get("messages") or body.get("input")) or [{}])[0]
    heads = [(body, "system"), (body, "instructions"), (as_object(first), "content")]
    heads += [
        (as_object(block), "text")
        for holder, key in heads
        for block in as_list(holder.get(key))
    ]
    for holder, key in heads:
        text = holder.get(key)
        if isinstance(text, str) and text.startswith(_NONCE_LINE):
            edit.set(holder, key, text.partition("\n")[2])


class LinkedImage(NamedTuple):
    """A part of a conversation whose image somebody has to fetch.  holder: the object in it that
    holds the URL, under `key`."""

    part: Json
    holder: Json
    key: str
    url: str

    def put(self, media_type: str, data: str) -> None:
        """The image itself, as base64, in place of its URL."""
        if self.holder.get("type") == "url":  # Anthropic's words
            self.holder.update(type="base64", media_type=media_type, data=data)
            del self.holder[self.key]
        else:
            self.holder[self.key] = "data:%s;base64,%s" % (media_type, data)


def gemini_links(body: Json) -> list[LinkedImage]:
    """The same in Gemini's words, which become a data: URL in the place of the address."""
    found = []
    for content in as_list(body.get("contents")):
        for part in map(as_object, gemini_parts(content)):
            for name, key in (("fileData", "fileUri"), ("file_data", "file_uri")):
                file = as_object(part.get(name))
                kind = file.get("mimeType") or file.get("mime_type") or "image/"
                url = str(file.get(key) or "")
                if is_image_address(url, str(kind)):
                    found.append(LinkedImage(part, file, key, url))
    return found


def linked_images(body: Json) -> list[LinkedImage]:
    """All that are named by URL, in order."""
    found = []
    for part in content_parts(body):
        holder = as_object(part.get("source") or part.get("image_url")) or part
        key = "image_url" if holder is part else "url"
        url = holder.get(key)
        if (
            part.get("type") in IMAGE_TYPES
            and isinstance(url, str)
            and not is_inline_image(url)
        ):
            found.append(LinkedImage(part, holder, key, url))
    return found + gemini_links(body)


def last_turn(body: Json) -> Json:
    """A body that holds nothing but the last turn of a conversation."""
    turns = as_list(body.get("messages")) or as_list(body.get("input"))
    return {"messages": turns[-1:]}


def image_parts(body: Json) -> list[Json]:
    """The images of a conversation, in order."""
    return [part for part in content_parts(body) if part.get("type") in IMAGE_TYPES]


def put_note(part: Json) -> None:
    """Turn an image into a few words that say that it was left out."""
    kind = "text"
    if part.get("type") == "input_image":
        kind = "input_text"
    note = given(
        type=kind if "type" in part else None,
        cache_control=part.get("cache_control"),
        text=SHED_IMAGE,
    )
    part.clear()
    part.update(note)


def shed_images(
    edit: Edit, size: int, limit: int = MAX_SENT_BYTES, most: int = MAX_IMAGES
) -> bool:
    """A note instead of the oldest images until at most `most` are left in a body of `size` bytes,
    now within the limit; never of those in the last turn.  Was there one?"""
    images, asked = image_parts(edit.body), image_parts(last_turn(edit.body))
    left = len(images)
    for part in images[: len(images) - len(asked)]:
        if left <= most and size <= limit:
            break
        size, left = size - len(dumps(part)), left - 1
        put_note(part)
        edit.lose("images", "the upstream takes no more")
    return left < len(images)


KIMI_SAMPLING = {"temperature": 1, "top_p": 0.95}


def limit_images(edit: Edit, most: int) -> None:
    """No more images than the model's family takes.  Raises BadRequest where the last turn alone
    has too many."""
    asked = len(image_parts(last_turn(edit.body)))
    if asked > most:
        raise BadRequest(
            "this model takes at most %d images, and the last turn has %d"
            % (most, asked)
        )
    shed_images(edit, 0, most=most)


def fit_kimi(edit: Edit, model: Model) -> None:
    """Kimi knows its own tool calls by ids that it makes itself, counted over the conversation:
    with others it goes astray.  At a temperature of 0 it says the same for ever."""
    if model.version < (3,):
        form = "functions.%s:%d"
    else:
        form = "%s:%d"
    new_ids: dict[str, str] = {}
    for message in dicts_in(edit.body, "messages"):
        for call in dicts_in(message, "tool_calls"):
            name = str(as_object(call.get("function")).get("name"))
            new_ids[str(call.get("id"))] = form % (name, len(new_ids))
            edit.set(call, "id", new_ids[str(call.get("id"))])
        call_id = str(message.get("tool_call_id"))
        if call_id in new_ids:
            edit.set(message, "tool_call_id", new_ids[call_id])

    for name, value in KIMI_SAMPLING.items():
        if edit.body.get(name, value) != value:
            edit.lose(name, "Kimi's own is %g" % value)
        edit.set(edit.body, name, value)


# ---- Compaction ----

COMPACTION_TRIGGER = (
    "compaction_trigger"  # with it as last item Codex asks for a compaction
)
SUMMARY_HEAD = (
    "Summary of the conversation so far, whose full text is not there any more:\n\n"
)
UNREADABLE_SUMMARY = (
    "[a summary of earlier turns stood here that only another model can read]"
)


def expand_compactions(edit: Edit, upstream: Dialect) -> None:
    """Our own compactions become text and replace what models did before; the upstream's stay
    where they can be read."""
    items = as_list(edit.body.get("input"))
    kinds = [str(as_object(item).get("type")) for item in items]
    if COMPACTION_TRIGGER not in kinds and not any(
        kind in COMPACTIONS for kind in kinds
    ):
        return
    summaries: dict[int, str] = {}  # place -> text, of those packed here
    for at, (item, kind) in enumerate(zip(items, kinds)):
        if kind in COMPACTIONS:
            packed = unpack_opaque(item.get("encrypted_content"))
        else:
            packed = []
        if packed:
            summaries[at] = packed[0][2]

    kept: list[Any] = []
    last_summary = max(summaries, default=-1)
    for at, (item, kind) in enumerate(zip(items, kinds)):
        if at in summaries:
            item = {"role": "user", "content": SUMMARY_HEAD + summaries[at]}
        elif kind in COMPACTIONS and not upstream.reads_compactions:
            edit.lose("compaction", FOREIGN_STATE)
            item = {"role": "user", "content": UNREADABLE_SUMMARY}
        is_replaced = at < last_summary and as_object(item).get("role") not in (
            "user",
            "system",
            "developer",
        )
        if not is_replaced and (kind != COMPACTION_TRIGGER or item is items[-1]):
            kept.append(item)
    edit.replace(edit.body, "input", kept)


def compaction_request(body: Json, native: bool) -> Json:
    """The request for a compaction item, or for a summary; its items are those of `body`."""
    items = [
        item for item in input_items(body) if item.get("type") != COMPACTION_TRIGGER
    ]
    # both leave out the same, so that a bad value there is not taken for a refusal to compact
    asked = {
        key: value
        for key, value in body.items()
        if key not in ("text", "max_output_tokens", "tool_choice")
    }
    if native:
        return dict(asked, stream=False, input=[*items, {"type": COMPACTION_TRIGGER}])
    if body.get("tools"):
        asked["tool_choice"] = "none"  # they stay: the history may name them
    return dict(
        asked, stream=False, input=[*items, {"role": "user", "content": SUMMARY_PROMPT}]
    )


def fit_body(edit: Edit, upstream: Dialect, model: Model) -> None:
    """Make a body in the upstream's dialect fit for it.  Raises BadRequest."""
    pair_calls(edit, upstream)
    upstream.prepare(edit, model)
    tidy_history(edit, upstream, model)
    if model.is_claude and model.version >= (4, 6):
        end_with_user(edit)
    upstream.fit_cache(edit, model)
    if model.is_openai:
        fit_openai_tools(edit, upstream)
    if model.is_kimi:
        fit_kimi(edit, model)
    if model.most_images:
        limit_images(edit, model.most_images)
    if model.is_gemini:
        schemas = GeminiSchema()
        for holder, key in upstream.tool_schemas(edit.body):
            edit.set(holder, key, schemas.convert(holder[key]))


def translate_request(
    client: Dialect, upstream: Dialect, before: Edit, model: Model
) -> tuple[Edit, Request]:
    """(a body that is fit for the upstream, the request in neutral words).
    before: the normalised request, which may be changed.  Raises BadRequest for what would change
    the meaning."""
    drop_nonce(before)
    expand_compactions(before, upstream)
    request = client.decode_request(before.body)
    for name, reason in before.losses:
        request.lose(name, reason)
    edit = Edit(upstream.encode_request(request, model), request.losses)
    fit_body(edit, upstream, model)
    return edit, request


# ==== 9. Planning =================================================================================
# Which model is meant, may it be asked in this dialect, how long is a prompt.

_FAMILIES = ("opus", "sonnet", "haiku", "fable")

#: what clients hang behind a model's id, taken off one at a time: all in one pattern froze
_SUFFIX = re.compile(
    r"(?:[-:]latest|@[\w-]+|-v\d+(?::\d+)?|-20\d{6}|-20\d\d-\d\d-\d\d)\Z"
)


def normalise_model(asked: str) -> list[str]:
    """The ids that a client's spelling may stand for, most literal first.
    'anthropic/claude-haiku-4-5-20251001' -> [..., 'claude-haiku-4-5', 'claude-haiku-4.5']"""
    names = [asked, asked.strip().lower()]
    plain = names[1]
    while plain.endswith("[1m]"):
        plain = plain[: -len("[1m]")]
    bare = re.sub(r"\A(?:us\.|eu\.|apac\.)?anthropic\.", "", plain.rsplit("/", 1)[-1])
    steady, is_shorter = _SUFFIX.subn("", bare)
    while is_shorter:
        steady, is_shorter = _SUFFIX.subn("", steady)
    dotted = re.sub(r"(?<=\d)-(?=\d)", ".", steady)
    if plain != names[1]:
        names += [dotted + "-1m", dotted + "-1m-internal"]
    names += [plain, bare, steady, dotted]
    return [name for at, name in enumerate(names) if name and name not in names[:at]]


#: Models that GitHub has retired from Copilot -> the day, "" where only the fact is known.  From
#: the table data/tables/copilot/model-deprecation-history.yml of github/docs and GitHub's
#: announcements up to August 2026.  An account that still lists such a model gets it all the same.
RETIRED_MODELS: Mapping[str, str] = {
    "gpt-3.5-turbo": "",
    "gpt-4": "",
    "gpt-4-turbo": "",
    "gpt-4o": "",
    "gpt-4o-mini": "",
    "gpt-4.5-preview": "",
    "gpt-4.1": "2026-06-01",
    "o1": "",
    "o1-preview": "",
    "o1-mini": "2025-10-23",
    "o3": "2025-10-23",
    "o3-mini": "2025-10-23",
    "o4-mini": "2025-10-23",
    "gpt-5": "2026-02-17",
    "gpt-5-codex": "2026-02-17",
    "gpt-5.1": "2026-04-01",
    "gpt-5.1-codex": "2026-04-01",
    "gpt-5.1-codex-mini": "2026-04-01",
    "gpt-5.1-codex-max": "2026-04-01",
    "gpt-5.2": "2026-06-05",
    "gpt-5.2-codex": "2026-06-05",
    "claude-3.5-sonnet": "2025-11-06",
    "claude-3.7-sonnet": "2025-10-23",
    "claude-3.7-sonnet-thought": "2025-10-23",
    "claude-sonnet-4": "2026-05-01",
    "claude-opus-4": "2025-10-23",
    "claude-opus-4.1": "2026-02-17",
    "gemini-2.0-flash": "2025-10-23",
    "gemini-2.0-flash-001": "2025-10-23",
    "gemini-3-pro": "2026-03-26",
    "gemini-3-pro-preview": "2026-03-26",
    "grok-code-fast-1": "2026-05-15",
}
#: names that clients have built in, which no list has -> what serves them, best first
BUILT_IN_NAMES: Mapping[str, tuple[str, ...]] = {
    # the model by which Codex judges what wants to leave its sandbox
    "codex-auto-review": ("gpt-5.6-luna", "gpt-5.4-mini", "gpt-5.4-nano", "gpt-5-mini")
}
CHEAP_MODEL = "gpt-5-mini"  # answers for a retired model whose line has ended

_LINES = {"chatgpt": "gpt", "codex": "gpt"}  # first words that belong to another line
_LIGHT_WORDS = frozenset(
    {"mini", "nano", "flash", "lite", "haiku", "luna", "fast", "instant"}
)
_OTHER_WORDS = frozenset({"pro", "code", "codex", "opus", "sonnet", "fable"})
#: words that name no other model, only a state, a mode or an effort of one
_PLAIN_WORDS = frozenset(
    {
        "preview",
        "exp",
        "chat",
        "turbo",
        "instruct",
        "vision",
        "thinking",
        "thought",
        "reasoning",
        "low",
        "medium",
        "high",
        "xhigh",
        "max",
        "picker",
    }
)


@dataclass(frozen=True)
class ModelName:
    """A model's name, taken apart.
    'gpt-5.1-codex-mini' -> line 'gpt', version (5, 1), words {'codex', 'mini'}"""

    line: str
    version: tuple[int, ...]
    words: frozenset[str]

    @classmethod
    def parse(cls, name: str) -> ModelName:
        """From a lower-case name whose version has a dot."""
        first, *others = name.split("-")
        line = _LINES.get(first, first)
        words = {first} & {"codex"}
        version: tuple[int, ...] = ()
        if re.fullmatch(r"o\d", first):  # the reasoning models that GPT-5 replaced
            line = "gpt"
            version = (5,)

        for word in others:
            number = re.fullmatch(
                r"k?(\d{1,9})(?:\.(\d{1,9}))?[a-z]?", word
            )  # 5.1, 4o, k2.7
            if number is None:
                words.add(word)
            elif not version:
                version = tuple(int(part) for part in number.groups() if part)

        if line == "claude" and not words:
            words.add("sonnet")  # claude-2.1: a name without a class
        return cls(line, version, frozenset(words))

    @property
    def is_light(self) -> bool:
        """Is it one of the small, cheap ones?  The GPTs before 5 count among them: they cost no
        premium request, and GPT-5 mini is what is left of that kind."""
        is_old_gpt = self.line == "gpt" and () < self.version < (5,)
        return is_old_gpt or bool(self.words & _LIGHT_WORDS)

    @property
    def number(self) -> int:
        """The version as one number: (5, 3) -> 5003."""
        major, minor = (*self.version, 0, 0)[:2]
        return major * 1000 + minor

    def distance_to(self, other: ModelName) -> tuple[int, ...]:
        """Smallest for the model that replaces this one best: of the same size and kind, rather
        the next newer version than an older one.  Without a version the newest is meant."""
        differing = len((self.words ^ other.words) - _PLAIN_WORDS)
        unlike = int(self.is_light != other.is_light)
        if not self.version:
            return unlike, differing, -other.number
        is_older = int(other.version < self.version)
        return unlike, differing, is_older, abs(self.number - other.number)


def _newest_claude(name: str, models: list[Model]) -> Model | None:
    """The model for any version of a Claude class: the next newer one, else the newest."""
    family = next(
        (f for f in _FAMILIES if re.search(r"(?:\A|-)%s(?:-|\Z)" % f, name)), ""
    )
    if not family or not ("claude" in name or name == family):
        return None

    kin = [
        m
        for m in models
        if re.fullmatch(r"claude-%s-[\d.]+" % family, m.id)
        and m.entry.get("preview") is not True
    ]
    kin = kin or [m for m in models if "claude-%s" % family in m.id]

    version = ModelName.parse(name).version
    if re.match(r"claude-\d", name):  # claude-3.5-haiku: any newer one will do
        version = ()
    at_least = [m for m in kin if len(version) > 1 and m.version >= version]
    if at_least:
        return min(at_least, key=lambda m: m.version)
    return max(kin, key=lambda m: m.version, default=None)


def _nearest_in_line(name: str, models: list[Model]) -> Model | None:
    """The model of the same line that comes nearest.  None for a name with words that nobody
    knows, which may be mistyped, and for one that says no more than the line."""
    asked = ModelName.parse(name)
    kin = [(ModelName.parse(model.id), model) for model in models]
    kin = [(parsed, model) for parsed, model in kin if parsed.line == asked.line]

    known = _LIGHT_WORDS | _OTHER_WORDS | _PLAIN_WORDS
    known = known.union(*(parsed.words for parsed, _ in kin))
    if not kin or not asked.words <= known or not (asked.version or asked.words):
        return None

    if asked.line == "claude":  # a class that this account does not have
        newest = max(parsed.version for parsed, _ in kin)
        is_older = () < asked.version < newest
        if not is_older and name not in RETIRED_MODELS:
            return None
    return min(kin, key=lambda pair: asked.distance_to(pair[0]))[1]


def _cheap_model(models: list[Model]) -> Model | None:
    """What answers where the line of a retired model has ended."""
    for model in models:
        if model.id == CHEAP_MODEL:
            return model
    light = [m for m in models if ModelName.parse(m.id).is_light]
    usual = [m for m in models if m.entry.get("is_chat_default") is True]
    return next(iter(light + usual + models), None)


def _is_gemini_helper(name: str) -> bool:
    """Gemini CLI asks small models of Google's by itself, which an account may not have."""
    parsed = ModelName.parse(name)
    known = _LIGHT_WORDS | _OTHER_WORDS | _PLAIN_WORDS
    return parsed.line == "gemini" and bool(parsed.version) and parsed.words <= known


def retirement_of(asked: str) -> str:
    """'GitHub retired it on 2026-06-01', "" for a model that is not known to be retired."""
    for name in normalise_model(asked[:MAX_MODEL_CHARS]):
        if name in RETIRED_MODELS:
            day = RETIRED_MODELS[name]
            return "GitHub retired it" + (day and " on " + day)
    return ""


#: models that search the web for others, the cheapest first; after them any GPT from 5 on
SEARCH_MODELS = ("gpt-5-mini", "gpt-5.4-mini", "gpt-5.4-nano", "gpt-5.6-luna")
QUERY_HEAD = "Perform a web search for the query:"  # of Claude Code


@dataclass(frozen=True)
class SearchWish:
    """A search of the web.  filters, location: of the tool, in OpenAI's words."""

    query: str
    filters: Json = field(default_factory=dict)
    location: Json | None = None

    @classmethod
    def of_message(cls, body: Json) -> SearchWish:
        """From a request whose only tool is Anthropic's search."""
        turns = dicts_in(body, "messages")
        texts = [
            text_of(turn.get("content")) for turn in turns if turn.get("role") == "user"
        ]
        query = "".join(texts[-1:]).strip()
        if query.startswith(QUERY_HEAD):
            query = query[len(QUERY_HEAD) :].strip()

        tool = (dicts_in(body, "tools") or [{}])[0]
        filters = given(
            allowed_domains=words(tool.get("allowed_domains")) or None,
            blocked_domains=words(tool.get("blocked_domains")) or None,
        )
        return cls(query, filters, as_object(tool.get("user_location")) or None)

    def request(self, model: Model) -> Json:
        """The body for /responses."""
        tool = given(
            type="web_search", filters=self.filters or None, user_location=self.location
        )
        part = {"type": "input_text", "text": self.query[:MAX_QUERY_CHARS]}
        return {
            "model": model.id,
            "input": [{"role": "user", "content": [part]}],
            "tools": [tool],
            "stream": False,
            "store": False,
        }


def search_blocks(query: str, use: str, content: Any) -> list[Json]:
    """The call of a search and its result, or its error."""
    return [
        {
            "type": "server_tool_use",
            "id": use,
            "name": "web_search",
            "input": {"query": query},
        },
        {"type": "web_search_tool_result", "tool_use_id": use, "content": content},
    ]


@dataclass(frozen=True)
class SearchResult:
    """What a search has found.  sources: (url, title), each url once."""

    text: str
    sources: list[tuple[str, str]]
    usage: Usage | None = None

    @classmethod
    def read(cls, answer: Json, usage: Usage | None) -> SearchResult:
        """From the model's answer.  Raises UpstreamError where it has not searched."""
        items = dicts_in(answer, "output")
        parts = [part for item in items for part in dicts_in(item, "content")]
        marks = [mark for part in parts for mark in dicts_in(part, "annotations")]
        sources: dict[str, str] = {}
        for mark in marks[:MAX_SOURCES]:
            url = mark.get("url")
            if mark.get("type") == "url_citation" and isinstance(url, str):
                sources.setdefault(url, str(mark.get("title") or url))

        text = text_of(parts).strip()
        has_searched = any(item.get("type") == "web_search_call" for item in items)
        if not text or not (has_searched or sources):
            raise UpstreamError("the model did not search")
        return cls(text, list(sources.items()), usage)

    @property
    def told(self) -> str:
        """The words with the sources behind them."""
        lines = ["- %s: %s" % (title, url) for url, title in self.sources]
        if lines:
            return "\n".join([self.text, "", "Sources:", *lines])
        return self.text

    def blocks(self, query: str, use: str) -> list[Json]:
        """As Anthropic's search tells it; the opaque content is ours and carries nothing."""
        results = [
            {
                "type": "web_search_result",
                "url": url,
                "title": title,
                "page_age": None,
                "encrypted_content": pack_opaque("search", None, url),
            }
            for url, title in self.sources
        ]
        return [
            *search_blocks(query, use, results),
            {"type": "text", "text": self.told},
        ]


def search_frames(message: Json) -> bytes:
    """A whole message as a stream: the input of a call and texts come as deltas."""
    usage = message["usage"]
    head = dict(
        message,
        content=[],
        stop_reason=None,
        usage=dict(usage, output_tokens=0),
    )
    events: list[Json] = [{"type": "message_start", "message": head}]
    for at, block in enumerate(message["content"]):
        shown, delta = block, None
        if block["type"] == "server_tool_use":
            shown = dict(block, input={})
            text = dumps(block["input"]).decode()
            delta = {"type": "input_json_delta", "partial_json": text}
        elif block["type"] == "text":
            shown = dict(block, text="")
            delta = {"type": "text_delta", "text": block["text"]}
        events.append(
            {"type": "content_block_start", "index": at, "content_block": shown}
        )
        if delta:
            events.append({"type": "content_block_delta", "index": at, "delta": delta})
        events.append({"type": "content_block_stop", "index": at})

    end = {"stop_reason": message["stop_reason"], "stop_sequence": None}
    events.append({"type": "message_delta", "delta": end, "usage": usage})
    events.append({"type": "message_stop"})
    return b"".join(Frame(event["type"], dumps(event)).encode() for event in events)


AUTO_NAMES = ("auto", "copilot-auto")
AUTO_TIERS = ("efficiency", "balance", "intelligence")


def auto_tier(asked: str) -> str | None:
    """'auto' -> "", 'auto:balance' -> "balance"; None for the name of a model."""
    name, colon, tier = asked.strip().lower().partition(":")
    is_tier = tier in AUTO_TIERS or not colon
    if name in AUTO_NAMES and is_tier:
        return tier
    return None


@dataclass(frozen=True)
class AutoWish:
    """What `auto` chooses a model by.  key: of the conversation; prompt: the newest words of the
    user; summary: a mark of what stands for turns that were compacted, "" where none does."""

    key: str
    tier: str
    prompt: str
    has_image: bool = False
    summary: str = ""

    @classmethod
    def read(cls, key: str | None, tier: str, body: Json) -> AutoWish:
        """From a request of any dialect.  Without a key its beginning stands for one."""
        texts: list[str] = []
        summary = ""
        turns = body.get("messages", body.get("input", body.get("contents")))
        if isinstance(turns, str):
            texts.append(turns)
        for turn in map(as_object, as_list(turns)):
            text = text_of(turn.get("content", turn.get("parts"))).strip()
            if turn.get("role") == "user" and text and not is_reminder(text):
                texts.append(text)
            if turn.get("type") in COMPACTIONS or text.startswith(CONTINUED):
                summary = stable_id("", text or str(turn.get("encrypted_content")))

        texts = texts or [text_of(body.get("prompt")) or "hello"]
        system = text_of(body.get("system", body.get("instructions")))
        key = key or stable_id("", system + texts[0])
        return cls(
            key,
            tier,
            texts[-1].strip()[:MAX_AUTO_CHARS],
            Dialect.has_images(body),
            summary,
        )

    def fits(self, old: AutoWish, model: Model) -> bool:
        """May the choice for an older wish go on?  The prompt cache is lost with another model."""
        sees = (
            not self.has_image or old.has_image or model.supports.get("vision") is True
        )
        return sees and self.tier == old.tier and self.summary == old.summary


def auto_models(models: list[Model]) -> list[Model]:
    """Entries for `auto` and its tiers, with the limits that hold whatever is chosen."""
    routable = [m for m in models if m.prices.auto_discount] or [
        m for m in models if m.kind == "chat" and m.is_listed
    ]
    prompt = min(
        (
            m.limit("max_prompt_tokens")
            for m in routable
            if m.limit("max_prompt_tokens")
        ),
        default=AUTO_PROMPT_TOKENS,
    )

    output = min(
        (
            m.limit("max_output_tokens")
            for m in routable
            if m.limit("max_output_tokens")
        ),
        default=AUTO_OUTPUT_TOKENS,
    )

    limits = {
        "max_prompt_tokens": prompt,
        "max_output_tokens": output,
        "max_context_window_tokens": prompt + output,
    }

    paths = (CHAT.path, RESPONSES.path, MESSAGES.path)
    return [
        Model(
            name,
            "Auto" + name[4:].replace(":", ": "),
            "GitHub",
            endpoints=paths,
            limits=limits,
            supports={"tool_calls": True},
            picker=True,
        )
        for name in ("auto", *("auto:" + tier for tier in AUTO_TIERS))
    ]


def listed_models(
    models: list[Model], everything: bool = False, has_auto: bool = False
) -> list[Model]:
    """Those meant for users, and `auto` where the account has it or nothing else to chat with."""
    shown = [model for model in models if model.is_listed or everything]
    is_bare = bool(models) and all(model.kind != "chat" for model in shown)
    if has_auto or is_bare or any(model.prices.auto_discount for model in models):
        shown = auto_models(models) + shown
    return shown


def resolve_model(
    asked: str, models: list[Model], aliases: Mapping[str, str]
) -> Model | None:
    """The catalogue entry that `asked` means: alias, exact id, normalised spelling, nearest of the
    same family for an unknown or retired name, for a retired one without a family a cheap model.
    None when nothing fits.  Whether it is the model that was asked for says `is_same_model`."""
    asked = aliases.get(asked, asked)
    if not asked or len(asked) > MAX_MODEL_CHARS:
        return None
    if auto_tier(asked) is not None:
        return next((m for m in models if m.entry.get("is_chat_default") is True), None)

    by_id = {m.id: m for m in models}
    names = normalise_model(asked)
    for name in names:
        if name in by_id:
            return by_id[name]

    usable = [m for m in models if m.is_listed and m.kind == "chat"]
    for name in BUILT_IN_NAMES.get(asked, ()):
        if name in by_id:
            return by_id[name]
    if asked in BUILT_IN_NAMES:
        return _cheap_model(usable)
    nearest = _newest_claude(names[-1], usable) or _nearest_in_line(names[-1], usable)
    if nearest is None and (retirement_of(asked) or _is_gemini_helper(names[-1])):
        return _cheap_model(usable)
    return nearest


def is_same_model(asked: str, model: Model) -> bool:
    """Does `asked` name this model, in whatever spelling?  A bare class ('opus') names the newest
    of it; every other name that led to the model was substituted."""
    if asked == model.id or asked in BUILT_IN_NAMES:
        return True
    names = normalise_model(asked)
    return model.id in names or re.sub(r"\Aclaude-", "", names[-1]) in _FAMILIES


def _most_alike(name: str, ids: list[str], most: int) -> list[str]:
    """The ids that share most pieces of three letters with `name`: a quick choice of those that
    are worth a closer look."""
    pieces = {name[at : at + 3] for at in range(max(len(name) - 2, 1))}
    return sorted(
        ids, key=lambda one: sum(piece in one for piece in pieces), reverse=True
    )[:most]


def nearest_ids(asked: str, models: list[Model], count: int = 3) -> list[str]:
    """Ids that come nearest to `asked`, for the text of a 404: first the one that would answer for
    it, then those that look most like it."""
    import difflib

    ids = [m.id for m in models if m.is_listed] or [m.id for m in models]
    if asked:
        name = normalise_model(asked[:COMPARED_CHARS])[-1]
    else:
        name = ""
    ids = [one for one in ids if len(one) <= COMPARED_CHARS] or ids[:count]
    if len(ids) > MAX_COMPARED:
        ids = _most_alike(name, ids, MAX_COMPARED)
    near = difflib.get_close_matches(name, ids, count, 0.0)
    model = resolve_model(asked, models, {})
    if model is not None:
        near = [model.id] + [one for one in near if one != model.id]
    return near[:count]


def fate_of_name(asked: str, models: list[Model], is_strict: bool = False) -> str:
    """What becomes of a model's name that stands in somebody's settings: "" when the account has
    the model, else why not and what answers.  Without a list only retired names are known."""
    if auto_tier(asked) is not None:
        return ""
    retired = retirement_of(asked)
    if not models:
        return retired

    model = resolve_model(asked, models, {})
    if model is not None and is_same_model(asked, model):
        return ""

    reason = retired or "this account does not list it"
    if model is None or is_strict:
        return reason + "; requests with it get 404"
    return "%s; %s answers instead" % (reason, printable(model.id))


_WIDE_BETA = "context-1m-"


def wider_sibling(model: Model, betas: str, models: list[Model]) -> Model:
    """The sibling with a context of a million tokens, where the client's `anthropic-beta` asks for
    it and one is listed; else the model itself."""
    if _WIDE_BETA not in betas or "-1m" in model.id:
        return model
    names = (model.id + "-1m", model.id + "-1m-internal")
    return next((other for other in models if other.id in names), model)


def choose_upstream(
    client: Dialect,
    model: Model,
    refused: Container[tuple[str, str]],
    has_files: bool = False,
) -> Dialect:
    """The dialect to ask a model in: the client's own wherever the model has it, unless files are
    in the request and another of the model's dialects takes them.
    refused: (model id, path) that the upstream did not serve though its list says so; such a model
    is tried in what it does not list, too.  Raises BadRequest when nothing is left."""
    known = [DIALECTS[name] for name in client.substitutes]
    if client.path:
        known.insert(0, client)
    if has_files:
        known.sort(
            key=lambda dialect: not dialect.takes_files
        )  # stable: the order stays

    left = [d for d in known if (model.id, d.path) not in refused]
    found = [d for d in left if d.path in model.endpoints]
    if not found and len(left) < len(known):
        found = [d for d in (RESPONSES, CHAT, MESSAGES) if d in left]
    if not found:
        check_endpoint(model, known[0].path)
    return (found or known)[0]


def check_endpoint(model: Model, path: str) -> None:
    """Raises BadRequest when the model cannot be asked at this upstream path."""
    if path not in model.endpoints:
        spoken = (
            ", ".join(e for e in model.endpoints if e.startswith("/")) or "no endpoint"
        )
        raise BadRequest(
            "model %s is not accessible via %s: it speaks %s"
            % (model.id, path, spoken),
            code="unsupported_api_for_model",
            param="model",
        )


def needs_hub(client: Dialect, body: Json, model: Model) -> bool:
    """Does a request need translation though model and client speak one dialect?  So it is with
    stop sequences that the upstream cannot watch for, and with OpenAI's freeform tools, which its
    models know from GPT-5 on."""
    if client.stop_key and not client.takes_stops(
        words(body.get(client.stop_key)), model
    ):
        return True
    if not client.has_freeform_tools or (model.is_openai and model.version >= (5,)):
        return False
    return any(map(freeform_of, dicts_in(body, "tools")))


def fold_long_answer(edit: Edit, upstream: Dialect, model: Model) -> None:
    """Ask for a stream where a whole answer as long as the client allows would be refused."""
    cap = model.limit("max_non_streaming_output_tokens")
    wish = max(
        count_or_zero(edit.body.get(key))
        for key in ("max_tokens", "max_completion_tokens")
    )
    if 0 < cap < wish and upstream.has_whole_answer_limit:
        edit.set(edit.body, "stream", True)


@dataclass
class PlanRepairs:
    """What section Repairs notes of a plan; nobody else writes here.  memory: of the account;
    names: what was repaired, in order, one list for all plans of a request; lessons: (repair,
    words) to be remembered when they help; words: of the refusal that matched last; is_stale: the
    request needs another plan."""

    memory: Any = None  # a Memory, which is defined below
    names: list[str] = field(default_factory=list)
    lessons: list[Any] = field(default_factory=list)
    words: tuple[str, ...] = ()
    is_stale: bool = False


@dataclass
class Plan:
    """How one request goes up, and how its answer comes back; made by `make`.
    edit: the upstream's body and what was lost; headers: beside the usual ones; pipeline: for a
    client that wants a stream; streams: is the upstream asked for one; answer: the whole answer,
    once read; begun: the client's bytes of what was read by `open_answer`, which is_whole or not;
    tries: how often it was opened."""

    client: Dialect
    upstream: Dialect
    model: Model
    edit: Edit
    request: Request
    is_translated: bool
    pipeline: StreamRelay | None
    streams: bool
    meter: Meter
    headers: Headers = field(default_factory=dict)
    answer: Json = field(default_factory=dict)
    begun: bytes = b""
    is_whole: bool = False
    tries: int = 0
    repairs: PlanRepairs = field(default_factory=PlanRepairs)

    @classmethod
    def make(
        cls,
        client: Dialect,
        upstream: Dialect,
        body: Json,
        model: Model,
        now: int,
        key: str,
        by_hub: bool = False,
    ) -> Plan:
        """Translate the body or fit it.  An answer longer than the model gives in one piece is
        asked for as a stream and folded.  by_hub: translate even where the dialects are the same.
        `body` may be changed.  Raises BadRequest."""
        echo = client.echo_of(body)  # as the client wrote it
        edit = Edit(body)
        normalise(edit, client, model)
        is_translated = (
            client is not upstream or by_hub or needs_hub(client, body, model)
        )
        wants_stream = body.get("stream") is True
        request = Request(str(body["model"]), client.name)
        pipeline: StreamRelay | None = None

        if is_translated:
            edit, request = translate_request(client, upstream, edit, model)
            if wants_stream:
                pipeline = TranslatedStream(client, upstream, request)
        else:
            if wants_stream:
                pipeline = client.stream(request.model, body, request)
            drop_nonce(edit)
            expand_compactions(edit, upstream)
            fit_body(edit, upstream, model)

        request.now, request.key, request.echo = now, key, echo
        if pipeline is not None:
            pipeline.names = edit.names
        if not wants_stream:
            fold_long_answer(edit, upstream, model)
        meter = pipeline.meter if pipeline else Meter()
        return cls(
            client,
            upstream,
            model,
            edit,
            request,
            is_translated,
            pipeline,
            edit.body.get("stream") is True,
            meter,
        )

    def begin(self) -> None:
        """An answer of the upstream is about to be read; nothing is left of one before."""
        if self.tries and self.pipeline is not None:
            self.pipeline = self.pipeline.restart()
            self.meter = self.pipeline.meter
        self.tries += 1

    def attach(self, headers: Headers, repaired: list[str], echo: Json) -> None:
        """The headers that go with the body, what was repaired for this request so far, and what
        the answer repeats beside what the body says."""
        if self.streams:
            self.headers = dict(headers, Accept="text/event-stream")
        else:
            self.headers = headers
        betas = [beta for beta in headers.get("anthropic-beta", "").split(",") if beta]
        needed = self.upstream.betas(self.edit.body)
        missing = [beta for beta in needed if beta not in betas]
        if missing:
            both = ",".join(betas + missing)
            self.headers = dict(self.headers, **{"anthropic-beta": both})
        self.repairs.names = repaired
        self.request.echo.update(echo)

    @property
    def key(self) -> tuple[str, str]:
        """What lessons of the upstream's refusals hold for."""
        return self.model.id, self.upstream.path

    @property
    def turns(self) -> list[Json]:
        """Messages or items of the upstream's body."""
        return [
            turn
            for key in ("messages", "input")
            for turn in as_list(self.edit.body.get(key))
            if isinstance(turn, dict)
        ]

    def read(self, data: bytes, is_stream: bool) -> bytes:
        """The client's bytes for a whole answer.  Raises UpstreamError."""
        data = restore_names(data, self.edit.names)
        if not self.is_translated and not is_stream:
            self.answer = parse_answer(data)
            self.meter.take(self.answer)
            self.client.check_answer(self.answer)
            changed = self.client.mend(self.answer, self.request.model, self.request)
            if changed:
                return dumps(self.answer)
            return data
        response = read_answer(self.upstream, data, is_stream, self.request, self.meter)
        if isinstance(self.pipeline, TranslatedStream):
            return self.pipeline.tell(unfold(response))
        self.answer = self.client.encode_response(response, self.request)
        return dumps(self.answer)


# ---- Token estimate: text is cut as the o200k tokenizer cuts it, a piece of each kind has the
# weight it had in measured texts, and the sum leans high.

_WORDY = (
    r"0-9A-Za-z\u00aa\u00b5\u00ba\u00c0-\u1fff\u2c00-\u2dff\u3040-\ufdff\ufe70-\ufeff"
    r"\uff10-\uff19\uff21-\uff3a\uff41-\uff5a\uff66-\uffdc"
)  # \w is slow and has "_"
_PIECES = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9+/]{59,}"  # base64, hex
    r"|[0-9]{1,3}(?:[-.,:/ \t](?=[0-9])|, (?=[0-9])|[A-Za-z](?![A-Za-z]))?"  # 12, 12. of 12.5, 3f
    r"|[^\r\n"
    + _WORDY
    + r"]?(?:[A-Z]+[a-z\u00df-\u024f]*|[a-z\u00aa-\u024f]+"  # mark and word
    r"|[\u3400-\u9fff\uf900-\ufaff]+|[\u3040-\u30ff]+|[\uac00-\ud7a3]+|[\u0250-\u1fff]+)"
    r"| ?[^\s" + _WORDY + r"]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+|.",
    re.DOTALL,
)
_ASCII_PIECES = re.compile(  # the same without the other letters: a quarter less time
    re.sub(r"\|\[(?:\\u....-?)+\]\+|\\u....-?", "", _PIECES.pattern), re.DOTALL
)
_CHUNK_CHARS = 64 * 1024  # cut at once
_SAMPLES, _SAMPLE_CHARS = 16, 2048  # of a long text, where an estimate may be rough
_LEAN = 1.025
_CLAUDE_FACTOR = 1.25  # its own tokenizer makes more of the same text
_MARKS_IN_WORDS = "._(-\t[#$"  # often one token together with the word after them
_MARKS_OF_CODE = "{}[]\":,<>/='();."  # runs of these are often one token
# Mark before an ASCII word (none, blank, one of the above, other) and case -> tokens, per letter.
_WORDS = {
    "a": (1.09, 0.01),
    "Aa": (-0.27, 0.17),
    "A": (0.76, 0.21),
    "AAa": (1.60, 0.15),
    " a": (0.39, 0.08),
    " Aa": (0.27, 0.13),
    " A": (1.00, 0.04),
    ".a": (0.21, 0.17),
    ".Aa": (0.81, 0.17),
    ".A": (1.25, 0.14),
    "?a": (1.30, 0.12),
    "?Aa": (1.27, 0.08),
    "?A": (1.45, 0.22),
}
# End of code points -> tokens, per character, more for words with a capital or without a blank.
# Latin with accents, Greek, Cyrillic; Hebrew to Arabic, India, others; marks, kana, Han; Hangul,
# full width, emoji.
_SCRIPTS = (
    (0x250, -1.26, 0.42, 1.45),
    (0x400, -0.34, 0.37, 1.55),
    (0x530, -0.06, 0.20, 1.55),
    (0x800, -0.87, 0.46, 1.18),
    (0x1100, -0.40, 0.37, 1.18),
    (0x2000, 0.0, 1.0, 0.0),
    (0x3040, 0.88, 0.32, 0.0),
    (0x3100, 0.29, 0.57, 0.0),
    (0xA000, 0.46, 0.67, 0.0),
    (0xD7B0, 0.86, 0.33, 0.0),
    (0x10000, 1.35, 0.24, 0.0),
    (0x110000, 1.38, 0.90, 0.0),
)


@functools.lru_cache(maxsize=1 << 16)
def _weigh(piece: str) -> float:
    """Tokens of one match, on average: ' return' -> 1, '_HEAD' -> 1.8, '12.' -> 2, ' ==' -> 1"""
    size, last, mark = len(piece), piece[-1], "" if piece[0].isalpha() else piece[0]

    if not piece.isascii():
        point = ord(last if last > "\x7f" else max(piece))
        if size > 4 and 0x2000 <= point < 0x3000 and len(set(piece)) < 4:
            return 1 + size / 8  # a line of a drawn box
        if size == 1 and point < 0x10000:
            return 1.0
        first, each, more = next(rest for end, *rest in _SCRIPTS if point < end)
        return max(
            1.0, first + each * size + more * (mark != " " or piece[1].isupper())
        )

    if size > 59 and piece[0].isalnum():
        return size * (0.66 if piece.strip("0123456789abcdefABCDEF") else 0.57)
    if mark.isdigit():
        if last.isdigit():
            return 1.0
        if piece[-2] == ",":
            return 3.0
        return 2.0
    if last.isalpha():
        word = piece[1:] if mark else piece
        size = len(word)
        if mark in ("", " "):
            kind = mark
        elif mark in _MARKS_IN_WORDS:
            kind = "."
        else:
            kind = "?"
        first, each = _WORDS[
            kind + "a"
            if word.islower()
            else kind + "A"
            if word.isupper()
            else kind + "Aa"
            if word[1:].islower()
            else "AAa"
        ]

        if size == 1:
            return 1.0
        return max(1.0, first + each * min(size, 12) + 0.5 * max(0, size - 12))

    marks = piece.strip()
    if len(marks) < 3:
        return 1.0 + (size - len(marks)) // 64
    each = {1: 0.02, 2: 0.12}.get(
        len(set(marks)), 0.5 if marks.strip(_MARKS_OF_CODE) else 0.3
    )
    return 1.0 + (len(marks) - 2.5) * each


def count_text(text: str) -> int:
    """About how many o200k tokens `text` has; over a mix 3 % too many rather than one too few.
    Measured: half of the texts within 5 % (English, code, JSON, Chinese, Japanese, numbers), nine
    of ten within 11 %; Polish, Ukrainian and traditional Chinese come out 10 to 20 % short."""
    total = 0.0
    for at in range(0, len(text), _CHUNK_CHARS):
        chunk = text[at : at + _CHUNK_CHARS]
        pieces = (_ASCII_PIECES if chunk.isascii() else _PIECES).findall(chunk)
        total += sum(map(_weigh, pieces))
    return int(total * _LEAN + 0.999)


def sample_tokens(text: str) -> int:
    """The same, by samples of a long text: in a few milliseconds whatever its length."""
    step = len(text) // _SAMPLES
    if step <= _SAMPLE_CHARS:
        return count_text(text)
    sample = "".join(
        text[at * step : at * step + _SAMPLE_CHARS] for at in range(_SAMPLES)
    )
    return count_text(sample) * len(text) // len(sample)


_PROMPT_FIELDS = (
    "system",
    "instructions",
    "messages",
    "input",
    "prompt",
    "response_format",
    "text",
    "output_config",
)
_UNSEEN_FIELDS = (
    "id",
    "call_id",
    "tool_call_id",
    "tool_use_id",
    "type",
    "role",
    "status",
    "detail",
    "cache_control",
    "copilot_cache_control",
    "media_type",
    "annotations",
)
_SEALED_FIELDS = (
    "signature",
    "encrypted_content",
    "reasoning_opaque",
    "data",
    "result",
)
_JSON_FIELDS = (
    "input",
    "arguments",
    "schema",
    "action",
)  # objects that the model reads as JSON
_LINK_FIELDS = ("url", "image_url", "file_url", "file_id", "file_data")
_LINK_TYPES = (
    None,
    "url",
    "file",
    "image_url",
    "input_image",
    "input_file",
    "computer_screenshot",
)
_FILE_TOKENS = 1600  # Anthropic's largest image
_HEAD_CHARS = 256 * 1024  # of base64: a JPEG has its size behind previews and colours
_JPEG_SIZE = re.compile(rb"\xff[\xc0-\xc2]\0[\x0b\x11\x14]\x08(.{4})", re.DOTALL)


def image_size(head: bytes) -> tuple[int, ...]:
    """(width, height) by the first bytes of a PNG, GIF, WebP or JPEG; () or struct.error: none."""
    if head[:4] in (b"\x89PNG", b"GIF8"):
        return struct.unpack_from(
            *((">II", head, 16) if head[0] > 127 else ("<HH", head, 6))
        )
    if head[8:12] == b"WEBP":
        at, bits, less = {b"X": (24, 24, 1), b"L": (21, 14, 1)}.get(
            head[15:16], (26, 16, 0)
        )
        both, mask = int.from_bytes(head[at : at + 6], "little"), (1 << bits) - 1
        return less + (both & mask), less + (both >> bits & mask)
    sizes = _JPEG_SIZE.findall(head)  # its own behind that of its preview
    if sizes:
        return struct.unpack(">HH", sizes[-1])[::-1]
    return ()


def image_tokens(url: str, is_claude: bool) -> int:
    """What a picture costs, the most where its pixels are not told.  Claude: 1 for 750 pixels; GPT:
    170 for each tile of 512 x 512 once it is fit into 2048 x 2048 and its short side into 768."""
    start = url.find(",", 0, 100) + 1
    try:
        wide, high = image_size(base64.b64decode(url[start : start + _HEAD_CHARS]))
    except (ValueError, struct.error):
        return _FILE_TOKENS
    if is_claude:
        return min(_FILE_TOKENS, wide * high // 750 + 1)
    scale = min(1, 2048 / max(wide, high, 1), 768 / max(min(wide, high), 1))
    across, down = (-(-round(side * scale, 3) // 512) for side in (wide, high))
    return 85 + 170 * int(across * down)


def _as_json(value: Any) -> str:
    try:
        return _encode_text(value)
    except RecursionError:
        return ""  # no upstream takes it either


def estimate_tokens(
    body: Json, is_claude: bool = False, count: Callable[[str], int] = count_text
) -> int:
    """How many tokens the prompt of a request of any dialect has, estimated on the high side.
    System, tools and all texts count, images by their pixels, a PDF by its size (3,000 per 60 KB),
    sealed reasoning little, ids not.  `is_claude`: as Claude counts, about a quarter more;
    `count`: of a text."""
    tools = as_list(body.get("tools")) + as_list(body.get("functions"))
    texts = [_as_json(tool) for tool in tools]
    tokens = 3 + 8 * len(tools) + (346 if is_claude else 16) * bool(tools)
    todo: list[tuple[str, Any]] = [("", body.get(name)) for name in _PROMPT_FIELDS]

    while todo:
        name, value = todo.pop()
        if name in _UNSEEN_FIELDS:
            continue
        if isinstance(value, dict):
            kind = value.get("type")
        else:
            kind = None
        if isinstance(value, list):
            todo.extend(("", inner) for inner in value)
        elif isinstance(value, str) and (value[:5] == "data:" or name in _LINK_FIELDS):
            is_image = value[:11] != "data:applic"
            tokens += (
                image_tokens(value, is_claude)
                if is_image
                else _FILE_TOKENS + len(value) * 3 // 80
            )
        elif isinstance(value, str) and name in _SEALED_FIELDS:
            tokens += len(value) // 16
        elif isinstance(value, str):
            texts.append(value)
        elif isinstance(value, dict) and name in _JSON_FIELDS:
            texts.append(_as_json(value))
        elif isinstance(value, dict) and kind == "base64":
            todo.append(
                ("", "data:%s,%s" % (value.get("media_type"), value.get("data")))
            )
        elif isinstance(value, dict):
            tokens += 1 if "text" in value else 4
            plain: tuple[str, ...]
            if kind == "text":
                plain = ("data",)
            elif kind in _LINK_TYPES:
                plain = ()
            else:
                plain = _LINK_FIELDS
            todo.extend(
                ("" if field in plain else field, inner)
                for field, inner in value.items()
            )

    return int(count("\n".join(texts)) * (_CLAUDE_FACTOR if is_claude else 1)) + tokens


# ==== 10. Repairs =================================================================================
# What the upstream refuses is learned from its own words: a row of REPAIRS knows a text and how to
# change the request that it was said of.  What helped is remembered for the model as long as the
# process lives, so that the next request goes up fit.  Nothing that carries the client's meaning
# goes: then the upstream's error is the answer.  At the end: how long a limit lasts.

REFUSED = "refused upstream"
BY_HUB = "as it is: "  # before a path: bodies of that dialect need translation, too
_MEANT = re.compile(  # fields that carry the meaning
    "arguments|call_id|content|data|enum|format|function|id|image_url|input|input_schema|items|"
    "instructions|json_schema|max_tokens|messages|model|name|output|parameters|properties|required|"
    "response_format|role|schema|source|stream|system|text|tool_call_id|tool_use_id|tools|type|url"
)
_ROOTS = (
    "",
    "messages.0.",
    "input.0.",
    "tools.0.",
    "tools.0.function.",
    "messages.0.content.0.",
    "input.0.content.0.",
)  # where a field may stand that is named without a path
_EFFORTS = ("reasoning_effort", "reasoning.effort", "output_config.effort")
_STATE_KINDS = (
    "thinking",
    "redacted_thinking",
    "reasoning",
    "compaction",
    "encrypted_content",
)


def places(value: Any, path: str) -> list[tuple[Json, str]]:
    """(object, key) of all that a validator's path means: a number stands for every element, the
    tag of a union for nothing.  'tools.0.custom.strict' -> `strict` of each such tool."""
    path = path.replace("[", ".").replace("]", "")
    if path.count(".") > MAX_PATH_STEPS:  # each may be a tag: two ways to go on
        return []
    step, _, rest = path.partition(".")
    if isinstance(value, list) and step.isdigit() and rest:
        return [place for item in value for place in places(item, rest)]
    if not isinstance(value, dict) or not rest:
        if isinstance(value, dict) and step in value:
            return [(value, step)]
        return []
    is_tag = value.get("type", step) == step
    return places(value.get(step), rest) or (places(value, rest) if is_tag else [])


# A patch changes the plan; False: there is nothing that it may change.


def avoid(plan: Plan, what: str) -> bool:
    """Never again for this model; the request needs another plan."""
    plan.repairs.is_stale |= (plan.model.id, what) not in plan.repairs.memory.refused
    plan.repairs.memory.refused.add((plan.model.id, what))
    return plan.repairs.is_stale


def drop_places(plan: Plan, found: list[tuple[Json, str]]) -> bool:
    """Remove these fields, unless one of them carries the meaning."""
    for holder, key in found:
        if (
            _MEANT.fullmatch(key)
            or "format" in as_object(holder[key])
            or (key == "tool_choice" and holder[key] not in ("auto", {"type": "auto"}))
        ):
            return False
    for holder, key in found:
        plan.edit.drop(holder, key, REFUSED)
    if plan.edit.body.get("output_config") == {}:
        del plan.edit.body["output_config"]
    return bool(found)


def drop_field(plan: Plan, path: str) -> bool:
    """Remove a field that the upstream does not know."""
    body = plan.edit.body
    return drop_places(
        plan, next(filter(None, (places(body, root + path) for root in _ROOTS)), [])
    )


def value_mark(value: Any) -> str:
    """What tells a value from others, in constant time; '' for objects and lists."""
    if isinstance(value, (dict, list)):
        return ""
    if isinstance(value, str):
        text = value
    else:
        text = repr(value)
    return stable_id(
        "", "%d %s %s" % (len(text), text[:MARKED_CHARS], text[-MARKED_CHARS:])
    )


def drop_value(plan: Plan, path: str, mark: str = "") -> bool:
    """Remove a field whose value is refused: another value may be good.  mark: only that one.

    A field inside a list is not remembered, since each element has a value of its own."""
    body = plan.edit.body
    whole_path = next(
        (root + path for root in _ROOTS if places(body, root + path)), path
    )
    found = places(body, whole_path)
    marks = [value_mark(holder[key]) for holder, key in found]
    if mark:
        return marks == [mark] and drop_places(plan, found)
    is_single = len(marks) == 1 and marks[0] and not re.search(r"[.\[]\d", whole_path)
    if is_single:
        plan.repairs.words = (whole_path, marks[0])
    else:
        plan.repairs.words = ()
    return drop_places(plan, found)


def clamp(plan: Plan, path: str, side: str, limit: str) -> bool:
    """A number within the upstream's limit, the highest one or by these words the least.  One
    below zero is no wish at all: its sender is told."""
    sign = -1 if side in ("greater", ">=") else 1
    most = float(limit) if "." in limit else int(limit)
    found = [
        (holder, key)
        for holder, key in places(plan.edit.body, path)
        if isinstance(holder[key], (int, float))
        and holder[key] >= 0
        and sign * holder[key] > sign * most
    ]
    for holder, key in found:
        holder[key] = most
        plan.edit.lose(key, "the limit is " + limit)
    return bool(found)


def rename_limit(plan: Plan, old: str) -> bool:
    """max_tokens as max_completion_tokens, or the reverse."""
    body, is_there = plan.edit.body, old in plan.edit.body and plan.upstream is CHAT
    if is_there:
        if old == "max_completion_tokens":
            new = "max_tokens"
        else:
            new = "max_completion_tokens"
        body.setdefault(new, plan.edit.drop(body, old))
    return is_there


def lower_effort(plan: Plan, words: str) -> bool:
    """The nearest effort that the message lists, else of those that the catalogue lists."""
    holder, key = next(
        (p for path in _EFFORTS for p in places(plan.edit.body, path)), ({}, "")
    )
    wish = str(holder.get(key))
    listed = re.findall(r"\b(?:none|minimal|low|medium|high|xhigh|max)\b", words) or [
        effort for effort in plan.model.efforts if effort != wish
    ]
    if holder and listed and wish not in listed:
        holder[key] = clamp_effort(
            "low" if wish in ("none", "minimal") else wish, listed
        )
        plan.edit.lose("effort", "%s is refused" % wish[:20])
        plan.repairs.words = (" ".join(listed),)  # of the catalogue, too
    return bool(holder) and holder[key] != wish


def stop_thinking(plan: Plan) -> bool:
    """A round of tools that was begun without thinking must be ended without."""
    kinds = [
        str(as_object((as_list(turn.get("content")) or [0])[0]).get("type"))
        for turn in plan.turns[-2:]
    ]
    fits = kinds[-1:] != ["tool_result"] or "thinking" in kinds[0]
    return not fits and bool(
        plan.edit.drop(plan.edit.body, "thinking", "the round began without")
    )


def drop_cache_times(plan: Plan) -> bool:
    """The prompt cache for its usual time: it only costs differently."""
    found = False
    for mark in Messages.cache_marks(plan.edit.body):
        found = mark.pop("ttl", None) is not None or found
    if found:
        plan.edit.lose("cache_control.ttl", REFUSED)
    return found


def drop_thinking(plan: Plan) -> bool:
    """Say nothing of thinking to a model that cannot be kept from it."""
    return plan.edit.drop(plan.edit.body, "thinking", REFUSED) is not None


def drop_state(plan: Plan, known: bool = False) -> bool:
    """Remove thinking and reasoning that only another model, account or route can read: all that
    is there, or only what was refused before, since new state is welcome."""

    def is_bad(item: Any) -> bool:
        state = "".join(str(as_object(item).get(key) or "") for key in _SEALED_FIELDS)
        return (
            bool(state)
            and (item.get("type") in _STATE_KINDS or "reasoning_opaque" in item)
            and plan.repairs.memory.is_bad(plan.model.id + state, known)
        )

    body, turns, bad = plan.edit.body, plan.turns, False
    for turn in [turn for turn in turns if "reasoning_opaque" in turn and is_bad(turn)]:
        bad = [
            turn.pop(key, None) for key in ("reasoning_opaque", "reasoning_text")
        ] != []
    for holder, key in [(body, "input")] + [
        (t, k) for t in turns for k in ("content", "output")
    ]:
        items = as_list(holder.get(key))
        kept = [item for item in items if not is_bad(item)]
        if len(kept) < len(items):
            bad, holder[key] = True, kept or "[it cannot be read]"
    if bad:
        plan.edit.lose("reasoning", REFUSED)
    return bad


def image_mark(part: Json) -> str:
    """What tells an image from others."""
    holder = as_object(part.get("source") or part.get("image_url")) or part
    return value_mark(
        str(holder.get("data") or holder.get("url") or holder.get("image_url"))
    )


def note_images_left(plan: Plan) -> None:
    """The header that tells of images goes with the last of them."""
    if not plan.upstream.has_images(plan.edit.body):
        plan.headers.pop("Copilot-Vision-Request", None)


def keep_images(plan: Plan, most: str) -> bool:
    """A note instead of the oldest images until the newest `most` are left; never of those that
    the user asks about now."""
    size = len(dumps(plan.edit.body))
    is_changed = shed_images(plan.edit, size, size, int(most))
    note_images_left(plan)
    return is_changed


def drop_images(plan: Plan, marks: str = "") -> bool:
    """A note instead of the oldest images until the body has half its size; marks: of these
    images.  Never of those that the user asks about now.

    What is remembered are the images: one that cannot be read says nothing of others."""
    body = plan.edit.body
    asked = {id(part) for part in image_parts(last_turn(body))}
    images = [(part, image_mark(part)) for part in image_parts(body)]

    if marks:
        refused = set(marks.split())
        for part, mark in images:
            if mark in refused and id(part) not in asked:
                put_note(part)
                plan.edit.lose("images", REFUSED)
    else:
        size = len(dumps(body))
        shed_images(plan.edit, size, size // 2)

    gone = [mark for part, mark in images if part.get("type") not in IMAGE_TYPES]
    plan.repairs.words = (" ".join(gone[-MAX_MARKED_IMAGES:]),)
    note_images_left(plan)
    return bool(gone)


def drop_tool(plan: Plan, name: str) -> bool:
    """A hosted tool goes unless its call is demanded; freeform ones become functions."""
    tools = list(map(as_object, as_list(plan.edit.body.get("tools"))))
    hosted = [
        tool
        for tool in tools
        if name in (tool.get("type"), tool.get("name"))
        and tool.get("type", "function") != "function"
        and "input_schema" not in tool
    ]

    kinds = {tool["type"] for tool in hosted}

    if kinds & {
        "custom",
        "namespace",
        *CLIENT_TOOLS,
    }:  # as functions the model can call them
        return not plan.is_translated and avoid(plan, BY_HUB + plan.upstream.path)

    if hosted and hosted == tools and plan.client is MESSAGES:
        return avoid(plan, SEARCH_TOOLS)
    if not hosted or dumps(name) in dumps(plan.edit.body.get("tool_choice")):
        return False
    places_of_hosted = set(map(id, hosted))
    prepare_tools(plan.edit, lambda tool: id(tool) not in places_of_hosted)
    return True


def drop_betas(plan: Plan, names: str) -> bool:
    """Take the betas that the upstream names out of `anthropic-beta`."""
    sent = plan.headers.get("anthropic-beta", "")
    named = [word for word in re.findall(r"[\w-]+", names) if re.search(r".-\d", word)]
    kept = ",".join(beta for beta in sent.split(",") if beta not in named)
    if kept == sent:
        return False
    del plan.headers["anthropic-beta"]
    if kept:
        plan.headers["anthropic-beta"] = kept
    plan.edit.lose("anthropic-beta", REFUSED)
    return True


def drop_all_betas(plan: Plan, refused: str = "") -> bool:
    """Where the upstream names none, all go.  refused: only if the header is this one."""
    sent = plan.headers.get("anthropic-beta", "")
    if not sent or refused not in ("", sent):
        return False
    plan.repairs.words = (sent,)
    del plan.headers["anthropic-beta"]
    plan.edit.lose("anthropic-beta", REFUSED)
    return True


# What is learned of a refusal.  A fact about the model holds for everybody.  That a value was
# refused says nothing of other values: it is remembered together with the value, else one client's
# nonsense would take a field from all others.
ONCE, WITH_VALUE, FOR_MODEL = range(3)

# pattern: searched in "code=C param=P MESSAGE", its groups are what `patch` gets; source: whose
# words these are; unless: not where the error has one of these codes.
Repair = collections.namedtuple(
    "Repair",
    "name pattern patch source statuses keeps unless",
    defaults=((400,), FOR_MODEL, ()),
)
# No pattern may look further ahead than a fixed number of characters, or try a name again from
# each of its letters: that would take the square of the text's length.
_FAR = r".{0,300}"
_QUOTES = r"['\"`\\]{0,8}"
_NAME = (
    _QUOTES + r"(?<![\w.$\[\]-])([\w.$\[\]-]+)" + _QUOTES
)  # a field, a path or a tool
_UN = r"n(?:supported|known|recognized)(?: request)? "
VALUE_CODES = ("unsupported_value", "invalid_value")  # not the field: what stands in it
REPAIRS = (
    Repair(
        "endpoint",
        r"\Acode=unsupported_api_for_model",
        lambda plan: avoid(plan, plan.upstream.path),
        "Copilot, where its list is wrong",
        keeps=ONCE,
    ),
    Repair(
        "reasoning state",
        r"(?i)encrypted (?:function output )?content|invalid .?signature.? in"
        r"|input item id does not belong|thinking.{0,40}blocks.{0,60}cannot be modified|without "
        r"its required following item",
        drop_state,
        "OpenAI, Anthropic",
        (400, 401),
        ONCE,
    ),
    Repair(
        "thinking", r"Expected .?thinking.? or .?redacted", stop_thinking, "Anthropic"
    ),
    Repair(
        "thinking",
        r"thinking\.type\.enabled.{0,3} is not supported",
        lambda plan: think_adaptively(plan.edit),
        "Claude from 4.7 on",
    ),
    Repair(
        "thinking",
        r"thinking\.type\.disabled.{0,3} is not supported",
        lambda plan: drop_thinking(plan),
        "Claude models that always think",
    ),
    Repair(
        "thinking",
        r"(?i)adaptive.{0,3} (?:thinking )?is not supported|tag 'adaptive'",
        lambda plan: think_within_budget(plan.edit, plan.model),
        "Claude before 4.6",
    ),
    Repair(
        "effort",
        r"(?s)effort\b" + _FAR + r"?(?:upported values|one of|must be)(.*)",
        lower_effort,
        "all",
    ),
    Repair("effort", r"\Acode=invalid_reasoning_effort()", lower_effort, "Copilot"),
    Repair(
        "effort",
        r"not support the (effort) parameter",
        lambda plan, word: drop_field(plan, "output_config." + word),
        "Anthropic",
    ),
    Repair(
        "limit",
        r"\b(max_tokens|max_completion_tokens)\b['\"`]*(?: is not support|: Extra)|"
        + _UN
        + r"(?!value)[^:]{0,80}: ['\"`]{0,8}(max\w*_tokens)\b",
        rename_limit,
        "OpenAI, Anthropic",
    ),
    Repair(
        "limit",
        r"\b(max_\w*tokens)(?:: \d+ (>)| is too large: "
        + _FAR
        + r" (at most)) (\d{1,15}(?:\.\d{1,15})?)",
        clamp,
        "Anthropic, OpenAI",
    ),
    Repair(
        "limit",
        _NAME
        + r": (?:Input"
        + _FAR
        + r" (less|greater) than or equal to|"
        + _FAR
        + r"Expected a value ([<>]=)) (\d{1,15}(?:\.\d{1,15})?)",
        clamp,
        "Anthropic, OpenAI",
    ),
    Repair(
        "tool",
        r"use of the (web.search) tool is not supported",
        lambda plan, name: drop_tool(plan, name.replace(" ", "_")),
        "Copilot, of Anthropic's search",
    ),
    Repair(
        "cache time",
        r"cache_control\S{0,40}ttl",
        lambda plan: drop_cache_times(plan),
        "Anthropic, Bedrock",
    ),
    Repair(
        "sampling",
        r"temperature.? and .?(top_p).? cannot both",
        lambda plan, name: "temperature" in plan.edit.body and drop_field(plan, name),
        "Claude from 4.5 on",
    ),
    Repair(
        "tool",
        r"[Tt]ool (?:type )?" + _NAME + r" is not (?:supported|available)|nsupported "
        r"tool(?: type)?:? "
        + _NAME
        + r"|tag '([\w-]+)' found using|param=tools\S{0,200} "
        + _FAR
        + r"nvalid value: "
        + _NAME,
        drop_tool,
        "Copilot, OpenAI, Anthropic",
    ),
    Repair(
        "beta",
        r"(?i)value\(s\) (" + _FAR + r"?) for the .?anthropic-beta|"
        r"(?:invalid|unknown) beta(" + _FAR + r"-\d.*)",
        drop_betas,
        "Anthropic, Bedrock",
    ),
    Repair(
        "beta",
        r"(?i)(?:invalid|unknown) beta",
        lambda plan, *sent: drop_all_betas(plan, *sent),
        "Bedrock, which names none",
        keeps=WITH_VALUE,
    ),
    Repair(
        "prefill",
        r"not support assistant message prefill|must end with a user message",
        lambda plan: end_with_user(plan.edit),
        "Claude from 4.6 on",
    ),
    Repair(
        "images",
        r"many-image requests()|too many .{0,9}images" + _FAR + r"?(\d{1,15})",
        lambda plan, *most: keep_images(plan, most[-1] or "20"),
        "Anthropic, Copilot",
    ),
    Repair(
        "images",
        r"(?i)image (?:exceeds|dimensions|size)|could not process image",
        drop_images,
        "Anthropic: 5 MB, 8000 pixels",
        keeps=WITH_VALUE,
    ),
    Repair(
        "images", r"\A", drop_images, "Copilot, of too large a body", (413,), WITH_VALUE
    ),
    Repair(
        "field",
        r"param=(\S{1,200}) " + _FAR + r"(?:nsupported value|nvalid value|string too "
        r"long)|\Acode=(?:unsupported|invalid)_value param=(\S{1,200}) ",
        drop_value,
        "OpenAI, of a value that the field cannot have",
        keeps=WITH_VALUE,
    ),
    Repair(
        "field",
        _NAME + r"(?:: range| does not support (?!th))",
        drop_value,
        "Bedrock, OpenAI",
        keeps=WITH_VALUE,
        unless=VALUE_CODES,
    ),
    Repair(
        "field",
        r"does not support the " + _NAME + r" parameter",
        drop_field,
        "Copilot",
        unless=VALUE_CODES,
    ),
    Repair(
        "field",
        _NAME
        + r"(?:: Extra inputs| is not supported| is deprecated)|"
        + _UN
        + r"(?:parameter|argument|field|key)s?(?: supplied)?:? "
        + _NAME
        + r"|not allowed \("
        + _NAME
        + " w",
        drop_field,
        "all, with each release of a client",
        unless=VALUE_CODES,
    ),
    Repair(
        "field",
        r"param=(\S{1,200}) " + _FAR + r"(?:not support|nsupported)",
        drop_field,
        "OpenAI",
        unless=VALUE_CODES,
    ),
)

# such a refusal holds beside other fields only, and those are another client's to send
_CONDITION = re.compile(
    r"\b(?:when|while|without|unless|if|together|combin\w*|requires?)\b"
)

_QUOTE = re.compile(r"['\"`\\]+")


def is_echo(words: str, body: Json) -> bool:
    """Do these words of a refusal stand in the request, quotes aside?  Then the upstream may have
    done no more than repeat them, and whoever wrote them there must teach the proxy nothing."""
    plain = _QUOTE.sub("", words)
    longest = max(_QUOTE.split(words), key=len)
    return bool(longest) and any(
        longest in text and plain in _QUOTE.sub("", text) for text in strings_in(body)
    )


class Memory:
    """What one account's upstream has refused, for the life of the process and bounded.
    refused: (model id, path) of what a model does not serve, see also BY_HUB."""

    def __init__(self) -> None:
        self.refused: set[tuple[str, str]] = set()
        #: plan's key -> (row, words), the latest last: facts of a model, and refused values
        self._facts: dict[
            tuple[str, str], tuple[tuple[Repair, tuple[str, ...]], ...]
        ] = {}
        self._values: dict[
            tuple[str, str], tuple[tuple[Repair, tuple[str, ...]], ...]
        ] = {}
        self._bad: set[str] = set()  # marks of refused state

    def is_bad(self, data: str, known: bool) -> bool:
        """Was this refused before (known), or just now: then it is remembered."""
        mark = stable_id("", data)
        if not known and len(self._bad) < MAX_MARKS:
            self._bad.add(mark)
        return not known or mark in self._bad

    def prepare(self, plan: Plan) -> None:
        """Change a plan by what was learned before."""
        plan.repairs.memory = self
        if self._bad and drop_state(plan, True):
            plan.repairs.names.append("reasoning state")
        for store in (self._facts, self._values):
            for repair, words in store.get(plan.key, ()):
                if repair.patch(plan, *words):
                    plan.repairs.names.append(repair.name)

    def repair(self, plan: Plan, error: ProxyError) -> bool:
        """Change a refused plan so that it can be asked again; False: no row knows how."""
        if not isinstance(error, UpstreamError) or not error.answered:
            return False
        said = "code=%s param=%s %s" % (error.code or "", error.param or "-", error)
        said = said[:MAX_SAID]  # patterns may look far ahead
        return any(
            self._apply(repair, plan, said)
            for repair in REPAIRS
            if error.status in repair.statuses and error.code not in repair.unless
        )

    @staticmethod
    def _apply(repair: Repair, plan: Plan, said: str) -> bool:
        """Change the plan as one row knows -> was there anything?"""
        is_changed = False
        for found in re.finditer(repair.pattern, said):
            doubtful = is_echo(found.group(), plan.edit.body)
            if doubtful and repair.name == "tool":  # it may teach at once, see `avoid`
                continue
            plan.repairs.words = tuple(
                group for group in found.groups() if group is not None
            )
            if not repair.patch(plan, *plan.repairs.words):
                continue

            is_changed = True
            plan.repairs.names.append(repair.name)
            doubtful = (
                doubtful or repair.name == "field" and bool(_CONDITION.search(said))
            )
            has_words = repair.keeps == FOR_MODEL or bool(plan.repairs.words)
            if repair.keeps != ONCE and has_words and not doubtful:
                plan.repairs.lessons.append((repair, plan.repairs.words))
        return is_changed

    def learn(self, plan: Plan) -> None:
        """What helped is remembered: the plan was accepted."""
        for lesson in plan.repairs.lessons:
            if lesson[0].keeps == FOR_MODEL:
                store = self._facts
            else:
                store = self._values
            known = store.get(plan.key, ())
            if lesson not in known and (known or len(store) < MAX_LEARNED):
                store[plan.key] = (*known, lesson)[-MAX_LESSONS:]


# ---- How long a limit lasts ----

ACCOUNT_LIMITS = re.compile(
    "(?:user_global|user_weekly|integration)_rate_limited|agent_mode_limit"
)
USAGE_LANES = ("session", "weekly")  # ceilings of use, beside the quotas
_SPAN = (
    r"([0-9]{1,15}(?:\.[0-9]{1,15})?) ?(ms|milli(?=s)|[smhdw])"
    r"(?:seconds?|econds?|ecs?|inutes?|ins?|ours?|rs?|ays?|eeks?)?(?![a-z])"
)
_WAIT = re.compile(
    r"(?:again|after|wait|retry|resets?)\b[^0-9.;!?\n]{0,20}((?:%s,?(?: and)? ?)+)"
    % _SPAN
)
_SECONDS = {
    "ms": 0.001,
    "milli": 0.001,
    "s": 1,
    "m": 60,
    "h": 3600,
    "d": 86400,
    "w": 604800,
}
#: a date that the words before it call the end; others are parts of a model's name
_UNTIL = re.compile(
    r"(?<![a-z])(?:resets?|until|again|retry)(?:[ _:=\"'(,]|after|at|on|date|time|is|the)*"
    r"([0-9]{4}-[0-9]{2}-[0-9]{2}(?:[t ][0-9:]{8}|(?![\w-])))"
)


def is_quota(error: ProxyError) -> bool:
    """Is the account's allowance used up?"""
    return error.status == 402 or status_of(error.code) == 402


def is_limit(error: ProxyError) -> bool:
    """Must nobody ask again for a while?"""
    return error.status == 429 or is_quota(error)


def quota_lane(name: str, said: Any) -> Json:
    """One lane for people, out of a snapshot or a header (ent=300&rem=75.5&ov=0.0&rst=2026-12-01,
    `rem` in percent).  Numbers are None where the account tells none.  More than all may be used:
    then what is left is negative, or the overage says so."""
    if isinstance(said, str):
        said = dict(urllib.parse.parse_qsl(said))
    else:
        said = as_object(said)
    total = text_number_or_none(said.get("entitlement", said.get("ent")))
    percent = text_number_or_none(said.get("percent_remaining", said.get("rem")))
    over = text_number_or_none(said.get("overage_count", said.get("ov")))
    left = text_number_or_none(said.get("quota_remaining", said.get("remaining")))
    if total is not None and 0 < total < 1e-3:
        total = None  # nothing can be divided by it
    unlimited = said.get("unlimited") in (True, "true") or total == -1
    if unlimited:
        total = left = percent = None
    if total and percent is None and left is not None:
        percent = 100 * left / total
    if total and left is None and percent is not None:
        left = total * percent / 100
    if total and over and left is not None and left <= 0:
        left = min(left, -over)
        percent = min(percent or 0, 100 * left / total)

    return {
        "name": name,
        "unlimited": unlimited,
        "total": total,
        "left": left,
        "overage": said.get("overage_permitted", said.get("ovPerm")) in (True, "true"),
        "used": None if total is None or left is None else total - left,
        "percent_left": percent,
        "percent_used": None if percent is None else 100 - percent,
        "resets_at": moment_or_none(said.get("quota_reset_at", said.get("rst"))),
    }


def lane_rooms(lanes: Mapping[str, Any]) -> dict[str, float]:
    """Lane -> percent left, infinity where overage is permitted; of the lanes that limit something
    here.  Completions are an editor's own; the lane of premium requests has two names."""
    rooms: dict[str, float] = {}
    for name, said in list(lanes.items())[:MAX_NAMES]:
        lane = quota_lane(name, said)
        if lane["overage"]:
            room = float("inf")
        else:
            room = lane["percent_left"]
        is_limit_here = (
            lane["total"] != 0 and not lane["unlimited"] and name != "completions"
        )
        if room is not None and is_limit_here:
            rooms[name.replace("premium_models", "premium_interactions")] = room
    return rooms


def header_lanes(
    headers: Headers, prefixes: tuple[str, ...] = QUOTA_PREFIXES
) -> dict[str, str]:
    """Lane -> what an answer's headers say of it.  {"weekly": "ent=300&rem=75.5&rst=2026-..."}"""
    return {
        name[len(prefix) :]: value
        for name, value in headers.items()
        if name.startswith(prefixes)
        for prefix in prefixes
        if name.startswith(prefix)
    }


def exhausted_lanes(error: ProxyError) -> dict[str, float | None]:
    """Lane -> unix time of its reset, None where it is not told; of the lanes that the error's own
    headers call used up.  Quotas are believed where the error speaks of them only: they stand in
    the headers of every answer, also of a plain 429."""
    prefixes: tuple[str, ...] = QUOTA_PREFIXES
    if not is_quota(error):
        prefixes = QUOTA_PREFIXES[1:]
    return {
        lane: quota_lane(lane, said)["resets_at"]
        for name, said in header_lanes(error.headers, prefixes).items()
        for lane, room in lane_rooms({name: said}).items()
        if room <= 0
    }


def named_limit_s(error: ProxyError, now: float) -> float | None:
    """Seconds until a limit ends, from the unix time `now`, where the upstream names its end: by
    retry-after (seconds or a date), else in its text ('try again in 2 hours', 'resets at
    2026-12-01T00:00:00Z'), else by the reset of the lanes that are used up."""
    text = str(error).lower()
    after = error.headers.get("retry-after", "").strip()
    after_s = text_number_or_none(after)
    after_ms = text_number_or_none(error.headers.get("retry-after-ms"), 0)
    moment = http_moment_or_none(after)
    if after_ms is not None:
        return after_ms / 1000
    if after_s is not None:
        return after_s
    if after.isdigit():
        return QUOTA_LIMIT_S  # more digits than any number has
    if moment is not None:
        return moment - now

    spans = _WAIT.search(text)
    if spans:
        return sum(
            float(number) * _SECONDS[unit]
            for number, unit in re.findall(_SPAN, spans.group(1))
        )

    for ends in (
        map(moment_or_none, _UNTIL.findall(text)),
        exhausted_lanes(error).values(),
    ):
        left = [end - now for end in ends if end is not None and end > now]
        if left:
            return max(left)
    return None


def doubled_s(first_s: float, times: int, most_s: float) -> float:
    """A pause that was doubled some times.  10 s, 3 times, at most 300 s -> 80 s"""
    return min(first_s * 2.0 ** min(times, 30), most_s)


def limit_s(error: ProxyError, now: float, repeats: int = 0) -> float:
    """How long a limit lasts, from the unix time `now`.  Nonsense is clamped.  Where no end is
    named: for a quota an hour, else a short while that doubles each time the limit repeats."""
    named, most_s = named_limit_s(error, now), LIMIT_S
    usual_s = doubled_s(LIMIT_PAUSE_S, repeats, LIMIT_PAUSE_MAX_S)
    if is_quota(error):
        usual_s, most_s = QUOTA_PAUSE_S, QUOTA_LIMIT_S
    if named is None:
        return usual_s
    return min(max(named, 1.0), most_s)


# ==== 11. Settings ================================================================================
# Every value has flag > environment > default.  One table makes the command line, the environment
# names and the help text.  Pure: the environment is handed in.


@dataclass(frozen=True)
class Option:
    """One setting: `--name`, `COPILOT_PROXY_NAME`, and what it is for.
    kind: text, int, float, switch, list; where: the commands that take it, 'network' means all
    that talk to GitHub; env: further variables, read after COPILOT_PROXY_NAME."""

    name: str
    default: Any
    help: str
    kind: str = "text"
    short: str = ""
    where: str = "start"
    env: tuple[str, ...] = ()

    @property
    def field(self) -> str:
        return self.name.replace("-", "_")

    @property
    def variables(self) -> tuple[str, ...]:
        return ("COPILOT_PROXY_" + self.field.upper(),) + self.env


OPTIONS = (
    Option(
        "port",
        DEFAULT_PORT,
        "port to serve on; 0 takes a free one",
        "int",
        "-p",
        "start setup",
        ("PORT",),
    ),
    Option(
        "ollama-port",
        0,
        "serve on this port, too, where programs look for Ollama: 11434",
        "int",
    ),
    Option(
        "host",
        "127.0.0.1",
        "address to serve on; beyond loopback only with --api-key",
        where="start setup",
        env=("HOST",),
    ),
    Option(
        "verbose",
        False,
        "log every step, not only one line per request",
        "switch",
        "-v",
        "network",
    ),
    Option(
        "account-type",
        "individual",
        "individual, business or enterprise: the API host to use "
        "when GitHub names none",
        short="-a",
        where="network",
    ),
    Option(
        "manual",
        False,
        "ask on terminal and page before each request goes up",
        "switch",
    ),
    Option(
        "rate-limit",
        0.0,
        "least seconds between two requests to the upstream",
        "float",
        "-r",
    ),
    Option(
        "wait",
        False,
        "with --rate-limit: let requests wait instead of answering 429",
        "switch",
        "-w",
    ),
    Option(
        "github-token",
        "",
        "a GitHub token to use; - reads it from standard input",
        short="-g",
        where="network",
        env=("GH_TOKEN", "GITHUB_TOKEN"),
    ),
    Option(
        "show-token",
        False,
        "print tokens on the terminal at login and refresh, and serve "
        "/token to this machine",
        "switch",
        where="start auth",
    ),
    Option(
        "proxy-env",
        None,
        "insist on HTTPS_PROXY & co.; --no-proxy-env ignores them",
        "either",
        where="network",
    ),
    Option(
        "github-url",
        GITHUB_URL,
        "where to log in: https://TENANT.ghe.com",
        where="network",
    ),
    Option(
        "copilot-url",
        "",
        "Copilot API base, instead of the one GitHub names",
        where="network",
    ),
    Option("client-id", CLIENT_ID, "app id of the device login", where="network"),
    Option(
        "ca-file", "", "PEM file with further certificate authorities", where="network"
    ),
    Option(
        "tls-relaxed",
        False,
        "accept CAs that lack key identifiers (Python 3.13 is strict)",
        "switch",
        where="network",
    ),
    Option(
        "data-dir",
        "",
        "folder of the login",
        where="network",
        env=("COPILOT_PROXY_HOME",),
    ),
    Option(
        "header",
        (),
        "NAME=VALUE sent upstream instead of the built-in value",
        "list",
        where="network",
    ),
    Option(
        "fallback",
        "",
        "model to ask instead when the quota is used up",
        where="start models debug",
    ),
    Option(
        "model-alias",
        (),
        "FROM=TO: serve model TO under the name FROM",
        "list",
        where="start models debug",
    ),
    Option(
        "strict-models",
        False,
        "answer 404 instead of asking another model than the one that was named",
        "switch",
        where="start models debug",
    ),
    Option("search-model", "", "model that searches the web, else a small GPT"),
    Option("no-web-search", False, "searches of the web fail", "switch"),
    Option(
        "fetch-images",
        False,
        "fetch images that clients name by URL, from public addresses "
        "only, and send them inline",
        "switch",
    ),
    Option(
        "api-key",
        (),
        "a key that clients must send; auto makes, stores and prints one",
        "list",
    ),
    Option(
        "requests-per-minute",
        0,
        "most requests of one key in a minute; 0 is no limit",
        "int",
    ),
    Option(
        "max-concurrency",
        0,
        "most requests at a time, the others wait; 0 is no limit",
        "int",
    ),
    Option("tls-cert", "", "PEM file with the certificate chain: serve https"),
    Option("tls-key", "", "PEM file with its key, where --tls-cert does not hold it"),
    Option(
        "trusted-proxy",
        (),
        "address or network whose X-Forwarded-* headers are believed",
        "list",
    ),
    Option(
        "allow-host",
        (),
        "a further name that clients may use in the Host header",
        "list",
    ),
    Option(
        "cors-origin",
        (),
        "a web page's origin that may call the API (https://app.example), or "
        "a scheme of a program (vscode-webview://*)",
        "list",
    ),
    Option(
        "grace",
        10.0,
        "seconds that running answers get at shutdown",
        "float",
        where="start setup",
    ),
    Option(
        "claude-code",
        False,
        "choose models for Claude Code and print its launch command",
        "switch",
        "-c",
    ),
    Option("budget", 0.0, "credits that may be spent in a day; 0 is no limit", "float"),
    Option("no-history", False, "write no history.sqlite3", "switch"),
    Option("log-json", False, "the log as one JSON object per line", "switch"),
    Option("log-bodies", "", "folder for every request and answer WITH ITS WORDS"),
    Option("open", False, "open the status page in the browser", "switch"),
    Option("demo", False, "play without account and network", "switch"),
)
_YES, _NO = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")
_GUARDED_HEADERS = (
    "authorization",
    "host",
    "content-length",
    "transfer-encoding",
    "connection",
    "content-type",
    "cookie",
    "accept-encoding",
)


def parse_value(option: Option, text: str, source: str) -> Any:
    """A value from the environment or the command line.  Raises ConfigError naming its source."""
    if option.kind in ("int", "float"):
        number = text_number_or_none(text)
        if number is None or option.kind == "int" and number != int(number):
            raise ConfigError(
                "%s: '%s' is not a number" % (source, printable(text, 40))
            )
        if option.kind == "int":
            return int(number)
        return number

    if option.kind in ("switch", "either"):
        if text.strip().lower() not in _YES + _NO:
            raise ConfigError(
                "%s: '%s' is neither yes nor no" % (source, printable(text, 40))
            )
        return text.strip().lower() in _YES

    if option.kind == "list":
        return tuple(part.strip() for part in re.split("[,\n]", text) if part.strip())
    return text


def parse_pairs(values: Iterable[str], flag: str) -> dict[str, str]:
    """('A=b', 'C=d') -> {'A': 'b', 'C': 'd'}.  Raises ConfigError."""
    pairs = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not (name.strip() and equals and text.strip()):
            raise ConfigError(
                "%s: '%s' is not of the form NAME=VALUE" % (flag, printable(value, 60))
            )
        pairs[name.strip()] = text.strip()
    return pairs


def parse_networks(values: Iterable[str]) -> list[Any]:
    """('10.0.0.0/8', '::1') -> ipaddress networks.  Raises ConfigError."""
    import ipaddress

    try:
        return [ipaddress.ip_network(value, strict=False) for value in values]
    except ValueError as error:
        raise ConfigError("--trusted-proxy: %s" % printable(str(error))) from None


def check_origin(value: str) -> str:
    """A value of --cors-origin as browsers write it.  Raises ConfigError with the reason."""
    origin = origin_of(value)
    if origin:
        return origin

    as_text = printable(value, 80)
    scheme, _, rest = value.partition("://")
    is_site = scheme.lower() in ("http", "https")
    if value == "*":
        reason = "every web page could then use this account: name each origin that may"
    elif value.lower() == "null":
        reason = (
            "local files and sandboxed frames of every site share it: serve the page over "
            "http and name that origin"
        )
    elif is_site and "*" in rest:
        reason = (
            "patterns are for schemes of programs (vscode-webview://*): name each site"
        )
    elif is_site and "/" in rest:
        reason = "an origin has no path: write %s" % (
            origin_of("%s://%s" % (scheme, rest.partition("/")[0])) or "https://HOST"
        )
    elif not rest and origin_of("http://" + value):
        reason = "its scheme is missing: write http://%s or https://%s" % (
            as_text,
            as_text,
        )
    else:
        reason = (
            "this is no origin, which is written scheme://host or scheme://host:port"
        )
    raise ConfigError("--cors-origin %s: %s" % (as_text, reason))


def is_allowed_origin(origin: str, allowed: Container[str]) -> bool:
    """Is this Origin header one of them, or of a scheme that is allowed as a whole?"""
    known = origin_of(origin)
    return bool(known) and (
        known in allowed or known.partition("://")[0] + "://*" in allowed
    )


def check_host_name(flag: str, value: str) -> str:
    """A name or address alone, as `split_host` gives it.  Raises ConfigError."""
    is_ipv6 = value.count(":") > 1 and value[0] != "["
    name, port = split_host("[%s]" % value if is_ipv6 else value)
    if not name or port:
        raise ConfigError(
            "%s %s: give the name alone, without scheme, port or *"
            % (flag, printable(value, 80))
        )
    return name


_SERVER_URL = re.compile(r"(https?)://([^/]*)(?:/[!-~]*)?\Z", re.IGNORECASE)


def parse_url(url: str, flag: str) -> tuple[str, str]:
    """Scheme and host of a server's base URL.  Raises ConfigError."""
    match = _SERVER_URL.match(url)
    if match:
        host = split_host(match.group(2))[0]
    else:
        host = ""
    if not match or not host or set(url) & set("?#\\"):
        raise ConfigError(
            "%s: '%s' is not the URL of a server" % (flag, redact(printable(url)))
        )
    return match.group(1).lower(), host


def check_url(url: str, flag: str) -> str:
    """The URL without its trailing slash; plain http only on this machine.  Raises ConfigError."""
    scheme, host = parse_url(url, flag)
    if scheme == "http" and not is_loopback(host):
        raise ConfigError(
            "%s: plain http is accepted for this machine only, use https" % flag
        )
    return url.rstrip("/")


def check_own_url(url: str, flag: str) -> str:
    """Where a proxy like this one serves: a URL, a host with or without port, or a port of this
    machine.  '4399' -> 'http://127.0.0.1:4399'.  Raises ConfigError."""
    if re.fullmatch("[0-9]{1,5}", url):
        url = "127.0.0.1:" + url
    if "://" not in url and split_host(url)[0] and (":" in url or is_loopback(url)):
        url = "http://" + url
    parse_url(url, flag)
    return url.rstrip("/")


#: a key for clients; a GitHub token is none, it would be an account's
_KEY = re.compile(r"(?!gh[a-z]_|github_pat_)[!-~]{%d,}\Z" % KEY_MIN_CHARS)


@dataclass
class Settings:
    """All settings, checked.  The fields of OPTIONS, then timings that only tests change."""

    port: int = DEFAULT_PORT
    ollama_port: int = 0  # 0: none
    host: str = "127.0.0.1"
    verbose: bool = False
    account_type: str = "individual"
    manual: bool = False
    rate_limit: float = 0.0
    wait: bool = False
    github_token: str = ""
    show_token: bool = False
    proxy_env: bool | None = None
    github_url: str = GITHUB_URL
    copilot_url: str = ""
    client_id: str = CLIENT_ID
    ca_file: str = ""
    tls_relaxed: bool = False
    data_dir: str = ""
    header: tuple[str, ...] = ()
    fallback: str = ""
    model_alias: tuple[str, ...] = ()
    strict_models: bool = False
    fetch_images: bool = False
    search_model: str = ""
    no_web_search: bool = False
    api_key: tuple[str, ...] = ()
    requests_per_minute: int = 0
    max_concurrency: int = 0
    tls_cert: str = ""
    tls_key: str = ""
    trusted_proxy: tuple[str, ...] = ()
    allow_host: tuple[str, ...] = ()
    cors_origin: tuple[str, ...] = ()
    grace: float = 10.0
    claude_code: bool = False
    budget: float = 0.0
    no_history: bool = False
    log_json: bool = False
    log_bodies: str = ""
    open: bool = False
    demo: bool = False

    keepalive_s: float = KEEPALIVE_S
    poll_margin_s: float = 1.0  # added to GitHub's polling interval
    token_retry_s: tuple[float, ...] = TOKEN_RETRY_S
    hiccup_pause_s: float = 0.5
    idle_client_s: float = IDLE_CLIENT_S
    head_timeout_s: float = HEAD_TIMEOUT_S
    body_stall_s: float = BODY_STALL_S
    answer_timeout_s: float = ANSWER_TIMEOUT_S
    catalogue_age_s: float = CATALOGUE_AGE_S

    @classmethod
    def merge(cls, flags: Mapping[str, Any], environ: Mapping[str, str]) -> Settings:
        """Flags (None: not given) over environment over defaults.  Raises ConfigError."""
        values: dict[str, Any] = {}
        for option in OPTIONS:
            value = flags.get(option.field)
            for name in option.variables if value is None else ():
                if environ.get(name):
                    value = parse_value(option, environ[name], name)
                    break
            values[option.field] = option.default if value is None else value
        return cls(**values).check()

    def check(self) -> Settings:
        """Every combination that cannot work is refused here, with the flag's name."""
        self.github_url = check_url(self.github_url, "--github-url")
        if self.copilot_url:
            self.copilot_url = check_url(self.copilot_url, "--copilot-url")
        if self.account_type not in COPILOT_URLS:
            raise ConfigError(
                "--account-type: choose individual, business or enterprise"
            )

        for flag_, port in (("--port", self.port), ("--ollama-port", self.ollama_port)):
            if not 0 <= port <= 65535:
                raise ConfigError("%s: %d is not a port (0 to 65535)" % (flag_, port))

        if not 0 <= self.rate_limit <= 86400 or not 0 <= self.grace <= 86400:
            raise ConfigError("--rate-limit and --grace take 0 to 86400 seconds")
        if not 0 <= self.budget < 1e6:
            raise ConfigError("--budget takes 0 to 1000000 credits")
        if min(self.requests_per_minute, self.max_concurrency) < 0:
            raise ConfigError(
                "--requests-per-minute and --max-concurrency cannot be negative"
            )

        if not all(key == "auto" or _KEY.match(key) for key in self.api_key):
            raise ConfigError(
                "--api-key: a key has %d characters or more, printable ASCII without "
                "spaces, and is no GitHub token" % KEY_MIN_CHARS
            )

        if self.tls_key and not self.tls_cert:
            raise ConfigError("--tls-key needs --tls-cert")
        for name, value in self.headers.items():
            if name.lower() in _GUARDED_HEADERS or not _TOKEN.match(
                name.encode("utf-8")
            ):
                raise ConfigError("--header: %s cannot be set" % printable(name, 60))
            if not value.isprintable() or not value.isascii():
                raise ConfigError(
                    "--header %s: the value must be printable ASCII" % name
                )

        parse_pairs(self.model_alias, "--model-alias")
        self.cors_origin = tuple(map(check_origin, self.cors_origin))
        self.allow_host = tuple(
            check_host_name("--allow-host", name) for name in self.allow_host
        )
        _ = self.trusted_networks
        return self

    @functools.cached_property
    def headers(self) -> dict[str, str]:
        return parse_pairs(self.header, "--header")

    @functools.cached_property
    def trusted_networks(self) -> list[Any]:
        """--trusted-proxy as networks.  Raises ConfigError."""
        if self.trusted_proxy:
            return parse_networks(self.trusted_proxy)
        return []

    @functools.cached_property
    def aliases(self) -> dict[str, str]:
        return parse_pairs(self.model_alias, "--model-alias")

    def missing_models(self, models: list[Model]) -> list[str]:
        """A line for each alias and for --fallback whose model this account does not have.
        Without a list only retired models are known."""
        named = [
            ("--model-alias %s=%s" % pair, pair[1]) for pair in self.aliases.items()
        ]
        if self.fallback:
            named.append(("--fallback " + self.fallback, self.fallback))

        lines = []
        for place, name in named:
            fate = fate_of_name(name, models, self.strict_models)
            if fate:
                lines.append("%s: %s" % (printable(place), fate))
        return lines

    @property
    def rest_url(self) -> str:
        """Base of GitHub's REST API: github.com -> api.github.com, X.ghe.com -> api.X.ghe.com."""
        host = host_of(self.github_url)
        if host == "github.com":
            return "https://api.github.com"
        if host.endswith(".ghe.com"):
            return self.github_url.replace("://", "://api.", 1)
        if is_loopback(host):
            return self.github_url
        return self.github_url + "/api/v3"

    @property
    def usual_copilot_url(self) -> str:
        """The Copilot API base when neither a flag nor GitHub names one."""
        host = host_of(self.github_url)
        if host.endswith(".ghe.com"):
            return self.github_url.replace("://", "://copilot-api.", 1)
        if is_loopback(host):
            return self.github_url
        return COPILOT_URLS[self.account_type]

    def accept_copilot_url(self, url: Any) -> str:
        """A server-given API base if a bearer may be sent there, else ''."""
        if not isinstance(url, str) or not url:
            return ""
        match = re.match(r"(https?)://([^/]*)/?\Z", url)
        if match:
            host = split_host(match.group(2))[0]
        else:
            host = ""
        if not match or not host:
            return ""  # a login, a path, a backslash: never of the service

        own = host_of(self.github_url)
        if is_loopback(host):
            if is_loopback(own):
                return url.rstrip("/")
            return ""

        is_tenant = own != "github.com" and host.endswith("." + own)
        if match.group(1) == "https" and (host.endswith(COPILOT_HOSTS) or is_tenant):
            return url.rstrip("/")
        return ""


# ==== 12. Storage =================================================================================
# The data folder: mode 0700, files 0600 from their first byte, replaced in one step.  The
# short-lived Copilot token is never written.


def default_data_dir(environ: Mapping[str, str]) -> str:
    """$XDG_DATA_HOME/copilot-proxy, ~/.local/share/copilot-proxy, on Windows %LOCALAPPDATA%."""
    if os.name == "nt":
        base = environ.get("LOCALAPPDATA")
    else:
        base = environ.get("XDG_DATA_HOME")
    home = os.path.expanduser("~")  # stays as it is where there is none
    base = base or os.path.join("/" if home == "~" else home, ".local", "share")
    return os.path.join(base, "copilot-proxy")


def write_file(path: str, data: bytes) -> None:
    """Replace a file in one step: a crash leaves the old one or the new one.  Raises OSError."""
    folder = os.path.dirname(path)
    os.makedirs(folder, mode=0o700, exist_ok=True)

    for name in os.listdir(folder):  # left by a crash: it may hold a secret
        left = os.path.join(folder, name)
        with contextlib.suppress(OSError):
            if (
                name.startswith(".new-")
                and time.time() - os.stat(left).st_mtime > STALE_FILE_S
            ):
                os.unlink(left)

    handle, temporary = tempfile.mkstemp(prefix=".new-", dir=folder)  # mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def save_file(path: str, data: bytes) -> None:
    """`write_file` with an error for people.  Raises ConfigError."""
    try:
        write_file(path, data)
    except OSError as error:
        raise ConfigError(
            "cannot write %s: %s; choose another folder with --data-dir"
            % (path, error.strerror)
        ) from None


def move_aside(path: str, what: str) -> ConfigError:
    """Rename a file of ours that cannot be parsed -> the error that names both."""
    aside = "%s.bad-%d" % (path, time.time_ns())
    os.replace(path, aside)
    return ConfigError(
        "%s held no %s; it was moved to %s. Log in again: copilot_proxy.py auth"
        % (path, what, aside)
    )


class LoginFile:
    """The GitHub token of one host: `github_token` for github.com, else `github_token.<host>`.
    Plain text; empty means that nobody is logged in.  Same place and form as other proxies of
    this kind use, so that a login can be shared with them."""

    def __init__(self, folder: str, github_url: str) -> None:
        host = re.sub(
            r"[^a-z0-9.-]", "_", urllib.parse.urlsplit(github_url).netloc.lower()
        )
        self.path = os.path.join(
            folder, "github_token" + ("" if host == "github.com" else "." + host)
        )

    def load(self) -> str:
        """The token, '' when there is none.  A file that holds something else is moved aside."""
        try:
            with open(self.path, "rb") as file:
                text = file.read(4096).decode("ascii").strip()
        except FileNotFoundError:
            return ""
        except UnicodeDecodeError:
            text = "not a token"
        except OSError as error:
            raise ConfigError(
                "cannot read %s: %s" % (self.path, error.strerror)
            ) from None
        if text and not re.fullmatch(r"[A-Za-z0-9_.~-]+", text):
            raise move_aside(self.path, "token")
        return text

    def save(self, token: str) -> None:
        """Raises ConfigError."""
        save_file(self.path, token.encode("ascii"))

    def delete(self) -> bool:
        """True if there was a login."""
        try:
            os.unlink(self.path)
            return True
        except FileNotFoundError:
            return False


@dataclass(frozen=True)
class Key:
    """A key that clients may send, as it is stored.  One without a token is the operator's."""

    hash: str  # HMAC-SHA256 in hexadecimal; its beginning is the key's id
    made: int = 0  # unix time; 0: from a flag or the environment, never stored
    host: str = ""  # of the GitHub account that it stands for
    login: str = ""
    token: str = field(default="", repr=False)

    @property
    def id(self) -> str:
        return self.hash[:8]


def new_key() -> str:
    """A key that nobody can guess."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


class KeyFile:
    """`proxy_accounts.json`: keys made here, as hashes, and the GitHub tokens of those that
    browsers logged in for; with the keys from flags.  Hashes are keyed with the file's salt.  What
    another process writes is noticed.  Thread-safe; `_lock` guards all fields and, unlike others,
    is held while the file is read and written: changes must not mix."""

    def __init__(self, path: str, host: str, given: Iterable[str]) -> None:
        self.path, self._host = path, host
        self._given = [key for key in given if key != "auto"]
        self._lock = threading.RLock()
        self._salt = secrets.token_hex(32)
        self._keys: list[Key] = []  # of the file, those for other hosts, too
        self._good: list[Key] = []  # those given and those of the file for this host
        self._stamp: Any = ()  # of the file as it was read; () before
        self.is_closed = False  # is a key wanted?  As of `all`; never undone

    def all(self) -> list[Key]:
        """Every key that is good here.  Raises ConfigError for a file that cannot be parsed."""
        try:
            known = os.stat(self.path)
            stamp: Any = (known.st_mtime_ns, known.st_size, known.st_ino)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                stamp = None
            else:
                stamp = 0
        if stamp != self._stamp:
            with self._lock:
                self._read(stamp)
        return self._good

    def find(self, text: str) -> Key | None:
        """The key that this is.  Every hash is compared, in constant time."""
        keys, found = self.all(), None
        digest = self._hash(text) if keys else ""
        for key in keys:
            if hmac.compare_digest(key.hash, digest):
                found = key
        return found

    def add(self, text: str, login: str = "", token: str = "") -> Key:
        """Store a key, the operator's or that of an account, whose older keys get the new token.
        Raises ConfigError, BadRequest 409."""
        with self._lock:
            self.all()
            if len(self._keys) >= MAX_ACCOUNTS:
                raise BadRequest(
                    "%d keys are stored: delete one first" % MAX_ACCOUNTS, 409
                )

            host = self._host if token else ""
            made = Key(self._hash(text), int(time.time()), host, login, token)
            self._write(
                [
                    replace(key, token=token)
                    if login and (key.login, key.host) == (login, host)
                    else key
                    for key in self._keys
                ]
                + [made]
            )

            return made

    def delete(self, ids: Container[str]) -> None:
        """Forget stored keys.  Raises ConfigError."""
        with self._lock:
            self.all()
            self._write([key for key in self._keys if key.id not in ids])

    def _hash(self, text: str) -> str:
        return hmac.new(
            self._salt.encode(), text.encode("utf-8", "replace"), hashlib.sha256
        ).hexdigest()

    def _read(self, stamp: Any) -> None:
        is_first, self._stamp, self._keys = self._stamp == (), stamp, []
        if stamp is not None:
            try:
                with open(self.path, "rb") as file:
                    value = as_object(loads(file.read(MAX_BODY_BYTES)))
                self._keys, self._salt = (
                    [Key(**entry) for entry in value["keys"]],
                    value["salt"],
                )
                texts = [self._salt] + [
                    text
                    for key in self._keys
                    for name, text in vars(key).items()
                    if name != "made"
                ]

                if not all(isinstance(text, str) for text in texts):
                    raise ValueError
            except (ValueError, TypeError, KeyError):
                self._keys, self._salt = [], secrets.token_hex(32)
                raise move_aside(self.path, "keys") from None
            except OSError as error:
                raise ConfigError(
                    "cannot read %s: %s" % (self.path, error.strerror)
                ) from None

        self._good = [Key(self._hash(text)) for text in self._given]
        self._good += [key for key in self._keys if key.host in ("", self._host)]
        self.is_closed |= any(not key.token for key in self._good)

        if self._given and is_first and stamp is None:
            with contextlib.suppress(
                ConfigError
            ):  # read-only: ids differ at each start
                self._write([])

    def _write(self, keys: list[Key]) -> None:
        save_file(
            self.path, dumps({"salt": self._salt, "keys": [vars(key) for key in keys]})
        )
        self.all()


# ==== 13. Upstream HTTP ===========================================================================
# How a request waits, and all traffic to GitHub and Copilot.  One urllib opener finds the way to a
# host (proxies, CONNECT, CAs) and gives a connection, which is kept in a pool; no redirect is
# followed.  Heads and bodies are read by section 6, because a relay must see bytes as they come.

Work = Coroutine[Any, Any, Any]  # what `run` and the event loop drive
OnEnd = Callable[[Any, Optional[BaseException]], None]


class Wait:
    """Something that a coroutine waits for.

    A request is a coroutine: plain `async def`, without asyncio.  Where it has to wait it hands
    one of these objects to its driver, which resumes it with the result:

        coroutine  -- await wait(Wait) -->  EventLoop: calls `begin`, serves others, resumes it
                   <------ result --------  run():     calls `block` in this very thread

    So the same code serves a client in the loop, and a command or a test in a thread.  The loop is
    the EventLoop of section 18, a task one coroutine that it drives.
    timeout_s: the longest wait; when it is over the result is False."""

    timeout_s = math.inf

    def begin(self, loop: Any, task: Any) -> None:
        """In the loop: see to it that the task is resumed.  Must not resume it at once."""
        raise NotImplementedError

    def block(self) -> Any:
        """In a thread: wait here, return the result."""
        raise NotImplementedError


@types.coroutine
def wait(what: Wait) -> Generator[Wait, Any, Any]:
    """`await wait(what)`: the one place where a coroutine hands over to its driver."""
    return (yield what)


def outcome(work: Callable[..., Any], *items: Any) -> tuple[Any, BaseException | None]:
    """(what it returns, None) or (None, what it raises), for somebody else."""
    try:
        return work(*items), None
    except Exception as error:  # noqa: BLE001
        return None, error


def run(work: Work) -> Any:
    """Drive a coroutine to its end in this thread; returns its result, raises its error."""
    value, error = None, None
    while True:
        try:
            if error is None:
                what = work.send(value)
            else:
                what = work.throw(error)
        except StopIteration as end:
            return end.value
        value, error = outcome(what.block)


_POLL_READ = getattr(select, "POLLIN", 0) | getattr(select, "POLLRDHUP", 0)


def wait_ready(sock: Any, timeout_s: float, write: bool = False) -> bool:
    """Can this socket (or object with fileno()) be read, or written, now or within `timeout_s`?
    poll where there is one: select ends at file number 1,024."""
    if not hasattr(select, "poll"):
        if timeout_s == math.inf:
            seconds = None
        else:
            seconds = timeout_s
        wanted: tuple[list[Any], list[Any], list[Any]]
        if write:
            wanted = ([], [sock], [sock])
        else:
            wanted = ([sock], [], [])
        return any(select.select(*wanted, seconds))

    poller = select.poll()
    poller.register(sock, select.POLLOUT if write else _POLL_READ)
    if timeout_s == math.inf:
        timeout_ms = None
    else:
        timeout_ms = max(0, int(timeout_s * 1000 + 0.999))
    return bool(poller.poll(timeout_ms))


def is_would_block(error: OSError) -> bool:
    """Does a socket that does not block only say "not now"?  (By name: ssl is imported late.)"""
    return isinstance(error, (BlockingIOError, InterruptedError)) or type(
        error
    ).__name__ in ("SSLWantReadError", "SSLWantWriteError")


def receive_now(sock: Any) -> bytes | None:
    """Read from a socket that does not block, TLS or not: None when nothing is there."""
    try:
        return sock.recv(READ_BYTES)  # type: ignore[no-any-return]
    except OSError as error:
        if is_would_block(error):
            return None
        raise


def send_now(sock: Any, data: Any) -> int:
    """Write what fits to a socket that does not block -> how many bytes.  Raises OSError."""
    try:
        return sock.send(data)  # type: ignore[no-any-return]
    except OSError as error:
        if is_would_block(error):
            return 0
        raise


class Ready(Wait):
    """Until a connection can be read, or written -> True."""

    def __init__(
        self,
        connection: Connection,
        events: int = selectors.EVENT_READ,
        timeout_s: float = math.inf,
    ) -> None:
        self.connection, self.events, self.timeout_s = connection, events, timeout_s

    def begin(self, loop: Any, task: Any) -> None:
        self.connection.waiter = task
        loop.watch(self.connection, self.events)

    def block(self) -> bool:
        return wait_ready(
            self.connection, self.timeout_s, self.events == selectors.EVENT_WRITE
        )


class InThread(Wait):
    """Until work that may block is done, in a worker thread -> what it returns."""

    def __init__(self, work: Callable[[], Any], timeout_s: float = math.inf) -> None:
        self.block, self.timeout_s = work, timeout_s  # type: ignore[method-assign]

    def begin(self, loop: Any, task: Any) -> None:
        loop.run_in_thread(self.block, task, self)


class Pause(Wait):
    """For some seconds."""

    def __init__(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds

    def begin(self, loop: Any, task: Any) -> None:
        loop.wake_at(self._until, task, self)

    def block(self) -> None:
        time.sleep(max(0.0, self._until - time.monotonic()))


class NextTurn(Wait):
    """Until the running streams have been served: what follows takes a moment to compute."""

    def begin(self, loop: Any, task: Any) -> None:
        loop.wake_in_turn(task, self)

    def block(self) -> None:
        """A thread has its turn always."""


class Signal(Wait):
    """Until `set` is called, from whatever thread -> True.  One coroutine waits for it, once."""

    def __init__(self, timeout_s: float = math.inf) -> None:
        self.timeout_s = timeout_s
        self.is_set = False
        self._wake: Callable[[], Any] | None = None

    def set(self) -> None:
        """It has happened."""
        self.is_set = True
        wake, self._wake = self._wake, None
        if wake is not None:
            wake()

    def _tell(self, wake: Callable[[], Any]) -> None:
        """Without a lock: `set` writes, then reads, and so does this, so one of them wakes."""
        self._wake = wake
        if self.is_set:
            wake()

    def begin(self, loop: Any, task: Any) -> None:
        self._tell(lambda: loop.wake(task, self, True))

    def block(self) -> bool:
        event = threading.Event()
        self._tell(event.set)
        return event.wait(None if self.timeout_s == math.inf else self.timeout_s)


class Apart(Wait):
    """Until another coroutine has ended -> its result.  It goes on when who waits for it leaves:
    so a token that many wait for is fetched although the first of them hangs up."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def begin(self, loop: Any, task: Any) -> None:
        loop.spawn(self._work, lambda value, error: loop.wake(task, self, value, error))

    def block(self) -> Any:
        return run(self._work)


class Within(Wait):
    """Until another coroutine has ended -> (its result, its error), or its time is over."""

    def __init__(self, timeout_s: float, work: Work) -> None:
        self.timeout_s, self._work = timeout_s, work
        self._stop: Callable[[], None] = work.close

    def begin(self, loop: Any, task: Any) -> None:
        inner = loop.spawn(self._work, lambda *result: loop.wake(task, self, result))
        self._stop = lambda: loop.cancel(inner, ClientGone())

    def block(self) -> Any:
        return outcome(lambda: run(self._work))

    def stop(self) -> None:
        """Nobody waits for it any more."""
        self._stop()


async def within(seconds: float, work: Work) -> Any:
    """The result of `work`, which has so many seconds in all.  Raises socket.timeout."""
    what = Within(seconds, work)
    try:
        found = await wait(what)
    finally:
        what.stop()
    value, error = found or (None, socket.timeout("timed out"))
    if error is not None:
        raise error
    return value


class Refreshed:
    """A value that is fetched again when it is due; one fetch for all who wait for it.

    `get()` returns at once while the value is fresh.  When it is due the first caller fetches, the
    others go on with the old value as long as it is not dead, else they wait for that one fetch.
    After a failed fetch the old value is kept and further tries are spaced by `pauses_s`.
    value: what is there, without a fetch, None at the start; error: why the last fetch failed.
    `_lock` guards all fields and is held for no I/O.  Any thread and the loop may ask."""

    def __init__(
        self,
        fetch: Callable[[], Work],
        due: Callable[[Any], bool],
        dead: Callable[[Any], bool],
        pauses_s: tuple[float, ...],
    ) -> None:
        self._fetch, self._is_due, self._is_dead, self._pauses_s = (
            fetch,
            due,
            dead,
            pauses_s,
        )

        self._lock = threading.Lock()
        self.value: Any = None
        self.error: ProxyError | None = None
        self._is_busy = False
        self._waiting: list[Signal] = []  # who waits for the fetch that runs
        self._attempts = 0  # fetches that have ended
        self._failures = 0  # of them, failed in a row
        self._retry_at = 0.0  # monotonic

    async def get(self, bad: Any = None) -> Any:
        """The value; never the very object `bad`.  Raises what the fetch raised."""
        seen = self._attempts
        while True:
            with self._lock:
                value = self.value
                is_early = time.monotonic() < self._retry_at
                if self._is_usable(value, bad) and (
                    not self._is_due(value) or self._is_busy or is_early
                ):
                    return value

                has_failed = self._attempts != seen or is_early and not self._is_busy
                if self.error is not None and has_failed:
                    raise self.error.with_traceback(None)

                if not self._is_busy:
                    self._is_busy = True
                    break
                ended = Signal()
                self._waiting.append(ended)
            await wait(ended)
        return await wait(Apart(self._attempt(bad)))

    def _is_usable(self, value: Any, bad: Any) -> bool:
        return value is not None and value is not bad and not self._is_dead(value)

    async def _attempt(self, bad: Any) -> Any:
        value, error = None, None
        try:
            value = await self._fetch()
        except ProxyError as problem:
            error = problem
        finally:
            old = self._end_attempt(value, error)

        if value is None and error is not None:
            if not self._is_usable(old, bad):
                raise error
            value = old
        return value

    def _end_attempt(self, value: Any, error: ProxyError | None) -> Any:
        """Note how a fetch ended, wake those who wait for it -> the value that counts now."""
        with self._lock:
            self._is_busy = False
            self._attempts += 1
            waiting, self._waiting = self._waiting, []
            if value is not None:
                self.value, self.error = value, None
                self._failures, self._retry_at = 0, 0.0
            else:
                pause = self._pauses_s[min(self._failures, len(self._pauses_s) - 1)]
                self._failures += 1
                self._retry_at = time.monotonic() + pause
                self.error = error or UpstreamError("the fetch was broken off")
            current = self.value

        for one in waiting:
            one.set()
        return current


class Connection:
    """A socket that the event loop may watch.

    An event belongs to the coroutine that waits for it (`waiter`); where none does the connection
    decides itself what it means, in `on_event`.
    watched: the events that the loop's selector reports; written by the loop alone."""

    sock: Any = None
    loop: Any = None  # that watches it
    waiter: Any = None
    watched = 0

    def fileno(self) -> int:
        return self.sock.fileno()  # type: ignore[no-any-return]

    def on_event(self, mask: int) -> None:
        """The selector reports something that nobody waits for."""
        raise NotImplementedError

    async def shake_hands(self, deadline: float) -> None:
        """Take all steps of a TLS handshake until `deadline`, monotonic.  Raises OSError."""
        while True:
            self.unwatch()
            await wait(NextTurn())
            try:
                self.sock.do_handshake()
                return
            except OSError as error:
                if not is_would_block(error):
                    raise
                wants_write = type(error).__name__ == "SSLWantWriteError"

            if wants_write:
                events = selectors.EVENT_WRITE
            else:
                events = selectors.EVENT_READ
            if not await wait(Ready(self, events, deadline - time.monotonic())):
                raise socket.timeout("timed out")

    def unwatch(self) -> None:
        """The loop has nothing to do with it any more."""
        self.waiter = None
        if self.loop is not None and self.watched:
            self.loop.watch(self, 0)


@functools.lru_cache(maxsize=HEADS_KEPT)
def split_origin(url: str) -> tuple[str, str, str]:
    """'https://me@a:1/b?c' -> ('https://a:1', 'a:1', '/b?c')"""
    scheme, _, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    host = host.rpartition("@")[2]
    return f"{scheme}://{host}", host, slash + path or "/"


class UpstreamRequest:
    """A request to GitHub or Copilot.
    origin: "https://host:port"; head: as it goes over the wire, with the empty line, and where it
    is given all but the Content-Length; is_fresh: not over a connection that was kept."""

    def __init__(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes | None = None,
        timeout_s: float = ANSWER_TIMEOUT_S,
        head: bytes = b"",
    ) -> None:
        self.origin, host, target = split_origin(url)
        self.method, self.url, self.body, self.timeout_s = method, url, body, timeout_s
        self.is_fresh = False
        if not head:
            head = render_head(
                f"{method} {target} HTTP/1.1", {"Host": host, **headers}.items()
            )
        if body is not None:
            head = b"%bContent-Length: %d\r\n\r\n" % (head[:-2], len(body))
        self.head = head


class ProxyRefusal(OSError):
    """What a company proxy answered to CONNECT."""

    logins = ""  # that it would take: Basic, NTLM, Negotiate


def plain_reason(error: BaseException) -> str:
    """An OSError in a few words, without secrets."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return redact(printable(str(text)))


#: part of OpenSSL's reason -> what it means and helps
_TLS_REMEDIES = (
    (
        "ismatch",
        "a captive portal or a filter answers: open a web page and sign in there",
    ),
    ("not yet valid", "set this machine's clock"),
    ("expired", "set this machine's clock"),
    ("Missing", "use --tls-relaxed"),
    ("not marked critical", "use --tls-relaxed"),
    (
        "",
        "use --ca-file FILE with your company's root certificate, if it inspects connections",
    ),
)


def without_answer(
    kind: type[UpstreamError], reason: str, is_unsent: bool
) -> UpstreamError:
    """The error of a connection that gave no answer.  Who raises it has no name for it, which
    would lead from the error's traceback back to it."""
    error = kind(reason)
    error.unsent = is_unsent
    return error


def explain_connect_error(error: Exception, host: str, proxied: bool) -> UpstreamError:
    """Why a host could not be reached, and what to do: as an error for the client."""
    text = str(error)
    way = " through the proxy" if proxied else ""

    if isinstance(error, socket.gaierror):
        return UpstreamError(
            "cannot find the host %s%s: no DNS or no network; behind a company "
            "proxy set HTTPS_PROXY" % (host, way)
        )

    if "CERTIFICATE_VERIFY_FAILED" in text:
        hint = next(remedy for sign, remedy in _TLS_REMEDIES if sign in text)
        return UpstreamError(
            "the certificate of %s is not trusted (%s): %s"
            % (host, plain_reason(error), hint)
        )

    if isinstance(error, ProxyRefusal):
        hint = f"ask for {host} to be allowed, or look at HTTPS_PROXY"
        if text[:3] == "407":
            hint = "write user:password@ before its host in HTTPS_PROXY"
            if error.logins and "basic" not in error.logins.lower():
                hint = (
                    "it takes only a Windows login (%s): run px or cntlm on this machine and "
                    "set HTTPS_PROXY=http://127.0.0.1:3128"
                    % printable(error.logins, 20)
                )
        return UpstreamError(
            f"the proxy refuses {host} ({plain_reason(error)}): {hint}"
        )

    if isinstance(error, socket.timeout):
        return UpstreamError(
            "connecting to %s%s took more than %d s: a firewall? Behind a company "
            "proxy set HTTPS_PROXY" % (host, way, CONNECT_TIMEOUT_S),
            504,
        )

    reason = f"cannot connect to {host}{way}: {plain_reason(error)}"
    return without_answer(UpstreamError, reason, True)


class HostNames:
    """Addresses of hosts, looked up in a thread and kept for NAME_AGE_S."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], Refreshed] = {}

    async def find(self, host: str, port: int) -> list[tuple[int, Any]]:
        """[(address family, address)].  Raises OSError."""
        with contextlib.suppress(OSError):
            return self._look_up(host, port, socket.AI_NUMERICHOST)

        known = self._known.get((host, port))
        if known is None:
            fetch = functools.partial(self._fetch, host, port)
            known = self._known[host, port] = Refreshed(
                fetch, self._is_old, self._is_old, (0.0,)
            )
        _, found = await known.get()
        if isinstance(found, OSError):
            raise found
        return found  # type: ignore[no-any-return]

    async def _fetch(self, host: str, port: int) -> tuple[float, Any]:
        """(monotonic time, what the resolver says or its error)"""
        look_up = functools.partial(self._look_up, host, port)
        found = await wait(InThread(lambda: outcome(look_up), CONNECT_TIMEOUT_S))
        addresses, error = found or (None, socket.timeout("timed out"))
        return time.monotonic(), error or addresses

    @staticmethod
    def _look_up(host: str, port: int, flags: int = 0) -> list[tuple[int, Any]]:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
        return [(entry[0], entry[4]) for entry in found]

    @staticmethod
    def _is_old(value: tuple[float, Any]) -> bool:
        is_error = isinstance(value[1], Exception)
        return is_error or time.monotonic() - value[0] >= NAME_AGE_S


#: what connect_ex returns while a connection is being made
_CONNECTING = (
    errno.EINPROGRESS,
    errno.EWOULDBLOCK,
    getattr(errno, "WSAEWOULDBLOCK", 0),
)


class HttpConnection(Connection):
    """A connection to an upstream, directly or through a proxy; it carries one request at a time.

        opener ---> open() ---> exchange() ---> UpstreamResponse --- read whole ---> Pool
                                    ^                 |                               |
                                    |                 +--- cut, given up ---> closed  |
                                    +----------------- next request <-----------------+

    received: bytes that were read already and belong to the next head or body;
    has_more: more may be there that no selector tells of, inside TLS;
    forward: the origin that an HTTP proxy is asked for, "" for a direct connection."""

    default_port = 80
    origin = ""
    tunnel = ""  # host:port behind a proxy that speaks CONNECT
    forward = ""
    proxy_login = ""  # the value of Proxy-Authorization
    idle_since = 0.0  # monotonic; 0 before its first request
    is_idle = False  # in the pool
    received = b""
    has_more = False

    def __init__(self, host: str, names: HostNames | ImageFetcher) -> None:
        where = urllib.parse.urlsplit("//" + host)
        self.host, self.port = where.hostname or "", where.port or self.default_port
        self._names = names
        self._readable = Ready(self)

    async def open(self) -> None:
        """Connect, through the proxy if there is one, and begin TLS.  Raises UpstreamError."""
        try:
            await self.connect()
            if self.tunnel:
                await self.ask_proxy()
            await self.secure()
        except OSError as error:
            self.close()
            name = host_of(self.origin)
            raise explain_connect_error(
                error, name, bool(self.tunnel or self.forward)
            ) from None
        except BaseException:
            self.close()
            raise

    async def connect(self) -> None:
        """Try one address after the other."""
        problem = OSError("no address")
        for family, address in await self._names.find(self.host, self.port):
            self.sock = socket.socket(family, socket.SOCK_STREAM)
            self.sock.setblocking(False)
            try:
                await self._reach(address)
                break
            except OSError as error:
                problem = error
                self.close()
        else:
            raise problem

        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    async def _reach(self, address: Any) -> None:
        code = self.sock.connect_ex(address)
        if code in _CONNECTING:
            if not await wait(Ready(self, selectors.EVENT_WRITE, CONNECT_TIMEOUT_S)):
                raise socket.timeout("timed out")
            code = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))

    async def ask_proxy(self) -> None:
        """CONNECT.  Raises ProxyRefusal."""
        fields_ = [("Host", self.tunnel)]
        if self.proxy_login:
            fields_.append(("Proxy-Authorization", self.proxy_login))
        await self._send(render_head(f"CONNECT {self.tunnel} HTTP/1.1", fields_))

        data = b""
        while b"\r\n\r\n" not in data and len(data) < MAX_HEAD_BYTES:
            more = await self._receive_one()
            if not more:
                break
            data += more
        try:
            status, reason, headers = parse_response_head(
                data.partition(b"\r\n\r\n")[0]
            )
        except ProxyError:
            raise ProxyRefusal("no HTTP proxy answers there") from None
        if status != 200:
            refusal = ProxyRefusal(f"{status} {reason}")
            refusal.logins = headers.get("proxy-authenticate", "")
            raise refusal

    async def _receive_one(self) -> bytes:
        """One byte, and none of the TLS that follows."""
        while True:
            try:
                return self.sock.recv(1)  # type: ignore[no-any-return]
            except OSError as error:
                if not is_would_block(error):
                    raise
            if not await wait(Ready(self, timeout_s=CONNECT_TIMEOUT_S)):
                raise socket.timeout("timed out")

    async def secure(self) -> None:
        """Begin TLS, where it is spoken.  Raises OSError."""

    def on_event(self, mask: int) -> None:
        """An idle connection that can be read was closed by the upstream.  Another one is just
        not read now: its client is slow, or its request is in a thread."""
        self.unwatch()
        if self.is_idle:
            self.close()

    def is_stale(self) -> bool:
        """Has the other side closed it, or sent something nobody asked for?"""
        return self.sock is None or bool(self.received) or wait_ready(self.sock, 0)

    async def _send(self, data: bytes) -> None:
        """Raises OSError; socket.timeout when nothing is taken for SEND_TIMEOUT_S."""
        sent = send_now(self.sock, data)
        while sent < len(data):
            if not await wait(Ready(self, selectors.EVENT_WRITE, SEND_TIMEOUT_S)):
                raise socket.timeout("timed out")
            sent += send_now(self.sock, memoryview(data)[sent : sent + MAX_OUT_BYTES])

    async def receive(self, timeout_s: float) -> bytes:
        """The next bytes, b"" at the end.  Raises OSError; UpstreamError 504 after a silence."""
        if self.received:
            data, self.received = self.received, b""
            return data

        while True:
            if self.has_more:
                more = self.receive_now()
                if more is not None:
                    return more
            self._readable.timeout_s = timeout_s
            if not await wait(self._readable):
                raise UpstreamError("the upstream was silent for too long", 504)
            more = self.receive_now()
            if more is not None:
                return more

    def receive_now(self) -> bytes | None:
        """What is there now: None when nothing is, b"" at the end.  Raises OSError.
        A TLS socket gives one record at a time, so a full one may have others behind it."""
        more = receive_now(self.sock)
        whole = min(RECORD_BYTES, READ_BYTES)
        if more is None or len(more) < whole:
            self.has_more = False
            return more

        parts, size = [more], len(more)
        while len(more) >= whole and size < READ_BYTES:
            more = receive_now(self.sock)
            if not more:  # nothing now; an end will show the next time
                break
            parts.append(more)
            size += len(more)
        self.has_more = size >= READ_BYTES
        return b"".join(parts)

    async def exchange(self, request: UpstreamRequest, pool: Pool) -> UpstreamResponse:
        """Send a request, wait for the head of its answer.  Raises StaleConnection when a kept
        connection proves closed before a byte came, else UpstreamError."""
        try:
            return UpstreamResponse(
                await self._ask(request), self, request.method, pool
            )
        except StaleConnection as error:
            is_kept = self.idle_since > 0
            self.close()
            if is_kept:
                raise
            raise without_answer(UpstreamError, str(error), error.unsent) from None
        except BaseException:
            self.close()
            raise

    async def _ask(self, request: UpstreamRequest) -> tuple[int, str, Headers]:
        head, body = request.head, request.body or b""
        if self.forward:
            head = self._for_proxy(head)
        broken = ""
        try:
            if len(body) <= READ_BYTES:  # in one packet
                await self._send(head + body)
            else:
                await self._send(head)
                await self._send(body)
        except OSError as error:
            broken = plain_reason(error)  # an early answer may still be readable
        return await self._read_head(request.timeout_s, broken)

    def _for_proxy(self, head: bytes) -> bytes:
        """A proxy that forwards plain HTTP wants the whole URL, and its login."""
        line, _, rest = head.partition(b"\r\n")
        method, _, target = line.partition(b" ")
        login = ""
        if self.proxy_login:
            login = f"Proxy-Authorization: {self.proxy_login}\r\n"
        return b"%b %b%b\r\n%b%b" % (
            method,
            self.forward.encode(),
            target,
            login.encode(),
            rest,
        )

    async def _read_head(
        self, timeout_s: float, broken: str
    ) -> tuple[int, str, Headers]:
        """broken: why the request could not be sent whole."""
        deadline = time.monotonic() + timeout_s
        is_unsent = bool(broken)
        interim_bytes = 0  # of the 1xx answers before
        data = b""
        while True:
            end = data.find(b"\r\n\r\n")
            if end >= 0:
                head, data = parse_response_head(data[:end]), data[end + 4 :]
                if head[0] >= 200:
                    self.received = data
                    return head
                interim_bytes += end  # 100 Continue and its like
                if head[0] == 101 or interim_bytes > MAX_HEAD_BYTES:
                    raise UpstreamError(
                        "the upstream's answer is not the one to a plain request"
                    )
                continue

            if len(data) > MAX_HEAD_BYTES:
                raise UpstreamError("the head of the upstream's answer is too large")
            try:
                more = await self.receive(max(0.0, deadline - time.monotonic()))
            except OSError as error:
                more, broken = b"", plain_reason(error)
            if not more:
                reason = (
                    f"the upstream gave no answer ({broken or 'connection closed'})"
                )
                if data:
                    raise UpstreamError(reason)
                raise without_answer(StaleConnection, reason, is_unsent)
            data += more

    def close(self) -> None:
        """May be called twice."""
        self.unwatch()
        sock, self.sock = self.sock, None
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.close()


class HttpsConnection(HttpConnection):
    """The same over TLS."""

    default_port = 443

    def __init__(
        self, host: str, names: HostNames | ImageFetcher, context: Any
    ) -> None:
        super().__init__(host, names)
        self._context = context

    async def secure(self) -> None:
        name = self.tunnel.rpartition(":")[0] or self.host
        self.unwatch()  # the wrapped socket is another object
        self.sock = self._context.wrap_socket(
            self.sock, do_handshake_on_connect=False, server_hostname=name
        )
        await self.shake_hands(time.monotonic() + CONNECT_TIMEOUT_S)


class Pool:
    """Idle connections by origin; newest first, none older than POOL_IDLE_S.

    The loop watches those that it keeps, so that one that is closed by its upstream is gone at
    once; those of other threads are looked at when they are taken.  Neither takes the other's.
    `_lock` guards `_idle` and is held for no I/O."""

    def __init__(self, closed: bool = False) -> None:
        self.closed = closed
        self._loop_thread = 0  # the loop's own, by number
        self._lock = threading.Lock()
        #: (origin, is the loop's) -> connections, the oldest first
        self._idle: dict[tuple[str, bool], collections.deque[HttpConnection]] = {}

    def belong_to_loop(self) -> None:
        """Called in the loop's thread: the connections that are made here are watched."""
        self._loop_thread = threading.get_ident()

    def _key(self, origin: str) -> tuple[str, bool]:
        return origin, threading.get_ident() == self._loop_thread

    def take(self, origin: str) -> HttpConnection | None:
        """A connection that is usable as far as one can see."""
        key = self._key(origin)
        while True:
            with self._lock:
                idle = self._idle.get(key)
                connection = idle.pop() if idle else None
            if connection is None:
                return None

            connection.is_idle = False
            is_young = time.monotonic() - connection.idle_since < POOL_IDLE_S
            is_open = connection.sock is not None
            if (
                is_young
                and is_open
                and (connection.watched or not connection.is_stale())
            ):
                return connection
            connection.close()

    def give(self, connection: HttpConnection) -> None:
        """Keep a connection for the next request."""
        now = connection.idle_since = time.monotonic()
        with self._lock:
            if self.closed:
                connection.close()
                return
            idle = self._idle.setdefault(
                self._key(connection.origin), collections.deque()
            )
            idle.append(connection)
            connection.is_idle = True
            old = []
            while now - idle[0].idle_since >= POOL_IDLE_S or len(idle) > POOL_SIZE:
                old.append(idle.popleft())
        for gone in old:
            gone.close()

    def close(self) -> None:
        """Keep nothing from now on, not even what is still under way."""
        self.closed = True
        self.clear()

    def clear(self) -> None:
        """Close all."""
        with self._lock:
            connections = [one for idle in self._idle.values() for one in idle]
            self._idle.clear()
        for connection in connections:
            connection.close()


class UpstreamResponse:
    """An answer whose body is still to be read.
    status, reason, headers (lower-case names).  `read` gives the next piece of the body,
    `read_all` the whole rest.  At the end `finish` puts the connection back into the pool; `close`
    gives it up.  Belongs to the one request."""

    def __init__(
        self,
        head: tuple[int, str, Headers],
        connection: HttpConnection,
        method: str,
        pool: Pool,
    ) -> None:
        self.status, self.reason, self.headers = head
        self.connection: HttpConnection | None = connection
        self._pool = pool
        chunked = "chunked" in self.headers.get("transfer-encoding", "").lower()
        if method == "HEAD" or self.status in (204, 304):
            self._body = BodyDecoder(0)
        else:
            self._body = BodyDecoder(answer_length(self.headers), chunked)
        wish = self.headers.get("connection", "").lower()
        self._keep = self._body.delimited and "close" not in wish

    @property
    def done(self) -> bool:
        return self._body.done

    async def read(self, timeout_s: float = ANSWER_TIMEOUT_S) -> bytes:
        """The next piece of the body, b"" where only framing came.  `timeout_s` is the longest
        silence.  Raises StreamCut, UpstreamError 504."""
        assert self.connection is not None
        try:
            data = await self.connection.receive(timeout_s)
        except OSError as error:
            raise StreamCut(
                f"the upstream broke the connection ({plain_reason(error)})",
                code="upstream_stream_ended",
            ) from None
        return self.take(data)

    def take(self, data: bytes) -> bytes:
        """The payload in these bytes from the connection; b"" means that it has ended.
        Raises StreamCut when the body ends too early or is malformed."""
        if not data:
            if self._body.delimited:
                raise StreamCut(
                    "the upstream closed the connection in the middle of its answer",
                    code="upstream_stream_ended",
                )
            self._body.done, self._keep = True, False
            return b""
        try:
            return self._body.feed(data)
        except BadRequest as error:
            raise StreamCut(f"the upstream's body is malformed: {error}") from None

    async def read_all(
        self, limit: int = MAX_ANSWER_BYTES, timeout_s: float = ANSWER_TIMEOUT_S
    ) -> bytes:
        """The whole rest of the body, at most `limit` bytes (more is an UpstreamError).
        `timeout_s` is the longest silence.  Raises StreamCut, UpstreamError 504."""
        parts: list[bytes] = []
        size = 0
        try:
            while not self.done:
                parts.append(await self.read(timeout_s))
                size += len(parts[-1])
                if size > limit:
                    raise UpstreamError(
                        f"the upstream's answer is larger than {limit} bytes"
                    )
        finally:
            self.finish()
        return b"".join(parts)

    def finish(self) -> None:
        """Give the connection back if it can be used again, else give it up."""
        connection = self.connection
        if connection is None:
            return
        is_clean = self.done and not self._body.rest and not connection.received
        if is_clean and self._keep:
            self.connection = None
            self._pool.give(connection)
        else:
            self.close()

    def close(self) -> None:
        """Give the connection up: the upstream stops working on the answer."""
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.close()


def proxy_login(proxy: str) -> Headers:
    """The header for user:password@ in a proxy's URL."""
    login = urllib.parse.unquote(urllib.parse.urlsplit(proxy).netloc.rpartition("@")[0])
    if login:
        return {
            "Proxy-Authorization": "Basic " + base64.b64encode(login.encode()).decode()
        }
    return {}


class _Proxies(urllib.request.ProxyHandler):
    """urllib's own, except that this machine itself is never asked for through a proxy."""

    def proxy_open(self, req: Any, proxy: str, type: str) -> Any:
        if is_loopback(host_of(req.full_url)):
            return None
        return super().proxy_open(req, proxy, type)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """A redirect is an answer like any other: a token must not follow it."""


class _PlainErrors(urllib.request.HTTPErrorProcessor):
    def http_response(self, request: Any, response: Any) -> Any:
        """Every status is an answer; what it means is decided by GitHub and Copilot."""
        return response

    https_response = http_response


_SecureHandler: Any = getattr(
    urllib.request, "HTTPSHandler", urllib.request.BaseHandler
)


class ConnectionHandler(urllib.request.HTTPHandler, _SecureHandler):  # type: ignore[misc]
    """Gives the opener a connection that is still to be opened, where the stock handlers would
    open one for each call and read its answer."""

    def __init__(self, names: HostNames, context: Callable[[], Any]) -> None:
        urllib.request.HTTPHandler.__init__(self)
        self._names, self._context = names, context

    def http_request(self, request: Any) -> Any:
        """There is nothing to add: each request writes its own headers."""
        return request

    https_request = http_request

    def http_open(self, req: Any) -> Any:
        """Directly, or through a proxy that forwards."""
        connection = HttpConnection(req.host, self._names)
        if req.has_proxy():
            connection.forward = req.full_url
            connection.proxy_login = req.get_header("Proxy-authorization", "")
        return connection

    def https_open(self, req: Any) -> Any:
        """Directly, or through a proxy that speaks CONNECT."""
        connection = HttpsConnection(req.host, self._names, self._context())
        connection.tunnel = getattr(req, "_tunnel_host", None) or ""
        if connection.tunnel:
            connection.tunnel += "" if ":" in connection.tunnel else ":443"
            connection.proxy_login = req.get_header("Proxy-authorization", "")
        return connection


#: where operating systems keep their CA bundle, for a Python that was built elsewhere
_CA_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
    "/usr/local/etc/openssl/cert.pem",
)
_CA_VARIABLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "NODE_EXTRA_CA_CERTS")


def ca_files(settings: Settings, environ: Mapping[str, str]) -> list[str]:
    """CA files of the user's, to be added to those of the system."""
    named = [settings.ca_file] + [environ.get(name, "") for name in _CA_VARIABLES]
    return [name for at, name in enumerate(named) if name and name not in named[:at]]


def check_ca_files(names: list[str]) -> None:
    """Tell at once about a file that is no use.  Raises ConfigError."""
    for name in names:
        try:
            with open(name, "rb") as file:
                usable = b"-----BEGIN" in file.read()
        except OSError as error:
            raise ConfigError(
                f"cannot read the CA file {name}: {error.strerror}"
            ) from None
        if not usable:
            raise ConfigError(f"the CA file {name} holds no certificate in PEM form")


def make_tls_context(settings: Settings, environ: Mapping[str, str]) -> Any:
    """The system's CAs plus the user's.  Raises ConfigError for a file that cannot be read."""
    try:
        import ssl  # late: 15 ms that a plain start can do without
    except ImportError:
        raise ConfigError(
            "this Python was built without its ssl module: GitHub cannot be reached "
            "(--demo works); use another Python, on Debian: apt install python3"
        ) from None

    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    paths = ssl.get_default_verify_paths()

    for name in (paths.openssl_cafile,) + _CA_BUNDLES:
        if os.path.isfile(name):  # SSL_CERT_FILE replaced it, we want both
            with contextlib.suppress(ssl.SSLError, OSError):
                context.load_verify_locations(cafile=name)
            break

    for name in ca_files(settings, environ):
        try:
            context.load_verify_locations(cafile=name)
        except (ssl.SSLError, OSError) as error:
            raise ConfigError(
                f"cannot use the CA file {name}: {plain_reason(error)}"
            ) from None

    if settings.tls_relaxed or settings.ca_file:
        context.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)
    return context


PAC_REMEDY = (
    "is a PAC script (%s), which is not supported: look into it for a line PROXY "
    "host:port and set HTTPS_PROXY=http://host:port"
)


class Upstream:
    """The one opener, and the pool of the connections that it made.  Thread-safe."""

    def __init__(self, settings: Settings, environ: Mapping[str, str]) -> None:
        self._settings, self._environ = settings, environ
        check_ca_files(ca_files(settings, environ))
        self._tls: Any = None
        self._lock = threading.Lock()  # guards the making of _tls
        self.pool = Pool()
        self.proxies = self._find_proxies()
        self.opener = urllib.request.build_opener(
            _Proxies(self.proxies),
            ConnectionHandler(HostNames(), self.tls_context),
            _NoRedirects,
            _PlainErrors,
        )
        self.opener.addheaders = []

    def _find_proxies(self) -> dict[str, str]:
        if self._settings.proxy_env is False:
            return {}
        proxies = {
            name: url if "://" in url else "http://" + url
            for name, url in urllib.request.getproxies().items()
            if name in ("http", "https", "all") and url
        }

        if self._settings.proxy_env and not proxies:
            raise ConfigError("--proxy-env: no HTTP_PROXY or HTTPS_PROXY is set")
        for name in ("http", "https"):
            if "all" in proxies:
                proxies.setdefault(name, proxies["all"])

        proxies.pop("all", None)
        for name, url in proxies.items():
            if url.lower().endswith((".pac", ".dat")) or "pac+" in url.lower():
                raise ConfigError(f"the proxy for {name} " + PAC_REMEDY % redact(url))
            try:
                usable = (
                    urllib.parse.urlsplit(url).port is not None or host_of(url) != ""
                )
            except ValueError:
                usable = False

            if not usable or not url.lower().startswith("http://"):
                raise ConfigError(
                    "the proxy %s for %s is not of the kind http://host:port"
                    % (redact(url), name)
                )

        return proxies

    def proxy_for(self, url: str) -> str:
        """The proxy that a URL is reached through, '' when there is none."""
        host = host_of(url)
        direct = is_loopback(host) or urllib.request.proxy_bypass(host)
        if direct:
            return ""
        return self.proxies.get(url.partition(":")[0], "")

    def tls_context(self) -> Any:
        """Made at the first https call: it takes longer than all the rest of the start."""
        with self._lock:
            if self._tls is None:
                self._tls = make_tls_context(self._settings, self._environ)
            return self._tls

    async def connect(self, origin: str) -> HttpConnection:
        """A new connection.  Raises UpstreamError (502, 504)."""
        if self._tls is None and origin.startswith("https:"):
            await wait(InThread(self.tls_context))
        connection = self.connection_to(origin)
        await connection.open()
        return connection

    def connection_to(self, origin: str) -> HttpConnection:
        """A connection that is still to be opened; the opener knows the way."""
        try:
            connection = self.opener.open(urllib.request.Request(origin))
        except urllib.error.URLError as error:
            name = host_of(origin)
            raise UpstreamError(f"cannot reach {name}: {plain_reason(error)}") from None
        connection.origin = origin
        return connection  # type: ignore[no-any-return]

    async def send(self, request: UpstreamRequest) -> UpstreamResponse:
        """One try.  Raises StaleConnection when a kept connection proved closed, UpstreamError
        (502, 504); any status is an answer."""
        if request.is_fresh:
            connection = None
        else:
            connection = self.pool.take(request.origin)
        if connection is None:
            connection = await self.connect(request.origin)
        return await connection.exchange(request, self.pool)

    async def send_again(self, request: UpstreamRequest) -> UpstreamResponse:
        """The same for calls to GitHub: once more where a kept connection proved closed."""
        try:
            return await self.send(request)
        except StaleConnection:
            request.is_fresh = True
            return await self.send(request)

    async def fetch_json(
        self, request: UpstreamRequest
    ) -> tuple[int, Any, Headers, bytes]:
        """(status, JSON value or None, headers, raw body) of a small answer."""
        answer = await self.send_again(request)
        body = await answer.read_all(limit=MAX_BODY_BYTES, timeout_s=request.timeout_s)

        try:
            value = loads(body)
        except ValueError:
            value = None

        if (
            value is None
            and answer.status < 400
            and (body.lstrip()[:1] == b"<" or answer.status >= 300)
        ):
            raise UpstreamError(
                "%s answers with a web page (%d): a captive portal or a filter; "
                "open a web page and sign in there, or set HTTPS_PROXY"
                % (host_of(request.url), answer.status)
            )

        return answer.status, value, answer.headers, body


#: networks that are nobody's on the internet, by IANA's registries of special-purpose addresses;
#: Pythons differ in which of them they call global.  Clouds tell secrets at addresses in them.
_SPECIAL_NETWORKS = (
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.0.2.0/24",
    "192.31.196.0/24",
    "192.52.193.0/24",
    "192.88.99.0/24",
    "192.168.0.0/16",
    "192.175.48.0/24",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "224.0.0.0/3",
    "168.63.129.16/32",  # Azure's host, from inside each machine
    "2001::/23",
    "2001:db8::/32",
    "2002::/16",
    "2620:4f:8000::/48",
    "3fff::/20",
)
_UNICAST_NETWORK = (
    "2000::/3"  # of IPv6: all that is given out; fc00::/7, fe80::/10 are not
)
#: IPv6 networks whose addresses end with an IPv4 address that is meant
_MAPPED_NETWORKS = ("::ffff:0:0/96", "::ffff:0:0:0/96", "64:ff9b::/96")
_ISATAP_MARKS = (0x00005EFE, 0x02005EFE)  # before such an end in any other IPv6 network


def is_public(address: str) -> bool:
    """May an image be fetched from here?  Nothing of this machine, its networks, or the cloud's."""
    import ipaddress

    found: Any = ipaddress.ip_address(address.partition("%")[0])
    if found.version == 6:
        if any(found in ipaddress.ip_network(network) for network in _MAPPED_NETWORKS):
            found = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        elif (
            found not in ipaddress.ip_network(_UNICAST_NETWORK)
            or int(found) >> 32 & 0xFFFFFFFF in _ISATAP_MARKS
        ):
            return False

    networks = map(ipaddress.ip_network, _SPECIAL_NETWORKS)
    return bool(found.is_global) and not any(found in network for network in networks)


_IMAGE_STARTS = (
    (b"\x89PNG", "png"),
    (b"\xff\xd8\xff", "jpeg"),
    (b"GIF8", "gif"),
    (b"RIFF", "webp"),
)


class ImageFetcher:
    """`--fetch-images`: images that clients name by URL.  A name is resolved once, all that it
    stands for must be public, and the connection goes there: another answer of the name server
    changes nothing.  No credentials, no proxy, no redirects.  The last ones are kept, since each
    turn of a conversation names them again.  Only the loop's thread may use it."""

    def __init__(self, tls_context: Callable[[], Any]) -> None:
        self.resolve: Callable[..., Any] = socket.getaddrinfo
        self.is_allowed: Callable[[str], bool] = is_public
        self.timeout_s = IMAGE_TIMEOUT_S
        self._tls_context = tls_context
        self._kept: collections.OrderedDict[
            str, tuple[str, str]
        ]  # the last used one last
        self._kept = collections.OrderedDict()
        self._kept_bytes = 0

    async def fetch(self, url: str) -> tuple[str, str]:
        """(media type, base64).  Raises BadRequest."""
        if url in self._kept:
            self._kept.move_to_end(url)
            return self._kept[url]
        try:
            data = await within(self.timeout_s, self._download(url))
            kind = next(
                (kind for start, kind in _IMAGE_STARTS if data.startswith(start)), ""
            )
            if not kind:
                raise ValueError("it is no PNG, JPEG, GIF or WebP image")
        except (OSError, ValueError, UpstreamError) as error:
            raise BadRequest(
                "the image at %s cannot be fetched: %s"
                % (printable(host_of(url)), plain_reason(error)),
                param="image_url",
            ) from None

        found = "image/" + kind, base64.b64encode(data).decode()
        self._keep(url, found)
        return found

    def _keep(self, url: str, image: tuple[str, str]) -> None:
        if url in self._kept:  # fetched twice at a time
            return
        self._kept[url] = image
        self._kept_bytes += len(url) + len(image[1])
        while self._kept_bytes > IMAGE_CACHE_BYTES:
            old_url, old = self._kept.popitem(last=False)
            self._kept_bytes -= len(old_url) + len(old[1])

    async def _download(self, url: str) -> bytes:
        connection = self._connection_to(urllib.parse.urlsplit(url))
        connection.origin = url
        await connection.open()
        headers = {
            "Accept": "image/*",
            "Accept-Encoding": "identity",
            "User-Agent": "copilot-proxy",
        }

        answer = await connection.exchange(
            UpstreamRequest("GET", url, headers), Pool(closed=True)
        )

        try:
            if answer.status != 200:
                raise ValueError(f"status {answer.status}; redirects are not followed")
            return await answer.read_all(IMAGE_BYTES)
        except StreamCut:
            raise ValueError("it is cut") from None
        finally:
            answer.close()

    def _connection_to(self, url: urllib.parse.SplitResult) -> HttpConnection:
        if (
            url.scheme not in ("http", "https")
            or not url.hostname
            or url.username is not None
        ):
            raise ValueError("only http and https URLs without a password are")
        if url.scheme == "https":
            return HttpsConnection(url.netloc, self, self._tls_context())
        return HttpConnection(url.netloc, self)

    async def find(self, host: str, port: int) -> list[tuple[int, Any]]:
        """In the place of HostNames.  Raises ValueError where not all addresses are public."""
        look_up = functools.partial(self.resolve, host, port, 0, socket.SOCK_STREAM)
        found = [(entry[0], entry[4]) for entry in await wait(InThread(look_up))]
        if not found or not all(
            self.is_allowed(str(address[0])) for _, address in found
        ):
            raise ValueError("its address is not public")
        return found


# ==== 14. GitHub ==================================================================================
# Login by device flow, exchange of the GitHub token for a Copilot token, the usage answer.


@dataclass(frozen=True)
class DeviceCode:
    """GitHub's answer to a login request; times in seconds."""

    device_code: str
    user_code: str
    verification_uri: str
    expires_in: float
    interval: float


@dataclass(frozen=True)
class CopilotToken:
    """The short-lived bearer and the API host it is bound to: always replaced together.
    Its age is the larger of two elapsed times, because the monotonic clock stands still while a
    laptop sleeps and the wall clock may be set; the server's `expires_at` is never compared with
    the local clock, which may be wrong by hours."""

    value: str = field(repr=False)
    api_url: str
    refresh_s: float  # from receipt until it is due
    lifetime_s: float  # from receipt until it is dead
    obtained: tuple[float, float]  # (monotonic, wall) at receipt
    direct: bool = False  # the GitHub token itself, without an exchange
    details: Json = field(default_factory=dict, repr=False)

    @property
    def is_machine(self) -> bool:
        """Is it a GitHub token that was made for programs?"""
        return self.value.startswith(MACHINE_PREFIXES)

    def age_s(self, now: tuple[float, float]) -> float:
        return max(now[0] - self.obtained[0], now[1] - self.obtained[1])


def read_clock() -> tuple[float, float]:
    """(monotonic, wall) in seconds."""
    return time.monotonic(), time.time()


def check_github_token(token: str) -> str:
    """The token without white space.  Raises AuthError, before any call, for what never works."""
    token = token.strip()
    if token.startswith(REFUSED_PREFIX):
        raise AuthError(
            "this is a classic personal access token, which Copilot does not accept: "
            "log in with: copilot_proxy.py auth, or make a fine-grained one with the "
            'permission "Copilot Requests"'
        )
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise AuthError("this is no GitHub token: log in with: copilot_proxy.py auth")
    return token


def machine_hint(token: str) -> str:
    """What a token of a machine needs, for the text of a refusal."""
    if token.startswith("ghs_"):
        return (
            "a workflow's job needs `permissions: copilot-requests: write`, an app the "
            "repository permission Copilot Requests, and the organisation must allow both"
        )
    return (
        'the token needs the account permission "Copilot Requests", which only tokens of a '
        "person can have, not those that belong to an organisation"
    )


def explain_refusal(token: CopilotToken, error: UpstreamError) -> UpstreamError:
    """The API's refusal of a token of a machine, with what that token needs."""
    is_refused = error.status in (401, 403) or "access token" in str(error).lower()
    if not token.is_machine or not is_refused or is_limit(error):
        return error
    told = UpstreamError(
        "Copilot refuses this token (%s): %s" % (error, machine_hint(token.value)),
        error.status,
        error.code,
        error.param,
        error.headers,
    )
    told.answered = error.answered
    return told


def override(headers: Headers, own: Mapping[str, str]) -> Headers:
    """With the user's own in their place, whatever their case."""
    lower = {name.lower() for name in own}
    if own:
        kept = {k: v for k, v in headers.items() if k.lower() not in lower}
    else:
        kept = headers
    return dict(kept, **own)


class GitHub:
    """The calls to github.com and its REST API.  Thread-safe, at most 30 s each."""

    def __init__(
        self,
        settings: Settings,
        upstream: Upstream,
        clock: Callable[[], tuple[float, float]] = read_clock,
    ) -> None:
        self._settings, self._upstream, self._clock = settings, upstream, clock

    def _headers(self, token: str = "") -> Headers:
        is_machine = token.startswith(MACHINE_PREFIXES)
        if is_machine:
            identity = CLI_HEADERS
        else:
            identity = EDITOR_HEADERS
        headers = dict(identity, Accept="application/json")
        if token:
            scheme = "Bearer " if is_machine else "token "
            headers["X-GitHub-Api-Version"] = INTERNAL_API_VERSION
            headers["Authorization"] = scheme + token
        own = {
            k: v
            for k, v in self._settings.headers.items()
            if k.lower() in map(str.lower, identity)
        }
        return override(headers, own)

    async def _post(self, path: str, values: Json) -> tuple[int, Json]:
        headers = dict(self._headers(), **{"Content-Type": "application/json"})
        status, answer, _, _ = await self._upstream.fetch_json(
            UpstreamRequest(
                "POST",
                self._settings.github_url + path,
                headers,
                dumps(values),
                timeout_s=GITHUB_TIMEOUT_S,
            )
        )
        return status, as_object(answer)

    async def _get(self, path: str, token: str) -> tuple[int, Json, Headers, bytes]:
        status, answer, headers, body = await self._upstream.fetch_json(
            UpstreamRequest(
                "GET",
                self._settings.rest_url + path,
                self._headers(token),
                timeout_s=GITHUB_TIMEOUT_S,
            )
        )
        return status, as_object(answer), headers, body

    async def request_code(self) -> DeviceCode:
        """Begin a login.  Raises UpstreamError, AuthError."""
        status, answer = await self._post(
            "/login/device/code",
            {"client_id": self._settings.client_id, "scope": SCOPE},
        )

        if not answer.get("device_code") or not answer.get("user_code"):
            text = (
                answer.get("error_description")
                or answer.get("error")
                or f"status {status}"
            )
            raise UpstreamError(
                "%s gave no login code: %s"
                % (host_of(self._settings.github_url), printable(str(text)))
            )

        uri = str(
            answer.get("verification_uri")
            or self._settings.github_url + "/login/device"
        )
        return DeviceCode(
            str(answer["device_code"]),
            str(answer["user_code"]),
            uri,
            number_or(answer.get("expires_in"), CODE_LIFE_S, 1, MAX_CODE_LIFE_S),
            number_or(answer.get("interval"), POLL_S, 0, MAX_POLL_S),
        )

    async def poll(self, code: DeviceCode) -> Json:
        """GitHub's words on a running login; {} for a passing fault."""
        try:
            status, answer = await self._post(
                "/login/oauth/access_token",
                {
                    "client_id": self._settings.client_id,
                    "device_code": code.device_code,
                    "grant_type": DEVICE_GRANT,
                },
            )
        except UpstreamError:
            return {}
        if status == 200:
            return answer
        return {}

    async def fetch_login(self, token: str) -> str:
        """The account's name, '' when it cannot be had (it is needed for nothing)."""
        try:
            status, answer, _, _ = await self._get("/user", token)
        except UpstreamError:
            return ""
        if status == 200:
            return str(answer.get("login") or "")
        return ""

    async def fetch_usage(self, token: str) -> Json:
        """The whole answer of /copilot_internal/user.  Raises AuthError, UpstreamError."""
        status, answer, headers, body = await self._get("/copilot_internal/user", token)
        if status != 200:
            raise self._refusal(status, headers, body, token)
        return answer

    async def fetch_copilot_token(self, token: str) -> CopilotToken:
        """Exchange the GitHub token.  Where the exchange is not offered but the account has
        Copilot, the GitHub token itself is the bearer (direct mode); so are tokens of machines."""
        if token.startswith(MACHINE_PREFIXES):
            return await self._use_machine_token(token)
        status, answer, headers, body = await self._get(
            "/copilot_internal/v2/token", token
        )
        if status == 200 and answer.get("token"):
            return self._read_token(answer, headers)
        limited = status in (403, 429) and b"rate limit" in body.lower()
        if status in (400, 403, 404) and b"notification_id" not in body and not limited:
            direct = await self._try_direct(token)
            if direct:
                return direct
        raise self._refusal(status, headers, body, token)

    def _read_token(self, answer: Json, headers: Headers) -> CopilotToken:
        value = str(answer["token"])
        parts = dict(
            p.partition("=")[::2] for p in value.split(":")[0].split(";") if "=" in p
        )
        named = as_object(answer.get("endpoints")).get("api")
        proxy = parts.get("proxy-ep", "")
        if proxy.startswith("proxy."):
            fallback = "https://api." + proxy[6:]
        else:
            fallback = ""
        refresh = number_or_none(answer.get("refresh_in")) or TOKEN_FALLBACK_S
        due = min(max(refresh - TOKEN_MARGIN_S, 60.0), 86400.0)
        lifetime = due + 2 * TOKEN_MARGIN_S
        expires = moment_or_none(answer.get("expires_at"))
        sent = http_moment_or_none(headers.get("date", ""))  # by the server's own clock
        if expires is not None and sent is not None and 0 < expires - sent < 86400:
            lifetime = max(expires - sent, due)

        return CopilotToken(
            value,
            self._api_url(named, fallback),
            due,
            lifetime,
            self._clock(),
            details={k: v for k, v in answer.items() if k != "token"},
        )

    def _api_url(self, *candidates: Any) -> str:
        if self._settings.copilot_url:
            return self._settings.copilot_url
        accepted = [self._settings.accept_copilot_url(url) for url in candidates]
        return next((url for url in accepted if url), self._settings.usual_copilot_url)

    async def _use_machine_token(self, token: str) -> CopilotToken:
        """There is no exchange for it.  An app's token may not ask for the account's API host:
        the usual one serves it.  Raises AuthError, UpstreamError."""
        status, answer, headers, body = await self._get("/copilot_internal/user", token)
        if status == 401 or status >= 500:
            raise self._refusal(status, headers, body, token)
        if status == 200:
            named = as_object(answer.get("endpoints")).get("api")
        else:
            named = None
        return CopilotToken(
            token, self._api_url(named), 86400.0, 1e9, self._clock(), True, answer
        )

    async def _try_direct(self, token: str) -> CopilotToken | None:
        status, answer, _, _ = await self._get("/copilot_internal/user", token)
        named = as_object(answer.get("endpoints")).get("api")
        if status != 200 or not named:
            return None
        return CopilotToken(
            token, self._api_url(named), 86400.0, 1e9, self._clock(), True, answer
        )

    def _refusal(
        self, status: int, headers: Headers, body: bytes, token: str
    ) -> ProxyError:
        """What a refused call to GitHub means for the user."""
        is_machine = token.startswith(MACHINE_PREFIXES)
        text, code, _ = unwrap_error(status, body, "")
        host = host_of(self._settings.rest_url)

        if status == 401 and is_machine:
            return AuthError(
                "GitHub does not know this token (%s): a fine-grained one has "
                "expired or was revoked, a workflow's ends with its job" % text
            )
        if status == 401:
            return AuthError(
                "GitHub refuses this login (%s): log in again with: copilot_proxy.py "
                "auth; for a GHE.com tenant set --github-url" % text
            )

        if "rate limit" in text.lower():
            if "retry-after" in headers:
                kept = {"retry-after": headers["retry-after"]}
            else:
                kept = {}
            return RateLimited(f"GitHub limits calls to {host}: {text}", headers=kept)

        if is_machine and status in (403, 404):
            return AuthError(
                "%s tells a token of a machine nothing about the account (%s)"
                % (host, text),
                403,
            )

        if status == 404:
            return AuthError(
                "%s offers no Copilot to this login (404): log in with: "
                "copilot_proxy.py auth" % host,
                403,
            )

        if status in (400, 402, 403):
            return AuthError(f"no access to Copilot: {text}", 403, code)
        return UpstreamError(f"{host} answered {status}: {text}")


class DeviceLogin:
    """One login by device flow.  `run` blocks until it is granted, refused or stopped.
    `code` is what the user must type, None while there is none; `problem` says why it ended,
    `token` that it was granted.  renews: a code that expires is followed by another."""

    def __init__(
        self,
        github: GitHub,
        margin_s: float,
        stop: threading.Event,
        announce: Callable[[DeviceCode], None],
        renews: bool = True,
    ) -> None:
        self._github, self._margin_s, self.stop = github, margin_s, stop
        self._announce, self.renews = announce, renews
        self.code: DeviceCode | None = None
        self.problem = self.token = ""
        self.ready = threading.Event()  # there is a code, or a problem

    def run(self) -> str:
        """The GitHub token.  Raises AuthError (denied, refused, expired), UpstreamError (no code
        to be had); returns '' when stopped."""
        while not self.stop.is_set():
            earliest = time.monotonic() + CODE_PAUSE_S
            self.code = run(self._github.request_code())
            self.ready.set()
            self._announce(self.code)
            token = self._poll(self.code)
            if token is not None:
                return token
            if not self.renews:
                raise AuthError("the code has expired: start the login again")
            self.stop.wait(max(earliest - time.monotonic(), 0))
        return ""

    def start(self, keep: Callable[[str], Any], log: logging.Logger) -> None:
        """`run` in a thread of its own; `keep` gets the token before it counts as granted."""
        threading.Thread(
            target=self._run_and_keep,
            args=(keep, log),
            name="device-login",
            daemon=True,
        ).start()

    def _run_and_keep(self, keep: Callable[[str], Any], log: logging.Logger) -> None:
        try:
            token = self.run()
            if token:
                keep(token)
                self.token = token
        except ProxyError as error:
            self.code, self.problem = None, str(error)
            log.error("%s", error)
        finally:
            self.ready.set()

    def _poll(self, code: DeviceCode) -> str | None:
        """The token, '' when stopped, None when the code has expired."""
        deadline = time.monotonic() + code.expires_in
        interval = code.interval

        while time.monotonic() < deadline:
            left = deadline - time.monotonic()
            if self.stop.wait(
                min(interval + self._margin_s, left)
            ):  # first sleep, then ask
                return ""

            answer = run(self._github.poll(code))
            problem = answer.get("error")
            if answer.get("access_token"):
                return str(answer["access_token"])
            if problem == "slow_down":
                wish = number_or(answer.get("interval"), 0, 0, MAX_POLL_S)
                interval = min(max(interval + 5, wish), MAX_POLL_S)
            elif problem == "expired_token":
                return None
            elif problem == "access_denied":
                raise AuthError(
                    "the login was cancelled on GitHub's page: start it again"
                )
            elif problem not in (None, "authorization_pending"):
                text = answer.get("error_description") or problem
                raise AuthError(f"GitHub refuses the login: {printable(str(text))}")

        return None


# ==== 15. Copilot =================================================================================
# One account: its token, its catalogue, and one call to the API with everything that may be
# replayed before the first byte has gone to the client.


class Catalogue:
    """The models as fetched at one time (monotonic), and what was found among them before."""

    def __init__(self, fetched_at: float, models: list[Model]) -> None:
        self.fetched_at, self.models = fetched_at, models
        self._found = {model.id: model for model in models}

    def find(self, asked: str, aliases: Mapping[str, str]) -> Model | None:
        """The model that `asked` means, None when there is none."""
        if asked in self._found and asked not in aliases:
            return self._found[asked]
        model = resolve_model(asked, self.models, aliases)
        if (
            model is not None
            and asked not in aliases
            and len(self._found) < MAX_SPELLINGS
        ):
            self._found[asked] = model
        return model


# ---- Limits ----


def whole_s(pause_s: float) -> int:
    """For a Retry-After: whole seconds, one at least.  9.0000001 -> 9, 9.2 -> 10"""
    return max(int(-(-round(pause_s, 3) // 1)), 1)


@dataclass
class Cooldown:
    """The rest of one scope.  RateLimits alone changes it, under its lock, by the methods here;
    times are seconds of its clock.

    error: what the upstream said last; since: time of the first refusal in this row; ends: by what
    the upstream named; next_try: before it nothing goes up; pause_s: from a probe to the next;
    number: of the newest request when the upstream refused last; repeats: refusals in a row;
    probes: of them, answers to probes in this rest; lanes: that the refusal called used up;
    refuted: the most room that was shown when the upstream refused yet, by headers and by /usage;
    prober: number of the request that is the probe now, 0 for none; deaths: probes in a row that
    ended without a verdict; is_tried: a request has gone up since the end."""

    error: UpstreamError
    since: float
    ends: float
    next_try: float
    pause_s: float
    number: int
    repeats: int
    probes: int
    lanes: set[str]
    refuted: list[float]
    prober: int = 0
    deaths: int = 0
    is_tried: bool = False

    def begin(self, number: int, now: float) -> None:
        """A request goes up: as the probe, or as the first one after the end.  The next one may
        follow it after a pause, should nothing be heard of it."""
        if now < self.ends:
            self.next_try = min(now + self.pause_s, self.ends)
            self.prober = number
        elif not self.is_tried:
            self.next_try = now + TRIAL_S
            self.prober = number
            self.is_tried = True

    def free(self, number: int, now: float) -> None:
        """That request ended without a verdict: another one may go up, but not for ever."""
        if self.prober == number:
            self.prober, self.is_tried = 0, False
            self.deaths += 1
            if self.deaths <= MAX_DEAD_PROBES:
                self.next_try = now

    def see(self, rooms: Mapping[str, float], is_usage: bool, now: float) -> bool:
        """End the rest when what was used up has room again: `rooms` is lane -> percent left.
        No more room than was shown before and refused yet does not count, each kind of source for
        itself: GitHub's usage answer and the headers do not always tell the same."""
        mine = {lane: room for lane, room in rooms.items() if lane in self.lanes}
        if not self.lanes and is_quota(self.error):  # which one nobody said
            mine = {
                lane: room for lane, room in rooms.items() if lane not in USAGE_LANES
            }
        room = min(mine.values(), default=0.0)
        if now >= self.ends or self.lanes - set(mine) or room <= self.refuted[is_usage]:
            return False

        self.refuted[is_usage] = room
        self.ends = self.next_try = now
        self.is_tried = False
        return True


class RateLimits:
    """What rests because the upstream refused: a model, or under the name ACCOUNT all of them.

    state     begins when                          a request of this scope
    open      nothing was refused yet, a request   goes up
              succeeded, or `clear` was called
    resting   the upstream refused (429, quota)    is refused here until the next probe
    probing   a probe goes up: after a minute,     is refused here; the next probe may go up after
              then at growing pauses               5 minutes at most, 15 in a rest beyond a day
    over      the named end has passed by one of   goes up, but the first one alone for TRIAL_S
              both clocks, or /usage or a header
              shows room for what was used up

    From resting, probing and over: a success opens the scope, a refusal makes it rest anew, and
    anything else (the client left, a network error, another error) frees the place of the probe.
    A 429 that names no end rests 10 s and twice as long each time, up to 5 minutes, and is not
    probed in between.  Nobody goes up before the end of a rest as short as the first pause.

    Every request has a number from `admit`, in their order.  It tells a refusal of requests that
    went up together from one that repeats, and keeps a success of before from ending a rest.

    Nothing here waits or calls anybody but the clock; `_lock` guards all."""

    ACCOUNT = "account"

    def __init__(self, clock: Callable[[], tuple[float, float]]) -> None:
        self._clock, self._seen = clock, clock()
        self._time = 0.0  # of the clock here
        self._lock = threading.Lock()
        self._count = 0
        self._scopes: dict[str, Cooldown] = {}  # what was refused last stands last

    def admit(self, model: str, may_probe: bool = True) -> int:
        """The number of a request that may go up; `finish` must follow, after `refuse` or not.
        Raises UpstreamError in the upstream's words when it may not.  model: "" for what no limit
        of a model holds for; may_probe: False for a look, which nothing follows."""
        with self._lock:
            self._count += 1
            if not self._scopes:  # nearly always
                return self._count
            resting = self._resting(model)
            now = self._now()
            for scope, rest in resting:
                if now < rest.next_try or now < rest.ends and not may_probe:
                    raise self._refusal(scope, rest, rest.next_try - now)
            for _, rest in resting:
                if may_probe:
                    rest.begin(self._count, now)
            return self._count

    def refuse(self, model: str, number: int, error: UpstreamError) -> UpstreamError:
        """The upstream refused a request for a limit -> its error, which says how long it lasts.
        number: 0 where it is not known."""
        scope = model
        if ACCOUNT_LIMITS.search(f"{error.code} {error}"):
            scope = self.ACCOUNT

        with self._lock:
            old = self._scopes.pop(scope, None)
            rest = self._new_rest(error, number, old)
            if old and number <= old.number and rest.ends <= old.ends:
                rest = old  # one of a burst: it says no more
            if len(self._scopes) >= MAX_SCOPES:
                del self._scopes[next(iter(self._scopes))]
            self._scopes[scope] = rest
            return self._refusal(scope, rest, rest.ends - self._now(), error.headers)

    def finish(self, model: str, number: int, is_taken: bool) -> list[str]:
        """A request is through -> the scopes that it opens, if the upstream took it.  Else, unless
        it was refused before, the place of the probe is free again."""
        opened: list[str] = []
        if not self._scopes:
            return opened
        with self._lock:
            for scope, rest in self._resting(model):
                rest.free(number, self._now())
                if is_taken and number > rest.number:
                    opened.append(scope)
                    del self._scopes[scope]
        return opened

    def see(self, lanes: Mapping[str, Any], source: str) -> list[str]:
        """What an account's lanes have left was told, by "usage" or an answer -> the scopes whose
        rest it ends."""
        if not self._scopes:
            return []
        rooms = lane_rooms(lanes)
        with self._lock:
            return [
                scope
                for scope, rest in self._scopes.items()
                if rest.see(rooms, source == "usage", self._now())
            ]

    def clear(self, scope: str = "") -> list[str]:
        """Open one scope, or all -> those that rested."""
        with self._lock:
            now, found = (
                self._now(),
                [name for name in self._scopes if scope in ("", name)],
            )
            return [name for name in found if self._scopes.pop(name).ends > now]

    def report(self) -> list[Json]:
        """What rests now, for people; times are unix seconds."""
        with self._lock:
            now = self._now()
            wall = self._seen[1] - now
            return [
                {
                    "scope": scope,
                    "status": rest.error.status,
                    "code": rest.error.code,
                    "since": wall + rest.since,
                    "until": wall + rest.ends,
                    "next_probe": wall + max(rest.next_try, now),
                }
                for scope, rest in self._scopes.items()
                if rest.ends > now
            ]

    def _now(self) -> float:
        """Seconds of a clock that goes on with the faster one of both: the monotonic one stands
        still while a laptop sleeps, the wall clock can be set back."""
        now, seen = self._clock(), self._seen
        self._time += max(now[0] - seen[0], now[1] - seen[1], 0.0)
        self._seen = now
        return self._time

    def _resting(self, model: str) -> list[tuple[str, Cooldown]]:
        """The rests that hold for a model."""
        scopes = (self.ACCOUNT, model) if model else ()
        return [
            (scope, self._scopes[scope]) for scope in scopes if scope in self._scopes
        ]

    def _new_rest(
        self, error: UpstreamError, number: int, old: Cooldown | None
    ) -> Cooldown:
        """What follows a refusal; old: the rest of the same scope before it."""
        since = now = self._now()
        repeats, probes, refuted = 0, 0, [0.0, 0.0]
        if old:
            since, refuted = old.since, old.refuted
            repeats = old.repeats + (number > old.number)
            if now < old.ends:
                probes = old.probes + (number > old.number)

        wall = self._seen[1]
        rest_s = limit_s(error, wall, repeats)
        if rest_s > LONG_REST_S:
            most_s = LONG_PROBE_MAX_S
        else:
            most_s = PROBE_MAX_S
        pause_s = doubled_s(PROBE_S, probes, most_s)
        first_s = min(rest_s, pause_s)
        if not is_quota(error) and named_limit_s(error, wall) is None:
            first_s = rest_s  # our own guess is the pause already

        rooms = lane_rooms(header_lanes(error.headers))
        refuted[0] = max(refuted[0], min(rooms.values(), default=0.0))
        return Cooldown(
            error,
            since,
            now + rest_s,
            now + first_s,
            pause_s,
            self._count,
            repeats,
            probes,
            set(exhausted_lanes(error)),
            refuted,
        )

    def _refusal(
        self, scope: str, rest: Cooldown, pause_s: float, headers: Headers | None = None
    ) -> UpstreamError:
        """What a request is told; pause_s: for its Retry-After."""
        error, now = rest.error, self._now()
        if scope == self.ACCOUNT:
            what = "the account"
        else:
            what = "model " + scope
        until = time.strftime(
            "%Y-%m-%d %H:%M:%S", time.localtime(self._seen[1] + rest.ends - now)
        )

        plan = "nothing is sent before"
        if rest.next_try < rest.ends:
            plan = "the next request goes up as a probe in %d s" % whole_s(
                rest.next_try - now
            )
        if rest.ends <= now:
            plan = "it is over, and one request is trying it now"

        text = (
            "%s (a limit of %s until %s local time: %s; to end it at once: POST /limits/clear, "
            "or the button on this server's page)" % (error, what, until, plan)
        )
        told = dict(headers or {}, **{"retry-after": "%d" % whole_s(pause_s)})
        if "retry-after-ms" in told:  # SDKs believe it more than the other
            told["retry-after-ms"] = "%d" % max(pause_s * 1000, 1)
        return UpstreamError(text, error.status, error.code, error.param, told)


@dataclass
class Call:
    """One call to the Copilot API, and again after a repair.  model: whose limits hold for it,
    "" for none; opening: reads what an answer begins with, raises the failure that it tells."""

    path: str
    body: bytes | None = None
    headers: Headers = field(default_factory=dict)  # beside the usual ones
    request_id: str = ""
    timeout_s: float = ANSWER_TIMEOUT_S
    model: str = ""
    opening: Callable[[UpstreamResponse], Work] | None = None

    @property
    def method(self) -> str:
        """POST where there is a body."""
        if self.body is None:
            return "GET"
        return "POST"


def new_request_id() -> str:
    """A random UUID as text (uuid4 without the import)."""
    text = secrets.token_hex(16)
    return f"{text[:8]}-{text[8:12]}-4{text[13:16]}-a{text[17:20]}-{text[20:]}"


@functools.lru_cache(maxsize=HEADS_KEPT)
def is_passed(name: str) -> bool:
    """May clients see this header of the upstream?"""
    return name in PASSED_HEADERS or name.startswith(PASSED_PREFIXES)


def passed_headers(headers: Headers) -> Headers:
    """The upstream's headers that clients may see."""
    return {name: headers[name] for name in filter(is_passed, headers)}


_TOKEN_CODES = ("expired_token", "invalid_token", "token_expired")

AUTO_PATH, PAIR_PATH = AUTO_PATHS = ("/auto", "/models/session")


def is_auto_refusal(error: ProxyError) -> bool:
    """Is the choice of `auto` not good any more?  It comes as a 401, but the login is good."""
    return error.status == 401 and "invalid auto-mode selector" in str(error).lower()


#: row of the retry ladder -> how often it may be taken for one request of a client
ATTEMPTS = {
    "stale": 1,
    "login": 1,
    "version": 1,
    "hiccup": 1,
    "auto": 1,
    "fallback": 1,
    "repair": MAX_REPAIRS,
}
CURES, MAX_CURES = ("login", "version", "hiccup"), 2  # of these together


async def read_error(answer: UpstreamResponse) -> UpstreamError:
    """The upstream's refusal as an error."""
    try:
        body = await answer.read_all(MAX_ANSWER_BYTES, GITHUB_TIMEOUT_S)
    except StreamCut:
        body = b""

    if answer.status >= 400:
        status = answer.status
    else:
        status = 502
    text, code, param, names = read_error_text(
        body, status_phrase(status, answer.reason)
    )
    if answer.status < 400:
        text = f"the upstream wants to redirect elsewhere ({answer.status}), which is not followed"

    error = UpstreamError(
        text, true_status(status, names), code, param, passed_headers(answer.headers)
    )
    error.answered = answer.status >= 400
    error.opaque = text == "Forbidden" and "x-github-request-id" in answer.headers
    return error


class Attempts:
    r"""The retry ladder: all that is ever tried again for one request of a client.

        row        what came back                          what is changed             at most
        stale      nothing: a kept connection had ended    a fresh connection          1
        login      401, 421, token codes, a bare 403       a new token exchange        1 \
        version    466                                     the next API version        1  } 2
        hiccup     500 502 503 504 529, also told inside   a pause, fresh connection   1 /
                   a 200; it never left; a stream that
                   broke before it showed anything
        auto       401 "Invalid auto-mode selector"        another choice of `auto`    1
        fallback   402, a quota code                       the model of --fallback     1
        repair     a text that REPAIRS knows               the body; learned for ever  3
        all of them together                                                           5 calls

    `send` takes the first four rows, the Job the last three, and all of them ask `may`: no row is
    taken when a byte of the answer has gone to the client.  A 401 of GitHub itself is no row:
    the caller must log in again."""

    def __init__(
        self, copilot: Copilot, has_started: Callable[[], bool] = bool
    ) -> None:
        self._copilot, self._has_started = copilot, has_started
        self._calls = 0
        self._taken: collections.Counter[str] = collections.Counter()
        self._is_fresh = False  # no kept connection is trusted any more

    def may(self, row: str) -> bool:
        """May this row be taken now?  The one place that asks whether the client has something."""
        is_left = self._calls < MAX_CALLS and self._taken[row] < ATTEMPTS[row]
        if row in CURES and sum(self._taken[one] for one in CURES) >= MAX_CURES:
            is_left = False
        return is_left and not self._has_started()

    def take(self, row: str) -> None:
        """Count it."""
        self._taken[row] += 1

    async def send(self, call: Call) -> UpstreamResponse:
        """An answer below 300.  Raises UpstreamError with the upstream's own status and words,
        AuthError, ClientGone.  While a limit of the model or the account lasts nothing is sent but
        probes, see RateLimits."""
        log, limits = self._copilot.log, self._copilot.limits
        number, is_taken = limits.admit(call.model), False

        try:
            answer = await self._send_cured(call)
            is_taken = True
            return answer
        except UpstreamError as error:
            if not (error.answered and call.model and is_limit(error)):
                raise
            forget_frames(error)  # it is kept as long as the limit
            told = limits.refuse(call.model, number, error)
            log.warning("%s", told)
            raise told from None
        finally:
            for scope in limits.finish(call.model, number, is_taken):
                log.info("%s the limit of %s is over", call.request_id, scope)

    async def _send_cured(self, call: Call) -> UpstreamResponse:
        copilot = self._copilot
        token: CopilotToken = await copilot.token.get()
        while True:
            version = copilot.version
            try:
                self._calls += 1
                return await self._send_once(call, token)
            except UpstreamError as problem:
                error = problem
                forget_frames(error)

            row = self._row_for(error)
            is_own = call.path in AUTO_PATHS and error.status == 466
            if is_own or token.is_machine and error.status == 401:
                row = ""
            if not row or not self.may(row):
                if error.opaque and self._taken["login"]:
                    copilot.note_futile_login()
                raise error
            self.take(row)
            copilot.log.debug(
                "%s upstream %d, trying again after: %s",
                call.request_id,
                error.status,
                row,
            )
            token = await self._change(row, token, version, error.status)

    async def _send_once(self, call: Call, token: CopilotToken) -> UpstreamResponse:
        answer = await self._copilot.send_once(call, token, self._is_fresh)
        if answer.status >= 300:
            raise explain_refusal(token, await read_error(answer))
        if call.opening is not None:
            await call.opening(answer)
        return answer

    def _row_for(self, error: UpstreamError) -> str:
        """What may cure this error, "" when nothing does."""
        status, text = error.status, str(error).lower()
        if isinstance(error, StaleConnection):
            return "stale"
        if status == 401:  # item ids that went stale come as a 401, too
            is_other = (
                "input item" in text or "connection" in text or is_auto_refusal(error)
            )
            if is_other:
                return ""
            return "login"

        if status == 421 or status == 403 and error.code in _TOKEN_CODES:
            return "login"
        if status == 403 and error.opaque:
            if self._copilot.may_be_login():
                return "login"
            return ""
        if status == 466:
            if self._copilot.may_change_version():
                return "version"
            return ""
        is_told = error.answered or error.showed_nothing
        if error.unsent or status in HICCUP_STATUS and is_told:
            wish = error.headers.get("retry-after", "0")
            if wish in ("0", "1"):
                return "hiccup"
            return ""

        return ""

    async def _change(
        self, row: str, token: CopilotToken, version: str, status: int
    ) -> CopilotToken:
        """Do what the row says -> the token to go on with."""
        copilot = self._copilot
        if row == "login":
            return await copilot.token.get(token)  # type: ignore[no-any-return]
        if row == "version":
            copilot.change_version(version)
            return token

        self._is_fresh = True
        if row == "hiccup":
            least = 2 if status == 503 else 1  # a second at least for a 503
            await wait(
                Pause(copilot.hiccup_pause_s * (least + secrets.randbelow(100) / 100))
            )
        return token


@functools.lru_cache(maxsize=HEADS_KEPT)
def request_start(
    method: str,
    url: str,
    bearer: str,
    version: str,
    headers: tuple[tuple[str, str], ...],
    own: tuple[str, ...],
) -> bytes:
    """The head of a call to the API up to the value of X-Request-Id: most of it is as in the
    request before.  headers: of the call; own: of --header, which win."""
    is_machine = bearer.startswith(MACHINE_PREFIXES)
    fields_ = dict(CLI_HEADERS if is_machine else EDITOR_HEADERS)
    fields_.update(
        {
            "Authorization": "Bearer " + bearer,
            "Accept": "application/json",
            "Accept-Encoding": "identity",
            "OpenAI-Intent": INTENT,
            "X-Interaction-Type": INTENT,
            "X-GitHub-Api-Version": version,
        }
    )
    if method == "POST":
        fields_["Content-Type"] = "application/json"
    fields_.update(headers)

    pairs = parse_pairs(own, "--header")
    _, host, target = split_origin(url)
    fields_ = {"Host": host, **override(fields_, pairs)}
    head = render_head(f"{method} {target} HTTP/1.1", fields_.items())
    if "x-request-id" in {name.lower() for name in pairs}:
        return head
    return head[:-2] + b"X-Request-Id: "


async def same_error(error: AuthError) -> AuthError:
    return error


class Copilot:
    """One account's way to the API.  Thread-safe."""

    def __init__(
        self,
        settings: Settings,
        upstream: Upstream,
        github: GitHub,
        github_token: str,
        log: logging.Logger,
        clock: Callable[[], tuple[float, float]] = read_clock,
    ) -> None:
        self._settings, self._upstream, self._github = settings, upstream, github
        self.log, self._clock = log, clock
        self.github_token = github_token
        self.on_token: Callable[[CopilotToken], None] = lambda token: None
        self.on_refused: Callable[[AuthError], Work] = same_error
        self.on_headers: Callable[[Headers], None] = lambda headers: (
            None
        )  # of each answer
        self._version = ""  # the API version that worked after a 466
        self.memory = Memory()
        self.limits = RateLimits(clock)
        self._futile_refresh_at = -REACTIVE_PAUSE_S  # monotonic
        self.token = Refreshed(
            self._fetch_token, self._is_due, self._is_dead, settings.token_retry_s
        )

        self.catalogue = Refreshed(
            self._fetch_models,
            self._is_old,
            lambda value: False,
            settings.token_retry_s,
        )

    # -- the token

    def _is_due(self, token: CopilotToken) -> bool:
        return token.age_s(self._clock()) >= token.refresh_s

    def _is_dead(self, token: CopilotToken) -> bool:
        return token.age_s(self._clock()) >= token.lifetime_s

    async def _ask_github(self, ask: Callable[[str], Work]) -> Any:
        """`ask(GitHub token)`.  All that needs the login passes here.  A 401 counts only when a
        second one follows, since GitHub sends a wrong one at times; what to raise then is the
        matter of `on_refused`."""
        try:
            return await ask(self.github_token)
        except AuthError as error:
            if error.status != 401:
                raise

        await wait(Pause(self._settings.hiccup_pause_s))
        try:
            return await ask(self.github_token)
        except AuthError as error:
            if error.status != 401:
                raise
            problem = error
        raise await self.on_refused(problem)

    async def fetch_usage(self) -> Json:
        """The whole usage answer.  Raises AuthError, UpstreamError."""
        answer: Json = await self._ask_github(self._github.fetch_usage)
        return answer

    async def _fetch_token(self) -> CopilotToken:
        token: CopilotToken = await self._ask_github(self._github.fetch_copilot_token)
        self.log.info(
            "copilot token fetched for %s%s",
            host_of(token.api_url),
            " (direct mode: the GitHub token is the bearer)" if token.direct else "",
        )
        if token.details.get("chat_enabled") is False:
            self.log.warning(
                "this account's policy has chat disabled: calls will be refused"
            )
        self.on_token(token)
        return token

    def keep_fresh(self, stop: threading.Event) -> None:
        """Body of the refresh thread: fetch ahead of time, so that no request has to wait."""
        while not stop.is_set():
            with contextlib.suppress(ProxyError):
                run(self.token.get())
            token = self.token.value
            if token:
                left = token.refresh_s - token.age_s(self._clock())
            else:
                left = 0.0
            if isinstance(self.token.error, AuthError):
                stop.wait(LOGIN_RETRY_S)  # no seat, say: a person must act
                continue
            if self.token.error is not None:
                left = self._settings.token_retry_s[-1]
            stop.wait(
                min(max(left, 0.2), 30.0)
            )  # 30: a slept laptop wakes into the check

    # -- one call; what is tried again is decided by Attempts

    async def send(self, call: Call) -> UpstreamResponse:
        """A call that belongs to no client's request, or is all that it needs."""
        return await Attempts(self).send(call)

    async def send_once(
        self, call: Call, token: CopilotToken, is_fresh: bool = False
    ) -> UpstreamResponse:
        """Any status is an answer.  Raises StaleConnection, UpstreamError."""
        url = token.api_url + call.path
        head = request_start(
            call.method,
            url,
            token.value,
            self.version,
            tuple(call.headers.items()),
            self._settings.header,
        )

        if head.endswith(b": "):
            head += (call.request_id or new_request_id()).encode() + b"\r\n\r\n"
        request = UpstreamRequest(call.method, url, {}, call.body, call.timeout_s, head)
        request.is_fresh = is_fresh
        answer = await self._upstream.send(request)
        self.on_headers(answer.headers)
        return answer

    @property
    def hiccup_pause_s(self) -> float:
        """Before a second try, at the least."""
        return self._settings.hiccup_pause_s

    @property
    def version(self) -> str:
        """The API version that is sent: the first one, or what worked after a 466."""
        return self._version or API_VERSIONS[0]

    def may_change_version(self) -> bool:
        """Not where the user has set one."""
        return "x-github-api-version" not in {
            name.lower() for name in self._settings.headers
        }

    def change_version(self, refused: str) -> None:
        """Take the next one, unless another call has done so already."""
        if self.version != refused:
            return
        at = API_VERSIONS.index(refused) + 1
        self._version = API_VERSIONS[at % len(API_VERSIONS)]
        self.log.warning(
            "API version %s is refused (466): trying %s; if that fails set "
            "--header X-GitHub-Api-Version=...",
            refused,
            self._version,
        )

    def may_be_login(self) -> bool:
        """May a new token cure a 403 without a reason?  Not when that has just been in vain."""
        return time.monotonic() - self._futile_refresh_at >= REACTIVE_PAUSE_S

    def note_futile_login(self) -> None:
        self._futile_refresh_at = time.monotonic()

    # -- the catalogue

    def _is_old(self, catalogue: Catalogue) -> bool:
        return time.monotonic() - catalogue.fetched_at >= self._settings.catalogue_age_s

    async def _fetch_models(self) -> Catalogue:
        """Where the list is refused to the editor's identity, the GitHub
        token with the command line's identity is tried: some accounts changed in 2026."""
        call = Call(
            "/models",
            headers={"OpenAI-Intent": MODEL_INTENT, "X-Interaction-Type": MODEL_INTENT},
            timeout_s=GITHUB_TIMEOUT_S,
            request_id=new_request_id(),
        )

        try:
            answer = await self.send(call)
        except UpstreamError as error:
            if not 400 <= error.status < 500 or error.status == 429:
                raise
            bearer = {
                "Authorization": "Bearer " + self.github_token,
                "Copilot-Integration-Id": CLI_INTEGRATION,
            }
            call.headers = dict(call.headers, **bearer)
            answer = await self.send_once(call, await self.token.get())
            if answer.status >= 300:
                answer.close()
                raise

        try:
            body = await answer.read_all(MAX_BODY_BYTES, GITHUB_TIMEOUT_S)
            entries = as_list(as_object(loads(body)).get("data"))
        except ValueError:
            raise UpstreamError("the model list is not JSON") from None

        models: dict[str, Model] = {}
        for entry in entries:
            model_id = as_object(entry).get("id")
            if isinstance(model_id, str) and len(model_id) <= MAX_MODEL_CHARS:
                model = Model.from_entry(entry)
                if model.id not in models or (
                    model.picker and not models[model.id].picker
                ):
                    models[model.id] = model

        self.log.debug("catalogue: %d models", len(models))
        last = self.catalogue.value

        if not models and last is not None and last.models:
            raise UpstreamError(
                "the upstream's list of models is empty: the last one is kept"
            )

        return Catalogue(time.monotonic(), list(models.values()))

    async def models(self) -> list[Model]:
        """The catalogue, at most 10 minutes old if it can be had, else the last one."""
        catalogue: Catalogue = await self.catalogue.get()
        return catalogue.models

    async def find_model(self, asked: str) -> Model:
        """The model that `asked` means; an unknown name refreshes the list, once a minute at most.
        Raises BadRequest 404 that names the three nearest ids."""
        catalogue: Catalogue = await self.catalogue.get()
        model = self._find_in(catalogue, asked)
        if (
            model is None
            and time.monotonic() - catalogue.fetched_at >= CATALOGUE_RETRY_S
        ):
            with contextlib.suppress(UpstreamError):
                catalogue = await self.catalogue.get(catalogue)
            model = self._find_in(catalogue, asked)

        if model is None:
            retired = retirement_of(asked)
            raise BadRequest(
                "model '%s' does not exist here%s; nearest: %s"
                % (
                    printable(asked, 80),
                    retired and f" ({retired})",
                    ", ".join(nearest_ids(asked, catalogue.models)) or "none",
                ),
                404,
                "model_not_found",
                "model",
            )
        return model

    def _find_in(self, catalogue: Catalogue, asked: str) -> Model | None:
        """None also where --strict-models forbids the model that would answer instead."""
        aliases = self._settings.aliases
        model = catalogue.find(asked, aliases)
        is_strict = self._settings.strict_models and self.tier_of(asked) is None
        if model is not None and is_strict and self.is_substitute(asked, model):
            return None
        return model

    def tier_of(self, asked: str) -> str | None:
        """The tier of `auto`, "" for the usual one; None for the name of a model."""
        return auto_tier(self._settings.aliases.get(asked, asked))

    def is_substitute(self, asked: str, model: Model) -> bool:
        """Is `model` another one than the client named, itself or through an alias?"""
        return not is_same_model(self._settings.aliases.get(asked, asked), model)


# ---- auto: the upstream chooses the model ----


@dataclass(frozen=True)
class AutoChoice:
    """A model, with the session token that is good for it and this account only."""

    model: Model
    wish: AutoWish
    lifetime_s: float  # from receipt
    obtained: tuple[float, float]  # (monotonic, wall) at receipt

    def left_s(self, now: tuple[float, float]) -> float:
        age_s = max(now[0] - self.obtained[0], now[1] - self.obtained[1])
        return self.lifetime_s - age_s


class AutoConversation:
    """The choice for one conversation; one call for all who wait for it.  wish: of the request
    that asked last."""

    def __init__(self, auto: AutoMode) -> None:
        self._auto = auto
        self._wish = AutoWish("", "", "")
        self._choice = Refreshed(
            self._fetch, self._is_due, self._is_dead, auto.pauses_s
        )

    def _fetch(self) -> Work:
        return self._auto.ask(self._wish)

    def _is_due(self, choice: AutoChoice) -> bool:
        return choice.left_s(self._auto.clock()) < AUTO_RENEW_S

    def _is_dead(self, choice: AutoChoice) -> bool:
        return choice.left_s(self._auto.clock()) <= 0

    async def choose(self, wish: AutoWish, refused: str) -> Model:
        """refused: the selector that the upstream does not take any more.  Raises UpstreamError,
        AuthError; the old choice is better than none."""
        self._wish, old = wish, self._choice.value
        is_refused = old is not None and old.model.selector == refused
        keeps = old is not None and not is_refused and wish.fits(old.wish, old.model)
        try:
            choice: AutoChoice = await self._choice.get(None if keeps else old)
        except UpstreamError:
            if old is None or is_refused or self._is_dead(old):
                raise
            choice = old
        return choice.model


class AutoMode:
    """`auto` for one account: POST /auto; on accounts without it the pair that it replaced; else
    the account's default model.  is_there: the upstream has chosen once.
    Only the loop may use it.  `_conversations`: the most recently used last."""

    def __init__(
        self,
        copilot: Copilot,
        pauses_s: tuple[float, ...],
        clock: Callable[[], tuple[float, float]],
    ) -> None:
        self._copilot, self.pauses_s, self.clock = copilot, pauses_s, clock
        self.is_there = False
        self._is_told = False
        self._absent_until = 0.0  # monotonic
        self._conversations: collections.OrderedDict[str, AutoConversation]
        self._conversations = collections.OrderedDict()

    async def choose(self, wish: AutoWish, refused: str = "") -> Model:
        """The model for a request, with its selector if the upstream chose it.  Raises
        UpstreamError, AuthError, BadRequest."""
        conversation = self._conversations.pop(wish.key, None) or AutoConversation(self)
        self._conversations[wish.key] = conversation
        if len(self._conversations) > MAX_SESSIONS:
            self._conversations.popitem(last=False)

        if time.monotonic() >= self._absent_until:
            try:
                return await conversation.choose(wish, refused)
            except UpstreamError as error:
                if is_limit(error):
                    raise
                problem = error
            if not self._is_told:
                self._copilot.log.warning(
                    "the upstream chooses no model for `auto` (%s): the "
                    "account's default model answers",
                    problem,
                )
            self._is_told = True
        return await self._copilot.find_model("auto")

    async def ask(self, wish: AutoWish) -> AutoChoice:
        """By /auto, else by the pair.  Raises UpstreamError, AuthError."""
        body = {"prompt": wish.prompt, "tier": wish.tier, "has_image": wish.has_image}
        body = {name: value for name, value in body.items() if value}
        try:
            answer = await self._post(AUTO_PATH, AUTO_API_VERSION, body)
            chosen = answer.get("selected_model")
        except UpstreamError as error:
            if error.status not in (400, 403, 404, 466):
                raise
            answer, chosen = await self._ask_pair()
        return await self._choice_of(answer, chosen, wish)

    async def _ask_pair(self) -> tuple[Json, Any]:
        try:
            answer = await self._post(
                PAIR_PATH, PAIR_API_VERSION, {"auto_mode": {"model_hints": ["auto"]}}
            )
        except UpstreamError as error:
            if error.status in (400, 403, 404, 466):
                self._absent_until = time.monotonic() + AUTO_ABSENT_S
            raise
        known = {model.id for model in await self._copilot.models()}
        names = [answer.get("selected_model"), *as_list(answer.get("available_models"))]
        return answer, next((name for name in names if str(name) in known), None)

    async def _post(self, path: str, version: str, body: Json) -> Json:
        call = Call(
            path,
            dumps(body),
            {"X-GitHub-Api-Version": version},
            new_request_id(),
            AUTO_TIMEOUT_S,
        )
        answer = await self._copilot.send(call)
        try:
            return as_object(
                loads(await answer.read_all(MAX_ERROR_BYTES, AUTO_TIMEOUT_S))
            )
        except ValueError:
            raise UpstreamError("the choice of a model is not JSON") from None

    async def _choice_of(self, answer: Json, chosen: Any, wish: AutoWish) -> AutoChoice:
        """The list's own entry is preferred: the one in the answer may be a part of it."""
        entry = as_object(chosen) or {"id": chosen}
        listed = {model.id: model.entry for model in await self._copilot.models()}
        entry = listed.get(str(entry.get("id")), entry)
        selector = answer.get("session_token")
        if (
            not isinstance(entry.get("id"), str)
            or not isinstance(selector, str)
            or not selector
        ):
            raise UpstreamError("the upstream's choice of a model names none")

        discount = as_object(answer.get("discounted_costs")).get(entry["id"])
        if discount is not None:
            billing = dict(as_object(entry.get("billing")), auto_discount=discount)
            entry = dict(entry, billing=billing)
        now = self.clock()
        left_s = number_or(answer.get("expires_at"), 0) - now[1]
        if not 0 < left_s <= AUTO_LIFE_MAX_S:  # one of both clocks is wrong, or no end
            left_s = AUTO_LIFE_S
        self.is_there = True
        model = replace(Model.from_entry(entry), selector=selector)
        self._copilot.log.info("auto chose %s", printable(model.id))
        return AutoChoice(model, wish, left_s, now)


# ==== 16. History =================================================================================
# What was asked, what it cost and what is left of the quotas; never what was said.  A row is a
# request as a flat JSON object; what nobody told is None in it, never 0.

#: columns of the table and fields of a row; repairs and losses are joined by ", "
COLUMNS = (
    "id TEXT, at REAL, account TEXT, key TEXT, client TEXT, session TEXT, dialect TEXT, "
    "path TEXT, "
    "route TEXT, asked TEXT, model TEXT, streamed INTEGER, status INTEGER, error TEXT, "
    "initiator TEXT, %s INTEGER, estimate INTEGER, sent_ms REAL, "
    "first_ms REAL, total_ms REAL, "
    "repairs TEXT, losses TEXT, upstream_id TEXT" % " INTEGER, ".join(COUNTS)
)
ROW_FIELDS = tuple(column.split()[0] for column in COLUMNS.split(","))
#: files of earlier versions lack these
LATER_COLUMNS = {"key": "TEXT", "sent_ms": "REAL"}
#: a 404 is no failure: clients probe for models and paths that may not exist
SUMS = (
    "COUNT(*) AS requests, "
    "SUM(error IS NOT NULL AND error != 'client_left' AND status IS NOT 404) AS errors, %s, "
    "SUM(CASE WHEN nano_aiu IS NULL THEN estimate END) AS estimate, "
    "SUM(first_ms) AS first_total_ms, COUNT(first_ms) AS timed"
    % ", ".join("SUM(%s) AS %s" % (name, name) for name in COUNTS)
)
SUMMED = ("requests", "errors", *COUNTS, "estimate", "first_total_ms", "timed")
SUMS_OF_SUMS = ", ".join("SUM(%s) AS %s" % (name, name) for name in SUMMED)
SUMMARIES = (
    "total",
    "by_day",
    "by_hour",
    "by_model",
    "by_client",
    "by_account",
    "by_session",
)
#: state of a row that has ended, as /history filters it
ROW_STATES = {
    "done": "error IS NULL",
    "failed": "error IS NOT NULL AND error != 'client_left' AND status IS NOT 404",
    "not_found": "error IS NOT NULL AND status = 404",
    "left": "error = 'client_left'",
}
#: where the text of a filter is looked for
TEXT_COLUMNS = (
    "id",
    "client",
    "account",
    "session",
    "asked",
    "model",
    "path",
    "error",
    "repairs",
    "losses",
    "upstream_id",
)
SESSIONS_SHOWN, HOURS_SHOWN = 20, 8 * 24
#: first part of a User-Agent, lower case -> the program's name for people; the longest one counts
CLIENT_NAMES = {
    "codex": "Codex",
    "claude-cli": "Claude Code",
    "claude-code": "Claude Code",
    "opencode": "opencode",
    "aider": "aider",
    "cline": "Cline",
    "roo": "Roo Code",
    "kilo": "Kilo Code",
    "continue": "Continue",
    "zed": "Zed",
    "goose": "goose",
    "crush": "Crush",
    "qwen": "Qwen Code",
    "geminicli": "Gemini CLI",
    "open-webui": "Open WebUI",
    "openai/python": "OpenAI SDK (Python)",
    "openai/js": "OpenAI SDK (JavaScript)",
    "asyncopenai": "OpenAI SDK (Python)",
    "anthropic/python": "Anthropic SDK (Python)",
    "anthropic/js": "Anthropic SDK (JavaScript)",
    "asyncanthropic": "Anthropic SDK (Python)",
    "mozilla": "a browser",
}
NO_COUNTS = dict.fromkeys(COUNTS)


def with_credits(value: Json) -> Json:
    """A row or sums of rows with its nano-AIU as credits, too."""
    for name, source in (("credits", "nano_aiu"), ("estimated_credits", "estimate")):
        value[name] = None if value.get(source) is None else value[source] / NANO
    return value


def client_name(agent: str | None) -> str | None:
    """The program behind a User-Agent, without its version: an update is no other client."""
    if not agent:
        return None
    lowered = agent.lower()
    known = [start for start in CLIENT_NAMES if lowered.startswith(start)]
    if known:
        return CLIENT_NAMES[max(known, key=len)]
    return agent.partition("/")[0] or agent


def row_filter(
    wanted: Mapping[str, str], agents: Iterable[str | None]
) -> tuple[str, list[Any]]:
    """A condition in SQL and its values.  wanted: model, client (a program's name), state, text;
    '' is no wish.  agents: every User-Agent of the history."""
    parts: list[str] = []
    values: list[Any] = []

    if wanted["model"]:
        parts.append("? IN (model, asked)")
        values.append(wanted["model"])

    if wanted["client"]:
        named = [agent for agent in agents if client_name(agent) == wanted["client"]]
        parts.append("client IN (%s)" % ", ".join("?" * len(named[:MAX_NAMES])))
        values += named[:MAX_NAMES]

    if wanted["state"]:
        parts.append(ROW_STATES[wanted["state"]])

    if wanted["text"]:
        found = ["instr(lower(%s), ?)" % name for name in TEXT_COLUMNS]
        parts.append("(%s)" % " OR ".join("ifnull(%s, 0)" % one for one in found))
        values += [wanted["text"].lower()] * len(found)

    return " AND ".join("(%s)" % part for part in parts) or "1", values


def objects(cursor: Any) -> list[Json]:
    """The rows of a query, each with the names of its columns."""
    names = [column[0] for column in cursor.description]
    return [dict(zip(names, row)) for row in cursor]


def finish_sums(sums: Json) -> Json:
    """Credits for people, and the mean time to the first byte."""
    timed, total_ms = sums["timed"], sums.pop("first_total_ms")
    sums["first_ms"] = total_ms / timed if timed else None
    return with_credits(sums)


def merge_clients(rows: list[Json]) -> list[Json]:
    """Sums by User-Agent -> by program, the busiest first."""
    merged: dict[str | None, Json] = {}

    for row in rows:
        name = client_name(row["client"])
        into = merged.setdefault(name, {"client": name, **dict.fromkeys(SUMMED)})
        for field_ in SUMMED:
            if row[field_] is not None:
                into[field_] = (into[field_] or 0) + row[field_]

    return sorted(merged.values(), key=lambda row: -row["requests"])


def summarise(link: Any, since: float, with_sessions: bool) -> Json:
    """{"total": one line of sums, "by_day": lines, ...} of the requests since then.
    The rows are read once: their sums by hour, model, client and account go into a table in
    memory, and that is summed up for each answer."""
    link.execute("DROP TABLE IF EXISTS temp.sums")
    link.execute(
        "CREATE TEMP TABLE sums AS SELECT "
        "strftime('%%Y-%%m-%%d %%H', at, 'unixepoch', 'localtime') AS hour, "
        "model, client, account, %s FROM requests WHERE at >= ? GROUP BY 1, 2, 3, 4"
        % SUMS,
        (since,),
    )

    def grouped(key: str, order: str) -> list[Json]:
        return objects(
            link.execute(
                f"SELECT {key}, {SUMS_OF_SUMS} FROM temp.sums GROUP BY 1 ORDER BY {order}"
            )
        )

    found = {
        "total": grouped("'' AS day", "1"),
        "by_day": grouped("substr(hour, 1, 10) AS day", "1"),
        "by_hour": grouped("hour", "1 DESC LIMIT %d" % HOURS_SHOWN)[::-1],
        "by_model": grouped("model", "requests DESC"),
        "by_client": merge_clients(grouped("client", "requests DESC")),
        "by_account": grouped("account", "requests DESC"),
        "by_session": [],
    }
    if with_sessions:
        found["by_session"] = objects(
            link.execute(
                f"SELECT session, {SUMS} FROM requests WHERE at >= ? AND session IS NOT NULL "
                f"GROUP BY 1 ORDER BY requests DESC LIMIT {SESSIONS_SHOWN}",
                (since,),
            )
        )
    link.execute("DROP TABLE temp.sums")
    return {name: [finish_sums(row) for row in rows] for name, rows in found.items()}


def shown(row: Json) -> Json:
    """A row as people get it."""
    lists = {
        name: (row[name] or "").split(", ") if row[name] else []
        for name in ROW_FIELDS[-3:-1]
    }
    return with_credits(
        {
            "n": None,
            "state": "done",
            "message": None,
            **row,
            **lists,
            "program": client_name(row["client"]),
            "streamed": bool(row["streamed"]),
        }
    )


def session_key(headers: Headers, body: Json) -> str | None:
    """A short name of the conversation that a request belongs to, made from what the client sends
    to keep it together; None when it sends nothing of the kind."""
    found = next(
        (headers[name] for name in SESSION_HEADERS if name in headers), None
    ) or body.get("prompt_cache_key")
    if not found and body.get("metadata"):  # .._session_UUID, or a JSON text
        user = as_object(body["metadata"]).get("user_id")
        found = re.split("session_(?:id)?", "%s" % user, maxsplit=1)[1:]
    if found and isinstance(found, (str, list)):
        return stable_id("", str(found))[:8]
    return None


def quotas_of(answer: Json) -> Json:
    """Lane -> snapshot of a usage answer; the free plan's counts are put into that form."""
    reset = next(
        filter(
            None,
            map(
                answer.get,
                ("quota_reset_date_utc", "quota_reset_date", "limited_user_reset_date"),
            ),
        ),
        None,
    )

    monthly = as_object(answer.get("monthly_quotas"))
    found: Json = {
        name: {"entitlement": monthly.get(name), "remaining": left}
        for name, left in as_object(answer.get("limited_user_quotas")).items()
    }
    found.update(as_object(answer.get("quota_snapshots")))
    return {
        name: {"quota_reset_at": reset, **as_object(said)}
        for name, said in found.items()
    }


class EventReader:
    """One who reads /history/events: what is told waits here until it is sent."""

    def __init__(self) -> None:
        self._frames: collections.deque[bytes] = collections.deque()
        self._news = Signal()

    @property
    def is_full(self) -> bool:
        return len(self._frames) >= READER_QUEUE

    def put(self, frame: bytes) -> None:
        self._frames.append(frame)
        self._news.set()

    async def get(self) -> bytes:
        """The next frame; b"" when there will be no other."""
        while not self._frames:
            self._news = Signal()
            if not self._frames:  # else it came just now
                await wait(self._news)
        return self._frames.popleft()


class Events:
    """What happens, told to all who read /history/events.  One that is too slow is cut off."""

    def __init__(self) -> None:
        self.readers: list[EventReader] = []

    def tell(self, event: str, value: Any) -> None:
        """To every reader; cheap where there is none."""
        if self.readers:
            frame = Frame(event, dumps(value)).encode()
        else:
            frame = b""
        for reader in list(self.readers):
            if reader.is_full:
                self.close(reader)
            else:
                reader.put(frame)

    def open(self) -> EventReader:
        """A new reader.  Raises ProxyError 503."""
        if len(self.readers) >= MAX_READERS:
            raise ProxyError("%d readers are there already" % MAX_READERS, 503)
        self.readers.append(EventReader())
        return self.readers[-1]

    def close(self, *readers: EventReader) -> None:
        """These are told nothing more."""
        for reader in readers:
            with contextlib.suppress(ValueError):
                self.readers.remove(reader)
                reader.put(b"")


#: one statement for many rows: each runs outside the interpreter's lock, which the loop wants
ROWS_PER_INSERT = 999 // len(ROW_FIELDS)  # 999: values that any SQLite takes at once


def insert_rows(link: Any, rows: list[Json]) -> None:
    """Write rows; of texts only what fits on a line."""
    one = "(%s?)" % ("?, " * (len(ROW_FIELDS) - 1))
    values = []
    for row in rows:
        for value in map(row.get, ROW_FIELDS):
            if isinstance(value, str) and not (value.isascii() and len(value) < 200):
                value = printable(value)
            values.append(value)
    link.execute(
        "INSERT INTO requests (%s) VALUES %s"
        % (", ".join(ROW_FIELDS), ", ".join([one] * len(rows))),
        values,
    )


class History:
    """The table of requests in SQLite.  One thread writes and reads it, so that no request waits
    for the disk: rows go into a queue, and where the file cannot be written they stay there until
    it can.  A broken file is moved aside.  path: ':memory:' for the demo, '' for none; problem: why
    nothing is written now; dropped: how many rows were lost."""

    def __init__(self, path: str, log: logging.Logger) -> None:
        self.path, self._log, self.problem, self.dropped = path, log, "", 0
        self._rows: collections.deque[Json] = collections.deque()
        self._jobs: collections.deque[Callable[[Any], None]] = collections.deque()
        self._hurry, self._closing = threading.Event(), False
        self._thread: threading.Thread | None = None

    def put(self, row: Json) -> None:
        """Write it soon.  Never waits."""
        if self.path and len(self._rows) < HISTORY_QUEUE:
            self._rows.append(row)
        else:
            self.dropped += bool(self.path)

    def ask(self, job: Callable[[Any], None]) -> None:
        """Have the thread call `job(connection)`, before anything is written; None where there is
        no database.  The first call starts the thread."""
        if not self.path:
            job(None)
            return
        self._jobs.append(job)
        self._hurry.set()
        if self._thread is None and not self._closing:
            self._thread = threading.Thread(
                target=self._run, name="history", daemon=True
            )
            self._thread.start()

    def read(self, work: Callable[[Any], Any]) -> Any:
        """What `work(connection)` returns; None without a database, when reading failed, and when
        it is not there within HISTORY_WAIT_S."""
        answer: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def job(link: Any) -> None:
            found = None
            try:
                found = work(link) if link else None
            finally:
                answer.put(found)

        self.ask(job)
        with contextlib.suppress(queue.Empty):
            return answer.get(timeout=HISTORY_WAIT_S)
        return None

    def query(self, sql: str, *values: Any) -> list[Json]:
        """Rows as objects; none when they are not there within HISTORY_WAIT_S."""
        found: list[Json] | None = self.read(
            lambda link: objects(link.execute(sql, values))
        )
        return found or []

    def close(self) -> None:
        """Write what waits, end the thread."""
        self._closing = True
        self._hurry.set()
        if self._thread is not None:
            self._thread.join(2 * HISTORY_BUSY_S)

    def _run(self) -> None:
        try:
            import sqlite3
        except ImportError:
            self._fail("this Python has no sqlite3")
            self.path = ""
            while self._jobs:
                self._jobs.popleft()(None)
            return

        while True:
            try:
                self._serve(sqlite3)
            except (
                sqlite3.OperationalError,
                OSError,
            ) as error:  # locked, full, unreachable
                self._fail("%s: %s" % (self.path, error))
            except sqlite3.Error as error:
                aside = "%s.bad-%d" % (self.path, time.time_ns())
                self._fail(
                    "%s was broken (%s) and moved to %s" % (self.path, error, aside)
                )
                for end in ("", "-wal", "-shm"):
                    with contextlib.suppress(OSError):
                        os.replace(self.path + end, aside + end)

            if self._closing:
                return
            self._hurry.wait(HISTORY_RETRY_S)
            self._hurry.clear()

    def _serve(self, sqlite3: Any) -> None:
        """Until the end, a fault, or the file is gone."""
        if self.path != ":memory:":
            os.makedirs(os.path.dirname(self.path), mode=0o700, exist_ok=True)
            os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))

        with contextlib.closing(
            sqlite3.connect(self.path, timeout=HISTORY_BUSY_S)
        ) as link:
            for sql in (
                "PRAGMA journal_mode=WAL",
                "PRAGMA synchronous=NORMAL",
                "PRAGMA temp_store=MEMORY",
                "CREATE TABLE IF "
                "NOT EXISTS requests (n INTEGER PRIMARY KEY, %s)" % COLUMNS,
            ):
                link.execute(sql)

            known = {
                column[1] for column in link.execute("PRAGMA table_info(requests)")
            }
            missing = set(ROW_FIELDS) - known
            if missing.difference(LATER_COLUMNS):
                raise sqlite3.DatabaseError("it has the columns of another version")
            for name in missing:
                kind = LATER_COLUMNS[name]
                link.execute("ALTER TABLE requests ADD COLUMN %s %s" % (name, kind))
            link.execute("CREATE INDEX IF NOT EXISTS requests_at ON requests (at)")
            while self.path == ":memory:" or os.path.exists(self.path):
                closing = self._closing
                self._work(link)
                if closing:
                    return
                self._hurry.wait(HISTORY_PAUSE_S)
                self._hurry.clear()

    def _work(self, link: Any) -> None:
        while self._jobs:
            self._jobs.popleft()(link)
        while self._rows:
            most = min(len(self._rows), ROWS_PER_INSERT)
            rows = [self._rows[at] for at in range(most)]
            with link:
                insert_rows(link, rows)
                if secrets.randbelow(1000) < len(rows):  # now and then
                    link.execute(
                        "DELETE FROM requests WHERE at < ? OR n <= (SELECT MAX(n) FROM "
                        "requests) - ?",
                        (time.time() - HISTORY_AGE_S, HISTORY_ROWS),
                    )

            for _ in rows:
                self._rows.popleft()

        if self.problem:
            self.problem = ""
            self._log.warning("the history is written again")

    def _fail(self, problem: str) -> None:
        """Into the log when it is news."""
        if problem != self.problem:
            self._log.warning("no history is written: %s", problem)
        self.problem = problem


# ==== 17. Policy ==================================================================================
# Who may ask and as which account, when a request may go up, and the App that holds everything
# together.


def too_early(text: str, pause_s: float, **headers: str) -> RateLimited:
    """The refusal that tells when to come again."""
    seconds = str(int(pause_s) + 1)
    return RateLimited(
        "%s: try again in %s s" % (text, seconds),
        code="rate_limit_exceeded",
        headers=dict(headers, **{"retry-after": seconds}),
    )


class RateLimiter:
    """At least `interval_s` between two starts.  Who must wait stands in a line; who leaves gives
    up the place, and those behind move up.  Only the loop's thread may use it."""

    def __init__(self, interval_s: float, may_wait: bool) -> None:
        self._interval_s, self._may_wait = interval_s, may_wait
        self._next = 0.0  # monotonic: when the first in line may go
        self._line: collections.deque[Signal] = collections.deque()

    def check(self, calls: int) -> None:
        """Refuse a request that takes so many calls upstream that its last one would come far too
        late, before the first one has cost anything.  Raises RateLimited."""
        pause = (calls - 1) * self._interval_s
        if pause > CALLS_WAIT_S and not self._may_wait:
            raise too_early(
                "this request takes %d calls, and one in %g s is allowed here "
                "(--rate-limit): send fewer inputs at a time, or start with --wait"
                % (calls, self._interval_s),
                self._interval_s,
            )

    async def admit(self, is_begun: bool = False) -> None:
        """Return when it is this caller's turn.  is_begun: its request has had a call already and
        waits for the next one in any case.  Raises RateLimited."""
        if not self._interval_s:
            return
        pause = (
            max(0.0, self._next - time.monotonic()) + len(self._line) * self._interval_s
        )
        may_wait = self._may_wait or is_begun
        if pause and (not may_wait or len(self._line) >= RATE_QUEUE):
            raise too_early(
                "one request in %g s is allowed here (--rate-limit)" % self._interval_s,
                pause,
            )

        turn = Signal()
        self._line.append(turn)
        self._call_first()
        try:
            await wait(turn)
            if self._next > time.monotonic():
                await wait(Pause(self._next - time.monotonic()))
            self._next = time.monotonic() + self._interval_s
        finally:
            self._line.remove(turn)
            self._call_first()

    def _call_first(self) -> None:
        if self._line:
            self._line[0].set()


class MinuteLimiter:
    """At most `limit` calls of each caller within any 60 s; 0 is no limit.
    `_lock` guards `_times`: caller -> when it asked, the most recently active caller last."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._times: collections.OrderedDict[str, collections.deque[float]]
        self._times = collections.OrderedDict()

    def admit(self, who: str, text: str, calls: int = 1) -> Headers:
        """Count a request of so many calls -> headers that tell what is left.  Raises RateLimited
        with `text`, and counts nothing, where not all of them are left."""
        if not self._limit:
            return {}
        now = time.monotonic()
        with self._lock:
            times = self._times[who] = self._times.pop(who, collections.deque())
            if len(self._times) > MAX_ACCOUNTS:
                self._times.popitem(last=False)
            while times and now - times[0] >= 60:
                times.popleft()
            left = self._limit - len(times)
            fits = left >= calls
            if fits:
                times.extend([now] * calls)
                left -= calls
            pause = 60 - (now - times[0]) if times else 0.0

        headers = {
            "x-ratelimit-limit-requests": str(self._limit),
            "x-ratelimit-remaining-requests": str(left),
            "x-ratelimit-reset-requests": "%ds" % (int(pause) + 1),
        }

        if not fits:
            if calls > 1:
                text = "this request takes %d calls, and %s" % (calls, text)
            raise too_early(text, pause, **headers)

        return headers


class Gate:
    """`--max-concurrency`: at most `most` requests at a time, 0 for any number; the others wait,
    each caller's in a line of its own, and the lines take turns.  Only the loop may use it."""

    def __init__(self, most: int) -> None:
        self._most, self._running = most, 0
        self._lines: collections.OrderedDict[str, collections.deque[Signal]]
        self._lines = collections.OrderedDict()

    async def enter(self, who: str) -> bool:
        """Returns when it is this request's turn.  True: it holds a slot, `leave` must follow.
        Raises RateLimited when too many wait already."""
        if not self._most:
            return False
        turn = Signal()
        self._lines.setdefault(who, collections.deque()).append(turn)
        self._pass_on()

        if not turn.is_set and sum(map(len, self._lines.values())) > WAITING_MAX:
            self._lines[who].pop()
            raise too_early(
                "%d requests run and %d wait (--max-concurrency)"
                % (self._running, WAITING_MAX),
                1,
            )

        try:
            await wait(turn)
        except BaseException:
            if turn.is_set:
                self._running -= 1
            else:
                self._lines[who].remove(turn)
            self._pass_on()
            raise

        return True

    def leave(self) -> None:
        """The request is over."""
        self._running -= 1
        self._pass_on()

    def _pass_on(self) -> None:
        while self._lines and self._running < self._most:
            who, line = self._lines.popitem(last=False)
            if line:
                line.popleft().set()
                self._running += 1
                self._lines[who] = line  # behind the others


class Approval:
    """`--manual`: a person says yes or no to each request, on the terminal or on the page.
    waiting: id -> what is asked, the oldest first; `_changed` guards it."""

    def __init__(
        self, wanted: bool, log: logging.Logger, tell: Callable[[str, Any], None]
    ) -> None:
        self._wanted, self._log, self._tell = wanted, log, tell
        self._changed = threading.Condition()
        self.waiting: dict[str, Json] = {}
        self._decided: dict[str, Signal] = {}  # id -> who waits for it
        self._terminal: threading.Thread | None = None
        self._asked = ""  # the id whose answer the terminal owes

    async def ask(self, **about: Any) -> None:
        """Returns after a yes.  about: client, account, model, text.  Raises BadRequest 403 for a
        no, RateLimited when too many wait."""
        if not self._wanted:
            return
        if len(self.waiting) >= RATE_QUEUE:
            raise RateLimited(
                "too many requests wait for a person's approval (--manual)"
            )

        question = dict(about, id=secrets.token_hex(4), at=time.time(), state="waiting")
        decided = Signal()
        with self._changed:
            self.waiting[question["id"]] = question
            self._decided[question["id"]] = decided
            self._changed.notify_all()
            self._call_person(question["id"])
        self._tell("approval", question)
        try:
            await wait(decided)
        finally:
            with contextlib.suppress(BadRequest):
                self.decide(question["id"], "gone")
            self._tell("approval", question)
        if question["state"] != "allowed":
            raise BadRequest(
                "refused by the person who is asked (--manual)", 403, "request_refused"
            )

    def _call_person(self, question_id: str) -> None:
        if not (sys.stdin and sys.stdin.isatty()):
            self._log.warning("%s waits for its approval on the page", question_id)
        elif self._terminal is None:
            self._terminal = threading.Thread(target=self._converse, daemon=True)
            self._terminal.start()

    def decide(self, question_id: str, state: str) -> Json:
        """'allowed', 'refused' or 'gone'.  Raises BadRequest 404 when it does not wait."""
        with self._changed:
            question = self.waiting.pop(question_id, None)
            if question is None:
                raise BadRequest(
                    "this request does not wait for an approval any more",
                    404,
                    "approval_gone",
                )
            question["state"] = state
            self._decided.pop(question_id).set()
            self._changed.notify_all()
            if question_id == self._asked:
                sys.stderr.write("\nthis one is decided already: press Enter\n")
        return question

    def _converse(self) -> None:
        """On the terminal, to its end: a question, the line for it, the next.  A yes to one that
        the page has decided meanwhile allows no other."""
        line = "y"

        while line:
            with self._changed:
                self._changed.wait_for(lambda: self.waiting)
                question = next(iter(self.waiting.values()))
                self._asked = question["id"]

            sys.stderr.write(
                "\nallow %s to ask %s: %s ? [y/N] "
                % (
                    printable(question["client"], 40),
                    printable(question["model"], 60),
                    printable(question["text"], 60),
                )
            )

            sys.stderr.flush()
            line, self._asked = sys.stdin.readline(), ""
            with contextlib.suppress(BadRequest):
                allowed = line.strip().lower() in ("y", "yes")
                self.decide(question["id"], "allowed" if allowed else "refused")


def payer_of(key: str | None, session: str | None, agent: str | None) -> str:
    """The name of a budget.  ("3f2a", "9c01", "curl/8") -> "3f2a 9c01" """
    name = session or agent or "-"
    if key:
        return "%s %s" % (key, name)
    return name


class Budget:
    """`--budget`: credits that may be spent in a day of local time, and in a session whose client
    says how many.  What an answer cost is known at its end, so those that run may pass the limit.
    `_lock` guards all fields; `clock` gives unix seconds."""

    def __init__(
        self,
        limit: float,
        clock: Callable[[], float],
        log: logging.Logger,
        tell: Callable[[str, Any], None],
    ) -> None:
        self._clock, self._log, self._tell = clock, log, tell
        self._lock = threading.Lock()
        self.loaded = threading.Event()  # what an earlier process spent is known
        self._began = self._ends = 0.0  # of the day
        self._estimated = False
        #: payer -> credits, and nano-AIU that were spent; '' is the day
        self._limits = {"": limit} if limit else {}
        self._spent: collections.OrderedDict[str, int] = collections.OrderedDict()

    @property
    def is_set(self) -> bool:
        """Is anything limited?"""
        return bool(self._limits)

    async def admit(self, payer: str, wish: str | None, running: int = 0) -> None:
        """May another call go up?  wish: the header that limits this payer; running: nano-AIU that
        its request has spent so far.  Raises RateLimited, BadRequest."""
        if wish is None and not self._limits:
            return
        limit = text_number_or_none(wish)
        if wish is not None and (limit is None or limit < 0):
            raise BadRequest(
                "x-copilot-proxy-budget: say how many credits this session may spend"
            )

        with self._lock:
            if limit is not None and (
                payer in self._limits or len(self._limits) < MAX_SESSIONS
            ):
                self._limits[payer] = limit

        deadline = time.monotonic() + BUDGET_WAIT_S
        while not self.loaded.is_set() and time.monotonic() < deadline:
            await wait(Pause(BUDGET_LOOK_S))
        self.loaded.set()  # a locked file delays nobody else
        for line in self._lines({"": running, payer: running}):
            if line["state"] != "spent" or line["session"] not in ("", wish and payer):
                continue
            text = (
                "this session's budget is spent, %.2f of %g credits: begin a new one or "
                "raise x-copilot-proxy-budget"
            )
            headers = {"x-should-retry": "false"}

            if not line["session"]:
                text = (
                    "today's budget is spent, %.2f of %g credits (--budget); it starts anew "
                    "at " + local_time(self._ends)
                )
                headers["retry-after"] = "%d" % (self._ends - self._clock() + 1)

            raise RateLimited(
                text % (line["used"], line["limit"]),
                code="budget_exceeded",
                headers=headers,
            )

    def _lines(self, running: Mapping[str, int] | None = None) -> list[Json]:
        """What is limited, how much of it is used; a new day begins when it is time.  running:
        payer -> nano-AIU that are spent, but not recorded yet."""
        running = running or {}

        with self._lock:
            now = self._clock()
            if not self._began <= now < self._ends:
                year, month, day = time.localtime(now)[:3]
                self._began, self._ends = (
                    time.mktime((year, month, at, 0, 0, 0, 0, 0, -1))
                    for at in (day, day + 1)
                )
                self._spent[""], self._estimated = 0, False
            used = [
                (name, limit, (self._spent.get(name, 0) + running.get(name, 0)) / NANO)
                for name, limit in self._limits.items()
            ]

        shares = [spent / limit if limit else 1.0 for _, limit, spent in used]
        return [
            {
                "session": name,
                "limit": limit,
                "used": spent,
                "percent": 100 * share,
                "state": "spent"
                if share >= 1
                else "warning"
                if share >= BUDGET_WARNING
                else "ok",
            }
            for (name, limit, spent), share in zip(used, shares)
        ]

    def spend(self, row: Json) -> None:
        """A request has ended.  Where the upstream tells no credits the estimate counts."""
        before = self.report()
        if row["nano_aiu"] is None:
            cost = row["estimate"]
        else:
            cost = row["nano_aiu"]

        if cost:
            self._estimated |= row["nano_aiu"] is None
            self._add(
                {
                    payer_of(row["key"], row["session"], row["client"]): cost,
                    "": cost if row["at"] >= self._began else 0,
                }
            )

        after = self.report()
        if before and after:
            if after["state"] not in (before["state"], "ok", None):
                self._log.warning(
                    "%.0f %% of today's budget of %g credits is spent",
                    after["percent"],
                    after["limit"],
                )
            self._tell("budget", after)

    def _add(self, costs: Mapping[str, int]) -> None:
        with self._lock:
            for session, cost in costs.items():
                self._spent[session] = self._spent.pop(session, 0) + cost
            while len(self._spent) > MAX_SESSIONS:
                self._limits.pop(self._spent.popitem(last=False)[0], None)

    def load(self, link: Any) -> None:
        """What was spent before this process began, from the history."""
        self._lines()
        payer = (
            "COALESCE(key || ' ', '') || COALESCE(session, client, '-')"  # as payer_of
        )
        for name, since in ((payer, 0), ("''", self._began)):
            if link:
                found = link.execute(
                    "SELECT %s, SUM(COALESCE(nano_aiu, estimate, 0)) FROM requests "
                    "WHERE at >= ? GROUP "
                    "BY 1 ORDER BY MAX(at) DESC LIMIT %d" % (name, MAX_SESSIONS - 1),
                    (since,),
                ).fetchall()
            else:
                found = []
            self._add(dict(reversed(found)))
        self.loaded.set()

    def report(self) -> Json | None:
        """For people; None where nothing is limited."""
        lines = self._lines() if self._limits else []
        if lines and not lines[0]["session"]:
            day = lines.pop(0)
        else:
            day = dict.fromkeys(("limit", "used", "percent", "state"))
        if self._limits:
            return {
                **day,
                "estimated": self._estimated,
                "ends_at": self._ends,
                "sessions": lines,
            }
        return None


def local_time(at: Any) -> str:
    """A moment as people write it here, "?" for what is none: files may hold anything."""
    moment = moment_or_none(at)
    if moment is None:
        return "?"
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(moment))


class Stats:
    """Counts since the start, by group and name.  `_lock` guards them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, dict[Any, int]] = collections.defaultdict(dict)

    def count(self, groups: Mapping[str, Mapping[Any, int]]) -> None:
        """At most MAX_NAMES different ones of a group: clients make up field names."""
        with self._lock:
            for group, amounts in groups.items():
                counts = self._counts[group]
                for name, amount in amounts.items():
                    if name in counts:
                        counts[name] += amount
                    elif len(counts) < MAX_NAMES:
                        counts[name] = amount

    def group(self, name: str) -> dict[Any, int]:
        """{name: count}"""
        with self._lock:
            return dict(self._counts[name])


def append_body(folder: str, name: str, data: bytes) -> None:
    """--log-bodies: append to a file; a new one takes the place of the oldest of BODIES_KEPT.
    Raises OSError."""
    path = os.path.join(folder, name + ".body")
    if not os.path.exists(path):
        os.makedirs(folder, mode=0o700, exist_ok=True)
        old = sorted(file for file in os.listdir(folder) if file.endswith(".body"))
        for file in old[: max(0, len(old) - BODIES_KEPT + 1)]:
            os.unlink(os.path.join(folder, file))
    with open(
        os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600), "ab"
    ) as body:
        body.write(redact(data.decode("utf-8", "replace")).encode("utf-8", "replace"))


def check_expanded(size_bytes: int) -> None:
    """A small request may name large things.  Raises BadRequest 413."""
    if size_bytes > MAX_BODY_BYTES:
        raise BadRequest(
            "the request with all that it refers to is larger than %d bytes"
            % MAX_BODY_BYTES,
            413,
            param="input",
        )


_ITEM_IDS = re.compile(rb'"id":("[^"\\]{1,%d}")' % MAX_ID_CHARS)


class KeptResponse:
    """An answer of /responses, the request that it answers, and when it came (monotonic).

    Both stay bytes and are parsed when they are asked for."""

    def __init__(self, at: float, request: bytes, answer: bytes) -> None:
        self.at, self.request, self.answer = at, request, answer
        self.size_bytes = len(request) + len(answer)

    @functools.cached_property
    def ids(self) -> frozenset[bytes]:
        """The ids in the answer, as JSON."""
        found = _ITEM_IDS.finditer(self.answer)
        return frozenset(match.group(1) for match, _ in zip(found, range(MAX_KEPT_IDS)))

    def parse_answer(self) -> Json:
        """The answer, which is kept as a body or as the last event of a stream."""
        is_body = self.answer[:1] == b"{"
        value = as_object(
            loads(self.answer if is_body else Frame.parse(self.answer).data)
        )
        return as_object(value.get("response", value))

    def parse_input(self) -> list[Json]:
        """The items that the request held."""
        return input_items(loads(self.request))


class ResponseStore:
    """Answers of /responses that their client may name later: bounded in number, bytes and age,
    the oldest go first.  `owner` is whose they are.  `_lock` guards the fields."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: collections.OrderedDict[
            tuple[str, str], KeptResponse
        ]  # (owner, id) ->
        self._kept = collections.OrderedDict()
        self._size = 0

    def put(self, owner: str, request: bytes, response_id: str, answer: bytes) -> None:
        """Keep an answer; cheap."""
        kept = KeptResponse(time.monotonic(), request, answer)
        with self._lock:
            self._drop((owner, response_id))
            self._kept[owner, response_id] = kept
            self._size += kept.size_bytes
            while self._size > STORE_BYTES or len(self._kept) > STORE_COUNT:
                self._drop(next(iter(self._kept)))

    def _drop(self, key: tuple[str, str]) -> bool:
        kept = self._kept.pop(key, None)
        if kept is None:
            return False
        self._size -= kept.size_bytes
        return True

    def _drop_old(self) -> None:
        oldest = time.monotonic() - STORE_AGE_S
        for key in [key for key, kept in self._kept.items() if kept.at < oldest]:
            self._drop(key)

    def _of(self, owner: str) -> list[KeptResponse]:
        """All of an owner, the newest first."""
        with self._lock:
            self._drop_old()
            return [
                kept for key, kept in reversed(self._kept.items()) if key[0] == owner
            ]

    def _get(self, owner: str, response_id: str) -> KeptResponse | None:
        with self._lock:
            self._drop_old()
            return self._kept.get((owner, response_id))

    def find(self, owner: str, response_id: str) -> tuple[Json, list[Json]] | None:
        """(answer, input items) of a kept response, None when it is not there."""
        kept = self._get(owner, response_id)
        if kept:
            return (kept.parse_answer(), kept.parse_input())
        return None

    def find_items(self, owner: str, ids: Iterable[str]) -> dict[str, bytes]:
        """{id: item as JSON} of the output items that are there: each answer is looked at once."""
        missing = {dumps(item_id): item_id for item_id in ids}
        found: dict[str, bytes] = {}
        for kept in self._of(owner):
            if not missing:
                break
            if kept.ids.isdisjoint(missing):
                continue
            for item in map(as_object, as_list(kept.parse_answer().get("output"))):
                item_id = missing.pop(dumps(item.get("id")), None)
                if item_id is not None:
                    found[item_id] = dumps(item)
        return found

    def delete(self, owner: str, response_id: str) -> bool:
        """False when it is not there."""
        with self._lock:
            return self._drop((owner, response_id))

    def expand(self, owner: str, body: Json, size_bytes: int) -> bool:
        """Put what a request names by id into its `input` -> was there anything?

        size_bytes: of the request as it came.  Raises BadRequest in OpenAI's words for what is
        gone, since clients then send the whole input, and 413 for what grows too large."""
        items = input_items(body)
        previous = body.get("previous_response_id")
        has_references = any(item.get("type") == "item_reference" for item in items)
        if not previous and not has_references:
            return False

        if has_references:
            items, size_bytes = self._resolve(owner, items, size_bytes)
        if previous:
            items = self._history(owner, str(previous), size_bytes) + items
            del body["previous_response_id"]
        body["input"] = items
        return True

    def _resolve(
        self, owner: str, items: list[Json], size_bytes: int
    ) -> tuple[list[Json], int]:
        """(the items with what they refer to, the size of the request then)."""
        named = [
            str(item.get("id"))
            for item in items
            if item.get("type") == "item_reference"
        ]

        if len(named) > MAX_REFERENCES:
            raise BadRequest(
                "more than %d item references: send the items themselves"
                % MAX_REFERENCES,
                413,
                param="input",
            )

        found = self.find_items(owner, named)
        for item_id in named:
            if item_id not in found:
                raise BadRequest(
                    "Item with id '%s' not found." % printable(item_id, 80),
                    404,
                    param="input",
                )

        size_bytes += sum(len(found[item_id]) for item_id in named)
        check_expanded(size_bytes)
        resolved = [
            loads(found[str(item.get("id"))])
            if item.get("type") == "item_reference"
            else item
            for item in items
        ]

        return resolved, size_bytes

    def _history(self, owner: str, response_id: str, size_bytes: int) -> list[Json]:
        """The conversation up to a kept answer and with it."""
        kept = self._get(owner, response_id)
        if kept is None:
            raise BadRequest(
                "Previous response with id '%s' not found."
                % printable(response_id, 80),
                code="previous_response_not_found",
                param="previous_response_id",
            )
        check_expanded(size_bytes + kept.size_bytes)
        return kept.parse_input() + as_list(kept.parse_answer().get("output"))


def show_token(token: CopilotToken) -> None:
    """--show-token: on a terminal, never in a file or pipe that may be a log."""
    if sys.stderr.isatty():
        sys.stderr.write("Copilot token: %s\n" % visible(token.value))
        sys.stderr.flush()


class Services(NamedTuple):
    """What accounts and logins need of the server; stop: it ends."""

    settings: Settings
    log: logging.Logger
    clock: Callable[[], tuple[float, float]]
    upstream: Upstream
    github: GitHub
    ledger: Ledger
    stop: threading.Event


class Account(Copilot):
    """One GitHub account; nothing of it is shared.  id: short, always the same for its token;
    name: the GitHub login where known, else the id.  on_refused: GitHub refuses its login -> the
    error to raise."""

    def __init__(
        self,
        services: Services,
        github_token: str,
        on_refused: Callable[[Account, AuthError], Work],
        name: str = "",
    ) -> None:
        settings, ledger = services.settings, services.ledger
        super().__init__(
            settings,
            services.upstream,
            services.github,
            check_github_token(github_token),
            services.log,
            services.clock,
        )

        self.on_refused = lambda error: on_refused(self, error)
        self.id = stable_id("", github_token)[:8]
        self.name = name or self.id
        self.limiter = RateLimiter(settings.rate_limit, settings.wait)
        self.stats = Stats()
        self.auto = AutoMode(self, settings.token_retry_s, services.clock)
        self._ledger = ledger
        self.on_headers = lambda headers: ledger.see_quotas(
            self, "header", header_lanes(headers)
        )
        if settings.show_token:
            self.on_token = show_token

    async def fetch_usage(self) -> Json:
        """The usage answer; the account's name and quotas in it are noted."""
        answer = await super().fetch_usage()
        self.name = str(answer.get("login") or self.name)
        self._ledger.see_quotas(self, "usage", quotas_of(answer))
        return answer

    async def _fetch_models(self) -> Catalogue:
        """The first time it warns of settings that name a model which this account lacks."""
        catalogue = await super()._fetch_models()
        if self.catalogue.value is None:
            for line in self._settings.missing_models(catalogue.models):
                self.log.warning("%s", line)
        return catalogue


#: path -> the name in the history of what is asked there
LABELS = {
    "/chat/completions": "chat",
    "/responses": "responses",
    "/messages": "messages",
    "/completions": "completions",
    "/embeddings": "embeddings",
    "/messages/count_tokens": "count_tokens",
    "/responses/input_tokens": "count_tokens",
    "/responses/compact": "compact",
    "/alpha/search": "search",
    "/api/chat": "ollama",
    "/api/generate": "ollama",
    "/api/embed": "embeddings",
    "/api/embeddings": "embeddings",
}
#: the same of Gemini's methods
METHOD_LABELS = dict(
    zip(
        GEMINI_METHODS, ("gemini", "gemini", "count_tokens", "embeddings", "embeddings")
    )
)
DEPLOYMENTS = (
    "/openai/deployments"  # Azure: .../NAME/chat/completions; a model is the name
)


def gemini_method(path: str) -> str:
    """'/models/gemini-3:countTokens' -> 'countTokens', "" where the path names none."""
    head, _, tail = path.rpartition("/")
    method = urllib.parse.unquote(tail).rpartition(":")[2]
    if head.endswith("/models") and method in GEMINI_METHODS:
        return method
    return ""


def label_of(path: str) -> str:
    """The name in the history of what is asked at a path, "" for what is not kept."""
    if path.startswith(DEPLOYMENTS + "/"):
        path = "/" + path[len(DEPLOYMENTS) + 1 :].partition("/")[2]
    return LABELS.get(path) or METHOD_LABELS.get(gemini_method(path), "")


#: what the page sends with everything it fetches to show it
PAGE_HEADER = "x-copilot-proxy-page"
#: GET of these shows how the proxy is; an open page and monitors do it again and again
LOOK_PATHS = frozenset(
    {
        "/",
        "/dashboard",
        "/health",
        "/stats",
        "/metrics",
        "/history",
        "/history/summary",
        "/history/events",
        "/approvals",
    }
)


@functools.lru_cache(maxsize=1)
def log_time(second: int) -> str:
    """The time of day as a line of the log begins."""
    return time.strftime(LOG_TIME, time.localtime(second))


class LogHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """The log of the command line.  The lines of requests come ready, several at a time: to make a
    LogRecord of each and to format it takes longer than all the rest of the accounting."""

    @staticmethod
    def line(level: int, text: str) -> str:
        """As RedactingFormatter writes it.  text: one line, redacted."""
        letter = logging.getLevelName(level)[0]
        return f"{log_time(int(time.time()))} {letter} {visible(text)}\n"

    def write_lines(self, lines: str) -> None:
        """Write ready lines; a stream that is dead or closed fails no request."""
        self.acquire()
        try:
            self.stream.write(lines)
            self.flush()
        except (OSError, ValueError):
            pass
        finally:
            self.release()


def line_handler(log: logging.Logger) -> LogHandler | None:
    """The handler that takes ready lines; None where the log is configured in another way."""
    handlers = log.handlers
    if len(handlers) != 1 or log.propagate or log.filters:
        return None
    if isinstance(handlers[0], LogHandler):
        return handlers[0]
    return None


class Notes:
    """Names of what was changed of a request, as its header and its row list them: as many as fit
    into MAX_NOTE_CHARS, then how many more there are."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.more = 0
        self._room = MAX_NOTE_CHARS - len("+1000000000 more")

    def add(self, names: set[str], more: int = 0) -> set[str]:
        """Note them -> those that are listed now and were not before.  more: how many were not
        even recorded.  The same ones may be noted again: their number does not add up."""
        fresh = set()
        for name in sorted(names - self.names):
            self._room -= len(name) + len(", ")
            if self._room < 0:
                break
            fresh.add(name)
        self.names |= fresh
        self.more = max(self.more, len(names - self.names) + more)
        return fresh

    def __str__(self) -> str:
        listed = sorted(self.names)
        if self.more:
            listed.append(f"+{self.more} more")
        return ", ".join(listed)


@dataclass
class AskedFor:
    """What the client said, and when.  label: its name in the history, '' for what is not kept
    there; agent: the client program; key: the id of the client's key, '' without one; session: a
    short name of the conversation; model: as the client wrote it, '' when it wrote none; at: unix
    time; began: monotonic; is_look: the open page or a monitor looks at the proxy."""

    method: str
    path: str
    label: str
    agent: str | None
    at: float
    began: float
    key: str = ""
    session: str | None = None
    model: str = ""
    streamed: bool = False
    is_look: bool = False

    @property
    def payer(self) -> str:
        """Whose budget it is: of the session, or of the program, but never of two keys."""
        return payer_of(self.key, self.session, self.agent)


@dataclass
class RequestRecord:
    """What is known of one request, for its row, its log line and the page.

    The endpoint that serves the request writes down what it learns, by the methods here; so does
    whoever ends the request.  route: local, passthrough or translated; model: the one that is
    asked; account: that serves; path: the upstream's; error: its kind; failure: in words; meters:
    one for each answer of the upstream; total_ms: 0 while it runs."""

    id: str
    asked: AskedFor
    route: str = "local"
    model: Model | None = None
    account: Account | None = None
    path: str = ""
    initiator: str = ""
    status: int = 0
    error: str = ""
    failure: str = ""
    sent_ms: float = 0.0
    first_byte_ms: float = 0.0
    losses: Notes = field(default_factory=Notes)
    repairs: Notes = field(default_factory=Notes)
    meters: list[Meter] = field(default_factory=list)
    upstream_id: str | None = None
    total_ms: float = 0.0

    @classmethod
    def begin(
        cls, method: str, path: str, headers: Headers, at: float
    ) -> RequestRecord:
        """A request has come in."""
        label = label_of(path) if method == "POST" else ""
        agent = printable(headers.get("user-agent", "").partition(" ")[0], 60) or None
        asked = AskedFor(method, path, label, agent, at, time.monotonic())
        by_page = headers.get(PAGE_HEADER) == "1" and not label
        asked.is_look = by_page or (method == "GET" and path in LOOK_PATHS)
        return cls(new_request_id(), asked)

    # -- what happens to it

    def serve_by(self, account: Account) -> Account:
        """This account serves it."""
        self.account = account
        return account

    def ask(self, model: Model) -> None:
        """This model is asked."""
        self.model = model

    def begin_by(self, initiator: str) -> None:
        """Known beforehand: who began it, 'user' or 'agent'."""
        self.initiator = initiator

    def name(self, key: str, session: str | None, model: str, streamed: bool) -> None:
        """Its body has been read."""
        self.asked.key = key
        self.asked.session = session
        self.asked.model = model
        self.asked.streamed = streamed

    def go_up(self, route: str, path: str, initiator: str = "") -> None:
        """It is sent to this path of the upstream."""
        self.route = route
        self.path = path
        self.initiator = initiator
        self.sent_ms = self.elapsed_ms()

    def hear(self, headers: Headers, meter: Meter) -> None:
        """The upstream answers; the meter goes on counting."""
        self.upstream_id = headers.get("x-github-request-id")
        self.meters.append(meter)

    def elapsed_ns(self) -> int:
        """Since it came in."""
        return int((time.monotonic() - self.asked.began) * NANO)

    def begin_answer(self, status: int) -> None:
        """The first bytes go to the client."""
        self.status = status
        self.first_byte_ms = self.elapsed_ms()

    def fail(self, error: ProxyError) -> None:
        """It ends with this error, whether or not the client can still be told."""
        self.failure = redact(str(error))
        self.error = error.code or error.types()[0]
        self.upstream_id = error.headers.get("x-github-request-id", self.upstream_id)

    def end_stream(self, failure: str, code: str | None) -> None:
        """The upstream's stream is over; failure: why it was cut, '' when it was not."""
        self.failure = failure
        if failure:
            self.error = code or "stream_error"

    def leave(self) -> None:
        """The client hung up before it was answered."""
        self.status = self.status or 499
        self.error = "client_left"

    def leave_stream(self) -> None:
        """The client hung up while its answer was sent."""
        self.failure = self.failure or "the client left"
        self.error = self.error or "client_left"

    def end(self) -> None:
        """It is over."""
        self.total_ms = self.elapsed_ms()

    # -- what is known

    @property
    def is_look(self) -> bool:
        """Only a look at the proxy, and it went well: nothing that the log should be full of."""
        return self.asked.is_look and self.status < 400

    def elapsed_ms(self) -> float:
        return (time.monotonic() - self.asked.began) * 1000

    def counts(self) -> dict[str, int]:
        """What the upstream told so far of tokens and nano-AIU, all its answers together."""
        if len(self.meters) == 1:
            return self.meters[0].counts
        total: collections.Counter[str] = collections.Counter()
        for meter in self.meters:
            total.update(meter.counts)
        return total

    def estimate(self) -> int | None:
        """Nano-AIU by the listed prices, each answer for itself, since tiers go by the length of
        one prompt; None when that is unknown."""
        if self.model is None:
            return None
        prices, by_auto = self.model.prices, self.model.selector != ""
        found = [
            prices.cost(meter.counts, self.asked.at, by_auto) for meter in self.meters
        ]
        known = [cost for cost in found if cost is not None]
        if known:
            return sum(known)
        return None

    def cost(self) -> int:
        """Nano-AIU so far; by the listed prices where the upstream told none, 0 when unknown."""
        counts = self.counts()
        if "nano_aiu" in counts:
            return counts["nano_aiu"]
        return self.estimate() or 0

    def row(self) -> Json:
        """This request as a row of the history."""
        asked, counts = self.asked, self.counts()

        return {
            "id": self.id,
            "at": asked.at,
            "client": asked.agent,
            "account": self.account.name if self.account else None,
            "key": asked.key or None,
            "session": asked.session,
            "dialect": asked.label,
            "path": self.path or None,
            "route": self.route,
            "asked": printable(asked.model, 100) or None,
            "model": self.model.id if self.model else None,
            "streamed": int(asked.streamed),
            "status": self.status or None,
            "error": self.error or None,
            "initiator": self.initiator or None,
            **{name: counts.get(name) for name in COUNTS},
            "estimate": self.estimate(),
            "sent_ms": self.sent_ms or None,
            "first_ms": self.first_byte_ms or None,
            "total_ms": self.total_ms or self.elapsed_ms(),
            "repairs": str(self.repairs) or None,
            "losses": str(self.losses) or None,
            "upstream_id": self.upstream_id,
        }

    def log_line(self, row: Json) -> str:
        """One line for the log.  The target's query is left out, it may hold anything."""
        asked, path = self.asked, self.asked.path
        if path.startswith("/auth/tokens/"):
            path = path[:21]  # the rest may be a whole key
        model = printable(asked.model, 60) or "-"
        if self.model is not None and asked.model not in ("", self.model.id):
            model += "->" + printable(self.model.id, 60)

        tokens = "-"
        prompt = [row[name] for name in COUNTS[:3] if row[name] is not None]
        if prompt:
            tokens = "%d+%d" % (sum(prompt), row["output"] or 0)

        parts = [
            self.id[:8],
            printable(asked.method, 20),
            printable(path, 80),
            "model=" + model,
            "route=" + self.route,
            "status=%d" % self.status,
            "first=%.0fms" % self.first_byte_ms,
            "total=%.0fms" % row["total_ms"],
            "tokens=" + tokens,
        ]
        if row["nano_aiu"] is not None:
            parts.append("credits=%.4g" % (row["nano_aiu"] / NANO))
        if self.failure:
            parts.append("error=" + printable(self.failure))
        return redact(" ".join(parts))


class Ledger:
    """What happens here, for people: counts since the start, the requests that run and the last
    that ended, the budget, the history, the quotas, and the events that tell of it.
    Thread-safe: each part guards itself, and what is plain here is changed in one step.

    running: id -> request that has begun and not ended; quotas: (account's id, lane) -> what was
    said of it last: whose it is, source, snapshot or header, unix time."""

    def __init__(
        self,
        settings: Settings,
        folder: str,
        log: logging.Logger,
        clock: Callable[[], tuple[float, float]],
    ) -> None:
        self._log, self._clock = log, clock
        if settings.no_history:
            path = ""
        else:
            path = os.path.join(folder, "history.sqlite3")

        if path and settings.demo:
            path = ":memory:"
        self.events, self.stats = Events(), Stats()
        self.history = History(path, log)
        self.budget = Budget(settings.budget, lambda: clock()[1], log, self.events.tell)
        self.running: dict[str, RequestRecord] = {}
        self._ended: collections.deque[RequestRecord] = collections.deque()
        self._lines: list[str] = []  # of the log, not written yet
        self.recent: collections.deque[Json] = collections.deque(maxlen=RECENT)
        self.quotas: dict[tuple[str, str], tuple[Account, str, Any, float]] = {}

    # -- requests

    def begin(self, record: RequestRecord) -> None:
        """A request has come in."""
        self.running[record.id] = record

    def show_running(self, record: RequestRecord) -> None:
        """To the page: a request goes up, or its first byte has come."""
        if record.asked.label and self.events.readers:
            self.events.tell("request", dict(shown(record.row()), state="running"))

    def end(self, record: RequestRecord) -> None:
        """A request has ended; it is recorded by `settle`, which may be called a moment later.
        At once where a budget could be passed meanwhile."""
        record.end()
        self._ended.append(record)
        if record.account is not None:
            for meter in record.meters:
                if meter.quotas:
                    self.see_quotas(record.account, "stream", meter.quotas)
        if self.budget.is_set:
            self.settle()

    def settle(self) -> None:
        """Record the requests that have ended; called before anybody looks."""
        while self._ended:
            record = self._ended.popleft()
            _, error = outcome(self.record, record)
            if error is not None:
                self._log.error("%s could not be counted", record.id, exc_info=error)

        lines, self._lines = self._lines, []
        handler = line_handler(self._log)
        if lines and handler is not None:
            handler.write_lines("".join(lines))

    def record(self, record: RequestRecord) -> None:
        """A request has ended: into the counts, the history, the log, to the page."""
        self.running.pop(record.id, None)
        row, account = record.row(), record.account
        group = "looks" if record.is_look else "requests"
        told: dict[str, dict[Any, int]] = {
            group: {(record.route, str(record.status)): 1}
        }
        if record.asked.label:
            told.update(self._record_row(row, redact(record.failure)))
        for stats in [self.stats, account.stats] if account else [self.stats]:
            stats.count(told)

        level = logging.INFO
        if record.is_look:
            level = logging.DEBUG
        if self._log.isEnabledFor(level):
            self._log_request(level, record, row)

    def _log_request(self, level: int, record: RequestRecord, row: Json) -> None:
        log, text = self._log, record.log_line(row)
        if line_handler(log) is not None:
            self._lines.append(LogHandler.line(level, text))
            return
        # as log.info would, but without its search for the caller's line in each request
        extra = {"row": row}
        log.handle(log.makeRecord(log.name, level, "", 0, text, (), None, extra=extra))

    def _record_row(self, row: Json, message: str) -> dict[str, dict[Any, int]]:
        """-> what it adds to the counts."""
        counts = {name: row[name] for name in COUNTS if row[name] is not None}
        tokens = {(row["model"], name): number for name, number in counts.items()}
        compared: dict[Any, int] = {}
        if row["nano_aiu"] is not None and row["estimate"] is not None:
            compared = {
                (row["model"], "requests"): 1,
                (row["model"], "reported"): row["nano_aiu"],
                (row["model"], "estimated"): row["estimate"],
            }
        if row["nano_aiu"] is None and row["estimate"] is not None:
            counts["estimate"] = row["estimate"]
        errors = int(row["error"] not in (None, "client_left") and row["status"] != 404)

        self.budget.spend(row)
        self.history.put(row)
        row["message"] = message or None  # not among the columns
        self.recent.appendleft(row)
        if self.events.readers:
            self.events.tell("request", shown(row))
        return {
            "tokens": tokens,
            "totals": dict(counts, requests=1, errors=errors),
            "compared": compared,
        }

    def note_changes(
        self, record: RequestRecord, losses: Losses, repairs: Iterable[str]
    ) -> Headers:
        """What did not go upstream, and what was repaired -> headers that tell what is new."""
        headers: Headers = {}
        if not losses and not repairs:
            return headers
        names = {name for name, _ in losses}
        for group, notes, found, more in (
            ("lossy", record.losses, names, losses.more),
            ("repaired", record.repairs, set(repairs), 0),
        ):
            before = str(notes)
            fresh = notes.add(found, more)

            if str(notes) != before:
                headers["x-copilot-proxy-" + group] = str(notes)
                words = ["%s (%s)" % loss for loss in losses] or sorted(repairs)
                self._log.debug(
                    "%s %s: %s",
                    record.id,
                    group,
                    printable(", ".join(words), MAX_LOGGED_CHARS),
                )
                self.stats.count({group: dict.fromkeys(fresh, 1)})

        return headers

    # -- quotas

    def see_quotas(
        self, account: Account, source: str, told: Mapping[str, Any]
    ) -> None:
        """Keep what was said last of some lanes; it is looked into when somebody asks.  Room in
        them may end a rest of the account."""
        for name, said in told.items():
            if (account.id, name) in self.quotas or len(self.quotas) < MAX_NAMES:
                self.quotas[account.id, name] = account, source, said, self._clock()[1]
        for scope in account.limits.see(told, source):
            self._log.info("the limit of %s is over: the account has room again", scope)
        if told and self.events.readers:
            self.events.tell("quota", {"lanes": self.lanes(account.id)})

    def lanes(self, wanted: str = "") -> list[Json]:
        """Every lane of every account, or of one by its id, as told last."""
        return [
            dict(
                quota_lane(name, said), account=account.name, source=source, seen_at=at
            )
            for (owner, name), (account, source, said, at) in list(self.quotas.items())
            if wanted in ("", owner)
        ]

    def history_state(self) -> Json:
        """Is there a history, and what is wrong with it."""
        return {
            "enabled": bool(self.history.path),
            "problem": self.history.problem or None,
            "dropped": self.history.dropped,
        }


@dataclass
class Ticket:
    """A request's way through all limits; only Admission changes it.  who: the key's id, or the
    address; payer: whose budget it is; wish: the header that limits that budget; about: for the
    person who approves."""

    who: str
    payer: str
    wish: str | None
    account: Account
    about: Json
    has_slot: bool = False  # of --max-concurrency
    is_admitted: bool = False  # by all


class Admission:
    """When a request may go up: budget, requests per minute, slots, rate, a person's approval.
    A person is asked once for a request, which has one slot; budget and rates hold for each call
    that it takes upstream: one for each prompt of a completion, for each batch of embeddings.  A
    call that is repeated, since the upstream refused it, is no further one."""

    def __init__(
        self,
        settings: Settings,
        log: logging.Logger,
        budget: Budget,
        tell: Callable[[str, Any], None],
    ) -> None:
        self._budget = budget
        self._minute = MinuteLimiter(settings.requests_per_minute)
        self._minute_text = (
            "%d requests of a key are allowed in a minute here "
            "(--requests-per-minute)" % settings.requests_per_minute
        )
        self.gate = Gate(settings.max_concurrency)
        self.approval = Approval(settings.manual, log, tell)

    async def admit(self, ticket: Ticket, calls: int = 1) -> Headers:
        """Returns when the request may go up -> headers for its answer; `leave` must follow, also
        after an exception.  calls: how many it takes, each further one by `admit_next`.  Raises
        RateLimited, BadRequest."""
        await self._budget.admit(ticket.payer, ticket.wish)
        ticket.account.limiter.check(calls)
        headers = self._minute.admit(ticket.who, self._minute_text, calls)
        if not ticket.has_slot:
            ticket.has_slot = await self.gate.enter(ticket.who)
        await ticket.account.limiter.admit()
        await self.approval.ask(account=ticket.account.name, **ticket.about)
        ticket.is_admitted = True
        return headers

    async def admit_next(self, ticket: Ticket, spent: int) -> None:
        """Returns when the request's next call may go up.  spent: nano-AIU, by those before.
        Raises RateLimited."""
        await self._budget.admit(ticket.payer, ticket.wish, spent)
        await ticket.account.limiter.admit(is_begun=True)

    def leave(self, ticket: Ticket | None) -> None:
        """The request is over; may be called twice, and without a ticket."""
        if ticket is not None and ticket.has_slot:
            ticket.has_slot = False
            self.gate.leave()


@dataclass(frozen=True)
class Caller:
    """Who sends a request.  account: None is the default one; key_id: the beginning of the key's
    hash, '' without one; is_operator: may see and change what belongs to others; address: of the
    client itself, behind a trusted proxy, too."""

    address: str = ""
    is_admitted: bool = False
    is_operator: bool = False
    key_id: str = ""
    account: Account | None = None

    @property
    def name(self) -> str:
        """For limits: whose requests are counted together."""
        return self.key_id or self.address


@dataclass(frozen=True)
class BrowserLogin:
    """A login that a browser began.  began: monotonic; gives_key: may its claim get a key?"""

    began: float
    login: DeviceLogin
    gives_key: bool


_GITHUB_KEY = re.compile(r"gh[ou]_[A-Za-z0-9_]{1,255}")


class DefaultLogin:
    """The login that serves whoever brings none of his own.

    account: None while nobody is logged in; device: the login that is under way or was the last;
    file: where the login is stored; announce: told of each code, may be replaced.
    `_lock` guards all fields and is held for no I/O."""

    def __init__(self, services: Services, file: LoginFile) -> None:
        self._services, self._log, self.file = services, services.log, file
        self.account: Account | None = None
        self.device: DeviceLogin | None = None
        self.announce: Callable[[DeviceCode], None] = self._log_code
        self._account_stop = threading.Event()
        #: tokens that GitHub does not know any more; tried again while no other login serves
        self._refused: list[str] = []
        self._retry: threading.Thread | None = None
        self._lock = threading.Lock()

    def _log_code(self, code: DeviceCode) -> None:
        self._log.warning(
            "login needed: open %s and enter the code %s",
            code.verification_uri,
            code.user_code,
        )

    async def copilot(self) -> Account:
        """The account.  Raises AuthError with the code to enter while there is none."""
        account = self.account
        if account is not None:
            return account
        stored = self.load()  # another process may have logged in
        if stored:
            return self.use(stored)
        self.begin()
        raise AuthError(await self.hint(), code="login_required")

    def load(self) -> str:
        """The GitHub token to use: the given one, else the stored one, else ''.
        Never one that GitHub has refused.  A login file that cannot be read is told in the log."""
        given = self._services.settings.github_token
        if given and given not in self._refused:
            return given
        try:
            stored = self.file.load()
        except ConfigError as error:
            self._log.error("%s", error)
            return ""
        if stored in self._refused:
            return ""
        return stored

    def use(self, github_token: str) -> Account:
        """Serve with this login from now on."""
        account = Account(self._services, github_token, self._replace)
        stop = threading.Event()
        with self._lock:
            self._account_stop.set()
            if self.device is not None:
                self.device.stop.set()  # another way was quicker
            self.account, self._account_stop, self.device = account, stop, None
            self._refused = [token for token in self._refused if token != github_token]
        threading.Thread(
            target=account.keep_fresh, args=(stop,), name="copilot-token", daemon=True
        ).start()
        return account

    def begin(self) -> None:
        """Start a login by device flow in its own thread, unless one is running."""
        services = self._services
        with self._lock:
            if (
                self.device is not None
                and not self.device.problem
                or services.stop.is_set()
            ):
                return
            device = self.device = DeviceLogin(
                services.github,
                services.settings.poll_margin_s,
                threading.Event(),
                lambda code: self.announce(code),
            )
        device.start(self._keep, self._log)

    def _keep(self, token: str) -> None:
        try:
            self.file.save(token)
        except ConfigError as error:
            self._log.error("the login works, but only until the end: %s", error)
        self.use(token)
        self._log.warning("logged in")

    async def hint(self) -> str:
        """What to do to be logged in; waits a moment for the code of a login just begun."""
        device, deadline = self.device, time.monotonic() + CODE_WAIT_S
        while (
            device is not None
            and not device.ready.is_set()
            and time.monotonic() < deadline
        ):
            await wait(Pause(CODE_LOOK_S))
        code = device.code if device else None
        if code:
            return (
                "login required: open %s and enter the code %s, or run: copilot_proxy.py auth"
                % (code.verification_uri, code.user_code)
            )
        if device and device.problem:
            return "login required; the last try failed: %s" % device.problem
        return "login required: open /auth/device on this server, or run: copilot_proxy.py auth"

    # -- a login that GitHub refuses

    async def _replace(self, account: Account, error: AuthError) -> AuthError:
        """GitHub has refused this account's login: a newer one is taken from the file, else a
        person is asked -> what to raise."""
        with self._lock:
            is_news = self.account is account
            if is_news:
                self._refused.append(account.github_token)  # kept on disk
                self.account = None
                self._account_stop.set()
        if is_news:
            stored = self.load()
            if stored:
                self.use(stored)
            else:
                self._log.error("GitHub refuses the login: a new one is needed")
                self.begin()
                self._start_retry()
        return AuthError("%s (%s)" % (error, await self.hint()), code="login_required")

    def _start_retry(self) -> None:
        with self._lock:
            if self._retry is None:
                self._retry = threading.Thread(
                    target=self._retry_refused, name="login-retry", daemon=True
                )
                self._retry.start()

    def _retry_refused(self) -> None:
        """Thread: GitHub may have been wrong, or the account was only suspended."""
        services = self._services
        while not services.stop.wait(LOGIN_RETRY_S):
            for token in list(self._refused):
                with contextlib.suppress(ProxyError):
                    run(services.github.fetch_copilot_token(token))
                    if self.account is None:
                        self.use(token)
                        self._log.warning("the login that GitHub refused works again")
            with self._lock:
                if self.account is not None:
                    self._retry = None
                    return

    def close(self) -> None:
        """Stop the threads."""
        self._account_stop.set()
        if self.device is not None:
            self.device.stop.set()


async def own_login_refused(account: Account, error: AuthError) -> AuthError:
    """For an account that a key or a token stands for: its owner must act."""
    return AuthError("%s (log in again at /auth/device)" % error, code="login_required")


class Accounts:
    """Who calls, and as which account: the keys, the accounts that keys and GitHub tokens stand
    for, the logins that browsers begin.  The default one is `login`'s.
    `_lock` guards all fields and is held for no I/O."""

    def __init__(self, services: Services, keys: KeyFile, login: DefaultLogin) -> None:
        self._services, self._log = services, services.log
        self.keys, self._login = keys, login
        self.wrong_keys = MinuteLimiter(WRONG_KEYS_PER_MINUTE)
        #: by the hash of their token, the most recently used last
        self._accounts: collections.OrderedDict[str, Account] = (
            collections.OrderedDict()
        )
        #: by the hash of the browser's state token
        self._logins: dict[str, BrowserLogin] = {}
        self._lock = threading.Lock()

    def identify(self, headers: Headers, address: str) -> Caller:
        """Who sends these headers; anybody is the operator where no key is wanted.  Raises
        AuthError for a missing or wrong key, RateLimited for one address' many wrong ones."""
        keys, offered = (
            self.keys.all(),
            [headers[name] for name in KEY_HEADERS if name in headers],
        )
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            offered.append(bearer.strip())
        if keys:
            found = [key for key in map(self.keys.find, offered) if key]
        else:
            found = []
        if not found and (
            self.keys.is_closed or any(text.startswith(KEY_PREFIX) for text in offered)
        ):
            if any(offered):
                self.wrong_keys.admit(
                    address, "too many wrong keys came from this address"
                )

            raise AuthError(
                "%s: send it as Authorization: Bearer KEY or x-api-key: KEY"
                % (
                    "this key is not known here"
                    if any(offered)
                    else "this server wants an API key"
                ),
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )

        issued = next((key for key in found if key.token), None)
        if issued:
            token = issued.token
        else:
            token = next(filter(_GITHUB_KEY.fullmatch, offered), "")
        if not token:
            return Caller(address, True, True, found[0].id if found else "")
        account = self.of_token(token, issued.login if issued else "")
        is_operator = any(not key.token for key in found)
        if found:
            key_id = (issued or found[0]).id
        else:
            key_id = account.id
        return Caller(address, True, is_operator, key_id, account)

    def of_token(self, github_token: str, name: str = "") -> Account:
        """The account of a token; beyond MAX_ACCOUNTS the least recently used one is forgotten."""
        key = stable_id("", github_token)
        with self._lock:
            account = self._accounts.pop(key, None) or Account(
                self._services, github_token, own_login_refused, name
            )
            self._accounts[key] = account
            if len(self._accounts) > MAX_ACCOUNTS:
                self._accounts.popitem(last=False)
            return account

    def all(self) -> list[Account]:
        """All that are in memory, the default one first."""
        with self._lock:
            others = list(self._accounts.values())
        default = self._login.account
        if default:
            return [default, *others]
        return others

    # -- logins that browsers begin: each belongs to the one that knows its state token

    def open_login(self, by_key: bool) -> tuple[str, DeviceLogin]:
        """(state token, login): the default account's own while nobody is logged in, so that all
        works then; else one of another account.  by_key: the operator's key is behind this.
        Without it the default login, which another person may grant, yields no key.
        Raises RateLimited."""
        now, state = time.monotonic(), secrets.token_urlsafe(32)
        services, is_default = self._services, self._login.account is None
        if is_default:
            self._login.begin()
        with self._lock:
            self._logins = {
                key: old
                for key, old in self._logins.items()
                if not old.login.problem and now - old.began < LOGIN_AGE_S
            }

            login = self._login.device if is_default else None

            if login is not None and len(self._logins) >= MAX_LOGINS:
                del self._logins[
                    next(iter(self._logins))
                ]  # they all wait for the same one
            elif len(self._logins) >= MAX_LOGINS:
                raise too_early("%d logins are under way" % MAX_LOGINS, 60)

            gives_key = by_key or login is None
            if login is None:
                login = DeviceLogin(
                    services.github,
                    services.settings.poll_margin_s,
                    services.stop,
                    lambda code: None,
                    renews=False,
                )
                login.start(self._check_seat, services.log)

            self._logins[stable_id("", state)] = BrowserLogin(now, login, gives_key)

        login.ready.wait(GITHUB_TIMEOUT_S)
        return state, login

    def _check_seat(self, token: str) -> None:
        """Raises AuthError for a login without Copilot."""
        run(self._services.github.fetch_copilot_token(token))

    def find_login(self, state: str) -> BrowserLogin:
        """Raises BadRequest 403."""
        with self._lock:
            begun = self._logins.get(stable_id("", state))
        if begun is None or time.monotonic() - begun.began > LOGIN_AGE_S:
            raise BadRequest(
                "this login was begun by another browser, or is over: start again",
                403,
                "unknown_login",
            )
        return begun

    def claim_login(self, state: str) -> Json:
        """The key of a granted login, this once; None where it yields none.
        Raises BadRequest 403, 409, ConfigError."""
        begun, key, text = self.find_login(state), stable_id("", state), new_key()
        login = begun.login
        if not login.token:
            raise BadRequest("nobody has granted this login yet", 409, "login_pending")
        if not begun.gives_key:
            name = run(self._services.github.fetch_login(login.token))
            return {"login": name or None, "key": None, "key_id": None}

        with self._lock:
            entry = self._logins.pop(key, None)
        if entry is None:
            raise BadRequest(
                "this login's key has been handed out", 403, "unknown_login"
            )

        try:
            name = run(self._services.github.fetch_login(login.token))
            made = self.issue_key(text, name, login.token)
        except ProxyError:
            with self._lock:
                self._logins[key] = entry
            raise

        return {"login": made.login or None, "key": text, "key_id": made.id}

    # -- keys

    def issue_key(self, text: str, login: str = "", token: str = "") -> Key:
        """Store a new key; the log tells its id.  Raises ConfigError, BadRequest 409."""
        made = self.keys.add(text, login, token)
        if token:
            owner = printable(login or "an account", 60)
        else:
            owner = "the operator"
        self._log.info("key %s was issued to %s", made.id, owner)
        return made

    def log_keys(self) -> None:
        """At the start: who holds a key of this server's making.  Raises ConfigError."""
        stored = [key for key in self.keys.all() if key.made]

        for key in stored[:KEYS_LISTED]:
            if key.token:
                owner = printable(key.login or "an account", 60)
            else:
                owner = "the operator"
            self._log.info(
                "key %s of %s is good here, made %s (auth --logout %s ends it)",
                key.id,
                owner,
                local_time(key.made),
                key.id,
            )

        if len(stored) > KEYS_LISTED:
            self._log.info(
                "%d more keys are good here: auth --list", len(stored) - KEYS_LISTED
            )

    def forget(self, keys: list[Key]) -> None:
        """Delete keys; accounts without one are let go of.  Raises ConfigError."""
        self.keys.delete([key.id for key in keys])
        left = {key.token for key in self.keys.all()}
        with self._lock:
            for key in keys:
                if key.token not in left:
                    self._accounts.pop(stable_id("", key.token), None)


class App:
    """Everything one server needs, each by its owner.  Two can live in a process.
    sessions: a caller's conversation -> the model that was asked for last."""

    def __init__(
        self,
        settings: Settings,
        environ: Mapping[str, str] | None = None,
        clock: Callable[[], tuple[float, float]] = read_clock,
        log: logging.Logger | None = None,
    ) -> None:
        self.settings, self.clock = settings, clock
        self.environ: Mapping[str, str] = os.environ
        if environ is not None:
            self.environ = environ
        self.log = log or logging.getLogger("copilot_proxy")
        self.stop = threading.Event()
        self.started = time.time()
        self.upstream = Upstream(settings, self.environ)
        self.github = GitHub(settings, self.upstream, clock)

        folder = settings.data_dir or default_data_dir(self.environ)
        self.ledger = Ledger(settings, folder, self.log, clock)
        self.admission = Admission(
            settings, self.log, self.ledger.budget, self.ledger.events.tell
        )
        services = Services(
            settings,
            self.log,
            clock,
            self.upstream,
            self.github,
            self.ledger,
            self.stop,
        )
        self.login = DefaultLogin(services, LoginFile(folder, settings.github_url))
        host = urllib.parse.urlsplit(settings.github_url).netloc.lower()
        keys = KeyFile(
            os.path.join(folder, "proxy_accounts.json"), host, settings.api_key
        )
        self.accounts = Accounts(services, keys, self.login)

        if settings.log_bodies:
            self.log.warning(
                "--log-bodies: EVERY WORD of requests and answers is written to %s",
                settings.log_bodies,
            )
        self.store = ResponseStore()
        self.images = ImageFetcher(self.upstream.tls_context)
        self.sessions: collections.OrderedDict[str, str] = collections.OrderedDict()

    def close(self) -> None:
        """Stop the threads and close the pool."""
        self.stop.set()
        self.login.close()
        self.upstream.pool.close()
        self.ledger.settle()
        self.ledger.history.close()


# ==== 18. HTTP server =============================================================================
# One loop drives each connection as a coroutine: it reads requests, calls their endpoints, sends
# their answers on.  Threads do only what may block, so that a thousand streams and idle clients
# hold none.  Every error is rendered here and nowhere else.

PLAIN_HTTP_REFUSAL = (
    render_head(
        "HTTP/1.1 400 Bad Request",
        (("Content-Type", "text/plain"), ("Connection", "close")),
    )
    + b"this port speaks https only\n"
)

PROBE = b"HTTP/1.1 "  # how every answer begins


def bare_address(name: Any) -> str:
    """('::ffff:10.0.0.1', 80, 0, 0) -> '10.0.0.1'."""
    if isinstance(name, tuple):
        return str(name[0]).replace("::ffff:", "")
    return ""


def make_server_context(settings: Settings) -> Any:
    """For --tls-cert and --tls-key.  Raises ConfigError."""
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key or None, lambda: "")
    except OSError as error:
        raise ConfigError(
            "--tls-cert, --tls-key: cannot use them (%s): PEM files are wanted, the "
            "certificate chain and its key without a password" % plain_reason(error)
        ) from None
    return context


class News(Wait):
    """Until a client has sent something, has hung up, or has taken what was sent to it."""

    def __init__(self, client: ClientConnection, timeout_s: float) -> None:
        self._client, self.timeout_s = client, timeout_s

    def begin(self, loop: Any, task: Any) -> None:
        self._client.expect(self, task)


class ClientConnection(Connection):
    """One connection from a client.

    Its coroutine (Server.serve) reads a request, answers it, and reads the next.  Meanwhile the
    loop reads ahead and writes what the client did not take at once, so that a client that leaves
    is noticed in whatever its request waits for: ClientGone is thrown into the coroutine.

    A client that only stops sending (shutdown of one direction) still gets its answer.  TCP does
    not tell it from one that has closed, so something harmless is sent to it at once: whoever has
    closed answers with a reset.  That is a keep-alive of the stream, or before the answer its
    first bytes, which are always the same (PROBE).  Over TLS the end of sending is the end.

    ahead: read, but not used yet; out: to be sent, not taken yet."""

    def __init__(
        self,
        sock: Any,
        address: Any,
        settings: Settings,
        loop: EventLoop,
        on_close: Callable[[ClientConnection], None],
    ) -> None:
        self.sock, self.settings, self.loop, self._on_close = (
            sock,
            settings,
            loop,
            on_close,
        )

        self.address = bare_address(address)
        self.task: Any = None  # the loop's, that runs its coroutine
        self.ahead = b""
        self.out = bytearray()
        self.exchange: Exchange | None = None  # the request that is being answered
        self.is_idle = True  # it waits for a request
        self.is_used = False  # it has had one
        self.at_end = False  # the client sends no more
        self.sent_at = time.monotonic()  # when the client took something last
        self._news: tuple[News, Any] | None = None

    @property
    def is_full(self) -> bool:
        """Is so much read ahead that it is not read any more?"""
        return len(self.ahead) > MAX_HEAD_BYTES

    @property
    def is_slow(self) -> bool:
        """Has so much not been taken that nothing more is to be sent?"""
        return len(self.out) > MAX_OUT_BYTES

    @property
    def has_head(self) -> bool:
        """Is there a whole request head, or something that can never become one?"""
        if self.ahead[:1] in (b"\r", b"\n"):
            self.ahead = self.ahead.lstrip(b"\r\n")  # some clients send one too many
        return b"\r\n\r\n" in self.ahead or b"\n\n" in self.ahead or self.is_full

    # -- what the loop reports

    def on_event(self, mask: int) -> None:
        """Read ahead, send on; then whoever waits for news looks at it."""
        if mask & selectors.EVENT_WRITE and self.out:
            self._flush()
        if mask & selectors.EVENT_READ and self.sock is not None:
            self.fill()
        self._watch()

        if self._news is not None:
            (what, task), self._news = self._news, None
            self.loop.resume(task, what, True)

    def expect(self, what: News, task: Any) -> None:
        """The coroutine waits for news."""
        self._news = what, task
        self._watch()

    def _watch(self) -> None:
        """Tell the selector what matters now."""
        if self.sock is None:
            return
        events = 0
        if not (self.at_end or self.is_full):
            events |= selectors.EVENT_READ
        if self.out:
            events |= selectors.EVENT_WRITE
        self.loop.watch(self, events)

    def fill(self) -> None:
        """Read ahead what is there now."""
        try:
            if self.is_full:
                data = None
            else:
                data = receive_now(self.sock)
        except (OSError, ValueError):
            self.at_end = True
            self.leave()
            return

        if data:
            if self.ahead:
                self.ahead = self.ahead + data
            else:
                self.ahead = data
        elif data is not None:
            self.at_end = True
            if self._news is None and not self.still_reads():
                self.leave()

    def still_reads(self) -> bool:
        """Does it wait for its answer, though it may have stopped sending?"""
        if not self.at_end or self.exchange is None:
            return True
        if hasattr(self.sock, "unwrap"):
            return False
        try:
            if not self.out:  # else what is sent next will tell
                self.exchange.probe()
        except ClientGone:
            return False
        return not self._is_reset()

    def _is_reset(self) -> bool:
        return bool(self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))

    def _flush(self) -> None:
        try:
            sent = send_now(self.sock, self.out)
        except OSError:
            self.at_end = True
            self.leave()
            return
        if sent:
            self.sent_at = time.monotonic()
            del self.out[:sent]

    def on_tick(self, now: float) -> None:
        """What depends on time, while a request is being answered."""
        exchange = self.exchange
        if self.out:
            if now - self.sent_at >= SEND_TIMEOUT_S:
                self.leave()
        elif self.at_end and exchange is not None and self._is_reset():
            self.leave()
        elif exchange is not None and now - self.sent_at >= self.settings.keepalive_s:
            try:
                exchange.ping()
            except ClientGone:
                self.leave()

    def leave(self) -> None:
        """The client has gone: its coroutine is told."""
        self.out.clear()
        self.loop.cancel(self.task, ClientGone())

    # -- what its coroutine does

    def send(self, data: bytes) -> None:
        """Send what the client takes now, the rest as soon as it can.  Raises ClientGone."""
        if not self.out:
            try:
                sent = send_now(self.sock, data)
            except (OSError, ValueError):
                raise ClientGone from None
            self.sent_at = time.monotonic()
            if sent == len(data):
                return
            data = data[sent:]
        self.out += data
        self._watch()

    async def room(self) -> None:
        """Return when the client has taken most of what was sent: so a slow one stops its own
        upstream.  Raises ClientGone when it takes nothing for SEND_TIMEOUT_S."""
        while self.is_slow:
            await wait(News(self, math.inf))

    async def flushed(self) -> None:
        """Return when the client has taken all.  Raises ClientGone."""
        while self.out:
            await wait(News(self, math.inf))

    async def begin_tls(self, context: Any) -> None:
        """The server's side of the handshake.  Raises OSError."""
        deadline = time.monotonic() + HANDSHAKE_S
        if not await wait(Ready(self, timeout_s=HANDSHAKE_S)):
            raise socket.timeout("timed out")
        # not before the first byte: it takes memory
        self.sock = context.wrap_socket(
            self.sock, server_side=True, do_handshake_on_connect=False
        )
        try:
            await self.shake_hands(deadline)
        except OSError as error:
            if getattr(error, "reason", "") == "HTTP_REQUEST":
                with contextlib.suppress(OSError):
                    socket.socket.send(self.sock, PLAIN_HTTP_REFUSAL)
            raise

    async def read_head(self) -> bytes:
        """The next request's head without its empty line, b"" when there will be none.
        Raises BadRequest, also for half a head that came too slowly."""
        self.is_idle = True
        deadline = time.monotonic() + self.settings.idle_client_s
        has_begun = False
        while not self.has_head:
            if self.ahead and not has_begun:
                has_begun = True
                deadline = time.monotonic() + self.settings.head_timeout_s
            if self.at_end or not await wait(News(self, deadline - time.monotonic())):
                if not self.ahead:
                    return b""
                raise BadRequest("the request head came too slowly or not whole", 408)

        self.is_idle, self.is_used = False, True
        return self._take_head()

    def _take_head(self) -> bytes:
        end = self.ahead.find(b"\r\n\r\n")
        if end > MAX_HEAD_BYTES or end < 0 and self.is_full:
            raise BadRequest(
                f"the request head is larger than {MAX_HEAD_BYTES} bytes", 431
            )
        if end < 0:
            raise BadRequest("line ends of the head must be CR LF")
        raw, self.ahead = self.ahead[:end], self.ahead[end + 4 :]
        return raw

    async def read_body(self, length: int, chunked: bool) -> bytes:
        """Raises BadRequest (400, 408, 413), ClientGone when it ends in the middle."""
        decoder = BodyDecoder(length, chunked)
        parts: list[bytes] = []
        size, began = 0, time.monotonic()
        while True:
            data, self.ahead = self.ahead, b""
            parts.append(decoder.feed(data))
            size += len(parts[-1])
            if size > MAX_BODY_BYTES:
                raise BadRequest(f"the body is larger than {MAX_BODY_BYTES} bytes", 413)
            if decoder.done:
                self.ahead = decoder.rest
                if len(parts) == 1:
                    return parts[0]
                return b"".join(parts)

            if self.at_end:
                raise ClientGone
            late = began + self.settings.body_stall_s + size / BODY_BYTES_PER_S
            pause = min(self.settings.body_stall_s, late - time.monotonic())
            if not await wait(News(self, pause)):
                raise BadRequest("the request body came too slowly", 408)

    async def linger(self) -> None:
        """After a refusal: read on for a moment, else the client sees a reset, not the reason."""
        await self.flushed()
        deadline, size = time.monotonic() + LINGER_S, 0
        with contextlib.suppress(OSError):
            self._end_tls()
            socket.socket.shutdown(
                self.sock, socket.SHUT_WR
            )  # TLS has one that ends it, too
        while not self.at_end and size < 4 * MAX_BODY_BYTES:
            size += len(self.ahead)
            self.ahead = b""
            if not await wait(News(self, deadline - time.monotonic())):
                break

    def _end_tls(self) -> None:
        """Tell the other side that nothing was cut off."""
        if hasattr(self.sock, "unwrap"):
            with contextlib.suppress(OSError, ValueError):
                self.sock.unwrap()

    def close(self) -> None:
        """Let go of the socket; may be called twice."""
        if self.sock is None:
            return
        self._on_close(self)
        self._end_tls()
        self.unwatch()
        sock, self.sock = self.sock, None
        with contextlib.suppress(OSError):
            sock.close()


async def drain(answer: UpstreamResponse) -> None:
    """The last chunk behind a terminal event, for DRAIN_S: then the connection can be kept.  Its
    client does not wait for that."""
    deadline = time.monotonic() + DRAIN_S
    try:
        while not answer.done and time.monotonic() < deadline:
            await answer.read(deadline - time.monotonic())
    except UpstreamError:
        pass
    finally:
        answer.finish()


class Exchange:
    """One request and its answer.
    `reply` and `fail` send a whole answer.  A stream is announced with `expect_stream`; then either
    `relay` sends an upstream's answer on, or `write` and `finish` send one that is made here.  Its
    head goes out together with its first bytes.

    It knows bytes, head and answer, but no model and no account: those are in `record`.  The
    Handler sets caller, is_same_origin, argument, body and keep_alive before the endpoint runs;
    the endpoint may set ticket, keepalive and keep_alive, and the rest by methods.  Nobody else
    sets anything."""

    def __init__(self, client: ClientConnection, head: RequestHead, app: App) -> None:
        self.client, self.head, self.app = client, head, app
        self.path = normalise_path(split_target(head.target)[1].partition("?")[0])
        self.record = RequestRecord.begin(
            head.method, self.path, head.headers, app.clock()[1]
        )
        self.argument = ""  # what a route with a pattern matched
        self.is_same_origin = True  # no page of another origin has sent it
        self.caller = Caller(client.address)
        self.ticket: Ticket | None = None  # once it wants to go up
        self.dialect = dialect_of(self.path)
        self.body = b""
        self.headers: Headers = {}  # to be added to the answer
        self.keep_alive = head.keep_alive
        self._is_probed = False  # PROBE is sent: the head goes on behind it
        self.keepalive = b""

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def is_chunked(self) -> bool:
        """Can the client be sent chunks?"""
        return self.head.minor == 1

    @property
    def started(self) -> bool:
        """Has a byte of the answer gone out?"""
        return self.record.status != 0

    # -- the request

    def answer_in(self, dialect: Dialect) -> None:
        """Errors, too, are told in this dialect from here on."""
        self.dialect = dialect

    def put_body(self, body: bytes) -> None:
        """What the endpoint makes of the body; nothing, when nobody needs it any more."""
        self.body = body

    async def read_json(self) -> Json:
        """The same; a large body is parsed in a thread, since streams would stand still."""
        if len(self.body) <= INLINE_BYTES:
            return self.json_object()
        return await wait(InThread(self.json_object))  # type: ignore[no-any-return]

    def json_object(self) -> Json:
        """The body.  Raises BadRequest."""
        text = valid_text(self.body)
        if text is not self.body:
            self.body = text
            losses = Losses()
            losses.add("text", "half of a character became U+FFFD")
            self.headers.update(self.app.ledger.note_changes(self.record, losses, ()))
        try:
            value = loads(self.body)
        except TooManyValues as error:
            raise BadRequest(f"the body is too large: {error}", 413) from None
        except ValueError as error:
            raise BadRequest(
                f"the body is not valid JSON: {printable(str(error))}"
            ) from None
        if not isinstance(value, dict):
            raise BadRequest("the body must be a JSON object")
        return value

    def parameter(self, name: str) -> str | None:
        """A value of the query string."""
        query = split_target(self.head.target)[1].partition("?")[2]
        found = urllib.parse.parse_qs(query, keep_blank_values=True).get(name)
        if found:
            return found[-1]
        return None

    # -- a whole answer

    def reply(
        self, body: bytes, status: int = 200, kind: str = "application/json"
    ) -> None:
        """Send a whole answer.  Raises ClientGone."""
        if status == 204:
            length = []
        else:
            length = [("Content-Length", str(len(body)))]

        cost = self.record.counts().get("nano_aiu")
        if cost is not None:
            length.append(("x-copilot-proxy-credits", "%d.%09d" % divmod(cost, NANO)))
        head = self._head(status, kind, length)
        self.log_body("answer", body)
        if self.head.method == "HEAD":
            body = b""
        if len(body) > READ_BYTES:  # without a copy of what is large
            self._send(head)
            self._send(body)
        else:
            self._send(head + body)

    def reply_json(self, value: Any, status: int = 200) -> None:
        self.reply(dumps(value), status)

    def fail(self, error: ProxyError) -> None:
        """Render the error in the dialect of the route."""
        self.record.fail(error)
        error.args = (self.record.failure,)
        self.headers.update(error.headers)
        self.reply_json(self.dialect.error_body(error, self.id), error.status)

    def refuse(self, error: ProxyError) -> None:
        """Tell the client, or where its answer has begun only note it.  Raises ClientGone."""
        if self.started:
            self.record.fail(error)
            self.keep_alive = False
        else:
            self.fail(error)

    def client_left(self) -> None:
        """Nobody waits for the answer any more."""
        self.keep_alive = False
        if self.started:
            self.record.leave_stream()
        else:
            self.record.leave()

    # -- a streamed answer

    def expect_stream(self, keepalive: bytes) -> None:
        """From now on silence is filled with keep-alives, the first of which commits to 200."""
        self.keepalive = keepalive
        self.keep_alive = self.keep_alive and self.is_chunked
        self.client.sent_at = time.monotonic()

    def expect_whole(self) -> None:
        """No keep-alive before a whole answer."""
        self.keepalive = b""

    def ping(self) -> None:
        """A keep-alive, where a stream is expected.  Raises ClientGone."""
        if self.keepalive:
            self.write(self.keepalive)

    def probe(self) -> None:
        """Send something that may be sent now in any case, only to see whether the client still
        reads.  Raises ClientGone."""
        if self.started:
            self.ping()
        elif not self._is_probed:
            self._is_probed = True
            self.client.send(PROBE)

    def frame(self, data: bytes) -> bytes:
        """Some bytes of the stream as they go over the wire, with the head before the first."""
        self.log_body("answer", data)
        if self.started and self.is_chunked:
            return chunk(data)
        head = b"" if self.started else self._stream_head()
        return head + (chunk(data) if self.is_chunked else data)

    def frame_end(self, last: bytes = b"") -> bytes:
        """The last bytes of the stream and its end."""
        return self.frame(last) + (LAST_CHUNK if self.is_chunked else b"")

    def write(self, data: bytes) -> None:
        """Send some bytes of the stream.  Raises ClientGone."""
        self._send(self.frame(data))

    def finish(self, last: bytes = b"") -> None:
        """The end of the stream, in one write with its last bytes."""
        self._send(self.frame_end(last))

    async def relay(
        self, answer: UpstreamResponse, pipeline: StreamRelay, begun: bytes
    ) -> None:
        """Send a stream on as it comes, to its end: proper, cut, or given up.  A cut one ends with
        the dialect's error event, never politely.  begun: what is there for the client already.
        Raises ClientGone."""
        problem: ProxyError | None = None
        last = begun
        try:
            while not (answer.done or pipeline.ended):
                if last:
                    self.write(last)
                    last = b""
                    if self.client.is_slow:
                        await self.client.room()
                last = pipeline.feed(
                    await answer.read(self.app.settings.answer_timeout_s)
                )
        except UpstreamError as error:
            problem = forget_frames(error)
        except (ClientGone, GeneratorExit):
            answer.close()
            raise
        except Exception:
            self.app.log.exception("%s failed", self.id)
            problem = ProxyError(
                "an error in the proxy itself; its log has the request id " + self.id
            )

        try:
            end = self._last_bytes(last, pipeline, problem)
        except BaseException:
            answer.close()
            raise
        if answer.done or pipeline.failure or problem is not None:
            answer.finish()
        else:
            self.client.loop.spawn(drain(answer))
        self._send(end)

    def _last_bytes(
        self, last: bytes, pipeline: StreamRelay, problem: ProxyError | None
    ) -> bytes:
        begin = self.frame(last) if last else b""
        end = self.frame_end(pipeline.close(problem))
        self.record.end_stream(
            pipeline.failure or "", problem.code if problem else None
        )
        return begin + end

    def _stream_head(self) -> bytes:
        if self.is_chunked:
            coding = [("Transfer-Encoding", "chunked")]
        else:
            coding = []
        head = self._head(
            200, self.dialect.stream_type, coding + [("Cache-Control", "no-cache")]
        )
        self.app.ledger.show_running(self.record)
        return head

    def _head(self, status: int, kind: str, more: list[tuple[str, str]]) -> bytes:
        self.record.begin_answer(status)
        fields_ = [("Date", http_date(int(time.time()))), ("x-request-id", self.id)]

        if self.dialect is MESSAGES:
            fields_.append(
                ("request-id", self.id)
            )  # where Anthropic's SDK looks for it

        if kind:
            fields_.append(("Content-Type", kind))
        fields_ += more
        fields_.append(("X-Content-Type-Options", "nosniff"))
        fields_ += [(k, v) for k, v in self.headers.items() if k != "x-request-id"]
        if "Access-Control-Allow-Origin" in self.headers:
            fields_.append(("Access-Control-Expose-Headers", exposed_headers(fields_)))
        if not self.keep_alive:
            fields_.append(("Connection", "close"))
        elif self.head.minor == 0:
            fields_.append(("Connection", "keep-alive"))

        phrase = http.client.responses.get(status, "Error")
        whole = render_head(f"HTTP/1.1 {status} {phrase}", fields_)
        if self._is_probed:
            return whole[len(PROBE) :]
        return whole

    def _send(self, data: bytes) -> None:
        if data:
            self.client.send(data)

    def log_body(self, kind: str, data: bytes) -> None:
        """For --log-bodies; a fault is told, it fails no request."""
        folder = self.app.settings.log_bodies
        if folder and self.record.asked.label:
            try:
                append_body(
                    folder,
                    "%d-%s.%s" % (self.record.asked.at * 1000, self.id[:8], kind),
                    data,
                )
            except OSError as error:
                self.app.log.warning("--log-bodies: %s", plain_reason(error))


def exposed_headers(fields_: list[tuple[str, str]]) -> str:
    """What a page of another origin may read of this answer: all but the rules about it."""
    names = [name.lower() for name, _ in fields_]
    own = [name for name in names if not name.startswith("access-control-")]
    return ", ".join(dict.fromkeys((*EXPOSED_HEADERS, *own)))


@functools.lru_cache(maxsize=1)
def http_date(second: int) -> str:
    return email.utils.formatdate(second, usegmt=True)


Endpoint = Callable[[Exchange], Optional[Work]]  # None where it is through already
Routes = Mapping[
    str, Mapping[str, Endpoint]
]  # path -> method -> endpoint; "/x/*" for a tail


def split_target(target: str) -> tuple[str | None, str]:
    """(host and port, path and query) of a request target.  The first is None for the usual form;
    a client that believes in a proxy writes a whole URL."""
    if not target.lower().startswith(("http://", "https://")):
        return None, target
    rest = target.partition("://")[2]
    host = re.split("[/?#]", rest, maxsplit=1)[0]
    path = rest[len(host) :]
    if path[:1] != "/":
        path = "/" + path
    return host, path


PATH_PREFIXES = ("/v1", "/api/v1", "/openai/v1", "/v1beta/openai")


def normalise_path(path: str) -> str:
    """'//v1/v1/models/' -> '/models': doubled slashes, a final one and any /v1 are left out.
    '/openai/v1/responses' -> '/responses': so are prefixes that only name the kind of API."""
    while "//" in path:
        path = path.replace("//", "/")
    prefix = "/"
    while prefix:
        prefix = next(
            (one for one in PATH_PREFIXES if (path + "/").startswith(one + "/")), ""
        )
        path = path[len(prefix) :]
    if path.startswith("/openai/") and not (path + "/").startswith(DEPLOYMENTS + "/"):
        path = path[len("/openai") :]  # Azure's older form
    return path.rstrip("/") or "/"


def dialect_of(path: str) -> Dialect:
    """In whose words errors are told until an endpoint knows better."""
    if path.startswith("/messages"):
        return MESSAGES
    if path.startswith(("/v1beta/", "/v1alpha/")) or gemini_method(path):
        return GEMINI
    if path.startswith("/api/"):
        return OLLAMA
    return CHAT


#: what holds no data and asks for the key itself
OPEN_PATHS = ("/health", "/", "/dashboard", "/auth/device")


def is_open(exchange: Exchange) -> bool:
    """Is this served without a key?"""
    return exchange.head.method == "OPTIONS" or (
        exchange.path in OPEN_PATHS and exchange.head.method in ("GET", "HEAD")
    )


def is_within(address: str, networks: list[Any]) -> bool:
    """Is this an address, and in one of the networks?"""
    with contextlib.suppress(ConfigError):
        return any(
            own.version == network.version and own.subnet_of(network)
            for own in parse_networks([address])
            for network in networks
        )
    return False


def as_seen(
    head: RequestHead, peer: str, settings: Settings, scheme: str
) -> tuple[str, str, str]:
    """(host, scheme, address of the client) as the client itself sees them: a trusted proxy tells
    them in X-Forwarded-*, where the last value is the proxy's own."""
    host, trusted = head.headers.get("host", "localhost"), settings.trusted_networks
    if not trusted or not is_within(peer, trusted):
        return host, scheme, peer
    hosts, schemes, hops = (
        [
            value.strip()
            for value in head.headers.get("x-forwarded-" + name, "").split(",")
        ]
        for name in ("host", "proto", "for")
    )

    hops = [hop for hop in hops if hop][::-1] or [peer]
    return (
        hosts[-1] or host,
        schemes[-1].lower() or scheme,
        next((hop for hop in hops if not is_within(hop, trusted)), hops[-1]),
    )


def check_host(text: str, settings: Settings, own_address: str) -> None:
    """DNS rebinding: only names of this server are served.  Raises BadRequest 403."""
    name = split_host(text)[0]
    if not name:
        raise BadRequest(
            f"the host {printable(text, 60)} is malformed", 403, "host_not_allowed"
        )
    if not (
        is_loopback(name)
        or name in settings.allow_host
        or name in (settings.host.strip("[]").lower(), own_address)
    ):
        raise BadRequest(
            "the host name %s is not served here; allow it with --allow-host"
            % printable(name, 60),
            403,
            "host_not_allowed",
        )


def foreign_origin(origin: str | None) -> BadRequest:
    """The refusal of a foreign page; it names --cors-origin where that flag would help."""
    if origin is None:
        text = "pages of other sites may not fetch this"
    elif origin_of(origin):
        text = (
            "pages of the origin %s may not call this API; allow it with --cors-origin %s"
            % (printable(origin, 80), printable(origin_of(origin), 80))
        )
    else:
        text = "pages whose origin is %s may not call this API" % printable(
            origin or "''", 80
        )
    return BadRequest(text, 403, "origin_not_allowed")


class Workers:
    """A few threads for what may block; an idle one ends after WORKER_IDLE_S.
    `_lock` guards the fields; _free: threads that wait less work that waits, so below 0 when all
    of them are busy."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = self._free = 0
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()

    def put(self, work: Callable[[], None]) -> bool:
        """Do it soon.  False: too much waits already, or no thread can be had."""
        with self._lock:
            if self._queue.qsize() >= WORKER_QUEUE:
                return False
            if self._free <= 0 and self._count < MAX_WORKERS:
                self._begin_thread()
            if not self._count:
                return False
            self._free -= 1
            self._queue.put(work)
        return True

    def _begin_thread(self) -> None:
        try:
            threading.Thread(target=self._run, name="worker", daemon=True).start()
            self._count += 1
        except RuntimeError:  # the system gives no more of them
            pass

    def stop(self) -> None:
        """End the idle ones; who works ends with its work."""
        for _ in range(MAX_WORKERS):
            self._queue.put(None)

    def _run(self) -> None:
        while True:
            with self._lock:
                self._free += 1
            work = self._next()
            if work is None:
                break
            work()
        with self._lock:
            self._free -= 1
            self._count -= 1

    def _next(self) -> Callable[[], None] | None:
        """None: nothing more is to be done by this thread."""
        try:
            return self._queue.get(timeout=WORKER_IDLE_S)
        except queue.Empty:
            pass
        with self._lock:
            if self._queue.empty():
                return None
            return self._queue.get()


class Alarm(Connection):
    """Wakes the loop out of its select, from any thread."""

    def __init__(self) -> None:
        self._far, self.sock = socket.socketpair()
        self.sock.setblocking(False)
        self._is_ringing = False

    def ring(self) -> None:
        """Wake it, once for however many calls."""
        if not self._is_ringing:
            self._is_ringing = True
            with contextlib.suppress(OSError):
                self._far.send(b"x")

    def on_event(self, mask: int) -> None:
        """The loop is awake."""
        with contextlib.suppress(BlockingIOError):
            self.sock.recv(4096)
        self._is_ringing = False

    def close(self) -> None:
        """Both ends."""
        self._far.close()
        self.sock.close()


class Task:
    """A coroutine in the loop, and what it waits for now (None while it runs).
    deadline: when that wait is over, monotonic."""

    __slots__ = ("deadline", "on_end", "what", "work")

    def __init__(self, work: Work, on_end: OnEnd | None) -> None:
        self.work, self.on_end = work, on_end
        self.what: Wait | None = None
        self.deadline = math.inf


class Deferred:
    """Work that one round of the loop leaves to the next, each piece once."""

    def __init__(self) -> None:
        self._of_this_round: dict[Callable[[], None], None] = {}
        self._due: dict[Callable[[], None], None] = {}

    @property
    def is_due(self) -> bool:
        """Has an earlier round left something?"""
        return bool(self._due)

    def add(self, work: Callable[[], None]) -> None:
        """Do it in the next round."""
        self._of_this_round[work] = None

    def take(self) -> Iterable[Callable[[], None]]:
        """What an earlier round has left, at the end of this one."""
        due, self._due = self._due, self._of_this_round
        self._of_this_round = {}
        return due


class EventLoop:
    """One thread for everything that waits.

    Each connection of a client is a coroutine that the loop drives, and so is whatever goes on
    beside it (a fetched token, the last chunk of a stream).  A coroutine runs until it waits:

        it waits for                                      and is resumed by
        Ready     an upstream connection                  the selector
        News      bytes from its client, or room          the selector, through on_event
        Pause     some time                               the loop's timers
        NextTurn  its turn to compute                     the loop, when streams have been served
        InThread  DNS, files, the database, big bodies    one of a few worker threads
        Signal    a limit, an approval, a shared fetch    whoever sets it, in any thread

    and, whatever it waits for: by the end of its time (the result is False), by its client's
    leaving (ClientGone), or by the end of the server (UpstreamError 503).  One round of the loop:

        select --> resume what is ready --> compute for 1 to 8 ms --> timers, and once a tick:
           ^                                                          deadlines, pings
           +---------------------------------------------------------------------------+

    Methods with a leading underscore run in the loop's own thread; spawn, wake, post, start and
    stop may be called from any.  No exception of one coroutine touches another."""

    def __init__(self, settings: Settings, log: logging.Logger) -> None:
        self.log = log
        self.clients: set[ClientConnection] = set()  # the open ones
        self.workers = Workers()
        self._selector = selectors.DefaultSelector()
        self._inbox: collections.deque[tuple[Any, ...]] = collections.deque()
        self._alarm = Alarm()
        self._stopped = False
        self._tasks: dict[Task, None] = {}
        self._turns: collections.deque[tuple[Task, Wait]] = collections.deque()
        self._timers: list[tuple[float, int, Task, Wait]] = []
        self._deferred = Deferred()
        self._tick_s = min(1.0, settings.keepalive_s / 4, settings.head_timeout_s / 4)
        self._now = self._ticked_at = time.monotonic()
        self._thread = threading.Thread(
            target=self._run, name="event-loop", daemon=True
        )

    # -- from any thread

    def start(self) -> None:
        """Begin to wait."""
        self.watch(self._alarm, selectors.EVENT_READ)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Has it begun, and not ended?"""
        return self._thread.is_alive()

    def stop(self) -> None:
        """End all coroutines and the thread."""
        self.post(self._stop)
        self._thread.join(5)

    def close(self) -> None:
        """Give up what it waits with; it does not run, or runs no more."""
        self._selector.close()
        self._alarm.close()

    def post(self, work: Callable[..., None], *items: Any) -> None:
        """Have the loop call `work`."""
        self._inbox.append((work, *items))
        if not self.is_own_thread():
            self._alarm.ring()

    def is_own_thread(self) -> bool:
        return threading.get_ident() == self._thread.ident

    def spawn(self, work: Work, on_end: OnEnd | None = None) -> Task:
        """Drive a coroutine; `on_end` gets its result or error."""
        task = Task(work, on_end)
        self._tasks[task] = None
        self.post(self._resume, task)
        return task

    def wake(
        self,
        task: Task,
        what: Wait,
        value: Any = None,
        error: BaseException | None = None,
    ) -> None:
        """Resume the task if it still waits for `what`."""
        self.post(self.resume, task, what, value, error)

    # -- for coroutines, in the loop's thread

    def watch(self, connection: Connection, events: int) -> None:
        """Have the selector watch for these events only; 0 for none."""
        if events == connection.watched:
            return
        if not events:
            self._forget(connection)
        elif connection.watched:
            self._selector.modify(connection, events, connection)
        else:
            self._selector.register(connection, events, connection)
            connection.loop = self
        connection.watched = events

    def _forget(self, connection: Connection) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(connection)

    def wake_at(self, when_s: float, task: Task, what: Wait) -> None:
        """The same at this monotonic time."""
        heapq.heappush(self._timers, (when_s, id(what), task, what))  # id: never a tie

    def wake_in_turn(self, task: Task, what: Wait) -> None:
        """The same when the running streams have been served."""
        self._turns.append((task, what))

    def run_in_thread(self, work: Callable[[], Any], task: Task, what: Wait) -> None:
        """Resume the task with what `work` returns or raises in a worker thread."""
        if not self.workers.put(lambda: self.wake(task, what, *outcome(work))):
            self.wake(
                task,
                what,
                None,
                ProxyError(
                    "the proxy has more work than it can do now: try again in a moment",
                    503,
                    headers={"retry-after": "1"},
                ),
            )

    def defer(self, work: Callable[[], None]) -> None:
        """Call `work` once in the next round, when what is urgent in that has been done, or after
        DEFER_S.  So a client's next request is with the upstream before its last one is counted."""
        self._deferred.add(work)

    def _do_deferred(self) -> None:
        for work in self._deferred.take():
            self._guard(work)

    def cancel(self, task: Task | None, error: BaseException) -> None:
        """Throw an error into a coroutine that waits."""
        if task is not None and task.what is not None:
            self._resume(task, None, error)

    # -- the loop

    def _run(self) -> None:
        while not self._stopped:
            ready = self._selector.select(self._pause_s())
            self._now = time.monotonic()
            for key, mask in ready:
                self._on_ready(key.data, mask)
            self._take_inbox()
            self._take_turns()
            self._run_timers()
            self._do_deferred()
            if self._now - self._ticked_at >= self._tick_s:
                self._ticked_at = self._now
                self._tick()
        self.close()

    def _pause_s(self) -> float:
        """How long nothing can happen but in sockets."""
        if self._inbox or self._turns:
            return 0.0
        most = self._tick_s
        if self._deferred.is_due:
            most = DEFER_S
        if self._timers:
            return min(most, max(0.0, self._timers[0][0] - time.monotonic()))
        return most

    def _on_ready(self, connection: Connection, mask: int) -> None:
        task = connection.waiter
        if task is not None:
            connection.waiter = None
            self._resume(task, True)
            return
        if not self._guard(connection.on_event, mask):
            self._give_up(connection)

    def _guard(self, work: Callable[..., None], *items: Any) -> bool:
        """Call `work` -> did it go well?  A fault of ours is logged, and the loop goes on."""
        _, error = outcome(work, *items)
        if error is not None:
            self.log.error("the loop failed", exc_info=error)
        return error is None

    def _give_up(self, connection: Connection) -> None:
        """After a fault of ours: this connection is over, the others go on."""
        self.watch(connection, 0)
        if isinstance(connection, ClientConnection):
            connection.at_end = True
            self.cancel(connection.task, ClientGone())

    def _take_inbox(self) -> None:
        for _ in range(len(self._inbox)):
            self._guard(*self._inbox.popleft())

    def _take_turns(self) -> None:
        """Compute: as long as the streams took, so that neither starves the other."""
        if not self._turns:
            return
        until = time.monotonic()
        until += min(max(SLICE_S, until - self._now), MAX_SLICE_S)
        while self._turns:
            self.resume(*self._turns.popleft())
            if time.monotonic() >= until:
                break

    def _run_timers(self) -> None:
        while self._timers and self._timers[0][0] <= self._now:
            _, _, task, what = heapq.heappop(self._timers)
            self.resume(task, what)

    def _tick(self) -> None:
        """Deadlines, and what clients are sent in a silence."""
        for task in [task for task in list(self._tasks) if task.deadline <= self._now]:
            if task.what is not None:
                self._resume(task, False)
        for client in list(self.clients):
            if not self._guard(client.on_tick, self._now):
                self._give_up(client)

    # -- coroutines

    def resume(
        self,
        task: Task,
        what: Wait,
        value: Any = None,
        error: BaseException | None = None,
    ) -> None:
        """At once, if the task still waits for `what`."""
        if task.what is what:  # else it was resumed by something else
            self._resume(task, value, error)

    def _resume(
        self, task: Task, value: Any = None, error: BaseException | None = None
    ) -> None:
        """Run a coroutine until it waits or ends."""
        what, task.what = task.what, None
        if isinstance(what, Ready):
            what.connection.waiter = None
        try:
            if error is None:
                what = task.work.send(value)
            else:
                what = task.work.throw(error)
        except StopIteration as end:
            self._end(task, end.value, None)
            return
        except BaseException as fault:  # noqa: BLE001
            self._end(task, None, fault)
            return

        task.what, task.deadline = what, self._now + what.timeout_s
        try:
            what.begin(self, task)
        except (
            AttributeError,
            KeyError,
            OSError,
            ValueError,
        ) as fault:  # a closed socket
            self.wake(task, what, None, fault)

    def _end(self, task: Task, value: Any, error: BaseException | None) -> None:
        del self._tasks[task]
        if task.on_end is not None:
            task.on_end(value, error)
        elif error is not None and not isinstance(error, ClientGone):
            self.log.error("a coroutine failed", exc_info=error)

    def _stop(self) -> None:
        self._stopped = True
        for task in list(self._tasks):
            self._guard(task.work.close)
        self._tasks.clear()
        self._do_deferred()
        self._do_deferred()  # what has ended just now
        self.workers.stop()


class Handler:
    """From a request's head to its endpoint: what must be right before any work is done."""

    def __init__(self, app: App, routes: Routes, scheme: str) -> None:
        self._app, self._routes, self._scheme = app, routes, scheme

    async def handle(self, exchange: Exchange) -> None:
        """Check the request, read its body, call its endpoint.  Raises ProxyError, ClientGone."""
        head, length, chunked = exchange.head, 0, True  # until we know better
        try:
            length, chunked = head.body_form()
            self._check_browser(exchange)
            self._check_key(exchange)
            if head.method == "OPTIONS":
                endpoint = None
            else:
                endpoint = self._find_route(exchange)
            self._check_body(exchange, length, chunked)
        except ProxyError:
            exchange.keep_alive = exchange.keep_alive and not (length or chunked)
            raise

        if length or chunked:
            await self._read_body(exchange, length, chunked)
        if not exchange.client.still_reads():
            raise ClientGone
        await wait(NextTurn())
        if endpoint is None:
            exchange.headers["Allow"] = "GET, HEAD, POST, OPTIONS"
            exchange.reply(b"", 204, "")
            return
        work = endpoint(exchange)
        if work is not None:
            await work

    async def _read_body(self, exchange: Exchange, length: int, chunked: bool) -> None:
        head, client = exchange.head, exchange.client
        if head.minor == 1 and head.headers.get("expect", "").lower() == "100-continue":
            client.send(b"HTTP/1.1 100 Continue\r\n\r\n")

        exchange.keep_alive, keep = False, exchange.keep_alive  # until it is read whole
        body = await client.read_body(length, chunked)
        exchange.keep_alive = keep

        coding = head.headers.get("content-encoding", "")
        if coding:
            exchange.body = inflate(body, coding)
        else:
            exchange.body = body
        exchange.log_body("request", exchange.body)

    def _check_browser(self, exchange: Exchange) -> None:
        """DNS rebinding and foreign web pages: refused before any work."""
        headers, settings = exchange.head.headers, self._app.settings
        host, scheme, address = as_seen(
            exchange.head, exchange.client.address, settings, self._scheme
        )
        exchange.caller = Caller(address)
        named = split_target(exchange.head.target)[0]
        for text in (host,) if named is None else (named, host):
            check_host(text, settings, bare_address(exchange.client.sock.getsockname()))

        origin = headers.get("origin")
        if origin is None:
            site = headers.get("sec-fetch-site", "none")
            exchange.is_same_origin = site in ("same-origin", "none")
            if not exchange.is_same_origin and not is_open(exchange):
                raise foreign_origin(origin)
            return

        own = origin_of(f"{scheme}://{host}")
        exchange.is_same_origin = bool(own) and origin_of(origin) == own
        if not exchange.is_same_origin and not is_allowed_origin(
            origin, settings.cors_origin
        ):
            raise foreign_origin(origin)
        exchange.headers.update(
            {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}
        )
        if exchange.head.method == "OPTIONS":
            exchange.headers.update(
                {
                    "Access-Control-Allow-Methods": "GET, HEAD, POST, DELETE, OPTIONS",
                    "Access-Control-Allow-Headers": headers.get(
                        "access-control-request-headers", "authorization, content-type"
                    ),
                    "Access-Control-Max-Age": "600",
                }
            )
            if "access-control-request-private-network" in headers:
                exchange.headers["Access-Control-Allow-Private-Network"] = "true"

    def _check_key(self, exchange: Exchange) -> None:
        """Raises AuthError, RateLimited."""
        try:
            accounts = self._app.accounts
            exchange.caller = accounts.identify(
                exchange.head.headers, exchange.caller.address
            )
        except (AuthError, RateLimited):
            if not is_open(exchange):
                raise

    def _find_route(self, exchange: Exchange) -> Endpoint:
        """Exact path first, then `/x/*` and `/x/y/*`.  Raises BadRequest 404, 405."""
        methods = self._routes.get(exchange.path)
        parts = exchange.path.split("/")

        for at in (2, 3):
            if methods is None and len(parts) > at:
                methods = self._routes.get("/".join(parts[:at]) + "/*")
                exchange.argument = urllib.parse.unquote("/".join(parts[at:]))

        if methods is None:
            raise BadRequest(
                "there is no route %s %s"
                % (printable(exchange.head.method, 20), printable(exchange.path, 80)),
                404,
                "unknown_url",
            )

        method = exchange.head.method
        endpoint = methods.get("GET" if method == "HEAD" else method)

        if endpoint is None:
            allowed = sorted(methods) + (["HEAD"] if "GET" in methods else [])
            raise BadRequest(
                "%s is not possible here, only %s"
                % (printable(method, 20), ", ".join(allowed)),
                405,
                "method_not_allowed",
                headers={"Allow": ", ".join(allowed)},
            )

        return endpoint

    def _check_body(self, exchange: Exchange, length: int, chunked: bool) -> None:
        headers = exchange.head.headers
        if length > MAX_BODY_BYTES:
            raise BadRequest(f"the body is larger than {MAX_BODY_BYTES} bytes", 413)
        if headers.get("expect", "100-continue").lower() != "100-continue":
            raise BadRequest("this expectation cannot be met", 417)
        kind = headers.get("content-type", "").split(";")[0].strip().lower()
        is_json = kind == "application/json" or kind.endswith("+json")
        if exchange.head.method == "POST" and (length or chunked) and not is_json:
            raise BadRequest(
                "send the header Content-Type: application/json (curl: "
                "-H 'Content-Type: application/json')",
                415,
            )


def give_back_memory() -> None:
    """Compiling this file took 12 MB that glibc would keep for ever, and each new thread would
    open an arena of its own: return the one, forbid the other.  Elsewhere nothing happens."""
    with contextlib.suppress(ImportError, OSError, AttributeError, TypeError):
        import ctypes

        libc = ctypes.CDLL(None)
        libc.mallopt(-8, 1)  # M_ARENA_MAX
        libc.malloc_trim(0)


def file_limit() -> int:
    """How many files this process may open; Windows' select ends at 512 sockets."""
    try:
        import resource

        return min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 1 << 20)
    except ImportError:
        return 512


def raise_file_limit() -> None:
    """The soft limit to the hard one: a stream takes two files."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Listener(Connection):
    """The listening socket, as the loop sees it."""

    def __init__(self, sock: Any, accept: Callable[[], None]) -> None:
        self.sock, self._accept = sock, accept

    def on_event(self, mask: int) -> None:
        self._accept()


class Server(ThreadingHTTPServer):
    """Listens, and serves each connection as a coroutine in the loop.  Of ThreadingHTTPServer it
    uses how to listen and to accept; `serve_forever` and its threads are not needed."""

    request_queue_size = BACKLOG
    allow_reuse_address = os.name != "nt"  # on Windows that would let another take over

    def __init__(self, app: App, routes: Routes, host: str, port: int) -> None:
        self.app = app
        self._running: dict[Exchange, None] = {}
        self._most_clients = max(file_limit() // 2 - SPARE_FILES, 1)
        self.loop = EventLoop(app.settings, app.log)
        if app.settings.tls_cert:
            self._tls = make_server_context(app.settings)
        else:
            self._tls = None
        self.scheme = "https" if self._tls else "http"
        self._handler = Handler(app, routes, self.scheme)
        if ":" in host:
            self.address_family = socket.AF_INET6
        self._listeners: list[Listener] = []
        super().__init__((host, port), socketserver.BaseRequestHandler)
        self._listen_on(self.socket)

    def server_bind(self) -> None:
        """Without the name look-up of the original, which can take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def server_close(self) -> None:
        """Listen no more.  The base class calls it, too, where the port cannot be had."""
        super().server_close()
        for listener in self._listeners:
            listener.sock.close()
        if not self.loop.is_running:
            self.loop.close()

    @property
    def url(self) -> str:
        """Of this server, as a client on this machine may write it."""
        host = str(self.server_address[0])
        return "%s://%s:%d" % (
            self.scheme,
            f"[{host}]" if ":" in host else host,
            self.server_port,
        )

    # -- connections

    def listen_too(self, port: int) -> None:
        """Serve on a further port of the same address, before `start`.  Raises OSError."""
        sock = socket.socket(self.address_family, socket.SOCK_STREAM)
        try:
            if self.allow_reuse_address:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((self.server_address[0], port))
            sock.listen(BACKLOG)
        except OSError:
            sock.close()
            raise
        self._listen_on(sock)

    def _listen_on(self, sock: Any) -> None:
        accept = functools.partial(self._accept_some, sock)
        self._listeners.append(Listener(sock, accept))

    def _accept_some(self, sock: Any) -> None:
        """Let in who has connected, ACCEPTED_AT_ONCE at a time."""
        for _ in range(ACCEPTED_AT_ONCE):
            try:
                request, address = sock.accept()
            except OSError:  # nobody else, or no file is left
                return
            self.process_request(request, address)

    def process_request(self, request: Any, client_address: Any) -> None:
        """A new connection."""
        with contextlib.suppress(OSError):  # macOS: the client has reset it already
            request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        request.settimeout(0)
        client = ClientConnection(
            request,
            client_address,
            self.app.settings,
            self.loop,
            self.loop.clients.discard,
        )
        if len(self.loop.clients) >= self._most_clients:
            self._refuse_connection(request)
            client.close()
            return
        self.loop.clients.add(client)
        client.task = self.loop.spawn(self.serve(client))

    def _refuse_connection(self, request: Any) -> None:
        if self._tls is not None:
            return
        refusal = dumps(CHAT.error_body(ProxyError("too many connections", 503), ""))
        head = render_head(
            "HTTP/1.1 503 Service Unavailable",
            (
                ("Content-Type", "application/json"),
                ("Content-Length", str(len(refusal))),
                ("Retry-After", "5"),
                ("Connection", "close"),
            ),
        )
        send_now(request, head + refusal)

    async def serve(self, client: ClientConnection) -> None:
        """The life of a connection: its requests, one after the other."""
        try:
            if self._tls is not None:
                await client.begin_tls(self._tls)
            while await self._serve_one(client):
                pass
        except (ClientGone, OSError):
            pass
        finally:
            client.close()

    async def _serve_one(self, client: ClientConnection) -> bool:
        """Read a request and answer it.  False: the connection is over."""
        problem: BadRequest | None = None
        try:
            raw = await client.read_head()
            if not raw:
                return False
            head = parse_request_head(raw)
        except BadRequest as error:
            problem, head = error, RequestHead("GET", "/", 1, {"connection": "close"})

        exchange = Exchange(client, head, self.app)
        client.exchange = exchange
        self._running[exchange] = None
        self.app.ledger.begin(exchange.record)
        try:
            is_refused = await self._answer(exchange, problem)
        finally:
            client.exchange = None
            self.end(exchange)
        if exchange.keep_alive and not self.app.stop.is_set():
            return True
        if is_refused:
            await client.linger()
        return False

    async def _answer(self, exchange: Exchange, problem: BadRequest | None) -> bool:
        """Every error is rendered here and nowhere else.  -> was it refused?"""
        refusal: ProxyError | None = problem

        try:
            if problem is None:
                await self._handler.handle(exchange)
        except ClientGone:
            exchange.client_left()
            return False
        except ProxyError as error:
            refusal = forget_frames(error)
        except Exception:
            self.app.log.exception("%s failed", exchange.id)
            refusal = ProxyError(
                "an error in the proxy itself; its log has the request id "
                + exchange.id
            )

        try:
            if refusal is not None:
                exchange.refuse(refusal)
            await exchange.client.flushed()
        except ClientGone:
            exchange.client_left()
            return False

        return refusal is not None

    def end(self, exchange: Exchange) -> None:
        """The exchange is over: one log line."""
        self._running.pop(exchange, None)
        self.app.admission.leave(exchange.ticket)
        self.app.ledger.end(exchange.record)
        self.loop.defer(self.app.ledger.settle)

    # -- begin and end

    def start(self) -> None:
        """Serve in a thread of its own; returns at once."""
        self.app.ledger.history.ask(self.app.ledger.budget.load)
        self.loop.start()
        self.loop.post(self.app.upstream.pool.belong_to_loop)
        for listener in self._listeners:
            listener.sock.setblocking(False)
            self.loop.post(self.loop.watch, listener, selectors.EVENT_READ)

    def finish(self, grace_s: float) -> None:
        """Accept nothing more, give running answers `grace_s`, then end them with an error.

        A second call has nothing left to do."""
        if not self.loop.is_running:
            self.server_close()
            return
        self.app.stop.set()
        self.app.ledger.events.close(*self.app.ledger.events.readers)
        self._stop_listening()
        if any(not client.is_used for client in self.loop.clients.copy()):
            time.sleep(FIRST_REQUEST_S)  # who has just connected is served
        self.loop.post(self._close_idle)
        if not self._wait_idle(grace_s):
            self.loop.post(self._end_running)
            self._wait_idle(1.0)
        self.loop.stop()

    def _stop_listening(self) -> None:
        """Who has connected by now is let in, but no more than that."""
        done = threading.Event()

        def stop() -> None:
            until = time.monotonic() + FIRST_REQUEST_S  # others may go on connecting
            for listener in self._listeners:
                while wait_ready(listener.sock, 0) and time.monotonic() < until:
                    self._accept_some(listener.sock)
                listener.unwatch()
            done.set()

        self.loop.post(stop)
        done.wait(5)
        self.server_close()

    def _close_idle(self) -> None:
        """No further requests; running ones go on."""
        for client in list(self.loop.clients):
            if client.is_idle:
                client.leave()

    def _end_running(self) -> None:
        for exchange in list(self._running):
            self.loop.cancel(
                exchange.client.task, UpstreamError("the proxy is shutting down", 503)
            )

    def _wait_idle(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while self._running and time.monotonic() < deadline:
            time.sleep(0.01)
        return not self._running


# ==== 19. Page ====================================================================================
# What a browser shows at / and /dashboard: one page, no outside resource, works air-gapped.  It
# holds no data; its script asks this server, with the key as header where one is set.  All text is
# set as text, never as markup; what is not known is shown as unknown.

PAGE_STYLE = """
:root { color-scheme: light dark; --back: light-dark(#f5f6f8, #0e1217);
  --card: light-dark(#fff, #161b22); --ink: light-dark(#1b2330, #e4e9f0);
  --dim: light-dark(#586474, #9ba7b6); --line: light-dark(#dfe3e9, #2a323d);
  --accent: light-dark(#3f51b5, #a5b4ff); --soft: light-dark(#e8ebf4, #242c3a);
  --good: light-dark(#1a7342, #63cb8f); --warn: light-dark(#8f5700, #e3b058);
  --bad: light-dark(#b3261e, #f4948b); --s0: light-dark(#4a5fd0, #7f92f5); }
[data-theme=light] { color-scheme: light; } [data-theme=dark] { color-scheme: dark; }
[hidden], p:empty, #lock:not([hidden]) ~ * { display: none !important; }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: break-word; } * { box-sizing: border-box; }
header, main { max-width: 74rem; margin: auto; padding: 0 1rem; } main:focus { outline: none; }
h1 { font-size: 1.15rem; margin: 0; } h2 { font-size: 1rem; margin: 0; flex: 1 0 auto; }
h3, .sub, .key, .pill, caption, dt, th { font-size: .82rem; } p, dd { margin: .2rem 0; }
.line, nav, header { display: flex; flex-wrap: wrap; gap: .4rem 1rem; align-items: center; }
header { padding-top: 1rem; } main h1 { margin: 1rem 0; } nav { flex: 1; } pre { overflow: auto; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .7rem;
  margin: 1rem 0; padding: 1rem 1.2rem; } .card > :first-child { margin-bottom: .7rem; }
.loud, button:hover { border-color: var(--accent); } .stale section { filter: grayscale(1); }
.pill { font-weight: 600; } .pill::before { content: "● "; } a, .run { color: var(--accent); }
.good { color: var(--good); } .warn { color: var(--warn); } .bad { color: var(--bad); }
.dim, caption, dt, th, .sub { color: var(--dim); } .code { font-size: 2rem; letter-spacing: .1em; }
button, input, select { font: inherit; font-size: .88rem; color: inherit; background: var(--card);
  border: 1px solid var(--line); border-radius: .45rem; padding: .3rem .75rem; max-width: 100%; }
button { cursor: pointer; } .main { background: var(--accent); color: var(--card); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.skip:not(:focus) { position: absolute; left: -99rem; } dd.big { font: 600 1.3rem system-ui; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr));
  gap: .8rem 2.5rem; } .tiles { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1rem 0; }
.tiles .card { flex: 1 1 8rem; margin: 0; padding: .8rem 1rem; } .ends > :first-child { flex: 1; }
ul { list-style: none; margin: 0; padding: 0; font-size: .9rem; }
details, #limits li { margin: .7rem 0; }
svg { display: block; width: 100%; } text { fill: var(--dim); font-size: 11px; }
.bar { height: .5rem; border-radius: .25rem; background: var(--soft); margin: .25rem 0 .5rem; }
.key svg { display: inline-block; width: .7rem; margin-right: .3rem; }
.s0 { fill: var(--s0); } .s1 { fill: #2ea294; } .s2 { fill: #d08c1d; } .s3 { fill: #8d98b4; }
.over { fill: var(--bad); } .clear { opacity: 0; } line { stroke: var(--line); }
table { border-collapse: collapse; width: 100%; font-size: .9rem; } th { white-space: nowrap; }
caption, th, td { text-align: left; padding: .45rem .9rem .45rem 0; vertical-align: top; }
tbody tr { border-top: 1px solid var(--line); } code, pre { font: .85em monospace; }
@media (prefers-reduced-motion: no-preference) { .run::before { animation: beat 1.4s infinite; } }
@keyframes beat { 50% { opacity: .2; } } @media (min-width: 62rem) { td:first-child {
  min-width: 17rem; } td:nth-child(n+4) { white-space: nowrap; } }
@media (max-width: 62rem) { nav { order: 1; flex-basis: 100%; } .cards thead { display: none; }
  .cards :is(table, tbody, td, caption) { display: block; padding: 0 0 .2rem; }
  .cards tr { display: grid; grid-template-columns: repeat(6, 1fr); gap: .3rem .8rem; }
  .cards td { grid-column: span 2; min-width: 0; } .cards td:nth-child(-n+3) { grid-column:
    span 3; } .cards tr { padding: .6rem 0; } .cards td:first-child { grid-column: 1 / -1; }
  .cards td + td::before { content: attr(data-label); font-size: .75rem; display: block;
    color: var(--dim); } }
"""
PAGE_SCRIPT = r"""
'use strict'; const $ = id => document.getElementById(id);
const show = (id, ...children) => $(id).replaceChildren(...children);   // a string becomes text
const pause = ms => new Promise(done => setTimeout(done, ms));
function el(name, ...children) {                            // el('p.sub.dim', 'text', node)
  const [tag, ...classes] = name.split('.'), e = document.createElement(tag);
  e.className = classes.join(' '); e.append(...children); return e; }
const SVG = document.querySelector('svg').namespaceURI;
function svg(tag, attributes, ...children) {
  const e = document.createElementNS(SVG, tag);
  for (const name in attributes) e.setAttribute(name, attributes[name]);
  e.append(...children); return e; }
const due = new Set();                                      // many calls in that time are one
const soon = (work, ms) => due.has(work) || due.add(work) && setTimeout(() => {
  due.delete(work); work(); }, ms);
// -- figures in words: null is unknown, never 0
const known = v => typeof v === 'number' && isFinite(v);
const join = (list, glue) => list.filter(Boolean).join(glue);
const total = list => list.some(known) ? list.filter(known).reduce((a, b) => a + b, 0) : null;
const writer = options => { const number = new Intl.NumberFormat('en', options);
                            return v => known(v) ? number.format(v) : 'unknown'; };
const count = writer({ notation: 'compact', maximumFractionDigits: 1 });
const cents = writer({ maximumFractionDigits: 2 }), few = writer({ maximumSignificantDigits: 2 });
const fine = v => v < .1 && v > 0 ? few(v) : cents(v);
const percent = v => known(v) ? fine(Math.round(v * 10) / 10) + ' %' : 'unknown';
const UNITS = [[864e5, ' days'], [36e5, ' h'], [6e4, ' min']];
function span(ms) {
  const [size, unit] = UNITS.find(([size]) => ms >= 2 * size) || [1e3, ' s'];
  return !known(ms) ? 'unknown' : ms < 1e3 ? Math.round(ms) + ' ms'
    : (ms / size).toFixed(size > 1e3 ? 0 : 1) + unit; }
const clock = (s, style) => new Date(s * 1000).toLocaleString([], style);
const time = s => clock(s, { timeStyle: 'medium' });
const when = s => clock(s, { dateStyle: 'medium', timeStyle: 'short' })
  + (s * 1000 > Date.now() ? ', in ' + span(s * 1000 - Date.now()) : '');
const cost = c => join([known(c.credits) && fine(c.credits), known(c.estimated_credits)
  && '~' + fine(c.estimated_credits)], ' + ') || 'unknown';
const rowCost = row => known(row.credits) ? fine(row.credits) : cost(row);
const prompt = c => total([c.input, c.cache_read, c.cache_write]);
const hits = c => percent(known(c.cache_read) ? 100 * c.cache_read / prompt(c) : null);
const inOut = c => total([prompt(c), c.output]) === null ? 'unknown'
  : count(prompt(c)) + ' in, ' + count(c.output) + ' out';
const human = name => (name.charAt(0).toUpperCase() + name.slice(1)).replace(/_/g, ' ');
// -- the server: a key goes as header, which is why events are read with fetch
const KEY = 'copilot_proxy_key', stored = sessionStorage;
let locked = null, stream = null, live = false, ready = null, goneAt = 0;
async function call(path, options) {
  const headers = { 'Content-Type': 'application/json' }, key = stored.getItem(KEY);
  if (key) headers.Authorization = 'Bearer ' + key;
  const answer = await fetch(path, { headers, cache: 'no-store', ...options });
  if (answer.ok) return answer;
  const { message, code } = (await answer.json().catch(() => ({}))).error || {};
  if (answer.status === 401 && code !== 'login_required') lock();
  throw new Error(message || 'the server says ' + answer.status); }
const get = (path, options = { signal: AbortSignal.timeout(2e4) }) => call(path, options).then(
  answer => answer.json());
const post = (path, body) => get(path, { method: 'POST', body: JSON.stringify(body) });
function lock() {
  locked = locked || new Promise(unlock => { $('lock').onsubmit = event => {
    event.preventDefault(); stored.setItem(KEY, $('key').value.trim());
    $('lock').reset(); $('lock').hidden = true; locked = null; unlock(); }; });
  if ($('lock').hidden) { $('lock').hidden = false; $('key').focus(); }
  show('lock-note', stored.getItem(KEY) ? 'This key is not the right one.' : ''); }
async function readEvents() {
  stream = new AbortController();
  const answer = await call('/history/events', { signal: stream.signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = '', part; !(part = await reader.read()).done;) {
    const texts = (rest + part.value).split('\n\n'); rest = texts.pop(); texts.forEach(take); } }
function take(event) {
  const [, name, data] = /^event: (.*)\ndata: (.*)$/m.exec(event) || [];
  if (name in ON) queueMicrotask(() => ON[name](JSON.parse(data))); }
// -- health and login
const check = () => get('/health').then(showHealth, showGone);
function showState(text, isGood, since) {
  show('state', text); $('state').className = 'pill ' + (isGood ? 'good' : 'bad');
  $('gone').hidden = !since; $('main').classList.toggle('stale', !!since); goneAt = since; }
function showGone() {
  ready = null; if (stream) stream.abort();
  showState('the server is gone', false, goneAt || Date.now() / 1000);
  show('gone', 'No answer since ' + time(goneAt) + '. Below stands what the server said before; '
    + 'this page connects again by itself.'); }
function showHealth(health) {
  const problem = (health.token || {}).problem, was = ready; ready = health.status === 'ok';
  showState((!ready ? 'login required' : problem ? 'no Copilot token' : 'ready')
    + (health.demo ? ' (demo)' : ''), ready && !problem, 0);
  show('version', 'copilot_proxy ' + health.version + ', up for ' + span(health.uptime_s * 1000));
  showLogin(health.login || health); if (was !== ready) soon(loadAll, 50); }
function showLogin({ user_code, verification_uri = '', problem }) {
  const box = $('login'), mark = [ready, user_code, problem].join();
  const link = el('a', verification_uri); box.hidden = ready;
  if (box.dataset.mark === mark) return;                    // else it would be read out again
  box.dataset.mark = mark; link.target = '_blank'; link.rel = 'noreferrer';
  if (/^https?:/.test(verification_uri)) link.href = verification_uri;
  const button = el('button.main', 'Get a login code');
  button.onclick = () => post('/auth/device/start', {}).then(showHealth, error => button.after(
    el('p.bad', error.message)));
  box.replaceChildren(el('h2', 'Log in to GitHub'), ...user_code
    ? [el('p', 'Open ', link, ' and enter this code:'), el('p.code', user_code)]
    : [el('p', problem || 'Nobody is logged in.'), button]); }
const KINDS = { ok: 'good', enabled: 'good', done: 'good', problem: 'bad' };
const pill = (text, kind) => el('span.pill.' + (kind || KINDS[text] || 'warn'), text);
const account = ({ account, state, problem, token }) => el('p.line', el('b', account), pill(state),
  problem || '', el('span.dim', token.direct ? 'GitHub token used directly' : !token.ready
    ? 'no Copilot token' : 'Copilot token valid for ' + span(token.expires_in_s * 1000)));
// -- approvals
const asks = new Map();
function showAsks() {
  const had = $('asks').contains(document.activeElement);
  $('asks').hidden = !asks.size; showTiles();
  document.title = (asks.size ? '(' + asks.size + ') ' : '') + 'copilot_proxy';
  show('ask-list', ...[...asks.values()].map(one => el('li', el('p', el('b', one.client),
    ' wants to ask ', el('b', one.model), ', ' + time(one.at)), el('p', el('q', one.text)),
    el('p.line', decider(one, 'Allow', 'main'), decider(one, 'Deny', 'plain')))));
  if (had) $(asks.size ? 'asks-head' : 'main').focus(); }
function decider({ id, client, model }, text, kind) {
  const button = el('button.' + kind, text), done = () => { asks.delete(id); showAsks(); };
  button.setAttribute('aria-label', text + ' ' + client + ' to ask ' + model);
  button.onclick = () => post('/approvals/' + id, { allow: kind === 'main' }).then(
    done, error => button.after(error.message));
  return button; }
// -- quota, budget, tiles
const bar = parts => svg('svg', { class: 'bar', 'aria-hidden': true }, ...parts.map(([x, size,
  color]) => svg('rect', { x: x + '%', width: size + '%', height: '100%', class: color })));
const gauge = (name, value, parts, ...notes) => el('li', el('div.line.ends', el('b', name),
  el('span.dim', value)), bar(parts), ...notes.map(note => el('p.sub', note)));
function meter(name, used, ...notes) {                      // in percent; above 100 stands out
  const scale = Math.max(100, used) / 100, most = Math.max(0, Math.min(100, used)) / scale;
  return !known(used) ? gauge(name, 'unknown', [], ...notes) : gauge(name, percent(used) + ' used',
    [[0, most, used < 80 ? 's0' : 's2'], [most, used > 100 ? 100 - most : 0, 'over']], ...notes); }
let lanes = [], budget = null, sums = null, several = false;
function laneMeter({ account, name, unlimited, used, total, left, percent_used, resets_at }) {
  const title = join([human(name), several && (account || 'unknown account')], ', ');
  const figures = join([known(used) && known(total) && fine(used) + ' of ' + fine(total),
    known(left) && (left < 0 ? fine(-left) + ' over' : fine(left) + ' left')], ', ');
  return unlimited ? gauge(title, 'unlimited', []) : meter(title, percent_used, figures,
    resets_at ? 'resets ' + when(resets_at) : 'reset time unknown'); }
const BUDGET = { ok: 'starts anew ', warning: 'nearly spent; starts anew ',
                 spent: 'spent: requests are refused until ' };
function showQuota() {
  lanes.sort((a, b) => a.unlimited - b.unlimited || a.name.localeCompare(b.name));
  const list = lanes.map(laneMeter), of = b => fine(b.used) + ' of ' + fine(b.limit) + ' credits';
  if (budget) list.unshift(meter('Budget', budget.percent, (budget.estimated ? '~' : '')
    + of(budget), BUDGET[budget.state] + when(budget.ends_at)), ...(budget.sessions || []).map(
    one => meter('Budget of session ' + one.session, one.percent, of(one))));
  show('quota', ...list.length ? list : [el('li.dim', 'No quota is known yet.')]); }
function limitLine({ account, scope, status, code, until, next_probe }) {
  const button = el('button', 'Clear'), name = join([scope === 'account' ? 'All models' : scope,
    several && account], ', ');
  const left = next_probe * 1000 - Date.now();
  button.setAttribute('aria-label', 'Clear the limit of ' + name);
  button.onclick = () => post('/limits/clear', { scope, account }).then(loadStats,
    error => button.after(error.message));
  return el('li.line.ends', el('span', el('b', name), ' limited by GitHub (' + join([status, code],
    ' ') + ') until ' + when(until) + '. Next probe: ' + (left > 0 ? 'in ' + span(left)
    : 'with the next request') + '.'), button); }
function showStats({ totals, accounts, quotas, limits }) {
  sums = totals; lanes = quotas; several = accounts.length > 1; showTiles(); showQuota();
  show('limits', ...limits.map(limitLine));
  show('accounts', ...accounts.map(account)); }
function showTiles() {
  const kept = summary.enabled, of = kept ? ' today' : ' since start';
  const c = kept ? lastDays(1)[0] : !sums ? {} : sums.requests ? sums : NOTHING;
  show('tiles', ...[['Running now', String([...rows.values()].filter(isOpen).length),
    asks.size ? asks.size + ' to decide' : 'requests'],
    ['Requests' + of, count(c.requests), count(c.errors) + ' failed'],
    ['Credits' + of, cost(c), known(c.estimated_credits) ? '~ is an estimate' : 'by GitHub'],
    ['Tokens' + of, count(total([prompt(c), c.output])), inOut(c)],
    ['Cache hits' + of, c.requests === 0 ? '–' : hits(c), 'of the prompt tokens']].map(
    ([dt, big, sub]) => el('div.card', el('dt', dt), el('dd.big', big), el('dd.sub', sub)))); }
// -- charts: a metric is a list of [name, color, figure]
let summary = { enabled: false, days: 7, by_day: [], by_model: [], by_client: [] };
const METRICS = {
  credits: [['reported', 's0', c => c.credits], ['estimated', 's3', c => c.estimated_credits]],
  tokens: [['prompt', 's0', c => total([c.input, c.cache_write])],
           ['prompt from cache', 's3', c => c.cache_read], ['output', 's1', c => c.output]],
  requests: [['answered', 's0', c => c.requests - c.errors], ['failed', 'over', c => c.errors]] };
const metric = () => METRICS[$('metric').value], height = c => total(metric().map(m => m[2](c)));
const words = c => $('metric').value === 'credits' ? cost(c) : count(height(c));
function stack(c, scale) {                                  // [[from, size, color]...]
  const sizes = metric().map(part => (part[2](c) || 0) * scale);
  return metric().map((part, at) => [total(sizes.slice(0, at)) || 0, sizes[at], part[1]]); }
const NOTHING = { requests: 0, errors: 0, input: 0, cache_read: 0, output: 0, credits: 0 };
function lastDays(number) {                                 // those without requests, too
  const date = ms => new Date(ms).toISOString().slice(0, 10);
  const found = new Map(summary.by_day.map(c => [c.day, c]));
  const here = date(Date.now() - new Date().getTimezoneOffset() * 6e4);
  const last = Date.parse([here, ...found.keys()].sort().pop());
  return Array.from({ length: number }, (_, at) => date(last - (number - 1 - at) * 864e5)).map(
    day => found.get(day) || { day, ...NOTHING }); }
function axisStep(most) {                                   // a round figure, 4 of which suffice
  const unit = 10 ** Math.floor(Math.log10(most / 3 || 1));
  return [1, 2, 5, 10].find(n => n * unit * 4 >= most) * unit; }
function showDays() {
  const days = lastDays(summary.days), width = Math.max(260, $('days').clientWidth);
  const most = Math.max(0, ...days.map(height)), step = axisStep(most);
  const steps = Math.ceil(most / step) || 1, slot = (width - 42) / days.length;
  const text = (x, y, words, anchor) => svg('text', { x, y, 'text-anchor': anchor }, words);
  const chart = svg('svg', { viewBox: '0 0 ' + width + ' 172', height: 172, role: 'img',
    'aria-label': $('metric').value + ' by day: ' + (join(days.map(
      c => c.requests && c.day + ' ' + words(c)), ', ') || 'none') });
  for (let n = 0, y = 150; n <= steps; n++, y -= 140 / steps) chart.append(
    svg('line', { x1: 42, x2: width, y1: y, y2: y }),
    text(34, y + 4, step < 1 ? fine(n * step) : count(n * step), 'end'));
  days.forEach((c, at) => {
    const x = 42 + (at + .15) * slot, middle = Math.min(x + .35 * slot, width - 20);
    chart.append(svg('g', {}, svg('title', {}, c.day + ': ' + words(c)),
      ...[[0, 140, 'clear'], ...stack(c, 140 / step / steps)].map(([from, size, color]) =>
        svg('rect', { x, y: 150 - from - size, width: .7 * slot, height: size, class: color })),
      height(c) === null ? text(middle, 146, '?', 'middle') : ''));
    if ((days.length - 1 - at) % Math.ceil(70 / slot) === 0) chart.append(text(middle, 167, clock(
      Date.parse(c.day + 'T12:00') / 1000, { month: 'short', day: 'numeric' }), 'middle')); });
  show('days', chart); }
function showRank(field) {
  const best = summary['by_' + field].slice().sort((a, b) => height(b) - height(a)).slice(0, 8);
  const scale = 100 / (height(best[0] || {}) || 1);
  show('by-' + field, ...best.map(c => gauge(c[field] || 'unknown', words(c), stack(c, scale)))); }
function showUsage() {
  $('charts').hidden = !summary.enabled; showDays(); showRank('model'); showRank('client');
  show('legend', ...metric().map(([name, color]) => el('span', svg('svg', { viewBox: '0 0 9 9' },
    svg('rect', { width: 9, height: 9, rx: 2, class: color })), name))); }
// -- tables: with roles, since on a phone each row is a card
const role = (name, e) => { e.setAttribute('role', name); return e; };
const line = (...tds) => role('row', el('tr', ...tds.map(td => role('cell', el('td', td)))));
const two = (big, ...small) => el('div', big, el('div.sub', join(small, ' · ')));
function fill(id, heads, lines) {
  const table = role('table', $(id)), body = table.tBodies[0] || table.createTBody();
  if (!table.tHead) table.createTHead().append(el('tr', ...heads.map(text => el('th', text))));
  for (const row of lines) heads.forEach((text, at) => { row.cells[at].dataset.label = text; });
  body.replaceChildren(...lines); }
const rows = new Map(), made = new WeakMap(), isOpen = row => row.state === 'running';
let shown = 15;
function outcome(row) {
  if (isOpen(row)) return pill(row.first_ms ? 'streaming' : 'waiting', 'run');
  if (!row.error && row.status < 400) return pill('done');
  const left = row.status === 499, what = left ? 'the client left' : human(row.error || 'failed');
  return two(pill(what, left ? 'dim' : 'bad'), row.message || 'status ' + row.status); }
function requestLine(row) {
  const asked = row.asked || row.model || 'unknown', open = isOpen(row);
  const age = open ? Date.now() - row.at * 1000 : row.total_ms;
  const used = row.model && row.model !== asked ? ' → ' + row.model : '';
  const yet = text => open ? text.replace(/unknown/g, '…') : text;
  return line(two(el('div', el('b', asked), used), row.client || 'unknown client',
      several && row.account, time(row.at)), outcome(row),
    two(row.route, row.dialect, row.streamed && 'streamed', ...row.repairs || [],
      ...(row.losses || []).map(field => 'without ' + field)),
    two(yet(span(row.first_ms)), span(age) + ' in all'), two(yet(inOut(row)), row.cache_read
      && hits(row) + ' from cache'), yet(rowCost(row))); }
const lineOf = row => !isOpen(row) && made.get(row) || made.set(row, requestLine(row)).get(row);
function showRequests() {
  const rank = row => isOpen(row) * 1e12 + row.at;
  const list = [...rows.values()].sort((a, b) => rank(b) - rank(a));
  list.slice(300).forEach(row => rows.delete(row.id));
  fill('requests', ['Model', 'State', 'Route', 'First byte', 'Tokens', 'Credits'],
       list.slice(0, shown).map(lineOf));
  $('more').hidden = list.length <= shown; showTiles();
  if (list.some(isOpen)) soon(showRequests, 1000); }
const PRICES = [['input', 'in'], ['cache_read', 'cached'], ['output', 'out']];
const price = p => !p ? 'unknown' : join(PRICES.map(([field, name]) => known(p[field])
  && '$' + cents(p[field]) + ' ' + name), ', ') || cents(p.multiplier).replace(/\d$/, '$&×');
const showModels = list => fill('catalogue', ['Model', 'State', 'Endpoints', 'Context', 'Output',
  'Price'], list.data.map(m => line(two(el('b', m.id), m.display_name), pill(m.state),
    m.supported_endpoints.join(' ') || 'unknown', count(m.context_window),
    count(m.max_output_tokens), price(m.price))));
// -- loading: a problem is told where the data would stand
const load = (id, path, done) => get(path).then(value => { done(value); show(id,
  value.enabled === false ? 'The history is off: figures since the start.' : value.problem || '');
  }, problem => show(id, problem.message));
const loadModels = () => load('problem', '/models' + ($('all').checked ? '?all=1' : ''),
                              showModels);
const loadQuota = () => load('quota-problem', '/usage',
                             value => show('raw', JSON.stringify(value, null, 2)));
const loadUsage = () => load('history-problem', '/history/summary?days=' + $('range').value,
                             value => { summary = value; showUsage(); loadStats(); });
const loadStats = () => get('/stats').then(showStats, () => {});
function loadAll() {
  loadUsage(); load('history-problem', '/history?limit=200', page => {
    page.rows.forEach(row => rows.has(row.id) || rows.set(row.id, row)); showRequests(); });
  if (ready) { loadModels(); loadQuota(); } }
const ON = {
  hello(value) {
    budget = value.budget; live = true; asks.clear(); showStats(value);
    [...rows.values()].filter(isOpen).forEach(row => rows.delete(row.id));
    for (const row of [...value.running, ...value.recent]) rows.set(row.id, row);
    value.approvals.forEach(one => asks.set(one.id, one));
    showAsks(); showRequests(); soon(loadAll, 50); },
  request(row) {
    rows.set(row.id, row); soon(showRequests, 100); if (!isOpen(row)) soon(loadUsage, 3000); },
  approval(one) { asks[one.state === 'waiting' ? 'set' : 'delete'](one.id, one); showAsks(); },
  quota() { soon(loadStats, 1000); },                       // accounts get their names late
  budget(value) { budget = value; showQuota(); } };
async function follow() {
  for (;; await pause(2000)) {
    await locked; await readEvents().catch(error => error.name === 'Error'
      && show('history-problem', 'No live updates: ' + error.message));
    live = false; check(); } }
async function watch() {
  for (;; await pause(live && ready ? 20e3 : 2000)) { await check(); if (live) loadStats(); } }
// -- controls
const NEXT = { auto: 'light', light: 'dark', dark: 'auto' }, kept = localStorage;
function setTheme(theme) {
  kept.setItem('theme', theme); document.documentElement.dataset.theme = theme;
  show('theme', '◐ ' + theme); $('theme').setAttribute('aria-label', 'Theme: ' + theme);
  $('theme').onclick = () => setTheme(NEXT[theme]); }
$('metric').onchange = showUsage; $('range').onchange = loadUsage; $('all').onchange = loadModels;
$('again').onclick = loadQuota; $('more').onclick = () => { shown += 50; showRequests(); };
window.onresize = () => soon(showUsage, 200); show('base', location.origin + '/v1');
setTheme(kept.getItem('theme') || 'auto'); showTiles(); showQuota(); follow(); watch();
"""
PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>copilot_proxy</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>%s</style></head>
<body><a class="skip" href="#main">Skip to content</a><header><h1>copilot_proxy</h1>
<span id="state" class="pill" role="status">loading</span><nav aria-label="Sections">
<a href="#usage">Usage</a> <a href="#activity">Requests</a> <a href="#models">Models</a>
<a href="#account">Account</a></nav><button id="theme"></button></header>
<main id="main" tabindex="-1"><p id="gone" class="card bad" role="alert" hidden></p>
<form id="lock" class="card loud" hidden><h2>This server asks for a key</h2><p class="line">
<label for="key">API key</label><input id="key" type="password" autocomplete="off" required>
<button class="main">Show</button><span id="lock-note" class="bad" role="alert"></span></p>
<p class="sub">It stays in this tab and is forgotten when the tab is closed.</p></form>
<section id="login" class="card loud" aria-live="polite" hidden></section>
<section id="asks" class="card loud" aria-live="polite" hidden><h2 id="asks-head" tabindex="-1">
Waiting for your decision</h2><ul id="ask-list"></ul></section><dl id="tiles" class="tiles"></dl>
<section class="card" aria-label="Quota"><div class="line"><h2>Quota</h2><button id="again">Refresh
</button></div><p id="quota-problem" class="bad"></p><ul id="limits"></ul>
<ul id="quota" class="grid"></ul></section>
<section id="usage" class="card" aria-label="Usage"><div class="line"><h2>Usage</h2><label>Show
<select id="metric"><option>credits<option>tokens<option>requests</select></label><label>of
<select id="range"><option value="7">7 days<option value="30" selected>30 days<option value="90">90
days</select></label></div><p id="history-problem" class="warn"></p><div id="charts">
<p id="legend" class="line key"></p><div id="days"><svg/></div><div class="grid"><div>
<h3>By model</h3><ul id="by-model"></ul></div><div><h3>By client</h3><ul id="by-client"></ul></div>
</div></div></section><section id="activity" class="card cards" aria-label="Requests"><h2>Requests
</h2><table id="requests"><caption>Running and recent ones, the newest first</caption></table>
<button id="more">Show more</button></section><section id="models" class="card cards"
aria-label="Models"><div class="line"><h2>Models</h2><label><input id="all" type="checkbox"> hidden
ones, too</label></div><p id="problem" class="bad"></p><table id="catalogue"><caption>Prices are
USD for a million tokens, or a multiple of one premium request</caption></table></section>
<section id="account" class="card" aria-label="Account"><h2>Account</h2><div id="accounts"></div>
<p><a href="/auth/device">Add or manage accounts</a></p><p>OpenAI clients: base URL
<code id="base"></code>; Anthropic clients: without <code>/v1</code>.</p><details><summary>What
GitHub says about the usage</summary><pre id="raw" tabindex="0"></pre></details>
<p id="version" class="sub"></p></section></main><script>%s</script></body></html>
""" % (PAGE_STYLE, PAGE_SCRIPT)


def csp_hash(text: str) -> str:
    """How a Content-Security-Policy names an inline script or style."""
    return (
        "'sha256-%s'"
        % base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    )


def page_headers(style: str, script: str) -> Headers:
    """What keeps a page to itself."""
    return {
        "Content-Security-Policy": "default-src 'none'; connect-src 'self'; script-src %s; "
        "style-src %s; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        % (csp_hash(script), csp_hash(style)),
        "X-Frame-Options": "DENY",
        "Cache-Control": "no-store",
        "Referrer-Policy": "no-referrer",
    }


PAGE_HEADERS = page_headers(PAGE_STYLE, PAGE_SCRIPT)

#: /auth/device: the state of a login lives in the script's memory, a key in sessionStorage
LOGIN_SCRIPT = """
const byId = id => document.getElementById(id);
const tell = (id, text) => { byId(id).textContent = text; };
async function ask(method, path, body, more) {
  const key = sessionStorage.getItem('copilot_proxy_key');
  const answer = await fetch(path, { method, body: body && JSON.stringify(body), headers: {
    'Content-Type': 'application/json', ...more,
    ...(key && { Authorization: 'Bearer ' + key }) } });
  const value = await answer.json();
  if (answer.status === 401) byId('door').hidden = false;
  if (!answer.ok) throw new Error((value.error || {}).message || answer.statusText);
  return value;
}
async function begin() {
  const login = await ask('POST', '/auth/device/start', {}), link = byId('link');
  if (/^https?:/.test(login.verification_uri)) link.href = login.verification_uri;
  tell('link', login.verification_uri); tell('code', login.user_code);
  let now = { status: 'pending' };
  for (byId('login').hidden = false; now.status === 'pending';) {
    await new Promise(done => setTimeout(done, 2000));
    now = await ask('GET', '/auth/device/poll', null, { 'X-Login-State': login.state });
  }
  byId('login').hidden = true;
  if (now.status !== 'granted') throw new Error(now.problem);
  const made = await ask('POST', '/auth/device/claim', { state: login.state });
  tell('said', 'Logged in' + (made.login ? ' as ' + made.login : '')
    + (made.key ? '. The API key of this account, shown this once: ' + made.key
      : '. No key is needed now; with --api-key the operator makes keys.'));
}
byId('begin').onclick = () => begin().catch(problem => tell('said', problem.message));
byId('door').onsubmit = event => {
  event.preventDefault(); sessionStorage.setItem('copilot_proxy_key', byId('key').value);
  byId('key').value = ''; byId('door').hidden = true; byId('begin').click(); };
"""
LOGIN_STYLE = PAGE_STYLE + "#said { overflow-wrap: anywhere; }"
LOGIN_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>copilot_proxy: login</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>%s</style></head><body><main><h1>Log in with GitHub</h1>
<form id="door" hidden><label>API key of this server
<input id="key" type="password" autocomplete="off" required></label> <button>Use</button></form>
<p><button id="begin">Get a login code</button></p>
<div id="login" hidden><p>Open <a id="link" target="_blank" rel="noreferrer"></a> and enter this
code:</p><p id="code" class="code"></p></div><p id="said" aria-live="polite"></p>
</main><script>%s</script></body></html>
""" % (LOGIN_STYLE, LOGIN_SCRIPT)
LOGIN_HEADERS = page_headers(LOGIN_STYLE, LOGIN_SCRIPT)


# ==== 20. Endpoints ===============================================================================
# One short function per route, and the table of routes.


async def account_for(exchange: Exchange) -> Account:
    """The account that serves this request.  Raises AuthError."""
    record = exchange.record
    if record.account is not None:
        return record.account
    return record.serve_by(
        exchange.caller.account or await exchange.app.login.copilot()
    )


async def choose_model(
    exchange: Exchange, copilot: Account, body: Json, refused: str = ""
) -> Model:
    """The model that the upstream chooses for a request that asks for `auto`."""
    key = session_key(exchange.head.headers, body)
    if key:
        key = "%s %s" % (exchange.caller.key_id, key)
    tier = copilot.tier_of(exchange.record.asked.model) or ""
    model = await copilot.auto.choose(AutoWish.read(key, tier, body), refused)
    exchange.headers["x-copilot-proxy-auto"] = printable(model.id)
    exchange.app.ledger.stats.count({"auto": {model.id: 1}})
    return model


async def resolve(exchange: Exchange, body: Json) -> tuple[Account, Model]:
    """(account, model) of a request.  Raises AuthError, BadRequest."""
    sessions, asked = exchange.app.sessions, body.get("model")
    key = session_key(exchange.head.headers, body)
    session = key and "%s %s" % (exchange.caller.key_id, key)
    if asked is None and session:  # Codex's desktop app leaves it out at times
        asked = body["model"] = sessions.get(session)
        exchange.put_body(dumps(body))

    if not isinstance(asked, str) or not asked:
        raise BadRequest(
            "'model' is required: the id of a model, see /v1/models", param="model"
        )

    exchange.record.name(exchange.caller.key_id, key, asked, body.get("stream") is True)
    if session:
        sessions[session] = asked
        if len(sessions) > MAX_SESSIONS:
            sessions.popitem(last=False)

    copilot = await account_for(exchange)
    betas = exchange.head.headers.get("anthropic-beta", "")
    if copilot.tier_of(asked) is not None:
        model = await choose_model(exchange, copilot, body)
        betas = ""  # the choice holds for this very model
    else:
        model = await copilot.find_model(asked)
    if betas:
        model = wider_sibling(model, betas, await copilot.models())
    name_model(exchange, model)
    if copilot.is_substitute(asked, model):  # the answer then names the real one
        exchange.put_body(fit_model(exchange.body, Edit(body), model.id))
        body["model"] = model.id

    return copilot, model


def name_model(exchange: Exchange, model: Model) -> None:
    """Note the model that answers, for the log and for the header that always names it."""
    exchange.record.ask(model)
    exchange.headers["x-copilot-proxy-model"] = printable(model.id)


def fit_model(data: bytes, edit: Edit, model_id: str) -> bytes:
    """The body to send: the client's own bytes where nothing but the model's id changes."""
    asked = edit.body["model"]
    if asked == model_id and not edit.changed:
        return data
    found: list[re.Match[bytes]] = []
    if not edit.changed:
        found = list(re.finditer(rb'"model"\s*:\s*' + re.escape(dumps(asked)), data))
    if len(found) != 1:
        return dumps(dict(edit.body, model=model_id))
    start, end = found[0].span()
    return data[:start] + b'"model":' + dumps(model_id) + data[end:]


def upstream_headers(
    exchange: Exchange, client: Dialect, upstream: Dialect, body: Json, model: Model
) -> Headers:
    """What of the request itself decides headers: who began it, images, Anthropic's versions."""
    given = exchange.head.headers
    said = exchange.record.initiator or given.get("x-initiator", "").lower()
    interaction = client.interaction(body)
    if said not in ("user", "agent"):
        said = "user" if interaction == "user" else "agent"
    headers = {"X-Initiator": said}
    if interaction in ("compaction", "background"):
        headers["X-Interaction-Type"] = "conversation-" + interaction
    if model.selector:
        headers["Copilot-Session-Token"] = model.selector
    if client.has_images(body):
        headers["Copilot-Vision-Request"] = "true"
    if upstream is MESSAGES:
        headers["anthropic-version"] = ANTHROPIC_VERSION
        betas = filter_betas(given.get("anthropic-beta", ""))
        if betas:
            headers["anthropic-beta"] = betas

    return headers


async def admit(exchange: Exchange, body: Json, model: Model, calls: int = 1) -> None:
    """Wait until this request may go up, once.  calls: how many it takes, see `admit_next`.
    Raises RateLimited, BadRequest, ClientGone."""
    headers, asked = exchange.head.headers, exchange.record.asked
    if exchange.ticket is None:
        turns = as_list(body.get("messages") or body.get("input"))
        last = as_object(turns[-1]) if turns else {}
        text = text_of(last.get("content")) or text_of(body.get("input"))
        if calls > 1:
            text = "[%d calls] %s" % (calls, text)
        about = {
            "client": headers.get("user-agent", "an unnamed client")[:200],
            "model": model.id,
            "text": text[:200],
        }
        exchange.ticket = Ticket(
            exchange.caller.name,
            asked.payer,
            headers.get("x-copilot-proxy-budget"),
            await account_for(exchange),
            about,
        )
    if exchange.ticket.is_admitted:
        return

    app = exchange.app
    if exchange.ticket.wish is not None:
        app.ledger.settle()  # what this payer has spent
    exchange.headers.update(await app.admission.admit(exchange.ticket, calls))
    app.ledger.show_running(exchange.record)


async def admit_next(exchange: Exchange) -> None:
    """Wait until the next call of a request of several may go up.  Raises RateLimited."""
    if exchange.ticket is not None:
        await exchange.app.admission.admit_next(exchange.ticket, exchange.record.cost())


def owner_of(exchange: Exchange, copilot: Copilot) -> str:
    """Whose kept responses are: the account's and the client's key's, as a hash of both."""
    keys = [exchange.head.headers.get(name) for name in (*KEY_HEADERS, "authorization")]
    return stable_id("", "%s %s" % (copilot.github_token, keys))


def tell_losses(
    exchange: Exchange, losses: Losses, repaired: Iterable[str] = ()
) -> None:
    """What did not go upstream, and what was repaired: to the client, the log and /stats."""
    headers = exchange.app.ledger.note_changes(exchange.record, losses, repaired)
    exchange.headers.update(headers)


async def inline_images(exchange: Exchange, body: Json) -> None:
    """--fetch-images: put images that are named by URL into the body, the newest first.

    Where the upstream would take no more, older ones are left out unfetched.  Raises BadRequest
    (413 for what grows too large)."""
    if exchange.app.settings.fetch_images:
        links = linked_images(body)
    else:
        links = []
    if not links:
        return
    asked = len(linked_images(last_turn(body)))
    if asked > MAX_IMAGES:
        raise BadRequest(
            "at most %d images by URL can be asked about at a time" % MAX_IMAGES
        )

    losses = Losses()
    size_bytes = len(exchange.body)
    for place, link in enumerate(reversed(links)):
        if place >= asked and (place >= MAX_IMAGES or size_bytes > MAX_SENT_BYTES):
            put_note(link.part)
            losses.add("images", "the upstream takes no more")
            continue
        media_type, data = await exchange.app.images.fetch(link.url)
        size_bytes += len(data)
        check_expanded(size_bytes)
        link.put(media_type, data)
    tell_losses(exchange, losses)
    exchange.put_body(dumps(body))


async def fall_back(
    exchange: Exchange, copilot: Copilot, model: Model, error: ProxyError
) -> Model | None:
    """The model of --fallback where a quota is used up, told in header and log; else None."""
    name, headers, other = exchange.app.settings.fallback, exchange.headers, model
    if name and is_quota(error):
        with contextlib.suppress(ProxyError):
            other = await copilot.find_model(name)
    if other.id == model.id:
        return None
    exchange.app.log.warning(
        "%s the quota for %s is used up: %s answers (--fallback)",
        exchange.id,
        model.id,
        other.id,
    )
    headers["x-copilot-proxy-fallback"] = "%s -> %s" % (model.id, other.id)
    return other


def failed_search(query: str, use: str, error: ProxyError) -> list[Json]:
    """A search that failed, as its client reads it."""
    if is_limit(error):
        code = "too_many_requests"
    else:
        code = "unavailable"
    content = {"type": "web_search_tool_result_error", "error_code": code}
    words_ = {"type": "text", "text": "Web search failed: %s" % error}
    return [*search_blocks(query, use, content), words_]


async def search_model(exchange: Exchange, copilot: Account) -> Model:
    """The model that searches.  Raises BadRequest."""
    settings = exchange.app.settings
    if settings.no_web_search:
        raise BadRequest("searching the web is off here (--no-web-search)")
    if settings.search_model:
        return await copilot.find_model(settings.search_model)

    models = [
        model
        for model in await copilot.models()
        if model.state == "enabled" and RESPONSES.path in model.endpoints
    ]
    for name in (*SEARCH_MODELS, "gpt-5"):
        for model in models:
            if model.id == name or name == "gpt-5" and model.id.startswith(name):
                return model
    raise BadRequest("no model of this account searches the web")


COMPACT_PATH = "/responses/compact"


async def read_beginning(
    answer: UpstreamResponse, pipeline: StreamRelay, timeout_s: float
) -> bytes:
    """What of a stream is for the client up to its first content.  Raises UpstreamError."""
    out: list[bytes] = []
    try:
        while not (answer.done or pipeline.ended or pipeline.has_content):
            out.append(pipeline.feed(await answer.read(timeout_s)))
        if answer.done:
            out.append(pipeline.close())
    except UpstreamError as error:
        error.mark_early()
        raise

    failure = pipeline.error
    if isinstance(failure, UpstreamError) and not pipeline.has_content:
        failure.mark_early()
        raise failure
    return b"".join(out)


class Job:
    """A request to a model, from its body to its answer.  Its life, top to bottom:

        stage      does                                               in section
        read       parse the body; a large one in a thread            20, Exchange
        identify   which account serves it                            18, account_for
        resolve    which model its name means                         15, Copilot.find_model
        expand     put in what it names by id or by URL               17, ResponseStore; 13
        plan       the dialect, body and headers to ask with          9, Plan; 8, care
        admit      wait for budget, limits, a person's approval       17, Admission
        send       to the upstream; what fails is tried again         15, Attempts
        answer     to the client: whole, or relayed as it comes       18, Exchange
        record     one row, one log line, whatever happened           18, Server.end

    Each stage calls down into its section and comes back.  Where one waits (`await`) the loop
    serves others; a client that leaves ends the job there, with ClientGone.

    A remedy of Attempts goes back to `plan`: a repaired body, or the model of --fallback.
    data: the body as bytes, parsed in `body`; keep: stores the answer under its id."""

    def __init__(self, exchange: Exchange, client: Dialect) -> None:
        self.exchange, self.client = exchange, client
        self.body: Json = {}
        self.data = b""
        self.keep: Callable[[str, bytes], None] | None = None
        self.plan: Plan | None = None
        self.repaired: list[str] = []
        self.echo: Json = {}  # what the answer repeats, beside what the body says
        self.copilot: Account
        self.model: Model
        self.attempts: Attempts

    @classmethod
    def part(cls, whole: Job, client: Dialect, body: Json) -> Job:
        """One call of a request that takes several; admitted once, with attempts of its own."""
        job = cls(whole.exchange, client)
        job.take(whole.copilot, whole.model, body)
        return job

    def take(
        self, copilot: Account, model: Model, body: Json, data: bytes = b""
    ) -> None:
        """What the first stages have found."""
        self.copilot, self.model = copilot, model
        self.body, self.data = body, data or dumps(body)
        exchange = self.exchange  # a cycle would keep the body alive
        self.attempts = Attempts(copilot, lambda: exchange.started)

    async def run(self) -> None:
        """All stages.  Raises ProxyError, ClientGone."""
        await self.serve(await self.exchange.read_json())

    async def serve(self, body: Json) -> None:
        """All stages behind `read`; `body` is what the exchange's bytes say."""
        exchange = self.exchange
        copilot, model = await resolve(exchange, body)
        body = await self.expand(body, copilot, model)
        self.take(copilot, model, body, exchange.body)

        if self.is_compaction():
            await compact(self)
            return
        answer = await self.ask()
        if answer is not None:
            await self.answer(answer)

    async def expand(self, body: Json, copilot: Account, model: Model) -> Json:
        """The body with all that it only names, in the shape of its dialect."""
        exchange = self.exchange

        if self.client is CHAT and "input" in body and "messages" not in body:
            request = RESPONSES.decode_request(
                body
            )  # Cursor asks so, and reads a chat answer
            tell_losses(exchange, request.losses)
            body = dict(CHAT.encode_request(request, model), model=body["model"])
            exchange.put_body(dumps(body))

        await inline_images(exchange, body)
        if self.client is RESPONSES:
            owner = owner_of(exchange, copilot)
            self.echo = given(previous_response_id=body.get("previous_response_id"))
            if exchange.app.store.expand(owner, body, len(exchange.body)):
                exchange.put_body(dumps(body))
            if body.get("store") is not False:
                self.keep = functools.partial(
                    exchange.app.store.put, owner, exchange.body
                )

        return body

    def is_compaction(self) -> bool:
        """Does it ask for one item in the place of the conversation so far?"""
        last = as_object((as_list(self.body.get("input")) or [None])[-1])
        return self.client is RESPONSES and (
            self.exchange.path == COMPACT_PATH or last.get("type") == COMPACTION_TRIGGER
        )

    async def ask(self) -> UpstreamResponse | None:
        """Plan, admit, send, and again after each remedy; None when the client has its answer
        already.  Raises ProxyError, ClientGone."""
        if not isinstance(self.body.get("stream"), (bool, type(None))):
            raise BadRequest("'stream' must be true or false", param="stream")
        while True:
            if self.plan is None:
                self.plan = await self.compute(self.make_plan)
            plan = self.plan
            if plan is None:
                await self.answer_search()
                return None

            data = await self.compute(functools.partial(self.body_for, plan))
            call = self.call_for(plan, data)
            await admit(self.exchange, plan.edit.body, self.model)
            try:
                return await self.send(plan, call)
            except ProxyError as error:
                forget_frames(error)
                if await self.remedy(plan, error):
                    continue
                if not self.tell(plan, error):
                    raise
                return None

    @classmethod
    async def search(
        cls, exchange: Exchange, copilot: Account, wish: SearchWish
    ) -> SearchResult:
        """Have a model search; it costs what its tokens do.  Raises ProxyError."""
        model = await search_model(exchange, copilot)
        exchange.record.begin_by("agent")  # it is a step of a tool
        exchange.headers["x-copilot-proxy-search"] = printable(model.id)
        exchange.app.ledger.stats.count({"searches": {model.id: 1}})
        exchange.app.log.info(
            "%s %s searches the web", exchange.id, printable(model.id)
        )

        job = cls(exchange, RESPONSES)
        job.take(copilot, model, wish.request(model))
        answer = await job.ask()
        if answer is None or job.plan is None:
            raise UpstreamError("the search has no answer")
        return SearchResult.read(job.plan.answer, Usage.of(job.plan.meter.counts))

    async def answer_search(self) -> None:
        """Claude Code asks for a search in a request of its own: another model makes it.  One that
        fails is told as such, instead of words made without one."""
        exchange, body = self.exchange, self.body
        wish = SearchWish.of_message(body)
        use, count, usage = stable_id("srvtoolu_", exchange.id), 1, Usage()
        if body.get("stream") is True:
            exchange.expect_stream(MESSAGES.keepalive)
        try:
            found = await self.search(exchange, self.copilot, wish)
            blocks, usage = found.blocks(wish.query, use), found.usage or usage
        except (UpstreamError, BadRequest) as error:
            blocks, count = failed_search(wish.query, use, error), 0
            exchange.record.fail(error)

        request = Request(str(body["model"]), "messages", key=exchange.id)
        message = MESSAGES.encode_response(
            Response(exchange.id, "", usage=usage), request
        )
        message["content"] = blocks
        message["usage"]["server_tool_use"] = {"web_search_requests": count}
        if body.get("stream") is True:
            exchange.finish(search_frames(message))
        else:
            exchange.reply_json(message)

    async def compute(self, work: Callable[[], Any]) -> Any:
        """`work()`, with a large body in a thread: streams would stand still meanwhile."""
        if len(self.data) <= INLINE_BYTES:
            return work()
        return await wait(InThread(work))

    def make_plan(self) -> Plan | None:
        """How to ask the model, with all that was learned of it; None for a search where there is
        none.  Raises BadRequest."""
        exchange, client, body, model = (
            self.exchange,
            self.client,
            self.body,
            self.model,
        )
        refused = self.copilot.memory.refused
        upstream = choose_upstream(client, model, refused, client.has_files(body))
        kinds = [
            str(as_object(tool).get("type")) for tool in as_list(body.get("tools"))
        ]
        has_search = upstream is MESSAGES and (model.id, SEARCH_TOOLS) not in refused
        if (
            client is MESSAGES
            and kinds
            and not has_search
            and all(kind.startswith(SEARCH_TOOLS) for kind in kinds)
        ):
            return None

        # as the client wrote it
        headers = upstream_headers(exchange, client, upstream, body, model)
        plan = Plan.make(
            client,
            upstream,
            body,
            model,
            int(time.time()),
            exchange.id,
            (model.id, BY_HUB + upstream.path) in refused,
        )
        plan.attach(headers, self.repaired, self.echo)
        if plan.is_translated and plan.pipeline and client.tells_prompt_first:
            sent = plan.edit.body
            plan.request.foresee(estimate_tokens(sent, model.is_claude, sample_tokens))
        plan.request.measure(exchange.record.elapsed_ns)
        self.copilot.memory.prepare(plan)
        return plan

    def body_for(self, plan: Plan) -> bytes:
        """What is sent: the client's own bytes as far as possible."""
        if plan.is_translated:
            data = dumps(plan.edit.body)
        else:
            data = fit_model(self.data, plan.edit, self.model.id)
        if (
            len(data) > MAX_SENT_BYTES
            and "Copilot-Vision-Request" in plan.headers
            and shed_images(plan.edit, len(data))
        ):
            data = fit_model(self.data, plan.edit, self.model.id)
        return data

    def call_for(self, plan: Plan, data: bytes) -> Call:
        """The call that a plan means; its losses are told, its way is recorded."""
        exchange, model = self.exchange, self.model
        tell_losses(exchange, plan.edit.losses, self.repaired)
        name_model(exchange, model)
        exchange.record.go_up(
            "translated" if plan.is_translated else "passthrough",
            plan.upstream.path,
            plan.headers["X-Initiator"],
        )
        return Call(
            plan.upstream.path,
            data,
            plan.headers,
            exchange.id,
            exchange.app.settings.answer_timeout_s,
            model.id,
            functools.partial(self.open, plan),
        )

    async def send(self, plan: Plan, call: Call) -> UpstreamResponse:
        """The head of a good answer.  Raises ProxyError."""
        exchange = self.exchange
        exchange.log_body("sent", call.body or b"")
        if plan.pipeline is not None:
            plan.pipeline.on_final = self.keep
            exchange.expect_stream(self.client.keepalive)

        answer = await self.attempts.send(call)
        self.copilot.memory.learn(plan)
        exchange.headers.update(passed_headers(answer.headers))
        exchange.record.hear(answer.headers, plan.meter)
        return answer

    async def open(self, plan: Plan, answer: UpstreamResponse) -> None:
        """Read an answer until it shows something to a user, a whole one to its end.  Raises
        UpstreamError for a failure before: it can still be answered by its status, or the
        upstream be asked again."""
        exchange = self.exchange
        plan.begin()
        is_stream = "event-stream" in answer.headers.get("content-type", "")
        timeout_s = exchange.app.settings.answer_timeout_s
        try:
            if plan.pipeline is not None and (is_stream or exchange.started):
                plan.begun = await read_beginning(answer, plan.pipeline, timeout_s)
                return
            if plan.pipeline is not None and not plan.is_translated:
                exchange.expect_whole()  # no keep-alive before a whole answer
            data = await answer.read_all(timeout_s=timeout_s)
            plan.begun, plan.is_whole = plan.read(data, is_stream), True
        except BaseException:
            answer.close()
            raise

    async def remedy(self, plan: Plan, error: ProxyError) -> bool:
        """The last three rows of the retry ladder, see Attempts -> is another try prepared?"""
        other, row = None, "fallback"
        if self.model.selector and is_auto_refusal(error):
            row = "auto"
        if not self.attempts.may(row):
            other = None
        elif row == "auto":
            other = await choose_model(
                self.exchange, self.copilot, self.body, self.model.selector
            )
        else:
            other = await fall_back(self.exchange, self.copilot, self.model, error)
        if other is not None:
            self.attempts.take(row)
            self.model, self.plan = other, None
            self.body = dict(loads(self.data), model=other.id)
            self.data = dumps(self.body)
            return True

        if not self.attempts.may("repair") or not self.copilot.memory.repair(
            plan, error
        ):
            return False
        self.attempts.take("repair")
        if plan.repairs.is_stale:
            self.body, self.plan = loads(self.data), None
        return True

    def tell(self, plan: Plan, error: ProxyError) -> bool:
        """Could the client be told of the error inside a stream?  Else it is raised."""
        if error.overflow == (0, 0):
            size = estimate_tokens(plan.edit.body, self.model.is_claude)
            most = self.model.limit("max_prompt_tokens") or size - 1
            error.overflow = max(size, most + 1), most
        is_wanted = (
            error.overflow and self.client is RESPONSES
        )  # Codex reads it there only
        if plan.pipeline is None or not (self.exchange.started or is_wanted):
            return False
        self.exchange.record.fail(error)
        plan.begin()
        self.exchange.finish(plan.pipeline.close(error))
        return True

    async def answer(self, answer: UpstreamResponse) -> None:
        """Whole, or as it comes.  Raises ProxyError, ClientGone."""
        exchange, plan = self.exchange, self.plan
        assert plan is not None
        self.data = b""  # several MB that nobody needs any more
        exchange.put_body(b"")
        if plan.pipeline is not None and not plan.is_whole:
            await exchange.relay(answer, plan.pipeline, plan.begun)
            return
        if plan.pipeline is not None and plan.is_translated:
            exchange.finish(plan.begun)
            return
        if self.keep is not None:
            self.keep(str(plan.answer.get("id")), plan.begun)
        exchange.reply(plan.begun)


async def alpha_search(exchange: Exchange) -> None:
    """POST /alpha/search: Codex' search of its own.  Pages cannot be opened: there is only what
    the searching model says of them."""
    exchange.answer_in(RESPONSES)
    body = exchange.json_object()
    key = session_key(exchange.head.headers, body)
    asked = str(body.get("model") or "")
    exchange.record.name(exchange.caller.key_id, key, asked, False)
    commands = as_object(body.get("commands"))
    searches = dicts_in(commands, "search_query")[:MAX_QUERIES]
    queries = [str(one["q"]) for one in searches if isinstance(one.get("q"), str)]
    if not commands:
        texts = [text_of(item.get("content")) for item in input_items(body)]
        queries = [text for text in texts if text][-1:]
    if not queries:
        exchange.reply_json(
            {"output": "Only search_query is supported here.", "encrypted_output": None}
        )
        return

    settings = as_object(body.get("settings"))
    domains = [name for one in searches for name in words(one.get("domains"))]
    filters = as_object(settings.get("filters"))
    if domains:
        filters = dict(filters, allowed_domains=domains)
    wish = SearchWish(
        "\n".join(queries), filters, as_object(settings.get("user_location")) or None
    )
    found = await Job.search(exchange, await account_for(exchange), wish)
    exchange.reply_json({"output": found.told, "encrypted_output": None})


async def compact(job: Job) -> None:
    """POST /responses/compact, or a request that ends with a `compaction_trigger`: one item that
    stands for the conversation so far."""
    exchange, body, keep = job.exchange, job.body, job.keep
    is_route, now = exchange.path == COMPACT_PATH, int(time.time())
    if "x-initiator" not in exchange.head.headers:
        exchange.record.begin_by("agent")  # no human asks for this
    if body.get("stream") is True and not is_route:
        exchange.expect_stream(RESPONSES.keepalive)
    encoder = ResponsesEncoder(
        RESPONSES, Request(str(body["model"]), now=now, key=exchange.id)
    )
    out, answer = encoder.feed(ResponseStart("", "")), encoder.answer

    try:
        item, usage = await make_compaction(job)
        out += encoder.whole_item(dict(item, id=stable_id("cmp_", exchange.id)))
        out += encoder.feed(ResponseEnd("stop", usage))
    except ProxyError as error:
        if not exchange.started:
            raise
        exchange.record.fail(error)
        out += encoder.feed(
            StreamError(UpstreamError(str(error), error.status, error.code))
        )

    if is_route:
        answer = {
            name: answer[name] for name in ("id", "created_at", "output", "usage")
        }
        answer["object"] = "response.compaction"
    elif keep is not None:
        keep(str(answer["id"]), dumps(answer))

    if exchange.keepalive:
        exchange.finish(out)
    else:
        exchange.reply_json(answer)


async def make_compaction(job: Job) -> tuple[Json, Usage | None]:
    """(a compaction item, token counts): the upstream's own where it makes one, else a summary by
    the same model, packed.  Raises ProxyError."""
    copilot, model = job.copilot, job.model
    refusal = model.id, COMPACTION_TRIGGER
    can = RESPONSES.path in model.endpoints and refusal not in copilot.memory.refused

    for native in (True, False) if can else (False,):
        part = Job.part(job, RESPONSES, compaction_request(job.body, native))
        try:
            answer = await part.ask()
        except (
            UpstreamError,
            BadRequest,
        ) as error:  # the latter of a --fallback without it
            if native and error.status in (400, 404, 422):
                continue
            raise

        plan = part.plan
        if answer is None or plan is None:
            break  # it was told already
        usage = Usage.of(plan.meter.counts)
        output = [as_object(item) for item in as_list(plan.answer.get("output"))]
        own = [item for item in output if item.get("type") in COMPACTIONS]
        if native and len(own) == 1 and own[0].get("encrypted_content"):
            return dict(own[0], type="compaction"), usage
        text = "\n\n".join(text_of(item.get("content")) for item in output).strip()
        if text and not native:
            if can and job.exchange.record.model is model:
                copilot.memory.refused.add(refusal)
            return {
                "type": "compaction",
                "encrypted_content": pack_opaque("compaction", None, text),
            }, usage

    raise UpstreamError("the model gave no summary of the conversation")


async def complete(dialect: Dialect, exchange: Exchange) -> None:
    """A request of any dialect to any model."""
    exchange.answer_in(dialect)
    await Job(exchange, dialect).run()


def refuse_websocket(exchange: Exchange) -> None:
    """Codex asks for a WebSocket first and falls back to HTTP when told so at once."""
    if "upgrade" in exchange.head.headers:
        exchange.keep_alive = False
        raise BadRequest("WebSockets are not served here: use plain HTTP", 426)
    raise BadRequest(
        "GET is not possible here, only POST", 405, headers={"Allow": "POST"}
    )


async def fetch_count(
    exchange: Exchange, copilot: Copilot, edit: Edit, model: Model, headers: Headers
) -> int:
    """The tokens of a prompt as the upstream counts them.  Raises ProxyError, ValueError."""
    MESSAGES.prepare_count(edit)
    answer = await copilot.send(
        Call(
            "/v1/messages/count_tokens",
            fit_model(exchange.body, edit, model.id),
            headers,
            exchange.id,
            GITHUB_TIMEOUT_S,
        )
    )
    counted = count_or_zero(
        as_object(loads(await answer.read_all())).get("input_tokens")
    )
    exchange.record.go_up("passthrough", "")
    return counted


async def count_tokens(exchange: Exchange) -> None:
    """The upstream's own count for models with /v1/messages, else an estimate, always 200: Claude
    Code waits for it."""
    exchange.answer_in(MESSAGES)
    body = exchange.json_object()
    check_list(body, "messages")
    counted, is_claude = 0, True  # the higher estimate until the model is known

    try:
        copilot, model = await resolve(exchange, body)
        is_claude = model.is_claude
        check_endpoint(model, MESSAGES.path)
        copilot.limits.admit(model.id, may_probe=False)
        await inline_images(exchange, body)
        edit = Edit(body)
        drop_nonce(edit)
        fit_body(edit, MESSAGES, model)
        headers = upstream_headers(exchange, MESSAGES, MESSAGES, body, model)
        counted = await fetch_count(exchange, copilot, edit, model, headers)
    except (ProxyError, ValueError) as error:
        if isinstance(error, BadRequest) and error.code != "unsupported_api_for_model":
            raise

    exchange.reply_json({"input_tokens": counted or estimate_tokens(body, is_claude)})


async def count_input(exchange: Exchange) -> None:
    """POST /responses/input_tokens: an estimate."""
    exchange.answer_in(RESPONSES)
    body = exchange.json_object()
    copilot, model = await resolve(exchange, body)
    exchange.app.store.expand(owner_of(exchange, copilot), body, len(exchange.body))
    exchange.reply_json(
        {
            "object": "response.input_tokens",
            "input_tokens": estimate_tokens(body, model.is_claude),
        }
    )


async def stored_response(exchange: Exchange) -> None:
    """GET and DELETE /responses/ID, GET /responses/ID/input_items: from the local store."""
    exchange.answer_in(RESPONSES)
    store, owner = exchange.app.store, owner_of(exchange, await account_for(exchange))
    response_id, _, tail = exchange.argument.partition("/")

    if (
        exchange.head.method == "DELETE"
        and not tail
        and store.delete(owner, response_id)
    ):
        exchange.reply_json({"id": response_id, "object": "response", "deleted": True})
        return

    found = store.find(owner, response_id)
    if (
        found is None
        or tail not in ("", "input_items")
        or exchange.head.method == "DELETE"
    ):
        raise BadRequest(
            "Response with id '%s' not found." % printable(exchange.argument, 80), 404
        )

    answer, items = found
    if not tail:
        exchange.reply_json(answer)
        return

    items = [
        dict({"id": stable_id("item_", "%s %d" % (response_id, at))}, **item)
        for at, item in enumerate(items)
    ]
    order, limit = (
        exchange.parameter("order") or "desc",
        exchange.parameter("limit") or "20",
    )
    left, after = items if order == "asc" else items[::-1], exchange.parameter("after")
    ids = [None, *(item["id"] for item in left)]
    most = digits_or_none(limit, 100)

    if order not in ("asc", "desc") or not most or after not in ids:
        raise BadRequest(
            "'order' must be asc or desc, 'limit' 1 to 100, 'after' an item's id"
        )

    left = left[ids.index(after) :]
    shown = left[:most]
    exchange.reply_json(
        {
            "object": "list",
            "data": shown,
            "has_more": len(shown) < len(left),
            "first_id": shown[0]["id"] if shown else None,
            "last_id": shown[-1]["id"] if shown else None,
        }
    )


async def completions(exchange: Exchange) -> None:
    """POST /completions, the old shape: each prompt is a chat of its own."""
    body = exchange.json_object()
    given = body.pop("prompt", None)
    if isinstance(given, str):
        prompts = [given]
    else:
        prompts = given

    if (
        not isinstance(prompts, list)
        or not prompts
        or not all(isinstance(p, str) for p in prompts)
    ):
        raise BadRequest(
            "'prompt' must be a string or an array of strings", param="prompt"
        )

    if len(prompts) > MAX_PROMPTS:
        raise BadRequest(
            "at most %d prompts are taken at a time" % MAX_PROMPTS, param="prompt"
        )

    for key in ("suffix", "best_of", "logprobs"):
        if body.get(key) and body[key] != 1:
            raise BadRequest(
                "'%s' is not supported: no chat model can do it" % key, param=key
            )
        body.pop(key, None)

    copilot, model = await resolve(exchange, body)
    echo, streams = body.pop("echo", False) is True, body.get("stream") is True
    relays, whole, choices = streams and len(prompts) == 1, {}, []
    counts = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    if len(prompts) > 1:
        await admit(exchange, {"input": prompts[0]}, model, len(prompts))
    for at, prompt in enumerate(prompts):
        if at:
            await admit_next(exchange)
        one = dict(body, messages=[{"role": "user", "content": prompt}], stream=relays)
        part = Job(exchange, CHAT)
        part.take(copilot, model, one)
        answer = await part.ask()
        plan = part.plan
        if answer is None or plan is None:
            return
        text = prompt if echo else ""
        if plan.pipeline is not None:
            stream = CompletionStream(plan.pipeline, text)
            await exchange.relay(answer, stream, stream.reshape(plan.begun))
            return

        whole = as_completion(plan.answer, text, at)
        choices += whole["choices"]
        for key in counts:
            counts[key] += count_or_zero(as_object(whole.get("usage")).get(key))

    whole.update(choices=choices, usage=counts)
    if streams:
        exchange.expect_stream(CHAT.keepalive)
        exchange.finish(b"data: %b\n\ndata: [DONE]\n\n" % dumps(whole))
    else:
        exchange.reply_json(whole)


def by_route(stats: Stats) -> dict[str, Json]:
    """{route: {status: count}}"""
    found: dict[str, Json] = {}
    for (route, status), count in stats.group("requests").items():
        found.setdefault(route, {})[status] = count
    return found


def price_check(stats: Stats) -> list[Json]:
    """For each model with both: the credits that the upstream told beside those of its listed
    prices, of the same requests."""
    found: dict[str, Json] = {}
    for (model, name), amount in stats.group("compared").items():
        found.setdefault(model, {"model": model})[name] = amount

    lines = []
    for line in found.values():
        reported, estimated = line["reported"] / NANO, line["estimated"] / NANO
        line.update(
            reported=reported, estimated=estimated, difference=reported - estimated
        )
        lines.append(line)
    return lines


def account_entry(account: Account) -> Json:
    """How it stands with one account; no secret."""
    token: CopilotToken | None = account.token.value
    problem = account.token.error
    return {
        "account": account.name,
        "problem": str(problem) if problem else None,
        "state": "problem" if problem else "ok" if token else "starting",
        "token": {
            "ready": token is not None,
            "direct": token is not None and token.direct,
            "expires_in_s": token and token.lifetime_s - token.age_s(read_clock()),
        },
        "requests": by_route(account.stats),
    }


def own_names(exchange: Exchange) -> tuple[str, ...]:
    """Of the account whose requests the caller may see; () for the operator, who sees all."""
    own = exchange.caller.account
    if exchange.caller.is_operator:
        return ()
    if own:
        return (own.name, own.id)
    return ("",)


def check_operator(exchange: Exchange) -> None:
    """Raises BadRequest 403: what belongs to all is for the operator."""
    if not exchange.caller.is_operator:
        raise BadRequest("this is for the operator's key", 403)


def stats_report(exchange: Exchange) -> Json:
    """Everything that /stats, /metrics and the page show at a glance; no secret, no words.  The
    operator sees that of all, others what is their account's."""
    app, ledger = exchange.app, exchange.app.ledger
    ledger.settle()
    names, account = own_names(exchange), exchange.caller.account
    if names and account:
        stats = account.stats
    else:
        stats = ledger.stats
    running = [
        dict(shown(record.row()), state="running")
        for record in list(ledger.running.values())
        if record.asked.label
    ]

    def visible(rows: Iterable[Json]) -> list[Json]:
        return [row for row in rows if not names or row["account"] in names]

    report: Json = {
        "version": __version__,
        "uptime_s": round(time.time() - app.started, 1),
        "demo": app.settings.demo,
        "requests": by_route(stats),
        "losses": stats.group("lossy"),
        "repairs": stats.group("repaired"),
        "running": visible(running),
        "recent": visible(map(shown, list(ledger.recent))),
        "quotas": visible(ledger.lanes()),
        "limits": visible(
            dict(rest, account=one.name)
            for one in app.accounts.all()
            for rest in one.limits.report()
        ),
        "accounts": visible(map(account_entry, app.accounts.all())),
        "totals": {**NO_COUNTS, "requests": 0, "errors": 0, **stats.group("totals")},
        "price_check": price_check(stats),
        "auto": stats.group("auto"),
        "searches": stats.group("searches"),
        "approvals": [],
        "budget": None,
        "history": ledger.history_state(),
        "log": {"lost_lines": lost_lines(app)},
    }
    with_credits(report["totals"])
    if not names:
        report["approvals"] = list(app.admission.approval.waiting.values())
        report["budget"] = ledger.budget.report()
    return report


def lost_lines(app: App) -> int:
    """Lines of the log that nobody took, counted by the streams they were written to."""
    return sum(
        getattr(getattr(handler, "stream", None), "lost", 0)
        for handler in app.log.handlers
    )


def label_value(value: Any) -> str:
    """A name as Prometheus wants it between the quotes; names come from upstreams and clients."""
    return visible(str(value)).replace("\\", "\\\\").replace('"', '\\"')


MetricFamily = Tuple[str, str, Tuple[str, ...], Mapping[Any, Any]]


def metric_families(report: Json, ledger: Ledger) -> list[MetricFamily]:
    """(name, what it counts, labels, {values of the labels: number}) of each metric."""
    group = ledger.stats.group
    reported = group("tokens").items()

    return [
        ("uptime_seconds", "since the start", (), {(): report["uptime_s"]}),
        ("requests_total", "requests", ("route", "status"), group("requests")),
        (
            "looks_total",
            "requests of the open page and of monitors, which only look",
            ("route", "status"),
            group("looks"),
        ),
        ("running", "requests that run now", (), {(): len(report["running"])}),
        (
            "tokens_total",
            "tokens as the upstream told them",
            ("model", "kind"),
            {key: count for key, count in reported if key[1] != "nano_aiu"},
        ),
        (
            "credits_total",
            "credits as the upstream told them",
            ("model",),
            {key[:1]: count / NANO for key, count in reported if key[1] == "nano_aiu"},
        ),
        (
            "losses_total",
            "fields that did not go upstream",
            ("field",),
            {(name,): count for name, count in group("lossy").items()},
        ),
        (
            "repairs_total",
            "requests that were mended",
            ("repair",),
            {(name,): count for name, count in group("repaired").items()},
        ),
        (
            "quota_used_percent",
            "used part of a quota",
            ("account", "lane"),
            {
                (lane["account"], lane["name"]): lane["percent_used"]
                for lane in report["quotas"]
            },
        ),
        (
            "budget_credits",
            "today's budget",
            ("kind",),
            {(kind,): (report["budget"] or {}).get(kind) for kind in ("limit", "used")},
        ),
        (
            "approvals_waiting",
            "requests that wait for a person",
            (),
            {(): len(report["approvals"])},
        ),
        (
            "history_dropped_total",
            "rows that were lost",
            (),
            {(): ledger.history.dropped},
        ),
        (
            "log_lines_lost_total",
            "lines of the log that nobody took",
            (),
            {(): report["log"]["lost_lines"]},
        ),
    ]


def render_metric(family: MetricFamily) -> Iterator[str]:
    """The lines of one metric in Prometheus' text format 0.0.4."""
    name, text, labels, values = family
    if name.endswith("_total"):
        kind = "counter"
    else:
        kind = "gauge"
    yield f"# HELP copilot_proxy_{name} {text}"
    yield f"# TYPE copilot_proxy_{name} {kind}"

    for key, value in values.items():
        if value is None:
            continue
        pairs = [f'{label}="{label_value(part)}"' for label, part in zip(labels, key)]
        shown = "{%s}" % ",".join(pairs) if pairs else ""
        yield f"copilot_proxy_{name}{shown} {value!r}"


def metrics(exchange: Exchange) -> None:
    """The same for Prometheus, in its text format 0.0.4."""
    check_operator(exchange)
    families = metric_families(stats_report(exchange), exchange.app.ledger)
    lines = [line for family in families for line in render_metric(family)]

    exchange.reply(
        ("\n".join(lines) + "\n").encode("utf-8", "replace"),
        kind="text/plain; version=0.0.4; charset=utf-8",
    )


def number_of(exchange: Exchange, name: str, usual: int, most: int) -> int:
    """A whole number of the query string.  Raises BadRequest."""
    text = exchange.parameter(name) or str(usual)
    number = digits_or_none(text, most)
    if not number:
        raise BadRequest(
            "'%s' must be a number from 1 to %d" % (name, most), param=name
        )
    return number


def wanted_rows(exchange: Exchange) -> dict[str, str]:
    """The filters of GET /history.  Raises BadRequest."""
    wanted = {
        name: exchange.parameter(name) or ""
        for name in ("model", "client", "state", "text")
    }
    if wanted["state"] and wanted["state"] not in ROW_STATES:
        states = ", ".join(ROW_STATES)
        raise BadRequest("'state' must be one of " + states, param="state")
    for name, value in wanted.items():
        if len(value) > MAX_FILTER_CHARS:
            raise BadRequest(
                "'%s' is longer than %d characters" % (name, MAX_FILTER_CHARS),
                param=name,
            )
    return wanted


async def history(exchange: Exchange) -> None:
    """GET /history: the newest rows, or those before row `before`; model, client, state and text
    choose among them."""
    ledger, limit = exchange.app.ledger, number_of(exchange, "limit", 50, 500)
    ledger.settle()
    before = number_of(exchange, "before", MAX_COUNT, MAX_COUNT)
    names, wanted = own_names(exchange), wanted_rows(exchange)
    owners = names or ("", "")

    def read(link: Any) -> list[Json]:
        agents = []
        if wanted["client"]:
            agents = [
                row[0] for row in link.execute("SELECT DISTINCT client FROM requests")
            ]
        condition, values = row_filter(wanted, agents)
        sql = (
            "SELECT * FROM requests WHERE n < ? AND (? OR account IN (?, ?)) AND %s "
            "ORDER BY n DESC LIMIT ?" % condition
        )
        return objects(link.execute(sql, (before, not names, *owners, *values, limit)))

    rows: list[Json] = []
    if len(names) != 1:
        work = functools.partial(ledger.history.read, read)
        rows = await wait(InThread(work)) or []

    found = rows
    if not ledger.history.path:
        found = [
            row
            for row in list(ledger.recent)[:limit]
            if not names or row["account"] in names
        ]

    exchange.reply_json(
        dict(
            ledger.history_state(),
            rows=[shown(row) for row in found],
            next=rows[-1]["n"] if len(rows) == limit else None,
        )
    )


async def summary(exchange: Exchange) -> None:
    """GET /history/summary: sums by local day and hour, by model, client and account, and with
    `sessions=1` by session."""
    check_operator(exchange)
    exchange.app.ledger.settle()
    days = number_of(exchange, "days", 30, 366)
    year, month, day = time.localtime(exchange.app.clock()[1])[:3]
    since = time.mktime((year, month, day - days + 1, 0, 0, 0, 0, 0, -1))
    with_sessions = exchange.parameter("sessions") == "1"

    work = functools.partial(summarise, since=since, with_sessions=with_sessions)
    read = functools.partial(exchange.app.ledger.history.read, work)
    found = await wait(InThread(read)) or {key: [] for key in SUMMARIES}

    total = [line for line in found["total"] if line["requests"]]
    none = with_credits({**NO_COUNTS, "requests": 0, "errors": 0, "first_ms": None})
    state = exchange.app.ledger.history_state()
    exchange.reply_json(
        {**state, **found, "days": days, "total": total[0] if total else none}
    )


async def events(exchange: Exchange) -> None:
    """GET /history/events: what happens, as server-sent events; first of all /stats."""
    check_operator(exchange)
    reader = exchange.app.ledger.events.open()
    try:
        exchange.expect_stream(CHAT.keepalive)
        exchange.write(Frame("hello", dumps(stats_report(exchange))).encode())
        while True:
            frame = await reader.get()
            if not frame:
                break
            exchange.write(frame)
            await exchange.client.room()
        exchange.finish()
    finally:
        exchange.app.ledger.events.close(reader)


def approvals(exchange: Exchange) -> None:
    """GET /approvals: what waits; POST /approvals/ID: a person's answer."""
    check_operator(exchange)
    approval = exchange.app.admission.approval
    if exchange.head.method != "POST":
        exchange.reply_json({"approvals": list(approval.waiting.values())})
        return
    allow = exchange.json_object().get("allow")
    if not isinstance(allow, bool):
        raise BadRequest("'allow' must be true or false", param="allow")
    exchange.reply_json(
        approval.decide(exchange.argument, "allowed" if allow else "refused")
    )


def read_embeddings(
    answer: bytes, wanted: int, counts: Json, meter: Meter
) -> list[Json]:
    """One batch's vectors in their order; its counts are added to `counts` and told to the meter.
    Raises UpstreamError."""
    try:
        value = as_object(loads(answer, decode_vectors, VECTORS_ROOM_BYTES))
    except ValueError:
        value = {}
    if value.get("error"):
        raise told_error(value)
    items = [
        item
        for item in as_list(value.get("data"))
        if isinstance(item, dict)
        and isinstance(item.get("embedding"), list)
        and all(
            type(number) in (int, float) and number - number == 0  # finite
            for number in item["embedding"]
        )
    ]
    if len(items) != wanted:
        raise UpstreamError(
            "the upstream gave %d embeddings for %d texts" % (len(items), wanted)
        )

    meter.take(value)
    for key in counts:
        counts[key] += count_or_zero(as_object(value.get("usage")).get(key))
    return sorted(items, key=lambda item: count_or_zero(item.get("index")))


async def fetch_vectors(
    exchange: Exchange, body: Json, write: Callable[[Json, int], bytes]
) -> tuple[list[bytes], Json]:
    """(each vector of `input` as `write` makes it of {"embedding"} and its number, the counts).
    Strings only upstream, floats only back: wrapped, split and merged here."""
    copilot, model = await resolve(exchange, body)
    check_endpoint(model, "/embeddings")
    texts = body.get("input")
    if isinstance(texts, str):
        texts = [texts]
    if (
        not isinstance(texts, list)
        or not texts
        or not all(isinstance(t, str) for t in texts)
    ):
        raise BadRequest(
            "'input' must be a string or an array of strings; token arrays cannot be "
            "decoded here",
            param="input",
        )
    if len(texts) > MAX_EMBEDDINGS:
        raise BadRequest(
            "at most %d inputs are taken at a time" % MAX_EMBEDDINGS, param="input"
        )
    exchange.record.go_up("passthrough", "/embeddings")
    batch = model.limit("max_inputs")
    if batch < 1:
        batch = EMBEDDING_BATCH
    await admit(exchange, {"input": texts[0]}, model, -(-len(texts) // batch))

    items: list[bytes] = []
    counts = {"prompt_tokens": 0, "total_tokens": 0}
    for at in range(0, len(texts), batch):
        if at:
            await admit_next(exchange)
        part = dict(body, model=model.id, input=texts[at : at + batch])
        call = Call("/embeddings", dumps(part), {}, exchange.id, model=model.id)
        answer = await copilot.send(call)
        exchange.headers.update(passed_headers(answer.headers))
        meter = Meter()
        exchange.record.hear(answer.headers, meter)
        for item in read_embeddings(
            await answer.read_all(), len(part["input"]), counts, meter
        ):
            items.append(write(item, len(items)))  # a third of what its numbers take
    return items, counts


async def embeddings(exchange: Exchange) -> None:
    """POST /embeddings; the numbers may be packed."""
    body = exchange.json_object()
    packing = body.pop("encoding_format", None)
    if packing not in (None, "float", "base64"):
        raise BadRequest(
            "'encoding_format' must be float or base64", param="encoding_format"
        )

    def write(item: Json, index: int) -> bytes:
        item.update(object="embedding", index=index)
        if packing == "base64":
            item["embedding"] = floats_to_base64(item["embedding"])
        return dumps(item)

    items, counts = await fetch_vectors(exchange, body, write)
    answer_end = dumps({"model": body["model"], "usage": counts})
    items[0] = b'{"object":"list","data":[' + items[0]
    items[-1] += b"]," + answer_end[1:]
    exchange.reply(b",".join(items))


def model_entry(model: Model) -> Json:
    """One model so that the OpenAI and the Anthropic SDKs both parse it."""
    found = re.search(r"(20\d\d)-(\d\d)-(\d\d)", str(model.entry.get("version") or ""))
    if found:
        created = moment_or_none(found.group())
    else:
        created = None
    # unknown, as Anthropic says it
    if found and created:
        date = found.group()
    else:
        date = "1970-01-01"

    return {
        "id": model.id,
        "object": "model",
        "type": "model",
        "created": int(created or 0),
        "created_at": date + "T00:00:00Z",
        "owned_by": model.vendor.lower() or "unknown",
        "display_name": model.name,
        "kind": model.kind,
        "state": model.state,
        "picker_enabled": model.picker,
        "supported_endpoints": list(model.endpoints),
        "context_window": model.limit("max_context_window_tokens") or None,
        "max_input_tokens": model.limit("max_prompt_tokens") or None,
        "max_output_tokens": model.limit("max_output_tokens") or None,
        "max_tokens": model.limit("max_output_tokens") or None,
        "lifecycle": "deprecated" if model.notice else "active",
        "notice": model.notice or None,
        "price_category": model.entry.get("model_picker_price_category"),
        "promo": model.promo or None,
        "price": price_entry(model),
    }


def price_entry(model: Model) -> Json | None:
    """USD per million tokens, or the multiplier of a request; None where nothing is listed."""
    prices = {name: price / 100 for name, price in model.prices.per_million().items()}
    billing = as_object(model.entry.get("billing"))
    multiplier = text_number_or_none(billing.get("multiplier"))
    if prices or multiplier is not None:
        return dict(
            dict.fromkeys(("input", "cache_read", "cache_write", "output")),
            **prices,
            multiplier=multiplier,
            auto_discount=model.prices.auto_discount / MILLION,
        )
    return None


async def shown_models(exchange: Exchange) -> list[Model]:
    """Those meant for users; with `?all=1` hidden and disabled ones, too."""
    copilot = await account_for(exchange)
    everything = exchange.parameter("all") not in (None, "0")
    shown = listed_models(await copilot.models(), everything, copilot.auto.is_there)
    return [model for model in shown if model.kind in ("chat", "embeddings")]


async def models(exchange: Exchange) -> None:
    """The models meant for users; `?all=1` shows hidden and disabled ones, too.  Codex asks with
    `client_version` and takes an empty `models` as: use your own list."""
    data = list(map(model_entry, await shown_models(exchange)))
    answer: Json = {
        "object": "list",
        "data": data,
        "has_more": False,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
    }
    if exchange.parameter("client_version") is not None:
        answer["models"] = []
    exchange.reply_json(answer)


async def one_model(exchange: Exchange) -> None:
    """One entry of the list; any spelling that finds a model will do.  Its id is then the one
    that was asked for, unless another model answers for it."""
    exchange.answer_in(
        MESSAGES if "anthropic-version" in exchange.head.headers else CHAT
    )
    copilot = await account_for(exchange)
    if copilot.tier_of(exchange.argument) is None:
        model = await copilot.find_model(exchange.argument)
    else:
        model = auto_models(await copilot.models())[0]
    name_model(exchange, model)
    if copilot.is_substitute(exchange.argument, model):
        shown = model.id
    else:
        shown = exchange.argument
    exchange.reply_json(dict(model_entry(model), id=shown))


async def usage(exchange: Exchange) -> None:
    """The upstream's usage answer, whole."""
    copilot = await account_for(exchange)
    answer = await copilot.fetch_usage()
    exchange.reply_json(answer)


async def token(exchange: Exchange) -> None:
    """The Copilot token, for this machine's own programs and only with --show-token."""
    if (
        not exchange.app.settings.show_token
        or "origin" in exchange.head.headers
        or "x-forwarded-for" in exchange.head.headers
        or not is_loopback(exchange.caller.address)
    ):
        raise BadRequest(
            "there is no route GET /token; it is off without --show-token",
            404,
            "unknown_url",
        )
    copilot = await account_for(exchange)
    value: CopilotToken = await copilot.token.get()
    exchange.headers["Cache-Control"] = "no-store"
    exchange.reply_json({"token": value.value})


def health(exchange: Exchange) -> None:
    """200 as soon as the port serves; whether calls will work is in `status`."""
    exchange.reply_json(health_report(exchange))


def health_report(exchange: Exchange) -> Json:
    """Login state, code to enter, token state; no secret, and to strangers only whether it works:
    who knows the code could log in as somebody else."""
    app = exchange.app
    account, login = exchange.caller.account or app.login.account, app.login.device
    report: Json = {
        "status": "ok" if account else "login_required",
        "version": __version__,
        "uptime_s": round(time.time() - app.started, 1),
        "demo": app.settings.demo,
    }

    if not exchange.caller.is_admitted:
        return report
    if account is not None:
        problem = account.token.error
        report["token"] = {
            "ready": account.token.value is not None,
            "problem": str(problem) if problem else None,
        }
    elif login is not None:
        report["login"] = {"problem": login.problem or None}
        if login.code:
            report["login"].update(
                user_code=login.code.user_code,
                verification_uri=login.code.verification_uri,
            )

    return report


def page(exchange: Exchange) -> None:
    """The one page: it holds no data and fetches what it shows."""
    exchange.headers.update(PAGE_HEADERS)
    exchange.reply(PAGE.encode(), kind="text/html; charset=utf-8")


def front_door(exchange: Exchange) -> None:
    """GET /: the page for browsers; programs that look for Ollama ask here whether it runs."""
    if "text/html" in exchange.head.headers.get("accept", ""):
        page(exchange)
    else:
        exchange.reply(b"Ollama is running", kind="text/plain; charset=utf-8")


def login_page(exchange: Exchange) -> None:
    """GET /auth/device: a shell, too."""
    exchange.headers.update(LOGIN_HEADERS)
    exchange.reply(LOGIN_PAGE.encode(), kind="text/html; charset=utf-8")


def check_door(exchange: Exchange) -> None:
    """Logins, keys and limits are for this server's own page and for programs.
    Raises BadRequest 403."""
    exchange.headers["Cache-Control"] = "no-store"
    if not exchange.is_same_origin:
        raise BadRequest(
            "pages of other origins cannot log in here, see keys or end limits",
            403,
            "origin_not_allowed",
        )


def clear_limits(exchange: Exchange) -> None:
    """POST /limits/clear: end the rest of `scope` (a model's id, or "account") of `account` (its
    name); without them of all -> what rested."""
    check_door(exchange)
    check_operator(exchange)
    if exchange.body:
        asked = exchange.json_object()
    else:
        asked = {}

    for name, value in asked.items():
        if name not in ("scope", "account") or not isinstance(value, str) or not value:
            raise BadRequest(
                "'scope' (a model's id, or \"account\") and 'account' (its name) are "
                "possible here, as strings",
                param=printable(name, 40),
            )

    exchange.reply_json(
        {
            "cleared": [
                {"account": account.name, "scope": scope}
                for account in exchange.app.accounts.all()
                if asked.get("account") in (None, account.name)
                for scope in account.limits.clear(asked.get("scope", ""))
            ]
        }
    )


async def begin_login(exchange: Exchange) -> None:
    """POST /auth/device/start: a code, and the state token that makes it this browser's login."""
    check_door(exchange)
    if not exchange.caller.is_operator:
        raise BadRequest("only the operator's key can begin a login", 403)
    by_key = bool(exchange.caller.key_id)
    open_login = functools.partial(exchange.app.accounts.open_login, by_key)
    state, login = await wait(InThread(open_login))
    if login.code is None:
        raise UpstreamError(login.problem or "GitHub gave no login code in time")
    exchange.reply_json(
        dict(
            health_report(exchange),
            state=state,
            user_code=login.code.user_code,
            verification_uri=login.code.verification_uri,
            expires_in=login.code.expires_in,
        )
    )


def poll_login(exchange: Exchange) -> None:
    """GET /auth/device/poll: how it stands; the server's own thread asks GitHub."""
    check_door(exchange)
    login = exchange.app.accounts.find_login(
        exchange.head.headers.get("x-login-state", "")
    ).login
    exchange.reply_json(
        {
            "status": "failed"
            if login.problem
            else "granted"
            if login.token
            else "pending",
            "problem": login.problem or None,
        }
    )


async def claim_login(exchange: Exchange) -> None:
    """POST /auth/device/claim: the account's key, once; null for a default login that was begun
    without the operator's key."""
    check_door(exchange)
    state = str(exchange.json_object().get("state"))
    claim = functools.partial(exchange.app.accounts.claim_login, state)
    exchange.reply_json(await wait(InThread(claim)))


def own_keys(exchange: Exchange) -> list[Key]:
    """The keys that the caller may see: the operator all, others their account's."""
    caller = exchange.caller
    return [
        key
        for key in exchange.app.accounts.keys.all()
        if caller.is_operator
        or caller.account
        and key.token == caller.account.github_token
    ]


def list_keys(exchange: Exchange) -> None:
    """GET /auth/tokens: ids and accounts, never keys."""
    check_door(exchange)
    exchange.reply_json(
        {
            "object": "list",
            "data": [
                {
                    "key_id": key.id,
                    "kind": "account" if key.token else "operator",
                    "login": key.login,
                    "host": key.host,
                    "created": key.made,
                }
                for key in own_keys(exchange)
            ],
        }
    )


def delete_key(exchange: Exchange) -> None:
    """DELETE /auth/tokens/ID: forget a key, and its account with the last one."""
    check_door(exchange)
    whole = exchange.app.accounts.keys.find(exchange.argument)
    found = [
        key
        for key in own_keys(exchange)
        if key.id == exchange.argument or whole is not None and key.hash == whole.hash
    ]
    if not found:
        raise BadRequest("there is no such key", 404, "unknown_key")
    if not found[0].made:
        raise BadRequest(
            "this key comes from --api-key or the environment: it ends with the next "
            "start without it",
            409,
        )
    exchange.app.accounts.forget(found)
    exchange.reply_json({"key_id": found[0].id, "deleted": True})


def accept_quietly(exchange: Exchange) -> None:
    """Telemetry of clients: dropped without noise."""
    exchange.reply_json({})


def nothing(exchange: Exchange) -> None:
    exchange.reply(b"", 204, "")


# ---- Gemini ----


def gemini_entry(model: Model) -> Json:
    """One model as Google lists it."""
    calls = ["generateContent", "streamGenerateContent", "countTokens"]
    if model.kind == "embeddings":
        calls = ["embedContent", "batchEmbedContents"]
    return {
        "name": "models/" + model.id,
        "baseModelId": model.id,
        "version": str(model.entry.get("version") or "001"),
        "displayName": model.name,
        "description": model.vendor,
        "inputTokenLimit": model.limit("max_prompt_tokens"),
        "outputTokenLimit": model.limit("max_output_tokens"),
        "supportedGenerationMethods": calls,
        "thinking": bool(model.efforts),
    }


async def gemini_models(exchange: Exchange) -> None:
    """GET /v1beta/models and /v1beta/models/ID."""
    collection, _, asked = exchange.argument.partition("/")
    if collection != "models":
        raise BadRequest(
            "there is no route %s" % printable(exchange.path, 80), 404, "unknown_url"
        )
    if not asked:
        shown = await shown_models(exchange)
        exchange.reply_json({"models": list(map(gemini_entry, shown))})
        return
    copilot = await account_for(exchange)
    model = await copilot.find_model(asked)
    name_model(exchange, model)
    exchange.reply_json(gemini_entry(model))


async def complete_with(exchange: Exchange, dialect: Dialect, body: Json) -> None:
    """`complete` with another body than the client's bytes say."""
    exchange.answer_in(dialect)
    exchange.put_body(dumps(body))
    await Job(exchange, dialect).serve(body)


async def generate_content(exchange: Exchange, body: Json) -> None:
    """:generateContent"""
    await complete_with(exchange, GEMINI, dict(body, stream=False))


async def stream_content(exchange: Exchange, body: Json) -> None:
    """:streamGenerateContent, as server-sent events or as the elements of an array."""
    dialect: Dialect = GEMINI_ARRAY
    if exchange.parameter("alt") == "sse":
        dialect = GEMINI
    await complete_with(exchange, dialect, dict(body, stream=True))


async def count_content(exchange: Exchange, body: Json) -> None:
    """:countTokens; the upstream's own count for Claude, else an estimate."""
    body = dict(
        as_object(body.get("generateContentRequest")) or body, model=body["model"]
    )
    exchange.put_body(dumps(body))
    copilot, model = await resolve(exchange, body)
    upstream = choose_upstream(GEMINI, model, copilot.memory.refused)
    headers = upstream_headers(exchange, GEMINI, upstream, body, model)
    plan = Plan.make(GEMINI, upstream, body, model, int(time.time()), exchange.id)
    counted = 0
    if upstream.counts_tokens:
        with contextlib.suppress(ProxyError, ValueError):
            copilot.limits.admit(model.id, may_probe=False)
            counted = await fetch_count(exchange, copilot, plan.edit, model, headers)
    exchange.reply_json(
        {"totalTokens": counted or estimate_tokens(plan.edit.body, model.is_claude)}
    )


def content_text(request: Json, place: str) -> str:
    """The text to embed.  Raises BadRequest."""
    parts = gemini_parts(camel_keys(request).get("content"))
    texts = [as_object(part).get("text") for part in parts]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise BadRequest("'%s.content' must hold parts with text" % place, param=place)
    return "\n".join(map(str, texts))


async def fetch_values(
    exchange: Exchange, model: str, requests: list[Json]
) -> list[bytes]:
    """The vector of each request, as Google writes it."""
    texts = [
        content_text(request, "requests[%d]" % at)
        for at, request in enumerate(requests)
    ]
    sizes = [camel_keys(request).get("outputDimensionality") for request in requests]
    body = given(model=model, input=texts, dimensions=next(filter(None, sizes), None))
    items, _ = await fetch_vectors(
        exchange, body, lambda item, index: dumps({"values": item["embedding"]})
    )
    return items


async def embed_content(exchange: Exchange, body: Json) -> None:
    """:embedContent"""
    (vector,) = await fetch_values(exchange, body["model"], [body])
    exchange.reply(b'{"embedding":%b}' % vector)


async def embed_contents(exchange: Exchange, body: Json) -> None:
    """:batchEmbedContents"""
    vectors = await fetch_values(exchange, body["model"], check_list(body, "requests"))
    exchange.reply(b'{"embeddings":[%b]}' % b",".join(vectors))


GEMINI_CALLS: dict[str, Callable[[Exchange, Json], Work]] = dict(
    zip(
        GEMINI_METHODS,
        (
            generate_content,
            stream_content,
            count_content,
            embed_content,
            embed_contents,
        ),
    )
)


async def gemini_call(exchange: Exchange) -> None:
    """POST .../models/ID:METHOD, where the path says what other dialects say in the body."""
    name, _, method = exchange.argument.rpartition(":")
    if method not in GEMINI_CALLS and exchange.path.startswith("/models/"):
        raise BadRequest(
            "POST is not possible here, only GET, HEAD",
            405,
            "method_not_allowed",
            headers={"Allow": "GET, HEAD"},
        )
    if method not in GEMINI_CALLS:
        raise BadRequest(
            "there is no method %s" % printable(method, 60), 404, "unknown_url"
        )
    body = await exchange.read_json()
    if name.startswith("models/"):
        name = name[len("models/") :]
    body["model"] = name
    await GEMINI_CALLS[method](exchange, body)


# ---- Ollama ----

OLLAMA_VERSION = "0.12.0"  # VS Code wants 0.6.4 at least
OLLAMA_ROOM = 4096  # what VS Code leaves of a context for the answer


def ollama_details(model: Model) -> Json:
    """What Ollama says of a model's file."""
    return {
        "parent_model": "",
        "format": "gguf",
        "family": model.vendor.lower() or "unknown",
        "families": [model.vendor.lower() or "unknown"],
        "parameter_size": "",
        "quantization_level": "",
    }


async def ollama_tags(exchange: Exchange) -> None:
    """GET /api/tags: the models."""
    entries = []
    for model in await shown_models(exchange):
        entries.append(
            {
                "name": model.id,
                "model": model.id,
                "size": 0,
                "modified_at": model_entry(model)["created_at"],
                "digest": hashlib.sha256(model.id.encode()).hexdigest(),
                "details": ollama_details(model),
            }
        )
    exchange.reply_json({"models": entries})


async def ollama_show(exchange: Exchange) -> None:
    """POST /api/show: what VS Code and others read of a model before they offer it."""
    body = exchange.json_object()
    body.setdefault("model", body.get("name"))
    _, model = await resolve(exchange, body)
    abilities = [
        ("completion", model.kind == "chat"),
        ("embedding", model.kind != "chat"),
        ("tools", model.supports.get("tool_calls") is True),
        ("vision", model.supports.get("vision") is True),
        ("thinking", bool(model.efforts)),
    ]

    context = model.limit("max_prompt_tokens") + OLLAMA_ROOM
    exchange.reply_json(
        {
            "license": "",
            "modelfile": "",
            "parameters": "",
            "template": "",
            "details": ollama_details(model),
            "modified_at": model_entry(model)["created_at"],
            "model_info": {
                "general.architecture": "copilot",
                "general.basename": model.name,
                "general.parameter_count": 0,
                "copilot.context_length": context,
            },
            "capabilities": [name for name, has_it in abilities if has_it],
        }
    )


async def ollama_call(dialect: Ollama, exchange: Exchange) -> None:
    """POST /api/chat and /api/generate: a stream unless the client wants none.  Without anything
    to answer the model is only to be loaded."""
    exchange.answer_in(dialect)
    body = await exchange.read_json()
    if body.get("stream") is None:
        body["stream"] = True
    if any(body.get(name) for name in ("messages", "prompt", "images")):
        await complete_with(exchange, dialect, body)
        return

    await resolve(exchange, body)
    reason = "load"
    if str(body.get("keep_alive")) in ("0", "0s", "0m"):
        reason = "unload"
    request = Request(body["model"], now=int(time.time()))
    exchange.reply_json(
        dialect.line({"content": ""}, request, done=True, done_reason=reason)
    )


async def ollama_embed(exchange: Exchange) -> None:
    """POST /api/embed, and the older /api/embeddings with one text and one vector."""
    body = exchange.json_object()
    is_old = exchange.path == "/api/embeddings"
    texts = body.get("input")
    if is_old:
        texts = body.get("prompt")
    asked = given(
        model=body.get("model"), input=texts, dimensions=body.get("dimensions")
    )
    items, counts = await fetch_vectors(
        exchange, asked, lambda item, index: dumps(item["embedding"])
    )
    if is_old:
        exchange.reply(b'{"embedding":%b}' % items[0])
        return

    about = dumps(
        {
            "model": body["model"],
            "total_duration": exchange.record.elapsed_ns(),
            "load_duration": 0,
            "prompt_eval_count": counts["prompt_tokens"],
        }
    )

    exchange.reply(b'%b,"embeddings":[%b]}' % (about[:-1], b",".join(items)))


async def ollama_pull(exchange: Exchange) -> None:
    """POST /api/pull: a model of the account is there already."""
    body = exchange.json_object()
    body.setdefault("model", body.get("name"))
    await resolve(exchange, body)
    exchange.reply(b'{"status":"success"}\n', kind=OLLAMA.stream_type)


def refuse_change(exchange: Exchange) -> None:
    """What makes, copies or deletes models."""
    raise BadRequest("models cannot be changed here: they are those of GitHub Copilot")


# ---- Azure ----

AZURE_CALLS: Mapping[str, Endpoint] = {
    "chat/completions": functools.partial(complete, CHAT),
    "completions": completions,
    "embeddings": embeddings,
    "responses": functools.partial(complete, RESPONSES),
}


async def azure_call(exchange: Exchange) -> None:
    """POST /openai/deployments/NAME/...: a deployment is a model, whatever the body names."""
    name, _, operation = exchange.argument.partition("/")
    endpoint = AZURE_CALLS.get(operation)

    if endpoint is None:
        raise BadRequest(
            "there is no route POST %s" % printable(exchange.path, 80),
            404,
            "unknown_url",
        )

    body = await exchange.read_json()
    if body.get("model") != name:
        exchange.put_body(dumps(dict(body, model=name)))
    try:
        work = endpoint(exchange)
        if work is not None:
            await work
    except BadRequest as error:
        if error.code != "model_not_found":
            raise
        raise BadRequest(str(error), 404, "DeploymentNotFound", error.param) from None


async def list_deployments(exchange: Exchange) -> None:
    """GET /openai/deployments: each model is one."""
    exchange.reply_json(
        {
            "object": "list",
            "data": [
                {
                    "id": model.id,
                    "model": model.id,
                    "status": "succeeded",
                    "object": "deployment",
                }
                for model in await shown_models(exchange)
            ],
        }
    )


ROUTES: Routes = {
    "/chat/completions": {"POST": functools.partial(complete, CHAT)},
    "/responses": {
        "POST": functools.partial(complete, RESPONSES),
        "GET": refuse_websocket,
    },
    "/responses/input_tokens": {"POST": count_input},
    COMPACT_PATH: {"POST": functools.partial(complete, RESPONSES)},
    "/alpha/search": {"POST": alpha_search},
    "/responses/*": {"GET": stored_response, "DELETE": stored_response},
    "/completions": {"POST": completions},
    "/messages": {"POST": functools.partial(complete, MESSAGES)},
    "/messages/count_tokens": {"POST": count_tokens},
    "/embeddings": {"POST": embeddings},
    "/stats": {"GET": lambda x: x.reply_json(stats_report(x))},
    "/metrics": {"GET": metrics},
    "/history": {"GET": history},
    "/history/summary": {"GET": summary},
    "/history/events": {"GET": events},
    "/approvals": {"GET": approvals},
    "/approvals/*": {"POST": approvals},
    "/limits/clear": {"POST": clear_limits},
    "/models": {"GET": models},
    "/models/*": {"GET": one_model, "POST": gemini_call},
    "/v1beta/*": {"GET": gemini_models, "POST": gemini_call},
    "/v1alpha/*": {"GET": gemini_models, "POST": gemini_call},
    DEPLOYMENTS: {"GET": list_deployments},
    DEPLOYMENTS + "/*": {"POST": azure_call},
    "/api/version": {"GET": lambda x: x.reply_json({"version": OLLAMA_VERSION})},
    "/api/tags": {"GET": ollama_tags},
    "/api/ps": {"GET": lambda x: x.reply_json({"models": []})},
    "/api/show": {"POST": ollama_show},
    "/api/chat": {"POST": functools.partial(ollama_call, OLLAMA)},
    "/api/generate": {"POST": functools.partial(ollama_call, OLLAMA_GENERATE)},
    "/api/embed": {"POST": ollama_embed},
    "/api/embeddings": {"POST": ollama_embed},
    "/api/pull": {"POST": ollama_pull},
    "/api/create": {"POST": refuse_change},
    "/api/copy": {"POST": refuse_change},
    "/api/push": {"POST": refuse_change},
    "/api/delete": {"DELETE": refuse_change},
    "/api/blobs/*": {"GET": refuse_change, "POST": refuse_change},
    "/usage": {"GET": usage},
    "/token": {"GET": token},
    "/health": {"GET": health},
    "/": {"GET": front_door},
    "/dashboard": {"GET": page},
    "/auth/device": {"GET": login_page},
    "/auth/device/start": {"POST": begin_login},
    "/auth/device/poll": {"GET": poll_login},
    "/auth/device/claim": {"POST": claim_login},
    "/auth/tokens": {"GET": list_keys},
    "/auth/tokens/*": {"DELETE": delete_key},
    "/api/event_logging/batch": {"POST": accept_quietly},
    "/favicon.ico": {"GET": nothing},
}


# ==== 21. Demo ====================================================================================
# `start --demo`: a make-believe GitHub and Copilot on a loopback port of this process, so that a
# client can be tried without account and network.  The proxy's own code runs unchanged; only the
# upstream's address differs.  Every answer says that it is the demo.

DEMO_TEXT = "This is the copilot_proxy demo; no model was asked."
DEMO_PAUSE_S = 0.02  # between two words, so that streaming can be seen
#: credits for a million tokens, in the upstream's own shape; the same for all models
DEMO_PRICES = {
    "batch_size": MILLION,
    "default": {
        "input_price": 100,
        "cache_read_price": 10,
        "cache_write_price": 125,
        "output_price": 500,
        "max_prompt_tokens": 136000,
    },
    "long_context": {"input_price": 200, "output_price": 750},
}


def demo_model(name: str, vendor: str, endpoints: str, efforts: str = "") -> Json:
    """A catalogue entry in the upstream's own shape."""
    if endpoints == "/embeddings":
        kind = "embeddings"
    else:
        kind = "chat"
    supports: Json = {
        "streaming": True,
        "tool_calls": True,
        "dimensions": kind == "embeddings",
    }

    if efforts:
        supports.update(
            reasoning_effort=efforts.split(), adaptive_thinking=vendor == "Anthropic"
        )

    if vendor == "Anthropic":
        supports.update(max_thinking_budget=32000, min_thinking_budget=1024)
    entry: Json = {
        "id": name,
        "name": name + " (demo)",
        "object": "model",
        "vendor": vendor,
        "version": name,
        "model_picker_enabled": kind == "chat",
        "is_chat_default": name == CHEAP_MODEL,
        "billing": {"token_prices": DEMO_PRICES},
        "capabilities": {
            "type": kind,
            "family": name,
            "tokenizer": "o200k_base",
            "limits": {
                "max_context_window_tokens": 200000,
                "max_prompt_tokens": 168000,
                "max_output_tokens": 32000,
                "max_inputs": 512,
            },
            "supports": supports,
        },
    }

    if endpoints not in ("/chat/completions", "/embeddings"):
        entry["supported_endpoints"] = endpoints.split()
    return entry


#: one or two of each family, with the endpoints that Copilot listed for it in the second half of
#: 2026: the GPTs from 5.3 on speak Responses only, the Claudes from 4.7 on Messages only
DEMO_MODELS = [
    demo_model(
        "gpt-5-mini", "Azure OpenAI", "/chat/completions /responses", "low medium high"
    ),
    demo_model("gpt-5.3-codex", "OpenAI", "/responses", "low medium high xhigh"),
    demo_model("gpt-5.6-terra", "OpenAI", "/responses", "low medium high xhigh"),
    demo_model("claude-haiku-4.5", "Anthropic", "/chat/completions /v1/messages"),
    demo_model(
        "claude-sonnet-4.6",
        "Anthropic",
        "/chat/completions /v1/messages",
        "low medium high",
    ),
    demo_model("claude-sonnet-5", "Anthropic", "/v1/messages", "low medium high"),
    demo_model("claude-opus-5", "Anthropic", "/v1/messages", "low medium high max"),
    demo_model("gemini-3.1-pro-preview", "Google", "/chat/completions", "low high"),
    demo_model("grok-4.5", "xAI", "/chat/completions"),
    demo_model("kimi-k3", "Moonshot AI", "/chat/completions"),
    demo_model("mai-code-1-flash-picker", "Microsoft", "/responses"),
    demo_model("text-embedding-3-small", "Azure OpenAI", "/embeddings"),
]


def demo_response(request: Request, prompt_tokens: int) -> Response:
    """What the demo says: the prompt, or a call of the first tool when it speaks of a tool."""
    if request.turns:
        parts = request.turns[-1].parts
    else:
        parts = []
    results = [
        result_text(part, request) for part in parts if isinstance(part, ToolResult)
    ]
    said = "\n".join(results) or join_texts(parts)
    text = "%s %s: %s" % (
        DEMO_TEXT,
        "The tool answered" if results else "You said",
        said[:2000],
    )

    calls = bool(request.tools) and not results and "tool" in said.lower()
    if calls:
        part: Part = ToolCall("call_" + request.key, request.tools[0].name)
    else:
        part = Text(text)
    return Response(
        "",
        request.model,
        [part],
        "tool_use" if calls else "stop",
        Usage(prompt_tokens, output=len(text.split())),
    )


async def demo_answer(dialect: Dialect, exchange: Exchange) -> None:
    """A request of any dialect to the demo; streams come at a pace that can be seen."""
    body = exchange.json_object()
    request = dialect.decode_request(body)
    request.now, request.key, request.wants_usage = int(time.time()), exchange.id, True
    response = demo_response(request, estimate_tokens(body))
    if not request.stream:
        exchange.reply_json(dialect.encode_response(response, request))
        return

    encoder = dialect.stream_encoder(request)
    exchange.expect_stream(b": demo\n\n")

    for event in unfold(response):
        words: list[Event] = [event]
        if isinstance(event, PartDelta):
            words = [
                PartDelta(event.index, w) for w in re.findall(r"\S+\s*", event.text)
            ]
        for word_ in words:
            exchange.write(encoder.feed(word_))
            if len(words) > 1:
                await wait(Pause(DEMO_PAUSE_S))

    exchange.finish()


def demo_embeddings(exchange: Exchange) -> None:
    """Vectors made from a hash: equal texts have equal vectors, no more is promised."""
    body = exchange.json_object()
    size = min(count_or_zero(body.get("dimensions")) or 8, 1536)
    data = []
    for at, text in enumerate(as_list(body.get("input"))):
        digest = (hashlib.sha256(str(text).encode("utf-8", "replace")).digest() * 48)[
            :size
        ]
        data.append(
            {"index": at, "embedding": [(byte - 127.5) / 127.5 for byte in digest]}
        )
    count = sum(len(str(text)) // 4 + 1 for text in as_list(body.get("input")))
    exchange.reply_json(
        {"data": data, "usage": {"prompt_tokens": count, "total_tokens": count}}
    )


def demo_auto(exchange: Exchange) -> None:
    """POST /auto of the demo: always the same model."""
    chosen = DEMO_MODELS[0]
    exchange.reply_json(
        {
            "session_token": "demo",
            "expires_at": int(time.time()) + 3600,
            "selected_model": chosen,
            "discounted_costs": {chosen["id"]: 0.1},
        }
    )


def demo_token(exchange: Exchange) -> None:
    """A token of the make-believe Copilot."""
    exchange.reply_json(
        {
            "token": "tid=demo",
            "expires_at": int(time.time()) + 1800,
            "refresh_in": 1500,
            "chat_enabled": True,
        }
    )


def demo_user(exchange: Exchange) -> None:
    """GET /copilot_internal/user and /user of the demo."""
    exchange.reply_json(
        {
            "login": "demo",
            "copilot_plan": "demo",
            "quota_snapshots": {
                "premium_interactions": {
                    "entitlement": 300,
                    "remaining": 226,
                    "percent_remaining": 75.4,
                    "quota_remaining": 226.3,
                    "unlimited": False,
                },
                "chat": {
                    "entitlement": 0,
                    "remaining": 0,
                    "percent_remaining": 100.0,
                    "unlimited": True,
                },
            },
            "quota_reset_date": "2099-01-01",
        }
    )


DEMO_ROUTES: Routes = {
    "/copilot_internal/*": {
        "GET": lambda x: (demo_token if x.argument == "v2/token" else demo_user)(x)
    },
    "/user": {"GET": demo_user},
    "/auto": {"POST": demo_auto},
    "/models": {"GET": lambda x: x.reply_json({"object": "list", "data": DEMO_MODELS})},
    "/chat/completions": {"POST": functools.partial(demo_answer, CHAT)},
    "/responses": {"POST": functools.partial(demo_answer, RESPONSES)},
    "/messages": {"POST": functools.partial(demo_answer, MESSAGES)},
    "/messages/count_tokens": {
        "POST": lambda x: x.reply_json(
            {"input_tokens": estimate_tokens(x.json_object())}
        )
    },
    "/embeddings": {"POST": demo_embeddings},
}


def start_demo(settings: Settings) -> Server:
    """Start the make-believe upstream and point `settings` at it."""
    log = logging.getLogger("copilot_proxy.demo")  # its requests are not the user's
    log.disabled = True
    app = App(Settings(no_history=True), {}, log=log)
    app.accounts.keys = KeyFile("", "", ())  # everybody may ask it
    server = Server(app, DEMO_ROUTES, "127.0.0.1", 0)
    server.start()
    settings.github_url, settings.copilot_url = server.url, ""
    settings.github_token = "ghu_demo"
    return server


# ==== 22. Setup ===================================================================================
# What a client, a service manager or a person behind a company proxy needs: tables of text with
# places for addresses, keys and models, and the few functions that fill, merge and try them.

_LARGE_GPT = "gpt-(?!.{0,40}(?:mini|nano))"


@dataclass(frozen=True)
class Recipe:
    """How a client is set up; all of it text with %(places)s that `fill` knows.
    main, small: patterns of model ids, best first.  env: variables, those that stay empty are left
    out.  run: what is typed, `typed` into it.  files: (path, text, text for each model); what
    stands before // is moved by a $VARIABLE.  suffix: of models with a window of 1M tokens.
    sign, named: patterns that find in those files that they are about this proxy, and a setting
    with the model it names."""

    about: str
    dialect: Dialect = CHAT
    main: tuple[str, ...] = ("claude-sonnet", _LARGE_GPT, "gpt-")
    small: tuple[str, ...] = ("haiku", "-mini", "flash", "nano")
    env: str = ""
    run: str = ""
    typed: str = ""
    files: tuple[tuple[str, str, str], ...] = ()
    note: str = ""
    suffix: str = ""
    sign: str = ""
    named: str = ""


_LLM = "$LLM_USER_PATH:%s//" % {
    "win32": "~/AppData/Roaming/io.datasette.llm",
    "darwin": "~/Library/Application Support/io.datasette.llm",
}.get(sys.platform, "~/.config/io.datasette.llm")
_CODEX = "-c model_providers.copilot_proxy."

CLIENTS: Mapping[str, Recipe] = {
    "claude-code": Recipe(
        "Claude Code",
        MESSAGES,
        ("claude-sonnet", "claude", _LARGE_GPT, "gpt-"),
        env="ANTHROPIC_BASE_URL=%(url)s ANTHROPIC_AUTH_TOKEN=%(key)s ANTHROPIC_MODEL=%(main)s "
        "ANTHROPIC_DEFAULT_OPUS_MODEL=%(opus)s ANTHROPIC_DEFAULT_SONNET_MODEL=%(main)s "
        "ANTHROPIC_DEFAULT_HAIKU_MODEL=%(small)s CLAUDE_AUTOCOMPACT_PCT_OVERRIDE=%(percent)s "
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC=1",
        run="claude",
        suffix="[1m]",
        note="ANTHROPIC_API_KEY must not be set beside it.",
        sign='"ANTHROPIC_BASE_URL"',
        named=r'"(ANTHROPIC\w{0,40}_MODEL|CLAUDE_CODE_SUBAGENT_MODEL|model)" *: *"([^"\n]{1,200})"',
        files=(
            ("$CLAUDE_CONFIG_DIR:~/.claude//settings.json", '{"env": {%(env)s}}', ""),
            (
                "$CLAUDE_CONFIG_DIR:~//.claude.json",
                '{"hasCompletedOnboarding": true}',
                "",
            ),
        ),
    ),
    "codex": Recipe(
        "Codex",
        RESPONSES,
        ("codex(?!.{0,40}mini)", _LARGE_GPT, "gpt-"),
        sign="""model_provider *= *["']copilot_proxy["']""",
        named=r"""(?m)^ *((?:review_)?model) *= *["']([^"'\n]{1,200})["']""",
        run="codex -m %(main)s -c model_provider=copilot_proxy -c model_context_window=%(window)s "
        + _CODEX
        + "name=copilot_proxy "
        + _CODEX
        + "base_url=%(base)s "
        + _CODEX
        + "wire_api=responses "
        + _CODEX
        + "experimental_bearer_token=%(key)s",
        files=(
            (
                "$CODEX_HOME:~/.codex//config.toml",
                """\
model = "%(main)s"
model_provider = "copilot_proxy"
model_context_window = %(window)s

[model_providers.copilot_proxy]
name = "copilot_proxy"
base_url = "%(base)s"
wire_api = "responses"
experimental_bearer_token = "%(key)s"
""",
                "",
            ),
        ),
    ),
    "opencode": Recipe(
        "opencode",
        run="opencode",
        sign='"copilot_proxy"',
        named=r'"((?:small_)?model)" *: *"copilot_proxy/([^"\n]{1,200})"',
        files=(
            (
                "$XDG_CONFIG_HOME:~/.config//opencode/opencode.json",
                """\
{"$schema": "https://opencode.ai/config.json", "model": "copilot_proxy/%(main)s",
 "small_model": "copilot_proxy/%(small)s", "provider": {"copilot_proxy": {
   "npm": "@ai-sdk/openai-compatible", "name": "copilot_proxy",
   "options": {"baseURL": "%(base)s", "apiKey": "%(key)s"}, "models": {%(models)s}}}}""",
                (
                    '"%(id)s": {"name": "%(name)s", "limit": '
                    '{"context": %(context)s, "output": %(out)s}}'
                ),
            ),
        ),
    ),
    "aider": Recipe(
        "aider",
        env="OPENAI_API_BASE=%(base)s OPENAI_API_KEY=%(key)s",
        run="aider --model openai/%(main)s --weak-model openai/%(small)s",
        sign="openai-api-base",
        named=r"""(?m)^((?:weak-|editor-)?model) *: *["']?openai/([^\s#"']{1,200})""",
        files=(
            (
                "~//.aider.conf.yml",
                (
                    "openai-api-base: %(base)s\nopenai-api-key: %(key)s\n"
                    "model: openai/%(main)s\nweak-model: openai/%(small)s\n"
                ),
                "",
            ),
            (
                "~//.aider.model.metadata.json",
                "{%(models)s}",
                (
                    '"openai/%(id)s": {"litellm_provider": "openai", "mode": "chat", '
                    '"max_input_tokens": %(window)s, "max_output_tokens": %(out)s}'
                ),
            ),
        ),
    ),
    "continue": Recipe(
        "Continue (VS Code, JetBrains)",
        note="Choose copilot_proxy among its configurations.",
        files=(
            (
                "$CONTINUE_GLOBAL_DIR:~/.continue//assistants/copilot_proxy.yaml",
                (
                    "name: copilot_proxy\nversion: 1.0.0\nschema: v1\nmodels:\n%(models)s"
                    '  - {name: "%(embed)s", provider: openai, model: "%(embed)s", '
                    "roles: [embed],\n"
                    '     apiBase: "%(base)s", apiKey: "%(key)s"}\n'
                ),
                (
                    '  - {name: "%(name)s", provider: openai, model: "%(id)s", '
                    'roles: [chat, edit, apply],\n     apiBase: "%(base)s", apiKey: "%(key)s"}\n'
                ),
            ),
        ),
    ),
    "cline": Recipe(
        "Cline, Roo Code, Kilo Code",
        note=(
            "Enter on their settings page:\n  API provider    OpenAI Compatible\n  Base URL        "
            "%(base)s\n  API key         %(key)s\n  Model           %(main)s\n  Context window  "
            "%(window)s\n  Max output      %(out)s"
        ),
    ),
    "open-webui": Recipe(
        "Open WebUI",
        run="open-webui serve",
        env="OPENAI_API_BASE_URL=%(base)s OPENAI_API_KEY=%(key)s DEFAULT_MODELS=%(main)s "
        "TASK_MODEL_EXTERNAL=%(small)s RAG_EMBEDDING_ENGINE=openai RAG_OPENAI_API_KEY=%(key)s "
        "RAG_OPENAI_API_BASE_URL=%(base)s RAG_EMBEDDING_MODEL=%(embed)s",
        note="They count at its first start, later its admin page.  In a container its address is\n"
        "http://host.docker.internal:PORT/v1: start the proxy with --host 0.0.0.0 --api-key\n"
        "and --allow-host host.docker.internal.",
    ),
    "llm": Recipe(
        "llm",
        run="llm -m copilot-%(main)s Hello",
        files=(
            (
                _LLM + "extra-openai-models.yaml",
                "%(models)s",
                (
                    "- model_id: copilot-%(id)s\n  model_name: %(id)s\n  api_base: %(base)s\n"
                    "  api_key_name: copilot_proxy\n  supports_tools: true\n"
                ),
            ),
            (_LLM + "keys.json", '{"copilot_proxy": "%(key)s"}', ""),
        ),
    ),
    "openai-sdk": Recipe(
        "OpenAI SDKs",
        env="OPENAI_BASE_URL=%(base)s OPENAI_API_KEY=%(key)s",
        note=(
            "OpenAI() in Python and new OpenAI() in Node read these.\n"
            "  client.chat.completions.create("
            'model="%(main)s", ...)\n  client.embeddings.create(model="%(embed)s", ...)'
        ),
    ),
    "anthropic-sdk": Recipe(
        "Anthropic SDKs",
        MESSAGES,
        env="ANTHROPIC_BASE_URL=%(url)s ANTHROPIC_API_KEY=%(key)s",
        note="Anthropic() in Python and new Anthropic() in Node read these.\n"
        '  client.messages.create(model="%(main)s", ...)',
    ),
    "curl": Recipe(
        "curl",
        main=(CHEAP_MODEL, "-mini", "gpt-", "claude"),
        run="curl -sS %(base)s/chat/completions -H %(type)s -H %(bearer)s -d @-",
        typed='{"model": "%(main)s", "messages": [{"role": "user", "content": "Hello"}]}',
    ),
}

#: shell -> (sets a variable: name, value, both, and value in any case quoted; what joins commands;
#: how a word is quoted; what is escaped in it)
SHELLS: Mapping[str, tuple[str, str, str, tuple[tuple[str, str], ...]]] = {
    "bash": ("export {2}", " ", "'{}'", (("'", "'\\''"),)),
    "fish": ("set -gx {0} {1}", " ", "'{}'", (("\\", "\\\\"), ("'", "\\'"))),
    "powershell": ("$env:{0} = {3}", "; ", "'{}'", (("'", "''"),)),
    "cmd": ("set {2}", " && ", '"{}"', (('"', '\\"'),)),
}


def shell_of(environ: Mapping[str, str]) -> str:
    """The shell that the user types into, as far as it shows; zsh reads what bash reads."""
    name = os.path.basename(environ.get("SHELL", ""))
    if os.name == "nt" and not name:
        # cmd.exe alone sets PROMPT
        if "PROMPT" in environ:
            return "cmd"
        return "powershell"
    return {"fish": "fish", "pwsh": "powershell"}.get(name, "bash")


def quote_word(shell: str, word: str, always: bool = False) -> str:
    """A word of a command line, quoted where this shell would read something into it."""
    if not always and re.fullmatch(r"[\w+=:,./-]+", word, re.ASCII):
        return word
    for plain, escaped in SHELLS[shell][3]:
        word = word.replace(plain, escaped)
    return SHELLS[shell][2].format(word)


def pick_model(models: list[Model], *patterns: str) -> Model | None:
    """The newest model of the first pattern that fits any, of equal ones the shortest id."""
    for pattern in (*patterns, ""):
        found = [m for m in models if re.search(pattern, m.id)]
        if found:
            return max(found, key=lambda m: (m.version, -len(m.id)))
    return None


def escape_all(texts: Mapping[str, str]) -> dict[str, str]:
    """For between double quotes in JSON, TOML and YAML alike."""
    return {name: json.dumps(text)[1:-1] for name, text in texts.items()}


def places_of(model: Model) -> dict[str, str]:
    """A model's own places; where the catalogue names no limit, a cautious one stands."""
    out = model.limit("max_output_tokens") or 4096
    whole = model.limit("max_context_window_tokens") or 64000
    prompt = model.limit("max_prompt_tokens") or whole - out
    return {
        "id": model.id,
        "name": model.name,
        "out": str(out),
        "window": str(prompt),
        "context": str(min(whole, prompt + out)),
    }


def fill(
    recipe: Recipe, models: list[Model], url: str, key: str, main: Model, small: Model
) -> dict[str, str]:
    """What stands in the places of a recipe's texts."""

    def spell(model: Model) -> str:
        wide = model.limit("max_context_window_tokens") >= 1000000
        return model.id + (recipe.suffix if wide else "")

    opus = pick_model([m for m in models if "opus" in m.id]) or main
    embedding = pick_model([m for m in models if m.kind == "embeddings"], "-3-small")
    prompt = main.limit("max_prompt_tokens")
    # by Claude Code
    if spell(main) == main.id:
        believed = 200000
    else:
        believed = 1000000
    return dict(
        places_of(main),
        url=url,
        base=url + "/v1",
        key=key,
        main=spell(main),
        small=spell(small),
        opus=spell(opus),
        embed=embedding.id if embedding else "",
        type="Content-Type: application/json",
        bearer="Authorization: Bearer " + key,
        percent=str(prompt * 95 // believed) if 0 < prompt < believed * 0.95 else "",
    )


def variables_of(recipe: Recipe, values: Mapping[str, str]) -> list[tuple[str, str]]:
    """Name and value of those that have one."""
    pairs = [pair.partition("=")[::2] for pair in recipe.env.split()]
    return [(name, text % values) for name, text in pairs if text % values]


def settings_path(place: str, environ: Mapping[str, str]) -> str:
    """Where a file of a recipe lies: '$CODEX_HOME:~/.codex//config.toml' -> its path here."""
    variable, _, usual = place.rpartition(":")
    folder, _, name = usual.partition("//")
    return os.path.join(environ.get(variable[1:]) or os.path.expanduser(folder), name)


def models_in_settings(
    recipe: Recipe, environ: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """(place, model) for each model that a client is set up with, in its files or in the
    environment.  A bare word ('opus') is an alias of the client's own and left out."""
    found: list[tuple[str, str]] = []
    pairs = [pair.partition("=")[::2] for pair in recipe.env.split()]
    if any(
        "%(url)s" in text or "%(base)s" in text
        for name, text in pairs
        if environ.get(name)
    ):
        found = [
            (name + " in the environment", environ.get(name, ""))
            for name, text in pairs
            if text in ("%(main)s", "%(small)s", "%(opus)s")
        ]

    for place, _, _ in recipe.files if recipe.named else ():
        path, text = settings_path(place, environ), ""
        if os.path.isfile(path):
            with contextlib.suppress(OSError, ValueError), open(
                path, encoding="utf-8-sig"
            ) as file:
                text = file.read(MAX_SETTINGS_CHARS)
        if re.search(recipe.sign, text):
            settings = re.findall(recipe.named, text)[:MAX_NAMES]
            found += [
                ("%s in %s" % (setting, path), name) for setting, name in settings
            ]

    for place, name in found:
        if re.search(r"\d", name):
            yield place, name


def fill_file(
    recipe: Recipe,
    row: tuple[str, str, str],
    values: Mapping[str, str],
    models: list[Model],
    environ: Mapping[str, str],
) -> tuple[str, str]:
    """(path, text) of a settings file."""
    (place, text, each), safe = row, escape_all(values)
    path = settings_path(place, environ)
    items = [
        each % {**safe, **escape_all(places_of(m))} for m in models if m.kind == "chat"
    ]
    safe["models"] = (",\n " if path.endswith(".json") else "").join(items)
    safe["env"] = ",\n  ".join(
        "%s: %s" % (json.dumps(n), json.dumps(v))
        for n, v in variables_of(recipe, values)
    )
    return path, text % safe


def command_line(
    recipe: Recipe, values: Mapping[str, str], shell: str, single: bool = False
) -> str:
    """What is typed: the variables and the client, `single`: in one line."""
    export, join = SHELLS[shell][:2]
    run = [" ".join(quote_word(shell, word % values) for word in recipe.run.split())]

    if recipe.typed:
        said = recipe.typed % escape_all(values)
        run = [
            "echo %s | %s"
            % (
                said if shell == "cmd" else quote_word(shell, said),
                run[0].replace("curl", "curl.exe", join == "; "),
            )
        ]

    if single and join == " ":
        export = "{2}"
    lines = [
        export.format(
            n,
            quote_word(shell, v),
            quote_word(shell, n + "=" + v),
            quote_word(shell, v, True),
        )
        for n, v in variables_of(recipe, values)
    ]

    line = (join if single else "\n").join(lines + run).rstrip("\n")
    if export == "{2}":
        return "env " + line
    return line


def merge_json(old: Any, new: Any) -> Any:
    """`new` over `old`; objects are merged, everything else is replaced."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    return {
        **old,
        **{key: merge_json(old.get(key), value) for key, value in new.items()},
    }


def merge_lines(old: str, new: str) -> str:
    """`new` over a TOML or flat YAML text: its top keys replace theirs, a [table] or "- item" with
    the same first line is replaced up to its first empty line, the rest is added."""
    top, *sections = re.split(
        r"(?m)^(?=\[|- )", old + "\n" * (old[-1:] not in ("", "\n"))
    )
    new_top, *new_sections = re.split(r"(?m)^(?=\[|- )", new)

    for line in reversed(new_top.splitlines(True)):
        theirs = re.search(
            r"(?m)^%s\s*[=:].*\n" % re.escape(re.split("[ =:]", line)[0]), top
        )
        if theirs:
            top = top.replace(theirs.group(), line, 1)
        elif line.strip() or not old:
            top = line + top

    for section in new_sections:
        same = [s for s in sections if s.split("\n")[0] == section.split("\n")[0]]
        if same:
            rest = same[0].partition("\n\n")[2]
            sections[sections.index(same[0])] = section + ("\n" + rest if rest else "")
        else:
            sections.append(section)

    return top + "".join(sections)


def merge_file(path: str, text: str) -> tuple[str, str]:
    """(what the file holds, what it shall hold).  Raises ConfigError."""
    old = ""
    try:
        with contextlib.suppress(FileNotFoundError), open(
            path, encoding="utf-8-sig"
        ) as file:
            old = file.read()
        if path.endswith(".json"):
            merged = merge_json(loads((old or "{}").encode()), json.loads(text))
            return old, json.dumps(merged, indent=2, ensure_ascii=False) + "\n"
    except (OSError, ValueError) as error:
        raise ConfigError(
            "cannot merge into %s (%s): put this into it by hand:\n%s"
            % (path, plain_reason(error), text)
        ) from None
    return old, text if path.endswith("copilot_proxy.yaml") else merge_lines(old, text)


def copy_text(text: str) -> str:
    """To the clipboard -> a sentence about it."""
    import shutil
    import subprocess

    for command in (
        "pbcopy",
        "clip",
        "wl-copy",
        "xclip -selection clipboard",
        "xsel -ib",
    ):
        if shutil.which(command.split()[0]):
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                subprocess.run(
                    command.split(),
                    input=text.encode(),
                    timeout=5,
                    check=True,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
                return "(copied with %s)" % command.split()[0]
    return "(no clipboard program is here: copy it by hand)"


#: service manager -> (what to do with it, the text)
SERVICES: Mapping[str, tuple[str, str]] = {
    "systemd": (
        """\
# Into ~/.config/systemd/user/copilot_proxy.service, then: systemctl --user daemon-reload &&
# systemctl --user enable --now copilot_proxy   (and loginctl enable-linger to serve all the time).
# journalctl --user -u copilot_proxy shows its log, at first with the code to enter.""",
        """\
[Unit]
Description=GitHub Copilot as a local OpenAI and Anthropic API

[Service]
ExecStart=%(command)s
ExecStartPost=%(health)s
Restart=on-failure
RestartSec=5
TimeoutStopSec=%(stop)d
UMask=0077
NoNewPrivileges=yes
LockPersonality=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
RestrictNamespaces=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
SystemCallArchitectures=native
SystemCallFilter=@system-service

[Install]
WantedBy=default.target""",
    ),
    "launchd": (
        """\
<!-- Into ~/Library/LaunchAgents/copilot_proxy.plist, then:
       launchctl bootstrap gui/$(id -u) ~/Library/LaunchAgents/copilot_proxy.plist
     Its log, at first with the code to enter: ~/Library/Logs/copilot_proxy.log -->""",
        """\
<plist version="1.0"><dict><key>Label</key><string>copilot_proxy</string>
  <key>ProgramArguments</key><array>%(strings)s</array>
  <key>RunAtLoad</key><true/><key>ExitTimeOut</key><integer>%(stop)d</integer>
  <key>KeepAlive</key><dict><key>SuccessfulExit</key><false/></dict>
  <key>StandardErrorPath</key><string>%(home)s/Library/Logs/copilot_proxy.log</string>
</dict></plist>""",
    ),
    "schtasks": (
        """\
# Into PowerShell.  It starts at each logon; now: schtasks /Run /TN copilot_proxy
# Log in first with: copilot_proxy.py auth   It runs without a window.""",
        """\
Register-ScheduledTask -Force -TaskName copilot_proxy `
  -Action (New-ScheduledTaskAction -Execute '%(program)s' -Argument '%(arguments)s') `
  -Trigger (New-ScheduledTaskTrigger -AtLogOn -User $env:USERNAME) `
  -Settings (New-ScheduledTaskSettingsSet -ExecutionTimeLimit ([TimeSpan]::Zero) `
    -AllowStartIfOnBatteries -DontStopIfGoingOnBatteries -RestartCount 99 `
    -RestartInterval (New-TimeSpan -Minutes 1))""",
    ),
}


def service_text(
    name: str, python: str, arguments: list[str], url: str, grace_s: float
) -> str:
    """The unit for this Python, file and user.  arguments: this file, `start`, its flags."""

    def line(words: list[str]) -> str:
        return " ".join(
            '"%s"' % word if re.search(r"[\s']", word) else word for word in words
        )

    windows = os.path.join(os.path.dirname(python), "pythonw.exe")  # it opens no window
    head, text = SERVICES[name]
    return (
        head
        + "\n"
        + text
        % {
            "command": line([python] + arguments).replace("%", "%%"),
            "stop": grace_s + 10,
            "health": line([python, arguments[0], "debug", "--health", url]).replace(
                "%", "%%"
            ),
            "strings": "".join(
                "<string>%s</string>" % html.escape(w) for w in [python] + arguments
            ),
            "home": os.path.expanduser("~"),
            "arguments": line(arguments).replace("'", "''"),
            "program": (windows if os.path.exists(windows) else python).replace(
                "'", "''"
            ),
        }
    )


def probe_host(upstream: Upstream, url: str) -> Iterator[tuple[str, str, bool]]:
    """(hop, what was found, is it well) for each step to a host; the first bad one is the last."""
    proxy = upstream.proxy_for(url)
    far, near = urllib.parse.urlsplit(url), urllib.parse.urlsplit(proxy or url)
    host, gate = far.hostname or "", near.hostname or ""
    port, secure = (
        near.port or (443 if near.scheme == "https" else 80),
        far.scheme == "https",
    )
    wire: Any = upstream.connection_to(url)
    hop = "DNS"

    try:
        found = socket.getaddrinfo(gate, port, type=socket.SOCK_STREAM)
        yield hop, "%s is %s" % (gate, found[0][4][0]), True
        hop = "TCP"
        run(wire.connect())
        yield hop, "%s port %d is open" % (gate, port), True

        if proxy and secure:
            hop = "proxy"
            run(wire.ask_proxy())
            yield hop, "%s lets %s through" % (gate, host), True

        if secure:
            hop = "TLS"
            run(wire.secure())
            issuer = dict(
                pair for name in wire.sock.getpeercert()["issuer"] for pair in name
            )
            yield (
                hop,
                "%s, certificate by %s"
                % (
                    wire.sock.version(),
                    printable(
                        " / ".join(
                            issuer.get(n, "")
                            for n in ("organizationName", "commonName")
                        )
                    ),
                ),
                True,
            )

        hop = "HTTP"
        answer = run(
            upstream.send_again(
                UpstreamRequest(
                    "GET", url, {"User-Agent": "debug"}, timeout_s=GITHUB_TIMEOUT_S
                )
            )
        )

        answer.close()
        yield hop, "%d %s" % (answer.status, printable(answer.reason)), True
    except (ProxyError, OSError) as error:
        yield (
            hop,
            str(
                error
                if isinstance(error, ProxyError)
                else explain_connect_error(error, host, bool(proxy))
            ),
            False,
        )
    finally:
        wire.close()


# ==== 23. Commands ================================================================================
# One function per command.  Each gets the App and the parsed flags and returns an exit code:
# 0 ok, 1 failure, 2 usage, 130 interrupt.


def say(text: str = "") -> None:
    """Lines for a person, flushed at once: start scripts wait for them.  What comes from outside
    is escaped here; where it must not begin a line either, `printable` is used before.
    Raises ClientGone when nobody reads (models | head), ProxyError when it cannot be written."""
    try:
        sys.stdout.write(visible(text, keep="\n\t") + "\n")
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (else the exit fails, too)
        if isinstance(error, BrokenPipeError):
            raise ClientGone from None
        raise ProxyError(
            "cannot write to standard output: %s" % plain_reason(error)
        ) from None


_PIPE_BYTES = getattr(
    select, "PIPE_BUF", 512
)  # a pipe that is ready takes so much at once


def has_file(stream: Any) -> bool:
    """Is it a file of the system, and one that can be waited for?"""
    try:
        return os.name == "posix" and bool(stream.fileno() >= 0)
    except (OSError, ValueError, AttributeError):
        return False


class QueuedOutput:
    """A text stream that keeps nobody waiting: standard output and standard error of a server.

    What is written goes into a bounded queue, and one thread hands it on.  While nobody takes it
    (a full pipe, a stopped terminal) the queue fills, and lines that find no room are counted in
    `lost`; so are those that a dead stream refuses.  `report(lines)` is called in that thread as
    soon as the stream takes something again.  `_changed` guards the fields."""

    def __init__(self, stream: Any, report: Callable[[int], None]) -> None:
        self.stream, self._report = stream, report
        self._has_file = has_file(stream)
        self.lost = 0  # lines, since the start
        self._reported = 0
        self._changed = threading.Condition()
        self._parts: list[str] = []
        self._size = 0  # characters in _parts
        self._ending = threading.Event()
        self._ends_at = float("inf")  # monotonic; nothing is written after that
        self._thread = threading.Thread(target=self._run, name="output", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Write what is left, unless nobody takes it."""
        with self._changed:
            self._ends_at = time.monotonic() + OUTPUT_END_S
            self._ending.set()
            self._changed.notify()
        self._thread.join(OUTPUT_END_S)

    def __getattr__(self, name: str) -> Any:
        """isatty, fileno, encoding and so on are those of the stream itself."""
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Never blocks, never fails."""
        with self._changed:
            if self._size + len(text) > OUTPUT_QUEUE_CHARS:
                self.lost += text.count("\n")
            else:
                self._parts.append(text)
                self._size += len(text)
                self._changed.notify()
        return len(text)

    def flush(self) -> None:
        """The thread does that."""

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._parts or self._ending.is_set())
                text = "".join(self._parts)
                self._parts, self._size = [], 0
            if not text:
                return

            if not self._hand_on(text):
                with self._changed:
                    self.lost += text.count("\n")
            elif self.lost > self._reported:
                lost = self.lost - self._reported
                self._reported += lost
                self._report(lost)
            self._ending.wait(OUTPUT_PAUSE_S)

    def _hand_on(self, text: str) -> bool:
        """Write all of it.  False when the stream is dead, or takes nothing until the end."""
        try:
            if self._has_file:
                data = text.encode(self.stream.encoding or "utf-8", "backslashreplace")
                return self._write_pieces(data)
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError):
            return False
        return True

    def _write_pieces(self, data: bytes) -> bool:
        """Whole lines where they fit, and never more than a pipe takes at once: neither Python's
        own locks nor the end of the process may wait for a reader."""
        begin = 0
        while begin < len(data):
            if not wait_ready(self.stream, OUTPUT_LOOK_S, write=True):
                if time.monotonic() > self._ends_at:
                    return False
                continue
            end = (
                data.rfind(b"\n", begin, begin + _PIPE_BYTES) + 1 or begin + _PIPE_BYTES
            )
            try:
                begin += os.write(self.stream.fileno(), data[begin:end])
            except BlockingIOError:
                time.sleep(
                    OUTPUT_LOOK_S
                )  # another program has made it so, and was first
        return True


def load_settings(flags: argparse.Namespace, environ: Mapping[str, str]) -> Settings:
    """Flags and environment, with the token from standard input.  Raises ConfigError."""
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(flags).items()}
    settings = Settings.merge(values, environ)
    if settings.github_token == "-":
        settings.github_token = sys.stdin.readline().strip()
        if not settings.github_token:
            raise ConfigError("--github-token -: standard input holds no token")
    return settings


def open_account(app: App) -> Copilot:
    """The login for commands without a server.  Raises AuthError."""
    github_token = app.login.load()
    if not github_token:
        raise AuthError("nobody is logged in: run copilot_proxy.py auth")
    return Copilot(
        app.settings,
        app.upstream,
        app.github,
        check_github_token(github_token),
        app.log,
    )


def print_code(code: DeviceCode) -> None:
    """Tell the person at the terminal where to log in."""
    say(
        "\nTo log in, open   %s\nand enter the code   %s\n(the code is good for %d minutes)\n"
        % (
            printable(code.verification_uri),
            printable(code.user_code),
            code.expires_in // 60,
        )
    )


def open_server(app: App) -> Server:
    """Bind the ports.  Raises ProxyError that says what is in the way."""
    settings = app.settings
    try:
        server = Server(app, ROUTES, settings.host.strip("[]"), settings.port)
    except OSError as error:
        raise port_refused(error, settings.host, settings.port, "--port") from None
    if settings.ollama_port:
        try:
            server.listen_too(settings.ollama_port)
        except OSError as error:
            server.server_close()
            raise port_refused(
                error, settings.host, settings.ollama_port, "--ollama-port"
            ) from None
    return server


def port_refused(error: OSError, host: str, port: int, option: str) -> ProxyError:
    """What to tell of a port that cannot be bound."""
    if error.errno == errno.EADDRINUSE:
        hint = (
            "another program (this one, too?) uses it; choose one with --port, 0 takes a "
            "free one"
        )
        if option == "--ollama-port":
            hint = (
                "another program uses it, perhaps Ollama itself; end that, or leave "
                "--ollama-port away"
            )
    elif error.errno == errno.EACCES or getattr(error, "winerror", 0) == 10013:
        hint = (
            "the system reserves it; choose another with %s (Windows: netsh interface "
            "ipv4 show excludedportrange protocol=tcp)" % option
        )
    else:
        hint = plain_reason(error)

    return ProxyError("cannot serve on %s port %d: %s" % (host, port, hint))


def banner(server: Server) -> str:
    """What `start` prints once it serves."""
    return "\n".join(
        (
            "copilot_proxy %s%s"
            % (__version__, " DEMO" if server.app.settings.demo else ""),
            "  OpenAI clients     %s/v1" % server.url,
            "  Anthropic clients  %s" % server.url,
            "  status page        %s/" % server.url,
            "  set up a client    copilot_proxy.py setup claude-code (or codex, aider, ...)",
            "Ctrl-C ends it.",
        )
    )


def json_banner(server: Server, notice: str) -> str:
    """The same with --log-json: a line like those of the log."""
    return json.dumps(
        {
            "level": "info",
            "time": time.time(),
            "version": __version__,
            "message": "OpenAI clients %s/v1, Anthropic clients %s"
            % (server.url, server.url),
            "url": server.url,
            "demo": server.app.settings.demo,
            "notice": notice.strip() or None,
        }
    )


def guard_door(app: App) -> str:
    """Before the port opens: the key of --api-key auto -> what to tell of it, the key itself when
    it is new.  Raises ConfigError where strangers could come in."""
    stored, text = (
        [key for key in app.accounts.keys.all() if key.made and not key.token],
        "",
    )

    if "auto" in app.settings.api_key and stored:
        text = (
            "\nAPI key: the one made before (id %s); to get a new one: auth --logout %s"
            % (stored[0].id, stored[0].id)
        )
    elif "auto" in app.settings.api_key:
        made = new_key()
        app.accounts.issue_key(made)
        text = "\nAPI key, shown this once: %s" % made

    if not is_loopback(app.settings.host) and not app.accounts.keys.is_closed:
        raise ConfigError(
            "--host %s can be reached by others, and no key keeps them out: add "
            "--api-key auto (or --api-key KEY)" % printable(app.settings.host, 60)
        )

    if app.settings.host:
        check_host_name("--host", app.settings.host.partition("%")[0])  # fe80::1%eth0
    return text


def check_folder(path: str, flag: str) -> None:
    """Make it where it is missing.  Raises ConfigError when nothing can be written there."""
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise ConfigError(
            "%s %s: %s" % (flag, printable(path), plain_reason(error))
        ) from None


def wait_for_login(app: App) -> None:
    """Until somebody is logged in, or the server ends."""
    while app.login.account is None and not app.stop.wait(0.2):
        pass


def look_up_models(app: App) -> None:
    """The list of models ahead of the first request, where a flag names one: the log then tells
    at the start of a name that is wrong, not when the quota is used up."""
    wait_for_login(app)
    with contextlib.suppress(ProxyError):
        run(run(app.login.copilot()).models())


def cmd_start(app: App, flags: argparse.Namespace) -> int:
    """Serve.  The port opens before anything is asked of GitHub."""
    settings = app.settings
    if settings.github_token:
        check_github_token(settings.github_token)
    if settings.log_bodies:
        check_folder(settings.log_bodies, "--log-bodies")
    raise_file_limit()
    app.accounts.log_keys()
    new_key = guard_door(app)
    server = open_server(app)
    if flags.signals is None:
        interrupts: list[int] = catch_signals()
    else:
        interrupts = flags.signals
    server.start()
    github_token = app.login.load()
    if github_token:
        app.login.use(github_token)
    say(json_banner(server, new_key) if settings.log_json else banner(server) + new_key)
    if not github_token:
        if sys.stdout.isatty() and not settings.log_json:
            app.login.announce = print_code
        app.login.begin()
    if settings.open:
        import webbrowser

        threading.Thread(
            target=webbrowser.open, args=(server.url + "/",), daemon=True
        ).start()
    if settings.fallback or settings.model_alias:
        threading.Thread(target=look_up_models, args=(app,), daemon=True).start()
    if settings.claude_code:
        threading.Thread(
            target=offer_claude_code, args=(app, server.url), daemon=True
        ).start()
    time.sleep(0.1)
    give_back_memory()
    while not interrupts:
        time.sleep(0.1)
    server.finish(settings.grace)
    if interrupts[0] == signal.SIGINT:
        return 130
    return 0


def catch_signals() -> list[int]:
    """A list that Ctrl-C, SIGTERM and SIGHUP append to; a second one ends the process at once,
    but not a SIGHUP: a terminal that is closed sends it twice, by its shell and by the system.
    Under nohup SIGHUP stays ignored."""
    seen: list[int] = []
    hangup = getattr(signal, "SIGHUP", None)

    def note(number: int, frame: Any) -> None:
        seen.append(number)
        if len(seen) > 1 and number != hangup:
            os._exit(130)

    if threading.current_thread() is not threading.main_thread():
        return seen
    for name in ("SIGINT", "SIGTERM", "SIGBREAK"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), note)
    if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:
        signal.signal(hangup, note)
    return seen


def cmd_auth(app: App, flags: argparse.Namespace) -> int:
    """Log in without a server, or list, import, forget a login."""
    settings = app.settings
    if flags.list:
        return list_logins(app)
    if flags.logout is not None:
        return log_out(app, flags.logout)
    if flags.import_login:
        github_token = import_login(app)
    elif settings.github_token and flags.github_token:
        github_token = settings.github_token
    else:
        login = DeviceLogin(app.github, settings.poll_margin_s, app.stop, print_code)
        github_token = login.run()

    github_token = check_github_token(github_token)
    copilot = run(app.github.fetch_copilot_token(github_token))
    app.login.file.save(github_token)
    if settings.show_token and sys.stdout.isatty():
        say("GitHub token: %s\nCopilot token: %s" % (github_token, copilot.value))
    name = run(app.github.fetch_login(github_token))
    say(
        "logged in%s; kept in %s"
        % (" as " + printable(name) if name else "", app.login.file.path)
    )
    return 0


def list_logins(app: App) -> int:
    """auth --list: who is logged in and which keys there are, never a token or key."""
    stored, keys = app.login.file.load(), app.accounts.keys.all()

    if stored:
        name = run(app.github.fetch_login(stored)) or "(the name could not be fetched)"
        say(
            "%s  %s  %s"
            % (printable(name), host_of(app.settings.github_url), app.login.file.path)
        )

    for key in keys:
        say(
            "%s  %s  key %s"
            % (
                printable(key.login) or ("(an account)" if key.token else "(operator)"),
                host_of("//" + key.host) or "-",
                key.id,
            )
        )

    if not stored and not keys:
        say("nobody is logged in")
    return 0


def log_out(app: App, name: str) -> int:
    """auth --logout [NAME]: forget the default login, or what NAME, a login or key id, has."""
    stored, wanted = app.login.file.load(), name.lower()
    keys = [
        key
        for key in app.accounts.keys.all()
        if key.made and name and wanted in (key.login.lower(), key.id)
    ]
    app.accounts.forget(keys)
    is_default = (
        not name
        or bool(stored)
        and run(app.github.fetch_login(stored)).lower() == wanted
    )
    if name and stored and not is_default and not keys:
        raise AuthError("%s is not logged in here" % printable(name))
    removed = is_default and app.login.file.delete()
    say("logged out" if removed and stored or keys else "nobody was logged in")
    return 0


def import_login(app: App) -> str:
    """A login of another program on this machine.  Asks first on a terminal."""
    for source, found in find_logins(app):
        if found.startswith(REFUSED_PREFIX):
            say(
                "%s holds a classic personal access token, which Copilot does not accept"
                % source
            )
            continue
        if not confirm("use the login found in %s ?" % source):
            continue
        say("using the login found in %s" % source)
        return found
    raise AuthError(
        "no login to import was found in the environment or in an editor's files: run "
        "copilot_proxy.py auth"
    )


def find_logins(app: App) -> Iterator[tuple[str, str]]:
    """(where, token) of logins in the environment and in the editor plugins' files."""
    for name in (
        "COPILOT_GITHUB_TOKEN",
        "GH_COPILOT_TOKEN",
        "GH_TOKEN",
        "GITHUB_TOKEN",
    ):
        if app.environ.get(name):
            yield name, app.environ[name].strip()

    host = host_of(app.settings.github_url)
    bases = [
        app.environ.get("LOCALAPPDATA"),
        app.environ.get("XDG_CONFIG_HOME"),
        os.path.join(os.path.expanduser("~"), ".config"),
    ]

    for path in [
        os.path.join(base, "github-copilot", name)
        for base in bases
        if base
        for name in ("apps.json", "hosts.json")
    ]:
        entries: Json = {}
        with contextlib.suppress(OSError, ValueError), open(path, "rb") as file:
            entries = as_object(loads(file.read(MAX_ERROR_BYTES)))
        for key, entry in entries.items():
            value = as_object(entry).get("oauth_token")
            if key.split(":")[0].lower() == host and isinstance(value, str) and value:
                yield path, value


def cmd_check_usage(app: App, flags: argparse.Namespace) -> int:
    """Quota as bars, or the upstream's answer as JSON."""
    answer = run(open_account(app).fetch_usage())
    if flags.json:
        say(json.dumps(answer, indent=2))
        return 0
    say(
        "%s, plan %s"
        % (
            printable(str(answer.get("login") or "?")),
            printable(str(answer.get("copilot_plan") or "?")),
        )
    )
    for line in [
        quota_line(quota_lane(name, said)) for name, said in quotas_of(answer).items()
    ] or ["the account reports no quotas"]:
        say(line)
    return 0


def quota_line(lane: Json) -> str:
    """One lane: 'chat  [########............]  40.0 % used, 120 of 300, 180 left, resets ...'."""
    percent, parts = lane["percent_used"], ["unlimited"] if lane["unlimited"] else []
    if percent is not None:
        filled = max(0, min(20, round(percent / 5)))
        parts.append(
            "[%s%s] %5.1f %% used" % ("#" * filled, "." * (20 - filled), percent)
        )
    for form, *names in (("%.12g of %.12g", "used", "total"), ("%.12g left", "left")):
        if lane[names[0]] is not None:
            parts.append(form % tuple(round(lane[name], 2) for name in names))
    if lane["resets_at"] and not lane["unlimited"]:
        parts.append("resets " + local_time(lane["resets_at"]))
    return "%-22s %s" % (
        printable(lane["name"], 24),
        ", ".join(parts) or "reports no numbers",
    )


def cmd_models(app: App, flags: argparse.Namespace) -> int:
    """The catalogue as a table, or as JSON with the upstream's own entries."""
    found = run(open_account(app).models())
    shown = listed_models(found, flags.all)
    notices = [
        "%s: %s" % (printable(m.id), printable(m.notice, 300))
        for m in shown
        if m.notice
    ]
    notices += missing_models(app, found)
    if flags.json:
        say(json.dumps([dict(model_entry(m), entry=m.entry) for m in shown], indent=2))
        for line in notices:
            print(line, file=sys.stderr)
        return 0

    rows = [("id", "endpoints", "context", "output", "price", "state")]
    for m in shown:
        paths = " ".join(e for e in m.endpoints if e.startswith("/"))
        window = str(m.limit("max_context_window_tokens") or "?")
        output = str(m.limit("max_output_tokens") or "?")
        state = m.state + (m.notice and ", retiring") + (m.promo and ", promotion")
        rows.append((m.id, paths, window, output, price_of(m), state))

    table = [list(map(visible, row)) for row in rows]
    widths = [max(len(row[at]) for row in table) for at in range(len(rows[0]))]
    for row in table:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    for line in notices:
        say(line)
    return 0


def missing_models(app: App, models: list[Model]) -> list[str]:
    """A line for each alias, --fallback and setting of a client that names a model which this
    account does not have."""
    lines = app.settings.missing_models(models)
    for recipe in CLIENTS.values():
        for place, name in models_in_settings(recipe, app.environ):
            fate = fate_of_name(name, models, app.settings.strict_models)
            if fate:
                lines.append(
                    "%s: %s is named by %s: %s"
                    % (recipe.about, printable(name), printable(place, 300), fate)
                )
    return lines


def price_of(model: Model) -> str:
    """As the account reports it: USD per million tokens in/out, or the request multiplier."""
    price = price_entry(model) or {}
    if price.get("input") is not None and price.get("output") is not None:
        return "$%.2f/$%.2f" % (price["input"], price["output"])
    if price.get("multiplier") is None:
        return "-"
    return "%gx" % price["multiplier"]


def cmd_debug(app: App, flags: argparse.Namespace) -> int:
    """What runs where; --network: is everything in reach; --health: does a server serve."""
    if flags.health is not None:
        return check_health(app, flags.health)
    report = debug_report(app)
    well = True
    if flags.network:
        report["network"], well = probe_network(app)
    report["missing_models"] = missing_models(app, models_at_hand(app)) or ["none"]
    if flags.bundle:
        write_bundle(app, report, flags.bundle)
        return 0

    if flags.json:
        say(json.dumps(report, indent=2))
    for name, value in report.items() if not flags.json else ():
        for at, line in enumerate(value if isinstance(value, list) else [value]):
            say(
                "%-14s %s"
                % (name.replace("_", " ") if not at else "", printable(str(line), 500))
            )

    if well:
        return 0
    return 1


def models_at_hand(app: App) -> list[Model]:
    """The account's models for `debug`, [] without a login or where they cannot be had within
    MODELS_WAIT_S.  Nothing is asked when no setting names a model."""
    models: list[Model] = []
    settings = app.settings
    names = [*settings.model_alias, *filter(None, [settings.fallback])]
    for recipe in CLIENTS.values():
        names += [name for _, name in models_in_settings(recipe, app.environ)]

    def fetch() -> None:
        with contextlib.suppress(ProxyError):
            models.extend(run(open_account(app).models()))

    if names:
        thread = threading.Thread(target=fetch, daemon=True)
        thread.start()
        thread.join(MODELS_WAIT_S)
    return models


def check_health(app: App, url: str) -> int:
    """0 as soon as the server at `url` answers, 1 if it does not within HEALTH_WAIT_S."""
    url = re.sub("(/health)?/?$", "", check_own_url(url, "--health")) + "/health"
    deadline = time.monotonic() + HEALTH_WAIT_S
    while True:
        try:
            status, answer, _, _ = run(
                app.upstream.fetch_json(
                    UpstreamRequest("GET", url, {}, timeout_s=HEALTH_WAIT_S)
                )
            )
            if status == 200:
                say("%s: %s" % (url, printable(str(as_object(answer).get("status")))))
                return 0
            raise UpstreamError("%s answered %d" % (url, status))
        except ProxyError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.1)


def debug_report(app: App) -> Json:
    """Facts that help to find a fault; no secret is among them."""
    settings = app.settings

    try:
        github_token = app.login.load()
        if github_token:
            state = "logged in"
        else:
            state = "nobody is logged in"
    except ConfigError as error:
        github_token, state = "", str(error)

    if settings.github_token:
        source = "flag or environment"
    else:
        source = app.login.file.path
    return {
        "version": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "executable": sys.executable,
        "data_folder": os.path.dirname(app.login.file.path),
        "login": "%s (%s)" % (state, source),
        "github": settings.github_url,
        "rest": settings.rest_url,
        "copilot": settings.copilot_url
        or "named by GitHub with each token, else " + settings.usual_copilot_url,
        "proxies": [
            "%s through %s" % (k, redact(v)) for k, v in app.upstream.proxies.items()
        ]
        or ["none"],
        "ca_files": ca_files(settings, app.environ) or ["the system's"],
        "headers": [
            "%s: %s" % pair for pair in dict(EDITOR_HEADERS, **settings.headers).items()
        ],
        "api_version": API_VERSIONS[0],
    }


def write_bundle(app: App, report: Json, path: str) -> None:
    """debug --bundle: all of it in a new file for a bug report; no secret, no words of anybody."""
    given = {
        option.name: getattr(app.settings, option.field)
        for option in OPTIONS
        if getattr(app.settings, option.field) != option.default
    }

    for name in given:
        if re.search("token|key|header", name):
            given[name] = "[set]"

    if os.path.exists(app.ledger.history.path):
        rows = app.ledger.history.query(
            "SELECT * FROM requests ORDER BY n DESC LIMIT 500"
        )
    else:
        rows = []

    bundle = dict(
        report,
        settings=given,
        headers=sorted(app.settings.headers),
        requests=[shown(row) for row in rows],
    )

    bundle.setdefault("network", probe_network(app)[0])

    try:
        with open(
            os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w"
        ) as file:
            file.write(redact(json.dumps(bundle, indent=1)))
    except OSError as error:
        raise ProxyError("cannot write %s: %s" % (path, plain_reason(error))) from None

    say("wrote %s: read it before you attach it to a report" % path)


def probe_network(app: App) -> tuple[list[str], bool]:
    """(a line for each hop to each host, is everything well)."""
    settings, lines, well = app.settings, [], True
    with contextlib.suppress(ImportError, OSError):
        import winreg

        registry: Any = winreg
        path = r"Software\Microsoft\Windows\CurrentVersion\Internet Settings"
        with registry.OpenKey(registry.HKEY_CURRENT_USER, path) as key:
            script = redact(printable(registry.QueryValueEx(key, "AutoConfigURL")[0]))
            lines.append("Windows' own proxy setting " + PAC_REMEDY % script)

    copilot_url = settings.copilot_url or settings.usual_copilot_url
    try:
        copilot = open_account(app)
        value: CopilotToken = run(copilot.token.get())
        copilot_url = value.api_url
        end = "token for %s, good for %d s%s; it lists %d models" % (
            value.api_url,
            value.lifetime_s,
            " (direct mode)" if value.direct else "",
            len(run(copilot.models())),
        )
    except ProxyError as error:
        well, end = False, "copilot FAILED: %s" % error
    for url in dict.fromkeys((settings.github_url, settings.rest_url, copilot_url)):
        lines.append(url + "/")
        for hop, text, good in probe_host(app.upstream, url + "/"):
            lines.append("  %-5s %s%s" % (hop, "" if good else "FAILED: ", text))
            well = well and good
    return lines + [end], well


def offered_models(app: App, url: str, key: str) -> list[Model]:
    """What the running server lists; without one, what the login's account has."""
    try:
        status, answer, _, body = run(
            app.upstream.fetch_json(
                UpstreamRequest(
                    "GET",
                    url + "/v1/models",
                    {"Authorization": "Bearer " + key},
                    timeout_s=GITHUB_TIMEOUT_S,
                )
            )
        )
    except UpstreamError as error:
        if app.login.load():
            return listed_models(run(open_account(app).models()))
        raise AuthError(
            "%s: start the server first (if it has another port: setup --port), or "
            "log in with auth" % error
        ) from None
    if status != 200:
        raise AuthError("%s: %s" % (url, unwrap_error(status, body, "")[0]), status)

    models = []
    for entry in map(as_object, as_list(as_object(answer).get("data"))):
        limits = dict(
            entry,
            max_context_window_tokens=entry.get("context_window"),
            max_prompt_tokens=entry.get("max_input_tokens"),
        )
        notice = {"code": "retirement", "message": entry.get("notice")}
        models.append(
            Model(
                str(entry.get("id")),
                str(entry.get("display_name")),
                kind=str(entry.get("kind")),
                limits=limits,
                picker=True,
                entry={"info_messages": [notice]} if entry.get("notice") else {},
            )
        )
    return models


def client_key(settings: Settings) -> str:
    """A key that this server takes, as far as the settings tell."""
    return next((key for key in settings.api_key if key != "auto"), "dummy")


def model_for(models: list[Model], asked: str, patterns: tuple[str, ...]) -> Model:
    """The chat model that was asked for, else the best for this client.  Raises ConfigError."""
    chat = [m for m in models if m.kind == "chat"]
    if asked:
        model = resolve_model(asked, chat, {})
    else:
        model = pick_model(chat, *patterns)
    if model is None:
        raise ConfigError(
            "there is no chat model '%s'; the account has: %s"
            % (printable(asked), ", ".join(m.id for m in chat) or "none")
        )

    fate = fate_of_name(asked, chat) if asked else ""
    if fate:
        print("%s: %s" % (printable(asked), fate), file=sys.stderr)
    if model.notice:
        print(
            "%s: %s" % (printable(model.id), printable(model.notice, 300)),
            file=sys.stderr,
        )
    return model


def cmd_setup(app: App, flags: argparse.Namespace) -> int:
    """What to paste for a client, or a service manager's unit."""
    settings, shell = app.settings, flags.shell or shell_of(app.environ)

    if flags.client not in [*CLIENTS, *SERVICES]:
        raise ConfigError(
            "setup: choose one of %s; openai-sdk says what others need"
            % ", ".join([*CLIENTS, *SERVICES])
        )

    if settings.host in ("0.0.0.0", "::"):
        host = "127.0.0.1"
    else:
        host = settings.host
    url = "http%s://%s:%d" % (
        "s" * bool(settings.tls_cert),
        "[%s]" % host if ":" in host else host,
        settings.port or DEFAULT_PORT,
    )

    if flags.url:
        url = re.sub("(/v1)?/?$", "", flags.url)
    url = check_own_url(url, "--url" if flags.url else "--host")
    if flags.client in SERVICES:
        given = [
            "--%s=%s" % (o.name, getattr(settings, o.field))
            for o in OPTIONS
            if o.name in ("port", "host", "data-dir", "grace")
            and getattr(settings, o.field) != o.default
        ]

        say(
            service_text(
                flags.client,
                sys.executable,
                [os.path.abspath(__file__), "start", *given],
                url,
                settings.grace,
            )
        )

        return 0

    recipe, key = CLIENTS[flags.client], flags.key or client_key(settings)
    models = offered_models(app, url, key)
    main = model_for(models, flags.model, recipe.main)
    small = model_for(models, flags.small_model, recipe.small)
    values = fill(recipe, models, url, key, main, small)
    files = [
        fill_file(recipe, row, values, models, app.environ) for row in recipe.files
    ]
    if flags.write:
        write_settings(recipe, files)
    if flags.check:
        say(try_client(app, recipe, values, main))
    if flags.write or flags.check:
        return 0
    line = command_line(recipe, values, shell)
    direct = recipe.env or values["url"] in line  # usable without a settings file

    if direct:
        say(
            "%s, for this terminal (%s):\n\n%s\n"
            % (recipe.about, shell.replace("bash", "bash, zsh"), line)
        )

    for path, content in files:
        say(
            "%s for good, in %s ('setup %s --write' puts it there):\n\n%s\n"
            % (recipe.about, path, flags.client, content.rstrip())
        )

    if line and not direct:
        say("then:\n\n%s\n" % line)
    say(recipe.note % values)
    if flags.copy:
        say(copy_text(line if direct or not files else files[0][1]))
    return 0


def write_settings(recipe: Recipe, files: list[tuple[str, str]]) -> None:
    """Show each difference, ask on a terminal, keep a backup, write."""
    import difflib

    if not files:
        raise ConfigError("%s: there is no settings file to write" % recipe.about)
    for path, text in files:
        path = os.path.realpath(path)
        old, new = merge_file(path, text)
        say(
            "".join(
                difflib.unified_diff(
                    old.splitlines(True), new.splitlines(True), path, path
                )
            )
            or "%s is as it should be" % path
        )
        if old == new or not confirm("write %s ?" % path):
            continue
        try:
            if old:
                backup = "%s.%d.bak" % (path, time.time())
                write_file(backup, old.encode())
                say("the old one is kept as " + backup)
            write_file(path, new.encode())
        except OSError as error:
            raise ConfigError("cannot write %s: %s" % (path, error.strerror)) from None
        say("wrote " + path)


def confirm(question: str) -> bool:
    """Ask on a terminal; without one the answer is yes."""
    if not sys.stdin.isatty():
        return True
    say(question + " [y/N]")
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def try_client(app: App, recipe: Recipe, values: dict[str, str], model: Model) -> str:
    """One streamed request in the client's dialect through the running server."""
    dialect, began = recipe.dialect, time.monotonic()
    url = values["url"] + "/v1" + dialect.path.replace("/v1", "")
    request = Request(
        values["main"],
        turns=[Turn("user", [Text("Say hello in one word.")])],
        max_output_tokens=200,
        stream=True,
    )

    answer = run(
        app.upstream.send_again(
            UpstreamRequest(
                "POST",
                url,
                {
                    "Content-Type": "application/json",
                    "Authorization": "Bearer " + values["key"],
                },
                dumps(
                    dict(dialect.encode_request(request, model), model=values["main"])
                ),
            )
        )
    )

    data = run(answer.read_all())

    if answer.status != 200:
        raise UpstreamError(
            "%s answered %d: %s"
            % (url, answer.status, unwrap_error(answer.status, data, "")[0])
        )

    return "ok: %s answered through %s in %.1f s: %s" % (
        values["main"],
        url,
        time.monotonic() - began,
        printable(join_texts(read_answer(dialect, data, True, request).parts)),
    )


def ask_model(what: str, models: list[Model], patterns: tuple[str, ...]) -> Model:
    """By number or name, until the answer can be used; an empty one takes the best.  Raises
    ConfigError where there is no chat model."""
    best = model_for(models, "", patterns)

    while True:
        say("%s model [%s]: " % (what, best.id))
        if sys.stdin.isatty():
            typed = sys.stdin.readline().strip()
        else:
            typed = ""

        if not typed:
            return best
        if re.fullmatch("[0-9]{1,9}", typed):
            if 0 < int(typed) <= len(models):
                return models[int(typed) - 1]
            say("there is no number %s: 1 to %d" % (typed, len(models)))
            continue

        try:
            return model_for(models, typed, patterns)
        except ConfigError as error:
            say(str(error))


def offer_claude_code(app: App, url: str) -> None:
    """start --claude-code: ask for the models, then print and copy the launch command."""
    wait_for_login(app)
    recipe, chosen = CLIENTS["claude-code"], []
    try:
        found = run(run(app.login.copilot()).models())
        models = [m for m in listed_models(found) if m.kind == "chat"]
        say(
            "\n".join("%3d  %s" % (at, visible(m.id)) for at, m in enumerate(models, 1))
        )
        for what, patterns in (("main", recipe.main), ("small, fast", recipe.small)):
            chosen.append(ask_model(what, models, patterns))
        values = fill(recipe, models, url, client_key(app.settings), *chosen)
        line = command_line(recipe, values, shell_of(app.environ), True)
        say("\nTo start Claude Code, paste:\n\n%s\n\n%s" % (line, copy_text(line)))
    except ProxyError as error:
        say("error: %s" % error)


COMMANDS: Mapping[str, tuple[str, Callable[[App, argparse.Namespace], int]]] = {
    "start": ("serve; logs in first if nobody is logged in", cmd_start),
    "auth": ("log in to GitHub, no server", cmd_auth),
    "check-usage": ("quota and resets", cmd_check_usage),
    "debug": ("what runs where; never a secret", cmd_debug),
    "models": ("the models of this account", cmd_models),
    "setup": ("what to paste into a client, or a service manager's unit", cmd_setup),
}


def add_option(parser: argparse.ArgumentParser, option: Option) -> None:
    """One row of OPTIONS as an argument, its help with default and environment names."""
    names = ([option.short] if option.short else []) + ["--" + option.name]
    if option.default in ("", None, (), False):
        default = ""
    else:
        default = "default %s, " % option.default

    help_text = "%s [%senv %s]" % (option.help, default, ", ".join(option.variables))
    more: Json = {
        "dest": option.field,
        "default": None,
        "help": help_text.replace("%", "%%"),
    }

    if option.kind in ("switch", "either"):
        parser.add_argument(*names, action="store_const", const=True, **more)
        if option.kind == "either":
            parser.add_argument(
                "--no-" + option.name,
                action="store_const",
                const=False,
                dest=option.field,
                help=argparse.SUPPRESS,
            )
    elif option.kind == "list":
        parser.add_argument(
            *names,
            action="append",
            metavar=option.help.split(" ")[0].strip(":")
            if "=" in option.help.split(" ")[0]
            else "VALUE",
            **more,
        )
    else:
        kind = {"int": int, "float": float}.get(option.kind, str)
        parser.add_argument(
            *names, type=kind, metavar=option.field.split("_")[-1].upper(), **more
        )


def add_command_flags(commands: Any) -> None:
    """The flags of single commands that are no settings."""
    auth, debug, table = (commands.choices[n] for n in ("auth", "debug", "models"))
    auth.add_argument(
        "--import",
        dest="import_login",
        action="store_true",
        help="reuse a login of the environment or of an editor's files",
    )

    auth.add_argument("--list", action="store_true", help="who is logged in")
    auth.add_argument(
        "--logout", nargs="?", const="", metavar="LOGIN", help="forget the login"
    )
    debug.add_argument(
        "--network", action="store_true", help="probe each hop, name the remedy"
    )
    debug.add_argument(
        "--health", metavar="URL", help="exit code 0 if the server there is ready"
    )
    debug.add_argument(
        "--bundle",
        metavar="FILE",
        help="write a report for a bug: hops, settings, "
        "recent requests; no secret, no words",
    )

    table.add_argument(
        "--all", action="store_true", help="hidden and disabled ones, too"
    )


def add_setup_flags(setup: argparse.ArgumentParser) -> None:
    """The flags of `setup`."""
    setup.add_argument(
        "client",
        nargs="?",
        metavar="CLIENT",
        default="",
        help=", ".join([*CLIENTS, *SERVICES]),
    )

    setup.add_argument(
        "--shell", choices=sorted(SHELLS), help="instead of the one that is seen"
    )

    for name, text in (
        ("url", "base URL, where the client sees the server under another"),
        ("key", "key of the server"),
        ("model", "main model"),
        ("small-model", "model for small tasks"),
    ):
        setup.add_argument("--" + name, help=text, default="")

    for name, text in (
        ("write", "merge into the client's files, show what changes, keep a backup"),
        ("check", "send one real request through the running server"),
        ("copy", "to the clipboard, too"),
    ):
        setup.add_argument("--" + name, action="store_true", help=text)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="copilot_proxy.py",
        description="Your own GitHub Copilot subscription as a local "
        "OpenAI and Anthropic API.",
    )

    version = "copilot_proxy %s (Python %s, %s)" % (
        __version__,
        sys.version.split()[0],
        sys.platform,
    )

    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    for name, (text, _) in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text)
        for option in OPTIONS:
            if option.where == "network" or name in option.where.split():
                add_option(sub, option)
        if name in ("check-usage", "debug", "models"):
            sub.add_argument("--json", action="store_true", help="as JSON")

    add_command_flags(commands)
    add_setup_flags(commands.choices["setup"])
    return parser


class RedactingFormatter(logging.Formatter):
    """The last line of defence: whatever was logged, no token leaves through the log, no character
    that a terminal obeys, and no line that pretends to be another record."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """One line, the words of clients and upstreams in it escaped."""
        return visible(redact(super().formatMessage(record)))

    def format(self, record: logging.LogRecord) -> str:
        """With the lines of a traceback below, if there is one, indented."""
        text = visible(redact(super().format(record)), keep="\n")
        return text.replace("\n", "\n  ")


class JsonFormatter(RedactingFormatter):
    """--log-json: one object per line; a request's line has its row of the history."""

    def format(self, record: logging.LogRecord) -> str:
        """Redacted before it is JSON: afterwards a quote could go with a secret."""
        values = dict(
            vars(record).get("row", {}),
            level=record.levelname.lower(),
            time=record.created,
            message=super().format(record),
        )
        return dumps(
            {
                name: visible(redact(value), keep="\n")
                if isinstance(value, str)
                else value
                for name, value in values.items()
            }
        ).decode()


def set_up_logging(verbose: bool, as_json: bool) -> None:
    """Log to standard error; a library user configures the logger himself."""
    if as_json:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(JsonFormatter())
    else:
        handler = LogHandler(sys.stderr)
        form = "%(asctime)s %(levelname).1s %(message)s"
        handler.setFormatter(RedactingFormatter(form, LOG_TIME))
    log = logging.getLogger("copilot_proxy")
    log.handlers[:] = [handler]
    log.setLevel(logging.DEBUG if verbose else logging.INFO)
    log.propagate = False


# ==== 24. Main ====================================================================================


def main(argv: list[str] | None = None, signals: list[int] | None = None) -> int:
    """Run one command -> exit code.  `main(["start", "--port", "0"])`
    signals: what `catch_signals` gave when the caller is not in the main thread."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # pythonw has none
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # consoles with an old code page

    parser = build_parser()
    flags = parser.parse_args(argv)
    flags.signals = signals
    if flags.command is None:
        parser.print_help()
        return 2

    try:
        settings = load_settings(flags, os.environ)
        with contextlib.ExitStack() as stack:
            if flags.command == "start":
                queue_output(stack)
            set_up_logging(
                settings.verbose if flags.command == "start" else bool(flags.verbose),
                settings.log_json,
            )
            if flags.command != "start" and not flags.verbose:
                logging.getLogger("copilot_proxy").setLevel(logging.WARNING)
            if settings.demo:
                stack.callback(start_demo(settings).finish, 0)
            app = App(settings)
            stack.callback(app.close)
            return COMMANDS[flags.command][1](app, flags)
    except ProxyError as error:
        with contextlib.suppress(OSError, ValueError):
            print("error: %s" % visible(redact(str(error))), file=sys.stderr)
        if isinstance(error, ConfigError):
            return 2
        return 1
    except ClientGone:  # nobody reads what is printed
        return 1
    except KeyboardInterrupt:
        return 130


def queue_output(stack: contextlib.ExitStack) -> None:
    """From here on nobody waits for who reads the output, until `stack` is closed."""

    def report(lines: int) -> None:
        log.warning("%d lines of the log are lost: nobody took them in time", lines)

    log = logging.getLogger("copilot_proxy")
    output = QueuedOutput(sys.stdout, lambda lines: None)
    errors = QueuedOutput(sys.stderr, report)
    stack.callback(output.close)
    stack.callback(errors.close)
    stack.enter_context(contextlib.redirect_stdout(output))
    stack.enter_context(contextlib.redirect_stderr(errors))


def flush_output() -> None:
    """What argparse has printed."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def run_script() -> None:
    """The command line.
    Python keeps the syntax tree of a script, 14 MB here, until its last line has run.  So `start`
    goes on in a thread of its own and lets the script come to its end; from 3.12 on an ended
    script can begin no more threads, and the memory stays taken."""
    if sys.argv[1:2] != ["start"]:
        sys.exit(main())
    signals = catch_signals()

    def serve() -> None:
        try:
            code: Any = main(None, signals)
        except SystemExit as end:
            code = end.code
        flushing = threading.Thread(target=flush_output, daemon=True)
        flushing.start()
        flushing.join(OUTPUT_END_S)  # no longer: perhaps nobody reads it
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)

    if sys.version_info >= (3, 12):
        serve()
    else:
        threading.Thread(target=serve, name="start").start()


if __name__ == "__main__":
    run_script()
