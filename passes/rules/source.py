"""Where in the user's code a graph node comes from."""

from __future__ import annotations

import os
import re

import torch
from torch import fx

__all__ = ["located", "source_of"]

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<name>.+)')
_OURS = os.path.dirname(os.path.dirname(os.path.realpath(__file__))) + os.sep
_TORCH = os.path.dirname(os.path.realpath(torch.__file__)) + os.sep


def source_of(node: fx.Node) -> str:
    """ "file:line: code" of the innermost frame outside torch and this package, or ""."""
    lines = (node.stack_trace or "").splitlines()
    for i in range(len(lines) - 1, -1, -1):
        frame = _FRAME.search(lines[i])
        if frame is None or os.path.realpath(frame["file"]).startswith((_TORCH, _OURS)):
            continue
        code = lines[i + 1].strip() if i + 1 < len(lines) else ""
        return f"{frame['file']}:{frame['line']}: {code}"
    return ""


def located(node: fx.Node) -> str:
    """Where a node comes from, as an addition in brackets to a text; "" where that is unknown."""
    source = source_of(node)
    return f" ({source})" if source else ""
