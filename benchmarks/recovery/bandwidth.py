"""What moving so many bytes between two processes takes at best: gloo's own send and receive."""

import json
import os
import sys
import time

import torch
import torch.distributed as dist


def main() -> None:
    num_bytes, repeats = int(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    data = torch.ones(num_bytes, dtype=torch.uint8)
    took: list[float] = []
    for _ in range(repeats + 1):
        dist.barrier()
        begun_s = time.perf_counter()
        if rank == 0:
            dist.send(data, 1)
        else:
            dist.recv(data, 0)
            took.append(time.perf_counter() - begun_s)
    dist.barrier()
    if rank == 1:
        # One line in one write, and the first is a warm-up.
        os.write(1, json.dumps(took[1:]).encode() + b"\n")


if __name__ == "__main__":
    main()
