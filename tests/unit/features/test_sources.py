"""How samples are known: what is read, what is not, and what is refused."""

import os
import random
import sys
import time

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, Subset

from trainonce.errors import DataError
from trainonce.graph.features.evaluate import features
from trainonce.graph.features.items import file_digests

X = torch.randn(20, 6, generator=torch.Generator().manual_seed(2))


class Items(Dataset):
    """Samples with labels of several kinds; counts how often one is read."""

    reads = 0

    def __init__(self, num=20):
        self.num = num

    def __len__(self):
        return self.num

    def __getitem__(self, index):
        type(self).reads += 1
        return X[index], index, f"name {index}", torch.tensor([index, 2 * index]), index / 2


class Keyed(Items):
    def sample_key(self, index):
        return f"sample {index}"


SCALE = 1.0


class Scaled(Keyed):
    def __getitem__(self, index):
        return X[index] * SCALE, index


@pytest.fixture(autouse=True)
def no_reads_yet():
    Items.reads = Keyed.reads = 0


def test_keyed_samples_are_read_once_ever_labels_included(encoder, tmp_path):
    first = features(encoder, Keyed(), store=tmp_path)
    assert first.report.computed == 20
    assert Keyed.reads == 20 + 16, "each once, and eight twice more, to see that they repeat"
    Keyed.reads = 0
    rows = features(encoder, Keyed(), store=tmp_path)
    assert rows.report.computed == 0
    batch = rows.batch([3, 5])
    feature, number, name, pair, half = rows[3]
    assert Keyed.reads == 0
    assert (number, name, pair.tolist(), half) == (3, "name 3", [3, 6], 1.5)
    assert type(number) is int
    assert torch.equal(batch[0][0], feature)
    assert batch[2] == ["name 3", "name 5"]
    assert batch[4].dtype is torch.float64


def test_a_global_that_a_keyed_dataset_reads_counts_as_it_is_now(encoder, tmp_path, monkeypatch):
    assert features(encoder, Scaled(), store=tmp_path).report.computed == 20
    assert features(encoder, Scaled(), store=tmp_path).report.computed == 0
    monkeypatch.setattr(sys.modules[__name__], "SCALE", 2.0)
    rows = features(encoder, Scaled(), store=tmp_path)
    assert rows.report.computed == 20
    assert torch.equal(rows[3][0], encoder(2 * X[3:5])[0].detach())


def test_a_dataset_that_grew_is_read_at_its_new_samples_only(encoder, tmp_path):
    features(encoder, Keyed(12), store=tmp_path)
    Keyed.reads = 0
    rows = features(encoder, Keyed(20), store=tmp_path)
    assert rows.report.computed == 8
    assert Keyed.reads <= 8 + 16
    assert rows[19][1] == 19


def test_a_sample_key_may_be_given_as_an_argument(encoder, tmp_path):
    data = Items()
    features(encoder, data, store=tmp_path, sample_key=lambda index: ("v1", index))
    Items.reads = 0
    rows = features(encoder, data, store=tmp_path, sample_key=lambda index: ("v1", index))
    assert (rows.report.computed, Items.reads) == (0, 0)
    other = features(encoder, data, store=tmp_path, sample_key=lambda index: ("v2", index))
    assert other.report.computed == 20


def test_what_is_taken_out_of_a_keyed_sample_counts(encoder, tmp_path):
    class Pairs(Keyed):
        def __getitem__(self, index):
            return {"a": X[index], "b": -X[index]}

    first = features(encoder, Pairs(), inputs="a", store=tmp_path)
    second = features(encoder, Pairs(), inputs="b", store=tmp_path)
    assert second.report.computed == 20
    assert not torch.equal(first[0]["features"], second[0]["features"])


def test_an_unnamed_dataset_is_read_at_each_run_and_says_so(encoder, tmp_path, caplog):
    rows = features(encoder, Items(), store=tmp_path)
    assert "every sample is read and hashed at each run" in rows.report.identity
    assert "sample_key" in caplog.text
    again = features(encoder, Items(), store=tmp_path)
    assert again.report.computed == 0, "rows are still found by content"
    assert again[4][2] == "name 4"
    assert features(encoder, X, store=tmp_path).report.computed == 0, "and shared with tensors"


def test_labels_that_cannot_be_kept_are_read_with_the_sample(encoder, tmp_path, caplog):
    class Odd(Keyed):
        def __getitem__(self, index):
            return X[index], {"nested": [index]}

    rows = features(encoder, Odd(), store=tmp_path)
    assert rows[3][1] == {"nested": [3]}
    assert "no plain values" in caplog.text


def test_random_augmentation_is_refused(encoder, tmp_path):
    class Flipping(Keyed):
        def __getitem__(self, index):
            return X[index].flip(0) if random.random() < 0.5 else X[index]

    with pytest.raises(DataError, match="random numbers"):
        features(encoder, Flipping(), store=tmp_path)


def test_a_generator_of_its_own_is_noticed_by_reading_twice(encoder, tmp_path):
    generator = np.random.default_rng(0)

    class Noisy(Items):
        def __getitem__(self, index):
            return X[index] + float(generator.standard_normal())

    with pytest.raises(DataError, match="differs each time"):
        features(encoder, Noisy(), store=tmp_path)


