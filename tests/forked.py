"""The other side of support.Forked: what a process does that has been forked off a server.

The server of multiprocessing has imported copilot_proxy once, by this file.  A process that it
forks is the program's own: it has the arguments, variables, folder and standard streams of a
command, and ends as the command does.
"""
from __future__ import annotations

import os
import signal
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

import copilot_proxy

#: fields of Settings that no flag sets: how long the program waits before it asks once more
PAUSES = dict(poll_margin_s=0.01, token_retry_s=(0.02, 0.05), hiccup_pause_s=0.002)
load_settings = copilot_proxy.load_settings


def load_impatient(*given: Any) -> copilot_proxy.Settings:
    """The program's load_settings, with short pauses."""
    settings = load_settings(*given)
    for name, value in PAUSES.items():
        setattr(settings, name, value)
    return settings


def run_command(words: tuple[str, ...], environ: dict[str, str], folder: str,
                ends: list[Connection], has_session: bool, has_terminal: bool,
                signals: tuple[tuple[int, Any], ...]) -> None:
    """`copilot_proxy.py WORDS` in this process.

    ends: standard input, output and errors; has_session: a new one, as setsid makes it;
    has_terminal: standard input is its terminal; signals: how it handles some, as by nohup.
    """
    if has_session:
        os.setsid()
    for number, end in enumerate(ends):
        os.dup2(end.fileno(), number)
        end.close()
    if has_terminal:
        import fcntl
        import termios
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    for number, handling in signals:
        signal.signal(number, handling)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environ)
    time.tzset()
    sys.stdin = open(0, closefd=False)
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", errors="backslashreplace", buffering=1, closefd=False)
    sys.argv = ["copilot_proxy.py", *words]
    copilot_proxy.load_settings = load_impatient
    copilot_proxy.SIGNAL_LOOK_S = copilot_proxy.LOGIN_LOOK_S = 0.01
    copilot_proxy.run_script()
