"""Linear-Llama3, a Hugging Face model whose token mixers are sequence-parallel."""
