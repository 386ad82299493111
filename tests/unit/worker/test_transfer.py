"""Digests of what is handed over."""

import torch

from trainonce.worker.transfer import Digest, as_bytes


def digest_of(tensor):
    digest = Digest()
    digest.add("x", as_bytes(tensor))
    return digest.hex()


def test_a_flipped_bit_anywhere_changes_the_digest():
    for size in (1, 7, 8, 9, 4096, (1 << 17) + 13, (1 << 18) + 5):
        data = torch.randint(0, 256, (size,), dtype=torch.uint8)
        before = digest_of(data)
        for place in {0, size // 2, size - 1}:
            data[place] ^= 16
            assert digest_of(data) != before, (size, place)
            data[place] ^= 16
        assert digest_of(data) == before


def test_a_permutation_changes_the_digest():
    data = torch.arange(1 << 18, dtype=torch.int64)
    swapped = data.clone()
    swapped[[3, 200_000]] = swapped[[200_000, 3]]
    assert digest_of(data) != digest_of(swapped)


def test_layout_and_alignment_do_not_matter():
    matrix = torch.randn(33, 65)
    assert digest_of(matrix.t()) == digest_of(matrix.t().contiguous())
    data = torch.randint(0, 256, (1001,), dtype=torch.uint8)
    assert digest_of(data[1:]) == digest_of(data[1:].clone())


def test_every_dtype_has_bytes():
    for dtype in (torch.bfloat16, torch.float16, torch.bool, torch.int8, torch.complex64):
        tensor = torch.zeros(3, 5, dtype=dtype)
        assert as_bytes(tensor).numel() == tensor.nbytes
    assert as_bytes(torch.tensor(1.5)).numel() == 4
