"""The collectives of a compiled program, and how often its loops run, from its text."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# `%name = TYPE kind(` or `kind-start(`; TYPE is one array, or a tuple of some with comments in it.
_LINE = re.compile(rf" = (?P<type>.+?) (?P<kind>{'|'.join(_KINDS)})(?P<start>-start)?\(")
_ARRAY = re.compile(r"(pred|[a-z]+(\d+))\[([\d,]*)\]")
# A module is a list of computations, `%name (parameters) -> type {` to `}`, callees first.
_COMPUTATION = re.compile(r"(?:ENTRY )?%(?P<name>[\w.-]+) .*\{$")
_CALLS = re.compile(r"\b(body|condition|calls|to_apply|\w+_computations?)=\{?((?:%[\w.-]+,? ?)+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Collective:
    """All of one kind: how many, and the bytes that each device has of their results."""

    count: int
    bytes: int


def collectives(text: str, trips: int = 1) -> dict[str, Collective]:
    """The collectives of an optimised module, by kind; those of a loop as often as it runs.

    A collective that is started and awaited apart has a tuple of operands and results; the results
    alone are counted.

    Args:
      text: the module's.
      trips: how often an outermost loop runs whose text does not have it (on TPUs none has).
    """
    runs, _ = _runs(text, trips)
    total: dict[str, Collective] = {}
    for computation, line in _lines(text):
        if match := _LINE.search(line):
            often = runs.get(computation, 1)
            before = total.get(match["kind"], Collective(0, 0))
            size = before.bytes + often * _result_bytes(match)
            total[match["kind"]] = Collective(before.count + often, size)
    return total


def loop_trips(text: str, trips: int) -> int:
    """How often the longest of the outermost loops runs; 1 where the compiler left none.

    Args:
      text: the module's.
      trips: of a loop whose text does not have it; a loop that runs more often is another one.
    """
    runs, bodies = _runs(text, trips)
    return max((runs[body] for body in bodies if runs[body] <= trips), default=1)


def _result_bytes(match: re.Match[str]) -> int:
    sizes = []
    for _, bits, shape in _ARRAY.findall(match["type"]):
        # A permutation may have two counters, u32[], behind operand and result.
        if not (match["kind"] == "collective-permute" and bits == "32" and not shape):
            elements = math.prod(int(n) for n in shape.split(",") if n)
            sizes.append(elements * int(bits or 8) // 8)
    if match["start"] and match["kind"] != "all-reduce" and len(sizes) > 1:
        sizes = sizes[len(sizes) // 2 :]
    return sum(sizes)


def _lines(text: str) -> Iterator[tuple[str, str]]:
    """Each line, after the name of its computation."""
    name = ""
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        name = header["name"] if header else name
        yield name, line


def _runs(text: str, trips: int) -> tuple[dict[str, int], set[str]]:
    """How often each computation runs that is called at all, and which are bodies of loops."""
    runs: dict[str, int] = {}
    bodies: set[str] = set()
    # Callers stand last, so theirs is known when it is needed.
    for caller, line in reversed(list(_lines(text))):
        around = runs.get(caller, 1)
        for how, callees in _CALLS.findall(line):
            names = re.findall(r"%([\w.-]+)", callees)
            times = 1
            if how == "body":
                bodies.update(names)
                known = _TRIPS.search(line)
                times = int(known[1]) if known else trips if around == 1 else 1
            for callee in names:
                runs[callee] = runs.get(callee, 0) + around * times
    return runs, bodies
