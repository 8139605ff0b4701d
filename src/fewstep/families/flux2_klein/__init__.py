"""FLUX.2 klein, the base models."""
