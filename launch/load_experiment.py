"""How much more load the policy of `variator serve` holds than a fixed ratio 1, on this machine.

    python launch/load_experiment.py                # T5-base shape, about half an hour on 2 cores
    python launch/load_experiment.py --overload 600 # then 10 minutes at 3 times what it holds

One run does all: it makes a T5-base shape of random weights that takes texts by their bytes, with
plugins up to a span plugin that saves over 70 % of the encoder's FLOPs; times a batch of ratio 1,
five times which is the target of p99; starts `variator serve`; checks that at a low load every
answer has ratio 1; and finds by bisection over runs of 60 s the highest load that holds the target,
first for requests that name ratio 1, then for requests whose plugin the policy chooses. At last
the server is killed under load and started again: how long both starts took from the first answer
of /live on, which leaves the imports out, and whether clients that retry got every answer.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import jax
import numpy as np

from variator_jax import PluginConfig, VariatorModel, save_backbone, save_plugins
from variator_jax.backbones.t5 import T5, get_config, shape_params
from variator_jax.bench.latency import random_params
from variator_jax.bench.output import hardware
from variator_jax.plugin import init_plugin
from variator_jax.serving import loadreport
from variator_jax.serving.loadtest import Load, run
from variator_jax.store import Plugin, load_backbone
from variator_jax.store.plugins import by_key

GEARS = ("span all x2 size=1 rank=16", "span all x4 size=1 rank=16")
WORDS = "the library returns a list of values and draws one line for each axis in file".split()


def make_model(folder: Path, shape: str) -> None:
    """Writes the backbone and its plugins; the weights do not change the time."""
    # A name of ByT5's, which takes texts by their bytes and needs no vocabulary.
    config = get_config(shape, vocab_size=384, num_decoder_layers=0)
    config = dataclasses.replace(config, name="byt5_experiment")
    save_backbone(
        folder / "backbone", config, jax.device_get(random_params(config, shape_params(config)))
    )
    backbone, stack = load_backbone(folder / "backbone"), T5(config).stack()
    plugins = []
    for sites in GEARS:
        settings = PluginConfig(sites=(sites,))
        variables = jax.device_get(init_plugin(settings, stack, jax.random.key(0)))
        plugins.append(Plugin(settings, variables))
    save_plugins(folder / "plugins", by_key(plugins), backbone)


def write_texts(path: Path, length: int) -> None:
    """Writes texts of `length` tokens: bytes, and the end of the sequence."""
    rng = random.Random(0)
    texts = (" ".join(rng.choices(WORDS, k=length))[: length - 1] for _ in range(200))
    path.write_text("\n".join(text.replace(" ", "_") for text in texts))


def batch_ms(folder: Path, texts: Path, rows: int) -> float:
    """The median time of a batch of ratio 1, in milliseconds."""
    model = VariatorModel(load_backbone(folder / "backbone"))
    tokens = model.tokenize(texts.read_text().splitlines()[:rows])
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        jax.block_until_ready(model.encode(tokens))
        seconds.append(time.perf_counter() - start)
    return 1e3 * float(np.median(seconds[1:]))


class Server:
    """`variator serve` on a port of its own, with a cache of compiled programs."""

    def __init__(self, folder: Path, target_ms: float, length: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        tasks = folder / "tasks.json"
        tasks.write_text(json.dumps([{"name": "embed", "kind": "embed", "plugin": "auto"}]))
        command = [sys.executable, "-m", "variator_jax", "serve", f"--backbone={folder}/backbone"]
        command += [f"--plugins={folder}/plugins", f"--tasks={tasks}", f"--slo_ms={target_ms}"]
        command += [f"--max_length={length}", f"--port={port}", f"--cache={folder}/cache"]
        self._command = command

    def start(self) -> float:
        """Starts it; returns the seconds from /live to /health, behind the imports."""
        self.process = subprocess.Popen(self._command)
        self._until("/live")
        began = time.monotonic()
        self._until("/health")
        return time.monotonic() - began

    def _until(self, path: str) -> None:
        while not answers(self.url + path):
            if self.process.poll() is not None:
                sys.exit("the server did not start")
            time.sleep(0.1)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Sends a signal and waits for the end."""
        self.process.send_signal(number)
        self.process.wait()


