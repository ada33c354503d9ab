"""How long a chunk takes on this machine, engine by engine, and how long it would take at the machine's own limits."""
