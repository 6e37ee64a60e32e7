"""Linear recurrences chunk by chunk in plain PyTorch: for any device and float dtype, and tuned for CPUs."""
