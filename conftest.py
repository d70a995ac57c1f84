"""Makes the fixtures of a real cluster known to every test, and examples independent of the machine's load."""

from hypothesis import HealthCheck, settings

pytest_plugins = ["tests.cluster.fixtures"]

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")
