"""Knowledge distillation: a pruned network learns from the dense one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from halp_fx.api import plan_of
from halp_fx.errors import InputError
from halp_fx.modes import in_eval
from halp_fx.passes.rules.scope import output_dims
from halp_fx.passes.rules.scored import is_gone

__all__ = ["Distillation", "distillation_loss"]


def distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    target: torch.Tensor | None = None,
    *,
    temperature: float = 4.0,
    alpha: float = 0.9,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> torch.Tensor:
    """`alpha * T**2 * KL(teacher / T, student / T) + (1 - alpha) * cross entropy(target)`.

    After Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network (2015), section 2;
    T**2 keeps the gradients' size when the temperature changes. No gradient goes to the teacher.

    Args:
        student_logits: (N, classes, ...).
        teacher_logits: the same shape.
        target: classes (N, ...) or probabilities (N, classes, ...). None: the teacher alone.
        temperature: T, above 0.
        alpha: share of the teacher, 0 to 1; without a target it counts in full.
        label_smoothing: of the cross entropy.
        ignore_index: class of samples (or positions) that say nothing, to the teacher's part too;
            255 in many sets for segmentation.

    Returns:
        A scalar, the mean over samples (and positions); 0 where all are ignored.

    Raises:
        InputError: shapes that differ, or a setting out of range.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0]])
        >>> float(distillation_loss(logits, logits))
        0.0
    """
    for name, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        if not isinstance(logits, torch.Tensor):
            raise InputError(
                f"{name} are a {type(logits).__name__}: pass a tensor (N, classes, ...), of a "
                "network with several outputs one of them"
            )
    if student_logits.shape != teacher_logits.shape or student_logits.ndim < 2:
        raise InputError(
            f"student_logits are {tuple(student_logits.shape)} and teacher_logits "
            f"{tuple(teacher_logits.shape)}: both must be (N, classes, ...)"
        )
    _check_settings(temperature, alpha, label_smoothing)
    student = F.log_softmax(student_logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits.detach() / temperature, dim=1)
    each = F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)
    if target is None:
        return each.mean() * temperature**2
    if target.is_floating_point():
        soft = each.mean() * temperature**2
        hard = F.cross_entropy(student_logits, target, label_smoothing=label_smoothing)
        return alpha * soft + (1 - alpha) * hard
    counted = target != ignore_index
    count = counted.sum().clamp_min(1)
    soft = torch.where(counted, each, 0.0).sum() / count * temperature**2
    hard = F.cross_entropy(
        student_logits, target, label_smoothing=label_smoothing, ignore_index=ignore_index,
        reduction="sum",
    )  # fmt: skip
    return alpha * soft + (1 - alpha) * hard / count


class Distillation:
    """Loss of a pruned network beside its dense teacher: by logits, and by features where asked.

    Args:
        teacher: the dense network. It is used in eval mode and without gradients, and left in its
            own mode. The model that was given to `GradualPruner` or `compile` is one as it is.
        temperature, alpha, label_smoothing, ignore_index: as in `distillation_loss`.
        select: of a network with several outputs, output -> the logits that are compared, as
            `lambda output: output["out"]`.
        features: layers with weights (convolution, linear, batch norm) whose outputs are compared
            on the channels that survive: names, or a dict from name to weight. A layer that is
            gone by now is left out.

    Example:
        >>> import halp_fx
        >>> dense = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 5))
        >>> x = torch.rand(2, 3, 8, 8)
        >>> pruned = halp_fx.compile(dense, 0.5, x, latency="analytic")
        >>> distillation = Distillation(dense, features=["0"])
        >>> output, loss = distillation(pruned, x, torch.tensor([1, 4]))
        >>> loss.backward()
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        temperature: float = 4.0,
        alpha: float = 0.9,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        select: Callable[[Any], torch.Tensor] | None = None,
        features: Iterable[str] | Mapping[str, float] = (),
    ) -> None:
        if not isinstance(teacher, nn.Module):
            raise InputError(f"teacher is a {type(teacher).__name__}: pass the dense network")
        _check_settings(temperature, alpha, label_smoothing)
        names = [features] if isinstance(features, str) else features
        self.features = dict(names) if isinstance(names, Mapping) else dict.fromkeys(names, 1.0)
        layers = dict(teacher.named_modules())
        for name in self.features:
            if not isinstance(getattr(layers.get(name), "weight", None), torch.Tensor):
                raise InputError(
                    f"features has {name!r}, which is no layer with weights of "
                    f"{type(teacher).__name__}: pass names of convolutions, linear layers or norms"
                )
        self.teacher = teacher
        self.temperature, self.alpha = temperature, alpha
        self.label_smoothing, self.ignore_index = label_smoothing, ignore_index
        if select is not None and not callable(select):
            raise InputError(f"select is {select!r}: pass a callable, output -> logits, or None")
        self.select = select if select is not None else _as_it_is

    def __call__(
        self, student: nn.Module, inputs: Any, target: torch.Tensor | None = None
    ) -> tuple[Any, torch.Tensor]:
        """The student's output and the loss to call `backward()` on.

        Args:
            student: the pruned network, `pruner.model` for instance; it may be wrapped.
            inputs: a tensor or a tuple, for both networks.
            target: as in `distillation_loss`.
        """
        given = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
        network = _network_in(student) if self.features else student
        with torch.no_grad(), in_eval(self.teacher), _outputs(self.teacher, self.features) as seen:
            expected = self.teacher(*given)
        with _outputs(network, self.features) as own:
            output = student(*given)
        loss = distillation_loss(
            self.select(output), self.select(expected), target, temperature=self.temperature,
            alpha=self.alpha, label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
        )  # fmt: skip
        for name, weight in self.features.items():
            if name not in seen or name not in own:
                _check_gone(network, name)
            else:
                loss = loss + weight * self._difference(network, name, own[name], seen[name])
        return output, loss

    def _difference(
        self, network: nn.Module, name: str, own: torch.Tensor, seen: torch.Tensor
    ) -> torch.Tensor:
        """Mean squared difference on surviving channels, relative to the teacher's mean square."""
        layer = self.teacher.get_submodule(name)
        index = _survivors(layer, _kept(network, name))
        if index is not None:
            dim = -1 if isinstance(layer, (nn.Linear, nn.LayerNorm, nn.Embedding)) else 1
            seen = seen.index_select(dim, index.to(seen.device))
        own, seen = _precise(own), _precise(seen)
        size = seen.square().mean().clamp_min(1e-12)
        return F.mse_loss(own, seen.to(own.dtype)) / size


