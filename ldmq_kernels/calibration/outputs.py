"""What pipelines and models return, as tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def output_tensor(output: Any) -> Tensor:
    """The tensor in what a model returns: a tensor, or the first of a tuple or an output object.

    Of an encoder it is the parameters of the distribution that it gives. What steers a denoiser, as a ControlNet does,
    gives tensors of several sizes: they follow each other in the rows of one, (N, values).
    """
    if isinstance(output, Tensor):
        return output
    steering = [leaf for leaf in pytree.tree_leaves(_plain(output)) if isinstance(leaf, Tensor)]
    if _steers(output):
        return torch.cat([tensor.flatten(1) for tensor in steering], 1)
    first = output[0]
    parameters = getattr(first, "parameters", None)  # of a diagonal normal distribution
    return parameters if isinstance(parameters, Tensor) else first


def _plain(output: Any) -> Any:
    return tuple(output.values()) if isinstance(output, Mapping) else output


def _steers(output: Any) -> bool:
    """Whether an output is a list of tensors, or begins with one."""
    if isinstance(output, list):
        return True
    first = next(iter(_plain(output)), None)
    return isinstance(first, list | tuple) and all(isinstance(value, Tensor) for value in first)


def output_of(result: Any) -> Tensor | None:
    """What a pipeline draws, as one tensor: its images, its frames, or the first thing that it returns.

    Returns:
        A row for each picture or video, in the pipeline's own layout; None where it is no tensor, array or picture.
    """
    for name in ("images", "frames"):
        if hasattr(result, name):
            return _tensor(getattr(result, name))
    if isinstance(result, Tensor | np.ndarray):
        return _tensor(result)
    try:
        return _tensor(result[0])
    except (TypeError, KeyError, IndexError):
        return None


def _tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if hasattr(value, "getbands"):  # a picture of PIL
        return torch.from_numpy(np.array(value.convert("RGB"))).float() / 255
    if isinstance(value, Sequence) and not isinstance(value, str) and value:
        parts = [_tensor(part) for part in value]
        tensors = [part for part in parts if part is not None]
        if len(tensors) == len(parts) and len({tensor.shape for tensor in tensors}) == 1:
            return torch.stack(tensors)
    return None


def as_pictures(output: Tensor) -> Tensor:
    """(N, 3, H, W) float32 on the CPU of drawn pictures; of a video, its middle frame.

    Args:
        output: (N, 3, H, W) or (N, H, W, 3), or videos with frames before that, in [0, 1].

    Raises:
        ValueError: these are no pictures with three colours.
    """
    pictures = output.float().cpu()
    if pictures.dim() == 5:
        pictures = pictures[:, pictures.shape[1] // 2]
    if pictures.dim() == 4 and pictures.shape[-1] == 3 and pictures.shape[1] != 3:
        pictures = pictures.permute(0, 3, 1, 2)
    if pictures.dim() != 4 or pictures.shape[1] != 3:
        raise ValueError(
            f"the pipeline draws {tuple(output.shape)}, which are no pictures: they need (N, 3, H, W), or frames of it"
        )
    return pictures
