//! `cairn data prepare`: text in, indexed datasets out.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::args::{DataCommand, PrepareArgs};
use crate::failure::{Failure, chain};
use crate::table;

pub(crate) fn run(command: DataCommand) -> Result<u8, Failure> {
    let DataCommand::Prepare(args) = command;
    tokio::task::block_in_place(|| prepare(&args))
}

fn prepare(args: &PrepareArgs) -> Result<u8, Failure> {
    let wrong = |error: &dyn std::error::Error| Failure::request(chain(error));
    let tokenizer = worker::data::Tokenizer::from_name(&args.tokenizer).map_err(|error| wrong(&error))?;
    let total = args.files.iter().filter_map(|file| std::fs::metadata(file).ok()).map(|m| m.len()).sum();
    let target =
        if std::io::stderr().is_terminal() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    let bar = ProgressBar::with_draw_target(Some(total), target);
    if let Ok(style) = ProgressStyle::with_template("{bar:28} {bytes}/{total_bytes}  {bytes_per_sec}  {eta} left") {
        bar.set_style(style);
    }
    let reports = worker::data::prepare(&tokenizer, &args.files, &args.output, &mut |bytes| bar.inc(bytes))
        .map_err(|error| wrong(&error))?;
    bar.finish_and_clear();
    let rows: Vec<Vec<String>> = reports
        .iter()
        .map(|report| {
            vec![
                report.prefix.display().to_string(),
                report.documents.to_string(),
                report.tokens.to_string(),
                table::bytes(report.bytes),
            ]
        })
        .collect();
    table::print(&["DATASET", "DOCUMENTS", "TOKENS", "SIZE"], &rows);
    println!("vocabulary {}: set model.vocab_size to at least this", tokenizer.vocab_size());
    Ok(0)
}
