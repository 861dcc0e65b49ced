//! `cairn bench coordinator`: what the control plane costs with as many agents as the largest clusters have.
//!
//! The agents are simulated in this process; the machine, the checks of messages and their encoding are the real ones
//! (`coordinator::bench`). All runs on one thread, as the coordinator's decisions do, so its processor time over the
//! simulated time is the share of a core. Gaps in which agents only make their messages are not counted.

use std::time::{Duration, Instant};

use coordinator::bench::{Sent, Simulation};
use proto::spec::{JobSpec, Overrides};
use serde_json::{Value, json};

use crate::args::{BenchCoordinatorArgs, Output};
use crate::bench_synthetic::peak_memory;
use crate::failure::Failure;
use crate::size;
use crate::table::{self, say};

/// The targets: cores of heartbeats, seconds to agree, bytes of memory, bytes of an announcement.
const TARGETS: (f64, f64, u64, usize) = (1.0, 2.0, 2 << 30, 16 << 10);

/// What a phase took.
#[derive(Debug, Clone, Copy, Default)]
struct Took {
    seconds: f64,
    processor: f64,
    sent: Sent,
}

pub(crate) fn run(args: &BenchCoordinatorArgs) -> Result<u8, Failure> {
    let mut line = measure(args)?;
    let missed = judge(&line);
    if args.output == Output::Json {
        line["missed"] = json!(missed);
        say!("{line}");
    } else {
        print(&line, args);
    }
    if missed.is_empty() { Ok(0) } else { Err(Failure::job(format!("over the target: {}", missed.join(", ")))) }
}

/// Runs all phases; what each took.
fn measure(args: &BenchCoordinatorArgs) -> Result<Value, Failure> {
    let mut simulation = Simulation::new(args.agents, args.workers, spec(args)?).map_err(Failure::job)?;
    let mut line = json!({
        "event": "bench_coordinator", "agents": args.agents, "workers": args.agents * args.workers,
    });
    line["attach"] = told(&time(|| simulation.attach())?);
    line["submit"] = told(&time(|| simulation.submit())?);
    line["agree"] = told(&form(&mut simulation, &mut line)?);
    line["heartbeats"] = heartbeats(&mut simulation, args.seconds)?;
    if args.agents > 1 {
        line["loss"] = loss(&mut simulation)?;
    }
    line["peak_memory_bytes"] = json!(peak_memory());
    Ok(line)
}

/// A job for all workers, which goes on with fewer.
fn spec(args: &BenchCoordinatorArgs) -> Result<JobSpec, Failure> {
    let workers = args.agents * args.workers;
    let text = format!(
        "name = \"bench\"\nmodel.preset = \"tiny\"\ndata.train = \"synthetic\"\ntraining.steps = 1000000\n\
         training.global_batch = {workers}\ntraining.micro_batch = 1\n\
         resources.workers = {{ min = 1, max = {workers} }}\n"
    );
    Ok(JobSpec::parse("bench", &text, std::path::Path::new("/"), &Overrides::new())?)
}

/// The workers become ready, one node after another. Counted is the time from the report of the last one.
fn form(simulation: &mut Simulation, line: &mut Value) -> Result<Took, Failure> {
    let reports = simulation.obey();
    line["ready"] = told(&time(|| simulation.deliver(reports.saturating_sub(1)))?);
    time(|| simulation.deliver(1))
}

/// So many seconds of every agent's report, in each of which all its workers have taken a step.
fn heartbeats(simulation: &mut Simulation, seconds: u32) -> Result<Value, Failure> {
    // The first report of a generation says more than the later ones.
    let reports = simulation.obey();
    time(|| simulation.deliver(reports))?;
    let mut all = Took::default();
    let mut most: f64 = 0.0;
    for _ in 0..seconds {
        simulation.obey();
        let second = time(|| simulation.beat())?;
        most = most.max(second.processor);
        all.seconds += second.seconds;
        all.processor += second.processor;
        all.sent.add(second.sent);
    }
    Ok(json!({
        "seconds": seconds, "cores": all.processor / f64::from(seconds.max(1)), "cores_most": most,
        "messages_sent": all.sent.messages,
    }))
}

/// One node is lost: from the event to the next generation's last announcement, without the time agents take.
fn loss(simulation: &mut Simulation) -> Result<Value, Failure> {
    let fenced = time(|| simulation.lose())?;
    let reports = simulation.obey();
    let ready = time(|| simulation.deliver(reports.saturating_sub(1)))?;
    let agreed = time(|| simulation.deliver(1))?;
    let seconds = fenced.seconds + ready.seconds + agreed.seconds;
    Ok(json!({
        "seconds": seconds, "fenced": told(&fenced), "ready": told(&ready), "agree": told(&agreed),
    }))
}

