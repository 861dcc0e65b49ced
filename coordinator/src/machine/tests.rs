//! The machine driven by hand-made events in virtual time.

mod admission;
mod detection;
mod doubting;
mod failure;
mod incidents;
mod keeping;
mod life;
mod memory;
mod nodes;
mod random;
mod rig;
mod several;
