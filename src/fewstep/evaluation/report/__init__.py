"""Pages made of sections."""
