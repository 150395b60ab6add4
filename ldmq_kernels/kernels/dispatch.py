"""Which backend serves an op: chosen when the op runs, counted, and overridable.

A call is offered to one backend after the other: to the one that was measured to be the fastest at its shape, where
that was measured on this GPU, and to the others in the usual order. The refusal of each is counted, and
`dispatch_report` tells. A backend that `ldmq doctor` switched off for an op is passed over in the same way, with a
warning. So is one that could not launch a call, from then on for such calls: what a GPU's limits or a compiler refuse
is no fault, and the next backend computes it. A call that is differentiated is computed by the definition, see
`gradients`. With an override (`use_backend` or the environment variable LDMQ_BACKEND) there is no next one: the reason
becomes an error.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from ldmq_kernels.files import shortened
from ldmq_kernels.kernels import gradients, measurements
from ldmq_kernels.kernels.backend import DEFINITION, Packer, backends, usual_order
from ldmq_kernels.kernels.backend import Unsupported as Unsupported
from ldmq_kernels.kernels.op_spec import Arguments, Key, OpSpec, spec_of

MOST_SHAPES = 4096  # remembered for an op and device

_VARIABLE = "LDMQ_BACKEND"
# what os.environ looks in: it raises twice for a variable that is not set, for as long as all else of a call here takes
_environment, _key = os.environ._data, os.environ.encodekey(_VARIABLE)  # type: ignore[attr-defined]
_override: ContextVar[str | None] = ContextVar("ldmq_backend", default=None)
_calls: Counter[tuple[str, str, torch.device]] = Counter()
_refusals: Counter[tuple[str, str, str]] = Counter()


def _check(name: str) -> str:
    if name not in backends():
        raise ValueError(f"unknown backend {name!r}: choose one of {', '.join(backends())}")
    return name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every op from one backend inside this block: "reference", "cpu", "triton" or "cuda".

    Other threads do not see it, not even those that are started inside the block; LDMQ_BACKEND reaches all of them.

    Raises:
        ValueError: there is no such backend.
    """
    token = _override.set(_check(name))
    try:
        yield
    finally:
        _override.reset(token)


def forced_backend() -> str | None:
    """The backend that `use_backend` or LDMQ_BACKEND asks for, if any."""
    name = _override.get() or (os.environ.get(_VARIABLE) if _key in _environment else None)
    return _check(name) if name else None


@dataclass(frozen=True, slots=True)
class Choice:
    """What holds for one op on one device.

    Attributes:
        spec: the op's.
        usual: the backends in the order without a measurement.
        off: why a backend is switched off, by its name.
        measured: the order by the text of a shape, where the best backend is another than the usual one.
        foreign: by backend, how the others pack the op's weight on such a device.
        absent: why a backend that does not serve the device takes no call.
        weight, multiplier, weight_scale: the places of these arguments, None where the op has none.
        key: what tells the shapes of the op's calls apart.
        known: the order by that key, for the shapes that were met.
        unlaunched: why a backend could not launch a call, by its name and what tells the call apart.
    """

    spec: OpSpec
    usual: tuple[str, ...]
    off: Mapping[str, str]
    measured: Mapping[str, tuple[str, ...]]
    foreign: Mapping[str, tuple[Packer, ...]]
    absent: str
    weight: int | None
    multiplier: int | None
    weight_scale: int | None
    key: Callable[[Arguments], Key]
    known: dict[Hashable, tuple[str, ...]] = field(default_factory=dict)
    unlaunched: dict[Hashable, str] = field(default_factory=dict)

    def order(self, arguments: Arguments) -> tuple[str, ...]:
        """The backends for a call, the best first, where one was measured."""
        key = self.key(arguments)
        found = self.known.get(key)
        if found is None:
            if len(self.known) >= MOST_SHAPES:
                self.known.clear()
            found = self.known[key] = self.measured.get(self.spec.shape.text(key), self.usual)
        return found

    def not_launched(self, name: str, arguments: Arguments) -> str | None:
        """Why a backend could not launch such a call before; None where nothing is known."""
        return self.unlaunched.get((name, _signature(arguments)))

    def note_unlaunched(self, name: str, arguments: Arguments, why: str) -> str:
        """Offer no more such calls to a backend, said once as a warning; the reason as reports have it."""
        if len(self.unlaunched) >= MOST_SHAPES:
            self.unlaunched.clear()
        told = self.unlaunched[name, _signature(arguments)] = f"could not be launched: {shortened(why)}"
        measurements.warn_once(f"ldmq::{self.spec.name} on {name} {told}; the next backend serves such calls")
        return told

    def plain(self, name: str, arguments: Arguments) -> Arguments:
        """The arguments for a backend, with a weight that another one packed as it was before."""
        at = self.weight
        if at is not None:
            weight = arguments[at]
            for packer in self.foreign[name]:
                if packer.is_packed(weight):
                    multiplier = None if self.multiplier is None else arguments[self.multiplier]
                    assert self.weight_scale is not None
                    outputs = arguments[self.weight_scale].shape[0]
                    return (*arguments[:at], packer.unpack(weight, multiplier, outputs), *arguments[at + 1 :])
        return arguments


