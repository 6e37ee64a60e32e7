"""Fine-tune a tiny Qwen3.5-style hybrid with the Trainer of transformers, half of each sequence on each of two ranks.

torchrun --nproc-per-node 2 examples/finetune_trainer.py
"""

from pathlib import Path

import torch
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig, TrainingArguments

import lasp

group = lasp.SequenceGroup.from_mesh(lasp.init_mesh(sp=2, device="cpu"))
torch.manual_seed(0)  # the same weights on both ranks; or AutoModelForCausalLM.from_pretrained
config = Qwen3_5TextConfig(
    vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, layer_types=["linear_attention"] * 3 + ["full_attention"],
    linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1],
                     "partial_rotary_factor": 0.25},
)  # fmt: skip
model = lasp.parallelize(Qwen3_5ForCausalLM(config), group)

ids = torch.tensor(list(Path(__file__).read_bytes() * 2))[:1536].view(12, 128)
samples = [{"input_ids": text, "labels": text} for text in ids]
options = TrainingArguments(
    "runs/trainer", num_train_epochs=5, per_device_train_batch_size=2, gradient_accumulation_steps=2,
    learning_rate=1e-2, lr_scheduler_type="constant", eval_strategy="epoch", save_strategy="no",
    report_to="none", use_cpu=True,
)  # fmt: skip
trainer = lasp.ShardedTrainer(model, options, train_dataset=samples, eval_dataset=samples[:3], group=group)
trainer.train()
for epoch, log in enumerate(log for log in trainer.state.log_history if "eval_loss" in log):
    print(f"rank {group.rank}, epoch {epoch}: loss {log['eval_loss']:.4f}")
lasp.shutdown()
