"""The `torch.compile` back-end: what it runs, and what it says where nothing can be compiled."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from halp_fx.errors import LatencyError
from halp_fx.latency import (
    LatencyTable,
    Timing,
    Torch,
    TorchCompile,
    measure_network,
    resolve_backend,
)

__all__: list[str] = []

X = torch.randn(1, 3, 8, 8)


def test_it_is_told_from_eager_pytorch() -> None:
    backend = TorchCompile(threads=1)
    assert (backend.name, backend.fuses, backend.coarse, backend.measured) == (
        "torch.compile", True, True, True,
    )  # fmt: skip
    fields = json.loads(backend.fingerprint())
    assert fields == {**json.loads(Torch(threads=1).fingerprint()), "backend": "torch.compile"}


def test_its_table_rebuilds_it(tmp_path: Path) -> None:
    backend = TorchCompile(threads=1, channels_last=True)
    with LatencyTable.open(tmp_path / "t.sqlite") as table:
        table.put("k", backend.fingerprint(), Timing(1.0, 0.0, 1))
    assert resolve_backend(tmp_path / "t.sqlite").backend == backend


def test_the_module_is_compiled_for_its_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[nn.Module, dict[str, Any]]] = []

    def compiled(module: nn.Module, **options: Any) -> Callable[..., Any]:
        seen.append((module, options))
        return module

    monkeypatch.setattr(torch, "compile", compiled)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout()).train()
    TorchCompile(threads=1).prepare(net, (X,))()
    ((module, options),) = seen
    assert options == {"dynamic": False}
    assert not module.training
    assert net.training


def test_a_compiler_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(module: nn.Module, **_: Any) -> Callable[..., Any]:
        def fail(*_: Any) -> Any:
            raise OSError("no compiler found\nand much more")

        del module
        return fail

    monkeypatch.setattr(torch, "compile", compiled)
    run = TorchCompile(threads=1).prepare(nn.Conv2d(3, 4, 3), (X,))
    with pytest.raises(LatencyError, match=r"\(OSError: no compiler found\): measure with the"):
        run()


def test_a_network_is_compiled_and_timed() -> None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("needs a C++ compiler")
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    backend = TorchCompile(threads=1, min_sample_ms=0.02, samples=2)
    assert measure_network(net, (X,), backend).median_ms > 0
