//! What tensors there are: element types, shapes, and the checked list of them.
//!
//! The canonical space declares a model's parameters in one type; other frameworks bring any type and any names. A
//! [`Catalog`] is such a list after its checks: distinct usable names, no empty tensor, sums that cannot overflow. All
//! arithmetic on regions relies on them.

use std::collections::HashMap;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::region::{Region, flat_regions};
use crate::error::StoreError;
use crate::space::{MAX_DIMENSIONS, MAX_ELEMENTS, MAX_NAME, MAX_TENSORS};

/// The type of an element, with the names that safetensors gives them. All are little-endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum ElementType {
    /// One byte, 0 or 1.
    Bool,
    /// Unsigned, 8 bits.
    U8,
    /// Signed, 8 bits.
    I8,
    /// Float of 8 bits, 5 of exponent.
    #[serde(rename = "F8_E5M2")]
    F8E5M2,
    /// Float of 8 bits, 4 of exponent.
    #[serde(rename = "F8_E4M3")]
    F8E4M3,
    /// Unsigned, 16 bits.
    U16,
    /// Signed, 16 bits.
    I16,
    /// IEEE 754 binary16.
    F16,
    /// The upper half of an F32.
    #[serde(rename = "BF16")]
    Bf16,
    /// Unsigned, 32 bits.
    U32,
    /// Signed, 32 bits.
    I32,
    /// IEEE 754 binary32.
    F32,
    /// Unsigned, 64 bits.
    U64,
    /// Signed, 64 bits.
    I64,
    /// IEEE 754 binary64.
    F64,
}

impl ElementType {
    /// Every type.
    pub const ALL: [Self; 15] = [
        Self::Bool,
        Self::U8,
        Self::I8,
        Self::F8E5M2,
        Self::F8E4M3,
        Self::U16,
        Self::I16,
        Self::F16,
        Self::Bf16,
        Self::U32,
        Self::I32,
        Self::F32,
        Self::U64,
        Self::I64,
        Self::F64,
    ];

    /// Bytes of one element.
    pub const fn size(self) -> u64 {
        match self {
            Self::Bool | Self::U8 | Self::I8 | Self::F8E5M2 | Self::F8E4M3 => 1,
            Self::U16 | Self::I16 | Self::F16 | Self::Bf16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 => 8,
        }
    }

    /// The name in safetensors headers.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bool => "BOOL",
            Self::U8 => "U8",
            Self::I8 => "I8",
            Self::F8E5M2 => "F8_E5M2",
            Self::F8E4M3 => "F8_E4M3",
            Self::U16 => "U16",
            Self::I16 => "I16",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::U32 => "U32",
            Self::I32 => "I32",
            Self::F32 => "F32",
            Self::U64 => "U64",
            Self::I64 => "I64",
            Self::F64 => "F64",
        }
    }

    /// The type of a name in safetensors headers.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|t| t.name() == name)
    }
}

/// One tensor as a whole, whoever holds its parts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorInfo {
    /// Its name, one of its kind; optimizer state has names of its own, such as `exp_avg/<parameter>`.
    pub name: String,
    /// The type of its elements.
    pub dtype: ElementType,
    /// Its row-major shape; empty for a scalar.
    pub shape: Vec<u64>,
}

impl TensorInfo {
    /// Describes a tensor; checked when it enters a [`Catalog`].
    pub fn new(name: impl Into<String>, dtype: ElementType, shape: impl Into<Vec<u64>>) -> Self {
        Self { name: name.into(), dtype, shape: shape.into() }
    }
}

/// A checked list of tensors, in an order that everyone shares.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<TensorInfo>", into = "Vec<TensorInfo>")]
pub struct Catalog {
    tensors: Vec<TensorInfo>,
    /// First element of each tensor when all are laid end to end, and the number of elements as the last entry.
    starts: Vec<u64>,
    by_name: HashMap<String, usize>,
}

impl TryFrom<Vec<TensorInfo>> for Catalog {
    type Error = StoreError;
    fn try_from(tensors: Vec<TensorInfo>) -> Result<Self, StoreError> {
        Self::new(tensors)
    }
}

impl From<Catalog> for Vec<TensorInfo> {
    fn from(catalog: Catalog) -> Self {
        catalog.tensors
    }
}

