"""Fine-tune a tiny hybrid of Mamba-2 and attention on this file, half of each sequence on each of two ranks.

torchrun --nproc-per-node 2 examples/finetune_mamba2.py
"""

from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import BambaConfig, BambaForCausalLM

import lasp

group = lasp.SequenceGroup.from_mesh(lasp.init_mesh(sp=2, device="cpu"))
torch.manual_seed(0)  # the same weights on both ranks; or AutoModelForCausalLM.from_pretrained
config = BambaConfig(
    vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, attn_layer_indices=[1, 3], mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8,
)  # fmt: skip
model = lasp.parallelize(BambaForCausalLM(config), group)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

ids = torch.tensor(list(Path(__file__).read_bytes() * 2))[:1536].view(12, 128)
samples = [{"input_ids": text, "labels": text} for text in ids]
rng = torch.Generator().manual_seed(0)  # the same samples, too
loader = DataLoader(samples, batch_size=4, shuffle=True, generator=rng, collate_fn=lasp.ShardedCollator(group))
for epoch in range(5):
    for batch in loader:
        loss = model(**batch).loss
        loss.backward()
        lasp.sync_gradients(model, group)
        lasp.clip_grad_norm_(model, 1.0, group)
        optimizer.step()
        optimizer.zero_grad()
    print(f"rank {group.rank}, epoch {epoch}: loss {loss.item():.4f}")
lasp.shutdown()
