"""The load test, against servers whose latency, refusals and capacity are known."""

import contextlib
import dataclasses
import importlib.util
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from variator_jax import cli
from variator_jax.errors import VariatorError
from variator_jax.serving import loadreport, loadtest
from variator_jax.serving.loadtest import Load, Run, Sample, arrivals, bodies, run


@contextlib.contextmanager
def served(answer):
    """The URL of a server, what it gets, and the headers; `answer` returns status and ratio."""
    received, headers = [], []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            headers.append(self.headers)
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            status, ratio = answer(len(received) - 1, received[-1])
            self.reply(status, b"[]", {"x-variator-ratio": str(ratio)})

        def do_GET(self):
            memory = f"process_resident_memory_bytes {2**20 * (100 + len(received))}.0\n"
            self.reply(200, f"# HELP x y\n{memory}variator_compilations 7.0\n".encode(), {})

        def reply(self, status, content, headers):
            self.send_response(status)
            for name, value in {**headers, "Content-Length": len(content)}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", received, headers
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("shape", ["steady", "burst", "ramp"])
def test_arrivals_are_a_poisson_process_of_the_asked_shape(shape):
    load = Load(shape=shape, rate=50, peak=200, seconds=300)
    times = arrivals(load)
    thirds = np.histogram(times, bins=3, range=(0, 300))[0] / 100
    expected = {"steady": (50, 50, 50), "burst": (50, 200, 50), "ramp": (75, 125, 175)}[shape]
    np.testing.assert_allclose(thirds, expected, rtol=0.08)
    # As many arrivals in a second vary by the root of their mean.
    counts = np.histogram(times[times < 100], bins=100, range=(0, 100))[0]
    if shape != "ramp":
        assert 0.6 < counts.var() / counts.mean() < 1.6
    assert (np.diff(times) >= 0).all() and len(arrivals(load)) == len(times)


def test_bodies_are_those_of_the_route(tmp_path):
    (tmp_path / "texts.txt").write_text("one text\n")
    load = Load(texts=str(tmp_path / "texts.txt"), plugin="none", documents=2)
    assert next(bodies(load)) == {"inputs": "one text", "plugin": "none"}
    ranked = next(bodies(dataclasses.replace(load, route="rerank", plugin=None)))
    assert ranked["texts"] == ["one text"] * 2 and set(ranked) == {"query", "texts"}
    assert len(next(bodies(Load(words=7)))["inputs"].split()) == 7
    (tmp_path / "texts.txt").write_text("\n")
    with pytest.raises(VariatorError, match="has no texts"):
        next(bodies(load))


def test_every_request_is_counted_with_its_latency_status_and_ratio(monkeypatch):
    def answer(number, body):
        time.sleep(0.05)
        return (429, 1) if number % 4 == 3 else (200, [1, 4][number % 2])

    monkeypatch.setattr(loadtest, "_SAMPLED_EVERY", 0.1)
    load = Load(rate=60, seconds=1.5, words=3)
    with served(answer) as (url, received, _):
        result = run(dataclasses.replace(load, url=url))
    assert len(result.samples) == len(arrivals(load)) == len(received) - 1  # one before the test
    assert {sample.status for sample in result.samples} == {200, 429}
    assert min(sample.seconds for sample in result.samples) >= 0.05
    total = loadreport.whole(result, load, target_ms=1e4)
    assert total.refused == sum(sample.status == 429 for sample in result.samples) > 0
    assert total.goodput * 1.5 == pytest.approx(total.requests - total.refused)
    assert 1 < total.ratio < 4 and total.p50 >= 50 and not total.failed and not total.held
    assert result.metrics[-1]["memory"] > result.metrics[0]["memory"] >= 100 * 2**20


def test_latency_counts_from_the_arrival_however_slow_the_answers_before_it():
    slow = threading.Lock()  # one request at a time, 0.1 s each: half of what arrives

    def answer(number, body):
        with slow:
            time.sleep(0.1)
        return 200, 1

    load = Load(rate=20, seconds=1)
    with served(answer) as (url, *_):
        result = run(dataclasses.replace(load, url=url))
    assert [sample.status for sample in result.samples] == [200] * len(arrivals(load))
    # The last ones wait for all before them.
    assert max(s.seconds for s in result.samples) > 0.05 * len(result.samples) - 0.3
    assert np.median([s.behind for s in result.samples]) < 0.25


