"""From recipes to weights in a live model, and from a live model to scores."""
