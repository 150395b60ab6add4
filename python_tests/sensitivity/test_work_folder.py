"""The folder of an analysis: private, of one set of inputs, free of code, and every damage found."""

from __future__ import annotations

import copy
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from safetensors.torch import load_file

import ldmq_kernels
from ldmq_kernels.calibration import SamplingSettings
from ldmq_kernels.files import PART
from ldmq_kernels.numerics.formats import parse_schemes
from ldmq_kernels.sensitivity.analysis import open_work
from ldmq_kernels.sensitivity.stored import Stored
from ldmq_kernels.sensitivity.work_folder import WorkError, WorkFolder
from python_tests.tiny import PROMPTS, SHALLOW, tiny_pipeline, tiny_tokenizer

SETTINGS = {"steps": 2}
RESULT = Stored({"noise": 0.1}, {"weight": torch.arange(12.0).reshape(3, 4)})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "work"


def entry(folder: Path) -> Path:
    """The file of the only result in a folder."""
    return next(folder.glob("*/*.safetensors"))


def same(one: Stored | None, other: Stored) -> bool:
    return (
        one is not None
        and one.data == other.data
        and one.tensors.keys() == other.tensors.keys()
        and all(torch.equal(one.tensors[name], tensor) for name, tensor in other.tensors.items())
    )


# -- whose it is ---------------------------------------------------------------------------------------


def test_a_new_folder_is_its_owners_alone(folder: Path) -> None:
    before = os.umask(0)
    try:
        WorkFolder(folder, SETTINGS).save("stage", "x", RESULT)
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (folder, folder / "stage")] == [0o700, 0o700]
    assert same(WorkFolder(folder, SETTINGS).load("stage", "x"), RESULT)


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o755, 0o770, 0o702])
def test_a_folder_that_others_may_enter_is_refused_with_the_remedy(folder: Path, mode: int) -> None:
    WorkFolder(folder, SETTINGS).save("stage", "x", RESULT)
    folder.chmod(mode)
    with pytest.raises(WorkError, match=rf"open to other users \(mode {mode:04o}\).*chmod 700 {folder}"):
        WorkFolder(folder, SETTINGS)
    folder.chmod(0o700)
    assert same(WorkFolder(folder, SETTINGS).load("stage", "x"), RESULT)


def test_a_folder_of_another_user_is_refused_also_behind_a_link(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(folder)
    me = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: me + 1)
    for path in (folder, tmp_path / "link"):
        with pytest.raises(WorkError, match=f"belongs to the user {me}.*folder that does not exist yet"):
            WorkFolder(path, SETTINGS)


def test_a_file_and_a_folder_with_something_else_are_refused_and_kept(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(WorkError, match=r"file is a file.*does not exist yet"):
        WorkFolder(tmp_path / "file", SETTINGS)
    folder.mkdir(mode=0o700)
    (folder / "thesis.tex").write_text("mine")
    with pytest.raises(WorkError, match=r"holds thesis\.tex, which is no work of ldmq: give another folder"):
        WorkFolder(folder, SETTINGS)
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]


# -- no code ---------------------------------------------------------------------------------------------


