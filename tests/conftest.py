"""One hypothesis profile for all tests: the same examples on every machine, and no deadline on slow ones."""

from hypothesis import settings

settings.register_profile("deterministic", derandomize=True, deadline=None)
settings.load_profile("deterministic")
