"""Budgets: shares, times, percentages, and what is refused."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import halp_fx
from halp_fx.budget import Budget, parse_budget
from halp_fx.errors import BudgetError, InputError

__all__: list[str] = []

ACCEPTED = r"pass a share of the dense latency \(0\.5\), a time \(\"4ms\"\) or halp_fx\.Budget"


@pytest.mark.parametrize(
    ("given", "expected_ms"),
    [
        (0.5, 4.0),
        (1, 8.0),
        (1.0, 8.0),
        ("0.5", 4.0),
        ("50%", 4.0),
        (" 50 % ", 4.0),
        ("12.5%", 1.0),
        ("4ms", 4.0),
        ("4 ms", 4.0),
        ("800us", 0.8),
        ("1e3us", 1.0),
        ("0.1s", 100.0),
        (Budget(share=0.25), 2.0),
        (Budget(latency_ms=3), 3.0),
        (Budget(latency_ms=3.5), 3.5),
    ],
    ids=repr,
)
def test_what_is_accepted(given: Any, expected_ms: float) -> None:
    assert parse_budget(given).in_ms(dense_ms=8.0) == pytest.approx(expected_ms)


@pytest.mark.parametrize("number", [0, 0.0, -0.5, -3, float("nan"), float("inf"), -float("inf")])
def test_numbers_out_of_range(number: float) -> None:
    with pytest.raises(BudgetError, match=rf"is {number!r}, it must be above 0: {ACCEPTED}"):
        parse_budget(number)


@pytest.mark.parametrize("text", ["0ms", "-4ms", "0%", "-5%", "nan", "0", "-0.5", "0s", "1e999ms"])
def test_texts_out_of_range(text: str) -> None:
    with pytest.raises(BudgetError, match="it must be above 0"):
        parse_budget(text)


@pytest.mark.parametrize("given", [4, 1.5, "4", "150%"])
def test_a_share_above_one_suggests_the_unit(given: Any) -> None:
    with pytest.raises(BudgetError, match=r'is above 1: .*for a time write the unit, "[0-9.]+ms"'):
        parse_budget(given)


@pytest.mark.parametrize(
    "text", ["", "fast", "4 minutes", "ms", "4ms please", "1e", "--4ms", "4msms", "e5us"]
)
def test_texts_that_cannot_be_parsed(text: str) -> None:
    with pytest.raises(BudgetError, match=rf"the budget {text!r} can't be parsed: {ACCEPTED}"):
        parse_budget(text)


@pytest.mark.parametrize(
    "given", [True, False, None, [0.5], {"share": 0.5}, 1j, torch.tensor(0.5), b"4ms"], ids=repr
)
def test_wrong_types(given: Any) -> None:
    with pytest.raises(BudgetError, match=rf"(?s)of the budget is .*, not a number: {ACCEPTED}"):
        parse_budget(given)


def test_exactly_one_of_time_and_share() -> None:
    for options in ({}, {"latency_ms": 1.0, "share": 0.5}):
        with pytest.raises(BudgetError, match="exactly one of latency_ms and share"):
            Budget(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"latency_ms": "4"}, {"share": True}, {"latency_ms": True}])
def test_fields_of_the_wrong_type(options: dict[str, Any]) -> None:
    with pytest.raises(BudgetError, match="not a number"):
        Budget(**options)


def test_a_budget_error_is_an_input_error() -> None:
    with pytest.raises(ValueError, match="above 0"):
        Budget(share=0.0)
    assert issubclass(BudgetError, InputError)
    assert halp_fx.Budget is Budget


def test_compile_refuses_before_it_traces() -> None:
    with pytest.raises(BudgetError, match="not a number"):
        halp_fx.compile(nn.Identity(), True, torch.rand(1, 3, 8, 8), latency="analytic")


@pytest.mark.parametrize("half", [0.5, np.float32(0.5), Fraction(1, 2)])
def test_shares_of_counts_may_be_any_fraction(half: Any) -> None:
    assert Budget(params=half, macs=1).counts(100, 1000) == {"params": 50.0, "macs": 1.0}
