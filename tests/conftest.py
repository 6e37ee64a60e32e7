"""Triton's kernels run in its interpreter, which is chosen when triton is imported."""

import os

os.environ["TRITON_INTERPRET"] = "1"
