//! What a manifest must satisfy before it is believed.
//!
//! Every number comes from disk. Sums are checked, extents must cover each state exactly, object paths must stay in the
//! job's folder, and the digest must follow from the hashes. Reading an accepted manifest cannot go out of bounds.

use std::collections::HashSet;

use super::{Located, MAX_OBJECTS, MAX_STATES, Manifest};
use crate::digest::{StateDecl, state_digest};
use crate::layout;
use crate::object::ObjectEntry;

/// Most bytes of one object: beyond what any store takes.
const MAX_OBJECT: u64 = 1 << 50;

impl Manifest {
    /// Checks all claims and builds the index; the error says what is wrong.
    pub(super) fn check(&mut self) -> Result<(), String> {
        self.check_structure()?;
        let digest = state_digest(&self.scalar, &self.space, &self.states, &self.hashes);
        if digest != self.digest {
            return Err(format!("its digest is {}, but its hashes give {digest}", self.digest));
        }
        Ok(())
    }

    /// Checks everything but the digest, and builds the index.
    pub(super) fn check_structure(&mut self) -> Result<(), String> {
        if self.step != self.scalar.step {
            return Err(format!("it is of step {} but its scalar state of step {}", self.step, self.scalar.step));
        }
        if self.block_elements != self.space.block_elements() {
            let right = self.space.block_elements();
            return Err(format!("block_elements is {}; this model's is {right}", self.block_elements));
        }
        check_states(&self.states)?;
        if self.hashes.len() != self.states.len() {
            return Err(format!("{} lists of hashes for {} states", self.hashes.len(), self.states.len()));
        }
        for (state, list) in self.states.iter().zip(&self.hashes) {
            if list.0.len() as u64 != self.space.blocks() {
                let (have, want) = (list.0.len(), self.space.blocks());
                return Err(format!("state {} has {have} block hashes, the model has {want} blocks", state.name));
            }
        }
        if self.objects.len() > MAX_OBJECTS {
            return Err(format!("{} objects are more than {MAX_OBJECTS}", self.objects.len()));
        }
        self.index = self.build_index()?;
        Ok(())
    }

    fn build_index(&self) -> Result<Vec<Vec<Located>>, String> {
        let mut index: Vec<Vec<Located>> = vec![vec![]; self.states.len()];
        let mut paths = HashSet::with_capacity(self.objects.len());
        let mut bytes = 0u64;
        for (number, object) in self.objects.iter().enumerate() {
            if !layout::is_object_of(&self.job, &object.path) {
                let shown: String = object.path.chars().take(120).collect();
                return Err(format!("{shown:?} is not a path of an object of job {}", self.job));
            }
            if !paths.insert(object.path.as_str()) {
                return Err(format!("{} is listed twice", object.path));
            }
            if object.bytes > MAX_OBJECT {
                return Err(format!("{} would have {} bytes, more than {MAX_OBJECT}", object.path, object.bytes));
            }
            bytes = bytes.checked_add(object.bytes).ok_or("its objects would have more than 2^64 bytes")?;
            self.index_object(number, object, &mut index)?;
        }
        for (state, extents) in self.states.iter().zip(&mut index) {
            extents.sort_unstable_by_key(|e| (e.first, e.elements));
            let mut next = 0;
            for e in extents.iter() {
                if e.first != next {
                    let what = if e.first < next { "lie twice" } else { "are missing" };
                    let (a, b) = (e.first.min(next), e.first.max(next));
                    return Err(format!("elements {a}..{b} of state {} {what}", state.name));
                }
                next = e.first + e.elements;
            }
            if next != self.space.elements() {
                return Err(format!("elements {next}..{} of state {} are missing", self.space.elements(), state.name));
            }
        }
        Ok(index)
    }

    /// Checks one object's extents against the space and against its size.
    fn index_object(&self, number: usize, object: &ObjectEntry, index: &mut [Vec<Located>]) -> Result<(), String> {
        let path = &object.path;
        if object.extents.is_empty() {
            return Err(format!("{path} holds nothing"));
        }
        let mut spans = Vec::with_capacity(object.extents.len());
        for e in &object.extents {
            let at = self.state_index(&e.state).ok_or_else(|| format!("{path} holds an undeclared state"))?;
            let end = e.first.checked_add(e.elements).filter(|&end| e.elements > 0 && end <= self.space.elements());
            let end = end.ok_or_else(|| format!("an extent of {path} lies outside the space"))?;
            let block = self.block_elements;
            if !e.first.is_multiple_of(block) || !(end.is_multiple_of(block) || end == self.space.elements()) {
                return Err(format!("an extent of {path} does not consist of whole blocks"));
            }
            // Cannot overflow: the space has at most 2^48 elements of at most 8 bytes.
            let length = e.elements * self.states[at].dtype.size();
            let stop = e.offset.checked_add(length).filter(|&stop| e.offset >= 8 && stop <= object.bytes);
            let stop = stop.ok_or_else(|| format!("an extent of {path} lies outside the object's bytes"))?;
            spans.push((e.offset, stop));
            index[at].push(Located { first: e.first, elements: e.elements, object: number, offset: e.offset });
        }
        spans.sort_unstable();
        match spans.windows(2).find(|w| w[0].1 > w[1].0) {
            Some(w) => Err(format!("extents of {path} overlap at byte {}", w[1].0)),
            None => Ok(()),
        }
    }
}

/// Checks the declared states: how many, and usable distinct names.
fn check_states(states: &[StateDecl]) -> Result<(), String> {
    if states.is_empty() || states.len() > MAX_STATES {
        return Err(format!("{} states; there are 1 to {MAX_STATES}", states.len()));
    }
    let mut names = HashSet::new();
    for state in states {
        let name = &state.name;
        let good = (1..=64).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        if !good || !names.insert(name) {
            let shown: String = name.chars().take(80).collect();
            return Err(format!("state name {shown:?} is not usable or not the only one of its name"));
        }
    }
    Ok(())
}
