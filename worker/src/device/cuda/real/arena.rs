//! Device memory in few large pieces.
//!
//! What a model is made of are hundreds of arrays, all taken when it is made and given back together. Small ones share
//! a slab, one behind the other; a slab goes back to the driver when the last of its arrays does. Large ones have a
//! piece of their own, which the driver rounds to its pages anyway.

use std::collections::HashMap;

use cudarc::driver::result::{self, DriverError};

/// Bytes of a slab.
const SLAB: usize = 64 << 20;
/// Arrays beyond this have a piece of their own.
const SMALL: usize = 8 << 20;
/// What arrays' addresses are multiples of.
const ALIGN: usize = 256;

/// A piece of memory from the driver.
struct Slab {
    /// Bytes that arrays were given, from its start on.
    used: usize,
    /// Arrays in it that were not given back.
    arrays: usize,
}

/// See the module's text. The context is bound wherever it is used.
#[derive(Default)]
pub(super) struct Arena {
    slabs: HashMap<u64, Slab>,
    /// The slab of each small array.
    homes: HashMap<u64, u64>,
    /// The slab that still has room.
    current: Option<u64>,
}

impl Arena {
    /// Memory, its content undefined, aligned to 256 bytes.
    pub(super) fn take(&mut self, bytes: usize) -> Result<u64, DriverError> {
        let bytes = bytes.max(1);
        if bytes > SMALL {
            // SAFETY: nothing reads the memory before it is written.
            return unsafe { result::malloc_sync(bytes) };
        }
        let room = |(_, slab): &(u64, &mut Slab)| SLAB - slab.used >= bytes;
        let found = self.current.and_then(|at| Some((at, self.slabs.get_mut(&at)?))).filter(room);
        let (start, slab) = match found {
            Some(found) => found,
            None => {
                // SAFETY: as above.
                let start = unsafe { result::malloc_sync(SLAB) }?;
                self.current = Some(start);
                (start, self.slabs.entry(start).or_insert(Slab { used: 0, arrays: 0 }))
            }
        };
        let address = start + slab.used as u64;
        slab.used += bytes.next_multiple_of(ALIGN);
        slab.arrays += 1;
        self.homes.insert(address, start);
        Ok(address)
    }

    /// Gives an array back, and its piece with the last one in it; the driver waits for work that uses that.
    pub(super) fn give_back(&mut self, address: u64) {
        let piece = match self.homes.remove(&address) {
            None => address,
            Some(home) => {
                let Some(slab) = self.slabs.get_mut(&home) else { return };
                slab.arrays -= 1;
                if slab.arrays > 0 {
                    return;
                }
                self.slabs.remove(&home);
                self.current = self.current.filter(|current| *current != home);
                home
            }
        };
        // SAFETY: taken from the driver, and given back once.
        let _ = unsafe { result::free_sync(piece) };
    }
}
