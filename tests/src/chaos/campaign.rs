//! One campaign: a job on a lab, fault after fault, and in the end the digest of an undisturbed run.
//!
//! After each fault training must move on within a bound, or the campaign ends with "hung". The job is paused after the
//! last fault: its last checkpoint is what an undisturbed run of as many steps must reproduce to the bit.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::blame;
use super::fault::{self, Active, Draw, Fault, Kind, LINK};
use super::lab::{Lab, Shape};
use super::report::{Blamed, Line, Report};
use crate::job::Job;
use crate::run::Run;

/// Set to end all campaigns of this process early, tidily.
pub static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// After a fault has ended training must move on within this.
const BOUND: Duration = Duration::from_secs(60);
/// After that the lost parts are waited for, so that the next fault meets a whole cluster.
const WHOLE: Duration = Duration::from_secs(20);
/// How long the events of the job are waited for at a time.
const POLL: Duration = Duration::from_millis(50);
/// Steps that training must take after a fault to have moved on.
const MOVED: u64 = 2;
/// The name that [`Job`] gives.
const NAME: &str = "t";

/// What a campaign is made of.
#[derive(Debug, Clone)]
pub struct Plan {
    /// What all is drawn from.
    pub seed: u64,
    /// How many faults.
    pub faults: usize,
    /// Nodes with a worker each.
    pub nodes: usize,
    /// The sorts of faults; empty: all.
    pub only: Vec<Kind>,
    /// Whether a fault may begin while another one lasts.
    pub overlap: bool,
    /// The step to end at; without one the job is paused after the last fault.
    pub steps: Option<u64>,
    /// Keep the logs also of a campaign that went well.
    pub keep: bool,
}

/// The keys of the job: timeouts near their lower ends, so that a hundred faults pass in half an hour.
pub const KEYS: [&str; 9] = [
    "fault.heartbeat=0.5",
    "fault.suspicion=3",
    "fault.collective=6",
    "fault.hang=15",
    "fault.restart=60",
    "fault.restarts_without_progress=20",
    "checkpoint.every_steps=25",
    "checkpoint.memory_every=1",
    "schedule.kind=\"constant\"",
];

struct Campaign {
    lab: Lab,
    watch: Run,
    began: Instant,
    /// The newest step there ever was, and when it was told.
    high: (u64, Instant),
    /// The longest time between two such steps since it was last asked for.
    gap: Duration,
    world: u64,
    /// Incidents that were looked at.
    seen: u64,
    /// The event that ended the job.
    end: Option<Value>,
}

/// Runs a campaign. `Err`: why it could not be brought to its end.
pub fn run(plan: &Plan) -> Result<Report, String> {
    let steps = format!("training.steps={}", plan.steps.unwrap_or(10_000_000));
    let job = Job::with(&[&KEYS[..], &[&steps]].concat());
    let mut campaign = Campaign::start(plan, &job)?;
    let faults = fault::draw(plan.seed, plan.faults, &campaign.lab.nodes(), &plan.only);
    let mut report = Report::new(plan.seed);
    let done = campaign.strike_all(plan, &faults, &mut report).and_then(|()| campaign.finish(plan));
    report.seconds = campaign.began.elapsed().as_secs_f64();
    let (step, digest) = match done {
        Ok(end) => end,
        Err(why) => {
            campaign.lab.keep = true;
            return Err(format!("{why}\nseed {}; so far:\n{report}", plan.seed));
        }
    };
    report.unexpected(&campaign.lab.ends);
    campaign.lab.keep |= plan.keep || !report.wrong.is_empty();
    drop(campaign);
    report.end(step, digest, undisturbed(&job, step)?);
    Ok(report)
}

