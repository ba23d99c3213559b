"""What torchrun starts in the tests: a network that is pruned while it trains, and goes on.

    torchrun --nproc-per-node 2 -m tests.launched_training FOLDER [STEP]

Each optimiser step leaves a checkpoint of each process. After STEP of them the second process kills
itself; what is started next in the same folder goes on from there.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import halp_fx
from tests.training_networks import batches, example, network

__all__: list[str] = []

STEPS = 8


def main(folder: Path, killed_after: int | None) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    checkpoint = folder / f"checkpoint{rank}.pt"
    pruner = halp_fx.GradualPruner(
        DistributedDataParallel(network()), 0.4, example(), steps=3, every=2, latency="analytic"
    )
    state = torch.load(checkpoint, weights_only=True) if checkpoint.exists() else None
    if state is not None:
        pruner.load_state_dict(state["pruner"])
    optimizer = torch.optim.SGD(pruner.model.parameters(), 0.1, momentum=0.9)
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])
    first = 0 if state is None else state["step"]
    with (folder / f"lives{rank}.txt").open("a", encoding="utf-8") as file:
        file.write(f"{first}\n")
    data = batches(STEPS, seed=rank)
    for step in range(first, STEPS):
        images, classes = data[step]
        nn.functional.cross_entropy(pruner.model(images), classes).backward()
        pruner.after_backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step(optimizer)
        parts = {"pruner": pruner.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**parts, "step": step + 1}, folder / f"checkpoint{rank}.new")
        os.replace(folder / f"checkpoint{rank}.new", checkpoint)
        dist.barrier()
        if rank == 1 and state is None and step + 1 == killed_after:
            os.kill(os.getpid(), signal.SIGKILL)
    torch.save(pruner.network.state_dict(), folder / f"final{rank}.pt")
    assert pruner.done
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
