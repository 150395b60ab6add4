"""The quantization method "ldmq" as vLLM knows methods: its own layers have none of it, and say so."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.transformers_utils.config import get_hf_file_to_dict

from ldmq_kernels.integrations.vllm_omni.classes import CLASSES


class LdmqMethod(QuantizationConfig):
    """Accepted of a checkpoint whose pipeline is one of this package's; of another it would be int8 read as floats."""

    @classmethod
    def get_name(cls) -> str:
        """As `quant_method` in config.json."""
        return "ldmq"

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Those of the floating-point layers."""
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """None: the layers choose their own backend."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None of its own."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LdmqMethod:
        """The plan is read by the pipeline."""
        return cls()

    def maybe_update_config(self, model_name: str, *_args: Any, **_kwargs: Any) -> None:
        """Refuse a model that another pipeline than this package's would load.

        Raises:
            ValueError: it is of such a class.
        """
        index = get_hf_file_to_dict("model_index.json", model_name) or {}
        if index.get("_class_name") not in CLASSES:
            raise ValueError(
                f"{model_name} is a {index.get('_class_name')} with layers of ldmq_kernels, which vLLM-Omni's own "
                "pipelines would read wrongly: serve it with --diffusion-load-format diffusers"
            )

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Refuse a layer of vLLM's.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{prefix or type(layer).__name__} is a layer of vLLM's, which has no arithmetic of ldmq_kernels: serve "
            "this model with --diffusion-load-format diffusers"
        )
