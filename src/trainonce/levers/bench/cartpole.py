"""CartPole: a pole is kept upright, one point a step, 500 at most."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainonce.levers.bench.control import Control, Setting, recipe

if TYPE_CHECKING:
    from trainonce.levers.harness import Recipe

_BUDGET = 100_000  # of RL Baselines3 Zoo, whose other settings are the default as well
_SOLVED = 475.0  # gymnasium's own threshold


class CartPole(Control):
    """The task; see `trainonce.levers.harness.Task`."""

    name = "cartpole"
    margin = 10.0
    setting = Setting(
        env="CartPole-v1", num_envs=8, rollout=32, batch=256, gamma=0.98, lam=0.8, scale=(1.0,) * 4
    )


def default() -> Recipe:
    """Return the customary recipe, with its fixed budget."""
    return recipe(steps=_BUDGET)


def baseline(grid: str) -> list[Recipe]:
    """Return fixed budgets, over rates and passes over what was gathered."""
    if grid == "small":
        return [recipe(steps=steps, epochs=10) for steps in (30_000, 60_000)]
    shorter = [
        recipe(steps=steps, lr=lr, epochs=epochs)
        for steps in (20_000, 30_000, 50_000)
        for lr in (1e-3, 3e-3)
        for epochs in (10, 20)
    ]
    return [*shorter, recipe(steps=_BUDGET, epochs=10), recipe(steps=_BUDGET, lr=3e-3, epochs=10)]


def candidates(grid: str) -> list[Recipe]:
    """Return early stops that know returns, with and without part of each batch."""
    if grid == "small":
        return [recipe(steps=_BUDGET, share=share, stop_at=_SOLVED) for share in (0.5, 1.0)]
    shares = (0.25, 0.5, 1.0)
    chosen = [
        recipe(steps=_BUDGET, lr=lr, epochs=epochs, share=share, stop_at=_SOLVED)
        for lr, epochs in ((1e-3, 20), (1e-3, 10), (3e-3, 10))
        for share in shares
    ]
    return [*chosen, *(recipe(steps=_BUDGET, share=share, stop_at=490.0) for share in shares)]
