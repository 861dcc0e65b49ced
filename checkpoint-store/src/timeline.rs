//! Where the time of a save went: per rank and stage, when it began, how long it took, how many bytes it moved.
//!
//! Each rank measures on its own clock, from its own capture on; all ranks capture after the same step, so the lines
//! stand beside one another. Times travel with the receipts and stay in the manifest. They are no part of the digest:
//! how long a save took says nothing about the state.

use std::io::{Read, Write};

use proto::ids::Rank;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::codec::{Reader, Writer, Wrong};

/// The stage the committer adds.
pub const COMMIT: &str = "commit";
/// The stage of [`crate::upload_shard`].
pub const UPLOAD: &str = "upload";
/// Most stages of one rank.
pub const MAX_STAGES: usize = 16;
/// Most ranks whose times are kept.
const MAX_RANKS: usize = 1 << 17;
/// Most different names of stages.
const MAX_NAMES: usize = 64;
/// Longest name of a stage.
const MAX_STAGE_NAME: usize = 32;
/// Rows of ranks in a drawing; the ranks beyond are summed up in one more.
const ROWS: usize = 40;

/// One stage of one rank's save.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stage {
    /// `capture`, `hash`, `parity`, `upload`, `commit`, or another lower-case word.
    pub name: String,
    /// When it began, in microseconds from the capture.
    pub start_micros: u64,
    /// How long it took, in microseconds.
    pub micros: u64,
    /// The bytes it was about.
    pub bytes: u64,
}

impl Stage {
    /// A stage measured in seconds. What is no time at all, such as a negative number, counts as zero.
    pub fn new(name: &str, start_seconds: f64, seconds: f64, bytes: u64) -> Self {
        let micros = |seconds: f64| (seconds.max(0.0) * 1e6) as u64;
        Self { name: name.to_owned(), start_micros: micros(start_seconds), micros: micros(seconds), bytes }
    }

    /// When it ended, in microseconds from the capture.
    pub fn end_micros(&self) -> u64 {
        self.start_micros.saturating_add(self.micros)
    }

    pub(crate) fn check(&self) -> Result<(), Wrong> {
        let name = &self.name;
        let good = (1..=MAX_STAGE_NAME).contains(&name.len())
            && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
        if good {
            return Ok(());
        }
        let shown: String = name.chars().take(MAX_STAGE_NAME).collect();
        Err(format!("{shown:?} is no name of a stage: 1 to {MAX_STAGE_NAME} of a-z, 0-9 and '_'"))
    }
}

/// Checks a receipt's stages: how many, and usable names.
pub(crate) fn check_stages(stages: &[Stage]) -> Result<(), Wrong> {
    if stages.len() > MAX_STAGES {
        return Err(format!("{} stages; there are at most {MAX_STAGES}", stages.len()));
    }
    stages.iter().try_for_each(Stage::check)
}

/// The times of a whole save.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Timeline {
    names: Vec<String>,
    ranks: Vec<(Rank, Vec<Span>)>,
    commit: Option<Stage>,
}

/// A stage, its name as an index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Span {
    name: usize,
    start: u64,
    micros: u64,
    bytes: u64,
}

impl Span {
    fn end(&self) -> u64 {
        self.start.saturating_add(self.micros)
    }
}

/// One stage over all ranks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StageSummary {
    /// Its name.
    pub name: String,
    /// The rank that took longest, the lowest of several; `None` for the committer's stage.
    pub slowest: Option<Rank>,
    /// How long that one took, in microseconds.
    pub micros: u64,
    /// What half of the ranks took at most, in microseconds.
    pub median_micros: u64,
    /// The bytes of all ranks.
    pub bytes: u64,
}

impl Timeline {
    /// Adds a rank's stages; a rank without any is left out, and so are names and ranks beyond what is kept.
    pub(crate) fn add(&mut self, rank: Rank, stages: &[Stage]) {
        let mut spans = vec![];
        for stage in stages {
            let Some(name) = index_of(&mut self.names, &stage.name) else { continue };
            spans.push(Span { name, start: stage.start_micros, micros: stage.micros, bytes: stage.bytes });
        }
        if !spans.is_empty() && self.ranks.len() < MAX_RANKS {
            self.ranks.push((rank, spans));
        }
    }

    /// Adds the committer's stage. It begins when the last rank has stored its part; writing manifest and record comes
    /// after it, so that part cannot be in it.
    pub fn set_commit(&mut self, seconds: f64, bytes: u64) {
        let start = self.ranks.iter().map(|(_, spans)| end(spans)).max().unwrap_or(0);
        self.commit = Some(Stage { start_micros: start, ..Stage::new(COMMIT, 0.0, seconds, bytes) });
    }

    /// Whether nothing was measured.
    pub fn is_empty(&self) -> bool {
        self.ranks.is_empty() && self.commit.is_none()
    }

