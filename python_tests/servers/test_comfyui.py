"""The nodes in comfyui/ inside ComfyUI's own code, from the source that the variable COMFYUI names, on a CPU."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

import ldmq_kernels as ldmq
from ldmq_kernels.integrations.comfyui import export, ldm_names
from ldmq_kernels.integrations.comfyui.export import PREFIX
from ldmq_kernels.integrations.diffusers.fused import unfuse
from ldmq_kernels.nn import QuantizedLayer
from ldmq_kernels.numerics.sqnr import sqnr_db
from python_tests.tiny import mixed_plan, tiny_unet, unet_inputs

if not os.environ.get("COMFYUI"):
    pytest.skip("COMFYUI names no checkout of ComfyUI", allow_module_level=True)
PACK = Path(__file__).resolve().parents[2] / "comfyui"
LIKE_COMFYUI = {"norm_num_groups": 32, "attention_head_dim": 8}
ATTENDING = {"down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)}
ATTENDING |= {"up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3}
SDXL: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
MODELS = {
    "SD15": {"cross_attention_dim": 768, "attention_head_dim": 8, **ATTENDING},
    "SD20": {
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
        **ATTENDING,
    },
    "SDXL": SDXL,
}


@pytest.fixture(scope="module")
def comfy() -> ModuleType:
    """The package, told that there is no GPU."""
    sys.path.insert(0, os.environ["COMFYUI"])
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import comfy.model_detection
    import comfy.sd
    import comfy.supported_models

    return comfy


@pytest.fixture(scope="module")
def pack(comfy: ModuleType) -> ModuleType:
    """The nodes' files, loaded as ComfyUI loads a folder of custom_nodes, without its menu."""
    for name in ("layers", "loading"):
        package = sys.modules.setdefault("ldmq_nodes", ModuleType("ldmq_nodes"))
        spec = importlib.util.spec_from_file_location(f"ldmq_nodes.{name}", PACK / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        package.__path__ = [str(PACK)]
        spec.loader.exec_module(module)
    return sys.modules["ldmq_nodes.loading"]


@pytest.mark.parametrize("name", MODELS)
def test_comfyui_recognises_the_models_and_every_tensor(comfy: ModuleType, name: str) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, layers_per_block=2, **MODELS[name])
    names = ldm_names(unet)
    renamed = {}
    for key, tensor in unet.state_dict().items():
        place, _, leaf = key.rpartition(".")
        renamed[f"{names[place]}.{leaf}"] = tensor.half()
    config = comfy.model_detection.model_config_from_unet({PREFIX + key: t for key, t in renamed.items()}, PREFIX)
    assert type(config).__name__ == name
    theirs = comfy.utils.unet_to_diffusers(config.unet_config)
    assert {theirs[key] for key in unet.state_dict()} == renamed.keys()


@pytest.fixture(scope="module", params=["w8a8-dynamic", "mixed"])
def unet(request: pytest.FixtureRequest) -> Any:
    """Quantized, with diffusers' own blocks: these round where ComfyUI's do."""
    unet = tiny_unet(**LIKE_COMFYUI)
    if request.param == "mixed":
        return unfuse(ldmq.quantize(unet, mixed_plan(unet)))
    return unfuse(ldmq.quantize(unet, scheme=request.param))


@pytest.fixture
def patcher(comfy: ModuleType, pack: ModuleType, unet: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The file of the small UNet, loaded by the node; ComfyUI is told of its shape."""

    class Small(comfy.supported_models.SD15):
        unet_config = {"context_dim": 32, "model_channels": 32}  # noqa: RUF012  as ComfyUI has them

    monkeypatch.setattr(comfy.supported_models, "models", [Small])
    (tmp_path / "small.safetensors").write_bytes(export(unet, own_layers=True).content)
    return pack.load(str(tmp_path / "small.safetensors"))


def outputs(unet: Any, model: Any, timestep: float) -> tuple[Tensor, Tensor]:
    inputs = unet_inputs() | {"timestep": torch.tensor(timestep)}
    with torch.no_grad():
        expected = unet(**inputs).sample
        times = torch.full((2,), timestep)
        return expected, model(inputs["sample"], times, context=inputs["encoder_hidden_states"])


def test_own_layers_run_inside_comfyui(unet: Any, patcher: Any) -> None:
    model = patcher.model.diffusion_model
    layers = [module for module in model.modules() if isinstance(module, QuantizedLayer)]
    assert len(layers) == sum(isinstance(module, QuantizedLayer) for module in unet.modules())
    assert any(isinstance(layer, ldmq.QuantConv2d) and layer.scheme.quantizes for layer in layers)
    for timestep in (901.0, 321.0, 41.0):
        expected, found = outputs(unet, model, timestep)
        assert sqnr_db(expected, found) > 30  # attention sums in another order, and a value falls to the next integer


def test_timestep_layers_follow_comfyui_s_timesteps(unet: Any, patcher: Any) -> None:
    followed = [layer for layer in patcher.model.diffusion_model.modules() if isinstance(layer, QuantizedLayer)]
    followed = [layer for layer in followed if layer.scheme.has_timestep_scales]
    for timestep in (901.0, 41.0):
        outputs(unet, patcher.model.diffusion_model, timestep)
        for layer in followed:
            group = 0 if timestep == 901.0 else layer.input_scale.numel() - 1
            assert torch.equal(layer.call_scale, layer.input_scale[group : group + 1])
    assert bool(followed) == any(layer.scheme.has_timestep_scales for layer in unet.modules() if is_quantized(layer))


def is_quantized(module: torch.nn.Module) -> bool:
    return isinstance(module, QuantizedLayer) and module.scheme.quantizes


def test_comfyui_counts_the_integers(comfy: ModuleType, unet: Any, patcher: Any) -> None:
    size = comfy.model_management.module_size(patcher.model.diffusion_model)
    float_size = 4 * sum(parameter.numel() for parameter in tiny_unet(**LIKE_COMFYUI).parameters())
    assert size < 0.4 * float_size


def test_a_file_of_another_kind_is_refused(pack: ModuleType, unet: Any, tmp_path: Path) -> None:
    (tmp_path / "int8.safetensors").write_bytes(export(unet).content)
    with pytest.raises(ValueError, match="holds no layers of ldmq_kernels"):
        pack.load(str(tmp_path / "int8.safetensors"))
