import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from trainonce.errors import ConfigError, DataError
from trainonce.levers.infobatch import InfoBatch, WithIndex
from trainonce.worker.loader import ShardedLoader


def scored(losses, **changes):
    """An InfoBatch that has seen one loss for each sample."""
    lever = InfoBatch(len(losses), **{"num_epochs": 8, **changes})
    lever.reduce_loss(torch.tensor(losses), torch.arange(len(losses)))
    return lever


def test_the_first_and_the_last_epochs_take_every_sample_once():
    lever = scored([float(i) for i in range(40)])
    for epoch in (0, 7):
        lever.set_epoch(epoch)
        assert sorted(lever) == list(range(40))


def test_hard_samples_are_all_kept_and_easy_ones_by_the_ratio():
    lever = scored([0.0] * 1000 + [10.0] * 1000, ratio=0.3)
    lever.set_epoch(1)
    order = list(lever)
    assert sorted(i for i in order if i >= 1000) == list(range(1000, 2000))
    assert 620 < sum(i < 1000 for i in order) < 780
    assert len(order) == len(lever) == len(set(order))


def test_the_expected_gradient_is_that_of_all_samples():
    losses = torch.rand(4000, generator=torch.Generator().manual_seed(0)) ** 3
    lever = scored(losses.tolist(), ratio=0.5)
    lever.set_epoch(1)
    kept = torch.tensor(list(lever))
    weighed = lever.reduce_loss(losses[kept], kept) * len(kept)
    assert weighed.item() == pytest.approx(losses.sum().item(), rel=0.05)
    assert losses[kept].sum() < 0.96 * losses.sum()  # without weights it would be too small


def test_the_order_of_an_epoch_does_not_change_with_what_is_learned_in_it():
    lever = scored([float(i) for i in range(100)])
    lever.set_epoch(2)
    before = list(lever)
    lever.reduce_loss(torch.zeros(50), torch.arange(50, 100))
    lever.set_epoch(2)
    assert list(lever) == before
    lever.set_epoch(3)
    assert list(lever) != before


def test_asking_for_epoch_0_in_between_changes_nothing():
    lever = scored([float(i) for i in range(100)])
    lever.set_epoch(2)
    before, state = list(lever), lever.state_dict()
    lever.set_epoch(0)
    assert len(list(lever)) == 100
    lever.set_epoch(2)
    assert list(lever) == before
    assert torch.equal(lever.state_dict()["easy"], state["easy"])


def test_an_epoch_that_is_over_is_refused():
    lever = scored([0.0, 1.0])
    lever.set_epoch(3)
    with pytest.raises(DataError, match="epoch 2 is over"):
        lever.set_epoch(2)


def test_indices_beyond_what_a_float_holds_stay_exact():
    first = 2**24 - 4
    lever = InfoBatch(2**24 + 4, 8)
    indices = torch.arange(first, first + 8)
    lever.reduce_loss(torch.arange(8.0), indices)
    assert lever.state_dict()["scores"][first:].tolist() == list(range(8))


def test_a_loss_that_is_not_finite_makes_no_sample_easy():
    lever = scored([float("nan"), float("inf"), 1.0, 5.0])
    lever.set_epoch(1)
    assert lever.state_dict()["easy"].tolist() == [False, False, True, False]


@pytest.mark.parametrize(
    ("losses", "indices"),
    [
        (torch.tensor(1.0), torch.arange(4)),
        (torch.ones(4), torch.arange(3)),
        (torch.ones(4), torch.ones(4)),
        (torch.ones(4, 2), torch.arange(4)),
    ],
)
def test_a_loss_that_is_not_per_sample_gets_a_hint(losses, indices):
    with pytest.raises(ConfigError, match="one loss a sample") as caught:
        InfoBatch(8, 8).reduce_loss(losses, indices)
    assert 'reduction="none"' in caught.value.hint


@pytest.mark.parametrize("index", [-1, 4])
def test_an_index_beyond_the_dataset_is_refused(index):
    with pytest.raises(ConfigError, match="made for 4 samples") as caught:
        InfoBatch(4, 8).reduce_loss(torch.ones(2), torch.tensor([0, index]))
    assert "length of the dataset" in caught.value.hint


def test_another_dataset_is_refused():
    with pytest.raises(ConfigError, match="began with 4 samples"):
        InfoBatch(5, 8).load_state_dict(InfoBatch(4, 8).state_dict())


def test_it_is_a_sampler_of_a_plain_dataloader_with_exact_indices():
    dataset = TensorDataset(torch.arange(20.0))
    lever = InfoBatch(20, 8, seed=3)
    seen = []
    for indices, (x,) in DataLoader(WithIndex(dataset), batch_size=6, sampler=lever):
        assert indices.dtype == torch.int64
        assert torch.equal(indices.float(), x)
        seen += indices.tolist()
    assert sorted(seen) == list(range(20))


