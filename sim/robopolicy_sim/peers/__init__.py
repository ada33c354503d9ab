"""Environments of other projects (Meta-World, gym-aloha, robosuite) behind this package's interface.

``catalogue`` lists and registers them without importing those projects; each is an optional package.
"""
