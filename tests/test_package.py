"""The package as a whole: what it imports, what it ships, who may talk to other ranks, and what its README says."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import lasp
import lasp.__main__ as entry
from lasp.launch import cli

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
    code = (
        "import sys, torch; before = {*sys.modules}; import lasp; print(*{*sys.modules} - before)\n"
        "import lasp.layers; print('transformers' in sys.modules)"
    )
    printed, layers = run(code, tmp_path).splitlines()
    assert layers == "False"
    modules = [name for name in printed.split() if name.partition(".")[0] != "lasp"]
    slow = {"transformers", "deepspeed", "mpi4py", "matplotlib", "jsonargparse", "tokenizers", "triton", "fla", "sympy"}
    assert not slow & {name.partition(".")[0] for name in modules}
    assert not [name for name in modules if name.startswith(("torch._dynamo", "torch._inductor"))]
    assert len(modules) < 150


@pytest.mark.parametrize(
    ("module", "argument", "code", "said"),
    [
        (
            "lasp",
            "no-such",
            2,
            "lasp: error: unknown command 'no-such'; choose from "
            "train, data, launch, runs, export, plot, linearize, verify, doctor, tune, plan, bench",
        ),
        ("lasp.launch.cli", "--version", 0, f"lasp {lasp.__version__}"),
    ],
)
def test_python_m_lasp_is_the_command(module: str, argument: str, code: int, said: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", module, argument]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == code
    assert (done.stderr if code else done.stdout).strip() == said


def test_the_version_is_said_where_one_asks(capsys: pytest.CaptureFixture[str]) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", lasp.__version__)
    assert entry.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"lasp {lasp.__version__}"


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


EXTRAS = ("numpy", "rich", "triton", "transformers", "tokenizers", "safetensors", "jsonargparse", "matplotlib")
BLOCKED = f"""
import sys
sys.modules.update(dict.fromkeys({EXTRAS}))
import torch, lasp
def call(function):
    x = torch.ones(1, 9, 2, 4, requires_grad=True)
    function(x).sum().backward()
    print(bool(x.grad.isfinite().all()))
"""
CALLS = [
    "lasp.linear_attention(x, x, x, torch.full((1, 9, 2), -0.1))",
    "lasp.delta_rule(x, x / 3, x, x[..., 0].sigmoid())",
    "lasp.softmax_attention(x, x, x, window=3)",
    "lasp.causal_conv1d(x.flatten(2), torch.ones(8, 3), group=lasp.SequenceGroup.from_mesh(lasp.init_mesh()))",
]


def test_the_core_needs_torch_alone(tmp_path: Path) -> None:
    code = "\n".join([BLOCKED, *(f"call(lambda x: {call})" for call in CALLS), "lasp.shutdown()"])
    assert run(code, tmp_path).splitlines() == ["True"] * len(CALLS)


@pytest.mark.parametrize("command", ["train", "verify", "bench"])
def test_a_command_without_its_extra_says_what_to_install(command: str, capsys, monkeypatch) -> None:
    needed, missing = cli.COMMANDS[command], cli.COMMANDS[command].packages[-1]
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == missing else True)
    assert cli.main([command, "demo"]) == 2
    expected = f'lasp: error: lasp {command} needs {missing}: pip install "lasp2[{needed.extra}]"\n'
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_the_extras_hold_what_the_commands_need(command: str) -> None:
    """`lasp2[extra]` in pyproject.toml, and what that takes from other extras of the package."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    needed = cli.COMMANDS[command]
    names = [re.match(r"[\w-]+", line)[0] for line in extras.get(needed.extra, [])]
    if "lasp2" in names:
        names += [re.match(r"[\w-]+", line)[0] for line in extras["train"] + extras["hf"]]
    assert {package.replace("_", "-") for package in needed.packages} <= set(names)


def test_one_version_in_all_places() -> None:
    assert f"\nversion: {lasp.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## {lasp.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("lost", [["kernels"], ["parallel", "launch"], ["kernels", "parallel", "launch"]])
