"""Killable worker processes, forked from one host that has TVM loaded."""

from __future__ import annotations

from gpu_aware_tune.workers.pool import Exit, Worker, WorkerHost, scratch_place

__all__ = ["Exit", "Worker", "WorkerHost", "scratch_place"]
