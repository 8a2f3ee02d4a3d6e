"""Copies standard input to standard error; after JAX's report of a lost process, adds a last line.

A program of its own, started by `distributed.py`: it outlives a process that JAX ends from C++.
"""

import os
import signal
import sys

MARK = b"JAX distributed service detected fatal errors"


def relay(last_line: bytes) -> None:
    """Copies all bytes; writes `last_line` at the end if MARK was among them and it was not."""
    tail, lost, written = b"", False, False
    while chunk := os.read(0, 65536):
        sys.stderr.buffer.write(chunk)
        sys.stderr.flush()
        tail += chunk
        lost, written = lost or MARK in tail, written or last_line in tail
        tail = tail[-max(len(MARK), len(last_line)) :]
    if lost and not written:
        sys.stderr.write(f"variator: error: {last_line.decode()}.\n")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    relay(sys.argv[1].encode())
