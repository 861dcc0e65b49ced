//! What a campaign came to: one row for each sort of fault, what was blamed wrongly, and the digests.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use super::blame;
use super::fault::Kind;

/// An incident, judged.
#[derive(Debug)]
pub struct Blamed {
    /// Whether cause and node are ones that the fault explains.
    pub rightly: bool,
    /// Whether a node, or the link between two, is named at all.
    pub named: bool,
    /// What it says.
    pub told: String,
}

/// One fault, or two that overlapped.
#[derive(Debug)]
pub struct Line {
    /// What was done.
    pub kinds: Vec<Kind>,
    /// How many of them found nothing to strike.
    pub missed: usize,
    /// The longest time between two new steps, as an operator sees them.
    pub gap: Duration,
    /// The incidents that followed.
    pub blame: Vec<Blamed>,
}

/// See the module header.
#[derive(Debug)]
pub struct Report {
    seed: u64,
    lines: Vec<Line>,
    /// Incidents that blame the wrong, and parts that ended by themselves for good.
    pub wrong: Vec<String>,
    /// How long it took.
    pub seconds: f64,
    digests: Option<(u64, String, String)>,
}

impl Report {
    /// Of nothing yet.
    pub fn new(seed: u64) -> Self {
        Self { seed, lines: vec![], wrong: vec![], seconds: 0.0, digests: None }
    }

    /// One more.
    pub fn add(&mut self, line: Line) {
        let names: Vec<&str> = line.kinds.iter().map(|kind| kind.name()).collect();
        let wrong = line.blame.iter().filter(|one| !one.rightly);
        self.wrong.extend(wrong.map(|one| format!("{}: {}", names.join(" and "), one.told)));
        if let [kind] = line.kinds[..]
            && blame::must_break(kind)
            && line.missed == 0
            && line.blame.is_empty()
        {
            self.wrong.push(format!("{}: no incident was told of", names[0]));
        }
        self.lines.push(line);
    }

    /// Parts that ended as only a wrong request or damaged data may end one.
    pub fn unexpected(&mut self, ends: &[(String, String)]) {
        let bad =
            |status: &str| status.ends_with("status: 2") || status.ends_with("status: 4") || status.contains("101");
        let bad = ends.iter().filter(|(_, status)| bad(status));
        self.wrong.extend(bad.map(|(part, status)| format!("{part} ended: {status}")));
    }

    /// The digests of the last step: the campaign's, and the undisturbed run's.
    pub fn end(&mut self, step: u64, digest: String, undisturbed: String) {
        self.digests = Some((step, digest, undisturbed));
    }

    /// Whether the weights are those of the undisturbed run.
    pub fn is_exact(&self) -> bool {
        self.digests.as_ref().is_some_and(|(_, one, other)| one == other)
    }

    /// How many faults there were, those left out that found nothing to strike.
    pub fn faults(&self) -> usize {
        self.lines.iter().map(|line| line.kinds.len() - line.missed).sum()
    }
}

/// Of a sort of fault.
#[derive(Default)]
struct Row {
    count: usize,
    incidents: usize,
    right: usize,
    named: usize,
    gaps: Vec<f64>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rows: BTreeMap<(usize, &str), Row> = BTreeMap::new();
        for line in self.lines.iter().filter(|line| line.missed < line.kinds.len()) {
            let key = match line.kinds[..] {
                [kind] => (kind as usize, kind.name()),
                _ => (usize::MAX, "two at once"),
            };
            let row = rows.entry(key).or_default();
            row.count += line.kinds.len() - line.missed;
            row.incidents += line.blame.len();
            row.right += line.blame.iter().filter(|one| one.rightly).count();
            row.named += line.blame.iter().filter(|one| one.rightly && one.named).count();
            row.gaps.push(line.gap.as_secs_f64());
        }
        writeln!(
            f,
            "| Fault | Count | Incidents | Attributed rightly | with a node or link | No new step, median | worst |"
        )?;
        writeln!(f, "|---|---|---|---|---|---|---|")?;
        let (mut incidents, mut right) = (0, 0);
        for ((_, name), mut row) in rows {
            row.gaps.sort_by(f64::total_cmp);
            let (median, worst) = (row.gaps[row.gaps.len() / 2], row.gaps[row.gaps.len() - 1]);
            let Row { count, incidents: told, right: well, named, .. } = row;
            writeln!(f, "| {name} | {count} | {told} | {well} | {named} | {median:.1} s | {worst:.1} s |")?;
            (incidents, right) = (incidents + told, right + well);
        }
        writeln!(
            f,
            "\nseed {}: {} faults in {:.0} s, nothing hung; {right} of {incidents} incidents attributed rightly",
            self.seed,
            self.faults(),
            self.seconds
        )?;
        for wrong in &self.wrong {
            writeln!(f, "wrong: {wrong}")?;
        }
        match &self.digests {
            Some((step, one, other)) if one == other => writeln!(f, "step {step}: same digest as undisturbed, {one}"),
            Some((step, one, other)) => writeln!(f, "step {step}: digest {one}, but undisturbed {other}"),
            None => writeln!(f, "not brought to its end"),
        }
    }
}
