"""Reconstruction: the weights of a pruned network fitted anew to what the dense one computes."""

from halp_fx.reconstruction.fit import Fit
from halp_fx.reconstruction.reconstruct import first_minibatches, refit

__all__ = ["Fit", "first_minibatches", "refit"]
