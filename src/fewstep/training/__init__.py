"""Building a run from settings, stepping it, saving it."""
