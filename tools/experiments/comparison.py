"""Ways to prune one trained network to the same latencies, compared on the task it was trained for.

Each result is a line of a file, written when it is known: a run that is stopped goes on with the
results that are missing.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import fx, nn

import halp_fx
from halp_fx.errors import InfeasibleError, InputError
from halp_fx.latency import Source, measure_paired
from halp_fx.passes.latency import price
from halp_fx.passes.saliency import DEFAULT
from halp_fx.tools.experiments.accuracy_task import to_latency
from halp_fx.tools.experiments.task import Task
from halp_fx.tools.experiments.training import Recipe, train
from halp_fx.tools.profiler import groups_of

__all__ = ["METHODS", "Record", "Settings", "check", "compare", "read_records"]

# What each method passes to halp_fx.compile.
METHODS: dict[str, Mapping[str, Any]] = {
    "joint": {"solver": "joint"},
    "joint-reconstructed": {"solver": "joint", "reconstruct": True},
    "uniform": {"solver": "uniform"},  # the same scores, but the same share of each group stays
    "uniform-l1": {"solver": "uniform", "saliency": "magnitude"},
    "halp": {"solver": "halp", "saliency": "taylor"},
    "joint-1.5": {"solver": "joint", "saliency": "taylor1.5"},
}
# A uniform share of wide steps may end far below the budget, one of narrow steps has widths that
# run slowly: the best of these is taken, so that it is not held to be worse than it is.
_ROUNDINGS: dict[str, tuple[int | None, ...]] = {"uniform": (None, 4, 1)}
_DENSE = "dense"
_TRIES = 5  # networks that are made to find one at the latency
_ROUNDS = 13  # pairs of samples in a bout, for the latencies that are reported
_BOUTS = 2
_ATTEMPTS = 5  # how often they are taken while the machine is busy with something else
_STEADY = 0.05  # relative spread

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """What results depend on besides method, speed-up and seed."""

    tune: Recipe  # its seed is replaced by that of the result
    score_batches: int = 16  # minibatches that channels are scored by
    recalibration_batches: int = 32

    def facts(self, task: Task, source: Source, dense: nn.Module) -> dict[str, Any]:
        """As JSON values."""
        tune = {f"tune_{k}": v for k, v in asdict(self.tune).items() if k != "seed"}
        return {
            **tune,
            "score_batches": self.score_batches,
            "recalibration_batches": self.recalibration_batches,
            "scores": DEFAULT,  # what methods without scores of their own take
            "backend": source.backend.name,
            "device": source.backend.fingerprint(),
            "dense": _digest(*(t.cpu().numpy().tobytes() for t in dense.state_dict().values())),
            **task.facts(),
            "test_images": task.test_count(),
        }


@dataclass(frozen=True)
class Record:
    """One pruned network, or the dense one."""

    method: str
    speedup: float  # asked for; 1 for the dense network
    seed: int
    settings: Mapping[str, Any]
    dense_ms: float  # measured in turn with `ms`; by the table where the back-end doesn't measure
    ms: float
    spread_ms: float | None  # half the interquartile range of `ms` beside the dense network
    outside_ms: float | None  # transform, anchors, suppression: what no pruning makes faster
    params: int
    value_kept: float  # share of the saliency
    gap: float | None  # certified; None for the dense network
    pruned: Mapping[str, float]  # metric -> after batch norm recalibration, without training
    tuned: Mapping[str, float]  # metric -> after fine-tuning

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes it the same result as another."""
        return _key(self.method, self.speedup, self.seed, self.settings)


def compare(
    task: Task,
    dense: nn.Module,
    folder: Path,
    *,
    methods: Sequence[str],
    speedups: Sequence[float],
    seeds: Sequence[int],
    settings: Settings,
    source: Source,
    progress: Progress,
    measure_again: bool = False,
) -> list[Record]:
    """Prune `dense` by each method to each speed-up, fine-tune, and evaluate before and after.

    The dense network is fine-tuned likewise, so that what more training alone gives is seen.

    Args:
        dense: the trained network; it is left as it is.
        folder: for records.jsonl and networks; records that are there already are not made again.
        methods: names in `METHODS`.
        speedups: dense latency over the latency aimed at, above 1.
        seeds: of the images that score channels and of fine-tuning.
        source: the back-end and the table for latencies.
        measure_again: measure the networks of records that are there already anew, one after the
            other, as on a machine that has become quiet.

    Returns:
        The records of these methods, speed-ups, seeds and settings.

    Raises:
        InputError: a method is unknown, or a speed-up is no number above 1.
        HalpError: the network can't be pruned.
    """
    check(methods, speedups, seeds)
    facts = settings.facts(task, source, dense)
    done = {record.key: record for record in read_records(folder)}
    wanted = [(_DENSE, 1.0)] + [(method, speedup) for speedup in speedups for method in methods]
    records = []
    for seed in seeds:
        for method, speedup in wanted:
            key = _key(method, speedup, seed, facts)
            run = _Run(
                task, dense, folder, method, speedup, seed, settings, facts, source, progress
            )
            if key not in done:
                done[key] = run.record()
                _append(folder, done[key])
            elif measure_again and source.backend.measured:
                done[key] = run.again(done[key])
                _append(folder, done[key])
            records.append(done[key])
    return records


