"""Another scheduler in a pipeline while it draws, made from the configuration of its own one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ldmq_kernels.calibration.denoisers import whole_pipeline


def schedulers_of(pipe: Any) -> dict[str, Any]:
    """The classes of schedulers that a pipeline can have in place of its own one, by name: its own among them."""
    own = getattr(whole_pipeline(pipe), "scheduler", None)
    found = [type(own), *getattr(own, "compatibles", ())]
    return {} if own is None else {kind.__name__: kind for kind in found}


def check_scheduler(pipe: Any, name: str | None) -> None:
    """Refuse a scheduler that a pipeline cannot have.

    Args:
        name: of its class, such as "DPMSolverMultistepScheduler"; None for the pipeline's own.

    Raises:
        ValueError: the pipeline has no scheduler, or that one does not take its configuration.
    """
    if name is not None and name not in (known := schedulers_of(pipe)):
        raise ValueError(
            f"{type(whole_pipeline(pipe)).__name__} cannot draw with the scheduler {name!r}: choose among "
            f"{', '.join(sorted(known)) or 'none, since it has none'}"
        )


@contextlib.contextmanager
def scheduled(pipe: Any, name: str | None) -> Iterator[None]:
    """A pipeline with another scheduler inside this block; with its own one if `name` is None.

    Raises:
        ValueError: as `check_scheduler`.
    """
    if name is None:
        yield
        return
    check_scheduler(pipe, name)
    whole = whole_pipeline(pipe)
    own = whole.scheduler
    whole.scheduler = schedulers_of(pipe)[name].from_config(own.config)
    try:
        yield
    finally:
        whole.scheduler = own
