"""The half of `rewards.math_judge` that runs inside a child process. Started as a script; never import it.

It says "ready" once math-verify is imported, then answers each line of standard input, `[ground truth,
completion]`, with a line that holds `true` or `false`. It ends when standard input does, so it cannot
outlive the trainer by more than one question, and that one is limited in CPU time.
"""

import json
import logging
import os
import resource
import signal
import sys

_MEMORY_BYTES = 2 * 1024**3


def main() -> None:
    # A scheduler sends it to every process of a job; it is for the trainer.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # The answers get the real standard output for themselves: a library that prints must not be able to
    # spoil them.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    logging.disable()
    cpu_s = int(sys.argv[1])

    from math_verify import verify

    if sys.platform == "linux":
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        memory = _MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(_MEMORY_BYTES, hard)
        resource.setrlimit(resource.RLIMIT_AS, (memory, hard))
    print("ready", file=answers)
    for question in sys.stdin:
        _renew_cpu_limit(cpu_s)
        truth, completion = json.loads(question)
        # timeout_seconds=None: no signals; the process that asks keeps the time.
        right = bool(verify(_parse_truth(truth), _parse(completion), timeout_seconds=None))
        print(json.dumps(right), file=answers)


def _parse(text: str) -> list[object]:
    from math_verify import parse

    return list(parse(text, parsing_timeout=None))


def _parse_truth(truth: str) -> list[object]:
    """Parse a ground truth, also where it is bare LaTeX (`\\sqrt{2}/2`), which math-verify passes over."""
    if "$" in truth or "\\boxed" in truth:
        return _parse(truth)
    boxed = _parse(f"\\boxed{{{truth}}}")
    # math-verify gives the expression and its text; the text alone means that it could make no sense of the
    # box.
    return boxed if any(not isinstance(answer, str) for answer in boxed) else _parse(truth) or boxed


def _renew_cpu_limit(cpu_s: int) -> None:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = int(usage.ru_utime + usage.ru_stime) + 1 + cpu_s
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


if __name__ == "__main__":
    main()
