//! The operator's commands about nodes: `nodes`, `drain`, `undrain`.

use std::time::Duration;

use proto::wire::{NodeRequest, NodeStatus, NodesRequest};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::args::{DrainArgs, NodeArgs, OperatorArgs, Output};
use crate::client::{self, Client};
use crate::failure::Failure;
use crate::table::{self, say};

/// The longest a drain waits for jobs to save and leave.
const LEAVE: Duration = Duration::from_secs(600);
/// Between two looks at a node that is being emptied.
const LOOK: Duration = Duration::from_millis(300);

pub(crate) async fn list(args: OperatorArgs) -> Result<u8, Failure> {
    let mut client = client::operator(&args).await?;
    let nodes = fetch(&mut client, &args).await?;
    if args.output == Output::Text && nodes.is_empty() {
        say!("no nodes; start an agent on each with: cairn agent");
        return Ok(0);
    }
    show(&args, &nodes);
    Ok(0)
}

pub(crate) async fn drain(args: DrainArgs) -> Result<u8, Failure> {
    let mut client = client::operator(&args.operator).await?;
    let request = NodeRequest { node: args.node.to_string() };
    let reply = client.drain(client::timed(request)).await;
    let mut node = reply.map_err(|status| client::explain(status, &args.operator.coordinator))?.into_inner();
    let began = Instant::now();
    while args.wait && node.used > 0 {
        if began.elapsed() > LEAVE {
            let jobs = node.jobs.join(", ");
            return Err(Failure::job(format!("after {} s jobs are still on {}: {jobs}", LEAVE.as_secs(), node.node)));
        }
        tokio::time::sleep(LOOK).await;
        let nodes = fetch(&mut client, &args.operator).await?;
        // A node that is gone is empty as well.
        let Some(found) = nodes.into_iter().find(|found| found.node == node.node) else { break };
        node = found;
    }
    show(&args.operator, &[node]);
    Ok(0)
}

pub(crate) async fn undrain(args: NodeArgs) -> Result<u8, Failure> {
    let mut client = client::operator(&args.operator).await?;
    let reply = client.undrain(client::timed(NodeRequest { node: args.node.to_string() })).await;
    let node = reply.map_err(|status| client::explain(status, &args.operator.coordinator))?.into_inner();
    show(&args.operator, &[node]);
    Ok(0)
}

async fn fetch(client: &mut Client, operator: &OperatorArgs) -> Result<Vec<NodeStatus>, Failure> {
    let reply = client.list_nodes(client::timed(NodesRequest {})).await;
    Ok(reply.map_err(|status| client::explain(status, &operator.coordinator))?.into_inner().nodes)
}

fn show(operator: &OperatorArgs, nodes: &[NodeStatus]) {
    if operator.output == Output::Json {
        for node in nodes {
            say!("{}", node_json(node));
        }
        return;
    }
    let dash = |text: &str| if text.is_empty() { "-".to_string() } else { text.to_string() };
    let row = |node: &NodeStatus| {
        vec![
            node.node.clone(),
            node.state.clone(),
            format!("{}/{}", node.used, node.slots),
            dash(&node.domain),
            node.silent_ms.map_or("-".into(), |ms| format!("{:.1} s ago", ms as f64 / 1e3)),
            dash(&node.jobs.join(", ")),
            notes(node),
        ]
    };
    let rows: Vec<Vec<String>> = nodes.iter().map(row).collect();
    table::print(&["NODE", "STATE", "USED", "DOMAIN", "SEEN", "JOBS", "NOTES"], &rows);
}

/// What else is worth knowing of a node.
fn notes(node: &NodeStatus) -> String {
    let mut notes = Vec::new();
    if node.drained_by_operator {
        notes.push("drained by an operator".to_string());
    }
    if node.leaving {
        notes.push("its agent was told to stop".to_string());
    }
    notes.extend(Some(node.reason.clone()).filter(|reason| !reason.is_empty()));
    notes.extend(node.exchange_bytes_per_second.map(|rate| format!("exchanged {:.0} MB/s", rate / 1e6)));
    notes.extend(node.stragglers.iter().map(|of| format!("slow: rank {} of {}, {:.2}x", of.rank, of.job, of.ratio)));
    notes.extend(node.set_aside.iter().map(|aside| format!("set aside for {}: {}", aside.job, aside.reason)));
    notes.join("; ")
}

fn node_json(node: &NodeStatus) -> Value {
    let aside: Vec<Value> =
        node.set_aside.iter().map(|aside| json!({"job": aside.job, "reason": aside.reason})).collect();
    let slow = &node.stragglers;
    let slow = slow.iter().map(|of| json!({"job": of.job, "rank": of.rank, "ratio": of.ratio}));
    json!({
        "event": "node", "node": node.node, "state": node.state, "reason": node.reason, "slots": node.slots,
        "used": node.used, "domain": node.domain, "drained_by_operator": node.drained_by_operator,
        "leaving": node.leaving, "silent_ms": node.silent_ms, "jobs": node.jobs, "set_aside": aside,
        "stragglers": slow.collect::<Vec<_>>(),
        "exchange_bytes_per_second": node.exchange_bytes_per_second,
    })
}
