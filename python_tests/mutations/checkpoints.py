"""Damaged checkpoints: each loads to the very same model, or is refused before its first call, naming the place."""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import logging
from safetensors.torch import load_file, save_file
from torch import Tensor

import ldmq_kernels as ldmq
from python_tests.mutations.trials import Outcome, is_clear
from python_tests.tiny import SHALLOW, mixed_plan, run_unet, tiny_unet

FILE, CONFIG = "diffusion_pytorch_model.safetensors", "config.json"
SHARD, INDEX = "diffusion_pytorch_model-0000*.safetensors", FILE + ".index.json"
SCALES = ("weight_scale", "group_scale", "input_scale", "smoothing")


def saves(folder: Path) -> Tensor:
    """Write one model twice, as one file and in shards, and two others of its shapes; give the output of the first.

    "others" is of other scales and has no smoothing; "weights" is of other weights under the same plan.
    """
    unet = tiny_unet(**SHALLOW)
    plan, other = mixed_plan(unet), mixed_plan(unet)
    other.smoothing.clear()
    for name, scale in other.input_scales.items():
        other.input_scales[name] = [0.9 * s for s in scale] if isinstance(scale, list) else 0.9 * scale
    for name, seed, its_plan in (("whole", 0, plan), ("others", 0, other), ("weights", 1, plan)):
        unet = ldmq.quantize(tiny_unet(seed, **SHALLOW), its_plan)
        unet.save_pretrained(folder / name)
        if name == "whole":
            unet.save_pretrained(folder / "shards", max_shard_size="60KB")
            output = run_unet(unet)
    return output


