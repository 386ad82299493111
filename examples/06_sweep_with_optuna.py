"""Optuna chooses when the learning rate falls; no step of training is computed twice.

    python examples/06_sweep_with_optuna.py

All trials train at the same rate until their decay, so they share that trunk; the sweep forks
each from the stored state. Run it again: nothing is trained. Needs optuna and scikit-learn:
pip install 'trainonce[examples]'
"""

import argparse

import optuna
import torch
from sklearn.datasets import load_digits
from torch import nn

import trainonce as once


def build(hyper, images, digits):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return {"model": model, "optimizer": optimizer, "images": images, "digits": digits}


def step(objects, hyper, index):
    chosen = torch.randint(0, 1200, (64,))
    logits = objects["model"](objects["images"][chosen])
    nn.functional.cross_entropy(logits, objects["digits"][chosen]).backward()
    objects["optimizer"].param_groups[0]["lr"] = hyper["lr"]
    objects["optimizer"].step()
    objects["optimizer"].zero_grad()


def error(objects):
    model = objects["model"].eval()
    with torch.no_grad():
        found = model(objects["images"][1200:]).argmax(1)
    return (found != objects["digits"][1200:]).double().mean().item()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    data = load_digits()
    images = torch.from_numpy(data.images).float().flatten(1) / 16
    segment = once.Segment(
        build, step, evaluate=error,
        inputs={"images": images, "digits": torch.from_numpy(data.target)},
    )  # fmt: skip
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    alone = trained = 0
    for _ in range(options.trials):
        asked = study.ask()
        tenths = asked.suggest_int("decay_at_tenths", 5, 9)
        rate = asked.suggest_categorical("late_lr", [0.03, 0.01, 0.003])
        decay_at = options.steps * tenths // 10
        trial = segment.trial(options.steps, lr={0: 0.1, decay_at: rate})
        report = once.sweep([trial], save_every=options.steps // 10)
        study.tell(asked, report.results[0].value)
        alone += report.steps_alone
        trained += report.steps_computed
    print(f"best: {study.best_params}, error {study.best_value:.4f}")
    print(f"{alone:,} steps asked for, {trained:,} trained")


if __name__ == "__main__":
    main()
