"""A lane: the pipelines of one device, and how they draw a batch so that each picture is the one drawn alone."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ldmq_kernels.integrations.diffusers.batch_invariance import batch_invariant
from ldmq_kernels.serving.engine import is_out_of_memory
from ldmq_kernels.serving.metrics import Metrics
from ldmq_kernels.serving.tasks import Key, Task

logger = logging.getLogger(__name__)


class Lane:
    """Draws with the pipelines that it is given, by the models' names.

    Args:
        pipes: each on this lane's device.
        metrics: where tiles are counted.
    """

    def __init__(self, pipes: Mapping[str, Any], metrics: Metrics | None = None) -> None:
        self.pipes = dict(pipes)
        self.metrics = metrics
        self._of_kind: dict[tuple[str, str], Any] = {}

    def pipe_of(self, key: Key) -> Any:
        """The pipeline for a key; those for pictures from pictures share the parts of the others."""
        if key.kind == "text":
            return self.pipes[key.model]
        made = self._of_kind.get((key.model, key.kind))
        if made is None:
            from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting

            maker = AutoPipelineForImage2Image if key.kind == "image" else AutoPipelineForInpainting
            made = maker.from_pipe(self.pipes[key.model])
            made.set_progress_bar_config(disable=True)
            self._of_kind[key.model, key.kind] = made
        return made

    def draw(self, tasks: Sequence[Task], on_step: Callable[[], None], tell: Callable[..., Any]) -> list[Any]:
        """PIL pictures of tasks that agree in their key; see `engine.Drawer`."""
        key = tasks[0].key
        pipe = self.pipe_of(key)
        self._set_adapter(pipe, key)
        arguments = _arguments(key, tasks)
        with batch_invariant(pipe, len(tasks)), _estimates(pipe, tasks) as estimate:

            def after(pipe: Any, step: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
                on_step()
                for place, task in enumerate(tasks):
                    if step + 1 in task.previews and task.preview is not None and not task.gone:
                        latents = tensors["latents"] if estimate.latents is None else estimate.latents
                        tell(task.preview, _decoded(pipe, latents[place : place + 1]))
                return tensors

            arguments["callback_on_step_end"] = after
            try:
                return list(pipe(**arguments).images)
            except Exception as error:
                vae: Any = getattr(pipe, "vae", None)
                if len(tasks) > 1 or not is_out_of_memory(error) or getattr(vae, "use_tiling", True):
                    raise
        return self._in_tiles(pipe, arguments, vae)

    def _in_tiles(self, pipe: Any, arguments: dict[str, Any], vae: Any) -> list[Any]:
        """Once more with less memory: one picture, decoded in tiles."""
        logger.warning("no memory for one picture: its VAE works in tiles now")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if self.metrics is not None:
            self.metrics.tiled.inc()
        for generator in arguments["generator"]:
            generator.manual_seed(generator.initial_seed())
        vae.enable_tiling()
        try:
            return list(pipe(**arguments).images)
        finally:
            vae.disable_tiling()

    @staticmethod
    def _set_adapter(pipe: Any, key: Key) -> None:
        if key.lora is not None:
            pipe.enable_lora()
            pipe.set_adapters([key.lora[0]], [key.lora[1]])
        elif getattr(pipe, "get_list_adapters", dict)():
            pipe.disable_lora()


def _arguments(key: Key, tasks: Sequence[Task]) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "prompt": [task.prompt for task in tasks],
        "num_inference_steps": key.steps,
        "guidance_scale": key.guidance,
        "generator": [torch.Generator().manual_seed(task.seed) for task in tasks],
    }
    if key.has_negative:
        arguments["negative_prompt"] = [task.negative for task in tasks]
    if key.clip_skip is not None:
        arguments["clip_skip"] = key.clip_skip
    if key.kind != "image":
        arguments |= {"height": key.height, "width": key.width}
    if key.kind != "text":
        arguments |= {"image": [task.image for task in tasks], "strength": key.strength}
    if key.kind == "mask":
        arguments["mask_image"] = [task.mask for task in tasks]
    return arguments


class _Estimate(threading.local):
    """What the scheduler takes the final latents to be, where it says so."""

    latents: Any = None


@contextlib.contextmanager
def _estimates(pipe: Any, tasks: Sequence[Task]) -> Iterator[_Estimate]:
    """Keep what the scheduler of `pipe` estimates, for previews; nothing is touched where none are asked for."""
    estimate = _Estimate()
    if not any(task.previews for task in tasks):
        yield estimate
        return
    scheduler = pipe.scheduler
    plain = scheduler.step

    @functools.wraps(plain)
    def step(*args: Any, **kwargs: Any) -> Any:
        out = plain(*args, **kwargs)
        estimate.latents = out[1] if isinstance(out, tuple) and len(out) > 1 else None
        return out

    scheduler.step = step
    try:
        yield estimate
    finally:
        del scheduler.step


def _decoded(pipe: Any, latents: Any) -> Any:
    """A PIL picture of latents (1, C, H, W) on their way."""
    vae = pipe.vae
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    with torch.no_grad():
        picture = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor + shift, return_dict=False)[0]
    return pipe.image_processor.postprocess(picture.float(), output_type="pil")[0]
