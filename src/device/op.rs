//! What an op is: a contract (arguments, reference, cases, tolerance) and the kernels held to it.
//!
//! This file defines the form only; the ops themselves live in [`crate::ops`].

use std::borrow::Cow;
use std::collections::HashMap;

use bytemuck::Pod;
use half::{bf16, f16};

use super::{Caps, DType, Dispatch, Recording, Tensor, Upload, e4m3};

/// How an op uses an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Only read.
    Read,
    /// Written without being read; elements outside the op's rows are left alone.
    Write,
    /// Read and written.
    ReadWrite,
}

/// One op: what one dispatch does.
#[derive(Debug)]
pub struct Op {
    /// The name, as in `hogwild kernels check NAME`.
    pub name: &'static str,
    /// One line that says what is computed.
    pub summary: &'static str,
    /// Names of the parameters, in order; each is 4 bytes (`u32` or `f32`).
    pub params: &'static [&'static str],
    /// Names of the arguments, in the order of their bindings.
    pub args: &'static [(&'static str, Access)],
    /// The meaning: computed in f64, rounded once to the storage type.
    pub reference: fn(&mut Args<'_>),
    /// Kernels, best first.
    pub kernels: &'static [Kernel],
    /// Inputs that kernels are judged on.
    pub cases: fn() -> Vec<Case>,
    /// How far a kernel may be from the reference.
    pub tolerance: Tolerance,
}

/// One implementation of an op.
#[derive(Debug)]
pub struct Kernel {
    /// The name, unique within the op.
    pub name: &'static str,
    /// What runs.
    pub run: Run,
    /// Whether it can serve a dispatch on a device; never reads a row count, so that a row's bits
    /// do not depend on how many others share the pass.
    pub fits: fn(&Dispatch, &Caps) -> bool,
}

/// What a kernel runs.
#[derive(Debug)]
pub enum Run {
    /// A compute shader.
    Wgsl(Wgsl),
    /// A Rust function.
    Cpu(fn(&mut Args<'_>)),
}

/// A compute shader and how it is launched.
#[derive(Debug)]
pub struct Wgsl {
    /// Path of the file, for messages: from the root of the sources, or as the user gave it.
    pub file: &'static str,
    /// The text.
    pub source: &'static str,
    /// Constants of the prelude.
    pub consts: fn(&Dispatch, &Caps) -> Vec<(&'static str, u32)>,
    /// Element types of the prelude: the name, and the argument whose dtype it takes.
    pub elements: &'static [(&'static str, usize)],
    /// Number of workgroups.
    pub groups: fn(&Dispatch, &Caps) -> [u32; 3],
    /// What one workgroup loads; none where that is not known.
    pub loads: Option<Loads>,
}

/// Bytes that the workgroup of a number loads from each argument, in the op's order.
///
/// A word counts once for all lanes that load it, and again when a lane comes back to it after many other
/// loads: it is then no longer near. Measured by `tests/bytes.rs`.
pub type Loads = fn(&Dispatch, &Caps, &Ints<'_>, [u32; 3]) -> Vec<u64>;

/// Contents of integer arguments, as the host gave them: what a workgroup loads may depend on them.
#[derive(Clone, Debug, Default)]
pub struct Ints<'a>(HashMap<u64, Cow<'a, [u32]>>);

impl<'a> Ints<'a> {
    /// The arrays that a recording uploads.
    pub fn of_recording(recording: &'a Recording) -> Self {
        let words = |bytes: &'a [u8]| match bytemuck::try_cast_slice(bytes) {
            Ok(words) => Cow::Borrowed(words),
            Err(_) => Cow::Owned(bytemuck::pod_collect_to_vec(bytes)),
        };
        let upload = |upload: &'a Upload| (upload.to.id(), words(&upload.bytes));
        Self(recording.uploads.iter().map(upload).collect())
    }

    /// Adds an array.
    pub fn insert(&mut self, tensor: &Tensor, words: Vec<u32>) {
        self.0.insert(tensor.id(), Cow::Owned(words));
    }

    /// The array in a tensor.
    ///
    /// # Panics
    /// If the host does not know it.
    pub fn get(&self, tensor: &Tensor) -> &[u32] {
        self.0
            .get(&tensor.id())
            .expect("the host knows its own arrays")
    }
}

/// The `fits` of a kernel without conditions.
pub fn always(_: &Dispatch, _: &Caps) -> bool {
    true
}

/// Bounds on the difference between a kernel and the reference, for one storage type.
#[derive(Clone, Copy, Debug)]
pub struct Bound {
    /// Absolute part of the elementwise bound `|got - want| <= abs + rel * |want|`.
    pub abs: f64,
    /// Relative part.
    pub rel: f64,
    /// Normalised mean squared error: `sum (got - want)^2 / sum want^2`.
    pub nmse: f64,
}

