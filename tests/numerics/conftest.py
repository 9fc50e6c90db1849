"""How many examples hypothesis tries: a few, always the same, or many (``make properties``)."""

import os

from hypothesis import HealthCheck, settings

_ANY = {
    "deadline": None,  # the machine may be busy
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
settings.register_profile("suite", max_examples=25, derandomize=True, **_ANY)
settings.register_profile("many", max_examples=3000, print_blob=True, **_ANY)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))
