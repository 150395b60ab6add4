"""Make results files of the rows that a GPU machine brought home: python -m benchmarks collect ROWS.jsonl"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.harness import results


def main(arguments: list[str]) -> None:
    """Print the files that were written: one for each device, date and kind."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks collect", description=__doc__)
    parser.add_argument("rows", type=Path)
    print(*results.collect(results.read(parser.parse_args(arguments).rows)), sep="\n")
