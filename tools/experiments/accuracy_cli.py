"""`halp-fx experiment cifar` and `imagenet`: accuracy at the same measured latency."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape

from halp_fx.errors import InputError
from halp_fx.latency import Backend, LatencyTable, OnnxRuntime, Source
from halp_fx.passes.saliency import DEFAULT
from halp_fx.tools.charts import matplotlib_figure
from halp_fx.tools.console import DebugOption, err, out
from halp_fx.tools.experiments import cifar, imagenet
from halp_fx.tools.experiments.accuracy_data import Images
from halp_fx.tools.experiments.accuracy_methods import SETS, chosen_methods
from halp_fx.tools.experiments.accuracy_records import Journal, Record
from halp_fx.tools.experiments.accuracy_report import compared, page, write_report
from halp_fx.tools.experiments.accuracy_run import Plan, made, require, run
from halp_fx.tools.experiments.accuracy_task import Settings, Task
from halp_fx.tools.experiments.data import data_folder, library

__all__ = ["add_commands", "experiment"]

_KEPT = 5000  # CIFAR-10 training images for choosing; of others, a fifth

# name of a network -> network, last layer, training and test images
Loader = Callable[[str], tuple[torch.nn.Module, str, Images, Images]]

_SETS = ", ".join(f"{name} ({', '.join(members)})" for name, members in SETS.items())

MethodsOption = Annotated[
    str, typer.Option("--methods", help=f"Comma-separated. Several at once: {_SETS}.")
]
BudgetsOption = Annotated[
    str, typer.Option("--budgets", help="Shares of the dense latency, comma-separated.")
]
SeedsOption = Annotated[str, typer.Option("--seeds", help="Comma-separated.")]
TuneOption = Annotated[int, typer.Option("--tune-images", min=0, help="That fine-tuning sees.")]
RateOption = Annotated[
    str,
    typer.Option(
        "--rate",
        help="Highest learning rate. Of several, comma-separated, each network has the one that "
        "suits it best on kept training images; methods that train while they prune use the first.",
    ),
]
BatchOption = Annotated[int, typer.Option("--batch", min=2, help="Minibatch of fine-tuning.")]
ScoreOption = Annotated[
    int, typer.Option("--score-images", min=1, help="That channels are scored by.")
]
ChooseOption = Annotated[
    int,
    typer.Option(
        "--choose-images", min=1, help="Kept training images that variants and rates are tried on."
    ),
]
TestOption = Annotated[
    int | None, typer.Option("--test-images", min=1, help="Default: all.", show_default=False)
]
OnOption = Annotated[
    str,
    typer.Option(
        "--on",
        help="test, or choose: the kept training images, so that a method can be worked on without "
        "looking at the test images.",
    ),
]
RecoveryOption = Annotated[
    str,
    typer.Option("--recovery", help="plain, or distilled: the dense network teaches the pruned."),
]
AlphaOption = Annotated[
    float, typer.Option("--alpha", min=0.0, max=1.0, help="The teacher's share when distilled.")
]
LatencyBatchOption = Annotated[
    int, typer.Option("--latency-batch", min=1, help="Images at a time when latency is measured.")
]
ThreadsOption = Annotated[
    int, typer.Option("--threads", min=1, help="Of ONNX Runtime, which measures the latency.")
]
DeviceOption = Annotated[
    str, typer.Option("--device", help="For training and testing: cpu or cuda.")
]
DataOption = Annotated[
    Path | None,
    typer.Option("--data", metavar="DIR", help="Folder of the data. Default: HALP_FX_DATA."),
]
AgainOption = Annotated[bool, typer.Option("--again", help="Repeat what failed before.")]


def add_commands(app: typer.Typer) -> None:
    """Adds `cifar` and `imagenet` to the group of experiments."""
    app.command(
        name="cifar",
        epilog="Examples:\n\n"
        "halp-fx experiment cifar --networks resnet56 --methods joint,halp,uniform --seeds 0,1 "
        "-o cifar/\n\n"
        "halp-fx experiment cifar --networks resnet56 --methods parts --budgets 0.5 -o cifar/",
    )(_cifar)
    app.command(
        name="imagenet",
        epilog="Examples:\n\n"
        "halp-fx experiment imagenet --networks mobilenet_v2 --budgets 0.7,0.5 -o imagenet/",
    )(_imagenet)


def experiment(
    title: str,
    load: Loader,
    plan: Plan,
    settings: Settings,
    directory: Path,
    *,
    backend: Backend,
    needs: Callable[[str], object],
    latency_batch: int = 1,
    device: str = "cpu",
    again: bool = False,
) -> list[Record]:
    """Make the records that a folder lacks, and its report.

    Where it ends by an error or an interrupt, the report is of the records that there are.

    Args:
        title: of the report.
        load: network -> the network, its last layer, training and test images.
        plan: networks, methods, budgets and seeds.
        settings: the same for every record; records made with others are left alone.
        directory: receives records.jsonl, latency.sqlite and the report.
        backend: measures latencies.
        needs: raises `DependencyError` where a package for the network of this name is missing.
        latency_batch: images at a time when it does.
        device: for training and testing.
        again: repeat the records that failed.

    Raises:
        InputError: the folder's records are damaged, or the device can't be had.
        DependencyError: a package is missing; nothing was made then.
    """
    if settings.on == "choose":
        title += ", on training images kept for choosing"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {device}: there is no CUDA device here; use cpu")
    digest = settings.digest(
        backend.fingerprint(), device.partition(":")[0], str(latency_batch), DEFAULT
    )
    journal = Journal(directory / "records.jsonl", digest)
    matplotlib_figure()
    require(plan, journal, needs, again=again)
    with LatencyTable.open(directory / "latency.sqlite") as table:

        def task(name: str) -> Task:
            network, head, train, test = load(name)
            kept = min(_KEPT, len(train) // 5)
            cut = len(train) - kept
            shape = test.pixels.shape[1:]
            return Task(
                name=name,
                dense=network.eval(),
                head=head,
                train=train.at(slice(0, cut)),
                choose=train.at(slice(cut, None)),
                test=test,
                settings=settings,
                source=Source(backend, table),
                example=torch.rand(
                    latency_batch, *shape, generator=torch.Generator().manual_seed(0)
                ),
                device=device,
            )

        try:
            run(plan, journal, task, again=again, tell=_teller(several=len(settings.rates) > 1))
        finally:
            records = made(plan, journal)
            for path in write_report(records, directory, title) if records else ():
                err().print(f"wrote {escape(str(path))}")
    first = plan.methods[0].name
    pairs = compared([r for r in records if r.method != "dense"], first)
    out().print(page(records, pairs), markup=False)
    return records


def _teller(*, several: bool) -> Callable[[int, int, Record, bool], None]:
    """Prints a line for each record, and how long the rest will take about.

    Args:
        several: whether there are several learning rates, so that the one that was taken counts.
    """
    start, made = time.monotonic(), 0

    def tell(done: int, total: int, record: Record, there: bool) -> None:
        nonlocal made
        line = f"[{done}/{total}] {record.network} {record.method} {record.budget:g}"
        line += f" seed {record.seed}: "
        if there:
            err().print(escape(f"{line}there already"))
            return
        made += 1
        left = (total - done) * (time.monotonic() - start) / made / 60
        what = record.remark or ", ".join(
            f"{name} {100 * value:.2f} %"
            for name, value in (
                ("latency", record.share),
                ("recalibrated", record.recalibrated),
                ("tuned", record.tuned),
            )
            if value is not None
        )
        if record.rate is not None and several:
            what += f" at a rate of {record.rate:g}"
        text = f"{line}{what} ({record.seconds:.0f} s; at most {left:.0f} minutes left)"
        err().print(escape(text))

    return tell


def _cifar(
    networks: Annotated[
        str, typer.Option("--networks", help=f"Comma-separated, of {', '.join(cifar.NETWORKS)}.")
    ] = "resnet56,vgg16",
    methods: MethodsOption = "main",
    budgets: BudgetsOption = "0.667,0.5,0.333",
    seeds: SeedsOption = "0,1",
    tune_images: TuneOption = 10_000,
    rate: RateOption = "0.008,0.002",
    batch: BatchOption = 64,
    score_images: ScoreOption = 1024,
    choose_images: ChooseOption = 1000,
    test_images: TestOption = None,
    on: OnOption = "test",
    recovery: RecoveryOption = "plain",
    alpha: AlphaOption = 0.9,
    latency_batch: LatencyBatchOption = 1,
    threads: ThreadsOption = 1,
    device: DeviceOption = "cpu",
    data: DataOption = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Records, tables and charts.")
    ] = Path("cifar"),
    again: AgainOption = False,
    debug: DebugOption = False,
) -> None:
    """CIFAR-10: accuracy of ResNet-56 and VGG-16 at the same measured latency, by method.

    A run that was cut off goes on where it was.
    """
    del debug
    plan = _plan(networks, cifar.NETWORKS, methods, budgets, seeds)
    settings = Settings(
        tune_images=tune_images, rates=_rates(rate), batch=batch,
        score_images=score_images, choose_images=choose_images, test_images=test_images, on=on,
        recovery=recovery, alpha=alpha,
    )  # fmt: skip
    folder = data_folder(data)
    parts: dict[str, Images] = {}

    def load(name: str) -> tuple[torch.nn.Module, str, Images, Images]:
        for part in ("train", "test"):
            if part not in parts:
                parts[part] = cifar.cifar_images(folder, part)
        return *cifar.cifar_network(folder, name), parts["train"], parts["test"]

    experiment(
        "CIFAR-10", load, plan, settings, output, backend=OnnxRuntime(threads=threads),
        needs=lambda name: library("PIL.Image", "pillow"), latency_batch=latency_batch,
        device=device, again=again,
    )  # fmt: skip


def _imagenet(
    networks: Annotated[
        str, typer.Option("--networks", help=f"Comma-separated, of {', '.join(imagenet.NETWORKS)}.")
    ] = "mobilenet_v2",
    methods: MethodsOption = "main",
    budgets: BudgetsOption = "0.7,0.5",
    seeds: SeedsOption = "0",
    tune_images: TuneOption = 3200,
    rate: RateOption = "0.01,0.002",
    batch: BatchOption = 32,
    score_images: ScoreOption = 256,
    choose_images: ChooseOption = 400,
    test_images: TestOption = None,
    on: OnOption = "test",
    recovery: RecoveryOption = "distilled",
    alpha: AlphaOption = 1.0,
    pixels: Annotated[int, typer.Option("--pixels", min=32, help="Side of the images.")] = 224,
    latency_batch: LatencyBatchOption = 1,
    threads: ThreadsOption = 1,
    device: DeviceOption = "cpu",
    data: DataOption = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Records, tables and charts.")
    ] = Path("imagenet"),
    again: AgainOption = False,
    debug: DebugOption = False,
) -> None:
    """ImageNet weights: accuracy over 1,000 classes at the same measured latency, by method.

    Fine-tuning sees ten classes alone, so the dense network teaches all 1,000 (--recovery).
    """
    del debug
    plan = _plan(networks, imagenet.NETWORKS, methods, budgets, seeds)
    settings = Settings(
        tune_images=tune_images, rates=_rates(rate), batch=batch,
        score_images=score_images, recalibrate_images=512, choose_images=choose_images,
        test_images=test_images, on=on, recovery=recovery, alpha=alpha, shift=16, pixels=pixels,
    )  # fmt: skip
    folder = data_folder(data)

    def load(name: str) -> tuple[torch.nn.Module, str, Images, Images]:
        images = [imagenet.imagenet_images(folder, part, name, pixels) for part in ("train", "val")]
        order = torch.randperm(len(images[0]), generator=torch.Generator().manual_seed(0))
        return *imagenet.imagenet_network(folder, name), images[0].at(order), images[1]

    experiment(
        "ImageNet", load, plan, settings, output, backend=OnnxRuntime(threads=threads),
        needs=imagenet.require, latency_batch=latency_batch, device=device, again=again,
    )  # fmt: skip


def _plan(networks: str, known: Any, methods: str, budgets: str, seeds: str) -> Plan:
    names = _listed("--networks", networks, str)
    for name in names:
        if name not in known:
            raise InputError(f"there is no network {name!r}: use {', '.join(known)}")
    shares = _listed("--budgets", budgets, float)
    for share in shares:
        if not 0 < share < 1:
            raise InputError(f"--budgets has {share:g}: give shares between 0 and 1, as 0.5")
    return Plan(
        tuple(names),
        tuple(chosen_methods(methods)),
        tuple(shares),
        tuple(_listed("--seeds", seeds, int)),
    )


def _rates(text: str) -> tuple[float, ...]:
    return tuple(_listed("--rate", text, float))


def _listed(option: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    """The parts of a comma-separated text, each once."""
    try:
        found = [kind(part.strip()) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise InputError(f"{option} is {text!r}: give numbers, comma-separated") from error
    if not found:
        raise InputError(f"{option} is empty: give at least one")
    return list(dict.fromkeys(found))