class Trap:
    """A pickle that makes a file when it is read."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.trace,))


def test_a_planted_pickle_is_not_run(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    WorkFolder(folder, SETTINGS).save("stage", "x", RESULT)
    place, trace = entry(folder), tmp_path / "trace"
    place.write_bytes(pickle.dumps(Trap(trace)))
    torch.save(Trap(trace), place.with_suffix(".pt"))
    assert WorkFolder(folder, SETTINGS).load("stage", "x") is None
    assert not trace.exists()
    assert str(place) in caplog.text
    pickle.loads(place.read_bytes())  # the trap is one
    assert trace.exists()


def test_no_file_of_the_package_unpickles() -> None:
    for path in Path(ldmq_kernels.__file__).parent.rglob("*.py"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            where = f"{path.name}:{number}"
            assert "import pickle" not in line, where
            assert "weights_only=False" not in line, where
            assert "torch.load(" not in line or "weights_only=True" in line, where


def test_results_are_safetensors_and_json_alone(folder: Path) -> None:
    WorkFolder(folder, SETTINGS).save("stage", "x", RESULT)
    files = {path.name for path in folder.rglob("*") if path.is_file()}
    assert files == {"settings.json", "lock", entry(folder).name}
    assert torch.equal(load_file(entry(folder))["weight"], RESULT.tensors["weight"])


# -- damage ----------------------------------------------------------------------------------------------


def _flipped(content: bytes, random_: random.Random) -> bytes:
    damaged = bytearray(content)
    damaged[random_.randrange(len(content))] ^= 1 << random_.randrange(8)
    return bytes(damaged)


def _cut(content: bytes, random_: random.Random) -> bytes:
    return content[: random_.randrange(len(content))]


def _overwritten(content: bytes, random_: random.Random) -> bytes:
    start = random_.randrange(len(content))
    return content[:start] + random_.randbytes(8) + content[start + 8 :]


@pytest.mark.parametrize("damage", [_flipped, _cut, _overwritten])
def test_a_damaged_result_is_named_and_left_out(
    folder: Path, damage: Callable[..., bytes], caplog: pytest.LogCaptureFixture
) -> None:
    work = WorkFolder(folder, SETTINGS)
    work.save("stage", "x", RESULT)
    place = entry(folder)
    whole = place.read_bytes()
    for seed in range(60):
        place.write_bytes(damage(whole, random.Random(seed)))
        caplog.clear()
        found = work.load("stage", "x")
        assert found is None or same(found, RESULT), seed  # blanks that pad the header may be anything
        assert (found is None) == (str(place) in caplog.text), seed
    work.save("stage", "x", RESULT)
    assert same(work.load("stage", "x"), RESULT)


def test_a_result_of_another_item_or_folder_is_not_taken(folder: Path, tmp_path: Path) -> None:
    work, other = WorkFolder(folder, SETTINGS), WorkFolder(tmp_path / "other", {"steps": 3})
    other.save("stage", "x", Stored({"noise": 7.0}))
    work.save("stage", "x", RESULT)
    shutil.copy(entry(tmp_path / "other"), entry(folder))
    assert work.load("stage", "x") is None
    work.save("stage", "x", RESULT)
    mine = entry(folder)
    work.save("stage", "y", Stored({"noise": 7.0}))
    for path in folder.glob("stage/*"):
        if path != mine:
            shutil.copy(mine, path)
    assert work.load("stage", "y") is None
    assert same(work.load("stage", "x"), RESULT)


@pytest.mark.parametrize("content", ["", '{"steps": 2', "[1]", "\x00\xff"])
def test_damaged_settings_are_named(folder: Path, content: str) -> None:
    WorkFolder(folder, SETTINGS)
    (folder / "settings.json").write_text(content)
    with pytest.raises(WorkError, match=r"settings\.json is damaged.*give another folder, or remove this one"):
        WorkFolder(folder, SETTINGS)
    assert (folder / "settings.json").read_text() == content


# -- whose work it is ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def float_pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_pipeline(tmp_path_factory.mktemp("pipeline"), **SHALLOW)


def opened(pipe: Any, folder: Path, **changes: Any) -> None:
    settings = SamplingSettings(num_inference_steps=2)
    arguments = {"calls": PROMPTS, "sampling": settings, "mode": "first-step", "schemes": parse_schemes(["w8a16"])}
    open_work(pipe, folder, **(arguments | changes))


def _one_weight(pipe: Any) -> None:
    with torch.no_grad():
        pipe.unet.conv_in.weight.view(-1)[0] += 1e-3


def _one_norm(pipe: Any) -> None:
    with torch.no_grad():
        pipe.unet.conv_norm_out.bias[0] += 1e-3


def _bfloat16(pipe: Any) -> None:
    pipe.unet.to(torch.bfloat16)


def _euler(pipe: Any) -> None:
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)


def _prediction(pipe: Any) -> None:
    pipe.scheduler.register_to_config(prediction_type="v_prediction")


def _text_encoder(pipe: Any) -> None:
    with torch.no_grad():
        next(pipe.text_encoder.parameters()).mul_(2)


def _vae(pipe: Any) -> None:
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.add_(1)


OTHERS = {
    _one_weight: r"unet\.weights",
    _one_norm: r"unet\.weights",
    _bfloat16: r"dtype.*'float32'.*'bfloat16'",
    _euler: r"scheduler\.class \('DDIMScheduler', now 'EulerDiscreteScheduler'\)",
    _prediction: r"scheduler\.prediction_type \('epsilon', now 'v_prediction'\)",
    _text_encoder: r"text_encoder\.weights",
    _vae: r"vae\.weights",
}


@pytest.mark.parametrize(("change", "named"), OTHERS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_work_of_another_pipeline_is_refused_by_what_differs(
    float_pipe: Any, folder: Path, change: Callable[[Any], None], named: str
) -> None:
    parts = {name: part for name, part in float_pipe.components.items() if part is not None}
    other = type(float_pipe)(
        **{name: copy.deepcopy(part) for name, part in parts.items()},
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    opened(float_pipe, folder)
    opened(other, folder)
    change(other)
    with pytest.raises(WorkError, match=rf"another {named}.*same settings, or give another folder"):
        opened(other, folder)
    opened(float_pipe, folder)


def test_a_pipeline_that_is_not_in_memory_cannot_keep_work(
    float_pipe: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(float_pipe, "vae", copy.deepcopy(float_pipe.vae).to("meta"))
    with pytest.raises(ValueError, match=r"vae: .*weight is not in memory \(meta device\).*keep no work"):
        opened(float_pipe, folder)
    assert not folder.exists()


def test_work_of_another_tokenizer_or_version_is_refused(
    float_pipe: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(float_pipe, folder)
    with monkeypatch.context() as patch:
        patch.setattr("ldmq_kernels.sensitivity.identity.__version__", "0.0.9")
        with pytest.raises(WorkError, match=r"another versions\.ldmq_kernels \('0\.1\.0', now '0\.0\.9'\)"):
            opened(float_pipe, folder)
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    tokenizer.add_tokens(["circle"])
    monkeypatch.setattr(float_pipe, "tokenizer", tokenizer)
    with pytest.raises(WorkError, match=r"another tokenizer\.tokens"):
        opened(float_pipe, folder)


def test_work_of_other_settings_is_refused_in_a_short_line(float_pipe: Any, folder: Path) -> None:
    opened(float_pipe, folder)
    for changes, named in (
        ({"sampling": SamplingSettings(num_inference_steps=3)}, r"num_inference_steps \(2, now 3\)"),
        ({"schemes": parse_schemes(["w4a16"])}, r"schemes \(\['w8a16'\], now \['w4a16'\]\)"),
        ({"mode": "all-steps"}, r"mode \('first-step', now 'all-steps'\)"),
        ({"calls": ["a red circle"] * 500}, "prompts"),
    ):
        with pytest.raises(WorkError, match=f"another {named}") as refused:
            opened(float_pipe, folder, **changes)
        assert len(str(refused.value)) < 600


# -- what a kill leaves ----------------------------------------------------------------------------------


def test_parts_of_a_killed_run_are_removed_once_nobody_is_at_work(folder: Path) -> None:
    first = WorkFolder(folder, SETTINGS)
    first.save("stage", "x", RESULT)
    parts = [folder / f"settings.json{PART}", folder / "stage" / f"abc{PART}"]
    for part in parts:
        part.mkdir()
        (part / "result").write_text("half")
    second = WorkFolder(folder, SETTINGS)
    assert all(part.exists() for part in parts)  # the first may be writing them
    del first, second
    WorkFolder(folder, SETTINGS)
    assert not any(part.exists() for part in parts)
    assert entry(folder).exists()
