"""Training runs as chains of segments, and sweeps that train shared prefixes once.

`segment` holds what a user writes, `state` what passes from one segment to the next, `trial` the
schedules of hyperparameters, `tree` the stages that trials share, `sweep` the sweep itself, and
`halving` an ask-and-tell interface that stops poor trials early.
"""
