"""What a pipeline draws while it is calibrated: prompts, its own calls with any arguments, or functions that run it.

A prompt is a text; prompts are drawn several at a time. A call is a mapping of arguments of the pipeline's own
`__call__`. A function takes the pipeline and runs it as it likes, once. Each of these is one sample: what is fitted
on some is judged on others. All of them become drawings, which run the pipeline once and give what it draws.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ldmq_kernels.calibration.denoisers import denoiser, whole_pipeline
from ldmq_kernels.calibration.outputs import output_of
from ldmq_kernels.calibration.schedulers import check_scheduler, scheduled
from ldmq_kernels.calibration.settings import SamplingSettings, Settings, each_of, sample_number
from ldmq_kernels.progress import track

PROMPTS_AT_ONCE = 8
LATENT, PICTURES = "latent", "pt"
COUNTS = ("num_images_per_prompt", "num_videos_per_prompt")

Call: TypeAlias = str | Mapping[str, Any] | Callable[[Any], Any]


def given_calls(
    prompts: Sequence[str] | str | None,
    calls: Sequence[Mapping[str, Any]] | Mapping[str, Any] | None,
    forward_loop: Callable[[Any], Any] | Sequence[Callable[[Any], Any]] | None,
) -> tuple[Call, ...]:
    """What is drawn, as it was given in one of three ways.

    Raises:
        ValueError: it is given in none, or in several.
    """
    ways = {"prompts": prompts, "calls": calls, "forward_loop": forward_loop}
    given = [name for name, value in ways.items() if value is not None]
    if len(given) != 1:
        raise ValueError(
            f"{' and '.join(given) or 'nothing'} given: give prompts, or calls=[dict(prompt=..., image=...), ...] with "
            "arguments of the pipeline's own call, or a forward_loop that takes the pipeline and runs it"
        )
    value: Any = ways[given[0]]
    return (value,) if isinstance(value, str | Mapping) or callable(value) else tuple(value)


# -- what a pipeline accepts ----------------------------------------------------------------------------------


def parameters_of(pipe: Any) -> Mapping[str, inspect.Parameter] | None:
    """The parameters of a pipeline's call, by name; None where it takes any.

    Args:
        pipe: a pipeline, or its class.
    """
    pipe = whole_pipeline(pipe)
    call = pipe.__call__ if isinstance(pipe, type) else type(pipe).__call__
    parameters = dict(inspect.signature(call).parameters)
    parameters.pop("self", None)
    rest = [name for name, p in parameters.items() if p.kind is inspect.Parameter.VAR_KEYWORD]
    if rest and not call.__module__.startswith("diffusers."):  # whose pipelines drop what they do not know
        return None
    return {name: parameter for name, parameter in parameters.items() if name not in rest}


def check_arguments(pipe: Any, arguments: Mapping[str, Any], where: str) -> None:
    """Refuse a call that the pipeline cannot take, before it runs.

    Args:
        pipe: a pipeline, or its class.
        where: what the error calls these arguments.

    Raises:
        ValueError: the pipeline knows one of the arguments not, or lacks one.
    """
    parameters = parameters_of(pipe)
    if parameters is None:
        return
    pipe = whole_pipeline(pipe)
    name = pipe.__name__ if isinstance(pipe, type) else type(pipe).__name__
    unknown = next((key for key in arguments if key not in parameters), None)
    if unknown is not None:
        near = difflib.get_close_matches(str(unknown), parameters, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"{where}: {name} takes no {unknown!r}{hint}; it takes {', '.join(parameters)}")
    needed = (key for key, parameter in parameters.items() if parameter.default is inspect.Parameter.empty)
    lacking = [key for key in needed if key not in arguments]
    if lacking:
        raise ValueError(f"{where} lacks {', '.join(lacking)}, which {name} needs; it takes {', '.join(parameters)}")


def check_calls(pipe: Any, calls: Sequence[Call], settings: Settings) -> None:
    """Refuse what a pipeline cannot draw, before it draws anything.

    Raises:
        ValueError: there is nothing to draw, something is neither a text, arguments nor a function, or the pipeline
            knows one of the arguments not, or cannot have a scheduler of the settings.
    """
    if not calls:
        raise ValueError("calibration needs at least one prompt or call")
    for index, call in enumerate(calls):
        if not isinstance(call, str | Mapping) and not callable(call):
            raise ValueError(
                f"calls[{index}] is a {type(call).__name__}: give a mapping of the pipeline's arguments, such as "
                "dict(prompt=..., image=...)"
            )
        if isinstance(call, Mapping) and not all(isinstance(key, str) for key in call):
            raise ValueError(f"calls[{index}] has an argument whose name is no text: {', '.join(map(repr, call))}")
    for one in each_of(settings):
        check_scheduler(pipe, one.scheduler)
    for drawing in drawings(calls, settings):
        drawing.check(pipe)


# -- drawings -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawing:
    """One run of a pipeline.

    Attributes:
        calls: prompts that are drawn together, or one call or function alone.
        samples: their numbers among all that is drawn, one each, see `sample_number`.
    """

    calls: tuple[Call, ...]
    samples: tuple[int, ...]
    settings: SamplingSettings

    @property
    def names(self) -> list[str]:
        """Each sample in words."""
        return [described(call, sample) for call, sample in zip(self.calls, self.samples, strict=True)]

    def of_samples(self, pipe: Any, samples: Collection[int]) -> Drawing | None:
        """The run that draws some of these samples alone, each as in this one; None where no run does.

        Prompts are drawn apart as together where what is random comes from generators.
        """
        kept = [place for place, sample in enumerate(self.samples) if sample in samples]
        if len(kept) == len(self.samples):
            return self
        if not isinstance(self.calls[0], str) or "generator" not in (parameters_of(pipe) or {}):
            return None
        calls = tuple(self.calls[place] for place in kept)
        return replace(self, calls=calls, samples=tuple(self.samples[place] for place in kept))

    def _asked(self) -> dict[str, Any] | None:
        """The arguments that the pipeline is called with, without seeds and kind of output; None for a function."""
        first = self.calls[0]
        if isinstance(first, str):
            return {"prompt": list(self.calls), **self.settings.arguments()}
        if isinstance(first, Mapping):
            own = {key: value for key, value in first.items() if key not in ("output_type", "return_dict")}
            return {**self.settings.arguments(), **pytree.tree_map(_again, own)}
        return None

    def check(self, pipe: Any) -> None:
        """Refuse arguments that the pipeline does not take.

        Raises:
            ValueError: it knows one of them not, or lacks one.
        """
        asked = self._asked()
        if asked is None:
            if self.settings.arguments():
                raise ValueError(
                    f"a forward_loop draws as it is written: leave {', '.join(self.settings.arguments())} out, and "
                    "have the function give them to the pipeline"
                )
            return
        parameters = parameters_of(pipe)
        if isinstance(self.calls[0], str) and parameters is not None and "prompt" not in parameters:
            kind = type(whole_pipeline(pipe)).__name__
            raise ValueError(
                f"{kind} draws no prompts: give calls=[dict(...), ...] with what it takes: {', '.join(parameters)}"
            )
        where = f"calls[{self.samples[0]}]" if isinstance(self.calls[0], Mapping) else "drawing prompts"
        check_arguments(pipe, asked, where)

    def run(self, pipe: Any, output_type: str) -> Tensor | None:
        """Run the pipeline, and give what it draws: None where that is no tensor and no picture.

        Noise that comes from a generator has the seed of the first sample, `settings.seed` plus its number, each
        further prompt its own; whatever else is random has that of the first.

        Args:
            output_type: "latent", or "pt" for pictures; what a call says of it does not count. A pipeline that has no
                such output gives its own.
        """
        asked, seed = self._asked(), self.settings.seed + self.samples[0]
        with scheduled(pipe, self.settings.scheduler), _seeded(denoiser(pipe).parameters(), seed):
            if asked is None:
                function = self.calls[0]
                assert callable(function)
                return output_of(function(whole_pipeline(pipe)))
            parameters = parameters_of(pipe)
            if "generator" not in asked and (parameters is None or "generator" in parameters):
                generators = [torch.Generator().manual_seed(self.settings.seed + sample) for sample in self.samples]
                asked["generator"] = generators if isinstance(self.calls[0], str) else generators[0]
            if parameters is None or "output_type" in parameters:
                asked["output_type"] = _possible_output(pipe, output_type)
            return output_of(whole_pipeline(pipe)(**asked))

    def guidance_scale(self, pipe: Any, rows: int) -> float | None:
        """The scale of classifier-free guidance, where a batch of so many rows holds its two halves; None elsewhere."""
        asked = self._asked()
        if asked is None:
            value = getattr(whole_pipeline(pipe), "guidance_scale", None)  # as the running pipeline has it
            pictures = 1
        else:
            parameter = (parameters_of(pipe) or {}).get("guidance_scale")
            value = asked.get("guidance_scale", None if parameter is None else parameter.default)
            pictures = _pictures(asked)
        if not isinstance(value, int | float) or isinstance(value, bool) or rows != 2 * pictures:
            return None
        return float(value)


def drawings(calls: Sequence[Call], settings: Settings) -> list[Drawing]:
    """The runs that draw all calls at each of the settings: prompts that follow each other together, all else alone."""
    runs: list[Drawing] = []
    each = each_of(settings)
    for setting, one in enumerate(each):
        together = False  # whether the last run can take another prompt
        for index, call in enumerate(calls):
            sample = sample_number(index, setting, len(each))
            if together and isinstance(call, str) and len(runs[-1].calls) < PROMPTS_AT_ONCE:
                last = runs[-1]
                runs[-1] = replace(last, calls=(*last.calls, call), samples=(*last.samples, sample))
            else:
                runs.append(Drawing((call,), (sample,), one))
            together = isinstance(call, str)
    return runs


def draw(
    pipe: Any,
    calls: Sequence[Call],
    settings: Settings,
    output_type: str,
    what: str = "",
    *,
    show: bool = False,
) -> list[Tensor]:
    """Run the pipeline as it is now on everything that is given.

    Args:
        output_type: "latent" or "pt", see `Drawing.run`.
        what: is drawn, for the line of progress.

    Returns:
        What each run draws, in the pipeline's own layout; runs that draw no tensor and no picture are left out.

    Raises:
        ValueError: there is nothing to draw, or the pipeline does not take what a call gives.
    """
    check_calls(pipe, calls, settings)
    runs = drawings(calls, settings)
    drawn = [drawing.run(pipe, output_type) for drawing in track(runs, what, len(runs), show=show)]
    return [output for output in drawn if output is not None]


def described(call: Call, index: int) -> str:
    """A sample in words: its prompt where it has one."""
    if isinstance(call, str):
        return call
    prompt = call.get("prompt") if isinstance(call, Mapping) else None
    if isinstance(prompt, list | tuple) and prompt:
        prompt = prompt[0]
    return prompt if isinstance(prompt, str) and prompt else f"call {index + 1}"


def texts_of(calls: Sequence[Call]) -> list[str]:
    """All texts that calls give to a pipeline."""
    leaves = pytree.tree_leaves([dict(call) if isinstance(call, Mapping) else call for call in calls])
    return [leaf for leaf in leaves if isinstance(leaf, str)]


def _again(value: Any) -> Any:
    """A generator from where it is, so that the next run of the same call draws the same."""
    if isinstance(value, torch.Generator):
        return torch.Generator(value.device).set_state(value.get_state())
    return value


@contextlib.contextmanager
def _seeded(parameters: Iterator[Tensor], seed: int) -> Iterator[None]:
    """Random numbers of this seed inside this block, those of a process afterwards as before."""
    devices = sorted({parameter.device.index or 0 for parameter in parameters if parameter.is_cuda})
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


def _possible_output(pipe: Any, wanted: str) -> str:
    """The output to ask a pipeline for: some know no latents, and say so when all is drawn."""
    if wanted == PICTURES or isinstance(parameters_of(pipe), type(None)):
        return wanted
    call = inspect.unwrap(type(whole_pipeline(pipe)).__call__)
    try:
        source = inspect.getsource(call)
    except (OSError, TypeError):
        return wanted
    return wanted if f'"{LATENT}"' in source else PICTURES


def _pictures(asked: Mapping[str, Any]) -> int:
    """How many pictures or videos one call asks for, as far as its arguments tell."""
    prompts = asked.get("prompt", asked.get("prompt_embeds"))
    count = len(prompts) if isinstance(prompts, list | tuple | Tensor) else 1
    for name in COUNTS:
        count *= asked[name] if isinstance(asked.get(name), int) else 1
    return count
