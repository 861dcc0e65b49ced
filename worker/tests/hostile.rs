//! What comes to a worker from its data files and from the ring's port, under attack; see the harness.

#[macro_use]
#[path = "../../checkpoint-store/tests/hostile/harness.rs"]
mod harness;

use harness::{Allowance, Counting};
use worker::hostile;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const USUAL: Allowance = Allowance { fixed: 64 << 10, each: 64 };

targets! {
    dataset: USUAL, 30_000;
    frame: USUAL, 30_000;
    greeting: USUAL, 30_000;
}
