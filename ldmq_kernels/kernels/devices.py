"""What data sheets say of GPUs: the one table by which times are predicted for a device that is not there.

Rates are dense, of 10^12 operations a second, at `clock_ghz`; what a GPU sustains under load is lower.
"""

from __future__ import annotations

from typing import NamedTuple

from ldmq_kernels.kernels.gpu import Gpu


class Device(NamedTuple):
    """A GPU as its data sheet has it.

    Attributes:
        name: as people write it.
        device_name: what `torch.cuda.get_device_name` has of it.
        capability: compute capability, 9.0 being 90.
        multiprocessors: that are switched on.
        clock_ghz: the boost clock at which the rates are quoted.
        int8_tops: int8 products and sums, 10^12 a second.
        half_tops: of float16 and bfloat16 with float32 accumulators, 10^12 a second.
        fp8_tops: of e4m3 with float32 accumulators; None where there are no such instructions.
        bandwidth: of the memory, 10^9 bytes a second.
        source: where the figures were read.
    """

    name: str
    device_name: str
    capability: int
    multiprocessors: int
    clock_ghz: float
    int8_tops: float
    half_tops: float
    fp8_tops: float | None
    bandwidth: float
    source: str

    @property
    def gpu(self) -> Gpu:
        """What the choice of a tile depends on."""
        return Gpu(self.name, self.capability, self.multiprocessors)

    def products(self, tops: float) -> float:
        """Multiply-adds of a multiprocessor in a clock at a rate in 10^12 operations a second."""
        return tops * 1e3 / (2 * self.multiprocessors * self.clock_ghz)

    def milliseconds(self, clocks: float) -> float:
        """Time of so many clocks."""
        return clocks / (self.clock_ghz * 1e6)


_GA102, _ADA = "NVIDIA Ampere GA102 whitepaper", "NVIDIA Ada whitepaper"
_H100 = "NVIDIA H100 whitepaper and data sheet (SXM5)"
DEVICES = {
    "a100": Device("NVIDIA A100 80GB", "A100", 80, 108, 1.41, 624, 312, None, 2039, "NVIDIA A100 data sheet (SXM4)"),
    "rtx3090": Device("NVIDIA RTX 3090", "RTX 3090", 86, 82, 1.695, 284, 71, None, 936, _GA102),
    "rtx4090": Device("NVIDIA RTX 4090", "RTX 4090", 89, 128, 2.52, 660.6, 165.2, 330.3, 1008, _ADA),
    "l40s": Device("NVIDIA L40S", "L40S", 89, 142, 2.52, 733, 362, 733, 864, "NVIDIA L40S data sheet"),
    "h100": Device("NVIDIA H100", "H100 80GB HBM3", 90, 132, 1.83, 1979, 989, 1979, 3350, _H100),
    "h200": Device("NVIDIA H200", "H200", 90, 132, 1.83, 1979, 989, 1979, 4800, "NVIDIA H200 data sheet (SXM)"),
}


def device_of(name: str) -> Device:
    """A device by its key in the table, such as "h200".

    Raises:
        ValueError: the table has none of this name.
    """
    found = DEVICES.get(name.lower())
    if found is None:
        raise ValueError(f"nothing is known of the device {name!r}: known are {', '.join(DEVICES)}")
    return found


def device_called(device_name: str) -> Device | None:
    """The device that torch calls so; None for one that the table has not."""
    return next((device for device in DEVICES.values() if device.device_name in device_name), None)
