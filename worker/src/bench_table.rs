//! Where a training step's time goes: every operation of one worker's step, beside its floor on this machine.
//!
//! The floor is measured, not looked up: the rate of a large matrix product, and the rate at which a long run of memory
//! is read and written. What an operation takes at least is its operations over the one or its bytes over the other,
//! whichever is more; attention's products run at the rate of products, as they would in the best kernel.

use std::sync::Arc;
use std::time::Instant;

use checkpoint_store::Space;
use proto::spec::{DeviceKind, JobSpec};

use crate::bench::BenchError;
use crate::device::choose::start;
use crate::device::cpu::CpuDevice;
use crate::device::timed::{Row, Timed, UPDATE};
use crate::device::{Device, ExactForm, MatmulShape, Part, PartMut, Product, RankState, TrainDevice, Update, Write};
use crate::exact::{ExactGradient, mean_scale};
use crate::exact32::BlockGradient;
use crate::feed::{Feed, Synthetic};
use crate::init::initialize;
use crate::model::{MicroBatch, Model, parameters};
use crate::optimizer::AdamW;
use crate::slots::Slots;

/// Elements that are moved to measure the memory's rate, and rows and columns of the products that measure the
/// arithmetic's; the larger ones are for GPUs.
const MOVED: [usize; 2] = [1 << 26, 1 << 28];
const SQUARES: [usize; 2] = [1024, 8192];

/// One operation of a step.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Line {
    /// Its name; products with their shape.
    pub operation: String,
    /// Calls of one step.
    pub calls: usize,
    /// Seconds of one step.
    pub seconds: f64,
    /// Seconds it takes at least, as the machine's rates say; 0 where nothing is known.
    pub floor: f64,
}

/// All operations of a step, the longest first.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Table {
    /// Operations.
    pub lines: Vec<Line>,
    /// Operations a second of a large product.
    pub operations_per_second: f64,
    /// Bytes a second, read and written.
    pub bytes_per_second: f64,
}

/// Takes steps for about `seconds`, every operation waited for and timed.
pub fn bench_table(spec: &JobSpec, kind: DeviceKind, threads: usize, seconds: f64) -> Result<Table, BenchError> {
    if kind == DeviceKind::Cuda {
        return measure(&start(0, spec.training.reduction)?, spec, seconds);
    }
    measure(&CpuDevice::new(threads)?, spec, seconds)
}

fn measure<D: TrainDevice>(device: &D, spec: &JobSpec, seconds: f64) -> Result<Table, BenchError> {
    let kind = usize::from(D::ACTIVATION_BYTES == 2);
    let (operations, bytes) = (arithmetic(device, SQUARES[kind])?, memory(device, MOVED[kind])?);
    let timed = Timed::new(device);
    let mut step = Step::new(&timed, device.exact_form(), spec)?;
    let mut optimizer = Optimizer::new(device, &mut step, spec)?;
    // The first step touches its memory for the first time.
    for limit in [0.0, seconds] {
        timed.restart();
        let began = Instant::now();
        while timed.rounds() == 0 || began.elapsed().as_secs_f64() < limit {
            step.take(&timed)?;
            optimizer.update(&timed, device, &mut step)?;
        }
    }
    let steps = timed.rounds();
    let line = |(operation, row): (String, Row)| Line {
        operation,
        calls: row.calls.div_ceil(steps),
        seconds: row.seconds / steps as f64,
        floor: (row.operations / operations).max(row.bytes / bytes) / steps as f64,
    };
    let mut lines: Vec<Line> = timed.rows().into_iter().map(line).collect();
    lines.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    Ok(Table { lines, operations_per_second: operations, bytes_per_second: bytes })
}

/// Operations a second of a square product, the best of a few.
fn arithmetic<D: TrainDevice>(device: &D, n: usize) -> Result<f64, BenchError> {
    let matrix = || device.allocate_activation(n * n, "a matrix");
    let (mut a, mut b, mut c) = (matrix()?, matrix()?, matrix()?);
    // No zeros: a device that has less to switch runs faster.
    let values: Vec<f32> = (0..n * n).map(|i| (i * 7919 % 1009) as f32 / 1009.0 - 0.5).collect();
    device.upload_activation(&values, PartMut(&mut a, 0))?;
    device.upload_activation(&values, PartMut(&mut b, 0))?;
    best(device, 2.0 * (n * n * n) as f64, || {
        let shape = MatmulShape::new(n, n, n);
        device.enter(|| device.matmul(Product::NT, shape, Part(&a, 0), Part(&b, 0), Write::Replace, PartMut(&mut c, 0)))
    })
}

/// Bytes a second of a copy, the best of a few.
fn memory<D: TrainDevice>(device: &D, moved: usize) -> Result<f64, BenchError> {
    let [from, mut to] = [device.allocate(moved, "a run of memory")?, device.allocate(moved, "a run of memory")?];
    best(device, 8.0 * moved as f64, || device.copy(moved, Part(&from, 0), PartMut(&mut to, 0)))
}

fn best<D: TrainDevice>(
    device: &D,
    work: f64,
    mut run: impl FnMut() -> crate::device::DeviceResult,
) -> Result<f64, BenchError> {
    let mut rate = 0.0f64;
    for _ in 0..5 {
        let ((), seconds) = device.time(&mut run)?;
        rate = rate.max(work / seconds);
    }
    Ok(rate)
}

/// What one worker alone needs for the computing part of a step.
struct Step<D: Device> {
    model: Model<D>,
    feed: Feed,
    parameters: D::Activation,
    gradient: D::Buffer,
    sums: Sums<D>,
    losses: D::Losses,
    norms: Vec<f64>,
    micro_batches: usize,
    block: usize,
}

