"""Examines one model in a process of its own: `python -m halp_fx.tools.coverage_worker JOB OUT`.

JOB is a JSON text with `model`, `budget`, `seed` and `threads`; OUT is the file that gets a
`Record` as JSON, again after each stage, so that what was known before a crash is not lost.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
import time
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from halp_fx.errors import InfeasibleError, NothingToPruneError
from halp_fx.latency import Analytic, Source
from halp_fx.passes.groups import find_groups
from halp_fx.passes.latency import price
from halp_fx.passes.rewrite import rewrite
from halp_fx.passes.rules.plan import kept_indices
from halp_fx.passes.saliency import score
from halp_fx.passes.select import select
from halp_fx.passes.trace import trace
from halp_fx.tools.coverage_models import example_for
from halp_fx.tools.exactness import Exactness, calibrate, compare, randomize
from halp_fx.tools.models import load_model
from halp_fx.types import ChannelGroups, LatencyModel, Plan

__all__ = ["Cause", "Record", "examine"]

_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
_WEAK = 1e-6  # a dependence of the output on the input that proves little
_TOP = 8  # causes kept for each model


@dataclass(frozen=True)
class Cause:
    """Why channels are pinned."""

    reason: str
    node: str  # the first graph node that pins some of them
    source: str  # "file:line: code" of the model's source, or ""
    channels: int  # output channels of convolutions and linear layers


@dataclass(frozen=True)
class Record:
    """What came of one model; numbers are None where the examination did not get so far."""

    model: str  # "torchvision:resnet50"
    status: str = "error"  # exact, inexact, error, timeout or memory
    message: str = ""  # of the error; or what qualifies the status
    stage: str = "load"  # the last one that began
    inputs: str = ""  # shapes of the example
    opaque: tuple[str, ...] = ()  # "module: why" for what could not be traced and is held whole
    groups: int | None = None
    prunable: float | None = None  # share of the output channels of convolutions and linear layers
    inexact_groups: int | None = None  # groups over which a LayerNorm or the like takes statistics
    pinned: tuple[Cause, ...] = ()  # most channels first
    parameters: int | None = None  # of the dense network
    parameters_kept: float | None = None  # share
    latency_kept: float | None = None  # predicted share of the dense latency
    error: float | None = None  # exactness, relative to the output's magnitude
    signal: float | None = None  # see `Exactness.signal`
    trace_s: float | None = None
    groups_s: float | None = None
    rewrite_s: float | None = None
    total_s: float | None = None  # wall-clock of the process
    memory_gb: float | None = None  # peak resident memory of the process

    @property
    def passes_s(self) -> float | None:
        """Seconds for trace, groups and rewrite."""
        parts = (self.trace_s, self.groups_s, self.rewrite_s)
        return None if None in parts else sum(s for s in parts if s is not None)

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Record:
        """The record of a line that `to_json` gave."""
        facts = json.loads(text)
        facts["opaque"] = tuple(facts["opaque"])
        facts["pinned"] = tuple(Cause(**cause) for cause in facts["pinned"])
        return cls(**facts)


class _Log:
    """The record so far, on disk."""

    def __init__(self, model: str, path: Path | None) -> None:
        self.record = Record(model=model)
        self.path = path

    def note(self, **facts: Any) -> None:
        self.record = replace(self.record, **facts)
        if self.path is not None:
            partial = self.path.with_suffix(".part")
            partial.write_text(self.record.to_json(), encoding="utf-8")
            os.replace(partial, self.path)


def examine(
    model: str, *, budget: float = 0.5, seed: int = 0, output: Path | None = None
) -> Record:
    """Prune one model with random weights and hold the result to the dense network.

    Args:
        model: as `load_model` takes it.
        budget: share of the analytic latency; one below the least becomes the least.
        seed: of the random norm statistics.
        output: file that gets the record after each stage.

    Returns:
        The record; errors are in it, not raised.
    """
    log = _Log(model, output)
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _examine(log, model, budget, seed)
    except Exception as error:  # noqa: BLE001 (an error is a result here)
        log.note(status="error", message=_described(error))
    log.note(total_s=time.perf_counter() - start, memory_gb=_peak_gb())
    return log.record


def _examine(log: _Log, spec: str, budget: float, seed: int) -> None:
    network, inputs = load_model(spec)
    randomize(network, seed)
    parameters = sum(p.numel() for p in network.parameters())
    log.note(parameters=parameters, stage="input")
    if inputs is None:
        inputs = example_for(spec, network)
    calibrate(network, inputs, seed)
    log.note(inputs=" ".join(_shape(x) for x in inputs), stage="trace")

    began = time.perf_counter()
    traced = trace(network, inputs)
    opaque = tuple(f"{name}: {why}" for name, why in traced.opaque.items())
    log.note(trace_s=time.perf_counter() - began, opaque=opaque, stage="groups")

    began = time.perf_counter()
    groups = find_groups(traced)
    log.note(
        groups_s=time.perf_counter() - began,
        groups=len(groups.groups),
        inexact_groups=sum(1 for g in groups.groups if g.inexact),
        prunable=prunable_share(groups),
        pinned=causes(groups),
        stage="select",
    )
    if not groups.groups:
        raise NothingToPruneError("every channel is pinned")
    scores = score(groups)
    costs = price(groups, Source(Analytic(), None))
    plan = _plan(groups, scores, costs, budget)
    log.note(latency_kept=plan.predicted_ms / plan.dense_ms, stage="rewrite")

    began = time.perf_counter()
    pruned = rewrite(plan)
    kept = sum(p.numel() for p in pruned.parameters())
    log.note(
        rewrite_s=time.perf_counter() - began,
        parameters_kept=kept / max(parameters, 1),
        stage="compare",
    )
    first = compare(network, pruned, plan.kept, inputs, seed=seed)
    # A budget may leave most groups whole, or next to nothing of a group: halve them all, too.
    log.note(error=first.error, signal=first.signal, stage="halve")
    half = _halved(plan, seed)
    second = compare(network, rewrite(half), half.kept, inputs, seed=seed)
    log.note(
        status="exact" if first.exact and second.exact else "inexact",
        message="; ".join(_notes(first, second)),
        error=max(first.error, second.error),
        signal=max(first.signal, second.signal),
        stage="done",
    )


def _notes(budget: Exactness, halved: Exactness) -> list[str]:
    notes = list(dict.fromkeys(found.note for found in (budget, halved) if found.note))
    if budget.exact != halved.exact:
        notes.append(f"inexact only when {'halved' if budget.exact else 'pruned to the budget'}")
    if halved.dtype != torch.float64:
        notes.append("compared in float32")
    if budget.signal < _WEAK <= halved.signal:
        notes.append("pruned to the budget, the output hardly depends on the input")
    elif halved.signal < _WEAK:
        notes.append("the output hardly depends on the input: a weak test")
    return notes


def _halved(plan: Plan, seed: int) -> Plan:
    """Half of the units of each group, chosen at random."""
    generator = np.random.default_rng(seed)
    units = tuple(
        np.sort(generator.permutation(group.units)[: max(group.least, (group.units + 1) // 2)])
        for group in plan.groups.groups
    )
    return replace(plan, units=units, kept=kept_indices(plan.groups, units))


def _plan(groups: ChannelGroups, scores: Any, costs: LatencyModel, budget: float) -> Plan:
    try:
        return select(groups, scores, costs, budget * costs.dense_ms)
    except InfeasibleError as error:
        return select(groups, scores, costs, error.least * 1.02)


def prunable_share(groups: ChannelGroups) -> float:
    """Share of the output channels of convolutions and linear layers that belong to a group."""
    rows = _output_rows(groups)
    free = sum(
        member.index.size
        for group in groups.groups
        for member in group.members
        if (member.name, member.dim) in rows
    )
    return free / max(sum(rows.values()), 1)


def causes(groups: ChannelGroups) -> tuple[Cause, ...]:
    """What pins output channels of convolutions and linear layers, most channels first."""
    rows = _output_rows(groups)
    counts: Counter[tuple[str, str]] = Counter()  # of a source line, which often makes many nodes
    first: dict[tuple[str, str], str] = {}
    for pin in groups.pins:
        if (pin.name, pin.dim) in rows:
            key = pin.reason, pin.source or pin.node
            counts[key] += len(pin.index)
            first.setdefault(key, pin.node)
    return tuple(
        Cause(reason, first[reason, where], where if ":" in where else "", channels)
        for (reason, where), channels in counts.most_common(_TOP)
    )


def _output_rows(groups: ChannelGroups) -> dict[tuple[str, int], int]:
    """(weight, dim of its output channels) -> channels, of each layer that the graph uses.

    The layers are those of the model: the graph has only the weights of a layer class of a
    model's own (a convolution with standardised weights).
    """
    found: dict[tuple[str, int], int] = {}
    for path, module in groups.traced.root.named_modules():
        name = f"{path}.weight" if path else "weight"
        if isinstance(module, _LAYERS) and (spec := groups.parameters.get(name)) is not None:
            dim = 1 if isinstance(module, nn.modules.conv._ConvTransposeNd) else 0
            found[name, dim] = spec.dense_shape[dim]
    return found


def _shape(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "x".join(str(size) for size in value.shape)
    return type(value).__name__


def _described(error: BaseException) -> str:
    text = " ".join(str(error).split())
    notes = "; ".join(getattr(error, "__notes__", ()))
    return f"{type(error).__name__}: {text}"[:600] + (f" [{notes}]" if notes else "")


def _peak_gb() -> float | None:
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 30 if sys.platform == "darwin" else 1 << 20)


def _end_with(parent: int) -> None:
    """End this process when the sweep that started it is gone, in whatever way."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def main() -> None:
    """Entry point of the process."""
    job, output = json.loads(sys.argv[1]), Path(sys.argv[2])
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(int(job["threads"]))
    examine(job["model"], budget=job["budget"], seed=job["seed"], output=output)


if __name__ == "__main__":
    main()
