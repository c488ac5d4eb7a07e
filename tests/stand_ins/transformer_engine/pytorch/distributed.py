"""What Megatron imports or subclasses at its import."""


class CudaRNGStatesTracker:
    """Megatron subclasses it."""


def activation_recompute_forward(*args, **kwargs):
    """Asked for by fp8 only."""
    raise NotImplementedError
