"""Inside the training process: the session, the exactly-once step, the process group, the state."""
