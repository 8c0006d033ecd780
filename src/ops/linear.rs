//! What the linear ops share: a matrix of any storage type, a norm folded into its input, two ways to be
//! launched, and the meaning of both.
//!
//! A weight is read once for all rows of a pass: by columns, at most 16 rows at a time, in an order of
//! summation that is the same for every count. The prefill of a block that nobody else sees goes by tiles.

use std::collections::BTreeSet;
use std::ops::Range;

use rayon::prelude::*;

use super::case::{Rng, floats, words};
use super::dot::{Matrix, ROWS, dots};
use super::{MAX_COLS, u32_of};
use crate::device::{Caps, CaseArg, DType, Tensor, View};

/// Weight and bias of a linear layer, or a piece of it.
#[derive(Clone, Copy, Debug)]
pub struct Linear<'a> {
    /// `[n, k]`; codes have their rows padded to whole spans ([`DType::span`]).
    pub weight: &'a Tensor,
    /// Of codes, `[n, ceil(k / group)]` words, as [`DType::scale_of`] reads them. Of floats, any tensor of
    /// words.
    pub scales: &'a Tensor,
    /// Numbers of a row that share a scale: a multiple of 32, or at least `k`. Not used for floats.
    pub group: usize,
    /// `[>= first + n]`, in f32.
    pub bias: &'a Tensor,
    /// The row of the whole weight that the piece begins with.
    pub first: usize,
}

/// A norm over the residual stream: `x / sqrt(mean(x^2) + eps) * weight`.
#[derive(Clone, Copy, Debug)]
pub struct Norm<'a> {
    /// `[k]`, in f32.
    pub weight: &'a Tensor,
    /// Columns that are no padding.
    pub count: usize,
    /// Added to the mean square before its root.
    pub eps: f32,
}

/// Which kernels serve a linear op. A choice of the caller and never of a row count, so that a row's bits
/// depend on its own numbers alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// At most 16 rows at a time: workers that write.
    Columns,
    /// Many rows of one block that no other row sees: a prefill.
    Tiles,
}

impl Linear<'_> {
    /// Checks that the matrix fits an input of `k` columns.
    ///
    /// # Panics
    /// If it does not.
    pub(super) fn check(&self, op: &str, k: usize) {
        let (rows, span) = (self.weight.shape()[0], self.weight.dtype().span());
        assert_eq!(
            self.weight.cols(),
            k.next_multiple_of(span),
            "{op}: x does not fit the weight"
        );
        assert!(
            self.first + rows <= self.bias.len(),
            "{op}: bias is too short"
        );
        if span > 1 {
            let group = self.group;
            assert!(
                group.is_multiple_of(32) || group >= k && group.is_multiple_of(8),
                "{op}: groups of {group}"
            );
            assert_eq!(
                self.scales.len(),
                rows * k.div_ceil(group),
                "{op}: number of scales"
            );
        }
    }
}

/// Columns that a kernel is compiled for: the rows of the pass, at most 16, with some steps left out
/// where a column more costs little. Each column's sum runs in the same order whatever the count.
pub(super) fn columns(n_rows: u32) -> u32 {
    match n_rows {
        0..=8 => n_rows.max(1),
        9..=10 => 10,
        11..=12 => 12,
        _ => u32_of(MAX_COLS),
    }
}

/// Quads of weight rows that a workgroup of 64 lanes serves by columns: one for each subgroup.
pub(super) fn quads_per_group(caps: &Caps) -> u32 {
    64 / caps.subgroup.0.clamp(4, 64)
}

/// Constants of `parts/columns.wgsl`.
pub(super) fn column_consts(n_rows: u32, group: u32, caps: &Caps) -> Vec<(&'static str, u32)> {
    vec![
        ("COLS", columns(n_rows)),
        ("QUADS", quads_per_group(caps)),
        ("GROUP", (group / 8).max(1)),
    ]
}

/// Constants of `parts/tiles.wgsl`.
pub(super) fn tile_consts(group: u32) -> Vec<(&'static str, u32)> {
    vec![("GROUP", (group / 8).max(1))]
}

/// Workgroups by columns.
pub(super) fn column_groups(n_quads: u32, n_rows: u32, caps: &Caps) -> [u32; 3] {
    [
        n_quads.div_ceil(quads_per_group(caps)),
        n_rows.div_ceil(columns(n_rows)),
        1,
    ]
}

/// Constants of `parts/matrix.wgsl`.
pub(super) fn matrix_consts(group: u32, caps: &Caps) -> Vec<(&'static str, u32)> {
    vec![("GROUP", (group / 8).max(1)), ("MATRIX", caps.matrix)]
}

