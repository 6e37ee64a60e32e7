"""One rank of `lasp bench step`: training steps of a tiny hybrid, timed.

Started by its path, so that the `lasp` it imports may be that of another checkout: it uses public names alone.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

import lasp
from lasp.models import LinearLlamaConfig, LinearLlamaForCausalLM

VOCABULARY, DOCUMENTS, WARM = 256, 8, 2


def main() -> None:
    """Rank 0 prints what it measured as one line of JSON."""
    told = json.loads(sys.argv[1])
    torch.set_num_threads(told["threads"])
    dist.init_process_group(
        "gloo",
        init_method=told["store"],
        rank=told["rank"],
        world_size=told["ranks"],
        timeout=timedelta(minutes=5),
    )
    group = lasp.SequenceGroup.from_group()
    torch.manual_seed(0)
    config = LinearLlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_hidden_layers=told["layers"],
        mixer="gated_deltanet",
        pattern="LLLN",
    )
    model = lasp.parallelize(LinearLlamaForCausalLM(config).train(), group)
    batch = _batch(told["tokens"], told["packed"])
    seconds = [_step(model, batch, group) for _ in range(WARM + told["steps"])][WARM:]
    with lasp.traffic() as ledger:
        _step(model, batch, group)
    records = {"headers": [r for r in ledger.records if r.phase == "control"]}
    records["exchanges"] = [r for r in ledger.records if r.phase != "control"]
    if group.rank == 0:
        counts = {name: len(found) for name, found in records.items()}
        print(json.dumps({"seconds": statistics.median(seconds), **counts}), flush=True)
    lasp.shutdown()


def _batch(tokens: int, packed: bool) -> dict[str, torch.Tensor]:
    ids = torch.randint(VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(1))
    bounds = torch.linspace(0, tokens, DOCUMENTS + 1).long()
    return {"input_ids": ids, "labels": ids} | ({"cu_seqlens": bounds} if packed else {})


def _step(model: Any, batch: dict[str, torch.Tensor], group: lasp.SequenceGroup) -> float:
    """Seconds from the batch to the end of backward."""
    model.zero_grad()
    start = time.perf_counter()
    model(**lasp.shard_batch(batch, group)).loss.backward()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
