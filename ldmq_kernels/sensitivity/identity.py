"""What a pipeline's numbers depend on, as JSON: weights, dtype, configurations and versions."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ldmq_kernels.calibration.denoisers import denoiser, denoiser_name, whole_pipeline
from ldmq_kernels.calibration.drawings import Call
from ldmq_kernels.numerics.checksum import checksum, combined
from ldmq_kernels.version import __version__

LIBRARIES = ("torch", "diffusers", "transformers")


def _versions() -> dict[str, str]:
    found = {"ldmq_kernels": __version__}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # a pipeline of another library
    return found


def _config(component: Any) -> dict[str, Any]:
    """A component's configuration, without where it was loaded from and by which version."""
    config = getattr(component, "config", {})
    entries = config.to_dict() if hasattr(config, "to_dict") else dict(config) if isinstance(config, Mapping) else {}
    kept = {key: value for key, value in entries.items() if not key.startswith("_") and not key.endswith("_version")}
    return json.loads(json.dumps(kept, default=str, sort_keys=True))


def _weights(part: str, module: nn.Module) -> str:
    tensors = {name: tensor for name, tensor in module.state_dict().items() if isinstance(tensor, Tensor)}
    away = next((name for name, tensor in tensors.items() if tensor.is_meta), None)
    if away is not None:
        raise ValueError(
            f"{part}: {away} is not in memory (meta device), so that work could not be told from another model's: keep "
            "the pipeline in memory, or keep no work"
        )
    return combined({f"{name} {t.dtype} {tuple(t.shape)}": checksum(t) for name, t in tensors.items()})


def call_identity(call: Call) -> Any:
    """What a prompt or a call asks for, as JSON: texts and numbers as they are, all else by a digest.

    Raises:
        ValueError: it is a function.
    """
    if isinstance(call, str):
        return call
    if not isinstance(call, Mapping):
        raise ValueError(
            "no file can tell what a forward_loop draws, so that its work could not be told from another's: give "
            "calls, or keep no work"
        )
    described = {str(name): pytree.tree_map(_value_identity, value) for name, value in call.items()}
    return json.loads(json.dumps(described, default=str))


def _value_identity(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, torch.Generator):
        value = value.get_state()
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} {checksum(value.cpu())}"
    content = value.tobytes() if hasattr(value, "tobytes") else repr(value).encode()  # a picture, an array
    return f"{type(value).__name__} {getattr(value, 'size', '')} {hashlib.sha256(content).hexdigest()[:16]}"


def pipeline_identity(pipe: Any, prompts: Sequence[str]) -> dict[str, Any]:
    """What the outputs of a pipeline depend on beside its sampling settings.

    The weights of every part are read once; those of SDXL in float32 are 14 GB.

    Args:
        prompts: what its tokenizers are asked for.

    Raises:
        ValueError: a part is offloaded.
    """
    model = denoiser(pipe)
    parts: Mapping[str, Any] = getattr(pipe, "components", None) or {"denoiser": model}
    identity: dict[str, Any] = {
        "pipeline": type(whole_pipeline(pipe)).__name__,
        "part": denoiser_name(pipe),
        "dtype": sorted({str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}),
        "versions": _versions(),
    }
    for name, part in sorted(parts.items()):
        if part is None:
            continue
        described = {"class": type(part).__name__, **_config(part)}
        if isinstance(part, nn.Module):
            described["weights"] = _weights(name, part)
        elif hasattr(part, "convert_tokens_to_ids"):
            tokens = [list(part(text)["input_ids"]) for text in prompts]
            described["tokens"] = hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16]
        identity[name] = described
    return identity
