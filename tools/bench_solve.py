"""`halp-fx bench solve`: how good the knapsack's answers are, and how long they take."""

from __future__ import annotations

import csv
import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.markup import escape
from rich.table import Table

from halp_fx.errors import InfeasibleError, InputError
from halp_fx.knapsack import (
    Solution,
    Term,
    cost_of,
    solve,
    solve_greedy,
    solve_halp,
    solve_uniform,
    value_of,
)
from halp_fx.latency import Analytic, Source
from halp_fx.passes.groups import find_groups
from halp_fx.passes.latency import price
from halp_fx.passes.saliency import score
from halp_fx.passes.select import knapsack_of
from halp_fx.passes.trace import trace
from halp_fx.tools.console import DebugOption, err, out, progress_bars
from halp_fx.tools.models import load_model, parse_input

__all__ = [
    "DEFAULT_MODELS",
    "Instance",
    "Solved",
    "add_command",
    "network_instance",
    "read_instance",
    "solve_all",
    "solved_table",
    "write",
]

DEFAULT_MODELS = (
    "torchvision:resnet18",
    "torchvision:resnet50",
    "torchvision:mobilenet_v2",
    "torchvision:densenet121",
    "torchvision:googlenet",
    "torchvision:shufflenet_v2_x1_0",
)
_DATA_VARIABLE, _DATA_FILE = "HALP_FX_DATA", "knapsack_resnet50_titanv.npz"
_COLUMNS = ("instance", "groups", "budget", "solver", "value_kept", "cost", "gap", "seconds")


@dataclass(frozen=True)
class Instance:
    """A choice of widths to solve."""

    name: str
    values: Sequence[Any]  # value of each level of each variable
    terms: Sequence[Term]
    sizes: Sequence[Any] | None  # width of each level of each variable; None: evenly spaced
    outputs: Sequence[int] | None  # output axis of each term, for the paper's solver
    dense_cost: float
    dense_value: float


@dataclass(frozen=True)
class Solved:
    """What one solver made of one instance at one budget."""

    instance: str
    groups: int
    budget: float  # share of the dense cost
    solver: str
    value_kept: float  # share of the dense value; NaN where the solver found nothing
    cost: float  # true cost, as a share of the dense one
    gap: float  # to the bound that the joint solver proves at this budget, relative
    seconds: float


def network_instance(name: str, input_shape: tuple[int, ...] = (1, 3, 224, 224)) -> Instance:
    """The widths of a network, priced by the roofline and scored by its weights.

    Args:
        name: as the command line takes it.
        input_shape: shape of the input, `(N, C, H, W)`, where the model brings none.
    """
    model, inputs = load_model(name)
    if inputs is None:
        inputs = (torch.randn(input_shape, generator=torch.Generator().manual_seed(0)),)
    groups = find_groups(trace(model, inputs))
    latency, saliency = price(groups, Source(Analytic(), None)), score(groups)
    problem = knapsack_of(groups, saliency, latency)
    return Instance(
        name=name,
        values=problem.values,
        terms=problem.terms,
        sizes=problem.sizes,
        outputs=problem.outputs,
        dense_cost=latency.dense_ms,
        dense_value=float(sum(s.sum() for s in saliency.scores)),
    )


def read_instance(path: Path) -> Instance:
    """A recorded instance of a residual network, an npz file without pickles.

    `names[k]` holds the layers of variable k, several where they are coupled; `value_k` (levels,)
    what its levels are worth; `term_j` the cost (out,) or (out, in) of a layer, and
    `term_j_groups` its variables, out and in, the latter -1 for none. The stem (variable 0) stays
    whole, coupled layers keep at least one level, and conv1 and conv2 of a block go together.

    Raises:
        InputError: there is no such file, or it isn't of this form.
    """
    try:
        with np.load(path, allow_pickle=False) as data:
            names = [str(n) for n in data["names"]]
            values = [np.array(data[f"value_{k}"], dtype=np.float64) for k in range(len(names))]
            terms: list[Term] = []
            for j in itertools.takewhile(lambda j: f"term_{j}" in data, itertools.count()):
                produced, into = (int(g) for g in data[f"term_{j}_groups"])
                scope = (produced,) if into < 0 else (produced, into)
                terms.append((scope, np.array(data[f"term_{j}"], dtype=np.float64)))
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{path} can't be read as a knapsack instance: {error}") from error
    dense = [v.size - 1 for v in values]
    cost, value = cost_of(dense, terms), value_of(dense, values)
    layers = [name.replace("'", "").strip("(),").split(", ") for name in names]
    values[0][:-1] = -np.inf
    for v, coupled in zip(values, layers, strict=True):
        if len(coupled) > 1:
            v[0] = -np.inf
    where = {coupled[0]: k for k, coupled in enumerate(layers)}
    for layer, first in where.items():
        second = where.get(layer.replace("conv1", "conv2"))
        if ".layer" in layer and second is not None and second != first:
            none = np.equal.outer(
                np.arange(values[first].size) == 0, np.arange(values[second].size) == 0
            )
            terms.append(((first, second), np.where(none, 0.0, np.inf)))
    return Instance(path.stem, values, terms, None, None, cost, value)


