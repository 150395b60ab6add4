"""Programs in processes that have imported neither diffusers nor this package."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# importing torch and transformers takes most of a new process: one that has done so forks into each program's own
FORK = """
import json, os, sys, traceback
import torch, transformers
early = {name for name in sys.modules if name.split(".")[0] in ("diffusers", "ldmq_kernels")}
assert not early, early
for number, program in enumerate(json.loads(sys.argv[1])):
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        code = 0
        try:
            exec(program, {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stderr.flush()
        os._exit(code)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"this program failed: {program}")
"""


def run_each_anew(programs: Sequence[str]) -> None:
    """Run programs one after the other, none of which sees what another has imported.

    Raises:
        AssertionError: with the traceback of the first one that fails.
    """
    command = [sys.executable, "-c", FORK, json.dumps(list(programs))]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
