"""HeterMoE for Megatron-Core: attention on the new GPUs, experts on the old ones.

The package is laid out in floors; a module imports only from its own floor and from those below it:
``cli`` > ``mcore`` > ``runtime`` > ``planner`` > ``simulator`` > ``cost`` > ``schedule`` > ``topology`` > ``config``. All
below ``runtime`` need neither torch nor Megatron.
"""

__version__ = "0.1.0"
