"""The models of `definitions` quantized, without memory: for what is counted and predicted of them."""

from __future__ import annotations

from unittest import mock

import torch
from torch import nn

from benchmarks.models.definitions import Model
from ldmq_kernels.integrations.diffusers.fused import fuse, merged
from ldmq_kernels.nn import QuantConv2d, QuantLinear
from ldmq_kernels.numerics.formats import SCHEMES


def on_meta(model: Model, scheme: str) -> nn.Module:
    """A model with every layer in one scheme, or with "fp16" in none, on the meta device."""
    with torch.device("meta"):
        made = model.make().half()
    if not SCHEMES[scheme].quantizes:
        return made
    for path, module in list(made.named_modules()):
        if isinstance(module, nn.Linear | nn.Conv2d):
            kind = QuantLinear if isinstance(module, nn.Linear) else QuantConv2d
            layer = kind.empty(module, SCHEMES[scheme], smoothed=False)
            layer.bias = module.bias
            layer.finish()
            made.set_submodule(path, layer)
    # what has no memory has no scales to compare: in these schemes q, k and v share theirs
    with mock.patch.multiple(merged, _is_empty=lambda _: False, _equal=lambda _a, _b: True):
        return fuse(made)
