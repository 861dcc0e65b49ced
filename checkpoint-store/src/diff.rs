//! The difference between two checkpoints: which tensors, and by how much.
//!
//! Equal digests mean equal states, and nothing is read. Otherwise the manifests' block hashes say which blocks can
//! differ, and only those are read, from both sides, verified as any read is. Checkpoints of models of other shapes
//! have no common blocks: there, tensors of the same name and shape are compared element by element, and the rest is
//! listed.
//!
//! Numbers: an element differs if its bits do. The largest difference and the root of the mean square are over the
//! whole tensor, in 64-bit arithmetic in element order, so they are the same on every run; elements that are not finite
//! on either side are counted apart.

use std::collections::BTreeMap;
use std::ops::Range;

use serde::Serialize;

use crate::backend::Store;
use crate::error::StoreError;
use crate::load::read_range;
use crate::manifest::Manifest;
use crate::space::{Dtype, Space};

/// Elements compared at a time; it bounds the memory.
const CHUNK: u64 = 1 << 21;

/// One of two checkpoints.
#[derive(Debug, Clone, Copy)]
pub struct Side<'a> {
    /// Where it lies.
    pub store: &'a Store,
    /// Its manifest.
    pub manifest: &'a Manifest,
}

/// A scalar that differs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ScalarDifference {
    /// Its name.
    pub name: String,
    /// Its value in the first checkpoint.
    pub a: String,
    /// Its value in the second.
    pub b: String,
}

/// A tensor of a state that differs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TensorDifference {
    /// The state: `param`, `exp_avg`, …
    pub state: String,
    /// The tensor.
    pub tensor: String,
    /// Its elements.
    pub elements: u64,
    /// Elements whose bits differ.
    pub differing: u64,
    /// Differing elements that are not finite on one side or both; they count in neither figure below.
    pub not_finite: u64,
    /// The largest absolute difference.
    pub max_abs: f64,
    /// The root of the mean square of the differences, over all elements.
    pub rms: f64,
}

/// What two checkpoints differ in.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct DiffReport {
    /// Whether the digests are equal, and so everything is.
    pub equal: bool,
    /// Scalars that differ.
    pub scalars: Vec<ScalarDifference>,
    /// Tensors that differ, state by state in canonical order.
    pub tensors: Vec<TensorDifference>,
    /// `state/tensor` that only the first has, or has in another shape.
    pub only_a: Vec<String>,
    /// `state/tensor` that only the second has, or has in another shape.
    pub only_b: Vec<String>,
    /// Tensors that both have, over all states.
    pub compared: u64,
    /// Bytes read from both sides together.
    pub bytes_read: u64,
}

/// Compares two checkpoints. `progress` hears of the bytes compared on each side, and of their total first.
pub async fn diff(a: Side<'_>, b: Side<'_>, progress: &(dyn Fn(u64, u64) + Sync)) -> Result<DiffReport, StoreError> {
    let mut report = DiffReport { equal: a.manifest.digest == b.manifest.digest, ..DiffReport::default() };
    if report.equal {
        report.compared = pairs(a.manifest, b.manifest).len() as u64;
        return Ok(report);
    }
    report.scalars = scalars(a.manifest, b.manifest)?;
    let pairs = pairs(a.manifest, b.manifest);
    (report.only_a, report.only_b) = unpaired(a.manifest, b.manifest, &pairs);
    report.compared = pairs.len() as u64;
    let aligned = a.manifest.space == b.manifest.space;
    let todo: Vec<(Pair, Vec<Range<u64>>)> = pairs
        .into_iter()
        .map(|pair| {
            let suspects = pair.suspects(aligned.then_some((a.manifest, b.manifest)));
            (pair, suspects)
        })
        .collect();
    let size = |(pair, runs): &(Pair, Vec<Range<u64>>)| {
        runs.iter().map(|run| (run.end - run.start) * pair.dtype.size()).sum::<u64>()
    };
    let total = todo.iter().map(size).sum();
    let mut done = 0;
    for (pair, suspects) in todo {
        let mut sum = Sum::default();
        for run in suspects {
            let mut at = run.start;
            while at < run.end {
                let part = at..run.end.min(at + CHUNK);
                at = part.end;
                let read = pair.compare(a, b, part, &mut sum).await?;
                report.bytes_read += 2 * read;
                done += read;
                progress(done, total);
            }
        }
        report.tensors.extend(sum.finish(&pair));
    }
    Ok(report)
}

/// A tensor of a state that both sides have in one shape.
#[derive(Debug)]
struct Pair {
    state: String,
    /// The state's index on either side.
    at: (usize, usize),
    tensor: String,
    /// The tensor's first element in either space.
    first: (u64, u64),
    elements: u64,
    dtype: Dtype,
}

impl Pair {
    /// The runs of elements, counted within the tensor, that can differ: of manifests of one space those whose blocks
    /// have different hashes, else all.
    fn suspects(&self, aligned: Option<(&Manifest, &Manifest)>) -> Vec<Range<u64>> {
        let Some((a, b)) = aligned else {
            return std::iter::once(0..self.elements).collect();
        };
        let (block, first) = (a.space.block_elements(), self.first.0);
        let end = first + self.elements;
        let (a, b) = (&a.hashes[self.at.0].0, &b.hashes[self.at.1].0);
        let mut runs: Vec<Range<u64>> = vec![];
        for number in first / block..end.div_ceil(block) {
            if a[number as usize] == b[number as usize] {
                continue;
            }
            let start = (number * block).max(first) - first;
            let stop = ((number + 1) * block).min(end) - first;
            match runs.last_mut() {
                Some(run) if run.end == start => run.end = stop,
                _ => runs.push(start..stop),
            }
        }
        runs
    }

