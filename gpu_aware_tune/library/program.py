"""One compiled library opened in TVM's virtual machine, its weights on the device."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import relax

from gpu_aware_tune.codegen.cuda_toolchain import has_gpu_kernels
from gpu_aware_tune.errors import SetupError, UserError, last_line
from gpu_aware_tune.kernels.packing import packed
from gpu_aware_tune.partition.thread_pool import adopt

_WARM_UP = 3
# Modules of a GPU, for good: the context that their end needs may be closed before them.
_KEPT: list[Any] = []
_ALIGNMENT = 64  # bytes, of the tensors that kernels take


class Weights:
    """A weights file, read when it is first needed, and once for all programs on a device.

    Args:
        path: the file that `save_weights` wrote.
    """

    def __init__(self, path: Path | str) -> None:
        self._path = path
        self._by_device: dict[tuple[int, int], list[Any]] = {}
        self._packed: dict[tuple[str, str, tuple[int, int]], list[Any]] = {}
        self._reading, self._packing = threading.Lock(), threading.Lock()

    def on(self, device: Any) -> list[Any]:
        """Give the tensors on a device, in the order in which `main` takes them.

        Raises:
            UserError: the file cannot be read.
        """
        key = (device.dlpack_device_type(), device.index)
        with self._reading:
            if key not in self._by_device:
                try:
                    tensors = tvm.runtime.load_param_dict_from_file(str(self._path)).values()
                except Exception as error:  # TVM reports a bad file with errors of several kinds
                    raise UserError(
                        f"{self._path} cannot be read ({_said(error)}): tune again"
                    ) from error
                self._by_device[key] = [_on(tensor, device) for tensor in tensors]
                device.sync()  # copies use the default stream, kernels a partition's
            return self._by_device[key]

    def packed(self, library: str, machine: Any, device: Any, entry: str) -> list[Any]:
        """Give the tensors as a library's `main` takes them, packed once for all of its programs.

        Args:
            library: its file.
            machine: with the library loaded.
            device: where it runs.
            entry: the function's name, as in `Program`.
        """
        given = self.on(device)
        key = (library, entry, (device.dlpack_device_type(), device.index))
        with self._packing:
            if key not in self._packed:
                self._packed[key] = packed(machine, given, entry)
            return self._packed[key]

    def drop(self) -> None:
        """Give the memory back; programs that are open keep theirs."""
        with self._reading, self._packing:
            self._by_device.clear()
            self._packed.clear()


class Program:
    """A library's `main`, with the weights already given, in the layout that its kernels want.

    Args:
        module: the loaded library.
        weights: of its folder, or on the device, as `save_weights` stored them, in that order.
        device: where it runs.
        entry: the function's name where the library holds several shares: "main_2" for 2 units.
        file: the library's file, which programs that share `weights` are known by.
    """

    def __init__(
        self,
        module: Any,
        weights: Weights | Iterable[Any],
        device: Any,
        entry: str = "main",
        file: str = "",
    ) -> None:
        self.device = device
        machine = relax.VirtualMachine(module, device)
        self._main = machine[entry]
        self._weights = (
            weights.packed(file, machine, device, entry)
            if isinstance(weights, Weights)
            else packed(machine, weights, entry)
        )

    def place(self, arrays: Sequence[np.ndarray]) -> list[Any]:
        """Copy inputs to the device."""
        return [tvm.runtime.tensor(np.asarray(array, order="C"), self.device) for array in arrays]

    def borrow(self, arrays: Sequence[np.ndarray]) -> list[Any]:
        """Inputs as they lie in memory where TVM can read them there, else copied.

        They must not change until the run is over.
        """
        return [self._borrowed(array) for array in arrays]

    def _borrowed(self, array: np.ndarray) -> Any:
        on_host = self.device.dlpack_device_type() == 1
        if on_host and array.ctypes.data % _ALIGNMENT == 0 and array.flags.c_contiguous:
            with contextlib.suppress(BufferError, RuntimeError, TypeError):  # bool, bfloat16
                return tvm.runtime.from_dlpack(array)
        return tvm.runtime.tensor(np.asarray(array, order="C"), self.device)

    def __call__(self, placed: Sequence[Any]) -> list[np.ndarray]:
        """Run once on inputs that `place` or `borrow` gave."""
        result = self._main(*placed, *self._weights)
        wait(self.device)
        outputs = [result] if isinstance(result, tvm.runtime.Tensor) else list(result)
        return [output.numpy() for output in outputs]

    def timer(
        self, inputs: Mapping[str, np.ndarray], is_ending: Callable[[], bool] = lambda: False
    ) -> Callable[[float], list[float]]:
        """Give a function that runs for so many seconds (at least once) and lists each run's.

        Args:
            inputs: arrays in the order of the model's inputs.
            is_ending: whether to stop earlier, asked after each run.
        """
        placed = self.place(list(inputs.values()))
        call = (*placed, *self._weights)
        for _ in range(_WARM_UP):
            self._main(*call)
        wait(self.device)

        def sample(seconds: float) -> list[float]:
            samples: list[float] = []
            end = time.perf_counter() + seconds
            while not samples or (time.perf_counter() < end and not is_ending()):
                start = time.perf_counter()
                self._main(*call)
                wait(self.device)
                samples.append(time.perf_counter() - start)
            return samples

        return sample


def wait(device: Any) -> None:
    """Wait for the stream that this thread launches on; reading a tensor waits for the default one.

    Inside a partition's `timing_context()` kernels run on the partition's stream, which a plain
    `device.sync()` does not cover: results could be read, or a clock stopped, before they are done.
    """
    device.sync(tvm_ffi.get_raw_stream(device))


def open_vm(
    library: Path | str,
    weights: Weights | Path | str,
    index: int = 0,
    entry: str = "main",
) -> Program:
    """Open a compiled library and its weights; threads are left as they are.

    Args:
        library: the `.so` file.
        weights: the file that `save_weights` wrote, or `Weights` that several programs share.
        index: which of the devices of the library's kind.
        entry: as in `Program`.

    Raises:
        UserError: a file cannot be read.
        SetupError: the device that the library is for is not there.
    """
    try:
        # `tvm.runtime.load_module` would keep it until the process ends, 0.1 MB each time.
        module = tvm_ffi.load_module(os.path.realpath(library), keep_module_alive=False)
    except Exception as error:  # TVM reports a bad file with RuntimeError, ValueError and others
        raise UserError(f"{library} cannot be loaded ({_said(error)}): tune again") from error
    cuda = has_gpu_kernels(module)
    if cuda:
        _KEPT.append(module)
    else:
        adopt(library)
    device = tvm.cuda(index) if cuda else tvm.cpu(0)
    if cuda and not device.exist:
        raise SetupError(f"{library} is for a CUDA GPU, and none is visible: see `tune doctor`")
    shared = weights if isinstance(weights, Weights) else Weights(weights)
    shared.on(device)  # an error of the file is not one of the library
    try:
        return Program(module, shared, device, entry, str(library))
    except (ValueError, TypeError, LookupError, AttributeError) as error:  # no such function
        raise UserError(f"{library} cannot be used ({_said(error)}): tune again") from error


def _on(tensor: Any, device: Any) -> Any:
    return tensor if device.dlpack_device_type() == 1 else tensor.copyto(device)


def _said(error: Exception) -> str:
    return last_line(error)[:200] or type(error).__name__
