"""The training step under DeepSpeed ZeRO (arXiv:1910.02054), stages 0 to 3.

DeepSpeed's configuration is built from ours. The arithmetic is that of DDP: weights and updates in
fp32, matrix products in bf16 by ``torch_autocast``, gradients accumulated and reduced in fp32.
Checkpoints have our format, through DeepSpeed's accessors for whole tensors.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from gpt_dist.config.settings import Config
from gpt_dist.data.loader import Batch
from gpt_dist.errors import UsageError
from gpt_dist.model.gpt import GPT
from gpt_dist.optim.adamw import Guard, global_norm
from gpt_dist.optim.average import AVERAGE, advance_average, begin_average
from gpt_dist.optim.muon import Muon
from gpt_dist.optim.spikes import make_spikes
from gpt_dist.parallel.copies import CopiedState, make_optimizer
from gpt_dist.parallel.engine import Reader, guard_step, load_spikes, set_rates, spikes_state
from gpt_dist.parallel.sharing import share_partition
from gpt_dist.parallel.world import World

MOMENTS = ("exp_avg", "exp_avg_sq")


def build_config(config: Config, dtype: torch.dtype, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration, with the file of ``parallel.deepspeed_config`` added.

    Raises:
        UsageError: the file is missing or not JSON, or sets what our configuration sets.
    """
    micro_batch, accumulation = config.micro_batch(world_size)
    zero: dict[str, Any] = {"stage": config.parallel.zero_stage}
    if config.parallel.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optim.grad_clip if config.parallel.zero_stage else 0.0,
        "zero_optimization": zero,
        "data_types": {"grad_accum_dtype": "fp32"},
        # DeepSpeed's own AdamW would have to be compiled on each machine.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "torch_autocast": {
            "enabled": dtype != torch.float32,
            "dtype": str(dtype).removeprefix("torch."),
            # No modules: gradients are communicated in fp32, as under DDP.
            "lower_precision_safe_modules": [],
        },
    }
    file = config.parallel.deepspeed_config
    return merge(ours, read_json(Path(file)), file) if file else ours


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"parallel.deepspeed_config = {path}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"parallel.deepspeed_config = {path}: not JSON ({error})") from None
    if not isinstance(data, dict):
        raise UsageError(f"parallel.deepspeed_config = {path}: expected a JSON object")
    return data


RESERVED = {
    "optimizer": "optim.*",
    "scheduler": "optim.schedule",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "amp": "train.precision",
    "train_batch_size": "train.batch_tokens",
}
"""DeepSpeed's keys for what our configuration decides, and the setting to use instead."""


def merge(ours: dict[str, Any], theirs: dict[str, Any], file: str, prefix: str = "") -> Any:
    """Our settings with those of a file added; a key that is in both is refused.

    Raises:
        UsageError: naming the key and the setting to use instead.
    """
    merged = dict(ours)
    for key, value in theirs.items():
        name = prefix + key
        if name in RESERVED:
            raise UsageError(
                f"parallel.deepspeed_config = {file}: {name} conflicts with this configuration; "
                f"set {RESERVED[name]} instead"
            )
        if isinstance(value, dict) and isinstance(ours.get(key), dict):
            merged[key] = merge(ours[key], value, file, f"{name}.")
        elif key in ours:
            raise UsageError(
                f"parallel.deepspeed_config = {file}: {name} = {value} conflicts with "
                f"{name} = {ours[key]}, which follows from this configuration; leave it out"
            )
        else:
            merged[key] = value
    return merged


