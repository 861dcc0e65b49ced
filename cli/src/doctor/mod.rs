//! `cairn doctor`: whether this machine can do what a job asks of it, and what to do about what it cannot.
//!
//! Each check is a line with a verdict: `ok`, `warn` (it works, but not well), `fail` (it will not work) or `skip`,
//! with the reason. Nothing is guessed: the store is written to and read from, the ring exchanges, the coordinator
//! answers. What a check writes it removes again; only a store's own folder is made where it is missing, as a
//! coordinator would.

mod args;
mod job;
mod machine;
mod remote;

use proto::spec::JobSpec;
use serde_json::{Map, Value, json};

pub(crate) use self::args::DoctorArgs;
use crate::args::Output;
use crate::failure::{Failure, WRONG_REQUEST};
use crate::table::{self, say};
use crate::train;

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Ok,
    Warn,
    Fail,
    Skip,
}

impl Verdict {
    fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "fail",
            Self::Skip => "skip",
        }
    }
}

/// One line of the report.
#[derive(Debug)]
struct Finding {
    check: &'static str,
    verdict: Verdict,
    /// What is the case, for people.
    found: String,
    /// What to do about it; empty if nothing.
    advice: String,
    /// What was measured, for tools.
    values: Map<String, Value>,
}

impl Finding {
    fn new(check: &'static str, verdict: Verdict, found: impl ToString, advice: impl ToString) -> Self {
        let (found, advice) = (found.to_string(), advice.to_string());
        Self { check, verdict, found, advice, values: Map::new() }
    }

    fn ok(check: &'static str, found: impl ToString) -> Self {
        Self::new(check, Verdict::Ok, found, "")
    }

    fn warn(check: &'static str, found: impl ToString, advice: impl ToString) -> Self {
        Self::new(check, Verdict::Warn, found, advice)
    }

    fn fail(check: &'static str, found: impl ToString, advice: impl ToString) -> Self {
        Self::new(check, Verdict::Fail, found, advice)
    }

    fn skip(check: &'static str, why: impl ToString) -> Self {
        Self::new(check, Verdict::Skip, why, "")
    }

    /// Adds what was measured: an object.
    fn with(mut self, values: Value) -> Self {
        if let Value::Object(values) = values {
            self.values.extend(values);
        }
        self
    }

    fn json(&self) -> Value {
        let mut line = json!({
            "event": "check", "check": self.check, "verdict": self.verdict.name(), "found": self.found,
            "advice": self.advice,
        });
        if let Value::Object(line) = &mut line {
            line.extend(self.values.clone());
        }
        line
    }

    /// Its line, and below it what to do.
    fn rows(&self) -> Vec<Vec<String>> {
        let mut rows = vec![vec![self.verdict.name().into(), self.check.into(), self.found.clone()]];
        if !self.advice.is_empty() {
            rows.push(vec![String::new(), String::new(), format!("→ {}", self.advice)]);
        }
        rows
    }
}

pub(crate) async fn run(args: DoctorArgs) -> Result<u8, Failure> {
    let (spec, mut findings) = read_job(&args);
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    findings.extend(tokio::task::block_in_place(|| local(&args, spec.as_ref(), cores)));
    let url = args.store.clone().or_else(|| spec.as_ref().map(|spec| spec.checkpoint.store.clone()));
    findings.extend(match url {
        Some(url) => remote::store(&url, spec.as_ref()).await,
        None => vec![Finding::skip("store", "no store given: name one with --store, or a job file")],
    });
    findings.extend(remote::coordinators(&args).await);
    let failed = findings.iter().filter(|finding| finding.verdict == Verdict::Fail).count();
    match args.output {
        Output::Json => findings.iter().for_each(|finding| say!("{}", finding.json())),
        Output::Text => {
            let rows: Vec<Vec<String>> = findings.iter().flat_map(Finding::rows).collect();
            table::print(&["VERDICT", "CHECK", "FOUND"], &rows);
        }
    }
    Ok(if failed == 0 { 0 } else { WRONG_REQUEST })
}

/// The job, if there is one that can be read; one that cannot is a finding, and the rest is checked all the same.
fn read_job(args: &DoctorArgs) -> (Option<JobSpec>, Vec<Finding>) {
    let Some(file) = &args.file else {
        return (None, vec![Finding::skip("job", "no job file given: what a job needs is not checked")]);
    };
    match train::read_job(&args.job(file)) {
        Ok(spec) => {
            let workers = spec.resources.workers;
            let found = format!("{} with {} to {} workers", spec.name, workers.min, workers.max);
            let timeouts = spec.fault.detection();
            let timeouts = Finding::ok("timeouts", timeouts).with(json!({"seconds": timeouts}));
            (Some(spec), vec![Finding::ok("job", found), timeouts])
        }
        Err(failure) => (None, vec![Finding::fail("job", failure, "correct the job file")]),
    }
}

/// What can be told without asking anybody else.
fn local(args: &DoctorArgs, spec: Option<&JobSpec>, cores: usize) -> Vec<Finding> {
    let mut findings = Vec::new();
    let need = spec.map(|spec| job::Need::of(spec, args.nodes, args.slots.unwrap_or(cores as u32)));
    findings.extend(spec.map(job::data));
    findings.push(machine::processor(cores));
    findings.push(machine::cores(cores, need.as_ref()));
    findings.push(machine::device());
    findings.push(job::memory(need.as_ref()));
    findings.push(job::folder(&args.memory, args.memory_budget, need.as_ref()));
    findings.extend(machine::limits());
    findings.push(machine::clock());
    findings.push(machine::ring());
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_has_the_promised_fields() {
        let finding = Finding::fail("ring", "no", "yes").with(json!({"bytes_per_second": 1}));
        let expected = json!({
            "event": "check", "check": "ring", "verdict": "fail", "found": "no", "advice": "yes", "bytes_per_second": 1,
        });
        assert_eq!(finding.json(), expected);
    }
}
