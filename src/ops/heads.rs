//! Head by head projection: every head of a row goes through a small matrix of its own.
//!
//! Attention by a latent (MLA) needs it twice: a query is brought to where the keys are, in the latent, and
//! what was gathered there to the head's values. In the latent a head also has rotated channels, which no
//! matrix touches. They stand in front of each half, where [`super::attend`] rotates them together: a *gap*
//! for the projection, filled with the channels behind the input, or passed over where the input has them.

use bytemuck::{Pod, Zeroable};
use rayon::prelude::*;

use super::case::{Rng, case, floats, output};
use super::dot::{Matrix, ROWS, dots};
use super::linear::{Linear, Product, columns, matrix, quads_per_group};
use super::{MAX_COLS, u32_of};
use crate::device::Access::{Read, Write};
use crate::device::{
    Args, Caps, Case, DType, Dispatch, Ints, Kernel, Op, Recording, Run, Tensor, Tolerance, View,
    Wgsl,
};

/// The op.
pub static OP: Op = Op {
    name: "heads",
    summary: "y[r, h, n] = sum_k weight[h, n, k] * x[r, h, k], around the gaps of x and y",
    params: &[
        "n_rows", "n_heads", "k", "n_out", "x_cols", "y_cols", "x_gap", "y_gap", "group",
    ],
    args: &[
        ("x", Read),
        ("weight", Read),
        ("scales", Read),
        ("y", Write),
    ],
    reference,
    kernels: &[
        Kernel {
            name: "columns",
            run: Run::Wgsl(Wgsl {
                file: "shaders/heads.wgsl",
                source: include_str!("../../shaders/heads.wgsl"),
                consts: |d, caps| {
                    let p: Params = d.params.get();
                    vec![
                        ("COLS", columns(p.n_rows)),
                        ("QUADS", quads_per_group(caps)),
                        ("GROUP", (p.group / 8).max(1)),
                    ]
                },
                elements: &[("Weight", 1)],
                groups: |d, caps| {
                    let p: Params = d.params.get();
                    let quads = p.n_out.div_ceil(4).div_ceil(quads_per_group(caps));
                    [quads, p.n_rows.div_ceil(columns(p.n_rows)), p.n_heads]
                },
                loads: Some(loads),
            }),
            fits,
        },
        Kernel {
            name: "dots",
            run: Run::Cpu(by_head),
            fits,
        },
    ],
    cases,
    tolerance: Tolerance::with_abs(3e-4),
};

/// Uniform of `heads.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Params {
    n_rows: u32,
    n_heads: u32,
    k: u32,
    n_out: u32,
    x_cols: u32,
    y_cols: u32,
    x_gap: u32,
    y_gap: u32,
    group: u32,
}

impl Params {
    /// Channels of a head of x, and of y.
    fn widths(self) -> [usize; 2] {
        [
            (self.k + 2 * (self.x_gap + self.y_gap)) as usize,
            (self.n_out + 2 * self.y_gap) as usize,
        ]
    }
}

fn fits(d: &Dispatch, _: &Caps) -> bool {
    let p: Params = d.params.get();
    let fours = [p.x_cols, p.x_gap, 2 * p.y_gap];
    p.k.is_multiple_of(8) && fours.iter().all(|n| n.is_multiple_of(4))
}

/// What a workgroup loads: its outputs' weights, and the head of each of its rows; the first of a head also what
/// fills the gaps.
fn loads(d: &Dispatch, caps: &Caps, _: &Ints<'_>, group: [u32; 3]) -> Vec<u64> {
    let p: Params = d.params.get();
    let mine = |n: u32, at: u32, end: u32| u64::from((at * n + n).min(end) - at * n);
    let outputs = mine(4 * quads_per_group(caps), group[0], p.n_out);
    let rows = mine(columns(p.n_rows), group[1], p.n_rows);
    let passing = if group[0] == 0 { 2 * p.y_gap } else { 0 };
    let weight = &d.args[1];
    let scales = match weight.dtype().span() {
        1 => 0,
        _ => outputs * u64::from(p.k.div_ceil(p.group)) * 4,
    };
    let weights = outputs * (weight.bytes() / weight.shape()[0]) as u64;
    vec![rows * u64::from(p.k + passing) * 4, weights, scales, 0]
}

/// Where channel `i` of `n` stands among gaps of `gap` channels in front of each half.
fn place(i: usize, n: usize, gap: u32) -> usize {
    let gaps = if i < n / 2 { 1 } else { 2 };
    i + gaps * gap as usize
}

