"""Executes a schedule, and watches that all ranks do. Knows torch and nothing of Megatron."""
