//! `cairn bench store --capture`: how long a capture at every step holds the training thread.

use serde_json::json;
use worker::bench_capture::CaptureReport;

use crate::args::{BenchStoreArgs, Output};
use crate::failure::{Failure, chain};
use crate::size;
use crate::table::{self, say};

/// Seconds of training.
const SECONDS: f64 = 60.0;

pub(crate) fn run(args: &BenchStoreArgs) -> Result<u8, Failure> {
    let workers = args.ranks.unwrap_or(1);
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let threads = (cores / workers as usize).max(1);
    let report = worker::bench_capture::bench_capture(args.size, threads, workers as usize, SECONDS)
        .map_err(|error| Failure::job(chain(&error)))?;
    print(&report, args.output);
    Ok(0)
}

/// Shows what was measured.
pub(crate) fn print(report: &CaptureReport, output: Output) {
    if output == Output::Json {
        say!("{}", json!({"event": "bench_capture", "report": report}));
        return;
    }
    say!(
        "{} of state a worker ({} parameters in all), {} workers, a snapshot at every step",
        size::show(report.state_bytes),
        report.parameters,
        report.workers
    );
    say!(
        "captured {} of {} steps, skipped {}; {} computed twice as a gradient outgrew its grid",
        report.captured,
        report.steps,
        report.skipped,
        report.again
    );
    let milliseconds = |seconds: f64| format!("{:.2} ms", seconds * 1e3);
    let rows = [
        ("training thread held, median", milliseconds(report.held_median)),
        ("training thread held, p99", milliseconds(report.held_p99)),
        ("share of a step, median", format!("{:.3} %", 100.0 * report.held_median / report.step_median)),
        ("a step with captures, median", milliseconds(report.step_median)),
        ("a step without, median", milliseconds(report.step_without)),
        ("hashing in the background, median", milliseconds(report.hash_median)),
    ];
    let rows: Vec<Vec<String>> = rows.into_iter().map(|(what, value)| vec![what.into(), value]).collect();
    table::print(&["WHAT", "VALUE"], &rows);
}
