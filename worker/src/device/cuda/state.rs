//! A rank's optimizer state on the device, and its snapshots.
//!
//! Master parameters and both moments stay in device memory and are updated in place. A snapshot is copied into a slot
//! beside the computation: the copies wait for the update whose state they take, the next update waits for the copies.
//! Between two updates lie a forward and a backward pass, which take several times as long, so nothing is held up.
//! Slots are pinned when they are first copied to, so that copies run at the bus's speed.

use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use super::driver::{Driver, Stream};
use super::error::CudaResult;
use super::memory::{Array, Bf16, Mark};
use super::{CudaDevice, arguments, long};
use crate::device::{Device, DeviceResult, Frozen, PartMut, RankState, Update};
use crate::optimizer::{AdamW, AdamwScalars};
use crate::slots::{Slot, Slots};

/// The runs of the canonical space that are decayed or not, as the kernel takes them.
struct Runs<D: Driver> {
    host: Vec<(usize, bool)>,
    ends: Array<D, i64>,
    decay: Array<D, i32>,
}

/// See the module's text.
pub struct CudaState<D: Driver> {
    driver: Arc<D>,
    slots: Arc<Slots>,
    elements: usize,
    /// Parameters in float32, first and second moment, of the shard.
    states: [Array<D, f32>; 3],
    scalars: Array<D, f32>,
    runs: Option<Runs<D>>,
    /// The slot to start from, then the one the next snapshot goes to.
    spare: Option<Slot>,
    /// Slots that are pinned.
    pinned: Vec<Slot>,
    updated: Arc<Mark<D>>,
    /// The newest snapshot's copies, and whether there is one that the next update has to wait for.
    copied: Arc<Mark<D>>,
    copying: bool,
}

impl<D: Driver> CudaState<D> {
    /// Three states in a slot.
    ///
    /// # Safety
    /// The slot is this state's, and nobody else reads or writes it meanwhile.
    unsafe fn parts(slot: &mut Slot, elements: usize) -> [&mut [f32]; 3] {
        assert!(3 * elements * size_of::<f32>() <= slot.map.len(), "the slot has room for three states");
        #[allow(clippy::cast_ptr_alignment)] // a mapping begins at a page
        let start = slot.map.as_ptr().cast::<f32>();
        // SAFETY: in bounds, and the three do not overlap; the caller promises the rest.
        [0, 1, 2].map(|n| unsafe { std::slice::from_raw_parts_mut(start.add(n * elements), elements) })
    }

    /// Pins a slot, unless it is.
    fn pin(&mut self, slot: &Slot) -> CudaResult {
        if self.pinned.iter().any(|pinned| Arc::ptr_eq(&pinned.map, &slot.map)) {
            return Ok(());
        }
        let Some(memory) = NonNull::new(slot.map.as_ptr()) else { return Ok(()) };
        // SAFETY: the mapping is held in `pinned` until it is unregistered.
        unsafe { self.driver.register(memory, slot.map.len())? };
        self.pinned.push(slot.clone());
        Ok(())
    }

    /// Enqueues the copies of all three states, after the update before.
    fn copy(&mut self, slot: &Slot) -> CudaResult {
        self.pin(slot)?;
        self.driver.record(self.updated.event, Stream::Compute)?;
        self.driver.wait(Stream::Copy, self.updated.event)?;
        let bytes = self.elements * size_of::<f32>();
        for (n, state) in self.states.iter().enumerate() {
            let to = slot.map.as_ptr().wrapping_add(n * bytes);
            // SAFETY: pinned, with room for three states; whoever reads the slot waits for `copied` first.
            unsafe { self.driver.copy_out(Stream::Copy, state.at(0, self.elements), to, bytes)? };
        }
        self.driver.record(self.copied.event, Stream::Copy)?;
        self.copying = true;
        Ok(())
    }

    /// The rule's runs on the device.
    fn runs(&mut self, device: &CudaDevice<D>, rule: &AdamW) -> DeviceResult<&Runs<D>> {
        let known = self.runs.take().filter(|runs| runs.host == rule.runs());
        let runs = match known {
            Some(runs) => runs,
            None => {
                let host = rule.runs().to_vec();
                let ends = Array::zeroed(&self.driver, host.len(), "runs of parameters")?;
                let decay = Array::zeroed(&self.driver, host.len(), "runs of parameters")?;
                device.send(host.len(), &ends, 0, |i| long(host[i].0))?;
                device.send(host.len(), &decay, 0, |i| i32::from(host[i].1))?;
                Runs { host, ends, decay }
            }
        };
        Ok(self.runs.insert(runs))
    }
}

