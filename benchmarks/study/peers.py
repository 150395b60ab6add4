"""The peers of the study: each tool, set to quantize all the layers that it can, and this package beside it.

What each one does was read in its source (SDNQ 0.2.8, torchao 0.18.0, optimum-quanto 0.2.7, nvidia-modelopt 0.47.0):
SDNQ leaves out convolutions, small layers and layers of certain names unless told otherwise, and
multiplies in float where a convolution has fewer than 32 channels or a linear fewer than 32 rows.
torchao has no integer convolution. optimum-quanto restores its convolution weights to float in
each call, and scales its activations statically, by a moving average over the calibration run. nvidia-modelopt
rounds floats to 8 bits and back, with static scales of the largest value; TensorRT computes in integers later.
"""

from __future__ import annotations

import copy
import importlib.metadata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import ldmq_kernels
from benchmarks.study.evaluation import Setup, draw_latents, with_unet
from benchmarks.study.own_plans import on_layers, own_plans, plan_of, quantized
from ldmq_kernels.calibration.ranges import ALL_STEPS
from ldmq_kernels.sensitivity.output_noise import output_noise

OURS = "ldmq_kernels"
NOT_INSTALLED = "not installed: pip install --no-deps -r benchmarks/requirements-peers.txt"
MODELOPT = "nvidia-modelopt"
SIMULATED = "simulated: computes in float"
MORE_DB = 0.5  # that a plan on a peer's layers is to have above the peer


@dataclass(frozen=True)
class Quantization:
    """One way to quantize: `build` gives a quantized copy of the setup's UNet."""

    tool: str
    configuration: str
    build: Callable[[Setup], nn.Module]
    note: str = ""

    @property
    def version(self) -> str:
        """The version of the installed package.

        Raises:
            PackageNotFoundError: it is not installed.
        """
        return ldmq_kernels.__version__ if self.tool == OURS else importlib.metadata.version(self.tool)


# -- SDNQ ------------------------------------------------------------------------------------------------


def _sdnq(setup: Setup, **settings: Any) -> nn.Module:
    from sdnq.quantizer import sdnq_post_load_quant

    return sdnq_post_load_quant(copy.deepcopy(setup.unet), weights_dtype="int8", **settings)


def _sdnq_everywhere(setup: Setup) -> nn.Module:
    return _sdnq(
        setup,
        quant_conv=True,
        use_quantized_matmul=True,
        use_quantized_matmul_conv=True,
        minimum_allowed_numel=0,
        minimum_allowed_channel_size=0,
        add_skip_keys=False,
    )


# -- torchao ---------------------------------------------------------------------------------------------


def _torchao(setup: Setup, configuration: str) -> nn.Module:
    from torchao import quantization

    model = copy.deepcopy(setup.unet)
    quantization.quantize_(model, getattr(quantization, configuration)())
    return model


# -- optimum-quanto --------------------------------------------------------------------------------------


def _quanto_weights(setup: Setup) -> nn.Module:
    from optimum import quanto

    model = copy.deepcopy(setup.unet)
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    return model


def _quanto_calibrated(setup: Setup) -> nn.Module:
    from optimum import quanto

    model = copy.deepcopy(setup.unet)
    quanto.quantize(model, weights=quanto.qint8, activations=quanto.qint8)
    with quanto.Calibration(), torch.no_grad():
        _draw_calibration(setup, model)
    quanto.freeze(model)
    return model


# -- nvidia-modelopt -------------------------------------------------------------------------------------

# Which layers NVIDIA's example for diffusers leaves in float: `filter_func_default` in
# https://github.com/NVIDIA/Model-Optimizer/blob/main/examples/diffusers/quantization/utils.py
MODELOPT_SKIPS = (
    "time_emb_proj",
    "time_embedding",
    "conv_in",
    "conv_out",
    "conv_shortcut",
    "add_embedding",
    "pos_embed",
    "time_text_embed",
    "context_embedder",
    "norm_out",
    "x_embedder",
)


def _modelopt(setup: Setup, configuration: Callable[[Any], dict[str, Any]], *, skips: bool) -> nn.Module:
    import modelopt.torch.quantization as mtq

    model = copy.deepcopy(setup.unet)
    config = copy.deepcopy(configuration(mtq))
    model = mtq.quantize(model, config, lambda quantized: _draw_calibration(setup, quantized))
    if skips:
        mtq.disable_quantizer(model, lambda name: any(skip in name for skip in MODELOPT_SKIPS))
    return model


