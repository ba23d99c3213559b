"""Where costs come from: what a user may pass as `latency`, made a back-end and a table."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ..errors import DeviceMismatchError, HalpError, InputError, LatencyError, warn_caller
from .analytic import Analytic
from .backend import Backend
from .device import differences, fingerprint_fields, summary
from .onnxruntime_backend import OnnxRuntime
from .table import LatencyTable, default_table_path
from .torch_backend import Torch
from .torch_compile import TorchCompile

__all__ = ["Source", "Stored", "resolve_backend", "tell_foreign"]

_ACCEPTED = (
    'Accepted are None, "torch", "torch.compile", "onnxruntime", "analytic", a back-end such as '
    "halp_fx.latency.OnnxRuntime(threads=1), the path of an existing latency table, a "
    "halp_fx.LatencyTable, or a halp_fx.latency.Source."
)


@dataclass(frozen=True)
class Source:
    """A back-end, and the table its measurements are kept in."""

    backend: Backend
    table: LatencyTable | None  # None: costs are computed, not measured


@dataclass(frozen=True)
class Stored:
    """The back-end behind a table that was made on another device: for look-up only."""

    text: str  # fingerprint of that device
    here: str  # fingerprint of the nearest back-end on this device, or why there is none

    measured: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """Name of the back-end that made the table."""
        return str(fingerprint_fields(self.text).get("backend", "unknown"))

    @property
    def fuses(self) -> bool:
        """Whether that back-end runs a convolution and what follows it as one."""
        fields = fingerprint_fields(self.text)
        known = {made.name: made.fuses for made in (Torch, TorchCompile, OnnxRuntime, Analytic)}
        return known.get(self.name, bool(fields.get("fuses", False)))

    @property
    def copies(self) -> bool:
        """Whether that back-end copies where PyTorch looks at a tensor in another way."""
        return self.name == OnnxRuntime.name

    @property
    def coarse(self) -> bool:
        """Whether that back-end measures few widths."""
        return self.name == TorchCompile.name

    @property
    def differs(self) -> str:
        """What differs from this device, or why there is no such back-end here."""
        if set(fingerprint_fields(self.here)) == {"fingerprint"}:
            return self.here
        return "; ".join(differences(self.text, self.here))

    def fingerprint(self) -> str:
        """The fingerprint in the table."""
        return self.text

    def prepare(self, module: nn.Module, inputs: tuple[Any, ...]) -> Callable[[], None]:  # noqa: ARG002
        """Never runs anything.

        Raises:
            DeviceMismatchError: always; the message lists what differs from this device.
        """
        raise DeviceMismatchError(
            "the latency table was made on another device and lacks this measurement, which "
            f"can't be made here ({self.differs}). Complete the "
            "table on its own device, or measure this one."
        )


def resolve_backend(
    latency: Any = None, *, device: str | torch.device = "cpu", allow_foreign: bool = False
) -> Source:
    """The back-end and the table that `latency` stands for.

    Args:
        latency: None or "torch": eager PyTorch on `device`. "torch.compile": compiled PyTorch
            there. "onnxruntime", "analytic": those with their defaults. A back-end: itself. All
            that measure keep their timings in the table at `default_table_path()`. A path to a
            table, or a `LatencyTable`: the back-end is rebuilt from the fingerprint stored in it.
            An empty table is filled by PyTorch on `device`. A `Source`: itself.
        device: the torch device to measure where `latency` names none.
        allow_foreign: take the timings of another device, or of settings or versions that can't
            be had here, from a table that was carried over from the device that is aimed at. It
            is for look-up only: what it lacks can't be measured and raises
            `DeviceMismatchError`. What `halp-fx profile --import` and `import_results` read is
            accepted in any case.

    Raises:
        InputError: `latency` is none of these; the message lists what is accepted. Or
            `allow_foreign`, and the table has no timings of another device.
        DeviceMismatchError: the table is of another device and `allow_foreign` is False; the
            message lists what differs.
        DependencyError: "onnxruntime" is asked for and not installed.
        LatencyError: the table can't be used, or it holds several fingerprints and not exactly
            one of them is this device.
    """
    if latency is None:
        return _with_default_table(Torch(str(device)))
    if isinstance(latency, Source):
        return latency
    if isinstance(latency, LatencyTable):
        return _from_table(latency, device, allow_foreign)
    if isinstance(latency, (str, os.PathLike)):
        return _from_text(os.fspath(latency), device, isinstance(latency, str), allow_foreign)
    if isinstance(latency, Backend) and not isinstance(latency, type):
        if not latency.measured and not isinstance(latency, Analytic):
            raise InputError(
                f"the back-end {latency.name!r} has measured=False, and costs are computed by "
                "halp_fx.latency.Analytic alone: pass one of those, or have kernels timed by it "
                "with measured=True"
            )
        return _with_default_table(latency)
    raise InputError(f"latency is {latency!r}. {_ACCEPTED}")


def tell_foreign(source: Source) -> None:
    """Warn where times are only looked up, and the result is not measured here."""
    if isinstance(source.backend, Stored):
        warn_caller(
            "the latency table was made on another device or with other settings: times are "
            f"looked up in it, and the result is not measured here ({source.backend.differs})"
        )


def _from_text(
    text: Any, device: str | torch.device, may_be_name: bool, allow_foreign: bool
) -> Source:
    if may_be_name and text == "torch":
        return _with_default_table(Torch(str(device)))
    if may_be_name and text == "torch.compile":
        return _with_default_table(TorchCompile(str(device)))
    if may_be_name and text == "onnxruntime":
        return _with_default_table(OnnxRuntime())
    if may_be_name and text == "analytic":
        return Source(Analytic(), None)
    if not isinstance(text, str) or not Path(text).is_file():
        raise InputError(f"latency is {text!r}: no back-end and no existing file. {_ACCEPTED}")
    return _from_table(LatencyTable.open(text), device, allow_foreign)


def _with_default_table(backend: Backend) -> Source:
    if not backend.measured:
        return Source(backend, None)
    backend.fingerprint()  # a device or package that is missing is better told now
    return Source(backend, LatencyTable.open(default_table_path()))


def _from_table(table: LatencyTable, device: str | torch.device, allow_foreign: bool) -> Source:
    stored = table.fingerprints()
    if not stored and not allow_foreign:
        return Source(Torch(str(device)), table)
    rebuilt = [_rebuild(text, torch.device(device)) for text in stored]
    live = [backend for backend in rebuilt if not isinstance(backend, Stored)]
    if allow_foreign:
        return _of_other_device(table, [b for b in rebuilt if isinstance(b, Stored)])
    if len(stored) == 1:
        only = rebuilt[0]
        if isinstance(only, Stored) and not table.is_imported(only.text):
            raise DeviceMismatchError(
                f"the latency table {table.path} was made on another device or with other settings "
                f"({only.differs}). Set what differs as it was, where it is a setting of this "
                "process; or measure this device into a new table (halp-fx profile -o FILE); or, "
                "to prune for the device that it was made on, say so: --foreign, or "
                "latency=halp_fx.latency.resolve_backend(table, allow_foreign=True)"
            )
        return Source(only, table)
    if len(live) == 1:
        return Source(live[0], table)
    count = "none of them is" if not live else f"{len(live)} of them are"
    listed = "\n".join(f"  - {summary(text)}" for text in stored)
    raise LatencyError(
        f"the latency table {table.path} holds several devices or settings, and {count} this "
        f"one:\n{listed}\nPass halp_fx.latency.Source(backend, table) to say which, or keep each "
        "in a table of its own (halp-fx profile -o FILE)."
    )


def _of_other_device(table: LatencyTable, foreign: list[Stored]) -> Source:
    """The one device in the table that is not this one."""
    if len(foreign) == 1:
        return Source(foreign[0], table)
    if not foreign:
        raise InputError(
            f"the latency table {table.path} has no timings of another device or other settings: "
            "leave --foreign (allow_foreign) out"
        )
    listed = "\n".join(f"  - {summary(backend.text)}" for backend in foreign)
    raise LatencyError(
        f"the latency table {table.path} holds several devices or settings besides this one:\n"
        f"{listed}\nKeep each in a table of its own (halp-fx profile -o FILE)."
    )


def _rebuild(text: str, device: torch.device) -> Backend:
    """The back-end with this fingerprint, or a `Stored` where it can't be had here.

    Of several devices of a kind, on `device`.
    """
    fields = fingerprint_fields(text)
    try:
        backend = _construct(fields, device)
        here = "no such back-end here" if backend is None else backend.fingerprint()
    except (HalpError, TypeError, ValueError, KeyError) as e:
        return Stored(text, str(e))
    return backend if backend is not None and here == text else Stored(text, here)


def _construct(fields: dict[str, Any], device: torch.device) -> Backend | None:
    kind = fields.get("backend")
    if kind in ("torch", "torch.compile"):
        name = fields.get("dtype")
        dtype = None if name is None else getattr(torch, str(name), None)
        if name is not None and not isinstance(dtype, torch.dtype):
            raise InputError(f"dtype {name!r} is not known to this torch")
        made = TorchCompile if kind == "torch.compile" else Torch
        where = str(fields["device"])
        return made(
            str(device) if device.type == where else where,
            fields.get("threads"),
            dtype,
            channels_last=fields.get("layout") == "channels_last",
            cuda_graphs=bool(fields.get("cuda_graphs", False)),
        )
    if kind == "onnxruntime":
        return OnnxRuntime(fields["threads"], fields["provider"])
    if kind == "analytic":
        return Analytic(**{name: value for name, value in fields.items() if name != "backend"})
    return None
