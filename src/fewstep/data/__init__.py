"""Batches: pictures and noise-image pairs, addressed by global sample position."""
