//! The canonical space: all parameters of a model laid end to end, cut into blocks, shared out to ranks.
//!
//! It is a function of the model alone. Tensors follow one another in declared order with no padding; the space is cut
//! into fixed blocks of a power of two of elements; a rank's shard is a contiguous run of whole blocks. So the place of
//! an element never depends on how many workers there are, and any number of workers can load what any other number
//! saved. Optimizer state lives in the same space, in the same shards.

use std::collections::HashSet;
use std::ops::Range;

use proto::ids::{Rank, WorldSize};
use proto::spec::ModelSpec;
use serde::{Deserialize, Serialize};

/// Most tensors a space may declare.
pub const MAX_TENSORS: usize = 1 << 20;
/// Most dimensions of a tensor.
pub const MAX_DIMENSIONS: usize = 16;
/// Longest tensor name, in bytes.
pub const MAX_NAME: usize = 256;
/// Most elements of a space: far beyond any model, and safe to multiply by an element's size.
pub const MAX_ELEMENTS: u64 = 1 << 48;
/// Smallest block, in elements.
pub const MIN_BLOCK: u64 = 1 << 16;
/// Most blocks of a space.
pub const MAX_BLOCKS: u64 = 1 << 19;

/// The type of a stored element.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Dtype {
    /// IEEE 754 binary32, little-endian.
    F32,
}

impl Dtype {
    /// Bytes of one element.
    pub const fn size(self) -> u64 {
        match self {
            Self::F32 => 4,
        }
    }

    /// The name in safetensors headers and in the digest.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
        }
    }
}

/// One parameter as the model declares it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorDecl {
    /// The Hugging Face name.
    pub name: String,
    /// Row-major shape; empty for a scalar.
    pub shape: Vec<u64>,
    /// The element type of the parameter.
    pub dtype: Dtype,
}

/// Why a list of tensors is not a space.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpaceError {
    /// No tensors, or too many.
    #[error("a model declares 1 to {MAX_TENSORS} tensors, not {0}")]
    Count(usize),
    /// A name that cannot stand in an object's entry.
    #[error("tensor name {0:?} is not usable: 1 to {MAX_NAME} printable characters without '@' and spaces")]
    Name(String),
    /// Two tensors of one name.
    #[error("tensor {0:?} is declared twice")]
    Duplicate(String),
    /// A shape with a zero, too many dimensions, or too many elements.
    #[error(
        "tensor {name:?} has shape {shape:?}: at most {MAX_DIMENSIONS} dimensions, none zero, 2^48 elements in all"
    )]
    Shape {
        /// The tensor.
        name: String,
        /// Its first dimensions.
        shape: Vec<u64>,
    },
}

/// The canonical space of a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<TensorDecl>", into = "Vec<TensorDecl>")]
pub struct Space {
    tensors: Vec<TensorDecl>,
    /// First element of each tensor, and the number of elements as the last entry.
    starts: Vec<u64>,
    block_elements: u64,
}

impl TryFrom<Vec<TensorDecl>> for Space {
    type Error = SpaceError;
    fn try_from(tensors: Vec<TensorDecl>) -> Result<Self, SpaceError> {
        Self::new(tensors)
    }
}

impl From<Space> for Vec<TensorDecl> {
    fn from(space: Space) -> Self {
        space.tensors
    }
}

impl Space {
    /// The space of a model's parameters, each float32.
    pub fn of_model(model: &ModelSpec) -> Result<Self, SpaceError> {
        let tensors = model.tensors().into_iter().map(|(name, shape)| TensorDecl {
            name,
            shape: shape.into_iter().map(|size| size as u64).collect(),
            dtype: Dtype::F32,
        });
        Self::new(tensors.collect())
    }

