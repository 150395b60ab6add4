"""Which parts of a pipeline denoise, and which others can be planned: what planning and quantizing are about."""

from __future__ import annotations

from typing import Any

from torch import nn

from ldmq_kernels.calibration.autoencoders import takes_a_timestep

# the first that a pipeline has is planned where none is named
DENOISERS = ("unet", "transformer", "transformer_2", "prior", "prior_prior", "decoder")

# planned only where they are named; of several nets at once each by its place, "controlnet.nets.0"
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "image_encoder")
OTHERS = ("vae", "controlnet", "adapter", *ENCODERS)
SEVERAL = ("nets", "adapters")


class PartOf:
    """A pipeline, with the one of its parts that is planned; all else is the pipeline's own.

    Args:
        pipe: a diffusers pipeline.
        part: the name of one of its denoisers, or of what it has beside them: `parts_of` has all names.

    Raises:
        TypeError: the pipeline has no part of that name that could be planned.
    """

    def __init__(self, pipe: Any, part: str) -> None:
        known = parts_of(pipe)
        if part not in known:
            raise TypeError(f"{type(pipe).__name__} has no part {part!r}: choose {' or '.join(known) or 'none'}")
        self.pipe, self.part = pipe, part

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipe, name)


def chosen(pipe: Any, part: str | None) -> Any:
    """The pipeline with the part that is planned, of that name; the pipeline as it is if None.

    Raises:
        TypeError: the pipeline has no part of that name.
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
        if isinstance(model, nn.Module) and (name != "decoder" or takes_a_timestep(model))  # an autoencoder's does not
    }


def parts_of(pipe: Any) -> dict[str, nn.Module]:
    """All parts of a pipeline that can be planned, by name: denoisers, then its VAE, what steers it, and encoders."""
    found = denoisers(pipe)
    for name in OTHERS:
        model = getattr(pipe, name, None)
        if isinstance(model, nn.Module):
            lists = (getattr(model, several, None) for several in SEVERAL)
            nets = next((nets for nets in lists if isinstance(nets, nn.ModuleList)), None)
            kind = next((several for several in SEVERAL if getattr(model, several, None) is nets), "")
            found |= {name: model} if nets is None else {f"{name}.{kind}.{i}": net for i, net in enumerate(nets)}
    return found


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
    return parts_of(whole_pipeline(pipe))[denoiser_name(pipe)]
