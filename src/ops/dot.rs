//! Dot products of weight rows with several columns: the inner loop of the CPU path.
//!
//! The sum of one row with one column runs in the same order whatever is computed beside it, so that a
//! worker's bits do not depend on who shares the pass.

#![allow(
    clippy::inline_always,
    reason = "what is not in line is not compiled for the instruction set of the dispatch"
)]

use std::sync::LazyLock;

use half::slice::HalfFloatSliceExt;
use pulp::{Arch, Simd, WithSimd};

use super::MAX_COLS;
use crate::device::{DType, View, e4m3};

/// Elements of a weight row that are widened to f32 at once; a piece stays in the first cache.
const PIECE: usize = 512;

/// Weight rows that are computed together: each column is then read once for two of them.
pub(super) const ROWS: usize = 2;

/// The instruction set of this machine.
pub(super) static ARCH: LazyLock<Arch> = LazyLock::new(Arch::new);

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
        DType::U32 | DType::U4 | DType::U8 | DType::F8 => panic!("codes have scales"),
    }
}

/// A matrix of floats, or of codes with scales.
pub(super) struct Matrix<'a> {
    /// `[n, k]`, the rows of codes padded to whole spans.
    pub(super) weight: &'a View<'a>,
    /// Of codes, `[n, ceil(k / group)]`.
    pub(super) scales: &'a [u32],
    /// Columns.
    pub(super) k: usize,
    /// Columns that share a scale.
    pub(super) group: usize,
}

impl Matrix<'_> {
    /// Widens `to.len()` elements of a row, from column `first` on, to f32. The piece begins at a span.
    #[inline(always)]
    fn widen(&self, row: usize, first: usize, to: &mut [f32]) {
        match self.weight.dtype() {
            DType::BF16 => {
                let from = &self.weight.bf16s()[row * self.k + first..];
                for (to, &from) in to.iter_mut().zip(from) {
                    *to = f32::from_bits(u32::from(from.to_bits()) << 16);
                }
            }
            DType::U4 => self.decode::<4, false>(row, first, to),
            DType::U8 => self.decode::<8, false>(row, first, to),
            DType::F8 => self.decode::<8, true>(row, first, to),
            _ => widen(self.weight, row * self.k + first, to),
        }
    }

    /// As [`Matrix::widen`], for codes of `BITS` bits in the order of [`DType::code_at`], which may be floats.
    #[inline(always)]
    fn decode<const BITS: usize, const FLOATS: bool>(
        &self,
        row: usize,
        first: usize,
        to: &mut [f32],
    ) {
        let (span, runs) = if BITS == 4 { (128, 4) } else { (32, 2) };
        let dtype = if FLOATS { DType::F8 } else { DType::U8 };
        let stride = self.k.next_multiple_of(span);
        let words = &self.weight.codes()[(row * stride + first) * BITS / 32..];
        let scales = &self.scales[row * self.k.div_ceil(self.group)..];
        for (i, to) in to.chunks_mut(8).enumerate() {
            let (factor, zero) = dtype.scale_of(scales[(first + 8 * i) / self.group]);
            let run = i % (runs * runs);
            let at = i / (runs * runs) * 4 * runs + run % runs * 4 + run / runs * (4 / runs);
            let bits = if BITS == 4 {
                u64::from(words[at])
            } else {
                u64::from(words[at]) | u64::from(words[at + 1]) << 32
            };
            for (j, to) in to.iter_mut().enumerate() {
                #[allow(clippy::cast_possible_truncation, reason = "a code has at most 8 bits")]
                let code = (bits >> (BITS * j) & ((1 << BITS) - 1)) as u32;
                let number = if FLOATS {
                    e4m3(code)
                } else {
                    (code.cast_signed() - zero.cast_signed()) as f32
                };
                *to = number * factor;
            }
        }
    }
}

/// `out[i][c] = sum over j of matrix[rows[i], j] * x[c][j]`, for at most 16 columns of length `k`.
///
/// Shapes: `x` `[columns, k]`; `out` holds one sum for each column in its first places.
pub(super) fn dots(
    matrix: &Matrix<'_>,
    rows: [usize; ROWS],
    x: &[f32],
    out: &mut [[f32; MAX_COLS]; ROWS],
) {
    let columns = x.len() / matrix.k.max(1);
    assert!(
        columns <= MAX_COLS && x.len() == columns * matrix.k,
        "columns of the same length"
    );
    ARCH.dispatch(Dots {
        matrix,
        rows,
        columns,
        x,
        out,
    });
}

