//! What the simulated job computes: a state that is a pure function of the specification and the step.
//!
//! A step adds up a number for each micro-batch, whoever computes it, and the sum decides the next state, as the exact
//! gradients of a real step do: a rank that is left out, counted twice or a step behind changes every later state. Of
//! the state's one number all bytes of all blocks follow; some blocks never change, as those of frozen parameters.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use checkpoint_store::{BlockHash, Digest, HashList, Space, StateDecl, state_digest};
use proto::spec::{JobSpec, Overrides};
use worker::load::scalar_state;

use super::random::{Random, mix};

/// Updates of the whole job.
pub(crate) const STEPS: u64 = 30;
/// Micro-batches of an update.
pub(crate) const MICRO_BATCHES: u64 = 12;
/// The states of the optimizer.
pub(crate) const STATES: [&str; 3] = ["param", "exp_avg", "exp_avg_sq"];

/// Three blocks of parameters, so that among four workers one owns none.
const JOB: &str = r#"
name = "sim"
[model]
architecture = "llama"
hidden_size = 64
num_hidden_layers = 1
num_attention_heads = 1
num_key_value_heads = 1
intermediate_size = 64
vocab_size = 2048
tie_word_embeddings = true
[data]
train = "/data/corpus"
[training]
steps = 30
sequence_length = 8
global_batch = 12
micro_batch = 1
validate_every = 0
seed = 7
[checkpoint]
store = "s3://simulated"
every_steps = 4
keep_last = 2
[resources]
workers = { min = 1, max = 4 }
device = "cpu"
[fault]
heartbeat = 0.5
suspicion = 3.0
collective = 6.0
hang = 15.0
restart = 20.0
grace = 5.0
restarts_without_progress = 1000
"#;

/// What differs between simulated jobs, none of which may show in what they compute.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    /// Steps between snapshots in the nodes' memory; 0: no memory tier.
    pub(crate) memory_every: u64,
    /// Steps between stored checkpoints.
    pub(crate) every_steps: u64,
    /// Nodes of a parity group that may be lost at once.
    pub(crate) parity: u64,
    /// Fewer workers than this and the job waits.
    pub(crate) least: u64,
    /// Milliseconds of a micro-batch.
    pub(crate) pace: u64,
}

impl Shape {
    /// One of many.
    pub(crate) fn draw(random: &mut Random) -> Self {
        Self {
            memory_every: if random.chance(650) { random.within(1, 3) } else { 0 },
            every_steps: random.within(3, 8),
            parity: random.within(1, 2),
            least: random.within(1, 2),
            // A few jobs go on for long after all is well.
            pace: if random.chance(125) { 250 } else { 40 },
        }
    }

    /// One with snapshots in memory whose steps take long, so that there is time between stored checkpoints.
    pub(crate) fn slow(random: &mut Random) -> Self {
        let shape = Self::draw(random);
        Self { memory_every: shape.memory_every.max(1), pace: 500, least: 2, ..shape }
    }
}

/// The job's specification.
pub(crate) fn job(shape: Shape) -> JobSpec {
    let Shape { memory_every, every_steps, parity, least, .. } = shape;
    let settings = [
        ("checkpoint.memory", (memory_every > 0).to_string()),
        ("checkpoint.memory_every", memory_every.to_string()),
        ("checkpoint.every_steps", every_steps.to_string()),
        ("checkpoint.parity", parity.to_string()),
        ("resources.workers", format!("{{ min = {least}, max = 4 }}")),
    ];
    let overrides: Overrides = settings.into_iter().map(|(key, value)| (key.to_string(), value)).collect();
    JobSpec::parse("the simulated job", JOB, std::path::Path::new("/"), &overrides).expect("the job file is right")
}

/// What a micro-batch adds to the sum of a step.
pub(crate) fn contribution(step: u64, micro: u64) -> u64 {
    mix(step.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ micro)
}

/// The state after a step, from the one before and the sum of all micro-batches.
pub(crate) fn advance(state: u64, sum: u64) -> u64 {
    mix(state ^ sum.rotate_left(17))
}

/// The word that fills a block.
fn word(number: u64, state: usize, block: u64) -> u32 {
    // Blocks of the second moment that lie first never change.
    let of = if state == 2 && block == 0 { 0 } else { number };
    mix(of ^ ((state as u64) << 32) ^ block) as u32
}

/// Everything that is known of the job in advance.
#[derive(Debug)]
pub(crate) struct Truth {
    pub(crate) space: Space,
    /// The state after each step.
    numbers: Vec<u64>,
    digests: Vec<Digest>,
    hashes: Mutex<HashMap<(u32, u64), BlockHash>>,
}

impl Truth {
    /// The one job of all simulations.
    pub(crate) fn get() -> Arc<Self> {
        static TRUTH: OnceLock<Arc<Truth>> = OnceLock::new();
        TRUTH.get_or_init(|| Arc::new(Self::compute())).clone()
    }

    fn compute() -> Self {
        let spec = job(Shape { memory_every: 0, every_steps: 1, parity: 1, least: 1, pace: 0 });
        let space = Space::of_model(&spec.model).expect("the model has a space");
        let mut truth = Self { space, numbers: vec![mix(1)], digests: vec![], hashes: Mutex::default() };
        for step in 1..=STEPS {
            let sum = (0..MICRO_BATCHES).fold(0u64, |sum, micro| sum.wrapping_add(contribution(step, micro)));
            truth.numbers.push(advance(truth.numbers[step as usize - 1], sum));
        }
        for step in 0..=STEPS {
            let blocks = 0..truth.space.blocks();
            let hashes: Vec<_> =
                (0..STATES.len()).map(|state| truth.hashes(truth.number(step), state, blocks.clone())).collect();
            let scalar = scalar_state(&spec, step, &[]);
            truth.digests.push(state_digest(&scalar, &truth.space, &StateDecl::adamw(), &hashes));
        }
        truth
    }

    /// The state after a step.
    pub(crate) fn number(&self, step: u64) -> u64 {
        self.numbers[step as usize]
    }

    /// The digest of the state after a step; `None` beyond the end.
    pub(crate) fn digest(&self, step: u64) -> Option<Digest> {
        self.digests.get(step as usize).copied()
    }

    /// The hashes of some blocks of one state.
    pub(crate) fn hashes(&self, number: u64, state: usize, blocks: Range<u64>) -> HashList {
        let mut known = self.hashes.lock().unwrap_or_else(PoisonError::into_inner);
        let hash = |block: u64| {
            let elements = self.space.blocks_to_elements(block..block + 1);
            let key = (word(number, state, block), elements.end - elements.start);
            *known.entry(key).or_insert_with(|| BlockHash::of(&key.0.to_le_bytes().repeat(key.1 as usize)))
        };
        HashList(blocks.map(hash).collect())
    }

    /// The bytes of some blocks of one state.
    pub(crate) fn fill(&self, number: u64, state: usize, blocks: Range<u64>, out: &mut Vec<u8>) {
        for block in blocks {
            let elements = self.space.blocks_to_elements(block..block + 1);
            let word = word(number, state, block).to_le_bytes();
            out.extend(word.iter().copied().cycle().take(4 * (elements.end - elements.start) as usize));
        }
    }

    /// The bytes of a shard: its blocks of one state after the other.
    pub(crate) fn shard(&self, number: u64, blocks: Range<u64>) -> Vec<u8> {
        let mut out = vec![];
        (0..STATES.len()).for_each(|state| self.fill(number, state, blocks.clone(), &mut out));
        out
    }
}
