"""What kind of training this is: found by looking at the model, the data and one forward pass."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from trainonce.errors import ConfigError
from trainonce.levers.batches import call_model, num_samples, tensors, to_device, unwrapped
from trainonce.levers.memory import is_out_of_memory, nothing_fits
from trainonce.worker.seeds import derive_seed, seeded

if TYPE_CHECKING:
    from collections.abc import Generator

    from trainonce.levers.batches import Count, Data, Loss

TASKS = ("language-model", "vision", "finetune", "other")
_LOOK_SAMPLES = 4
_COUNT_HINT = "return one integer a sample, as in (targets != -100).sum(1)"


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """What a plan is made for.

    Args:
        model: Digest of the names, shapes and dtypes of parameters and buffers.
        num_parameters: Elements that are trained.
        task: "language-model" (integer tokens in, a distribution for each out, causal),
            "vision" (images in), "finetune" (as the caller said, or a model that was trained
            before), or "other".
        pretrained: The model was trained before.
        per_sample: The loss function returns one value a sample.
        num_samples: Of the dataset.
        batch_shapes: Shape of each tensor of a batch of four.
        sequence_length: Tokens of a sample of a language model; else 0.
        learned_positions: It has an embedding of as many rows as a sequence has tokens.
        device: What it was planned on.
        world_size: Ranks.
    """

    model: str
    num_parameters: int
    task: str
    pretrained: bool
    per_sample: bool
    num_samples: int
    batch_shapes: list[list[int]]
    sequence_length: int
    learned_positions: bool
    device: str
    world_size: int


def take_fingerprint(
    model: torch.nn.Module,
    data: Data,
    loss: Loss,
    *,
    task: str | None,
    device: torch.device,
    world_size: int,
    count: Count | None = None,
) -> Fingerprint:
    """Look at the model, four samples, and the loss of one forward pass.

    The model, its buffers and the generators are left as they were.

    Raises:
        ConfigError: There is no such task, nothing to train, no tensor in a batch, or the loss
            function returns neither a scalar nor one value a sample, or a scalar in spite of
            a `count`.
    """
    if task is not None and task not in TASKS:
        raise ConfigError(f"there is no task {task!r}", hint="one of " + ", ".join(TASKS))
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(
            "the model has no parameter that is trained",
            hint="call requires_grad_() on those that should be",
        )
    batch, out, per_sample = _look(model, data, loss, device)
    amount_of(batch, count)
    if count is not None and not per_sample:
        raise ConfigError(
            "the loss is a scalar, and a count was given",
            hint="return the sum over what counts of each sample, shape (B,)",
        )
    tokens = _tokens(batch)
    with kept(model), torch.no_grad():
        causal = tokens is not None and _is_causal(model, batch, tokens, out)
    shapes = [list(each.shape) for each in tensors(batch)]
    pretrained = task == "finetune" or _was_trained(model)
    found = task
    if found is None:
        found = "language-model" if causal else "vision" if len(shapes[0]) == 4 else "other"
        found = "finetune" if pretrained and not causal else found
    length = int(tokens.shape[1]) if causal and tokens is not None else 0
    return Fingerprint(
        model=model_digest(model),
        num_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        task=found,
        pretrained=pretrained,
        per_sample=per_sample,
        num_samples=len(data),
        batch_shapes=shapes,
        sequence_length=length,
        learned_positions=length > 0 and _has_positions(model, length),
        device=device_name(device),
        world_size=world_size,
    )


def _look(
    model: torch.nn.Module,
    data: Data,
    loss: Loss,
    device: torch.device,
) -> tuple[Any, Any, bool]:
    """Return a small batch, the model's output for it, and whether the loss is per sample."""
    for samples in (min(_LOOK_SAMPLES, len(data)), 1):
        batch = to_device(data.batch(range(samples)), device)
        num_samples(batch)
        try:
            with kept(model), torch.no_grad():
                out = call_model(model, batch)
                return batch, out, is_per_sample(loss(out, batch), num_samples(batch))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
    raise nothing_fits()


