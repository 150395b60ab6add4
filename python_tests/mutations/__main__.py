"""python -m python_tests.mutations KIND [--count N] [--seed S]: exit code 0 where every answer was right."""

from __future__ import annotations

import argparse
import importlib
import sys

from ldmq_kernels.progress import track
from python_tests.mutations.trials import table, wrong_ones

# Each module has `trials(count, seed)`, an iterator of Outcomes: seeds from `seed` on, one for each.
KINDS = {
    "checkpoints": "python_tests.mutations.checkpoints",
    "kills": "python_tests.mutations.kills",
    "plans": "python_tests.mutations.plans",
}


def main(arguments: list[str]) -> int:
    """Try mutations of one kind and print what came of them."""
    parser = argparse.ArgumentParser(prog="python -m python_tests.mutations", description=__doc__)
    parser.add_argument("kind", choices=sorted(KINDS))
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    outcomes = []
    tried = importlib.import_module(KINDS[asked.kind]).trials(asked.count, asked.seed)
    for outcome in track(tried, asked.kind, asked.count, show=sys.stderr.isatty()):
        outcomes.append(outcome)
        if not outcome.right:
            print("\n".join(wrong_ones([outcome])), flush=True)
    print(table(outcomes))
    return 0 if all(outcome.right for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