/// The digest of step `step` of the same job on this machine, where nothing happens to it.
fn undisturbed(job: &Job, step: u64) -> Result<String, String> {
    let (file, step) = (job.file().display().to_string(), step.to_string());
    let mut run = Run::start(&["train", &file, "--workers", "1", "--steps", &step, "--output", "json"]);
    loop {
        // It takes as long as so many steps take; only its silence is bounded.
        match run.poll(BOUND)? {
            Some(event) if matches!(event["event"].as_str(), Some("paused" | "finished")) => {
                return event["digest"].as_str().map(str::to_string).ok_or_else(|| format!("no digest: {event}"));
            }
            Some(_) => {}
            None => return Err(format!("the undisturbed run took no step within {BOUND:?}")),
        }
        if INTERRUPTED.load(Ordering::Relaxed) {
            return Err("interrupted".into());
        }
    }
}

impl Campaign {
    fn start(plan: &Plan, job: &Job) -> Result<Self, String> {
        let lab = Lab::new(Shape { nodes: plan.nodes, coordinators: 2, planes: true, admission: false });
        for node in lab.nodes() {
            lab.net.limit(&node, Some(LINK));
        }
        let file = job.file().display().to_string();
        let workers = format!("resources.workers={{ min = 1, max = {} }}", plan.nodes);
        let submitted = lab.call(&["submit", &file, "--set", &workers]);
        if submitted.code != Some(0) {
            return Err(format!("the job was not taken: {}", submitted.stderr));
        }
        let watch = lab.operate(&["watch", NAME]);
        let now = Instant::now();
        let mut campaign =
            Self { lab, watch, began: now, high: (0, now), gap: Duration::ZERO, world: 0, seen: 0, end: None };
        campaign.wait("the first steps", BOUND, |campaign| campaign.high.0 > MOVED)?;
        campaign.wait("all nodes", BOUND, |campaign| campaign.world == plan.nodes as u64)?;
        campaign.incidents()?;
        Ok(campaign)
    }

    /// Takes in what happens for a moment.
    fn look(&mut self) -> Result<(), String> {
        if INTERRUPTED.load(Ordering::Relaxed) {
            return Err("interrupted".into());
        }
        self.lab.tend();
        let Some(event) = self.watch.poll(POLL).map_err(|report| format!("the watch ended{report}"))? else {
            return Ok(());
        };
        match event["event"].as_str() {
            Some("step") => {
                let (step, now) = (event["step"].as_u64().unwrap_or(0), Instant::now());
                if step > self.high.0 {
                    self.gap = self.gap.max(now - self.high.1);
                    self.high = (step, now);
                }
            }
            Some("generation") => self.world = event["world_size"].as_u64().unwrap_or(0),
            Some("failed" | "cancelled") => return Err(format!("the job ended: {event}")),
            Some("finished" | "paused") => self.end = Some(event),
            _ => {}
        }
        Ok(())
    }

    fn wait(&mut self, what: &str, bound: Duration, done: impl Fn(&Self) -> bool) -> Result<(), String> {
        let deadline = Instant::now() + bound;
        while !done(self) {
            self.look()?;
            if Instant::now() > deadline {
                return Err(format!("hung: no {what} within {} s", bound.as_secs()));
            }
        }
        Ok(())
    }

    fn pass(&mut self, time: Duration) -> Result<(), String> {
        let until = Instant::now() + time;
        while Instant::now() < until {
            self.look()?;
        }
        Ok(())
    }

    fn strike_all(&mut self, plan: &Plan, faults: &[Fault], report: &mut Report) -> Result<(), String> {
        let mut draw = Draw(plan.seed ^ 0xface);
        let mut left = faults;
        while let Some((first, rest)) = left.split_first() {
            let second = rest.first().filter(|_| plan.overlap && draw.below(6) == 0);
            left = if second.is_some() { &rest[1..] } else { rest };
            let offset = Duration::from_millis(draw.below(first.length.as_millis() as u64 + 500));
            self.pass(Duration::from_millis(200 + draw.below(1500)))?;
            let struck: Vec<&Fault> = [Some(first), second].into_iter().flatten().collect();
            let names: Vec<String> = struck.iter().map(|f| format!("{} ({})", f.kind.name(), f.node)).collect();
            println!("{:>4}: step {:>6}: {}", faults.len() - left.len(), self.high.0, names.join(" and "));
            let line = self.strike(&struck, offset).map_err(|why| format!("{why}, after {}", names.join(" and ")))?;
            line.blame.iter().filter(|one| !one.rightly).for_each(|one| println!("      wrong: {}", one.told));
            report.add(line);
            if self.end.is_some() {
                return Err(format!("the job ended before {} faults; give it more --steps", faults.len()));
            }
        }
        Ok(())
    }

