"""Runs: the one loop, the store, the front, and what is made of a front's points."""
