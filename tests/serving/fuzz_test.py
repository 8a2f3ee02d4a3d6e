"""Requests that no honest client sends: no 500, no hang, and the server still answers."""

import contextlib
import socket

import http_server
import httpx
import hypothesis
import pytest

from variator_jax.serving.http import HttpLimits

HEAD = b"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
RAW = {
    "nothing": (b"", b""),
    "no HTTP": (b"\x00\xff\xfe\r\n\r\n", b"400"),
    "half a header": (b"POST /embed HT", b""),
    "a huge header": (b"GET / HTTP/1.1\r\nA: " + b"a" * 100_000, b"400"),
    "half a body": (HEAD + b'Content-Length: 99\r\n\r\n{"inp', b"408"),
    "a negative length": (HEAD + b"Content-Length: -5\r\n\r\n", b"400"),
    "two lengths": (HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef", b"400"),
    "a broken chunk": (HEAD + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n", b"400"),
    "a huge body": (HEAD + b"Content-Length: 99999999999\r\n\r\n" + b"x" * 200_000, b"413"),
    "a websocket": (
        b"GET / HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
        b"200",
    ),
}
BODIES = {
    "invalid UTF-8": b'{"inputs": "\xff"}',
    "half a surrogate pair": rb'{"inputs": "\ud800"}',
    "NaN": b'{"inputs": NaN}',
    "an infinite number": b'{"inputs": "x", "ratio": 1e999}',
    "deep JSON": b'{"inputs": ' + b"[" * 50_000,
    "a huge number": b'{"inputs": ' + b"1" * 5_000 + b"}",
    "an id beyond 64 bits": b'{"inputs": [18446744073709551616]}',
    "half JSON": b'{"inputs"',
    "no JSON": b"inputs=x",
}


def running(**more):
    limits = HttpLimits(body_bytes=100_000, **more)
    with http_server.running(http_server.service(), limits=limits) as url:
        yield url
        assert httpx.post(f"{url}/embed", json={"inputs": "x"}).status_code == 200


@pytest.fixture(scope="module")
def url():
    yield from running()


@pytest.fixture(scope="module")
def strict_url():
    """As above, for which half a request lasts a second."""
    yield from running(seconds=1)


@pytest.mark.parametrize("sent, status", RAW.values(), ids=RAW)
def test_broken_http_ends_the_connection_in_time(strict_url, sent, status):
    with socket.create_connection(("127.0.0.1", int(strict_url.rpartition(":")[2])), 60) as client:
        client.sendall(sent)
        found = b""
        with contextlib.suppress(ConnectionResetError):
            while part := client.recv(1 << 16):
                found += part
    assert found.partition(b" ")[2][:3] == status


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_broken_bodies_are_refused_with_a_reason(url, body):
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{url}/embed", content=body, headers=headers)
    assert answer.status_code in (400, 422) and answer.json()["error"]


def test_the_openapi_description_holds_under_fuzzing(url):
    schemathesis = pytest.importorskip("schemathesis")
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    # Any text is no plugin's name, and any number no ratio: what fits the schema may be refused.
    schemathesis.checks.load_all_checks()
    excluded = [schemathesis.checks.CHECKS.get_one("positive_data_acceptance")]
    for operation in schema.get_all_operations():

        @hypothesis.given(case=operation.ok().as_strategy())
        @hypothesis.settings(max_examples=4)
        def fits(case):
            case.call_and_validate(excluded_checks=excluded)

        fits()
