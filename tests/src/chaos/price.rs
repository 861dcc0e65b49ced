//! What fault tolerance costs while nothing fails: the same job with and without it, in turn.
//!
//! With: a snapshot at every step, parity between the nodes, heartbeats at their default. Without: no memory tier, and
//! a heartbeat only every 20 s. Steps of both are timed by the workers themselves.

use std::fmt;

use super::lab::{Lab, Shape};
use crate::job::Job;
use crate::run::Run;

/// Steps at the beginning of a run that are not counted: memory is touched for the first time.
const WARM: u64 = 10;

/// What is compared.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Nodes with a worker of one thread each.
    pub nodes: usize,
    /// Runs of each kind.
    pub rounds: usize,
    /// Steps of a run.
    pub steps: u64,
    /// Sequences of 128 tokens of a step: what a snapshot costs does not grow with them.
    pub batch: u64,
    /// What the data plane carries, in Mbit/s; `None`: as much as the machine can.
    pub link: Option<u32>,
}

/// Medians of each run's steps, in seconds.
#[derive(Debug)]
pub struct Price {
    plan: Plan,
    with: Vec<f64>,
    without: Vec<f64>,
    captured: f64,
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Measures.
pub fn measure(plan: Plan) -> Result<Price, String> {
    let lab = Lab::new(Shape { nodes: plan.nodes, coordinators: 1, planes: true, admission: false });
    lab.nodes().iter().for_each(|node| lab.net.limit(node, plan.link));
    let mut price = Price { plan, with: vec![], without: vec![], captured: 0.0 };
    for round in 0..plan.rounds {
        // Either is first in turn.
        for tolerant in if round % 2 == 0 { [true, false] } else { [false, true] } {
            let name = format!("{}{round}", if tolerant { "with" } else { "without" });
            let (seconds, captured) = steps(&lab, plan, &name, tolerant)?;
            if tolerant {
                price.with.push(seconds);
                price.captured += captured / plan.rounds as f64;
            } else {
                price.without.push(seconds);
            }
        }
    }
    Ok(price)
}

/// Runs one job; the median of its steps, and the share of steps that were captured.
fn steps(lab: &Lab, plan: Plan, name: &str, tolerant: bool) -> Result<(f64, f64), String> {
    let (title, count) = (format!("name=\"{name}\""), format!("training.steps={}", plan.steps));
    let batch = format!("training.global_batch={}", plan.batch);
    let workers = format!("resources.workers={{ min = {0}, max = {0} }}", plan.nodes);
    let common: [&str; 7] = [
        &title,
        &count,
        &workers,
        "resources.threads=1",
        "training.validate_every=0",
        "checkpoint.every_steps=1000000",
        &batch,
    ];
    let chosen: &[&str] = if tolerant {
        &["checkpoint.memory_every=1"]
    } else {
        &["checkpoint.memory=false", "fault.heartbeat=20", "fault.suspicion=25"]
    };
    let job = Job::with(&[&common[..], chosen].concat());
    let submitted = lab.call(&["submit", &job.file().display().to_string()]);
    if submitted.code != Some(0) {
        return Err(format!("the job was not taken: {}", submitted.stderr));
    }
    let outcome = Run::finish(lab.operate(&["watch", name]));
    if outcome.code != Some(0) {
        return Err(format!("the job did not finish: {}", outcome.stderr));
    }
    let told = outcome.of("step");
    let tokens = plan.batch as f64 * 128.0;
    let timed = told.iter().filter(|event| event["step"].as_u64() > Some(WARM));
    let seconds: Vec<f64> = timed.filter_map(|event| Some(tokens / event["tokens_per_second"].as_f64()?)).collect();
    let status = lab.call(&["status", name]);
    let skipped = status.events.first().and_then(|event| event["memory_skipped"].as_u64()).unwrap_or(0);
    Ok((median(&seconds), 1.0 - skipped as f64 / (plan.steps * plan.nodes as u64) as f64))
}

impl fmt::Display for Price {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (with, without) = (median(&self.with), median(&self.without));
        let runs = |of: &[f64]| of.iter().map(|s| format!("{:.1}", s * 1e3)).collect::<Vec<_>>().join(" ");
        let link = self.plan.link.map_or("as fast as the machine".into(), |rate| format!("{rate} Mbit/s"));
        let (nodes, batch) = (self.plan.nodes, self.plan.batch);
        writeln!(f, "{nodes} nodes, one worker of one thread each, {batch} sequences a step, data plane {link}")?;
        writeln!(f, "with:    {:.1} ms a step (runs: {})", with * 1e3, runs(&self.with))?;
        writeln!(f, "without: {:.1} ms a step (runs: {})", without * 1e3, runs(&self.without))?;
        writeln!(
            f,
            "price:   {:.1}% of a step; {:.0}% of steps captured",
            (with / without - 1.0) * 100.0,
            self.captured * 100.0
        )
    }
}