def test_variants_store_several_seeded_draws_and_leave_the_generators_alone(encoder, tmp_path):
    class Jittered(Keyed):
        def __getitem__(self, index):
            return X[index] + torch.randn(6), index

    torch.manual_seed(5)
    before = torch.get_rng_state()
    rows = features(encoder, Jittered(), variants=3, store=tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert rows.report.computed == 60
    seen = []
    for epoch in range(4):
        rows.set_epoch(epoch)
        seen.append(rows.batch(range(20))[0])
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[3]), "the variants take turns"
    again = features(encoder, Jittered(), variants=3, store=tmp_path)
    assert again.report.computed == 0
    again.set_epoch(1)
    assert torch.equal(again.batch(range(20))[0], seen[1])


def test_streams_are_refused(encoder, tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(X)

    with pytest.raises(DataError, match="no length"):
        features(encoder, Stream(), store=tmp_path)


def test_an_empty_dataset_is_refused(encoder, tmp_path):
    with pytest.raises(ValueError, match="empty"):
        features(encoder, X[:0], store=tmp_path)


# ---------------------------------------------------------------- image folders


class Folder(Dataset):
    """Laid out as torchvision's folders are; its files hold six numbers."""

    reads = 0

    def __init__(self, root, transform=None):
        self.root = root
        self.samples = [
            (os.path.join(root, kind, name), target)
            for target, kind in enumerate(sorted(os.listdir(root)))
            for name in sorted(os.listdir(os.path.join(root, kind)))
        ]
        self.transform = transform
        self.loader = load_numbers

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        type(self).reads += 1
        path, target = self.samples[index]
        sample = self.loader(path)
        return (self.transform(sample) if self.transform else sample), target


def load_numbers(path):
    return torch.from_numpy(np.fromfile(path, np.float32))


def double(sample):
    return sample * 2


@pytest.fixture
def pictures(tmp_path):
    for number in range(12):
        path = tmp_path / "pictures" / ("cat" if number % 2 else "dog") / f"{number:02d}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        X[number].numpy().tofile(path)
    return tmp_path / "pictures"


def test_files_are_known_by_content_and_decoded_once(encoder, pictures, tmp_path):
    Folder.reads = 0
    first = features(encoder, Folder(pictures), store=tmp_path / "store")
    assert first.report.computed == 12
    Folder.reads = 0
    rows = features(encoder, Folder(pictures), store=tmp_path / "store")
    assert (rows.report.computed, Folder.reads) == (0, 0)
    assert [rows[index][1] for index in range(12)] == [0] * 6 + [1] * 6
    moved = pictures.rename(tmp_path / "elsewhere")
    assert features(encoder, Folder(moved), store=tmp_path / "store").report.computed == 0


def test_a_changed_file_and_a_changed_transform_are_computed_again(encoder, pictures, tmp_path):
    features(encoder, Folder(pictures), store=tmp_path / "store")
    path = pictures / "cat" / "01.bin"
    stat = path.stat()
    X[19].numpy().tofile(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    rows = features(encoder, Folder(pictures), store=tmp_path / "store")
    assert rows.report.computed == 1, "its time was set back, its change time was not"
    torch.testing.assert_close(rows[0][0], encoder(X[19][None])[0].detach())
    assert features(encoder, Folder(pictures, double), store=tmp_path / "store").report.hits == 0


def test_unchanged_files_are_not_read_again(pictures, tmp_path, monkeypatch):
    from trainonce.graph.features import items

    monkeypatch.setattr(items, "is_settled", lambda stat: True)  # they were made just now
    paths = [path for path, _ in Folder(pictures).samples]
    found = file_digests(paths, tmp_path / "store")
    read = []
    monkeypatch.setattr(items, "digest_file", lambda path: read.append(path) or "00" * 32)
    assert file_digests(paths, tmp_path / "store") == found
    assert read == []
    os.utime(paths[3], (time.time(), time.time()))
    file_digests(paths, tmp_path / "store")
    assert read == [paths[3]]


def test_a_file_that_changes_within_a_tick_of_the_clock_is_read_again(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    stat = os.stat(path)
    monkeypatch.setattr(os, "stat", lambda *_: stat)  # as if no stamp of it had moved
    before = file_digests([str(path)], tmp_path)
    path.write_bytes(b"new")
    assert file_digests([str(path)], tmp_path) != before


def test_a_subset_of_a_folder_keeps_labels_in_order(encoder, pictures, tmp_path):
    rows = features(encoder, Subset(Folder(pictures), [11, 0]), store=tmp_path / "store")
    assert [rows[0][1], rows[1][1]] == [1, 0]
    assert rows.batch([0, 1])[1].tolist() == [1, 0]


# ---------------------------------------------------------------- Hugging Face datasets


def test_hugging_face_rows_are_known_by_content_and_not_decoded_again(encoder, tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the datasets library")
    data = datasets.Dataset.from_dict({"x": X.tolist(), "label": list(range(20))})
    data = data.with_format("torch")
    rows = features(encoder, data, inputs="x", store=tmp_path)
    torch.testing.assert_close(rows[3]["features"], encoder(X)[3].detach())
    assert rows[3]["label"] == 3
    again = features(encoder, data.select(range(10)), inputs="x", store=tmp_path)
    assert again.report.computed == 0
    assert again.batch([1, 2])["label"].tolist() == [1, 2]
    relabelled = data.remove_columns("label").add_column("label", [0] * 20)
    assert features(encoder, relabelled, inputs="x", store=tmp_path).report.computed == 0
