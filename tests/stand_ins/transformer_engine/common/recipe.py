"""What Megatron subclasses at its import: there is no fp8 here."""


class DelayedScaling:
    """Megatron subclasses it."""
