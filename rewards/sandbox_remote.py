"""What a program's tests hold of the program's objects: remote controls.

Imported inside the sandbox by `rewards.sandbox_crossing`; standard library only.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any, Protocol


class Connection(Protocol):
    """What a remote control needs of the connection to the other side."""

    def ask(self, name: str, /, *args: Any, **keywords: Any) -> Any: ...


_PLAIN_KINDS: tuple[Any, ...] = (
    int,
    float,
    complex,
    str,
    bytes,
    bytearray,
    list,
    tuple,
    dict,
    set,
    frozenset,
    deque,
    Decimal,
)

_SHOWN = ("__name__", "__qualname__", "__doc__", "__enter__", "__exit__")

_BINARY = [
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "matmul",
    "and_",
    "or_",
    "xor",
    "lshift",
    "rshift",
]
_UNARY = ["neg", "pos", "abs", "invert"]
_ORDER = ["lt", "le", "gt", "ge"]


def plain(value: Any) -> Any:
    """The data in an instance of a subclass of `int`, `tuple`, `dict` and so on."""
    for kind in _PLAIN_KINDS:
        if isinstance(value, kind):
            return kind(value)
    raise TypeError(f"{type(value).__name__} is not data")


def call(function: Callable[..., Any], /, *args: Any, **keywords: Any) -> Any:
    if not callable(function):
        raise TypeError(f"{type(function).__name__} is not callable")
    return function(*args, **keywords)


def _run(coroutine: Any) -> Any:
    import asyncio  # takes as long to import as all the rest

    return asyncio.run(coroutine)


PROGRAM_OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": call,
    "plain": plain,
    "run": _run,
    **{
        name: getattr(operator, name)
        for name in [*_BINARY, *_UNARY, *_ORDER, "eq", "getitem", "setitem", "delitem"]
    },
    **{
        function.__name__: function
        for function in (getattr, setattr, delattr, iter, next, len, str, repr, format, bool, hash, isinstance)
    },
    **{kind.__name__: kind for kind in (int, float, complex)},
}
"""What the tests may ask of the program."""

TEST_OPERATIONS: dict[str, Callable[..., Any]] = {"call": call}
"""What the program may ask of the tests."""


class Remote:
    """What the other side has. Operators, calls and attributes are the other side's.

    What comes of arithmetic with the tests' data is `mixed`: in `abs(f(2) - 1.5) < 1e-9` the program hears 1.5,
    and must not answer with 0. Of such an object the tests can have its attributes that are data, and whether
    it is equal to another of the program's objects.
    """

    __slots__ = ("__weakref__", "_mixed", "_number", "_peer")

    def __init__(self, peer: Connection, number: int) -> None:
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_number", number)
        object.__setattr__(self, "_mixed", False)

    def __call__(self, /, *args: Any, **keywords: Any) -> Any:
        return self._ask("call", self, *args, **keywords)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in _SHOWN:
            # Libraries look for such names in order to be told what an object is: numpy for its memory's address.
            raise AttributeError(f"the {name} of what the program made cannot be had")
        value = self._peer.ask("getattr", self, name)
        return _marked(value) if self._mixed and isinstance(value, Remote) else value

    def __setattr__(self, name: str, value: object) -> None:
        self._ask("setattr", self, name, value)

    def __delattr__(self, name: str) -> None:
        self._ask("delattr", self, name)

    def __getitem__(self, key: object) -> Any:
        return self._ask("getitem", self, key)

    def __setitem__(self, key: object, value: object) -> None:
        self._ask("setitem", self, key, value)

    def __delitem__(self, key: object) -> None:
        self._ask("delitem", self, key)

    # There is no __contains__: `x in` what the program made compares here, with what iterating over it gives.
    def __iter__(self) -> Iterator[Any]:
        iterator = self._ask("iter", self)
        while True:
            try:
                value = self._peer.ask("next", iterator)
            except StopIteration:
                return
            yield value

    def __next__(self) -> Any:
        return self._ask("next", self)

    def __enter__(self) -> Any:
        return self.__getattr__("__enter__")()

    def __exit__(self, *_: object) -> None:
        # What it returns is not asked: the program must not swallow an assertion.
        self.__getattr__("__exit__")(None, None, None)

    def __len__(self) -> int:
        return self._ask("len", self)

    def __bool__(self) -> bool:
        return self._ask("bool", self)

    def __hash__(self) -> int:
        return self._ask("hash", self)

    def __str__(self) -> str:
        return self._ask("str", self)

    def __repr__(self) -> str:
        return self._ask("repr", self)

    def __format__(self, how: str) -> str:
        return self._ask("format", self, how)

    def __int__(self) -> int:
        return self._ask("int", self)

    def __float__(self) -> float:
        return self._ask("float", self)

    def __complex__(self) -> complex:
        return self._ask("complex", self)

    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(instance, Remote) and self._ask("isinstance", instance, self)

    def __eq__(self, other: object) -> Any:
        if isinstance(other, Remote):
            # Both are the program's, which could as well have made them the same number.
            return self._peer.ask("eq", self, other)
        data = self._data()
        return NotImplemented if data is None else data == other

    def _ask(self, name: str, /, *args: Any, **keywords: Any) -> Any:
        if self._mixed:
            raise TypeError("what comes of arithmetic between the program's object and data can only be compared")
        return self._peer.ask(name, *args, **keywords)

    def _data(self) -> Any:
        """The plain value of an instance of a subclass of a kind of data, else None."""
        if self._mixed:
            return None
        try:
            data = self._peer.ask("plain", self)
        except Exception:
            return None
        return None if isinstance(data, Remote) else data


def _marked(value: Any) -> Remote:
    if not isinstance(value, Remote):
        raise TypeError("arithmetic between the program's object and data must give an object of the program")
    object.__setattr__(value, "_mixed", True)
    return value


def _arithmetic(name: str, remote: Remote, left: object, right: object) -> Any:
    if isinstance(left, Remote) and isinstance(right, Remote):
        result = remote._peer.ask(name, left, right)
        return _marked(result) if left._mixed or right._mixed else result
    data = remote._data()
    if data is None:
        return _marked(remote._peer.ask(name, left, right))
    operate = getattr(operator, name)
    return operate(data, right) if left is remote else operate(left, data)


def _binary(name: str) -> Callable[[Remote, object], Any]:
    return lambda self, other: _arithmetic(name, self, self, other)


def _reflected(name: str) -> Callable[[Remote, object], Any]:
    return lambda self, other: _arithmetic(name, self, other, self)


def _unary(name: str) -> Callable[[Remote], Any]:
    def operate(self: Remote) -> Any:
        result = self._peer.ask(name, self)
        return _marked(result) if self._mixed else result

    return operate


def _order(name: str) -> Callable[[Remote, object], Any]:
    def compare(self: Remote, other: object) -> Any:
        if isinstance(other, Remote):
            return self._peer.ask(name, self, other)
        data = self._data()
        return NotImplemented if data is None else getattr(operator, name)(data, other)

    return compare


for _name in _BINARY:
    setattr(Remote, f"__{_name.strip('_')}__", _binary(_name))
    setattr(Remote, f"__r{_name.strip('_')}__", _reflected(_name))
for _name in _UNARY:
    setattr(Remote, f"__{_name}__", _unary(_name))
for _name in _ORDER:
    setattr(Remote, f"__{_name}__", _order(_name))
