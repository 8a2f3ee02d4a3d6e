"""What a compiled program exchanges between devices, and how often its loops run, by its text."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "s8": 8, "u8": 8, "bf16": 16, "f16": 16, "s32": 32, "u32": 32, "f32": 32}
_BITS |= {"s64": 64, "u64": 64, "f64": 64, "s16": 16, "u16": 16}
# `%name = TYPE kind(` or `kind-start(`; TYPE is one array, or a tuple of some with comments in it.
_LINE = re.compile(rf" = (?P<type>.+?) (?P<kind>{'|'.join(_KINDS)})(?P<start>-start)?\(")
_ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")
# A module is a list of computations, `%name (parameters) -> type {` to `}`, callees first.
_COMPUTATION = re.compile(r"(?:ENTRY )?%(?P<name>[\w.-]+) .*\{$")
_CALLS = re.compile(r"\b(body|condition|calls|to_apply|\w+_computations?)=\{?((?:%[\w.-]+,? ?)+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Collective:
    """All exchanges of one kind: how many, and the bytes that each device has of their results."""

    count: int
    bytes: int


def collectives(text: str, trips: int = 1) -> dict[str, Collective]:
    """The exchanges of an optimised module, by kind; those of a loop as often as it runs.

    An exchange that is started and awaited apart has a tuple of operands and results; the results
    alone are counted.

    Args:
      text: the module's.
      trips: how often an outermost loop runs that does not say so itself (on TPUs none does).
    """
    runs = _runs(list(_calls(text)), trips)
    found: dict[str, Collective] = {}
    for computation, line in _lines(text):
        if match := _LINE.search(line):
            often, size = runs.get(computation, 1), _result_bytes(match)
            before = found.get(match["kind"], Collective(0, 0))
            found[match["kind"]] = Collective(before.count + often, before.bytes + often * size)
    return found


def loop_trips(text: str, trips: int) -> int:
    """How often the longest of the outermost loops runs; 1 where the compiler left none.

    Args:
      text: the module's.
      trips: of a loop that does not say so itself; a loop that runs more often is another one.
    """
    calls = list(_calls(text))
    runs = _runs(calls, trips)
    found = [runs[call.callee] for call in calls if call.how == "body"]
    return max((often for often in found if often <= trips), default=1)


def _result_bytes(match: re.Match[str]) -> int:
    arrays = _ARRAY.findall(match["type"])
    if match["start"] and match["kind"] != "all-reduce" and len(arrays) > 1:
        # A permutation may have two counters behind operand and result.
        arrays = arrays[:-2] if arrays[2:] and set(arrays[-2:]) == {("u32", "")} else arrays
        arrays = arrays[len(arrays) // 2 :]
    return sum(_size(*array) for array in arrays)


def _size(dtype: str, shape: str) -> int:
    return math.prod(int(n) for n in shape.split(",") if n) * _BITS.get(dtype, 32) // 8


def _lines(text: str) -> Iterator[tuple[str, str]]:
    """Each line, after the name of its computation."""
    name = ""
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        name = header["name"] if header else name
        yield name, line


class _Call(NamedTuple):
    caller: str
    callee: str
    how: str
    trips: int | None  # None for a loop that does not say how often it runs


def _calls(text: str) -> Iterator[_Call]:
    for caller, line in _lines(text):
        for how, callees in _CALLS.findall(line):
            known = _TRIPS.search(line)
            trips = 1 if how != "body" else int(known[1]) if known else None
            for callee in re.findall(r"%([\w.-]+)", callees):
                yield _Call(caller, callee, how, trips)


def _runs(calls: list[_Call], trips: int) -> dict[str, int]:
    """How often each computation runs that is called at all."""
    runs: dict[str, int] = {}
    for call in reversed(calls):  # Callers stand last, so theirs is known when it is needed.
        around = runs.get(call.caller, 1)
        unknown = trips if around == 1 else 1
        times = unknown if call.trips is None else call.trips
        runs[call.callee] = runs.get(call.callee, 0) + around * times
    return runs
