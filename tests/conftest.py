"""Triton's kernels run in its interpreter, which is chosen when triton is imported."""

import gc
import os

os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_finish() -> None:
    """Take what the imports have made out of Python's garbage collection: it would look through it over and over."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Give it back: Triton's bindings look at the end of the process whether all of theirs was collected."""
    gc.unfreeze()
