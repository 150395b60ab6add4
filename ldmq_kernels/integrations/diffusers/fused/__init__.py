"""Blocks of a UNet, VAE or transformer that call the fused ops: `fuse` puts them in, in place, `unfuse` takes them out.

A block keeps its parameters and its place; only its class changes, to a subclass of diffusers' own. Its fused
form runs when its children are layers of this package with nothing on top: with LoRA, hooks, an attention processor
or arguments that the fused form does not know (`attention`), diffusers' own forward runs.
"""

from __future__ import annotations

from typing import TypeVar

from diffusers.models.attention import BasicTransformerBlock, FeedForward, JointTransformerBlock
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from diffusers.models.upsampling import Upsample2D
from torch import nn

from ldmq_kernels.integrations.diffusers.fused.feed_forward import FusedFeedForward
from ldmq_kernels.integrations.diffusers.fused.flux import FusedFluxSingleTransformerBlock, FusedFluxTransformerBlock
from ldmq_kernels.integrations.diffusers.fused.joint import FusedJointTransformerBlock
from ldmq_kernels.integrations.diffusers.fused.projections import FOUND, SharesProjections
from ldmq_kernels.integrations.diffusers.fused.resampling import FusedDownsample2D, FusedUpsample2D
from ldmq_kernels.integrations.diffusers.fused.resnet import FusedResnetBlock2D
from ldmq_kernels.integrations.diffusers.fused.transformer_2d import FusedTransformer2DModel
from ldmq_kernels.integrations.diffusers.fused.transformer_block import FusedBasicTransformerBlock
from ldmq_kernels.integrations.diffusers.fused.wan import FusedWanTransformerBlock

M = TypeVar("M", bound=nn.Module)
FUSED: dict[type[nn.Module], type[nn.Module]] = {
    BasicTransformerBlock: FusedBasicTransformerBlock,
    Downsample2D: FusedDownsample2D,
    FeedForward: FusedFeedForward,
    FluxSingleTransformerBlock: FusedFluxSingleTransformerBlock,
    FluxTransformerBlock: FusedFluxTransformerBlock,
    JointTransformerBlock: FusedJointTransformerBlock,
    ResnetBlock2D: FusedResnetBlock2D,
    Transformer2DModel: FusedTransformer2DModel,
    Upsample2D: FusedUpsample2D,
    WanTransformerBlock: FusedWanTransformerBlock,
}
PLAIN = {fused: plain for plain, fused in FUSED.items()}
for _plain, _fused in FUSED.items():
    _fused.__name__ = _plain.__name__  # device maps and compile_repeated_blocks know blocks by this name


def fuse(model: M) -> M:
    """Make a converted model's blocks call the fused ops, in place; again is the same as once.

    Args:
        model: a diffusers UNet, VAE, transformer or other pipeline component with QuantLinear or QuantConv2d in it.

    Returns:
        `model` itself.
    """
    for module in model.modules():
        if type(module) in FUSED:
            module.__class__ = FUSED[type(module)]
        if isinstance(module, SharesProjections):
            module.find_shared()
    return model


def unfuse(model: M) -> M:
    """Make the blocks diffusers' own again, in place.

    Returns:
        `model` itself.
    """
    for module in model.modules():
        if type(module) in PLAIN:
            for name in FOUND:
                vars(module).pop(name, None)
            module.__class__ = PLAIN[type(module)]
    return model
