"""For the tests of training frameworks: processes as torchrun starts them, examples of the docs."""

from __future__ import annotations

import os
import re
import runpy
import socket
from pathlib import Path
from typing import Any

import torch

__all__ = ["as_launched", "free_port", "run_example"]

_DOCS = Path(__file__).resolve().parent.parent / "docs" / "training.md"


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def as_launched(rank: int, world: int, port: int) -> None:
    """Give this process the environment that torchrun gives to each of its own."""
    torch.set_num_threads(1)
    settings = {
        "RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    os.environ.update({name: str(value) for name, value in settings.items()})


def run_example(section: str, folder: Path, **given: Any) -> dict[str, Any]:
    """Run the first Python block of a section of docs/training.md, with few milestones.

    Args:
        folder: where to keep the file that is run.
        given: the names that the block takes from its surroundings.

    Returns:
        All names that it has at its end.
    """
    _, _, text = _DOCS.read_text(encoding="utf-8").partition(f"## {section}\n")
    found = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert found is not None and "steps=30, every=100" in found[1]
    code = found[1].replace("steps=30, every=100", "steps=3, every=1, latency='analytic'")
    (folder / "example.py").write_text(code, encoding="utf-8")
    return runpy.run_path(str(folder / "example.py"), init_globals=given)
