"""Arithmetic and memory traffic of each part of the model: what a roofline needs to know."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

from megatron_hetermoe.config.shape import ModelShape

if TYPE_CHECKING:
    import numpy as np

Numbers = TypeVar("Numbers", float, "np.ndarray")

_HALF = 2  # bytes of an activation in bf16 or fp16


@dataclass(frozen=True)
class Work:
    """What a part does.

    Attributes:
        matmul: operations of its matrix products.
        core: operations of the attention core, causal.
        traffic: bytes between memory and chip, operands that stay on chip not counted.
        kernels: number of kernels, which each take some microseconds to start.
    """

    matmul: float
    core: float
    traffic: float
    kernels: int

    def backward(self) -> Work:
        """Of the same part: two matrix products for each one; FlashAttention's backward computes the scores again."""
        return Work(2 * self.matmul, 2.5 * self.core, 2 * self.traffic, 2 * self.kernels)

    @property
    def weight_share(self) -> float:
        """The share of a backward's operations that gradients of weights take: one product for each of the forward."""
        backward = self.backward()
        return self.matmul / (backward.matmul + backward.core) if self.matmul else 0.0


def attention_work(shape: ModelShape, tokens: int) -> Work:
    """One sequence through norm, projections, attention core, norm, router and the sum of combine."""
    hidden, core = shape.hidden, shape.query_width + shape.value_width
    matmul = 2 * tokens * (shape.attention_weights + hidden * shape.experts)
    # Norms, residuals, rotary, permuted tokens.
    rows = tokens * (14 * hidden + 3 * core + 4 * shape.latent_width + 2 * shape.topk * hidden)
    return Work(matmul, tokens * tokens * core, _HALF * (rows + shape.attention_weights), 25)


def feed_forward_work(shape: ModelShape, ffn: int, tokens: float) -> Work:
    """An expert, a shared expert or a dense feed-forward part of width ffn."""
    matrices = 3 if shape.gated else 2
    weights = matrices * shape.hidden * ffn
    rows = tokens * (2 * shape.hidden + (2 * matrices - 1) * ffn)
    return Work(2 * tokens * weights, 0, _HALF * (weights + rows), 6)


def activation_work(shape: ModelShape, tokens: float) -> Work:
    """An expert's activation function by itself."""
    return Work(0, 0, _HALF * tokens * (3 if shape.gated else 2) * shape.expert_ffn, 3)


def head_work(shape: ModelShape, vocabulary: int, tokens: int) -> Work:
    """Final norm, output layer and loss, whose logits are read in fp32."""
    traffic = _HALF * (shape.hidden * vocabulary + 4 * tokens * shape.hidden) + tokens * vocabulary * (_HALF + 3 * 4)
    return Work(2 * tokens * shape.hidden * vocabulary, 0, traffic, 15)


def embedding_work(shape: ModelShape, tokens: int) -> Work:
    """Rows of the embedding."""
    return Work(0, 0, _HALF * 3 * tokens * shape.hidden, 3)


def crossing_share(shape: ModelShape, held: Numbers) -> Numbers:
    """The share of tokens that go to at least one of so many experts of a layer, with balanced routing.

    A token's k experts are then any k of E with equal probability, and none of n is among them in C(E-n, k) of C(E, k) cases
    (the hypergeometric distribution at 0): 1 - C(E-n, k) / C(E, k).
    """
    missed = 1.0
    for chosen in range(min(shape.topk, shape.experts)):
        left = (shape.experts - chosen - held) / (shape.experts - chosen)
        missed = missed * left * (left > 0)
    return 1.0 - missed


def projection_width(shape: ModelShape) -> int:
    """Width of the feed-forward part that has as many weights as what joins a token's hidden state [hidden] and a later
    token's embedding [hidden] to one, in a layer that predicts a further token."""
    return 2 * shape.hidden // (3 if shape.gated else 2)


@lru_cache(maxsize=256)
def dense_parameters(shape: ModelShape, vocabulary: int, begins: bool = True, ends: bool = True) -> int:
    """Weights of an attention rank beside the experts that it holds: all but the routed experts.

    Args:
        shape: of the layers that it has.
        vocabulary: rows of the output layer.
        begins, ends: whether it has the embedding, and final norm and output layer; tied, they are one only on one rank.
    """
    matrices = 3 if shape.gated else 2
    attention = shape.attention_weights + 2 * shape.hidden
    dense_layers = shape.layers - len(shape.moe_layers)
    feed_forward = matrices * shape.hidden * (
        dense_layers * shape.dense_ffn + len(shape.moe_layers) * shape.shared_expert_ffn
    )
    router = len(shape.moe_layers) * shape.hidden * shape.experts
    matrices = 1 if begins and ends and shape.tied_embeddings else begins + ends
    further = shape.mtp_layers * (2 * shape.hidden + 3) * shape.hidden  # what joins two to one, and three norms
    embeddings = (matrices * vocabulary + ends) * shape.hidden
    return shape.layers * attention + feed_forward + router + embeddings + further
