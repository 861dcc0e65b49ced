//! Float32 memory of the CPU device: aligned to cache lines, so that rows of whole vectors never straddle two.

use std::ops::{Deref, DerefMut};

use bytemuck::{Pod, Zeroable};

use super::reserve;
use crate::device::DeviceResult;

#[derive(Clone, Copy, Default, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// A run of float32 values; dereferences to a slice.
pub struct CpuBuffer {
    lines: Vec<Line>,
    len: usize,
}

impl CpuBuffer {
    /// `elements` zeros; `what` names them in the error when there is no room.
    pub fn zeroed(elements: usize, what: &'static str) -> DeviceResult<Self> {
        Ok(Self { lines: reserve(elements.div_ceil(16), what)?, len: elements })
    }
}

impl std::fmt::Debug for CpuBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CpuBuffer({} elements)", self.len)
    }
}

impl Deref for CpuBuffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &bytemuck::cast_slice(&self.lines)[..self.len]
    }
}

impl DerefMut for CpuBuffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.len]
    }
}