def _signature(arguments: Arguments) -> Hashable:
    """What tells launches apart: shapes and dtypes of tensors, and all other arguments."""
    given = (tuple(a) if isinstance(a, list) else a for a in arguments)  # torch hands sizes on as lists
    return tuple((a.shape, a.dtype) if isinstance(a, torch.Tensor) else a for a in given)


@measurements.emptied_by_forget
@functools.cache
def choice(op: str, device: torch.device) -> Choice:
    """What holds for an op on a device; the files are read once."""
    usual = usual_order(device)
    best: dict[str, str] = {}
    raced = [backend for backend in backends().values() if backend.is_raced]
    if any(backend.device_type == device.type for backend in raced):
        accepted = [*(backend.name for backend in raced), DEFINITION]
        fastest = measurements.fastest_backends(op, device, accepted)
        there = {name for name in set(fastest.values()) if backends()[name].serves(device) and backends()[name].has(op)}
        best = {text: name for text, name in fastest.items() if name in there and name != usual[0]}
    measured = {text: tuple(dict.fromkeys((name, *usual))) for text, name in best.items()}
    packers = {
        backend.name: packer
        for backend in backends().values()
        if backend.device_type in ("", device.type) and (packer := backend.packer(op)) is not None
    }
    foreign = {
        name: tuple(packer for owner, packer in packers.items() if owner != name) for name in backends() if packers
    }
    spec = spec_of(op)
    weight, multiplier, weight_scale = (
        spec.arguments.index(name) if name in spec.arguments else None
        for name in ("weight", "multiplier", "weight_scale")
    )
    off, key = measurements.off(op, device), spec.shape.key(spec.arguments)
    absent = f"not available on {device}"
    return Choice(spec, usual, off, measured, foreign, absent, weight, multiplier, weight_scale, key)


def backend_order(op: str, arguments: Arguments, device: torch.device) -> tuple[str, ...]:
    """The backends that a call is offered to, one after the other; those switched off are among them."""
    chosen = choice(op, device)
    return chosen.order(arguments) if chosen.measured else chosen.usual


def packer(op: str, device: torch.device) -> Packer | None:
    """How the weight of an op is held on a device: as the backend packs it that is offered the op first.

    Returns:
        None where that backend takes the weight as a checkpoint holds it.
    """
    for name in usual_order(device):
        backend = backends()[name]
        if backend.serves(device):
            return backend.packer(op)
    return None


def is_served(op: str, device: torch.device) -> bool:
    """Whether the backend that is offered an op first on a device has it: else parts of it, each an op, run faster.

    On the meta device, where nothing is computed, calls are recorded as a GPU would get them.
    """
    if device.type == "meta":
        return True
    off = measurements.off(op, device)
    first = next(name for name in usual_order(device) if name not in off and backends()[name].serves(device))
    return first != DEFINITION and backends()[first].has(op)