def is_per_sample(losses: Any, samples: int) -> bool:
    """Tell whether a loss function returned one value a sample, rather than a scalar.

    Raises:
        ConfigError: It returned something else.
    """
    if not isinstance(losses, torch.Tensor) or not losses.is_floating_point():
        kind = losses.dtype if isinstance(losses, torch.Tensor) else type(losses).__name__
        raise ConfigError(f"loss(out, batch) returned {kind}", hint="return a float tensor")
    if losses.ndim == 0:
        return False
    if losses.ndim == 1 and len(losses) == samples:
        return True
    raise ConfigError(
        f"loss(out, batch) returned shape {list(losses.shape)} for {samples} samples",
        hint='return one value a sample: reduction="none", then the mean over all but dim 0; or '
        "a scalar, which switches the per-sample levers off",
    )


def amount_of(batch: Any, count: Count | None) -> int:
    """Return what a batch is averaged over: its samples, or the sum of what `count` says of each.

    Raises:
        ConfigError: `count` does not return one integer a sample.
    """
    samples = num_samples(batch)
    if count is None:
        return samples
    found: Any = count(batch)
    if not isinstance(found, torch.Tensor):
        raise ConfigError(f"count(batch) returned {type(found).__name__}", hint=_COUNT_HINT)
    if found.is_floating_point() or list(found.shape) != [samples]:
        raise ConfigError(
            f"count(batch) returned {found.dtype} of shape {list(found.shape)} for {samples} "
            "samples",
            hint=_COUNT_HINT,
        )
    return int(found.sum())


def model_digest(model: torch.nn.Module) -> str:
    """Return 16 hex digits of the names, shapes and dtypes of a model's state."""
    state = unwrapped(model).state_dict()
    lines = [[name, list(t.shape), str(t.dtype)] for name, t in state.items() if _is_tensor(t)]
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()[:16]


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def device_name(device: torch.device) -> str:
    """Return "cpu", or the accelerator's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@contextlib.contextmanager
def kept(model: torch.nn.Module) -> Generator[None]:
    """Put parameters, buffers, training mode and generators back after the block.

    The copy takes as much memory on the device as the model has.
    """
    plain = unwrapped(model)
    cuda = sorted({p.device.index or 0 for p in plain.parameters() if p.is_cuda})
    state = copy.deepcopy(plain.state_dict())
    modes = {module: module.training for module in plain.modules()}
    with torch.random.fork_rng(cuda), seeded(derive_seed("kept")):
        try:
            yield
        finally:
            plain.load_state_dict(state)
            for module, mode in modes.items():
                module.training = mode
            plain.zero_grad(set_to_none=True)


def _tokens(batch: Any) -> torch.Tensor | None:
    """Return the input of integers, shape (B, T) with T > 1, if that is the first tensor."""
    first = next(iter(tensors(batch)))
    integers = first.dtype in (torch.int64, torch.int32, torch.uint8, torch.int16)
    return first if integers and first.ndim == 2 and first.shape[1] > 1 else None


def _is_causal(model: torch.nn.Module, batch: Any, tokens: torch.Tensor, out: Any) -> bool:
    """Tell whether the output is one distribution a token that later tokens do not change."""
    logits = next((each for each in tensors(out) if each.ndim == 3), None)
    if logits is None or logits.shape[:2] != tokens.shape:
        return False
    plain = unwrapped(model)
    plain.eval()  # dropout would change the output too
    before = next(each for each in tensors(call_model(model, batch)) if each.ndim == 3)
    # Another token that is sure to exist, in every last place.
    other = tokens.flatten()[0].expand(len(tokens)).clone()
    same = other == tokens[:, -1]
    other[same] = torch.where(other[same] > 0, other[same] - 1, other[same] + 1)
    kept_tokens = tokens[:, -1].clone()
    tokens[:, -1] = other
    after = next(each for each in tensors(call_model(model, batch)) if each.ndim == 3)
    tokens[:, -1] = kept_tokens
    plain.train()
    earlier = torch.allclose(before[:, :-1], after[:, :-1], rtol=1e-3, atol=1e-4)
    return earlier and not torch.equal(before[:, -1], after[:, -1])


def _was_trained(model: torch.nn.Module) -> bool:
    """Tell whether batch norms have counted batches, or the model's config names a source."""
    plain = unwrapped(model)
    for name, buffer in plain.named_buffers():
        if name.endswith("num_batches_tracked") and int(buffer) > 0:
            return True
    config = getattr(plain, "config", None)
    return bool(getattr(config, "_name_or_path", ""))


def _has_positions(model: torch.nn.Module, length: int) -> bool:
    return any(
        isinstance(module, torch.nn.Embedding) and module.num_embeddings == length
        for module in unwrapped(model).modules()
    )