    /// The stages of a rank.
    pub fn stages(&self, rank: Rank) -> Vec<Stage> {
        let found = self.ranks.iter().find(|(r, _)| *r == rank);
        found.map_or(vec![], |(_, spans)| spans.iter().map(|span| self.stage(span)).collect())
    }

    /// Every stage with its rank; the committer's has none.
    pub fn all(&self) -> impl Iterator<Item = (Option<Rank>, Stage)> {
        let of_rank = move |(rank, spans): &(Rank, Vec<Span>)| {
            let rank = Some(*rank);
            spans.iter().map(move |span| (rank, self.stage(span))).collect::<Vec<_>>()
        };
        self.ranks.iter().flat_map(of_rank).chain(self.commit.iter().map(|stage| (None, stage.clone())))
    }

    fn stage(&self, span: &Span) -> Stage {
        let name = self.names.get(span.name).cloned().unwrap_or_default();
        Stage { name, start_micros: span.start, micros: span.micros, bytes: span.bytes }
    }

    /// The rank that was done last, the lowest of several, and when, in microseconds from the capture.
    pub fn slowest(&self) -> Option<(Rank, u64)> {
        let ends = self.ranks.iter().map(|(rank, spans)| (*rank, end(spans)));
        ends.max_by_key(|(rank, end)| (*end, std::cmp::Reverse(*rank)))
    }

    /// Each stage over all ranks, in the order in which stages begin.
    pub fn summary(&self) -> Vec<StageSummary> {
        let mut order: Vec<(u64, StageSummary)> = vec![];
        for (index, name) in self.names.iter().enumerate() {
            let of = |(rank, spans): &(Rank, Vec<Span>)| {
                let own: Vec<&Span> = spans.iter().filter(|s| s.name == index).collect();
                let micros = own.iter().fold(0u64, |sum, s| sum.saturating_add(s.micros));
                let bytes = own.iter().fold(0u64, |sum, s| sum.saturating_add(s.bytes));
                own.first().map(|first| (*rank, first.start, micros, bytes))
            };
            let all: Vec<_> = self.ranks.iter().filter_map(of).collect();
            let slowest = all.iter().max_by_key(|(rank, _, micros, _)| (*micros, std::cmp::Reverse(*rank)));
            let Some((rank, _, micros, _)) = slowest else { continue };
            let mut lengths: Vec<u64> = all.iter().map(|(_, _, micros, _)| *micros).collect();
            lengths.sort_unstable();
            let summary = StageSummary {
                name: name.clone(),
                slowest: Some(*rank),
                micros: *micros,
                median_micros: lengths[lengths.len() / 2],
                bytes: all.iter().fold(0u64, |sum, (_, _, _, bytes)| sum.saturating_add(*bytes)),
            };
            order.push((all.iter().map(|(_, start, _, _)| *start).min().unwrap_or(0), summary));
        }
        order.sort_by_key(|(start, _)| *start);
        let mut summaries: Vec<_> = order.into_iter().map(|(_, summary)| summary).collect();
        summaries.extend(self.commit.iter().map(|stage| StageSummary {
            name: stage.name.clone(),
            slowest: None,
            micros: stage.micros,
            median_micros: stage.micros,
            bytes: stage.bytes,
        }));
        summaries
    }

    /// As JSON: the summary, the slowest rank, and all ranks' stages, in seconds.
    pub fn to_json(&self) -> Value {
        let seconds = |micros: u64| micros as f64 / 1e6;
        let stage = |s: &Stage| {
            let (start, length) = (seconds(s.start_micros), seconds(s.micros));
            json!({"stage": s.name, "start": start, "seconds": length, "bytes": s.bytes})
        };
        let rank = |(rank, spans): &(Rank, Vec<Span>)| {
            let stages: Vec<Value> = spans.iter().map(|span| stage(&self.stage(span))).collect();
            json!({"rank": rank, "stages": stages})
        };
        let summary = |s: &StageSummary| {
            json!({
                "stage": s.name, "slowest_rank": s.slowest, "seconds": seconds(s.micros),
                "median_seconds": seconds(s.median_micros), "bytes": s.bytes,
            })
        };
        json!({
            "slowest": self.slowest().map(|(rank, end)| json!({"rank": rank, "end": seconds(end)})),
            "stages": self.summary().iter().map(summary).collect::<Vec<_>>(),
            "ranks": self.ranks.iter().map(rank).collect::<Vec<_>>(),
            "commit": self.commit.as_ref().map(stage),
        })
    }

