"""A backbone that is unfrozen on the way, between steps and in a step, with groups of its own."""

import torch
from pieces import WIDTH
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import TensorDataset

import trainonce
from trainonce.testing import record, state_digests


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.low, self.norm = torch.nn.Linear(WIDTH, 16), torch.nn.BatchNorm1d(16)
        self.high, self.head = torch.nn.Linear(16, 16), torch.nn.Linear(16, 1)
        self.low_is_frozen = True

    def forward(self, x):
        x = self.norm(self.low(x))
        return self.head(self.high(x.detach() if self.low_is_frozen else x).tanh())


run = trainonce.init(seed=5)
torch.manual_seed(0)
net = Net()
model = DDP(net, find_unused_parameters=True)
optimizer = torch.optim.SGD(net.head.parameters(), lr=0.05, momentum=0.9)
loader = run.dataloader(TensorDataset(torch.randn(40, WIDTH)), batch_size=4, shuffle=True)
run.protect(model=model, optimizer=optimizer, loader=loader)


@run.step
def train(x):
    if run.step_index >= 11 and net.low_is_frozen:
        net.low_is_frozen = False
        optimizer.add_param_group({"params": list(net.low.parameters()), "lr": 0.01})
    loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


for epoch in run.epochs(4):
    if epoch == 1:
        optimizer.add_param_group({"params": net.high.parameters(), "lr": 0.02})
    if epoch == 3:
        net.norm.eval()
        net.low.bias.requires_grad_(False)
    for (x,) in run.batches(loader):
        train(x)

record(
    run.rank,
    state=state_digests(model=model, optimizer=optimizer),
    modes=[net.norm.training, net.low.bias.requires_grad, net.low_is_frozen],
    groups=[group["lr"] for group in optimizer.param_groups],
    steps=run.step_index,
)
