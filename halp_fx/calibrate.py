"""Calibration: networks of random widths, measured whole."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence

import numpy as np

from halp_fx.errors import InputError, LatencyError
from halp_fx.latency import (
    Calibration,
    LatencyTable,
    Source,
    Stored,
    Timing,
    fit_calibration,
    measure_paired,
)
from halp_fx.passes.latency import copies_views, measure_widths, network_key, price, refine
from halp_fx.passes.rewrite import rewrite
from halp_fx.passes.rules.counts import Count, parameter_counts, total
from halp_fx.passes.rules.plan import kept_indices
from halp_fx.passes.select import unit_steps, widths
from halp_fx.types import ChannelGroups, IntArray, LatencyModel, Plan

__all__ = ["calibrate", "random_plan"]

_LEAST_SHARE = 0.1
_ROUNDS = 7  # samples of each network in a bout, in turn with the dense one
_BOUTS = 2  # in each both are prepared anew, one of them first


def calibrate(
    groups: ChannelGroups,
    source: Source,
    *,
    networks: int = 8,
    held_out: int = 4,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Fit `whole = offset + scale * kernels + rate * weights` on random widths, and keep it.

    Each network is measured in turn with the dense one, so that a machine that is slower for a
    while slows both; its kernels are measured at its widths, as `halp_fx.compile` does. The result
    goes into the source's table, where `halp_fx.compile` finds it. A run that was stopped goes on
    where it was; a new one measures all networks anew.

    Args:
        groups: of the network.
        source: a back-end that measures on this device, and its table.
        networks: random networks to fit on; the dense one is fitted besides.
        held_out: random networks to check the fit on.
        seed: of the widths.
        progress: called with how many kernels and networks are measured, and how many there are.

    Raises:
        InputError: there are no networks to fit on, or none to check.
        LatencyError: the source computes its costs, or its device is not this one, or a network
            can't be measured.
    """
    backend, table = source.backend, source.table
    if table is None or not backend.measured or isinstance(backend, Stored):
        raise LatencyError(
            f"the back-end {backend.name!r} doesn't measure here, so there is nothing to "
            "calibrate: pass one that measures this device"
        )
    if networks < 1 or held_out < 1:
        raise InputError(
            f"networks={networks}, held_out={held_out}: pass at least one to fit on and one to "
            "check the fit on"
        )
    costs = price(groups, source, calibrated=False)
    total = networks + held_out
    generator = np.random.default_rng(seed)
    plans = [random_plan(groups, costs, generator) for _ in range(total)]
    choices = [[len(units) for units in plan.units] for plan in plans]
    kernels = 0

    def tell(done: int, measured: int) -> None:
        nonlocal kernels
        kernels = measured
        if progress is not None:
            progress(done, kernels + total)

    measure_widths(groups, source, costs, choices, progress=tell)
    key = network_key(groups, backend.fuses, copies=copies_views(backend))
    keys = [_keys_of(groups, backend.fuses, i, kept) for i, kept in enumerate(choices)]
    pairs: dict[int, tuple[Timing, Timing]] = {}
    # In random order: what the machine does meanwhile is no matter of those held out.
    for done, i in enumerate(generator.permutation(total).tolist(), start=1):
        pairs[i] = _whole(source, table, keys[i], plans[i])
        if progress is not None:
            progress(kernels + done, kernels + total)
    # They are there for a run that is stopped; the next one is to measure anew.
    table.remove(itertools.chain.from_iterable(keys), backend.fingerprint())
    usual_ms = statistics.median(before.median_ms for before, _ in pairs.values())
    weights = parameter_counts(groups)
    sums, times = [costs.dense_ms], [usual_ms]
    sizes = [_megabytes(weights, groups.dense_units)]
    for i, kept in enumerate(choices):
        before, after = pairs[i]
        sums.append(refine(groups, source, costs, kept).total_ms(kept))
        times.append(after.median_ms / before.median_ms * usual_ms)
        sizes.append(_megabytes(weights, kept))
    found = fit_calibration(sums, times, sizes, held_out=held_out)
    table.put_calibration(key, backend.fingerprint(), found)
    return found


def _keys_of(
    groups: ChannelGroups, fuses: bool, number: int, kept: Sequence[int]
) -> tuple[str, str]:
    """Where the table keeps the dense network and a pruned one, until the calibration is done."""
    name = f"whole network {number}, {network_key(groups, fuses, kept)}"
    return f"{name}: dense", f"{name}: pruned"


def _whole(
    source: Source, table: LatencyTable, keys: tuple[str, str], plan: Plan
) -> tuple[Timing, Timing]:
    """What the dense network and a pruned one take: as a run that was stopped left it, or measured.

    Kept as soon as it is known, so that a run that is killed loses one network at most.
    """
    backend, traced = source.backend, plan.groups.traced
    known = [table.get(key, backend.fingerprint()) for key in keys]
    if known[0] is not None and known[1] is not None:
        return known[0], known[1]
    pair = measure_paired(
        traced.module, rewrite(plan).eval(), backend, traced.example_inputs, traced.example_inputs,
        rounds=_ROUNDS, bouts=_BOUTS,
    )  # fmt: skip
    table.put_all(dict(zip(keys, pair, strict=True)), backend.fingerprint())
    return pair


def _megabytes(weights: list[Count], kept: Sequence[int]) -> float:
    return 4e-6 * total(weights, kept)


def random_plan(groups: ChannelGroups, costs: LatencyModel, generator: np.random.Generator) -> Plan:
    """A plan of random widths among those that the solver may choose, wide or narrow."""
    overall = generator.uniform(0.25, 1.0)
    units: list[IntArray] = []
    for group, step in zip(groups.groups, unit_steps(groups, costs), strict=True):
        allowed = widths(group, min_share=_LEAST_SHARE, step=step)
        wanted = group.units * min(1.0, overall * generator.uniform(0.6, 1.4))
        nearest = int(allowed[np.argmin(np.abs(allowed - wanted))])
        units.append(np.arange(nearest, dtype=np.int64))
    predicted = costs.total_ms([len(kept) for kept in units])
    return Plan(
        kept=kept_indices(groups, units),
        units=tuple(units),
        dense_ms=costs.dense_ms,
        predicted_ms=predicted,
        budget_ms=predicted,
        gap=0.0,
        value=0.0,
        dense_value=0.0,
        solver="random",
        groups=groups,
    )