def check(methods: Sequence[str], speedups: Sequence[float], seeds: Sequence[int]) -> None:
    """What `compare` refuses, told before anything is trained.

    Raises:
        InputError: a method is unknown, a speed-up is no number above 1, or something is empty.
    """
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        raise InputError(f"there is no method {unknown[0]!r}: choose from {', '.join(METHODS)}")
    wrong = [speedup for speedup in speedups if not speedup > 1]
    if wrong:
        raise InputError(f"a speed-up of {wrong[0]} is none: pass numbers above 1, as 1.5,1.94")
    if not (methods and speedups and seeds):
        raise InputError("there is nothing to compare: give methods, speed-ups and seeds")


def read_records(folder: Path) -> list[Record]:
    """The records of a folder; a last line that was cut off is left out.

    Raises:
        InputError: another line is damaged.
    """
    path = folder / "records.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    records = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last line end is incomplete
        try:
            records.append(Record(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise InputError(f"{path}, line {number} is damaged: remove that line") from error
    return records


@dataclass(frozen=True)
class _Run:
    task: Task
    dense: nn.Module
    folder: Path
    method: str
    speedup: float
    seed: int
    settings: Settings
    facts: Mapping[str, Any]  # of the settings
    source: Source
    progress: Progress

    def record(self) -> Record:
        if self.method == _DENSE:
            network: Any = copy.deepcopy(self.dense).eval()
            value_kept, gap, outside_ms = 1.0, None, None
        else:
            network = self._pruned()
            plan = halp_fx.plan_of(network)
            value_kept, gap = plan.value / plan.dense_value, plan.gap
            outside_ms = plan.report.get("outside_ms")
        pruned = self.task.evaluate(network, self._tell("evaluate pruned"))
        dense_ms, ms, spread_ms = self._measured(network)
        self._tune(network)
        tuned = self.task.evaluate(network, self._tell("evaluate tuned"))
        self._save(network)
        return Record(
            method=self.method,
            speedup=self.speedup,
            seed=self.seed,
            settings=self.facts,
            dense_ms=dense_ms,
            ms=ms,
            spread_ms=spread_ms,
            outside_ms=outside_ms,
            params=sum(p.numel() for p in network.parameters()),
            value_kept=value_kept,
            gap=gap,
            pruned=pruned,
            tuned=tuned,
        )

    def _pruned(self) -> nn.Module:
        options = dict(METHODS[self.method])
        if options.get("saliency") != "magnitude":
            options["data"] = self.task.calm(self.seed, self.settings.score_batches)
            options |= self.task.scoring()
        network = self._best([{**options, "round_to": r} for r in self._roundings(options)])
        if not options.get("reconstruct"):
            batches = self.task.calm(self.seed + 1, self.settings.recalibration_batches)
            halp_fx.recalibrate(network, self.task.recalibration(batches))
        return network

    def _roundings(self, options: Mapping[str, Any]) -> tuple[int | None, ...]:
        return _ROUNDINGS.get(str(options["solver"]), (None,))

    def _best(self, tries: Sequence[Mapping[str, Any]]) -> nn.Module:
        """The network that keeps most of the saliency, each rounding brought to the latency."""
        found: list[nn.Module] = []
        failed: InfeasibleError | None = None
        budget = 1 / self.speedup
        for options in tries:

            def make(share: float, options: Mapping[str, Any] = options) -> nn.Module:
                nonlocal failed
                try:
                    return self._compiled(options, share)
                except InfeasibleError as error:
                    failed = error
                    raise

            nearest = to_latency(make, _share, budget, start=budget, tries=_TRIES)
            if nearest is not None:
                found.append(nearest[1])
        if not found:
            why = "" if failed is None else f": {failed}"
            raise InfeasibleError(
                f"{self.method} can't make the network {self.speedup:g} times as fast{why}",
                math.nan if failed is None else failed.least,
            ) from failed
        return max(found, key=lambda network: halp_fx.plan_of(network).value)

    def _compiled(self, options: Mapping[str, Any], share: float) -> nn.Module:
        prune = self._tell("prune")

        def tell(stage: str, done: int, total: int) -> None:
            if stage == "latency":  # the longest by far
                prune(done, total)

        return halp_fx.compile(
            self.dense.eval(), halp_fx.Budget(share=share), self.task.example(),
            latency=self.source, progress=tell, **options,
        )  # fmt: skip

    def again(self, record: Record) -> Record:
        """The record with latencies measured anew, of the network that was saved."""
        core, inputs = self.task.core(self.dense)
        if self.method != _DENSE:
            if not self._path.is_file():
                raise InputError(f"{self._path} is gone: make the record again in another folder")
            core = halp_fx.load(self._path).eval()
        dense_ms, ms, spread_ms = self._timed(core, inputs)
        return replace(record, dense_ms=dense_ms, ms=ms, spread_ms=spread_ms)

    def _measured(self, network: nn.Module) -> tuple[float, float, float | None]:
        small, inputs = self.task.core(network)
        if not self.source.backend.measured:
            dense_ms = price(groups_of(self.task.core(self.dense)[0], inputs), self.source).dense_ms
            if self.method == _DENSE:
                return dense_ms, dense_ms, None
            return dense_ms, halp_fx.plan_of(network).predicted_ms, None
        return self._timed(small, inputs)

    def _timed(self, small: nn.Module, inputs: Any) -> tuple[float, float, float | None]:
        dense = self.task.core(self.dense)[0]
        steadiest: tuple[float, float, float] | None = None
        least = math.inf
        for _ in range(_ATTEMPTS):
            pair = measure_paired(
                dense, small, self.source.backend, inputs, inputs, rounds=_ROUNDS, bouts=_BOUTS
            )
            unsteady = pair[1].spread_ms / pair[1].median_ms
            if unsteady < least:
                least, (large, little) = unsteady, pair
                steadiest = large.median_ms, little.median_ms, little.spread_ms
            if unsteady <= _STEADY:
                break
        assert steadiest is not None
        return steadiest

    def _tune(self, network: nn.Module) -> None:
        recipe = Recipe(**{**asdict(self.settings.tune), "seed": self.seed})
        # Seeds of epochs that training didn't have.
        train(
            network,
            recipe,
            lambda number: self.task.epoch(self.seed + 1000, number),
            self.task.loss,
            tick=self._tell("fine-tune"),
        )

    def _save(self, network: nn.Module) -> None:
        if self.method == _DENSE:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        core = self.task.core(network)[0]
        assert isinstance(core, fx.GraphModule)
        halp_fx.save(core, self._path)

    @property
    def _path(self) -> Path:
        settings = _digest(json.dumps(self.facts, sort_keys=True).encode())
        name = f"{self.method}_{self.speedup:g}_{self.seed}_{settings}.safetensors"
        return self.folder / "networks" / name

    def _tell(self, what: str) -> Callable[[int, int], None]:
        name = f"{self.method} {self.speedup:g}x seed {self.seed}: {what}"
        return lambda done, total: self.progress(name, done, total)


def _share(network: nn.Module) -> float:
    """Of the dense latency, as measured, or by the table where nothing was."""
    plan = halp_fx.plan_of(network)
    if "measured_ms" in plan.report:
        return float(plan.report["measured_ms"] / plan.report["measured_dense_ms"])
    return plan.predicted_ms / plan.dense_ms


def _digest(*parts: bytes) -> str:
    """A short text that differs where the parts do."""
    known = hashlib.sha256()
    for part in parts:
        known.update(part)
    return known.hexdigest()[:12]


def _key(method: str, speedup: float, seed: int, settings: Mapping[str, Any]) -> tuple[Any, ...]:
    return method, speedup, seed, json.dumps(settings, sort_keys=True)


def _append(folder: Path, record: Record) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "records.jsonl"
    if path.exists():  # the rest of a line that was cut off
        text = path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text:
            path.write_bytes(whole)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(record)) + "\n")
        file.flush()
        os.fsync(file.fileno())
