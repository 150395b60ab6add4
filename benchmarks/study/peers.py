"""The peers of the study: each tool, set to quantize all the layers that it can, and how it comes.

What each one does was read in its source (SDNQ 0.2.8, torchao 0.18.0, optimum-quanto 0.2.7, nvidia-modelopt 0.47.0):
SDNQ leaves out convolutions, small layers and layers of certain names unless told otherwise, and
multiplies in float where a convolution has fewer than 32 channels or a linear fewer than 32 rows.
torchao has no integer convolution. optimum-quanto restores its convolution weights to float in
each call, and scales its activations statically, by a moving average over the calibration run. nvidia-modelopt
rounds floats to 8 bits and back, with static scales of the largest value; TensorRT computes in integers later.
OpenVINO multiplies in integers what NNCF quantizes, with static scales: of all layers and of attention, or of
convolutions alone, as Optimum Intel has it for diffusion models.
"""

from __future__ import annotations

import copy
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

import ldmq_kernels
from benchmarks.study.cases import NVIDIA
from benchmarks.study.evaluation import Setup, draw_latents, with_unet

OURS = "ldmq_kernels"
NOT_INSTALLED = (
    "not installed: pip install --no-deps -r benchmarks/requirements-peers.txt; pip install -r "
    "benchmarks/requirements-openvino.txt"
)


@dataclass(frozen=True)
class Quantization:
    """One way to quantize: `build` gives a quantized copy of the setup's UNet."""

    tool: str
    configuration: str
    build: Callable[[Setup], nn.Module]

    @property
    def version(self) -> str:
        """The version of the installed package.

        Raises:
            PackageNotFoundError: it is not installed.
        """
        return ldmq_kernels.__version__ if self.tool == OURS else importlib.metadata.version(self.tool)


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


def _torchao(setup: Setup) -> nn.Module:
    from torchao import quantization

    model = copy.deepcopy(setup.unet)
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
    return model


def _quanto(setup: Setup) -> nn.Module:
    from optimum import quanto

    model = copy.deepcopy(setup.unet)
    quanto.quantize(model, weights=quanto.qint8, activations=quanto.qint8)
    with quanto.Calibration(), torch.no_grad():
        _draw_calibration(setup, model)
    quanto.freeze(model)
    return model


def _modelopt(setup: Setup) -> nn.Module:
    """What NVIDIA's example for diffusers does: every linear and every convolution but those of its list."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.opt.config_loader import load_config

    config = load_config("configs/ptq/presets/diffusers/int8", schema_type=mtq.config.QuantizeConfig)
    model = mtq.quantize(
        copy.deepcopy(setup.unet),
        config.model_dump(exclude_unset=True),
        lambda quantized: _draw_calibration(setup, quantized),
    )
    mtq.disable_quantizer(model, NVIDIA.has)
    return model


def _openvino(setup: Setup, hybrid: bool) -> nn.Module:
    from benchmarks.study.openvino_peer import ByOpenVino

    return ByOpenVino(setup.unet, setup.calibration.trajectory, hybrid)


def _draw_calibration(setup: Setup, model: nn.Module) -> None:
    """Draw the calibration's pictures with this UNet, as a tool's own calibration loop."""
    calibration = setup.calibration
    with_unet(setup.pipe, model, lambda: draw_latents(setup.pipe, calibration.calls, calibration.settings))


def peers() -> list[Quantization]:
    """The other tools, each with all the layers that it can quantize, and SDNQ as it comes."""
    return [
        Quantization("sdnq", "w8a8 dynamic, everywhere", _sdnq_everywhere),
        Quantization("torchao", "w8a8 dynamic", _torchao),
        Quantization("sdnq", "as it comes", _sdnq),
        Quantization("openvino", "w8a8 calibrated, by NNCF", partial(_openvino, hybrid=False)),
        Quantization("openvino", "convolutions w8a8 calibrated, by NNCF", partial(_openvino, hybrid=True)),
        Quantization("optimum-quanto", "w8a8 calibrated", _quanto),
        Quantization("nvidia-modelopt", "w8a8 calibrated, NVIDIA's recipe for diffusers", _modelopt),
    ]
