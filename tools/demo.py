"""`python -m halp_fx.tools.demo`: train, prune to half the latency, fine-tune, export.

A residual network with batch norm learns scikit-learn's handwritten digits (1,797 images, bundled
with the library: nothing is downloaded). It takes about two minutes on two cores.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from rich.text import Text
from torch import nn

import halp_fx
from halp_fx.errors import DependencyError, HalpError
from halp_fx.tools.console import err, out, progress_bars
from halp_fx.tools.prune import write_report
from halp_fx.verification import TOLERANCE

__all__ = ["Digits", "ResidualNet", "main", "run"]

_SEED = 0
_PIXELS = 16  # the digits are 8x8; at 16x16 the convolutions cost something
_BATCH = 32


@dataclass(frozen=True)
class Digits:
    """Images `(N, 1, 16, 16)` in [0, 1] and labels `(N,)`, for training and for testing."""

    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor


class _Block(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResidualNet(nn.Module):
    """A small residual network: `(N, 1, H, W)` images to `(N, classes)` logits."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128), classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        blocks: list[nn.Module] = []
        channels_in = widths[0]
        for i, channels in enumerate(widths):
            blocks.append(_Block(channels_in, channels, stride=1 if i == 0 else 2))
            blocks.append(_Block(channels, channels, stride=1))
            channels_in = channels
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels_in, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.blocks(self.stem(x))
        return self.head(y.mean(dim=(2, 3)))


def run(
    directory: Path,
    *,
    budget: float = 0.5,
    epochs: int = 6,
    tune_epochs: int = 4,
    widths: tuple[int, ...] = (32, 64, 128),
    latency: str = "torch",
) -> dict[str, Any]:
    """Trains, prunes, fine-tunes, measures and exports; prints a table of the results.

    Args:
        directory: receives `model.safetensors`, `model.onnx`, `report.md` and `report.json`.
        budget: share of the dense latency that the pruned network may take.
        epochs: epochs of training before the network is pruned.
        tune_epochs: epochs of fine-tuning afterwards.
        widths: channels of the three stages.
        latency: back-end that prices the widths.

    Returns:
        Accuracies, measured milliseconds and their ratio, as in the table.
    """
    torch.manual_seed(_SEED)
    digits = _load_digits()
    model = ResidualNet(widths)
    example = (digits.test_x[:_BATCH],)
    with progress_bars() as progress:
        _train(model, digits, epochs, 3e-3, lambda done: progress("train", done, epochs))
        dense_accuracy = _accuracy(model, digits)
        pruned = halp_fx.compile(
            model.eval(),
            budget,
            example,
            data=_batches(digits.train_x[:512], digits.train_y[:512]),
            loss=F.cross_entropy,
            latency=latency,
            progress=progress,
        )
        raw_accuracy = _accuracy(pruned, digits)
        _train(
            pruned, digits, tune_epochs, 1e-3, lambda done: progress("fine-tune", done, tune_epochs)
        )
        accuracy = _accuracy(pruned, digits)
        dense_ms, pruned_ms, ratio = _measure(model, pruned, example[0])
        directory.mkdir(parents=True, exist_ok=True)
        plan = halp_fx.plan_of(pruned)
        write_report(plan, directory)
        halp_fx.save(pruned, directory / "model.safetensors")
        progress("export", 0, 1)
        halp_fx.export_onnx(pruned, directory / "model.onnx")
        progress("export", 1, 1)
    difference = _onnx_difference(pruned, directory / "model.onnx", digits.test_x[: _BATCH + 1])
    result = {
        "dense_accuracy": dense_accuracy,
        "raw_accuracy": raw_accuracy,
        "accuracy": accuracy,
        "dense_ms": dense_ms,
        "pruned_ms": pruned_ms,
        "ratio": ratio,
        "onnx_difference": difference,
        "parameters": (_size(model), _size(pruned)),
    }
    _print(result, budget, plan, directory)
    return result


def main() -> None:
    """Entry point: parses the options and runs the demo."""
    parser = argparse.ArgumentParser(prog="python -m halp_fx.tools.demo", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("demo_out"), metavar="DIR")
    parser.add_argument("--budget", type=float, default=0.5, help="share of the dense latency")
    options = parser.parse_args()
    try:
        run(options.output, budget=options.budget)
    except HalpError as error:
        err().print(Text(f"error: {error}", style="red"))
        raise SystemExit(2) from error


