"""CartPole: a pole is kept upright, one point a step, 500 at most."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
    return [
        recipe(steps=steps, lr=lr, epochs=epochs)
        for steps, choices in (
            (20_000, ((1e-3, 10), (1e-3, 20), (3e-3, 10))),
            (30_000, ((1e-3, 10), (1e-3, 20), (3e-3, 10))),
            (50_000, ((1e-3, 20), (3e-3, 10))),
        )
        for lr, epochs in choices
    ]


def candidates(grid: str) -> list[Recipe]:
    """Return early stops that know returns, with and without part of each batch and passes."""
    if grid == "small":
        return [recipe(steps=_BUDGET, share=share, stop_at=_SOLVED) for share in (0.5, 1.0)]
    at_once = recipe(steps=_BUDGET, stop_at=_SOLVED)
    spared: tuple[dict[str, Any], ...] = (
        {"share": 0.5},
        {"lr": 3e-3, "epochs": 10, "share": 0.5},
        {"lr": 3e-3, "epochs": 10, "share": 0.25},
        {"lr": 3e-3, "epochs": 5, "share": 0.5},
    )
    verified = [
        recipe(steps=_BUDGET, stop_at=stop_at, window=8, verify=2, **each)
        for each in spared
        for stop_at in ((_SOLVED, 495.0) if "lr" in each else (_SOLVED,))
    ]
    return [at_once, *verified]
