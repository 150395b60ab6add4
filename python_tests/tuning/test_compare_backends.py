"""The tuner measures the CUDA backend at the calls that it takes, and says who is faster."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from ldmq_kernels.kernels import dispatch, gpu, measurements
from ldmq_kernels.kernels.cuda import backend as cuda_backend
from ldmq_kernels.kernels.reference import backend as reference
from ldmq_kernels.tuning import TuningError, tune
from ldmq_kernels.tuning import calls as tuner_calls
from ldmq_kernels.tuning.shapes import Linear

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
CPU = torch.device("cpu")
LINEARS = [Linear(3, 70, 64, 40), Linear(1, 20, 48, 20)]
OP = "linear_w8a8"


@dataclass(frozen=True)
class Tile:
    """A tile of the CUDA backend: the tuner asks for its name alone."""

    name: str


class OtherBackend:
    """A CUDA backend on the CPU, with three tiles; tests say what each does."""

    def __init__(self) -> None:
        self.tile: Tile | None = None
        self.calls: list[str | None] = []
        self.asked: list[tuple[Any, ...]] = []
        self.behaviour: dict[str, Callable[..., Any]] = {}

    def candidates(self, op: str, m: int, n: int, k: int, device: torch.device) -> list[Tile]:
        self.asked.append((op, m, n, k))
        return [Tile("small"), Tile("large"), Tile("wide")]

    @contextlib.contextmanager
    def forced(self, tile: Tile) -> Iterator[None]:
        self.tile = tile
        try:
            yield
        finally:
            self.tile = None

    def linear_w8a8(self, *arguments: Any) -> Any:
        name = self.tile.name if self.tile else None
        self.calls.append(name)
        return self.behaviour.get(str(name), reference.linear_w8a8)(*arguments)

    def clock(self, triton: float, **tiles: float) -> Callable[..., float]:
        """A timer by which Triton takes so long, and each tile so long."""
        return lambda _run, _device: tiles[self.tile.name] if self.tile else triton


@pytest.fixture(autouse=True)
def other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OtherBackend]:
    """Another backend in the CUDA backend's place, two small shapes, and a cache of the test's own."""
    found = OtherBackend()
    tiles = types.ModuleType("ldmq_kernels.kernels.cuda.tiles")
    vars(tiles).update(candidates=found.candidates, forced=found.forced)
    monkeypatch.setitem(sys.modules, tiles.__name__, tiles)
    monkeypatch.setattr("ldmq_kernels.kernels.cuda.tiles", tiles, raising=False)
    monkeypatch.setattr(cuda_backend, "serves", lambda _: True)
    monkeypatch.setattr(cuda_backend, OP, found.linear_w8a8, raising=False)
    monkeypatch.setattr(tuner_calls, "of_models", lambda *_: (LINEARS, []))
    monkeypatch.setattr(tuner_calls, "merged_of", lambda *_: [])
    monkeypatch.setenv("LDMQ_CACHE", str(tmp_path / "cache"))
    measurements.forget()
    yield found
    measurements.forget()


def measured(path: Path, timer: Callable[..., float], names: tuple[str, ...] = (OP,)) -> tuple[dict[str, Any], int]:
    """What the tuner writes, and how many shapes it leaves."""
    _, left = tune(CPU, path, timer=timer, names=names, show=False)
    return json.loads(path.read_text()), left


def test_the_fastest_tile_and_the_faster_backend_are_kept(other: OtherBackend, tmp_path: Path) -> None:
    found, left = measured(tmp_path / "t.json", other.clock(0.5, small=0.4, large=0.3, wide=0.6))
    assert left == 0
    assert found["cuda_tiles"] == {"linear_w8a8 70x40x64": "large", "linear_w8a8 20x20x48": "large"}
    line = {"backend": "cuda", "milliseconds": {"triton": 0.5, "cuda": 0.3}}
    assert found["backends"] == {OP: {"70x64 to 40": line, "20x48 to 20": line}}
    assert (OP, 70, 40, 64) in other.asked
    assert len(found["tiles"]) == 2


def test_the_slower_backend_is_kept_as_such(other: OtherBackend, tmp_path: Path) -> None:
    found, _ = measured(tmp_path / "t.json", other.clock(0.2, small=0.4, large=0.3, wide=0.6))
    assert {line["backend"] for line in found["backends"][OP].values()} == {"triton"}
    assert set(found["cuda_tiles"].values()) == {"large"}


def test_triton_is_compared_by_its_own_fastest_tile(other: OtherBackend, tmp_path: Path) -> None:
    from ldmq_kernels.kernels.triton import tile_choice
    from ldmq_kernels.kernels.triton.tile_choice import Problem

    def timer(run: Any, device: torch.device) -> float:
        if other.tile:
            return 20.0
        return float(tile_choice.choose(OP, Problem(70, 40, 64), device).m)

    found, _ = measured(tmp_path / "t.json", timer)
    assert found["tiles"]["linear_w8a8 70x40x64"]["m"] == 16
    assert found["backends"][OP]["70x64 to 40"] == {"backend": "triton", "milliseconds": {"triton": 16.0, "cuda": 20.0}}


def test_the_ops_read_what_the_tuner_wrote(other: OtherBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    tune(CPU, timer=other.clock(0.5, small=0.4, large=0.3, wide=0.6), names=(OP,), show=False)
    device = torch.device("cuda", 0)
    monkeypatch.setattr(measurements, "gpu_of", lambda _: gpu.ABSENT)
    for call in tuner_calls.calls((OP,), ("sd15",), CPU):
        assert dispatch.backend_order(OP, call.make(), device)[0] == "cuda"
        assert measurements.section(device, "cuda_tiles")[f"{OP} {'x'.join(map(str, call.shape.product))}"] == "large"


def test_a_tile_that_fails_or_is_wrong_is_noted_and_never_the_fastest(other: OtherBackend, tmp_path: Path) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("too much shared memory")

    other.behaviour = {"small": fail, "large": lambda *a: reference.linear_w8a8(*a) * 1.01}
    found, _ = measured(tmp_path / "t.json", other.clock(0.5, small=0.1, large=0.1, wide=0.4))
    assert set(found["cuda_tiles"].values()) == {"wide"}
    small, large = found["refused"][f"cuda {OP} {'x'.join(map(str, LINEARS[0].product))}"]
    assert small == ["small", "RuntimeError: too much shared memory"]
    assert large[0] == "large"
    assert "differs by" in large[1]


def test_a_call_that_the_backend_does_not_take_stays_unmeasured(other: OtherBackend, tmp_path: Path) -> None:
    def refuse(*_: Any) -> Any:
        raise dispatch.Unsupported("depth must be a multiple of 128")

    other.behaviour = dict.fromkeys(("small", "large", "wide"), refuse)
    found, left = measured(tmp_path / "t.json", other.clock(0.5))
    assert (found["backends"], found["cuda_tiles"], left) == ({}, {}, 0)
    assert "depth must be a multiple of 128" in json.dumps(found["refused"])
    assert len(found["tiles"]) == 2


def test_a_file_without_backends_is_gone_on_with(
    other: OtherBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an earlier version wrote it, or as it is before the extension is built."""
    path = tmp_path / "t.json"
    with monkeypatch.context() as patch:
        patch.setattr(cuda_backend, "serves", lambda _: False)
        before, left = measured(path, other.clock(0.5))
    assert left == 0
    assert not other.calls
    path.write_text(json.dumps({key: before[key] for key in ("gpu", "tiles", "milliseconds", "refused", "seen")}))
    after, left = measured(path, other.clock(0.7, small=0.4, large=0.3, wide=0.6))
    assert left == 0
    assert after["tiles"] == before["tiles"]
    assert before["milliseconds"].items() <= after["milliseconds"].items()
    assert after["backends"][OP]["70x64 to 40"]["milliseconds"] == {"triton": 0.7, "cuda": 0.3}
    other.calls.clear()
    measured(path, other.clock(0.7))
    assert not other.calls