    /// Reads a part of the tensor on both sides and adds up the differences; returns the bytes of one side.
    async fn compare(&self, a: Side<'_>, b: Side<'_>, part: Range<u64>, sum: &mut Sum) -> Result<u64, StoreError> {
        let bytes = (part.end - part.start) * self.dtype.size();
        let (mut left, mut right) = (vec![0; bytes as usize], vec![0; bytes as usize]);
        let within = |first: u64| first + part.start..first + part.end;
        futures::try_join!(
            read_range(a.store, a.manifest, &self.state, within(self.first.0), &mut left),
            read_range(b.store, b.manifest, &self.state, within(self.first.1), &mut right),
        )?;
        sum.add(self.dtype, &left, &right);
        Ok(bytes)
    }
}

/// The differences of one tensor so far.
#[derive(Debug, Default)]
struct Sum {
    differing: u64,
    not_finite: u64,
    max_abs: f64,
    squares: f64,
}

impl Sum {
    fn add(&mut self, dtype: Dtype, a: &[u8], b: &[u8]) {
        let size = dtype.size() as usize;
        for (a, b) in a.chunks_exact(size).zip(b.chunks_exact(size)).filter(|(a, b)| a != b) {
            self.differing += 1;
            let difference = (value(dtype, a) - value(dtype, b)).abs();
            if difference.is_finite() {
                self.max_abs = self.max_abs.max(difference);
                self.squares += difference * difference;
            } else {
                self.not_finite += 1;
            }
        }
    }

    /// `None` if nothing differs: the block that did belongs to a neighbour too.
    fn finish(self, pair: &Pair) -> Option<TensorDifference> {
        (self.differing > 0).then(|| TensorDifference {
            state: pair.state.clone(),
            tensor: pair.tensor.clone(),
            elements: pair.elements,
            differing: self.differing,
            not_finite: self.not_finite,
            max_abs: self.max_abs,
            rms: (self.squares / pair.elements as f64).sqrt(),
        })
    }
}

/// One stored element as a number.
fn value(dtype: Dtype, bytes: &[u8]) -> f64 {
    match dtype {
        Dtype::F32 => bytes.try_into().map_or(f64::NAN, |bytes| f64::from(f32::from_le_bytes(bytes))),
    }
}

/// The tensors both have, state by state in the first one's order.
fn pairs(a: &Manifest, b: &Manifest) -> Vec<Pair> {
    let places = |space: &Space| {
        let all = space.tensor_ranges();
        all.map(|(t, range)| (t.name.clone(), (t.shape.clone(), range.start))).collect::<BTreeMap<_, _>>()
    };
    let there = places(&b.space);
    let mut found = vec![];
    for (at, state) in a.states.iter().enumerate() {
        let Some(other) = b.state_index(&state.name).filter(|&i| b.states[i].dtype == state.dtype) else { continue };
        for (tensor, range) in a.space.tensor_ranges() {
            let Some((_, first)) = there.get(&tensor.name).filter(|(shape, _)| *shape == tensor.shape) else {
                continue;
            };
            found.push(Pair {
                state: state.name.clone(),
                at: (at, other),
                tensor: tensor.name.clone(),
                first: (range.start, *first),
                elements: range.end - range.start,
                dtype: state.dtype,
            });
        }
    }
    found
}

/// What has no counterpart, on either side.
fn unpaired(a: &Manifest, b: &Manifest, pairs: &[Pair]) -> (Vec<String>, Vec<String>) {
    let paired: std::collections::BTreeSet<(&str, &str)> =
        pairs.iter().map(|pair| (pair.state.as_str(), pair.tensor.as_str())).collect();
    let alone = |manifest: &Manifest| {
        let mut names = vec![];
        for state in &manifest.states {
            let tensors = manifest.space.tensors().iter().map(|t| &t.name);
            let alone = tensors.filter(|tensor| !paired.contains(&(state.name.as_str(), tensor.as_str())));
            names.extend(alone.map(|tensor| format!("{}/{tensor}", state.name)));
        }
        names
    };
    (alone(a), alone(b))
}

/// The fields of the scalar state that differ, whatever they are.
fn scalars(a: &Manifest, b: &Manifest) -> Result<Vec<ScalarDifference>, StoreError> {
    let fields = |manifest: &Manifest| match serde_json::to_value(&manifest.scalar) {
        Ok(serde_json::Value::Object(fields)) => Ok(fields),
        Ok(_) => Err(StoreError::Bug("a scalar state is not an object".into())),
        Err(e) => Err(StoreError::Bug(format!("a scalar state cannot be written: {e}"))),
    };
    let (a, b) = (fields(a)?, fields(b)?);
    let names: std::collections::BTreeSet<&String> = a.keys().chain(b.keys()).collect();
    let differing = names.into_iter().filter(|name| a.get(*name) != b.get(*name));
    Ok(differing
        .map(|name| ScalarDifference { name: name.clone(), a: shown(a.get(name)), b: shown(b.get(name)) })
        .collect())
}

/// A value in few characters: a long list by its length.
fn shown(value: Option<&serde_json::Value>) -> String {
    match value {
        None => "(none)".into(),
        Some(serde_json::Value::Array(items)) if items.len() > 8 => format!("a list of {}", items.len()),
        Some(value) => value.to_string().chars().take(120).collect(),
    }
}
