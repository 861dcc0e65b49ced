//! The machine driven by hand-made events in virtual time.

mod failure;
mod life;
mod random;
mod rig;
