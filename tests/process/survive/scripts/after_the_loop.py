"""Code after a loop reads a variable of the loop, which a newcomer does not go through."""

from pieces import descend, small_job

import trainonce

run = trainonce.init()
model, optimizer, loader = small_job(run, batch_size=8)


@run.step
def train(x):
    return descend(model, optimizer, x).item()


@run.step
def evaluate():
    return 1.0


for epoch in run.epochs(3):
    for (x,) in run.batches(loader):
        loss = train(x)
    evaluate()
    print(f"epoch {epoch} loss {loss}")
