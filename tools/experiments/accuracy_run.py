"""Prune by each method to each budget, recalibrate, fine-tune, test: one record each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from halp_fx.errors import DependencyError
from halp_fx.tools.experiments.accuracy_data import correct
from halp_fx.tools.experiments.accuracy_methods import DENSE, Method, candidate_key
from halp_fx.tools.experiments.accuracy_records import Journal, Record, packed
from halp_fx.tools.experiments.accuracy_task import Task
from halp_fx.tools.experiments.accuracy_tune import best_tuned, random_devices

__all__ = ["Plan", "made", "require", "run"]

Tell = Callable[[int, int, Record, bool], None]  # done, total, record, whether it was there already


@dataclass(frozen=True)
class Plan:
    """Which records an experiment consists of."""

    networks: tuple[str, ...]
    methods: tuple[Method, ...]
    budgets: tuple[float, ...]
    seeds: tuple[int, ...]

    def __len__(self) -> int:
        each = 1 + len(self.methods) * len(self.budgets) * len(self.seeds)
        return len(self.networks) * each

    def of(self, network: str) -> Iterator[tuple[str, Method, float, int]]:
        """Records of one network; the dense one first, then complete rounds of all methods."""
        yield network, DENSE, 1.0, self.seeds[0]
        for budget in self.budgets:
            for seed in self.seeds:
                for method in self.methods:
                    yield network, method, budget, seed


def run(
    plan: Plan,
    journal: Journal,
    make_task: Callable[[str], Task],
    *,
    again: bool = False,
    tell: Tell | None = None,
) -> list[Record]:
    """Make the records that are not there yet.

    A method that fails at a budget gives a record with a remark, and the others go on.

    Args:
        plan: what to make.
        journal: where records are kept.
        make_task: network -> its task; called for networks with records left to make.
        again: repeat those that failed before.
        tell: called after each record.

    Returns:
        The records of the plan, in its order.

    Raises:
        DependencyError: a package is missing.
    """
    found: list[Record] = []
    for network in plan.networks:
        task: Task | None = None
        for name, method, budget, seed in plan.of(network):
            record = journal.find(name, method.name, budget, seed)
            there = not _is_due(record, again)
            if record is None or not there:
                task = make_task(network) if task is None else task
                record = _record(task, method, budget, seed, journal.settings)
                journal.add(record)
            found.append(record)
            if tell is not None:
                tell(len(found), len(plan), record, there)
    return found


def made(plan: Plan, journal: Journal) -> list[Record]:
    """The records of a plan that are there, in its order."""
    found = [
        journal.find(name, method.name, budget, seed)
        for network in plan.networks
        for name, method, budget, seed in plan.of(network)
    ]
    return [record for record in found if record is not None]


def require(
    plan: Plan, journal: Journal, of_network: Callable[[str], object], *, again: bool = False
) -> None:
    """Check that the packages of all records that `run` would make are installed.

    Args:
        plan, journal, again: as for `run`.
        of_network: raises where a package is missing that the network of this name needs.

    Raises:
        DependencyError: a package is missing.
    """
    for network in plan.networks:
        due = [
            method
            for name, method, budget, seed in plan.of(network)
            if _is_due(journal.find(name, method.name, budget, seed), again)
        ]
        if due:
            of_network(network)
        for method in due:
            if method.needs is not None:
                method.needs()


def _is_due(record: Record | None, again: bool) -> bool:
    return record is None or (again and bool(record.remark))


def _record(task: Task, method: Method, budget: float, seed: int, settings: str) -> Record:
    base = Record(task.name, method.name, budget, seed, settings, method.title)
    start = time.monotonic()
    try:
        with torch.random.fork_rng(devices=random_devices(task.device)):
            torch.manual_seed(seed)
            done = _made(task, method, budget, seed, base)
    except DependencyError:
        raise
    except Exception as error:  # noqa: BLE001  peers fail in many ways; the others go on
        remark = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        done = replace(base, remark=remark)
    return replace(done, seconds=round(time.monotonic() - start, 1))


def _made(task: Task, method: Method, budget: float, seed: int, base: Record) -> Record:
    key = candidate_key(method, budget, seed)
    candidate = task.once(key, lambda: method.prune(task, budget, seed))
    # The networks of a method without seeds are measured once: they are the same ones.
    dense_ms, pruned_ms = task.once(("latency", *key), lambda: task.measured(candidate.network))
    network = deepcopy(candidate.network).to(task.device)
    images = task.tested()
    before: np.ndarray[Any, Any] | None = None
    if candidate.recalibrate:
        (task.reconstruct if method.reconstruct else task.recalibrate)(network, seed)
    if not candidate.used_images:
        before = correct(network, images)
    network, rate = best_tuned(
        task, network, seed, used=candidate.used_images, recovery=method.recovery
    )
    after = correct(network, images)
    counts = [sum(p.numel() for p in net.parameters()) for net in (network, task.dense)]
    return replace(
        base,
        share=pruned_ms / dense_ms,
        dense_ms=dense_ms,
        pruned_ms=pruned_ms,
        knob=candidate.knob,
        variant=candidate.variant,
        params_share=counts[0] / counts[1],
        recalibrated=None if before is None else float(before.mean()),
        tuned=float(after.mean()),
        rate=rate,
        tested=len(images),
        right_recalibrated="" if before is None else packed(before),
        right_tuned=packed(after),
    )
