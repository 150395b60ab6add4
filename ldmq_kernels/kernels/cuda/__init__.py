"""Calls into the compiled CUDA extension (csrc/), where the package was built with it."""

from __future__ import annotations

import torch

from ldmq_kernels.kernels.backend import Backend, register
from ldmq_kernels.kernels.cuda.tuning import CudaTiles

# cudaGetErrorString of launches that never began: a cooperative grid that does not fit at once (MPS, green contexts),
# too many registers or too much shared memory, a size that the device does not have, no code for it, no TMA
NOT_LAUNCHED = (
    "too many blocks in cooperative launch",
    "too many resources requested for launch",
    "invalid configuration argument",
    "no kernel image is available for execution on the device",
    "operation not supported",
)
BEFORE_TRITON = 20  # where Triton waits for each int8 product before it starts the next one


class _Cuda(Backend):
    name = "cuda"
    device_type = "cuda"
    is_raced = True
    tiles = CudaTiles()

    def serves(self, device: torch.device) -> bool:
        """A CUDA device that the extension holds code for; False where it was not built."""
        from ldmq_kernels.kernels.cuda.extension import runs_on

        return device.type == "cuda" and runs_on(torch.cuda.get_device_capability(device))

    def rank_on(self, device: torch.device) -> int | None:
        """Before Triton on compute capability 9.0, where the extension has kernels made for it; no rank elsewhere."""
        from ldmq_kernels.kernels.cuda.extension import has_hopper_kernels

        leads = has_hopper_kernels() and self.serves(device) and torch.cuda.get_device_capability(device) == (9, 0)
        return BEFORE_TRITON if leads else None

    def why_not(self, device: torch.device) -> str:
        """Whether the extension or a GPU that it holds code for is missing."""
        from ldmq_kernels.kernels.cuda.extension import load

        module = load()
        if module is None:
            return "the package was built without it: install a wheel that has it, or build with LDMQ_CUDA_ARCHS set"
        built = f"it is built for {module.architectures()}, with {len(module.tiles())} tiles"
        if not torch.cuda.is_available():
            return f"{built}, and needs an NVIDIA GPU and a torch build with CUDA"
        return f"{built}, and not for this GPU or its driver"

    def launch_failure(self, error: Exception) -> str:
        """Whether CUDA refused the launch."""
        return str(error) if any(text in str(error) for text in NOT_LAUNCHED) else ""


backend = register(_Cuda())
