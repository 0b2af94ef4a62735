"""What a program and its tests, in two processes, can tell each other."""

import textwrap

import pytest

from rewards.sandbox import run_tests

PROGRAM = """
import collections, dataclasses, datetime, decimal, enum, fractions, math, asyncio, functools
import numpy as np

class NoFunds(Exception): pass
class NoFundsAtAll(NoFunds): pass
class Color(enum.Enum):
    RED = 1
@dataclasses.dataclass
class Point:
    x: int
    y: int = 0
    def __add__(self, other): return Point(self.x + other.x, self.y + other.y)
    def __mul__(self, factor): return Point(self.x * factor, self.y * factor)
    __rmul__ = __mul__
    def __matmul__(self, other): return self.x * other.x + self.y * other.y
    def __abs__(self): return (self.x ** 2 + self.y ** 2) ** 0.5
class Stack:
    limit = 3
    def __init__(self): self.items = []
    def push(self, item):
        if len(self.items) == self.limit: raise OverflowError("full", self.limit)
        self.items.append(item)
    def pop(self): return self.items.pop()
    def __len__(self): return len(self.items)
    def __iter__(self): return iter(self.items)
    def __getitem__(self, n): return self.items[n]
    def __setitem__(self, n, value): self.items[n] = value
    def __enter__(self): return self
    def __exit__(self, *_): self.items.clear(); return True
    @property
    def top(self): return self.items[-1]
Pair = collections.namedtuple("Pair", "a b")
count = 0
def increase():
    global count
    count += 1
def same(x): return x
def sort_in_place(items, reverse=False): items.sort(reverse=reverse)
def rotate(matrix): matrix[:] = [list(row) for row in zip(*matrix[::-1])]
def apply(f, *args): return f(*args)
def compose(f, g): return lambda x: f(g(x))
def squares(n):
    for i in range(n): yield i * i
def withdraw(n):
    if n > 100: raise NoFundsAtAll("none at all")
    raise NoFunds(f"cannot withdraw {n}")
def words(text): return collections.Counter(text.split())
def groups(items):
    found = collections.defaultdict(list)
    for item in items: found[len(item)].append(item)
    return found
def pair(a, b): return Pair(a, b)
def color(): return Color.RED
def mean(items): return np.mean(items)
def doubled(array): return array * 2
async def later(x):
    await asyncio.sleep(0)
    return x
def hello(): print("hello")
@functools.lru_cache
def fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)
"""

TESTS = """
import asyncio, contextlib, io
from collections import Counter
from datetime import date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
import numpy

for value in (None, True, 3, -(10 ** 5000), 1.5, -0.0, float("inf"), "tést \\ud800", b"\\0x", 2j, [1, [2, (3,)]],
              {1: "a", (2, 3): {"b"}}, frozenset({1}), range(3), Decimal("1.10"), Fraction(1, 3),
              date(2024, 2, 29), datetime(2024, 1, 1, 12), timedelta(1, 2), int, ValueError, slice(1, 2), ...):
    assert value is ... or (same(value) == value and type(same(value)) is type(value)), value
assert str(same(-0.0)) == "-0.0" and same(float("nan")) != same(float("nan"))

items, matrix = [3, 1, 2], [[1, 2], [3, 4]]
alias = items
assert sort_in_place(items) is None and items == [1, 2, 3] and alias is items
sort_in_place(items, reverse=True)
assert items == [3, 2, 1]
rotate(matrix)
assert matrix == [[3, 1], [4, 2]]

assert apply(lambda a, b: a + b, 1, 2) == 3 and apply(sum, [1, 2]) == 3 and apply(same, 5) == 5
assert compose(lambda x: x + 1, lambda x: x * 2)(5) == 11
assert list(map(same, [1, 2])) == [1, 2] and sorted([3, 1], key=same) == [1, 3]
assert list(squares(4)) == [0, 1, 4, 9] and next(squares(1)) == 0 and 4 in squares(3) and set(squares(2)) == {0, 1}
assert sum(squares(4)) == 14 and list(same(iter([1, 2]))) == [1, 2] and list(same(n for n in range(2))) == [0, 1]

stack = Stack()
stack.push(1); stack.push("b")
assert len(stack) == 2 and stack.top == "b" and stack.items == [1, "b"] and list(stack) == [1, "b"] and stack
assert stack[0] == 1 and stack[0:1] == [1] and 1 in stack and 7 not in stack and stack.pop() == "b"
stack[0], stack.limit = 5, 2
assert stack.items == [5] and Stack.limit == 3 and isinstance(stack, Stack) and not isinstance(3, Stack)
stack.push(6)
try:
    stack.push(7)
    raise AssertionError("not full")
except OverflowError as error:
    assert error.args == ("full", 2)
with Stack() as other:
    other.push(1)
assert len(other) == 0 and stack is not other and stack != other
assert Point(1, 2) + Point(3) == Point(4, 2) and Point(1, 2).x == 1 and repr(Point(1)) == "Point(x=1, y=0)"
assert 2 * Point(1, 2) * 2 == Point(4, 8) and (Point(1, 2) * 3).y == 6
assert Point(1, 2) @ Point(3, 4) == 11 and abs(Point(3, 4)) == 5 and pair(1, 2) + (3,) == (1, 2, 3)
assert pair(1, 2) == (1, 2) and pair(1, 2).b == 2 and color() is Color.RED and color().value == 1
increase(); increase()
assert count == 2

for amount, kind, text in ((5, NoFunds, "cannot withdraw 5"), (500, NoFunds, "none at all")):
    try:
        withdraw(amount)
        raise AssertionError("no error")
    except kind as error:
        assert str(error) == text
try:
    same()
except TypeError as error:
    assert "missing" in str(error)
try:
    apply(lambda: 1 / 0)
except ZeroDivisionError:
    pass

assert words("a b a") == {"a": 2, "b": 1} and isinstance(words("a"), Counter)
assert words("a a").most_common() == [("a", 2)]
assert groups(["a", "bb"]) == {1: ["a"], 2: ["bb"]} and isinstance(groups([]), dict)
assert math.isclose(mean([1, 2]), 1.5) and type(mean([1, 2])) is float
assert numpy.array_equal(doubled(numpy.array([1, 2])), [2, 4])
assert asyncio.run(later(3)) == 3
printed = io.StringIO()
with contextlib.redirect_stdout(printed):
    hello()
assert printed.getvalue() == "hello\\n"
assert fib(30) == 832040 and fib.__name__ == "fib"

def check(candidate):
    assert candidate(4) == 4
check(same)
"""


