//! A rank's optimizer state, in the slots, and its capture without a copy (P3, §8).
//!
//! The live state is read and written in one slot. A capture freezes that slot: from then on it belongs to the hashing
//! thread and the agent, and the next update reads the moments from it and writes them to another slot, which is live
//! from then on. Parameters are updated in the full buffer that computation uses; at a capturing step the update writes
//! them into the slot too. So an update moves no more bytes than without captures, but for that one write.

use std::collections::VecDeque;
use std::ops::{DerefMut, Range};
use std::sync::Arc;

use crate::device::{DeviceResult, Frozen, HostDevice, RankState, Update};
use crate::optimizer::ShardUpdate;
use crate::slots::{Slot, Slots};

/// A slot, as the buffers of its states.
struct Opened<D: HostDevice> {
    slot: Slot,
    param: D::Buffer,
    exp_avg: D::Buffer,
    exp_avg_sq: D::Buffer,
}

impl<D: HostDevice> Opened<D> {
    fn new(slot: Slot, elements: usize) -> Self {
        // SAFETY: the slot is this thread's until it is frozen, and the three parts do not overlap. Once frozen it is
        // only read, here as by the others.
        let part = |n: usize| unsafe { D::over(&slot.map, n * elements, elements) };
        Self { param: part(0), exp_avg: part(1), exp_avg_sq: part(2), slot }
    }
}

/// What an update reads and writes of the state.
struct UpdateParts<'a, B> {
    /// Where the new parameters are to be written too.
    mirror: Option<&'a mut B>,
    /// The moments before, if they lie in another slot.
    from: Option<[&'a B; 2]>,
    /// The moments after.
    to: [&'a mut B; 2],
}

/// The optimizer state of a rank in one generation.
pub struct ShardState<D: HostDevice> {
    slots: Arc<Slots>,
    elements: usize,
    live: Opened<D>,
    /// The slot that was frozen last, while the update that leaves it reads it.
    left: Option<Opened<D>>,
    frozen: bool,
    spares: VecDeque<Slot>,
}

impl<D: HostDevice> ShardState<D> {
    /// The buffers for the next update. Leaves a frozen slot for a spare one; `capture` says that the result will be
    /// frozen. `None`: the state is frozen and there is no spare slot, which [`ShardState::ready`] prevents.
    fn parts(&mut self, capture: bool) -> Option<UpdateParts<'_, D::Buffer>> {
        self.leave();
        if self.frozen {
            let next = Opened::new(self.spares.pop_front()?, self.elements);
            self.left = Some(std::mem::replace(&mut self.live, next));
            self.frozen = false;
        }
        let live = &mut self.live;
        Some(UpdateParts {
            mirror: capture.then_some(&mut live.param),
            from: self.left.as_ref().map(|left| [&left.exp_avg, &left.exp_avg_sq]),
            to: [&mut live.exp_avg, &mut live.exp_avg_sq],
        })
    }
}

impl<D: HostDevice<Buffer = B>, B: DerefMut<Target = [f32]> + 'static> RankState<D> for ShardState<D> {
    fn new(_: &D, slots: Arc<Slots>, elements: usize) -> DeviceResult<Option<Self>> {
        Ok(slots.take().map(|slot| {
            let live = Opened::new(slot, elements);
            Self { slots, elements, live, left: None, frozen: false, spares: VecDeque::new() }
        }))
    }

    fn slot(&self) -> u32 {
        self.live.slot.index
    }

    fn fill(&mut self) -> [&mut [f32]; 3] {
        [&mut self.live.param, &mut self.live.exp_avg, &mut self.live.exp_avg_sq]
    }

    fn filled(&mut self, _: &D, parameters: &mut B, at: usize) -> DeviceResult {
        parameters[at..at + self.elements].copy_from_slice(&self.live.param);
        Ok(())
    }

    fn ready(&mut self) -> bool {
        self.leave();
        let needed = 1 + usize::from(self.frozen);
        while self.spares.len() < needed {
            let Some(spare) = self.slots.take() else { return false };
            self.spares.push_back(spare);
        }
        true
    }

    fn update(&mut self, device: &D, update: Update<'_, D>) -> DeviceResult<bool> {
        let Update { rule, scalars, shard, parameters, gradient, capture } = update;
        let Some(UpdateParts { mirror, from, to }) = self.parts(capture) else { return Ok(false) };
        rule.update(device, &scalars, shard, ShardUpdate { parameters, mirror, from, to, gradient })?;
        Ok(true)
    }

    fn unchanged(&mut self, _: &D, parameters: &B, shard: Range<usize>) -> DeviceResult {
        self.live.param.copy_from_slice(&parameters[shard]);
        Ok(())
    }

    fn freeze(&mut self, _: &D) -> DeviceResult<Frozen> {
        self.leave();
        self.frozen = true;
        self.slots.hand_over(self.live.slot.index);
        Ok(Frozen { slot: self.live.slot.clone(), arrival: None })
    }
}

