//! The gated projection of a mixture of experts: each row goes through the experts that it chose.
//!
//! `y[r, slot] = silu(gate(norm(x))) * up(norm(x))` with the matrices of the expert in that slot of the row.
//! The matrix of every expert holds the gate's rows first, then those of up. Experts nobody chose are not
//! read, and the choice is read where [`super::route`] left it.

use bytemuck::{Pod, Zeroable};
use rayon::prelude::*;

use super::MAX_COLS;
use super::case::{Rng, case, floats, output, words};
use super::dot::{Matrix, ROWS, dots};
use super::linear::{
    Launched, Linear, Norm, Product, column_consts, column_groups, columns, matrix,
};
use super::u32_of;
use crate::device::Access::{Read, Write};
use crate::device::{
    Args, Caps, Case, DType, Dispatch, Ints, Kernel, Op, Recording, Run, Tensor, Tolerance, View,
    Wgsl,
};

/// The op.
pub static OP: Op = Op {
    name: "expert_up",
    summary: "y[r, s] = silu(g) * u with g, u = the halves of the matrix of expert chosen[r, s] times norm(x)[r]",
    params: &[
        "n_rows",
        "k",
        "n_out",
        "count",
        "eps",
        "group",
        "top_k",
        "first",
        "n_experts",
    ],
    args: &[
        ("x", Read),
        ("gamma", Read),
        ("weight", Read),
        ("scales", Read),
        ("chosen", Read),
        ("y", Write),
    ],
    reference,
    kernels: &[
        Kernel {
            name: "columns",
            run: Run::Wgsl(Wgsl {
                file: "shaders/expert_up.wgsl",
                source: include_str!("../../shaders/expert_up.wgsl"),
                consts: |d, caps| {
                    let p: Params = d.params.get();
                    column_consts(p.n_rows, p.group, caps)
                },
                elements: &[("Weight", 2)],
                loads: Some(loads),
                groups: |d, caps| {
                    let p: Params = d.params.get();
                    let [x, y, _] = column_groups(p.n_out.div_ceil(2), p.n_rows, caps);
                    [x, y, p.n_experts]
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

/// Uniform of `expert_up.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Params {
    n_rows: u32,
    k: u32,
    n_out: u32,
    count: u32,
    eps: f32,
    group: u32,
    top_k: u32,
    first: u32,
    n_experts: u32,
}

fn fits(d: &Dispatch, _: &Caps) -> bool {
    d.params.get::<Params>().k.is_multiple_of(8)
}

/// What a workgroup loads: the choices of its rows and, if any of them chose its expert, those rows of x and
/// its weights.
fn loads(d: &Dispatch, caps: &Caps, ints: &Ints<'_>, [quads, rows, expert]: [u32; 3]) -> Vec<u64> {
    let p: Params = d.params.get();
    let chosen = choices_of(ints.get(&d.args[4]), p.top_k, p.n_rows, rows);
    let takers = takers(chosen, p.top_k as usize, p.first + expert).len();
    let launched = Launched {
        weight: &d.args[2],
        n_rows: u32_of(takers),
        k: p.k,
        group: p.group,
        norm: true,
        n_quads: p.n_out.div_ceil(2),
    };
    // The gate's rows, and those of up.
    let served = launched.by_columns(caps, [quads, 0, 0], |quad| {
        let [a, b] = [0, 1].map(|i| (2 * quad + i).min(p.n_out - 1));
        [a, b, a + p.n_out, b + p.n_out]
    });
    let mut loads = vec![0; 4];
    if takers > 0 {
        loads.copy_from_slice(&served.loads[..4]);
    }
    loads.extend([size_of_val(chosen) as u64, 0]);
    loads
}

/// What the rows of a workgroup chose, of all choices.
pub(super) fn choices_of(chosen: &[u32], top_k: u32, n_rows: u32, group: u32) -> &[u32] {
    let (first, most) = (group * columns(n_rows), columns(n_rows));
    let rows = first..(first + most).min(n_rows);
    &chosen[(rows.start * top_k) as usize..(rows.end * top_k) as usize]
}

/// Records the gated projection of `n_rows` rows by a piece of the experts: the matrices of the experts from
/// `linear.first` on, below each other, without bias.
///
/// Shapes: `x` `[>= n_rows, k]`, the weight `[n_experts * 2 n, k]`, `chosen` `[>= n_rows, top_k]`, ascending;
/// `y` `[>= n_rows, top_k, n]`.
///
/// # Panics
/// If the shapes disagree.
pub fn expert_up(
    r: &mut Recording,
    x: &Tensor,
    norm: Norm<'_>,
    linear: Linear<'_>,
    chosen: &Tensor,
    y: &Tensor,
    n_rows: usize,
) {
    let (rows, n_out) = (linear.weight.shape()[0], y.cols());
    assert!(
        rows.is_multiple_of(2 * n_out),
        "expert_up: y does not fit the weight"
    );
    let params = Params {
        n_rows: u32_of(n_rows),
        k: u32_of(x.cols()),
        n_out: u32_of(n_out),
        count: u32_of(norm.count),
        eps: norm.eps,
        group: u32_of(linear.group),
        top_k: u32_of(chosen.cols()),
        first: u32_of(linear.first),
        n_experts: u32_of(rows / (2 * n_out)),
    };
    let args = [x, norm.weight, linear.weight, linear.scales, chosen, y];
    r.push(&OP, &params, &args);
}

fn product(p: Params, [x, gamma, weight, scales]: [View<'_>; 4]) -> Product<'_> {
    Product {
        x,
        norm: Some((gamma, p.count, p.eps)),
        weight,
        scales,
        n_rows: p.n_rows as usize,
        k: p.k as usize,
        group: p.group as usize,
    }
}

fn reference(args: &mut Args<'_>) {
    let p: Params = args.params();
    let [x, gamma, weight, scales, chosen, mut y] = args.views();
    let product = product(p, [x, gamma, weight, scales]);
    let [n_out, top_k] = [p.n_out, p.top_k].map(|n| n as usize);
    for row in 0..p.n_rows as usize {
        let x = product.exact_input(row);
        for slot in 0..top_k {
            let expert = chosen.u32s()[row * top_k + slot].wrapping_sub(p.first);
            if expert >= p.n_experts {
                continue;
            }
            let base = expert as usize * 2 * n_out;
            for n in 0..n_out {
                let gate = product.exact(&x, base + n);
                let up = product.exact(&x, base + n_out + n);
                let value = gate / (1.0 + (-gate).exp()) * up;
                y.set((row * top_k + slot) * n_out + n, value);
            }
        }
    }
}

/// The rows that chose an expert, and the slot where each has it.
pub(super) fn takers(chosen: &[u32], top_k: usize, expert: u32) -> Vec<(usize, usize)> {
    let of_row = |(row, chosen): (usize, &[u32])| {
        let slot = chosen.iter().position(|&e| e == expert)?;
        Some((row, slot))
    };
    chosen
        .chunks_exact(top_k)
        .enumerate()
        .filter_map(of_row)
        .collect()
}

fn by_expert(args: &mut Args<'_>) {
    let p: Params = args.params();
    let [x, gamma, weight, scales, chosen, mut y] = args.views();
    let [n_rows, k, n_out, top_k] = [p.n_rows, p.k, p.n_out, p.top_k].map(|n| n as usize);
    let product = product(p, [x, gamma, weight, scales]);
    let x = product.normed().expect("there is a norm");
    let chosen = &chosen.u32s()[..n_rows * top_k];
    let matrix = Matrix {
        weight: &product.weight,
        scales: product.scales.u32s(),
        k,
        group: p.group as usize,
    };
    let y = y.f32s_mut();
    for expert in 0..p.n_experts {
        let takers = takers(chosen, top_k, p.first + expert);
        let base = expert as usize * 2 * n_out;
        for takers in takers.chunks(MAX_COLS) {
            let rows = takers.iter().map(|&(row, _)| &x[row * k..][..k]);
            let mine: Vec<f32> = rows.flatten().copied().collect();
            let gated: Vec<[f32; MAX_COLS]> = (0..n_out)
                .into_par_iter()
                .with_min_len(4)
                .map(|n| {
                    let mut out = [[0.0; MAX_COLS]; ROWS];
                    dots(&matrix, [base + n, base + n_out + n], &mine, &mut out);
                    let [gates, ups] = out;
                    std::array::from_fn(|c| gates[c] / (1.0 + (-gates[c]).exp()) * ups[c])
                })
                .collect();
            for (c, &(row, slot)) in takers.iter().enumerate() {
                let to = &mut y[(row * top_k + slot) * n_out..][..n_out];
                for (to, gated) in to.iter_mut().zip(&gated) {
                    *to = gated[c];
                }
            }
        }
    }
}

/// What rows chose, for a case: different experts, ascending, the first rows all alike.
pub(super) fn choices(rng: &mut Rng, n_rows: usize, top_k: usize, n_experts: usize) -> Vec<u32> {
    let mut all = Vec::new();
    for row in 0..n_rows {
        let mut mine: Vec<u32> = Vec::new();
        while mine.len() < top_k {
            let e = u32_of(if row < 2 {
                mine.len() * 2 % n_experts
            } else {
                rng.below(n_experts)
            });
            if mine.contains(&e) {
                let all = 0..u32_of(n_experts);
                mine.extend(all.into_iter().find(|e| !mine.contains(e)));
            } else {
                mine.push(e);
            }
        }
        mine.sort_unstable();
        all.extend(mine);
    }
    all
}

/// A case: rows, k, outputs, experts, experts of a row.
#[derive(Clone, Copy)]
struct Scene {
    dtype: DType,
    shape: [usize; 5],
    /// The first expert of the piece, and how many it has.
    piece: [usize; 2],
    count: usize,
    eps: f32,
}

impl Scene {
    fn case(self, name: &str) -> Case {
        let mut rng = Rng::named(name);
        let ([n_rows, k, n_out, n_experts, top_k], [first, n_here]) = (self.shape, self.piece);
        let group = 32;
        let params = Params {
            n_rows: u32_of(n_rows),
            k: u32_of(k),
            n_out: u32_of(n_out),
            count: u32_of(self.count),
            eps: self.eps,
            group,
            top_k: u32_of(top_k),
            first: u32_of(first),
            n_experts: u32_of(n_here),
        };
        // Epsilon decides where it is large; the padding is zero.
        let small = if self.eps > 1e-3 { 1e-3 } else { 1.0 };
        let mut x = rng.outliers(n_rows * k);
        for (i, x) in x.iter_mut().enumerate() {
            *x *= if i % k < self.count { small } else { 0.0 };
        }
        let gamma = rng.scaled(k, 1.5);
        let [weight, scales] = matrix(
            &mut rng,
            self.dtype,
            [n_here * 2 * n_out, k],
            group as usize,
        );
        let chosen = choices(&mut rng, n_rows, top_k, n_experts);
        let args = vec![
            floats(DType::F32, &[n_rows, k], x),
            floats(DType::F32, &[k], gamma),
            weight,
            scales,
            words(&[n_rows, top_k], chosen),
            output(DType::F32, &[n_rows, top_k, n_out]),
        ];
        case(name, &params, args)
    }
}

fn cases() -> Vec<Case> {
    let base = Scene {
        dtype: DType::F32,
        shape: [1, 8, 1, 1, 1],
        piece: [0, 1],
        count: 8,
        eps: 1e-6,
    };
    vec![
        base.case("one of one"),
        Scene {
            dtype: DType::BF16,
            shape: [4, 64, 37, 8, 3],
            piece: [0, 8],
            count: 61,
            ..base
        }
        .case("four rows, padding"),
        Scene {
            dtype: DType::F16,
            shape: [5, 72, 10, 12, 4],
            piece: [4, 5],
            count: 72,
            ..base
        }
        .case("a piece in the middle"),
        Scene {
            dtype: DType::U4,
            shape: [16, 160, 12, 16, 8],
            piece: [0, 16],
            count: 160,
            ..base
        }
        .case("int4, 16 rows"),
        Scene {
            dtype: DType::U8,
            shape: [19, 64, 9, 6, 2],
            piece: [0, 6],
            count: 64,
            ..base
        }
        .case("more rows than columns of a kernel"),
        Scene {
            dtype: DType::F8,
            shape: [3, 96, 10, 5, 2],
            piece: [1, 4],
            count: 96,
            ..base
        }
        .case("fp8, a piece"),
        Scene {
            shape: [3, 64, 16, 5, 2],
            piece: [1, 4],
            count: 64,
            eps: 1e-2,
            ..base
        }
        .case("eps decides"),
    ]
}