    /// Lays the tensors end to end in the given order.
    pub fn new(tensors: Vec<TensorDecl>) -> Result<Self, SpaceError> {
        if tensors.is_empty() || tensors.len() > MAX_TENSORS {
            return Err(SpaceError::Count(tensors.len()));
        }
        let mut names = HashSet::with_capacity(tensors.len());
        let mut starts = Vec::with_capacity(tensors.len() + 1);
        let mut end = 0u64;
        for tensor in &tensors {
            let good = (1..=MAX_NAME).contains(&tensor.name.len())
                && !tensor.name.chars().any(|c| c == '@' || c.is_control() || c.is_whitespace());
            if !good {
                return Err(SpaceError::Name(tensor.name.chars().take(80).collect()));
            }
            if !names.insert(tensor.name.as_str()) {
                return Err(SpaceError::Duplicate(tensor.name.clone()));
            }
            starts.push(end);
            end = count(&tensor.shape).and_then(|n| end.checked_add(n)).filter(|&n| n <= MAX_ELEMENTS).ok_or_else(
                || SpaceError::Shape {
                    name: tensor.name.clone(),
                    shape: tensor.shape.iter().take(MAX_DIMENSIONS).copied().collect(),
                },
            )?;
        }
        starts.push(end);
        let mut block_elements = MIN_BLOCK;
        while end.div_ceil(block_elements) > MAX_BLOCKS {
            block_elements *= 2;
        }
        Ok(Self { tensors, starts, block_elements })
    }

    /// The tensors in order.
    pub fn tensors(&self) -> &[TensorDecl] {
        &self.tensors
    }

    /// All elements of the space.
    pub fn elements(&self) -> u64 {
        self.starts[self.tensors.len()]
    }

    /// Elements of one block: the smallest power of two, at least 2^16, that gives at most 2^19 blocks.
    pub fn block_elements(&self) -> u64 {
        self.block_elements
    }

    /// The number of blocks; the last one may be short.
    pub fn blocks(&self) -> u64 {
        self.elements().div_ceil(self.block_elements)
    }

    /// The blocks of one rank: a contiguous run, sizes differing by at most one, empty when there are more ranks than
    /// blocks or when the rank is not of this world.
    pub fn shard_blocks(&self, rank: Rank, world: WorldSize) -> Range<u64> {
        let cut = |r: u32| (self.blocks() as u128 * r.min(world.get()) as u128 / world.get() as u128) as u64;
        cut(rank.get())..cut(rank.get().saturating_add(1))
    }

    /// The elements of one rank.
    pub fn shard(&self, rank: Rank, world: WorldSize) -> Range<u64> {
        self.blocks_to_elements(self.shard_blocks(rank, world))
    }

    /// The elements of a run of blocks, cut off at the end of the space.
    pub fn blocks_to_elements(&self, blocks: Range<u64>) -> Range<u64> {
        let at = |block: u64| block.saturating_mul(self.block_elements).min(self.elements());
        at(blocks.start)..at(blocks.end)
    }

    /// The elements of tensor `index` in the space.
    pub fn tensor_range(&self, index: usize) -> Range<u64> {
        self.starts[index]..self.starts[index + 1]
    }

    /// Every tensor with its elements in the space, in order.
    pub fn tensor_ranges(&self) -> impl Iterator<Item = (&TensorDecl, Range<u64>)> {
        self.tensors.iter().enumerate().map(|(i, tensor)| (tensor, self.tensor_range(i)))
    }

    /// The pieces of tensors within a range of elements: tensor, first element within the tensor, number of elements.
    pub fn pieces(&self, range: Range<u64>) -> impl Iterator<Item = Piece<'_>> {
        let range = range.start..range.end.min(self.elements());
        let first = self.starts.partition_point(|&s| s <= range.start).saturating_sub(1);
        let end = range.end;
        (first..self.tensors.len()).take_while(move |&i| self.starts[i] < end).filter_map(move |i| {
            let start = self.starts[i].max(range.start);
            let stop = self.starts[i + 1].min(range.end);
            let (tensor, first) = (&self.tensors[i], start - self.starts[i]);
            (start < stop).then(|| Piece { tensor, first, elements: stop - start })
        })
    }

    /// The tensor that holds an element, for messages.
    pub fn tensor_at(&self, element: u64) -> &str {
        self.pieces(element..element.saturating_add(1)).next().map_or("(past the end)", |p| p.tensor.name.as_str())
    }
}

/// A run of elements of one tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece<'a> {
    /// The tensor.
    pub tensor: &'a TensorDecl,
    /// First element, counted within the tensor.
    pub first: u64,
    /// Number of elements.
    pub elements: u64,
}

/// The product of a shape; `None` if it is zero, too deep or overflows.
fn count(shape: &[u64]) -> Option<u64> {
    if shape.len() > MAX_DIMENSIONS {
        return None;
    }
    shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d)).filter(|&n| n > 0)
}

