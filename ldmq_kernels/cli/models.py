"""Local diffusers directories: what they are, how they load, and in what they are stored."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldmq_kernels.calibration.denoisers import DENOISERS, OTHERS
from ldmq_kernels.cli.quiet import quiet_libraries
from ldmq_kernels.files import NotJsonError, alias_in_ascii, printable, read_json
from ldmq_kernels.files.variants import PIPELINE_FILE, chosen_variant, weights_of

MODEL_FILE = "config.json"
# str.splitlines parts lines at these too; a byte order mark is no letter
_IN_A_LINE = {ord(mark): " " for mark in "\v\f\x1c\x1d\x1e\x85\u2028\u2029"} | {0xFEFF: None}
STORED_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class ModelError(ValueError):
    """A directory that is not a model which the command can take."""


@dataclass(frozen=True)
class Loading:
    """How the weights of a directory are loaded.

    Attributes:
        dtype: float32, bfloat16 or float16, to compute in.
        variant: of the files that are loaded, such as fp16 for *.fp16.safetensors; None for plain ones, or the only
            variant that is there.
    """

    dtype: str = "float32"
    variant: str | None = None


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not blank.

    Lines end as in files of Unix, Windows or old Macs. What else parts lines in some programs, such as the line
    separator of Unicode or a form feed, comes with copied text, and is a space; byte order marks are left out.

    Raises:
        ValueError: there is no such file, it is not text, or it holds no prompt.
    """
    shown = printable(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"there is no prompt file {shown}: write one prompt a line into it") from None
    except (UnicodeDecodeError, IsADirectoryError):
        raise ValueError(f"{shown} is not a text file in UTF-8: it must hold one prompt a line") from None
    lines = text.translate(_IN_A_LINE).split("\n")  # read_text makes each end of a line "\n"
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{shown} holds no prompt: write one prompt a line into it")
    return prompts


