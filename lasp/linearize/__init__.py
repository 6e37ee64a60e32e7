"""Softmax models turned into linear ones: Liger (arXiv:2503.01496) and LoLCATs (arXiv:2410.10254)."""
