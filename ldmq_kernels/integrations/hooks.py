"""Registers with other libraries when they are imported, and imports none of them itself."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import wrapt


def install() -> None:
    """Register with diffusers and transformers once their tables of quantizers exist, and with PEFT, now or later."""
    # a hook on `diffusers` itself would fire before its lazy submodules can be imported
    wrapt.register_post_import_hook(_register_with_diffusers, "diffusers.quantizers.auto")
    # and wrap how its models and pipelines are saved, which a half imported module does not have yet
    wrapt.register_post_import_hook(
        "ldmq_kernels.integrations.diffusers.saving:wrap_models", "diffusers.models.modeling_utils"
    )
    wrapt.register_post_import_hook("ldmq_kernels.integrations.transformers:register", "transformers.quantizers.auto")
    wrapt.register_post_import_hook(
        "ldmq_kernels.integrations.tensor_parallel:watch_sharding", "torch.distributed.tensor.parallel.api"
    )
    wrapt.register_post_import_hook("ldmq_kernels.integrations.peft:watch_merging", "peft.tuners.tuners_utils")
    wrapt.register_post_import_hook(
        "ldmq_kernels.integrations.diffusers.publishing:wrap_pipelines", "diffusers.pipelines.pipeline_utils"
    )


def _register_with_diffusers(_module: ModuleType) -> None:
    if "ldmq_kernels.integrations.diffusers" in sys.modules:
        return  # it is what imports diffusers, and registers once it is complete
    importlib.import_module("ldmq_kernels.integrations.diffusers")
