"""Losses as pure functions of tensors: no module, no settings, no randomness."""
