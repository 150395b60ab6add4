"""Captured modules: what is recorded anew, what is replayed, what is refused; with a stand-in for CUDA graphs."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ldmq_kernels as ldmq
from ldmq_kernels import graphs


class FakeGraph:
    """Replays a call into the memory of its first output."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call
        self.out = call()

    def replay(self) -> None:
        for memory, new in zip(
            graphs.pytree.tree_leaves(self.out), graphs.pytree.tree_leaves(self.call()), strict=True
        ):
            memory.copy_(new)


class FakeGpu(graphs._Gpu):
    """A "GPU" on the CPU."""

    recorded = 0

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        yield

    def record(self, call: Callable[[], Any]) -> tuple[Any, Any]:
        type(self).recorded += 1
        graph = FakeGraph(call)
        return graph, graph.out


class Denoiser(nn.Module):
    """Takes what diffusers' denoisers take."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.types: set[type] = set()

    def forward(self, sample: Tensor, timestep: Any, context: Tensor, scale: float = 1.0, extra: Any = None) -> tuple:
        self.types.add(type(timestep))
        out = sample * self.weight + timestep + context.sum() * scale
        return (out if extra is None else out + extra["more"],)


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> Denoiser:
    monkeypatch.setattr(graphs, "_Gpu", FakeGpu)
    monkeypatch.setattr(FakeGpu, "recorded", 0)
    module = Denoiser().eval()
    module.forward = graphs._Replayer(module, torch.device("cpu"))  # type: ignore[method-assign]
    return module


def call(module: nn.Module, batch: int = 2, timestep: Any = 3, **more: Any) -> Tensor:
    with torch.no_grad():
        return module(torch.full((batch, 4), 2.0), timestep, torch.ones(3), **more)[0]


def test_calls_of_one_shape_replay_one_graph_with_their_own_values(captured: Denoiser) -> None:
    for value in (1.0, 5.0):
        with torch.no_grad():
            out = captured(torch.full((2, 4), value), 3, torch.ones(3))[0]
        assert torch.equal(out, torch.full((2, 4), value + 6))
    assert FakeGpu.recorded == 1


def test_every_time_step_replays_the_same_graph(captured: Denoiser) -> None:
    assert [float(call(captured, timestep=step)[0, 0]) for step in (3, 7, 900)] == [8, 12, 905]
    assert float(call(captured, timestep=torch.tensor(4))[0, 0]) == 9
    with torch.no_grad():
        assert float(captured(torch.ones(2, 4), timestep=9, context=torch.zeros(3))[0][0, 0]) == 10
    assert FakeGpu.recorded == 2
    assert captured.types == {Tensor}


def test_other_shapes_dtypes_and_values_are_recorded_anew(captured: Denoiser) -> None:
    call(captured)
    call(captured, batch=3)
    call(captured, scale=2.0)
    call(captured, extra={"more": torch.ones(4)})
    with torch.no_grad():
        captured(torch.ones(2, 4, dtype=torch.float64), 3, torch.ones(3))
        captured(torch.ones(4, 2).T, 3, torch.ones(3))
    assert FakeGpu.recorded == 6
    call(captured)
    call(captured, scale=2.0)
    call(captured, extra={"more": torch.zeros(4)})
    assert FakeGpu.recorded == 6


class Chooser:
    """As the scales of a timestep: a hook's owner whose work belongs into the recording."""

    is_recorded = True

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def before(self, _module: nn.Module, args: Any, _kwargs: Any) -> None:
        self.seen.append(args[1])


def test_a_hook_that_is_recorded_runs_on_the_recorded_inputs(captured: Denoiser) -> None:
    chooser = Chooser()
    captured.register_forward_pre_hook(chooser.before, with_kwargs=True)
    captured.register_forward_pre_hook(lambda *_: None)
    for timestep in (3, 7):
        call(captured, timestep=timestep)
    given = [seen for seen in chooser.seen if not isinstance(seen, Tensor)]
    recorded = [seen for seen in chooser.seen if isinstance(seen, Tensor)]
    assert given == [3, 7]
    assert len({id(buffer) for buffer in recorded}) == 1
    assert float(recorded[0]) == 7


def test_outputs_are_copies(captured: Denoiser) -> None:
    first = call(captured, timestep=1)
    kept = first.clone()
    call(captured, timestep=2)
    assert torch.equal(first, kept)


def test_the_least_recently_used_graph_goes_first(captured: Denoiser) -> None:
    for batch in range(1, graphs.MOST_GRAPHS + 1):
        call(captured, batch=batch)
    call(captured, batch=1)
    call(captured, batch=100)
    assert FakeGpu.recorded == graphs.MOST_GRAPHS + 1
    call(captured, batch=1)
    assert FakeGpu.recorded == graphs.MOST_GRAPHS + 1
    call(captured, batch=2)
    assert FakeGpu.recorded == graphs.MOST_GRAPHS + 2


def test_a_graph_recorded_in_inference_mode_replays_outside_of_it(captured: Denoiser) -> None:
    with torch.inference_mode():
        assert float(captured(torch.ones(2, 4), 3, torch.ones(3))[0][0, 0]) == 7
    assert float(call(captured)[0, 0]) == 8
    assert FakeGpu.recorded == 1


def test_a_call_that_needs_gradients_runs_the_module(captured: Denoiser) -> None:
    captured(torch.ones(2, 4, requires_grad=True), 3, torch.ones(3))[0].sum().backward()
    assert FakeGpu.recorded == 0


def test_an_argument_that_cannot_be_told_by_its_value_is_refused(captured: Denoiser) -> None:
    with pytest.raises(graphs.CaptureError, match="set"):
        call(captured, extra={1, 2})


def test_an_output_that_cannot_be_replayed_is_refused(captured: Denoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    replayer: Any = vars(captured)["forward"]
    monkeypatch.setattr(replayer, "forward", lambda *_: object())
    with pytest.raises(graphs.CaptureError, match="returns a object"):
        call(captured)


def test_release_gives_the_module_back(captured: Denoiser) -> None:
    call(captured)
    assert ldmq.release(captured) is captured
    call(captured)
    assert captured.types == {Tensor, int}
    assert ldmq.release(captured) is captured


def test_an_input_elsewhere_is_refused(captured: Denoiser) -> None:
    with pytest.raises(graphs.CaptureError, match="meta"):
        captured(torch.ones(2, 4, device="meta"), 3, torch.ones(3))


def test_moved_weights_are_refused(captured: Denoiser) -> None:
    call(captured)
    captured.double()
    with pytest.raises(graphs.CaptureError, match="release it first"):
        call(captured)


@pytest.mark.parametrize("clone", [copy.deepcopy, pickle.dumps])
def test_a_captured_module_is_not_copied(captured: Denoiser, clone: Callable[[Any], Any]) -> None:
    with pytest.raises(graphs.CaptureError, match="release it first"):
        clone(captured)
    clone(ldmq.release(captured))


def test_what_cannot_be_captured_says_why(captured: Denoiser) -> None:
    with pytest.raises(graphs.CaptureError, match="captured already"):
        ldmq.capture(captured)
    with pytest.raises(graphs.CaptureError, match="training mode"):
        ldmq.capture(Denoiser())
    with pytest.raises(graphs.CaptureError, match="on cpu: CUDA graphs need all of it on one GPU"):
        ldmq.capture(Denoiser().eval())
    hooked = Denoiser().eval()
    hooked.forward = hooked.forward  # type: ignore[method-assign]
    with pytest.raises(graphs.CaptureError, match="hooked"):
        ldmq.capture(hooked)