impl<D: Driver> RankState<CudaDevice<D>> for CudaState<D> {
    fn new(device: &CudaDevice<D>, slots: Arc<Slots>, elements: usize) -> DeviceResult<Option<Self>> {
        let Some(spare) = slots.take() else { return Ok(None) };
        let driver = device.driver.clone();
        let state = || Array::zeroed(&driver, elements, "a shard's optimizer state");
        let made = (|| {
            Ok((
                [state()?, state()?, state()?],
                Array::zeroed(&driver, 9, "an update's scalars")?,
                Arc::new(Mark::new(&driver, false)?),
                Arc::new(Mark::new(&driver, false)?),
            ))
        })();
        let (states, scalars, updated, copied) =
            made.inspect_err(|_: &super::error::CudaError| slots.give_back(spare.index))?;
        Ok(Some(Self {
            slots,
            elements,
            states,
            scalars,
            runs: None,
            spare: Some(spare),
            pinned: Vec::new(),
            updated,
            copied,
            copying: false,
            driver,
        }))
    }

    fn slot(&self) -> u32 {
        self.spare.as_ref().map_or(u32::MAX, |slot| slot.index)
    }

    fn fill(&mut self) -> [&mut [f32]; 3] {
        match &mut self.spare {
            // SAFETY: the slot was taken and not handed over, and nothing is copied to it before it is.
            Some(slot) => unsafe { Self::parts(slot, self.elements) },
            None => [&mut [], &mut [], &mut []],
        }
    }

    fn filled(&mut self, device: &CudaDevice<D>, parameters: &mut Array<D, Bf16>, at: usize) -> DeviceResult {
        let elements = self.elements;
        if let Some(slot) = &mut self.spare {
            // SAFETY: as above.
            let parts = unsafe { Self::parts(slot, elements) };
            for (part, state) in parts.into_iter().zip(&mut self.states) {
                device.upload(part, PartMut(state, 0))?;
            }
        }
        let (to, from) = (parameters.at(at, elements), self.states[0].at(0, elements));
        device.run("cast_to_bf16", [elements.div_ceil(2048), 1, 1], 256, 0, arguments![to, from, long(elements)])
    }

    fn ready(&mut self) -> bool {
        if self.spare.is_none() {
            self.spare = self.slots.take();
        }
        self.spare.is_some()
    }

    fn update(&mut self, device: &CudaDevice<D>, update: Update<'_, CudaDevice<D>>) -> DeviceResult<bool> {
        let Update { rule, scalars, shard, parameters, gradient, .. } = update;
        device.upload(&words(&scalars), PartMut(&mut self.scalars, 0))?;
        if std::mem::take(&mut self.copying) {
            self.driver.wait(Stream::Compute, self.copied.event)?;
        }
        let n = self.elements;
        assert_eq!(shard.len(), n, "the shard of this state");
        let runs = self.runs(device, rule)?;
        let count = runs.host.len();
        let (ends, decay) = (runs.ends.at(0, count), runs.decay.at(0, count));
        let [master, first, second] = self.states.each_ref().map(|state| state.at(0, n));
        parameters.at(shard.start, n);
        let (whole, gradient, scalars) = (parameters.at(0, shard.end), gradient.at(0, n), self.scalars.at(0, 9));
        let (runs, start) = (super::int(count), long(shard.start));
        let arguments = arguments![master, first, second, whole, gradient, ends, decay, runs, start, long(n), scalars];
        device.run("adamw", [n.div_ceil(2048), 1, 1], 256, 0, arguments)?;
        Ok(true)
    }

    fn unchanged(&mut self, _: &CudaDevice<D>, _: &Array<D, Bf16>, _: Range<usize>) -> DeviceResult {
        // The state on the device is what was filled.
        Ok(())
    }

    fn freeze(&mut self, device: &CudaDevice<D>) -> DeviceResult<Frozen> {
        let none = || crate::device::DeviceError::Unsupported("there is no free slot to copy a snapshot to".into());
        self.ready();
        let slot = self.spare.take().ok_or_else(none)?;
        if let Err(error) = self.copy(&slot) {
            self.spare = Some(slot);
            return Err(error.into());
        }
        self.slots.hand_over(slot.index);
        self.slots.give_back(slot.index);
        let (copied, patience) = (self.copied.clone(), device.patience);
        let arrival = move || copied.wait_host(patience, "copying a snapshot").map_err(Into::into);
        Ok(Frozen { slot, arrival: Some(Box::new(arrival)) })
    }
}

impl<D: Driver> Drop for CudaState<D> {
    fn drop(&mut self) {
        for slot in &self.pinned {
            if let Some(memory) = NonNull::new(slot.map.as_ptr()) {
                self.driver.unregister(memory);
            }
        }
        if let Some(spare) = self.spare.take() {
            self.slots.give_back(spare.index);
        }
    }
}

/// The scalars in the order in which the kernel has them.
fn words(scalars: &AdamwScalars) -> [f32; 9] {
    let AdamwScalars {
        beta1,
        one_minus_beta1,
        beta2,
        one_minus_beta2,
        step_size,
        inverse_root_correction2,
        epsilon,
        keep,
        clip,
    } = *scalars;
    [beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, inverse_root_correction2, epsilon, keep, clip]
}
