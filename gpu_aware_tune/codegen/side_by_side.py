"""A model's kernels compiled in several processes at once, for one library.

TVM compiles all kernels of a model one after the other, in one module of LLVM's: of DenseNet-121's 135
kernels that is the better part of a minute. Here the module is lowered first, and then forked processes
compile a part of its kernels each; the linker puts the parts together.
"""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import tvm
from tvm import relax
from tvm.relax import vm_build

from gpu_aware_tune.codegen.build_options import build_options
from gpu_aware_tune.codegen.compile import lowering
from gpu_aware_tune.errors import TuneError, one_line

_FEW = 4  # kernels for which a process of their own does not pay


def build_side_by_side(
    module: tvm.IRModule, target: tvm.target.Target, folder: Path, jobs: int
) -> tuple[relax.VMExecutable, list[Path]]:
    """Build a module as `compile.build` does, its kernels in several processes.

    Args:
        module: what `compile.prepare` gave.
        target: a CPU.
        folder: for the objects.
        jobs: how many processes there may be, this one among them.

    Returns:
        The executable, and the objects of the kernels that it has to be linked with.

    Raises:
        TuneError: a kernel did not compile.
    """
    with build_options(module, target, checks=True):
        return _build(module, target, folder, jobs)


def _build(
    module: tvm.IRModule, target: tvm.target.Target, folder: Path, jobs: int
) -> tuple[relax.VMExecutable, list[Path]]:
    with target:
        lowered = lowering(target)(module)
    attributes = dict(lowered.attrs or {})
    builder = relax.ExecBuilder()
    rest = vm_build._vmcodegen(builder, lowered, "bytecode")
    kernels = [
        (variable, function)
        for variable, function in rest.functions.items()
        if isinstance(function, tvm.tirx.PrimFunc)
    ]
    jobs = max(1, min(jobs, len(kernels) // _FEW))
    # One kernel stays with the executable, which finds the others where it finds that one.
    first, others = (kernels[:1], kernels[1:]) if jobs > 1 else (kernels, [])
    parts = [
        (tvm.IRModule(dict(others[number::jobs])), target, folder / f"part-{number}.o")
        for number in range(jobs if others else 0)
    ]
    with _Processes() as processes:
        for part in parts[1:]:
            processes.start(*part)
        for part in parts[:1]:
            _compile(*part)
        executable = vm_build._vmlink(
            builder=builder,
            target=target,
            tir_mod=tvm.IRModule(dict(first), attrs=rest.attrs) if first else None,
            ext_libs=list(attributes.get("external_mods", [])),
            params=dict(attributes.get("const_name_to_constant", {})),
        )
        processes.wait()
    return executable, [path for _, _, path in parts]


def _compile(kernels: tvm.IRModule, target: tvm.target.Target, path: Path) -> None:
    tvm.tirx.build(kernels, target=target).write_to_file(str(path), "o")


class _Processes:
    """Forked processes that compile; those that still run at the end are killed."""

    def __init__(self) -> None:
        self._running: dict[int, Path] = {}

    def __enter__(self) -> _Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self._running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def start(self, module: tvm.IRModule, target: tvm.target.Target, path: Path) -> None:
        """Compile kernels to an object file."""
        pid = os.fork()
        if pid:
            self._running[pid] = path
            return
        status = 1
        try:
            _compile(module, target, path)
            status = 0
        except BaseException as error:
            path.with_suffix(".error").write_text(f"{type(error).__name__}: {one_line(error)}")
        finally:
            os._exit(status)

    def wait(self) -> None:
        """Wait for all of them; raises TuneError where one failed."""
        while self._running:
            pid, status = os.waitpid(next(iter(self._running)), 0)
            path = self._running.pop(pid)
            if status:
                told = path.with_suffix(".error")
                code = os.waitstatus_to_exitcode(status)
                how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
                raise TuneError(
                    f"kernels did not compile: {told.read_text() if told.exists() else how}"
                )