def _load_digits() -> Digits:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise DependencyError(
            "the demo needs scikit-learn; run 'pip install \"halp-fx[demo]\"'"
        ) from error
    bundle = load_digits()
    images = torch.tensor(bundle.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, size=(_PIXELS, _PIXELS), mode="bilinear")
    labels = torch.tensor(bundle.target, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(_SEED))
    train, test = order[:1437], order[1437:]
    return Digits(images[train], labels[train], images[test], labels[test])


def _batches(x: torch.Tensor, y: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(x.split(_BATCH), y.split(_BATCH), strict=True))


def _train(
    model: nn.Module, digits: Digits, epochs: int, rate: float, tick: Callable[[int], None]
) -> None:
    generator = torch.Generator().manual_seed(_SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-2)
    steps = epochs * math.ceil(len(digits.train_x) / _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    tick(0)
    for epoch in range(epochs):
        order = torch.randperm(len(digits.train_x), generator=generator)
        for x, y in _batches(digits.train_x[order], digits.train_y[order]):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        tick(epoch + 1)
    model.eval()


@torch.no_grad()
def _accuracy(model: nn.Module, digits: Digits) -> float:
    model.eval()
    right = (model(digits.test_x).argmax(1) == digits.test_y).sum().item()
    return right / len(digits.test_y)


@torch.no_grad()
def _measure(
    dense: nn.Module, pruned: nn.Module, x: torch.Tensor, pairs: int = 60
) -> tuple[float, float, float]:
    """Median milliseconds of both, and the median ratio of neighbours.

    The two take turns, so that a machine that slows down slows both.
    """
    networks = (dense.eval(), pruned.eval())
    for network in networks * 5:
        network(x)
    times: tuple[list[float], list[float]] = ([], [])
    for pair in range(pairs):
        for which in (0, 1) if pair % 2 else (1, 0):
            start = time.perf_counter()
            networks[which](x)
            times[which].append(1e3 * (time.perf_counter() - start))
    ratios = [pruned_ms / dense_ms for dense_ms, pruned_ms in zip(*times, strict=True)]
    return statistics.median(times[0]), statistics.median(times[1]), statistics.median(ratios)


@torch.no_grad()
def _onnx_difference(model: nn.Module, path: Path, x: torch.Tensor) -> float:
    """The largest difference between ONNX Runtime and PyTorch, relative to the largest output."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    output = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    expected = model.eval()(x)
    difference = (torch.from_numpy(output) - expected).abs().max() / expected.abs().max()
    return float(difference)


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _print(result: dict[str, Any], budget: float, plan: Any, directory: Path) -> None:
    table = Table(title=f"Digits, pruned to {budget:.0%} of the dense latency")
    for header in ("", "dense", "pruned", "fine-tuned"):
        table.add_column(header, justify="right" if header else "left")
    table.add_row(
        "test accuracy",
        f"{result['dense_accuracy']:.1%}",
        f"{result['raw_accuracy']:.1%}",
        f"{result['accuracy']:.1%}",
    )
    table.add_row(
        f"latency by the table, batch {_BATCH}",
        f"{plan.dense_ms:.2f} ms",
        f"{plan.predicted_ms:.2f} ms",
        "",
    )
    table.add_row(
        "latency measured",
        f"{result['dense_ms']:.2f} ms",
        f"{result['pruned_ms']:.2f} ms",
        f"ratio {result['ratio']:.2f}",
    )
    dense, pruned = result["parameters"]
    table.add_row("parameters", f"{dense:,}", f"{pruned:,}", "")
    out().print(table)
    if result["ratio"] <= budget:
        out().print(f"[green]The budget is met: {result['ratio']:.2f} of the dense latency.[/]")
    elif result["ratio"] <= budget * (1 + TOLERANCE):
        out().print(
            f"[green]The budget is met to {TOLERANCE:.0%}, as well as timers repeat: "
            f"{result['ratio']:.3f} of the dense latency.[/]"
        )
    else:
        out().print(
            f"[yellow]The budget is not met: measured {result['ratio']:.2f} of the dense latency, "
            f"asked for {budget:.2f}.[/]"
        )
    out().print(f"ONNX Runtime agrees with PyTorch to {result['onnx_difference']:.1e} (relative).")
    err().print(f"wrote model.safetensors, model.onnx, report.md and report.json in {directory}/")


if __name__ == "__main__":
    main()
