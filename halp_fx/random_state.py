"""Random generators of the whole process, left as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["same_random_state"]


@contextmanager
def same_random_state() -> Iterator[None]:
    """Give the global random generators back as they were, also after an error."""
    python, numpy = random.getstate(), np.random.get_state()
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if cuda else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
