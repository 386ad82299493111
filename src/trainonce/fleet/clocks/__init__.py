"""Clocks of hosts compared to well below a microsecond, from probes in software."""