def solve_all(
    instance: Instance, budgets: Iterable[float], *, compare: bool = False
) -> list[Solved]:
    """The joint solver at each budget (a share of the dense cost), and the others if asked."""
    values, terms = instance.values, instance.terms
    solvers: dict[str, Callable[[Any, Any, float], Solution]] = {"joint": solve}
    if compare:
        solvers["halp"] = partial(solve_halp, outputs=instance.outputs)
        solvers["halp, 1 step"] = partial(solve_halp, outputs=instance.outputs, steps=1)
        solvers["greedy"] = solve_greedy
        solvers["uniform"] = partial(solve_uniform, sizes=instance.sizes)
    found = []
    for budget in budgets:
        bound = math.nan
        for name, solver in solvers.items():
            start = time.perf_counter()
            try:
                solution = solver(values, terms, budget * instance.dense_cost)
            except InfeasibleError:
                solution = Solution((), math.nan, math.nan, math.nan)
            seconds = time.perf_counter() - start
            if name == "joint":
                bound = solution.bound
            found.append(
                Solved(
                    instance=instance.name,
                    groups=len(values),
                    budget=budget,
                    solver=name,
                    value_kept=solution.value / instance.dense_value,
                    cost=solution.cost / instance.dense_cost,
                    gap=(bound - solution.value) / max(abs(bound), 1e-300),
                    seconds=seconds,
                )
            )
    return found


def solved_table(found: Sequence[Solved]) -> Table:
    """The figures as a table."""
    table = Table(title="value kept at the true cost, both as shares of the dense network's")
    for header in ("instance", "groups", "budget", "solver"):
        table.add_column(header, justify="left" if header in ("instance", "solver") else "right")
    for header in ("value kept", "true cost", "gap", "seconds"):
        table.add_column(header, justify="right")
    for row in found:
        table.add_row(*_cells(row))
    return table


def _cells(row: Solved) -> list[str]:
    return [
        row.instance,
        str(row.groups),
        f"{row.budget:g}",
        row.solver,
        "none found" if math.isnan(row.value_kept) else f"{row.value_kept:.4f}",
        f"{row.cost:.4f}",
        f"{100 * row.gap:.3f} %",
        f"{row.seconds:.2f}",
    ]


def write(found: Sequence[Solved], path: Path) -> None:
    """A Markdown table where the name ends in `.md`, else CSV with a header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".md":
        header = ("instance", "groups", "budget", "solver", "value kept", "true cost", "gap", "s")
        rows = [header, ("---", "---:", "---:", "---", "---:", "---:", "---:", "---:")]
        lines = ["| " + " | ".join(r) + " |" for r in [*rows, *map(_cells, found)]]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        for row in found:
            cells = (getattr(row, column) for column in _COLUMNS)
            writer.writerow([f"{c:.6g}" if isinstance(c, float) else c for c in cells])


def add_command(app: typer.Typer) -> None:
    """Adds `solve` to the group of benchmarks."""
    app.command(
        name="solve",
        epilog="Examples:\n\n"
        "halp-fx bench solve\n\n"
        "halp-fx bench solve --models torchvision:resnet50 --budgets 0.5 --compare -o solve.md\n\n"
        f"halp-fx bench solve --instance {_DATA_FILE} --compare",
    )(_command)


def _command(
    models: Annotated[
        str, typer.Option("--models", help="Comma-separated models.", show_default=False)
    ] = "",
    budgets: Annotated[
        str, typer.Option("--budgets", help="Comma-separated shares of the dense cost.")
    ] = "0.7,0.5,0.3",
    compare: Annotated[
        bool, typer.Option("--compare", help="Also the paper's solver, greedy and uniform.")
    ] = False,
    instance: Annotated[
        Path | None,
        typer.Option(
            "--instance",
            metavar="FILE",
            help="A recorded instance (npz). Alone: no models. With --compare and nothing else "
            f"named: {_DATA_FILE} in ${_DATA_VARIABLE}, beside the default models.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Also write CSV, or Markdown (.md)."),
    ] = None,
    shape: Annotated[
        str, typer.Option("--input", metavar="SHAPE", help="Shape of the input.")
    ] = "1x3x224x224",
    debug: DebugOption = False,
) -> None:
    """Solves the choice of widths of some networks; shows the certified gap and the seconds."""
    del debug
    shares = _shares(budgets)
    names = [name.strip() for name in models.split(",") if name.strip()]
    if not names and instance is None:
        names = list(DEFAULT_MODELS)
        folder = os.environ.get(_DATA_VARIABLE)
        if compare and folder and (Path(folder) / _DATA_FILE).is_file():
            instance = Path(folder) / _DATA_FILE
    input_shape = tuple(parse_input(shape).shape)
    sources: list[Callable[[], Instance]] = [
        partial(network_instance, name, input_shape) for name in names
    ]
    if instance is not None:
        sources.append(partial(read_instance, instance))
    found: list[Solved] = []
    with progress_bars() as progress:
        for done, make in enumerate(sources):
            progress("solve", done, len(sources))
            found.extend(solve_all(make(), shares, compare=compare))
        progress("solve", len(sources), len(sources))
    out().print(solved_table(found))
    if output is not None:
        write(found, output)
        err().print(f"wrote {escape(str(output))}")


def _shares(text: str) -> list[float]:
    try:
        shares = [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise InputError(f"--budgets {text!r} is no list of shares: write 0.7,0.5,0.3") from error
    if not shares or not all(0 < share <= 1 for share in shares):
        raise InputError(f"--budgets {text!r} must name shares above 0 and at most 1")
    return shares
