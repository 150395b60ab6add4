"""The application on Ray Serve over two machines, which one machine stands for; the second ends and comes back."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import httpx
import pytest

pytest.importorskip("ray", reason="`make test-servers` installs it")

from python_tests.servers.on_ray import (
    BATCH,
    MACHINE,
    at_once,
    body,
    drawn_by,
    seeds,
    slow_application,
    start,
    two_machines,
    until,
)


def lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_what_is_lost_with_a_machine_is_what_was_in_its_replica(tmp_path: Path) -> None:
    with two_machines() as (url, machines):
        start(slow_application(tmp_path, min_replicas=2))
        assert len(drawn_by(tmp_path)) == 2  # each takes a GPU, of which a machine has one

        def end_the_second() -> None:
            until(lambda: all(drawn_by(tmp_path).values()))
            machines.remove_node(machines.list_all_nodes()[1], allow_graceful=False)

        answers = at_once(url, [body(number, steps=25) for number in range(40)], end_the_second)
        lost = [number for number, answer in enumerate(answers) if answer.status_code != 200]
        assert len(lost) <= 2 * BATCH, Counter(answer.status_code for answer in answers)
        assert all(seeds(answer) == [number] for number, answer in enumerate(answers) if number not in lost)
        (alive,) = filter(lives, drawn_by(tmp_path))
        assert not set(drawn_by(tmp_path)[alive]) & set(lost)
        (by_url,) = at_once(url, [body(1, response_format="url")])
        assert httpx.get(by_url.json()["data"][0]["url"], timeout=60).content.startswith(b"\x89PNG")
        machines.add_node(**MACHINE)
        until(lambda: sum(map(lives, drawn_by(tmp_path))) == 2)
