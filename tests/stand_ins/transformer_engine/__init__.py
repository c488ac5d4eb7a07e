"""Stands for transformer-engine in tests on the CPU: modules with its names, parameters and states, by torch's operators.

Only what Megatron builds a GPT model from is here. What else Megatron looks for it does not find, as in a version that
lacks it. Numbers are those of torch's layers, so a run is compared with one of these.
"""

from transformer_engine import common, pytorch

__version__ = "2.20.0"
