"""A loaded library and its process: forks, the end of the interpreter, closing, many callers."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import tvm
from tiny_library import write_library

from gpu_aware_tune.errors import UserError
from gpu_aware_tune.library import Library, load, loaded
from gpu_aware_tune.library.manifest import read_manifest, write_manifest
from gpu_aware_tune.model.importer import random_inputs

CYCLES = int(os.environ.get("LIBRARY_CYCLES", "100"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_library(tmp_path_factory.mktemp("process"))[1]


def os_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def in_fork(function: Callable[[], str], limit_s: float = 30) -> tuple[int, str]:
    """The exit code of a forked child and what the function gave there; -SIGALRM if it hung."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.setitimer(signal.ITIMER_REAL, limit_s)
        code = 1
        try:
            os.write(writing, function().encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text


# -- forks -----------------------------------------------------------------------------------------


def test_a_forked_child_is_told_to_load_its_own(folder: Path) -> None:
    library = load(folder)
    inputs = random_inputs(library.inputs, 0)
    wanted = library(inputs)["scores"]

    def use_the_parents() -> str:
        told = []
        for call in (
            lambda: library(inputs),
            library.use,
            lambda: library.use(1),
            library.preload,
            lambda: library.benchmark(repeat=1),
        ):
            with pytest.raises(UserError) as caught:
                call()
            told.append(str(caught.value))
        library.close()  # nothing that hangs
        (text,) = set(told)
        return text

    code, text = in_fork(use_the_parents)
    assert code == 0
    assert f"was loaded in process {os.getpid()}" in text
    assert text.endswith("load it in the child")

    def load_in_the_child() -> str:
        with load(folder) as own:
            return str(np.array_equal(own(inputs)["scores"], wanted))

    assert in_fork(load_in_the_child) == (0, "True")
    np.testing.assert_array_equal(library(inputs)["scores"], wanted)
    library.close()


def test_a_child_that_is_forked_during_calls_ends(folder: Path) -> None:
    """The locks are copied as they are: here often held by a thread that the child does not have."""
    with load(folder) as library:
        inputs = random_inputs(library.inputs, 0)
        done = threading.Event()

        def call() -> None:
            while not done.is_set():
                library(inputs)
                library.use(1)

        def close() -> str:
            library.close()
            return "closed"

        callers = [threading.Thread(target=call) for _ in range(3)]
        for caller in callers:
            caller.start()
        try:
            for _ in range(20):
                assert in_fork(close, 10) == (0, "closed")
        finally:
            done.set()
            for caller in callers:
                caller.join()


# -- the end of the interpreter --------------------------------------------------------------------

ENDING = """
    import sys, threading, time
    from gpu_aware_tune.library import load
    from gpu_aware_tune.model.importer import random_inputs
    library = load(sys.argv[1], preload=True)
    inputs = random_inputs(library.inputs, 0)
    library(inputs)
    def call():
        while True:
            library(inputs) if sys.argv[2] == "call" else library.benchmark(seconds=1e6)
    for _ in range(3):
        threading.Thread(target=call, daemon=True).start()
    time.sleep(0.2)
"""


@pytest.mark.parametrize("kind", ["call", "benchmark"])
def test_the_interpreter_may_end_during_a_call(folder: Path, kind: str) -> None:
    program = textwrap.dedent(ENDING)
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", program, str(folder), kind],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")


# -- closing ---------------------------------------------------------------------------------------


CYCLING = """
    import json, os, sys, time
    from pathlib import Path
    from gpu_aware_tune.library import load
    from gpu_aware_tune.model.importer import random_inputs

    def threads():
        return set(os.listdir("/proc/self/task"))

    def resident_mb():
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    def ended(earlier):  # beside other work a core may be far away, so there is time
        end = time.monotonic() + 10
        while threads() - earlier and time.monotonic() < end:
            time.sleep(0.001)
        return not threads() - earlier

    def cycle():
        with load(sys.argv[1], units=2) as library:
            library(inputs)

    with load(sys.argv[1], units=2) as library:
        inputs = random_inputs(library.inputs, 0)
        library.preload()
    for _ in range(20):
        cycle()
    time.sleep(0.2)
    earlier, before_mb = threads(), resident_mb()
    descriptors = len(os.listdir("/proc/self/fd"))
    begun_s, left = time.process_time(), 0
    for _ in range(int(sys.argv[2])):
        cycle()
        left += not ended(earlier)
    spent_s = time.process_time() - begun_s
    more_mb = resident_mb() - before_mb
    descriptors = len(os.listdir("/proc/self/fd")) - descriptors
    time.sleep(0.2)
    idle_s = time.process_time()
    time.sleep(0.5)
    idle_s = time.process_time() - idle_s
    print(json.dumps([left, descriptors, more_mb, spent_s, idle_s]))
"""


