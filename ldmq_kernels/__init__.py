"""Quantized inference of latent diffusion models: int8 and int4 kernels, chosen by SQNR.

    import ldmq_kernels as ldmq

    plan = ldmq.plan(pipe, prompts, target_sqnr_db=38)
    ldmq.quantize(pipe, plan)  # or in one scheme for all layers: ldmq.quantize(pipe, scheme="w8a8-dynamic")
    pipe.save_pretrained("quantized")

Importing the package registers its quantizer with diffusers whenever diffusers is imported, so
that plain `from_pretrained` loads what `save_pretrained` wrote. It imports nothing heavy itself.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ldmq_kernels import extras
from ldmq_kernels.integrations import hooks
from ldmq_kernels.version import __version__ as __version__

if TYPE_CHECKING:
    from ldmq_kernels.calibration.clipping import clipping, unclip
    from ldmq_kernels.conversion import bake, quantize
    from ldmq_kernels.graphs import capture, release
    from ldmq_kernels.integrations.diffusers.batch_invariance import batch_invariant
    from ldmq_kernels.integrations.diffusers.fused.attention import fuse_with_processor
    from ldmq_kernels.integrations.diffusers.publishing import write_card
    from ldmq_kernels.integrations.diffusers.step_cache import cache_time_embeddings, uncache_time_embeddings
    from ldmq_kernels.integrations.diffusers.text_cache import cache_text, uncache_text
    from ldmq_kernels.kernels.dispatch import dispatch_report, use_backend
    from ldmq_kernels.nn import QuantConv1d, QuantConv2d, QuantConv3d, QuantLinear
    from ldmq_kernels.nn.cuts import check_cut_latents
    from ldmq_kernels.nn.guard import guard
    from ldmq_kernels.nn.packed import unpacked
    from ldmq_kernels.numerics.sqnr import sqnr_db
    from ldmq_kernels.planning.planner import plan
    from ldmq_kernels.plans.plan import Plan, PlanError

_EXPORTS = {
    "Plan": "plans.plan",
    "PlanError": "plans.plan",
    "QuantConv1d": "nn",
    "QuantConv2d": "nn",
    "QuantConv3d": "nn",
    "QuantLinear": "nn",
    "bake": "conversion",
    "batch_invariant": "integrations.diffusers.batch_invariance",
    "cache_text": "integrations.diffusers.text_cache",
    "cache_time_embeddings": "integrations.diffusers.step_cache",
    "capture": "graphs",
    "check_cut_latents": "nn.cuts",
    "clipping": "calibration.clipping",
    "dispatch_report": "kernels.dispatch",
    "fuse_with_processor": "integrations.diffusers.fused.attention",
    "guard": "nn.guard",
    "plan": "planning.planner",
    "quantize": "conversion",
    "release": "graphs",
    "sqnr_db": "numerics.sqnr",
    "uncache_text": "integrations.diffusers.text_cache",
    "uncache_time_embeddings": "integrations.diffusers.step_cache",
    "use_backend": "kernels.dispatch",
    "unclip": "calibration.clipping",
    "unpacked": "nn.packed",
    "write_card": "integrations.diffusers.publishing",
}
__all__ = [
    "Plan",
    "PlanError",
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv3d",
    "QuantLinear",
    "bake",
    "batch_invariant",
    "cache_text",
    "cache_time_embeddings",
    "capture",
    "check_cut_latents",
    "clipping",
    "dispatch_report",
    "fuse_with_processor",
    "guard",
    "plan",
    "quantize",
    "release",
    "sqnr_db",
    "uncache_text",
    "uncache_time_embeddings",
    "unclip",
    "unpacked",
    "use_backend",
    "write_card",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        with extras.explained(f"ldmq_kernels.{name}"):
            return getattr(importlib.import_module(f"ldmq_kernels.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'ldmq_kernels' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])


hooks.install()
