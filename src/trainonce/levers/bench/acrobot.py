"""Acrobot: two links are swung up; minus one a step until they are, -500 at worst."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainonce.levers.bench.control import Control, Setting, recipe

if TYPE_CHECKING:
    from trainonce.levers.harness import Recipe

_BUDGET = 200_000  # customary budgets are 500,000 and more: an early stop would save more of those
_SOLVED = -100.0  # gymnasium's own threshold


class Acrobot(Control):
    """The task; see `trainonce.levers.harness.Task`."""

    name = "acrobot"
    margin = 4.0
    # Velocities, of which about so much is common.
    setting = Setting(
        env="Acrobot-v1", num_envs=16, rollout=128, batch=128, gamma=0.99, lam=0.94,
        scale=(1.0, 1.0, 1.0, 1.0, 3.0, 6.0),
    )  # fmt: skip


def default() -> Recipe:
    """Return the customary recipe, with its fixed budget."""
    return recipe(steps=_BUDGET, lr=1e-3, epochs=4)


def baseline(grid: str) -> list[Recipe]:
    """Return fixed budgets, over rates and passes over what was gathered."""
    if grid == "small":
        return [recipe(steps=steps, epochs=4) for steps in (50_000, 100_000)]
    return [
        recipe(steps=steps, lr=lr, epochs=epochs)
        for steps, choices in (
            (30_000, ((3e-3, 4),)),
            (50_000, ((1e-3, 4), (1e-3, 10), (3e-3, 2), (3e-3, 4))),
            (75_000, ((3e-3, 2), (3e-3, 4))),
            (100_000, ((1e-3, 4), (1e-3, 10), (3e-3, 4))),
            (_BUDGET, ((3e-3, 4),)),
        )
        for lr, epochs in choices
    ]


def candidates(grid: str) -> list[Recipe]:
    """Return early stops that know returns, with and without part of each batch."""
    if grid == "small":
        return [recipe(steps=_BUDGET, epochs=4, share=s, stop_at=_SOLVED) for s in (0.5, 1.0)]
    return [
        recipe(steps=_BUDGET, lr=lr, epochs=4, share=share, stop_at=stop_at, window=32, verify=2)
        for lr, share, targets in (
            (1e-3, 1.0, (_SOLVED, -90.0)),
            (3e-3, 1.0, (_SOLVED, -90.0)),
            (3e-3, 0.5, (_SOLVED, -90.0, -85.0)),
            (3e-3, 0.25, (_SOLVED,)),
        )
        for stop_at in targets
    ]
