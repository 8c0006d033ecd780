//! Handles to device memory: a shape, an element type, and where the bytes are.
//!
//! A tensor is one whole buffer. Cloning clones the handle, never the bytes.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, RwLock};

/// Type of the elements of a [`Tensor`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// 32-bit float.
    F32,
    /// IEEE 16-bit float.
    F16,
    /// The upper half of a 32-bit float.
    BF16,
    /// 32-bit unsigned integer; signed values are stored in two's complement.
    U32,
}

impl DType {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Self::F32 | Self::U32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }

    /// The name that users type and read.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::U32 => "u32",
        }
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// A handle to device memory.
#[derive(Clone, Debug)]
pub struct Tensor(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    id: u64,
    shape: Vec<usize>,
    dtype: DType,
    storage: Storage,
}

#[derive(Debug)]
pub(super) enum Storage {
    /// Host memory in 32-bit words, so that every element type is aligned.
    Cpu(RwLock<Vec<u32>>),
    Gpu(wgpu::Buffer),
}

/// A tensor's identity that does not keep its memory alive.
#[derive(Clone, Debug)]
pub(super) struct WeakTensor(std::sync::Weak<Inner>);

impl WeakTensor {
    pub(super) fn is_alive(&self) -> bool {
        self.0.strong_count() > 0
    }
}

static NEXT_ID: AtomicU64 = AtomicU64::new(0);

impl Tensor {
    pub(super) fn new(shape: &[usize], dtype: DType, storage: Storage) -> Self {
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        Self(Arc::new(Inner {
            id,
            shape: shape.to_vec(),
            dtype,
            storage,
        }))
    }

    /// The shape, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.0.shape
    }

    /// The last dimension.
    ///
    /// # Panics
    /// If the tensor has no dimension.
    pub fn cols(&self) -> usize {
        *self
            .0
            .shape
            .last()
            .expect("a tensor has at least one dimension")
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.0.dtype
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.0.shape.iter().product()
    }

    /// Whether the tensor has no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of all elements.
    pub fn bytes(&self) -> usize {
        self.len() * self.dtype().size()
    }

    /// A number that no other tensor of this process has.
    pub fn id(&self) -> u64 {
        self.0.id
    }

    pub(super) fn storage(&self) -> &Storage {
        &self.0.storage
    }

    pub(super) fn downgrade(&self) -> WeakTensor {
        WeakTensor(Arc::downgrade(&self.0))
    }
}

/// Bytes of an element count, rounded up to whole 32-bit words.
pub(super) const fn padded_bytes(bytes: usize) -> usize {
    let words = bytes.div_ceil(4);
    if words == 0 { 4 } else { words * 4 }
}
