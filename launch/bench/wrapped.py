"""A Llama of transformers, parallelised on one device, beside itself as it was: what wrapping alone costs.

A training step (forward and backward of one sequence, fp32) from the same weights; the batch of the parallelised one
is cut within the step. Medians of interleaved rounds, in CPU time: a machine that is shared says little by its clock.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import lasp
from lasp.launch.bench.table import markdown
from lasp.launch.bench.timing import compared, cpu_seconds, interleave, machine

VOCABULARY, HEAD_DIM = 1024, 64
Step = Callable[[], Tensor]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The model and the sequence."""
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument(
        "--heads", type=int, default=8, help=f"of {HEAD_DIM} channels each; half as many keys and values"
    )
    parser.add_argument("--tokens", type=int, default=1024)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of a step of each, of all threads together."""
    shape = {name: getattr(options, name) for name in ("layers", "heads", "tokens")}
    plain, wrapped = steps(**shape)
    seconds = interleave({"transformers": plain, "lasp": wrapped}, options.repeat, clock=cpu_seconds)
    return {
        "machine": machine(torch.get_num_threads()),
        "shape": shape,
        "seconds": seconds,
        "times_faster": seconds["transformers"] / seconds["lasp"],
    }


def show(figures: dict[str, Any]) -> None:
    """The table, and the ratio."""
    rows = [[name, f"{1e3 * seconds:.1f}"] for name, seconds in figures["seconds"].items()]
    print(markdown(["Llama, one device", "step, ms of CPU time"], rows))
    shape = ", ".join(f"{value} {name}" for name, value in figures["shape"].items())
    told = figures["machine"]
    print(f"\n{shape}: the parallelised one is {compared(figures['times_faster'], 'the other')};", end=" ")
    print(f"{told['chip']}, {told['threads']} threads, torch {told['torch']}")


def steps(layers: int, heads: int, tokens: int) -> tuple[Step, Step]:
    """A training step of the model as it is, with the attention that transformers chooses, and of its copy."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=heads * HEAD_DIM, intermediate_size=heads * HEAD_DIM * 3,
        num_attention_heads=heads, num_key_value_heads=max(1, heads // 2), num_hidden_layers=layers, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    plain = LlamaForCausalLM(config).train()
    own = lasp.parallelize(copy.deepcopy(plain), None)
    ids = torch.randint(VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": ids}
    return (
        lambda: _step(plain, batch),
        lambda: _step(own, lasp.shard_batch(batch, None)),
    )


def _step(model: Any, batch: dict[str, Any]) -> Tensor:
    model.zero_grad()
    loss: Tensor = model(**batch).loss
    loss.backward()
    return loss.detach()
