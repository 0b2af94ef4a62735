"""Carries values and calls between a program that a model wrote and its tests, which run in two processes.

Imported inside both; standard library only. Numbers, text, containers and the like cross as JSON and are made
anew on the other side, so that what the tests compare is their own. Everything else that the program has
(functions, classes, instances) stays where it is: the tests hold a `Remote`, and what they do with it is done
by the program, which answers with data or with another `Remote`. A `Remote` is never equal to data unless its
plain value is, and that comparison happens here.

The program can call functions that the tests gave it, and do nothing else with what is theirs.
"""

from __future__ import annotations

import builtins
import io
import json
import os
import sys
import threading
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from contextlib import nullcontext, redirect_stdout
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
from types import CoroutineType
from typing import Any

from rewards.sandbox_remote import PROGRAM_OPERATIONS, TEST_OPERATIONS, Remote

__all__ = ["PROGRAM_OPERATIONS", "TEST_OPERATIONS", "Peer"]

_SEQUENCES = {kind.__name__: kind for kind in (list, tuple, set, frozenset, deque)}
_MAPPINGS = {kind.__name__: kind for kind in (dict, OrderedDict, Counter)}
_MUTABLE = (list, dict, set, bytearray, deque, OrderedDict, Counter, defaultdict)
_AS_TEXT: dict[type, tuple[Callable[[Any], str], Callable[[str], Any]]] = {
    bytes: (bytes.hex, bytes.fromhex),
    bytearray: (bytearray.hex, bytearray.fromhex),
    complex: (repr, complex),
    Decimal: (str, Decimal),
    Fraction: (str, Fraction),
    date: (date.isoformat, date.fromisoformat),
    datetime: (datetime.isoformat, datetime.fromisoformat),
    time: (time.isoformat, time.fromisoformat),
}
_FROM_TEXT = {kind.__name__: read for kind, (_, read) in _AS_TEXT.items()}


