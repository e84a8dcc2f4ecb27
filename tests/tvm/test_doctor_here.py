"""`tune doctor` on this very machine."""

from __future__ import annotations

import json

from conftest import RunTune


def test_this_machine_can_tune_on_its_cpu(run_tune: RunTune) -> None:
    done = run_tune("doctor", "--json")
    facts = json.loads(done.stdout)
    checks = {check["name"]: check for check in facts["checks"]}
    assert (done.returncode, facts["cpu_tuning"], done.stderr) == (0, True, "")
    assert checks["tvm starts"]["value"].startswith("version 0.27")
    assert checks["partition cores"]["status"] == "ok"
    for name in ("python", "cpu", "compiler", "apache-tvm-ffi", "device", "/dev/shm", "records"):
        assert checks[name]["status"] in ("ok", "warn")
    for backend in ("green", "mps", "mig", "full"):
        assert checks[f"partition {backend}"]["value"], "says why it is, or is not, there"


def test_what_is_missing_is_named_with_its_remedy_and_exit_code_3(run_tune: RunTune) -> None:
    done = run_tune("doctor", "--db", "cli.py/inside", env={"PATH": ""})
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    for name, remedy in (("compiler", "install gcc"), ("records", "--db")):
        row = next(i for i, line in enumerate(lines) if line.split()[:2] == ["FAIL", name])
        assert remedy in lines[row + 1]
    assert "tuning on the CPU is possible" not in done.stdout
