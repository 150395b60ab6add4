"""How pictures are drawn in calibration: steps, guidance, size, scheduler and seed, once or in several ways."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeAlias


@dataclass(frozen=True)
class SamplingSettings:
    """The settings of pictures drawn during calibration, as the user will draw them.

    What is None is as the pipeline has it by default. A call's own arguments come before these.

    Raises:
        ValueError: there is no step, a picture has no size, or the guidance is not finite.
    """

    num_inference_steps: int | None = 20
    guidance_scale: float | None = 7.5
    seed: int = 0
    height: int | None = None  # pixels
    width: int | None = None
    scheduler: str | None = None  # a class of diffusers, such as "DPMSolverMultistepScheduler"

    def __post_init__(self) -> None:
        for name in ("num_inference_steps", "height", "width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: give at least 1")
        if self.guidance_scale is not None and not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale is {self.guidance_scale}: give a finite number, such as 7.5")

    def arguments(self) -> dict[str, Any]:
        """What they ask a pipeline's call for, beside the seed; the scheduler is no argument of it."""
        names = ("num_inference_steps", "guidance_scale", "height", "width")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


Settings: TypeAlias = SamplingSettings | Sequence[SamplingSettings]
KINDS = {"num_inference_steps": int, "seed": int, "height": int, "width": int, "scheduler": str}


def each_of(settings: Settings) -> tuple[SamplingSettings, ...]:
    """All settings that are drawn at: the one, or several.

    Raises:
        ValueError: there is none.
    """
    each = (settings,) if isinstance(settings, SamplingSettings) else tuple(settings)
    if not each:
        raise ValueError("there are no settings to draw at: give one at least, or leave them out")
    return each


def changed(settings: SamplingSettings, changes: Sequence[Mapping[str, Any]]) -> tuple[SamplingSettings, ...]:
    """The settings with each of these changes: `[{"num_inference_steps": 4}, {"guidance_scale": 1.0}]`.

    Raises:
        ValueError: there is no change, or one of them has a name or a value that is none of sampling settings.
    """
    names = [field.name for field in fields(SamplingSettings)]
    for index, change in enumerate(changes):
        for name, value in change.items() if isinstance(change, Mapping) else [(change, None)]:
            if name not in names:
                raise ValueError(f"settings[{index}] has {name!r}: it is a mapping with any of {', '.join(names)}")
            kind = KINDS.get(name, (int, float))
            if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
                raise ValueError(f"settings[{index}] has {value!r} for {name}: give {_words(name)}")
    return each_of([replace(settings, **change) for change in changes])


def _words(name: str) -> str:
    return {int: "a whole number", str: "the name of a class of diffusers"}.get(KINDS.get(name, float), "a number")


def recorded(settings: Settings) -> dict[str, Any]:
    """The settings as files have them: by name, or where there are several as a list of such objects.

    A scheduler that is the pipeline's own is left out.
    """
    entries = [{k: v for k, v in asdict(one).items() if k != "scheduler" or v} for one in each_of(settings)]
    return entries[0] if len(entries) == 1 else {"settings": entries}


def of_record(record: Mapping[str, Any]) -> tuple[SamplingSettings, ...]:
    """The settings that a file has, as `recorded` gave them among other entries."""
    names = [field.name for field in fields(SamplingSettings)]
    entries = record.get("settings", [record])
    return tuple(SamplingSettings(**{name: one[name] for name in names if name in one}) for one in entries)


def sample_number(call: int, setting: int, settings: int) -> int:
    """The number of the sample that one call draws at one of several settings; the call's own where there is one.

    Two calls at one setting follow two at another, so that the halves of the calls that judge each other, which are
    told by even and odd numbers, are the same at all settings.
    """
    return call // 2 * 2 * settings + 2 * setting + call % 2


def setting_of(sample: int, settings: int) -> int:
    """Which of several settings a sample is drawn at, by its number."""
    return sample % (2 * settings) // 2


def with_defaults(settings: SamplingSettings) -> SamplingSettings:
    """The settings of prompts: 20 steps with guidance by 7.5, where they do not say."""
    plain, given = SamplingSettings(), settings.arguments()
    return replace(
        settings,
        num_inference_steps=given.get("num_inference_steps", plain.num_inference_steps),
        guidance_scale=given.get("guidance_scale", plain.guidance_scale),
    )
