"""A library's latency over the shares of a device."""
