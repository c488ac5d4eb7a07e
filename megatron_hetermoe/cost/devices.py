"""The device table: data-sheet figures of GPUs that nobody has profiled yet."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

_TABLE = Path(__file__).with_name("devices.yaml")
_FLASH_CAPABILITY = 8.0  # FlashAttention needs Ampere


@dataclass(frozen=True)
class Device:
    """A row of the table.

    Attributes:
        name: kind of GPU.
        flops: dense fp16 tensor operations a second, with fp32 accumulation.
        memory: sizes it is sold with, in bytes, ascending.
        bandwidth: of its memory, bytes a second.
        capability: compute capability.
        bf16: whether the hardware has bfloat16.
        checked: whether a second source agreed with the figures.
    """

    name: str
    flops: float
    memory: tuple[float, ...]
    bandwidth: float
    capability: float
    bf16: bool
    checked: bool

    @property
    def flash_attention(self) -> bool:
        """Whether FlashAttention runs on it."""
        return self.capability >= _FLASH_CAPABILITY


@cache
def device_table() -> dict[str, Device]:
    """All rows by name."""
    import yaml

    rows = yaml.safe_load(_TABLE.read_text(encoding="utf-8"))
    return {
        name: Device(
            name, row["tflops"] * 1e12, tuple(size * 1e9 for size in row["memory"]), row["bandwidth"] * 1e9,
            row["capability"], row["bf16"], row["checked"],
        )
        for name, row in rows.items()
    }
