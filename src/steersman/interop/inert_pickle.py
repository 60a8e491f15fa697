"""A pickle read as data: its opcodes build plain containers and records of what it names; nothing is imported
or called.

`pickle` runs whatever a stream names. Here the stream is taken apart by `pickletools` and interpreted over
None, numbers, text, bytes, tuples, lists and dicts with text or whole numbers as keys. A global is looked up
in a list of known names and becomes a mere word; a call of one (REDUCE, NEWOBJ) becomes a record of the word
and its arguments, and BUILD sets the record's state. What is on no list, or needs another opcode (extension
registry, sets, out-of-band buffers; persistent ids, unless the reader knows them), ends the reading.
"""

from __future__ import annotations

import pickletools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

MOST_BYTES = 64 << 20
"""The largest ranking published has 1.5 MB; 61 layers × 384 experts would have about 6."""
MOST_STEPS = 1_000_000

_MARK = object()


class HostilePickle(ValueError):
    """A pickle that names or does what no table needs."""


@dataclass(frozen=True)
class Word:
    """A global that a pickle names, by the word it has in the list of known ones."""

    word: str


@dataclass
class Record:
    """What a pickle wants called: the word, the arguments, and the state that is set afterwards, unread."""

    word: str
    arguments: tuple[Any, ...]
    state: Any = None
    built: bool = field(default=False)


PERSISTENT = "persistent"
"""The word of a persistent id's record: what the stream calls a thing that is kept beside it."""


def read_inert(
    content: bytes,
    known: Mapping[tuple[str, str], str],
    *,
    persistent: bool = False,
    what: str = "table of numbers",
) -> Any:
    """What a pickle holds, as plain data, `Word`s and `Record`s.

    Args:
        content: The pickle, any protocol from 0 to 5.
        known: (module, name) of each global that may occur → the word for it.
        persistent: Whether persistent ids may occur: as records of the word `PERSISTENT`.
        what: What is looked for, for messages.

    Raises:
        HostilePickle: it names another global, or has an opcode that plain data never needs.
        ValueError: it is damaged: cut off, or its stack does not work out.
    """
    if len(content) > MOST_BYTES:
        raise ValueError(f"it is larger than {MOST_BYTES >> 20} MiB")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # at escapes in text of Python 2, refused below
        return _Machine(known, persistent, what).run(content)


