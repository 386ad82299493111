"""Faults of the network traced to a link or a switch, from the hosts at its edge."""
