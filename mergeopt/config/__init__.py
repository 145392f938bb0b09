"""Run files and merge files: what they may say, and the problem and strategy they describe."""

from mergeopt.config.build import build_operator, build_pool, build_problem, load_operator
from mergeopt.config.run_file import RunFile, build_strategy, read_yaml, strategy_from

__all__ = ["RunFile", "build_operator", "build_pool", "build_problem", "build_strategy", "load_operator", "read_yaml", "strategy_from"]
