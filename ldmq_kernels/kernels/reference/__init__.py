"""Plain torch: the definition of every op, right on any device and fast on none."""

from __future__ import annotations

import torch

from ldmq_kernels.kernels.backend import DEFINITION, Backend, register


class _Reference(Backend):
    name = DEFINITION

    def serves(self, device: torch.device) -> bool:
        """Any device."""
        return True


backend = register(_Reference())
