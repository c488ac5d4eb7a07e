"""All that knows Megatron."""
