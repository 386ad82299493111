"""An agent learns a task of control by PPO, and may stop once its returns say that it has.

PPO is Schulman et al., Proximal Policy Optimization Algorithms, 2017, with advantages by
Schulman et al., High-Dimensional Continuous Control Using Generalized Advantage Estimation,
ICLR 2016.

Shapes: E environments side by side, T steps of each between updates, D observed numbers;
observations (T, E, D), actions, rewards and advantages (T, E).
"""

from __future__ import annotations

import collections
import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from trainonce.errors import ConfigError
from trainonce.levers.early_stop import EarlyStop
from trainonce.levers.harness import Recipe
from trainonce.levers.schedule import Schedule
from trainonce.worker.seeds import derive_seed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from trainonce.levers.usage import UsageMeter

_EVAL_EPISODES = 50
_CLIP_NORM = 0.5
_BIAS_OF_VALUE = 0.5  # weight of the value's loss, as is customary


@dataclass(frozen=True, kw_only=True)
class ControlRecipe:
    """How to train an agent.

    Args:
        steps: Steps of all environments together, the budget.
        lr: Peak rate; it falls to zero over the budget, and so does the clipping range.
        epochs: Passes over what was gathered, in each iteration.
        share: Part of what was gathered that is trained on, drawn at random.
        stop_at: Stop once the mean return of the last `window` episodes is this; None never.
        window: Episodes of that mean.
        verify: Once they reach it, make no update until each environment has had so many new
            episodes, and stop only if their mean reaches it too; 0 takes the first at its word.
    """

    steps: int
    lr: float = 1e-3
    epochs: int = 20
    share: float = 1.0
    stop_at: float | None = None
    window: int = 20
    verify: int = 0


@dataclass(frozen=True, kw_only=True)
class Setting:
    """An environment, and what of PPO is fixed for it.

    Args:
        env: Its name in gymnasium.
        num_envs: E.
        rollout: T.
        batch: Samples of an update.
        gamma: Discount.
        lam: Of the advantages' average.
        scale: What observations are divided by.
    """

    env: str
    num_envs: int
    rollout: int
    batch: int
    gamma: float
    lam: float
    scale: tuple[float, ...]


class Agent(nn.Module):
    """A policy and a value, each a perceptron of two hidden layers."""

    def __init__(self, num_observed: int, num_actions: int, width: int) -> None:
        super().__init__()
        self.policy = _perceptron(num_observed, width, num_actions, gain=0.01)
        self.value = _perceptron(num_observed, width, 1, gain=1.0)


def _perceptron(fan_in: int, width: int, fan_out: int, gain: float) -> nn.Sequential:
    layers = [nn.Linear(fan_in, width), nn.Linear(width, width), nn.Linear(width, fan_out)]
    for layer, each in zip(layers, (2**0.5, 2**0.5, gain), strict=True):
        nn.init.orthogonal_(layer.weight, each)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