/// Channels that rotate stand in front of each half of a head, this many: of the input, or of the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gap {
    /// The input has them, and they are passed over.
    Input(usize),
    /// The output gets them: the input has them behind the others, first half first.
    Output(usize),
}

/// Records the projection of `n_rows` rows of `n_heads` heads of `k` channels by the matrices below each other
/// in `linear`, without bias.
///
/// Shapes: the weight `[n_heads * n, k]`; `x` `[>= n_rows, m]` and `y` `[>= n_rows, o]` in f32, which hold the
/// heads one after the other: `k` channels and all gaps each, and `n` with those that the output gets. What is
/// behind the heads of `y` is left alone.
///
/// # Panics
/// If the shapes disagree.
pub fn heads(
    r: &mut Recording,
    x: &Tensor,
    linear: Linear<'_>,
    gap: Gap,
    y: &Tensor,
    [n_rows, n_heads, k]: [usize; 3],
) {
    let (rows, span) = (linear.weight.shape()[0], linear.weight.dtype().span());
    assert!(rows.is_multiple_of(n_heads), "heads: a matrix for each");
    assert_eq!(
        linear.weight.cols(),
        k.next_multiple_of(span),
        "heads: x does not fit the weight"
    );
    let (x_gap, y_gap) = match gap {
        Gap::Input(gap) => (gap, 0),
        Gap::Output(gap) => (0, gap),
    };
    let params = Params {
        n_rows: u32_of(n_rows),
        n_heads: u32_of(n_heads),
        k: u32_of(k),
        n_out: u32_of(rows / n_heads),
        x_cols: u32_of(x.len() / x.shape()[0]),
        y_cols: u32_of(y.len() / y.shape()[0]),
        x_gap: u32_of(x_gap),
        y_gap: u32_of(y_gap),
        group: u32_of(linear.group),
    };
    let [x_wide, y_wide] = params.widths();
    assert!(
        n_heads * x_wide <= params.x_cols as usize,
        "heads: x is too narrow"
    );
    assert!(
        n_heads * y_wide <= params.y_cols as usize,
        "heads: y is too narrow"
    );
    r.push(&OP, &params, &[x, linear.weight, linear.scales, y]);
}

fn reference(args: &mut Args<'_>) {
    let p: Params = args.params();
    let [x, weight, scales, mut y] = args.views();
    let ([k, n_out], [x_wide, y_wide]) = ([p.k, p.n_out].map(|n| n as usize), p.widths());
    let product = product(p, [x, weight, scales]);
    for row in 0..p.n_rows as usize {
        for head in 0..p.n_heads as usize {
            let from = row * p.x_cols as usize + head * x_wide;
            let to = row * p.y_cols as usize + head * y_wide;
            let mine: Vec<f64> = (0..k)
                .map(|i| product.x.get(from + place(i, k, p.x_gap)))
                .collect();
            for n in 0..n_out {
                let sum = product.exact(&mine, head * n_out + n);
                y.set(to + place(n, n_out, p.y_gap), sum);
            }
            for i in 0..2 * p.y_gap as usize {
                let behind = if i < p.y_gap as usize { 0 } else { n_out / 2 };
                y.set(to + behind + i, product.x.get(from + k + i));
            }
        }
    }
}

