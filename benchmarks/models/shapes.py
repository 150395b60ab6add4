"""Every linear and convolution of the models, with counts, into the package's tuning/model_shapes.json.

The models are made on the meta device, without weights, and called once: UNets with the two halves of guidance
(batch 2), the VAE decoder with one picture. Only this script needs diffusers; benchmarks and tuner read the file.
Run: python -m benchmarks shapes
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models.definitions import MODELS
from ldmq_kernels.tuning.shapes import FILE


def shapes_of(model: nn.Module, inputs: dict[str, Any]) -> tuple[Counter[tuple], Counter[tuple]]:
    """Counts of shapes in one call.

    Returns:
        ("linear", m, k, n) and ("conv2d", n, c, height, width, k, kernel, stride, upsample), and (m, k, n) of the
        transformer blocks' projections as single products: q, k and v of a picture, k and v of a text.
    """
    counts: Counter[tuple] = Counter()
    merged: Counter[tuple] = Counter()
    blocks = [module for module in model.modules() if type(module).__name__ == "BasicTransformerBlock"]
    parts = {block.attn1.to_k: 3 for block in blocks} | {block.attn2.to_k: 2 for block in blocks}
    enlarging = {
        child for module in model.modules() if type(module).__name__ == "Upsample2D" for child in module.children()
    }

    def record(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        (x,) = arguments
        if isinstance(module, nn.Linear):
            m, k, n = x.numel() // x.shape[-1], module.in_features, module.out_features
            counts["linear", m, k, n] += 1
            if module in parts:
                merged[m, k, parts[module] * n] += 1
        elif isinstance(module, nn.Conv2d):
            upsample = 2 if module in enlarging else 1
            size = tuple(side // upsample for side in x.shape[2:])
            kernel, stride = module.kernel_size[0], module.stride[0]
            counts["conv2d", x.shape[0], x.shape[1], *size, module.out_channels, kernel, stride, upsample] += 1

    for module in model.modules():
        module.register_forward_pre_hook(record) if isinstance(module, nn.Linear | nn.Conv2d) else None
    with torch.no_grad():
        model(**inputs)
    return counts, merged


def main(arguments: list[str]) -> None:
    """Write the file."""
    argparse.ArgumentParser(prog="python -m benchmarks shapes", description=__doc__).parse_args(arguments)
    parts = []
    together: dict[str, list[list[int]]] = {}
    for name, description in MODELS.items():
        with torch.device("meta"):
            counts, merged = shapes_of(description.make(), description.inputs(torch.device("meta"), torch.float32))
        rows = [json.dumps([count, *shape]) for shape, count in sorted(counts.items(), key=str)]
        parts.append(f" {json.dumps(name)}: [\n  " + ",\n  ".join(rows) + "\n ]")
        together[name] = [[count, *shape] for shape, count in sorted(merged.items())]
        print(name, sum(counts.values()), "layers")
    FILE.write_text("{\n" + ",\n".join([*parts, f' "merged": {json.dumps(together)}']) + "\n}\n")
