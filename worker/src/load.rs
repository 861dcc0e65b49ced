//! The state a generation starts from: loaded from a checkpoint, or initialised from the seed.
//!
//! Either way a rank makes its own shard only and the ring carries the parameters around, so each byte is read from the
//! store once for the whole job (P5), whatever number of workers saved it. What is read is verified block by block
//! before it is used.

use std::ops::Range;

use checkpoint_store::loader::open_timed;
use checkpoint_store::{CheckpointRef, Loader, Manifest, ScalarState, Store, StoreError};
use proto::ids::Step;
use proto::spec::JobSpec;
use proto::wire::LoadStage;
use tokio::runtime::Handle;

use crate::device::TrainDevice;
use crate::generation::Trainer;
use crate::init::initialize;
use crate::session::Control;

/// Why the state could not be had.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The store, or what is in it.
    #[error("cannot load the state to start from: {0}")]
    Store(#[from] StoreError),
    /// The reference to the checkpoint is not one.
    #[error("the checkpoint to start from is not given as one: {0}")]
    Reference(#[from] serde_json::Error),
    /// The checkpoint is of another job.
    #[error("the checkpoint of step {step} does not belong to this job: {what}")]
    Foreign {
        /// Its step.
        step: Step,
        /// What differs.
        what: String,
    },
    /// The generation was broken off.
    #[error("broken off")]
    Aborted,
}

/// Where a generation starts.
#[derive(Debug, Clone, PartialEq)]
pub struct Start {
    /// Updates the state has seen.
    pub step: u64,
    /// `"initialised"`, `"memory"`, `"peer"`, `"parity"` or `"store"`.
    pub source: String,
    /// What having it cost.
    pub stages: Vec<LoadStage>,
    /// The grids that its next step's sums begin with; see [`crate::exact32`].
    pub exponents: Vec<i8>,
}

impl Start {
    /// The state before the first step.
    pub const INITIALISED: &'static str = "initialised";
    /// A stored checkpoint.
    pub const STORED: &'static str = "store";
}

/// The scalar state after `step` updates of a job: nothing in it depends on how the job was run. `exponents` are the
/// grids of the next step's sums, none where the grid is fixed.
pub fn scalar_state(spec: &JobSpec, step: u64, exponents: &[i8]) -> ScalarState {
    let cursor = step.saturating_mul(spec.training.global_batch as u64);
    let start = ScalarState::start(spec.training.seed, spec.training.steps);
    let exponents = exponents.iter().map(|exponent| i32::from(*exponent)).collect();
    ScalarState { step: Step::new(step), cursor, exponents, ..start }
}

/// Fills this rank's shard of all states: from the checkpoint `reference` (JSON), or from the seed if it is empty.
pub fn load_shard<D: TrainDevice>(
    trainer: &Trainer<D>,
    range: Range<usize>,
    states: [&mut [f32]; 3],
    reference: &[u8],
    handle: &Handle,
    control: &Control,
) -> Result<Start, LoadError> {
    let [parameters, exp_avg, exp_avg_sq] = states;
    if reference.is_empty() {
        initialize(&trainer.spec.model, trainer.spec.training.seed, range, parameters);
        exp_avg.fill(0.0);
        exp_avg_sq.fill(0.0);
        return Ok(Start { step: 0, source: Start::INITIALISED.into(), stages: vec![], exponents: vec![] });
    }
    let reference: CheckpointRef = serde_json::from_slice(reference)?;
    let range = range.start as u64..range.end as u64;
    let spec = &trainer.spec;
    let space = &trainer.space;
    let reading = async {
        let store = Store::open_existing(&spec.checkpoint.store)?;
        let (manifest, list) = open_timed(&store, &spec.name, &reference).await?;
        let exponents = check(&manifest, spec, space == &manifest.space)?;
        let states = [("param", parameters), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)];
        let mut targets = states.map(|(state, values)| (state, bytemuck::cast_slice_mut(values)));
        let report = Loader::new(&store, &manifest).listed(list).load(range, &mut targets).await?;
        let stages = report.stages().into_iter();
        let stages = stages.map(|(name, s)| LoadStage { name: name.into(), seconds: s.seconds, bytes: s.bytes });
        Ok(Start { step: reference.step.get(), source: Start::STORED.into(), stages: stages.collect(), exponents })
    };
    handle.block_on(async {
        tokio::select! {
            result = reading => result,
            () = control.aborted() => Err(LoadError::Aborted),
        }
    })
}

/// Whether a checkpoint is one of this job's; the grids it has.
fn check(manifest: &Manifest, spec: &JobSpec, same_space: bool) -> Result<Vec<i8>, LoadError> {
    let step = manifest.step;
    let foreign = |what: String| LoadError::Foreign { step, what };
    if !same_space {
        return Err(foreign("its parameters have other names or shapes".into()));
    }
    let exponents: Result<Vec<i8>, _> = manifest.scalar.exponents.iter().map(|e| i8::try_from(*e)).collect();
    let exponents = exponents.map_err(|_| foreign("it has grids that no device writes".into()))?;
    let right = scalar_state(spec, step.get(), &exponents);
    if manifest.scalar != right {
        let what = format!("its scalar state is {:?}; this job's is {right:?}", manifest.scalar);
        return Err(foreign(what));
    }
    Ok(exponents)
}
