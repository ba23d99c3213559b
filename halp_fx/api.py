"""What users call: prune a network to a budget, or to several."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import fx, nn

from halp_fx.budget import Budget, parse_budget
from halp_fx.detection import is_detector, prune_detector
from halp_fx.errors import InputError
from halp_fx.minibatches import device_of, inputs_of
from halp_fx.passes.rules.scope import Selection
from halp_fx.passes.rules.structure import named_tensors
from halp_fx.passes.rules.widths import MIN_SHARE
from halp_fx.passes.rules.wrappers import unwrapped
from halp_fx.passes.select import check_solver
from halp_fx.passes.trace import trace
from halp_fx.pipeline import Progress, prepare
from halp_fx.random_state import same_random_state
from halp_fx.reconstruction import Fit, first_minibatches, refit
from halp_fx.types import ChannelGroups, Plan

__all__ = ["compile", "plan_of", "reconstruct", "sweep"]


def compile(
    model: nn.Module,
    budget: float | str | Budget,
    example_inputs: Any = None,
    *,
    data: Iterable[Any] | None = None,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    latency: Any = None,
    saliency: Callable[[ChannelGroups], Any] | str | None = None,
    include: Selection | None = None,
    exclude: Selection | None = None,
    exact: bool = False,
    solver: str = "joint",
    drop_blocks: bool = True,
    min_share: float | Mapping[str, float] = MIN_SHARE,
    min_width: int | Mapping[str, int] = 0,
    round_to: int | Mapping[str, int] | None = None,
    candidates: int = 1,
    evaluate: Callable[[fx.GraphModule], float] | None = None,
    steps: int = 1,
    reconstruct: bool = False,
    also: Sequence[tuple[Any, float | str | Budget]] = (),
    verify: bool = True,
    progress: Progress | None = None,
) -> fx.GraphModule:
    """Prune `model` to a latency budget.

    Args:
        model: a trained network; it is left as it is. Of a model in DataParallel,
            DistributedDataParallel or `torch.compile`, what is inside is pruned, with a warning.
        budget: share of the dense latency (0.5), a time ("4ms"), or a `Budget`, which may limit
            parameters, multiply-adds and the memory of activations besides.
        example_inputs: a tensor or a tuple, the model's positional arguments, at the batch size
            that the latency is meant for. None: one image of the size the model expects.
        data: minibatches to score channels by: `(inputs, target)`, or inputs alone (a tensor) where
            there is no `loss`; several inputs as a tuple, `((a, b), target)`. None: channels are
            scored by their weights alone, which is the weaker score.
        loss: `loss(output, target)`. None: channels are scored by how much the network's outputs
            change without them, for which no targets are needed; else by the loss as well.
        latency: what a width costs. None measures this device with PyTorch, keeping the table;
            "torch", "torch.compile", "onnxruntime" or "analytic" name a back-end; a back-end with
            options, as `halp_fx.latency.OnnxRuntime(threads=1)`; the path of a table; a
            `LatencyTable`. A table of another device is refused: see
            `halp_fx.latency.resolve_backend`.
        saliency: of the first-order change of the loss, "fisher" (mean squares), "taylor" (HALP's:
            mean absolute values) or "taylor1.5" (between the two); "output" (mean squares of the
            change of the outputs, the default with data alone); "both" (the geometric mean of
            "fisher" and "output", the default with data and loss); "magnitude"; or a callable that
            takes the `ChannelGroups` and returns group name -> scores (units,). Scores to lower
            powers, see `halp_fx.passes.saliency.score`: "output1.75", "output1.5", "output1",
            "both1.75", "both1.5".
        include: only the output channels of these modules and parameters may go: a glob over
            names ("layer1" takes in all below it, "*.conv2"), several, or a callable
            `(parameter name, dim) -> bool`. Norms, biases and depthwise convolutions follow the
            channels that come in. Channels stay where they are coupled with others that stay.
        exclude: the output channels of these stay whole, whatever `include` says. A callable is
            asked about each dim of each parameter.
        exact: pin the channels that LayerNorm and the like (standardised weights, global response
            norm) take statistics over. Otherwise they may go, and such norms take their
            statistics over the survivors.
        solver: "joint", proven to be near the best choice; or, to compare with, "halp" (the
            paper's own), "greedy" or "uniform".
        drop_blocks: residual branches may go whole where that pays; the constant that such a
            branch still adds is kept, in the state dict under "_constants.".
        min_share: each group of coupled channels keeps at least this share (a residual branch may
            still go whole). Sums of saliencies say little about what is left of a layer of which
            nearly all goes.
        min_width: each group keeps at least so many channels, or all that it has.
        round_to: each group keeps a multiple of so many channels, or all. None: multiples of
            the step that measurements show, or else of a power of two that grows with the group, 8
            from 32 units on.

            These three may be dicts from a glob, over the modules and parameters that give a
            group's channels and over the group's name, to a value. The pattern with the most
            characters besides wildcards counts, among equals the largest value; where none
            matches, the default holds.
        candidates: try so many plans, and keep the one with the least loss on a few batches of
            `data` after batch norm recalibration; without `loss`, the one whose outputs are nearest
            to the dense network's. The first are by other scores of the same data; what is above
            them, or where `saliency` is not by data, weighs the groups a little differently against
            each other.
        evaluate: `evaluate(network)` -> number, the higher the better, by which candidates are
            compared instead. What a network does before fine-tuning says little about what it will
            do after: a function that trains the network for a little while (it is thrown away) and
            returns its accuracy on held-out data says more.
        steps: prune in so many steps, of budgets that fall exponentially; between them, batch norms
            are recalibrated and the channels that are left scored anew on up to 64 minibatches of
            `data`, in a copy. Values and `plan.gap` are those of the last.
        reconstruct: fit the weights that are left to what the dense network computes on `data`, as
            `halp_fx.reconstruct` does; candidates are compared after it. Without it, weights are
            those of the dense network, and `recalibrate` is up to you.
        also: further devices or back-ends whose latency is limited too: pairs (latency, budget) as
            the arguments of these names; each budget limits latency alone.
        verify: measure the result beside the dense network, and choose again while it misses a
            budget. Only with back-ends that measure.
        progress: called as `progress(stage, done, total)`.

    Returns:
        The smaller network: same call signature, same modes, same keys in its `state_dict()` but
        for residual branches that were dropped.
        `plan_of` tells what was kept. Of a detector of torchvision, the same detector with a
        smaller core.

    Raises:
        InputError: an argument is wrong (`BudgetError` for the budget).
        InfeasibleError: the budget can't be met; `.least` is the least that can be reached of what
            was missed: milliseconds, or parameters, multiply-adds or bytes.
        NothingToPruneError: every channel is pinned; the message says by what.
        HalpError: any other error of ours, see `halp_fx.errors`.

    Example:
        >>> import torch, halp_fx
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 32, 3), torch.nn.ReLU(), torch.nn.Conv2d(32, 8, 3))
        >>> small = halp_fx.compile(net, 0.5, torch.rand(1, 3, 32, 32), latency="analytic")
        >>> small(torch.rand(4, 3, 32, 32)).shape
        torch.Size([4, 8, 28, 28])
    """
    model = unwrapped(model, stacklevel=3)
    limit = parse_budget(budget)
    check_solver(solver, limit.further)
    options: dict[str, Any] = {
        "data": data,
        "loss": loss,
        "latency": latency,
        "saliency": saliency,
        "include": include,
        "exclude": exclude,
        "exact": exact,
        "solver": solver,
        "drop_blocks": drop_blocks,
        "min_share": min_share,
        "min_width": min_width,
        "round_to": round_to,
        "candidates": candidates,
        "evaluate": evaluate,
        "steps": steps,
        "reconstruct": reconstruct,
        "also": also,
        "verify": verify,
        "progress": progress,
    }
    if is_detector(model):
        detector: Any = prune_detector(compile, model, budget, example_inputs, **options)
        return cast(fx.GraphModule, detector)
    return prepare(model, example_inputs, **options).prune(limit)


def sweep(
    model: nn.Module,
    budgets: Iterable[float | str | Budget],
    example_inputs: Any = None,
    **options: Any,
) -> Iterator[tuple[Budget, fx.GraphModule]]:
    """Prune `model` to several budgets with one trace, one saliency and one latency table.

    Of a detector of torchvision each budget is traced and scored anew; the table is shared.

    Args:
        model: a trained network; it is left as it is.
        budgets: as `compile` takes them.
        example_inputs: as `compile` takes them.
        options: the other arguments of `compile`.

    Yields:
        Each budget, in the order given, and what `compile` would return for it.

    Raises:
        InputError: no budget, or one that is wrong; told before any work is done.
        InfeasibleError: a budget can't be met; those after it are not tried.
        HalpError: as `compile`.

    Example:
        >>> import torch, halp_fx
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 32, 3), torch.nn.ReLU(), torch.nn.Conv2d(32, 8, 3))
        >>> x = torch.rand(1, 3, 32, 32)
        >>> for budget, small in halp_fx.sweep(net, [0.8, 0.4], x, latency="analytic"):
        ...     plan = halp_fx.plan_of(small)
        ...     print(budget.share, plan.predicted_ms <= budget.share * plan.dense_ms)
        0.8 True
        0.4 True
    """
    model = unwrapped(model, stacklevel=3)
    if isinstance(budgets, (str, float, int, Budget)) or not isinstance(budgets, Iterable):
        raise InputError(f"budgets is {budgets!r}: pass several, as [0.7, 0.5]")
    limits = [parse_budget(budget) for budget in budgets]
    if not limits:
        raise InputError("there are no budgets: pass at least one, as [0.7, 0.5]")
    for limit in limits:
        check_solver(options.get("solver", "joint"), limit.further)
    if is_detector(model):
        return ((limit, compile(model, limit, example_inputs, **options)) for limit in limits)
    prepared = prepare(model, example_inputs, **options)
    return ((limit, prepared.prune(limit)) for limit in limits)


def plan_of(pruned: nn.Module) -> Plan:
    """The plan by which a network was pruned: what was kept, and what it costs.

    Raises:
        InputError: the module is not one that `compile` or `load` returned.
    """
    plan = getattr(pruned, "meta", {}).get("halp_fx") if isinstance(pruned, nn.Module) else None
    if plan is None:
        raise InputError(
            f"{type(pruned).__name__} has no plan: pass what halp_fx.compile or halp_fx.load gave"
        )
    return cast(Plan, plan)


def reconstruct(
    pruned: fx.GraphModule,
    dense: nn.Module,
    data: Iterable[Any],
    *,
    minibatches: int | None = None,
    ridge: float = 1e-3,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Fit]:
    """Fit the weights of a pruned network to what the dense one computes, without training.

    Layer by layer, in the order in which they run: the weights of each convolution and linear
    layer become those that, from what the pruned network gives it by then, come nearest to what
    the dense network has there, by least squares (as in He, Zhang, Sun: Channel Pruning for
    Accelerating Very Deep Neural Networks, 2017). A residual branch is fitted to what the dense
    stream is, less the pruned stream before it, so it makes up for blocks that were dropped. Batch
    norms then give each channel the mean and the variance that it had. Behind a dropout, weights
    keep to those that serve under it too. No targets are needed.

    What stays as it is: layers of which nothing was lost; those that run more than once, share
    their weights, compute them or have hooks; transposed convolutions; layers with more than 4,608
    inputs an output. One minibatch in four, or one sample in four where they are few, is kept for
    checking: where no fit lessens the error there by 2 %, a layer stays too. Where, on these, the
    outputs are no nearer to the dense network's in the end than after `recalibrate`, weights stay
    and batch norms are recalibrated alone.

    Args:
        pruned: what `compile` or `load` gave; its weights, biases and batch norms change in place,
            those without gradients (`requires_grad`) too.
        dense: the network that it was made from; it is left as it is.
        data: minibatches as the network is used on: `(inputs, target)`, or inputs (a tensor)
            alone. Some hundred to a few thousand images, without labels.
        minibatches: use at most so many; None: 32. As many as fit into about 1 GiB of activations
            of both networks are held at once; the others join further on, where layers are smaller.
        ridge: how much the weights keep to what they were: their squared change counts so many
            times the mean square of an input. 10 to 10,000 times as much is tried too, and of what
            comes to within 2 % of the least error on the samples kept for checking, the largest
            is taken.
        progress: called as `progress(done, total)` after each layer.

    Returns:
        For each layer that was fitted, the squared error on the samples kept for checking, before
        and after, as a share of the variance. Empty where all layers stay.

    Raises:
        InputError: `pruned` has no plan, `dense` is not the network of that plan, there are no
            minibatches, they can't be run, or they are not finite. `pruned` is as it was then.
        TraceError: `dense` can't be traced.

    Example:
        >>> import torch, halp_fx
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 32, 3), torch.nn.ReLU(), torch.nn.Conv2d(32, 8, 3))
        >>> images = [torch.rand(16, 3, 12, 12) for _ in range(2)]
        >>> small = halp_fx.compile(net, 0.5, images[0], latency="analytic")
        >>> fit = halp_fx.reconstruct(small, net, images)["2"]
        >>> fit.after < fit.before
        True
    """
    dense = unwrapped(dense, stacklevel=3)
    network = unwrapped(pruned, stacklevel=3)
    plan = plan_of(network)
    if not isinstance(network, fx.GraphModule):
        raise InputError(
            f"{type(network).__name__} has a core that was pruned, which can't be run on data "
            "alone: pass reconstruct=True to halp_fx.compile or compile_core instead"
        )
    _check_minibatches(minibatches, ridge)
    batches = first_minibatches(data, minibatches)
    if not isinstance(dense, nn.Module):
        raise InputError(f"dense is a {type(dense).__name__}: pass the network before pruning")
    _check_dense(network, dense, plan)
    with torch.inference_mode(False), same_random_state():
        traced = trace(dense, inputs_of(batches[0], device_of(dense)), quiet=True)
        return refit(network, traced.module, plan.kept, batches, ridge=ridge, tell=progress)


def _check_dense(pruned: nn.Module, dense: nn.Module, plan: Plan) -> None:
    """Whether the plan can have been made from this network."""
    sizes = {name: tuple(tensor.shape) for name, tensor in named_tensors(dense)}
    for name, tensor in named_tensors(pruned):
        if name not in plan.kept:
            continue  # the constant of a branch that was dropped
        own, before = tuple(tensor.shape), sizes.get(name, ())
        fits = len(own) == len(before) and all(
            size == there if index is None else len(index) < there and int(index[-1]) < there
            for size, there, index in zip(own, before, plan.kept[name], strict=True)
        )
        if not fits:
            raise InputError(
                f"dense has {name} of shape {sizes.get(name)}, from which {own} can't come: pass "
                "the network that was given to halp_fx.compile"
            )


def _check_minibatches(minibatches: Any, ridge: Any) -> None:
    whole = isinstance(minibatches, int) and not isinstance(minibatches, bool)
    if minibatches is not None and (not whole or minibatches < 1):
        raise InputError(f"minibatches is {minibatches!r}: pass a whole number of at least 1")
    if not isinstance(ridge, (int, float)) or not 0 < ridge < float("inf"):
        raise InputError(f"ridge is {ridge!r}: pass a number above 0, as 1e-3")