def test_a_tile_that_is_known_is_not_measured_against_others(other: OtherBackend, tmp_path: Path) -> None:
    path, known = tmp_path / "t.json", {f"{OP} {'x'.join(map(str, shape.product))}": "wide" for shape in LINEARS}
    path.write_text(json.dumps({"gpu": "no GPU", "tiles": {}, "cuda_tiles": known}))
    found, _ = measured(path, other.clock(0.5, small=0.1, large=0.1, wide=0.4))
    assert set(other.calls) == {"wide"}
    assert found["cuda_tiles"] == known
    assert found["backends"][OP]["70x64 to 40"]["milliseconds"] == {"triton": 0.5, "cuda": 0.4}


def test_no_time_leaves_the_cuda_backend_for_another_run(other: OtherBackend, tmp_path: Path) -> None:
    _, left = tune(CPU, tmp_path / "t.json", seconds=-1.0, timer=other.clock(1.0), names=(OP,), show=False)
    assert left == 2


def test_a_backend_that_is_switched_off_is_not_measured(other: OtherBackend, tmp_path: Path) -> None:
    measurements.switch_off(OP, "cuda", CPU, "wrong")
    found, left = measured(tmp_path / "t.json", other.clock(0.5))
    assert (found["backends"], left, other.calls) == ({}, 0, [])


def test_a_tile_that_kills_the_device_is_not_tried_again(other: OtherBackend, tmp_path: Path) -> None:
    def kill(*_: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    path, timer = tmp_path / "t.json", other.clock(0.5, small=0.4, large=0.3, wide=0.6)
    other.behaviour = {"large": kill}
    for _ in LINEARS:
        with pytest.raises(TuningError, match="run `ldmq bench --tune` again"):
            measured(path, timer)
    found, left = measured(path, timer)
    assert left == 0
    assert set(found["cuda_tiles"].values()) == {"small"}


@pytest.mark.slow
def test_ops_without_tiles_are_compared_too(
    other: OtherBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[int] = []

    def quantize(*arguments: Any) -> Any:
        served.append(1)
        return reference.quantize_per_token(*arguments)

    def timer(run: Callable[[], Any], _device: torch.device) -> float:
        before = len(served)
        run()
        return 0.1 if len(served) > before else 0.2

    monkeypatch.setattr(cuda_backend, "quantize_per_token", quantize)
    found, left = measured(tmp_path / "t.json", timer, ("quantize_per_token",))
    line = {"backend": "cuda", "milliseconds": {"triton": 0.2, "cuda": 0.1}}
    assert found["backends"] == {"quantize_per_token": {"70x64": line, "20x48": line}}
    assert (found["cuda_tiles"], found["tiles"], left) == ({}, {}, 0)


def test_ops_without_tiles_are_not_measured_where_triton_has_no_rival(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_backend, "serves", lambda _: False)
    path = tmp_path / "t.json"
    assert tune(
        CPU, path, timer=lambda *_: 1.0, names=("quantize_static", "quantize_per_token", "geglu_quantize"), show=False
    ) == (path, 0)
    assert not path.exists()
