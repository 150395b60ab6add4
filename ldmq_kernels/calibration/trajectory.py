"""The float trajectory: every call that a pipeline makes of its UNet, with inputs and output.

Quantized variants are measured along it, each step from the float latents of that step, so that
the noise of different layers can be added and compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ldmq_kernels.progress import track

PROMPTS_AT_ONCE = 8
OnCall = Callable[[int, tuple[int, ...]], None]


@dataclass(frozen=True)
class SamplingSettings:
    """The settings of pictures drawn during calibration, as the user will draw them.

    Raises:
        ValueError: there is no step, a picture has no size, or the guidance is not finite.
    """

    num_inference_steps: int = 20
    guidance_scale: float = 7.5
    seed: int = 0
    height: int | None = None  # pixels; None as the pipeline draws by default
    width: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_inference_steps", "height", "width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: give at least 1")
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale is {self.guidance_scale}: give a finite number, such as 7.5")


@dataclass(frozen=True)
class UNetCall:
    """One call: `step` counts sampling steps from 0 (the noisiest); tensors lie where the model does.

    Attributes:
        prompts: the indices of the prompts drawn. With classifier-free guidance the batch is twice as many,
            the unconditional half first.
    """

    step: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
    prompts: tuple[int, ...] = ()

    @property
    def guided(self) -> bool:
        """Whether the batch holds both halves of classifier-free guidance."""
        return self.output.shape[0] == 2 * len(self.prompts)

    @property
    def timestep(self) -> float:
        """The timestep that the model was called with."""
        value = self.args[1] if len(self.args) > 1 else self.kwargs["timestep"]
        return float(value.flatten()[0]) if isinstance(value, Tensor) else float(value)

    def of_prompts(self, prompts: Sequence[int]) -> UNetCall:
        """The same call for some of its prompts only, both halves of each.

        Raises:
            ValueError: the call draws none of them.
        """
        places = [place for place, prompt in enumerate(self.prompts) if prompt in set(prompts)]
        if not places:
            raise ValueError(f"a call of prompts {self.prompts} draws none of {tuple(prompts)}")
        rows, count = self.output.shape[0], len(self.prompts)
        index = torch.tensor([place + half for half in range(0, rows, count) for place in places])

        def cut(value: Any) -> Any:
            batched = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == rows
            return value[index.to(value.device)] if batched else value

        args, kwargs = pytree.tree_map(cut, (self.args, self.kwargs))
        return UNetCall(self.step, args, kwargs, cut(self.output), tuple(self.prompts[place] for place in places))


def folds_of_rows(rows: int, prompts: Sequence[int]) -> tuple[int, ...]:
    """0 or 1 for each row of a batch, by its prompt: what is fitted on one fold of the prompts is judged on the other.

    Args:
        rows: of a tensor in a call for these prompts, both halves of guidance or one.

    Returns:
        Nothing where the rows are not those of the prompts.
    """
    if not prompts or rows not in (len(prompts), 2 * len(prompts)):
        return ()
    return tuple(prompts[row % len(prompts)] % 2 for row in range(rows))


@dataclass(frozen=True)
class Trajectory:
    """All calls of one or more runs of a pipeline, and the denoised latents at their ends."""

    calls: list[UNetCall]
    latents: Tensor
    steps: int

    def at_steps(self, steps: Sequence[int]) -> Trajectory:
        """Only the calls of some steps."""
        taken = set(steps)
        return Trajectory([call for call in self.calls if call.step in taken], self.latents, self.steps)

    @property
    def prompts(self) -> list[int]:
        """The indices of all prompts that its calls draw, ascending."""
        return sorted({prompt for call in self.calls for prompt in call.prompts})

    def by_fold(self) -> dict[int, Trajectory]:
        """The calls for the prompts of each fold, 0 and 1; all of them as fold 0 where there is one prompt."""
        if len(self.prompts) < 2:
            return {0: self}
        folds = {}
        for fold in (0, 1):
            of_fold = [prompt for prompt in self.prompts if prompt % 2 == fold]
            calls = [call.of_prompts(of_fold) for call in self.calls if set(call.prompts) & set(of_fold)]
            if calls:
                folds[fold] = replace(self, calls=calls)
        return folds

    def timesteps(self) -> list[float]:
        """The timestep that the model was called with at each step."""
        return [next(call.timestep for call in self.calls if call.step == step) for step in range(self.steps)]


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


class _Enough(Exception):
    """Ends a pipeline's run before its last step."""


