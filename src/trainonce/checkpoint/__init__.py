"""The durable fall-back: a folder of checkpoints, used when no living copy of state is left.

`store` stages, commits, finds and prunes checkpoints; `manifest` says what belongs to one and
whether it is whole; `tensors` writes and reads the tensors with torch.distributed.checkpoint;
`saver` does all of it in the background and measures what it costs.
"""