/// Bounds by storage type of the output.
#[derive(Clone, Copy, Debug)]
pub struct Tolerance {
    /// For f32 outputs.
    pub f32: Bound,
    /// For f16 outputs.
    pub f16: Bound,
    /// For bf16 outputs.
    pub bf16: Bound,
}

impl Tolerance {
    /// The common bounds: NMSE 1e-12 (f32), 1e-6 (f16), 1e-5 (bf16), with `abs` for f32 elements.
    pub const fn with_abs(abs: f64) -> Self {
        Self {
            f32: Bound {
                abs,
                rel: 1e-5,
                nmse: 1e-12,
            },
            // One unit in the last place: the two may round a tie apart.
            f16: Bound {
                abs,
                rel: 1.0 / 1024.0,
                nmse: 1e-6,
            },
            bf16: Bound {
                abs,
                rel: 1.0 / 128.0,
                nmse: 1e-5,
            },
        }
    }

    /// The bound for an output of a type; integers must be equal.
    pub const fn of(&self, dtype: DType) -> Bound {
        match dtype {
            DType::F32 => self.f32,
            DType::F16 => self.f16,
            DType::BF16 => self.bf16,
            DType::U32 | DType::U4 | DType::U8 | DType::F8 => Bound {
                abs: 0.0,
                rel: 0.0,
                nmse: 0.0,
            },
        }
    }
}

/// One input that kernels are judged on.
#[derive(Clone, Debug)]
pub struct Case {
    /// A sentence; also the seed of its random numbers.
    pub name: String,
    /// The parameters.
    pub params: ParamBytes,
    /// The arguments, in the op's order.
    pub args: Vec<CaseArg>,
}

/// An argument of a [`Case`].
#[derive(Clone, Debug)]
pub struct CaseArg {
    /// Storage type.
    pub dtype: DType,
    /// Shape.
    pub shape: Vec<usize>,
    /// Contents.
    pub data: Data,
}

/// Contents of a [`CaseArg`].
#[derive(Clone, Debug)]
pub enum Data {
    /// Numbers, rounded to the storage type.
    Floats(Vec<f32>),
    /// Raw integers.
    Words(Vec<u32>),
    /// Not initialised by the case: the judge fills it with NaN.
    Output,
}

/// Parameters of a dispatch as bytes; at most 64.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ParamBytes {
    bytes: [u8; 64],
    len: u8,
}

impl std::fmt::Debug for ParamBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list()
            .entries(bytemuck::cast_slice::<u8, u32>(self.as_bytes()))
            .finish()
    }
}

impl ParamBytes {
    /// The bytes of a parameter struct.
    ///
    /// # Panics
    /// If the struct is larger than 64 bytes or not a whole number of words.
    pub fn new<P: Pod>(params: &P) -> Self {
        let source = bytemuck::bytes_of(params);
        assert!(
            source.len() <= 64 && source.len().is_multiple_of(4),
            "parameters are at most 16 words"
        );
        Self::from_words(&bytemuck::pod_collect_to_vec(source))
    }

    /// The bytes of words, for those who do not know the struct.
    ///
    /// # Panics
    /// If there are more than 16.
    pub fn from_words(words: &[u32]) -> Self {
        let source: &[u8] = bytemuck::cast_slice(words);
        let mut bytes = [0; 64];
        bytes[..source.len()].copy_from_slice(source);
        Self {
            bytes,
            len: u8::try_from(source.len()).expect("at most 64"),
        }
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }

    /// Reads the struct back.
    ///
    /// # Panics
    /// If `P` has another size than what was stored.
    pub fn get<P: Pod>(&self) -> P {
        bytemuck::pod_read_unaligned(self.as_bytes())
    }
}

/// What a Rust kernel or a reference works on: parameters and typed views of the arguments.
#[derive(Debug)]
pub struct Args<'a> {
    params: ParamBytes,
    views: Vec<View<'a>>,
}

impl<'a> Args<'a> {
    /// Puts parameters and views together.
    pub fn new(params: ParamBytes, views: Vec<View<'a>>) -> Self {
        Self { params, views }
    }

    /// The parameters as the op's struct.
    pub fn params<P: Pod>(&self) -> P {
        self.params.get()
    }

    /// Moves all views out, in the order of the op's arguments.
    ///
    /// # Panics
    /// If the op has another number of arguments.
    pub fn views<const N: usize>(&mut self) -> [View<'a>; N] {
        let views = std::mem::take(&mut self.views);
        views
            .try_into()
            .expect("the op has as many arguments as its kernels take")
    }
}

/// A typed view of one argument in host memory.
#[derive(Debug)]
pub struct View<'a> {
    dtype: DType,
    words: Words<'a>,
}

