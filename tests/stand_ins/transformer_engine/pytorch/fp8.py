"""What Megatron imports: there is no fp8 here."""

from contextlib import nullcontext


class FP8GlobalStateManager:
    """Says that fp8 is off."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


def fp8_autocast(*args, **kwargs):
    """Changes nothing."""
    return nullcontext()


fp8_model_init = fp8_autocast
