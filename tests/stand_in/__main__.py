"""Runs a command on the stand-in GPU."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from stand_in import build, lacks

if reason := lacks():
    sys.exit(f"the stand-in GPU cannot be built: {reason}")
with tempfile.TemporaryDirectory() as folder:
    sys.exit(subprocess.run(sys.argv[1:], env=build(Path(folder)), check=False).returncode)
