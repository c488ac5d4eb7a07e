"""Checkpoints between Hugging Face's folders and Megatron's torch_dist."""
