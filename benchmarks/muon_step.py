"""How long one optimizer step of Muon takes, beside public implementations, at GPT-2's shapes.

    python benchmarks/muon_step.py --json benchmarks/results/muon_step-124m.json
    torchrun --nproc_per_node=2 benchmarks/muon_step.py

Gradients are random and the same for all. Every implementation updates the matrices of the blocks
alone and takes turns with the others. Beside the median of a step's time it prints the least time
of the CPU, which does not depend on what else runs (with OMP_NUM_THREADS=1, of rank 0):

- ours: ``gpt_dist.optim.muon`` with ``newton_schulz_precision`` bf16 and fp32; ranks share work;
- torch: ``torch.optim.Muon``, whose products are in bf16; every rank does all of the work;
- Jordan: the reference implementation (kellerjordan.github.io/posts/muon), written down here in
  fp32, which is faster than bf16 on a CPU without bf16 arithmetic; likewise.

It also prints the FLOPs of Newton-Schulz on each rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from flags import benchmark_parser
from record import record
from torch import Tensor, nn

from gpt_dist.config.settings import ModelConfig, OptimConfig
from gpt_dist.model.gpt import GPT
from gpt_dist.optim.muon import Muon
from gpt_dist.parallel.sharing import share_copies
from gpt_dist.parallel.world import World, start

SIZES = {"124m": (12, 768), "350m": (24, 1024), "1558m": (48, 1600)}

SLOW = 10.0
"""Times the fastest step: an implementation that takes longer is measured once."""


def jordan(matrix: Tensor, steps: int = 5) -> Tensor:
    """The reference implementation's ``zeropower_via_newtonschulz5``, in fp32."""
    a, b, c = (3.4445, -4.7750, 2.0315)
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Reference:
    """Muon as its author published it: one matrix after the other."""

    def __init__(self, matrices: list[nn.Parameter]) -> None:
        self.matrices = matrices
        self.momenta = [torch.zeros_like(matrix) for matrix in matrices]

    @torch.no_grad()
    def step(self) -> None:
        for matrix, momentum in zip(self.matrices, self.momenta, strict=True):
            assert matrix.grad is not None
            momentum.lerp_(matrix.grad, 0.05)
            update = jordan(matrix.grad.lerp(momentum, 0.95))
            matrix.mul_(1 - 1e-3 * 0.1)
            matrix.add_(update, alpha=-1e-3 * max(1, matrix.shape[0] / matrix.shape[1]) ** 0.5)


def ours(model: GPT, world: World, precision: str, split: bool) -> tuple[Muon, float]:
    """Our optimizer without its groups for AdamW, and this rank's FLOPs of a step."""
    config = OptimConfig.model_validate(
        {"name": "muon", "lr": 1e-3, "newton_schulz_precision": precision, "split_qkv": split}
    )
    optimizer = Muon(model, config, fused=False)
    exchange = share_copies(optimizer, world)
    optimizer.param_groups = [group for group in optimizer.param_groups if group["muon"]]
    mine = [
        block.flops
        for block, owner in zip(exchange.blocks, exchange.owners, strict=True)
        if owner == world.rank
    ]
    return optimizer, 5.0 * sum(mine)


def measure(world: World, size: str, layers: int | None, repeats: int) -> dict[str, Any]:
    """Seconds of one step by implementation, and FLOPs by rank."""
    n_layer, width = SIZES[size]
    n_layer = layers or n_layer
    torch.manual_seed(0)
    shape = {"n_layer": n_layer, "n_head": width // 64, "n_embd": width, "vocab_size": 128}
    model = GPT(ModelConfig.model_validate(shape)).to(world.device)
    matrices = [p for n, p in model.named_parameters() if n.startswith("h.") and p.dim() == 2]
    gradients = [torch.randn_like(matrix) for matrix in matrices]
    bf16, flops = ours(model, world, "bf16", split=True)
    optimizers: dict[str, Any] = {
        "ours, bf16": bf16,
        "ours, bf16, qkv whole": ours(model, world, "bf16", split=False)[0],
        "ours, fp32": ours(model, world, "fp32", split=True)[0],
        "torch.optim.Muon": torch.optim.Muon(matrices, lr=1e-3),
        "Jordan, fp32": Reference(matrices),
    }
    steps: dict[str, Callable[[], object]] = {n: o.step for n, o in optimizers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats + 1):
        fastest = min((times[0] for times in seconds.values() if times), default=0.0)
        for name, step in steps.items():
            if seconds[name] and world.any(seconds[name][0] > SLOW * fastest):
                continue
            for matrix, gradient in zip(matrices, gradients, strict=True):
                matrix.grad = gradient.clone()
            world.barrier()
            begin, used = time.perf_counter(), time.process_time()
            step()
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            world.barrier()
            seconds[name].append(time.perf_counter() - begin)
            cpu[name].append(time.process_time() - used)
    # The first step warms up; an implementation that is far slower takes no other.
    timed = {
        name: {
            "median": median(times[1:] or times),
            "all": times[1:] or times,
            "least_cpu": min(cpu[name]),
        }
        for name, times in seconds.items()
    }
    return {
        "model": size,
        "layers": n_layer,
        "ranks": world.size,
        "device": world.device.type,
        "threads": torch.get_num_threads(),
        "tflops_by_rank": [f / 1e12 for f in world.gather(flops)],
        "seconds": timed,
    }


def main() -> None:
    parser = benchmark_parser(__file__, __doc__)
    parser.add_argument("--model", choices=SIZES, default="124m")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", metavar="FILE", help="write the result here")
    arguments = parser.parse_args()
    with start(arguments.device) as world:
        result = measure(world, arguments.model, arguments.layers, arguments.repeats)
        if not world.is_main:
            return
        for name, found in result["seconds"].items():
            print(f"{name:<24}{found['median']:8.3f} s, CPU {found['least_cpu']:8.3f} s")
        flops = ", ".join(f"{f:.3f}" for f in result["tflops_by_rank"])
        print(f"Newton-Schulz, TFLOPs by rank: {flops}")
        record(arguments.json, result)


if __name__ == "__main__":
    main()
