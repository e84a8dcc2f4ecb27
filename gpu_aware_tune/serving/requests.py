"""What an engine is asked for: requests made of rows, their answers, and why there is none."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from gpu_aware_tune.errors import TuneError, UserError

Arrays = dict[str, np.ndarray]


class Refused(TuneError):
    """A request that cannot be answered in time, or for which there is no room: ask again later."""


class UnknownModel(UserError):
    """There is no model of that name."""


class Draining(TuneError):
    """The engine is closing, or the model is being removed: nothing new is accepted."""


class RunFailed(TuneError):
    """The run that a request was part of ended in an error; the request may be sent again."""


@dataclass(eq=False, slots=True)
class Request:
    """One call: as many rows as its inputs have along the batch axis.

    Args:
        model: which model.
        rows: how many.
        arrived_s: on the engine's clock; where a load generator says so, when it was planned.
        deadline_s: by when it must be answered.
        future: receives the outputs, or one of the errors above.
        first_slot: where its rows begin in the model's ring of slots.
        started_s: when its first row began to run; None until then.
        left: rows that are not done.
        parts: of the rows that are done: their number, their place in a run, and its outputs.
        is_over: it was answered, refused or given up; what is left of it is dropped.
    """

    model: str
    rows: int
    arrived_s: float
    deadline_s: float
    future: Future[Arrays]
    first_slot: int = 0
    started_s: float | None = None
    left: int = 0
    parts: list[tuple[int, int, list[np.ndarray]]] = field(default_factory=list)
    is_over: bool = False


Clock = Callable[[], float]
