"""The commands: ``hetermoe train``, ``data``, ``patches``, ``trace``."""
