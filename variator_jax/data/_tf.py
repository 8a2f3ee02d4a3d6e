"""The one place that imports TensorFlow and seqio: quiet, and off the accelerators.

Every other module takes `tf` and `seqio` from here. TensorFlow reads its log level when it is first
imported, and would take all memory of every GPU that it sees. Recent versions print information
about the processor whatever the log level is, so what the import itself writes to standard error is
dropped; what goes wrong in it is raised.
"""

import contextlib
import os
import sys
from collections.abc import Iterator

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


@contextlib.contextmanager
def _without_standard_error() -> Iterator[None]:
    """Drops standard error, native code's too."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


with _without_standard_error():
    import seqio
    import tensorflow as tf

    with contextlib.suppress(RuntimeError):  # TensorFlow is in use: its first user has decided
        tf.config.set_visible_devices([], "GPU")
    tf.constant(0)  # the first operation prints more about the processor

__all__ = ["seqio", "tf"]
