//! The parts that manifests and receipts share in their binary form: scalar state, states, objects.
//!
//! An object's path holds the job, the step, the generation, the rank and a UUID, and of these only the last is news:
//! a path that this library made is written as those numbers, and any other as a text.

use std::io::{self, Read, Write};

use proto::ids::{Generation, JobName, Rank, Step, WorldSize};
use uuid::Uuid;

use crate::codec::{Reader, Writer, Wrong};
use crate::digest::StateDecl;
use crate::layout;
use crate::manifest::MAX_STATES;
use crate::object::{Extent, ObjectEntry};
use crate::scalar::ScalarState;
use crate::space::Dtype;

/// Longest path of an object.
const MAX_PATH: usize = 1_000;
/// Longest name of a state.
const MAX_STATE_NAME: usize = 64;
/// Most exponents, and most samples left out, of a scalar state.
const MAX_SCALARS: usize = 1 << 22;

fn too_many(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, format!("more {what} than a reader takes"))
}

pub(crate) fn read_job<R: Read>(from: &mut Reader<R>) -> Result<JobName, Wrong> {
    let name = from.text("the job's name", 64)?;
    JobName::new(name).map_err(|e| e.to_string())
}

pub(crate) fn read_world_size<R: Read>(from: &mut Reader<R>) -> Result<WorldSize, Wrong> {
    let size = from.up_to("workers", u64::from(u32::MAX))?;
    WorldSize::new(size as u32).ok_or_else(|| "it is of a world of no workers".into())
}

pub(crate) fn write_dtype<W: Write>(out: &mut Writer<W>, dtype: Dtype) -> io::Result<()> {
    out.text(dtype.name())
}

pub(crate) fn read_dtype<R: Read>(from: &mut Reader<R>) -> Result<Dtype, Wrong> {
    let name = from.text("a type", 16)?;
    [Dtype::F32].into_iter().find(|dtype| dtype.name() == name).ok_or_else(|| format!("type {name:?} is unknown"))
}

pub(crate) fn write_scalar<W: Write>(out: &mut Writer<W>, scalar: &ScalarState) -> io::Result<()> {
    if scalar.exponents.len().max(scalar.samples_left_out.len()) > MAX_SCALARS {
        return Err(too_many("exponents or samples left out"));
    }
    [scalar.step.get(), scalar.seed, scalar.cursor, scalar.horizon].into_iter().try_for_each(|n| out.number(n))?;
    out.length(scalar.exponents.len())?;
    scalar.exponents.iter().try_for_each(|exponent| out.signed(i64::from(*exponent)))?;
    out.length(scalar.samples_left_out.len())?;
    scalar.samples_left_out.iter().try_for_each(|sample| out.number(*sample))
}

pub(crate) fn read_scalar<R: Read>(from: &mut Reader<R>) -> Result<ScalarState, Wrong> {
    let (step, seed, cursor, horizon) = (Step::new(from.number()?), from.number()?, from.number()?, from.number()?);
    let (mut exponents, mut samples_left_out) = (vec![], vec![]);
    for _ in 0..from.length("exponents", MAX_SCALARS)? {
        exponents.push(i32::try_from(from.signed()?).map_err(|_| "an exponent does not fit 32 bits")?);
    }
    for _ in 0..from.length("samples left out", MAX_SCALARS)? {
        samples_left_out.push(from.number()?);
    }
    Ok(ScalarState { step, seed, cursor, horizon, exponents, samples_left_out })
}

pub(crate) fn write_states<W: Write>(out: &mut Writer<W>, states: &[StateDecl]) -> io::Result<()> {
    out.length(states.len())?;
    states.iter().try_for_each(|state| {
        out.text(&state.name)?;
        write_dtype(out, state.dtype)
    })
}

pub(crate) fn read_states<R: Read>(from: &mut Reader<R>) -> Result<Vec<StateDecl>, Wrong> {
    let mut states = vec![];
    for _ in 0..from.length("states", MAX_STATES)? {
        states.push(StateDecl { name: from.text("a state's name", MAX_STATE_NAME)?, dtype: read_dtype(from)? });
    }
    Ok(states)
}

pub(crate) fn write_object<W: Write>(
    out: &mut Writer<W>,
    job: &JobName,
    states: &[StateDecl],
    object: &ObjectEntry,
) -> io::Result<()> {
    match layout::object_name(job, &object.path) {
        Some(name) => {
            out.number(1)?;
            [name.step.get(), name.generation.get(), u64::from(name.rank.get())]
                .into_iter()
                .try_for_each(|n| out.number(n))?;
            out.raw(name.id.as_bytes())?;
        }
        None => {
            out.number(0)?;
            out.text(&object.path)?;
        }
    }
    out.number(object.bytes)?;
    out.length(object.extents.len())?;
    for extent in &object.extents {
        let state = states.iter().position(|state| state.name == extent.state);
        let unknown = || io::Error::new(io::ErrorKind::InvalidInput, format!("state {:?} is unknown", extent.state));
        out.length(state.ok_or_else(unknown)?)?;
        [extent.first, extent.elements, extent.offset].into_iter().try_for_each(|n| out.number(n))?;
    }
    Ok(())
}

/// Reads an object; `extents` is how many more extents there may be.
pub(crate) fn read_object<R: Read>(
    from: &mut Reader<R>,
    job: &JobName,
    states: &[StateDecl],
    extents: &mut usize,
) -> Result<ObjectEntry, Wrong> {
    let path = if from.up_to("as the kind of a path", 1)? == 1 {
        let (step, generation) = (Step::new(from.number()?), Generation::new(from.number()?));
        let rank = Rank::new(from.up_to("as a rank", u64::from(u32::MAX))? as u32);
        layout::object(job, step, generation, rank, Uuid::from_bytes(from.raw()?))
    } else {
        from.text("an object's path", MAX_PATH)?
    };
    let bytes = from.number()?;
    let count = from.length("extents", *extents)?;
    *extents -= count;
    let mut object = ObjectEntry { path, bytes, extents: vec![] };
    for _ in 0..count {
        let state = from.length("states", MAX_STATES)?;
        let state = states.get(state).ok_or("an extent is of a state that is not declared")?.name.clone();
        object.extents.push(Extent { state, first: from.number()?, elements: from.number()?, offset: from.number()? });
    }
    Ok(object)
}
