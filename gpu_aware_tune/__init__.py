"""Tune a neural network for the share of the device it will really get.

Names are loaded on first use: `import gpu_aware_tune` imports neither TVM nor Ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpu_aware_tune.errors import SetupError, TuneError, UserError
    from gpu_aware_tune.library import Library, load
    from gpu_aware_tune.planning.demand import Demand
    from gpu_aware_tune.planning.device import PlanDevice
    from gpu_aware_tune.planning.planner import plan
    from gpu_aware_tune.planning.schedule import Plan
    from gpu_aware_tune.profiling.curves import Curve
    from gpu_aware_tune.profiling.profiles import profile
    from gpu_aware_tune.run.jobs import make_jobs
    from gpu_aware_tune.serving.deployments import Deployment
    from gpu_aware_tune.serving.engine import Engine
    from gpu_aware_tune.settings import DEFAULT, FULL, QUICK, Settings, make_settings
    from gpu_aware_tune.tuning import tune, tune_events, tune_jobs, tune_many

__version__ = "0.1.0"

_HOME = {
    "Curve": "profiling.curves",
    "DEFAULT": "settings",
    "Demand": "planning.demand",
    "Deployment": "serving.deployments",
    "Engine": "serving.engine",
    "FULL": "settings",
    "QUICK": "settings",
    "Library": "library",
    "Plan": "planning.schedule",
    "PlanDevice": "planning.device",
    "Settings": "settings",
    "SetupError": "errors",
    "TuneError": "errors",
    "UserError": "errors",
    "load": "library",
    "make_jobs": "run.jobs",
    "make_settings": "settings",
    "plan": "planning.planner",
    "profile": "profiling.profiles",
    "tune": "tuning",
    "tune_events": "tuning",
    "tune_jobs": "tuning",
    "tune_many": "tuning",
}

__all__ = [
    "DEFAULT",
    "FULL",
    "QUICK",
    "Curve",
    "Demand",
    "Deployment",
    "Engine",
    "Library",
    "Plan",
    "PlanDevice",
    "Settings",
    "SetupError",
    "TuneError",
    "UserError",
    "load",
    "make_jobs",
    "make_settings",
    "plan",
    "profile",
    "tune",
    "tune_events",
    "tune_jobs",
    "tune_many",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
