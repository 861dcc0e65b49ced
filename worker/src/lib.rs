//! One training process: the model and the device it computes on, exact gradient sums, the optimizer, the exchange with
//! other workers, the data, and the step that ties them together.

pub mod device;
pub mod exact;
pub mod exact32;
pub mod init;
pub mod math;
pub mod model;
pub mod optimizer;
pub mod rng;
pub mod schedule;

pub mod collective;
pub mod data;

pub mod bench;
pub mod bench_capture;
pub mod bench_collective;
pub mod bench_table;
pub mod capture;
pub mod dataset;
pub mod feed;
pub mod generation;
pub mod gradient;
pub mod hostile;
pub mod load;
pub mod machine;
pub mod run;
pub mod session;
pub mod slots;
pub mod state;
pub mod step;
pub mod trainer;
pub mod word;
#[cfg(test)]
mod worlds;

pub use run::{Options, WorkerError, run};
