"""DQN on CartPole whose frozen encoder and target network see each observation once.

    python examples/05_replay_values.py

The encoder is frozen and large, the head is trained; the target head is copied every 250 steps.
`once.ReplayValues` keeps what the encoder makes of an observation for good, and what the target
makes of it until the next copy. Needs gymnasium: pip install 'trainonce[examples]'
"""

import argparse
import copy
import random
from collections import deque

import gymnasium
import torch
from torch import nn

import trainonce as once


def networks(seed, width=256):
    torch.manual_seed(seed)
    encoder = nn.Sequential(
        nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(),
        nn.Linear(width, 64), nn.Tanh(),
    ).requires_grad_(False).eval()  # fmt: skip
    return encoder, nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))


class Recomputed:
    """The plain way, behind the same interface: the network is called for every batch."""

    def __init__(self, network):
        self.network, self.kept = network, []

    def add(self, observation):
        self.kept.append(torch.as_tensor(observation))
        return len(self.kept) - 1

    def __call__(self, numbers):
        with torch.no_grad():
            return self.network(torch.stack([self.kept[number] for number in numbers]))


def train(seed, num_steps, values_of, *, make=networks, copy_every=250, capacity=10_000, batch=64):
    """Train a DQN and return the returns of its episodes."""
    encoder, head = make(seed)
    target = nn.Sequential(copy.deepcopy(encoder), copy.deepcopy(head)).eval()
    encoded, targets = values_of(encoder), values_of(target)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-3)
    environment = gymnasium.make("CartPole-v1")
    chance = random.Random(seed)
    buffer: deque = deque(maxlen=capacity)
    returns, total = [], 0.0
    state, _ = environment.reset(seed=seed)
    numbers = encoded.add(state), targets.add(state)
    for step in range(num_steps):
        if chance.random() < max(0.05, 1 - step / (0.4 * num_steps)):
            action = chance.randrange(2)
        else:
            with torch.no_grad():
                action = int(head(encoded([numbers[0]])).argmax())
        state, reward, ended, cut, _ = environment.step(action)
        after = encoded.add(state), targets.add(state)
        buffer.append((numbers[0], action, float(reward), after[1], float(ended)))
        numbers, total = after, total + float(reward)
        if ended or cut:
            returns.append(total)
            total = 0.0
            state, _ = environment.reset()
            numbers = encoded.add(state), targets.add(state)
        if len(buffer) >= 500:
            chosen = chance.choices(buffer, k=batch)
            now, actions, rewards, later, ends = zip(*chosen, strict=True)
            best = targets(later).amax(1)
            wanted = torch.tensor(rewards) + 0.99 * (1 - torch.tensor(ends)) * best
            got = head(encoded(now)).gather(1, torch.tensor(actions)[:, None])[:, 0]
            optimizer.zero_grad()
            nn.functional.smooth_l1_loss(got, wanted).backward()
            optimizer.step()
        if step % copy_every == 0:
            target[1].load_state_dict(head.state_dict())
    return returns, encoded, targets


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=6000)
    options = parser.parse_args()
    torch.set_num_threads(1)

    def once_each(network):
        return once.ReplayValues(network, capacity=40_000)

    returns, encoded, targets = train(0, options.steps, once_each)
    print(f"mean return of the last 20 episodes: {sum(returns[-20:]) / len(returns[-20:]):.1f}")
    for name, values in (("encoder", encoded), ("target", targets)):
        report = values.report
        print(f"{name}: {report.requested:,} rows asked for, {report.computed:,} computed")


if __name__ == "__main__":
    main()
