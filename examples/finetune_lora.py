"""Train LoRA adapters of a tiny Llama on this file, half of each sequence on each of two ranks.

torchrun --nproc-per-node 2 examples/finetune_lora.py
"""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import lasp

group = lasp.SequenceGroup.from_mesh(lasp.init_mesh(sp=2, device="cpu"))
torch.manual_seed(0)  # the same weights on both ranks; or AutoModelForCausalLM.from_pretrained
config = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
)  # fmt: skip
model = lasp.parallelize(LlamaForCausalLM(config), group)
adapters = LoraConfig(r=8, target_modules="all-linear", modules_to_save=["embed_tokens", "lm_head"])
model = get_peft_model(model, adapters)
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
