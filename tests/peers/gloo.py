"""The collective benchmark's peer: the same operations over gloo, PyTorch's CPU backend, each rank a process on loopback.

Install:  python3 -m venv venv && venv/bin/pip install torch numpy
Run:      venv/bin/python tests/peers/gloo.py --world 2 --sizes 4096,1048576

A size is run once to warm up and then for at least a tenth of a second, between two barriers; the slowest rank's time
counts. Reduce-scatter is left out where this build of gloo has none. One JSON object a line:
{"operation": ..., "bytes": ..., "seconds": ...}.
"""

import argparse
import json
import os
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

LEAST = 0.1


def operations(world):
    def all_reduce(buffer, _):
        dist.all_reduce(buffer)

    def reduce_scatter(buffer, part):
        dist.reduce_scatter_tensor(part, buffer)

    def all_gather(buffer, part):
        dist.all_gather_into_tensor(buffer, part)

    def broadcast(buffer, _):
        dist.broadcast(buffer, 0)

    return [all_reduce, reduce_scatter, all_gather, broadcast]


def measure(operate, size, world):
    # Whole parts, so that every rank's is as large.
    buffer = torch.zeros(max(size // 4 // world, 1) * world)
    part = torch.zeros(len(buffer) // world)
    operate(buffer, part)
    dist.barrier()
    began = time.perf_counter()
    operate(buffer, part)
    once = torch.tensor([time.perf_counter() - began])
    dist.broadcast(once, 0)
    turns = min(max(int(LEAST / max(once.item(), 1e-9)) + 1, 1), 10_000)
    dist.barrier()
    began = time.perf_counter()
    for _ in range(turns):
        operate(buffer, part)
    dist.barrier()
    took = torch.tensor([(time.perf_counter() - began) / turns])
    dist.all_reduce(took, op=dist.ReduceOp.MAX)
    return took.item()


def run(rank, world, sizes, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    for operate in operations(world):
        for size in sizes:
            try:
                seconds = measure(operate, size, world)
            except (RuntimeError, ValueError, AttributeError):
                break
            if rank == 0:
                print(json.dumps({"operation": operate.__name__, "bytes": size, "seconds": seconds}), flush=True)
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--sizes", default="4096,65536,1048576,16777216,67108864")
    parser.add_argument("--port", type=int, default=29511)
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.sizes.split(",")]
    mp.spawn(run, (arguments.world, sizes, arguments.port), arguments.world)


if __name__ == "__main__":
    main()
