//! Threads of the CPU device: a loop whose iterations run on any thread in any order.
//!
//! Kernels cut their work into tasks by the shape alone, each task writes its own part of the output, and sums across
//! tasks are made afterwards in task order. So neither the number of threads nor who ran what can reach the bits.

use rayon::prelude::*;

use crate::device::DeviceError;

/// The device's own threads.
pub(crate) struct Pool {
    /// `None` for one thread: everything runs in the caller.
    threads: Option<rayon::ThreadPool>,
}

impl Pool {
    pub(crate) fn new(threads: usize) -> Result<Self, DeviceError> {
        if threads <= 1 {
            return Ok(Self { threads: None });
        }
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|n| format!("compute-{n}"))
            .build()
            .map_err(|source| DeviceError::Threads { threads, source })?;
        Ok(Self { threads: Some(pool) })
    }

    /// Number of threads.
    pub(crate) fn len(&self) -> usize {
        self.threads.as_ref().map_or(1, rayon::ThreadPool::current_num_threads)
    }

    /// Runs `task(0) … task(tasks - 1)`, each once.
    pub(crate) fn each(&self, tasks: usize, task: impl Fn(usize) + Sync) {
        match &self.threads {
            Some(pool) if tasks > 1 => {
                pool.install(|| (0..tasks).into_par_iter().with_max_len(1).for_each(&task));
            }
            _ => (0..tasks).for_each(task),
        }
    }

    /// Runs `work` on one of the threads, so that loops inside need no hand-over.
    pub(crate) fn enter<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        match &self.threads {
            Some(pool) => pool.install(work),
            None => work(),
        }
    }

    /// Which of the threads this is, below [`Pool::len`]: the index of its workspace.
    pub(crate) fn index(&self) -> usize {
        self.threads.as_ref().and_then(rayon::ThreadPool::current_thread_index).unwrap_or(0)
    }
}

/// The `i`-th of the ranges of at most `size` elements that make up `0..total`.
pub(crate) fn chunk(i: usize, size: usize, total: usize) -> std::ops::Range<usize> {
    (i * size).min(total)..((i + 1) * size).min(total)
}

/// A slice that tasks write disjoint parts of.
#[derive(Clone, Copy)]
pub(crate) struct Shared<T> {
    start: *mut T,
    len: usize,
}

// SAFETY: a Shared only hands out parts through an unsafe method whose caller promises that no two live parts overlap.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub(crate) fn new(slice: &mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len() }
    }

    /// A part to write.
    ///
    /// # Safety
    /// Parts in use at the same time must not overlap, and the slice this was made from must outlive them.
    ///
    /// # Panics
    /// If the part reaches beyond the slice.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn part(&self, from: usize, len: usize) -> &mut [T] {
        assert!(from <= self.len && len <= self.len - from, "part {from}+{len} of {}", self.len);
        // SAFETY: in range; the caller promises that parts do not overlap.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(from), len) }
    }

    /// The pointer at `from`, for kernels that write strided parts.
    ///
    /// # Safety
    /// As for [`Shared::part`], for the elements written.
    pub(crate) unsafe fn at(&self, from: usize) -> *mut T {
        debug_assert!(from <= self.len);
        // SAFETY: the caller stays within the slice.
        unsafe { self.start.add(from) }
    }
}
