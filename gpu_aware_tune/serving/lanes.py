"""Lanes that run: a thread bound to the lane's cores, with a program of every model.

A lane is kept once it was used, so that moving models between lanes opens nothing and copies nothing:
the plan's next lanes are prepared while the present ones serve.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from gpu_aware_tune.library.program import Program
from gpu_aware_tune.library.threads import CoreThread
from gpu_aware_tune.serving.served_model import ServedModel, Variant


class LaneRuns:
    """Runs one batch after the other on some cores.

    Args:
        cores: which ones.
    """

    def __init__(self, cores: tuple[int, ...]) -> None:
        self.cores = cores
        self._thread = CoreThread(len(cores), cores)
        self._programs: dict[Variant, Program] = {}
        self._opening = threading.Lock()

    def prepare(self, models: Iterable[ServedModel]) -> None:
        """Open the programs of models and run each once, so that no run of theirs has to wait.

        Raises:
            UserError: a library is damaged or fails.
        """
        for model in models:
            for variant in model.variants:
                if variant not in self._programs:
                    self.warm_up(model, variant)

    def warm_up(self, model: ServedModel, variant: Variant) -> None:
        """Run a batch of zeros."""
        zeros = model.zeros(variant)
        self._program(variant)
        self._thread.run(lambda: self.run(variant, zeros))

    def post(self, function: Callable[[], object]) -> None:
        """Call a function in the lane's thread after those before it, without waiting."""
        self._thread.post(function)

    def run(self, variant: Variant, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """In the lane's thread: run a batch."""
        program = self._program(variant)
        return program(program.borrow(arrays))

    def forget(self, model: ServedModel) -> None:
        """Close a model's programs."""
        with self._opening:
            for variant in model.variants:
                self._programs.pop(variant, None)

    def close(self) -> None:
        """End the thread after what it was given."""
        self._thread.stop()
        self._thread.join()
        self._programs.clear()

    def _program(self, variant: Variant) -> Program:
        if variant not in self._programs:
            with self._opening:
                if variant not in self._programs:
                    self._programs[variant] = variant.open(len(self.cores))
        return self._programs[variant]


class LanePool:
    """Every lane that was used so far, by its cores.

    Args:
        cores: of the device, in the order in which lanes take them.
    """

    def __init__(self, cores: Sequence[int]) -> None:
        self.cores = tuple(cores)
        self._lanes: dict[tuple[int, ...], LaneRuns] = {}
        self._making = threading.Lock()

    def on(self, cores: tuple[int, ...]) -> LaneRuns:
        """The lane on these cores."""
        with self._making:
            if cores not in self._lanes:
                self._lanes[cores] = LaneRuns(cores)
            return self._lanes[cores]

    def side_by_side(self, widths: Sequence[int]) -> list[LaneRuns]:
        """Disjoint lanes of these widths, in the order of the device's cores."""
        first, lanes = 0, []
        for width in widths:
            lanes.append(self.on(self.cores[first : first + width]))
            first += width
        return lanes

    def free(self, width: int, busy: set[int]) -> LaneRuns:
        """A lane of this width whose cores are all idle; one that exists if there is any."""
        for lane in self._lanes.values():
            if len(lane.cores) == width and busy.isdisjoint(lane.cores):
                return lane
        return self.on(tuple(core for core in self.cores if core not in busy)[:width])

    def every(self) -> list[LaneRuns]:
        """The lanes that exist."""
        with self._making:
            return list(self._lanes.values())

    def close(self) -> None:
        """End all threads."""
        for lane in self.every():
            lane.close()
