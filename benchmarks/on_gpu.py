"""The run on a GPU machine, in two commands: is every kernel right, and how fast is everything.

    python benchmarks/on_gpu.py --prove      # 240 s: every kernel in a process of its own, then SDXL
    python benchmarks/on_gpu.py --measure    # 480 s: tuning, models, ops, in order of value

What is run, and in which order, is in gpu_run/jobs.py. Between the two there is time to mend what --prove found. Each
goes on where an earlier run in the same folder stopped (--resume DIR takes another one's folder over); what has passed
is repeated only with other code. They run from a plain copy of the tree, without network, git, diffusers or an
installed package. `make wheels`, run just before, leaves in build/wheels what the models need, and the commit;
`python -m benchmarks gpu --prebuild` leaves compiled kernels in build/prebuilt. Below $OUT (or beside this file, in
results/run) six files are kept at most: rows.jsonl, to which every result is appended as soon as it is there; log.txt;
state.json; tuned.json, with what is switched off; kernels.txt; and trace.json.gz, of one replayed SDXL call.
`python -m benchmarks collect` makes results files of the rows.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

if __name__ == "__main__":  # from a plain copy, as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.gpu_run import install
from benchmarks.gpu_run.jobs import LISTS
from benchmarks.gpu_run.runner import FILES, run


def main(arguments: list[str]) -> int:
    """Run the jobs and print a line for each; 1 where any failed."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/on_gpu.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prove", dest="list", action="store_const", const="prove", help="every kernel, then SDXL")
    what.add_argument("--measure", dest="list", action="store_const", const="measure", help="tune, then measure")
    what.add_argument("--install", action="store_true", help="unpack the wheels, and stop")
    what.add_argument("--build", type=Path, metavar="KERNELS", help="put compiled kernels into the package, and stop")
    what.add_argument("--prebuild", action="store_true", help="compile the kernels into build/prebuilt, and stop")
    parser.add_argument("--seconds", type=float, help="without: 240 to prove, 480 to measure")
    parser.add_argument("--resume", type=Path, help="the folder that an earlier run left")
    options = parser.parse_args(arguments)
    if options.install:
        return install.install() or 0
    if options.prebuild:
        return install.prebuild() or 0
    if options.build:
        return install.build(options.build) or 0
    out = Path(os.environ.get("OUT") or Path(__file__).parent / "results" / "run")
    out.mkdir(parents=True, exist_ok=True)
    if options.resume and options.resume.resolve() != out.resolve():
        for name in FILES:
            if (options.resume / name).exists():
                shutil.copy(options.resume / name, out / name)
    jobs, seconds = LISTS[options.list]
    state = run(jobs, options.seconds or seconds, out)
    return int(any(outcome.startswith("failed") for outcome in state.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
