"""The command line `halp-fx`: groups, profile, prune, sweep, bench and experiment."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from halp_fx._version import __version__
from halp_fx.detection import is_detector
from halp_fx.errors import InputError
from halp_fx.passes.groups import find_groups
from halp_fx.passes.rules.widths import MIN_SHARE
from halp_fx.passes.trace import trace
from halp_fx.tools import bench, bench_latency, bench_solve, bench_speedup, cli_profile, inspector
from halp_fx.tools import coverage as sweeps
from halp_fx.tools import prune as pruner
from halp_fx.tools.console import DebugOption, HalpCommands, err, out, progress_bars
from halp_fx.tools.coverage_models import Family
from halp_fx.tools.coverage_report import coverage_table
from halp_fx.tools.experiments import accuracy_cli
from halp_fx.tools.experiments import cli as experiments_cli
from halp_fx.tools.models import parse_input
from halp_fx.tools.options import (
    AlsoOption,
    BatchOption,
    CandidatesOption,
    ForeignOption,
    InputOption,
    LatencyOption,
    MacsOption,
    MemoryOption,
    ModelArgument,
    ParamsOption,
    PretrainedOption,
    ReconstructOption,
    SamplesOption,
    StepsOption,
    WeightsOption,
    by_samples,
    load,
)

__all__ = ["app", "main"]

_HELP = {"help_option_names": ["-h", "--help"]}

app = typer.Typer(
    name="halp-fx",
    cls=HalpCommands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings=_HELP,
    help="Prunes torch.fx networks to a latency budget.",
    epilog="MODEL is torchvision:resnet50, timm:resnet18 or package.module:factory.\n\n"
    "Examples:\n\n"
    "halp-fx groups torchvision:resnet50 --why layer1.0.conv3\n\n"
    "halp-fx prune torchvision:resnet50 --pretrained --budget 0.5 -o out/",
)
bench_app = typer.Typer(
    name="bench",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings=_HELP,
    help="Measures this library's own speed.",
    epilog="Examples:\n\nhalp-fx bench discover --runs 5 -o bench.csv",
)
app.add_typer(bench_app)
bench_solve.add_command(bench_app)
bench_latency.add_commands(bench_app)
bench_speedup.add_command(bench_app)
cli_profile.add_commands(app)
accuracy_cli.add_commands(experiments_cli.add_commands(app))


class Format(StrEnum):
    """How `halp-fx groups` prints."""

    table = "table"
    json = "json"
    graphml = "graphml"
    dot = "dot"


def _version(value: bool) -> None:
    if value:
        out().print(f"halp-fx {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Prunes torch.fx networks to a latency budget."""
    del version


@app.command(
    epilog="Examples:\n\n"
    "halp-fx groups torchvision:resnet50\n\n"
    "halp-fx groups torchvision:resnet50 --why layer1.0.conv3\n\n"
    "halp-fx groups torchvision:resnet50 --why layer1.0.conv3 --to layer1.2.conv3\n\n"
    "halp-fx groups my_package.nets:make --input 2x3x64x64 --format json -o groups.json"
)
def groups(
    model: ModelArgument,
    why: Annotated[
        str | None,
        typer.Option(
            "--why",
            metavar="LAYER",
            help="What a module or parameter is coupled with or pinned by, and where.",
        ),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="LAYER", help="With --why: only the path to this layer."),
    ] = None,
    form: Annotated[Format, typer.Option("--format", help="How to print.")] = Format.table,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write here (json, graphml, dot)."),
    ] = None,
    shapes: InputOption = None,
    debug: DebugOption = False,
) -> None:
    """Shows which channels stand or fall together, and which must stay."""
    del debug
    if to is not None and why is None:
        raise InputError("--to names the end of a path; name its start with --why")
    if why is not None and form is not Format.table:
        raise InputError("--why prints a text; leave --format out")
    if output is not None and form is Format.table:
        raise InputError("--output is for --format json, graphml or dot")
    network, example = load(model, shapes)
    found = find_groups(trace(network, example))
    if why is not None:
        for part in inspector.explain(found, why, to):
            out().print(part)
        return
    if form is Format.table:
        out().print(inspector.groups_table(found))
        if found.pins or found.traced.opaque:
            out().print(inspector.pins_table(found))
        return
    printers = {
        Format.json: inspector.to_json,
        Format.graphml: inspector.to_graphml,
        Format.dot: inspector.to_dot,
    }
    text = printers[form](found)
    if output is None:
        typer.echo(text, nl=False)
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")
    err().print(f"wrote {escape(str(output))}")


