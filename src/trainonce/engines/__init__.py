"""Where workers run: processes of this host, or actors of a cluster."""
