"""A model of torch as an OpenVINO graph, and calls of it. OpenVINO is imported where it is used, since few have it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ldmq_kernels.calibration.outputs import output_tensor


def tensors_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that a model is called with, in the order in which a converted one takes them."""
    return [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]


class Positional(nn.Module):
    """A model whose tensors come one after the other, as converters want them; all else is as in one call."""

    def __init__(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.leaves, self.form = pytree.tree_flatten((args, kwargs))

    def forward(self, *tensors: Tensor) -> Tensor:
        """The output as a tensor."""
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.form)
        return output_tensor(self.model(*args, **kwargs))


def converted(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The graph of a model, traced in one call."""
    import openvino

    with torch.no_grad():
        shell = Positional(model, args, kwargs).eval()
        return openvino.convert_model(shell, example_input=tuple(tensors_of(args, kwargs)))


def quantized(graph: Any, calls: Sequence[Sequence[Tensor]], ignored: Any = None) -> Any:
    """The graph in int8 by NNCF, with static scales that are calibrated on the tensors of some calls."""
    import nncf

    samples = nncf.Dataset([tuple(tensor.numpy() for tensor in tensors) for tensors in calls])
    kind = nncf.ModelType.TRANSFORMER
    return nncf.quantize(graph, samples, subset_size=len(calls), model_type=kind, ignored_scope=ignored)


def request(graph: Any) -> Any:
    """What runs a graph on this CPU, with as many threads as torch has."""
    import openvino

    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    return openvino.Core().compile_model(graph, "CPU", settings).create_infer_request()