def _edit(file: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def _edit_json(file: Path, edit: Callable[[dict], object]) -> None:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def _a_weights_file(folder: Path, dice: random.Random) -> Path:
    return dice.choice(sorted(folder.glob("*.safetensors")))


def _header_size(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


# -- bytes -------------------------------------------------------------------------------------------


def flip_a_bit_of_the_tensors(folder: Path, dice: random.Random) -> None:
    file = _a_weights_file(folder, dice)
    content = bytearray(file.read_bytes())
    content[dice.randrange(_header_size(content), len(content))] ^= 1 << dice.randrange(8)
    file.write_bytes(content)


def flip_a_bit_of_the_header(folder: Path, dice: random.Random) -> None:
    file = _a_weights_file(folder, dice)
    content = bytearray(file.read_bytes())
    content[dice.randrange(_header_size(content))] ^= 1 << dice.randrange(8)
    file.write_bytes(content)


def blank_a_block(folder: Path, dice: random.Random) -> None:
    file = _a_weights_file(folder, dice)
    content = bytearray(file.read_bytes())
    start = dice.randrange(_header_size(content), len(content))
    content[start : start + 512] = bytes(len(content[start : start + 512]))
    file.write_bytes(content)


def cut_a_file(folder: Path, dice: random.Random) -> None:
    file = dice.choice(sorted(folder.iterdir()))
    content = file.read_bytes()
    file.write_bytes(content[: dice.randrange(len(content))])


def append_bytes(folder: Path, dice: random.Random) -> None:
    with _a_weights_file(folder, dice).open("ab") as file:
        file.write(dice.randbytes(dice.randrange(1, 100)))


def flip_a_bit_of_the_plan(folder: Path, dice: random.Random) -> None:
    content = bytearray((folder / CONFIG).read_bytes())
    start = content.index(b'"quantization_config"') + len(b'"quantization_config"')
    end = content.index(b'"resnet_out_scale_factor"')
    content[dice.randrange(start, end)] ^= 1 << dice.randrange(8)
    (folder / CONFIG).write_bytes(content)


# -- tensors -----------------------------------------------------------------------------------------


def swap_tensors_of_one_shape(folder: Path, dice: random.Random) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        kinds: dict[object, list[str]] = {}
        for name in sorted(tensors):
            kinds.setdefault((tensors[name].shape, tensors[name].dtype), []).append(name)
        one, other = dice.sample(dice.choice([names for names in kinds.values() if len(names) > 1]), 2)
        tensors[one], tensors[other] = tensors[other].clone(), tensors[one].clone()

    _edit(folder / FILE, edit)


def drop_a_tensor(folder: Path, dice: random.Random) -> None:
    _edit(folder / FILE, lambda tensors: tensors.pop(dice.choice(sorted(tensors))))


def add_a_tensor(folder: Path, dice: random.Random) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        layer = dice.choice(sorted(tensors)).rpartition(".")[0]
        names = [f"{layer}.{leaf}" for leaf in (*SCALES, "zero_point", "bias") if f"{layer}.{leaf}" not in tensors]
        tensors[dice.choice(names)] = torch.rand(dice.choice([1, 4, 32]))

    _edit(folder / FILE, edit)


def rename_a_tensor(folder: Path, dice: random.Random) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        name = dice.choice(sorted(tensors))
        tensors[name + dice.choice(["_", ".0", "s"])] = tensors.pop(name)

    _edit(folder / FILE, edit)


def give_another_dtype(folder: Path, dice: random.Random) -> None:
    """Not the half precisions to tensors that are no layer's, which is right and has a test of its own."""

    def edit(tensors: dict[str, Tensor]) -> None:
        name = dice.choice(sorted(tensors))
        dtypes = [torch.int8, torch.uint8, torch.int32, torch.int64]
        stored = not tensors[name].is_floating_point() or name.rpartition(".")[2] in SCALES
        dtypes += [torch.float16, torch.bfloat16, torch.float32, torch.float64] if stored else []
        tensors[name] = tensors[name].to(dice.choice([dtype for dtype in dtypes if dtype != tensors[name].dtype]))

    _edit(folder / FILE, edit)


def put_in_a_number(folder: Path, dice: random.Random) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        values = tensors[dice.choice([name for name in sorted(tensors) if tensors[name].is_floating_point()])].view(-1)
        values[dice.randrange(len(values))] = dice.choice([float("nan"), float("inf"), -1e30, 1e-42, 1e35, -1.0, 0.25])

    _edit(folder / FILE, edit)


def scale_the_scales(folder: Path, dice: random.Random) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[dice.choice([name for name in sorted(tensors) if name.endswith(SCALES)])].mul_(dice.choice([50, 0.98]))

    _edit(folder / FILE, edit)


def reshape_a_tensor(folder: Path, dice: random.Random) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        name = dice.choice([name for name in sorted(tensors) if tensors[name].dim() > 1])
        tensors[name] = tensors[name].transpose(0, 1).contiguous()

    _edit(folder / FILE, edit)


# -- files -------------------------------------------------------------------------------------------


def take_the_config_of_another_save(folder: Path, dice: random.Random) -> None:
    shutil.copy(folder.parent / "saved" / dice.choice(["others", "weights"]) / CONFIG, folder / CONFIG)


def take_the_tensors_of_another_save(folder: Path, dice: random.Random) -> None:
    shutil.copy(folder.parent / "saved" / dice.choice(["others", "weights"]) / FILE, folder / FILE)


def name_a_file_as_the_plan(folder: Path, dice: random.Random) -> None:
    path = dice.choice(["/etc/hostname", "/dev/zero", "plan.json", str(folder / CONFIG)])
    _edit_json(folder / CONFIG, lambda config: config["quantization_config"].update(plan=path))


def leave_out_the_checksums(folder: Path, dice: random.Random) -> None:
    del dice
    _edit_json(folder / CONFIG, lambda config: config["quantization_config"].pop("checksums"))


def spoil_the_checksums(folder: Path, dice: random.Random) -> None:
    def edit(config: dict) -> None:
        tensors = config["quantization_config"]["checksums"]["tensors"]
        value = dice.choice(["", "00000000", 0, None, {}, [], {"float32": "1"}, {"float31": "1"}])
        tensors[dice.choice(sorted(tensors))] = value

    _edit_json(folder / CONFIG, edit)


def change_the_plan(folder: Path, dice: random.Random) -> None:
    def edit(config: dict) -> None:
        plan = config["quantization_config"]["plan"]
        what = dice.choice(["scale", "scheme", "groups", "smoothing", "details"])
        if what == "scale":
            name = dice.choice(sorted(plan["input_scales"]))
            scale = plan["input_scales"][name]
            plan["input_scales"][name] = [50 * s for s in scale] if isinstance(scale, list) else 50 * scale
        elif what == "scheme":
            plan["exceptions"][dice.choice(sorted(plan["exceptions"]))]["scheme"] = dice.choice(["w8a8x2", "fp16"])
        elif what == "groups":
            plan["timestep_groups"][0] += 50
        elif what == "smoothing":
            plan["smoothing"].pop(dice.choice(sorted(plan["smoothing"])))
        else:
            plan["details"]["mid_block.attentions.0.to_k"] = {"first_token": True}

    _edit_json(folder / CONFIG, edit)


def take_another_shard(folder: Path, dice: random.Random) -> None:
    one, other = dice.sample(sorted(folder.glob(SHARD)), 2)
    shutil.copy(one, other)


def remove_a_shard(folder: Path, dice: random.Random) -> None:
    dice.choice(sorted(folder.glob(SHARD))).unlink()


def change_the_index(folder: Path, dice: random.Random) -> None:
    def edit(index: dict) -> None:
        names = index["weight_map"]
        name = dice.choice(sorted(names))
        if dice.random() < 0.5:
            del names[name]
        else:
            names[name] = dice.choice(sorted(set(names.values()) - {names[name]}))

    _edit_json(folder / INDEX, edit)


def flip_a_bit_of_the_index(folder: Path, dice: random.Random) -> None:
    content = bytearray((folder / INDEX).read_bytes())
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    (folder / INDEX).write_bytes(content)


def spoil_the_index(folder: Path, dice: random.Random) -> None:
    def edit(index: dict) -> None:
        names = index["weight_map"]
        file = dice.choice([None, 3, "", ".", "..", "../x.safetensors", "/etc/hostname", CONFIG, ["x"], "x" * 300])
        names[dice.choice(sorted(names))] = file

    def entry(index: dict) -> None:
        index[dice.choice(sorted(index))] = dice.choice([None, [], "x", 1])

    _edit_json(folder / INDEX, dice.choice([edit, edit, entry, dict.clear]))


def say_a_tensor_twice(folder: Path, dice: random.Random) -> None:
    lines = (folder / INDEX).read_text().splitlines()
    tensors = [number for number, line in enumerate(lines) if line.endswith('.safetensors",')]
    lines.insert(dice.choice(tensors), lines[dice.choice(tensors)])
    (folder / INDEX).write_text("\n".join(lines))


OF_ANY = (flip_a_bit_of_the_tensors, flip_a_bit_of_the_header, blank_a_block, cut_a_file, append_bytes)
OF_SHARDS = (
    take_another_shard,
    remove_a_shard,
    change_the_index,
    flip_a_bit_of_the_index,
    spoil_the_index,
    say_a_tensor_twice,
)
OF_ONE_FILE = (
    swap_tensors_of_one_shape,
    drop_a_tensor,
    add_a_tensor,
    rename_a_tensor,
    give_another_dtype,
    put_in_a_number,
    scale_the_scales,
    reshape_a_tensor,
    take_the_config_of_another_save,
    take_the_tensors_of_another_save,
    name_a_file_as_the_plan,
    leave_out_the_checksums,
    spoil_the_checksums,
    change_the_plan,
    flip_a_bit_of_the_plan,
)
MUTATIONS = (
    *((mutate, "whole") for mutate in (*OF_ANY, *OF_ONE_FILE)),
    *((mutate, "shards") for mutate in (*OF_ANY, *OF_SHARDS)),
)


def trial(place: Path, output: Tensor, seed: int) -> Outcome:
    """Damage a copy of a checkpoint and load it; mutations come in turn."""
    mutate, save = MUTATIONS[seed % len(MUTATIONS)]
    name = f"{mutate.__name__.replace('_', ' ')} ({save})"
    folder, whole = place / "damaged", place / "saved" / save
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    mutate(folder, random.Random(seed))
    try:
        unet = UNet2DConditionModel.from_pretrained(folder)
    except Exception as error:
        names = [*(file.name for file in whole.iterdir()), *load_file(place / "saved/whole" / FILE)]
        names += ["quantization_config", *(name.rpartition(".")[0] for name in names)]
        return Outcome(name, seed, is_clear(error, *names), f"{type(error).__name__}: {error}")
    try:
        same = torch.equal(run_unet(unet), output)
    except Exception as error:
        return Outcome(name, seed, False, f"at the first call: {type(error).__name__}: {error}")
    return Outcome(name, seed, same, "the same output" if same else "loads, and gives another output")


def trials(count: int, seed: int) -> Iterator[Outcome]:
    """`count` damaged checkpoints, of seeds from `seed` on."""
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as place:
        output = saves(Path(place) / "saved")
        for index in range(seed, seed + count):
            yield trial(Path(place), output, index)
