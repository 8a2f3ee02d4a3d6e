"""A pickle reader that can build data and nothing else.

Pickle is a small stack language whose dangerous words import names and call them. This reader
knows the harmless words only, never imports anything, and calls nothing but the functions that its
caller hands in by name. What torch's and numpy's pickles hold is `torch_pickle.py`'s business.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from typing import IO, Any

from variator_jax.errors import CheckpointError


class Buildable:
    """An object that a pickle may complete by its word BUILD."""

    def build(self, state: Any) -> None:
        """Takes the pickled state."""
        raise NotImplementedError


class Symbol:
    """An allowed name; `call` is what calling it does, None if it may only be an argument."""

    def __init__(self, name: str, call: Callable[..., Any] | None = None, value: Any = None):
        self.name, self.call, self.value = name, call, value


_LITERALS = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING "
    "BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 UNICODE SHORT_BINUNICODE BINUNICODE "
    "BINUNICODE8".split()
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], Any]] = {
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()
_MAX_ARGUMENTS = 32  # of a call; a tensor's have about seven


def read(
    stream: IO[bytes],
    symbols: Mapping[str, Symbol],
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """Reads one pickle of any protocol and leaves the stream behind it.

    Args:
      stream: the bytes; `read` must not reserve memory beyond what is there.
      symbols: 'module.name' -> what stands for it; every other name is refused.
      persistent: turns a persistent id into an object; None refuses them.

    Raises:
      CheckpointError: for a broken pickle, or one that asks for anything but data. Its text has no
        file name in it, for the reader does not know one.
    """
    machine = _Machine(symbols, persistent)
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name == "STOP":
                return machine.pop()
            machine.step(opcode.name, argument)
    except CheckpointError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, AttributeError) as error:
        raise CheckpointError(f"it is a broken pickle ({error})") from error
    except (RecursionError, MemoryError) as error:
        raise CheckpointError("it is a broken pickle (too deep or too large)") from error
    raise CheckpointError("it is a broken pickle (no end)")


class _Machine:
    """The stack and the memo of one pickle."""

    def __init__(
        self, symbols: Mapping[str, Symbol], persistent: Callable[[Any], Any] | None
    ) -> None:
        self._symbols, self._persistent = symbols, persistent
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def step(self, word: str, argument: Any) -> None:
        """Executes one word of the language."""
        stack = self._stack
        if word in _LITERALS:
            stack.append(argument)
        elif word in _CONSTANTS:
            stack.append(_CONSTANTS[word])
        elif word in _EMPTY:
            stack.append(_EMPTY[word]())
        elif word in _TUPLES:
            items = [self.pop() for _ in range(_TUPLES[word])]
            stack.append(tuple(reversed(items)))
        elif word in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif word in ("PUT", "BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self._top()
        elif word in ("PROTO", "FRAME"):
            pass
        else:
            self._structure(word, argument)

    def pop(self) -> Any:
        """Takes the top of the stack, which must not be a mark."""
        if self._stack[-1] is _MARK:
            raise ValueError("a mark where an object belongs")
        return self._stack.pop()

    def _top(self) -> Any:
        if self._stack[-1] is _MARK:
            raise ValueError("a mark where an object belongs")
        return self._stack[-1]

    def _to_mark(self) -> list[Any]:
        at = len(self._stack) - 1
        while self._stack[at] is not _MARK:  # runs into IndexError where there is none
            at -= 1
        items = self._stack[at + 1 :]
        del self._stack[at:]
        return items

    def _structure(self, word: str, argument: Any) -> None:
        stack = self._stack
        if word == "MARK":
            stack.append(_MARK)
        elif word == "POP":
            stack.pop()
        elif word == "POP_MARK":
            self._to_mark()
        elif word == "DUP":
            stack.append(self._top())
        elif word == "MEMOIZE":
            self._memo[len(self._memo)] = self._top()
        elif word == "TUPLE":
            stack.append(tuple(self._to_mark()))
        elif word == "LIST":
            stack.append(self._to_mark())
        elif word == "DICT":
            stack.append(_filled({}, self._to_mark()))
        elif word in ("APPEND", "APPENDS"):
            items = [self.pop()] if word == "APPEND" else self._to_mark()
            _of(list, self._top()).extend(items)
        elif word in ("SETITEM", "SETITEMS"):
            items = [self.pop(), self.pop()][::-1] if word == "SETITEM" else self._to_mark()
            _filled(_of(dict, self._top()), items)
        else:
            self._reference(word, argument)

    def _reference(self, word: str, argument: Any) -> None:
        """The words that name, call or complete something: here, only what the caller allows."""
        if word == "GLOBAL":
            self._stack.append(self._symbol(*argument.split(" ", 1)))
        elif word == "STACK_GLOBAL":
            name, module = self.pop(), self.pop()
            self._stack.append(self._symbol(_of(str, module), _of(str, name)))
        elif word == "REDUCE":
            arguments, symbol = self.pop(), self.pop()
            if not isinstance(symbol, Symbol) or symbol.call is None:
                raise CheckpointError(
                    "it calls something that is no tensor and no container; nothing was run"
                )
            if len(_of(tuple, arguments)) > _MAX_ARGUMENTS:  # copied by each call
                raise ValueError(f"a call with {len(arguments)} arguments")
            self._stack.append(symbol.call(*arguments))
        elif word == "BUILD":
            state, target = self.pop(), self._top()
            if isinstance(target, Buildable):
                target.build(state)
            elif not isinstance(target, dict):  # a dict's own attributes are of no use here
                raise CheckpointError(
                    f"it sets the attributes of a {type(target).__name__}; nothing was set"
                )
        elif word in ("PERSID", "BINPERSID") and self._persistent is not None:
            self._stack.append(self._persistent(argument if word == "PERSID" else self.pop()))
        else:
            raise CheckpointError(
                f"it uses the pickle instruction {word}, which tensors and containers do not need; "
                "nothing was run"
            )

    def _symbol(self, module: str, name: str) -> Symbol:
        full = f"{module}.{name}"
        if full not in self._symbols:
            raise CheckpointError(
                f"it refers to {full[:100]!r}, which is no tensor and no container; nothing was run"
            )
        return self._symbols[full]


def is_key(found: Any) -> bool:
    """Whether dictionaries may have this key: a text or a whole number of 64 bits.

    Larger numbers take time with each look at them, for their hash is not kept.
    """
    return isinstance(found, str) or (isinstance(found, int) and found.bit_length() <= 64)


def _of(kind: type, found: Any) -> Any:
    if not isinstance(found, kind):
        raise ValueError(f"a {type(found).__name__} where a {kind.__name__} belongs")
    return found


def _filled(target: dict, items: list[Any]) -> dict:
    """Puts key, value, key, value, ... into `target`."""
    if len(items) % 2:
        raise ValueError("a key without a value")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not is_key(key):
            raise ValueError(f"no proper key of a dictionary: a {type(key).__name__}")
        target[key] = value
    return target
