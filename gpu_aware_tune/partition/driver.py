"""Calls of the CUDA driver through cuda.bindings: the one place that imports it.

Every call there returns a tuple whose first value is the result code. `call` turns that into a
value or a `DriverError`. The package imports with neither the bindings nor a driver installed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from gpu_aware_tune.errors import SetupError

INSTALL = 'pip install "gpu-aware-tune[cuda]"'


class DriverError(SetupError):
    """The CUDA driver refused a call; `code` is its number, `name` its name."""

    def __init__(self, function: str, code: int, name: str) -> None:
        super().__init__(f"{function} failed: {name} ({code})")
        self.function = function
        self.code = code
        self.name = name


def load_driver() -> Any:
    """The module cuda.bindings.driver; raises `SetupError` where it is not installed."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise SetupError(f"the CUDA driver bindings are missing ({error}): {INSTALL}") from error
    return driver


def started_driver() -> Any:
    """The driver module after `cuInit`.

    A process that has called this must not fork workers that use the GPU: CUDA does not survive a
    fork. The parent therefore asks a short-lived child (`gpus.query_gpus`) instead.
    """
    driver = load_driver()
    try:
        call(driver.cuInit, 0)
    except DriverError:
        raise
    except Exception as error:  # the bindings raise RuntimeError where libcuda cannot be loaded
        raise SetupError(f"no NVIDIA driver: {_one_line(error)}") from error
    return driver


def call(function: Callable[..., Any], *args: Any) -> Any:
    """Call a driver function; return its value (None, one, or a tuple) or raise `DriverError`."""
    code, *values = function(*args)
    if int(code) != 0:
        name = getattr(code, "name", str(code))
        raise DriverError(getattr(function, "__name__", "CUDA call"), int(code), name)
    if not values:
        return None
    return values[0] if len(values) == 1 else tuple(values)


def quietly(function: Callable[..., Any], *args: Any) -> None:
    """Undo one step; after a fault every call fails, and the process is about to end anyway."""
    with contextlib.suppress(DriverError):
        call(function, *args)


def attribute(driver: Any, name: str, device: Any) -> int:
    """One device attribute, named without its CU_DEVICE_ATTRIBUTE_ prefix."""
    key = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
    return int(call(driver.cuDeviceGetAttribute, key, device))


def visible_sms(driver: Any, ordinal: int) -> int:
    """SMs this process may use on a device: fewer than it has under MPS and in a MIG instance."""
    return attribute(driver, "MULTIPROCESSOR_COUNT", call(driver.cuDeviceGet, ordinal))


def mps_is_on(driver: Any, ordinal: int) -> bool:
    """Whether this process reaches the device through an MPS server."""
    return attribute(driver, "MPS_ENABLED", call(driver.cuDeviceGet, ordinal)) == 1


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
