"""Import a model in a process of its own, which can be ended: a file from outside decides what it costs.

The child hands the module over as JSON, and the weights through memory that both processes map.
"""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
import pickle
import select
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_aware_tune.errors import MESSAGE_LENGTH, SetupError, TuneError, UserError, one_line

if TYPE_CHECKING:
    from gpu_aware_tune.model.importer import Model
    from gpu_aware_tune.run.session import Session
    from gpu_aware_tune.workers import Worker

_ALIGNMENT = 64  # bytes, of each array: what TVM's kernels take in place
_POLL_S = 0.2
_LEAST_BYTES = 4 << 30  # that an import may take, however small the file is
_TIMES_THE_FILE = 12  # and for a large one; float16 and 8-bit files are computed with in float32


@dataclass(frozen=True)
class _Array:
    """Where an array lies in the shared memory."""

    offset: int
    shape: tuple[int, ...]
    dtype: str


class _Ended(SetupError):
    """The child crashed."""


def import_apart(
    session: Session,
    path: Path,
    target: Mapping[str, Any],
    input_shapes: Mapping[str, tuple[int, ...]],
    dtype: str | None,
) -> Model:
    """Import an ONNX file in a worker; see `model.importer.load_model`.

    Args:
        session: of the run; its settings say how long that may take.
        path: the file.
        target: JSON of the TVM target.
        input_shapes: of inputs with dynamic dimensions, by name.
        dtype: as for `load_model`.

    Raises:
        UserError: the file cannot be used, or takes too long or too much memory.
        SetupError: the machine lacks something.
    """
    worker = session.host.spawn(
        serve_import, path.absolute(), dict(target), dict(input_shapes), dtype
    )
    # Meanwhile: what the search's workers, which are forked later, will need.
    session.host.load_intrinsics(str(target["kind"]))
    try:
        found = _answer(worker, path, session.settings.import_timeout_s)
        if isinstance(found, Exception):
            raise found
        model, module, arrays, descriptor = found
        return _rebuilt(model, module, arrays, f"/proc/{worker.pid}/fd/{descriptor}")
    except Exception as error:
        if isinstance(error, TuneError) and not isinstance(error, _Ended):
            raise
        if fault := _fault(session, path):
            raise UserError(
                f"{path} cannot be imported, nor run by ONNX Runtime ({fault}): export it again"
            ) from error
        raise
    finally:
        worker.kill()


def _fault(session: Session, path: Path) -> str:
    """What is wrong with a file whose import failed unexpectedly; "" if nothing is."""
    worker = session.host.spawn(serve_fault, path.absolute())
    try:
        return str(_answer(worker, path, session.settings.import_timeout_s))
    except TuneError as error:  # looking took too much, or crashed
        return one_line(error, 120)
    finally:
        worker.kill()


def _answer(worker: Worker, path: Path, limit_s: float) -> Any:
    begun, most = time.monotonic(), _most_bytes(path)
    while not select.select([worker], [], [], _POLL_S)[0]:
        if time.monotonic() - begun > limit_s:
            raise UserError(
                f"{path} is not imported after {limit_s:g} s: give it longer with --import-timeout"
            )
        if worker.rss_bytes() > most:
            raise UserError(
                f"{path} takes more than {most >> 20} MB to import: fold its constants, or use a"
                " smaller --batch or --input"
            )
    try:
        return worker.recv()
    except EOFError:
        raise _Ended(f"importing {path} ended: {worker.kill().text}") from None


def _most_bytes(path: Path) -> int:
    """What an import may take: by the size of the file and of what lies beside it, its data perhaps."""
    total = 0
    with contextlib.suppress(OSError):  # a folder that cannot be listed
        total = sum(e.stat().st_size for e in path.absolute().parent.iterdir() if e.is_file())
    return max(_LEAST_BYTES, _TIMES_THE_FILE * total)


def _rebuilt(model: Model, module: str, arrays: Mapping[str, _Array], memory: str) -> Model:
    import tvm

    from gpu_aware_tune.model.draws import numpy_dtype

    descriptor = os.open(memory, os.O_RDWR)
    try:
        size = os.fstat(descriptor).st_size
        mapped = mmap.mmap(descriptor, size) if size else b""
    finally:
        os.close(descriptor)
    weights = {
        name: np.ndarray(array.shape, numpy_dtype(array.dtype), mapped, array.offset)
        for name, array in arrays.items()
    }
    return dataclasses.replace(model, module=tvm.ir.load_json(module), weights=weights)


def serve_import(
    connection: Connection,
    path: Path,
    target: Mapping[str, Any],
    input_shapes: Mapping[str, tuple[int, ...]],
    dtype: str | None,
) -> None:
    """In the worker: import, answer, and wait until the weights have been mapped."""
    import tvm

    from gpu_aware_tune.model.importer import load_model

    try:
        model = load_model(path, tvm.target.Target(dict(target)), input_shapes, dtype)
    except TuneError as error:  # which may quote any name of the file
        connection.send(type(error)(one_line(error, MESSAGE_LENGTH + len(str(path)))))
        return
    except Exception as error:  # a defect, or what no check knew of: sent with its traceback
        connection.send(_as_told(error))
        return
    descriptor, arrays = _shared(model.weights)
    rest = dataclasses.replace(model, module=None, weights={})
    connection.send((rest, tvm.ir.save_json(model.module), arrays, descriptor))
    connection.poll(None)


def serve_fault(connection: Connection, path: Path) -> None:
    """In a worker: answer what is wrong with a file."""
    from gpu_aware_tune.onnx_prepare.validity import fault_of

    connection.send(fault_of(path))


def _as_told(error: Exception) -> Exception:
    """An exception that can be sent, with its traceback for `--debug`."""
    told = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(told)
    return error


def _shared(weights: dict[str, np.ndarray]) -> tuple[int, dict[str, _Array]]:
    """Move arrays to memory with a descriptor; each is dropped once it is copied."""
    arrays: dict[str, _Array] = {}
    end = 0
    for name, array in weights.items():
        arrays[name] = _Array(end, array.shape, array.dtype.name)
        end += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    descriptor = os.memfd_create("weights")
    os.ftruncate(descriptor, end)
    if end:
        mapped = mmap.mmap(descriptor, end)
        for name, place in arrays.items():
            array = weights.pop(name)
            np.ndarray(array.shape, array.dtype, mapped, place.offset)[...] = array
    return descriptor, arrays