@app.command(
    epilog="Examples:\n\n"
    "halp-fx prune torchvision:resnet50 --pretrained --budget 0.5 -o out/\n\n"
    "halp-fx prune torchvision:mobilenet_v2 --budget 4ms --latency onnxruntime -o out/\n\n"
    "halp-fx prune torchvision:resnet50 --budget 0.6 --params 0.5 --exclude conv1 --round-to 16 "
    "-o out/\n\n"
    "halp-fx prune torchvision:resnet18 --budget 0.7 --also board.sqlite=4ms -o out/\n\n"
    "halp-fx prune my_package.nets:make --weights net.safetensors --budget 0.6 "
    "--samples images.npy --latency analytic -o out/"
)
def prune(
    model: ModelArgument,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            "-b",
            help="Share of the dense latency (0.5) or a latency (4ms). Default: no slower than "
            "the dense network, where --params, --macs or --memory is given.",
            show_default=False,
        ),
    ] = None,
    params: ParamsOption = None,
    macs: MacsOption = None,
    memory: MemoryOption = None,
    include: Annotated[
        list[str] | None,
        typer.Option(
            "--include",
            metavar="PATTERN",
            help="Prune only the output channels of these modules (layer1, '*.conv2'); repeatable.",
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            "--exclude",
            metavar="PATTERN",
            help="Keep the output channels of these modules whole; repeatable.",
        ),
    ] = None,
    min_share: Annotated[
        float,
        typer.Option("--min-share", help="Share of its channels that each group keeps at least."),
    ] = MIN_SHARE,
    min_width: Annotated[
        int, typer.Option("--min-width", help="Channels that each group keeps at least.")
    ] = 0,
    round_to: Annotated[
        int | None,
        typer.Option(
            "--round-to",
            help="Keep multiples of so many channels. Default: the steps of the device; "
            "unknown, 8 in wide groups, less in others.",
        ),
    ] = None,
    solver: Annotated[
        str, typer.Option("--solver", help="joint, or to compare with: halp, greedy, uniform.")
    ] = "joint",
    samples: SamplesOption = None,
    candidates: CandidatesOption = 1,
    steps: StepsOption = 1,
    reconstruct: ReconstructOption = False,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Folder for what is written. A network of an earlier run that is not replaced "
            "stays there, with a warning.",
        ),
    ] = Path("out"),
    latency: LatencyOption = None,
    also: AlsoOption = None,
    foreign: ForeignOption = False,
    onnx: Annotated[bool, typer.Option(help="Export and check an ONNX file.")] = True,
    pretrained: PretrainedOption = False,
    weights: WeightsOption = None,
    batch: BatchOption = None,
    shapes: InputOption = None,
    debug: DebugOption = False,
) -> None:
    """Prunes a network; leaves weights, ONNX file and report in a folder.

    model.safetensors is for halp_fx.load. Where layers of your own can't be in such a file,
    weights.safetensors with the state dict is left instead.

    To score channels by a loss, or to fine-tune, call halp_fx.compile from Python.
    """
    del debug
    limit = pruner.budget_of(budget, params=params, macs=macs, memory=memory)
    source, further = pruner.latencies_of(latency, also or (), foreign)
    by_data = by_samples(samples, candidates, steps, reconstruct)
    network, example = load(
        model, shapes, batch=batch, pretrained=pretrained, weights=weights, whole=True
    )
    if by_data and is_detector(network):
        raise InputError(
            "--samples is not for a whole detector, which is scored by its losses: call "
            "halp_fx.compile from Python with data, or leave it out"
        )
    if not pretrained and weights is None and model.startswith(("torchvision:", "timm:")):
        err().print("[yellow]note: random weights; give --pretrained or --weights FILE[/]")
    options = {
        "include": include or None,
        "exclude": exclude or None,
        "min_share": min_share,
        "min_width": min_width,
        "round_to": round_to,
        "solver": solver,
        "also": further,
        **by_data,
    }
    pruner.prune(network, limit, example, output, latency=source, onnx=onnx, options=options)


