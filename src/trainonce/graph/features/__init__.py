"""Features of frozen modules, computed once per sample and kept as rows.

`dataset` holds `features`, `memoize` the automatic cut. Below them: `fingerprint` and
`graphs` name what a module computes, `sources` and `samples` name what it is computed from,
`compute` and `claims` fill what is missing, and `rows`, `segments`, `arena` store it.
"""
