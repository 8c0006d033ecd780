//! The gated half of the feed-forward block: `y = silu(gate(x)) * up(x)`, in one pass over the weights.
//!
//! The weight holds the gate's rows first, then those of up, as Phi-3's files do.

use bytemuck::{Pod, Zeroable};
use rayon::prelude::*;

use super::case::{Rng, case, floats, output};
use super::dot::{ROWS, dots};
use super::{MAX_COLS, columns, u32_of};
use crate::device::Access::{Read, Write};
use crate::device::{
    Args, Caps, Case, DType, Dispatch, Kernel, Op, Recording, Run, Tensor, Tolerance, Wgsl,
};

/// The op.
pub static OP: Op = Op {
    name: "gate_up",
    summary: "y[r, n] = silu(g) * u with g, u = the rows n and n_out + n of weight times x[r], plus bias",
    params: &["n_rows", "k", "n_out"],
    args: &[("x", Read), ("weight", Read), ("bias", Read), ("y", Write)],
    reference,
    kernels: &[
        Kernel {
            name: "columns",
            run: Run::Wgsl(Wgsl {
                file: "shaders/gate_up.wgsl",
                source: include_str!("../../shaders/gate_up.wgsl"),
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

/// Outputs that one workgroup serves; as in `gate_up.wgsl`.
const OUT_PER_GROUP: u32 = 8;

/// Uniform of `gate_up.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Params {
    n_rows: u32,
    k: u32,
    n_out: u32,
}

fn fits(d: &Dispatch, _: &Caps) -> bool {
    d.params.get::<Params>().k.is_multiple_of(8)
}

fn groups(d: &Dispatch) -> [u32; 3] {
    let p: Params = d.params.get();
    [
        p.n_out.div_ceil(OUT_PER_GROUP),
        p.n_rows.div_ceil(columns(p.n_rows)),
        1,
    ]
}

/// Records the gated projection of `n_rows` rows.
///
/// Shapes: `x` `[>= n_rows, k]`, `weight` `[2 n, k]`, `bias` `[2 n]`, `y` `[>= n_rows, n]`; all but
/// `weight` in f32.
///
/// # Panics
/// If the shapes disagree.
pub fn gate_up(
    r: &mut Recording,
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    y: &Tensor,
    n_rows: usize,
) {
    assert_eq!(
        x.cols(),
        weight.cols(),
        "gate_up: x does not fit the weight"
    );
    assert_eq!(
        weight.shape()[0],
        2 * y.cols(),
        "gate_up: y does not fit the weight"
    );
    assert_eq!(
        weight.shape()[0],
        bias.len(),
        "gate_up: bias does not fit the weight"
    );
    let params = Params {
        n_rows: u32_of(n_rows),
        k: u32_of(x.cols()),
        n_out: u32_of(y.cols()),
    };
    r.push(&OP, &params, &[x, weight, bias, y]);
}

fn reference(args: &mut Args<'_>) {
    let p: Params = args.params();
    let [x, weight, bias, mut y] = args.views();
    let (k, n_out) = (p.k as usize, p.n_out as usize);
    for row in 0..p.n_rows as usize {
        let sum = |n: usize| -> f64 {
            let products = (0..k).map(|i| x.get(row * k + i) * weight.get(n * k + i));
            products.sum::<f64>() + bias.get(n)
        };
        for n in 0..n_out {
            let (gate, up) = (sum(n), sum(n_out + n));
            y.set(row * n_out + n, gate / (1.0 + (-gate).exp()) * up);
        }
    }
}

fn by_row(args: &mut Args<'_>) {
    let p: Params = args.params();
    let [x, weight, bias, mut y] = args.views();
    let (n_rows, k, n_out) = (p.n_rows as usize, p.k as usize, p.n_out as usize);
    let (x, bias) = (&x.f32s()[..n_rows * k], bias.f32s());
    let mut gated = vec![0.0; n_out * n_rows];
    let by_n = gated
        .par_chunks_exact_mut(n_rows)
        .with_min_len(4)
        .enumerate();
    by_n.for_each(|(n, gated)| {
        let mut out = [[0.0; MAX_COLS]; ROWS];
        for (gated, x) in gated.chunks_mut(MAX_COLS).zip(x.chunks(MAX_COLS * k)) {
            dots(&weight, [n, n_out + n], k, x, &mut out);
            let [gates, ups] = &out;
            for (gated, (gate, up)) in gated.iter_mut().zip(gates.iter().zip(ups)) {
                let g = gate + bias[n];
                *gated = g / (1.0 + (-g).exp()) * (up + bias[n_out + n]);
            }
        }
    });
    for (row, y) in y
        .f32s_mut()
        .chunks_exact_mut(n_out)
        .take(n_rows)
        .enumerate()
    {
        for (n, y) in y.iter_mut().enumerate() {
            *y = gated[n * n_rows + row];
        }
    }
}

fn cases() -> Vec<Case> {
    let make = |name: &str, dtype, [n_rows, k, n_out]: [usize; 3], scale: f32| {
        let mut rng = Rng::named(name);
        let params = Params {
            n_rows: u32_of(n_rows),
            k: u32_of(k),
            n_out: u32_of(n_out),
        };
        let x = rng.scaled(n_rows * k, scale);
        let weight = rng.uniform(2 * n_out * k);
        let bias = rng.uniform(2 * n_out);
        case(
            name,
            &params,
            vec![
                floats(DType::F32, &[n_rows, k], x),
                floats(dtype, &[2 * n_out, k], weight),
                floats(DType::F32, &[2 * n_out], bias),
                output(DType::F32, &[n_rows, n_out]),
            ],
        )
    };
    vec![
        make("the smallest", DType::F32, [1, 8, 1], 1.0),
        make("saturated gates", DType::F32, [2, 64, 37], 20.0),
        make(
            "a width that nothing divides",
            DType::BF16,
            [3, 256, 1757],
            1.0,
        ),
        make("16 rows", DType::F16, [16, 264, 19], 1.0),
        make(
            "more rows than columns of a kernel",
            DType::BF16,
            [37, 176, 24],
            1.0,
        ),
        make("Qwen3-0.6B hidden size", DType::BF16, [4, 1024, 48], 1.0),
    ]
}
