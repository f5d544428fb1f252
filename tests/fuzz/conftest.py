"""How long to look: a little in every run, as long as `make fuzz` says there."""

import os

from hypothesis import HealthCheck, settings

_EVERY_TIME = {"deadline": None, "suppress_health_check": list(HealthCheck)}

# The same inputs in every run of the tests: what fails, fails for everybody.
settings.register_profile("quick", max_examples=40, derandomize=True, **_EVERY_TIME)
settings.register_profile("long", max_examples=1000, print_blob=True, **_EVERY_TIME)
settings.load_profile(os.environ.get("FUZZ_PROFILE", "quick"))
