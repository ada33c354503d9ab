"""A policy over the network: openpi's wire format, a server that refuses what it should, a small client."""

from robopolicy.errors import require_extra

for _module in ("msgpack", "websockets", "prometheus_client"):
    require_extra(_module, "serve")
