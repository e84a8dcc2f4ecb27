"""The Ray cluster that `--ray auto` starts where there is none: nobody else can reach it."""

from __future__ import annotations

import json
import subprocess
import sys

# In a process of its own, whose children are the cluster's processes.
PROGRAM = """
import json, os, sys
import psutil, ray
from gpu_aware_tune.cluster.connection import start_alone

start_alone(ray)
pid = ray.get(ray.remote(num_cpus=0)(lambda: os.getpid()).remote())
own = psutil.Process()
found = [
    (process.name(), c.laddr.ip)
    for process in (own, *own.children(recursive=True))
    for c in process.net_connections(kind="inet")
    if c.status == psutil.CONN_LISTEN
]
ray.shutdown()
print(json.dumps({"listening": found, "task": pid != os.getpid()}))
"""


def test_it_listens_on_loopback_only() -> None:
    for left in (2, 1, 0):  # Ray gives its own processes 30 s, which a busy machine may not have
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        if done.returncode == 0 or not left:
            break
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["task"], "a task has run in a worker"
    assert {"raylet", "gcs_server"} <= {name for name, _ in said["listening"]}
    elsewhere = [
        (name, ip) for name, ip in said["listening"] if ip.removeprefix("::ffff:") != "127.0.0.1"
    ]
    assert elsewhere == []
