"""Saves of a model over an older one that are killed: whoever loads gets one of the two, and the next save is whole."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

import ldmq_kernels as ldmq
from python_tests.tiny import SHALLOW, mixed_plan, run_unet, tiny_unet

# how the older one was saved, and how the newer one is
SAVES = {
    "save, one file over one": ({}, {}),
    "save, shards over one file": ({}, {"max_shard_size": "60KB"}),
    "save, one file over shards": ({"max_shard_size": "60KB"}, {}),
    "save, fewer shards over more": ({"max_shard_size": "30KB"}, {"max_shard_size": "100KB"}),
}
MOVE_SECONDS = 0.01  # of each move of a file, as on a disk far away: most kills fall among them
USERS = {"notes.txt": b"mine", "diffusion_pytorch_model-00001-of-00099.safetensors": b"mine"}


def _slowly(call: Callable[..., None]) -> Callable[..., None]:
    def moved(*names: object) -> None:
        time.sleep(MOVE_SECONDS)
        call(*names)

    return moved


def _save(model: UNet2DConditionModel, folder: Path, options: dict) -> None:
    """In a process of its own."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    for name in ("rename", "replace"):
        setattr(os, name, _slowly(getattr(os, name)))
    model.save_pretrained(folder, **options)


class Saves:
    """Two models of the same shapes and what they give."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "saved"
        self.models = []
        for seed in (0, 1):
            unet = tiny_unet(seed, mid_block_type=None, **SHALLOW)
            self.models.append(ldmq.quantize(unet, mixed_plan(unet)))
        self.outputs = [run_unet(model) for model in self.models]
        self._context = multiprocessing.get_context("fork")

    def _loaded(self) -> int | None:
        """Which of the two the folder holds."""
        output = run_unet(UNet2DConditionModel.from_pretrained(self.folder))
        return next((index for index, expected in enumerate(self.outputs) if torch.equal(output, expected)), None)

    def run(self, name: str, kill: tuple[signal.Signals, float] | None) -> int | None:
        """Save one over the other, and kill that after so many seconds; the exit code."""
        older, newer = SAVES[name]
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        for file, content in USERS.items():
            (self.folder / file).write_bytes(content)
        self.models[0].save_pretrained(self.folder, **older)
        process = self._context.Process(target=_save, args=(self.models[1], self.folder, newer))
        process.start()
        if kill is not None:
            process.join(kill[1])
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, kill[0])
        process.join()
        return process.exitcode

    def trial(self, name: str, number: signal.Signals, delay: float) -> tuple[bool, str]:
        """Kill, load, save again, load: whether all was right, and what was seen."""
        when = f"{number.name} after {delay:.2f} s, exit code {self.run(name, (number, delay))}"
        try:
            found = self._loaded()
            self.models[1].save_pretrained(self.folder, **SAVES[name][1])
            again = self._loaded()
        except Exception as error:
            return False, f"{when}: {type(error).__name__}: {error}"
        if found is None or again != 1:
            return False, f"{when}: another model loads"
        kept = {file: (self.folder / file).read_bytes() for file in USERS if (self.folder / file).exists()}
        if kept != USERS:
            return False, f"{when}: files of the user's are gone"
        files = {path.name for path in self.folder.iterdir()} - USERS.keys()
        alone = self.folder.parent / "alone"
        self.models[1].save_pretrained(alone, **SAVES[name][1])
        strange = files ^ {path.name for path in alone.iterdir()}
        shutil.rmtree(alone)
        return (
            not strange,
            f"{when}; left: {sorted(strange)}" if strange else f"{when}, the {('older', 'newer')[found]}",
        )
