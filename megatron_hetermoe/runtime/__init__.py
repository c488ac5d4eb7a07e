"""Executes a schedule: streams, channels, trace. Knows torch and nothing of Megatron."""
