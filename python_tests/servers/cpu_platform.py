"""A processor as a platform of vLLM-Omni, which has none of its own: the tests install it as `ldmq_cpu_platform`."""

from __future__ import annotations

import psutil
import torch
from vllm.platforms.cpu import CpuPlatform
from vllm_omni.diffusion.attention.backends.registry import DiffusionAttentionBackendEnum
from vllm_omni.platforms.interface import OmniPlatform, OmniPlatformEnum


def plugin() -> str:
    """The name of the class, for the entry point."""
    return "ldmq_cpu_platform.CpuOmniPlatform"


class CpuOmniPlatform(OmniPlatform, CpuPlatform):
    """One device, the processor, whose memory is the machine's."""

    _omni_enum = OmniPlatformEnum.OOT

    @classmethod
    def get_torch_device(cls, local_rank: int | None = None) -> torch.device:
        return torch.device("cpu")

    @classmethod
    def set_device(cls, device: torch.device) -> None:
        """There is one."""

    @classmethod
    def get_device_count(cls) -> int:
        return 1

    @classmethod
    def get_device_version(cls) -> str | None:
        return None

    @classmethod
    def synchronize(cls) -> None:
        """Calls are over when they return."""

    @classmethod
    def empty_cache(cls) -> None:
        """There is none."""

    @classmethod
    def get_free_memory(cls, device: torch.device | None = None) -> int:
        return psutil.virtual_memory().available

    @classmethod
    def get_device_memory(cls, device: torch.device | None = None) -> tuple[int, int]:
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    @classmethod
    def reset_peak_memory_stats(cls, device: torch.device | None = None) -> None:
        """None are kept."""

    @classmethod
    def max_memory_allocated(cls, device: torch.device | None = None) -> int:
        return 0

    @classmethod
    def max_memory_reserved(cls, device: torch.device | None = None) -> int:
        return 0

    @classmethod
    def memory_allocated(cls, device: torch.device | None = None) -> int:
        return 0

    @classmethod
    def supports_torch_inductor(cls) -> bool:
        return False

    @classmethod
    def get_diffusion_attn_backend_cls(
        cls, selected_backend: str | None, head_size: int, allow_trtllm_default: bool = False
    ) -> str:
        return DiffusionAttentionBackendEnum.TORCH_SDPA.get_path()

    @classmethod
    def get_default_stage_config_path(cls) -> str:
        return "vllm_omni/deploy"
