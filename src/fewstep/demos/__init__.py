"""Quick starts: one runner, two sets of facts."""
