"""Schedules of budgets."""

from __future__ import annotations

import itertools

import pytest

from halp_fx.errors import InputError
from halp_fx.training.schedule import check_schedule, limit_at


def test_exponential_takes_the_same_share_each_time() -> None:
    limits = [limit_at("exponential", t, 30, dense=10.0, target=2.5) for t in range(31)]
    ratios = [b / a for a, b in itertools.pairwise(limits)]
    assert limits[0] == 10.0 and limits[30] == 2.5
    assert ratios == pytest.approx([0.25 ** (1 / 30)] * 30)


def test_linear_takes_the_same_amount_each_time() -> None:
    assert [limit_at("linear", t, 4, dense=10.0, target=2.0) for t in range(1, 5)] == [
        8.0,
        6.0,
        4.0,
        2.0,
    ]


def test_a_callable_says_how_much_of_the_reduction_is_done() -> None:
    limits = [limit_at(lambda p: p**2, t, 2, dense=10.0, target=2.0) for t in (1, 2)]
    assert limits == [8.0, 2.0]


@pytest.mark.parametrize("schedule", ["exponential", "linear"])
def test_a_target_above_the_dense_holds_from_the_start(schedule: str) -> None:
    assert limit_at(schedule, 1, 5, dense=10.0, target=12.0) == 12.0


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("cosine", 'schedule is \'cosine\': pass "exponential", "linear", or a callable'),
        (lambda p: 1 - p, r"schedule\(0.5\) is 0.0 after 0.5|schedule\(0.5\) is 0.5 after 0.75"),
        (lambda p: p / 2, r"schedule\(1.0\) is 0.5: it must end at 1"),
        (lambda p: float("nan"), r"is nan, not a number"),
        (lambda p: 2 * p, r"schedule\(0.75\) is 1.5 after 1.0 at the milestone before"),
        (lambda p: "all", r"schedule\(0.25\) is 'all', not a number"),
    ],
)
def test_a_schedule_that_can_not_be_is_an_error(schedule: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_schedule(schedule, 4)  # type: ignore[arg-type]
