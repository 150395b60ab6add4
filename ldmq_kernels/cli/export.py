"""`ldmq export`: a quantized model in the files of another program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ldmq_kernels.cli.fitted import say
from ldmq_kernels.cli.models import MODEL_FILE, ModelError, is_pipeline
from ldmq_kernels.cli.quiet import quiet_libraries
from ldmq_kernels.files import alias_in_ascii, output_file, printable
from ldmq_kernels.files.variants import chosen_variant, weights_of

NORM = "conv_norm_out.weight"


def run_export(model: Path, out: Path, *, own_layers: bool, variant: str | None = None) -> None:
    """Write the UNet of a quantized directory for ComfyUI, and say what became of its layers."""
    quiet_libraries()
    from ldmq_kernels.integrations.comfyui import check_known, export

    with output_file(out, _is_exported, "file that ldmq export wrote") as write:
        unet = _load_unet(model, variant)
        try:
            check_known(unet.config)
            exported = export(unet, own_layers=own_layers)
        except ValueError as error:
            raise ModelError(f"{printable(model)}: {error}") from None
        write(exported.content)
    for what, count in exported.layers.most_common():
        say(f"{count} layers: {what}")
    folder = "models/diffusion_models"
    nodes = "Load LDMQ Diffusion Model, of the nodes in comfyui/" if own_layers else "Load Diffusion Model"
    say(f"written to {printable(out)}: put it into ComfyUI's {folder}, and load it with the node {nodes}")


def _load_unet(folder: Path, asked: str | None) -> Any:
    from diffusers import UNet2DConditionModel

    part = folder / "unet" if is_pipeline(folder) else folder
    if not (part / MODEL_FILE).exists():
        raise ModelError(f"{printable(folder)} holds no UNet: give the directory that `ldmq quantize` wrote")
    variant = chosen_variant(part, asked)
    try:
        with alias_in_ascii(part) as place:
            given = {"torch_dtype": _dtype_of(place, variant), "variant": variant, "local_files_only": True}
            return UNet2DConditionModel.from_pretrained(place, **given)
    except Exception as error:
        raise ModelError(f"{printable(part)} cannot be loaded: {error}") from error


def _dtype_of(part: Path, variant: str | None) -> torch.dtype:
    """Of the floating-point layers in a folder, whatever scales lie beside them; a norm is one in every plan."""
    from safetensors import safe_open

    for file in weights_of(part).get(variant, []):
        if file.suffix != ".safetensors":
            continue
        with safe_open(file, "pt") as opened:
            if NORM in opened.keys():  # noqa: SIM118  no mapping
                return opened.get_tensor(NORM).dtype
    return torch.float32


def _is_exported(file: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    from ldmq_kernels.integrations.comfyui.export import is_exported

    try:
        with safe_open(file, "pt") as opened:
            return is_exported(opened.metadata())
    except (SafetensorError, OSError):
        return False
