"""Which rank does what, and which holder has which expert."""
