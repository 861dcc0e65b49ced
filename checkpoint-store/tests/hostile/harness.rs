//! Hostile bytes without a fuzzer: a seeded mutator over the seeds in `fuzz/seeds`, and an allocator that counts.
//!
//! A run is a pure function of its seed, which is printed. `CAIRN_HOSTILE_SEED` sets it, `CAIRN_HOSTILE_ROUNDS` the
//! number of inputs a target gets. A failure prints the input, ready to become a seed.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

/// A test for each target of a room's `hostile`, and one that none is missing.
macro_rules! targets {
    ($($name:ident: $allowance:expr, $rounds:expr;)*) => {
        $(
            #[test]
            fn $name() {
                $crate::harness::withstand(stringify!($name), hostile::$name, $allowance, $rounds);
            }
        )*

        #[test]
        fn none_is_forgotten() {
            let tested = [$(stringify!($name)),*];
            assert_eq!(tested.to_vec(), hostile::TARGETS.map(|(name, _)| name).to_vec());
        }
    };
}

/// The system's allocator, with a count of what the thread holds and the most it ever held.
pub(crate) struct Counting;

thread_local! {
    static HELD: Cell<(usize, usize)> = const { Cell::new((0, 0)) };
}

fn count(change: impl FnOnce(usize) -> usize) {
    // No destructor runs on these cells, so they can be reached whenever a thread allocates.
    HELD.with(|held| {
        let (now, most) = held.get();
        let now = change(now);
        held.set((now, most.max(now)));
    });
}

// SAFETY: every call goes to the system's allocator as it came; the count beside it touches no memory of the caller.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(|now| now.saturating_add(layout.size()));
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(|now| now.saturating_add(layout.size()));
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        count(|now| now.saturating_sub(layout.size()));
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(place, layout) }
    }

    unsafe fn realloc(&self, place: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // While it moves, both are there.
        count(|now| now.saturating_add(size));
        count(|now| now.saturating_sub(layout.size()));
        // SAFETY: the caller's promise is passed on.
        unsafe { System.realloc(place, layout, size) }
    }
}

/// Runs something and returns the most memory it held at once on this thread.
fn measured<T>(work: impl FnOnce() -> T) -> (T, usize) {
    let (before, _) = HELD.get();
    HELD.set((before, before));
    let out = work();
    (out, HELD.get().1 - before)
}

/// A small generator of the project's own: SplitMix64 (Steele, Lea and Flood, 2014).
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }
}

/// Words that have broken parsers before.
const WORDS: [&str; 30] = [
    "0",
    "-1",
    "1",
    "-0",
    "255",
    "256",
    "65536",
    "4294967295",
    "4294967296",
    "281474976710656",
    "9223372036854775807",
    "-9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "1e999",
    "1e-400",
    "0.1",
    "NaN",
    "null",
    "true",
    "{}",
    "[]",
    "\"\"",
    "\"\\u0000\"",
    "\"\\ud800\"",
    "../../etc/passwd",
    "%2e%2e/",
    "\u{feff}",
    "\\",
    "//",
];

/// The longest input: room for nesting and repetition, and still thousands of inputs a second.
const MOST: usize = 256 << 10;

fn number(rng: &mut Rng, bytes: &mut Vec<u8>) {
    let digits: Vec<usize> = (0..bytes.len()).filter(|&at| bytes[at].is_ascii_digit()).collect();
    if digits.is_empty() {
        return;
    }
    let start = *rng.pick(&digits);
    let end = (start..bytes.len()).find(|&at| !bytes[at].is_ascii_digit()).unwrap_or(bytes.len());
    let word = rng.pick(&WORDS).as_bytes().to_vec();
    bytes.splice(start..end, word);
}

/// One change of a text or of binary data.
fn change(rng: &mut Rng, bytes: &mut Vec<u8>, others: &[Vec<u8>]) {
    let at = rng.below(bytes.len() + 1);
    let end = at + rng.below((bytes.len() - at + 1).min(64));
    match rng.below(11) {
        0 => bytes.truncate(at),
        1 => drop(bytes.drain(at..end)),
        2 => {
            let word = rng.pick(&WORDS).as_bytes().to_vec();
            bytes.splice(at..end, word);
        }
        3 | 4 => number(rng, bytes),
        5 => {
            let other = rng.pick(others);
            let from = rng.below(other.len() + 1);
            let until = from + rng.below(other.len() - from + 1);
            bytes.splice(at..end, other[from..until].iter().copied());
        }
        6 => {
            let open = *rng.pick(&["[", "{\"a\":", "\"", "(", "[[", "a = {b = "]);
            bytes.splice(at..at, open.repeat(1 << rng.below(15)).into_bytes());
        }
        7 => {
            let again = bytes[at..end].repeat(1 << rng.below(12));
            bytes.splice(at..at, again);
        }
        8 if bytes.len() >= 8 => {
            let at = rng.below(bytes.len() - 7);
            let word = *rng.pick(&[0, 1, u64::MAX, 1 << 63, 1 << 31, u64::from(u32::MAX), 8]);
            bytes[at..at + 8].copy_from_slice(&word.to_le_bytes());
        }
        9 => bytes.push(rng.next() as u8),
        _ => {
            if let Some(byte) = bytes.get_mut(at) {
                *byte = if rng.below(2) == 0 { rng.next() as u8 } else { *byte ^ (1 << rng.below(8)) };
            }
        }
    }
    bytes.truncate(MOST);
}

