"""The cases of the study: every configuration by name, and how its UNet is made.

Published lists of layers to leave in float are reproduced as far as the model has these layers; each case says where
its list stands.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from benchmarks.study.evaluation import Setup
from benchmarks.study.own_plans import UNCHANGED, OwnPlans, own_plans, plan_bytes, plan_of, quantized
from benchmarks.study.subjects import DEMO, SECOND
from ldmq_kernels.calibration.ranges import ALL_STEPS, DRAWN_STEPS, FIRST_STEP, SAMPLED_STEPS
from ldmq_kernels.plans.plan import Plan
from ldmq_kernels.sensitivity.candidates import Method

STATIC, TIMESTEP, DYNAMIC, ROTATED, W4_STATIC = (
    "w8a8-static",
    "w8a8-timestep",
    "w8a8-dynamic",
    "w8a8-rotated",
    "w4a8-static",
)
FLOAT8 = ("fp8-static", "fp8-dynamic")
MODES = {
    FIRST_STEP: "first step",
    SAMPLED_STEPS: "sampled steps",
    DRAWN_STEPS: "drawn steps",
    ALL_STEPS: "all steps",
}
PARTS = {
    "smoothing": Method(smoothing=False),
    "ranges": Method(ranges=False),
    "bias correction": Method(bias_correction=False),
    "first token in 16 bit": Method(first_token=False),
}
SMOOTHQUANT_ALPHA = 0.5
BOTH_SIGNALS = ("sqnr", "ssim")


@dataclass(frozen=True)
class SkipList:
    """Layers that someone else leaves in float, by fnmatch patterns, and where that stands.

    Attributes:
        models: names of the study's models that the list was made for the likes of.
    """

    name: str
    patterns: tuple[str, ...]
    source: str
    models: tuple[str, ...] = (DEMO,)

    def has(self, name: str) -> bool:
        """Whether a layer's name fits one of the patterns."""
        return any(fnmatchcase(name, pattern) for pattern in self.patterns)


NVIDIA = SkipList(
    "NVIDIA's list",
    (
        "*time_emb_proj*",
        "*time_embedding*",
        "*conv_in*",
        "*conv_out*",
        "*conv_shortcut*",
        "*add_embedding*",
        "*pos_embed*",
        "*time_text_embed*",
        "*context_embedder*",
        "*norm_out*",
        "*x_embedder*",
    ),
    "NVIDIA Model Optimizer, examples/diffusers/quantization/utils.py, filter_func_default",
    (DEMO, SECOND),
)
SKIP_LISTS = (
    NVIDIA,
    SkipList(
        "first and last convolution",
        ("conv_in", "conv_out"),
        "the usual exception, such as in BRECQ (arXiv 2102.05426) and Q-Diffusion (arXiv 2302.04304)",
    ),
)


@dataclass(frozen=True)
class Case:
    """A configuration, what makes a quantized copy of a setup's UNet, and where it comes from."""

    configuration: str
    build: Callable[[Setup], nn.Module]
    note: str = ""
    source: str = ""
    models: tuple[str, ...] = (DEMO, SECOND)


def _own(
    configuration: str,
    make: Callable[[OwnPlans], Plan],
    note: str = "",
    source: str = "",
    models: tuple[str, ...] = (DEMO, SECOND),
) -> Case:
    return Case(configuration, lambda setup: quantized(setup, make(own_plans(setup))), note, source, models)


# -- one scheme everywhere ---------------------------------------------------------------------------------


def words(scheme: str, mode: str = ALL_STEPS, how: str = "plain") -> str:
    """How a uniform case is called: "w8a8 static, all steps, searched"."""
    calibrated = f", {MODES[mode]}" if scheme.endswith(("static", "timestep")) else ""
    return f"{scheme.replace('-', ' ')}{calibrated}, {how}"


def _formats() -> list[Case]:
    cases = [
        _own(words("w8a16"), lambda p: p.plain("w8a16"), "weight-only"),
        _own(words("w8a16", how="searched"), lambda p: p.searched("w8a16"), "weight-only, biases corrected"),
    ]
    for scheme in (STATIC, TIMESTEP, DYNAMIC, ROTATED):
        cases.append(_own(words(scheme), lambda p, s=scheme: p.plain(s)))
        cases.append(_own(words(scheme, how="searched"), lambda p, s=scheme: p.searched(s)))
    for scheme in FLOAT8:
        cases.append(_own(words(scheme), lambda p, s=scheme: p.plain(s)))
    cases += [
        _own(words(W4_STATIC), lambda p: p.plain(W4_STATIC), "nearest"),
        _own(words(W4_STATIC, how="GPTQ"), lambda p: p.plain(W4_STATIC, rounding="gptq")),
    ]
    return cases


def _calibration() -> list[Case]:
    cases = []
    for mode in (FIRST_STEP, SAMPLED_STEPS, DRAWN_STEPS):
        cases.append(_own(words(STATIC, mode), lambda p, m=mode: p.plain(STATIC, m)))
        cases.append(_own(words(STATIC, mode, "searched"), lambda p, m=mode: p.searched(STATIC, m)))
    return cases


def _search() -> list[Case]:
    alpha = SMOOTHQUANT_ALPHA
    cases = [
        _own(
            words(STATIC, how=f"SmoothQuant {alpha}"),
            lambda p: p.plain(STATIC, alpha=alpha),
            "one alpha for every layer",
            "SmoothQuant (arXiv 2211.10438)",
        )
    ]
    for part, method in PARTS.items():
        cases.append(
            _own(words(STATIC, how=f"searched without {part}"), lambda p, m=method: p.searched(STATIC, method=m))
        )
    return cases


# -- published lists ---------------------------------------------------------------------------------------


def _skipping(plans: OwnPlans, skips: SkipList) -> Plan:
    """W8A8 static, each layer searched, but for those of a published list, which stay in float."""
    searched = plans.searched_choices(STATIC)
    choices = {name: UNCHANGED if skips.has(name) else choice for name, choice in searched.items()}
    return plan_of(plans.setup.unet, choices, plans.calibration(ALL_STEPS))


def skip_words(skips: SkipList) -> str:
    """How a case with a published list is called."""
    return f"{words(STATIC, how='searched')}, but {skips.name}"


def planned_words(skips: SkipList, signals: tuple[str, ...] = ("sqnr",)) -> str:
    """How the plan within the bytes of a list is called."""
    return f"planned by {' and '.join(s.upper() for s in signals)} within the bytes of {skips.name}"


def _lists() -> list[Case]:
    cases = []
    for skips in SKIP_LISTS:
        cases.append(
            _own(skip_words(skips), lambda p, s=skips: _skipping(p, s), source=skips.source, models=skips.models)
        )
        for signals in (("sqnr",), BOTH_SIGNALS):
            cases.append(
                _own(
                    planned_words(skips, signals),
                    lambda p, k=skips, s=signals: p.planned(plan_bytes(p.setup.unet, _skipping(p, k)), s),
                    models=skips.models,
                )
            )
    return cases


def cases(model: str = DEMO) -> list[Case]:
    """All that make sense for one of the study's models."""
    return [case for case in (*_formats(), *_calibration(), *_search(), *_lists()) if model in case.models]
