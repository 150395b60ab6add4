"""A backend is a folder that registers itself: nothing else is touched for it to serve, be preferred and be raced."""

from __future__ import annotations

import ast
import importlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ldmq_kernels as ldmq
from ldmq_kernels import (
    kernels,
    ops,  # noqa: F401  (defines torch.ops.ldmq)
)
from ldmq_kernels.cli import checks
from ldmq_kernels.kernels import backend as backend_table
from ldmq_kernels.kernels import dispatch, measurements
from ldmq_kernels.kernels.backend import Backend, Packer, backends, usual_order
from ldmq_kernels.nn import QuantLinear
from ldmq_kernels.numerics.formats import SCHEMES
from ldmq_kernels.tuning import calls as tuner_calls
from ldmq_kernels.tuning import tune
from ldmq_kernels.tuning.shapes import Linear

CPU = torch.device("cpu")
OP = "linear_w8a8"
PACKAGE = Path(kernels.__file__).parent

FOLDER = '''
"""A backend of one op."""

from ldmq_kernels.kernels.backend import Backend, register


class _Toy(Backend):
    name = "toy"
    device_type = "cpu"
    rank = 99
    is_raced = True

    def serves(self, device):
        """A CPU."""
        return device.type == "cpu"


backend = register(_Toy())
'''
FUNCTION = '''
"""The definition, and a trace of the call."""

from ldmq_kernels.kernels.backend import backends

CALLS = []


def linear_w8a8(*arguments):
    """As the definition."""
    CALLS.append(arguments)
    return backends()["reference"].linear_w8a8(*arguments)
'''