impl Catalog {
    /// Checks a list of tensors; the error names the first that is wrong.
    pub fn new(tensors: Vec<TensorInfo>) -> Result<Self, StoreError> {
        let wrong = |why: String| Err(StoreError::Input(why));
        if tensors.is_empty() || tensors.len() > MAX_TENSORS {
            return wrong(format!("{} tensors; there are 1 to {MAX_TENSORS}", tensors.len()));
        }
        let mut by_name = HashMap::with_capacity(tensors.len());
        let mut starts = Vec::with_capacity(tensors.len() + 1);
        let mut end = 0u64;
        for (index, tensor) in tensors.iter().enumerate() {
            let shown: String = tensor.name.chars().take(80).collect();
            if !(1..=MAX_NAME).contains(&tensor.name.len()) || tensor.name.chars().any(char::is_control) {
                return wrong(format!("tensor name {shown:?} is not usable: 1 to {MAX_NAME} printable characters"));
            }
            if by_name.insert(tensor.name.clone(), index).is_some() {
                return wrong(format!("tensor {shown:?} is listed twice"));
            }
            starts.push(end);
            let elements = elements(&tensor.shape);
            end = elements.and_then(|n| end.checked_add(n)).filter(|&n| n <= MAX_ELEMENTS).ok_or_else(|| {
                let shape: Vec<_> = tensor.shape.iter().take(MAX_DIMENSIONS).collect();
                StoreError::Input(format!(
                    "tensor {shown:?} has shape {shape:?}: at most {MAX_DIMENSIONS} dimensions, none zero, 2^48 \
                     elements in all"
                ))
            })?;
        }
        starts.push(end);
        Ok(Self { tensors, starts, by_name })
    }

    /// The tensors in order.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The place of a tensor in the list.
    pub fn find(&self, name: &str) -> Option<usize> {
        self.by_name.get(name).copied()
    }

    /// Elements of all tensors.
    pub fn elements(&self) -> u64 {
        self.starts[self.tensors.len()]
    }

    /// The elements of a tensor when all are laid end to end.
    pub(super) fn range(&self, tensor: usize) -> Range<u64> {
        self.starts[tensor]..self.starts[tensor + 1]
    }

    /// Bytes of all tensors. Cannot overflow: 2^48 elements of at most 8 bytes.
    pub fn bytes(&self) -> u64 {
        self.tensors.iter().zip(self.starts.windows(2)).map(|(t, w)| (w[1] - w[0]) * t.dtype.size()).sum()
    }

    /// The tensor and region of a piece, if the piece lies inside a tensor of this list.
    pub fn locate<'a>(&self, piece: &'a BoxPiece) -> Result<(usize, &'a Region), StoreError> {
        let shown: String = piece.tensor.chars().take(80).collect();
        let index = self
            .find(&piece.tensor)
            .ok_or_else(|| StoreError::Input(format!("there is no tensor {shown:?} among {}", self.tensors.len())))?;
        let shape = &self.tensors[index].shape;
        if piece.region.is_within(shape) {
            return Ok((index, &piece.region));
        }
        Err(StoreError::Input(format!("{} lies outside tensor {shown:?} of shape {shape:?}", piece.region)))
    }

    /// The boxes that a range of elements is made of, the tensors laid end to end in order: each is a whole run of its
    /// tensor's memory, they are as few as can be, and they come in order. A range past the end is cut off there.
    pub fn flat_pieces(&self, range: Range<u64>) -> Vec<(usize, Region)> {
        let end = range.end.min(self.elements());
        let mut at = range.start;
        let mut tensor = self.starts.partition_point(|&s| s <= at).saturating_sub(1);
        let mut pieces = vec![];
        while at < end {
            let stop = end.min(self.starts[tensor + 1]);
            let inside = at - self.starts[tensor]..stop - self.starts[tensor];
            pieces.extend(flat_regions(&self.tensors[tensor].shape, inside).into_iter().map(|region| (tensor, region)));
            (at, tensor) = (stop, tensor + 1);
        }
        pieces
    }
}

/// The product of a shape; `None` if it is zero, too deep or overflows.
pub(super) fn elements(shape: &[u64]) -> Option<u64> {
    if shape.len() > MAX_DIMENSIONS {
        return None;
    }
    shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d)).filter(|&n| n > 0 && n <= MAX_ELEMENTS)
}