class DeepSpeedEngine:
    """``Engine`` over ``deepspeed.initialize``.

    Args:
        model: on its device; in stage 3 on the host. From there parameters move to the device one
            at a time to be partitioned, so the device never holds the whole model.
        world: the ranks that share a step.
        config: the run's configuration.
        dtype: arithmetic of the matrix products; parameters and updates stay fp32.
    """

    def __init__(self, model: GPT, world: World, config: Config, dtype: torch.dtype) -> None:
        settings = build_config(config, dtype, world.size)
        if world.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        deepspeed = import_deepspeed()
        if not dist.is_initialized():  # one process without torchrun
            os.environ.setdefault("LOCAL_RANK", "0")
            backend = "nccl" if world.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        deepspeed.init_distributed(auto_mpi_discovery=False)
        self.model, self.world, self.dtype = model, world, dtype
        self.stage, self.grad_clip = config.parallel.zero_stage, config.optim.grad_clip
        self.loss_scale = world.size / (config.batch_sequences * config.model.context_length)
        # The optimizer updates DeepSpeed's partitions, which are on the host if offloaded.
        where = torch.device("cpu") if config.parallel.offload else world.device
        # Made before partitioning, which takes the shape from the parameters.
        self.optimizer = make_optimizer(model, config.optim, where)
        kinds = [group["muon"] for group in self.optimizer.param_groups]
        if self.stage == 3:
            # Parameters move to the device one at a time and are partitioned there at once.
            deepspeed.zero.Init(module=model, config_dict_or_path=settings)
            # The head may share the embedding's weights, so they stay gathered in a forward pass.
            deepspeed.zero.register_external_parameter(model, model.head_weight)
        with errors_only(deepspeed.utils.logger):  # it warns of a class that it has not tested
            self.engine, *_ = deepspeed.initialize(
                model=model, optimizer=self.optimizer, config=settings
            )
        self.deepspeed = deepspeed
        self.spikes = make_spikes(config.optim, world.device)
        self.averages = False
        self.copies = CopiedState(model, self.optimizer, world) if self.stage == 0 else None
        if self.stage:
            self._make_state(kinds)

    def warm_up(self, batch: Batch) -> None:
        """Run a step whose gradients are not finite, so that it changes nothing."""
        self._micro_step(batch, torch.nan, last=False)
        self._micro_step(batch, torch.nan, last=True)
        with errors_only(self.deepspeed.utils.logger):  # it warns of the overflow
            self.step(0.0)

    def micro_step(self, batch: Batch, *, last: bool) -> Tensor:
        return self._micro_step(batch, self.loss_scale, last=last)

    def _micro_step(self, batch: Batch, scale: float, *, last: bool) -> Tensor:
        self.engine.set_gradient_accumulation_boundary(last)
        loss = self.engine(batch.ids, batch.targets)
        self.engine.backward(loss * scale, scale_wrt_gas=False)
        if not last:
            self.engine.step()
        detached: Tensor = loss.detach()
        return detached

    @torch.no_grad()
    def step(
        self,
        lr: float,
        momentum: float | None = None,
        average: float | None = None,
        loss: Tensor | None = None,
    ) -> Tensor:
        norm = self._step(lr, momentum, loss)
        if self.copies:
            self.copies.average(average)
        elif average is not None:
            if not self.averages:
                self.begin_average()
            advance_average(self.optimizer, self._partitions(), average)
        return norm

    def _step(self, lr: float, momentum: float | None, loss: Tensor | None) -> Tensor:
        set_rates(self.engine.optimizer.param_groups, lr, momentum)
        if self.stage == 0:
            # Stage 0 is our optimizer behind an all-reduce: norm, clipping and skipping are ours.
            norm = global_norm([p.grad for p in self.model.parameters() if p.grad is not None])
            spike = self.spikes.skip(loss, norm) if self.spikes and loss is not None else None
            guard_step(self.optimizer, norm, self.grad_clip, 1.0, spike)
            self.engine.step()
            return norm
        if self.spikes is None or loss is None:
            self.engine.step()
            return self._norm()
        # DeepSpeed knows the norm before it lets the optimizer step, group by group, and not at
        # all where the norm is not finite.
        known: list[Tensor] = []
        spikes, where = self.spikes, self._partitions()[0].device

        def ask() -> Guard:
            if not known:
                known.append(spikes.skip(loss, self._norm()).to(where))
            return torch.ones((), device=where), known[0]

        self.optimizer.ask = ask
        self.engine.step()
        self.optimizer.ask = None
        ask()
        return self._norm()

    def _norm(self) -> Tensor:
        """The global gradient norm of the step that DeepSpeed takes or took last."""
        norm = self.engine.optimizer._global_grad_norm
        return torch.as_tensor(norm, device=self.world.device)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Tensor:
        enabled = self.dtype != torch.float32
        with torch.autocast(self.world.device.type, dtype=self.dtype, enabled=enabled):
            loss: Tensor = self.model(batch.ids, batch.targets)
        return loss

    def whole_weights(self) -> AbstractContextManager[object]:
        if self.stage < 3:
            return nullcontext()
        gathered: AbstractContextManager[object] = self.deepspeed.zero.GatheredParameters(
            list(self.model.parameters())
        )
        return gathered

    def full_state(self) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self.copies:
            yield from self.copies.full()
            yield from spikes_state(self.spikes)
            return
        for name, parameter in self.model.named_parameters():
            yield f"model.{name}", safe_get_full_fp32_param(parameter)
        for key, name, parameter in self._state_names():
            yield f"optimizer.{key}.{name}", safe_get_full_optimizer_state(parameter, key)
        yield "optimizer.step", self.optimizer.state[self._partitions()[0]]["step"]
        yield from spikes_state(self.spikes)

    @torch.no_grad()
    def load_optimizer(self, reader: Reader) -> None:
        load_spikes(self.spikes, reader)
        if self.copies:
            self.copies.load(reader)
            return
        for partition in self._partitions():
            if "step" in self.optimizer.state[partition]:
                self.optimizer.state[partition]["step"].copy_(reader("optimizer.step"))
        # Not by DeepSpeed's own accessor: in stage 3 it fails where the ranks do not divide a size.
        for key, name, parameter in self._state_names():
            value = reader(f"optimizer.{key}.{name}")  # every rank reads all, in the same order
            if place := self._place(parameter):
                number, start, size, at = place
                state = self.optimizer.state[self._partitions()[number]][key]
                state[at : at + size].copy_(value.reshape(-1)[start : start + size])

    def _state_names(self) -> Iterator[tuple[str, str, Parameter]]:
        """State of the optimizer that a checkpoint holds, name of the parameter, parameter."""
        matrices = self.optimizer.matrices if isinstance(self.optimizer, Muon) else {}
        for key in MOMENTS:
            for name, parameter in self.model.named_parameters():
                if name not in matrices:
                    yield key, name, parameter
        for name, parameter in matrices.items():
            yield "momentum_buffer", name, parameter
        if self.averages:
            for name, parameter in self.model.named_parameters():
                yield AVERAGE, name, parameter

    def _partitions(self) -> list[Tensor]:
        """The flat tensors that the optimizer updates on this rank."""
        zero = self.engine.optimizer
        partitions: list[Tensor] = (
            zero.fp32_partitioned_groups_flat
            if self.stage == 3
            else zero.single_partition_of_fp32_groups
        )
        return partitions

    def _make_state(self, kinds: list[bool]) -> None:
        """Make the optimizer's state before the first step, so that it can be saved and loaded.

        Args:
            kinds: whether each group of parameters is Muon's.
        """
        zero = self.engine.optimizer
        for number, partition in enumerate(self._partitions()):
            group = zero.sub_group_to_group_id[number] if self.stage == 3 else number
            if kinds[group]:
                self._share(number, partition)
            else:
                self.optimizer.make_state([partition])
        if self.stage in (1, 2):
            self._link_state()

    def begin_average(self) -> None:
        if self.copies:
            self.copies.begin_average()
            return
        begin_average(self.optimizer, self._partitions())
        self.averages = True
        if self.stage in (1, 2):
            self._link_state()

    def _link_state(self) -> None:
        """Tell DeepSpeed which state there is.

        It asks for itself when the first group steps; the others have none by then.
        """
        self.engine.optimizer._hp_optimizer_states_linked = False
        self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _share(self, number: int, partition: Tensor) -> None:
        """Let the ranks share the matrices of which one partition has parts."""
        assert isinstance(self.optimizer, Muon)
        zero = self.engine.optimizer
        groups = zero.fp16_groups if self.stage == 3 else zero.bit16_groups
        members = {id(parameter) for parameter in groups[number]}
        matrices = {n: p for n, p in self.optimizer.matrices.items() if id(p) in members}
        held = {name: place[1:] for name, p in matrices.items() if (place := self._place(p))}
        share_partition(self.optimizer, self.world, partition, list(matrices), held)

    def _place(self, parameter: Any) -> tuple[int, int, int, int] | None:
        """The part of a parameter that this rank updates; None where it is all on other ranks.

        Returns:
            Number of the partition that holds it, its first element within the parameter, number
            of elements, and its first element within the partition.
        """
        if self.stage == 3:
            zero = self.engine.optimizer
            number, at, size = zero.grad_position[zero.get_param_id(parameter)]
            start = size * self.world.rank
            size = min(size, parameter.ds_numel - start)  # the last parts are padded
            return (number, start, size, at) if size > 0 else None
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        whole, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
        return mapping.param_group_index, whole.start, whole.numel, flat.start


@contextmanager
def errors_only(logger: logging.Logger) -> Iterator[None]:
    """Silence a logger's warnings."""
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def import_deepspeed() -> Any:
    """Import DeepSpeed and limit its log to warnings.

    Raises:
        UsageError: it cannot be imported.
    """
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        import deepspeed
    except ImportError as error:
        raise UsageError(f"parallel.strategy = deepspeed: cannot import it ({error})") from None
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # DeepSpeed would compile an all-reduce in shared memory here, which only its inference on CPUs
    # uses. The module is imported by name, because deepspeed.comm.torch is PyTorch.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    return deepspeed
