"""Options of RL from neighbouring work, one file each: source, formula, what differs here.

Configured by ``regrpo.config.OptionsConfig``; all are off by default.
"""
