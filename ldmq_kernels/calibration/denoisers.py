"""Which parts of a pipeline denoise: what planning and quantizing are about."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from ldmq_kernels.nn.timestep_groups import TIMESTEP_NAMES

# the first that a pipeline has is planned where none is named
DENOISERS = ("unet", "transformer", "transformer_2", "prior", "prior_prior", "decoder")


class PartOf:
    """A pipeline, with the one of its parts that is planned; all else is the pipeline's own.

    Args:
        pipe: a diffusers pipeline.
        part: the name of one of its denoisers.

    Raises:
        TypeError: the pipeline has no denoiser of that name.
    """

    def __init__(self, pipe: Any, part: str) -> None:
        known = denoisers(pipe)
        if part not in known:
            raise TypeError(f"{type(pipe).__name__} has no denoiser {part!r}: choose {' or '.join(known) or 'none'}")
        self.pipe, self.part = pipe, part

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipe, name)


def chosen(pipe: Any, part: str | None) -> Any:
    """The pipeline with the part that is planned, of that name; the pipeline as it is if None.

    Raises:
        TypeError: the pipeline has no denoiser of that name.
    """
    return pipe if part is None else PartOf(pipe, part)


def whole_pipeline(pipe: Any) -> Any:
    """The pipeline itself, of which a part may be chosen."""
    return pipe.pipe if isinstance(pipe, PartOf) else pipe


def denoisers(pipe: Any) -> dict[str, nn.Module]:
    """The denoisers of a pipeline by name, the first one first."""
    found = {name: getattr(pipe, name, None) for name in DENOISERS}
    return {
        name: model
        for name, model in found.items()
        if isinstance(model, nn.Module) and (name != "decoder" or _takes_a_timestep(model))
    }


def _takes_a_timestep(model: nn.Module) -> bool:
    """Whether it denoises: that of Stable Cascade does, that of an autoencoder has the same name."""
    return not {*TIMESTEP_NAMES}.isdisjoint(inspect.signature(model.forward).parameters)


def denoiser_name(pipe: Any) -> str:
    """The name of the part that is planned: the one that was chosen, or the first denoiser.

    Raises:
        TypeError: the pipeline has none.
    """
    if isinstance(pipe, PartOf):
        return pipe.part
    name = next(iter(denoisers(pipe)), None)
    if name is None:
        raise TypeError(f"{type(pipe).__name__} has neither a unet nor a transformer: nothing to quantize")
    return name


def denoiser(pipe: Any) -> nn.Module:
    """The part that is planned: the UNet, the transformer, or the one that was chosen.

    Raises:
        TypeError: the pipeline has none.
    """
    model: nn.Module = getattr(whole_pipeline(pipe), denoiser_name(pipe))
    return model
