//! `cairn incidents JOB`: what broke a job's generations off and what that cost.

use proto::incident::Incident;
use proto::wire::{IncidentsReply, JobRequest};
use serde_json::{Value, json};

use crate::args::{JobArgs, Output};
use crate::client;
use crate::failure::Failure;
use crate::table::{self, say};

pub(crate) async fn show(args: JobArgs) -> Result<u8, Failure> {
    let mut client = client::operator(&args.operator).await?;
    let reply = client.incidents(client::timed(JobRequest { job: args.name.to_string() })).await;
    let reply = reply.map_err(|status| client::explain(status, &args.operator.coordinator))?.into_inner();
    let read = |json: &String| {
        let unread = |error| Failure::job(format!("the coordinator's answer cannot be read: {error}"));
        serde_json::from_str(json).map_err(unread)
    };
    let incidents: Vec<Incident> = reply.incidents.iter().map(read).collect::<Result<_, _>>()?;
    match args.operator.output {
        Output::Json => as_json(&args, &reply, &incidents),
        Output::Text => as_text(&reply, &incidents),
    }
    Ok(0)
}

/// Of its time since the first step, the share a job has spent on steps that counted.
fn goodput(reply: &IncidentsReply) -> Option<f64> {
    (reply.wall_ms > 0).then(|| reply.productive_ms.min(reply.wall_ms) as f64 / reply.wall_ms as f64)
}

fn as_json(args: &JobArgs, reply: &IncidentsReply, incidents: &[Incident]) {
    for incident in incidents {
        let mut line = serde_json::to_value(incident).unwrap_or_default();
        if let Value::Object(fields) = &mut line {
            fields.insert("event".into(), json!("incident"));
            fields.insert("planned".into(), json!(incident.cause.is_planned()));
            fields.insert("steps_lost".into(), json!(incident.steps_lost()));
            fields.insert("total_ms".into(), json!(incident.total_ms()));
        }
        say!("{line}");
    }
    let count = |planned: bool| -> u64 {
        reply.counts.iter().filter(|count| count.planned == planned).map(|count| count.count).sum()
    };
    let counts: serde_json::Map<String, Value> =
        reply.counts.iter().map(|count| (count.cause.clone(), json!(count.count))).collect();
    say!(
        "{}",
        json!({
            "event": "goodput", "job": args.name, "failures": count(false), "planned": count(true), "counts": counts,
            "productive_ms": reply.productive_ms, "wall_ms": reply.wall_ms, "goodput": goodput(reply),
        })
    );
}

fn as_text(reply: &IncidentsReply, incidents: &[Incident]) {
    if incidents.is_empty() {
        say!("no incidents");
    } else {
        let rows: Vec<Vec<String>> = incidents.iter().map(row).collect();
        let header = [
            "NUMBER",
            "CAUSE",
            "WHO",
            "DETECT",
            "ABORT",
            "AGREE",
            "RESTORE",
            "FIRST STEP",
            "TOTAL",
            "LOST",
            "SOURCE",
            "OUTCOME",
            "REASON",
        ];
        table::print(&header, &rows);
    }
    let counts: Vec<String> = reply.counts.iter().map(|count| format!("{} {}", count.count, count.cause)).collect();
    if !counts.is_empty() {
        say!("\nall of them: {}", counts.join(", "));
    }
    if let Some(share) = goodput(reply) {
        let (steps, wall) = (reply.productive_ms as f64 / 1e3, reply.wall_ms as f64 / 1e3);
        say!("goodput {:.1}%: {steps:.1} s on steps of {wall:.1} s since the first", 100.0 * share);
    }
}

fn row(incident: &Incident) -> Vec<String> {
    let time = |ms: Option<u64>| ms.map_or("-".to_string(), |ms| format!("{ms} ms"));
    let who = match (&incident.node, incident.rank) {
        (Some(node), Some(rank)) => format!("{node}, rank {rank}"),
        (Some(node), None) => node.to_string(),
        (None, Some(rank)) => format!("rank {rank}"),
        (None, None) => incident.link.as_ref().map_or("-".into(), |(one, other)| format!("link {one}\u{2013}{other}")),
    };
    let cause = match (incident.exit_code, incident.signal) {
        (_, Some(signal)) => format!("{} (signal {signal})", incident.cause.name()),
        (Some(code), _) => format!("{} (exit code {code})", incident.cause.name()),
        _ => incident.cause.name().to_string(),
    };
    let outcome = serde_json::to_value(incident.outcome).ok();
    vec![
        incident.number.to_string(),
        cause,
        who,
        time(Some(incident.detect_ms)),
        time(incident.abort_ms),
        time(incident.agree_ms),
        time(incident.restore_ms),
        time(incident.first_step_ms),
        time(Some(incident.total_ms())),
        incident.steps_lost().map_or("-".into(), |steps| format!("{steps} steps")),
        if incident.source.is_empty() { "-".into() } else { incident.source.clone() },
        outcome.as_ref().and_then(Value::as_str).unwrap_or("-").to_string(),
        incident.reason.clone(),
    ]
}
