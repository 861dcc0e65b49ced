//! What the store benchmark found, for people and for scripts.

use checkpoint_store::LoadReport;
use serde_json::{Value, json};

use super::rates::Rates;
use crate::args::Output;
use crate::table::{self, say};

/// Seconds of both sides, round by round.
#[derive(Debug, Default)]
pub(super) struct Pair {
    pub(super) ours: Vec<f64>,
    pub(super) plain: Vec<f64>,
}

impl Pair {
    /// Our rate over the plain one, of the medians.
    fn ratio(&self) -> f64 {
        median(&self.plain) / median(&self.ours)
    }

    fn json(&self) -> Value {
        json!({
            "seconds": median(&self.ours), "plain_seconds": median(&self.plain), "ratio": self.ratio(),
            "rounds": self.ours, "plain_rounds": self.plain,
        })
    }
}

/// A load at another size than the save.
#[derive(Debug)]
pub(super) struct Reshard {
    pub(super) from: u32,
    pub(super) to: u32,
    /// `plain` is the load of what as many ranks saved.
    pub(super) times: Pair,
    pub(super) over_read: f64,
}

impl Reshard {
    fn ratio(&self) -> f64 {
        median(&self.times.ours) / median(&self.times.plain)
    }
}

/// All of it.
#[derive(Debug)]
pub(super) struct Report {
    url: String,
    bytes: u64,
    ranks: u32,
    rounds: usize,
    pub(super) save: Pair,
    pub(super) cold: Pair,
    pub(super) warm: Pair,
    pub(super) load: LoadReport,
    pub(super) reshards: Vec<Reshard>,
    /// Seconds of a plain warm reader that also hashes.
    pub(super) warm_hashed: Vec<f64>,
    pub(super) rates: Rates,
    pub(super) peer: Option<Value>,
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

impl Report {
    pub(super) fn new(url: &str, bytes: u64, ranks: u32, rounds: usize) -> Self {
        let (save, cold, warm) = (Pair::default(), Pair::default(), Pair::default());
        let load = LoadReport::default();
        let url = url.to_owned();
        let (reshards, warm_hashed, rates, peer) = (vec![], vec![], Rates::default(), None);
        Self { url, bytes, ranks, rounds, save, cold, warm, load, reshards, warm_hashed, rates, peer }
    }

    pub(super) fn print(&self, output: Output) {
        match output {
            Output::Json => say!("{}", self.json()),
            Output::Text => self.text(),
        }
    }

    fn json(&self) -> Value {
        let reshards = self.reshards.iter().map(|r| {
            json!({
                "from": r.from, "to": r.to, "seconds": median(&r.times.ours), "same_seconds": median(&r.times.plain),
                "ratio": r.ratio(), "over_read": r.over_read,
            })
        });
        json!({
            "event": "bench_store", "store": self.url, "bytes": self.bytes, "ranks": self.ranks,
            "rounds": self.rounds, "save": self.save.json(), "load_cold": self.cold.json(),
            "load_warm": (!self.warm.ours.is_empty()).then(|| self.warm.json()), "load": self.load,
            "over_read": self.load.over_read(), "reshard": reshards.collect::<Vec<_>>(),
            "load_warm_hashed_seconds": (!self.warm_hashed.is_empty()).then(|| median(&self.warm_hashed)),
            "one_thread": self.rates.json(), "peer": self.peer,
        })
    }

    fn rate(&self, seconds: &[f64]) -> String {
        format!("{:.0}", self.bytes as f64 / median(seconds) / 1e6)
    }

    fn text(&self) {
        let (size, ranks, rounds) = (table::bytes(self.bytes), self.ranks, self.rounds);
        say!("{}: {size} of state over {ranks} ranks, medians of {rounds}", self.url);
        let mut rows = vec![];
        for (name, pair) in [("save", &self.save), ("load, cold", &self.cold), ("load, warm", &self.warm)] {
            if !pair.ours.is_empty() {
                let ratio = format!("{:.2}", pair.ratio());
                rows.push(vec![name.to_owned(), self.rate(&pair.ours), self.rate(&pair.plain), ratio]);
            }
        }
        table::print(&["", "CAIRN MB/s", "PLAIN MB/s", "RATIO"], &rows);
        let row = |r: &Reshard| {
            let (over, ratio) = (format!("{:.3}", r.over_read), format!("{:.2}", r.ratio()));
            vec![format!("{} -> {}", r.from, r.to), self.rate(&r.times.ours), self.rate(&r.times.plain), ratio, over]
        };
        let rows: Vec<_> = self.reshards.iter().map(row).collect();
        say!("");
        table::print(&["RESHARD", "MB/s", "SAME SIZE MB/s", "TIME RATIO", "READ/NEEDED"], &rows);
        let l = &self.load;
        say!(
            "\na cold load's seconds, over all threads: plan {:.3}, read {:.3}, verify {:.3}, place {:.3}; {} requests",
            l.plan.seconds,
            l.read.seconds,
            l.verify.seconds,
            l.place.seconds,
            l.requests
        );
        if !self.warm_hashed.is_empty() {
            let (rate, ratio) = (self.rate(&self.warm_hashed), median(&self.warm_hashed) / median(&self.warm.ours));
            say!("a plain warm reader that hashes what it reads: {rate} MB/s; a warm load is {ratio:.2} of it");
        }
        say!("{}", self.rates.text());
        if let Some(peer) = &self.peer {
            self.peer_text(peer);
        }
    }

    fn peer_text(&self, peer: &Value) {
        let mut rows = vec![
            vec!["cairn save".to_owned(), format!("{:.3}", median(&self.save.ours)), self.rate(&self.save.ours)],
            vec!["cairn load, cold".to_owned(), format!("{:.3}", median(&self.cold.ours)), self.rate(&self.cold.ours)],
        ];
        for (name, key) in [
            ("DCP save, synced", "dcp_save_seconds"),
            ("DCP load, cold", "dcp_load_cold_seconds"),
            ("DCP async save, caller held", "dcp_async_stall_seconds"),
            ("Orbax save, synced", "orbax_save_seconds"),
        ] {
            if let Some(seconds) = peer[key].as_f64() {
                rows.push(vec![name.to_owned(), format!("{seconds:.3}"), self.rate(&[seconds])]);
            }
        }
        say!("");
        table::print(&["PEER", "SECONDS", "MB/s"], &rows);
    }
}
