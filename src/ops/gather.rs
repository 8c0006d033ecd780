//! Gather: `y[r, i] = x[r, order[i]]`; puts channels in the order of a matrix that stores them in one of
//! its own.
//!
//! Checkpoints that were quantised in the order of the channels' importance (`desc_act` of GPTQ) have the
//! channels of a group anywhere in a row; they are stored group by group, and this op follows them.

use bytemuck::{Pod, Zeroable};

use super::case::{Rng, case, floats, output, words};
use super::u32_of;
use crate::device::Access::{Read, Write};
use crate::device::{
    Args, Case, DType, Kernel, Op, Recording, Run, Tensor, Tolerance, Wgsl, always,
};

/// The op.
pub static OP: Op = Op {
    name: "gather",
    summary: "y[r, i] = x[r, order[i]] for i < count",
    params: &["n_rows", "count", "cols"],
    args: &[("x", Read), ("order", Read), ("y", Write)],
    reference,
    kernels: &[
        Kernel {
            name: "lane",
            run: Run::Wgsl(Wgsl {
                file: "shaders/gather.wgsl",
                source: include_str!("../../shaders/gather.wgsl"),
                consts: |_, _| Vec::new(),
                elements: &[],
                groups: |d, _| {
                    let p: Params = d.params.get();
                    [p.count.div_ceil(64), p.n_rows, 1]
                },
                loads: Some(|d, _, ints, group| {
                    let p: Params = d.params.get();
                    let end = p.count.min(group[0] * 64 + 64) as usize;
                    let order = &ints.get(&d.args[1])[group[0] as usize * 64..end];
                    let channels: std::collections::BTreeSet<_> = order.iter().collect();
                    vec![channels.len() as u64 * 4, order.len() as u64 * 4, 0]
                }),
            }),
            fits: always,
        },
        Kernel {
            name: "copy",
            run: Run::Cpu(copy),
            fits: always,
        },
    ],
    cases,
    tolerance: Tolerance::with_abs(0.0),
};

/// Uniform of `gather.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Params {
    n_rows: u32,
    count: u32,
    cols: u32,
}

/// Records the gathering of `n_rows` rows. What is behind the channels of `order` is left alone.
///
/// Shapes: `x` and `y` `[>= n_rows, m]` in f32, `order` `[<= m]`, each number below `m`.
///
/// # Panics
/// If `x` and `y` differ in width, or are narrower than `order`.
pub fn gather(r: &mut Recording, x: &Tensor, order: &Tensor, y: &Tensor, n_rows: usize) {
    assert_eq!(x.cols(), y.cols(), "gather: x and y differ in width");
    assert!(
        order.len() <= x.cols(),
        "gather: the order is longer than a row"
    );
    let params = Params {
        n_rows: u32_of(n_rows),
        count: u32_of(order.len()),
        cols: u32_of(x.cols()),
    };
    r.push(&OP, &params, &[x, order, y]);
}

fn reference(args: &mut Args<'_>) {
    let p: Params = args.params();
    let [x, order, mut y] = args.views();
    let cols = p.cols as usize;
    for row in 0..p.n_rows as usize {
        for (i, &channel) in order.u32s()[..p.count as usize].iter().enumerate() {
            y.set(row * cols + i, x.get(row * cols + channel as usize));
        }
    }
}

fn copy(args: &mut Args<'_>) {
    let p: Params = args.params();
    let [x, order, mut y] = args.views();
    let cols = p.cols as usize;
    let order = &order.u32s()[..p.count as usize];
    let from = x.f32s().chunks_exact(cols);
    let rows = y.f32s_mut().chunks_exact_mut(cols).zip(from);
    for (to, from) in rows.take(p.n_rows as usize) {
        for (to, &channel) in to.iter_mut().zip(order) {
            *to = from[channel as usize];
        }
    }
}

fn cases() -> Vec<Case> {
    let make = |name: &str, n_rows: usize, count: usize, cols: usize| {
        let params = Params {
            n_rows: u32_of(n_rows),
            count: u32_of(count),
            cols: u32_of(cols),
        };
        let mut rng = Rng::named(name);
        let mut order: Vec<u32> = (0..u32_of(count)).collect();
        for i in (1..count).rev() {
            order.swap(i, rng.below(i + 1));
        }
        let x = rng.uniform(n_rows * cols);
        case(
            name,
            &params,
            vec![
                floats(DType::F32, &[n_rows, cols], x),
                words(&[count], order),
                output(DType::F32, &[n_rows, cols]),
            ],
        )
    };
    vec![
        make("the only channel", 1, 1, 1),
        make("rows with padding that stays", 3, 77, 80),
        make("more rows than a group of columns", 17, 1757, 1760),
        make("Qwen2.5-7B hidden size", 4, 3584, 3584),
    ]
}
