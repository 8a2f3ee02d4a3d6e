"""Copies standard input to standard error; after JAX's report of a lost process, says what to do.

A program of its own, which `distributed.py` starts: it outlives a process that JAX ends from C++.
"""

import os
import signal
import sys

MARK = b"JAX distributed service detected fatal errors"


def relay(last_word: bytes, source: int = 0, target: int = 2) -> None:
    """Copies bytes as they come, and writes `last_word` if MARK was among them, but itself not."""
    seen: set[bytes] = set()
    kept = b""
    while chunk := os.read(source, 65536):
        _write(target, chunk)
        kept += chunk
        seen.update(text for text in (MARK, last_word) if text in kept)
        kept = kept[-max(len(MARK), len(last_word)) :]
    if seen == {MARK}:
        _write(target, b"variator: error: " + last_word + b".\n")


def _write(target: int, data: bytes) -> None:
    while data:
        data = data[os.write(target, data) :]


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    relay(sys.argv[1].encode())
