"""The application on Ray Serve: replicas that are killed, updated, added, and what they share."""

from __future__ import annotations

import importlib
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

pytest.importorskip("ray", reason="`make test-servers` installs it")

from ray.serve.schema import ServeDeploySchema

from ldmq_kernels.serving.loading import ServingError
from ldmq_kernels.serving.ray import FIGURES_S, Images, Keeper, read_settings
from python_tests.servers.on_ray import BATCH, at_once, body, cluster, drawn_by, seeds, slow_application, start, until
from python_tests.serving.served import GENERATIONS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with cluster() as url:
        yield url


def figures(url: str, name: str) -> dict[str, float]:
    """The figures whose lines begin with the name, by replica."""
    found: Counter[str] = Counter()
    for line in httpx.get(f"{url}/metrics", timeout=60).text.splitlines():
        if line.startswith(name):
            labels, _, value = line.rpartition(" ")
            found[labels.partition('replica="')[2].partition('"')[0]] += float(value)
    return found


def total(url: str, name: str) -> float:
    return sum(figures(url, name).values())


def served(url: str) -> str:
    return httpx.get(f"{url}/v1/models", timeout=60).json()["data"][0]["id"]


def test_what_is_lost_with_a_replica_is_what_was_in_it(url: str, tmp_path: Path) -> None:
    start(slow_application(tmp_path, min_replicas=2))
    assert len(drawn_by(tmp_path)) == 2
    killed = min(drawn_by(tmp_path))

    def kill() -> None:
        until(lambda: all(drawn_by(tmp_path).values()))
        os.kill(killed, signal.SIGKILL)

    answers = at_once(url, [body(number, steps=25) for number in range(40)], kill)
    count = Counter(answer.status_code for answer in answers)
    lost = [number for number, answer in enumerate(answers) if answer.status_code != 200]
    assert len(lost) <= 2 * BATCH, count
    assert all(seeds(answer) == [number] for number, answer in enumerate(answers) if number not in lost)
    others = {number for pid, numbers in drawn_by(tmp_path).items() if pid != killed for number in numbers}
    assert not others & set(lost)
    until(lambda: len(drawn_by(tmp_path)) == 3)  # another takes its place
    assert at_once(url, [body(1)])[0].status_code == 200


def test_an_update_to_another_model_loses_no_request(url: str, tmp_path: Path) -> None:
    start(slow_application(tmp_path, "one", min_replicas=2))
    assert served(url) == "one"
    ended, statuses = threading.Event(), Counter[int]()

    def ask(number: int) -> None:
        with httpx.Client(base_url=url, timeout=120) as client:
            while not ended.is_set():
                answer = client.post(GENERATIONS, json=body(number))
                statuses[answer.status_code] += 1
                assert seeds(answer) == [number]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: statuses[200] > 6)
        start(slow_application(tmp_path, "two", min_replicas=2))
        until(lambda: {served(url) for _ in range(8)} == {"two"})
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert set(statuses) == {200}


def test_a_model_that_does_not_load_leaves_the_one_before_it(url: str, tmp_path: Path) -> None:
    start(slow_application(tmp_path, "good"))
    with pytest.raises(RuntimeError, match="images"):
        start(slow_application(tmp_path, "broken"))
    assert served(url) == "good"
    assert at_once(url, [body(3)])[0].status_code == 200


def test_every_replica_finds_a_picture_by_its_url(url: str, tmp_path: Path) -> None:
    start(slow_application(tmp_path, min_replicas=2))
    answers = at_once(url, [body(number, response_format="url") for number in range(4)])
    for answer in answers:
        for _ in range(4):
            assert httpx.get(answer.json()["data"][0]["url"], timeout=60).content.startswith(b"\x89PNG")


def test_more_than_may_wait_is_refused_and_the_rest_is_drawn(url: str, tmp_path: Path) -> None:
    start(slow_application(tmp_path, step_seconds=0.05, limits={"max_batch": 1}))
    answers = at_once(url, [body(number) for number in range(60)])
    count = Counter(answer.status_code for answer in answers)
    assert set(count) == {200, 429}
    assert all("retry-after" in answer.headers for answer in answers if answer.status_code == 429)
    assert count[200] >= 16


def test_a_batch_stops_when_its_clients_have_left(url: str, tmp_path: Path) -> None:
    start(slow_application(tmp_path, step_seconds=0.05))
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}{GENERATIONS}", json=body(1, steps=200), timeout=5)
    until(lambda: total(url, "ldmq_batches_stopped_total") == 1, 20)


def test_waiting_requests_start_another_replica(url: str, tmp_path: Path) -> None:
    start(slow_application(tmp_path, step_seconds=0.05, max_replicas=2))
    ended = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=url, timeout=120) as client:
            while not ended.is_set():
                client.post(GENERATIONS, json=body(1, steps=20)).raise_for_status()

    threads = [threading.Thread(target=ask) for _ in range(4 * BATCH)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: len(drawn_by(tmp_path)) == 2, 240)
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def test_figures_are_those_of_every_replica(url: str, tmp_path: Path) -> None:
    start(slow_application(tmp_path, min_replicas=2))
    answers = at_once(url, [body(number) for number in range(6 * BATCH)])
    assert {answer.status_code for answer in answers} == {200}
    assert all(drawn_by(tmp_path).values())
    until(lambda: len(figures(url, "ldmq_images_total")) == 2)
    until(lambda: total(url, "ldmq_images_total") == 6 * BATCH)


def test_figures_of_a_replica_that_is_gone_are_told_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = Keeper(10, 10)
    keeper.tell("images", "gone", [])
    keeper.tell("another", "other", [])
    assert set(keeper.tell("images", "here", [])) == {"gone", "here"}
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + FIGURES_S + 1)
    assert set(keeper.tell("images", "here", [])) == {"here"}


def test_arguments_are_read_as_a_configuration_gives_them() -> None:
    settings = read_settings({"models": "/a/one,/b/two", "steps": "30", "limits": {"max_batch": "4"}})
    assert [(str(model.folder), model.name) for model in settings.models] == [("/a/one", "one"), ("/b/two", "two")]
    assert (settings.steps, settings.limits.max_batch) == (30, 4)


def test_the_page_s_configuration_is_one_of_ray_s() -> None:
    text = (ROOT / "docs" / "ray.md").read_text().partition("```yaml\n")[2].partition("```")[0]
    (found,) = ServeDeploySchema.model_validate(yaml.safe_load(text)).applications
    module, _, name = found.import_path.partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    assert read_settings(found.args).limits.max_batch == 8
    assert [deployment.name for deployment in found.deployments] == [Images.__name__]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"models": "/a", "stepz": 3}, "stepz"),
        ({"models": "/a", "limits": {"batch": 1}}, "limits.batch"),
        ({"models": "/a", "dtype": "int8"}, "dtype"),
        ({"models": None}, "models"),
        ({"models": {"folder": "/a", "name": "a"}}, "models"),
    ],
)
def test_an_argument_that_is_wrong_is_named(given: dict[str, Any], named: str) -> None:
    with pytest.raises(ServingError, match=named):
        read_settings(given)
