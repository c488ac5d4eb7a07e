"""What a kind of GPU that nobody has profiled may take: a roofline over the device table's row.

Everything from here is an estimate, and whoever uses it says so.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_hetermoe.config.shape import ModelShape
from megatron_hetermoe.cost.curves import Notes
from megatron_hetermoe.cost.devices import Device
from megatron_hetermoe.cost.work import (
    Work, activation_work, attention_work, embedding_work, feed_forward_work, head_work,
)

Seconds = tuple[float, float]  # forward, backward
_OPTIMIZER_TRAFFIC = 30  # bytes a parameter: gradient, master weight and two moments read, all but the first written


@dataclass(frozen=True)
class Efficiency:
    """The share of a data sheet's figure that training reaches.

    Attributes:
        matmul: of the tensor cores, in large matrix products.
        flash: of the tensor cores, in FlashAttention's core.
        plain: of the tensor cores, in the attention core of GPUs that have no FlashAttention.
        bandwidth: of the memory's bandwidth.
        kernel: seconds that starting a kernel takes when nothing hides it.
    """

    matmul: float = 0.6
    flash: float = 0.45
    plain: float = 0.15
    bandwidth: float = 0.75
    kernel: float = 6e-6


class Estimate:
    """Seconds of each part of the model on a device.

    Args:
        device: row of the table.
        shape: the model's.
        notes: gets the line that says "estimated".
        efficiency: shares of the data sheet's figures.
    """

    estimated = True

    def __init__(self, device: Device, shape: ModelShape, notes: Notes, efficiency: Efficiency = Efficiency()):
        self.name = device.name
        self.device = device
        self.memory_figures: dict[str, float] = {}
        self._shape, self._efficiency = shape, efficiency
        source = "two sources agree on its row" if device.checked else "one source only"
        notes.add(f"{device.name}: estimated from the device table ({source}); data sheets mislead by up to "
                  f"69% (Sailor, SOSP'25), so measure before you rely on it")

    @property
    def bf16(self) -> bool:
        """Whether the hardware has bfloat16."""
        return self.device.bf16

    def attention(self, tokens: int, recompute: str) -> Seconds:
        """The attention part on one sequence."""
        work = attention_work(self._shape, tokens)
        forward, backward = self._pair(work)
        if recompute == "core_attn":
            backward += self._seconds(Work(0, work.core, 0, 2))
        return forward, backward + (forward if recompute == "full" else 0)

    def expert(self, tokens: float, recompute: str) -> Seconds:
        """One routed expert on that many tokens."""
        return self.feed_forward(self._shape.expert_ffn, tokens, recompute)

    def expert_task(self, recompute: str) -> Seconds:
        """An E task beside its experts: a data sheet does not tell."""
        return 0.0, 0.0

    def activation_again(self, tokens: float) -> float:
        """What one expert's backward takes longer where it computes the activation's output again."""
        return self._seconds(activation_work(self._shape, tokens))

    def feed_forward(self, ffn: int, tokens: float, recompute: str) -> Seconds:
        """A shared expert or a dense part of width ffn."""
        if not tokens or not ffn:
            return 0.0, 0.0
        forward, backward = self._pair(feed_forward_work(self._shape, ffn, tokens))
        return forward, backward + (forward if recompute == "full" else 0)

    def head(self, vocabulary: int, tokens: int) -> Seconds:
        """Final norm, output layer, loss."""
        return self._pair(head_work(self._shape, vocabulary, tokens))

    def embedding(self, tokens: int) -> Seconds:
        """The embedding's rows."""
        return self._pair(embedding_work(self._shape, tokens))

    def optimizer(self, parameters: float) -> float:
        """One step over that many parameters."""
        return parameters * _OPTIMIZER_TRAFFIC / (self.device.bandwidth * self._efficiency.bandwidth)

    def has_recompute(self, recompute: str) -> bool:
        """Whether times with this recomputation are known."""
        return True

    has_activation_again = True
    host_is_known = has_host = False

    def host(self, part: str, recompute: str) -> Seconds:
        """Seconds in which the host queues a part: a data sheet does not tell."""
        return 0.0, 0.0

    def _pair(self, work: Work) -> Seconds:
        return self._seconds(work), self._seconds(work.backward())

    def _seconds(self, work: Work) -> float:
        rates, device = self._efficiency, self.device
        core_share = rates.flash if device.flash_attention else rates.plain
        compute = (work.matmul / rates.matmul + work.core / core_share) / device.flops
        return max(compute, work.traffic / (device.bandwidth * rates.bandwidth), work.kernels * rates.kernel)