class Peer:
    """One end of the connection between a program and its tests."""

    def __init__(
        self, connection: int, operations: Mapping[str, Callable[..., Any]], *, lends_everything: bool
    ) -> None:
        """Take one end.

        Args:
            connection: descriptor of a stream socket.
            operations: what the other side may ask for.
            lends_everything: let the other side hold any object. If False, only what can be called.
        """
        self._reader = os.fdopen(connection, "rb")
        self._writer = os.fdopen(os.dup(connection), "wb")
        self._operations = operations
        self._lends_everything = lends_everything
        self._lock = threading.RLock()
        self._stdout = sys.stdout
        self._lent: list[object] = []
        self._numbers: dict[int, int] = {}  # by id() of what is lent
        self._borrowed: dict[int, Any] = {}  # by the other side's number
        self._stand_ins: dict[int, int] = {}  # by id() of a class that stands for an exception of the other side

    def ask(self, name: str, /, *args: Any, **keywords: Any) -> Any:
        """Have the other side do something, answering what it asks meanwhile.

        Raises:
            BaseException: what it raised there.
        """
        with self._lock:
            request = [self.encode(arg) for arg in args], {key: self.encode(arg) for key, arg in keywords.items()}
            # Tests may replace sys.stdout to see what a call prints.
            self._send(["ask", name, *request, sys.stdout is not self._stdout])
            while (reply := self._receive())[0] == "ask":
                self._answer(reply)
            kind, value, changes, printed = reply
            if printed:
                sys.stdout.write(printed)
            for arg, change in zip([*args, *keywords.values()], changes, strict=False):
                if change is not None:
                    _overwrite(arg, self.decode(change))
            result = self.decode(value)
        if kind == "value":
            return result
        error = _exception(*result)
        if name != "next" and isinstance(error, StopIteration | StopAsyncIteration | GeneratorExit):
            # It would end the loop of the tests that the call stands in, and what it was to check.
            error = RuntimeError(f"the program raised {type(error).__name__}")
        raise error from None

    def serve(self) -> None:
        """Answer until the other side ends; then end this process."""
        while True:
            self._answer(self._receive())

    def encode(self, value: Any) -> Any:
        """What stands for a value in JSON.

        Raises:
            TypeError: it is neither data nor something that may be lent.
        """
        kind: Any = type(value)
        if value is None or kind in (bool, str, float):
            return value
        if kind is int:
            return value if abs(value) < 2**63 else ["int", hex(value)]
        if kind.__name__ in _SEQUENCES and kind is _SEQUENCES[kind.__name__]:
            return [kind.__name__, [self.encode(item) for item in value]]
        if kind in (dict, OrderedDict, Counter, defaultdict):
            name = "dict" if kind is defaultdict else kind.__name__
            return [name, [[self.encode(key), self.encode(item)] for key, item in value.items()]]
        if kind in _AS_TEXT:
            return [kind.__name__, _AS_TEXT[kind][0](value)]
        if kind in (range, slice):
            return [kind.__name__, [self.encode(part) for part in (value.start, value.stop, value.step)]]
        if kind is timedelta:
            return ["timedelta", value.days, value.seconds, value.microseconds]
        if kind is Remote:
            return ["yours", value._number]
        if id(value) in self._stand_ins:
            return ["yours", self._stand_ins[id(value)]]
        numpy: Any = sys.modules.get("numpy")
        if numpy is not None and isinstance(value, numpy.generic):
            return self.encode(value.item())
        if numpy is not None and kind is numpy.ndarray and value.dtype.kind in "biufcSU":
            return ["ndarray", value.dtype.str, list(value.shape), value.tobytes().hex()]
        return (self._encode_type(value) if isinstance(value, type) else None) or self._encode_lent(value)

    def _encode_type(self, value: type) -> Any:
        if vars(builtins).get(value.__name__) is value:
            return ["type", value.__name__]
        if issubclass(value, BaseException):
            base = next(base for base in value.__bases__ if issubclass(base, BaseException))
            return ["exception", self._lend(value), value.__module__, value.__name__, self.encode(base)]
        return None

    def _encode_lent(self, value: Any) -> Any:
        if self._lends_everything:
            return ["coroutine" if isinstance(value, CoroutineType) else "mine", self._lend(value)]
        if hasattr(value, "__next__"):
            return ["iterator", [self.encode(item) for item in value]]
        if callable(value):
            return ["mine", self._lend(value)]
        raise TypeError(f"tests cannot hand a {type(value).__name__} to the program")

    def decode(self, message: Any) -> Any:
        """The value that a message stands for.

        Raises:
            Exception: the message makes no sense. Its sender may mean harm: nothing here runs code of its choice.
        """
        if message is None or isinstance(message, bool | int | float | str):
            return message
        name, first, *rest = message
        if name in _SEQUENCES:
            return _SEQUENCES[name](self.decode(item) for item in first)
        if name in _MAPPINGS:
            return _MAPPINGS[name]({self.decode(key): self.decode(item) for key, item in first})
        if name in _FROM_TEXT:
            return _FROM_TEXT[name](first)
        match name:
            case "int":
                return int(first, 16)
            case "range" | "slice":
                return (range if name == "range" else slice)(*map(self.decode, first))
            case "timedelta":
                return timedelta(first, *rest)
            case "iterator":
                return iter([self.decode(item) for item in first])
            case "ndarray":
                return _array(first, *rest)
            case "type":
                return _builtin_type(first)
            case "exception":
                return self._stand_in(first, *rest)
            case "yours":
                return self._lent[first]
            case "mine":
                return self._borrowed.setdefault(first, Remote(self, first))
            case "coroutine":
                return self._run(Remote(self, first))
        raise ValueError(f"there is no {name!r} to decode")

    async def _run(self, coroutine: Remote) -> Any:
        return self.ask("run", coroutine)

    def _stand_in(self, number: int, module: str, name: str, base: Any) -> Any:
        """The same exception of a module that is imported here, or else a class like the other side's."""
        # Not those that make a test runner skip a test.
        foreign = module == "__main__" or module.split(".")[0] in ("unittest", "pytest", "_pytest")
        known = None if foreign else getattr(sys.modules.get(module), name, None)
        if isinstance(known, type) and issubclass(known, BaseException):
            return known
        if number not in self._borrowed:
            parent = self.decode(base)
            if not (isinstance(parent, type) and issubclass(parent, BaseException)):
                raise ValueError(f"{name} is no exception")
            self._borrowed[number] = made = type(name, (parent,), {"__module__": module})
            self._stand_ins[id(made)] = number
        return self._borrowed[number]

    def _lend(self, value: object) -> int:
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._lent)
            self._lent.append(value)
        return self._numbers[id(value)]

    def _answer(self, message: Any) -> None:
        _, name, encoded, encoded_keywords, capture = message
        printed = io.StringIO()
        try:
            if not self._lends_everything and encoded[0][0] != "yours":
                # A built-in type, say: `type` would make a class whose instances are equal to everything.
                raise TypeError("a program can call what the tests gave it, nothing else")
            args = [self.decode(arg) for arg in encoded]
            keywords = {key: self.decode(arg) for key, arg in encoded_keywords.items()}
            with redirect_stdout(printed) if capture else nullcontext():
                value = self.encode(self._operations[name](*args, **keywords))
            pairs = zip([*args, *keywords.values()], [*encoded, *encoded_keywords.values()], strict=True)
            changes = [self._change(arg, before) for arg, before in pairs]
            reply = ["value", value, changes, printed.getvalue()]
        except BaseException as error:  # whatever it is, it is the other side's to handle
            reply = ["error", self._encode_error(error), [], printed.getvalue()]
        self._send(reply)

    def _change(self, arg: Any, before: Any) -> Any:
        """What an argument is now, if it is something that the other side can change its own to."""
        if type(arg) not in _MUTABLE or (after := self.encode(arg)) == before:
            return None
        return after

    def _encode_error(self, error: BaseException) -> Any:
        kind = self.encode(type(error))
        try:
            return ["tuple", [kind, self.encode(error.args)]]
        except Exception:
            return ["tuple", [kind, ["tuple", [str(error)]]]]

    def _send(self, message: Any) -> None:
        try:
            self._writer.write(json.dumps(message).encode() + b"\n")
            self._writer.flush()
        except (BrokenPipeError, ConnectionResetError):
            self._end()

    def _receive(self) -> Any:
        try:
            line = self._reader.readline()
        except ConnectionResetError:
            line = b""
        if not line:
            self._end()
        return json.loads(line)

    def _end(self) -> None:
        """The other side is gone. Not an exception: tests that expect one must not take this for it."""
        sys.stdout.flush()
        if not self._lends_everything:
            os.write(2, b"the program ended before its tests\n")
        os._exit(1)


def _overwrite(value: Any, new: Any) -> None:
    """Give a container of ours the contents that the other side's copy of it has now."""
    if isinstance(value, list | bytearray):
        value[:] = new
    elif isinstance(value, dict | set):
        value.clear()
        value.update(new)
    elif isinstance(value, deque):
        value.clear()
        value.extend(new)


def _exception(kind: Any, args: tuple[Any, ...]) -> BaseException:
    if not (isinstance(kind, type) and issubclass(kind, BaseException)):
        return RuntimeError("the other process raised something that is no exception")
    try:
        return kind(*args)
    except Exception:
        error = kind.__new__(kind)
        error.args = args
        return error


def _builtin_type(name: str) -> Any:
    kind = vars(builtins).get(name)
    if not isinstance(kind, type):
        raise ValueError(f"{name!r} is no type")
    return kind


def _array(dtype: str, shape: list[int], data: str) -> Any:
    import numpy

    kind = numpy.dtype(dtype)
    if kind.kind not in "biufcSU":
        raise ValueError(f"an array of {dtype}")
    return numpy.frombuffer(bytes.fromhex(data), kind).reshape(shape).copy()
