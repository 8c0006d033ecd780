//! Pseudo-random contents, made where they are needed: weights and caches of benches.
//!
//! A number depends on the seed and on its place, so that a tensor holds the same on every device.

use bytemuck::{Pod, Zeroable};
use rayon::prelude::*;

use super::case::{case, output};
use super::u32_of;
use crate::device::Access::Write;
use crate::device::{
    Args, Caps, Case, DType, Dispatch, Kernel, Op, Recording, Run, Tensor, Tolerance, Wgsl,
};
use half::{bf16, f16};

/// The op.
pub static OP: Op = Op {
    name: "fill",
    summary: "y[i] = mean + scale * a number in [-1, 1) that a hash of (seed, i) gives; codes are the hash",
    params: &["n_words", "seed", "mean", "scale", "low"],
    args: &[("y", Write)],
    reference,
    kernels: &[
        Kernel {
            name: "words",
            run: Run::Wgsl(Wgsl {
                file: "shaders/fill.wgsl",
                source: include_str!("../../shaders/fill.wgsl"),
                consts: |d, _| vec![("KIND", kind(d.args[0].dtype()))],
                elements: &[],
                groups: |d, _| {
                    let words = d.params.get::<Params>().n_words;
                    [words.div_ceil(64).min(MOST_GROUPS), 1, 1]
                },
                loads: Some(|_, _, _, _| vec![0]),
            }),
            fits,
        },
        Kernel {
            name: "words",
            run: Run::Cpu(by_word),
            fits,
        },
    ],
    cases,
    tolerance: Tolerance::with_abs(1e-6),
};

/// Workgroups that fill any device; larger tensors take more rounds.
const MOST_GROUPS: u32 = 8192;

/// Uniform of `fill.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Params {
    n_words: u32,
    seed: u32,
    mean: f32,
    scale: f32,
    low: u32,
}

/// What a tensor is filled with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Contents {
    /// Floats from `mean - scale` to `mean + scale`; codes of any value, 8-bit floats below 2.
    Numbers {
        /// The middle.
        mean: f32,
        /// Half the width.
        scale: f32,
    },
    /// Words of scales of codes: floats from `scale` to half as much again, and a zero point.
    Scales {
        /// The least.
        scale: f32,
        /// The zero point, at most 255.
        zero: u32,
    },
}

/// Four codes of [`DType::F8`] without the upper bit of their exponents: none of them is NaN.
const BELOW_TWO: u32 = 0xbfbf_bfbf;

/// As in `fill.wgsl`.
fn kind(dtype: DType) -> u32 {
    match dtype {
        DType::F32 => 0,
        DType::F16 => 1,
        DType::BF16 => 2,
        DType::U4 | DType::U8 => 3,
        DType::U32 => 4,
        DType::F8 => 5,
    }
}

/// Halves of words are not written.
fn fits(d: &Dispatch, _: &Caps) -> bool {
    d.args[0].bytes().is_multiple_of(4)
}

/// Records the filling of a tensor; of one with an odd number of halves, the last stays.
///
/// # Panics
/// If scales are to fill another type than [`DType::U32`], or numbers that one.
pub fn fill(r: &mut Recording, y: &Tensor, contents: Contents, seed: u32) {
    let (mean, scale, low) = match contents {
        Contents::Numbers { mean, scale } => (mean, scale, 0),
        Contents::Scales { scale, zero } => (0.0, scale, zero),
    };
    let scales = matches!(contents, Contents::Scales { .. });
    assert_eq!(scales, y.dtype() == DType::U32, "fill: words are scales");
    assert!(low < 256, "fill: a zero point is a byte");
    let params = Params {
        n_words: u32_of(y.bytes() / 4),
        seed,
        mean,
        scale,
        low,
    };
    r.push(&OP, &params, &[y]);
}

fn hash(seed: u32, i: u32) -> u32 {
    let state = (i ^ seed)
        .wrapping_mul(747_796_405)
        .wrapping_add(2_891_336_453);
    let word = ((state >> ((state >> 28) + 4)) ^ state).wrapping_mul(277_803_737);
    (word >> 22) ^ word
}

