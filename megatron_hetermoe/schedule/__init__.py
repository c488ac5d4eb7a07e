"""Tasks and their orders, as data, with what must hold of them."""
