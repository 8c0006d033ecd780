//! Projection: `y[r, first + n] = sum over k of x[r, k] * weight[n, k] + bias[first + n]`, or added to `y`.
//!
//! The op of every linear layer: queries, keys and values in one, the output projections (added to the
//! residual), the head. A weight larger than one binding comes in pieces of rows (`first`).

use bytemuck::{Pod, Zeroable};
use rayon::prelude::*;

use super::case::{Rng, case, floats, output};
use super::dot::{ROWS, dots};
use super::{MAX_COLS, columns, u32_of};
use crate::device::Access::{Read, ReadWrite};
use crate::device::{
    Args, Caps, Case, DType, Dispatch, Kernel, Op, Recording, Run, Tensor, Tolerance, Wgsl,
};

/// The op.
pub static OP: Op = Op {
    name: "project",
    summary: "y[r, first + n] = (y if add) + sum_k x[r, k] * weight[n, k] + bias[first + n]",
    params: &["n_rows", "k", "n_out", "y_cols", "first", "add"],
    args: &[
        ("x", Read),
        ("weight", Read),
        ("bias", Read),
        ("y", ReadWrite),
    ],
    reference,
    kernels: &[
        Kernel {
            name: "columns",
            run: Run::Wgsl(Wgsl {
                file: "shaders/project.wgsl",
                source: include_str!("../../shaders/project.wgsl"),
                consts: |d| vec![("COLS", columns(d.params.get::<Params>().n_rows))],
                elements: &[("Weight", 1)],
                groups,
            }),
            fits,
        },
        Kernel {
            name: "dots",
            run: Run::Cpu(by_row),
            fits,
        },
    ],
    cases,
    // Sums of up to thousands of terms as large as 100: an error of one in the last place of the
    // largest partial sum is 1e-4. The NMSE bound is the tight one.
    tolerance: Tolerance::with_abs(3e-4),
};

/// Rows of the weight that one workgroup serves; as in `project.wgsl`.
const ROWS_PER_GROUP: u32 = 8;

/// Uniform of `project.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Params {
    n_rows: u32,
    k: u32,
    n_out: u32,
    y_cols: u32,
    first: u32,
    add: u32,
}

fn fits(d: &Dispatch, _: &Caps) -> bool {
    d.params.get::<Params>().k.is_multiple_of(8)
}

fn groups(d: &Dispatch) -> [u32; 3] {
    let p: Params = d.params.get();
    [
        p.n_out.div_ceil(ROWS_PER_GROUP),
        p.n_rows.div_ceil(columns(p.n_rows)),
        1,
    ]
}

/// What happens to the old value of `y`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Into {
    /// It is overwritten.
    Replace,
    /// The projection is added to it: a residual connection.
    Add,
}

/// Weight and bias of a linear layer, or a piece of it.
#[derive(Clone, Copy, Debug)]
pub struct Linear<'a> {
    /// `[n, k]`.
    pub weight: &'a Tensor,
    /// `[>= first + n]`, in f32.
    pub bias: &'a Tensor,
    /// The row of the whole weight that the piece begins with.
    pub first: usize,
}

/// Records one projection of `n_rows` rows.
///
/// Shapes: `x` `[>= n_rows, k]`, `y` `[>= n_rows, m]` with `m >= first + n`, both in f32.
///
/// # Panics
/// If the shapes disagree.
pub fn project(
    r: &mut Recording,
    x: &Tensor,
    Linear {
        weight,
        bias,
        first,
    }: Linear<'_>,
    y: &Tensor,
    n_rows: usize,
    into: Into,
) {
    let n_out = weight.shape()[0];
    assert_eq!(
        x.cols(),
        weight.cols(),
        "project: x does not fit the weight"
    );
    assert!(first + n_out <= y.cols(), "project: y is too narrow");
    assert!(first + n_out <= bias.len(), "project: bias is too short");
    let params = Params {
        n_rows: u32_of(n_rows),
        k: u32_of(x.cols()),
        n_out: u32_of(n_out),
        y_cols: u32_of(y.cols()),
        first: u32_of(first),
        add: u32::from(into == Into::Add),
    };
    r.push(&OP, &params, &[x, weight, bias, y]);
}

