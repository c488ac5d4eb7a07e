"""For all tests."""

from hypothesis import settings

# A deadline for one example measures the machine's load, not the code.
settings.register_profile("loaded", deadline=None)
settings.load_profile("loaded")