/// The whole optimizer state, as a rank alone has it.
struct Optimizer<D: TrainDevice> {
    state: D::State,
    rule: AdamW,
    elements: usize,
}

impl<D: TrainDevice> Optimizer<D> {
    fn new(device: &D, step: &mut Step<Timed<'_, D>>, spec: &JobSpec) -> Result<Self, BenchError> {
        let elements = step.model.parameter_count();
        let slots = Arc::new(Slots::default());
        slots.reserve(elements)?;
        let mut state = D::State::new(device, slots, elements)?.ok_or(BenchError::NoSlot)?;
        let [values, first, second] = state.fill();
        initialize(&spec.model, spec.training.seed, 0..elements, values);
        first.fill(0.0);
        second.fill(0.0);
        state.filled(device, &mut step.parameters, 0)?;
        Ok(Self { state, rule: AdamW::new(&spec.optimizer, &parameters(&spec.model)), elements })
    }

    /// One update: of three states, and from the gradient, and to the model's copy of the parameters.
    fn update(&mut self, timed: &Timed<'_, D>, device: &D, step: &mut Step<Timed<'_, D>>) -> Result<(), BenchError> {
        let bytes = self.elements * (24 + 4 + D::ACTIVATION_BYTES);
        let update = Update {
            rule: &self.rule,
            scalars: self.rule.scalars(1, 0.0, 1.0),
            shard: 0..self.elements,
            parameters: &mut step.parameters,
            gradient: &step.gradient,
            capture: false,
        };
        timed.time(UPDATE, (0, bytes), || self.state.update(device, update))?;
        Ok(())
    }
}

enum Sums<D: Device> {
    Fixed(ExactGradient<D>),
    Blocks(BlockGradient<D>),
}

impl<D: Device> Step<D> {
    fn new(device: &D, form: ExactForm, spec: &JobSpec) -> Result<Self, BenchError> {
        let training = &spec.training;
        let space = Space::of_model(&spec.model).map_err(|error| BenchError::Input(error.to_string()))?;
        let (count, block) = (space.elements() as usize, space.block_elements() as usize);
        let (batch, sequence, micro_batches) =
            (training.micro_batch, training.sequence_length, training.micro_batches());
        let vocabulary = u32::try_from(spec.model.vocab_size).unwrap_or(u32::MAX);
        let sums = match form {
            ExactForm::Fixed => Sums::Fixed(ExactGradient::new(device, count, micro_batches)?),
            ExactForm::Blocks => Sums::Blocks(BlockGradient::new(device, count, block, micro_batches)?),
        };
        Ok(Self {
            model: Model::new(&spec.model, batch, sequence, device)?,
            feed: Feed::new(Box::new(Synthetic { vocabulary, sequence, held_out: 0 }), batch * sequence),
            parameters: device.allocate_activation(count, "the parameters")?,
            gradient: device.allocate(count, "a gradient")?,
            sums,
            losses: device.allocate_losses(micro_batches)?,
            norms: vec![0.0; count.div_ceil(block)],
            micro_batches,
            block,
        })
    }

    fn take(&mut self, device: &D) -> Result<(), BenchError> {
        match &mut self.sums {
            Sums::Fixed(sums) => sums.restart(),
            Sums::Blocks(sums) => sums.restart(device)?,
        }
        for m in 0..self.micro_batches {
            let (tokens, targets) =
                self.feed.micro_batch(1, m).map_err(|error| BenchError::Input(error.to_string()))?;
            self.model.load(device, MicroBatch { tokens, targets })?;
            self.model.compute(device, &self.parameters, &mut self.gradient, &mut self.losses, m)?;
            match &mut self.sums {
                Sums::Fixed(sums) => drop(sums.add(device, &self.gradient)?),
                Sums::Blocks(sums) => sums.add(device, &self.gradient)?,
            }
        }
        let (count, gradient) = (self.model.parameter_count(), &mut self.gradient);
        match &self.sums {
            Sums::Fixed(sums) => {
                device.gradient_from_sums(count, mean_scale(self.micro_batches), sums.sums(), 0, gradient)?;
            }
            Sums::Blocks(sums) => {
                let scale = 1.0 / self.micro_batches as f64;
                device.gradient_from_blocks(count, scale, sums.sums(), 0, gradient)?;
            }
        }
        Ok(device.block_square_sums(count, self.block, gradient, &mut self.norms)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operation_of_a_step_has_its_line() {
        let text = "name = \"table\"\n[model]\npreset = \"tiny\"\nnum_hidden_layers = 2\n[data]\ntrain = \"none\"\n\
                    [training]\nsteps = 4\nsequence_length = 16\nglobal_batch = 4\nmicro_batch = 2\n";
        let spec = JobSpec::parse("test", text, std::path::Path::new("/"), &std::collections::BTreeMap::new()).unwrap();
        let table = bench_table(&spec, DeviceKind::Cpu, 1, 0.0).unwrap();
        let find = |name: &str| table.lines.iter().find(|line| line.operation == name).unwrap();
        // Two micro-batches, two layers and the last norm.
        assert_eq!(find("rmsnorm_forward").calls, 2 * 5);
        assert_eq!(find("attention_backward").calls, 4);
        assert_eq!(find("adamw").calls, 1);
        assert_eq!(find("accumulate_exact").calls, 2);
        assert!(find("product TN 704 × 128 × 32").floor > 0.0);
        assert!(table.operations_per_second > 1e8 && table.bytes_per_second > 1e7);
    }
}
