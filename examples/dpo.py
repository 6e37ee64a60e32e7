"""Preference training (DPO, arXiv:2305.18290) of a tiny hybrid: half of each sequence on each of two ranks, no logits.

torchrun --nproc-per-node 2 examples/dpo.py
"""

import copy
import os

import torch
from torch.nn.functional import logsigmoid
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

import lasp

# All ranks share each sequence; one alone has the same curve.
group = lasp.SequenceGroup.from_mesh(lasp.init_mesh(sp=int(os.environ["WORLD_SIZE"]), device="cpu"))
torch.manual_seed(0)  # the same weights everywhere; or AutoModelForCausalLM.from_pretrained
config = Qwen3_5TextConfig(
    vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, layer_types=["linear_attention"] * 3 + ["full_attention"],
    linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1],
                     "partial_rotary_factor": 0.25},
)  # fmt: skip
model = lasp.fuse_loss(lasp.parallelize(Qwen3_5ForCausalLM(config), group))
reference = copy.deepcopy(model).eval()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

# The first half of a sequence asks; the answer to prefer goes on, the other one is noise. [pairs, 64]
asked = torch.arange(32).repeat(4, 1) + torch.arange(0, 128, 32).unsqueeze(1)
chosen, rejected = torch.cat([asked, asked + 32], 1), torch.cat([asked, torch.randint(256, (4, 32))], 1)
ids = torch.cat([chosen, rejected])
labels = ids.clone()
labels[:, :32] = -100


def log_probs(policy: torch.nn.Module) -> torch.Tensor:
    """Of the chosen and the rejected answers, [2, pairs]."""
    batch = lasp.shard_batch({"input_ids": ids, "labels": labels}, group)
    targets, _ = batch.pop("shift_labels"), batch.pop("labels")
    tokens = lasp.token_log_probs(policy(**batch).logits, None, targets, cut=batch["cut"])
    return lasp.unshard(tokens, cut=batch["cut"]).sum(1).view(2, -1)  # on every rank those of whole sequences


with torch.no_grad():
    before = log_probs(reference)
for epoch in range(10):
    margins = log_probs(model) - before
    loss = -logsigmoid(0.1 * (margins[0] - margins[1])).mean()
    (loss / group.size).backward()  # every rank has this loss; what is summed over them is one
    lasp.sync_gradients(model, group)
    optimizer.step()
    optimizer.zero_grad()
    print(f"rank {group.rank}, epoch {epoch}: loss {loss.item():.4f}")
lasp.shutdown()
