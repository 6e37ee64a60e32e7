"""The package as a whole: what it imports, what it ships, who may talk to other ranks, and what its README says."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import lasp

ROOT = Path(__file__).parents[1]
FOLDERS = ("kernels", "parallel", "lasp", "launch")


def run(code: str, cwd: Path, path: Path | None = None) -> str:
    """What a fresh interpreter prints; `path` stands first where it looks for packages."""
    environment = {**os.environ, "PYTHONPATH": str(path or ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def sources() -> list[Path]:
    """Every Python file of the package, once: the links in lasp/ lead to files listed already."""
    files = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")]
    return sorted({file.resolve() for file in files})


def test_import_is_quick_and_takes_no_extras(tmp_path: Path) -> None:
    """Of what torch has not imported already: no extras, not torch's compiler (seconds), and little besides."""
    code = "import sys, torch; before = {*sys.modules}; import lasp; print(*{*sys.modules} - before)"
    modules = [name for name in run(code, tmp_path).split() if name.partition(".")[0] != "lasp"]
    slow = {"transformers", "deepspeed", "mpi4py", "matplotlib", "jsonargparse", "tokenizers", "triton", "fla", "sympy"}
    assert not slow & {name.partition(".")[0] for name in modules}
    assert not [name for name in modules if name.startswith(("torch._dynamo", "torch._inductor"))]
    assert len(modules) < 150


@pytest.mark.parametrize(
    "command", [["-m", "lasp"], ["-m", "lasp.launch.cli"], ["-c", "import lasp.__main__ as m; m.main(['--version'])"]]
)
def test_the_version_is_said_where_one_asks(command: list[str], tmp_path: Path) -> None:
    version = run("import lasp; print(lasp.__version__)", tmp_path)
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    arguments = [] if "-c" in command else ["--version"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command, *arguments], cwd=tmp_path, env=environment, capture_output=True)
    assert done.stdout.decode().strip() == f"lasp {version}"


def test_python_m_lasp_is_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lasp", "no-such"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.returncode == 2
    assert b"unknown command 'no-such'" in done.stderr


def test_lazy_names_are_public(tmp_path: Path) -> None:
    """They are found by `from`, `dir` and attribute, and import transformers only then."""
    pytest.importorskip("transformers")
    code = (
        "import sys, lasp; assert 'transformers' not in sys.modules and 'ShardedTrainer' in dir(lasp)\n"
        "from lasp import ShardedTrainer\nimport lasp.train.sharded_trainer as m\n"
        "assert ShardedTrainer is lasp.ShardedTrainer is m.ShardedTrainer; print('transformers' in sys.modules)"
    )
    assert run(code, tmp_path) == "True"
    with pytest.raises(AttributeError, match="'lasp' has no attribute 'SharededTrainer'"):
        lasp.SharededTrainer  # noqa: B018


def test_a_lazy_name_without_its_extra_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys, lasp; sys.modules['transformers'] = None\n"
        "try: lasp.ShardedTrainer\nexcept ImportError as error: print(error)"
    )
    assert run(code, tmp_path) == 'lasp.ShardedTrainer needs transformers: pip install "lasp2[hf]"'


def test_the_wheel_works_outside_the_checkout(tmp_path: Path) -> None:
    """Real files in the place of the links, the recipes, the type marker, and nothing of the tests."""
    copy = tmp_path / "source"
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if names.returncode:
        pytest.skip("not a git checkout")
    for name in names.stdout.splitlines():
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            target.symlink_to(os.readlink(ROOT / name))
        elif (ROOT / name).exists():
            target.write_bytes((ROOT / name).read_bytes())
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        ".",
    ]
    subprocess.run(build, cwd=copy, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("lasp-*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    packed = {str(file.relative_to(site / "lasp")) for file in (site / "lasp").rglob("*") if file.is_file()}
    assert {"py.typed", "kernels/segment.py", "parallel/scan.py", "launch/configs/demo.toml"} <= packed
    assert not any("test" in name for name in packed)
    code = "import lasp, lasp.kernels.segment, lasp.launch.cli; print(lasp.__file__, lasp.kernels.segment.__file__)"
    for file in run(code, tmp_path, site).split():
        assert file.startswith(str(site))


def test_only_collectives_and_groups_talk_to_torch_distributed() -> None:
    """Data moves in parallel/collectives.py alone; parallel/group.py makes and leaves groups."""
    moves = re.compile(
        r"\bdist(?:ributed)?\.(all_|broadcast|send|recv|isend|irecv|reduce|gather|scatter|barrier|batch_)"
    )
    allowed = {"collectives.py"}
    found = {file.name for file in sources() if moves.search(file.read_text(encoding="utf-8"))}
    assert found <= allowed


def test_no_globals_no_bare_except_no_environment() -> None:
    reads_environment = set()
    for file in sources():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            assert not isinstance(node, ast.Global), f"global in {file}"
            assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"bare except in {file}"
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
                reads_environment.add(str(file.relative_to(ROOT)))
    assert {name for name in reads_environment if not name.startswith("launch/")} == {"kernels/backend.py"}


def test_the_readme_example_runs(tmp_path: Path) -> None:
    """The first Python block of README.md, as it stands."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert example is not None
    (tmp_path / "example.py").write_text(example[1], encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "example.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    bytes_of_a_state = 4 * 32 * 32 * 4
    for rank in range(2):
        assert f"rank {rank}: True" in done.stdout
    assert done.stdout.count(f"op='all_gather', phase='forward', bytes={bytes_of_a_state}, steps=1") == 2


def test_the_readme_names_every_file() -> None:
    """The file tree of the README has a line for each file of the four folders."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [str(f.relative_to(ROOT)) for f in sources() if f.name != "__init__.py" and f.name not in text]
    assert not missing
