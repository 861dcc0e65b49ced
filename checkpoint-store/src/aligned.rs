//! Memory that begins on a page: what a local disk reads and writes without a copy.

/// The page that direct input and output of a disk is counted in.
pub const PAGE: usize = 4096;

/// Zeroed memory whose first byte lies on a page boundary. A save from it and a load into it need no copy.
#[derive(Debug)]
pub struct AlignedBuffer {
    memory: Vec<u8>,
    start: usize,
    length: usize,
}

impl AlignedBuffer {
    /// `length` zeros.
    pub fn new(length: usize) -> Self {
        let memory = vec![0; length + PAGE];
        // The address may not change as long as the vector neither grows nor is cloned, and it does neither.
        let start = memory.as_ptr().addr().next_multiple_of(PAGE) - memory.as_ptr().addr();
        Self { memory, start, length }
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.length]
    }

    /// The bytes, to be changed.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.length]
    }
}

impl AsRef<[u8]> for AlignedBuffer {
    fn as_ref(&self) -> &[u8] {
        self.as_slice()
    }
}
