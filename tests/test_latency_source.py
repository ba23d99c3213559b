"""What may be passed as `latency`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import halp_fx.latency
from halp_fx.errors import DeviceMismatchError, InputError, LatencyError
from halp_fx.latency import (
    Analytic,
    Job,
    LatencyTable,
    OnnxRuntime,
    Source,
    Stored,
    Timing,
    Torch,
    default_table_path,
    measure_jobs,
    resolve_backend,
)
from halp_fx.latency import source as source_module

TIMING = Timing(1.0, 0.0, 1)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALP_FX_CACHE", str(tmp_path / "cache"))


def _foreign(backend: Any, /, **changes: Any) -> str:
    return json.dumps({**json.loads(backend.fingerprint()), **changes}, sort_keys=True)


def _table(path: Path, *fingerprints: str) -> Path:
    with LatencyTable.open(path) as table:
        for text in fingerprints:
            table.put("k", text, TIMING)
    return path


@pytest.mark.parametrize("latency", [None, "torch"])
def test_pytorch_on_this_device_is_the_default(latency: Any) -> None:
    source = resolve_backend(latency)
    assert source.backend == Torch()
    assert source.table is not None
    assert source.table.path == str(default_table_path())
    assert default_table_path().is_file()


def test_the_device_is_taken_over() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="torch sees no CUDA device here"):
            resolve_backend(None, device="cuda")
    assert resolve_backend("torch", device=torch.device("cpu")).backend == Torch("cpu")


def test_onnxruntime_by_name() -> None:
    pytest.importorskip("onnxruntime")
    source = resolve_backend("onnxruntime")
    assert source.backend == OnnxRuntime()
    assert source.table is not None


@pytest.mark.parametrize("latency", ["analytic", Analytic()])
def test_the_analytic_backend_needs_no_table(latency: Any) -> None:
    assert resolve_backend(latency) == Source(Analytic(), None)
    assert not default_table_path().exists()


def test_a_backend_is_taken_as_it_is() -> None:
    backend = Torch(threads=1, samples=3)
    source = resolve_backend(backend)
    assert source.backend is backend
    assert source.table is not None


def test_a_source_is_taken_as_it_is() -> None:
    source = Source(Torch(threads=1), None)
    assert resolve_backend(source) is source


@pytest.mark.parametrize("as_text", [True, False])
def test_a_path_rebuilds_the_backend_of_this_device(tmp_path: Path, as_text: bool) -> None:
    backend = Torch(threads=1, dtype=torch.float64)
    path = _table(tmp_path / "t.sqlite", backend.fingerprint())
    source = resolve_backend(str(path) if as_text else path)
    assert source.backend == backend
    assert source.table is not None
    assert source.table.get("k", source.backend.fingerprint()) == TIMING


@pytest.mark.parametrize("backend", [Torch(threads=2), OnnxRuntime(threads=2), Analytic(step=4)])
def test_every_backend_can_be_rebuilt(tmp_path: Path, backend: Any) -> None:
    path = _table(tmp_path / "t.sqlite", backend.fingerprint())
    assert resolve_backend(path).backend == backend


def test_a_table_object_is_used_as_it_is() -> None:
    backend = Torch(threads=1)
    with LatencyTable.open(":memory:") as table:
        table.put("k", backend.fingerprint(), TIMING)
        assert resolve_backend(table) == Source(backend, table)


def test_an_empty_table_is_filled_by_pytorch() -> None:
    with LatencyTable.open(":memory:") as table:
        assert resolve_backend(table) == Source(Torch(), table)


def _build() -> tuple[nn.Module, tuple[Any, ...]]:
    return nn.Identity(), (torch.zeros(1),)


@pytest.mark.parametrize(
    ("backend", "changes", "fuses", "difference"),
    [
        (Torch(threads=1), {"cores": 4096}, False, "cores: 4096, here "),
        (Torch(threads=1), {"dtype": "float4711"}, False, "float4711"),
        (Torch(threads=1), {"threads": "many"}, False, "threads is 'many'"),
        (OnnxRuntime(), {"cpu": "Abacus"}, True, "cpu: Abacus, here "),
        (OnnxRuntime(), {"provider": "TensorrtExecutionProvider"}, True, "this build"),
        (Torch(threads=1), {"backend": "mine", "fuses": True}, True, "no such back-end here"),
        (Analytic(), {"colour": "red"}, True, "colour"),
    ],
)
def test_the_table_of_another_device_is_for_look_up_only(
    tmp_path: Path, backend: Any, changes: dict[str, Any], fuses: bool, difference: str
) -> None:
    text = _foreign(backend, **changes)
    path = _table(tmp_path / "t.sqlite", text)
    with pytest.raises(DeviceMismatchError, match="on another device or with other settings") as e:
        resolve_backend(path)
    assert difference in str(e.value)
    assert "resolve_backend(table, allow_foreign=True)" in str(e.value)
    source = resolve_backend(path, allow_foreign=True)
    assert isinstance(source.backend, Stored)
    assert source.backend.fingerprint() == text
    assert source.backend.name == changes.get("backend", backend.name)
    assert source.backend.fuses is fuses
    assert source.backend.measured
    assert source.table is not None
    measure_jobs([Job("k", _build)], source.backend, source.table)  # known: nothing to do
    with pytest.raises(DeviceMismatchError, match="lacks this measurement") as e:
        measure_jobs([Job("new", _build)], source.backend, source.table)
    assert difference in str(e.value)


def test_a_fingerprint_that_is_no_json_is_for_look_up_only(tmp_path: Path) -> None:
    path = _table(tmp_path / "t.sqlite", "my board")
    with pytest.raises(DeviceMismatchError, match="on another device"):
        resolve_backend(path)
    source = resolve_backend(path, allow_foreign=True)
    assert isinstance(source.backend, Stored)
    assert (source.backend.name, source.backend.fuses) == ("unknown", False)


def test_of_several_devices_this_one_is_chosen(tmp_path: Path) -> None:
    backend = Torch(threads=1)
    others = [_foreign(backend, cores=4096), _foreign(backend, cores=8192)]
    path = _table(tmp_path / "t.sqlite", others[0], backend.fingerprint(), others[1])
    assert resolve_backend(path).backend == backend


def test_of_several_devices_the_other_one_is_chosen_where_that_is_asked_for(
    tmp_path: Path,
) -> None:
    backend = Torch(threads=1)
    other = _foreign(backend, cores=4096)
    path = _table(tmp_path / "t.sqlite", backend.fingerprint(), other)
    assert resolve_backend(path).backend == backend
    found = resolve_backend(path, allow_foreign=True).backend
    assert isinstance(found, Stored)
    assert found.text == other
    own = _table(tmp_path / "own.sqlite", backend.fingerprint())
    with pytest.raises(InputError, match=r"no timings of another device.*leave --foreign"):
        resolve_backend(own, allow_foreign=True)
    with pytest.raises(InputError, match="no timings of another device"):
        resolve_backend(LatencyTable.open(":memory:"), allow_foreign=True)
    several = _table(tmp_path / "several.sqlite", other, _foreign(backend, cores=8192))
    with pytest.raises(LatencyError, match="several devices or settings besides this one") as e:
        resolve_backend(several, allow_foreign=True)
    assert "cores 4096" in str(e.value) and "cores 8192" in str(e.value)


def test_several_foreign_devices_are_named(tmp_path: Path) -> None:
    texts = [_foreign(Torch(threads=1), cores=cores) for cores in (4096, 8192)]
    with pytest.raises(LatencyError, match="none of them is this one") as e:
        resolve_backend(_table(tmp_path / "t.sqlite", *texts))
    assert "cores 4096" in str(e.value)
    assert "cores 8192" in str(e.value)
    assert "Source(backend, table)" in str(e.value)


def test_several_settings_of_this_device_are_named(tmp_path: Path) -> None:
    texts = [Torch(threads=threads).fingerprint() for threads in (1, 2)]
    with pytest.raises(LatencyError, match="2 of them are this one") as e:
        resolve_backend(_table(tmp_path / "t.sqlite", *texts))
    assert "threads 1" in str(e.value)
    assert "threads 2" in str(e.value)
    assert "or keep each in a table of its own (halp-fx profile -o FILE)" in str(e.value)


@pytest.mark.parametrize("latency", ["tensorrt", "no/such/table.sqlite", Path("gone"), 3, Torch])
def test_anything_else_is_refused_with_what_is_accepted(latency: Any) -> None:
    with pytest.raises(InputError) as e:
        resolve_backend(latency)
    for accepted in ('"torch"', '"onnxruntime"', '"analytic"', "a back-end", "path", "Table"):
        assert accepted in str(e.value)


def test_a_damaged_table_is_told(tmp_path: Path) -> None:
    path = tmp_path / "t.sqlite"
    path.write_text("64 1.5\n" * 500)
    with pytest.raises(LatencyError, match="damaged or not a latency table"):
        resolve_backend(path)


def test_the_public_names_are_these() -> None:
    assert sorted(halp_fx.latency.__all__) == halp_fx.latency.__all__
    for name in halp_fx.latency.__all__:
        assert getattr(halp_fx.latency, name).__doc__


def test_a_backend_of_ones_own_is_accepted() -> None:
    class Mine:
        name, measured, fuses = "mine", True, False

        def fingerprint(self) -> str:
            return "{}"

        def prepare(self, module: nn.Module, inputs: tuple[Any, ...]) -> Callable[[], None]:
            return lambda: None

    backend = Mine()
    assert resolve_backend(backend).backend is backend


def test_a_backend_that_measures_nothing_is_refused() -> None:
    class Mine:
        name, measured, fuses = "mine", False, False

        def fingerprint(self) -> str:
            return "{}"

        def prepare(self, module: nn.Module, inputs: tuple[Any, ...]) -> Callable[[], None]:
            return lambda: None

    with pytest.raises(InputError, match=r"'mine' has measured=False"):
        resolve_backend(Mine())


def test_of_several_devices_of_a_kind_the_one_asked_for_is_rebuilt() -> None:
    fields = {"backend": "torch", "device": "cuda", "threads": 1}
    for device, expected in (("cuda:1", "cuda:1"), ("cpu", "cuda")):
        found = source_module._construct(fields, torch.device(device))
        assert isinstance(found, Torch)
        assert found.device == expected
