"""The recovery benchmark's peer: torchrun restarts a job of three agents with one worker each after a SIGKILL.

Install:  python3 -m venv venv && venv/bin/pip install torch numpy
Run:      venv/bin/python tests/peers/torchrun_recovery.py --folder /dev/shm/some-folder --rounds 5

Each worker holds 64 MiB of state (float32) and writes it to a folder in memory at every step, which is the cheapest
checkpoint torchrun can be given; a step is an all-reduce of a third of it over gloo. After a kill, the time counts until
all ranks have loaded their state and begin their first step. torchrun's timeouts are its defaults. The last line is one
JSON object: {"worker": [seconds, ...], "node": [seconds, ...]}.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time

WORLD = 3
STATE = 64 << 20


def worker(folder):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    path = os.path.join(folder, f"state-{rank}.pt")
    step, state = 0, torch.zeros(STATE // 4)
    if os.path.exists(path):
        saved = torch.load(path)
        step, state = saved["step"], saved["state"]
    # The ranks go on from the oldest step that one of them has.
    oldest = torch.tensor([step])
    dist.all_reduce(oldest, op=dist.ReduceOp.MIN)
    step = int(oldest.item())
    dist.barrier()
    with open(os.path.join(folder, f"begun-{rank}-{os.getpid()}"), "w") as file:
        file.write(f"{time.time()} {dist.get_world_size()}")
    while True:
        part = state[: len(state) // WORLD]
        dist.all_reduce(part)
        part.zero_()
        step += 1
        torch.save({"step": step, "state": state}, path + ".new")
        os.replace(path + ".new", path)
        with open(os.path.join(folder, f"step-{rank}"), "w") as file:
            file.write(str(step))


def begun(folder, since):
    """When all ranks had begun anew, if they have."""
    times = {}
    for name in os.listdir(folder):
        if name.startswith("begun-"):
            try:
                at, _ = open(os.path.join(folder, name)).read().split()
            except (ValueError, OSError):
                continue
            rank = name.split("-")[1]
            times[rank] = max(times.get(rank, 0.0), float(at))
    after = [at for at in times.values() if at > since]
    return max(after) if len(after) == WORLD else None


def steps(folder):
    found = []
    for rank in range(WORLD):
        try:
            found.append(int(open(os.path.join(folder, f"step-{rank}")).read() or 0))
        except (ValueError, OSError):
            return 0
    return min(found)


def wait(what, seconds):
    until = time.time() + seconds
    while time.time() < until:
        found = what()
        if found:
            return found
        time.sleep(0.01)
    return None


def children(pid):
    try:
        return [int(p) for p in open(f"/proc/{pid}/task/{pid}/children").read().split()]
    except OSError:
        return []


def agent(folder, port):
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", f"{WORLD}:{WORLD}", "--nproc-per-node", "1"]
    command += ["--max-restarts", "1000", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    command += ["--rdzv-id", "recovery", __file__, "--folder", folder, "--worker"]
    quiet = dict(os.environ, GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1", TORCHELASTIC_ERROR_FILE="")
    return subprocess.Popen(command, env=quiet, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def settle(folder):
    first = steps(folder)
    return wait(lambda: steps(folder) >= first + 3, 120)


def main(folder, rounds, port):
    agents = [agent(folder, port) for _ in range(WORLD)]
    times = {"worker": [], "node": []}
    try:
        if not wait(lambda: begun(folder, 0.0), 120):
            raise SystemExit("torchrun did not start")
        for turn in range(rounds):
            settle(folder)
            victim = children(agents[1 + turn % 2].pid)[-1]
            since = time.time()
            os.kill(victim, signal.SIGKILL)
            back = wait(lambda: begun(folder, since), 180)
            if back is None:
                break
            times["worker"].append(back - since)
        # Not the first agent, which hosts the rendezvous: without it the job is lost. The lost one is started again at
        # once, as a supervisor would.
        for turn in range(min(rounds, 3)):
            settle(folder)
            at = 1 + turn % 2
            workers = children(agents[at].pid)
            since = time.time()
            for pid in [agents[at].pid, *workers]:
                os.kill(pid, signal.SIGKILL)
            agents[at].wait()
            agents[at] = agent(folder, port)
            back = wait(lambda: begun(folder, since), 180)
            if back is None:
                break
            times["node"].append(back - since)
    finally:
        for process in agents:
            for pid in [*children(process.pid), process.pid]:
                try:
                    os.kill(pid, signal.SIGKILL)
                except OSError:
                    pass
            process.wait()
    print(json.dumps(times))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--port", type=int, default=29611)
    parser.add_argument("--worker", action="store_true")
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.folder)
    else:
        main(arguments.folder, arguments.rounds, arguments.port)
