"""What a compiled program exchanges between devices, read from its text."""

from __future__ import annotations

import dataclasses
import math
import re

_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "s8": 8, "u8": 8, "bf16": 16, "f16": 16, "s32": 32, "u32": 32, "f32": 32}
_BITS |= {"s64": 64, "u64": 64, "f64": 64, "s16": 16, "u16": 16}
# `%name = TYPE kind(` or `kind-start(`; TYPE is one array, or a tuple of some with comments in it.
_LINE = re.compile(rf" = (?P<type>.+?) (?P<kind>{'|'.join(_KINDS)})(?P<start>-start)?\(")
_ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """All exchanges of one kind: how many, and the bytes that each device has of their results."""

    count: int
    bytes: int


def collectives(text: str) -> dict[str, Collective]:
    """The exchanges of an optimised module, by kind. Loops count once.

    An exchange that is started and awaited apart has a tuple of operands and results; the results
    alone are counted.
    """
    found: dict[str, Collective] = {}
    for match in _LINE.finditer(text):
        arrays = [_size(*array) for array in _ARRAY.findall(match["type"])]
        started = match["start"] and len(arrays) > 1 and match["kind"] != "all-reduce"
        size = sum(arrays[len(arrays) // 2 :] if started else arrays)
        before = found.get(match["kind"], Collective(0, 0))
        found[match["kind"]] = Collective(before.count + 1, before.bytes + size)
    return found


def _size(dtype: str, shape: str) -> int:
    return math.prod(int(n) for n in shape.split(",") if n) * _BITS.get(dtype, 32) // 8
