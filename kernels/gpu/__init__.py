"""Linear recurrences by Triton's kernels: for GPUs."""