def _as_it_is(output: Any) -> Any:
    return output


def _kept(network: nn.Module, name: str) -> tuple[torch.Tensor | None, ...]:
    """What is kept of a layer's weight along each dim; seen through parametrisations.

    Raises:
        InputError: the network has no such layer.
    """
    kept = plan_of(network).kept
    own = [f"{name}.{tensor}" for tensor in ("weight", "weight_orig", "weight_v")]
    behind = f"{name}.parametrizations.weight."
    # Of a weight norm's two tensors, the last one has the shape of the weight.
    found = max((k for k in kept if k in own or k.startswith(behind)), default=None)
    if found is None:
        raise InputError(
            f"features has {name!r}, which the student does not have: pass names of layers that "
            "teacher and student share"
        )
    return kept[found]


def _survivors(layer: nn.Module, kept: tuple[torch.Tensor | None, ...]) -> torch.Tensor | None:
    """Which of the channels that a layer gives are left; None: all."""
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    dim, *others = output_dims(layer, weight)
    index = kept[dim]
    if index is None or not others:
        return index
    # A transposed convolution in groups, (I, O / groups, ...): whole groups are removed.
    groups = (index // (len(weight) // int(layer.groups))).unique()  # type: ignore[arg-type]
    width = weight.shape[1]
    return (groups[:, None] * width + torch.arange(width)).flatten()


def _check_gone(network: nn.Module, name: str) -> None:
    """That a layer without an output went with a branch.

    Raises:
        InputError: it is there, but nobody calls it, or the hook on it is not.
    """
    if not is_gone(_kept(network, name)):
        raise InputError(
            f"features has {name!r}, but no output of it is seen in both networks: a norm of a "
            "library's own class is no layer any more once it was traced, and a network that was "
            "compiled before calls no new hooks. Name a convolution or linear layer beside it, or "
            "distil the network that is not compiled"
        )


def _precise(values: torch.Tensor) -> torch.Tensor:
    """At least float32: squares of half precision overflow from 256 on."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _check_settings(temperature: float, alpha: float, label_smoothing: float) -> None:
    if not isinstance(temperature, (int, float)) or not 0 < temperature < float("inf"):
        raise InputError(f"temperature is {temperature!r}: pass a number above 0")
    if not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
        raise InputError(f"alpha is {alpha!r}: pass the teacher's share, from 0 to 1")
    if not isinstance(label_smoothing, (int, float)) or not 0 <= label_smoothing <= 1:
        raise InputError(f"label_smoothing is {label_smoothing!r}: pass a number from 0 to 1")


def _network_in(student: nn.Module) -> nn.Module:
    """The pruned network inside of wrappers."""
    found = [m for m in student.modules() if isinstance(m, fx.GraphModule) and "halp_fx" in m.meta]
    if not found:
        raise InputError(
            f"the student ({type(student).__name__}) has no plan, which tells the channels of "
            "features: pass pruner.model, or what halp_fx.compile or halp_fx.load gave"
        )
    return found[0]


@contextmanager
def _outputs(network: nn.Module, names: Iterable[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Collects what these layers give while the context is open."""
    seen: dict[str, torch.Tensor] = {}
    layers = dict(network.named_modules())
    hooks = []

    def keep(name: str) -> Any:
        def hook(layer: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ARG001
            # A copy: an in-place operation that follows, as ReLU or +=, would change it.
            seen[name] = output.clone() if isinstance(output, torch.Tensor) else output

        return hook

    try:
        hooks += [layers[n].register_forward_hook(keep(n)) for n in names if n in layers]
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
