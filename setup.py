"""Packaging of lasp: four top-level folders, one import name (see docs/architecture.md, "The ladder")."""

from pathlib import Path

from setuptools import find_packages, setup

TRAIN = ["transformers>=5.20", "safetensors", "tokenizers", "jsonargparse", "toml", "matplotlib"]
HF = ["transformers>=5.20", "accelerate"]
DEEPSPEED = ["deepspeed"]
BENCH = [*HF, "ring-attention-pytorch"]
TEST = [
    "peft",
    "pytest",
    "pytest-timeout",
    "pytest-mpi",
    "mpi4py",
    "openmpi; sys_platform == 'linux'",
    "setuptools>=77",
]
DEV = ["ruff", "mypy", "import-linter"]

setup(
    name="lasp",
    version="0.1.0",
    description="Sequence-parallel training of linear-attention, state-space, softmax and hybrid models",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["lasp", "lasp.*"]),
    package_data={"lasp": ["py.typed"], "lasp.launch": ["configs/*.toml"]},
    install_requires=["torch>=2.11", "triton>=3.6; sys_platform == 'linux'", "numpy", "rich"],
    extras_require={
        "train": TRAIN,
        "hf": HF,
        "deepspeed": DEEPSPEED,
        "bench": BENCH,
        "test": TRAIN + TEST,
        "dev": DEV,
    },
    entry_points={"console_scripts": ["lasp = lasp.launch.cli:main"]},
)
