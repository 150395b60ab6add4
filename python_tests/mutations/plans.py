"""Plan files that are damaged, edited into nonsense or far too large: each loads as it was, or is refused by name."""

from __future__ import annotations

import copy
import json
import random
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ldmq_kernels.plans.plan import Plan, PlanError
from python_tests.mutations.trials import Outcome
from python_tests.tiny import SHALLOW, mixed_plan, tiny_unet

MOST_SECONDS, MOST_KILOBYTES, MOST_LETTERS = 2.0, 200 << 10, 1_100
NUMBERS = ("1e400", "-1e400", "1" + "0" * 400, "-" + "9" * 5000, "1e-42", "1e39", "-1", "0", "NaN", "Infinity", "2.5")
VALUES: tuple[Any, ...] = (None, True, False, 0, -1, 2.0, 1e-42, 10**24, "", "x", "x" * 10**5, [], [0], {}, {"a": 1})
ROOM = "*room*"  # a text that takes the place of a value, and the value its place


def _nested(rng: random.Random) -> str:
    depth = rng.choice((150, 1_000, 10_000, 100_000))
    opened, closed = rng.choice((("[", "]"), ('{"a":', "}")))
    return opened * depth + ("0" if opened != "[" else "") + closed * depth


def _many(rng: random.Random) -> str:
    count = rng.choice((2_001, 20_000, 150_000, 1_000_000))
    one = rng.choice(("0", "[]", '{"pattern": "*", "scheme": "fp16"}', '"*"'))
    return f"[{','.join([one] * count)}]"


def _many_names(rng: random.Random) -> str:
    count = rng.choice((10_001, 40_000, 300_000))
    one = rng.choice(('{"scheme": "fp16"}', "1", '""'))
    return "{" + ",".join(f'"layer.{number}": {one}' for number in range(count)) + "}"


def _long(rng: random.Random) -> str:
    return '"' + rng.choice(("x", "*a", "é", "\U0001f600")) * rng.choice((10**4, 10**6, 10**7)) + '"'


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every place in a value: its object or list, and the name or index in it."""
    found: list[tuple[Any, Any]] = []
    inner = [value]
    while inner:
        outer = inner.pop()
        names = list(outer) if isinstance(outer, dict) else range(len(outer))
        found += [(outer, name) for name in names]
        inner += [outer[name] for name in names if isinstance(outer[name], dict | list)]
    return found


def _with(plan: dict[str, Any], rng: random.Random, literal: str) -> bytes:
    """The plan with JSON of its own in a place; the places of the first level come as often as all others."""
    places = _places(plan)
    first = [place for place in places if place[0] is plan]
    outer, name = rng.choice(rng.choice((first, places)))
    outer[name] = ROOM
    return json.dumps(plan).replace(f'"{ROOM}"', literal).encode()


def _another_value(plan: dict[str, Any], rng: random.Random) -> bytes:
    return _with(plan, rng, json.dumps(rng.choice(VALUES)))


def _without(plan: dict[str, Any], rng: random.Random) -> bytes:
    outer, name = rng.choice(_places(plan))
    del outer[name]
    return json.dumps(plan).encode()


def _another_name(plan: dict[str, Any], rng: random.Random) -> bytes:
    outer, name = rng.choice([place for place in _places(plan) if isinstance(place[0], dict)])
    outer[rng.choice((f"{name}.", "", "x" * 10**6, "\ud800", "conv_in"))] = outer.pop(name)
    return json.dumps(plan).encode()


def _twice(plan: dict[str, Any], rng: random.Random) -> bytes:
    outer, name = rng.choice([place for place in _places(plan) if isinstance(place[0], dict)])
    outer[ROOM] = copy.deepcopy(outer[name])
    return json.dumps(plan).replace(f'"{ROOM}"', json.dumps(name)).encode()


def _cut(plan: dict[str, Any], rng: random.Random) -> bytes:
    content = json.dumps(plan).encode()
    return content[: rng.randrange(len(content))]


def _bytes(plan: dict[str, Any], rng: random.Random) -> bytes:
    content = bytearray(json.dumps(plan).encode())
    for _ in range(rng.choice((1, 1, 2, 8))):
        content[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(content)


def _large(plan: dict[str, Any], rng: random.Random) -> bytes:
    return json.dumps(plan).encode() + rng.choice((b" ", b"\x00", b"[", b'"')) * 60_000_000


MUTATIONS: dict[str, Callable[[dict[str, Any], random.Random], bytes]] = {
    "another value": _another_value,
    "a number": lambda plan, rng: _with(plan, rng, rng.choice(NUMBERS)),
    "nesting": lambda plan, rng: _with(plan, rng, _nested(rng)),
    "an entry less": _without,
    "another name": _another_name,
    "a name twice": _twice,
    "a long text": lambda plan, rng: _with(plan, rng, _long(rng)),
    "a long list": lambda plan, rng: _with(plan, rng, _many(rng)),
    "many names": lambda plan, rng: _with(plan, rng, _many_names(rng)),
    "cut": _cut,
    "other bytes": _bytes,
    "a large file": _large,
}
OFTEN = ("another value", "a number", "an entry less", "another name", "a name twice", "cut", "other bytes")
SMALL = 8  # of so many mutations, one is of those that take long to make


def _is_sound(plan: Plan, model: torch.nn.Module) -> bool:
    """Whether what a mutated plan makes of a model has numbers that can be computed with."""
    for layer_plan in plan.layers(model).values():
        scales = torch.tensor(layer_plan.scales, dtype=torch.float32)
        vectors = [scales] if layer_plan.smoothing is None else [scales, layer_plan.smoothing]
        if not all(bool((v > 0).all() and v.isfinite().all() and (1 / v).isfinite().all()) for v in vectors):
            return False
    return True


def _answer(path: Path, model: torch.nn.Module, mutation: str) -> tuple[bool, str]:
    """Whether the answer to a file is right, and the answer in words."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        plan = Plan.load(path)
        right = _is_sound(plan, model) and mutation != "a name twice"
        text = "" if right else "it loads"
    except PlanError as error:
        text = str(error)
        has_name = path.name in text or "the plan" in text or "this plan" in text or _names_a_layer(text, model)
        right = len(text) <= MOST_LETTERS and has_name
    except Exception as error:
        return False, f"{type(error).__name__}: {str(error)[:300]}"
    seconds = time.process_time() - start
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if seconds > MOST_SECONDS or grown > MOST_KILOBYTES:
        return False, f"{seconds:.1f} s and {grown >> 10} MB: {text[:100]}"
    return right, text


def _names_a_layer(text: str, model: torch.nn.Module) -> bool:
    return any(f"{name}: " in text for name, _ in model.named_modules() if name)


def trials(count: int, seed: int) -> Iterator[Outcome]:
    """Mutate the plan of a small model, each mutation by a seed of its own.

    Args:
        count: of mutations.
        seed: of the first; the others count up.
    """
    model = tiny_unet(**SHALLOW)
    whole = mixed_plan(model)
    whole.calibration = {"texts": ["a red circle"], "num_inference_steps": 2, "guidance_scale": 7.5, "seed": 0}
    whole.measured = {"held_out_sqnr_db": 30.0}
    content = json.dumps(whole.to_dict())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mutated plan.json"
        for number in range(seed, seed + count):
            rng = random.Random(number)
            names = sorted(set(MUTATIONS) - set(OFTEN)) if number % SMALL == 0 else OFTEN
            mutation = rng.choice(names)
            path.write_bytes(MUTATIONS[mutation](json.loads(content), rng))
            right, text = _answer(path, model, mutation)
            yield Outcome(mutation, number, right, text)