class _Machine:
    """The stack and the memo of one reading."""

    def __init__(self, known: Mapping[tuple[str, str], str], persistent: bool, what: str) -> None:
        self._known = known
        self._persistent = persistent
        self._what = what
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, content: bytes) -> Any:
        for step, (opcode, argument, _) in enumerate(pickletools.genops(content)):
            if step >= MOST_STEPS:
                raise ValueError(f"it has more than {MOST_STEPS} steps")
            if opcode.name == "STOP":
                value = self._pop()
                if self._stack:
                    raise ValueError("its stack is not empty at the end")
                return value
            act = _ACTS.get(opcode.name)
            if act is None or (opcode.name == "BINPERSID" and not self._persistent):
                raise HostilePickle(f"it has the opcode {opcode.name}, which no {self._what} needs")
            act(self, argument)
        raise ValueError("it has no end")  # genops itself raises before

    # ------------------------------------------------------------ the stack

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise ValueError("it takes more from its stack than there is")
        return self._stack.pop()

    def _top(self) -> Any:
        value = self._pop()
        self._stack.append(value)
        return value

    def _since_mark(self) -> list[Any]:
        for place in range(len(self._stack) - 1, -1, -1):
            if self._stack[place] is _MARK:
                items = self._stack[place + 1 :]
                del self._stack[place:]
                return items
        raise ValueError("it has no mark where it needs one")

    def mark(self, _: Any) -> None:
        self._stack.append(_MARK)

    def drop(self, _: Any) -> None:
        if self._stack and self._stack[-1] is _MARK:
            self._stack.pop()
        else:
            self._pop()

    def drop_to_mark(self, _: Any) -> None:
        self._since_mark()

    # ------------------------------------------------------------ the memo

    def memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._top()

    def put(self, place: int) -> None:
        self._memo[place] = self._top()

    def get(self, place: int) -> None:
        if place not in self._memo:
            raise ValueError("it recalls what it never kept")
        self.push(self._memo[place])

    # ------------------------------------------------------------ containers

    def take_tuple(self, size: int | None) -> None:
        if size is None:
            self.push(tuple(self._since_mark()))
            return
        items = [self._pop() for _ in range(size)]
        self.push(tuple(reversed(items)))

    def take_list(self, _: Any) -> None:
        self.push(self._since_mark())

    def take_dict(self, _: Any) -> None:
        items = self._since_mark()
        self.push({})
        self._set(items)

    def append(self, _: Any) -> None:
        self._extend([self._pop()])

    def appends(self, _: Any) -> None:
        self._extend(self._since_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, list):
            raise HostilePickle("it appends to what is not a plain list")
        target.extend(items)

    def set_item(self, _: Any) -> None:
        value, key = self._pop(), self._pop()
        self._set([key, value])

    def set_items(self, _: Any) -> None:
        self._set(self._since_mark())

    def _set(self, items: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, dict):
            raise HostilePickle("it sets items of what is not a plain dictionary")
        if len(items) % 2:
            raise ValueError("it has a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Nothing nested: hashing what a stream has nested deep enough would overflow the stack of C.
            if type(key) not in (str, int):
                raise HostilePickle("it has a dictionary whose keys are neither text nor whole numbers")
            target[key] = value

    # ------------------------------------------------------------ what it names and would call

    def name(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._name(module, name)

    def name_from_stack(self, _: Any) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise HostilePickle("it names a global by what is not text")
        self._name(module, name)

    def _name(self, module: str, name: str) -> None:
        word = self._known.get((module, name))
        if word is None:
            raise HostilePickle(f"it names {_short(f'{module}.{name}')}, which no {self._what} needs")
        self.push(Word(word))

    def call(self, _: Any) -> None:
        arguments, called = self._pop(), self._pop()
        if not isinstance(called, Word) or not isinstance(arguments, tuple):
            raise HostilePickle("it calls what is not a known global")
        self.push(Record(called.word, arguments))

    def refer(self, _: Any) -> None:
        self.push(Record(PERSISTENT, (self._pop(),)))

    def build(self, _: Any) -> None:
        state, target = self._pop(), self._top()
        if not isinstance(target, Record) or target.built:
            raise HostilePickle("it sets the state of what has none, or twice")
        target.state, target.built = state, True


def _short(text: str) -> str:
    """A name from a file for a message: escaped, and not long."""
    shown = repr(text[:80])[1:-1]
    return shown if len(text) <= 80 else f"{shown}…"


def _constant(value: Any) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.push(value)


def _new(kind: type) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.push(kind())


def _tuple_of(size: int | None) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.take_tuple(size)


def _argument(machine: _Machine, argument: Any) -> None:
    machine.push(bytes(argument) if isinstance(argument, bytearray) else argument)


_ACTS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    "NONE": _constant(None),
    "NEWTRUE": _constant(True),
    "NEWFALSE": _constant(False),
    **dict.fromkeys(
        [
            *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
            *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
            *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
        ],
        _argument,
    ),
    "EMPTY_TUPLE": _constant(()),
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "TUPLE": _tuple_of(None),
    "EMPTY_LIST": _new(list),
    "LIST": _Machine.take_list,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "EMPTY_DICT": _new(dict),
    "DICT": _Machine.take_dict,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "MARK": _Machine.mark,
    "POP": _Machine.drop,
    "POP_MARK": _Machine.drop_to_mark,
    "PUT": _Machine.put,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.memoize,
    "GET": _Machine.get,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": _Machine.name_from_stack,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.refer,
}
