"""`ldmq bench --op` says how fast an op is; the tests bring the clock, so that every figure is known."""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ldmq_kernels import ops
from ldmq_kernels.cli import main
from ldmq_kernels.cli.bench import backends as bench_backends
from ldmq_kernels.cli.bench import measure
from ldmq_kernels.cli.bench.cases import Case, cases_of, shape_kinds
from ldmq_kernels.cli.bench.show import number
from ldmq_kernels.kernels import dispatch
from ldmq_kernels.kernels.backend import backends

CPU = torch.device("cpu")
reference = backends()["reference"]
LINEAR = ["bench", "--op", "linear_w8a8", "--shape", "64x48x32", "--backend", "reference"]
TAKEN_MS = 0.25


class FakeClock:
    """Every call takes `TAKEN_MS`, or what `takes` gives for the backend that serves it."""

    def __init__(self) -> None:
        self.cache: list[str] = []
        self.takes: Callable[[str | None], float] = lambda _: TAKEN_MS

    def named(self, cache: str) -> Callable[..., float]:
        def clock(call: Callable[[], Any], _: torch.device) -> float:
            call()
            self.cache.append(cache)
            return self.takes(dispatch.forced_backend())

        return clock


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeClock]:
    fake = FakeClock()
    monkeypatch.setattr(measure, "CLOCKS", {cache: fake.named(cache) for cache in ("cold", "warm")})
    monkeypatch.setattr(measure, "MATMUL_SIZE", {"cpu": 32})
    monkeypatch.setattr(measure, "COPIED_BYTES", {"cpu": 2**20})
    monkeypatch.delenv("LDMQ_BACKEND", raising=False)
    return fake