    /// Begins one or two faults, ends them when their time has come, and waits until all is well again.
    fn strike(&mut self, faults: &[&Fault], offset: Duration) -> Result<Line, String> {
        let began = Instant::now();
        self.gap = Duration::ZERO;
        let mut active: Vec<(Instant, Active)> = Vec::new();
        let mut missed = 0;
        for (at, fault) in faults.iter().enumerate() {
            self.pass(if at > 0 { offset } else { Duration::ZERO })?;
            match fault::begin(fault, &mut self.lab) {
                Some(begun) => active.push((Instant::now() + fault.length, begun)),
                None => missed += 1,
            }
        }
        while !active.is_empty() {
            self.look()?;
            let now = Instant::now();
            for (due, fault) in active.iter_mut().filter(|(due, _)| *due <= now) {
                match fault.end(&mut self.lab) {
                    Some(later) => *due = now + later,
                    None => *due = began,
                }
            }
            active.retain(|(due, _)| *due != began);
        }
        let from = self.high.0;
        self.wait("step", BOUND, |campaign| campaign.high.0 > from + MOVED)?;
        let gap = self.gap;
        let nodes = self.lab.nodes().len() as u64;
        // Not all come back at once; the next fault then meets what there is.
        let whole = Instant::now() + WHOLE;
        while Instant::now() < whole && !(self.world == nodes && self.lab.whole()) {
            self.look()?;
        }
        let incidents = self.incidents()?;
        let right = |incident: &Value| faults.iter().any(|fault| blame::is_right(fault, incident));
        let judge = |incident: &Value| Blamed {
            rightly: right(incident),
            named: incident["node"].is_string() || incident["link"].is_array(),
            told: blame::tell(incident),
        };
        let blame = incidents.iter().map(judge).collect();
        let kinds = faults.iter().map(|fault| fault.kind).collect();
        Ok(Line { kinds, missed, gap, blame })
    }

    /// The unplanned incidents that are over and were not looked at before.
    fn incidents(&mut self) -> Result<Vec<Value>, String> {
        let deadline = Instant::now() + BOUND;
        loop {
            let told = self.lab.call(&["incidents", NAME]);
            if told.code == Some(0) {
                let fresh = told.of("incident").into_iter().filter(|one| one["number"].as_u64() > Some(self.seen));
                let fresh: Vec<Value> = fresh.filter(|one| one["outcome"] != "open").cloned().collect();
                self.seen = fresh.iter().filter_map(|one| one["number"].as_u64()).max().unwrap_or(self.seen);
                return Ok(fresh.into_iter().filter(|one| one["planned"] == false).collect());
            }
            if Instant::now() > deadline {
                return Err(format!("hung: the incidents are not told: {}", told.stderr));
            }
            self.pass(Duration::from_millis(500))?;
        }
    }

    /// Brings the job to its end; its last step and digest.
    fn finish(&mut self, plan: &Plan) -> Result<(u64, String), String> {
        if plan.steps.is_none() {
            let paused = self.lab.call(&["pause", NAME]);
            if paused.code != Some(0) {
                return Err(format!("the job was not paused: {}", paused.stderr));
            }
        }
        while self.end.is_none() {
            let before = self.high.0;
            self.wait("step", BOUND, |campaign| campaign.high.0 > before || campaign.end.is_some())?;
        }
        let end = self.end.clone().unwrap_or_default();
        match (end["step"].as_u64(), end["digest"].as_str()) {
            (Some(step), Some(digest)) => Ok((step, digest.to_string())),
            _ => Err(format!("the job ended without a digest: {end}")),
        }
    }
}
