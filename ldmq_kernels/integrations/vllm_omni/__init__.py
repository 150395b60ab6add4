"""Pipelines of this package in vLLM-Omni, which finds them by the entry points of `vllm_omni.general_plugins`.

    vllm serve DIR --omni --dtype float16 --max-num-seqs 8

DIR is what `save_pretrained` wrote. vLLM-Omni has no pipeline of its own for Stable Diffusion 1.x and 2.x, and its own
for SDXL would take int8 weights for floating-point ones; through diffusers it serves one request at a time.
"""

from __future__ import annotations

import inspect
import logging

from ldmq_kernels.integrations.vllm_omni.classes import CLASSES

TRIED = "0.30.0"
MODULE = "ldmq_kernels.integrations.vllm_omni.pipeline"
NEEDED = ("model_arch", "module_name", "class_name", "post_process_func_name")

logger = logging.getLogger(__name__)


def register() -> None:
    """Enter the pipelines, and the quantization method that only they serve; all or nothing, again is as once.

    Called in each process of a server. Where vLLM-Omni has changed, nothing is entered and a warning says so: its
    diffusers backend (`--diffusion-load-format diffusers`) serves this package's models in any case.
    """
    try:
        from vllm_omni.diffusion.registry import register_diffusion_model
        from vllm_omni.quantization import register_quantization_override

        from ldmq_kernels.integrations.vllm_omni.method import LdmqMethod

        missing = set(NEEDED) - {*inspect.signature(register_diffusion_model).parameters}
        if missing:
            raise TypeError(f"register_diffusion_model takes no {', '.join(sorted(missing))}")
    except (ImportError, TypeError, ValueError) as error:
        logger.warning(
            "this vLLM-Omni is not the one that ldmq_kernels was tried with (%s): %s; serve with "
            "--diffusion-load-format diffusers, one request at a time",
            TRIED,
            error,
        )
        return
    for architecture, name in CLASSES.items():
        register_diffusion_model(architecture, MODULE, name, post_process_func_name="post_process")
    register_quantization_override("ldmq", lambda **_config: LdmqMethod())
