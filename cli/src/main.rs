//! `cairn`: one binary that plays every part.
//!
//! `cairn train` runs a whole job on one machine; `coordinator`, `agent` and `worker` are the parts it is made of, and
//! the same ones a cluster starts by hand. The other subcommands talk to a coordinator or read a store. One file for
//! each subcommand; what they share is in `client`, `render` and `failure`.

mod args;
mod bench;
mod bench_capture;
mod bench_collective;
mod bench_coordinator;
mod bench_store;
mod bench_synthetic;
mod certs;
mod checkpoint;
mod client;
mod data;
mod doctor;
mod failure;
mod incidents;
mod jobs;
mod nodes;
mod parts;
mod render;
mod size;
mod supervise;
mod table;
mod train;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;

use args::{Cairn, Command};
use failure::Failure;

fn main() -> ExitCode {
    let cairn = match Cairn::try_parse() {
        Ok(cairn) => cairn,
        Err(error) => {
            // Help and version are answers, not errors; anything else is a wrong request.
            let code = if error.use_stderr() { failure::WRONG_REQUEST } else { 0 };
            let _ = error.print();
            return ExitCode::from(code);
        }
    };
    start_logging(&cairn);
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return report(&Failure::job(format!("cannot start the async runtime: {error}"))),
    };
    let outcome = runtime.block_on(dispatch(cairn.command));
    // A reader of standard input cannot be cancelled; do not wait for it.
    runtime.shutdown_background();
    match outcome {
        Ok(code) => ExitCode::from(code),
        Err(failure) => report(&failure),
    }
}

fn report(failure: &Failure) -> ExitCode {
    eprintln!("cairn: {failure}");
    ExitCode::from(failure.code())
}

/// Logs go to standard error, so that standard output stays for results.
fn start_logging(cairn: &Cairn) {
    let filter = EnvFilter::try_from_env("CAIRN_LOG")
        .unwrap_or_else(|_| EnvFilter::new(if cairn.verbose { "info" } else { "warn" }));
    let colour = std::io::stderr().is_terminal();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(colour)
        .with_target(false)
        .init();
}

async fn dispatch(command: Command) -> Result<u8, Failure> {
    match command {
        Command::Train(args) => train::run(args).await,
        Command::Coordinator(args) => parts::coordinator(args).await,
        Command::Agent(args) => parts::agent(args).await,
        Command::Worker(args) => parts::worker(args),
        Command::Submit(args) => jobs::submit(args).await,
        Command::Jobs(args) => jobs::list(args).await,
        Command::Status(args) => jobs::status(args).await,
        Command::Watch(args) => jobs::watch(args).await,
        Command::Scale(args) => jobs::scale(args).await,
        Command::Pause(args) => jobs::pause(args).await,
        Command::Resume(args) => jobs::resume(args).await,
        Command::Cancel(args) => jobs::cancel(args).await,
        Command::Incidents(args) => incidents::show(args).await,
        Command::Nodes(args) => nodes::list(args).await,
        Command::Drain(args) => nodes::drain(args).await,
        Command::Undrain(args) => nodes::undrain(args).await,
        Command::Checkpoint(command) => checkpoint::run(command).await,
        Command::Certs(command) => certs::run(command),
        Command::Data(command) => data::run(command),
        Command::Doctor(args) => doctor::run(args).await,
        Command::Bench(command) => bench::run(command).await,
    }
}
