"""The commands: ``hetermoe train``, ``data``, ``convert``, ``patches``, ``trace``."""
