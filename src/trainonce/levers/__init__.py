"""Less compute for the same quality: one module a lever, one registry."""
