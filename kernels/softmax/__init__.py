"""Softmax attention over one block of keys, and the merging of blocks."""
