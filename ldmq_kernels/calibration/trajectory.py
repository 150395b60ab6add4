"""The float trajectory: every call that a pipeline makes of its UNet, with inputs and output.

Quantized variants are measured along it, each step from the float latents of that step, so that
the noise of different layers can be added and compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ldmq_kernels.progress import track

PROMPTS_AT_ONCE = 8


@dataclass(frozen=True)
class SamplingSettings:
    """How pictures are drawn during calibration: as the user will draw them."""

    num_inference_steps: int = 20
    guidance_scale: float = 7.5
    seed: int = 0


@dataclass(frozen=True)
class UNetCall:
    """One call: `step` counts sampling steps from 0 (the noisiest); tensors lie where the model does."""

    step: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


@dataclass(frozen=True)
class Trajectory:
    """All calls of one or more runs of a pipeline, and the denoised latents at their ends."""

    calls: list[UNetCall]
    latents: Tensor
    steps: int

    def at_steps(self, steps: Sequence[int]) -> Trajectory:
        """Only the calls of some steps."""
        wanted = set(steps)
        return Trajectory([call for call in self.calls if call.step in wanted], self.latents, self.steps)


def output_tensor(output: Any) -> Tensor:
    """The tensor in what a UNet returns: a tensor, a tuple or an output object."""
    return output if isinstance(output, Tensor) else output[0]


def denoiser(pipe: Any) -> nn.Module:
    """The UNet (or transformer) of a pipeline.

    Raises:
        TypeError: the pipeline has neither.
    """
    for name in ("unet", "transformer"):
        model = getattr(pipe, name, None)
        if isinstance(model, nn.Module):
            return model
    raise TypeError(f"{type(pipe).__name__} has neither a unet nor a transformer: nothing to quantize")


def run_pipeline(pipe: Any, prompts: Sequence[str], settings: SamplingSettings, output_type: str) -> Any:
    """Draw one picture for each prompt, its noise seeded by its index, and return `images`."""
    generators = [torch.Generator().manual_seed(settings.seed + index) for index in range(len(prompts))]
    return pipe(
        prompt=list(prompts),
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        generator=generators,
        output_type=output_type,
    ).images


def _detached(value: Any) -> Any:
    return pytree.tree_map(lambda v: v.detach().clone() if isinstance(v, Tensor) else v, value)


@torch.no_grad()
def record_trajectory(
    pipe: Any,
    prompts: Sequence[str],
    settings: SamplingSettings,
    *,
    show: bool = False,
    on_step: Callable[[int], None] = lambda step: None,
) -> Trajectory:
    """Run the pipeline and keep every call of its UNet.

    Args:
        pipe: a diffusers text-to-image pipeline in full precision.
        prompts: one picture each, seeds counting up from `settings.seed`.
        on_step: told the step number before each call.

    Raises:
        ValueError: there is no prompt, or the UNet's output is not finite.
    """
    if not prompts:
        raise ValueError("calibration needs at least one prompt")
    model = denoiser(pipe)
    calls: list[UNetCall] = []
    step = 0

    def before(_module: nn.Module, _args: Any, _kwargs: Any) -> None:
        on_step(step)

    def after(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        nonlocal step
        tensor = output_tensor(output).detach().clone()
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"the full-precision UNet's output is not finite at sampling step {step}")
        calls.append(UNetCall(step, _detached(args), _detached(kwargs), tensor))
        step += 1

    chunks = [prompts[i : i + PROMPTS_AT_ONCE] for i in range(0, len(prompts), PROMPTS_AT_ONCE)]
    handles = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, with_kwargs=True),
    ]
    latents = []
    try:
        for index, chunk in enumerate(track(chunks, "float trajectory", len(chunks), show=show)):
            step = 0
            offset = SamplingSettings(
                settings.num_inference_steps, settings.guidance_scale, settings.seed + index * PROMPTS_AT_ONCE
            )
            latents.append(run_pipeline(pipe, chunk, offset, "latent"))
    finally:
        for handle in handles:
            handle.remove()
    steps = max(call.step for call in calls) + 1
    return Trajectory(calls, torch.cat(latents), steps)


@torch.no_grad()
def replay(model: nn.Module, trajectory: Trajectory) -> Iterator[tuple[UNetCall, Tensor]]:
    """Call the model as it is now with the recorded inputs; gives each call and the new output."""
    for call in trajectory.calls:
        yield call, output_tensor(model(*call.args, **call.kwargs))