def restart(server: Server, texts: Path, cold: float) -> None:
    """Kills the server under load and starts it again, while clients retry."""
    lines = texts.read_text().splitlines()[:100]

    def embed(text: str) -> bytes:
        body = json.dumps({"inputs": text, "plugin": "none"}).encode()
        headers = {"Content-Type": "application/json"}
        while True:
            try:
                request = urllib.request.Request(f"{server.url}/embed", body, headers)
                return urllib.request.urlopen(request, timeout=60).read()
            except OSError:  # refused, reset, 429 or 503
                time.sleep(0.2)

    with concurrent.futures.ThreadPoolExecutor(8) as clients:
        before = list(clients.map(embed, lines))
        again = [clients.submit(embed, line) for line in lines]
        time.sleep(1)
        server.stop(signal.SIGKILL)
        warm = server.start()
        after = [future.result() for future in again]
    same = sum(a == b for a, b in zip(before, after, strict=True))
    print(f"cold start {cold:.1f} s, after a kill {warm:.1f} s ({warm / cold:.0%}), no imports")
    print(f"{len(after)} requests over the kill: all answered, {same} with the same bytes")


def answers(url: str) -> bool:
    """Whether a URL answers 200."""
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False


def main() -> None:
    """Runs the experiment; exits with 1 if a low load is not answered at ratio 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="t5_1_0_base", help="of the backbone")
    parser.add_argument("--length", type=int, default=256, help="tokens of every text")
    parser.add_argument("--rows", type=int, default=4, help="of the batch that sets the target")
    parser.add_argument("--seconds", type=float, default=60, help="of a measurement")
    parser.add_argument(
        "--overload", type=float, default=0, help="seconds at 3 times what it holds"
    )
    parser.add_argument("--output", default="runs/load_experiment", help="tables and plots")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends the server, too
    with tempfile.TemporaryDirectory() as scratch:
        folder, texts = Path(scratch), Path(scratch) / "texts.txt"
        write_texts(texts, args.length)
        make_model(folder, args.shape)
        one = batch_ms(folder, texts, args.rows)
        target = 5 * one
        print(f"{args.shape} with random weights on {hardware()}")
        batch = f"{args.rows} x {args.length} tokens at ratio 1: {one:.0f} ms"
        print(f"{batch}; the target of p99 is five times that, {target:.0f} ms", flush=True)
        server = Server(folder, target, args.length)
        cold = server.start()
        try:
            measure(server.url, texts, target, 1e3 * args.rows / one, args)
            restart(server, texts, cold)
        finally:
            server.stop()


def measure(
    url: str, texts: Path, target: float, capacity: float, args: argparse.Namespace
) -> None:
    """Measures a low load, the highest loads, and on demand an overload.

    Args:
      url: of the server.
      texts: what is sent.
      target: of p99, in milliseconds.
      capacity: texts a second of ratio 1, without a queue.
      args: those of the script.
    """
    load = Load(url, rate=capacity / 5, seconds=args.seconds, texts=str(texts))
    low = loadreport.whole(run(load), load, target)
    print(
        f"low load, {low.offered:.1f}/s: mean ratio {low.ratio:.3f}, p99 {low.p99:.0f} ms",
        flush=True,
    )
    if low.ratio != 1 or not low.held:
        sys.exit("a low load is to be answered at ratio 1, within the target")
    load = Load(url, rate=0.7 * capacity, seconds=args.seconds, texts=str(texts))
    found = loadreport.compare(load, target, "none")
    print(found.markdown(), flush=True)
    held = found.held[-1]
    ramp = {"shape": "ramp", "rate": capacity / 5, "peak": 1.2 * held, "seconds": 3 * args.seconds}
    shapes = {"ramp": dataclasses.replace(load, **ramp)}
    if args.overload:
        shapes["overload"] = dataclasses.replace(load, rate=3 * held, seconds=args.overload)
    for name, shape in shapes.items():
        result = run(shape)
        print(loadreport.markdown(result, shape, target), flush=True)
        loadreport.write(result, shape, target, Path(args.output) / name)


if __name__ == "__main__":
    main()