/// The ranks of a world of another size whose shards may overlap a rank's, whatever the space.
///
/// Block `b` of `n` is with rank `⌈world·(b+1)/n⌉ - 1` of any world. For the blocks of rank `r`, `world·(b+1)/n` is in
/// `(r, r+1]`, so for the old world it is in that interval times `old/world`.
pub fn shards_before(rank: Rank, world: WorldSize, old: WorldSize) -> std::ops::Range<u32> {
    let (rank, world, old) = (u64::from(rank.get()), u64::from(world.get()), u64::from(old.get()));
    let (first, end) = (rank * old / world, ((rank + 1) * old).div_ceil(world));
    first.min(old) as u32..end.min(old) as u32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tensor(name: &str, shape: &[u64]) -> TensorDecl {
        TensorDecl { name: name.into(), shape: shape.into(), dtype: Dtype::F32 }
    }

    #[test]
    fn blocks_grow_with_the_model() {
        let small = Space::new(vec![tensor("a", &[10]), tensor("b", &[])]).unwrap();
        assert_eq!((small.elements(), small.blocks(), small.block_elements()), (11, 1, 65536));
        let exact = Space::new(vec![tensor("a", &[65536, 1 << 19])]).unwrap();
        assert_eq!((exact.blocks(), exact.block_elements()), (1 << 19, 65536));
        let over = Space::new(vec![tensor("a", &[65536, 1 << 19]), tensor("b", &[1])]).unwrap();
        assert_eq!((over.blocks(), over.block_elements()), ((1 << 18) + 1, 131072));
    }

    #[test]
    fn hostile_declarations_are_refused() {
        assert_eq!(Space::new(vec![]), Err(SpaceError::Count(0)));
        for shape in [&[0u64][..], &[u64::MAX, 2], &[1 << 47, 3], &[1; 17]] {
            assert!(matches!(Space::new(vec![tensor("a", shape)]), Err(SpaceError::Shape { .. })), "{shape:?}");
        }
        for name in ["", "a@b", "a b", "a\n", &"x".repeat(257)] {
            assert!(matches!(Space::new(vec![tensor(name, &[1])]), Err(SpaceError::Name(_))), "{name:?}");
        }
        assert!(matches!(Space::new(vec![tensor("a", &[1]), tensor("a", &[1])]), Err(SpaceError::Duplicate(_))));
        assert!(serde_json::from_str::<Space>(r#"[{"name":"a","shape":[0],"dtype":"F32"}]"#).is_err());
    }

    proptest! {
        #[test]
        fn shards_that_overlap_are_of_the_ranks_said(blocks in 1u64..400, world in 1u32..40, old in 1u32..40) {
            let space = Space::new(vec![tensor("a", &[blocks * 65536 - 7])]).unwrap();
            let (world, old) = (WorldSize::new(world).unwrap(), WorldSize::new(old).unwrap());
            for rank in world.ranks() {
                let said = shards_before(rank, world, old);
                let shard = space.shard_blocks(rank, world);
                for other in old.ranks() {
                    let theirs = space.shard_blocks(other, old);
                    let common = shard.start.max(theirs.start) < shard.end.min(theirs.end);
                    prop_assert!(!common || said.contains(&other.get()), "{rank} of {world}, {other} of {old}");
                }
                let most = old.get().div_ceil(world.get()) + 1;
                prop_assert!(said.len() as u32 <= most, "no more than the neighbours beside them");
            }
        }

        #[test]
        fn shards_cover_the_space_exactly(sizes in proptest::collection::vec(1u64..300_000, 1..12), world in 1u32..40) {
            let tensors = sizes.iter().enumerate().map(|(i, &n)| tensor(&format!("t{i}"), &[n])).collect();
            let space = Space::new(tensors).unwrap();
            let world = WorldSize::new(world).unwrap();
            let (mut next, mut lengths) = (0, vec![]);
            for rank in world.ranks() {
                let shard = space.shard(rank, world);
                prop_assert_eq!(shard.start, next);
                next = shard.end;
                lengths.push(space.shard_blocks(rank, world).count());
                let total: u64 = space.pieces(shard.clone()).map(|p| p.elements).sum();
                prop_assert_eq!(total, shard.end - shard.start);
            }
            prop_assert_eq!(next, space.elements());
            prop_assert!(lengths.iter().max().unwrap() - lengths.iter().min().unwrap() <= 1);
        }
    }
}