def _switched_off(op: str, name: str, reason: str) -> str:
    """Why a backend that was found to be wrong here gets no call; said once as a warning, too."""
    told = f"switched off by `ldmq doctor`: {reason}"
    measurements.warn_once(f"ldmq::{op} on {name} is {told}; run `ldmq doctor` again once it is mended")
    return told


@functools.cache
def _tell_of_the_definition(device: torch.device) -> None:
    """Warn where no backend but the definition serves a device: it is right, and slow."""
    others = [backends()[name] for name in usual_order(device) if name != DEFINITION]
    if not any(backend.serves(device) for backend in others):
        why = "; ".join(f"{backend.name}: {backend.why_not(device)}" for backend in others)
        measurements.warn_once(
            f"the quantized ops run by their definition on {device}, more slowly than in float: "
            f"no faster backend serves it ({why}); `ldmq doctor` tells more"
        )


def server(op: str) -> Callable[..., Any]:
    """The implementation of an op: hands the call to the first backend that takes it."""
    table, spec = backends(), spec_of(op)
    floating = spec.floating

    def serve(*arguments: Any) -> Any:
        if torch.is_grad_enabled():
            for index in floating:
                if index < len(arguments) and (tensor := arguments[index]) is not None and tensor.requires_grad:
                    return differentiated(arguments)
        device = arguments[0].device
        forced, chosen = forced_backend(), choice(op, device)
        names = (forced,) if forced else chosen.order(arguments) if chosen.measured else chosen.usual
        reasons: list[str] = []
        for name in names:
            backend = table[name]
            if name in chosen.off:
                why = _switched_off(op, name, chosen.off[name])
            elif not backend.serves(device):
                why = chosen.absent
            elif (function := getattr(backend, op, None)) is None:
                why = "has no such op"
            elif chosen.unlaunched and not forced and (earlier := chosen.not_launched(name, arguments)):
                why = earlier
            else:
                taken = chosen.plain(name, arguments) if chosen.foreign.get(name) else arguments
                try:
                    result = function(*taken)
                except Unsupported as refusal:
                    why = str(refusal)
                except Exception as error:
                    failure = "" if forced else backend.launch_failure(error)
                    if not failure:
                        raise
                    why = chosen.note_unlaunched(name, arguments, failure)
                else:
                    _calls[op, name, device] += 1
                    if reasons and name == DEFINITION:
                        _tell_of_the_definition(device)
                    return result
            reasons.append(f"{name}: {why}")
            _refusals[op, name, why] += 1
        raise RuntimeError(f"ldmq::{op}: no backend takes this call ({'; '.join(reasons)})")

    def differentiated(arguments: Arguments) -> Any:
        if not spec.rounds:
            _calls[op, DEFINITION, arguments[0].device] += 1
            return getattr(table[DEFINITION], op)(*arguments)
        gradients.check(spec, arguments)
        return gradients.refusing(spec, serve, arguments)

    serve.__name__ = op
    return serve


def dispatch_report() -> str:
    """Who served what since the start, and what was refused and why, as text."""
    calls = sorted((op, name, str(device), count) for (op, name, device), count in _calls.items())
    lines = [f"{op:22} {name:10} {device:8} {count:8} calls" for op, name, device, count in calls]
    lines += [f"{op:22} {name:10} refused {count} times: {why}" for (op, name, why), count in sorted(_refusals.items())]
    return "\n".join(lines) or "no ldmq op has run"


def calls_by_backend() -> dict[tuple[str, str], int]:
    """How many calls of an op a backend has served since the start, on all devices."""
    counts: Counter[tuple[str, str]] = Counter()
    for (op, name, _), count in _calls.copy().items():
        counts[op, name] += count
    return dict(counts)


def reset_dispatch_report() -> None:
    """Forget what was counted."""
    _calls.clear()
    _refusals.clear()


def visible_backends() -> dict[str, bool]:
    """Backend by name, and whether it serves the best device of this machine."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {name: backend.serves(device) for name, backend in backends().items()}