def run(*arguments: str) -> None:
    """The command, which has to succeed."""
    with pytest.raises(SystemExit) as exit_code:
        main(list(arguments))
    assert exit_code.value.code == 0


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command says where it does not go on."""
    with pytest.raises(SystemExit) as exit_code:
        main(list(arguments))
    assert exit_code.value.code in (1, 2)
    return " ".join(capsys.readouterr().err.replace("│", " ").split())


def rows_of(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return found


SMALL = {"NxCxHxWxK": "2x32x6x5x12", "MxNxK": "17x12x40", "MxK": "17x40", "NxCxHxW": "2x32x6x5"}


@pytest.mark.parametrize(("op", "letters"), [(op, kind.letters) for op in ops.specs() for kind in shape_kinds(op)])
def test_every_op_takes_its_operands_in_every_way_to_write_a_shape(op: str, letters: str) -> None:
    (case,) = cases_of(op, [SMALL[letters]], torch.float32, (), 3, 2)
    operands = case.operands(CPU)
    with dispatch.use_backend("reference"):
        out = getattr(ops, op)(*operands)
    out = out[0] if isinstance(out, tuple) else out
    if ops.spec_of(op).is_product:
        assert case.product is not None
        m, n, k = case.product
        assert case.operations == 2 * m * n * k
        assert out.numel() == m * n // (2 if "geglu" in op else 1)
    else:
        assert case.operations == 0
        assert tuple(operands[0].shape) == case.sizes


def test_an_epilogue_is_added_by_its_name() -> None:
    plain = Case("conv2d_w8a8", (2, 16, 5, 7, 12), torch.float32)
    spec = ops.spec_of(plain.op)
    given = spec.call(*replace(plain, epilogue=("sample-bias",)).operands(CPU))
    assert given.sample_bias.shape == (2, 12)
    assert (given.bias, given.residual) == (None, None)
    given = spec.call(*replace(plain, epilogue=("bias", "residual")).operands(CPU))
    assert given.residual.shape == reference.conv2d_w8a8(*plain.operands(CPU)).shape
    assert given.bias.shape == (12,)
    assert given.sample_bias is None


def test_a_number_has_three_digits_that_count() -> None:
    shown = {0.0: "0.00", 0.000012345: "0.0000123", 0.25: "0.250", 1.0: "1.00", 98.76: "98.8", 12345.6: "12346"}
    assert {value: number(value) for value in shown} == shown
    assert (number(None), number(1.234, "x")) == ("-", "1.23x")


def test_the_figures_follow_from_time_work_and_bytes(tmp_path: Path) -> None:
    run(*LINEAR, "--rounds", "3", "--json", str(tmp_path / "a.json"), "--epilogue", "bias")
    (row,) = rows_of(tmp_path / "a.json")
    moved = 64 * 32 + 48 * 32 + 4 * (1 + 48 + 48) + 4 * 64 * 48  # x and weight; scales and bias; the output
    assert row["tops"] == pytest.approx(2 * 64 * 48 * 32 / TAKEN_MS / 1e9)
    assert row["gbps"] == pytest.approx(moved / TAKEN_MS / 1e6)
    assert (row["p20_ms"], row["p50_ms"], row["p80_ms"], row["noise"]) == (TAKEN_MS, TAKEN_MS, TAKEN_MS, 0)
    compute, memory = 64 * 48 * 32 / 32**3, moved / 2**21  # of the matmul and of the copy in the same time
    assert row["share_of_ceiling"] == pytest.approx(max(compute, memory))
    assert row["bound"] == "compute"


def test_a_csv_file_has_what_json_has(tmp_path: Path) -> None:
    run(*LINEAR, "--rounds", "1", "--json", str(tmp_path / "a.json"), "--csv", str(tmp_path / "a.csv"))
    with (tmp_path / "a.csv").open() as file:
        (line,) = csv.DictReader(file)
    assert line == {name: str(value) for name, value in rows_of(tmp_path / "a.json")[0].items()}


@pytest.mark.parametrize("width", [60, 80, 120, 200, None])
def test_no_figure_is_cut_at_any_width(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, width: int | None
) -> None:
    if width is None:
        monkeypatch.delenv("COLUMNS", raising=False)
    else:
        monkeypatch.setenv("COLUMNS", str(width))
    file, shapes = tmp_path / "earlier.json", {"linear_w8a8": "4096x8x16", "conv2d_w8a8": "1x16x6x5x128"}
    for op, shape in {**shapes, "silu_quantize": "4096x16"}.items():
        arguments = ["bench", "--op", op, "--shape", shape, "--rounds", "1", "--backend", "reference"]
        run(*arguments, "--json", str(file))
        run(*arguments, "--compare", str(file))
    out = capsys.readouterr().out
    assert "…" not in out
    assert out.count("0.250") >= 6
    assert out.count("1.00x") == 3
    if width is not None:
        assert max(map(len, out.splitlines())) <= width
    if width != 120:
        assert ("left out:" in out) == (width in (60, 80))


@pytest.mark.parametrize(("option", "kind"), [("--json", "json"), ("--csv", "csv")])
def test_a_file_is_tried_before_anything_is_measured_and_replaces_its_like_alone(
    option: str,
    kind: str,
    clock: FakeClock,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, notes = tmp_path / "found", tmp_path / "notes"
    for _ in range(2):
        run(*LINEAR, "--rounds", "1", option, str(file))
    notes.write_text("mine")

    def begins(*_: object) -> None:
        raise AssertionError("the work has begun")

    monkeypatch.setattr("ldmq_kernels.cli.bench.run.measure_ceilings", begins)
    assert f"is no file of `ldmq bench --{kind}`" in refusal(capsys, *LINEAR, "--rounds", "1", option, str(notes))
    assert notes.read_text() == "mine"


def test_another_run_is_compared_by_its_file_and_with_the_noise_of_both(
    clock: FakeClock, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "earlier.json"
    run(*LINEAR, "--rounds", "5", "--json", str(file))
    content = json.loads(file.read_text())
    content["rows"][0] |= {"p50_ms": 0.5, "noise": 0.031}
    content["torch"] = "1.0"
    file.write_text(json.dumps(content))
    capsys.readouterr()
    run(*LINEAR, "--rounds", "5", "--compare", str(file))
    out = capsys.readouterr().out
    assert "0.500" in out
    assert "3.1 %" in out
    assert "2.00x" in out
    assert f"the earlier run differs: torch was 1.0, is {torch.__version__}" in out


def test_what_the_other_run_did_not_measure_is_left_open(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run(*LINEAR, "--rounds", "1", "--json", str(tmp_path / "a.json"))
    capsys.readouterr()
    run(*LINEAR, "--shape", "8x48x32", "--rounds", "1", "--compare", str(tmp_path / "a.json"))
    first, second = (line for line in capsys.readouterr().out.splitlines() if "x48x32" in line)
    assert "1.00x" in first
    assert second.split()[-3:] == ["-", "-", "-"]


@pytest.mark.parametrize("cache", ["cold", "warm"])
def test_the_cache_is_what_was_asked_for(clock: FakeClock, cache: str, tmp_path: Path) -> None:
    run(*LINEAR, "--rounds", "2", "--cache", cache, "--json", str(tmp_path / "a.json"))
    assert clock.cache[-2:] == [cache] * 2
    assert rows_of(tmp_path / "a.json")[0]["cache"] == cache


def test_without_a_choice_a_cpu_is_measured_warm_and_in_float32(tmp_path: Path) -> None:
    run(*LINEAR, "--rounds", "1", "--json", str(tmp_path / "a.json"))
    (row,) = rows_of(tmp_path / "a.json")
    assert (row["cache"], row["dtype"]) == ("warm", "float32")


def test_lists_take_commas_and_repetition(tmp_path: Path) -> None:
    shapes = ["--shape", "8x16x32,9x16x32", "--shape", "10x16x32"]
    ops_asked = ["--op", "linear_w8a8", "--op", "linear_w8a16,linear_w4a16"]
    settings = ["--backend", "reference", "--rounds", "1", "--dtype", "bfloat16"]
    run("bench", *ops_asked, *shapes, *settings, "--json", str(tmp_path / "a.json"))
    found = [(row["op"], row["shape"]) for row in rows_of(tmp_path / "a.json")]
    assert found == [(op, f"{m}x16x32") for op in ("linear_w8a8", "linear_w8a16", "linear_w4a16") for m in (8, 9, 10)]
    assert {row["dtype"] for row in rows_of(tmp_path / "a.json")} == {"bfloat16"}


REFUSED = {
    ("--op", "linear_w8a9"): "--op linear_w8a9: there is no such op: choose among conv2d_w8a8",
    ("--op", "linear_w8a8", "--shape", "64x64"): "linear_w8a8 takes MxNxK (tokens, output features, input features)",
    ("--op", "linear_w8a8", "--shape", "64x0x64"): "such as 4096x1280x1280",
    ("--op", "conv2d_w8a8", "--shape", "64x64x64"): "conv2d_w8a8 takes NxCxHxWxK (samples, input channels, height",
    ("--op", "geglu_quantize", "--shape", "64"): "geglu_quantize takes MxK (tokens, input features)",
    ("--op", "geglu_quantize", "--shape", "64x3"): "K must be even",
    ("--op", "quantize_static", "--shape", "64"): "features), such as 4096x1280 or NxCxHxW (samples, channels",
    ("--op", "conv2d_w8a8", "--kernel", "2"): "--kernel 2: it must be odd",
    ("--op", "linear_w8a8", "--backend", "cutlass"): "choose among reference, cpu, cuda, triton",
    ("--op", "linear_w8a8", "--tile", "128x128"): "give a single --backend",
    (
        "--op",
        "linear_w8a8",
        "--shape",
        "8x8x8",
        "--tile",
        "128x128",
        "--backend",
        "reference",
    ): "no choice of tiles on reference",
    ("--op", "linear_w8a8", "--epilogue", "relu"): "choose among bias, residual, sample-bias",
    ("--op", "linear_w8a8", "--epilogue", "sample-bias"): "cannot add that; it can add bias, residual",
    ("--op", "silu_quantize", "--epilogue", "bias"): "it has no epilogue: leave --epilogue out",
    ("--op", "linear_w8a8", "--compare", "nowhere.json"): "there is no file nowhere.json",
    ("--shape", "64x64x64", "--json", "a.json"): "--shape and --json can only be given with --op",
    ("--out", "tiles.json"): "--out can only be given with --tune",
    ("--op", "linear_w8a8", "--tune"): "give either --op or --tune",
    ("--op", "linear_w8a8", "--dtype", "float8"): "float16",
}


@pytest.mark.parametrize(("arguments", "told"), REFUSED.items(), ids=[" ".join(given) for given in REFUSED])
def test_what_there_is_not_is_refused_with_what_there_is(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], told: str
) -> None:
    assert told in refusal(capsys, "bench", *arguments)


@pytest.mark.parametrize("content", ["{", "[]", '{"rows": [{"op": "linear_w8a8"}]}'])
def test_a_file_that_is_none_of_its_own_is_not_compared_with(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str
) -> None:
    (tmp_path / "other.json").write_text(content)
    assert "other.json is no file of" in refusal(capsys, *LINEAR, "--compare", str(tmp_path / "other.json"))


@dataclass(frozen=True)
class Tile:
    name: str


TILES = ("sm90 128x128x128x4", "sm90 128x160x128x4", "sm90 128x160x128x4 cluster 2")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch, clock: FakeClock) -> list[str | None]:
    """A CUDA backend on the CPU with three tiles, twice as fast as the others; the tiles that its calls took."""
    taken: list[str | None] = []
    tile: list[str | None] = [None]

    def linear_w8a8(*arguments: Any) -> Any:
        taken.append(tile[0])
        if arguments[0].shape[-1] % 16:
            raise dispatch.Unsupported("K must be a multiple of 16")
        return reference.linear_w8a8(*arguments)

    @contextlib.contextmanager
    def forced(chosen: Tile) -> Iterator[None]:
        tile[0] = chosen.name
        yield
        tile[0] = None

    backend = backends()["cuda"]
    monkeypatch.setattr(backend, "serves", lambda _: True)
    monkeypatch.setattr(backend, "linear_w8a8", linear_w8a8)
    monkeypatch.setattr(backend.tiles, "candidates", lambda *_: [Tile(name) for name in TILES])
    monkeypatch.setattr(backend.tiles, "forced", forced)
    clock.takes = lambda backend: TAKEN_MS / 2 if backend == "cuda" else TAKEN_MS
    return taken


def test_backends_are_rows_of_their_own_and_the_definition_is_measured_where_it_is_asked_for(
    cuda: list[str | None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arguments = ["bench", "--op", "linear_w8a8", "--shape", "8x16x32", "--rounds", "2"]
    run(*arguments, "--backend", "reference,cuda", "--json", str(tmp_path / "a.json"))
    assert {row["backend"]: row["p50_ms"] for row in rows_of(tmp_path / "a.json")} == {
        "reference": TAKEN_MS,
        "cuda": TAKEN_MS / 2,
    }
    known = {name: backends()[name] for name in ("reference", "cuda")}
    monkeypatch.setattr(bench_backends, "backends", lambda: known)
    run(*arguments, "--json", str(tmp_path / "a.json"))
    assert "reference" not in {row["backend"] for row in rows_of(tmp_path / "a.json")}


def test_a_tile_is_forced_by_its_name_or_its_beginning(cuda: list[str | None], tmp_path: Path) -> None:
    arguments = ["bench", "--op", "linear_w8a8", "--shape", "8x16x32", "--backend", "cuda", "--rounds", "2"]
    run(*arguments, "--tile", "sm90 128x160x128x4", "--json", str(tmp_path / "a.json"))
    assert set(cuda) == {"sm90 128x160x128x4"}
    assert rows_of(tmp_path / "a.json")[0]["tile"] == "sm90 128x160x128x4"
    cuda.clear()
    run(*arguments, "--tile", "sm90 128x128")
    assert set(cuda) == {"sm90 128x128x128x4"}


@pytest.mark.parametrize(
    ("tile", "told"),
    [("64x64", "is no tile of linear_w8a8 at 8x16x32 on cuda"), ("sm90 128x16", "names several tiles")],
)
def test_a_tile_that_is_none_or_several_is_refused_with_the_list(
    cuda: list[str | None], capsys: pytest.CaptureFixture[str], tile: str, told: str
) -> None:
    arguments = ["bench", "--op", "linear_w8a8", "--shape", "8x16x32", "--backend", "cuda"]
    found = refusal(capsys, *arguments, "--tile", tile)
    assert told in found
    assert "sm90 128x160x128x4; sm90 128x160x128x4 cluster 2" in found
    assert not cuda


def test_a_backend_that_does_not_take_a_shape_is_told_and_the_others_are_measured(
    cuda: list[str | None], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bench", "--op", "linear_w8a8", "--shape", "8x16x24", "--rounds", "1", "--backend"]
    run(*arguments, "cuda,reference")
    out = " ".join(capsys.readouterr().out.split())
    assert "linear_w8a8 at 8x16x24 was not measured on cuda" in out
    assert "K must be a multiple of 16" in out
    assert "8x16x24 reference" in out
    assert "K must be a multiple of 16" in refusal(capsys, *arguments, "cuda")