impl<D: HostDevice> ShardState<D> {
    /// The update that read the slot before is done: it is the agent's alone now.
    fn leave(&mut self) {
        if let Some(left) = self.left.take() {
            self.slots.give_back(left.slot.index);
        }
    }
}

impl<D: HostDevice> Drop for ShardState<D> {
    fn drop(&mut self) {
        self.leave();
        for slot in self.spares.drain(..).map(|slot| slot.index).chain([self.live.slot.index]) {
            self.slots.give_back(slot);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cpu::CpuDevice;

    fn state() -> (Arc<Slots>, ShardState<CpuDevice>) {
        let slots = Arc::new(Slots::default());
        slots.reserve(100).unwrap();
        let state = ShardState::new(&CpuDevice::new(1).unwrap(), slots.clone(), 100).unwrap().unwrap();
        (slots, state)
    }

    /// One update that adds one to everything, as an optimizer would through the parts.
    fn update(state: &mut ShardState<CpuDevice>, capture: bool) {
        let parts = state.parts(capture).expect("a slot to go on in");
        let before = parts.from.map(|from| from.map(|part| part.to_vec()));
        for (n, to) in parts.to.into_iter().enumerate() {
            for (i, value) in to.iter_mut().enumerate() {
                *value = before.as_ref().map_or(*value, |before| before[n][i]) + 1.0;
            }
        }
        if let Some(mirror) = parts.mirror {
            mirror.fill(9.0);
        }
    }

    fn freeze(state: &mut ShardState<CpuDevice>) -> Slot {
        state.freeze(&CpuDevice::new(1).unwrap()).unwrap().slot
    }

    #[test]
    fn a_snapshot_does_not_change_while_training_goes_on() {
        let (slots, mut state) = state();
        update(&mut state, false);
        assert!(state.ready());
        update(&mut state, true);
        let frozen = freeze(&mut state);
        assert!(state.ready(), "the third slot");
        update(&mut state, false);
        update(&mut state, true);
        let second = freeze(&mut state);
        assert_ne!(frozen.index, second.index);
        assert!(!state.ready(), "one is live, two are held");
        // SAFETY: the slots are frozen.
        let values = |slot: &Slot| unsafe { bytemuck::cast_slice::<u8, f32>(slot.map.frozen(1200)).to_vec() };
        assert_eq!((values(&frozen)[0], values(&frozen)[150], values(&frozen)[250]), (9.0, 2.0, 2.0));
        assert_eq!((values(&second)[150], values(&second)[250]), (4.0, 4.0));
        slots.free(frozen.index);
        assert!(state.ready());
        update(&mut state, false);
        assert_eq!(state.fill()[1][0], 5.0);
    }

    #[test]
    fn a_slot_freed_by_the_agent_is_not_written_while_it_is_left() {
        let (slots, mut state) = state();
        assert!(state.ready());
        update(&mut state, true);
        let frozen = freeze(&mut state);
        slots.free(frozen.index);
        // Still the source of the next update, so it is no spare.
        assert!(state.ready());
        assert!(state.spares.iter().all(|spare| spare.index != frozen.index));
        drop(state);
        assert_eq!((0..9).map_while(|_| slots.take()).count(), 3, "all are free again");
    }
}
