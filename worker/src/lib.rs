//! One training process: the model and the device it computes on, exact gradient sums, the optimizer, the exchange with
//! other workers, the data, and the step that ties them together.

pub mod device;
pub mod exact;
pub mod init;
pub mod math;
pub mod model;
pub mod optimizer;
pub mod rng;
pub mod schedule;

pub mod collective;
pub mod data;
