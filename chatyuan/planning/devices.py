"""The accelerators that a plan can name: peak, memory, links and price of one device.

One device is what jax counts as one: a TPU chip, a GPU. Peaks are those that the MFU of a run is
computed with (`chatyuan.metrics.PEAK_FLOPS`, data sheets). Sources of the rest, read in 2025:

1. TPUs: cloud.google.com/tpu/docs (v5e, v5p, v6e): HBM, ICI in one direction (half of what the
   pages call bidirectional), data-centre network of a chip = of a pod / 256, or as the page says.
2. GPUs: NVIDIA's data sheets; NVLink in one direction (half of the "total" that they print), 8
   devices to a domain; network cards as in DGX systems (400 Gb/s a GPU; A100: 200), L4: PCIe 4.
3. Prices: on-demand list prices in US dollars, Google Cloud (us-central1 or us-east5) for TPUs and
   L4, Lambda's cloud for the other GPUs. They are a starting point: regions, commitments and spot
   markets differ by factors. `Config.price_per_hour` takes yours.
"""

import dataclasses

from chatyuan.errors import UserError, did_you_mean
from chatyuan.metrics import peak_flops

PRICES_OF = "2025"


@dataclasses.dataclass(frozen=True)
class Device:
    """One kind of accelerator.

    Attributes:
        name: as a plan names it.
        kind: as jax names it (`device_kind`).
        platform: as jax names it: "tpu" or "gpu".
        memory: GiB of one device.
        link: bytes per second that a device sends inside its group (NVLink, ICI, PCIe).
        network: bytes per second that a device sends to another group.
        group: devices that the fast links connect.
        dollars: list price of one device for an hour.
    """

    name: str
    kind: str
    platform: str
    memory: float
    link: float
    network: float
    group: int
    dollars: float

    @property
    def peak(self) -> float:
        """Dense bfloat16 FLOP/s."""
        flops = peak_flops(self.kind)
        assert flops is not None, self.kind
        return flops


DEVICES = {
    device.name: device
    for device in (
        Device("v5e", "TPU v5 lite", "tpu", 16, 200e9, 3.125e9, 256, 1.20),
        Device("v5p", "TPU v5p", "tpu", 95, 600e9, 6.25e9, 6144, 4.20),
        Device("v6e", "TPU v6 lite", "tpu", 32, 400e9, 12.5e9, 256, 2.70),
        Device("l4", "NVIDIA L4", "gpu", 24, 32e9, 12.5e9, 8, 0.71),
        Device("a100_40gb", "NVIDIA A100-SXM4-40GB", "gpu", 40, 300e9, 25e9, 8, 1.29),
        Device("a100", "NVIDIA A100-SXM4-80GB", "gpu", 80, 300e9, 25e9, 8, 1.79),
        Device("h100", "NVIDIA H100 80GB HBM3", "gpu", 80, 450e9, 50e9, 8, 2.99),
        Device("h200", "NVIDIA H200", "gpu", 141e9 / 2**30, 450e9, 50e9, 8, 3.79),
        Device("b200", "NVIDIA B200", "gpu", 180e9 / 2**30, 900e9, 50e9, 8, 4.99),
    )
}


def device(name: str) -> Device:
    """Returns a device of the table.

    Raises:
        UserError: there is none of that name.
    """
    if name not in DEVICES:
        raise UserError(
            f"Device {name!r} is not known; the devices are {', '.join(DEVICES)}."
            f"{did_you_mean(name, DEVICES)}"
        )
    return DEVICES[name]
