"""What losing a worker costs under torchrun: three workers, the model of examples/recovery.toml.

    python tests/peers/torchrun_recovery.py [--rounds 5]

Needs torch. Three workers train 16.8 million float32 parameters with DistributedDataParallel over gloo; rank 0 writes
parameters and AdamW state to the memory file system every five steps. Again and again one worker is killed with
SIGKILL; the time counts from the signal to the start of the first step after torchrun has started all workers anew and
they have loaded the state. Prints the seconds of each round and their median.
"""

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time

WORKERS = 3
SAVE_EVERY = 5


def model():
    """As many parameters in matrices of the same shapes; what they compute does not matter to a restart."""
    import torch.nn as nn

    class Block(nn.Module):
        def __init__(self, width, inner):
            super().__init__()
            self.norm = nn.LayerNorm(width, bias=False)
            self.attention = nn.Linear(width, 4 * width, bias=False)
            self.gate = nn.Linear(width, inner, bias=False)
            self.up = nn.Linear(width, inner, bias=False)
            self.down = nn.Linear(inner, width, bias=False)

        def forward(self, x):
            y = self.norm(x)
            y = self.attention(y).view(*y.shape, 4).sum(-1)
            return x + y + self.down(nn.functional.silu(self.gate(y)) * self.up(y))

    return nn.Sequential(nn.Embedding(256, 384), *[Block(384, 1096) for _ in range(9)], nn.Linear(384, 256, bias=False))


def work(folder):
    """One worker's life: load what there is, and train until killed."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    # A place to meet for each start: in torchrun's own store gloo finds the addresses of the workers before (PyTorch 2.15).
    rank, again = int(os.environ["RANK"]), os.environ["TORCHELASTIC_RESTART_COUNT"]
    meet = f"file://{os.path.abspath(folder)}/meet-{again}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=int(os.environ["WORLD_SIZE"]))
    torch.manual_seed(1)
    net = DistributedDataParallel(model())
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    path, step = os.path.join(folder, "state.pt"), 0
    if os.path.exists(path):
        saved = torch.load(path)
        net.module.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
    tokens = torch.randint(0, 256, (1, 33))
    while True:
        step += 1
        if rank == 0:
            with open(os.path.join(folder, "steps"), "a", encoding="ascii") as log:
                log.write(f"{time.monotonic()} {os.getpid()} {step}\n")
        loss = torch.nn.functional.cross_entropy(net(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0 and step % SAVE_EVERY == 0:
            state = {"model": net.module.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(state, path + ".new")
            os.replace(path + ".new", path)


def last_step(folder):
    """When and by which process the newest step was begun; its number."""
    try:
        with open(os.path.join(folder, "steps"), encoding="ascii") as log:
            lines = log.read().split("\n")
    except FileNotFoundError:
        return None
    words = lines[-2].split() if len(lines) > 1 else []
    return (float(words[0]), int(words[1]), int(words[2])) if len(words) == 3 else None


def wait_for(folder, what, seconds=120):
    """The newest step once `what` holds of it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        newest = last_step(folder)
        if newest and what(newest):
            return newest
        time.sleep(0.005)
    sys.exit(f"torchrun's workers took no such step within {seconds} s; the newest is {last_step(folder)}")


def workers_of(launcher):
    """The process ids of torchrun's workers."""
    listed = subprocess.run(["pgrep", "-P", str(launcher)], capture_output=True, text=True, check=False)
    return [int(word) for word in listed.stdout.split()]


def measure(rounds):
    """Kills a worker in each round; the seconds until the next first step."""
    taken = []
    shm = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=shm) as folder:
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes=1"]
        words += [f"--nproc-per-node={WORKERS}", "--max-restarts=1000", os.path.abspath(__file__), "--work", folder]
        environment = dict(os.environ, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
        log = open(os.path.join(folder, "log"), "w", encoding="utf-8")
        launcher = subprocess.Popen(words, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            for _ in range(rounds):
                _, before, first = wait_for(folder, lambda newest: True)
                wait_for(folder, lambda newest: newest[2] >= first + 2 * SAVE_EVERY)
                began = time.monotonic()
                os.kill(random.choice(workers_of(launcher.pid)), signal.SIGKILL)
                at, _, _ = wait_for(folder, lambda newest: newest[1] != before)
                taken.append(at - began)
        finally:
            launcher.terminate()
            launcher.wait(60)
            log.close()
    return taken


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work)
        return
    import torch

    seconds = sorted(measure(arguments.rounds))
    listed = " ".join(f"{each:.2f}" for each in seconds)
    print(f"torchrun {torch.__version__}, a worker killed → the next first step: "
          f"median {statistics.median(seconds):.2f} s ({listed})", flush=True)


if __name__ == "__main__":
    main()
