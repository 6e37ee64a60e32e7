"""Command lines: training, benchmarks, launchers."""