@bench_app.command(
    epilog="Examples:\n\n"
    "halp-fx bench discover\n\n"
    "halp-fx bench discover --models torchvision:resnet50,timm:resnet18 --runs 5 -o bench.csv"
)
def discover(
    models: Annotated[
        str, typer.Option("--models", help="Comma-separated models.", show_default=False)
    ] = "",
    runs: Annotated[int, typer.Option("--runs", min=1, help="Runs; the median counts.")] = 3,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Also write a CSV file.")
    ] = None,
    shape: Annotated[
        str, typer.Option("--input", metavar="SHAPE", help="Shape of the input.")
    ] = "1x3x224x224",
    debug: DebugOption = False,
) -> None:
    """Times trace, groups and rewrite, next to Torch-Pruning where that is installed."""
    del debug
    names = [name.strip() for name in models.split(",") if name.strip()]
    input_shape = tuple(parse_input(shape).shape)
    with progress_bars() as progress:
        found = bench.discover(
            names or bench.DEFAULT_MODELS, runs, input_shape=input_shape, progress=progress
        )
    out().print(bench.discovery_table(found))
    if output is not None:
        bench.write_csv(found, output)
        err().print(f"wrote {escape(str(output))}")


@bench_app.command(
    epilog="Examples:\n\n"
    "halp-fx bench coverage --family torchvision -o coverage/\n\n"
    "halp-fx bench coverage --family timm --models resnet10t,levit_128s -o coverage/"
)
def coverage(
    family: Annotated[
        Family, typer.Option("--family", help="Which models; detection only if asked for.")
    ] = Family.torchvision,
    models: Annotated[
        str, typer.Option("--models", help="Comma-separated names.", show_default=False)
    ] = "",
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit",
            min=1,
            help="At most so many models. Default: all; of timm, one for each of its files.",
        ),
    ] = None,
    max_params: Annotated[
        float, typer.Option("--max-params", help="Millions of parameters of a timm model.")
    ] = 100.0,
    budget: Annotated[
        float, typer.Option("--budget", help="Share of the dense analytic latency.")
    ] = 0.5,
    seed: Annotated[int, typer.Option("--seed", help="Of the sample and of the weights.")] = 0,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds a model.")] = 600.0,
    memory_gb: Annotated[float, typer.Option("--memory-gb", help="Memory a model.")] = 8.0,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Models at a time.")] = 1,
    again: Annotated[
        bool, typer.Option("--again", help="Repeat the models that were not exact.")
    ] = False,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Folder for the results; a run that was cut off goes on where it was.",
        ),
    ] = Path("coverage"),
    debug: DebugOption = False,
) -> None:
    """Prunes each model of a library, in a process of its own, and checks the result."""
    del debug
    with progress_bars() as progress:
        records = sweeps.coverage(
            family,
            output,
            models=[name for name in models.split(",") if name.strip()],
            limit=limit,
            max_params=max_params * 1e6,
            budget=budget,
            seed=seed,
            limits=sweeps.Limits(timeout, memory_gb),
            jobs=jobs,
            again=again,
            progress=progress,
        )
    out().print(coverage_table(records))
    err().print(f"wrote {escape(str(output / family.value))}.csv, .md and .jsonl")


def main() -> None:
    """Entry point of `halp-fx`."""
    app()


if __name__ == "__main__":
    main()
