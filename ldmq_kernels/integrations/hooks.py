"""Registers with other libraries when they are imported, and imports none of them itself."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import wrapt

# the module of another library, once it is complete, and what is called with it
WRAPPED = (
    ("diffusers.models.modeling_utils", "diffusers.saving:wrap_models"),
    ("diffusers.models.modeling_utils", "diffusers.models:wrap_models"),
    ("diffusers.hooks._helpers", "diffusers.models:wrap_registry"),
    ("diffusers.loaders.single_file_model", "diffusers.models:wrap_single_files"),
    ("diffusers.pipelines.pipeline_utils", "diffusers.models:wrap_pipelines"),
    ("diffusers.pipelines.pipeline_utils", "diffusers.publishing:wrap_pipelines"),
    ("torch.distributed.tensor.parallel.api", "tensor_parallel:watch_sharding"),
    ("transformers.quantizers.auto", "transformers:register"),
    ("peft.tuners.tuners_utils", "peft:watch_merging"),
    ("diffusers.loaders.peft", "peft:watch_model_fusing"),
    ("diffusers.loaders.lora_base", "peft:watch_encoder_fusing"),
)


def install() -> None:
    """Register with diffusers and transformers once their tables of quantizers exist, and with PEFT, now or later."""
    # a hook on `diffusers` itself would fire before its lazy submodules can be imported
    wrapt.register_post_import_hook(_register_with_diffusers, "diffusers.quantizers.auto")
    for module, function in WRAPPED:
        wrapt.register_post_import_hook(f"ldmq_kernels.integrations.{function}", module)


def _register_with_diffusers(_module: ModuleType) -> None:
    if "ldmq_kernels.integrations.diffusers" in sys.modules:
        return  # it is what imports diffusers, and registers once it is complete
    importlib.import_module("ldmq_kernels.integrations.diffusers")
