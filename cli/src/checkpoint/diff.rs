//! `cairn checkpoint diff`: what two checkpoints differ in.

use checkpoint_store::{DiffReport, Side, open_checkpoint};
use serde_json::{Value, json};

use super::args::DiffArgs;
use super::{bar, best, open, open_job};
use crate::args::Output;
use crate::failure::Failure;
use crate::table::{self, say};

pub(super) async fn diff(args: DiffArgs) -> Result<u8, Failure> {
    let (store, chain) = open(&args.job).await?;
    let other_job = args.other_job.as_ref().unwrap_or(&args.job.name);
    let other_store = args.other_store.as_ref().unwrap_or(&args.job.store);
    let (second_store, second_chain) = open_job(other_store, other_job).await?;
    let (first, second) = (best(&chain, Some(args.a))?, best(&second_chain, Some(args.b))?);
    let a = open_checkpoint(&store, &args.job.name, &first.checkpoint).await?;
    let b = open_checkpoint(&second_store, other_job, &second.checkpoint).await?;
    let bar = bar("comparing", 0);
    let progress = |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    };
    let (left, right) = (Side { store: &store, manifest: &a }, Side { store: &second_store, manifest: &b });
    let compared = checkpoint_store::diff(left, right, &progress).await;
    bar.finish_and_clear();
    let report = compared?;
    match args.job.output {
        Output::Json => say!("{}", whole(&args, &report)?),
        Output::Text => print(&args, &report),
    }
    Ok(0)
}

fn whole(args: &DiffArgs, report: &DiffReport) -> Result<Value, Failure> {
    let mut value = serde_json::to_value(report).map_err(Failure::job)?;
    if let Some(fields) = value.as_object_mut() {
        fields.insert("event".into(), json!("diff"));
        fields.insert("a".into(), json!(args.a));
        fields.insert("b".into(), json!(args.b));
    }
    Ok(value)
}

fn print(args: &DiffArgs, report: &DiffReport) {
    if report.equal {
        say!("steps {} and {} are equal: one digest", args.a, args.b);
        return;
    }
    if !report.scalars.is_empty() {
        let rows: Vec<Vec<String>> =
            report.scalars.iter().map(|s| vec![s.name.clone(), s.a.clone(), s.b.clone()]).collect();
        table::print(&["SCALAR", &format!("STEP {}", args.a), &format!("STEP {}", args.b)], &rows);
        say!();
    }
    if !report.tensors.is_empty() {
        let row = |t: &checkpoint_store::diff::TensorDifference| {
            let share = t.differing as f64 / t.elements as f64 * 100.0;
            let odd = if t.not_finite > 0 { t.not_finite.to_string() } else { "-".into() };
            let (max, rms) = (format!("{:.3e}", t.max_abs), format!("{:.3e}", t.rms));
            vec![t.state.clone(), t.tensor.clone(), format!("{} ({share:.1}%)", t.differing), max, rms, odd]
        };
        let rows: Vec<Vec<String>> = report.tensors.iter().map(row).collect();
        table::print(&["STATE", "TENSOR", "DIFFERING", "MAX", "RMS", "NOT FINITE"], &rows);
        say!();
    }
    for (step, names) in [(args.a, &report.only_a), (args.b, &report.only_b)] {
        for name in names {
            say!("only step {step} has {name} in this shape");
        }
    }
    let (differ, compared) = (report.tensors.len(), report.compared);
    say!("{differ} of {compared} tensors differ; {} read", table::bytes(report.bytes_read));
}