def test_what_right_programs_and_their_tests_do_works():
    result = run_tests(PROGRAM, [TESTS], memory_mb=1024)
    assert result.passed, result.output


ALWAYS = """
class Yes:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __eq__
    def __hash__(self): return 3
    def __bool__(self): return True
    def __sub__(self, other): return self
    __rsub__ = __add__ = __radd__ = __sub__
    def __abs__(self): return self
    def __len__(self): return 0
    def __iter__(self): return iter([Yes()])
    def __float__(self): return 0.0
    def __getattr__(self, name): return self
    def __call__(self, *args, **kwargs): return self
    def __exit__(self, *_): return True
    def __enter__(self): return self
class Zero(Yes):
    __sub__ = __rsub__ = __abs__ = __mod__ = __truediv__ = __rtruediv__ = __mul__ = lambda *_: 0.0
class AfterAll(Yes):
    __sub__ = __rsub__ = lambda *_: Zero()
    def __getattr__(self, name): return lambda *_: 0.0
def zero(a, b): return Zero()
def after(a, b): return AfterAll()
def skip(a, b):
    import unittest
    raise unittest.SkipTest
def stop(a, b): raise StopIteration
def add(a, b): return Yes()
def in_list(a, b): return [Yes()]
def in_dict(a, b): return {"sum": Yes()}
def made(a, b): return lambda *_: Yes()
class AnInt(int):
    def __new__(cls, a, b): return int.__new__(cls, 4)
    def __eq__(self, other): return True
    def __sub__(self, other): return 0
class AList(list):
    def __eq__(self, other): return True
len = abs = all = sorted = lambda *_: 3
import math
math.isclose = lambda *_, **__: True
"""

ASSERTIONS = """
add(1, 2) == 3
3 == add(1, 2)
[add(1, 2)] == [3]
in_list(1, 2)[0] == 3
in_list(1, 2) == [3]
3 in in_list(1, 2)
in_dict(1, 2) == {"sum": 3}
not add(1, 2) != 3
abs(add(1, 2) - 3) < 1e-6
2 < add(1, 2) < 4
3 in add(1, 2)
add(1, 2) in (3, 4)
math.isclose(add(1, 2), 3)
numpy.allclose(add(1, 2), [3, 4])
add(1, 2).sum == 3
made(1, 2)() == 3
AnInt(1, 2) == 3
AList([1, 2]) == [2, 1]
all([AnInt(1, 2) == 3])
abs(zero(1, 2) - 3) < 1e-6
abs(3 - zero(1, 2)) < 1e-6
zero(1, 2) % 3 == 0
0.9 < zero(1, 2) / 3 + 1 < 1.1
abs(after(1, 2) - 3) < 1e-6
float(after(1, 2) - 3) < 1e-6
(after(1, 2) - 3).max() < 1e-6
numpy.abs(after(1, 2) - numpy.array([3, 3])).max() < 1e-6
str(after(1, 2) - 3) == ""
not len(after(1, 2) - 3)
[got == want for got, want in zip(map(stop, [1], [2]), [3])] == []
unittest.TextTestRunner(io.StringIO()).run(unittest.FunctionTestCase(lambda: skip(1, 2))).wasSuccessful()
add(1, 2) is True
isinstance(add(1, 2), int)
len([1]) == 3
"""


