"""The architecture as a test: which layer may import which, what is public, what no file may contain."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import trilemma

ROOT = Path(trilemma.__file__).parent
FAMILIES = ("classical", "energy", "autoregressive", "autoencoder", "flow", "adversarial", "diffusion")
LAYERS = [("core",), ("data",), ("nets",), FAMILIES, ("engine",), ("metrics",), ("check", "comparison"), ("cli",)]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

EXCEPTIONS = {
    # `GenerativeModel.fit` is a convenience that hands the model to the engine, inside the method.
    ("core/model.py", "engine"),
    # A continuous flow and flow matching are one thing: velocity, path, solver and likelihood are diffusion's.
    ("flow/continuous.py", "diffusion"),
}


def imports(path: Path) -> Iterator[str]:
    """Every module of Trilemma that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            if node.module == "trilemma":
                yield from (f"trilemma.{alias.name}" for alias in node.names)
            yield node.module


def test_imports_point_downwards() -> None:
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        relative = path.relative_to(ROOT).as_posix()
        layer = relative.split("/")[0].removesuffix(".py")
        if layer in ("__init__", "__main__"):
            continue
        assert layer in LEVEL, f"{relative} is in no layer"
        for name in imports(path):
            parts = name.split(".")
            if parts[0] != "trilemma" or len(parts) < 2 or parts[1] == layer or (relative, parts[1]) in EXCEPTIONS:
                continue
            if LEVEL[parts[1]] >= LEVEL[layer]:
                wrong.append(f"{relative} imports {name}")
    assert not wrong, wrong


def test_public_names() -> None:
    assert sorted(trilemma.__all__) == [
        "Batch", "CapabilityError", "Codec", "DataSpec", "Dataset", "GenerativeModel", "ModelConfig", "Noise",
        "Objective", "OptimizerConfig", "Report", "Run", "Score", "Step", "TrilemmaError", "UsageError",
        "check_model", "compare", "create", "load", "load_data", "register", "resume",
    ]  # fmt: skip
    for name in trilemma.__all__:
        assert getattr(trilemma, name).__name__ == name
    with pytest.raises(AttributeError):
        _ = trilemma.no_such_name


def test_importing_and_help_do_not_import_torch() -> None:
    for code in (
        "import trilemma",
        "import sys; sys.argv = ['trilemma', '--help']; from trilemma.cli import run; run(['--help'])",
        "from trilemma.cli import run; run(['compare', '--help'])",
    ):
        done = subprocess.run(
            [sys.executable, "-c", f"{code}; import sys; sys.exit('torch' in sys.modules)"],
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, code


FORBIDDEN = ("pickle", "torch.load", "eval(", "exec(", "nan_to_num", "yaml.load(", "allow_pickle=True")
ALLOWED = {
    # Only refuses it.
    ("data/arrays.py", "pickle"),
}


def code_of(path: Path) -> str:
    """The source without comments and docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body[0] = ast.Pass()
    return ast.unparse(tree).replace(".eval()", "").replace("allow_pickle=False", "")


def test_nothing_loaded_runs_code() -> None:
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        relative = path.relative_to(ROOT).as_posix()
        code = code_of(path)
        found += [f"{relative}: {word}" for word in FORBIDDEN if word in code and (relative, word) not in ALLOWED]
    assert not found, found
