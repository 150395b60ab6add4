"""What config.json says of the tensors beside it: a checksum of each, made while saving and compared while loading.

A quantized layer's tensors are compared bit for bit. The dtype of the others may change rightly, by `torch_dtype`, by a
variant or in another program: they have a checksum in their own dtype and one in each narrower one. How tensors are
spread over files, and adapters such as LoRA, do not matter.
"""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ldmq_kernels.nn import QuantizedLayer
from ldmq_kernels.nn.guard import is_finite
from ldmq_kernels.numerics.checksum import checksum
from ldmq_kernels.plans.plan import LayerPlan

MARK = {"ldmq_checksums": "in config.json"}  # in the metadata of safetensors files
FLOATS = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SAVE_AGAIN = "save it again, or copy config.json and tensors of one save"


class CheckpointError(ValueError):
    """A checkpoint that does not hold what its config.json says."""


# -- saving ------------------------------------------------------------------------------------------


def plan_checksum(plan: Mapping[str, Any]) -> str:
    """Of a plan as config.json holds it, whatever the order of its entries."""
    return f"{zlib.crc32(json.dumps(plan, sort_keys=True).encode()):08x}"


def checksums(model: nn.Module, plan: Mapping[str, Any]) -> dict[str, Any]:
    """What a model's config.json says of its plan and its tensors.

    Args:
        plan: as config.json holds it.

    Raises:
        CheckpointError: a tensor is not in memory, or holds a value that could not be loaded again.
    """
    exact = _stored_by_layers(model)
    tensors: dict[str, Any] = {}
    for name, tensor in without_adapters(model.state_dict()).items():
        if tensor.is_meta:
            raise CheckpointError(f"{name} is not in memory (meta device): save before offloading, or remove its hooks")
        if name in exact:
            _check_before_saving(name, *exact[name], tensor)
        if name in exact or not tensor.is_floating_point():
            tensors[name] = f"{checksum(tensor):08x}"
            continue
        if not is_finite(tensor):
            raise CheckpointError(f"{name} holds NaN or infinite values: such a model is not saved")
        tensors[name] = {_name(dtype): f"{checksum(tensor.to(dtype)):08x}" for dtype in _and_narrower(tensor.dtype)}
    return {"plan": plan_checksum(plan), "tensors": tensors}


def _check_before_saving(name: str, layer: QuantizedLayer, leaf: str, tensor: Tensor) -> None:
    try:
        layer.scheme.check(leaf, tensor)
    except ValueError as error:
        raise CheckpointError(f"{name.rpartition('.')[0]}: {error}: such a model is not saved") from None


