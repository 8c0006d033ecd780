//! Row selection: `y[i] = x[rows[i]]`; picks the rows whose logits are wanted.

use bytemuck::{Pod, Zeroable};

use super::case::{Rng, case, floats, output, words};
use super::u32_of;
use crate::device::Access::{Read, Write};
use crate::device::{
    Args, Case, DType, Kernel, Op, Recording, Run, Tensor, Tolerance, Wgsl, always,
};

/// The op.
pub static OP: Op = Op {
    name: "select_rows",
    summary: "y[i] = x[rows[i]]",
    params: &["n_rows", "dim"],
    args: &[("rows", Read), ("x", Read), ("y", Write)],
    reference,
    kernels: &[
        Kernel {
            name: "row",
            run: Run::Wgsl(Wgsl {
                file: "shaders/select_rows.wgsl",
                source: include_str!("../../shaders/select_rows.wgsl"),
                consts: |_, _| Vec::new(),
                elements: &[],
                groups: |d, _| [d.params.get::<Params>().n_rows, 1, 1],
                loads: Some(|d, _, _, _| {
                    let p: Params = d.params.get();
                    vec![4, u64::from(p.dim) * 4, 0]
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

/// Uniform of `select_rows.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Params {
    n_rows: u32,
    dim: u32,
}

/// Records the copy of `n_rows` rows of `x` to the start of `y`.
///
/// Shapes: `rows` `[>= n_rows]`, `x` `[n, dim]`, `y` `[>= n_rows, dim]`, both f32.
///
/// # Panics
/// If `x` and `y` differ in width.
pub fn select_rows(r: &mut Recording, rows: &Tensor, x: &Tensor, y: &Tensor, n_rows: usize) {
    assert_eq!(x.cols(), y.cols(), "select_rows: x and y differ in width");
    r.push(
        &OP,
        &Params {
            n_rows: u32_of(n_rows),
            dim: u32_of(x.cols()),
        },
        &[rows, x, y],
    );
}

fn reference(args: &mut Args<'_>) {
    let p: Params = args.params();
    let [rows, x, mut y] = args.views();
    let dim = p.dim as usize;
    for (i, &row) in rows.u32s()[..p.n_rows as usize].iter().enumerate() {
        for j in 0..dim {
            y.set(i * dim + j, x.get(row as usize * dim + j));
        }
    }
}

fn copy(args: &mut Args<'_>) {
    let p: Params = args.params();
    let [rows, x, mut y] = args.views();
    let dim = p.dim as usize;
    let to = y.f32s_mut().chunks_exact_mut(dim);
    for (to, &row) in to.zip(&rows.u32s()[..p.n_rows as usize]) {
        to.copy_from_slice(&x.f32s()[row as usize * dim..][..dim]);
    }
}

fn cases() -> Vec<Case> {
    let make = |name: &str, rows: Vec<u32>, n: usize, dim: usize| {
        let params = Params {
            n_rows: u32_of(rows.len()),
            dim: u32_of(dim),
        };
        let x = Rng::named(name).uniform(n * dim);
        case(
            name,
            &params,
            vec![
                words(&[rows.len()], rows.clone()),
                floats(DType::F32, &[n, dim], x),
                output(DType::F32, &[rows.len(), dim]),
            ],
        )
    };
    vec![
        make("the only row", vec![0], 1, 1),
        make("the last rows, out of order", vec![16, 3, 3], 17, 1757),
        make("a wide row", vec![1], 2, 5120),
    ]
}
