"""`python -m tests.links --schedules 50` trains over so many failing links, and prints one table."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from contextlib import closing, suppress
from pathlib import Path

from tests.conftest import byte_tokenizer, tiny_llama
from tests.links.harness import Bench, Case, table


def main() -> None:
    parser = argparse.ArgumentParser(description="Train over links that fail; compare how the runs end.")
    parser.add_argument("--schedules", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, action="append", help="this schedule; repeatable")
    parser.add_argument("--keep", type=Path, help="folder for the runs, which is kept")
    parser.add_argument("--loopback", action="store_true", help="as where there are no network namespaces")
    options = parser.parse_args()
    began = time.monotonic()
    cases: list[Case] = []
    with tempfile.TemporaryDirectory(prefix="grpo-links-") as name:
        model, folder = Path(name) / "model", options.keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        # The head size of 32 is what vLLM's attention on a CPU needs.
        tiny_llama(hidden_size=64, num_attention_heads=2, num_key_value_heads=1).save_pretrained(model)
        byte_tokenizer().save_pretrained(model)
        with closing(Bench(model, folder, loopback=options.loopback)) as bench, suppress(KeyboardInterrupt):
            for number in options.only or range(options.schedules):
                cases.append(bench.case(options.seed, number))
                print([*table(cases[-1:])][2], file=sys.stderr, flush=True)
                if cases[-1].wrong:
                    print(cases[-1].wrong, file=sys.stderr, flush=True)
    print("\n".join(table(cases)))
    print(f"{len(cases)} schedules in {time.monotonic() - began:.0f} s")
    sys.exit(any(case.wrong for case in cases))


if __name__ == "__main__":
    main()
