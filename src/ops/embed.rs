//! Embedding lookup: `x[r] = table[tokens[r]]`.
//!
//! A table larger than one binding comes in pieces of rows; each piece serves the tokens it holds and
//! leaves the other rows alone.

use bytemuck::{Pod, Zeroable};

use super::case::{Rng, case, floats, output, words};
use super::u32_of;
use crate::device::Access::{Read, Write};
use crate::device::{
    Args, Case, DType, Dispatch, Kernel, Op, Recording, Run, Tensor, Tolerance, View, Wgsl, always,
};

/// The op.
pub static OP: Op = Op {
    name: "embed",
    summary: "x[r] = table[tokens[r] - first], for the tokens that the piece of the table holds",
    params: &["n_rows", "dim", "first", "n_table"],
    args: &[("tokens", Read), ("table", Read), ("x", Write)],
    reference,
    kernels: &[
        Kernel {
            name: "row",
            run: Run::Wgsl(Wgsl {
                file: "shaders/embed.wgsl",
                source: include_str!("../../shaders/embed.wgsl"),
                consts: |_, _| Vec::new(),
                elements: &[("Weight", 1)],
                groups: |d, _| [d.params.get::<Params>().n_rows, 1, 1],
                loads: Some(|d, _, ints, group| {
                    let p: Params = d.params.get();
                    let token = ints.get(&d.args[0])[group[0] as usize];
                    let held = (p.first..p.first + p.n_table).contains(&token);
                    let row = d.args[1].bytes() / p.n_table as usize;
                    vec![4, if held { row as u64 } else { 0 }, 0]
                }),
            }),
            fits,
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

/// Uniform of `embed.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Params {
    n_rows: u32,
    dim: u32,
    first: u32,
    n_table: u32,
}

fn fits(d: &Dispatch, _: &crate::device::Caps) -> bool {
    d.params.get::<Params>().dim.is_multiple_of(8)
}

/// Records the lookup of `n_rows` tokens in the rows `first..` of the table.
///
/// Shapes: `tokens` `[>= n_rows]`, `table` `[n, dim]`, `x` `[>= n_rows, dim]` in f32.
///
/// # Panics
/// If `table` and `x` differ in width.
pub fn embed(
    r: &mut Recording,
    tokens: &Tensor,
    table: &Tensor,
    first: usize,
    x: &Tensor,
    n_rows: usize,
) {
    assert_eq!(table.cols(), x.cols(), "embed: table and x differ in width");
    let params = Params {
        n_rows: u32_of(n_rows),
        dim: u32_of(x.cols()),
        first: u32_of(first),
        n_table: u32_of(table.shape()[0]),
    };
    r.push(&OP, &params, &[tokens, table, x]);
}

/// Calls `f` with (row of x, row of the table) for every token that this piece holds.
fn for_each_row(p: Params, tokens: &View<'_>, mut f: impl FnMut(usize, usize)) {
    for (row, &token) in tokens.u32s()[..p.n_rows as usize].iter().enumerate() {
        if let Some(at) = token.checked_sub(p.first).filter(|&at| at < p.n_table) {
            f(row, at as usize);
        }
    }
}

fn reference(args: &mut Args<'_>) {
    let p: Params = args.params();
    let [tokens, table, mut x] = args.views();
    let dim = p.dim as usize;
    for_each_row(p, &tokens, |row, at| {
        for i in 0..dim {
            x.set(row * dim + i, table.get(at * dim + i));
        }
    });
}

fn copy(args: &mut Args<'_>) {
    let p: Params = args.params();
    let [tokens, table, mut x] = args.views();
    let dim = p.dim as usize;
    for_each_row(p, &tokens, |row, at| {
        let to = &mut x.f32s_mut()[row * dim..][..dim];
        super::dot::widen(&table, at * dim, to);
    });
}

fn cases() -> Vec<Case> {
    let make = |name: &str, dtype, n_rows: usize, dim: usize, first: u32, n_table: usize| {
        let mut rng = Rng::named(name);
        // Some tokens lie before and behind the piece.
        let span = n_table + 2 * first as usize + 1;
        let mut tokens: Vec<u32> = (0..n_rows).map(|_| u32_of(rng.below(span))).collect();
        tokens[0] = first + u32_of(n_table) - 1;
        let params = Params {
            n_rows: u32_of(n_rows),
            dim: u32_of(dim),
            first,
            n_table: u32_of(n_table),
        };
        let table = rng.uniform(n_table * dim);
        case(
            name,
            &params,
            vec![
                words(&[n_rows], tokens),
                floats(dtype, &[n_table, dim], table),
                output(DType::F32, &[n_rows, dim]),
            ],
        )
    };
    vec![
        make("one token, f32", DType::F32, 1, 8, 0, 3),
        make("a piece in the middle, f16", DType::F16, 17, 64, 5, 31),
        make(
            "a width that no group divides, bf16",
            DType::BF16,
            5,
            1768,
            0,
            7,
        ),
        make("Qwen2.5-7B hidden size, bf16", DType::BF16, 4, 3584, 2, 9),
    ]
}
