"""The float trajectory: every call that a pipeline makes of its UNet, with inputs and output.

Quantized variants are measured along it, each step from the float latents of that step, so that
the noise of different layers can be added and compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ldmq_kernels.calibration.autoencoders import is_autoencoder, through_forward
from ldmq_kernels.calibration.denoisers import denoiser
from ldmq_kernels.calibration.drawings import LATENT, PICTURES, Call, Drawing, check_calls, drawings
from ldmq_kernels.calibration.in_tiles import in_tiles
from ldmq_kernels.calibration.module_state import State, StateChanges, in_state
from ldmq_kernels.calibration.outputs import output_tensor
from ldmq_kernels.calibration.settings import Settings
from ldmq_kernels.nn.timestep_groups import TIMESTEP_NAMES
from ldmq_kernels.numerics.sums import is_finite
from ldmq_kernels.progress import track

OnCall = Callable[[int, tuple[int, ...]], None]


@dataclass(frozen=True)
class UNetCall:
    """One call: `step` counts sampling steps from 0 (the noisiest); tensors lie where the model does.

    Attributes:
        prompts: the indices of the samples drawn: prompts, or one call of the pipeline with whatever it draws. With
            classifier-free guidance the batch is twice as many, the unconditional half first.
        guidance_scale: of classifier-free guidance, where the batch holds both of its halves; None elsewhere.
        state: what the pipeline changes in the model from call to call, as it was in this one.
    """

    step: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
    prompts: tuple[int, ...] = ()
    guidance_scale: float | None = None
    state: State = field(default_factory=dict, compare=False)

    @property
    def guided(self) -> bool:
        """Whether the batch holds both halves of classifier-free guidance."""
        return self.guidance_scale is not None

    @property
    def timestep(self) -> float:
        """The timestep that the model was called with."""
        return timestep_of(self.args, self.kwargs)

    def run(self, model: nn.Module) -> Tensor:
        """Call the model as it is now with these arguments, and give its output.

        Lists and dictionaries are new ones, since models take things out of those that they get.
        """
        args, kwargs = pytree.tree_map(lambda value: value, (self.args, self.kwargs))
        with in_state(model, self.state), through_forward(model):
            return output_tensor(model(*args, **kwargs))

    def of_prompts(self, prompts: Sequence[int]) -> UNetCall:
        """The same call for some of its prompts only, both halves of each.

        Raises:
            ValueError: the call draws none of them.
        """
        taken = self.rows_of(prompts)
        if not taken:
            raise ValueError(f"a call of prompts {self.prompts} draws none of {tuple(prompts)}")
        rows, index = self.output.shape[0], torch.tensor(taken, device="cpu")

        def cut(value: Any) -> Any:
            batched = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == rows
            return value[index.to(value.device)] if batched else value

        args, kwargs = pytree.tree_map(cut, (self.args, self.kwargs))
        kept = tuple(prompt for prompt in self.prompts if prompt in set(prompts))
        return replace(self, args=args, kwargs=kwargs, output=cut(self.output), prompts=kept)

    def rows_of(self, prompts: Sequence[int]) -> list[int]:
        """The rows of the batch that belong to some of its prompts, both halves of each."""
        places = [place for place, prompt in enumerate(self.prompts) if prompt in set(prompts)]
        halves = range(0, self.output.shape[0], max(1, len(self.prompts)))
        return [half + place for half in halves for place in places]


def timestep_of(args: Sequence[Any], kwargs: dict[str, Any]) -> float:
    """The timestep among the arguments of a denoiser, of a batch that of its first row; 0 where there is none."""
    name = next((name for name in TIMESTEP_NAMES if name in kwargs), None)
    value = kwargs[name] if name is not None else args[1] if len(args) > 1 else 0.0
    return float(value.flatten()[0]) if isinstance(value, Tensor) else float(value)


def prompts_of_rows(rows: int, prompts: Sequence[int], batch: int = 0) -> tuple[int, ...]:
    """The prompt of each row of a batch.

    Args:
        rows: of a tensor in a call for these prompts: both halves of guidance or one, frames or windows of a row
            after each other.
        batch: rows of the model's output in that call.

    Returns:
        Nothing where the rows are not those of the prompts.
    """
    count = len(prompts)
    if count == 1:
        return tuple(prompts) * rows
    if not prompts or not rows:
        return ()
    if rows not in (count, 2 * count):
        if not batch or batch % count or rows % batch:
            return ()
        return tuple(prompts[row * batch // rows % count] for row in range(rows))
    return tuple(prompts[row % count] for row in range(rows))


def folds_of_rows(rows: int, prompts: Sequence[int], batch: int = 0) -> tuple[int, ...]:
    """0 or 1 for each row of a batch, by its prompt: what is fitted on one fold of the prompts is judged on the other.

    Args:
        rows: see `prompts_of_rows`, and `batch`.
    """
    folds = {prompt % 2 for prompt in prompts}
    if len(folds) == 1:
        return tuple(folds) * rows
    return tuple(prompt % 2 for prompt in prompts_of_rows(rows, prompts, batch))


@dataclass(frozen=True)
class Trajectory:
    """All calls of one or more runs of a pipeline, and what they draw.

    Attributes:
        outputs: of each run, denoised latents where the pipeline gives them; nothing of runs that ended early.
        steps: how many sampling steps there are.
        slots: for each step, the number that observers were told while it was recorded.
    """

    calls: list[UNetCall]
    outputs: Sequence[Tensor]
    steps: int
    slots: Sequence[int] = field(default=(), compare=False)

    @property
    def latents(self) -> Tensor:
        """What the runs draw, together; runs of different sizes have nothing in common, and only `outputs`."""
        return torch.cat(list(self.outputs)) if len(self.outputs) else torch.empty(0, dtype=torch.float32, device="cpu")

    def at_steps(self, steps: Sequence[int]) -> Trajectory:
        """Only the calls of some steps."""
        taken = set(steps)
        return replace(self, calls=[call for call in self.calls if call.step in taken])

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


def _called(model: nn.Module) -> str:
    return type(model).__name__ if is_autoencoder(model) else "UNet"


class _Enough(Exception):
    """Ends a pipeline's run before its last step."""


