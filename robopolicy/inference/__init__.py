"""Running exported policies: torch is not imported, unless a backend is torch itself."""
