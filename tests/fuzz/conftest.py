"""Number of examples: few in every test run, as many as fit the time limit under `make fuzz`."""

import os

from hypothesis import HealthCheck, settings

_EVERY_TIME = {"deadline": None, "suppress_health_check": list(HealthCheck)}

# Inputs are the same in every run of the tests, so that failures are reproducible.
settings.register_profile("quick", max_examples=40, derandomize=True, **_EVERY_TIME)
settings.register_profile("long", max_examples=1000, print_blob=True, **_EVERY_TIME)
settings.load_profile(os.environ.get("FUZZ_PROFILE", "quick"))
