//! Dot products of one weight row with several columns: the inner loop of the CPU path.
//!
//! Each column's sum runs in the same order whatever the number of columns, so that a worker's bits do
//! not depend on who shares the pass.

#![allow(
    clippy::inline_always,
    reason = "what is not in line is not compiled for the instruction set of the dispatch"
)]

use std::sync::LazyLock;

use half::slice::HalfFloatSliceExt;
use pulp::{Arch, Simd, WithSimd};

use super::MAX_COLS;
use crate::device::{DType, View};

/// Elements of a weight row that are widened to f32 at once; a piece stays in the first cache.
const PIECE: usize = 512;

/// The instruction set of this machine.
static ARCH: LazyLock<Arch> = LazyLock::new(Arch::new);

/// Widens `to.len()` elements from `at` to f32.
pub(super) fn widen(from: &View<'_>, at: usize, to: &mut [f32]) {
    let range = at..at + to.len();
    match from.dtype() {
        DType::F32 => to.copy_from_slice(&from.f32s()[range]),
        DType::F16 => from.f16s()[range].convert_to_f32_slice(to),
        DType::BF16 => {
            for (to, &from) in to.iter_mut().zip(&from.bf16s()[range]) {
                *to = from.to_f32();
            }
        }
        DType::U32 => panic!("integers are not weights"),
    }
}

/// `out[c] = sum over i of weight[at + i] * x[c][i]`, for at most 16 columns of length `k`.
///
/// Shapes: `x` `[columns, k]`, `out` `[columns]`.
pub(super) fn dots(weight: &View<'_>, at: usize, k: usize, x: &[f32], out: &mut [f32]) {
    assert!(
        out.len() <= MAX_COLS && x.len() == out.len() * k,
        "columns of the same length"
    );
    ARCH.dispatch(Dots {
        weight,
        at,
        k,
        x,
        out,
    });
}

/// The sum over i of `a[i] * b[i]`, in the same order on every call.
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    struct Dot<'a>(&'a [f32], &'a [f32]);
    impl WithSimd for Dot<'_> {
        type Output = f32;
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> f32 {
            let mut sums = [[simd.splat_f32s(0.0); 2]];
            let mut tails = [0.0];
            piece::<S, 1>(simd, self.0, [self.1], &mut sums, &mut tails);
            simd.reduce_sum_f32s(simd.add_f32s(sums[0][0], sums[0][1])) + tails[0]
        }
    }
    ARCH.dispatch(Dot(a, b))
}

/// `y += a * x`.
pub(super) fn add_scaled(y: &mut [f32], a: f32, x: &[f32]) {
    ARCH.dispatch(
        #[inline(always)]
        || {
            for (y, &x) in y.iter_mut().zip(x) {
                *y += a * x;
            }
        },
    );
}

struct Dots<'a> {
    weight: &'a View<'a>,
    at: usize,
    k: usize,
    x: &'a [f32],
    out: &'a mut [f32],
}

impl WithSimd for Dots<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self {
            weight,
            at,
            k,
            x,
            out,
        } = self;
        let mut sums = [[simd.splat_f32s(0.0); 2]; MAX_COLS];
        let mut tails = [0.0; MAX_COLS];
        let mut buffer = [0.0; PIECE];
        for first in (0..k).step_by(PIECE) {
            let len = PIECE.min(k - first);
            let w = &mut buffer[..len];
            match weight.dtype() {
                // In line, so that it is compiled for the instruction set of the dispatch.
                DType::BF16 => {
                    for (to, &from) in w.iter_mut().zip(&weight.bf16s()[at + first..][..len]) {
                        *to = f32::from_bits(u32::from(from.to_bits()) << 16);
                    }
                }
                _ => widen(weight, at + first, w),
            }
            let column = |c: usize| &x[c * k + first..][..len];
            let mut c = 0;
            while c + 4 <= out.len() {
                let xs = [column(c), column(c + 1), column(c + 2), column(c + 3)];
                piece::<S, 4>(simd, w, xs, &mut sums[c..], &mut tails[c..]);
                c += 4;
            }
            while c < out.len() {
                piece::<S, 1>(simd, w, [column(c)], &mut sums[c..], &mut tails[c..]);
                c += 1;
            }
        }
        for ((out, sum), tail) in out.iter_mut().zip(&sums).zip(&tails) {
            *out = simd.reduce_sum_f32s(simd.add_f32s(sum[0], sum[1])) + tail;
        }
    }
}

/// Adds the products of one piece to the running sums of `C` columns: vectors of even and of odd index
/// in a sum of their own, what is left over in `tails`.
#[inline(always)]
fn piece<S: Simd, const C: usize>(
    simd: S,
    w: &[f32],
    xs: [&[f32]; C],
    sums: &mut [[S::f32s; 2]],
    tails: &mut [f32],
) {
    let (ws, w_tail) = S::as_simd_f32s(w);
    let xs = xs.map(|x| S::as_simd_f32s(x));
    let mut acc: [[S::f32s; 2]; C] = std::array::from_fn(|c| sums[c]);
    let n = ws.len();
    for i in 0..n / 2 {
        for c in 0..C {
            acc[c][0] = simd.mul_add_e_f32s(ws[2 * i], xs[c].0[2 * i], acc[c][0]);
            acc[c][1] = simd.mul_add_e_f32s(ws[2 * i + 1], xs[c].0[2 * i + 1], acc[c][1]);
        }
    }
    for c in 0..C {
        if n % 2 == 1 {
            acc[c][0] = simd.mul_add_e_f32s(ws[n - 1], xs[c].0[n - 1], acc[c][0]);
        }
        sums[c] = acc[c];
        for (&w, &x) in w_tail.iter().zip(xs[c].1) {
            tails[c] += w * x;
        }
    }
}
