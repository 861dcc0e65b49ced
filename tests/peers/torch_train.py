"""The benchmark's peer: the same model and the same full training step in PyTorch on the CPU, in float32.

Install:  python3 -m venv venv && venv/bin/pip install torch numpy
Run:      venv/bin/python tests/peers/torch_train.py --threads 2 --seconds 20
          venv/bin/python tests/peers/torch_train.py --threads 1 --processes 2 --seconds 20

Model: Llama, width 256, 6 layers, 8 heads, feed-forward 768, vocabulary 256, tied embeddings; 16 sequences of 256 tokens
a step. The step is forward, backward, gradient clipping and AdamW (fused where this build has it). Attention is
scaled_dot_product_attention. Several micro-batch sizes are tried, plain and with torch.compile where it works, and the
best is reported: this script is meant to be as fast as PyTorch can be asked to be. With --processes 2 the gradients are
averaged by DistributedDataParallel over gloo. The last line is one JSON object: {"tokens_per_second": ...}.
"""

import argparse
import json
import os
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

DIM, LAYERS, HEADS, INNER, VOCABULARY, SEQUENCE, BATCH = 256, 6, 8, 768, 256, 256, 16


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(DIM))

    def forward(self, x):
        return F.rms_norm(x, (DIM,), self.weight, 1e-5)


def rotate(x, cosine, sine):
    low, high = x.chunk(2, -1)
    return x * cosine + torch.cat((-high, low), -1) * sine


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = Norm(), Norm()
        self.qkv = nn.Linear(DIM, 3 * DIM, bias=False)
        self.output = nn.Linear(DIM, DIM, bias=False)
        self.gate_up = nn.Linear(DIM, 2 * INNER, bias=False)
        self.down = nn.Linear(INNER, DIM, bias=False)

    def forward(self, x, cosine, sine):
        b, t, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, HEADS, DIM // HEADS).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, cosine, sine), rotate(k, cosine, sine)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output(a.transpose(1, 2).reshape(b, t, DIM))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, DIM)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = Norm()
        nn.init.normal_(self.embedding.weight, std=0.02)
        head = DIM // HEADS
        angle = torch.arange(SEQUENCE)[:, None] * 10000.0 ** (-torch.arange(0, head, 2) / head)
        self.register_buffer("cosine", torch.cat((angle, angle), -1).cos())
        self.register_buffer("sine", torch.cat((angle, angle), -1).sin())

    def forward(self, tokens, targets):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, self.cosine, self.sine)
        logits = F.linear(self.norm(x), self.embedding.weight)
        return F.cross_entropy(logits.view(-1, VOCABULARY), targets.view(-1))


def make_optimizer(model):
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    try:
        return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    except (RuntimeError, TypeError):
        return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))


def measure(seconds, micro, compiled, rank, processes):
    """Tokens per second of all processes, from the median step."""
    torch.manual_seed(1)
    model = Model()
    optimizer = make_optimizer(model)
    run = torch.compile(model) if compiled else model
    if processes > 1:
        run = nn.parallel.DistributedDataParallel(run)
    own = BATCH // processes
    data = torch.randint(VOCABULARY, (own, SEQUENCE + 1), generator=torch.Generator().manual_seed(rank))
    count = own // micro

    def step():
        optimizer.zero_grad(set_to_none=True)
        for i in range(count):
            part = data[i * micro : (i + 1) * micro]
            last = i + 1 == count
            if processes > 1 and not last:
                with run.no_sync():
                    (run(part[:, :-1], part[:, 1:].contiguous()) / count).backward()
            else:
                (run(part[:, :-1], part[:, 1:].contiguous()) / count).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    for _ in range(3):
        step()
    times = []
    # A fixed number of steps, agreed by all processes: a clock of each one's own would leave one waiting.
    begin = time.perf_counter()
    step()
    steps = torch.tensor([max(3, int(seconds / (time.perf_counter() - begin)))])
    if processes > 1:
        torch.distributed.broadcast(steps, 0)
    for _ in range(int(steps)):
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    times.sort()
    return BATCH * SEQUENCE / times[len(times) // 2], BATCH * SEQUENCE / times[0]


def work(rank, args):
    torch.set_num_threads(args.threads)
    if args.processes > 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(args.port))
        torch.distributed.init_process_group("gloo", rank=rank, world_size=args.processes)
    variants = [(m, False) for m in (2, 4, 8, 16) if m <= BATCH // args.processes]
    variants += [(m, True) for m in (4, 8, 16) if args.compile and m <= BATCH // args.processes]
    best = {"tokens_per_second": 0.0}
    for micro, compiled in variants:
        try:
            median, fastest = measure(args.seconds / len(variants), micro, compiled, rank, args.processes)
        except Exception as error:  # a build without a compiler, for example
            print(f"micro-batch {micro} compiled {compiled}: {str(error)[:200]}", file=sys.stderr)
            continue
        if rank == 0:
            print(f"micro-batch {micro} compiled {compiled}: median {median:.0f}, best {fastest:.0f}", file=sys.stderr)
        if median > best["tokens_per_second"]:
            best = {"tokens_per_second": round(median), "best_tokens_per_second": round(fastest), "micro_batch": micro,
                    "compiled": compiled, "threads": args.threads, "processes": args.processes,
                    "torch": torch.__version__}
    if rank == 0:
        print(json.dumps(best), flush=True)
    if args.processes > 1:
        torch.distributed.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description="PyTorch training speed on the CPU")
    parser.add_argument("--threads", type=int, default=2, help="threads of each process")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=30.0, help="measuring time of all variants together")
    parser.add_argument("--port", type=int, default=29517, help="rendezvous port with several processes")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    args = parser.parse_args()
    if args.processes == 1:
        work(0, args)
    else:
        torch.multiprocessing.spawn(work, (args,), nprocs=args.processes)


if __name__ == "__main__":
    main()