#[derive(Debug)]
enum Words<'a> {
    Read(&'a [u32]),
    Write(&'a mut [u32]),
}

impl<'a> View<'a> {
    /// A view that can only be read.
    pub fn read(dtype: DType, words: &'a [u32]) -> Self {
        Self {
            dtype,
            words: Words::Read(words),
        }
    }

    /// A view that can be written.
    pub fn write(dtype: DType, words: &'a mut [u32]) -> Self {
        Self {
            dtype,
            words: Words::Write(words),
        }
    }

    /// Storage type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    fn words(&self) -> &[u32] {
        match &self.words {
            Words::Read(words) => words,
            Words::Write(words) => words,
        }
    }

    fn words_mut(&mut self) -> &mut [u32] {
        match &mut self.words {
            Words::Read(_) => panic!("this argument is declared as read-only"),
            Words::Write(words) => words,
        }
    }

    fn assert_dtype(&self, want: DType) {
        assert_eq!(
            self.dtype, want,
            "an argument is viewed as another type than it has"
        );
    }

    /// The elements as f32.
    pub fn f32s(&self) -> &[f32] {
        self.assert_dtype(DType::F32);
        bytemuck::cast_slice(self.words())
    }

    /// The elements as f32, to write.
    pub fn f32s_mut(&mut self) -> &mut [f32] {
        self.assert_dtype(DType::F32);
        bytemuck::cast_slice_mut(self.words_mut())
    }

    /// The elements as f16.
    pub fn f16s(&self) -> &[f16] {
        self.assert_dtype(DType::F16);
        bytemuck::cast_slice(self.words())
    }

    /// The elements as f16, to write.
    pub fn f16s_mut(&mut self) -> &mut [f16] {
        self.assert_dtype(DType::F16);
        bytemuck::cast_slice_mut(self.words_mut())
    }

    /// The elements as bf16.
    pub fn bf16s(&self) -> &[bf16] {
        self.assert_dtype(DType::BF16);
        bytemuck::cast_slice(self.words())
    }

    /// The elements as bf16, to write.
    pub fn bf16s_mut(&mut self) -> &mut [bf16] {
        self.assert_dtype(DType::BF16);
        bytemuck::cast_slice_mut(self.words_mut())
    }

    /// The elements as u32.
    pub fn u32s(&self) -> &[u32] {
        self.assert_dtype(DType::U32);
        self.words()
    }

    /// The elements as u32, to write.
    pub fn u32s_mut(&mut self) -> &mut [u32] {
        self.assert_dtype(DType::U32);
        self.words_mut()
    }

    /// The elements as i32.
    pub fn i32s(&self) -> &[i32] {
        self.assert_dtype(DType::U32);
        bytemuck::cast_slice(self.words())
    }

    fn assert_codes(&self) {
        assert!(
            matches!(self.dtype, DType::U4 | DType::U8 | DType::F8),
            "an argument of {} holds no codes",
            self.dtype
        );
    }

    /// The words of an argument of codes, packed as [`DType::code_at`] says.
    ///
    /// # Panics
    /// If the argument is of another type.
    pub fn codes(&self) -> &[u32] {
        self.assert_codes();
        self.words()
    }

    /// The words of an argument of codes, to write.
    pub fn codes_mut(&mut self) -> &mut [u32] {
        self.assert_codes();
        self.words_mut()
    }

    /// One element of any type; of codes, the code, without its scale and zero point.
    pub fn get(&self, at: usize) -> f64 {
        match self.dtype {
            DType::F32 => f64::from(self.f32s()[at]),
            DType::F16 => f64::from(self.f16s()[at]),
            DType::BF16 => f64::from(self.bf16s()[at]),
            DType::U32 => f64::from(self.u32s()[at]),
            DType::U4 | DType::U8 | DType::F8 => {
                let (word, bit) = self.dtype.code_at(at);
                let code = self.words()[word] >> bit & ((1 << self.dtype.bits()) - 1);
                match self.dtype {
                    DType::F8 => f64::from(e4m3(code)),
                    _ => f64::from(code),
                }
            }
        }
    }

    /// Stores one element of any float type, rounded once to the storage type.
    ///
    /// # Panics
    /// If the argument is read-only or of integers.
    pub fn set(&mut self, at: usize, value: f64) {
        match self.dtype {
            #[expect(
                clippy::cast_possible_truncation,
                reason = "rounding to storage is the point"
            )]
            DType::F32 => self.f32s_mut()[at] = value as f32,
            DType::F16 => self.f16s_mut()[at] = f16::from_f64(value),
            DType::BF16 => self.bf16s_mut()[at] = bf16::from_f64(value),
            DType::U32 | DType::U4 | DType::U8 | DType::F8 => {
                panic!("floats are not stored in integer arguments")
            }
        }
    }
}
