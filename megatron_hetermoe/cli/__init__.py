"""The command ``hetermoe``: ``main`` has its sub-commands, each in a file of its name."""
