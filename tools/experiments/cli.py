"""`halp-fx experiment`: training, pruning and fine-tuning on real data, as commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.markup import escape

from halp_fx.errors import InputError
from halp_fx.tools import profiler
from halp_fx.tools.console import DebugOption, err, out, progress_bars
from halp_fx.tools.experiments.comparison import Settings, check, compare
from halp_fx.tools.experiments.report import results_table, write_results
from halp_fx.tools.experiments.task import Task
from halp_fx.tools.experiments.training import Recipe, train

__all__ = ["add_commands"]

_UNSTEADY = 0.1  # relative spread of a latency

_HELP = {"help_option_names": ["-h", "--help"]}

DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data", metavar="DIR", help="Folder of the data. Default: the variable HALP_FX_DATA."
    ),
]
OutputOption = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="DIR",
        help="Folder for weights and results; a run that was stopped goes on where it was.",
    ),
]
EpochsOption = Annotated[int, typer.Option("--epochs", min=0, help="Epochs of training.")]
RateOption = Annotated[float, typer.Option("--rate", help="Highest learning rate of training.")]
TuneEpochsOption = Annotated[
    int, typer.Option("--tune-epochs", min=0, help="Epochs of fine-tuning.")
]
TuneRateOption = Annotated[
    float, typer.Option("--tune-rate", help="Highest learning rate of fine-tuning.")
]
MethodsOption = Annotated[
    str,
    typer.Option(
        "--methods",
        help="Comma-separated: joint, uniform, uniform-l1 (by weights), halp, joint-1.5 (scores "
        "between HALP's and ours).",
    ),
]
SpeedupsOption = Annotated[
    str, typer.Option("--speedups", help="Dense latency over that aimed at, comma-separated.")
]
SeedsOption = Annotated[
    str, typer.Option("--seeds", help="Of scoring and fine-tuning, comma-separated.")
]
BackendOption = Annotated[
    str, typer.Option("--backend", help="onnxruntime (one thread), torch or analytic.")
]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", min=1, help="Threads of training. Default: all cores.")
]
MeasureAgainOption = Annotated[
    bool,
    typer.Option(
        "--measure-again", help="Measure the latencies of networks that are there already anew."
    ),
]
TrainOnlyOption = Annotated[bool, typer.Option("--train-only", help="Stop after training.")]
TrainImagesOption = Annotated[
    int | None, typer.Option("--train-images", min=2, help="Use so many, for a trial.")
]
TestImagesOption = Annotated[
    int | None, typer.Option("--test-images", min=1, help="Use so many, for a trial.")
]


def add_commands(app: typer.Typer) -> typer.Typer:
    """Adds the group `experiment` with the commands `detection` and `segmentation`.

    Returns:
        The group, for further experiments.
    """
    group = typer.Typer(
        name="experiment",
        no_args_is_help=True,
        rich_markup_mode="rich",
        context_settings=_HELP,
        help="Trains, prunes and fine-tunes on real data, and compares.",
        epilog="Examples:\n\n"
        "halp-fx experiment detection --data data/ -o detection/\n\n"
        "halp-fx experiment segmentation --data data/ -o segmentation/",
    )
    group.command(
        epilog="Examples:\n\n"
        "halp-fx experiment detection --data data/ -o detection/\n\n"
        "halp-fx experiment detection --data data/ --speedups 1.5,1.94 "
        "--methods joint,uniform,halp --seeds 0,1 -o detection/\n\n"
        "halp-fx experiment detection --data data/ --epochs 1 --tune-epochs 1 "
        "--train-images 32 --test-images 32 -o trial/"
    )(detection)
    group.command(
        epilog="Examples:\n\n"
        "halp-fx experiment segmentation --data data/ -o segmentation/\n\n"
        "halp-fx experiment segmentation --data data/ --network lraspp --speedups 1.5,2,3 "
        "-o lraspp/"
    )(segmentation)
    app.add_typer(group)
    return group


def detection(
    output: OutputOption,
    data: DataOption = None,
    epochs: EpochsOption = 30,
    rate: RateOption = 2e-3,
    tune_epochs: TuneEpochsOption = 6,
    tune_rate: TuneRateOption = 1e-3,
    methods: MethodsOption = "joint,uniform",
    speedups: SpeedupsOption = "1.5,1.94",
    seeds: SeedsOption = "0",
    backend: BackendOption = "onnxruntime",
    size: Annotated[int, typer.Option("--size", min=64, help="Pixels of images.")] = 160,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images a minibatch.")] = 16,
    train_images: TrainImagesOption = None,
    test_images: TestImagesOption = None,
    threads: ThreadsOption = None,
    train_only: TrainOnlyOption = False,
    measure_again: MeasureAgainOption = False,
    debug: DebugOption = False,
) -> None:
    """A small SSD on 31 classes: mAP dense, pruned, and pruned and fine-tuned.

    It is trained from scratch and pruned to shares of its measured latency.
    """
    del debug
    from halp_fx.tools.experiments.detection import Detection
    from halp_fx.tools.experiments.metrics import require_coco

    require_coco()
    _run(
        lambda: Detection(
            data, size=size, batch=batch, train_images=train_images, test_images=test_images
        ),
        output,
        Recipe(epochs, rate),
        Recipe(tune_epochs, tune_rate),
        _plan(methods, speedups, seeds),
        backend,
        threads,
        train_only,
        measure_again,
    )


def segmentation(
    output: OutputOption,
    data: DataOption = None,
    network: Annotated[
        str, typer.Option("--network", help="deeplab (small) or lraspp (MobileNetV3).")
    ] = "deeplab",
    epochs: EpochsOption = 60,
    rate: RateOption = 2e-3,
    tune_epochs: TuneEpochsOption = 15,
    tune_rate: TuneRateOption = 1e-3,
    methods: MethodsOption = "joint,uniform",
    speedups: SpeedupsOption = "1.5,2",
    seeds: SeedsOption = "0",
    backend: BackendOption = "onnxruntime",
    batch: Annotated[int, typer.Option("--batch", min=2, help="Images a minibatch.")] = 8,
    train_images: TrainImagesOption = None,
    test_images: TestImagesOption = None,
    threads: ThreadsOption = None,
    train_only: TrainOnlyOption = False,
    measure_again: MeasureAgainOption = False,
    debug: DebugOption = False,
) -> None:
    """Street scenes of 11 classes: mIoU dense, pruned, and pruned and fine-tuned."""
    del debug
    from halp_fx.tools.experiments.segmentation import Segmentation

    _run(
        lambda: Segmentation(
            data,
            network=network,
            batch=batch,
            train_images=train_images,
            test_images=test_images,
        ),
        output,
        Recipe(epochs, rate),
        Recipe(tune_epochs, tune_rate),
        _plan(methods, speedups, seeds),
        backend,
        threads,
        train_only,
        measure_again,
    )


Plan = tuple[list[str], list[float], list[int]]


def _plan(methods: str, speedups: str, seeds: str) -> Plan:
    """Methods, speed-ups and seeds, checked before anything is trained."""
    try:
        parsed = (_parts(methods), [*map(float, _parts(speedups))], [*map(int, _parts(seeds))])
    except ValueError as error:
        raise InputError(
            f"--speedups {speedups} and --seeds {seeds} must be numbers, as 1.5,1.94 and 0,1"
        ) from error
    check(*parsed)
    return parsed


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _run(
    make: Callable[[], Task],
    folder: Path,
    training: Recipe,
    tuning: Recipe,
    plan: Plan,
    backend: str,
    threads: int | None,
    train_only: bool,
    measure_again: bool,
) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; name a folder for the results")
    if threads is not None:
        torch.set_num_threads(threads)
    task = make()
    network = task.network()
    methods, speedups, seeds = plan
    folder.mkdir(parents=True, exist_ok=True)
    measured = backend != "analytic"
    table, one = (folder / "latency.sqlite", 1) if measured else (None, None)
    source = profiler.source_of(backend, table, threads=one)
    records = []
    with progress_bars() as progress:
        train(
            network,
            training,
            lambda number: task.epoch(training.seed, number),
            task.loss,
            checkpoint=folder / "dense.safetensors",
            settings=task.facts(),
            tick=lambda done, total: progress("train", done, total),
        )
        if not train_only:
            records = compare(
                task, network, folder,
                methods=methods, speedups=speedups, seeds=seeds,
                settings=Settings(tuning), source=source, progress=progress,
                measure_again=measure_again,
            )  # fmt: skip
    if train_only:
        err().print(f"wrote {escape(str(folder / 'dense.safetensors'))}")
        return
    title = f"{task.name}: {type(network).__name__}, {records[0].dense_ms:.2f} ms dense ({backend})"
    out().print(results_table(records, task.metrics, title))
    if any((record.spread_ms or 0.0) > _UNSTEADY * record.ms for record in records):
        err().print(
            "[yellow]note: the machine was busy with something else while latencies were measured; "
            "for figures to keep, run again in another folder on an idle one[/]"
        )
    for path in write_results(records, task.metrics, folder, title):
        err().print(f"wrote {escape(str(path))}")
