//! Tests of P1 on any device: the same bits whatever number of workers take the steps, and from whatever step they go
//! on. Workers are threads, each with a device of its own, exchanging over loopback.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use checkpoint_store::Space;
use proto::ids::Generation;
use proto::spec::{JobSpec, Overrides};

use crate::collective::{RingListener, RingMembership, RingTimeouts, connect};
use crate::device::cpu::CpuDevice;
use crate::device::{ExactForm, RankState, TrainDevice};
use crate::feed::Synthetic;
use crate::generation::{Finished, Member, Observer, Trainer, train};
use crate::init::initialize;
use crate::session::Control;
use crate::slots::Slots;
use crate::step::{StepError, Taken, gather_parameters};

/// All of a job's state after a step, as its bits.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Whole {
    step: u64,
    exponents: Vec<i8>,
    /// Parameters, first and second moment of the whole space.
    states: [Vec<u32>; 3],
    pub(crate) losses: Vec<u64>,
}

/// A small job: several micro-batches, so that worlds of several sizes have something to share.
pub(crate) fn spec(model: &str, reduction: &str) -> JobSpec {
    let text = format!(
        "name = \"worlds\"\n[model]\n{model}\n[data]\ntrain = \"none\"\n[training]\nsteps = 100\nsequence_length = 20\n\
         global_batch = 6\nmicro_batch = 1\nvalidate_every = 0\nreduction = \"{reduction}\"\n[optimizer]\n\
         learning_rate = 1e-2\n[checkpoint]\nevery_steps = 1000\nmemory_every = 1000\n"
    );
    JobSpec::parse("test", &text, std::path::Path::new("/"), &Overrides::new()).unwrap()
}

/// Two layers of a width that several blocks of the canonical space hold.
pub(crate) const SMALL: &str = "hidden_size = 64\nnum_hidden_layers = 2\nnum_attention_heads = 2\n\
                                num_key_value_heads = 1\nintermediate_size = 96\nvocab_size = 1100";

/// The same as a GPT-2, of more positions than a sequence has tokens.
pub(crate) const SMALL_GPT2: &str = "architecture = \"gpt2\"\nhidden_size = 64\nnum_hidden_layers = 2\n\
                                     num_attention_heads = 2\nvocab_size = 1100\nmax_position_embeddings = 24";

/// Trains from `start`, or from the beginning, to step `until` with `world` workers.
pub(crate) fn run<D: TrainDevice>(
    make: &(impl Fn() -> D + Sync),
    spec: &JobSpec,
    world: usize,
    start: Option<&Whole>,
    until: u64,
) -> Whole {
    let host = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let (listeners, addresses): (Vec<_>, Vec<_>) = (0..world).map(|_| RingListener::bind(host).unwrap()).unzip();
    let memberships = RingMembership::of_ring(&addresses, &spec.name, Generation::new(1), [7; 32]);
    let parts: Vec<Whole> = std::thread::scope(|scope| {
        let work =
            |(listener, membership)| scope.spawn(move || rank(make(), spec, &listener, &membership, start, until));
        let running: Vec<_> = listeners.into_iter().zip(memberships).map(work).collect();
        running.into_iter().map(|worker| worker.join().unwrap()).collect()
    });
    let mut whole = parts[0].clone();
    for part in &parts[1..] {
        assert_eq!((&part.exponents, &part.losses, part.step), (&whole.exponents, &whole.losses, whole.step));
        for (all, own) in whole.states.iter_mut().zip(&part.states) {
            all.extend(own);
        }
    }
    whole
}