def without_adapters(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict as it is without PEFT's layers: the layer that each of them wraps, by its own name."""
    wrapped = {name.partition(".base_layer.")[0] + "." for name in tensors if ".base_layer." in name}
    kept = {}
    for name, tensor in tensors.items():
        if ".base_layer." in name or not any(name.startswith(layer) for layer in wrapped):
            kept[name.replace(".base_layer.", ".")] = tensor
    return kept


def _stored_by_layers(model: nn.Module) -> dict[str, tuple[QuantizedLayer, str]]:
    """The tensors that quantized layers store, by name: the layer, and what it calls the tensor."""
    return {
        f"{name}.{leaf}".replace(".base_layer.", "."): (layer, leaf)
        for name, layer in model.named_modules()
        if isinstance(layer, QuantizedLayer)
        for leaf in layer.scheme.dtypes
    }


def _and_narrower(dtype: torch.dtype) -> Sequence[torch.dtype]:
    known = list(FLOATS.values())
    return known[known.index(dtype) :] if dtype in known else (dtype,)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -- loading -----------------------------------------------------------------------------------------


def check_form(said: Any) -> None:
    """Refuse what no `checksums` gives.

    Raises:
        CheckpointError: it is no object of a plan's checksum and of one or more for each tensor.
    """
    tensors = said.get("tensors") if isinstance(said, Mapping) else None
    entries = tensors.values() if isinstance(tensors, Mapping) else [None]
    if not all(isinstance(e, str) or (isinstance(e, Mapping) and e and all(d in FLOATS for d in e)) for e in entries):
        raise CheckpointError(f"config.json is damaged: its checksums are not those of tensors: {SAVE_AGAIN}")


def refuse_marked(files: Sequence[str]) -> None:
    """Refuse tensors that were saved with checksums, for a config.json that has none.

    Raises:
        CheckpointError: one of the files says so in its metadata.
    """
    for file in files:
        if is_marked(file):
            raise CheckpointError(
                f"{Path(file).name} was saved with checksums in its config.json, this config.json has none: "
                f"it is damaged or of another save: {SAVE_AGAIN}"
            )


def is_marked(file: str) -> bool:
    """Whether a file is one of a quantized model, saved with checksums in its config.json."""
    metadata: dict[str, str] = {}
    if file.endswith(".safetensors"):
        with (
            contextlib.suppress(SafetensorError, OSError),
            safe_open(file, "pt") as opened,
        ):  # whoever loads it tells
            metadata = opened.metadata() or {}
    return MARK.items() <= metadata.items()


class TensorChecks:
    """Checks the files of a checkpoint, one after another, before a tensor of them is taken.

    Args:
        model: with its quantized layers, everything on the meta device.
        layer_plans: what each layer becomes.
        said: the tensors' entry of `checksums`; None in a checkpoint that has none.
        files: in the order in which they come.
        own: tensors that are checked where they are quantized.
    """

    def __init__(
        self,
        model: nn.Module,
        layer_plans: Mapping[str, LayerPlan],
        said: Mapping[str, Any] | None,
        files: Sequence[str],
        own: Sequence[str] = (),
    ) -> None:
        self.expected = {
            name: (tensor.shape, tensor.is_floating_point()) for name, tensor in model.state_dict().items()
        }
        self.by_layers = _stored_by_layers(model)
        self.layers = {name.rpartition(".")[0] for name in self.by_layers}
        self.layer_plans, self.said, self.own = layer_plans, said, set(own)
        self.files = [Path(file).name for file in files]
        self.found: set[str] = set()
        self.read = 0

    def check_file(self, tensors: Mapping[str, Tensor]) -> None:
        """Check the tensors of the next file: that each is right and in no other file, in the end that none is missing.

        Raises:
            CheckpointError: a tensor is not what the model, its plan or its checksum says.
        """
        file = self.files[self.read] if self.read < len(self.files) else "the checkpoint"
        for name, tensor in tensors.items():
            try:
                self._check(name, tensor)
            except ValueError as error:
                raise CheckpointError(f"{error} ({file})") from None
        twice = sorted(self.found & tensors.keys())
        if twice:
            raise CheckpointError(
                f"{twice[0]} is in two files, of which {file} is the second: a file has another one's name or is of "
                f"another save: {SAVE_AGAIN}"
            )
        self.found |= tensors.keys()
        self.read += 1
        missing = sorted(self.expected.keys() - self.found)
        if missing and self.read >= len(self.files):
            raise CheckpointError(
                f"{file} was the last file and {missing[0]} is in none: a file has another one's name or is of "
                f"another save: {SAVE_AGAIN}"
            )

    def _check(self, name: str, tensor: Tensor) -> None:
        if name not in self.expected:
            self._check_unexpected(name)
            return
        shape, is_floating = self.expected[name]
        if tensor.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} in the checkpoint, {tuple(shape)} is needed: the checkpoint "
                "and its config.json do not belong together"
            )
        is_as_said = self.said is not None and self._is_as_said(name, tensor)
        if name in self.by_layers:
            self._check_stored(name, tensor, is_as_said)
        elif tensor.is_floating_point() != is_floating:
            needed = "a floating dtype" if is_floating else "an integer dtype"
            raise ValueError(f"{name} is {tensor.dtype}, {needed} is needed: the checkpoint is damaged: {SAVE_AGAIN}")
        elif is_floating and name not in self.own and not is_finite(tensor):
            raise ValueError(f"{name} holds a value that is not finite: the checkpoint is damaged: {SAVE_AGAIN}")
        if self.said is not None and not is_as_said:
            raise ValueError(
                f"{name} is not what config.json was saved with: the file is damaged, or of another save: {SAVE_AGAIN}"
            )

    def _check_unexpected(self, name: str) -> None:
        layer, _, leaf = name.rpartition(".")
        unsaid = self.said is not None and name not in self.said
        if unsaid or layer in self.layers:
            raise ValueError(
                f"{layer or name}: {leaf} is in the file, and nothing in config.json says so: they are of two "
                f"saves: {SAVE_AGAIN}"
            )

    def _check_stored(self, name: str, tensor: Tensor, is_as_said: bool) -> None:
        layer, leaf = self.by_layers[name]
        if is_as_said and tensor.dtype == layer.scheme.dtypes[leaf] and not tensor.is_floating_point():
            return  # to look at each integer takes longer than the checksum
        layer_name = name.rpartition(".")[0]
        try:
            layer.scheme.check(leaf, tensor)
        except ValueError as error:
            raise ValueError(f"{layer_name}: {error}") from None
        if leaf == "input_scale":
            planned = torch.tensor(self.layer_plans[layer_name].scales, dtype=torch.float32, device="cpu")
            if not torch.equal(tensor, planned):
                raise ValueError(
                    f"{layer_name}: input_scale is {tensor.tolist()}, the plan in config.json says {planned.tolist()}: "
                    f"they are of two saves: {SAVE_AGAIN}"
                )

    def _is_as_said(self, name: str, tensor: Tensor) -> bool:
        said = (self.said or {}).get(name)
        if said is None or isinstance(said, str):
            return said == f"{checksum(tensor):08x}"
        # wider than when it was saved, where a variant beside it was saved last: as that one
        dtype = _name(tensor.dtype)
        dtype = dtype if dtype in said else next(name for name in FLOATS if name in said)
        return said[dtype] == f"{checksum(tensor.to(FLOATS[dtype])):08x}"
