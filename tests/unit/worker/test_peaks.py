import torch

from trainonce.worker.peaks import find_peak, peak_flops


def test_a_device_is_known_by_the_most_exact_name():
    assert find_peak("NVIDIA H100 80GB HBM3") == 989 * 10**12
    assert find_peak("NVIDIA H100 PCIe") == 756 * 10**12
    assert find_peak("NVIDIA A10G") == 70 * 10**12
    assert find_peak("Some GPU") == 0


def test_the_processor_has_no_known_peak():
    assert peak_flops(torch.device("cpu")) == 0
