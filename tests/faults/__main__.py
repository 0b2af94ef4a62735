"""`python -m tests.faults --points 1000` kills runs so many times, and prints one table.

Of ten cases, each system with one process has ten, and each with two has one: it takes five times as long.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from tests.conftest import byte_tokenizer, tiny_llama
from tests.faults.harness import SERVED, SYSTEMS, Bench, Case, table


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill and resume runs; compare how they end.")
    parser.add_argument("--points", type=int, default=1000, help="stop after so many faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--system", choices=SYSTEMS, action="append", help="[all but vllm_server]")
    parser.add_argument("--only", type=int, help="this case of each system")
    options = parser.parse_args()
    began = time.monotonic()
    cases: list[Case] = []
    with tempfile.TemporaryDirectory(prefix="grpo-faults-") as name:
        models = {False: Path(name) / "model", True: Path(name) / "model-for-vllm"}
        tiny_llama().save_pretrained(models[False])
        tiny_llama(hidden_size=64, num_attention_heads=2, num_key_value_heads=1).save_pretrained(models[True])
        for model in models.values():
            byte_tokenizer().save_pretrained(model)
        chosen = options.system or [system for system in SYSTEMS if system != SERVED]
        benches = [
            Bench(system, models[system == SERVED], Path(name) / str(index)) for index, system in enumerate(chosen)
        ]
        with suppress(KeyboardInterrupt):  # the table then has what was done until then
            for number in itertools.count() if options.only is None else [options.only]:
                for bench in benches:
                    if options.only is None and bench.processes > 1 and number % 10:
                        continue
                    cases.append(bench.case(options.seed, number))
                    if cases[-1].wrong:
                        print(f"{cases[-1].name}: {cases[-1].wrong}", file=sys.stderr, flush=True)
                if sum(len(case.faults) for case in cases) >= options.points:
                    break
    print("\n".join(table(cases)))
    print(f"{len(cases)} runs in {time.monotonic() - began:.0f} s")
    sys.exit(any(case.wrong for case in cases))


if __name__ == "__main__":
    main()
