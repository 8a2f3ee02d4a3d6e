"""Kills `variator encode` at random times and compares its output with an undisturbed run's.

    python launch/encode_kills.py --backbone runs/quickstart/finetuned
    python launch/encode_kills.py --backbone DIR --texts 2000 --kills 3 --pooling none

Writes texts of random words and lengths with a few bad rows among them, encodes them once, then
again into another folder with SIGKILL at random times: two of three after a file was written, the
others at any time from the start. The two folders must hold the same files, byte for byte, and each
line of the input once. Further arguments go to `variator encode`.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes  # noqa: F401 - numpy's bfloat16
from safetensors.numpy import load_file

BAD = ("{broken", '{"other": 1}', '{"text": ""}', '{"text": 3}', "[1]", '{"text": "\\ud800"}')
WORDS = "the of and a library draws line on axes value returns list text file is not in for".split()


def write_texts(path: Path, count: int, rng: random.Random) -> list[int]:
    """Writes the input; returns the numbers of the bad lines."""
    bad = sorted(rng.sample(range(1, count + 1), max(1, count // 200)))
    with path.open("w") as file:
        for line in range(1, count + 1):
            words = " ".join(rng.choices(WORDS, k=int(rng.paretovariate(1.2) * 4) % 300 + 1))
            row = json.dumps({"text": f"{line} {words}"})
            file.write((rng.choice(BAD) if line in bad else row) + "\n")
    return bad


def start(command: list[str]) -> subprocess.Popen:
    """The process, quiet but for its errors."""
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def files(folder: Path) -> int:
    """How many files of windows there are."""
    return len(list(folder.glob("*.safetensors")))


def seconds_to_next_file(folder: Path, process: subprocess.Popen) -> float:
    """Waits until the run has written one more file: imports, weights, and a window."""
    before, begin = files(folder), time.monotonic()
    while process.poll() is None and files(folder) == before:
        time.sleep(0.02)
    return time.monotonic() - begin


def check(one: Path, other: Path, count: int, bad: list[int]) -> None:
    """Compares the folders, and looks for lines that are missing or there twice."""
    names = [sorted(file.name for file in folder.iterdir()) for folder in (one, other)]
    if names[0] != names[1]:
        sys.exit(f"different files, such as {min(set(names[0]) ^ set(names[1]))}")
    for name in names[0]:
        if (one / name).read_bytes() != (other / name).read_bytes():
            sys.exit(f"{name} differs")
    encoded = [x for file in sorted(other.glob("*.safetensors")) for x in load_file(file)["lines"]]
    listed = [json.loads(row)["line"] for row in (other / "bad_rows.jsonl").open()]
    if listed != bad or sorted([*encoded, *listed]) != list(range(1, count + 1)):
        sys.exit("lines are missing, there twice, or bad ones are not listed")
    print(f"equal: {len(names[0])} files, {len(encoded):,} rows, {len(listed)} bad rows")


def main() -> None:
    """Runs the comparison; exits with 1 and the reason if the outputs differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--texts", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    args, further = parser.parse_known_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as scratch:
        whole, killed = Path(scratch) / "whole", Path(scratch) / "killed"
        texts = Path(scratch) / "texts.jsonl"
        bad = write_texts(texts, args.texts, rng)
        command = [sys.executable, "-m", "variator_jax", "encode", "--backbone", args.backbone]
        # A text that is too long is cut; else it would be a bad row that `bad` does not have.
        command += ["--truncate", "--input", str(texts), "--window", str(args.window), *further]
        command += ["--output"]
        process, begin = start([*command, str(whole)]), time.monotonic()
        before = seconds_to_next_file(whole, process)
        if process.wait():
            sys.exit(f"{' '.join(command)} {whole} failed")
        work = time.monotonic() - begin - before
        print(f"undisturbed: {before:.1f} s to the first file, {work:.1f} s of work", flush=True)
        for number in range(1, args.kills + 1):
            process, begin = start([*command, str(killed)]), time.monotonic()
            if number % 3:
                seconds_to_next_file(killed, process)
                time.sleep(rng.uniform(0, 2 * work / args.kills))
            else:
                time.sleep(rng.uniform(0, before))
            if process.poll() is not None:
                sys.exit(f"the run ended before kill {number}: it needs more texts")
            process.kill()
            process.wait()
            seconds = time.monotonic() - begin
            print(f"kill {number} after {seconds:.1f} s: {files(killed)} files", flush=True)
        if start([*command, str(killed)]).wait():
            sys.exit("the last run failed")
        check(whole, killed, args.texts, bad)


if __name__ == "__main__":
    main()
