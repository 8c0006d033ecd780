//! Merge of attention partials by log-sum-exp, in each row's fixed order.

use bytemuck::{Pod, Zeroable};
use rayon::prelude::*;

use super::attend::EMPTY;
use super::case::{Rng, case, floats, output, words};
use super::u32_of;
use crate::device::Access::{Read, Write};
use crate::device::{
    Args, Caps, Case, DType, Dispatch, Ints, Kernel, Op, Recording, Run, Tensor, Tolerance, Wgsl,
};

/// The op.
pub static OP: Op = Op {
    name: "merge",
    summary: "attention output of a row from the partials of the splits that it sees",
    params: &["n_rows", "n_heads", "head_dim"],
    args: &[
        ("ranges", Read),
        ("order", Read),
        ("partial", Read),
        ("stats", Read),
        ("y", Write),
    ],
    reference,
    kernels: &[
        Kernel {
            name: "head",
            run: Run::Wgsl(Wgsl {
                file: "shaders/merge.wgsl",
                source: include_str!("../../shaders/merge.wgsl"),
                consts: |d, _| {
                    let dim = d.params.get::<Params>().head_dim;
                    // A lane has four channels.
                    let lanes = (dim / 4).next_multiple_of(64).max(128);
                    vec![("HEAD_DIM", dim), ("LANES", lanes)]
                },
                elements: &[],
                groups: |d, _| {
                    let p: Params = d.params.get();
                    [p.n_rows, p.n_heads, 1]
                },
                loads: Some(loads),
            }),
            fits,
        },
        Kernel {
            name: "head",
            run: Run::Cpu(by_head),
            fits,
        },
    ],
    cases,
    tolerance: Tolerance::with_abs(1e-6),
};

/// Uniform of `merge.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Params {
    n_rows: u32,
    n_heads: u32,
    head_dim: u32,
}

fn fits(d: &Dispatch, _: &Caps) -> bool {
    let p: Params = d.params.get();
    p.head_dim.is_multiple_of(4) && p.head_dim <= 1024
}

/// What a workgroup loads: its row's partials of its head, with their places and states. A lane comes back to
/// a state after few other loads.
fn loads(d: &Dispatch, _: &Caps, ints: &Ints<'_>, group: [u32; 3]) -> Vec<u64> {
    let dim = u64::from(d.params.get::<Params>().head_dim);
    let ranges = &ints.get(&d.args[0])[group[0] as usize..][..2];
    let n = u64::from(ranges[1] - ranges[0]);
    vec![8, n * 4, n * dim * 4, n * 8, 0]
}

/// Records the merge for `n_rows` rows.
///
/// Shapes: `ranges` `[>= n_rows + 1]`, where in `order` each row's pairs begin; `order` `[n_pairs]`,
/// pairs in the order in which they merge; `partial` `[n_pairs, n_heads, head_dim]`; `stats`
/// `[n_pairs, n_heads, 2]`; `y` `[>= n_rows, n_heads * head_dim]`.
pub fn merge(
    r: &mut Recording,
    [ranges, order]: [&Tensor; 2],
    [partial, stats]: [&Tensor; 2],
    y: &Tensor,
    n_rows: usize,
) {
    let params = Params {
        n_rows: u32_of(n_rows),
        n_heads: u32_of(partial.shape()[1]),
        head_dim: u32_of(partial.cols()),
    };
    r.push(&OP, &params, &[ranges, order, partial, stats, y]);
}

fn reference(args: &mut Args<'_>) {
    let p: Params = args.params();
    let [ranges, order, partial, stats, mut y] = args.views();
    let (heads, dim) = (p.n_heads as usize, p.head_dim as usize);
    for row in 0..p.n_rows as usize {
        let pairs = &order.u32s()[ranges.u32s()[row] as usize..ranges.u32s()[row + 1] as usize];
        for head in 0..heads {
            let at = |pair: u32| pair as usize * heads + head;
            let max = pairs
                .iter()
                .map(|&i| stats.get(at(i) * 2))
                .fold(f64::MIN, f64::max);
            let weight = |pair: u32| (stats.get(at(pair) * 2) - max).exp();
            let total: f64 = pairs
                .iter()
                .map(|&i| stats.get(at(i) * 2 + 1) * weight(i))
                .sum();
            for d in 0..dim {
                let sum: f64 = pairs
                    .iter()
                    .map(|&i| partial.get(at(i) * dim + d) * weight(i))
                    .sum();
                y.set((row * heads + head) * dim + d, sum / total);
            }
        }
    }
}

