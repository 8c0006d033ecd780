//! The last projection of a mixture of experts: what a row's experts give, weighted and added to it.
//!
//! `y[r] += sum over slots of gates[r, slot] * matrix(chosen[r, slot]) * x[r, slot]`, over a row's experts in
//! ascending order. Experts nobody chose are not read; one that several rows chose is read once.

use bytemuck::{Pod, Zeroable};
use rayon::prelude::*;

use super::MAX_COLS;
use super::case::{Rng, case, floats, words};
use super::dot::{Matrix, ROWS, dots};
use super::expert_up::{choices, choices_of, takers};
use super::linear::{Launched, Linear, Product, column_consts, column_groups, matrix};
use super::route::MAX_EXPERTS;
use super::u32_of;
use crate::device::Access::{Read, ReadWrite};
use crate::device::{
    Args, Caps, Case, DType, Dispatch, Ints, Kernel, Op, Recording, Run, Tensor, Tolerance, Wgsl,
};

/// The op.
pub static OP: Op = Op {
    name: "expert_down",
    summary: "y[r] += sum over s of gates[r, s] * the matrix of expert chosen[r, s] times x[r, s]",
    params: &[
        "n_rows",
        "k",
        "n_out",
        "group",
        "top_k",
        "first",
        "n_experts",
    ],
    args: &[
        ("x", Read),
        ("weight", Read),
        ("scales", Read),
        ("chosen", Read),
        ("gates", Read),
        ("y", ReadWrite),
    ],
    reference,
    kernels: &[
        Kernel {
            name: "columns",
            run: Run::Wgsl(Wgsl {
                file: "shaders/expert_down.wgsl",
                source: include_str!("../../shaders/expert_down.wgsl"),
                consts: |d, caps| {
                    let p: Params = d.params.get();
                    let mut consts = column_consts(p.n_rows, p.group, caps);
                    consts.push(("EXPERTS", p.n_experts));
                    consts
                },
                elements: &[("Weight", 1)],
                loads: Some(loads),
                groups: |d, caps| {
                    let p: Params = d.params.get();
                    column_groups(p.n_out.div_ceil(4), p.n_rows, caps)
                },
            }),
            fits,
        },
        Kernel {
            name: "dots",
            run: Run::Cpu(by_expert),
            fits,
        },
    ],
    cases,
    tolerance: Tolerance::with_abs(3e-4),
};

/// Uniform of `expert_down.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Params {
    n_rows: u32,
    k: u32,
    n_out: u32,
    group: u32,
    top_k: u32,
    first: u32,
    n_experts: u32,
}

fn fits(d: &Dispatch, _: &Caps) -> bool {
    let p: Params = d.params.get();
    p.k.is_multiple_of(8) && p.n_experts as usize <= MAX_EXPERTS
}

/// What a workgroup loads: the choices of its rows and, for each expert that any of them chose, its weights
/// and what those rows have for it.
fn loads(d: &Dispatch, caps: &Caps, ints: &Ints<'_>, [quads, rows, _]: [u32; 3]) -> Vec<u64> {
    let p: Params = d.params.get();
    let chosen = choices_of(ints.get(&d.args[3]), p.top_k, p.n_rows, rows);
    let n_rows = chosen.len() as u64 / u64::from(p.top_k);
    let (mut loads, mut outputs) = (vec![0; 6], 0);
    for expert in 0..p.n_experts {
        let takers = takers(chosen, p.top_k as usize, p.first + expert).len();
        let launched = Launched {
            weight: &d.args[1],
            n_rows: u32_of(takers),
            k: p.k,
            group: p.group,
            norm: false,
            n_quads: p.n_out.div_ceil(4),
        };
        let served = launched.by_columns(caps, [quads, 0, 0], |quad| {
            [0, 1, 2, 3].map(|i| (4 * quad + i).min(p.n_out - 1))
        });
        let [x, _, weight, scales, of_output] = served.loads[..] else {
            unreachable!("five arguments of every linear op");
        };
        outputs = of_output;
        if takers > 0 {
            let gates = takers as u64 * 4;
            for (sum, bytes) in loads.iter_mut().zip([x, weight, scales, 0, gates]) {
                *sum += bytes;
            }
        }
    }
    loads[3] = size_of_val(chosen) as u64;
    loads[5] = outputs * n_rows;
    loads
}

/// Records the projection of `n_rows` rows by a piece of the experts, in the order of the pieces: the matrices
/// of the experts from `linear.first` on, below each other, without bias.
///
/// Shapes: `x` `[>= n_rows, top_k, k]`, the weight `[n_experts * n, k]`; `chosen`, ascending, and `gates`
/// `[>= n_rows, top_k]`; `y` `[>= n_rows, n]`, which is added to.
///
/// # Panics
/// If the shapes disagree.
pub fn expert_down(
    r: &mut Recording,
    x: &Tensor,
    linear: Linear<'_>,
    [chosen, gates]: [&Tensor; 2],
    y: &Tensor,
    n_rows: usize,
) {
    let (rows, n_out) = (linear.weight.shape()[0], y.cols());
    assert!(
        rows.is_multiple_of(n_out),
        "expert_down: y does not fit the weight"
    );
    let params = Params {
        n_rows: u32_of(n_rows),
        k: u32_of(x.cols()),
        n_out: u32_of(n_out),
        group: u32_of(linear.group),
        top_k: u32_of(chosen.cols()),
        first: u32_of(linear.first),
        n_experts: u32_of(rows / n_out),
    };
    let args = [x, linear.weight, linear.scales, chosen, gates, y];
    r.push(&OP, &params, &args);
}

