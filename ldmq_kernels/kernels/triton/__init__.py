"""Triton kernels for NVIDIA GPUs of compute capability 8.0 and newer; on a CPU, in Triton's interpreter.

Neither this package nor `serves` imports triton: the ops do, when one is asked for.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from ldmq_kernels.kernels.backend import Backend, register
from ldmq_kernels.kernels.gpu import FLOAT8_FROM, gpu_of
from ldmq_kernels.kernels.triton.tuning import TritonTiles

# too much shared memory or too many registers for this GPU; what ptxas or Triton's compiler does not take
NOT_LAUNCHED = ("OutOfResources", "PTXASError", "CompilationError")
FAILED_PASS = "PassManager::run failed"  # a RuntimeError of Triton's compiler
WITHOUT_CUDA = "needs an NVIDIA GPU and a torch build with CUDA"


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _is_new_enough(device: torch.device) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 0)


class _Triton(Backend):
    name = "triton"
    device_type = "cuda"
    rank = 10
    is_raced = True
    tiles = TritonTiles()

    def serves(self, device: torch.device) -> bool:
        """Whether these kernels run on `device`; on a CPU only where TRITON_INTERPRET=1 is set."""
        if not _is_installed():
            return False
        if device.type == "cuda":
            return _is_new_enough(device)
        return device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"

    def why_not(self, device: torch.device) -> str:
        """Whether triton, a GPU or a newer GPU is missing."""
        if not _is_installed():
            return f"triton is not installed, it {WITHOUT_CUDA}: pip install triton"
        if not torch.cuda.is_available():
            return f"{WITHOUT_CUDA} (TRITON_INTERPRET=1 runs it slowly on a CPU)"
        return "needs compute capability 8.0 or newer"

    def launch_failure(self, error: Exception) -> str:
        """Whether Triton's compiler, ptxas or this GPU's limits refused the kernel."""
        names = [kind.__name__ for kind in type(error).__mro__ if kind.__module__.startswith("triton.")]
        is_refused = any(name in NOT_LAUNCHED for name in names) or FAILED_PASS in str(error)
        return f"{type(error).__name__}: {error}" if is_refused else ""

    def remark(self, device: torch.device) -> str:
        """That a GPU has no FP8, and what is done instead."""
        if gpu_of(device).capability >= FLOAT8_FROM:
            return ""
        return "this GPU has no FP8, which needs compute capability 8.9: FP8 layers run by their definition, slowly"


backend = register(_Triton())