fn by_head(args: &mut Args<'_>) {
    let p: Params = args.params();
    let [ranges, order, partial, stats, mut y] = args.views();
    let (heads, dim) = (p.n_heads as usize, p.head_dim as usize);
    let (ranges, order) = (ranges.u32s(), order.u32s());
    let (partial, stats) = (partial.f32s(), stats.f32s());
    let merge = |(at, y): (usize, &mut [f32])| {
        let (row, head) = (at / heads, at % heads);
        let pairs = &order[ranges[row] as usize..ranges[row + 1] as usize];
        let at = |pair: u32| pair as usize * heads + head;
        let max = pairs
            .iter()
            .map(|&i| stats[at(i) * 2])
            .fold(EMPTY, f32::max);
        let mut total = 0.0;
        y.fill(0.0);
        for &pair in pairs {
            let weight = (stats[at(pair) * 2] - max).exp();
            total += stats[at(pair) * 2 + 1] * weight;
            super::dot::add_scaled(y, weight, &partial[at(pair) * dim..][..dim]);
        }
        for y in y {
            *y /= total;
        }
    };
    let outputs = y.f32s_mut().par_chunks_exact_mut(dim);
    outputs
        .take(p.n_rows as usize * heads)
        .enumerate()
        .for_each(merge);
}

fn cases() -> Vec<Case> {
    let make = |name: &str, counts: &[usize], heads: usize, dim: usize| {
        let mut rng = Rng::named(name);
        let n_pairs: usize = counts.iter().sum();
        let mut ranges = vec![0];
        for count in counts {
            ranges.push(ranges.last().expect("starts with one") + u32_of(*count));
        }
        // A permutation: partials lie in the order of the work, not of the rows.
        let mut order: Vec<u32> = (0..u32_of(n_pairs)).collect();
        for i in (1..n_pairs).rev() {
            order.swap(i, rng.below(i + 1));
        }
        let partial = rng.uniform(n_pairs * heads * dim);
        let mut stats: Vec<f32> = (0..n_pairs * heads)
            .flat_map(|_| [rng.unit() * 8.0, 1.5 + rng.unit()])
            .collect();
        let mut partial = partial;
        // Each row but those of one pair has an empty partial.
        for row in (0..counts.len()).filter(|&row| counts[row] > 1) {
            let pair = order[ranges[row] as usize] as usize;
            for head in 0..heads {
                stats[(pair * heads + head) * 2..][..2].copy_from_slice(&[EMPTY, 0.0]);
                partial[(pair * heads + head) * dim..][..dim].fill(0.0);
            }
        }
        let n_rows = counts.len();
        let params = Params {
            n_rows: u32_of(n_rows),
            n_heads: u32_of(heads),
            head_dim: u32_of(dim),
        };
        case(
            name,
            &params,
            vec![
                words(&[n_rows + 1], ranges),
                words(&[n_pairs], order),
                floats(DType::F32, &[n_pairs, heads, dim], partial),
                floats(DType::F32, &[n_pairs, heads, 2], stats),
                output(DType::F32, &[n_rows, heads * dim]),
            ],
        )
    };
    vec![
        make("one partial", &[1], 1, 8),
        make("uneven rows", &[3, 1, 17, 2], 5, 40),
        make("many partials of QwQ-32B heads", &[64, 63], 40, 128),
        make("the widest head", &[5], 2, 256),
        make("a width that no lanes divide", &[9, 2], 3, 136),
        make("heads over a latent", &[3, 1], 5, 576),
        make("more partials than are weighed at once", &[700], 2, 24),
    ]
}
