"""What holds for all tests."""

from hypothesis import settings

# Speed is measured by `make bench`; a busy machine must not fail a test.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
