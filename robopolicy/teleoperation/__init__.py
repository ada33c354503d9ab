"""Demonstrations by a person: a device moves the tool of a simulated arm, a window shows it, a session records it."""
