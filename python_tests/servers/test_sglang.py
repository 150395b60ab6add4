"""SGLang serves what `save_pretrained` wrote by diffusers, and its batching is mended by this package's hooks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sglang", reason="`make test-servers` installs it")

from python_tests.servers.serving import SIZE, Server, draw, save_model, serving

SERVE = ("--backend", "diffusers", "--dit-precision", "fp32", "--vae-precision", "fp32")
BATCHES = ("--batching-max-size", "8", "--batching-delay-ms", "500", "--warmup-resolutions", f"{SIZE}x{SIZE}")
OWN_ROUNDING = 1  # of 255: it rounds pictures to 8 bit by itself


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("model") / "quantized"
    return folder, save_model(folder)


@pytest.fixture(scope="module")
def server(saved: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(("sglang", "serve", "--model-path", str(saved[0]), *SERVE, *BATCHES), log) as server:
        yield server


def apart(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def test_a_picture_is_diffusers_within_sglang_s_own_rounding(saved: tuple[Path, Any], server: Server) -> None:
    assert apart(server.pictures(seed=5)[0], draw(saved[1], 5)) <= OWN_ROUNDING


def test_requests_at_once_keep_their_seeds(saved: tuple[Path, Any], server: Server) -> None:
    seeds = range(20, 24)
    for seed, picture in zip(seeds, server.at_once(seeds), strict=True):
        assert apart(picture, draw(saved[1], seed)) <= OWN_ROUNDING, seed
