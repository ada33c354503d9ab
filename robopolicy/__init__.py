"""From demonstrations to a deployed policy. See the README."""

__version__ = "0.1.0"
