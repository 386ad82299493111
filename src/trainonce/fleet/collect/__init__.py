"""One agent a host, one collector: what all hosts report, on one page for Prometheus."""
