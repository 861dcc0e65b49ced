"""The GPU benchmark's peer: a whole training step of GPT-2 124M in PyTorch, bfloat16, compiled.

Install:  python3 -m venv venv && venv/bin/pip install torch
Run:      venv/bin/python tests/peers/torch_gpu.py --batch 64 --sequence 1024 --seconds 30

The step is forward, backward, gradient clipping and fused AdamW on float32 master weights, as Cairn's is; products and
attention are bfloat16 by autocast, attention is scaled_dot_product_attention, the vocabulary is padded to 50,304. Micro-
batches of several sizes are tried, and the best is reported: this script is meant to be as fast as PyTorch can be asked
to be. The last line is one JSON object: {"tokens_per_second": ...}.
"""

import argparse
import json
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

DIM, LAYERS, HEADS, VOCABULARY, PADDED = 768, 12, 12, 50257, 50304


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.output = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.up, self.down = nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, DIM)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, HEADS, DIM // HEADS).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output(a.transpose(1, 2).reshape(b, t, DIM))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Model(nn.Module):
    def __init__(self, sequence):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(PADDED, DIM), nn.Embedding(sequence, DIM)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(DIM)
        for table in (self.embedding, self.positions):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, tokens, targets):
        x = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        logits = F.linear(self.norm(x), self.embedding.weight)
        return F.cross_entropy(logits.view(-1, PADDED).float(), targets.reshape(-1))


def measure(args, micro):
    """Tokens per second, from the median step."""
    torch.manual_seed(1)
    model = Model(args.sequence).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    run = torch.compile(model) if args.compile else model
    data = torch.randint(VOCABULARY, (args.batch, args.sequence + 1), device="cuda")
    count = args.batch // micro

    def step():
        optimizer.zero_grad(set_to_none=True)
        for part in data.split(micro):
            with torch.autocast("cuda", torch.bfloat16):
                loss = run(part[:, :-1], part[:, 1:]) / count
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        torch.cuda.synchronize()

    for _ in range(4):
        step()
    times, end = [], time.perf_counter() + args.seconds
    while time.perf_counter() < end or len(times) < 5:
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    times.sort()
    return args.batch * args.sequence / times[len(times) // 2]


def main():
    parser = argparse.ArgumentParser(description="PyTorch training speed on a GPU")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--sequence", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=30.0, help="measuring time of all variants together")
    parser.add_argument("--micro", type=int, nargs="+", default=[16, 32, 64], help="sizes of micro-batches to try")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    variants = [micro for micro in args.micro if args.batch % micro == 0] or [args.batch]
    args.seconds /= len(variants)
    best = {"tokens_per_second": 0}
    for micro in variants:
        try:
            rate = measure(args, micro)
        except Exception as error:  # too little memory, or no compiler
            print(f"micro-batch {micro}: {str(error)[:200]}", file=sys.stderr)
            continue
        finally:
            torch.cuda.empty_cache()
        print(f"micro-batch {micro}: {rate:.0f}", file=sys.stderr)
        if rate > best["tokens_per_second"]:
            best = {"tokens_per_second": round(rate), "micro_batch": micro, "compiled": args.compile,
                    "torch": torch.__version__, "device": torch.cuda.get_device_name()}
    print(json.dumps(best), flush=True)


if __name__ == "__main__":
    main()
