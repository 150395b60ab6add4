"""Rules and exceptions say of every layer exactly what was chosen, in few lines."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
import torch

from ldmq_kernels.planning.rules import compress, patterns_of
from ldmq_kernels.plans.layers import quantizable_layers
from ldmq_kernels.plans.plan import Plan, model_record
from python_tests.tiny import tiny_unet

SCHEMES = ("w8a8-static", "w8a8-dynamic", "w8a16", "w4a8-static", "fp16")
NAMES = list(quantizable_layers(tiny_unet(layers_per_block=2)))


def read(rules: list[dict[str, str]], exceptions: dict[str, str], name: str) -> str:
    """As the format of plans says: an exception, else the last rule that fits."""
    fitting = [rule["scheme"] for rule in rules if fnmatchcase(name, rule["pattern"])]
    return exceptions.get(name, fitting[-1])


def reproduced(schemes: dict[str, str]) -> tuple[list[dict[str, str]], list[str]]:
    rules, wrong = compress(schemes)
    exceptions = {name: schemes[name] for name in wrong}
    assert {name: read(rules, exceptions, name) for name in schemes} == schemes
    return rules, wrong


@pytest.mark.parametrize("seed", range(8))
def test_any_choice_is_reproduced_and_never_in_more_lines_than_exceptions_alone(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    shares = torch.rand(len(SCHEMES), generator=random) ** 3
    drawn = torch.multinomial(shares, len(NAMES), replacement=True, generator=random).tolist()
    schemes = dict(zip(NAMES, (SCHEMES[i] for i in drawn), strict=True))
    rules, wrong = reproduced(schemes)
    commonest = max(drawn.count(i) for i in set(drawn))
    assert len(rules) + len(wrong) <= 1 + len(NAMES) - commonest


def test_a_choice_by_kind_and_block_takes_as_many_rules_as_it_has_thoughts() -> None:
    def thought(name: str) -> str:
        if name == "conv_in":
            return "fp16"
        if name.startswith("mid_block"):
            return "w8a16"
        if name.endswith((".attn2.to_q", ".attn2.to_k", ".attn2.to_v")):
            return "w8a8-dynamic"
        return "w4a8-static" if name.endswith((".conv1", ".conv2")) else "w8a8-static"

    schemes = {name: thought(name) for name in NAMES}
    rules, wrong = reproduced(schemes)
    assert wrong == ["conv_in"]
    assert len(rules) == 4
    assert {rule["pattern"] for rule in rules} >= {"*", "*.conv?", "*.attn2.to_?"}
    assert rules[0] == {
        "pattern": "*",
        "scheme": "w8a8-static",
        "reason": f"the commonest choice: {sum(s == 'w8a8-static' for s in schemes.values())} of {len(NAMES)} layers",
    }


def test_reasons_count_the_layers_that_agree() -> None:
    schemes = {name: "w8a16" if name.endswith("to_q") else "w8a8-static" for name in NAMES}
    queries = [name for name in NAMES if name.endswith("to_q")]
    schemes[queries[0]] = "fp16"
    rules, wrong = reproduced(schemes)
    assert wrong == [queries[0]]
    assert rules[1]["reason"] == f"{len(queries) - 1} of {len(queries)} layers of this kind choose it"


def test_one_scheme_for_all_is_one_rule() -> None:
    rules, wrong = reproduced(dict.fromkeys(NAMES, "w8a16"))
    assert ([rule["pattern"] for rule in rules], wrong) == (["*"], [])


def test_every_pattern_of_a_name_fits_it() -> None:
    for name in NAMES:
        assert all(fnmatchcase(name, pattern) for pattern in patterns_of(name))


def test_a_plan_reads_the_rules_as_they_were_meant() -> None:
    unet = tiny_unet(layers_per_block=2)
    schemes = {name: SCHEMES[1 + index % 2] if "attn" in name else "fp16" for index, name in enumerate(NAMES)}
    rules, wrong = compress(schemes)
    exceptions = {name: {"scheme": schemes[name], "reason": "made up"} for name in wrong}
    plan = Plan(model_record(unet), rules, exceptions)
    assert {name: str(plan.layer(name).scheme) for name in NAMES} == schemes
    assert Plan.from_dict(plan.to_dict()).rules == rules
