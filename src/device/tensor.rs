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
    /// 4-bit codes of weights, in the order of [`DType::code_at`]; scales lie in a tensor beside it.
    U4,
    /// 8-bit codes of weights, in the order of [`DType::code_at`]; scales lie in a tensor beside it.
    U8,
    /// 8-bit floats of weights (e4m3fn: a sign, 4 bits of exponent, 3 of mantissa), in the order of
    /// [`DType::code_at`]; scales lie in a tensor beside them.
    F8,
}

impl DType {
    /// Bits of one element.
    pub const fn bits(self) -> usize {
        match self {
            Self::F32 | Self::U32 => 32,
            Self::F16 | Self::BF16 => 16,
            Self::U8 | Self::F8 => 8,
            Self::U4 => 4,
        }
    }

    /// Bytes of one element of a type that has whole bytes.
    ///
    /// # Panics
    /// For [`DType::U4`].
    pub const fn size(self) -> usize {
        assert!(self.bits() >= 8, "two codes of 4 bits share a byte");
        self.bits() / 8
    }

    /// Bytes of a number of elements, rounded up; none where that is more than a `usize` counts.
    pub const fn bytes(self, elements: usize) -> Option<usize> {
        // Split, so that the bits of a large tensor do not overflow.
        let (whole, rest) = (elements / 8, elements % 8);
        match whole.checked_mul(self.bits()) {
            Some(bytes) => bytes.checked_add((rest * self.bits()).div_ceil(8)),
            None => None,
        }
    }

    /// Elements of a row of codes come in spans of this many; a row is padded to whole spans.
    pub const fn span(self) -> usize {
        match self {
            Self::U4 => 128,
            Self::U8 | Self::F8 => 32,
            _ => 1,
        }
    }

    /// Where the code of a flat index lies: the word, and its lowest bit in it.
    ///
    /// A lane of a kernel loads four words at once, which hold four runs of eight codes (two, if they have
    /// eight bits). The runs of neighbouring lanes alternate, so that for one word of each lane the
    /// activations that belong to it lie side by side: run `o` of a span of `s` runs is the
    /// `o / sqrt(s)`-th of lane `o % sqrt(s)`.
    ///
    /// # Panics
    /// If the type is not one of codes.
    pub const fn code_at(self, at: usize) -> (usize, usize) {
        let runs = match self {
            Self::U4 => 4,
            Self::U8 | Self::F8 => 2,
            _ => panic!("only codes are packed by runs"),
        };
        let words = 4 / runs;
        let (span, run, code) = (at / self.span(), at % self.span() / 8, at % 8);
        let (lane, part) = (run % runs, run / runs);
        let word = span * 4 * runs + lane * 4 + part * words;
        let bit = code * self.bits();
        (word + bit / 32, bit % 32)
    }

    /// The name that users type and read.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::U32 => "u32",
            Self::U4 => "int4",
            Self::U8 => "int8",
            Self::F8 => "fp8",
        }
    }

    /// The scale and the zero point that a word of a tensor of scales holds, beside codes of this type: a
    /// float of 24 bits and 8 bits, or a whole float beside codes that are floats themselves.
    #[inline]
    pub const fn scale_of(self, word: u32) -> (f32, u32) {
        match self {
            Self::F8 => (f32::from_bits(word), 0),
            _ => (f32::from_bits(word & !0xff), word & 0xff),
        }
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// The number of a code of [`DType::F8`]; of the two that stand for NaN, 480 with its sign.
#[allow(
    clippy::inline_always,
    reason = "what is not in line is not compiled for the instruction set of a kernel"
)]
#[inline(always)]
pub fn e4m3(code: u32) -> f32 {
    // Its bits as those of an f32 whose exponent is 120 more: right but for an exponent of 0, where there is
    // no leading one, and twice the number less 2^-6 is the lesser.
    let normal = f32::from_bits(((code & 0x7f) << 20) + (120 << 23));
    let least = 2.0 * normal - 0.015_625;
    let size = if least < normal { least } else { normal };
    f32::from_bits(size.to_bits() | (code & 0x80) << 24)
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
    ///
    /// # Panics
    /// Never: a tensor whose bytes cannot be counted is not made.
    pub fn bytes(&self) -> usize {
        self.dtype().bytes(self.len()).expect("it was allocated")
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_of_a_span_has_a_place_of_its_own() {
        for dtype in [DType::U4, DType::U8, DType::F8] {
            let n = 3 * dtype.span();
            let mut taken = vec![0u32; dtype.bytes(n).expect("small") / 4];
            for at in 0..n {
                let (word, bit) = dtype.code_at(at);
                let mask = ((1u32 << dtype.bits()) - 1) << bit;
                assert_eq!(taken[word] & mask, 0, "{dtype} {at} is the first there");
                taken[word] |= mask;
                assert_eq!(
                    word / (taken.len() / 3),
                    at / dtype.span(),
                    "within its span"
                );
            }
            assert!(taken.iter().all(|&w| w == u32::MAX), "nothing is left free");
        }
        assert_eq!(DType::U4.bytes(7), Some(4), "rounded up");
    }

    #[test]
    fn an_eight_bit_float_is_its_sign_exponent_and_mantissa() {
        for code in (0..256u32).filter(|code| code & 0x7f != 0x7f) {
            let [exponent, mantissa] = [code >> 3 & 15, code & 7].map(|n| n as f32);
            let size = if exponent > 0.0 {
                (1.0 + mantissa / 8.0) * (exponent - 7.0).exp2()
            } else {
                mantissa / 8.0 * (-6f32).exp2()
            };
            let want = if code < 128 { size } else { -size };
            assert_eq!(e4m3(code).to_bits(), want.to_bits(), "code {code}");
        }
        let ends = [0x7e, 0x01].map(|code| e4m3(code).to_bits());
        assert_eq!(
            ends,
            [448.0f32, 0.001_953_125].map(f32::to_bits),
            "the ends"
        );
    }
}
