"""Runs a command on the mock GPU."""

from __future__ import annotations

import subprocess
import sys

from mock_gpu import environment, lacks

if reason := lacks():
    sys.exit(f"the mock GPU cannot be built: {reason}")
sys.exit(subprocess.run(sys.argv[1:], env=environment(), check=False).returncode)
