"""EDM networks: pictures from class labels or from nothing."""
