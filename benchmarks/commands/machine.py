"""What this machine can do at most, and what the host spends on a call: python -m benchmarks machine"""

from __future__ import annotations

import argparse

from benchmarks.harness import machine, results
from benchmarks.machine import ceilings, host_time

PARTS = {"ceilings": ceilings, "host_time": host_time}


def main(arguments: list[str]) -> None:
    """Measure both parts, or one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks machine", description=__doc__)
    parser.add_argument("part", nargs="?", choices=PARTS, help="without: both")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="without: the GPU where there is one")
    results.add_options(parser)
    options = parser.parse_args(arguments)
    if options.json and not options.part:
        parser.error(f"--json holds one kind of results: name a part, {' or '.join(PARTS)}")
    try:
        if options.device:
            machine.use_device(options.device)
    except ValueError as error:
        parser.error(str(error))
    for name in [options.part] if options.part else PARTS:
        output = results.Output.of(name, options)
        for row in PARTS[name].measure():
            output.add(row)
            print(PARTS[name].text(row), flush=True)
