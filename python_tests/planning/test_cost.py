"""The planner's bytes are the bytes of the tensors that a checkpoint holds."""

import pytest
import torch
from torch import nn

from ldmq_kernels.nn import QuantConv2d, QuantLinear
from ldmq_kernels.numerics.formats import SCHEMES
from ldmq_kernels.planning.cost import weight_bytes


@pytest.mark.parametrize("scheme", [s for s in SCHEMES.values() if s.quantizes], ids=str)
@pytest.mark.parametrize(
    "layer", [nn.Linear(130, 20, bias=False), nn.Conv2d(70, 12, 3, bias=False)], ids=["linear", "conv2d"]
)
@pytest.mark.parametrize("smoothed", [False, True])
def test_bytes_match_the_state_dict(layer, scheme, smoothed):
    kind = QuantLinear if isinstance(layer, nn.Linear) else QuantConv2d
    if kind.kind not in scheme.format.layers:
        with pytest.raises(ValueError, match=str(scheme)):
            kind.empty(layer, scheme, smoothed=False)
        return
    channels = layer.weight.shape[1]
    smoothing = torch.ones(channels) if smoothed else None
    quantized = kind.from_float(layer, scheme, input_scale=torch.tensor([0.1]), smoothing=smoothing)
    stored = sum(t.numel() * t.element_size() for t in quantized.state_dict().values())
    assert stored == weight_bytes(layer, scheme, smoothed=smoothed)
