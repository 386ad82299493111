"""A DDP that is compiled as a whole: torch.compile sees the frames that DDP calls from C++."""

import torch
from pieces import WIDTH, descend, mlp
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import TensorDataset

import trainonce
from trainonce.testing import record, state_digests

run = trainonce.init(seed=5)
torch.manual_seed(0)
net = mlp()
model = torch.compile(DDP(net), backend="eager")
optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
loader = run.dataloader(TensorDataset(torch.randn(64, WIDTH)), batch_size=4, shuffle=True)
run.protect(model=net, optimizer=optimizer, loader=loader)
step = run.step(lambda x: descend(model, optimizer, x))
for (x,) in run.batches(loader):
    step(x)
record(run.rank, state=state_digests(model=net, optimizer=optimizer), steps=run.step_index)
