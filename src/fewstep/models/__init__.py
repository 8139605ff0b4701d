"""The public face of a model: load it, sample from it."""