/// A box of a tensor: what one holder has of it, or one reader wants of it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BoxPiece {
    /// The tensor's name.
    pub tensor: String,
    /// Where the box lies in it.
    pub region: Region,
}

impl BoxPiece {
    /// The box of `lengths` elements from `offsets` on.
    pub fn new(tensor: impl Into<String>, offsets: &[u64], lengths: &[u64]) -> Result<Self, StoreError> {
        Ok(Self { tensor: tensor.into(), region: Region::new(offsets.to_vec(), lengths.to_vec())? })
    }

    /// A whole tensor.
    pub fn whole(tensor: &TensorInfo) -> Result<Self, StoreError> {
        Self::new(tensor.name.clone(), &vec![0; tensor.shape.len()], &tensor.shape)
    }

    /// First element in each dimension.
    pub fn offsets(&self) -> &[u64] {
        self.region.offsets()
    }

    /// Number of elements in each dimension.
    pub fn lengths(&self) -> &[u64] {
        self.region.lengths()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_have_the_names_of_safetensors() {
        for t in ElementType::ALL {
            let json = format!("\"{}\"", t.name());
            assert_eq!(serde_json::to_string(&t).unwrap(), json);
            assert_eq!(serde_json::from_str::<ElementType>(&json).unwrap(), t);
            assert_eq!(ElementType::from_name(t.name()), Some(t));
            let theirs: safetensors::Dtype = serde_json::from_str(&json).unwrap();
            assert_eq!(theirs.bitsize() as u64, 8 * t.size(), "{json}");
        }
        assert_eq!(ElementType::from_name("F4"), None);
    }

    #[test]
    fn wrong_lists_are_refused() {
        let tensor = |name: &str, shape: &[u64]| TensorInfo::new(name, ElementType::F32, shape);
        let wrong = [
            vec![],
            vec![tensor("", &[1])],
            vec![tensor("a\n", &[1])],
            vec![tensor(&"x".repeat(257), &[1])],
            vec![tensor("a", &[1]), tensor("a", &[2])],
            vec![tensor("a", &[3, 0])],
            vec![tensor("a", &[1; 17])],
            vec![tensor("a", &[u64::MAX, u64::MAX])],
            vec![tensor("a", &[1 << 48]), tensor("b", &[1])],
        ];
        for list in wrong {
            let error = Catalog::new(list.clone()).expect_err(&format!("{list:?}"));
            assert_eq!(error.kind(), crate::Kind::Input);
        }
        let catalog = Catalog::new(vec![tensor("a", &[2, 3]), tensor("b", &[])]).unwrap();
        assert_eq!((catalog.elements(), catalog.bytes(), catalog.find("b")), (7, 28, Some(1)));
        for (name, offsets, lengths) in [("c", [0, 0], [1, 1]), ("a", [1, 0], [2, 3]), ("b", [0, 0], [1, 1])] {
            let piece = BoxPiece::new(name, &offsets, &lengths).unwrap();
            assert!(catalog.locate(&piece).is_err(), "{piece:?}");
        }
        assert!(catalog.locate(&BoxPiece::new("b", &[], &[]).unwrap()).is_ok());
    }

    #[test]
    fn a_range_crosses_tensors() {
        let tensor = |name: &str, shape: &[u64]| TensorInfo::new(name, ElementType::F32, shape);
        let catalog = Catalog::new(vec![tensor("a", &[2, 3]), tensor("b", &[]), tensor("c", &[4])]).unwrap();
        let region = |offsets: &[u64], lengths: &[u64]| Region::new(offsets.to_vec(), lengths.to_vec()).unwrap();
        let wanted = vec![
            (0, region(&[0, 2], &[1, 1])),
            (0, region(&[1, 0], &[1, 3])),
            (1, region(&[], &[])),
            (2, region(&[0], &[2])),
        ];
        assert_eq!(catalog.flat_pieces(2..9), wanted);
        assert_eq!(catalog.flat_pieces(9..100), vec![(2, region(&[2], &[2]))]);
        assert!(catalog.flat_pieces(11..12).is_empty() && catalog.flat_pieces(5..5).is_empty());
        assert!(catalog.flat_pieces(u64::MAX..u64::MAX).is_empty());
    }
}