def test_nothing_is_left_of_closed_libraries(folder: Path) -> None:
    """In a process of its own: the threads of others come and go in this one."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CYCLING), str(folder), str(CYCLES)],
        capture_output=True,
        text=True,
        timeout=60 + CYCLES,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    threads, descriptors, more_mb, spent_s, idle_s = json.loads(done.stdout)
    assert (threads, descriptors) == (0, 0)
    assert more_mb < 2 + 0.01 * CYCLES
    assert spent_s / CYCLES < 0.15
    assert idle_s < 0.1


def test_the_code_of_a_closed_library_is_unloaded(folder: Path, tmp_path: Path) -> None:
    """TVM's `load_module` keeps each until the process ends, however often one is loaded."""

    def is_mapped() -> bool:
        gc.collect()
        return f"{own}/lib-" in Path("/proc/self/maps").read_text()

    own = shutil.copytree(folder, tmp_path / "own.tuned")
    library = load(own, preload=True)
    library(random_inputs(library.inputs, 0))
    assert is_mapped()
    library.close()
    assert not is_mapped()


def test_a_closed_library_keeps_no_memory_of_its_programs(folder: Path) -> None:
    library = load(folder, preload=True)
    library.close()
    library.close()
    assert library._lanes == {}
    assert library._lane.program is None
    assert library.units in (1, 2)
    for call in (lambda: library({}), lambda: library.use(1), library.preload, library.benchmark):
        with pytest.raises(UserError, match=r"is closed: load it again|is missing"):
            call()
    with pytest.raises(UserError, match="is closed"):
        library(random_inputs(library.inputs, 0))


def test_calls_that_were_queued_before_close_are_answered(folder: Path) -> None:
    library = load(folder)
    inputs = random_inputs(library.inputs, 0)
    go_on = threading.Event()
    threading.Thread(target=lambda: library._run(lambda _: go_on.wait(30))).start()
    answers: list[object] = []

    def call() -> None:
        try:
            answers.append(library(inputs)["scores"].shape)
        except UserError as error:
            answers.append(str(error))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    while library._lane.thread._jobs.qsize() < 4:
        time.sleep(0.01)
    closing = threading.Thread(target=library.close)
    closing.start()
    go_on.set()
    closing.join(30)
    for caller in callers:
        caller.join(30)
    assert answers == 4 * [(1, 20)]


