"""Feature networks, distances between sets of pictures, protocols and reports."""
