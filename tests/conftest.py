"""One hypothesis profile for all tests: the same examples on every machine, and no deadline on slow ones."""

import importlib.util
import os

from hypothesis import settings

settings.register_profile("deterministic", derandomize=True, deadline=None)
settings.load_profile("deterministic")

if importlib.util.find_spec("transfer_queue") is None:
    collect_ignore = ["verl"]  # `make test-verl` runs it, in an environment of its own
else:
    os.environ |= {"TRANSFER_QUEUE_ENABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
    from verl_fixtures import configure, fit, folder  # noqa: F401  # fixtures, of the contract between engines as well
