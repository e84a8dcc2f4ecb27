"""Load for a server of the open inference protocol over HTTP; any such server can be driven."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import aiohttp
import numpy as np

from gpu_aware_tune.errors import SetupError, UserError, one_line
from gpu_aware_tune.planning.curve import Floats
from gpu_aware_tune.serving.load import Tally, send_as_planned
from gpu_aware_tune.serving.v2 import numpy_dtype

_TIMEOUT_S = 60.0
_CONNECTIONS = 256
_REFUSED = (429, 503)


async def server_models(url: str) -> dict[str, dict[str, Any]]:
    """The metadata of a server's models by name, with `slo_ms` where the server tells it.

    Raises:
        SetupError: there is no server.
        UserError: it is one of another kind.
    """
    async with _session() as session:
        try:
            async with session.get(f"{url}/v2/status") as response:
                status = await response.json() if response.status == 200 else {"models": []}
            found = {}
            for entry in status["models"]:
                async with session.get(f"{url}/v2/models/{entry['name']}") as response:
                    found[entry["name"]] = {**await response.json(), "slo_ms": entry["slo_ms"]}
        except aiohttp.ClientConnectionError as error:
            raise SetupError(f"no server answers at {url} ({one_line(error)})") from error
        except (ValueError, KeyError, TypeError, aiohttp.ClientError) as error:
            raise UserError(f"{url} is no server of `tune serve` ({one_line(error)})") from error
        return found


async def drive_http(
    url: str, metadata: Sequence[dict[str, Any]], streams: Sequence[Floats], slo_s: Sequence[float]
) -> tuple[list[Tally], float]:
    """Send requests as planned; returns what came of them, and how late they were sent (p99)."""
    tallies = [Tally() for _ in streams]
    bodies = [_body(each) for each in metadata]
    async with _session() as session:

        async def send(model: int, planned_s: float) -> None:
            body, headers = bodies[model]
            url_of_model = f"{url}/v2/models/{metadata[model]['name']}/infer"
            try:
                async with session.post(url_of_model, data=body, headers=headers) as response:
                    await response.read()
                    status = response.status
            except (TimeoutError, aiohttp.ClientError):
                status = 0
            if status == 200:
                tallies[model].answered(time.monotonic() - planned_s, slo_s[model])
            elif status not in _REFUSED:
                tallies[model].failed += 1

        return tallies, await send_as_planned(streams, send)


def _session() -> aiohttp.ClientSession:
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    return aiohttp.ClientSession(
        timeout=timeout, connector=aiohttp.TCPConnector(limit=_CONNECTIONS)
    )


def _body(metadata: dict[str, Any]) -> tuple[bytes, dict[str, str]]:
    """A request with random inputs of one row, its tensors binary."""
    random = np.random.default_rng(0)
    entries, blobs = [], []
    for tensor in metadata["inputs"]:
        shape = [abs(int(extent)) for extent in tensor["shape"]]
        dtype = numpy_dtype(tensor["datatype"])
        values = random.random(shape) if dtype.kind not in "iub" else random.integers(0, 2, shape)
        blob = values.astype(dtype).tobytes()
        blobs.append(blob)
        entries.append(
            {
                "name": tensor["name"],
                "shape": shape,
                "datatype": tensor["datatype"],
                "parameters": {"binary_data_size": len(blob)},
            }
        )
    head = json.dumps({"inputs": entries, "parameters": {"binary_data_output": True}}).encode()
    headers = {
        "Content-Type": "application/octet-stream",
        "Inference-Header-Content-Length": str(len(head)),
    }
    return head + b"".join(blobs), headers