class _Steps:
    """Numbers the sampling steps of runs, which may have different timesteps, as observers are told them."""

    def __init__(self) -> None:
        self._slots: dict[tuple[float, int], int] = {}
        self._seen: Counter[float] = Counter()
        self._first_run: int | None = None

    def begin(self) -> None:
        """A run begins."""
        if self._first_run is None and self._slots:
            self._first_run = len(self._slots)
        self._seen.clear()

    def slot(self, timestep: float) -> int:
        """The number of the step at this timestep: a timestep that comes twice in a run has two."""
        self._seen[timestep] += 1
        return self._slots.setdefault((timestep, self._seen[timestep]), len(self._slots))

    def order(self) -> list[int]:
        """The numbers in the order of the steps: the first run's, and where others differ, by timestep."""
        slots = list(self._slots)
        if self._first_run in (None, len(slots)):
            return list(range(len(slots)))
        descending = slots[0][0] >= slots[self._first_run - 1][0]
        keys = {slot: (-t if descending else t, nth) for (t, nth), slot in self._slots.items()}
        return sorted(keys, key=lambda slot: keys[slot])


def _copied(value: Any) -> Any:
    return pytree.tree_map(lambda v: v.detach().clone() if isinstance(v, Tensor) else v, value)


def _record(
    pipe: Any, drawing: Drawing, steps: _Steps, states: StateChanges, last_step: int | None, on_call: OnCall
) -> tuple[list[UNetCall], Tensor | None]:
    """One run of the pipeline; what it draws is None where it ended early."""
    calls: list[UNetCall] = []
    given: list[tuple[int, Any, Any]] = []

    def before(_module: nn.Module, args: Any, kwargs: Any) -> None:
        step = steps.slot(timestep_of(args, kwargs))
        states.note(model)
        given.append((step, *_copied((args, kwargs))))  # before the model takes anything out of them
        on_call(step, drawing.samples)

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        tensor = output_tensor(output).detach().clone()
        step, args, kwargs = given.pop()
        if not is_finite(tensor):
            wrong = ", ".join(map(repr, drawing.names))
            raise ValueError(
                f"the full-precision {_called(model)}'s output is not finite at sampling step {len(calls)}, prompts "
                f"{wrong}: leave the prompt out, or run the pipeline in bfloat16 or float32"
            )
        guidance = drawing.guidance_scale(pipe, tensor.shape[0])
        calls.append(UNetCall(step, args, kwargs, tensor, drawing.samples, guidance))
        if len(calls) - 1 == last_step:
            raise _Enough

    model = denoiser(pipe)
    handles = [model.register_forward_pre_hook(before, with_kwargs=True), model.register_forward_hook(after)]
    steps.begin()
    try:
        with through_forward(model), in_tiles(model) as tiles, tiles:
            return calls, drawing.run(pipe, PICTURES if is_autoencoder(model) else LATENT)
    except _Enough:
        return calls, None
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def record_trajectory(
    pipe: Any,
    calls: Sequence[Call],
    settings: Settings,
    *,
    last_step: int | None = None,
    show: bool = False,
    on_call: OnCall = lambda step, prompts: None,
) -> Trajectory:
    """Run the pipeline and keep every call of its UNet.

    Args:
        pipe: a diffusers pipeline in full precision, or a `PartOf` one.
        calls: prompts, arguments of the pipeline's own call, or functions that take the pipeline and run it once;
            seeds count up from `settings.seed`.
        settings: one, or several at each of which all is drawn; `sample_number` numbers the samples.
        last_step: stop each run after this sampling step, without pictures; None runs to the end.
        on_call: called with the step and the indices of the samples before each call of the UNet. Where runs have
            different timesteps, these steps are numbered as they come, and `Trajectory.slots` puts them in order.

    Raises:
        ValueError: there is nothing to draw, the pipeline does not take what a call gives, it never calls its
            denoiser, or the UNet's output is not finite.
    """
    check_calls(pipe, calls, settings)
    recorded: list[UNetCall] = []
    outputs: list[Tensor] = []
    steps, states = _Steps(), StateChanges()
    runs = drawings(calls, settings)
    for drawing in track(runs, "float trajectory", len(runs), show=show):
        of_run, drawn = _record(pipe, drawing, steps, states, last_step, on_call)
        if not of_run:
            raise ValueError(f"{', '.join(map(repr, drawing.names))}: drawing it never calls the model that is planned")
        recorded += of_run
        outputs += [] if drawn is None else [drawn]
    order = steps.order()
    place = {slot: step for step, slot in enumerate(order)}
    kept = [
        replace(call, step=place[call.step], state=state)
        for call, state in zip(recorded, states.of_calls(denoiser(pipe)), strict=True)
    ]
    return Trajectory(kept, outputs, len(order), order)


@torch.no_grad()
def replay(model: nn.Module, trajectory: Trajectory) -> Iterator[tuple[UNetCall, Tensor]]:
    """Call the model as it is now with the recorded inputs; gives each call and the new output."""
    with in_tiles(model) as tiles:
        for call in trajectory.calls:
            with tiles:
                output = call.run(model)
            yield call, output
