"""What may vary in a search, and how it is coded."""