def test_a_library_that_fails_to_open_leaves_no_thread(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise UserError("no")

    with load(folder):
        pass
    before = os_threads()
    monkeypatch.setattr(loaded, "open_vm", failing)
    with pytest.raises(UserError, match="no"):
        load(folder)
    end = time.monotonic() + 5
    while os_threads() > before and time.monotonic() < end:
        time.sleep(0.01)
    assert os_threads() <= before  # those of others come and go


# -- many calls ------------------------------------------------------------------------------------


def test_sixteen_threads_call_at_once(folder: Path) -> None:
    with load(folder) as library:
        inputs = [random_inputs(library.inputs, seed) for seed in range(16)]
        wanted = [library(given)["scores"].tobytes() for given in inputs]
        wrong = []

        def call(number: int) -> None:
            for _ in range(50):
                if library(inputs[number])["scores"].tobytes() != wanted[number]:
                    wrong.append(number)

        callers = [threading.Thread(target=call, args=(number,)) for number in range(16)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(60)
        assert not any(caller.is_alive() for caller in callers)
        assert wrong == []


# -- arguments -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library(folder: Path) -> Library:
    return load(folder)


MISTAKES: list[tuple[Callable[[Any], object], str]] = [
    (lambda lib: lib(None), "the inputs are a NoneType: give arrays by name, library({'image': "),
    (lambda lib: lib(np.zeros(3)), "the inputs are a ndarray: give arrays by name"),
    (lambda lib: lib([np.zeros(3)]), "the inputs are a list: give arrays by name"),
    (lambda lib: lib({"image": [[1], [1, 2]], "bias": 0}), "input 'image' is no array ("),
    (lambda lib: lib({1: 0}), "unknown input 1: the inputs are image, bias"),
    (lambda lib: lib.use(1.5), "1.5 units: give a whole number of cores or SMs"),
    (lambda lib: lib.use("2"), "'2' units: give a whole number"),
    (lambda lib: lib.use(True), "True units: give a whole number"),
    (lambda lib: lib.use(0), "0 units: a share has at least 1"),
    (lambda lib: load(lib.path, units=cast(Any, 1.5)), "1.5 units: give a whole number"),
    (lambda lib: lib.benchmark(repeat=0), "repeat=0: give a whole number of runs, at least 1"),
    (lambda lib: lib.benchmark(repeat=1.5), "repeat=1.5: give a whole number of runs"),
    (lambda lib: lib.benchmark(seconds=0), "seconds=0: give a number of seconds above 0"),
    (lambda lib: lib.benchmark(seconds=float("nan")), "seconds=nan: give a number"),
    (lambda lib: lib.benchmark(seconds="1"), "seconds='1': give a number"),
    (lambda lib: lib.benchmark(inputs={}), "input 'image' is missing"),
]


@pytest.mark.parametrize(("call", "text"), MISTAKES, ids=[text[:30] for _, text in MISTAKES])
def test_mistakes_give_one_clear_line(
    library: Library, call: Callable[[Library], object], text: str
) -> None:
    with pytest.raises(UserError) as caught:
        call(library)
    assert str(caught.value).startswith(text)
    assert "\n" not in str(caught.value)


def test_tensors_are_taken_through_dlpack(library: Library) -> None:
    arrays = random_inputs(library.inputs, 4)
    wanted = library(arrays)["scores"]

    class Foreign:
        """As PyTorch's and JAX's tensors: an array behind the protocol, and nothing else."""

        def __init__(self, array: np.ndarray) -> None:
            self._array = array

        def __dlpack__(self, **options: Any) -> object:
            return self._array.__dlpack__(**options)

        def __dlpack_device__(self) -> tuple[int, int]:
            return self._array.__dlpack_device__()

    for convert in (tvm.runtime.tensor, Foreign, np.ndarray.tolist):
        given = {name: convert(array) for name, array in arrays.items()}
        if convert is np.ndarray.tolist:
            with pytest.raises(UserError, match="has type float64: it must be float32"):
                library(given)
        else:
            np.testing.assert_array_equal(library(given)["scores"], wanted)
    library.benchmark(repeat=1, inputs={n: tvm.runtime.tensor(a) for n, a in arrays.items()})

    class Broken(Foreign):
        def __dlpack_device__(self) -> tuple[int, int]:
            raise RuntimeError("requires grad\nsecond line")

    with pytest.raises(UserError, match=r"^input 'image' is no array \(requires grad\)$"):
        library({**arrays, "image": Broken(arrays["image"])})


def test_units_may_be_numpys(library: Any) -> None:
    assert library.use(np.int64(1)).units == 1
    assert library.benchmark(repeat=np.int32(2)).n == 2


# -- the pool of threads ---------------------------------------------------------------------------

POOL = """
    import os, sys, time
    from pathlib import Path
    from gpu_aware_tune.library import load
    from gpu_aware_tune.model.importer import random_inputs
    with load(sys.argv[1], units=2) as library:
        library(random_inputs(library.inputs, 0))
        for _ in range(30):  # a thread that was not needed for the call may not have its name yet
            tasks = list(Path("/proc/self/task").iterdir())
            found = [(task / "comm").read_text().strip() for task in tasks].count("tune-pool")
            if found:
                break
            time.sleep(0.1)
        print(found)
"""


UNSET = ("CC", "CXX", "GPU_AWARE_TUNE_THREADS")


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core needs no pool")
@pytest.mark.parametrize("whole", [True, False])
def test_a_machine_without_a_compiler_uses_the_pool_of_the_folder(
    folder: Path, tmp_path: Path, whole: bool
) -> None:
    """A folder of an older version has none: then TVM's own pool serves."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy.tuned"))
    if not whole:
        manifest = dataclasses.replace(read_manifest(copy), threads=None)
        (copy / "threads.so").unlink()
        write_manifest(copy, manifest)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(POOL), str(copy)],
        env={**{k: v for k, v in os.environ.items() if k not in UNSET}, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) == int(whole)


def test_a_pool_that_is_damaged_is_not_loaded(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy.tuned"))
    file = copy / "threads.so"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(UserError, match=r"threads.so is damaged \(its content has changed\)"):
        load(copy)
    file.unlink()
    with pytest.raises(UserError, match=r"is incomplete \(threads.so is missing\): tune again"):
        load(copy)