/// Whether the adapter has cooperative matrices, and a workgroup as many subgroups as they make blocks:
/// 4 of 32 lanes where they are 16 wide, 16 of 8 lanes where they are 8 wide.
pub(super) fn has_matrices(caps: &Caps) -> bool {
    caps.subgroup.0 == caps.subgroup.1
        && matches!((caps.matrix, caps.subgroup.0), (16, 32) | (8, 8))
}

/// Workgroups by cooperative matrices: 16 quads and 64 rows each, as in `parts/matrix.wgsl`.
pub(super) fn matrix_groups(n_quads: u32, n_rows: u32) -> [u32; 3] {
    [n_quads.div_ceil(16), n_rows.div_ceil(64), 1]
}

/// Workgroups by tiles: 16 quads and 32 rows each, as in `parts/tiles.wgsl`.
pub(super) fn tile_groups(n_quads: u32, n_rows: u32) -> [u32; 3] {
    [n_quads.div_ceil(16), n_rows.div_ceil(32), 1]
}

/// A linear op as the host sees it, to count what a workgroup loads.
pub(super) struct Launched<'a> {
    pub(super) weight: &'a Tensor,
    pub(super) n_rows: u32,
    pub(super) k: u32,
    pub(super) group: u32,
    pub(super) norm: bool,
    pub(super) n_quads: u32,
}

/// What one workgroup of a linear op serves.
pub(super) struct Served {
    /// Quads of weight rows.
    pub(super) quads: Range<u32>,
    /// Rows of x.
    pub(super) rows: Range<u32>,
    /// Bytes that it loads of x, gamma, weight, scales and bias.
    pub(super) loads: Vec<u64>,
}

impl Launched<'_> {
    /// The workgroup of a number, by columns; `quad_rows` gives the weight rows of a quad.
    pub(super) fn by_columns(
        &self,
        caps: &Caps,
        group: [u32; 3],
        quad_rows: impl Fn(u32) -> [u32; 4],
    ) -> Served {
        self.served(
            [quads_per_group(caps), columns(self.n_rows)],
            group,
            quad_rows,
        )
    }

    /// The workgroup of a number, by tiles.
    pub(super) fn by_tiles(&self, group: [u32; 3], quad_rows: impl Fn(u32) -> [u32; 4]) -> Served {
        self.served([16, 32], group, quad_rows)
    }

    fn served(
        &self,
        [quads, rows]: [u32; 2],
        group: [u32; 3],
        quad_rows: impl Fn(u32) -> [u32; 4],
    ) -> Served {
        let stretch = |n: u32, at: u32, end: u32| (at * n).min(end)..((at + 1) * n).min(end);
        let quads = stretch(quads, group[0], self.n_quads);
        let rows = stretch(rows, group[1], self.n_rows);
        let served: BTreeSet<u32> = quads.clone().flat_map(quad_rows).collect();
        let weight = self.weight;
        let row = |n: usize| (served.len() * n) as u64;
        let x_row = u64::from(self.k) * 4;
        let coded = weight.dtype().span() > 1;
        let n_groups = self.k.div_ceil(self.group.max(8)) as usize;
        let loads = vec![
            x_row * rows.len() as u64,
            if self.norm { x_row } else { 0 },
            row(weight.bytes() / weight.shape()[0]),
            if coded { row(n_groups * 4) } else { 0 },
            row(4),
        ];
        Served { quads, rows, loads }
    }
}

/// The input and the matrix of a linear op, as its reference and its CPU kernel see them.
pub(super) struct Product<'a> {
    pub(super) x: View<'a>,
    /// The norm's weight, and what belongs to it; none where x goes in as it is.
    pub(super) norm: Option<(View<'a>, u32, f32)>,
    pub(super) weight: View<'a>,
    pub(super) scales: View<'a>,
    pub(super) n_rows: usize,
    pub(super) k: usize,
    pub(super) group: usize,
}

