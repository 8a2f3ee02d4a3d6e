"""Kills `variator encode` at random times and compares its output with an undisturbed run's.

    python launch/encode_kills.py --backbone runs/quickstart/finetuned
    python launch/encode_kills.py --backbone DIR --texts 400 --kills 3 --pooling none

Writes texts of random words and lengths with a few bad rows among them, encodes them once, then
again into another folder with SIGKILL after random times, spread over the time of the first run.
The two folders must hold the same files, byte for byte, and each line of the input once.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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


def first_file(folder: Path, process: subprocess.Popen) -> float:
    """Seconds until the run has written a file: imports, weights, and one window."""
    start = time.monotonic()
    while process.poll() is None and not list(folder.glob("*.safetensors")):
        time.sleep(0.05)
    return time.monotonic() - start


def run(command: list[str], seconds: float | None = None) -> bool:
    """Runs the command, for so many seconds at the most; returns whether it ended itself."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        error = process.communicate(timeout=seconds)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return False
    if process.returncode:
        sys.exit(error.decode()[-2000:])
    return True


def check(one: Path, other: Path, count: int, bad: list[int]) -> None:
    """Compares the folders, and looks for lines that are missing or there twice."""
    names = [sorted(file.name for file in folder.iterdir()) for folder in (one, other)]
    if names[0] != names[1]:
        sys.exit(f"different files: {set(names[0]) ^ set(names[1])}")
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--texts", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    args, further = parser.parse_known_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        bad = write_texts(folder / "texts.jsonl", args.texts, rng)
        base = [sys.executable, "-m", "variator_jax", "encode", "--backbone", args.backbone]
        base += ["--input", str(folder / "texts.jsonl"), "--window", str(args.window), *further]
        start, whole = time.monotonic(), [*base, "--output", str(folder / "whole")]
        process = subprocess.Popen(whole, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        before = first_file(folder / "whole", process)
        if process.wait():
            sys.exit(f"{' '.join(whole)} failed")
        work = time.monotonic() - start - before
        print(f"undisturbed: {before:.1f} s to the first file, {work:.1f} s of work", flush=True)
        killed = [*base, "--output", str(folder / "killed")]
        for number in range(1, args.kills + 1):
            # Some kills hit the start; the others leave work for those that follow.
            seconds = rng.uniform(0.5 * before, before + 2.2 * work / args.kills)
            if run(killed, seconds):
                print(f"ended before kill {number}: more texts are needed")
                break
            files = len(list((folder / "killed").glob("*.safetensors")))
            print(f"kill {number} after {seconds:.1f} s: {files} files", flush=True)
        run(killed)
        check(folder / "whole", folder / "killed", args.texts, bad)


if __name__ == "__main__":
    main()
