//! A job's events on the terminal: a progress bar and a line for each event worth knowing, or JSON lines.
//!
//! Lines are results and go to standard output, wherever that leads; the bar is for whoever watches, on standard error.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use proto::event::{JobEvent, LoadedStage};
use proto::spec::Detection;
use serde_json::json;
use tokio::time::Instant;

use crate::args::Output;
use crate::table;

/// Without a terminal there is no bar; steps are then reported as lines, at most this often.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Writes events as they come.
pub(crate) struct Renderer {
    output: Output,
    bar: ProgressBar,
    /// Whether steps are lines: nobody sees a bar, or what is written goes to a file or another program.
    step_lines: bool,
    steps: u64,
    tokens_per_step: u64,
    last_line: Option<Instant>,
    last_checkpoint: Option<u64>,
    /// Smoothed seconds a step, for the time left.
    pace: Option<f64>,
}

impl Renderer {
    /// A renderer for a job whose bar ends at `steps`, each of `tokens_per_step` tokens.
    pub(crate) fn new(output: Output, steps: u64, tokens_per_step: u64) -> Self {
        let has_bar = output == Output::Text && std::io::stderr().is_terminal();
        let bar = ProgressBar::with_draw_target(
            Some(steps),
            if has_bar { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() },
        );
        let template = "{bar:28.cyan/blue} step {pos}/{len}  {msg}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("━╸─"));
        }
        let step_lines = !has_bar || !std::io::stdout().is_terminal();
        Self { output, bar, step_lines, steps, tokens_per_step, last_line: None, last_checkpoint: None, pace: None }
    }

    /// Tells of a checkpoint that was there before the first event.
    pub(crate) fn found(&mut self, checkpoint: Option<u64>) {
        self.last_checkpoint = self.last_checkpoint.max(checkpoint);
    }

    /// Says something to a person; silent in JSON, whose lines are events only.
    pub(crate) fn note(&self, text: &str) {
        if self.output == Output::Text {
            self.line(text);
        }
    }

    /// Says how soon failures of this job are noticed.
    pub(crate) fn detection(&self, detection: &Detection) {
        match self.output {
            Output::Text => self.line(&detection.to_string()),
            Output::Json => self.line(&json!({"event": "detection", "seconds": detection}).to_string()),
        }
    }

    /// Shows one event.
    pub(crate) fn event(&mut self, event: &JobEvent) {
        if self.output == Output::Json {
            // A closed pipe must not end the job; what cannot be written is not wanted.
            let _ = writeln!(std::io::stdout(), "{}", event.to_json());
            return;
        }
        match event {
            JobEvent::Step { step, loss, tokens_per_second, .. } => self.step(*step, *loss, *tokens_per_second),
            JobEvent::Checkpoint { step, .. } => {
                self.last_checkpoint = Some(*step);
                self.line(&describe(event));
            }
            _ => self.line(&describe(event)),
        }
        if event.is_last() {
            self.bar.finish_and_clear();
        }
    }

    fn step(&mut self, step: u64, loss: f64, rate: f64) {
        if rate > 0.0 {
            let seconds = self.tokens_per_step as f64 / rate;
            self.pace = Some(self.pace.map_or(seconds, |pace| 0.9 * pace + 0.1 * seconds));
        }
        let left = self.pace.unwrap_or(0.0) * self.steps.saturating_sub(step) as f64;
        let checkpoint = self.last_checkpoint.map_or("none yet".to_string(), |step| format!("step {step}"));
        let message = format!(
            "loss {loss:.4}  {} tokens/s  {} left  checkpoint {checkpoint}",
            table::count(rate),
            table::duration(left)
        );
        self.bar.set_position(step);
        self.bar.set_message(message.clone());
        let due = self.last_line.is_none_or(|at| at.elapsed() >= LINE_EVERY) || step == self.steps;
        if self.step_lines && due {
            self.last_line = Some(Instant::now());
            self.line(&format!("step {step}/{}  {message}", self.steps));
        }
    }

    /// Writes a line to standard output; the bar, on standard error, makes room for it if both are one terminal.
    fn line(&self, text: &str) {
        self.bar.suspend(|| {
            let _ = writeln!(std::io::stdout(), "{text}");
        });
    }
}

