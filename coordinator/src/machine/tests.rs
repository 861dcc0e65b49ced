//! The machine driven by hand-made events in virtual time.

mod failure;
mod keeping;
mod life;
mod random;
mod rig;
