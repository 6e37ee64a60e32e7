"""lasp: train linear-attention, state-space, softmax and hybrid models with the sequence cut over ranks."""
