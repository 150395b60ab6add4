"""Loading what is served, and what must hold before it is: layers quantized, a picture drawn, batches invariant."""

from __future__ import annotations

import copy
import inspect
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldmq_kernels.calibration.denoisers import denoiser
from ldmq_kernels.conversion.summary import summarize
from ldmq_kernels.files import printable, read_json
from ldmq_kernels.files.variants import VariantError, chosen_variant, variants_in
from ldmq_kernels.integrations.diffusers.batch_invariance import batch_invariant, find_variance
from ldmq_kernels.serving.settings import ServerSettings

logger = logging.getLogger(__name__)

LIBRARIES = ("diffusers", "transformers")
USUAL_STEPS, USUAL_GUIDANCE = 30, 5.0
CHECK_STEPS = 2
NEEDED = {"prompt", "num_inference_steps", "guidance_scale", "generator", "callback_on_step_end", "output_type"}
CHECK_PROMPT = "a photograph"


class ServingError(ValueError):
    """A model that is not served, or a server that cannot start."""


@dataclass(frozen=True)
class Served:
    """What requests need to know of a model.

    Attributes:
        multiple: sizes of pictures are multiples of it.
        tokenizer: the server's own. A lane's is set to cut at its own length by each call, in the lane's thread.
        about: the `ldmq` object of /v1/models.
    """

    name: str
    width: int
    height: int
    multiple: int
    steps: int
    guidance: float
    tokenizer: Any
    arguments: frozenset[str]
    about: dict[str, Any]
    _counting: threading.Lock = field(default_factory=threading.Lock)

    def is_cut(self, prompt: str) -> bool | None:
        """Whether a prompt has more tokens than the text encoder reads; None where that is not known."""
        most = getattr(self.tokenizer, "model_max_length", None)
        if most is None:
            return None
        with self._counting:  # a tokenizer is one thread's at a time
            return len(self.tokenizer(prompt, verbose=False).input_ids) > most


