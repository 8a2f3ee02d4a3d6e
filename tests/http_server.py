"""A server of the tiny model of `served`, in a thread of this process."""

import contextlib
import threading
import time

import httpx
import served

from variator_jax.serving.http import HttpLimits, bind, create_app, make_server
from variator_jax.serving.service import Limits, Service


def service(limits=None, slo_ms=served.SLO_MS):
    """A service that is not started; its programs are compiled by the first test of a process."""
    return Service(served.warm(), slo_ms, limits or Limits())


@contextlib.contextmanager
def running(service, token=None, limits=None, ready=True):
    """The address of a running server."""
    limits = limits or HttpLimits()
    bound = bind("127.0.0.1", 0, limits.seconds)
    server = make_server(create_app(service, "tiny", token, limits))
    thread = threading.Thread(target=server.run, args=([bound],))
    thread.start()
    url = f"http://127.0.0.1:{bound.getsockname()[1]}"
    try:
        while ready and httpx.get(f"{url}/health", timeout=60).status_code != 200:
            time.sleep(0.05)
        yield url
    finally:
        server.should_exit = True
        thread.join()