def test_it_owns_the_order_of_the_runs_loader_and_deals_it_to_ranks_without_repeats():
    dataset = WithIndex(TensorDataset(torch.arange(41.0)))
    levers = [scored([float(i) for i in range(41)]) for _ in range(3)]
    loaders = [
        ShardedLoader(dataset, 4, seed=0, world_size=3, rank=rank, sampler=lever)
        for rank, lever in enumerate(levers)
    ]
    for epoch in range(3):
        dealt = [[b[0].tolist() for b, _ in loader.iterate(epoch)] for loader in loaders]
        assert len({len(batches) for batches in dealt}) == 1
        samples = [i for batches in dealt for batch in batches for i in batch]
        assert sorted(samples) == sorted(levers[0])
        assert len(set(samples)) == len(samples)


def test_the_runs_loader_goes_on_in_the_middle_of_a_pruned_epoch():
    dataset = WithIndex(TensorDataset(torch.arange(60.0)))
    lever = scored([float(i) for i in range(60)])
    loader = ShardedLoader(dataset, 5, seed=0, world_size=1, rank=0, sampler=lever)
    batches = list(loader.iterate(2))
    (_, offset), state = batches[3], lever.state_dict()
    lever.reduce_loss(torch.zeros(60), torch.arange(60))  # learned after the state was taken
    other = InfoBatch(60, 8)
    other.load_state_dict(state)
    state["scores"].fill_(9)  # what was loaded does not alias what was given
    resumed = ShardedLoader(dataset, 5, seed=0, world_size=1, rank=0, sampler=other)
    rest = [b[0].tolist() for b, _ in resumed.iterate(2, offset)]
    assert rest == [b[0].tolist() for b, _ in batches[4:]]
    assert len([i for batch in rest for i in batch]) < 60 - offset


def test_shares_of_plain_ddp_are_equally_long_and_disjoint():
    lever = InfoBatch(23, 8)
    shares = [list(lever.of_rank(rank, 4)) for rank in range(4)]
    assert [len(share) for share in shares] == [5] * 4 == [len(lever.of_rank(0, 4))] * 4
    assert len({i for share in shares for i in share}) == 20
    with pytest.raises(DataError):
        lever.of_rank(4, 4)


def _rank(rank, path, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    lever = InfoBatch(2**24 + 8, 8)
    mine = [2**24 + 1, 3, 5] if rank == 0 else [2**24 + 3, 4]  # one sample more on rank 0
    losses = torch.tensor([0.1 * i + rank for i in range(len(mine))])
    lever.reduce_loss(losses, torch.tensor(mine))
    lever.set_epoch(1)
    seen = torch.isfinite(lever.state_dict()["scores"]).nonzero().flatten()
    easy = lever.state_dict()["easy"].nonzero().flatten()
    results.put((rank, seen.tolist(), lever.state_dict()["scores"][seen].tolist(), easy.tolist()))
    dist.destroy_process_group()


def test_two_ranks_with_unequal_shares_know_the_same_scores_exactly(tmp_path):
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    mp.spawn(_rank, (str(tmp_path / "store"), results), nprocs=2)
    found = sorted(results.get() for _ in range(2))
    assert found[0][1:] == found[1][1:]
    _, seen, scores, easy = found[0]
    assert seen == [3, 4, 5, 2**24 + 1, 2**24 + 3]
    assert scores == torch.tensor([0.1, 1.1, 0.2, 0.0, 1.0]).tolist()
    assert easy == [3, 5, 2**24 + 1]


def test_pruning_costs_less_and_learns_as_well_on_a_toy_problem():
    torch.manual_seed(0)
    x = torch.randn(400, 5)
    y = (x @ torch.randn(5) > 0).long()
    results = {}
    for name, enabled in (("all", False), ("pruned", True)):
        torch.manual_seed(1)
        model, lever = torch.nn.Linear(5, 2), InfoBatch(400, 10, enabled=enabled)
        optimizer = torch.optim.Adam(model.parameters(), 0.05)
        samples = 0
        for epoch in range(10):
            lever.set_epoch(epoch)
            for batch in torch.tensor(list(lever)).split(20):
                losses = F.cross_entropy(model(x[batch]), y[batch], reduction="none")
                lever.reduce_loss(losses, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
                samples += len(batch)
        results[name] = (samples, F.cross_entropy(model(x), y).item())
    assert results["pruned"][0] < 0.8 * results["all"][0]
    assert results["pruned"][1] < results["all"][1] + 0.05
