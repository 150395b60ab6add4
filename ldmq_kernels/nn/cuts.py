"""Latents that are cut in parts, each of which a call of the model sees alone: which layers then round in another way.

A calibrated scale is the same for every part, and one that is measured for each token or pixel is that of the token. A
convolution that measures its scale measures it over all of its input: another cut gives other numbers.
"""

from __future__ import annotations

from torch import nn

from ldmq_kernels.nn.quantized import QuantizedLayer


def depends_on_cuts(layer: nn.Module) -> bool:
    """Whether a quantized layer measures one scale over all pixels of a sample."""
    if not isinstance(layer, QuantizedLayer) or not layer.scheme.quantizes_activations:
        return False
    return layer.kind != "linear" and not layer.is_pointwise and not layer.scheme.activations.is_calibrated


def check_cut_latents(model: nn.Module) -> None:
    """Accept a model whose numbers do not depend on how its latents are cut, as parallel sampling of videos cuts them.

    Args:
        model: quantized, or with quantized layers in it.

    Raises:
        ValueError: layers measure their scale over the whole of what they are given; the text names them.
    """
    found = [name for name, layer in model.named_modules() if depends_on_cuts(layer)]
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise ValueError(
            f"{', '.join(found[:3])}{more} measure their scale over all of a part of the latent, so that another cut "
            "gives other numbers: plan with ldmq.plan(..., cut_latents=True), or give them w8a8-static, w8a8-timestep, "
            "w8a8x2 or 16-bit activations"
        )