fn reference(args: &mut Args<'_>) {
    let p: Params = args.params();
    let [x, weight, scales, chosen, gates, mut y] = args.views();
    let [n_rows, k, n_out, top_k] = [p.n_rows, p.k, p.n_out, p.top_k].map(|n| n as usize);
    // Every slot of a row is a row of the input.
    let product = Product {
        x,
        norm: None,
        weight,
        scales,
        n_rows: n_rows * top_k,
        k,
        group: p.group as usize,
    };
    for row in 0..n_rows {
        for slot in 0..top_k {
            let at = row * top_k + slot;
            let expert = chosen.u32s()[at].wrapping_sub(p.first);
            if expert >= p.n_experts {
                continue;
            }
            let x = product.exact_input(at);
            for n in 0..n_out {
                let sum = product.exact(&x, expert as usize * n_out + n);
                let old = y.get(row * n_out + n);
                y.set(row * n_out + n, old + gates.get(at) * sum);
            }
        }
    }
}

fn by_expert(args: &mut Args<'_>) {
    let p: Params = args.params();
    let [x, weight, scales, chosen, gates, mut y] = args.views();
    let [n_rows, k, n_out, top_k] = [p.n_rows, p.k, p.n_out, p.top_k].map(|n| n as usize);
    let (x, gates, y) = (x.f32s(), gates.f32s(), y.f32s_mut());
    let chosen = &chosen.u32s()[..n_rows * top_k];
    let matrix = Matrix {
        weight: &weight,
        scales: scales.u32s(),
        k,
        group: p.group as usize,
    };
    for expert in 0..p.n_experts {
        let takers = takers(chosen, top_k, p.first + expert);
        let base = expert as usize * n_out;
        for takers in takers.chunks(MAX_COLS) {
            let rows = takers
                .iter()
                .map(|&(row, slot)| &x[(row * top_k + slot) * k..][..k]);
            let mine: Vec<f32> = rows.flatten().copied().collect();
            let sums: Vec<[[f32; MAX_COLS]; ROWS]> = (0..n_out.div_ceil(ROWS))
                .into_par_iter()
                .with_min_len(4)
                .map(|i| {
                    let mut out = [[0.0; MAX_COLS]; ROWS];
                    // An odd last row is computed twice, with itself.
                    let rows = [ROWS * i, (ROWS * i + 1).min(n_out - 1)];
                    dots(&matrix, rows.map(|n| base + n), &mine, &mut out);
                    out
                })
                .collect();
            for (c, &(row, slot)) in takers.iter().enumerate() {
                let gate = gates[row * top_k + slot];
                for (n, y) in y[row * n_out..][..n_out].iter_mut().enumerate() {
                    *y += gate * sums[n / ROWS][n % ROWS][c];
                }
            }
        }
    }
}

fn cases() -> Vec<Case> {
    // Rows, k, outputs, experts, experts of a row; the first expert of the piece, and how many it has.
    let make = |name: &str, dtype, shape: [usize; 5], [first, n_here]: [usize; 2]| {
        let mut rng = Rng::named(name);
        let ([n_rows, k, n_out, n_experts, top_k], group) = (shape, 32);
        let params = Params {
            n_rows: u32_of(n_rows),
            k: u32_of(k),
            n_out: u32_of(n_out),
            group,
            top_k: u32_of(top_k),
            first: u32_of(first),
            n_experts: u32_of(n_here),
        };
        let x = rng.outliers(n_rows * top_k * k);
        let [weight, scales] = matrix(&mut rng, dtype, [n_here * n_out, k], group as usize);
        let chosen = choices(&mut rng, n_rows, top_k, n_experts);
        let gates = (0..n_rows * top_k).map(|_| rng.unit() * 0.4 + 0.5);
        let gates = floats(DType::F32, &[n_rows, top_k], gates.collect());
        let y = rng.scaled(n_rows * n_out, 30.0);
        let args = vec![
            floats(DType::F32, &[n_rows, top_k, k], x),
            weight,
            scales,
            words(&[n_rows, top_k], chosen),
            gates,
            floats(DType::F32, &[n_rows, n_out], y),
        ];
        case(name, &params, args)
    };
    vec![
        make("one of one", DType::F32, [1, 8, 1, 1, 1], [0, 1]),
        make("four rows", DType::BF16, [4, 40, 37, 8, 3], [0, 8]),
        make(
            "a piece in the middle",
            DType::F16,
            [5, 72, 10, 12, 4],
            [4, 5],
        ),
        make("int4, 16 rows", DType::U4, [16, 160, 22, 16, 8], [0, 16]),
        make(
            "more rows than columns of a kernel",
            DType::U8,
            [19, 64, 9, 6, 2],
            [0, 6],
        ),
        make("fp8", DType::F8, [3, 72, 10, 5, 2], [1, 4]),
        make("many experts", DType::F32, [3, 16, 5, 256, 8], [0, 256]),
    ]
}
