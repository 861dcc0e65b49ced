//! `cairn bench collective`: the workers' exchange by operation, size and world, beside gloo if asked.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;

use clap::Args;
use serde_json::{Value, json};
use worker::bench_collective::{Operation, bench_collective};

use crate::args::Output;
use crate::failure::{Failure, chain};
use crate::size;
use crate::table::{self, say};

/// The smallest and the largest buffer.
const SIZES: (u64, u64) = (64, 1 << 30);

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cairn bench collective
  cairn bench collective --world 2,4 --sizes 4KiB,1MiB,64MiB
  cairn bench collective --peer --python venv/bin/python --output json

ALGORITHM is the buffer's bytes over the time, BUS what each link must carry at the least, over the time: what does not
depend on the number of ranks. All ranks run on this machine and share its cores. --peer runs tests/peers/gloo.py
(pip install torch) in turn with Cairn.")]
pub(crate) struct BenchCollectiveArgs {
    /// Numbers of ranks.
    #[arg(long, value_delimiter = ',', default_value = "2,3", value_parser = clap::value_parser!(u32).range(1..=64))]
    world: Vec<u32>,
    /// Bytes of each rank's buffer.
    #[arg(long, value_delimiter = ',', default_value = "4KiB,64KiB,1MiB,16MiB,64MiB", value_parser = size::parse)]
    sizes: Vec<u64>,
    /// Measurements of each kind; medians count.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Also measure gloo, in turn.
    #[arg(long)]
    peer: bool,
    /// The Python that has PyTorch.
    #[arg(long, default_value = "python3", env = "CAIRN_PYTHON")]
    python: PathBuf,
    /// The peer script.
    #[arg(long, default_value = "tests/peers/gloo.py", requires = "peer")]
    script: PathBuf,
    /// What standard output carries.
    #[arg(long, value_enum, default_value = "text")]
    output: Output,
}

/// Seconds of each round, by operation and bytes.
type Rounds = BTreeMap<(&'static str, u64), Vec<f64>>;

pub(crate) fn run(args: &BenchCollectiveArgs) -> Result<u8, Failure> {
    let sizes = sizes(args)?;
    for &world in &args.world {
        let (mut ours, mut theirs) = (Rounds::new(), Rounds::new());
        for _ in 0..args.rounds {
            let measured = bench_collective(world as usize, &sizes, &Operation::ALL)
                .map_err(|error| Failure::job(chain(&error)))?;
            for of in measured {
                ours.entry((of.operation.name(), of.bytes as u64)).or_default().push(of.seconds);
            }
            // One rank alone has nobody to exchange with.
            if args.peer && world > 1 {
                peer(args, world, &sizes, &mut theirs)?;
            }
        }
        show(args, world, &sizes, &mut ours, &mut theirs);
    }
    Ok(0)
}

/// The sizes asked for, in bytes of whole 64-bit words.
fn sizes(args: &BenchCollectiveArgs) -> Result<Vec<usize>, Failure> {
    let refuse = |size: &u64| {
        let (least, most) = (size::show(SIZES.0), size::show(SIZES.1));
        Failure::request(format!("--sizes has {}, but must be from {least} to {most}", size::show(*size)))
    };
    let bytes = |size: &u64| {
        let usable = (SIZES.0..=SIZES.1).contains(size);
        if usable { Ok(*size as usize / 8 * 8) } else { Err(refuse(size)) }
    };
    args.sizes.iter().map(bytes).collect()
}

/// One round of gloo.
fn peer(args: &BenchCollectiveArgs, world: u32, sizes: &[usize], into: &mut Rounds) -> Result<(), Failure> {
    let list: Vec<String> = sizes.iter().map(ToString::to_string).collect();
    let output = Command::new(&args.python)
        .arg(&args.script)
        .args(["--world", &world.to_string(), "--sizes", &list.join(","), "--port", &free_port()?.to_string()])
        .output()
        .map_err(|error| Failure::request(format!("cannot run the peer with {}: {error}", args.python.display())))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let mut any = false;
    for line in text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
        let known = Operation::ALL.iter().find(|operation| line["operation"] == operation.name());
        if let (Some(operation), Some(bytes), Some(seconds)) = (known, line["bytes"].as_u64(), line["seconds"].as_f64())
        {
            into.entry((operation.name(), bytes)).or_default().push(seconds);
            any = true;
        }
    }
    if any {
        return Ok(());
    }
    let error = String::from_utf8_lossy(&output.stderr);
    let last = error.lines().last().unwrap_or_default();
    Err(Failure::request(format!("the peer did not run (install it with: pip install torch): {last}")))
}

fn free_port() -> Result<u16, Failure> {
    let bound = std::net::TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    Ok(bound.map_err(|error| Failure::job(format!("no port for the peer: {error}")))?.port())
}

fn show(args: &BenchCollectiveArgs, world: u32, sizes: &[usize], ours: &mut Rounds, theirs: &mut Rounds) {
    let mut rows = Vec::new();
    for operation in Operation::ALL {
        for &bytes in sizes {
            let key = (operation.name(), bytes as u64);
            let Some(mine) = ours.get_mut(&key).and_then(|rounds| median(rounds)) else { continue };
            let peer = theirs.get_mut(&key).and_then(|rounds| median(rounds));
            let algorithm = bytes as f64 / mine / 1e9;
            let bus = algorithm * operation.share(world as usize);
            if args.output == Output::Json {
                say!(
                    "{}",
                    json!({
                        "event": "bench_collective", "world": world, "operation": operation.name(), "bytes": bytes,
                        "seconds": mine, "algorithm_gb_per_second": algorithm, "bus_gb_per_second": bus,
                        "peer_seconds": peer, "speedup": peer.map(|peer| peer / mine),
                    })
                );
                continue;
            }
            let mut row = vec![operation.name().to_string(), size::show(bytes as u64), format!("{:.3} ms", mine * 1e3)];
            row.extend([format!("{algorithm:.2} GB/s"), format!("{bus:.2} GB/s")]);
            if args.peer {
                row.push(peer.map_or("-".into(), |peer| format!("{:.3} ms", peer * 1e3)));
                row.push(peer.map_or("-".into(), |peer| format!("{:.2}", peer / mine)));
            }
            rows.push(row);
        }
    }
    if args.output == Output::Json {
        return;
    }
    say!("{world} ranks on loopback, each a thread; median of {} rounds", args.rounds);
    let mut head = vec!["OPERATION", "BYTES", "TIME", "ALGORITHM", "BUS"];
    if args.peer {
        head.extend(["GLOO", "TIMES FASTER"]);
    }
    table::print(&head, &rows);
    say!();
}

fn median(values: &mut [f64]) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}
