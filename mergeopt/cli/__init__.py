"""The command line: what each command of `mergeopt` does, kept free of heavy imports until a command needs them."""

from mergeopt.cli.app import app

__all__ = ["app"]
