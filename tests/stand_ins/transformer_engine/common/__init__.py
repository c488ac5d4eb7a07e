"""What Megatron subclasses at its import."""

from transformer_engine.common import recipe
