"""A call whose beginning is not computed again gives the same bits as a whole one, and computes less."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldmq_kernels.calibration.trajectory import UNetCall
from ldmq_kernels.nn import quantized_class
from ldmq_kernels.numerics.formats import SCHEMES
from ldmq_kernels.plans.layers import quantizable_layers
from ldmq_kernels.sensitivity.beginnings import Beginnings
from ldmq_kernels.sensitivity.output_noise import swapped
from python_tests.tiny import tiny_unet, unet_inputs


def call_of(model: nn.Module, *args: Any, **kwargs: Any) -> UNetCall:
    with torch.no_grad():
        output = model(*args, **kwargs)
    return UNetCall(0, args, kwargs, output if isinstance(output, Tensor) else output.sample)


def other(layer: nn.Module) -> nn.Module:
    """The layer quantized."""
    return quantized_class(layer).from_float(layer, SCHEMES["w8a8-dynamic"])


def both(model: nn.Module, call: UNetCall, layer: str, beginnings: Beginnings) -> tuple[Tensor, Tensor]:
    """The output with a layer quantized, of a whole call and of one whose beginning is skipped."""
    quantized = {layer: other(model.get_submodule(layer))}
    with torch.no_grad(), swapped(model, quantized):
        whole = call.run(model)
        with beginnings.skipped(quantized):
            return whole, call.run(model)


def test_every_layer_of_a_unet_has_the_bits_of_a_whole_call() -> None:
    unet = tiny_unet().requires_grad_(False)
    call = call_of(unet, **unet_inputs())
    layers = quantizable_layers(unet)
    beginnings = Beginnings(unet, call, layers)
    for name in layers:
        whole, skipped = both(unet, call, name, beginnings)
        assert torch.equal(whole, skipped), name
        assert not torch.equal(whole, call.output), name
    assert not any("forward" in vars(module) for module in unet.modules())


def test_what_was_done_before_the_layer_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = tiny_unet().requires_grad_(False)
    names = {id(layer): name for name, layer in quantizable_layers(unet).items()}
    call, ran = call_of(unet, **unet_inputs()), []
    beginnings = Beginnings(unet, call, ["up_blocks.0.resnets.0.conv2"])
    for kind in (nn.Linear, nn.Conv2d):
        original = kind.forward

        def forward(layer: nn.Module, x: Tensor, original: Any = original) -> Tensor:
            ran.append(names[id(layer)])
            return original(layer, x)

        monkeypatch.setattr(kind, "forward", forward)
    with torch.no_grad(), beginnings.skipped(["up_blocks.0.resnets.0.conv2"]):
        skipped = call.run(unet)
    assert torch.equal(skipped, call.output)
    assert ran[0] == "up_blocks.0.resnets.0.conv2"
    assert ran[-1] == "conv_out"


class Chain(nn.Module):
    """Two linears, with something between them."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.first, self.between, self.last = nn.Linear(8, 8), between, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 8) to (B, 8)."""
        return self.last(self.between(self.first(x)))


class WritesOver(nn.Module):
    """Adds to what it is given, in its place."""

    def forward(self, x: Tensor) -> Tensor:
        """x + 1."""
        return x.add_(1)


