"""Text that a trained model writes."""

from pathlib import Path

import torch

from lasp.models import LinearLlamaForCausalLM
from lasp.train.config import SampleConfig
from lasp.train.tokenizer import Tokenizer


@torch.no_grad()
def sample(checkpoint: Path, tokenizer: Tokenizer, config: SampleConfig, seed: int = 0) -> str:
    """Continue `config.prompt` with a model read from its checkpoint: the prompt and the text of new tokens.

    The model runs on one device, token by token. It is not allowed to end the document.
    """
    model = LinearLlamaForCausalLM.from_pretrained(checkpoint).eval()
    prompt = tokenizer.encode((config.prompt or "").encode()).tolist() or [tokenizer.vocab_size - 1]
    choice = {"do_sample": True, "temperature": config.temperature} if config.temperature else {"do_sample": False}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ids = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=config.tokens,
            suppress_tokens=[tokenizer.vocab_size - 1],
            eos_token_id=None,
            **choice,
        )
    return tokenizer.decode(ids[0].tolist())
