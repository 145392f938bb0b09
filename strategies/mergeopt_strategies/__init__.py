"""mergeopt."""
