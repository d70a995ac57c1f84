"""Makes the fixtures of a real cluster known to every test."""

pytest_plugins = ["tests.cluster.fixtures"]