def run_pipeline(pipe: Any, prompts: Sequence[str], settings: SamplingSettings, output_type: str) -> Any:
    """Draw one picture for each prompt, its noise seeded by its index, and return `images`."""
    generators = [torch.Generator().manual_seed(settings.seed + index) for index in range(len(prompts))]
    size = {name: value for name in ("height", "width") if (value := getattr(settings, name)) is not None}
    return pipe(
        prompt=list(prompts),
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        generator=generators,
        output_type=output_type,
        **size,
    ).images


def _detached(value: Any) -> Any:
    return pytree.tree_map(lambda v: v.detach().clone() if isinstance(v, Tensor) else v, value)


@dataclass(frozen=True)
class _Chunk:
    """Prompts that are drawn together, and their place among all."""

    first: int
    prompts: Sequence[str]


def _chunks(prompts: Sequence[str]) -> list[_Chunk]:
    return [_Chunk(i, prompts[i : i + PROMPTS_AT_ONCE]) for i in range(0, len(prompts), PROMPTS_AT_ONCE)]


def _record(
    pipe: Any, chunk: _Chunk, settings: SamplingSettings, last_step: int | None, on_call: OnCall
) -> tuple[list[UNetCall], Tensor | None]:
    """One run of the pipeline; the latents are None where it ended early."""
    calls: list[UNetCall] = []
    indices = tuple(range(chunk.first, chunk.first + len(chunk.prompts)))

    def before(_module: nn.Module, _args: Any, _kwargs: Any) -> None:
        on_call(len(calls), indices)

    def after(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        tensor = output_tensor(output).detach().clone()
        step = len(calls)
        if not bool(torch.isfinite(tensor).all()):
            wrong = ", ".join(repr(text) for text in chunk.prompts)
            raise ValueError(
                f"the full-precision UNet's output is not finite at sampling step {step}, prompts {wrong}: "
                "leave the prompt out, or run the pipeline in bfloat16 or float32"
            )
        calls.append(UNetCall(step, _detached(args), _detached(kwargs), tensor, indices))
        if step == last_step:
            raise _Enough

    model = denoiser(pipe)
    handles = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        return calls, run_pipeline(pipe, chunk.prompts, replace(settings, seed=settings.seed + chunk.first), "latent")
    except _Enough:
        return calls, None
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def record_trajectory(
    pipe: Any,
    prompts: Sequence[str],
    settings: SamplingSettings,
    *,
    last_step: int | None = None,
    show: bool = False,
    on_call: OnCall = lambda step, prompts: None,
) -> Trajectory:
    """Run the pipeline and keep every call of its UNet.

    Args:
        pipe: a diffusers text-to-image pipeline in full precision.
        prompts: one picture each, seeds counting up from `settings.seed`.
        last_step: stop after this sampling step, without pictures; None runs to the end.
        on_call: called with the step and the indices of the prompts before each call of the UNet.

    Raises:
        ValueError: there is no prompt, or the UNet's output is not finite.
    """
    if not prompts:
        raise ValueError("calibration needs at least one prompt")
    calls: list[UNetCall] = []
    latents: list[Tensor] = []
    chunks = _chunks(prompts)
    for chunk in track(chunks, "float trajectory", len(chunks), show=show):
        recorded, images = _record(pipe, chunk, settings, last_step, on_call)
        calls += recorded
        latents += [] if images is None else [images]
    steps = max(call.step for call in calls) + 1
    return Trajectory(calls, torch.cat(latents) if latents else torch.empty(0), steps)


@torch.no_grad()
def replay(model: nn.Module, trajectory: Trajectory) -> Iterator[tuple[UNetCall, Tensor]]:
    """Call the model as it is now with the recorded inputs; gives each call and the new output."""
    for call in trajectory.calls:
        yield call, output_tensor(model(*call.args, **call.kwargs))