    /// Drawn for people: the stages, then a bar for each rank, the slowest first, and one for the ranks beyond the
    /// fortieth. `width` is that of a bar.
    pub fn render(&self, width: usize) -> Vec<String> {
        if self.is_empty() {
            return vec!["no times were recorded with this checkpoint".into()];
        }
        let width = width.clamp(10, 400);
        let mut lines = vec![];
        for s in self.summary() {
            let slowest = s.slowest.map_or("coordinator".into(), |rank| format!("rank {rank}"));
            let (longest, median) = (time(s.micros), time(s.median_micros));
            let rate =
                if s.micros == 0 || s.bytes == 0 { String::new() } else { format!(", {} MB", s.bytes / 1_000_000) };
            let mark = mark(&s.name);
            lines.push(format!("{mark} {:<10} slowest {slowest}: {longest}, median {median}{rate}", s.name));
        }
        let end = self.slowest().map_or(0, |(_, end)| end).max(self.commit.as_ref().map_or(0, Stage::end_micros));
        let mut ranks: Vec<&(Rank, Vec<Span>)> = self.ranks.iter().collect();
        ranks.sort_by_key(|(rank, spans)| (std::cmp::Reverse(self::end(spans)), *rank));
        let (shown, rest) = ranks.split_at(ranks.len().min(ROWS));
        lines.push(String::new());
        for (rank, spans) in shown {
            let bars: Vec<(char, u64, u64)> =
                spans.iter().map(|s| (mark(&self.names[s.name]), s.start, s.end())).collect();
            let label = format!("rank {rank}");
            lines.push(format!("{label:>12} |{}| {}", bar(&bars, end, width), time(self::end(spans))));
        }
        if let (Some(first), Some(last)) = (rest.first(), rest.last()) {
            let (most, least) = (time(self::end(&first.1)), time(self::end(&last.1)));
            lines.push(format!("{:>12}  {} more ranks, done within {least} to {most}", "", rest.len()));
        }
        if let Some(commit) = &self.commit {
            let bars = [(mark(COMMIT), commit.start_micros, commit.end_micros())];
            lines.push(format!("{:>12} |{}| {}", COMMIT, bar(&bars, end, width), time(commit.end_micros())));
        }
        lines
    }

    /// Writes the times: the names once, then numbers only.
    pub(crate) fn write<W: Write>(&self, out: &mut Writer<W>) -> std::io::Result<()> {
        out.length(self.names.len())?;
        self.names.iter().try_for_each(|name| out.text(name))?;
        out.length(self.ranks.len())?;
        let mut next = 0;
        for (rank, spans) in &self.ranks {
            out.signed(i64::from(rank.get()) - next)?;
            next = i64::from(rank.get()) + 1;
            out.length(spans.len())?;
            for span in spans {
                out.length(span.name)?;
                [span.start, span.micros, span.bytes].into_iter().try_for_each(|n| out.number(n))?;
            }
        }
        out.length(usize::from(self.commit.is_some()))?;
        self.commit.iter().try_for_each(|stage| write_stage(out, stage))
    }

    pub(crate) fn read<R: Read>(from: &mut Reader<R>) -> Result<Self, Wrong> {
        let mut line = Self::default();
        for _ in 0..from.length("names of stages", MAX_NAMES)? {
            line.names.push(from.text("a stage's name", MAX_STAGE_NAME)?);
        }
        let mut next = 0;
        for _ in 0..from.length("ranks with times", MAX_RANKS)? {
            let rank = from.signed()?.checked_add(next).and_then(|rank| u32::try_from(rank).ok());
            let rank = rank.ok_or("its times are of a rank that cannot be")?;
            next = i64::from(rank) + 1;
            let mut spans = Vec::new();
            for _ in 0..from.length("stages of a rank", MAX_STAGES)? {
                let name = from.length("names of stages", line.names.len().saturating_sub(1))?;
                let (start, micros, bytes) = (from.number()?, from.number()?, from.number()?);
                spans.push(Span { name, start, micros, bytes });
            }
            line.ranks.push((Rank::new(rank), spans));
        }
        if from.length("stages of the commit", 1)? == 1 {
            line.commit = Some(read_stage(from)?);
        }
        let names = line.names.iter().map(|name| Stage::new(name, 0.0, 0.0, 0).check());
        names.collect::<Result<(), _>>()?;
        if line.names.is_empty() && !line.ranks.is_empty() {
            return Err("its times name no stages".into());
        }
        Ok(line)
    }
}

pub(crate) fn write_stage<W: Write>(out: &mut Writer<W>, stage: &Stage) -> std::io::Result<()> {
    out.text(&stage.name)?;
    [stage.start_micros, stage.micros, stage.bytes].into_iter().try_for_each(|n| out.number(n))
}

pub(crate) fn read_stage<R: Read>(from: &mut Reader<R>) -> Result<Stage, Wrong> {
    let name = from.text("a stage's name", MAX_STAGE_NAME)?;
    let stage = Stage { name, start_micros: from.number()?, micros: from.number()?, bytes: from.number()? };
    stage.check().map(|()| stage)
}

