"""The README says what there is: flags, exit codes, commands, and code that at least compiles."""

from __future__ import annotations

import ast
import re

import click
from conftest import ROOT

import gpu_aware_tune
from gpu_aware_tune.cli.main import COMMANDS
from gpu_aware_tune.cli.tune import tune

README = (ROOT / "README.md").read_text()


def test_every_flag_is_in_the_table_and_the_table_has_no_other() -> None:
    rows = re.findall(r"^\| (`-.*?) \|", README, re.MULTILINE)
    told = set(re.findall(r"--?[a-z][a-z-]*", " ".join(rows)))
    flags: set[str] = set()
    for item in tune.params:
        if isinstance(item, click.Option):
            assert told & {*item.opts, *item.secondary_opts}, f"{item.opts} is not in the README"
            flags |= {*item.opts, *item.secondary_opts}
    assert told <= flags


def test_every_command_is_shown() -> None:
    for command in set(COMMANDS) - {"tune"}:
        assert f"tune {command}" in README


def test_python_blocks_compile_and_import_public_names() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "gpu_aware_tune":
                assert {alias.name for alias in node.names} <= set(gpu_aware_tune.__all__)


def test_links_lead_somewhere() -> None:
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)#]+)\)", prose)
    assert "docs/flow.svg" in targets
    for target in targets:
        assert target.startswith("https://") or (ROOT / target).is_file(), target