/// The sums over i of `a[i] * b[i]`, each in the same order whatever is computed beside it.
#[inline(always)]
pub(super) fn dot_products<S: Simd, const C: usize>(
    simd: S,
    a: &[f32],
    b: [&[f32]; C],
) -> [f32; C] {
    let mut sums = [[simd.splat_f32s(0.0); C]];
    let mut tails = [[0.0; C]];
    tile::<S, 1, C>(simd, [a], b, &mut sums, &mut tails);
    std::array::from_fn(|c| simd.reduce_sum_f32s(sums[0][c]) + tails[0][c])
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
    matrix: &'a Matrix<'a>,
    rows: [usize; ROWS],
    columns: usize,
    x: &'a [f32],
    out: &'a mut [[f32; MAX_COLS]; ROWS],
}

impl WithSimd for Dots<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self {
            matrix,
            rows,
            columns,
            x,
            out,
        } = self;
        let k = matrix.k;
        let mut sums = [[simd.splat_f32s(0.0); MAX_COLS]; ROWS];
        let mut tails = [[0.0; MAX_COLS]; ROWS];
        let mut buffers = [[0.0; PIECE]; ROWS];
        for first in (0..k).step_by(PIECE) {
            let len = PIECE.min(k - first);
            for (row, buffer) in rows.iter().zip(&mut buffers) {
                matrix.widen(*row, first, &mut buffer[..len]);
            }
            let ws = [&buffers[0][..len], &buffers[1][..len]];
            let column = |c: usize| &x[c * k + first..][..len];
            let mut c = 0;
            while c + 4 <= columns {
                let xs = [column(c), column(c + 1), column(c + 2), column(c + 3)];
                tile_at::<S, 4>(simd, ws, xs, c, &mut sums, &mut tails);
                c += 4;
            }
            while c < columns {
                tile_at::<S, 1>(simd, ws, [column(c)], c, &mut sums, &mut tails);
                c += 1;
            }
        }
        for (out, (sums, tails)) in out.iter_mut().zip(sums.iter().zip(&tails)) {
            for (out, (sum, tail)) in out.iter_mut().zip(sums.iter().zip(tails)).take(columns) {
                *out = simd.reduce_sum_f32s(*sum) + tail;
            }
        }
    }
}

/// [`tile`] for the columns `c..c + C` of running sums.
#[inline(always)]
fn tile_at<S: Simd, const C: usize>(
    simd: S,
    ws: [&[f32]; ROWS],
    xs: [&[f32]; C],
    c: usize,
    sums: &mut [[S::f32s; MAX_COLS]; ROWS],
    tails: &mut [[f32; MAX_COLS]; ROWS],
) {
    let mut acc: [[S::f32s; C]; ROWS] =
        std::array::from_fn(|r| std::array::from_fn(|i| sums[r][c + i]));
    let mut rest: [[f32; C]; ROWS] =
        std::array::from_fn(|r| std::array::from_fn(|i| tails[r][c + i]));
    tile::<S, ROWS, C>(simd, ws, xs, &mut acc, &mut rest);
    for r in 0..ROWS {
        sums[r][c..c + C].copy_from_slice(&acc[r]);
        tails[r][c..c + C].copy_from_slice(&rest[r]);
    }
}

/// Adds the products of one piece to `R` times `C` running sums; what fills no vector goes to `tails`.
#[inline(always)]
fn tile<S: Simd, const R: usize, const C: usize>(
    simd: S,
    ws: [&[f32]; R],
    xs: [&[f32]; C],
    sums: &mut [[S::f32s; C]; R],
    tails: &mut [[f32; C]; R],
) {
    let ws = ws.map(|w| S::as_simd_f32s(w));
    let xs = xs.map(|x| S::as_simd_f32s(x));
    let mut acc = *sums;
    for i in 0..ws[0].0.len() {
        let x: [S::f32s; C] = std::array::from_fn(|c| xs[c].0[i]);
        for r in 0..R {
            for c in 0..C {
                acc[r][c] = simd.mul_add_e_f32s(ws[r].0[i], x[c], acc[r][c]);
            }
        }
    }
    *sums = acc;
    for r in 0..R {
        for c in 0..C {
            for (&w, &x) in ws[r].1.iter().zip(xs[c].1) {
                tails[r][c] += w * x;
            }
        }
    }
}
