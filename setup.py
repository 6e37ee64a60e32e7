"""What pyproject.toml cannot say: that links in lasp/ must be links, and how the README reads elsewhere."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
LINKS = ("kernels", "parallel", "launch")


def readme() -> str:
    """README.md, its links to files of this folder turned into their names: elsewhere they would lead nowhere."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.sub(r"\[([^]]+)\]\((?!https?:)([^)]+)\)", lambda m: m[1] if m[1] == m[2] else f"{m[1]} (`{m[2]}`)", text)


if missing := [f"lasp/{name}" for name in LINKS if not (ROOT / "lasp" / name).is_dir()]:
    raise SystemExit(
        f"{', '.join(missing)}: no link to the folder of that name, so this checkout lacks most of the package. "
        "Clone with `git clone -c core.symlinks=true` (on Windows in developer mode)"
    )
setup(long_description=readme(), long_description_content_type="text/markdown")
