"""The whole GPU, undivided: the baseline the other backends are compared with."""

from __future__ import annotations

from typing import ClassVar

from gpu_aware_tune.errors import SetupError
from gpu_aware_tune.partition.gpu_partition import GpuPartition
from gpu_aware_tune.partition.shares import Share


class FullPartition(GpuPartition):
    """All SMs of a GPU."""

    backend: ClassVar[str] = "full"

    def __init__(self, share: Share) -> None:
        super().__init__(share)
        if share.units != share.device.units_total:
            raise SetupError(
                f"backend full is the whole GPU, not {share.describe()}: "
                "use --partition green, mps or mig"
            )

    def verify(self) -> None:
        """Check that this process may use every SM, and that a kernel runs."""
        self._check_sms("the GPU")
        self._probe_sms("the GPU")
