"""What is counted in an OpenVINO graph, and how a model gets there; OpenVINO itself need not be installed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.study import openvino_peer
from benchmarks.study.inspect_model import LayerCounts, inspect_model
from ldmq_kernels.calibration.trajectory import UNetCall


class _Type:
    def __init__(self, size: int, is_real: bool) -> None:
        self.size, self._is_real = size, is_real

    def is_real(self) -> bool:
        return self._is_real


class _Node:
    """A node of a graph, as OpenVINO's answers."""

    def __init__(self, kind: str, *inputs: _Node, values: int = 0, size: int = 4) -> None:
        self.kind, self.inputs, self.values, self.size = kind, inputs, values, size

    def get_type_name(self) -> str:
        return self.kind

    def input_value(self, index: int) -> _Node:
        return self.inputs[index]

    def get_node(self) -> _Node:
        return self

    def get_element_type(self) -> _Type:
        return _Type(self.size, self.size > 1)

    def get_data(self) -> Any:
        return np.zeros(self.values)


class _Graph:
    def __init__(self, *ends: _Node) -> None:
        self.ends = ends

    def get_ordered_ops(self) -> list[_Node]:
        found: dict[int, _Node] = {}

        def visit(node: _Node) -> None:
            for given in node.inputs:
                visit(given)
            found[id(node)] = node

        for end in self.ends:
            visit(end)
        return list(found.values())


def _weight(values: int, size: int) -> _Node:
    scale = _Node("Constant", values=2)
    return _Node("Multiply", _Node("Convert", _Node("Constant", values=values, size=size)), scale)


def test_layers_are_counted_by_what_they_store_and_multiply() -> None:
    given = _Node("Parameter")
    rounded = _Node("Reshape", _Node("FakeQuantize", given))
    convolution = _Node("Convolution", rounded, _weight(100, 1))
    stored = _Node("MatMul", convolution, _weight(50, 1))
    plain = _Node("MatMul", _Node("FakeQuantize", stored), _weight(30, 4))
    attention = _Node("MatMul", plain, stored)
    found = openvino_peer._inspected(_Graph(attention))
    assert found.counts == {"conv2d": LayerCounts(1, 1, 1), "linear": LayerCounts(2, 1, 0)}
    assert found.bytes == 100 + 50 + 2 * 30 + 3 * 2 * 2  # int8 weights, a float one, three pairs of scales


def test_a_model_that_was_looked_at_is_not_looked_at_again() -> None:
    model: Any = nn.Linear(2, 2)
    model.inspected = openvino_peer._inspected(_Graph(_Node("MatMul", _Node("Parameter"), _weight(4, 1))))
    x = torch.zeros(1, 2)
    assert inspect_model(model, model, UNetCall(0, (x,), {}, x)) is model.inspected
