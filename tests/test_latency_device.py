"""Fingerprints."""

from __future__ import annotations

import copy
import getpass
import json
import platform
import socket
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import fx, nn

from halp_fx.devices import named_devices
from halp_fx.errors import InputError
from halp_fx.latency import OnnxRuntime, Torch, device
from halp_fx.latency.backend import settle
from halp_fx.passes.trace import trace


def test_the_order_of_fields_does_not_matter() -> None:
    assert device.fingerprint_text({"b": 1, "a": None}) == '{"a": null, "b": 1}'
    fields = {"a": [1, "x"], "b": 0.5}
    assert device.fingerprint_fields(device.fingerprint_text(fields)) == fields


@pytest.mark.parametrize("text", ["my board", "[1, 2]", "3"])
def test_a_text_that_is_no_object_is_one_field(text: str) -> None:
    assert device.fingerprint_fields(text) == {"fingerprint": text}


def test_differences_are_named_field_by_field() -> None:
    there = json.dumps({"cpu": "A", "threads": 4, "dtype": None, "same": 1})
    here = json.dumps({"cpu": "B", "threads": 4, "gpu": "G", "same": 1})
    assert device.differences(there, here) == (
        "cpu: A, here B",
        "dtype: None, here not given",
        "gpu: not given, here G",
    )
    assert device.differences(here, here) == ()


def test_a_summary_is_one_line() -> None:
    assert device.summary('{"backend": "torch", "cores": 8}') == "backend torch, cores 8"


@pytest.mark.parametrize("backend", [Torch(threads=1), OnnxRuntime()])
def test_no_host_and_no_person_is_named(backend: Any) -> None:
    values = {str(value) for value in json.loads(backend.fingerprint()).values()}
    assert socket.gethostname() not in values
    assert getpass.getuser() not in values
    assert platform.node() not in values


CPUINFO = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC
cpu MHz\t\t: 3000.123

processor\t: 1
model name\t: another
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CPUINFO, "AMD EPYC cpu family 25 model 17"),
        (
            "processor : 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\n",
            "arm CPU implementer 0x41 CPU part 0xd0c",
        ),
        ("", "arm"),
    ],
)
def test_the_processor_is_told_precisely_and_steadily(
    monkeypatch: pytest.MonkeyPatch, text: str, expected: str
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self, **options: text)
    monkeypatch.setattr(platform, "machine", lambda: "arm")
    assert device._cpu_model.__wrapped__() == expected


def _no_proc(self: Path, **options: Any) -> str:
    raise FileNotFoundError


def test_the_processor_of_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", _no_proc)
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: SimpleNamespace(stdout="Apple M9\n"))
    assert device._cpu_model.__wrapped__() == "Apple M9"

    def fail(*args: Any, **options: Any) -> Any:
        raise OSError

    monkeypatch.setattr(subprocess, "run", fail)
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert device._cpu_model.__wrapped__() == "arm64"


def test_the_processor_of_another_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", _no_proc)
    monkeypatch.setattr(platform, "system", lambda: "Windows")
    monkeypatch.setattr(platform, "processor", lambda: "Family 6 Model 158")
    assert device._cpu_model.__wrapped__() == "Family 6 Model 158"


def test_the_facts_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(
        name="TITAN V", multi_processor_count=80, total_memory=12 * 2**30, major=7, minor=0
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    facts = device.cuda_facts(torch.device("cuda"))
    assert facts["gpu"] == "TITAN V"
    assert facts["multiprocessors"] == 80
    assert facts["gpu_memory_mib"] == 12288
    assert facts["capability"] == "7.0"
    assert facts == device.cuda_facts(torch.device("cuda:0"))
    fields = json.loads(Torch(device="cuda").fingerprint())
    assert fields["gpu"] == "TITAN V"
    assert "threads" not in fields
    with pytest.raises(InputError, match="'cuda:1' does not exist: torch sees 1"):
        device.cuda_facts(torch.device("cuda:1"))


def test_a_graph_names_the_device_that_it_is_on() -> None:
    class Ramp(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.linspace(0, 1, 4, device=x.device)

    module = trace(Ramp(), torch.rand(2, 4)).module
    graph = fx.GraphModule(module, copy.deepcopy(module.graph))
    for node in list(graph.graph.nodes):
        if node.target is getattr:
            node.replace_all_uses_with(torch.device("cpu"))  # as a kernel is cut out
            graph.graph.erase_node(node)
    graph.recompile()
    cpu, meta = torch.device("cpu"), torch.device("meta")
    assert list(named_devices(graph)) == [cpu]
    assert settle(graph.eval(), cpu, None) is graph
    moved = settle(graph, meta, None)
    assert list(named_devices(moved)) == [meta]
    assert moved(torch.rand(2, 4, device=meta)).shape == (2, 4)
    assert list(named_devices(graph)) == [cpu]
