"""Small networks, one structural pattern each; `PATTERNS` maps names to all of them."""

from tests.patterns import (
    attention,
    convolutions,
    flattening,
    gates,
    interfaces,
    movement,
    norms,
    operators,
    reordering,
    topologies,
    weights,
)
from tests.patterns.base import PATTERNS, Pattern

__all__ = [
    "PATTERNS",
    "Pattern",
    "attention",
    "convolutions",
    "flattening",
    "gates",
    "interfaces",
    "movement",
    "norms",
    "operators",
    "reordering",
    "topologies",
    "weights",
]
