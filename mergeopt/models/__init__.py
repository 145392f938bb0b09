"""Models on disk, proven to fit together, and the model that is made of them."""
