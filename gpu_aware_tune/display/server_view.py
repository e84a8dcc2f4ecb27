"""A running server: lanes, queues, rates, tails against objectives, the last changes."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_COLUMNS = ("rate/s", "waiting", "p99 ms", "SLO ms", "answered", "in time", "refused", "failed")
_EVENTS = 5


def server_view(status: dict[str, Any]) -> RenderableType:
    """What `/v2/status` says, for a terminal."""
    table = Table("model", *_COLUMNS, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for model in status["models"]:
        asked = model["answered"] + model["refused"] + model["failed"]
        late = model["p99_ms"] > model["slo_ms"]
        table.add_row(
            model["name"],
            f"{model['rate_per_s']:.1f}",
            str(model["waiting"]),
            Text(f"{model['p99_ms']:.2f}", "red" if late else ""),
            f"{model['slo_ms']:g}",
            str(model["answered"]),
            f"{100 * model['good'] / asked:.1f} %" if asked else "",
            str(model["refused"]),
            str(model["failed"]),
        )
    events = [
        Text(f"{time.strftime('%H:%M:%S', time.localtime(event['time']))}  {event['text']}")
        for event in status["events"][-_EVENTS:]
    ]
    return Group(Text(_head(status)), table, *events)


def server_line(status: dict[str, Any]) -> str:
    """The same as one line."""
    models = ", ".join(
        f"{model['name']} {model['rate_per_s']:.1f}/s p99 {model['p99_ms']:.2f} ms,"
        f" {model['waiting']} waiting"
        for model in status["models"]
    )
    return f"{_head(status)}: {models}"


def lanes_text(status: dict[str, Any]) -> str:
    """How wide the lanes are: "lanes of 1 + 1 cores"."""
    lanes = " + ".join(str(len(lane)) for lane in status["lanes"]) or "a pool"
    return f"lanes of {lanes} cores"


def _head(status: dict[str, Any]) -> str:
    headroom = f"headroom {status['headroom']:.2f}"
    return f"policy {status['policy']}, {lanes_text(status)}, {headroom}"