fn time(phase: impl FnOnce() -> Result<Sent, String>) -> Result<Took, Failure> {
    let (began, before) = (Instant::now(), processor());
    let sent = phase().map_err(Failure::job)?;
    let seconds = began.elapsed().as_secs_f64();
    let spent = processor().zip(before).map(|(now, before)| now.saturating_sub(before).as_secs_f64());
    // Where the kernel does not say, the time that passed is an upper bound.
    Ok(Took { seconds, processor: spent.unwrap_or(seconds), sent })
}

/// Processor time of this thread.
fn processor() -> Option<Duration> {
    let line = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    line.split_whitespace().next()?.parse().ok().map(Duration::from_nanos)
}

fn told(took: &Took) -> Value {
    json!({
        "seconds": took.seconds, "processor_seconds": took.processor, "messages": took.sent.messages,
        "bytes": took.sent.bytes, "announcements": took.sent.announcements, "longest": took.sent.longest,
        "world": took.sent.world,
    })
}

/// The targets that were missed.
fn judge(line: &Value) -> Vec<&'static str> {
    let number = |value: &Value| value.as_f64().unwrap_or(0.0);
    let longest = number(&line["agree"]["longest"]).max(number(&line["loss"]["agree"]["longest"]));
    let checks = [
        ("heartbeats", number(&line["heartbeats"]["cores"]) < TARGETS.0),
        ("agreeing", number(&line["agree"]["seconds"]) < TARGETS.1),
        ("memory", number(&line["peak_memory_bytes"]) < TARGETS.2 as f64),
        ("length of an announcement", longest <= TARGETS.3 as f64),
    ];
    checks.into_iter().filter(|(_, met)| !met).map(|(what, _)| what).collect()
}

fn print(line: &Value, args: &BenchCoordinatorArgs) {
    let number = |value: &Value| value.as_f64().unwrap_or(0.0);
    let milliseconds = |value: &Value| format!("{:.0} ms", number(value) * 1e3);
    let bytes = |value: &Value| size::show(number(value) as u64);
    let longest = number(&line["agree"]["longest"]).max(number(&line["loss"]["agree"]["longest"]));
    say!("{} agents with {} workers each, one job; all on one thread", args.agents, args.workers);
    let heartbeats = &line["heartbeats"];
    let mut rows = vec![
        ("attach all agents", milliseconds(&line["attach"]["seconds"]), ""),
        ("submit, tell all to prepare workers", milliseconds(&line["submit"]["seconds"]), ""),
        ("all but the last node become ready", milliseconds(&line["ready"]["seconds"]), ""),
        ("last worker ready → last announcement", milliseconds(&line["agree"]["seconds"]), "2000 ms"),
        ("all announcements", bytes(&line["agree"]["bytes"]), ""),
        ("the longest announcement", format!("{longest:.0} bytes"), "16384 bytes"),
        ("heartbeats, each second", format!("{:.3} cores", number(&heartbeats["cores"])), "1 core"),
        ("the worst of these seconds", format!("{:.3} cores", number(&heartbeats["cores_most"])), ""),
    ];
    if args.agents > 1 {
        let loss = &line["loss"];
        rows.push(("a node lost → last announcement", milliseconds(&loss["seconds"]), ""));
        rows.push(("  of it: all others told to stop", milliseconds(&loss["fenced"]["seconds"]), ""));
        rows.push(("  of it: all others ready again", milliseconds(&loss["ready"]["seconds"]), ""));
        rows.push(("  of it: agreed and announced", milliseconds(&loss["agree"]["seconds"]), ""));
    }
    rows.push(("peak memory, simulated agents too", bytes(&line["peak_memory_bytes"]), "2 GiB"));
    let cells = |(what, value, target): (&str, String, &str)| vec![what.to_string(), value, target.to_string()];
    let rows: Vec<Vec<String>> = rows.into_iter().map(cells).collect();
    table::print(&["WHAT", "VALUE", "TARGET"], &rows);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_cluster_is_measured() {
        let args = BenchCoordinatorArgs { agents: 50, workers: 8, seconds: 1, output: Output::Json };
        let line = measure(&args).unwrap();
        // How long it took is the benchmark's to judge; that it did what it says is looked at here.
        assert_eq!((&line["agree"]["world"], &line["loss"]["agree"]["world"]), (&json!(400), &json!(392)), "{line}");
        assert!(line["agree"]["announcements"].as_u64() > Some(0) && line["heartbeats"]["cores"].is_f64(), "{line}");
    }
}