def _modelopt_default(mtq: Any) -> dict[str, Any]:
    """Made for language models: leaves layers named "proj_out" in float, which a UNet's attention has too."""
    return dict(mtq.INT8_DEFAULT_CFG)


def _modelopt_diffusers(mtq: Any) -> dict[str, Any]:
    """What NVIDIA's example for diffusers quantizes with: every linear and every convolution."""
    from modelopt.torch.opt.config_loader import load_config

    config = load_config("configs/ptq/presets/diffusers/int8", schema_type=mtq.config.QuantizeConfig)
    return config.model_dump(exclude_unset=True)


def _modelopt_smoothquant(mtq: Any) -> dict[str, Any]:
    """The example's configuration for SmoothQuant, with its default alpha."""
    return copy.deepcopy(mtq.INT8_SMOOTHQUANT_CFG) | {"algorithm": {"method": "smoothquant", "alpha": 1.0}}


def _draw_calibration(setup: Setup, model: nn.Module) -> None:
    """Draw the calibration's pictures with this UNet, as a tool's own calibration loop."""
    calibration = setup.calibration
    with_unet(setup.pipe, model, lambda: draw_latents(setup.pipe, calibration.calls, calibration.settings))


def baselines() -> list[Quantization]:
    """The other tools, each with all the layers that it can quantize, and as it comes."""
    recipe = "NVIDIA's recipe for diffusers"
    return [
        Quantization("sdnq", "w8a8 dynamic, everywhere", _sdnq_everywhere, "one scale a token or patch"),
        Quantization("sdnq", "as it comes", _sdnq, "weight-only"),
        Quantization("torchao", "w8a8 dynamic", lambda b: _torchao(b, "Int8DynamicActivationInt8WeightConfig")),
        Quantization("torchao", "weight-only", lambda b: _torchao(b, "Int8WeightOnlyConfig")),
        Quantization("optimum-quanto", "w8a8 calibrated", _quanto_calibrated, "rounds some outputs too"),
        Quantization("optimum-quanto", "weight-only", _quanto_weights),
        Quantization(
            MODELOPT, "w8a8 calibrated, everywhere", lambda b: _modelopt(b, _modelopt_diffusers, skips=False), SIMULATED
        ),
        Quantization(
            MODELOPT, "w8a8 calibrated, as it comes", lambda b: _modelopt(b, _modelopt_default, skips=False), SIMULATED
        ),
        Quantization(
            MODELOPT, f"w8a8 calibrated, {recipe}", lambda b: _modelopt(b, _modelopt_diffusers, skips=True), SIMULATED
        ),
        Quantization(
            MODELOPT,
            f"w8a8 calibrated, {recipe}, SmoothQuant",
            lambda b: _modelopt(b, _modelopt_smoothquant, skips=True),
            SIMULATED,
        ),
    ]


# -- this package ----------------------------------------------------------------------------------------


def own_beside(
    peer: Quantization, stored: Iterable[str], computed: Iterable[str], *, searched: bool = False
) -> Quantization:
    """This package on exactly the layers that a peer quantizes, in the peer's kind of arithmetic.

    Args:
        searched: with all of the method for each layer, else with the whole range and nothing more.
    """
    scheme = "w8a8-static" if "calibrated" in peer.configuration else "w8a8-dynamic"
    stored, computed = frozenset(stored), frozenset(computed)

    def build(setup: Setup) -> nn.Module:
        plans = own_plans(setup)
        calibration = plans.calibration(ALL_STEPS)
        choices = plans.searched_choices(scheme) if searched else plans.plain_choices(scheme, plans.whole)
        return quantized(setup, plan_of(setup.unet, on_layers(choices, stored, computed), calibration))

    kind = scheme.replace("-", " ").replace("static", "static, all steps") + (", searched" if searched else "")
    return Quantization(OURS, f"{kind}, layers of {peer.tool} {peer.configuration}", build)


def own_planned_beside(peer: Quantization, stored: Iterable[str], computed: Iterable[str]) -> Quantization:
    """This package's plan on exactly the layers that a peer quantizes, for a little more SQNR than the peer has.

    What the peer has is measured on the prompts that plans are verified on, which no figure is taken from.
    """
    stored, computed = frozenset(stored), frozenset(computed)

    def build(setup: Setup) -> nn.Module:
        reached = output_noise(peer.build(setup), setup.held_out).mean_db
        return quantized(setup, own_plans(setup).on_layers(stored, computed, reached + MORE_DB))

    return Quantization(OURS, f"planned on the layers of {peer.tool} {peer.configuration}", build)