class Keeps(nn.Module):
    """Keeps what it is given for another one, which takes it away."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        """x."""
        self.kept.append(x)
        return x.clone()


class Takes(nn.Linear):
    """Adds what `Keeps` kept, if it did."""

    source: Keeps

    def forward(self, input: Tensor) -> Tensor:
        """(B, 8) to (B, 8)."""
        return super().forward(input + sum(self.source.kept.pop() for _ in list(self.source.kept)))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def test_an_output_that_is_written_over_is_computed_again(x: Tensor) -> None:
    model = Chain(WritesOver()).requires_grad_(False)
    call = call_of(model, x)
    beginnings = Beginnings(model, call, ["last"])
    for _ in range(2):
        whole, skipped = both(model, call, "last", beginnings)
        assert torch.equal(whole, skipped)


def test_a_model_whose_modules_leave_something_for_others_is_run_whole(x: Tensor) -> None:
    model = Chain(Keeps()).requires_grad_(False)
    model.last = Takes(8, 8).requires_grad_(False)
    object.__setattr__(model.last, "source", model.between)
    call = call_of(model, x)
    beginnings = Beginnings(model, call, ["last"])
    with torch.no_grad(), beginnings.skipped(["last"]):
        assert torch.equal(call.run(model), call.output)


def test_a_module_with_hooks_is_run_and_a_replaced_forward_stays(x: Tensor) -> None:
    model, seen = Chain(nn.SiLU()).requires_grad_(False), []
    model.between.forward = lambda given: given * 2
    model.first.register_forward_hook(lambda *_: seen.append(1))
    own = model.between.forward
    call = call_of(model, x)
    beginnings = Beginnings(model, call, ["last"])
    seen.clear()
    with torch.no_grad(), beginnings.skipped(["last"]):
        assert model.between.forward is not own
        call.run(model)
    assert seen == [1]
    assert model.between.forward is own


def test_a_layer_that_never_runs_skips_nothing(x: Tensor) -> None:
    model = Chain(nn.SiLU()).requires_grad_(False)
    model.spare = nn.Linear(8, 8)
    beginnings = Beginnings(model, call_of(model, x), ["spare", "last"])
    with beginnings.skipped(["spare"]):
        assert not any("forward" in vars(module) for module in model.modules())
    with beginnings.skipped(["last"]):
        assert "forward" in vars(model.first)


def test_a_module_that_runs_again_after_the_layer_is_not_skipped(x: Tensor) -> None:
    class Twice(Chain):
        def forward(self, x: Tensor) -> Tensor:
            return self.first(self.last(self.between(self.first(x))))

    model = Twice(nn.SiLU()).requires_grad_(False)
    call = call_of(model, x)
    beginnings = Beginnings(model, call, ["last"])
    whole, skipped = both(model, call, "last", beginnings)
    assert torch.equal(whole, skipped)


class Shares(nn.Module):
    """Linears with one activation between all of them, before and after."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.p = nn.Sequential(nn.Linear(8, 8), act)
        self.q = nn.Sequential(act, nn.Linear(8, 8))
        self.act, self.r = act, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 8) to (B, 8)."""
        return self.r(self.act(self.q(self.p(x))))


class AddsItsInput(nn.Module):
    """x + linear(activation(x)), the activation in place of x."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.lin = nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 8) to (B, 8)."""
        x = self.first(x)
        return x + self.lin(self.act(x))


class TakesAnother(Shares):
    """Asks the shared activation for values of another shape where a layer is skipped."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, 8) to (B, 8)."""
        return self.r(self.act(self.q(self.p(x))[:, :4]).repeat(1, 2))


@pytest.mark.parametrize(
    "model", [Shares(nn.SiLU()), AddsItsInput(), TakesAnother(nn.SiLU())], ids=lambda model: type(model).__name__
)
def test_modules_that_are_shared_or_write_into_their_input_do_no_harm(model: nn.Module, x: Tensor) -> None:
    model.requires_grad_(False)
    call, layers = call_of(model, x), list(quantizable_layers(model))
    beginnings = Beginnings(model, call, layers)
    for layer in layers:
        whole, skipped = both(model, call, layer, beginnings)
        assert torch.equal(whole, skipped), layer


def test_outputs_that_find_no_room_are_computed_again(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Chain(nn.SiLU()).requires_grad_(False)
    monkeypatch.setattr("ldmq_kernels.sensitivity.beginnings.KEPT", x.nbytes)
    call = call_of(model, x)
    beginnings = Beginnings(model, call, ["last"])
    assert beginnings._kept == {"first"}
    whole, skipped = both(model, call, "last", beginnings)
    assert torch.equal(whole, skipped)


@pytest.mark.parametrize(("thorough", "calls"), [(True, 3), (False, 2)])
def test_the_first_layer_is_asked_for_where_that_is_wanted(x: Tensor, thorough: bool, calls: int) -> None:
    model, ran = Chain(nn.SiLU()).requires_grad_(False), []
    call = call_of(model, x)
    model.register_forward_hook(lambda *_: ran.append(1))
    assert Beginnings(model, call, ["first", "last"], thorough=thorough).is_right
    assert len(ran) == calls