/// One event as a sentence.
fn describe(event: &JobEvent) -> String {
    match event {
        JobEvent::Generation { generation, world_size } => {
            let plural = if *world_size == 1 { "worker" } else { "workers" };
            format!("generation {generation}: {world_size} {plural}")
        }
        JobEvent::Step { step, loss, .. } => format!("step {step}  loss {loss:.4}"),
        JobEvent::Validation { step, loss } => format!("step {step}  validation loss {loss:.4}"),
        JobEvent::Checkpoint { step, digest, stall_ms, seconds, bytes, .. } => format!(
            "step {step}  checkpoint stored: {} in {seconds:.2} s, training held {stall_ms:.1} ms, digest {}",
            table::bytes(*bytes),
            short(digest)
        ),
        JobEvent::Skipped { step, skipped } => {
            format!("step {step}  checkpoint skipped: storage is slower than the cadence ({skipped} so far)")
        }
        JobEvent::Failure { generation, rank, reason } => {
            let who = rank.map_or(String::new(), |rank| format!(", rank {rank}"));
            format!("failure in generation {generation}{who}: {reason}")
        }
        JobEvent::Straggler { rank, node, ratio: Some(ratio), .. } => {
            format!("rank {rank} on {node} holds the others up: {ratio:.2} times the median's time for a micro-batch")
        }
        JobEvent::Straggler { rank, node, ratio: None, .. } => format!("rank {rank} on {node} keeps up again"),
        JobEvent::Loaded { generation, step, stages } => loaded(*generation, *step, stages),
        JobEvent::Recovered { generation, step, seconds, source } => {
            format!("recovered in {seconds:.2} s: generation {generation} goes on from step {step} ({source})")
        }
        JobEvent::Incident(incident) => {
            let lost = incident.steps_lost().map_or(String::new(), |steps| format!(", {steps} steps taken again"));
            format!(
                "incident {}: {} cost {:.2} s{lost}",
                incident.number,
                incident.cause.name(),
                incident.total_ms() as f64 / 1e3
            )
        }
        JobEvent::Quarantined { step, reason } => format!("checkpoint of step {step} set aside: {reason}"),
        JobEvent::Finished { step, loss, digest } => {
            let loss = loss.map_or(String::new(), |loss| format!(", loss {loss:.4}"));
            format!("finished at step {step}{loss}\ndigest {digest}")
        }
        JobEvent::Paused { step, digest, .. } => {
            let digest = digest.as_ref().map_or(String::new(), |digest| format!("\ndigest {digest}"));
            format!("paused after step {step}; go on with --resume{digest}")
        }
        JobEvent::Failed { reason, .. } => format!("the job failed: {reason}"),
        JobEvent::Cancelled {} => "the job was cancelled".to_string(),
    }
}

/// Which stages a load's time went into, and the slowest rank of the longest.
fn loaded(generation: u64, step: u64, stages: &[LoadedStage]) -> String {
    let longest = stages.iter().max_by(|a, b| a.seconds.total_cmp(&b.seconds));
    let slowest = longest.map_or(String::new(), |s| format!("; slowest in {}: rank {} on {}", s.stage, s.rank, s.node));
    let bytes = stages.iter().find(|s| s.stage == "verify").map_or(0, |s| s.bytes);
    let times: Vec<String> = stages.iter().map(|s| format!("{} {:.3} s", s.stage, s.seconds)).collect();
    let (bytes, times) = (table::bytes(bytes), times.join(", "));
    format!("generation {generation} loaded {bytes} of step {step}: {times}{slowest}")
}

fn short(digest: &str) -> &str {
    digest.get(..16).unwrap_or(digest)
}