def _read_config(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except NotJsonError as error:
        raise ModelError(str(error)) from None
    if not isinstance(content, dict):
        raise ModelError(f"{printable(path)} is not a diffusers configuration: it holds no JSON object")
    return content


def denoiser_folder(folder: Path, part_name: str | None = None) -> Path:
    """The folder of the UNet (or transformer) in a pipeline directory; the directory itself if it is one.

    Args:
        part_name: the denoiser that is meant, where the pipeline has several, or its VAE or what steers it; the first
            denoiser if None.

    Raises:
        ModelError: there is no such directory, it is not diffusers', or its UNet is quantized already.
    """
    if not folder.exists():
        raise ModelError(f"there is no model directory {folder}: give the path of a local diffusers model")
    if not folder.is_dir():
        raise ModelError(
            f"{folder} is a file: give the diffusers directory, with {PIPELINE_FILE} or {MODEL_FILE} in it"
        )
    if (folder / PIPELINE_FILE).exists():
        parts = _read_config(folder / PIPELINE_FILE)
        names = [name for name in DENOISERS if name in parts]
        known = [*names, *(name for name in OTHERS if name in parts)]
        if part_name is not None and part_name not in known:
            raise ModelError(f"{folder} has no part {part_name!r}: choose {' or '.join(known) or 'none'}")
        part = folder / (part_name or names[0]) if names else None
        if part is None:
            raise ModelError(
                f"{folder} is a {parts.get('_class_name')}, with neither a unet nor a transformer to quantize"
            )
    else:
        part = folder
    if not (part / MODEL_FILE).exists():
        raise ModelError(f"{folder} is not a diffusers directory: there is no {part / MODEL_FILE}")
    config = _read_config(part / MODEL_FILE)
    if "_class_name" not in config:
        raise ModelError(f"{folder} is not a diffusers directory: {part / MODEL_FILE} has no _class_name")
    if "quantization_config" in config:
        method = (config["quantization_config"] or {}).get("quant_method", "an unknown method")
        raise ModelError(f"{folder} is quantized already, with {method}: give the full-precision model")
    return part


def is_pipeline(folder: Path) -> bool:
    """Whether the directory holds a whole pipeline."""
    return (folder / PIPELINE_FILE).exists()


def _model_class(folder: Path) -> Any:
    import diffusers

    name = _read_config(folder / MODEL_FILE)["_class_name"]
    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ModelError(f"{folder / MODEL_FILE}: diffusers {diffusers.__version__} has no model class {name}")
    return kind


def pipeline_class(folder: Path) -> Any:
    """The class of the pipeline in a directory, of which nothing is loaded.

    Raises:
        ModelError: as `denoiser_folder`, or the directory holds a model alone or a pipeline that diffusers has not.
    """
    quiet_libraries()
    import diffusers

    if denoiser_folder(folder) == folder:
        raise ModelError(f"{folder} is a model alone: calls are those of a whole pipeline's directory")
    name = _read_config(folder / PIPELINE_FILE).get("_class_name")
    kind = getattr(diffusers, str(name), None)
    if not isinstance(kind, type):
        raise ModelError(f"{folder / PIPELINE_FILE}: diffusers {diffusers.__version__} has no pipeline {name}")
    return kind


def load_structure(folder: Path, part_name: str | None = None) -> nn.Module:
    """The UNet of a directory with no weights in it, on the meta device.

    Raises:
        ModelError: as `denoiser_folder`, or diffusers cannot build it.
    """
    quiet_libraries()
    part = denoiser_folder(folder, part_name)
    kind = _model_class(part)
    try:
        with torch.device("meta"):
            model: nn.Module = kind.from_config(_read_config(part / MODEL_FILE))
    except Exception as error:
        raise ModelError(f"{part} cannot be built: {error}") from error
    return model


def load(folder: Path, how: Loading) -> Any:
    """A pipeline, or the model alone where that is what the directory holds, on the best device.

    Raises:
        ModelError: as `denoiser_folder`, or diffusers cannot load it.
        VariantError: as `chosen_variant`.
    """
    quiet_libraries()
    import diffusers

    part = denoiser_folder(folder)
    kind = diffusers.DiffusionPipeline if is_pipeline(folder) else _model_class(part)
    variant = chosen_variant(folder, how.variant)
    chosen = {"torch_dtype": getattr(torch, how.dtype), "variant": variant, "local_files_only": True}
    try:
        with alias_in_ascii(folder) as place:
            loaded: Any = kind.from_pretrained(place, **chosen)
    except Exception as error:
        raise ModelError(f"{folder} cannot be loaded: {error}") from error
    if is_pipeline(folder):
        loaded.set_progress_bar_config(disable=True)
    return loaded.to("cuda" if torch.cuda.is_available() else "cpu")


def load_pipeline(folder: Path, how: Loading) -> Any:
    """A pipeline that can draw.

    Raises:
        ModelError: as `load`, or the directory holds a model alone.
    """
    part = denoiser_folder(folder)
    if part == folder:
        raise ModelError(
            f"{folder} is a model alone: planning draws pictures, give the whole pipeline's directory "
            "(`ldmq quantize --plan` takes a model alone)"
        )
    return load(folder, how)


def _stored_dtypes(file: Path) -> Iterator[torch.dtype]:
    """The dtypes of a file's tensors, in order; the tensors themselves are not read."""
    if file.suffix == ".bin":
        tensors = torch.load(file, map_location="meta", weights_only=True, mmap=True)
        yield from (tensor.dtype for tensor in tensors.values() if isinstance(tensor, torch.Tensor))
        return
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    names = (entry["dtype"] for name, entry in header.items() if name != "__metadata__")
    yield from (STORED_DTYPES[name] for name in names if name in STORED_DTYPES)


def _stored_dtype(folder: Path, variant: str | None) -> torch.dtype | None:
    """The float dtype of what diffusers loads from a folder: the variant where it is, *.safetensors before *.bin."""
    by_variant = weights_of(folder)
    candidates = by_variant.get(variant) or by_variant.get(None, [])
    for ending in (".safetensors", ".bin"):
        files = [file for file in candidates if file.suffix == ending]
        found = (dtype for file in files for dtype in _stored_dtypes(file) if dtype in STORED_DTYPES.values())
        dtype = next(found, None)
        if dtype is not None:
            return dtype
    return None


def to_stored_dtype(loaded: Any, folder: Path, variant: str | None) -> None:
    """Bring every part back to the dtype that its directory stores, so that saving does not widen it."""
    parts, variant = dict(loaded.components) if is_pipeline(folder) else {".": loaded}, chosen_variant(folder, variant)
    for name, part in parts.items():
        dtype = _stored_dtype(folder / name, variant) if isinstance(part, nn.Module) else None
        if dtype is not None:
            part.to(dtype)
