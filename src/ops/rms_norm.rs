//! Root-mean-square normalisation, `y = x / sqrt(mean(x^2) + eps) * weight`, row by row.
//!
//! Used before the head; the norms of the layers are folded into what they feed. Rows are padded to a multiple
//! of eight: the padding of `x` is zero and does not count in the mean, the padding of `weight` is
//! zero and makes that of `y` zero.

use bytemuck::{Pod, Zeroable};
use rayon::prelude::*;

use super::case::{Rng, case, floats, output};
use super::linear::Norm;
use super::u32_of;
use crate::device::Access::{Read, Write};
use crate::device::{
    Args, Case, DType, Kernel, Op, Recording, Run, Tensor, Tolerance, Wgsl, always,
};

/// The op.
pub static OP: Op = Op {
    name: "rms_norm",
    summary: "y = x / sqrt(mean(x^2) + eps) * weight, row by row",
    params: &["n_rows", "dim", "count", "eps"],
    args: &[("x", Read), ("weight", Read), ("y", Write)],
    reference,
    kernels: &[
        Kernel {
            name: "row",
            run: Run::Wgsl(Wgsl {
                file: "shaders/rms_norm.wgsl",
                source: include_str!("../../shaders/rms_norm.wgsl"),
                consts: |_, _| Vec::new(),
                elements: &[],
                groups: |d, _| [d.params.get::<Params>().n_rows, 1, 1],
                loads: Some(|d, _, _, _| {
                    let dim = u64::from(d.params.get::<Params>().dim);
                    // Lanes with more numbers than this come back to them after 128 other loads.
                    let again: u64 = (0..64)
                        .map(|lane| (dim.saturating_sub(lane)).div_ceil(64))
                        .filter(|&mine| mine > 64)
                        .sum();
                    vec![(dim + again) * 4, dim * 4, 0]
                }),
            }),
            fits: always,
        },
        Kernel {
            name: "rows",
            run: Run::Cpu(rows),
            fits: always,
        },
    ],
    cases,
    tolerance: Tolerance::with_abs(1e-6),
};

/// Uniform of `rms_norm.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Params {
    n_rows: u32,
    dim: u32,
    count: u32,
    eps: f32,
}

/// Records the normalisation of `n_rows` rows of `x`.
///
/// Shapes: `x`, `y` `[>= n_rows, dim]`, in f32.
///
/// # Panics
/// If the shapes disagree.
pub fn rms_norm(
    r: &mut Recording,
    x: &Tensor,
    Norm { weight, count, eps }: Norm<'_>,
    y: &Tensor,
    n_rows: usize,
) {
    assert_eq!(x.cols(), y.cols(), "rms_norm: x and y differ in width");
    assert_eq!(
        x.cols(),
        weight.cols(),
        "rms_norm: weight does not fit a row of x"
    );
    let params = Params {
        n_rows: u32_of(n_rows),
        dim: u32_of(x.cols()),
        count: u32_of(count),
        eps,
    };
    r.push(&OP, &params, &[x, weight, y]);
}

// Sums in f64, so that a disagreement is the kernel's.
fn reference(args: &mut Args<'_>) {
    let p: Params = args.params();
    let [x, weight, mut y] = args.views();
    let dim = p.dim as usize;
    for row in 0..p.n_rows as usize {
        let at = |i| row * dim + i;
        let sum: f64 = (0..dim).map(|i| x.get(at(i)).powi(2)).sum();
        let scale = (sum / f64::from(p.count) + f64::from(p.eps)).sqrt().recip();
        for i in 0..dim {
            y.set(at(i), x.get(at(i)) * scale * weight.get(i));
        }
    }
}

fn rows(args: &mut Args<'_>) {
    let p: Params = args.params();
    let [x, weight, mut y] = args.views();
    let (dim, n) = (p.dim as usize, p.n_rows as usize);
    let (x, weight) = (&x.f32s()[..n * dim], weight.f32s());
    let rows = y.f32s_mut()[..n * dim]
        .par_chunks_exact_mut(dim)
        .zip(x.par_chunks_exact(dim));
    rows.for_each(|(y, x)| {
        // The mean in f64 costs nothing beside the projections and keeps long rows exact.
        let sum: f64 = x.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
        #[expect(
            clippy::cast_possible_truncation,
            reason = "the scale is applied in f32"
        )]
        let scale = (sum / f64::from(p.count) + f64::from(p.eps)).sqrt().recip() as f32;
        for ((y, &x), &w) in y.iter_mut().zip(x).zip(weight) {
            *y = x * scale * w;
        }
    });
}

fn cases() -> Vec<Case> {
    let make = |name: &str, n_rows: usize, dim: usize, count: usize, eps: f32, scale: f32| {
        let mut rng = Rng::named(name);
        let mut x = rng.outliers(n_rows * dim);
        let mut weight = rng.uniform(dim);
        for v in &mut x {
            *v *= scale;
        }
        for row in x.chunks_exact_mut(dim) {
            row[count..].fill(0.0);
        }
        weight[count..].fill(0.0);
        let params = Params {
            n_rows: u32_of(n_rows),
            dim: u32_of(dim),
            count: u32_of(count),
            eps,
        };
        case(
            name,
            &params,
            vec![
                floats(DType::F32, &[n_rows, dim], x),
                floats(DType::F32, &[dim], weight),
                output(DType::F32, &[n_rows, dim]),
            ],
        )
    };
    vec![
        make("one short row", 1, 8, 8, 1e-5, 1.0),
        make("a length that nothing divides", 3, 1757, 1757, 1e-6, 1.0),
        // The only case that a hard-coded epsilon cannot pass.
        make("eps decides", 2, 128, 128, 1e-2, 1e-3),
        // The only case that a mean over the padding cannot pass.
        make("padded rows", 5, 64, 57, 1e-6, 1.0),
        make("Qwen2.5-7B hidden size", 4, 3584, 3584, 1e-6, 1.0),
    ]
}
