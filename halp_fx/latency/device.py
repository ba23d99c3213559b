"""Fingerprints: what identifies a device and the settings of a measurement.

A fingerprint is the JSON text of one flat object. It holds what changes a latency (processor,
number of cores, versions, threads) and nothing that names a machine or a person.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from ..errors import InputError

__all__ = [
    "cpu_facts",
    "cuda_facts",
    "differences",
    "driver_facts",
    "fingerprint_fields",
    "fingerprint_text",
    "summary",
]

# Model names of virtual machines are often generic ("AMD EPYC"); these tell generations apart.
_CPUINFO_FIELDS = ("model name", "cpu family", "model", "CPU implementer", "CPU part", "Hardware")


def fingerprint_text(fields: Mapping[str, Any]) -> str:
    """JSON text of `fields`, the same for equal fields in any order."""
    return json.dumps(dict(fields), sort_keys=True)


def fingerprint_fields(text: str) -> dict[str, Any]:
    """The fields of a fingerprint; a text that is no JSON object is one field, "fingerprint"."""
    try:
        fields = json.loads(text)
    except ValueError:
        fields = None
    return fields if isinstance(fields, dict) else {"fingerprint": text}


def differences(there: str, here: str) -> tuple[str, ...]:
    """What differs between two fingerprints, one text a field: "threads: 4, here 1"."""
    stored, own = fingerprint_fields(there), fingerprint_fields(here)
    return tuple(
        f"{name}: {stored.get(name, 'not given')}, here {own.get(name, 'not given')}"
        for name in sorted(stored.keys() | own.keys())
        if stored.get(name) != own.get(name) or (name in stored) != (name in own)
    )


def summary(text: str) -> str:
    """A fingerprint in one line for people: "backend torch, cores 8, ..."."""
    return ", ".join(f"{name} {value}" for name, value in fingerprint_fields(text).items())


@functools.cache
def _cpu_model() -> str:
    """Model of the processor, as precise as the system tells."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return _cpu_model_without_proc()
    first = text.strip().split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in first.splitlines())
    found = {name.strip(): value.strip() for name, _, value in pairs}
    facts = [f"{name} {found[name]}" for name in _CPUINFO_FIELDS[1:] if name in found]
    return " ".join([found.get("model name", platform.machine()), *facts])


def _cpu_model_without_proc() -> str:
    if platform.system() != "Darwin":
        return platform.processor() or platform.machine()
    command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return platform.machine()
    return answer.stdout.strip()


def cpu_facts() -> dict[str, Any]:
    """Processor, cores, instruction set and operating system of this machine."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cudnn_version() -> int | None:
    # Where cuDNN doesn't go with the GPU, torch raises at the first call of a process and answers
    # at the next ones: the fingerprint must not depend on which call this is.
    for _ in range(2):
        try:
            version: int | None = torch.backends.cudnn.version()
        except RuntimeError:
            continue
        return version
    return None


def cuda_facts(device: torch.device) -> dict[str, Any]:
    """Model, size and libraries of a CUDA device.

    Raises:
        InputError: torch sees no such device.
    """
    if not torch.cuda.is_available():
        raise InputError(
            f"device {str(device)!r} is not usable: torch sees no CUDA device here. "
            'Pass device="cpu", or install a torch build for your GPU.'
        )
    count = torch.cuda.device_count()
    asked = cast("int | None", device.index)  # None for "cuda", whatever the annotation says
    index = torch.cuda.current_device() if asked is None else asked
    if index >= count:
        raise InputError(f"device {str(device)!r} does not exist: torch sees {count} CUDA devices")
    properties = torch.cuda.get_device_properties(index)
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,  # tells a MIG slice from a whole GPU
        "gpu_memory_mib": properties.total_memory // 2**20,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda or getattr(torch.version, "hip", None),
        "cudnn": _cudnn_version(),
    }


def driver_facts() -> dict[str, Any]:
    """Model and driver of the first NVIDIA GPU, as its driver tells; empty where it doesn't."""
    names = ("gpu", "capability", "driver")
    query = "--query-gpu=name,compute_cap,driver_version"
    command = ["nvidia-smi", query, "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(names, values, strict=True)) if len(values) == len(names) else {}
