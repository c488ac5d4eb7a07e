"""Tasks and their orders, as data."""