def check_folder(folder: Path) -> None:
    """Refuse what is no pipeline, and what would run code of its own.

    Raises:
        ServingError: with what was found.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        raise ServingError(f"{printable(folder)} is no pipeline: there is no model_index.json in it")
    content = read_json(index)
    kind = content.get("_class_name") if isinstance(content, dict) else None
    import diffusers

    if not isinstance(kind, str) or not isinstance(getattr(diffusers, kind, None), type):
        raise ServingError(
            f"{printable(index)}: _class_name is {kind!r}, the name of a pipeline of diffusers is needed"
        )
    for part, of in content.items():
        if part.startswith("_") or not isinstance(of, list) or of == [None, None]:
            continue
        library = of[0] if of else None
        if library is not None and library not in LIBRARIES and library != "stable_diffusion":
            raise ServingError(
                f"{printable(index)}: {part} comes from {library!r}, which is code of its own and is not run; parts of "
                f"{' and '.join(LIBRARIES)} are"
            )


def devices_here() -> list[str]:
    """All GPUs that this process sees, or the processor where it sees none."""
    return [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"]


def load(settings: ServerSettings, device: str) -> dict[str, Any]:
    """The pipelines of all models by name, on a device.

    Raises:
        ServingError: a model is missing, half-written, asks for code, or has no quantized layer.
    """
    from diffusers import DiffusionPipeline

    pipes: dict[str, Any] = {}
    for model in settings.models:
        if model.name in pipes:
            raise ServingError(f"two models are called {model.name!r}: give each a name of its own")
        check_folder(model.folder)
        dtype = getattr(torch, settings.dtype)
        given = {"torch_dtype": dtype, "variant": _variant(model.folder, settings), "local_files_only": True}
        try:
            pipe = DiffusionPipeline.from_pretrained(model.folder, **given)
        except Exception as error:
            raise ServingError(f"{printable(model.folder)} does not load: {error}") from error
        try:
            pipe.to(device)
        except Exception as error:
            raise ServingError(f"{printable(model.folder)} does not go to the device {device}: {error}") from error
        pipe.set_progress_bar_config(disable=True)
        summary = summarize(denoiser(pipe))
        if not (summary.quantized_convolutions + summary.quantized_linears or model.may_be_float):
            raise ServingError(
                f"{printable(model.folder)}: none of its layers is quantized; quantize it with `ldmq quantize`, or say "
                "--float to serve it as it is"
            )
        pipes[model.name] = pipe
    if settings.loras:
        first = next(iter(pipes.values()))
        for name, place in settings.loras.items():
            try:
                first.load_lora_weights(str(place), adapter_name=name)
            except Exception as error:
                raise ServingError(f"the adapter {name} of {printable(place)} does not load: {error}") from error
        first.disable_lora()
    return pipes


def _variant(folder: Path, settings: ServerSettings) -> str | None:
    """The variant that is asked for, of a folder that has it; an error where no folder has it."""
    asked = settings.variant
    is_there = [model.folder for model in settings.models if asked in set().union(*variants_in(model.folder).values())]
    try:
        return chosen_variant(folder, asked if folder in is_there or not is_there else None)
    except VariantError as error:
        raise ServingError(str(error)) from None


def describe(pipe: Any, name: str, settings: ServerSettings) -> Served:
    """What requests need to know of a pipeline.

    Raises:
        ServingError: it takes no prompt, or does not call back after each step.
    """
    model: Any = denoiser(pipe)
    taken = inspect.signature(type(pipe).__call__).parameters
    names = set(taken)
    if missing := NEEDED - names:
        raise ServingError(
            f"{name} is a {type(pipe).__name__}, whose call takes no {', '.join(sorted(missing))}: pipelines that draw "
            "pictures from a prompt, step by step, are served"
        )
    if not (hasattr(getattr(pipe, "text_encoder", None), "text_model") or hasattr(pipe, "text_encoder_2")):
        names.discard("clip_skip")  # diffusers reads a part of the text encoder that newer transformers have not
    factor = int(getattr(pipe, "vae_scale_factor", 8))
    size = getattr(model.config, "sample_size", None) or 64
    height, width = (size, size) if isinstance(size, int) else size
    guidance = taken["guidance_scale"].default if "guidance_scale" in taken else USUAL_GUIDANCE
    summary = summarize(model)
    plan: Any = getattr(getattr(model.config, "quantization_config", None), "plan", None)
    about = {
        "pipeline": type(pipe).__name__,
        "weights_bytes": summary.bytes_after,
        "weights_bytes_fp16": summary.bytes_before,
        "layers": {scheme: share.convolutions + share.linears for scheme, share in summary.schemes.items()},
        "quantized_layers": summary.quantized_convolutions + summary.quantized_linears,
        "measured": dict(getattr(plan, "measured", None) or {}),
        "size": f"{width * factor}x{height * factor}",
        "steps": settings.steps or USUAL_STEPS,
    }
    return Served(
        name,
        width * factor,
        height * factor,
        factor,
        settings.steps or USUAL_STEPS,
        float(settings.guidance if settings.guidance is not None else guidance),
        copy.deepcopy(getattr(pipe, "tokenizer", None)),
        frozenset(names),
        about,
    )


def is_invariant(pipe: Any, served: Served, batches: Sequence[int]) -> bool:
    """Draw a picture alone and in batches of so many, and say whether it is the same; the log tells by how much not."""

    def draw(seeds: Sequence[int]) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        with batch_invariant(pipe, len(seeds)):
            drawn = pipe(
                [CHECK_PROMPT] * len(seeds),
                num_inference_steps=CHECK_STEPS,
                guidance_scale=served.guidance,
                generator=generators,
                output_type="np",
            )
        if not hasattr(drawn, "images"):
            raise ServingError(f"{served.name} is a {type(pipe).__name__}, which draws no pictures: it is not served")
        return torch.from_numpy(np.asarray(drawn.images))

    found = find_variance(draw, [count for count in batches if count > 1] or [1])
    if found is not None:
        logger.warning("%s: a picture differs in a batch of %d by %g", served.name, found.pictures, found.largest)
    return found is None