fn reference(args: &mut Args<'_>) {
    let p: Params = args.params();
    let [x, weight, bias, mut y] = args.views();
    let k = p.k as usize;
    for row in 0..p.n_rows as usize {
        for n in 0..p.n_out as usize {
            let out = p.first as usize + n;
            let at = row * p.y_cols as usize + out;
            let old = if p.add == 1 { y.get(at) } else { 0.0 };
            let sum: f64 = (0..k)
                .map(|i| x.get(row * k + i) * weight.get(n * k + i))
                .sum();
            y.set(at, old + bias.get(out) + sum);
        }
    }
}

fn by_row(args: &mut Args<'_>) {
    let p: Params = args.params();
    let [x, weight, bias, mut y] = args.views();
    let (n_rows, k, n_out) = (p.n_rows as usize, p.k as usize, p.n_out as usize);
    let x = &x.f32s()[..n_rows * k];
    let mut sums = vec![0.0; n_out * n_rows];
    let by_pair = sums
        .par_chunks_mut(ROWS * n_rows)
        .with_min_len(4)
        .enumerate();
    by_pair.for_each(|(pair, sums)| {
        // An odd last row is computed twice, with itself.
        let rows = [ROWS * pair, (ROWS * pair + 1).min(n_out - 1)];
        let mut out = [[0.0; MAX_COLS]; ROWS];
        for (group, x) in x.chunks(MAX_COLS * k).enumerate() {
            dots(&weight, rows, k, x, &mut out);
            for (sums, out) in sums.chunks_exact_mut(n_rows).zip(&out) {
                let columns = x.len() / k;
                sums[group * MAX_COLS..][..columns].copy_from_slice(&out[..columns]);
            }
        }
    });
    let (bias, y) = (bias.f32s(), y.f32s_mut());
    for row in 0..n_rows {
        let first = p.first as usize;
        let to = &mut y[row * p.y_cols as usize + first..][..n_out];
        for (n, to) in to.iter_mut().enumerate() {
            let sum = sums[n * n_rows + row] + bias[first + n];
            *to = if p.add == 1 { *to + sum } else { sum };
        }
    }
}

fn cases() -> Vec<Case> {
    let make = |name: &str, dtype, [n_rows, k, n_out]: [usize; 3], first: usize, add: bool| {
        let mut rng = Rng::named(name);
        let y_cols = first + n_out + 3;
        let params = Params {
            n_rows: u32_of(n_rows),
            k: u32_of(k),
            n_out: u32_of(n_out),
            y_cols: u32_of(y_cols),
            first: u32_of(first),
            add: u32::from(add),
        };
        let x = rng.outliers(n_rows * k);
        let weight = rng.uniform(n_out * k);
        let bias = rng.scaled(first + n_out, 30.0);
        let y = rng.scaled(n_rows * y_cols, 30.0);
        let y = if add {
            floats(DType::F32, &[n_rows, y_cols], y)
        } else {
            output(DType::F32, &[n_rows, y_cols])
        };
        case(
            name,
            &params,
            vec![
                floats(DType::F32, &[n_rows, k], x),
                floats(dtype, &[n_out, k], weight),
                floats(DType::F32, &[first + n_out], bias),
                y,
            ],
        )
    };
    let mut cases = vec![
        make("the smallest", DType::F32, [1, 8, 1], 0, false),
        make(
            "a row count that nothing divides",
            DType::F32,
            [3, 1768, 1757],
            0,
            false,
        ),
        make(
            "a piece in the middle, added",
            DType::BF16,
            [2, 64, 37],
            11,
            true,
        ),
        make(
            "more rows than columns of a kernel",
            DType::F16,
            [37, 176, 24],
            0,
            true,
        ),
        make(
            "Qwen3-0.6B down projection",
            DType::BF16,
            [4, 3072, 64],
            0,
            true,
        ),
    ];
    for n_rows in 1..=17 {
        let name = format!("{n_rows} rows");
        cases.push(make(&name, DType::F16, [n_rows, 264, 19], 0, false));
    }
    cases
}
