//! Chaos on real processes: a cluster whose hosts are network namespaces, and a campaign of faults against it.
//!
//! `net` is the network, `lab` the cluster on it, `fault` what is done to it, `blame` what the ledger may then say,
//! `campaign` one seeded run with the digest as its oracle, `report` its table, `price` what fault tolerance costs
//! where nothing fails. `cargo run --release -p tests --bin chaos` is the command, `tests/tests/chaos.rs` its short
//! form.

pub mod blame;
pub mod campaign;
pub mod fault;
pub mod lab;
pub mod net;
pub mod price;
pub mod report;