fn rank<D: TrainDevice>(
    device: D,
    spec: &JobSpec,
    listener: &RingListener,
    membership: &RingMembership,
    start: Option<&Whole>,
    until: u64,
) -> Whole {
    let vocabulary = spec.model.vocab_size as u32;
    let source = Synthetic { vocabulary, sequence: spec.training.sequence_length, held_out: 0 };
    let space = Space::of_model(&spec.model).unwrap();
    let mut trainer = Trainer::new(spec.clone(), device, space, Box::new(source)).unwrap();
    let control = Control::new(false);
    let limit = Duration::from_mins(1);
    let timeouts = RingTimeouts { connect: limit, operation: limit };
    let ring = connect(listener, membership, timeouts, control.ring()).unwrap();
    let shard = trainer.shards(ring.world_size())[ring.rank().index()].clone();
    let slots = Arc::new(Slots::default());
    slots.reserve(shard.len()).unwrap();
    let mut state = D::State::new(&trainer.device, slots.clone(), shard.len()).unwrap().unwrap();
    match start {
        None => {
            let [parameters, first, second] = state.fill();
            initialize(&spec.model, spec.training.seed, shard.clone(), parameters);
            first.fill(0.0);
            second.fill(0.0);
        }
        Some(start) => {
            for (to, from) in state.fill().into_iter().zip(&start.states) {
                to.iter_mut().zip(&from[shard.clone()]).for_each(|(to, from)| *to = f32::from_bits(*from));
            }
        }
    }
    let (step, exponents) = start.map_or((0, &[][..]), |start| (start.step, &start.exponents));
    assert!(trainer.gradient_sum.resume(exponents));
    state.filled(&trainer.device, &mut trainer.parameters, shard.start).unwrap();
    let mut member = Member::new(&trainer, ring, state, slots, (membership.generation, step)).unwrap();
    gather_parameters(&mut trainer, &mut member).unwrap();
    let mut watch = Watch { elements: shard.len(), frozen: None, losses: vec![] };
    let (step, _) = train(&mut trainer, &mut member, step, until, &control, &mut watch).unwrap();
    let states = watch.frozen.expect("the last step is captured");
    Whole { step, exponents: trainer.gradient_sum.exponents().to_vec(), states, losses: watch.losses }
}

/// Keeps the losses, and the state that the last step captures.
struct Watch {
    elements: usize,
    frozen: Option<[Vec<u32>; 3]>,
    losses: Vec<u64>,
}

impl<D: TrainDevice> Observer<D> for Watch {
    type Error = StepError;

    fn updated(&mut self, _: u64, _: &Taken) {}

    fn finished(&mut self, trainer: &Trainer<D>, member: &mut Member<D>, done: Finished) -> Result<(), StepError> {
        self.losses.push(done.taken.loss.to_bits());
        if done.taken.decision.capture.is_some() {
            let frozen = member.state.freeze(&trainer.device)?;
            if let Some(arrive) = frozen.arrival {
                arrive()?;
            }
            let bytes = 4 * self.elements;
            // SAFETY: the slot is frozen.
            let states = unsafe { frozen.slot.map.frozen(3 * bytes) };
            self.frozen = Some([0, 1, 2].map(|n| bytemuck::cast_slice(&states[n * bytes..(n + 1) * bytes]).to_vec()));
        }
        Ok(())
    }
}

/// What holds on every device: worlds of 1, 2, 3 and more workers than micro-batches, and going on in another world
/// from what any of them left, give the same state.
pub(crate) fn same_bits_in_every_world<D: TrainDevice>(make: &(impl Fn() -> D + Sync), spec: &JobSpec, steps: u64) {
    let alone = run(make, spec, 1, None, steps);
    assert!(alone.losses.iter().all(|loss| f64::from_bits(*loss).is_finite()));
    for world in [1, 2, 3, 7] {
        assert!(run(make, spec, world, None, steps) == alone, "{world} workers");
    }
    let half = run(make, spec, 3, None, steps / 2);
    for world in [1, 2] {
        let resumed = run(make, spec, world, Some(&half), steps);
        assert_eq!(resumed.exponents, alone.exponents);
        assert!(resumed.states == alone.states, "resumed by {world}");
    }
}

#[test]
fn worlds_agree_on_the_fixed_grid_and_on_block_grids() {
    for form in [ExactForm::Fixed, ExactForm::Blocks] {
        let make = || CpuDevice::new(1).unwrap().with_form(form);
        same_bits_in_every_world(&make, &spec(SMALL, "exact"), 6);
    }
}

#[test]
fn worlds_agree_on_a_gpt2() {
    for form in [ExactForm::Fixed, ExactForm::Blocks] {
        let make = || CpuDevice::new(2).unwrap().with_form(form);
        same_bits_in_every_world(&make, &spec(SMALL_GPT2, "exact"), 6);
    }
}

#[test]
fn both_forms_train_alike() {
    let fixed = run(&|| CpuDevice::new(2).unwrap(), &spec(SMALL, "exact"), 1, None, 12);
    let blocks = || CpuDevice::new(2).unwrap().with_form(ExactForm::Blocks);
    let blocks = run(&blocks, &spec(SMALL, "exact"), 1, None, 12);
    assert!(fixed.exponents.is_empty() && blocks.exponents.len() == fixed.states[0].len().div_ceil(1 << 16));
    for (one, other) in fixed.losses.iter().zip(&blocks.losses) {
        let (one, other) = (f64::from_bits(*one), f64::from_bits(*other));
        assert!((one - other).abs() < 1e-4 * one, "{one} {other}");
    }
}
