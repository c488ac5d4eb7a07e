"""From what the user said to one Plan."""
