"""The cases of the study: every configuration by name, and how its UNet is made.

Published lists of layers to leave alone are reproduced as far as the model has these layers; each case says where its
list stands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from benchmarks.study.evaluation import Setup
from benchmarks.study.own_plans import (
    UNCHANGED,
    WEIGHT_ONLY,
    Choices,
    OwnPlans,
    except_for,
    float_bytes,
    own_plans,
    plan_bytes,
    plan_of,
    quantized,
)
from benchmarks.study.peers import MODELOPT_SKIPS, OURS, Quantization, baselines, own_beside, own_planned_beside
from benchmarks.study.subjects import DEMO, SECOND
from ldmq_kernels.calibration.calibrate import calibrate
from ldmq_kernels.calibration.ranges import ALL_STEPS, DRAWN_STEPS, FIRST_STEP, SAMPLED_STEPS
from ldmq_kernels.plans.plan import Plan
from ldmq_kernels.sensitivity.candidates import Method

FORMATS, CALIBRATION, SEARCH, PLANNER, PEERS = "formats", "calibration", "search", "planner", "peers"
SECTIONS = {
    FORMATS: "Formats: the same scheme for every layer",
    CALIBRATION: "Calibration: which steps give a static scale, and which seeds",
    SEARCH: "Search: what each part of it is worth, W8A8 static, calibrated on all steps",
    PLANNER: "Planner: uniform, published lists, and plans within the same bytes",
    PEERS: "Peers: each beside this package on the same layers, and planned within the same bytes",
}
STATIC, TIMESTEP, DYNAMIC, W4_STATIC = "w8a8-static", "w8a8-timestep", "w8a8-dynamic", "w4a8-static"
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
MIXED = ("w4a8", "w8a8", "w8a16", "fp16")
EVERYWHERE = {  # plans that quantize the weights and the activations of every layer: schemes, and the target in dB
    "every layer in W8A8": (("w8a8",), 42.5),
    "every layer in W8A8 without dynamic scales": (("w8a8-static", "w8a8-timestep", "w8a8x2"), 40.0),
}
MIXED_SHARE = 0.32  # of the bytes of weights in 16 bit
CALIBRATION_SEEDS = (1, 2)  # beside the seed 0 of all other cases; noise starts at this many thousands
SMOOTHQUANT_ALPHA = 0.5
W4_BUDGET = "the bytes of W4A8 static"
BOTH_SIGNALS = ("sqnr", "ssim")


@dataclass(frozen=True)
class SkipList:
    """Layers that someone else leaves out of 8-bit computation, by fnmatch patterns, and where that stands.

    Attributes:
        models: names of the study's models that the list was made for the likes of.
    """

    name: str
    patterns: tuple[str, ...]
    weight_only: bool
    source: str
    models: tuple[str, ...] = (DEMO,)


SKIP_LISTS = (
    SkipList(
        "NVIDIA's list",
        tuple(f"*{part}*" for part in MODELOPT_SKIPS),
        False,
        "NVIDIA Model Optimizer, examples/diffusers/quantization/utils.py, filter_func_default",
        (DEMO, SECOND),
    ),
    SkipList(
        "MixDQ's list",
        ("conv_in", "conv_out", "down_blocks.0.resnets.0.conv2", "*.ff.net.2", "up_blocks.1.resnets.1.conv_shortcut"),
        True,
        "MixDQ (arXiv 2405.17873), kernels/cfgs/act/act_8.00.yaml: activations in 16 bit there for the first and "
        "last convolution, conv2 of the first block, five of the ff.net.2, the last shortcut; here all ff.net.2",
    ),
    SkipList(
        "first and last convolution",
        ("conv_in", "conv_out"),
        False,
        "the usual exception, such as in BRECQ (arXiv 2102.05426) and Q-Diffusion (arXiv 2302.04304)",
    ),
)


@dataclass(frozen=True)
class Case:
    """A configuration in a section of the study."""

    section: str
    quantization: Quantization
    source: str = ""
    models: tuple[str, ...] = (DEMO, SECOND)

    @property
    def name(self) -> str:
        """What rows and questions call it."""
        return f"{self.quantization.tool}: {self.quantization.configuration}"


def own_name(configuration: str) -> str:
    """The name of a case of this package."""
    return f"{OURS}: {configuration}"


def _own(
    section: str,
    configuration: str,
    make: Callable[[OwnPlans], Plan],
    note: str = "",
    source: str = "",
    models: tuple[str, ...] = (DEMO, SECOND),
) -> Case:
    def build(setup: Setup) -> nn.Module:
        return quantized(setup, make(own_plans(setup)))

    return Case(section, Quantization(OURS, configuration, build, note), source, models)


# -- one scheme everywhere ---------------------------------------------------------------------------------


def words(scheme: str, mode: str = ALL_STEPS, how: str = "plain") -> str:
    """How a uniform case is called: "w8a8 static, all steps, searched"."""
    calibrated = f", {MODES[mode]}" if scheme.endswith(("static", "timestep")) else ""
    return f"{scheme.replace('-', ' ')}{calibrated}, {how}"


def _formats() -> list[Case]:
    cases = [
        _own(FORMATS, words("w8a16"), lambda p: p.plain("w8a16"), "weight-only"),
        _own(FORMATS, words("w8a16", how="searched"), lambda p: p.searched("w8a16"), "weight-only, biases corrected"),
    ]
    for scheme in (STATIC, TIMESTEP, DYNAMIC):
        cases.append(_own(FORMATS, words(scheme), lambda p, s=scheme: p.plain(s)))
        cases.append(_own(FORMATS, words(scheme, how="searched"), lambda p, s=scheme: p.searched(s)))
    for scheme in FLOAT8:
        cases.append(_own(FORMATS, words(scheme), lambda p, s=scheme: p.plain(s)))
    cases += [
        _own(FORMATS, words(W4_STATIC), lambda p: p.plain(W4_STATIC), "nearest"),
        _own(FORMATS, words(W4_STATIC, how="GPTQ"), lambda p: p.plain(W4_STATIC, rounding="gptq")),
        _own(FORMATS, words(W4_STATIC, how="searched"), lambda p: p.searched(W4_STATIC)),
    ]
    return cases


def _with_seed(plans: OwnPlans, seed: int) -> OwnPlans:
    """Plans of the same pipeline, calibrated from other noise."""
    setup, old = plans.setup, plans.setup.calibration
    settings = replace(old.settings[0], seed=1000 * seed)
    calibration = calibrate(setup.pipe, old.calls, settings)
    return OwnPlans(Setup(setup.pipe, calibration, setup.held_out))


def _calibration() -> list[Case]:
    cases = []
    for mode in (FIRST_STEP, SAMPLED_STEPS, DRAWN_STEPS):
        cases.append(_own(CALIBRATION, words(STATIC, mode), lambda p, m=mode: p.plain(STATIC, m)))
        cases.append(_own(CALIBRATION, words(STATIC, mode, "searched"), lambda p, m=mode: p.searched(STATIC, m)))
    for seed in CALIBRATION_SEEDS:
        for mode in (FIRST_STEP, ALL_STEPS):
            cases += [
                _own(
                    CALIBRATION,
                    words(STATIC, mode, f"plain, seed {seed}"),
                    lambda p, m=mode, s=seed: _with_seed(p, s).plain(STATIC, m),
                ),
                _own(
                    CALIBRATION,
                    words(STATIC, mode, f"searched, seed {seed}"),
                    lambda p, m=mode, s=seed: _with_seed(p, s).searched(STATIC, m),
                ),
            ]
    return cases


def _search() -> list[Case]:
    alpha = SMOOTHQUANT_ALPHA
    cases = [
        _own(
            SEARCH,
            words(STATIC, how=f"SmoothQuant {alpha}"),
            lambda p: p.plain(STATIC, alpha=alpha),
            "one alpha for every layer",
            "SmoothQuant (arXiv 2211.10438)",
        )
    ]
    for part, method in PARTS.items():
        cases.append(
            _own(
                SEARCH, words(STATIC, how=f"searched without {part}"), lambda p, m=method: p.searched(STATIC, method=m)
            )
        )
    return cases


# -- planners ----------------------------------------------------------------------------------------------


def skip_plan(plans: OwnPlans, skips: SkipList, *, searched: bool) -> Plan:
    """W8A8 static, calibrated on all steps, but for the layers of a published list."""
    choices: Choices = plans.searched_choices(STATIC) if searched else plans.plain_choices(STATIC, plans.whole)
    kept = except_for(choices, skips.patterns, WEIGHT_ONLY if skips.weight_only else UNCHANGED)
    return plan_of(plans.setup.unet, kept, plans.calibration(ALL_STEPS))


def skip_words(skips: SkipList, how: str) -> str:
    """How a case with a published list is called."""
    return f"{words(STATIC, how=how)}, but {skips.name}"


def planned_words(budget: str, signals: tuple[str, ...] = ("sqnr",)) -> str:
    """How a planned case is called."""
    return f"planned by {' and '.join(s.upper() for s in signals)} within {budget}"


def everywhere_words(what: str) -> str:
    """How a case that plans every layer in 8 bits is called."""
    return f"planned, {what}, for {EVERYWHERE[what][1]:g} dB"


@dataclass(frozen=True)
class Budget:
    """Bytes that a plan has to keep within."""

    of: Callable[[OwnPlans], int]
    models: tuple[str, ...] = (DEMO, SECOND)


BUDGETS = {
    "the bytes of W8A8 static": Budget(lambda p: plan_bytes(p.setup.unet, p.searched(STATIC))),
    W4_BUDGET: Budget(lambda p: plan_bytes(p.setup.unet, p.searched(W4_STATIC))),
    **{
        f"the bytes of {skips.name}": Budget(
            lambda p, s=skips: plan_bytes(p.setup.unet, skip_plan(p, s, searched=True)), skips.models
        )
        for skips in SKIP_LISTS
    },
}
MIXED_BUDGET = f"{MIXED_SHARE} of the bytes of fp16"


def _planner() -> list[Case]:
    cases = []
    for skips in SKIP_LISTS:
        for how in ("plain", "searched"):
            cases.append(
                _own(
                    PLANNER,
                    skip_words(skips, how),
                    lambda p, s=skips, h=how: skip_plan(p, s, searched=h == "searched"),
                    source=skips.source,
                    models=skips.models,
                )
            )
    for what, budget in BUDGETS.items():
        for signals in (("sqnr",), BOTH_SIGNALS):
            cases.append(
                _own(
                    PLANNER,
                    planned_words(what, signals),
                    lambda p, b=budget, s=signals: p.planned(b.of(p), MIXED, s),
                    models=budget.models,
                )
            )
    for what, (schemes, target) in EVERYWHERE.items():
        cases.append(
            _own(
                PLANNER,
                everywhere_words(what),
                lambda p, s=schemes, t=target: p.reaching(t, s),
            )
        )
    for signals in (("sqnr",), BOTH_SIGNALS):
        cases.append(
            _own(
                PLANNER,
                planned_words(MIXED_BUDGET, signals),
                lambda p, s=signals: p.planned(int(MIXED_SHARE * float_bytes(p.setup.unet)), MIXED, s),
                "W4A8 and W8A8 mixed",
            )
        )
    return cases


# -- peers -------------------------------------------------------------------------------------------------


def followers(peer: Case, row: Mapping[str, Any], known: set[Any]) -> list[Case]:
    """This package beside a peer that was measured: on its layers (plain, searched, planned) and within its bytes.

    Args:
        row: the peer's; "layers" names those that it stores and computes in 8 bits.
        known: sets of layers and budgets that other peers' followers have; this one's are added.
    """
    quantization, layers = peer.quantization, row["layers"]
    stored, computed = layers["stored"], layers["computed"]
    cases = []
    same_layers = ("calibrated" in quantization.configuration, tuple(stored), tuple(computed))
    if computed and same_layers not in known:
        cases += [Case(PEERS, own_beside(quantization, stored, computed, searched=how)) for how in (False, True)]
    if computed:
        cases.append(Case(PEERS, own_planned_beside(quantization, stored, computed)))
    same_bytes = round(row["figures"]["share_of_fp16"], 2)
    budget = f"the bytes of {quantization.tool} {quantization.configuration}"

    def planned(plans: OwnPlans) -> Plan:
        others = layers["bytes_fp16"] - float_bytes(plans.setup.unet)  # norms and biases, as they are in both
        return plans.planned(row["figures"]["bytes"] - others, MIXED)

    if same_bytes not in known:
        cases.append(_own(PEERS, planned_words(budget), planned))
    known |= {same_layers, same_bytes}
    return cases


def cases(model: str = DEMO) -> list[Case]:
    """All that make sense for one of the study's models, but the followers of peers."""
    peers = [Case(PEERS, quantization) for quantization in baselines()]
    every = [*_formats(), *_calibration(), *_search(), *_planner(), *peers]
    return [case for case in every if model in case.models]


def quick_cases() -> list[Case]:
    """Two that take seconds, for tests."""
    return [case for case in _formats() if case.quantization.configuration in (words("w8a16"), words(STATIC))]
