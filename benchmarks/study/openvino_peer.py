"""OpenVINO's int8 as a model that a pipeline draws with: NNCF's static quantization, calibrated on a trajectory.

OpenVINO runs a graph of its own, in which layers no longer have torch's names: what it stores and multiplies in 8 bits
is counted in that graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from benchmarks.study.inspect_model import Inspection, LayerCounts
from ldmq_kernels.calibration.outputs import output_tensor
from ldmq_kernels.calibration.trajectory import Trajectory, UNetCall
from ldmq_kernels.plans.cost import FLOAT_BYTES

KINDS = {"Convolution": "conv2d", "GroupConvolution": "conv2d", "MatMul": "linear"}
REST = frozenset({"MatMul", "ScaledDotProductAttention", "Add", "Multiply", "Divide", "Subtract"})
OF_WEIGHTS = frozenset({"Convert", "Multiply", "Subtract", "Reshape", "Transpose"})
OF_ACTIVATIONS = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Split", "VariadicSplit", "Concat"})


def _tensors(args: Any, kwargs: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]


class _Positional(nn.Module):
    """A model whose tensors come one after the other; all else is as in one call."""

    def __init__(self, model: nn.Module, call: UNetCall) -> None:
        super().__init__()
        self.model = model
        self.leaves, self.form = pytree.tree_flatten((call.args, call.kwargs))

    def forward(self, *tensors: Tensor) -> Tensor:
        """The output as a tensor."""
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.form)
        return output_tensor(self.model(*args, **kwargs))


class ByOpenVino(nn.Module):
    """A float model by OpenVINO in int8, called as the model is.

    Args:
        model: the float model.
        trajectory: what NNCF calibrates on.
        hybrid: whether only convolutions multiply in 8 bits, and of all else the weights alone are stored so, which is
            what Optimum Intel does with diffusion models.
    """

    def __init__(self, model: nn.Module, trajectory: Trajectory, hybrid: bool) -> None:
        super().__init__()
        import nncf
        import openvino

        self.config, self.dtype, self.device = model.config, model.dtype, model.device
        calls = trajectory.calls
        every = [tuple(_tensors(call.args, call.kwargs)) for call in calls]
        with torch.no_grad():
            converted = openvino.convert_model(_Positional(model, calls[0]).eval(), example_input=every[0])
        samples = nncf.Dataset([tuple(tensor.numpy() for tensor in tensors) for tensors in every])
        ignored = None
        if hybrid:
            converted = nncf.compress_weights(converted, ignored_scope=nncf.IgnoredScope(types=["Convolution"]))
            rest = [op.get_friendly_name() for op in converted.get_ordered_ops() if op.get_type_name() in REST]
            ignored = nncf.IgnoredScope(names=rest)
        made = nncf.quantize(
            converted, samples, subset_size=len(every), model_type=nncf.ModelType.TRANSFORMER, ignored_scope=ignored
        )
        self.inspected = _inspected(made)
        settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
        self._request = openvino.Core().compile_model(made, "CPU", settings).create_infer_request()

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        """The output alone, as of a model that returns no dictionary."""
        found = self._request.infer([tensor.numpy() for tensor in _tensors(args, kwargs)])
        return (torch.from_numpy(found[0].copy()),)


def _back(node: Any, through: frozenset[str]) -> Any:
    """What a node's value comes from, past nodes that only change its form."""
    while node.get_type_name() in through:
        node = node.input_value(0).get_node()
    return node


def _inspected(made: Any) -> Inspection:
    """What an OpenVINO graph stores and multiplies in 8 bits; floating constants count in 16 bits."""
    found: dict[str, list[tuple[bool, bool]]] = {kind: [] for kind in KINDS.values()}
    size = 0
    for op in made.get_ordered_ops():
        kind = op.get_type_name()
        if kind == "Constant":
            is_float = op.get_element_type().is_real()
            size += op.get_data().size * (FLOAT_BYTES if is_float else op.get_element_type().size)
        if kind in KINDS:
            weight = _back(op.input_value(1).get_node(), OF_WEIGHTS)
            if weight.get_type_name() == "Constant":  # no product of two activations, as attention has
                is_int8 = weight.get_element_type().size == 1
                rounded = _back(op.input_value(0).get_node(), OF_ACTIVATIONS).get_type_name() == "FakeQuantize"
                found[KINDS[kind]].append((is_int8, is_int8 and rounded))
    counts = {
        kind: LayerCounts(len(of), sum(stored for stored, _ in of), sum(computed for _, computed in of))
        for kind, of in found.items()
    }
    return Inspection(counts, frozenset(), frozenset(), size)
