"""Where readings come from: drivers, exporters, the host, the kernel log, files."""
