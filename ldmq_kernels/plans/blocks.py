"""The blocks of a model: what noise is summed by and compared by, between a single layer and the whole model."""

from __future__ import annotations

from torch import nn


def block_of(model: nn.Module, layer: str) -> str:
    """The name of the block that a layer is in.

    Blocks are the entries of the model's lists: "transformer_blocks.3" of a transformer. An entry, or a part, that
    holds lists itself is a stage of a U-Net, whose blocks are the entries of those: "down_blocks.0.resnets.1",
    "mid_block.attentions.0". Whatever is in no list belongs to the model's own part of that name: "conv_in",
    "time_embedding".

    Args:
        model: of any class.
        layer: the name of one of its layers, as `named_modules` gives it.
    """
    stage, rest = _entry(model, layer.split("."))
    inner = model.get_submodule(stage)
    if rest and isinstance(inner._modules.get(rest[0]), nn.ModuleList):
        block, _ = _entry(inner, rest)
        return f"{stage}.{block}"
    return stage


def _entry(module: nn.Module, names: list[str]) -> tuple[str, list[str]]:
    """The child that the names lead to, or of a list its entry; and the names that are left."""
    length = 2 if len(names) > 1 and isinstance(module._modules.get(names[0]), nn.ModuleList) else 1
    return ".".join(names[:length]), names[length:]
