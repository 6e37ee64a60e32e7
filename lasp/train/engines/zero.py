"""zero1, zero2, zero3: DeepSpeed holds a share of the optimizer state, of the gradients too, of the parameters too.

DeepSpeed averages gradients over all ranks and divides by the micro-batches; here they are summed over sp and averaged
over dp, so the loss is multiplied by sp and nothing divided.
"""

import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp.parallel.weights import OneByOne, hand_out_buffers
from lasp.train.config import TrainConfig
from lasp.train.engines.engine import Batch, Built, State, autocast
from lasp.train.optimizer import build_optimizers
from lasp.train.ranks import Ranks
from lasp.wrap.saving import tensors_of, to_cpu


def check_deepspeed() -> None:
    """ValueError where DeepSpeed is not installed."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError('engine = "zero…" needs DeepSpeed: pip install "lasp2[deepspeed]"')


class Zero:
    """DeepSpeed's engine around the model, with our optimizer inside it."""

    def __init__(self, built: Built, config: TrainConfig, ranks: Ranks) -> None:
        self.model, self.config, self.ranks = built.model, config, ranks
        self.stage = int(config.engine.removeprefix("zero"))
        self._shapes = {name: parameter.shape for name, parameter in self.model.named_parameters()}
        self.deepspeed = _initialize(built, config, self.stage, ranks)

    def backward(self, batch: Batch, last: bool) -> Tensor:
        with autocast(self.config, self.ranks):
            loss: Tensor = self.deepspeed(**batch).loss
        self.deepspeed.set_gradient_accumulation_boundary(last)
        self.deepspeed.backward(loss * self.ranks.sequence.size, scale_wrt_gas=False)
        if not last:
            self.deepspeed.step()
        return loss.detach()

    def update(self, lr: float, max_norm: float, skip: bool = False) -> float:
        """As of the protocol, but that a norm which is not finite is always infinite."""
        optimizer = self.deepspeed.optimizer
        for group in optimizer.param_groups:
            group["lr"] = lr
        if skip:  # of gradients that are not finite DeepSpeed itself makes no update
            for part in (part for parts in optimizer.averaged_gradients.values() for part in parts or []):
                part.fill_(math.nan)
        self.deepspeed.step()
        return float(self.deepspeed.get_global_grad_norm())

    def unfinite(self) -> list[str]:
        return []

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Tensor:
        self.deepspeed.eval()
        try:
            with autocast(self.config, self.ranks):
                loss: Tensor = self.deepspeed(**batch).loss
        finally:
            self.deepspeed.train()
        return loss

    def state(self) -> State:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        self._link_state()
        main, kept = self.ranks.is_main, {}
        with self._gathered():
            weights = {name: to_cpu(value, main) for name, value in tensors_of(self.model).items()}
        for name, parameter in self._trained().items():
            weights[name] = to_cpu(safe_get_full_fp32_param(parameter), main)
            found = {key: safe_get_full_optimizer_state(parameter, key) for key in ("exp_avg", "exp_avg_sq")}
            kept[name] = {key: to_cpu(value, main) for key, value in found.items()}
            kept[name]["step"] = self._steps()[0].cpu().clone()  # a file's tensors share no memory
        return State(weights, kept) if main else State({}, {})

    def load(self, read: Callable[[State], None]) -> None:
        held, trained = tensors_of(self.model), self._trained()
        whole = {
            name: torch.empty(self._shapes.get(name, value.shape), dtype=value.dtype) for name, value in held.items()
        }
        moments = {name: {key: torch.empty_like(whole[name]) for key in ("exp_avg", "exp_avg_sq")} for name in trained}
        state = State(whole, {name: {**kept, "step": torch.zeros(())} for name, kept in moments.items()})
        read(state)
        self._make_state()
        for name, value in held.items():
            if name not in trained:
                value.data.copy_(state.weights[name])
        for name, parameter in trained.items():
            self._put(parameter, state.weights[name], None)
            for key in moments[name]:
                self._put(parameter, state.optimizer[name][key], key)
        for steps in self._steps():
            steps.fill_(next(iter(state.optimizer.values()))["step"].item())

    def _trained(self) -> dict[str, Any]:
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        """Parameters are whole inside."""
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.model.parameters()), enabled=self.stage == 3):
            yield

    def _steps(self) -> list[Tensor]:
        """The numbers of steps that the optimizer inside has done, one per flat part of the parameters."""
        return [state["step"] for state in self.deepspeed.optimizer.optimizer.state.values()]

    def _make_state(self) -> None:
        """Let the optimizer inside make what it keeps: a step of rate 0 without gradients moves nothing."""
        optimizer = self.deepspeed.optimizer.optimizer
        flat = self._flat_parts()
        for group, parts in zip(optimizer.param_groups, flat, strict=True):
            group["lr"], group["params"] = 0.0, parts
            for part in parts:
                part.grad = torch.zeros_like(part)
        optimizer.step()
        for part in (part for parts in flat for part in parts):
            part.grad = None
        self._link_state()

    def _link_state(self) -> None:
        """Let parameters find what is kept of them: DeepSpeed looks after the first group's first step alone, when the
        other groups have nothing yet."""
        if self.stage < 3:
            self.deepspeed.optimizer._hp_optimizer_states_linked = False
            self.deepspeed.optimizer._lazy_init_hp_params_optimizer_state()

    def _flat_parts(self) -> list[list[Tensor]]:
        outer = self.deepspeed.optimizer
        if self.stage < 3:
            return [[part] for part in outer.single_partition_of_fp32_groups]
        parts: list[list[Tensor]] = [[] for _ in outer.optimizer.param_groups]
        for index, part in enumerate(outer.fp32_partitioned_groups_flat):
            parts[outer.sub_group_to_group_id[index]].append(part)
        return parts

    def _put(self, parameter: Any, value: Tensor, key: str | None) -> None:
        """Give this rank its part of a parameter's value, or of what the optimizer keeps of it."""
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        value = value.to(self.ranks.device)
        if self.stage == 3:
            size = parameter.ds_tensor.ds_numel
            whole = F.pad(value.flatten(), (0, size * self.ranks.everyone.size - value.numel()))
            part = whole.narrow(0, size * self.ranks.everyone.rank, size)
            if key is None:
                parameter.ds_tensor.data.copy_(part)
                safe_set_local_fp32_param(parameter, part)
            else:
                safe_set_local_optimizer_state(parameter, part, key)
        elif key is None:
            parameter.data.copy_(value)
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)


def _initialize(built: Built, config: TrainConfig, stage: int, ranks: Ranks) -> Any:
    import deepspeed

    if ranks.device.type == "cpu":
        from deepspeed.accelerator import set_accelerator
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        set_accelerator(CPU_Accelerator())
        # Else it compiles an operation for inference, or waits for ever for the lock of one that was killed there.
        deepspeed.ops.__compatible_ops__ = {}

    reduce = {} if config.reduce_dtype is None else {"communication_data_type": _SHORT[config.reduce_dtype]}
    settings = {
        "train_micro_batch_size_per_gpu": config.data.batch_size,
        "gradient_accumulation_steps": config.accumulation,
        "gradient_clipping": config.optimizer.clip,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 60,
        **reduce,
    }
    model = built.model
    if stage == 3:  # DeepSpeed sends each parameter from rank 0, and keeps a share, before it asks for the next
        deepspeed.zero.Init(module=OneByOne(model, built.weights, ranks.device), config_dict_or_path=settings)
        hand_out_buffers(model, built.weights, ranks.everyone, ranks.device)
    (optimizer,) = build_optimizers(model, config.optimizer)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    return engine


_SHORT = {"float32": "fp32", "bfloat16": "bf16"}