/// The memory a target may take: so many bytes, and so many for each byte of its input.
#[derive(Clone, Copy)]
pub(crate) struct Allowance {
    pub(crate) fixed: usize,
    pub(crate) each: usize,
}

fn setting(name: &str, default: u64) -> u64 {
    let set = std::env::var(name).ok();
    set.map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number")))
}

/// Gives a target every seed and thousands of inputs made from them.
pub(crate) fn attack(name: &str, target: fn(&[u8]) -> bool, seeds: &[Vec<u8>], allowance: Allowance, rounds: u64) {
    let seed = setting("CAIRN_HOSTILE_SEED", 1);
    let rounds = setting("CAIRN_HOSTILE_ROUNDS", rounds);
    println!("{name}: seed {seed}, {rounds} inputs from {} seeds", seeds.len());
    let mut rng =
        Rng(seed ^ name.bytes().fold(0, |hash: u64, byte| hash.wrapping_mul(131).wrapping_add(u64::from(byte))));
    let (mut accepted, mut most) = (0, 0);
    for round in 0..rounds {
        let mut bytes = rng.pick(seeds).clone();
        for _ in 0..=rng.below(4) {
            change(&mut rng, &mut bytes, seeds);
        }
        let (outcome, held) = measured(|| catch_unwind(AssertUnwindSafe(|| target(&bytes))));
        let shown = || bytes.iter().take(2_000).map(|byte| byte.escape_ascii().to_string()).collect::<String>();
        let Ok(yes) = outcome else { panic!("{name}, seed {seed}, input {round} panicked: {}", shown()) };
        accepted += u64::from(yes);
        let allowed = allowance.fixed + allowance.each * bytes.len();
        most = most.max(held.saturating_sub(allowance.fixed) / bytes.len().max(1));
        assert!(
            held <= allowed,
            "{name}, seed {seed}, input {round} took {held} bytes for {}: {}",
            bytes.len(),
            shown()
        );
    }
    println!("{name}: {accepted} accepted; at most {} bytes and {most} for each byte of input", allowance.fixed);
}

/// The folder of a target's seeds.
pub(crate) fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds").join(name)
}

/// A target's seeds on disk: those that are to be accepted, and those that are to be refused.
pub(crate) fn seeds(name: &str) -> (Vec<Vec<u8>>, Vec<Vec<u8>>) {
    let (mut valid, mut hostile) = (vec![], vec![]);
    let folder = folder(name);
    let entries = std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    for path in paths {
        let bytes = std::fs::read(&path).unwrap();
        let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        match file.split('-').next() {
            Some("valid") => valid.push(bytes),
            Some("hostile") => hostile.push(bytes),
            _ => panic!("{}: a seed is named valid-… or hostile-…", path.display()),
        }
    }
    (valid, hostile)
}

/// Every seed is what its name says, and no input made from the seeds does harm.
pub(crate) fn withstand(name: &str, target: fn(&[u8]) -> bool, allowance: Allowance, rounds: u64) {
    let (valid, hostile) = seeds(name);
    assert!(!valid.is_empty() && !hostile.is_empty(), "{name} has seeds of both kinds");
    for (bytes, wanted) in valid.iter().map(|b| (b, true)).chain(hostile.iter().map(|b| (b, false))) {
        let (found, held) = measured(|| target(bytes));
        let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(300)]);
        assert_eq!(found, wanted, "{name}: {shown}");
        let allowed = allowance.fixed + allowance.each * bytes.len();
        assert!(held <= allowed, "{name} took {held} bytes for {}: {shown}", bytes.len());
    }
    // Half of the inputs begin as valid ones: those go deepest.
    let again = hostile.len().div_ceil(valid.len());
    let all: Vec<_> = valid.iter().cycle().take(valid.len() * again).chain(&hostile).cloned().collect();
    attack(name, target, &all, allowance, rounds);
}

/// The mutator and the allocator do what they are for.
#[test]
fn a_panic_and_a_glutton_are_caught() {
    let seeds = [b"{\"a\": 1}".to_vec(), b"[1, 2, 3]".to_vec()];
    let small = Allowance { fixed: 1 << 10, each: 1 };
    let panics: fn(&[u8]) -> bool = |bytes| {
        assert!(!bytes.windows(4).any(|w| w == b"1e99"), "planted");
        true
    };
    let takes: fn(&[u8]) -> bool =
        |bytes| bytes.contains(&b'2') && std::hint::black_box(Vec::<u8>::with_capacity(1 << 20)).is_empty();
    for target in [panics, takes] {
        let caught = catch_unwind(|| attack("planted", target, &seeds, small, 5_000));
        let reason = caught.expect_err("the planted fault is found");
        let text = reason.downcast_ref::<String>().cloned().unwrap_or_default();
        assert!(text.contains("panicked") || text.contains("took 1048576 bytes"), "{text}");
    }
}