def test_a_server_that_is_not_there_or_refuses_the_request_is_reported():
    with pytest.raises(VariatorError, match="No answer from http://127.0.0.1:9"):
        run(Load(url="http://127.0.0.1:9"))
    with served(lambda *_: (422, 1)) as (url, *_):
        with pytest.raises(VariatorError, match="/rerank answers 422"):
            run(Load(url=url, route="rerank"))
    for wrong in ({"shape": "square"}, {"route": "embeds"}, {"rate": 0}, {"seconds": -1}):
        with pytest.raises(VariatorError, match="Known: steady|Did you mean|above 0"):
            Load(**wrong)
    for url in ("http://127.0.0.1:80x0", "http://127.0.0.1:99999"):
        with pytest.raises(VariatorError, match=f"'{url}' is no URL: .*[Pp]ort"):
            Load(url=url)
    with pytest.raises(VariatorError, match="The seed is -1"):
        Load(seed=-1)
    assert "secret" not in repr(Load(token="secret"))


def test_intervals_have_the_percentiles_rates_and_ratios_of_their_own_samples():
    load = Load(seconds=10)
    samples = [Sample(i / 10, 0.01 * (1 + i % 10), 200, 1 if i < 50 else 4, 0) for i in range(100)]
    samples[99] = samples[99]._replace(status=429)
    early, late = loadreport.intervals(Run(samples, []), load, 55, 2)
    assert (early.offered, early.goodput, early.ratio) == (10, 5, 1)
    assert early.p50 == pytest.approx(55) and early.p99 == pytest.approx(100, rel=0.02)
    assert (late.start, late.refused, late.ratio, late.requests) == (5, 1, 4, 50)
    assert early._replace(goodput=9.9).held and not early._replace(goodput=9.8).held
    empty = loadreport.intervals(Run([], []), load, 55, 1)[0]
    assert not empty.held and np.isnan(empty.p99)


@pytest.mark.parametrize("capacity", [0.3, 7, 10, 33, 900])
def test_the_search_brackets_the_highest_rate_that_holds(capacity):
    tried = []
    low, high = loadreport.highest_rate(lambda x: tried.append(x) or x <= capacity, 10)
    assert low <= capacity < high <= 1.05 * low and len(tried) < 16


def test_a_server_that_never_holds_ends_the_search():
    with pytest.raises(VariatorError, match="miss the target"):
        loadreport.highest_rate(lambda rate: False, 10)


def test_the_command_prints_and_plots(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("VARIATOR_TOKEN", "secret")
    with served(lambda number, _: (200, 1 if number < 15 else 2)) as (url, _, sent):
        command = ["loadtest", f"--url={url}", "--seconds=1", "--rate=30", "--target_ms=1000"]
        assert cli.main([*command, f"--output={tmp_path}"]) == 0
        printed = capsys.readouterr().out
        assert cli.main([*command, "--against=none"]) == 2
        sent_before = len(sent)
        assert cli.main([*command, f"--output={tmp_path / 'loadtest.md'}"]) == 2
        assert len(sent) == sent_before
    assert "| from s | offered/s |" in printed and "Compilations during the test: 0." in printed
    assert {x.name for x in tmp_path.iterdir()} == {f"loadtest.{x}" for x in ("json", "md", "png")}
    written = json.loads((tmp_path / "loadtest.json").read_text())
    assert "secret" not in str(written)
    assert {headers["Authorization"] for headers in sent} == {"Bearer secret"}
    expected = len(arrivals(Load(rate=30, seconds=1)))
    assert sum(part["requests"] for part in written["over_time"]) == expected


def test_without_matplotlib_the_numbers_are_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    loadreport.write(Run([], []), Load(), 55, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"loadtest.json", "loadtest.md"}
    assert "no plot: matplotlib is not installed" in capsys.readouterr().err


def test_the_command_compares_a_plugin_with_the_servers_choice(capsys, monkeypatch):
    def carried(load):
        """A plugin that is named carries 20 requests a second, the server's choice 60."""
        status = 200 if load.rate <= (20 if load.plugin else 60) else 429
        return Run([Sample(float(at), 0.01, status, 1, 0.0) for at in arrivals(load)], [])

    monkeypatch.setattr(loadreport, "run", carried)
    command = ["loadtest", "--url=http://x", "--seconds=2", "--rate=16", "--target_ms=1000"]
    assert cli.main([*command, "--search", "--against=none"]) == 0
    table = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[-2:]]
    names, held, *_, quotient = zip(*table, strict=True)
    assert [name.strip() for name in names] == ["none", "chosen by the server"]
    assert float(held[1]) / float(held[0]) == pytest.approx(float(quotient[1]), abs=0.02)
    assert float(quotient[1]) == pytest.approx(3, rel=0.1)
