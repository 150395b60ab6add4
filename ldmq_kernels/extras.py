"""Which extra of the package brings a library that is not installed: `pip install 'ldmq_kernels[plan]'`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

EXTRA_OF = {
    "PIL": "report",
    "accelerate": "diffusers",
    "diffusers": "diffusers",
    "huggingface_hub": "diffusers",
    "fastapi": "serve",
    "jsonschema": "diffusers",
    "matplotlib": "report",
    "prometheus_client": "serve",
    "python_multipart": "serve",
    "ray": "ray",
    "rich": "cli",
    "scipy": "plan",
    "torchmetrics": "plan",
    "transformers": "diffusers",
    "typer": "cli",
    "uvicorn": "serve",
}


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Say in the error of a missing library which extra brings it.

    Args:
        what: the part of the package that needs the library, for the error.

    Raises:
        ModuleNotFoundError: a library is not installed; with the command that installs it, where an extra has it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in EXTRA_OF:
            raise
        text = (
            f"{what} needs {library}, which is not installed: "
            f"pip install 'ldmq_kernels[{EXTRA_OF[library]}]', or [all] for everything"
        )
        raise ModuleNotFoundError(text, name=error.name) from None
