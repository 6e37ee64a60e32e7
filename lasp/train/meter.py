"""Meter: what the steps of a run take, on this rank, and, now and then, on all of them."""

import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lasp.parallel.collectives import traffic
from lasp.parallel.work import work
from lasp.train.chips import peak_flops
from lasp.train.flops import weight_flops
from lasp.train.profile import Profile
from lasp.train.ranks import Ranks
from lasp.train.run import Run


@dataclass
class _Sums:
    """What some steps took on this rank."""

    steps: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    data: float = 0.0
    received: float = 0.0
    mixers: float = 0.0


class Meter:
    """Times the steps of this rank, and counts what they exchange and compute."""

    def __init__(self, run: Run, ranks: Ranks, model: nn.Module) -> None:
        self._ranks, self._dtype = ranks, getattr(torch, run.config.dtype)
        self._tokens = run.batch(ranks) * run.config.data.seq_len
        self._counted = not run.config.engine.startswith("zero")  # DeepSpeed's own exchanges pass the ledger by
        self._weights = weight_flops(model)
        self._peak: float | None = None
        self._sums, self._last = _Sums(), math.inf
        steps = run.config.profiled
        name = f"steps-{steps.start}-{steps.stop - 1}-rank-{ranks.everyone.rank}.json"
        self._profile = Profile(steps, Path(run.config.output) / "profile" / name, ranks.device)

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around a step."""
        started = time.perf_counter()
        with self._profile.step(number), traffic(self._ranks.device) as ledger, work() as computed:
            yield
        self._last = time.perf_counter() - started
        sums = self._sums
        sums.steps += 1
        sums.seconds += self._last
        sums.waited += ledger.waited()
        sums.received += ledger.received
        sums.mixers += computed.flops

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the whole batch per second of the last step, as this rank saw it."""
        return self._tokens / self._last

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Around what a step reads."""
        started = time.perf_counter()
        yield
        self._sums.data += time.perf_counter() - started

    def close(self) -> None:
        """No more steps come."""
        self._profile.close()

    def totals(self, steps_done: int) -> dict[str, Any]:
        """What a step took on all ranks, by the names of `StepMetrics`: means over the steps since the last call. All
        ranks call this together; it is one exchange of six numbers."""
        sums, self._sums = self._sums, _Sums()
        own = [sums.seconds, sums.waited, sums.data, sums.received, sums.mixers]
        each = [value / max(sums.steps, 1) for value in own] + [self._peak_memory()]
        every = self._ranks.gather(torch.tensor(each, dtype=torch.float64))
        seconds, waited, data, received, mixers, memory = every.unbind(1)
        busy, pace, size = seconds - waited, seconds.max().item(), len(every)
        flops = (self._tokens * self._weights + 3 * mixers.sum().item()) / pace / size
        return {
            "tokens": steps_done * self._tokens,
            "seconds": pace,
            "tokens_per_second_per_rank": self._tokens / pace / size,
            "flops_per_second": flops,
            "mfu": self._share_of_peak(flops),
            "memory": int(memory.max()),
            "received": received.mean().item() if self._counted else None,
            "waited": waited.mean().item() if self._counted else None,
            "data": data.max().item(),
            "slowest_rank": int(busy.argmax()),
            "slowest_by": (busy.max() - busy.median()).item(),
        }

    def _share_of_peak(self, flops: float) -> float | None:
        if not self._ranks.is_main:
            return None
        self._peak = self._peak or peak_flops(self._ranks.device, self._dtype)
        return None if self._peak is None else flops / self._peak

    def _peak_memory(self) -> float:
        """Bytes: of a GPU what tensors took since the last call, of a CPU what the process ever took."""
        device = self._ranks.device
        if device.type == "cuda":
            most = torch.cuda.max_memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            return float(most)
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return float(most if sys.platform == "darwin" else 1024 * most)
