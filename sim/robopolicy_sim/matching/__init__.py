"""Matching a simulation to a real set-up: what the cameras see, and how the arm follows commands."""