@dataclass(frozen=True, kw_only=True)
class _Rollout:
    """What the environments gave, shape (T, E) but for `observed`, which has a row more.

    Args:
        cut: (step, environment, observation) of episodes that their time limit ended.
    """

    observed: torch.Tensor
    actions: torch.Tensor
    log_probs: torch.Tensor
    rewards: torch.Tensor
    ends: torch.Tensor
    cut: list[tuple[int, int, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class _Gathered:
    """What is learned from, over (T, E) flattened."""

    observed: torch.Tensor
    actions: torch.Tensor
    log_probs: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor


class Control:
    """A task of control; see `trainonce.levers.harness.Task`.

    Args:
        width: Of the agent's hidden layers.
        split_seed: Of the episodes on which it is judged.

    Raises:
        ConfigError: gymnasium, which has the environments, is not installed.
    """

    name = ""
    metric = "negative_return"
    margin = 0.0
    setting: Setting

    def __init__(self, width: int = 64, split_seed: int = 0) -> None:
        try:
            import gymnasium
        except ImportError as error:
            raise ConfigError(
                "gymnasium is not installed", hint="pip install 'trainonce[examples]'"
            ) from error
        self._make = gymnasium.make
        self._width = width
        self._split_seed = split_seed

    def settings(self) -> dict[str, Any]:
        """Return what the result depends on beside the recipe."""
        import gymnasium

        return {
            "width": self._width,
            "split_seed": self._split_seed,
            "eval_episodes": _EVAL_EPISODES,
            "gymnasium": gymnasium.__version__,
            **dataclasses.asdict(self.setting),
            "scale": list(self.setting.scale),
        }

    def shorter(self, recipe: Recipe, share: float) -> Recipe:
        """Return the recipe with a smaller budget."""
        steps = round(recipe.settings["steps"] * share)
        return recipe.changed(f"{share:.0%} long", steps=steps)

    def subset(self, recipe: Recipe, share: float) -> Recipe:
        """Return the recipe trained on part of what is gathered."""
        kept = recipe.settings["share"] * share
        return recipe.changed(f"{share:.0%} of data", share=kept)

    def train(
        self, recipe: Mapping[str, Any], seed: int, split: str, meter: UsageMeter
    ) -> dict[str, float]:
        """Train once; return the mean return of the greedy policy over new episodes, negated."""
        run = _Run(self.setting, ControlRecipe(**recipe), self._make, self._width, seed)
        with meter.running():
            run.train(meter)
        first = derive_seed(f"episodes-{split}", self._split_seed) % 2**31
        found = run.evaluate(range(first, first + _EVAL_EPISODES))
        return {"negative_return": -found, "return": found, "env_steps": float(run.steps)}


class _Run:
    """One agent and its environments.

    Attributes:
        steps: Of all environments together, so far.
    """

    def __init__(
        self, setting: Setting, how: ControlRecipe, make: Any, width: int, seed: int
    ) -> None:
        self._setting, self._how, self._make = setting, how, make
        self._envs = [self._open() for _ in range(setting.num_envs)]
        seeds = [derive_seed("environment", seed, i) % 2**31 for i in range(setting.num_envs)]
        self._now = [env.reset(seed=each)[0] for env, each in zip(self._envs, seeds, strict=True)]
        self._scale = torch.tensor(setting.scale)
        torch.manual_seed(derive_seed("control", seed))
        actions = int(self._envs[0].action_space.n)
        self._agent = Agent(len(setting.scale), actions, width)
        self._generator = torch.Generator().manual_seed(derive_seed("act", seed))
        self._optimizer = torch.optim.Adam(self._agent.parameters(), how.lr, eps=1e-5)
        per_iteration = setting.num_envs * setting.rollout
        self._iterations = max(how.steps // per_iteration, 1)
        self._schedule = Schedule(self._optimizer, self._iterations, warmup=0.0)
        self._stop = EarlyStop(
            target=how.stop_at or 0.0,
            better="higher",
            hold=2 if how.verify else 1,
            schedule=self._schedule,
            enabled=how.stop_at is not None,
        )
        self._running = [0.0] * setting.num_envs
        self._recent: collections.deque[float] = collections.deque(maxlen=how.window)
        self._verifying: list[list[float]] = []  # new returns of each environment
        self.steps = 0

    def _open(self) -> Any:
        return self._make(self._setting.env, disable_env_checker=True)

    def train(self, meter: UsageMeter) -> None:
        """Gather and learn until the budget is used, or the returns say that it is enough."""
        per_iteration = self._setting.num_envs * self._setting.rollout
        for iteration in range(self._iterations):
            self._schedule.begin_step(iteration)
            if self._verifying:
                meter.step("act", self._act, samples=per_iteration)
            else:
                clip = 0.2 * self._schedule.factor(iteration)
                meter.step("iterate", lambda clip=clip: self._iterate(clip), samples=per_iteration)
            self.steps += per_iteration
            if (value := self._value()) is not None:
                decision = self._stop.observe(iteration, value)
                if decision.stop:
                    return
                self._verify(decision.reached and not self._verifying)

    def _value(self) -> float | None:
        """Return the mean return that is to be judged, once there are episodes enough."""
        if not self._verifying:
            enough = len(self._recent) == self._how.window
            return sum(self._recent) / len(self._recent) if enough else None
        if min(map(len, self._verifying)) < self._how.verify:
            return None
        # As many of each: those that finish first are the short ones.
        counted = [one for each in self._verifying for one in each[: self._how.verify]]
        return sum(counted) / len(counted)

    def _verify(self, begin: bool) -> None:
        if begin or self._verifying:
            self._recent.clear()
        self._verifying = []
        if begin:  # with episodes that are this policy's from their first step
            self._verifying = [[] for _ in self._envs]
            self._now = [env.reset()[0] for env in self._envs]
            self._running = [0.0] * len(self._envs)

    def _iterate(self, clip: float) -> None:
        found = self._assess(self._act())
        total = len(found.actions)
        kept = torch.randperm(total, generator=self._generator)[: round(self._how.share * total)]
        for _ in range(self._how.epochs):
            order = torch.randperm(len(kept), generator=self._generator)
            for chosen in kept[order].split(self._setting.batch):
                self._update(found, chosen, clip)

    def _update(self, found: _Gathered, chosen: torch.Tensor, clip: float) -> None:
        agent, observed = self._agent, found.observed[chosen]
        advantages = found.advantages[chosen]
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        log_probs = agent.policy(observed).log_softmax(-1)
        mine = log_probs.gather(1, found.actions[chosen, None])[:, 0]
        ratio = (mine - found.log_probs[chosen]).exp()
        clipped = ratio.clamp(1 - clip, 1 + clip)
        policy_loss = -torch.min(ratio * advantages, clipped * advantages).mean()
        value_loss = F.mse_loss(agent.value(observed)[:, 0], found.returns[chosen])
        (policy_loss + _BIAS_OF_VALUE * value_loss).backward()
        for part in (agent.policy, agent.value):  # large returns must not crowd out the policy
            nn.utils.clip_grad_norm_(part.parameters(), _CLIP_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _act(self) -> _Rollout:
        """Act for T steps in each environment."""
        horizon, count = self._setting.rollout, self._setting.num_envs
        observed = torch.zeros(horizon + 1, count, len(self._scale))
        actions = torch.zeros(horizon, count, dtype=torch.long)
        log_probs = torch.zeros(horizon, count)
        rewards, ends = torch.zeros(horizon, count), torch.zeros(horizon, count)
        cut: list[tuple[int, int, torch.Tensor]] = []
        for step in range(horizon):
            observed[step] = self._observed(self._now)
            chances = self._agent.policy(observed[step]).log_softmax(-1)
            chosen = torch.multinomial(chances.exp(), 1, generator=self._generator)
            actions[step], log_probs[step] = chosen[:, 0], chances.gather(1, chosen)[:, 0]
            for i, (env, action) in enumerate(zip(self._envs, actions[step].tolist(), strict=True)):
                self._now[i], reward, ended, timed_out, _ = env.step(action)
                rewards[step, i] = float(reward)
                self._running[i] += float(reward)
                if ended or timed_out:
                    ends[step, i] = 1.0
                    if timed_out and not ended:
                        cut.append((step, i, self._observed([self._now[i]])))
                    self._finish(i)
        observed[horizon] = self._observed(self._now)
        return _Rollout(
            observed=observed,
            actions=actions,
            log_probs=log_probs,
            rewards=rewards,
            ends=ends,
            cut=cut,
        )

    def _finish(self, i: int) -> None:
        """Note the return of an environment's episode, and begin its next."""
        self._recent.append(self._running[i])
        if self._verifying:
            self._verifying[i].append(self._running[i])
        self._running[i] = 0.0
        self._now[i], _ = self._envs[i].reset()

    @torch.no_grad()
    def _assess(self, found: _Rollout) -> _Gathered:
        """Value what was done; an episode cut by its time limit is bootstrapped."""
        horizon = self._setting.rollout
        for step, i, last in found.cut:
            found.rewards[step, i] += self._setting.gamma * self._agent.value(last)[0, 0]
        values = self._agent.value(found.observed)[..., 0]
        advantages = self._advantages(found.rewards, values, found.ends)
        return _Gathered(
            observed=found.observed[:horizon].flatten(0, 1),
            actions=found.actions.flatten(),
            log_probs=found.log_probs.flatten(),
            advantages=advantages.flatten(),
            returns=(advantages + values[:horizon]).flatten(),
        )

    def _observed(self, each: Sequence[Any]) -> torch.Tensor:
        return torch.tensor([list(map(float, one)) for one in each]) / self._scale

    def _advantages(
        self, rewards: torch.Tensor, values: torch.Tensor, ends: torch.Tensor
    ) -> torch.Tensor:
        gamma, lam = self._setting.gamma, self._setting.lam
        found, running = torch.zeros_like(rewards), torch.zeros(rewards.shape[1])
        for step in reversed(range(len(rewards))):
            goes_on = gamma * (1 - ends[step])
            surprise = rewards[step] + goes_on * values[step + 1] - values[step]
            running = surprise + lam * goes_on * running
            found[step] = running
        return found

    @torch.no_grad()
    def evaluate(self, seeds: Sequence[int]) -> float:
        """Return the mean return of the greedy policy, one episode a seed."""
        total = 0.0
        envs = [self._open() for _ in seeds]
        now = [env.reset(seed=seed)[0] for env, seed in zip(envs, seeds, strict=True)]
        while envs:
            actions = self._agent.policy(self._observed(now)).argmax(-1).tolist()
            left: list[tuple[Any, Any]] = []
            for env, action in zip(envs, actions, strict=True):
                observed, reward, ended, timed_out, _ = env.step(action)
                total += float(reward)
                if not (ended or timed_out):
                    left.append((env, observed))
            envs, now = [env for env, _ in left], [observed for _, observed in left]
        return total / len(seeds)


def recipe(**settings: Any) -> Recipe:
    """Return a recipe, named by its settings."""
    how = ControlRecipe(**settings)
    name = f"ppo {how.lr:g}, {how.epochs} epochs, {how.steps // 1000}k steps"
    if how.share < 1:
        name += f", {how.share:.0%} of each batch"
    if how.stop_at is not None:
        name += f", until {how.stop_at:g} over {how.window}"
    if how.verify:
        name += f" and {how.verify} an environment at rest"
    return Recipe(name, dataclasses.asdict(how))
