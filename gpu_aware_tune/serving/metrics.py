"""What a Prometheus server reads from `/metrics`: counts of models, lanes and front ends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gpu_aware_tune.serving.requests import UnknownModel
from gpu_aware_tune.serving.statistics import LATENCY_BOUNDS_S, Duration, ModelStatistics

if TYPE_CHECKING:
    from gpu_aware_tune.serving.front_end import FrontEnd

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Labels = Mapping[str, object]
Sample = tuple[str, Labels, float]  # what follows the metric's name, labels, value


def metrics_text(front: FrontEnd) -> str:
    """All metrics in Prometheus's text format."""
    models = []
    for model in front.engine.models:
        with contextlib.suppress(UnknownModel):  # removed just now
            models.append((model, front.engine.statistics(model.name)))
    found = [(_labels(model.name, model.version), counts) for model, counts in models]
    lines = [
        *_metric("tune_ready", "gauge", "1 while requests are taken.", [("", {}, front.is_ready)]),
        *_metric(
            "tune_requests_in_flight",
            "gauge",
            "Requests that the front ends wait for.",
            [("", {}, front.in_flight)],
        ),
        *_metric(
            "tune_held_bytes", "gauge", "Bytes of these requests.", [("", {}, front.held_bytes)]
        ),
        *_metric(
            "tune_answers_total",
            "counter",
            "Answers of the front ends by status.",
            [
                ("", {"transport": transport, "status": status}, count)
                for (transport, status), count in sorted(front.answers.items())
            ],
        ),
        *_metric(
            "tune_slo_seconds",
            "gauge",
            "Latency objective.",
            [("", _labels(model.name, model.version), model.slo_s) for model, _ in models],
        ),
        *_model_metrics(found),
        *_status_metrics(front.engine.status()),
    ]
    return "\n".join(lines) + "\n"


def _model_metrics(found: Sequence[tuple[Labels, ModelStatistics]]) -> Iterable[str]:
    yield from _metric(
        "tune_requests_total",
        "counter",
        "Requests by what came of them.",
        [
            ("", {**labels, "result": result}, count)
            for labels, counts in found
            for result, count in _results(counts)
        ],
    )
    yield from _metric(
        "tune_good_requests_total",
        "counter",
        "Requests answered within their deadline (goodput).",
        [("", labels, counts.good) for labels, counts in found],
    )
    yield from _metric(
        "tune_rows_total", "counter", "Rows run.", [("", labels, c.rows) for labels, c in found]
    )
    yield from _metric(
        "tune_request_latency_seconds",
        "histogram",
        "Answered requests from arrival to answer.",
        [sample for labels, counts in found for sample in _histogram(labels, counts)],
    )
    for name, text, pick in (
        ("tune_queue_seconds", "Requests from arrival to the start of their run.", "queue"),
        ("tune_run_seconds", "Requests from the start of their run to its end.", "run"),
    ):
        yield from _metric(
            name,
            "summary",
            text,
            [
                sample
                for labels, counts in found
                for sample in _summary(labels, getattr(counts, pick))
            ],
        )
    yield from _metric(
        "tune_batch_seconds",
        "summary",
        "Runs by their number of rows.",
        [
            sample
            for labels, counts in found
            for rows, runs in sorted(counts.batches.items())
            for sample in _summary({**labels, "rows": rows}, runs)
        ],
    )


# What the status says of each model: its key, the metric, its factor, what it is.
_STATUS_KEYS = (
    ("waiting", "tune_waiting_rows", 1.0, "Rows that wait."),
    ("rate_per_s", "tune_rate_per_second", 1.0, "Estimated rate of requests."),
    ("p99_ms", "tune_latency_p99_seconds", 1e-3, "99th percentile of recent latencies."),
    ("drift", "tune_drift_ratio", 1.0, "Run times over those that were planned with."),
)


def _status_metrics(status: Mapping[str, Any]) -> Iterable[str]:
    """The plan and the queues, as `Engine.status` has them."""
    lanes, cores = status["lanes"], len(status["cores"])
    yield from _metric(
        "tune_lane_units", "gauge", "Units of each lane.",
        [("", {"lane": lane}, len(units)) for lane, units in enumerate(lanes)],
    )  # fmt: skip
    yield from _metric(
        "tune_lane_share_ratio", "gauge", "Share of the device of each lane.",
        [("", {"lane": lane}, len(units) / cores) for lane, units in enumerate(lanes)],
    )  # fmt: skip
    yield from _metric(
        "tune_headroom_ratio", "gauge", "The factor by which all rates can grow.",
        [("", {}, status["headroom"])],
    )  # fmt: skip
    for key, name, factor, text in _STATUS_KEYS:
        yield from _metric(
            name, "gauge", text,
            [("", {"model": model["name"]}, factor * model[key]) for model in status["models"]],
        )  # fmt: skip


def _labels(name: str, version: str) -> dict[str, object]:
    return {"model": name, "version": version}


def _results(counts: ModelStatistics) -> list[tuple[str, int]]:
    return [
        ("success", counts.success.count),
        ("fail", counts.fail.count),
        ("refused", counts.refused),
        ("full", counts.full),
        ("expired", counts.expired),
        ("cancelled", counts.cancelled),
    ]


def _histogram(labels: Labels, counts: ModelStatistics) -> Iterable[Sample]:
    total = 0
    for bound, count in zip((*LATENCY_BOUNDS_S, "+Inf"), counts.latency, strict=True):
        total += count
        yield "_bucket", {**labels, "le": bound}, total
    yield "_sum", labels, counts.success.seconds
    yield "_count", labels, total


def _summary(labels: Labels, duration: Duration) -> list[Sample]:
    return [("_sum", labels, duration.seconds), ("_count", labels, duration.count)]


def _metric(name: str, kind: str, text: str, samples: Iterable[Sample]) -> list[str]:
    lines = [
        f"{name}{suffix}{_label_text(labels)} {_number(value)}" for suffix, labels, value in samples
    ]
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}", *lines] if lines else []


def _label_text(labels: Labels) -> str:
    pairs = ",".join(f'{name}="{_escaped(str(value))}"' for name, value in labels.items())
    return f"{{{pairs}}}" if pairs else ""


def _escaped(text: str) -> str:
    clean = text.encode(errors="replace").decode()
    return clean.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    return repr(float(value)) if isinstance(value, float) else str(int(value))
