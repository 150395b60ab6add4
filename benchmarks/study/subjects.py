"""The models that the study is made on, and all that differs between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.study import second_model
from ldmq_kernels import demo
from ldmq_kernels.demo.run import GUIDANCE, STEPS

DEMO, SECOND = "demo", "second"


@dataclass(frozen=True)
class Subject:
    """A trained text-to-image pipeline that draws the demo's scenes.

    Attributes:
        words: what the page calls it.
        load: dtype -> the pipeline, on the CPU.
        enlarged: pixels a side of its pictures for one of those that the evaluator reads.
    """

    name: str
    words: str
    load: Callable[[torch.dtype], Any]
    steps: int
    guidance_scale: float
    enlarged: int


SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject(
            DEMO,
            "the demo model, a UNet of 9.5 million parameters that ships with the package",
            demo.load_demo_pipeline,
            STEPS,
            GUIDANCE,
            1,
        ),
        Subject(
            SECOND,
            "the second model, a transformer of 1.7 million parameters trained by flow matching",
            second_model.load_pipeline,
            second_model.STEPS,
            second_model.GUIDANCE,
            second_model.ENLARGED,
        ),
    )
}