fn product(p: Params, [x, weight, scales]: [View<'_>; 3]) -> Product<'_> {
    Product {
        x,
        norm: None,
        weight,
        scales,
        n_rows: p.n_rows as usize,
        k: p.k as usize,
        group: p.group as usize,
    }
}

fn by_head(args: &mut Args<'_>) {
    let p: Params = args.params();
    let [x, weight, scales, mut y] = args.views();
    let [n_rows, n_heads, k, n_out] = [p.n_rows, p.n_heads, p.k, p.n_out].map(|n| n as usize);
    let [x_cols, y_cols, y_gap] = [p.x_cols, p.y_cols, p.y_gap].map(|n| n as usize);
    let [x_wide, y_wide] = p.widths();
    let (x, weights) = (x.f32s(), &weight);
    let matrix = Matrix {
        weight: weights,
        scales: scales.u32s(),
        k,
        group: p.group as usize,
    };
    // Of each head all rows, `[n_rows, y_wide]`.
    let of_head = |head: usize| -> Vec<f32> {
        let mut out = vec![0.0; n_rows * y_wide];
        let from = |row: usize| &x[row * x_cols + head * x_wide..][..x_wide];
        let mut mine = Vec::with_capacity(MAX_COLS * k);
        for first in (0..n_rows).step_by(MAX_COLS) {
            let rows = first..n_rows.min(first + MAX_COLS);
            mine.clear();
            for row in rows.clone() {
                mine.extend((0..k).map(|i| from(row)[place(i, k, p.x_gap)]));
            }
            for n in (0..n_out).step_by(ROWS) {
                // An odd last row is computed twice, with itself.
                let pair = [n, (n + 1).min(n_out - 1)];
                let mut sums = [[0.0; MAX_COLS]; ROWS];
                dots(&matrix, pair.map(|n| head * n_out + n), &mine, &mut sums);
                for (n, sums) in pair.into_iter().zip(&sums) {
                    for (row, sum) in rows.clone().zip(sums) {
                        out[row * y_wide + place(n, n_out, p.y_gap)] = *sum;
                    }
                }
            }
            for row in rows {
                let (a, b) = from(row)[k..].split_at(y_gap);
                let out = &mut out[row * y_wide..][..y_wide];
                out[..y_gap].copy_from_slice(a);
                out[y_gap + n_out / 2..][..y_gap].copy_from_slice(&b[..y_gap]);
            }
        }
        out
    };
    let all: Vec<Vec<f32>> = (0..n_heads).into_par_iter().map(of_head).collect();
    let y = y.f32s_mut();
    for (head, rows) in all.iter().enumerate() {
        for (row, from) in rows.chunks_exact(y_wide).enumerate() {
            y[row * y_cols + head * y_wide..][..y_wide].copy_from_slice(from);
        }
    }
}

/// A case: rows, heads, k, outputs of a head; with columns behind the heads.
#[derive(Clone, Copy)]
struct Scene {
    dtype: DType,
    shape: [usize; 4],
    gap: Gap,
    behind: usize,
}

impl Scene {
    fn case(self, name: &str) -> Case {
        let mut rng = Rng::named(name);
        let [n_rows, n_heads, k, n_out] = self.shape;
        let (x_gap, y_gap) = match self.gap {
            Gap::Input(gap) => (gap, 0),
            Gap::Output(gap) => (0, gap),
        };
        let params = Params {
            n_rows: u32_of(n_rows),
            n_heads: u32_of(n_heads),
            k: u32_of(k),
            n_out: u32_of(n_out),
            x_cols: 0,
            y_cols: 0,
            x_gap: u32_of(x_gap),
            y_gap: u32_of(y_gap),
            group: 32,
        };
        let [x_cols, y_cols] = params.widths().map(|wide| n_heads * wide + self.behind);
        let params = Params {
            x_cols: u32_of(x_cols),
            y_cols: u32_of(y_cols),
            ..params
        };
        let x = rng.outliers(n_rows * x_cols);
        let [weight, scales] = matrix(&mut rng, self.dtype, [n_heads * n_out, k], 32);
        let args = vec![
            floats(DType::F32, &[n_rows, x_cols], x),
            weight,
            scales,
            output(DType::F32, &[n_rows, y_cols]),
        ];
        case(name, &params, args)
    }
}

fn cases() -> Vec<Case> {
    let base = Scene {
        dtype: DType::F32,
        shape: [1, 1, 8, 2],
        gap: Gap::Output(4),
        behind: 0,
    };
    let scene = |dtype, shape, gap, behind| Scene {
        dtype,
        shape,
        gap,
        behind,
    };
    vec![
        base.case("one small head"),
        scene(DType::BF16, [3, 5, 128, 512], Gap::Output(32), 0)
            .case("heads of DeepSeek-V3 to their latent"),
        scene(DType::BF16, [3, 5, 512, 128], Gap::Input(32), 0)
            .case("heads of DeepSeek-V3 from their latent"),
        scene(DType::F16, [4, 3, 24, 37], Gap::Input(4), 4).case("an odd number of outputs"),
        scene(DType::F32, [19, 2, 16, 24], Gap::Output(4), 8)
            .case("more rows than columns of a kernel, columns behind the heads"),
        scene(DType::U4, [2, 3, 160, 21], Gap::Input(4), 0).case("int4, passing over a gap"),
        scene(DType::U8, [5, 2, 64, 18], Gap::Input(0), 0).case("int8, no gap"),
    ]
}
