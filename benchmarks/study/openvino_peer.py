"""OpenVINO's int8 as a model that a pipeline draws with: NNCF's static quantization, calibrated on a trajectory.

OpenVINO runs a graph of its own, in which layers no longer have torch's names: what it stores and multiplies in 8 bits
is counted in that graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import by_openvino
from benchmarks.study.inspect_model import Inspection, LayerCounts
from ldmq_kernels.calibration.trajectory import Trajectory
from ldmq_kernels.plans.cost import FLOAT_BYTES

KINDS = {"Convolution": "conv2d", "GroupConvolution": "conv2d", "MatMul": "linear"}
REST = frozenset({"MatMul", "ScaledDotProductAttention", "Add", "Multiply", "Divide", "Subtract"})
OF_WEIGHTS = frozenset({"Convert", "Multiply", "Subtract", "Reshape", "Transpose"})
OF_ACTIVATIONS = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Split", "VariadicSplit", "Concat"})


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
        self.config, self.dtype, self.device = model.config, model.dtype, model.device
        first = trajectory.calls[0]
        graph, ignored = by_openvino.converted(model, first.args, first.kwargs), None
        if hybrid:
            import nncf

            graph = nncf.compress_weights(graph, ignored_scope=nncf.IgnoredScope(types=["Convolution"]))
            rest = [op.get_friendly_name() for op in graph.get_ordered_ops() if op.get_type_name() in REST]
            ignored = nncf.IgnoredScope(names=rest)
        calls = [by_openvino.tensors_of(call.args, call.kwargs) for call in trajectory.calls]
        made = by_openvino.quantized(graph, calls, ignored)
        self.inspected, self._request = _inspected(made), by_openvino.request(made)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        """The output alone, as of a model that returns no dictionary."""
        found = self._request.infer([tensor.numpy() for tensor in by_openvino.tensors_of(args, kwargs)])
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
