"""The store benchmark's peer: PyTorch's distributed checkpoint (DCP), and Orbax where it is installed.

Install:  python3 -m venv venv && venv/bin/pip install torch numpy && venv/bin/pip install orbax-checkpoint jax
Run:      venv/bin/python tests/peers/dcp.py --folder /some/disk --bytes 1073741824 --ranks 2 --rounds 7

Each rank (gloo, one process) holds a different part of --bytes of float32. Measured are a synchronous save, until every
file and folder of the checkpoint is synced to the disk as Cairn's saves are; a load of the same into memory that is
there, with the page cache dropped; and the time an asynchronous save holds its caller. Orbax saves the same bytes from
one process. The last line is one JSON object with the median of each.
"""

import argparse
import json
import os
import shutil
import statistics
import time

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp


def sync_all(folder, drop=False):
    """Syncs all files and folders; with drop, lets the page cache forget them."""
    for place, _, names in os.walk(folder):
        for path in [place] + [os.path.join(place, name) for name in names]:
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            if drop and os.path.isfile(path):
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def timed(work):
    dist.barrier()
    began = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - began


def rank_main(rank, args, port, results):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=args.ranks)
    # Three states a rank, as in training with Adam: a parameter shard and two moments.
    elements = args.bytes // args.ranks // 3 // 4
    state = {f"rank{rank}.{name}": torch.rand(elements) for name in ("param", "exp_avg", "exp_avg_sq")}
    saves, loads, stalls = [], [], []
    for turn in range(args.rounds):
        folder = os.path.join(args.folder, f"dcp-{turn}")

        def save():
            dcp.save(state, checkpoint_id=folder)
            if rank == 0:
                sync_all(folder)

        saves.append(timed(save))
        if rank == 0:
            sync_all(folder, drop=True)
        loads.append(timed(lambda: dcp.load(state, checkpoint_id=folder)))
        dist.barrier()
        if rank == 0:
            shutil.rmtree(folder)
        dist.barrier()
        # The caller is held until async_save returns; the rest runs beside training.
        began = time.perf_counter()
        future = dcp.async_save(state, checkpoint_id=folder + "-async")
        stalls.append(time.perf_counter() - began)
        future.result()
        dist.barrier()
        if rank == 0:
            shutil.rmtree(folder + "-async")
        dist.barrier()
    if rank == 0:
        results["dcp_save"], results["dcp_load_cold"] = saves, loads
    results[f"stall{rank}"] = stalls
    dist.destroy_process_group()


def orbax(args):
    """Save seconds of the same bytes from one process, or None where Orbax is not installed."""
    try:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        import numpy
        import orbax.checkpoint as ocp
    except ImportError:
        return None
    elements = args.bytes // 3 // 4
    state = {name: numpy.random.rand(elements).astype(numpy.float32) for name in ("param", "exp_avg", "exp_avg_sq")}
    saves = []
    for turn in range(args.rounds):
        folder = os.path.abspath(os.path.join(args.folder, f"orbax-{turn}"))
        began = time.perf_counter()
        with ocp.PyTreeCheckpointer() as saver:
            saver.save(folder, state)
        sync_all(folder)
        saves.append(time.perf_counter() - began)
        shutil.rmtree(folder)
    return saves


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", required=True)
    parser.add_argument("--bytes", type=int, default=1 << 30)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--without-orbax", action="store_true")
    args = parser.parse_args()
    os.makedirs(args.folder, exist_ok=True)
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(rank_main, (args, port, results), nprocs=args.ranks)
        found = dict(results)
    # The slowest rank of each round is what a training step would feel.
    stalls = [max(each) for each in zip(*(found[f"stall{rank}"] for rank in range(args.ranks)))]
    report = {
        "torch": torch.__version__,
        "dcp_save_seconds": statistics.median(found["dcp_save"]),
        "dcp_load_cold_seconds": statistics.median(found["dcp_load_cold"]),
        "dcp_async_stall_seconds": statistics.median(stalls),
    }
    saves = None if args.without_orbax else orbax(args)
    report["orbax_save_seconds"] = statistics.median(saves) if saves else None
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