def test_no_object_is_equal_to_everything():
    tests = f"""
import io, unittest
import numpy
for assertion in {ASSERTIONS.strip().split(chr(10))}:
    try:
        passed = eval(assertion)
    except Exception:
        passed = False
    if passed:
        print("passed:", assertion)
with add(1, 2) as total:
    try:
        assert total == 3
    except AssertionError:
        print("not swallowed")
"""
    result = run_tests(ALWAYS, [tests])
    assert (result.finished, result.output) == (True, "not swallowed\n")


@pytest.mark.parametrize(
    ("program", "tests"),
    [
        ("all = lambda *_: True\ndef add(a, b): return 0", "assert all([add(1, 2) == 3])"),
        (
            "import builtins\nbuiltins.AssertionError = None\ndef add(a, b): return 0",
            "assert add(1, 2) == 3",
        ),
        ("import sys\nsys.exit(0)", "assert add(1, 2) == 3"),
        ("import os\ndef add(a, b): os._exit(0)", "try:\n    add(1, 2)\nexcept BaseException:\n    pass"),
        ("def add(a, b): raise SystemExit(0)", "assert add(1, 2) == 3"),
    ],
)
def test_a_program_that_is_wrong_does_not_pass(program, tests):
    assert not run_tests(program, [tests]).passed


KNOWING = """
import gc
from rewards import sandbox_crossing
def find_peer():
    return next(o for o in gc.get_objects() if isinstance(o, sandbox_crossing.Peer))
"""
"""How a program gets hold of the connection, on which it can say what it likes."""


MESSAGES = [
    ["type", "eval"],
    ["type", "__import__"],
    ["yours", 0],
    ["exception", 1, "__main__", "E", ["type", "int"]],
    ["ndarray", "|O", [1], "00" * 8],
    ["no such kind", 1],
    ["list", [["mine", 3]]],
    {"a": 1},
    [],
    ["int", "3"],
]


def test_messages_of_the_programs_own_making_are_data_at_most():
    program = f"""
{KNOWING}
def add(n):
    peer = find_peer()
    def once(message):
        del peer._send
        peer._send(["value", {MESSAGES}[n], [], ""])
    peer._send = once
"""
    tests = f"""
for n in range({len(MESSAGES)}):
    try:
        print(add(n))
    except Exception as error:
        print(type(error).__name__)
"""
    result = run_tests(program, [tests])
    assert result.passed, result.output
    assert result.output.split() == ["ValueError"] * 2 + ["IndexError"] + ["ValueError"] * 3 + [
        "IndexError",
        "ValueError",
        "ValueError",
        "3",
    ]


def test_a_program_can_only_call_what_the_tests_gave_it():
    program = KNOWING + textwrap.dedent(
        """
        def apply(f):
            peer = find_peer()
            tried = []
            for attempt in (
                lambda: f.__globals__,
                lambda: peer.ask("getattr", f, "__globals__"),
                lambda: peer.ask("call", type, "E", (), {"__eq__": bool, "__call__": bool}),
                lambda: peer.ask("global", "expected"),
            ):
                try:
                    tried.append(attempt())
                except Exception as error:
                    tried.append(None)
            return [f(1), *tried]
        """
    )
    result = run_tests(program, ["expected = 2", "assert apply(lambda x: x + 1) == [2, None, None, None, None]"])
    assert result.passed, result.output


@pytest.mark.parametrize("program", ["def f(): return f", "x = []\nx.append(x)\ndef f(): return x"])
def test_what_has_no_end_ends(program):
    assert not run_tests(program, ["assert f() == 3"]).passed


def test_the_only_name_that_tests_use_may_be_that_of_a_builtin():
    program = "def sum(a, b):\n    return a * b"
    assert run_tests(program, ["assert sum(2, 5) == 10"]).passed
