"""For all tests: how long an example of a property takes says nothing on a machine that others use too."""

from hypothesis import HealthCheck, settings

settings.register_profile("worldloom", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("worldloom")
