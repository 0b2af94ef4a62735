"""Python as a tool, run by the sandbox of `rewards.sandbox`, and questions that are easily answered with it."""

from __future__ import annotations

import math
import random
import signal

from rewards import sandbox

TIMEOUT_S = 6.0


def run_python(code: str) -> str:
    """
    Run a Python program and return what it prints. Each run is a new one: nothing is kept from the last.

    Args:
        code: The program. Print what you want to know.

    Returns:
        What it printed, and the error that ended it if there was one.
    """
    sandbox.check_sandbox("auto")
    result = sandbox.run_python(code, timeout_s=TIMEOUT_S)
    output = result.output.rstrip()
    if result.timed_out:
        note = f"[ended after {TIMEOUT_S:g} seconds]"
    elif result.exit_code == -signal.SIGKILL:
        note = "[killed: it took too much time or memory]"
    elif result.exit_code != 0:
        note = f"[ended with exit code {result.exit_code}]"
    else:
        note = "" if output else "[it printed nothing]"
    return "\n".join(filter(None, (output, note)))


def questions(size: int = 500, seed: int = 0) -> list[dict[str, str]]:
    """Questions about whole numbers that take a loop to answer.

    Args:
        size: number of rows.
        seed: of the random numbers; the same seed makes the same rows.

    Returns:
        Rows with `prompt` and `ground_truth`.
    """
    numbers = random.Random(seed)
    return [_question(numbers) for _ in range(size)]


def _question(numbers: random.Random) -> dict[str, str]:
    n, m = numbers.randint(20, 400), numbers.randint(3, 40)
    prompt, answer = numbers.choice(
        [
            (f"What is the sum of all prime numbers below {n}?", sum(filter(_is_prime, range(n)))),
            (f"How many zeros does {n} factorial have in decimal notation?", str(math.factorial(n)).count("0")),
            (
                f"How many whole numbers from 1 to {n} have no common factor with {m} but 1?",
                sum(math.gcd(i, m) == 1 for i in range(1, n + 1)),
            ),
            (f"What is the sum of the decimal digits of {m} to the power of {n}?", sum(map(int, str(m**n)))),
        ]
    )
    return {"prompt": prompt, "ground_truth": str(answer)}


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % divisor for divisor in range(2, math.isqrt(n) + 1))
