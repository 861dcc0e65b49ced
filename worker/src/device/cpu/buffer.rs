//! Float32 memory of the CPU device: its own, aligned to cache lines so that rows of whole vectors never straddle two,
//! or a part of a slot, which other processes can map.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use crate::device::{DeviceError, DeviceResult};
use crate::slots::SlotMap;

#[derive(Clone, Copy, Default, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([f32; 16]);

enum Memory {
    Own(Vec<Line>),
    /// Elements of a slot from `first` on.
    Slot {
        map: Arc<SlotMap>,
        first: usize,
    },
}

/// A run of float32 values; dereferences to a slice.
pub struct CpuBuffer {
    memory: Memory,
    len: usize,
}

impl CpuBuffer {
    /// `elements` zeros; `what` names them in the error when there is no room.
    pub fn zeroed(elements: usize, what: &'static str) -> DeviceResult<Self> {
        Ok(Self { memory: Memory::Own(reserve(elements.div_ceil(16), what)?), len: elements })
    }

    /// `elements` float32 values of a slot, from element `first` on.
    ///
    /// # Safety
    ///
    /// Nobody else writes to these elements while the buffer lives, in this process or another, and nobody reads them
    /// while they are written through it.
    pub(crate) unsafe fn over(map: Arc<SlotMap>, first: usize, elements: usize) -> Self {
        assert!((first + elements) * size_of::<f32>() <= map.len(), "the slot has room for the buffer");
        Self { memory: Memory::Slot { map, first }, len: elements }
    }
}

impl std::fmt::Debug for CpuBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CpuBuffer({} elements)", self.len)
    }
}

impl Deref for CpuBuffer {
    type Target = [f32];

    #[allow(clippy::cast_ptr_alignment)] // a mapping begins at a page
    fn deref(&self) -> &[f32] {
        match &self.memory {
            Memory::Own(lines) => &bytemuck::cast_slice(lines)[..self.len],
            // SAFETY: the constructor checked the bounds; a mapping is aligned to pages; its caller promised that
            // nobody writes meanwhile.
            Memory::Slot { map, first } => unsafe {
                std::slice::from_raw_parts(map.as_ptr().cast::<f32>().add(*first), self.len)
            },
        }
    }
}

impl DerefMut for CpuBuffer {
    #[allow(clippy::cast_ptr_alignment)] // a mapping begins at a page
    fn deref_mut(&mut self) -> &mut [f32] {
        match &mut self.memory {
            Memory::Own(lines) => &mut bytemuck::cast_slice_mut(lines)[..self.len],
            // SAFETY: as above, and the caller promised that these elements are this buffer's alone.
            Memory::Slot { map, first } => unsafe {
                std::slice::from_raw_parts_mut(map.as_ptr().cast::<f32>().add(*first), self.len)
            },
        }
    }
}

/// Zeroed memory, or an error where there is none.
pub(super) fn reserve<T: Clone + Default>(elements: usize, what: &'static str) -> DeviceResult<Vec<T>> {
    let mut list = Vec::new();
    let bytes = elements.saturating_mul(size_of::<T>());
    list.try_reserve_exact(elements).map_err(|_| DeviceError::OutOfMemory { bytes, what })?;
    list.resize(elements, T::default());
    Ok(list)
}
