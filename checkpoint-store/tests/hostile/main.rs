//! Every kind of input from outside, under attack: seeds from `fuzz/seeds` and thousands of inputs made from them.
//!
//! These are the fuzz targets of `fuzz/`, run without a fuzzer so that every change meets them. What holds for each
//! input: no panic, memory within a bound proportional to the input, and what was accepted keeps the library's rules.

#[macro_use]
mod harness;
mod written;

use checkpoint_store::hostile;
use harness::{Allowance, Counting};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// A few kilobytes for messages and tables, and what a parsed byte may become: `{},` is three bytes and a structure.
const USUAL: Allowance = Allowance { fixed: 64 << 10, each: 64 };

targets! {
    capture: USUAL, 100_000;
    header: USUAL, 100_000;
    leader: USUAL, 100_000;
    manifest: USUAL, 100_000;
    nodes: USUAL, 100_000;
    path: USUAL, 200_000;
    receipt: USUAL, 100_000;
    record: USUAL, 100_000;
    // A short file may describe a model of 4096 layers, whose tensors are then listed.
    specification: Allowance { fixed: 24 << 20, each: 512 }, 50_000;
    url: USUAL, 200_000;
}