@pytest.fixture(autouse=True)
def own_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The table of backends, and the measurements of this device, as they are without the test."""
    monkeypatch.setenv("LDMQ_CACHE", str(tmp_path / "cache"))
    before = dict(backends())
    measurements.forget()
    yield
    backend_table._registered.clear()
    backend_table._registered.update(before)
    measurements.forget()
    dispatch.reset_dispatch_report()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """The backend of a folder that was put beside the others."""
    place = tmp_path / "more" / "toy"
    place.mkdir(parents=True)
    (place / "__init__.py").write_text(FOLDER)
    (place / f"{OP}.py").write_text(FUNCTION)
    monkeypatch.setattr(kernels, "__path__", [*kernels.__path__, str(place.parent)])
    backend_table._discover.cache_clear()
    found = backends()["toy"]
    measurements.forget()
    return found


@pytest.fixture(autouse=True)
def forget_the_folder() -> Iterator[None]:
    """Import the folder anew in each test."""
    yield
    for name in [name for name in sys.modules if name.startswith("ldmq_kernels.kernels.toy")]:
        del sys.modules[name]
    vars(kernels).pop("toy", None)
    backend_table._discover.cache_clear()


def call() -> tuple[Any, ...]:
    x_q, weight = torch.randint(-127, 128, (2, 5, 8)).to(torch.int8), torch.randint(-127, 128, (4, 8)).to(torch.int8)
    return x_q, torch.ones(1), weight, torch.ones(4), None, None, torch.float32


def test_a_folder_is_found_and_its_op_is_imported_when_it_is_asked_for(folder: Backend) -> None:
    assert folder.has(OP)
    assert not folder.has("conv2d_w8a8")
    assert f"{type(folder).__module__}.{OP}" not in sys.modules
    assert callable(folder.linear_w8a8)


def test_it_is_preferred_by_its_rank_and_hands_on_what_it_lacks(folder: Backend) -> None:
    assert usual_order(CPU)[0] == "toy"
    arguments = call()
    expected = backends()["reference"].linear_w8a8(*arguments)
    assert torch.equal(torch.ops.ldmq.linear_w8a8(*arguments), expected)
    torch.ops.ldmq.quantize_per_token(torch.ones(2, 8), None)
    report = dispatch.dispatch_report()
    assert "linear_w8a8            toy        cpu             1 calls" in report
    assert "quantize_per_token     toy        refused 1 times: has no such op" in report


def test_it_can_be_asked_for_and_misspelt_names_say_so(folder: Backend) -> None:
    with ldmq.use_backend("toy"):
        torch.ops.ldmq.linear_w8a8(*call())
    assert len(importlib.import_module(f"{type(folder).__module__}.{OP}").CALLS) == 1
    with pytest.raises(ValueError, match="choose one of reference, cpu, cuda, toy, triton"), ldmq.use_backend("tay"):
        pass


def test_doctor_checks_it(folder: Backend) -> None:
    assert checks.served_device("toy") == CPU
    assert checks.check_op(OP, "toy", CPU, torch.float32).verdict == "ok"
    assert checks.check_op("conv2d_w8a8", "toy", CPU, torch.float32).verdict == "refuses"


def test_it_is_raced_and_the_measurement_chooses_it(
    folder: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(Backend):
        name = "slow"
        device_type = "cpu"
        rank = 100
        is_raced = True

        def serves(self, device: torch.device) -> bool:
            return device.type == "cpu"

    slow = backend_table.register(Slow())
    vars(slow)[OP] = backends()["reference"].linear_w8a8
    monkeypatch.setattr(backends()["triton"], "serves", lambda _: False)
    monkeypatch.setattr(tuner_calls, "of_models", lambda *_: ([Linear(1, 10, 8, 4)], []))
    monkeypatch.setattr(tuner_calls, "merged_of", lambda *_: [])

    def timer(_run: Any, _device: torch.device) -> float:
        return {"toy": 1.0, "slow": 2.0}[str(dispatch.forced_backend())]

    assert dispatch.backend_order(OP, call(), CPU)[0] == "slow"
    tune(CPU, timer=timer, names=(OP,), show=False)
    assert dispatch.backend_order(OP, call(), CPU) == ("toy", "slow", "cpu", "reference")


def test_its_packed_weight_is_held_by_a_layer_and_unpacked_for_another_backend(folder: Backend) -> None:
    """Packed here is: under another dtype."""

    def pack(weight: Tensor, multiplier: Tensor | None, channels: int) -> Tensor:
        assert weight.shape[-1] == channels
        return weight.to(torch.int16)

    packer = Packer("toy's int16", lambda w: w.dtype == torch.int16, pack, lambda w, *_: w.to(torch.int8))
    vars(folder)["packer"] = lambda op: packer if op == OP else None
    layer = QuantLinear.from_float(torch.nn.Linear(8, 4), SCHEMES["w8a8-dynamic"])
    assert layer.kernel_weight(as_linear=True).dtype == torch.int16
    assert layer.state_dict()["weight"].dtype == layer.plain_weight.dtype == torch.int8
    assert sum(buffer.nbytes for buffer in layer.buffers()) == 2 * 8 * 4 + 4 * 4  # it is counted where it is held
    assert "packed for toy's int16" in repr(layer)
    measurements.forget()
    x = torch.randn(3, 8)
    with ldmq.use_backend("reference"):
        out = layer(x)
    layer.unpack()
    with ldmq.use_backend("reference"):
        assert torch.equal(layer(x), out)


def test_no_backend_is_named_outside_its_folder() -> None:
    """By a string, or by an import from its folder; "cpu" and "cuda" are also kinds of devices."""
    names = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} - {"cpu", "cuda", "reference"}
    assert "triton" in names
    wrong = []
    for path in PACKAGE.parent.rglob("*.py"):
        own = path.relative_to(PACKAGE).parts[0] if path.is_relative_to(PACKAGE) else ""
        allowed = {own, "reference"} if own else set()
        for node in ast.walk(ast.parse(path.read_text())):
            named = node.value if isinstance(node, ast.Constant) else None
            if named in names and named != own and not names_backends(path):
                wrong.append(f"{path.relative_to(PACKAGE.parent)}:{node.lineno} names {named}")
            module = str(node.module) if isinstance(node, ast.ImportFrom) else ""
            folder = module.removeprefix("ldmq_kernels.kernels.").split(".")[0]
            is_known = folder in allowed or names_backends(path)
            if folder != module.split(".")[0] and (PACKAGE / folder).is_dir() and not is_known:
                wrong.append(f"{path.relative_to(PACKAGE.parent)}:{node.lineno} imports {module}")
    assert not wrong


def names_backends(path: Path) -> bool:
    """Where the doctor lists what is installed, triton being a package among others, and where times are predicted.

    A prediction is of the tiles and loops of one backend's kernels, for a device that may not be there.
    """
    return path.name == "checks.py" or path.parent.name == "prediction" or path.name == "predicted_times.py"


def test_a_device_that_is_served_by_the_definition_alone_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends()["cpu"], "serves", lambda _: False)
    for memory in (dispatch._tell_of_the_definition, measurements.warn_once):
        memory.cache_clear()
    with warnings.catch_warnings(), ldmq.use_backend("reference"):  # asked for by name
        warnings.simplefilter("error")
        torch.ops.ldmq.linear_w8a8(*call())
    with pytest.warns(UserWarning, match=r"run by their definition on cpu, .* \(cpu: .*\); `ldmq doctor`") as told:
        torch.ops.ldmq.linear_w8a8(*call())
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.ops.ldmq.linear_w8a8(*call())


def test_one_refusal_is_no_warning(folder: Backend) -> None:
    for memory in (dispatch._tell_of_the_definition, measurements.warn_once):
        memory.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.ops.ldmq.quantize_per_token(torch.ones(2, 8), None)
