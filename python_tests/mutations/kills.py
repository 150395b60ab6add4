"""Commands that are killed at random moments and run again: the same result to the bit, nothing half, nothing left.

So are saves of a model over an older one (`saves`).
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ldmq_kernels import cli
from python_tests.mutations.saves import SAVES, Saves
from python_tests.mutations.trials import Outcome
from python_tests.tiny import SHALLOW, mixed_plan, tiny_pipeline

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PROMPTS = ("a red circle", "a blue square", "a dog")
WISHES = ("--prompts", "../prompts.txt", "--target-sqnr", "15", "--steps", "1", "--guidance", "1")
FORMATS = ("--formats", "w8a8-static,w4a8-dynamic")  # the second is rounded by GPTQ, which keeps whole layers
COMMANDS = {
    "plan --work": ("plan", "../model", *WISHES, *FORMATS, "--work", "work", "--out", "out"),
    "quantize --plan": ("quantize", "../model", "--plan", "../plan.json", "--out", "out"),
    "quantize --work": ("quantize", "../model", *WISHES, *FORMATS, "--work", "work", "--out", "out"),
    "analyze --work": ("analyze", "../model", *WISHES, *FORMATS, "--work", "work", "--out", "out"),
}
LIMIT = 300  # seconds for a command


@dataclass(frozen=True)
class _Undisturbed:
    digest: str
    seconds: float


def _main(arguments: Sequence[str], folder: Path) -> None:
    """The command in a process of its own, what it prints going to a file beside its folder."""
    torch.set_num_threads(1)  # a process that was forked has no other threads of torch
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    sys.stdout = sys.stderr = (folder.parent / "printed.txt").open("w")
    cli.main(list(arguments))


class _Commands:
    """Runs commands in a folder with a small model, prompts and a plan beside it."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "run"
        self._context = multiprocessing.get_context("fork")  # importing torch and diffusers takes many seconds

    def run(self, arguments: Sequence[str], kill: tuple[signal.Signals, float] | None = None) -> int | None:
        """The exit code of a command, which gets a signal after so many seconds; None where it hangs."""
        process = self._context.Process(target=_main, args=(arguments, self.folder))
        process.start()
        if kill is not None:
            process.join(kill[1])
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, kill[0])
        process.join(LIMIT)
        if process.exitcode is None:
            process.kill()
        return process.exitcode

    def printed(self) -> str:
        """What the last command printed."""
        return (self.folder.parent / "printed.txt").read_text(errors="replace")

    def clear(self) -> None:
        """An empty folder again."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()


def _digest(out: Path) -> str | None:
    """Of all files of a result but the page, which has times in it; None where there is none."""
    if not out.exists():
        return None
    files = [out] if out.is_file() else sorted(path for path in out.rglob("*") if path.is_file())
    lines = []
    for file in files:
        content = b"whole" if file.suffix == ".html" and b"</html>" in file.read_bytes()[-200:] else file.read_bytes()
        lines.append(f"{file.relative_to(out)} {hashlib.sha256(content).hexdigest()}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _leftovers(folder: Path) -> list[str]:
    """What is in the folder beside the result and finished work."""
    strange = [path for path in folder.iterdir() if path.name not in ("out", "work")]
    for path in (folder / "work").rglob("*"):
        known = path.suffix == ".safetensors" or path.name in ("settings.json", "lock")
        if not known and not (path.is_dir() and path.parent == folder / "work" and "." not in path.name):
            strange.append(path)
    return [str(path.relative_to(folder)) for path in strange]


def _prepare(root: Path) -> None:
    """The smallest pipeline, its prompts and a plan for it."""
    pipe = tiny_pipeline(root / "tokenizer", mid_block_type=None, **SHALLOW)  # 16 layers
    plan = mixed_plan(pipe.unet)
    plan.save(root / "plan.json")
    pipe.to(torch.float16).save_pretrained(root / "model")
    (root / "prompts.txt").write_text("\n".join(PROMPTS))


def _trial(name: str, number: signal.Signals, delay: float, commands: _Commands, expected: str) -> tuple[bool, str]:
    """Kill, look, run again, look: whether all was right, and what was seen."""
    commands.clear()
    out = commands.folder / "out"
    first = commands.run(COMMANDS[name], (number, delay))
    when = f"{number.name} after {delay:.2f} s, exit code {first}"
    if first is None:
        return False, f"{when}: it hangs"
    if _digest(out) not in (None, expected):
        return False, f"{when}: a half or other result has its final name"
    if not out.exists():
        again = commands.run(COMMANDS[name])
        if again != 0:
            return False, f"{when}; run again: exit code {again}, {commands.printed()[-200:]}"
    if _digest(out) != expected:
        return False, f"{when}; run again: another result"
    left = _leftovers(commands.folder)
    return not left, f"{when}; left: {left}" if left else when


def trials(count: int, seed: int, names: Sequence[str] = (*COMMANDS, *SAVES)) -> Iterator[Outcome]:
    """Kill commands and saves in turn, by every signal in turn, at a random moment of the time that they take.

    Args:
        names: of `COMMANDS` and `SAVES`.
    """
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kills-")))
        _prepare(root)
        commands, saves = _Commands(root), Saves(root)
        whole: dict[str, _Undisturbed] = {}
        for number in range(seed, seed + count):
            name = names[number % len(names)]
            if name not in whole:
                whole[name] = _undisturbed_save(name, saves) if name in SAVES else _undisturbed(name, commands)
            drawn = random.Random(number)
            chosen = SIGNALS[(number + number // len(names)) % len(SIGNALS)]
            delay = drawn.uniform(0, whole[name].seconds)
            if name in SAVES:
                right, text = saves.trial(name, chosen, delay)
            else:
                right, text = _trial(name, chosen, delay, commands, whole[name].digest)
            yield Outcome(f"{name}, {chosen.name}", number, right, text)


def _undisturbed(name: str, commands: _Commands) -> _Undisturbed:
    """What the command makes where nothing happens, and the time it takes."""
    commands.clear()
    start = time.perf_counter()
    code = commands.run(COMMANDS[name])
    seconds = time.perf_counter() - start
    digest = _digest(commands.folder / "out")
    if code != 0 or digest is None:
        raise RuntimeError(f"{name} fails where nothing kills it: {commands.printed()}")
    return _Undisturbed(digest, seconds)


def _undisturbed_save(name: str, saves: Saves) -> _Undisturbed:
    start = time.perf_counter()
    code = saves.run(name, None)
    seconds = time.perf_counter() - start
    if code != 0:
        raise RuntimeError(f"{name} fails where nothing kills it")
    return _Undisturbed("", seconds)
