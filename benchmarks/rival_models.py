"""A model with its layers in another tool's 8-bit dynamic quantization; the import fails where the tool is missing."""

from __future__ import annotations

import copy

from torch import nn


def by_torchao(model: nn.Module) -> nn.Module:
    """Linears by torchao: int8 weights and activations, a scale a token; it has no integer convolution."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    twin = copy.deepcopy(model)
    # or it changes Inductor's settings for the whole process, other rivals included
    quantize_(twin, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    return twin


def by_sdnq(model: nn.Module) -> nn.Module:
    """All linears and convolutions by SDNQ, multiplied in int8."""
    from sdnq.quantizer import sdnq_post_load_quant

    return sdnq_post_load_quant(
        copy.deepcopy(model),
        weights_dtype="int8",
        quant_conv=True,
        use_quantized_matmul=True,
        use_quantized_matmul_conv=True,
        minimum_allowed_numel=0,
        minimum_allowed_channel_size=0,
        add_skip_keys=False,
    )


TOOLS = {"torchao": by_torchao, "sdnq": by_sdnq}
