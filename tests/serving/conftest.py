"""A server of the tiny model, and a device that waits."""

import threading

import http_server
import pytest
import served


@pytest.fixture(scope="module")
def url():
    """The address of a server, of which each module has its own."""
    with http_server.running(http_server.service()) as url:
        yield url


@pytest.fixture
def held_device(monkeypatch):
    """An event before which no batch starts on the device."""
    go, dispatch = threading.Event(), served.warm().dispatch
    monkeypatch.setattr(served.warm(), "dispatch", lambda *args: go.wait(60) and dispatch(*args))
    return go
