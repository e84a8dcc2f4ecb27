"""The layout's rules: stages import only earlier stages, and some imports have one home."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent.parent / "gpu_aware_tune"

# The order in which data passes. A module may import from its own folder and from those above it.
ORDER = [
    "errors",
    "input_shapes",
    "settings",
    "events",
    "partition",
    "workers",
    "kernels",
    "onnx_prepare",
    "model",
    "records",
    "measure",
    "codegen",
    "search",
    "cluster",
    "library",
    "finalize",
    "profiling",
    "planning",
    "serving",
    "run",
    "tuning",
    "display",
    "report",
    "cli",
    "__main__",
]
LEVEL = {name: level for level, name in enumerate(ORDER)}

# Which modules (by the start of their path) may import what.
HOMES = {
    "sqlite3": ("records/",),
    "ray": ("cluster/", "serving/ray_app"),
    "pynvml": ("partition/",),
    "cuda": ("partition/",),
    "cuda.bindings.nvrtc": ("codegen/cuda_toolchain",),
    "matplotlib": ("report/",),
    "scipy": ("planning/bounds",),
    "aiohttp": ("serving/http_",),
    "grpc": ("serving/grpc_server",),
    "google": ("serving/grpc_messages", "onnx_prepare/"),
}

FILES = sorted(PACKAGE.rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Gives every (line, dotted name) that a module imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def within(name: str, package: str) -> bool:
    return f"{name}.".startswith(f"{package}.")


def layer_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def faults(file: Path, source: str) -> list[str]:
    """What is wrong with the imports of one module."""
    own = layer_of(file)
    relative = file.relative_to(PACKAGE).as_posix()
    found = []
    for line, name in imported(ast.parse(source)):
        first, _, rest = name.partition(".")
        homes = next(
            (HOMES[home] for home in sorted(HOMES, reverse=True) if within(name, home)), None
        )
        if homes is not None and not relative.startswith(homes):
            found.append(f"{relative}:{line}: {name} belongs in {' or '.join(homes)}")
        if first == "gpu_aware_tune" and rest:
            other = rest.partition(".")[0]
            if other not in LEVEL and other != "__version__":
                found.append(f"{relative}:{line}: {other} has no place in ORDER")
            elif LEVEL.get(other, -1) > LEVEL.get(own, -1):
                found.append(f"{relative}:{line}: {own} must not import {other}, a later stage")
    return found


def test_every_module_has_its_place() -> None:
    layers = {layer_of(file) for file in FILES} - {"__init__", "__main__"}
    assert layers <= set(LEVEL), f"not in ORDER: {sorted(layers - set(LEVEL))}"


def test_the_layout_page_names_every_module() -> None:
    page = (PACKAGE.parent / "docs" / "layout.md").read_text()
    layers = {layer_of(file) for file in FILES} - {"__init__"}
    named = {name for name in layers if f"`{name}.py`" in page or f"`{name}/`" in page}
    assert layers == named


def test_the_layout_page_is_in_the_order_of_imports() -> None:
    page = (PACKAGE.parent / "docs" / "layout.md").read_text()
    named = dict.fromkeys(re.findall(r"^\| `(\w+)(?:\.py|/)`", page, re.MULTILINE))
    levels = [LEVEL[name] for name in named if name in LEVEL]
    assert levels == sorted(levels)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_imports_go_one_way(file: Path) -> None:
    if file.parent == PACKAGE and file.name == "__init__.py":
        return  # names the public things of all stages; loads them lazily, see below
    assert faults(file, file.read_text()) == []


@pytest.mark.parametrize(
    ("file", "source", "fault"),
    [
        ("model/importer.py", "from gpu_aware_tune.tuning import tune", "a later stage"),
        ("model/tasks.py", "def f():\n    import gpu_aware_tune.library", "a later stage"),
        ("partition/cores.py", "from gpu_aware_tune import measure", "a later stage"),
        ("model/tasks.py", "import sqlite3", "belongs in"),
        ("cli/doctor.py", "from cuda.bindings import driver", "belongs in"),
        ("tuning.py", "import ray.util", "belongs in"),
        ("codegen/cuda_toolchain.py", "from cuda.bindings import driver", "belongs in"),
        ("codegen/build_pool.py", "from cuda.bindings import nvrtc", "belongs in"),
        ("records/rows.py", "from sqlite3 import connect as c, Row", None),
        ("codegen/cuda_toolchain.py", "from cuda.bindings import nvrtc", None),
        ("codegen/build_pool.py", "import cudart, tests.cuda", None),
        ("tuning.py", "import gpu_aware_tune.util", "no place"),
    ],
)
def test_the_rules_notice(file: str, source: str, fault: str | None) -> None:
    found = faults(PACKAGE / file, source)
    assert found == [] if fault is None else any(fault in text for text in found)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_modules_stay_small(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 400


@pytest.mark.parametrize(
    "statement",
    [
        "import gpu_aware_tune",
        "import gpu_aware_tune; gpu_aware_tune.Settings; gpu_aware_tune.UserError",
        "import gpu_aware_tune.cli.main, gpu_aware_tune.cli.tune, gpu_aware_tune.display.progress",
        "import gpu_aware_tune.cli.run, gpu_aware_tune.cli.records, gpu_aware_tune.cli.doctor",
        "import gpu_aware_tune.cli.profile, gpu_aware_tune.profiling.profiles, gpu_aware_tune.profiling.knee",
        "from gpu_aware_tune.library import Manifest, RunFacts, read_manifest",
        "import gpu_aware_tune.cli.plan, gpu_aware_tune.planning.fleet, gpu_aware_tune.report.plan_page",
        "import gpu_aware_tune.serving.server, gpu_aware_tune.serving.v2_json",
        "import gpu_aware_tune.cli.report, gpu_aware_tune.cli.watch, gpu_aware_tune.report.page",
    ],
)
def test_cheap_imports_load_no_heavy_package(statement: str) -> None:
    program = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "gpu_aware_tune" in loaded
    assert not loaded & {"tvm", "tvm_ffi", "ray", "onnx", "onnxruntime", "xgboost", "matplotlib"}
    assert not loaded & {"aiohttp", "grpc", "google"}
