"""Text that a trained model writes."""

from pathlib import Path
from typing import Any

import torch

from lasp.linearize.convert import read
from lasp.train.config import SampleConfig
from lasp.train.data.tokenizer import Tokenizer


@torch.no_grad()
def sample(checkpoint: Path, tokenizer: Tokenizer, config: SampleConfig, seed: int = 0) -> str:
    """Continue `config.prompt` with a model read from its checkpoint: the prompt and the text of new tokens.

    The model runs on one device, token by token. It is not allowed to end the document.
    """
    model = _load(checkpoint).eval()
    prompt = tokenizer.encode((config.prompt or "").encode()).tolist() or [tokenizer.end]
    choice = {"do_sample": True, "temperature": config.temperature} if config.temperature else {"do_sample": False}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ids = model.generate(
            input_ids=torch.tensor([prompt]),
            max_new_tokens=config.tokens,
            suppress_tokens=[tokenizer.end],
            eos_token_id=None,
            **choice,
        )
    return tokenizer.decode(ids[0].tolist())


def _load(checkpoint: Path) -> Any:
    if (checkpoint / "adapter_config.json").exists():
        from peft import PeftConfig, PeftModel

        base = PeftConfig.from_pretrained(checkpoint).base_model_name_or_path
        return PeftModel.from_pretrained(read(str(base)), checkpoint)
    return read(checkpoint)
