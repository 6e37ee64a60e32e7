"""Fine-tune a model of Hugging Face, every sequence shared by all ranks: MODEL is a folder or a name on the hub, DATA a
file of JSON lines with a "text" each. The result loads with from_pretrained.

torchrun --nproc-per-node 2 examples/finetune.py MODEL DATA
"""

import json
import os
from argparse import ArgumentParser
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lasp

parser = ArgumentParser()
parser.add_argument("model")
parser.add_argument("data", type=Path)
parser.add_argument("--output", default="finetuned")
parser.add_argument("--tokens", type=int, default=32768, help="of a packed sequence, over all ranks")
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--lr", type=float, default=1e-5)
options = parser.parse_args()

group = lasp.SequenceGroup.from_mesh(lasp.init_mesh(sp=int(os.environ["WORLD_SIZE"])))
device = torch.device(group.mesh.device_type, torch.cuda.current_device() if torch.cuda.is_available() else None)
tokenizer = AutoTokenizer.from_pretrained(options.model)
# Weights and optimizer in float32, shared out over the ranks; what is computed is in bfloat16.
model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(device)
lasp.parallelize(model, group)
lasp.fuse_loss(model)  # no [tokens, vocabulary]
lasp.checkpoint_activations(model)
lasp.data_parallel(model, group, "fsdp2")
optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)

texts = [json.loads(line)["text"] for line in options.data.read_text(encoding="utf-8").splitlines() if line.strip()]
documents = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id][: options.tokens] for text in texts]
collate = lasp.ShardedCollator(group, lasp.PackingCollator(options.tokens))


def packed(documents: list[list[int]]) -> list[list[dict]]:
    """Documents one after the other, as many to a sequence as fit; in it, none sees another."""
    rows: list[list[dict]] = [[]]
    for ids in documents:
        if sum(len(other["input_ids"]) for other in rows[-1]) + len(ids) > options.tokens:
            rows.append([])
        rows[-1].append({"input_ids": ids})
    return rows


def loss_of(row: list[dict]) -> torch.Tensor:
    batch = {name: x.to(device) if torch.is_tensor(x) else x for name, x in collate(row).items()}
    with torch.autocast(device.type, torch.bfloat16):
        return model(**batch).loss


held_out, training = packed(documents[::10]), packed([ids for i, ids in enumerate(documents) if i % 10])
rng = torch.Generator().manual_seed(0)  # the same order on every rank
for epoch in range(options.epochs):
    model.train()
    for i in torch.randperm(len(training), generator=rng).tolist():
        loss_of(training[i]).backward()
        lasp.clip_grad_norm_(model, 1.0, group)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        loss = torch.stack([loss_of(row) for row in held_out]).mean().item()
    print(f"rank {group.rank}, epoch {epoch}: loss {loss:.4f} of what is held out", flush=True)
lasp.save_pretrained(model, options.output)
if group.rank == 0:
    tokenizer.save_pretrained(options.output)
lasp.shutdown()
