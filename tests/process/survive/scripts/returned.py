"""Uses what its steps return, whether or not that was lost."""

from pieces import descend, small_job

import trainonce

run = trainonce.init()
model, optimizer, loader = small_job(run, batch_size=4)


@run.step
def step(x):
    return {"loss": descend(model, optimizer, x), "parts": (len(x), [1.0])}


total = 0.0
for (x,) in run.batches(loader, max_steps=6):
    out = step(x)
    size, parts = out["parts"]
    if size is trainonce.LOST:
        assert parts is trainonce.LOST
        print(f"LOST at {run.step_index}", flush=True)
    total += size * out["loss"]