def test_a_checkout_without_links_is_not_built(lost: list[str], tmp_path: Path) -> None:
    """As git leaves them where core.symlinks is false: files that hold the link's target."""
    shutil.copy(ROOT / "setup.py", tmp_path)
    (tmp_path / "README.md").touch()
    (tmp_path / "lasp").mkdir()
    for name in ("kernels", "parallel", "launch"):
        link = tmp_path / "lasp" / name
        link.write_text(f"../{name}") if name in lost else link.mkdir()
    done = subprocess.run([sys.executable, "setup.py", "--version"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(
        ", ".join(f"lasp/{name}" for name in ("kernels", "parallel", "launch") if name in lost)
    )
    assert "git clone -c core.symlinks=true" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_wheel_works_outside_the_checkout(tmp_path: Path) -> None:
    """Real files in the place of the links, the recipes, the type marker, what it is, and nothing of the tests."""
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
    (wheel,) = tmp_path.glob("lasp2-*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    packed = {str(file.relative_to(site / "lasp")) for file in (site / "lasp").rglob("*") if file.is_file()}
    assert {"py.typed", "kernels/segment.py", "parallel/scan.py", "launch/configs/demo.toml"} <= packed
    assert not any(re.match(r"(.*_)?tests?([_.]|$)", part) for name in packed for part in Path(name).parts)
    metadata = next(site.glob("*.dist-info/METADATA")).read_text(encoding="utf-8")
    assert metadata.startswith(f"Metadata-Version: 2.4\nName: lasp2\nVersion: {lasp.__version__}\n")
    for field in ("Author", "Keywords", "Classifier", "Project-URL", "License-Expression", "Requires-Python"):
        assert f"\n{field}: " in metadata
    assert not re.search(r"\]\((?!https?:)", metadata), "a link that leads nowhere on a page of its own"
    assert re.findall(r"Requires-Dist: ([^;\n]+)\n", metadata) == ["torch<2.14,>=2.11"]
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
    # A world of one rank among many processes can only be told from what their launcher left there.
    allowed = {"kernels/backend.py", "parallel/group.py"}
    assert {name for name in reads_environment if not name.startswith("launch/")} == allowed


def test_the_readme_example_runs(tmp_path: Path) -> None:
    """The first Python block of README.md, as it stands."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert example is not None
    (tmp_path / "example.py").write_text(example[1], encoding="utf-8")
    run_ranks = [sys.executable, "-m", "torch.distributed.run", "--local-addr=127.0.0.1", "--nproc-per-node=2"]
    done = subprocess.run([*run_ranks, "--standalone", "example.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    bytes_of_a_state = 4 * 32 * 32 * 4
    for rank in range(2):
        assert f"rank {rank}: True" in done.stdout
    assert done.stdout.count(f"op='all_gather', phase='forward', bytes={bytes_of_a_state}, steps=1") == 2


def test_the_architecture_names_every_file() -> None:
    """The file tree of docs/architecture.md has a line for each file of the four folders, but for families of foreign
    models: one file is all that a new one takes, and docs/models.md says what is in it."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = [f for f in sources() if f.name != "__init__.py" and f.parent.name != "families"]
    missing = [str(f.relative_to(ROOT)) for f in named if f.name not in text]
    assert not missing


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("failing", [(), ("PYTHON",), ("MPIRUN",), ("PYTHON", "MPIRUN")])
def test_both_halves_run_and_both_results_are_said(failing: tuple[str, ...], tmp_path: Path) -> None:
    """`make test`, with programs that only succeed or fail in the place of pytest and mpirun."""
    (tmp_path / ".test").touch()
    programs = [f"{name}={shutil.which('false' if name in failing else 'true')}" for name in ("PYTHON", "MPIRUN")]
    command = ["make", "test", f"VENV={tmp_path}", *programs]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (not failing)
    one, four = ("FAILED" if name in failing else "passed" for name in ("PYTHON", "MPIRUN"))
    assert f"tests of one process: {one}; of four ranks: {four}\n" in done.stdout
    assert done.stdout.count(" -m pytest tests") == 2, "both halves ran"
