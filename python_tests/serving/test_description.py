"""The OpenAPI description, and requests made from it: none is answered with an error of the server's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import schemathesis
from hypothesis import strategies

from ldmq_kernels.serving.app import make_app
from python_tests.serving.served import Server, settings_of
from python_tests.tiny import SHALLOW, tiny_pipeline

OPERATIONS = 8


@pytest.fixture(scope="module")
def operations(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Any]]:
    pipe = tiny_pipeline(tmp_path_factory.mktemp("tokenizer"), **SHALLOW)
    settings = settings_of(guidance=4.0, steps=1, limits={"max_steps": 3, "max_pixels": 16 * 24})
    with Server(make_app(settings, lambda *_: {"tiny": pipe})) as url:
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
        yield [found.ok() for found in schema.get_all_operations()]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(OPERATIONS))
def test_no_request_that_the_description_allows_breaks_the_server(operations: list[Any], number: int) -> None:
    assert len(operations) == OPERATIONS
    strategy = operations[number].as_strategy()

    @hypothesis.settings(
        max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(strategies.data())
    def ask(data: Any) -> None:
        case = data.draw(strategy)
        answer = case.call()
        assert answer.status_code < 500, (case.as_curl_command(), answer.text)

    ask()
