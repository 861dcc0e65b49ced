//! `cairn data prepare`: text in, indexed datasets out.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use worker::data::Tokenizer;
use worker::data::prepare::PrepareOptions;

use crate::args::{DataCommand, PrepareArgs};
use crate::failure::{Failure, chain};
use crate::table::{self, say};

pub(crate) fn run(command: DataCommand) -> Result<u8, Failure> {
    let DataCommand::Prepare(args) = command;
    tokio::task::block_in_place(|| prepare(&args))
}

fn prepare(args: &PrepareArgs) -> Result<u8, Failure> {
    let tokenizer = Tokenizer::load(&args.tokenizer).map_err(|error| Failure::request(chain(&error)))?;
    let options = PrepareOptions { tokenizer, output: args.output.clone(), files: args.files.clone() };
    let target =
        if std::io::stderr().is_terminal() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    let bar = ProgressBar::with_draw_target(None, target);
    if let Ok(style) = ProgressStyle::with_template("{bar:28} {bytes}/{total_bytes}  {bytes_per_sec}  {eta} left") {
        bar.set_style(style);
    }
    let report = worker::data::prepare::prepare(&options, &mut |progress| {
        bar.set_length(progress.bytes_total);
        bar.set_position(progress.bytes_done);
    });
    bar.finish_and_clear();
    let report = report.map_err(|error| Failure::request(chain(&error)))?;
    let rows: Vec<Vec<String>> = report
        .datasets
        .iter()
        .map(|set| vec![set.prefix.display().to_string(), set.documents.to_string(), set.tokens.to_string()])
        .collect();
    table::print(&["DATASET", "DOCUMENTS", "TOKENS"], &rows);
    say!("set model.vocab_size to at least {}", report.vocab_size);
    Ok(0)
}
