"""What the process that all cases are forked from imports before the first of them."""

from benchmarks.gpu_run.cases import preload

preload()