impl Product<'_> {
    /// The meaning: the sum over k of `norm(x)[row, k] * weight[n, k]`, in f64. Takes the row's numbers.
    pub(super) fn exact(&self, x: &[f64], n: usize) -> f64 {
        let codes = self.weight.dtype().span() > 1;
        let stride = self.k.next_multiple_of(self.weight.dtype().span());
        let value = |i: usize| {
            let stored = self.weight.get(n * stride + i);
            if !codes {
                return stored;
            }
            let word = self.scales.u32s()[n * self.k.div_ceil(self.group) + i / self.group];
            let (scale, zero) = self.weight.dtype().scale_of(word);
            (stored - f64::from(zero)) * f64::from(scale)
        };
        x.iter().enumerate().map(|(i, x)| x * value(i)).sum()
    }

    /// `norm(x)[row]` in f64.
    pub(super) fn exact_input(&self, row: usize) -> Vec<f64> {
        let x: Vec<f64> = (0..self.k).map(|i| self.x.get(row * self.k + i)).collect();
        let Some((gamma, count, eps)) = &self.norm else {
            return x;
        };
        let mean = x.iter().map(|x| x * x).sum::<f64>() / f64::from(*count);
        let scale = (mean + f64::from(*eps)).sqrt().recip();
        let scaled = x.iter().enumerate().map(|(i, x)| x * scale * gamma.get(i));
        scaled.collect()
    }

    /// The products of `n_out / 2` pairs of weight rows with every row of x, `[n_out / 2, 2, n_rows]`;
    /// `pair` gives the rows of a pair.
    pub(super) fn sums(
        &self,
        n_pairs: usize,
        pair: impl Fn(usize) -> [usize; ROWS] + Sync,
    ) -> Vec<f32> {
        let (n_rows, k) = (self.n_rows, self.k);
        let matrix = Matrix {
            weight: &self.weight,
            scales: self.scales.u32s(),
            k,
            group: self.group,
        };
        let normed = self.normed();
        let x = normed.as_deref().unwrap_or(&self.x.f32s()[..n_rows * k]);
        let mut sums = vec![0.0; n_pairs * ROWS * n_rows];
        let by_pair = sums
            .par_chunks_exact_mut(ROWS * n_rows)
            .with_min_len(4)
            .enumerate();
        by_pair.for_each(|(i, sums)| {
            let mut out = [[0.0; MAX_COLS]; ROWS];
            for (group, x) in x.chunks(MAX_COLS * k).enumerate() {
                dots(&matrix, pair(i), x, &mut out);
                for (sums, out) in sums.chunks_exact_mut(n_rows).zip(&out) {
                    let columns = x.len() / k;
                    sums[group * MAX_COLS..][..columns].copy_from_slice(&out[..columns]);
                }
            }
        });
        sums
    }

    /// `norm(x)`, `[n_rows, k]`, if there is a norm.
    pub(super) fn normed(&self) -> Option<Vec<f32>> {
        let (gamma, count, eps) = self.norm.as_ref()?;
        let (k, gamma) = (self.k, gamma.f32s());
        let mut out = self.x.f32s()[..self.n_rows * k].to_vec();
        out.par_chunks_exact_mut(k).for_each(|row| {
            // The mean in f64 costs nothing beside the products and keeps long rows exact.
            let sum: f64 = row.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
            #[expect(
                clippy::cast_possible_truncation,
                reason = "the scale is applied in f32"
            )]
            let scale = (sum / f64::from(*count) + f64::from(*eps)).sqrt().recip() as f32;
            for (x, &w) in row.iter_mut().zip(gamma) {
                *x = *x * scale * w;
            }
        });
        Some(out)
    }
}

/// Weight and scales of a case: floats, or codes in groups of `group` with scales around one.
pub(super) fn matrix(
    rng: &mut Rng,
    dtype: DType,
    [n, k]: [usize; 2],
    group: usize,
) -> [CaseArg; 2] {
    if dtype.span() == 1 {
        let weight = rng.uniform(n * k);
        return [floats(dtype, &[n, k], weight), words(&[1], vec![0])];
    }
    let wide = k.next_multiple_of(dtype.span());
    let n_words = dtype.bytes(n * wide).expect("small") / 4;
    let mut codes: Vec<u32> = (0..n_words).map(|_| u32_of(rng.below(1 << 32))).collect();
    let n_scales = n * k.div_ceil(group);
    if dtype == DType::F8 {
        // What is NaN becomes the largest number.
        for code in bytemuck::cast_slice_mut::<u32, u8>(&mut codes) {
            *code ^= u8::from(*code & 0x7f == 0x7f);
        }
    }
    let scales = (0..n_scales).map(|_| {
        if dtype == DType::F8 {
            return ((rng.unit() * 0.5 + 1.0) / 160.0).to_bits();
        }
        let scale = (rng.unit() * 0.5 + 1.0) * 2.0 / (1u32 << dtype.bits()) as f32;
        let zero = rng.below(1 << dtype.bits());
        scale.to_bits() & 0xffff_ff00 | u32_of(zero)
    });
    let scales = words(&[n, k.div_ceil(group)], scales.collect());
    let weight = CaseArg {
        shape: vec![n, wide],
        dtype,
        ..words(&[0], codes)
    };
    [weight, scales]
}
