"""The documentation says what there is: flags, commands, links, and code that at least compiles."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import click
import pytest
from conftest import ROOT

import gpu_aware_tune
from gpu_aware_tune.cli.main import COMMANDS
from gpu_aware_tune.cli.tune import tune

README = (ROOT / "README.md").read_text()
CLI = (ROOT / "docs" / "cli.md").read_text()
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "examples" / "README.md",
    ROOT / "tuning_logs" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def test_every_flag_is_in_the_table_and_the_table_has_no_other() -> None:
    rows = re.findall(r"^\| (`-.*?) \|", CLI, re.MULTILINE)
    told = set(re.findall(r"--?[a-z][a-z-]*", " ".join(rows)))
    flags: set[str] = set()
    for item in tune.params:
        if isinstance(item, click.Option):
            assert told & {*item.opts, *item.secondary_opts}, f"{item.opts} is not in docs/cli.md"
            flags |= {*item.opts, *item.secondary_opts}
    assert told <= flags


def test_every_command_is_shown() -> None:
    for command in set(COMMANDS) - {"tune"}:
        assert f"tune {command}" in README
        assert f"tune {command}" in CLI


def test_the_readme_is_short_and_shows_the_state_of_validation_first() -> None:
    assert len(README.split()) <= 1000
    assert "no figure is from a GPU yet" in " ".join(README.split()[:150])


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_python_blocks_compile_and_import_public_names(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "gpu_aware_tune":
                assert {alias.name for alias in node.names} <= set(gpu_aware_tune.__all__)


def test_there_are_python_blocks() -> None:
    counts = {page_id(page): page.read_text().count("```python") for page in PAGES}
    assert counts["README.md"] >= 1
    assert counts["docs/python.md"] >= 3
    assert counts["docs/library.md"] >= 2


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", prose):
        assert target.startswith("https://") or (page.parent / target).is_file(), target


def test_the_picture_is_in_the_readme() -> None:
    assert "](docs/flow.svg)" in README


def test_every_example_is_listed() -> None:
    listed = (ROOT / "examples" / "README.md").read_text()
    for script in (ROOT / "examples").glob("*.py"):
        assert f"`{script.name}`" in listed


def test_every_benchmark_with_results_is_on_its_page() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    for results in (ROOT / "benchmarks" / "results").glob("*.json"):
        if not results.name.startswith("gpu-"):
            assert f"`{results.name}`" in page