fn index_of(names: &mut Vec<String>, name: &str) -> Option<usize> {
    let found = names.iter().position(|n| n == name);
    if found.is_none() && names.len() < MAX_NAMES {
        names.push(name.to_owned());
        return Some(names.len() - 1);
    }
    found
}

fn end(spans: &[Span]) -> u64 {
    spans.iter().map(Span::end).max().unwrap_or(0)
}

/// The character a stage is drawn with.
fn mark(name: &str) -> char {
    match name {
        "capture" => 'c',
        "hash" => '#',
        "parity" => '=',
        UPLOAD => '>',
        COMMIT => '!',
        _ => name.chars().next().unwrap_or('?'),
    }
}

/// Stages drawn to scale; each that took place has a character at least, and a later one covers an earlier one.
fn bar(stages: &[(char, u64, u64)], end: u64, width: usize) -> String {
    let mut cells = vec!['.'; width];
    let scale = |at: u64| (u128::from(at) * width as u128 / u128::from(end.max(1))) as usize;
    for (mark, from, to) in stages {
        let first = scale(*from).min(width - 1);
        let last = scale(*to).clamp(first + 1, width);
        cells[first..last].fill(*mark);
    }
    cells.into_iter().collect()
}

fn time(micros: u64) -> String {
    match micros {
        0..1_000 => format!("{micros} µs"),
        1_000..1_000_000 => format!("{:.1} ms", micros as f64 / 1e3),
        _ => format!("{:.2} s", micros as f64 / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn line(ranks: u32) -> Timeline {
        let mut line = Timeline::default();
        for rank in 0..ranks {
            // Rank 3 is the slow one to upload, rank 1 the slow one to hash.
            let hash = if rank == 1 { 0.5 } else { 0.1 };
            let upload = if rank == 3 { 2.0 } else { 1.0 };
            line.add(
                Rank::new(rank),
                &[
                    Stage::new("capture", 0.0, 0.01, 100),
                    Stage::new("hash", 0.01, hash, 100),
                    Stage::new("upload", 0.6, upload, 2_000_000),
                ],
            );
        }
        line.set_commit(0.25, 5);
        line
    }

    #[test]
    fn the_slowest_are_named() {
        let line = line(100);
        assert_eq!(line.slowest(), Some((Rank::new(3), 2_600_000)));
        let summary = line.summary();
        let of: Vec<_> = summary.iter().map(|s| (s.name.as_str(), s.slowest.map(Rank::get), s.micros)).collect();
        let wanted = [
            ("capture", Some(0), 10_000),
            ("hash", Some(1), 500_000),
            ("upload", Some(3), 2_000_000),
            ("commit", None, 250_000),
        ];
        assert_eq!(of, wanted);
        assert_eq!((summary[2].median_micros, summary[2].bytes), (1_000_000, 200_000_000));
        assert_eq!(line.to_json()["slowest"]["rank"], 3);
        assert_eq!(line.to_json()["ranks"][7]["stages"][2]["seconds"], 1.0);
        assert_eq!(line.to_json()["commit"]["start"], 2.6);
    }

    #[test]
    fn a_drawing_has_few_rows_and_the_slowest_first() {
        let drawn = line(16_384).render(60);
        assert!(drawn.len() <= 48, "{} rows", drawn.len());
        assert!(drawn.iter().all(|row| row.chars().count() <= 120));
        let bars: Vec<&String> = drawn.iter().filter(|row| row.contains('|')).collect();
        assert!(bars[0].contains("rank 3 ") && bars[0].contains('>') && bars[0].contains('#'), "{}", bars[0]);
        assert!(drawn.iter().any(|row| row.contains("16344 more ranks")));
        assert!(bars[bars.len() - 1].contains("commit") && bars[bars.len() - 1].contains('!'));
        assert!(Timeline::default().render(60)[0].contains("no times"));
    }

    proptest! {
        #[test]
        fn times_read_back(
            ranks in proptest::collection::btree_map(0u32..70_000, proptest::collection::vec(
                ("[a-z]{1,8}", any::<u64>(), any::<u64>(), any::<u64>()), 1..5), 0..20),
            commit: bool,
        ) {
            let mut line = Timeline::default();
            for (rank, stages) in ranks {
                let stages = stages.into_iter().map(|(name, start_micros, micros, bytes)| {
                    Stage { name, start_micros, micros, bytes }
                });
                line.add(Rank::new(rank), &stages.collect::<Vec<_>>());
            }
            if commit {
                line.set_commit(1.5, 7);
            }
            let mut out = Writer(vec![]);
            line.write(&mut out).unwrap();
            let mut reader = Reader::new(&out.0[..], 1 << 20);
            prop_assert_eq!(Timeline::read(&mut reader), Ok(line.clone()));
            // Whatever was measured can be shown.
            line.render(40);
            line.to_json();
        }
    }
}