fn unit(seed: u32, i: u32) -> f32 {
    (hash(seed, i) >> 21) as f32 / 1024.0 - 1.0
}

fn scale_word(p: &Params, i: u32) -> u32 {
    let word = p.scale.to_bits() + ((hash(p.seed, i) & 0x3f) << 16);
    (word & 0xffff_ff00) | p.low
}

fn reference(args: &mut Args<'_>) {
    let p: Params = args.params();
    let [mut y] = args.views();
    let dtype = y.dtype();
    for i in 0..p.n_words {
        match dtype {
            DType::U4 | DType::U8 => y.codes_mut()[i as usize] = hash(p.seed, i),
            DType::F8 => y.codes_mut()[i as usize] = hash(p.seed, i) & BELOW_TWO,
            DType::U32 => y.u32s_mut()[i as usize] = scale_word(&p, i),
            _ => {
                let per_word = 32 / u32_of(dtype.bits());
                for i in i * per_word..(i + 1) * per_word {
                    let value = f64::from(unit(p.seed, i)) * f64::from(p.scale);
                    y.set(i as usize, f64::from(p.mean) + value);
                }
            }
        }
    }
}

fn by_word(args: &mut Args<'_>) {
    let p: Params = args.params();
    let [mut y] = args.views();
    let value = |i: u32| p.mean + unit(p.seed, i) * p.scale;
    match y.dtype() {
        DType::F32 => each(&p, y.f32s_mut(), value),
        DType::F16 => each(&p, y.f16s_mut(), |i| f16::from_f32(value(i))),
        DType::BF16 => each(&p, y.bf16s_mut(), |i| bf16::from_f32(value(i))),
        DType::U4 | DType::U8 => each(&p, y.codes_mut(), |i| hash(p.seed, i)),
        DType::F8 => each(&p, y.codes_mut(), |i| hash(p.seed, i) & BELOW_TWO),
        DType::U32 => each(&p, y.u32s_mut(), |i| scale_word(&p, i)),
    }
}

/// Sets every element that lies in the words to be filled.
fn each<T: Send>(p: &Params, y: &mut [T], value: impl Fn(u32) -> T + Sync) {
    let n = p.n_words as usize * 4 / size_of::<T>();
    let all = y[..n].par_iter_mut().enumerate().with_min_len(1 << 14);
    all.for_each(|(i, y)| *y = value(u32_of(i)));
}

fn cases() -> Vec<Case> {
    let make = |name: &str, dtype: DType, len: usize, [mean, scale]: [f32; 2], seed, low| {
        let bytes = dtype.bytes(len).expect("small");
        let params = Params {
            n_words: u32_of(bytes / 4),
            seed,
            mean,
            scale,
            low,
        };
        case(name, &params, vec![output(dtype, &[len])])
    };
    let small = 64 * 3 + 5;
    let grid = 64 * MOST_GROUPS as usize + 77;
    vec![
        make("floats", DType::F32, small, [0.0, 1.5], 7, 0),
        make("floats around one", DType::F32, small, [1.0, 0.1], 7, 0),
        make("another seed", DType::F32, small, [0.0, 1.5], 8, 0),
        make("halves", DType::F16, 2 * small, [1.0, 0.5], 1, 0),
        make("upper halves", DType::BF16, 2 * small, [-3.0, 5.0], 2, 0),
        make("codes of 4 bits", DType::U4, 128 * 3, [0.0; 2], 3, 0),
        make("codes of 8 bits", DType::U8, 32 * 5, [0.0; 2], 4, 0),
        make("floats of 8 bits", DType::F8, 32 * 5, [0.0; 2], 4, 0),
        make("scales", DType::U32, small, [0.0, 0.01], 5, 8),
        make("more than a grid", DType::F32, grid, [0.0, 1.0], 6, 0),
    ]
}
