"""The one place that imports TensorFlow and seqio: quiet, and off the accelerators.

Every other module takes `tf` and `seqio` from here. TensorFlow reads its log level when it is first
imported, and would take all memory of every GPU that it sees. Recent versions print information
about the processor whatever the log level is, so those lines are dropped from what the import
writes to standard error; errors pass through.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

_CHATTER = re.compile(
    rb"^(?:[IW]\d{4} |\d{4}-\d\d-\d\d [\d:.]+: [IW] |WARNING: All log messages before|"
    rb"To enable the following instructions)"
)


@contextlib.contextmanager
def _without_native_chatter() -> Iterator[None]:
    """Holds back standard error, native code's too, then lets through what is no chatter."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            written.seek(0)
            os.write(2, b"".join(line for line in written if not _CHATTER.match(line)))


with _without_native_chatter():
    import seqio
    import tensorflow as tf

    with contextlib.suppress(RuntimeError):  # TensorFlow is in use: its first user has decided
        tf.config.set_visible_devices([], "GPU")
    tf.constant(0)  # the first operation says more about the processor

__all__ = ["seqio", "tf"]
