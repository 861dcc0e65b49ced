//! The wire contract and the shared vocabulary of Cairn.
//!
//! Every other room imports this one and none of each other's insides: what they say to each other is said in these
//! types. `ids` has the counters and names, `spec` the job specification, `event` what a job tells its watchers,
//! `incident` what went wrong with it, `auth` the token of the control plane, `tls` its certificates and encrypted
//! connections, `net` the network below them, `wire` the generated gRPC messages, `chance` the random names, and
//! `invariant` what holds at every moment.

pub mod auth;
pub mod chance;
pub mod date;
pub mod event;
pub mod ids;
pub mod incident;
pub mod invariant;
pub mod net;
pub mod spec;
pub mod tls;
pub mod wire;
