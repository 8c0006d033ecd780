//! Queries, keys and values of new tokens in one dispatch: norm, projection, bias, rotation of the keys, the
//! write to the cache.
//!
//! For models whose queries and keys have no norms of their own; a norm over a head needs all of its
//! channels, which no workgroup has here, and goes by [`super::project`] and [`super::place`]. A key is
//! rotated to its index in its block, once and for ever; the query is rotated where it is used (paper 3.4).

use std::collections::BTreeSet;

use bytemuck::{Pod, Zeroable};

use super::case::{Rng, case, floats, output, targets};
use super::dot::ROWS;
use super::linear::{
    By, Launched, Linear, Norm, Product, Served, column_consts, column_groups, has_matrices,
    matrix, matrix_consts, matrix_groups, tile_consts, tile_groups,
};
use super::place::{Arena, rotate, store};
use super::u32_of;
use crate::device::Access::{Read, Write};
use crate::device::{
    Args, Caps, Case, DType, Dispatch, Kernel, Op, Recording, Run, Tensor, Tolerance, View, Wgsl,
};

/// The op.
pub static OP: Op = Op {
    name: "qkv",
    summary: "q, k, v = weight times norm(x) plus bias; k rotated to its index in its block; k and v to their slot",
    params: &[
        "n_rows",
        "k",
        "n_heads",
        "n_kv_heads",
        "head_dim",
        "count",
        "eps",
        "group",
        "tiled",
    ],
    args: &[
        ("x", Read),
        ("gamma", Read),
        ("weight", Read),
        ("scales", Read),
        ("bias", Read),
        ("angles", Read),
        ("targets", Read),
        ("q", Write),
        ("keys", Write),
        ("values", Write),
    ],
    reference,
    kernels: &[
        Kernel {
            name: "matrix",
            run: Run::Wgsl(Wgsl {
                file: "shaders/matrix/qkv.wgsl",
                source: include_str!("../../shaders/matrix/qkv.wgsl"),
                consts: |d, caps| {
                    let p: Params = d.params.get();
                    let mut consts = matrix_consts(p.group, caps);
                    consts.push(("HEAD_DIM", p.head_dim));
                    consts
                },
                elements: &[("Weight", 2), ("Kv", 8)],
                groups: |d, _| {
                    let p: Params = d.params.get();
                    matrix_groups(p.n_out() / 4, p.n_rows)
                },
                loads: None,
            }),
            fits: |d, caps| {
                d.params.get::<Params>().tiled == 1 && has_matrices(caps) && fits(d, caps)
            },
        },
        Kernel {
            name: "tiles",
            run: Run::Wgsl(Wgsl {
                file: "shaders/tiles/qkv.wgsl",
                source: include_str!("../../shaders/tiles/qkv.wgsl"),
                consts: |d, _| {
                    let p: Params = d.params.get();
                    let mut consts = tile_consts(p.group);
                    consts.push(("HEAD_DIM", p.head_dim));
                    consts
                },
                elements: &[("Weight", 2), ("Kv", 8)],
                groups: |d, _| {
                    let p: Params = d.params.get();
                    tile_groups(p.n_out() / 4, p.n_rows)
                },
                loads: Some(|d, _, ints, group| {
                    let p: Params = d.params.get();
                    let served = p.launched(d).by_tiles(group, |quad| p.quad_rows(quad));
                    p.loads(&served, ints.get(&d.args[6]))
                }),
            }),
            fits: |d, caps| d.params.get::<Params>().tiled == 1 && fits(d, caps),
        },
        Kernel {
            name: "columns",
            run: Run::Wgsl(Wgsl {
                file: "shaders/qkv.wgsl",
                source: include_str!("../../shaders/qkv.wgsl"),
                consts: |d, caps| {
                    let p: Params = d.params.get();
                    let mut consts = column_consts(p.n_rows, p.group, caps);
                    consts.push(("HEAD_DIM", p.head_dim));
                    consts
                },
                elements: &[("Weight", 2), ("Kv", 8)],
                groups: |d, caps| {
                    let p: Params = d.params.get();
                    column_groups(p.n_out() / 4, p.n_rows, caps)
                },
                loads: Some(|d, caps, ints, group| {
                    let p: Params = d.params.get();
                    let launched = p.launched(d);
                    let served = launched.by_columns(caps, group, |quad| p.quad_rows(quad));
                    p.loads(&served, ints.get(&d.args[6]))
                }),
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
    tolerance: Tolerance::with_abs(3e-4),
};

/// Uniform of `qkv.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Params {
    n_rows: u32,
    k: u32,
    n_heads: u32,
    n_kv_heads: u32,
    head_dim: u32,
    count: u32,
    eps: f32,
    group: u32,
    tiled: u32,
}

impl Params {
    fn n_out(self) -> u32 {
        (self.n_heads + 2 * self.n_kv_heads) * self.head_dim
    }
}

impl Params {
    fn launched(self, dispatch: &Dispatch) -> Launched<'_> {
        Launched {
            weight: &dispatch.args[2],
            n_rows: self.n_rows,
            k: self.k,
            group: self.group,
            norm: true,
            n_quads: self.n_out() / 4,
        }
    }

    /// As in `parts/qkv_op.wgsl`.
    fn quad_rows(self, quad: u32) -> [u32; 4] {
        let half = self.head_dim / 4;
        let row = quad / half * self.head_dim + quad % half * 2;
        [row, row + 1, row + 2 * half, row + 2 * half + 1]
    }

    /// With the angles of the keys, and the targets of keys and values.
    fn loads(self, served: &Served, targets: &[u32]) -> Vec<u64> {
        let half = self.head_dim / 4;
        let (mut angles, mut stored) = (BTreeSet::new(), BTreeSet::new());
        for quad in served.quads.clone().filter(|q| q / half >= self.n_heads) {
            for row in served.rows.clone() {
                stored.insert(row);
                if quad / half < self.n_heads + self.n_kv_heads {
                    angles.insert((targets[row as usize * 2 + 1], quad % half));
                }
            }
        }
        let more = [angles.len() as u64 * 16, stored.len() as u64 * 8, 0, 0, 0];
        [served.loads.as_slice(), &more].concat()
    }
}

fn fits(d: &Dispatch, _: &Caps) -> bool {
    let p: Params = d.params.get();
    p.k.is_multiple_of(8) && p.head_dim.is_multiple_of(8) && d.args[8].dtype() == d.args[9].dtype()
}

/// Records queries, keys and values of `n_rows` tokens.
///
/// Shapes: `x` `[>= n_rows, k]`, the weight `[(n_heads + 2 n_kv_heads) * head_dim, k]`; `angles`
/// `[n, head_dim / 2, 2]`, cosine and sine of each index; `targets` `[>= n_rows, 2]`, slot and index in the
/// block of each row; `q` `[>= n_rows, n_heads, head_dim]`.
///
/// # Panics
/// If the shapes disagree.
#[expect(clippy::too_many_arguments, reason = "one fused op")]
pub fn qkv(
    r: &mut Recording,
    x: &Tensor,
    norm: Norm<'_>,
    linear: Linear<'_>,
    angles: &Tensor,
    targets: &Tensor,
    q: &Tensor,
    arena: Arena<'_>,
    (n_rows, by): (usize, By),
) {
    linear.check("qkv", x.cols());
    let (n_heads, head_dim) = (q.shape()[1], q.cols());
    let n_kv_heads = arena.keys.shape()[1];
    assert_eq!(
        linear.weight.shape()[0],
        (n_heads + 2 * n_kv_heads) * head_dim,
        "qkv: rows of the weight"
    );
    assert_eq!(
        angles.shape()[1] * 2,
        head_dim,
        "qkv: angles do not fit the head"
    );
    assert_eq!(
        arena.keys.shape(),
        arena.values.shape(),
        "qkv: keys and values differ in shape"
    );
    let params = Params {
        n_rows: u32_of(n_rows),
        k: u32_of(x.cols()),
        n_heads: u32_of(n_heads),
        n_kv_heads: u32_of(n_kv_heads),
        head_dim: u32_of(head_dim),
        count: u32_of(norm.count),
        eps: norm.eps,
        group: u32_of(linear.group),
        tiled: u32::from(by == By::Tiles),
    };
    let args = [
        x,
        norm.weight,
        linear.weight,
        linear.scales,
        linear.bias,
        angles,
        targets,
        q,
        arena.keys,
        arena.values,
    ];
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
    let [
        x,
        gamma,
        weight,
        scales,
        bias,
        angles,
        targets,
        mut q,
        mut keys,
        mut values,
    ] = args.views();
    let product = product(p, [x, gamma, weight, scales]);
    let [heads, kv_heads, dim] = [p.n_heads, p.n_kv_heads, p.head_dim].map(|n| n as usize);
    let half = dim / 2;
    for row in 0..p.n_rows as usize {
        let [slot, index] = [0, 1].map(|i| targets.u32s()[row * 2 + i] as usize);
        let x = product.exact_input(row);
        let value =
            |head: usize, i: usize| product.exact(&x, head * dim + i) + bias.get(head * dim + i);
        for head in 0..heads {
            for i in 0..dim {
                q.set((row * heads + head) * dim + i, value(head, i));
            }
        }
        for head in 0..kv_heads {
            let at = (slot * kv_heads + head) * dim;
            for i in 0..half {
                let [cos, sin] = [0, 1].map(|j| angles.get((index * half + i) * 2 + j));
                let [a, b] = [i, i + half].map(|i| value(heads + head, i));
                keys.set(at + i, a * cos - b * sin);
                keys.set(at + i + half, b * cos + a * sin);
            }
            for i in 0..dim {
                values.set(at + i, value(heads + kv_heads + head, i));
            }
        }
    }
}

fn by_row(args: &mut Args<'_>) {
    let p: Params = args.params();
    let [
        x,
        gamma,
        weight,
        scales,
        bias,
        angles,
        targets,
        mut q,
        mut keys,
        mut values,
    ] = args.views();
    let [heads, kv_heads, dim] = [p.n_heads, p.n_kv_heads, p.head_dim].map(|n| n as usize);
    let n_rows = p.n_rows as usize;
    let n_out = p.n_out() as usize;
    let pair = |i: usize| [ROWS * i, ROWS * i + 1];
    let sums = product(p, [x, gamma, weight, scales]).sums(n_out / ROWS, pair);
    let mut buffer = vec![0.0; dim];
    for row in 0..n_rows {
        let [slot, index] = [0, 1].map(|i| targets.u32s()[row * 2 + i] as usize);
        let bias = bias.f32s()[..n_out].chunks_exact(dim);
        for (head, bias) in bias.enumerate() {
            for (i, (to, bias)) in buffer.iter_mut().zip(bias).enumerate() {
                *to = sums[(head * dim + i) * n_rows + row] + bias;
            }
            if head < heads {
                q.f32s_mut()[(row * heads + head) * dim..][..dim].copy_from_slice(&buffer);
            } else if head < heads + kv_heads {
                rotate(&mut buffer, &angles.f32s()[index * dim..][..dim]);
                store(&mut keys, (slot * kv_heads + head - heads) * dim, &buffer);
            } else {
                let head = head - heads - kv_heads;
                store(&mut values, (slot * kv_heads + head) * dim, &buffer);
            }
        }
    }
}

/// A case: some tokens of a model.
#[derive(Clone, Copy)]
struct Scene {
    /// Of the weight and of the cache.
    dtypes: [DType; 2],
    rows: usize,
    k: usize,
    /// Query heads, KV heads, `head_dim`.
    heads: [usize; 3],
    /// Columns that are no padding.
    count: usize,
    eps: f32,
    by: By,
}

impl Scene {
    fn case(self, name: &str) -> Case {
        let s = self;
        let mut rng = Rng::named(name);
        let [heads, kv_heads, dim] = s.heads;
        let (n_slots, n_angles, group) = (s.rows + 5, 33, 32);
        let targets = targets(&mut rng, s.rows, n_slots, n_angles);
        let params = Params {
            n_rows: u32_of(s.rows),
            k: u32_of(s.k),
            n_heads: u32_of(heads),
            n_kv_heads: u32_of(kv_heads),
            head_dim: u32_of(dim),
            count: u32_of(s.count),
            eps: s.eps,
            group: u32_of(group),
            tiled: u32::from(s.by == By::Tiles),
        };
        // Epsilon decides where it is large; the padding is zero.
        let small = if s.eps > 1e-3 { 1e-3 } else { 1.0 };
        let mut x = rng.outliers(s.rows * s.k);
        for (i, x) in x.iter_mut().enumerate() {
            *x *= if i % s.k < s.count { small } else { 0.0 };
        }
        let gamma = rng.scaled(s.k, 1.5);
        let n_out = (heads + 2 * kv_heads) * dim;
        let [weight, scales] = matrix(&mut rng, s.dtypes[0], [n_out, s.k], group);
        let bias = rng.uniform(n_out);
        let angles: Vec<f32> = (0..n_angles * dim / 2)
            .flat_map(|_| {
                let a = rng.unit() * 3.0;
                [a.cos(), a.sin()]
            })
            .collect();
        // What lies in other slots is noise that must survive.
        let mut arena = || {
            let noise = rng.scaled(n_slots * kv_heads * dim, 900.0);
            floats(s.dtypes[1], &[n_slots, kv_heads, dim], noise)
        };
        let (keys, values) = (arena(), arena());
        let args = vec![
            floats(DType::F32, &[s.rows, s.k], x),
            floats(DType::F32, &[s.k], gamma),
            weight,
            scales,
            floats(DType::F32, &[n_out], bias),
            floats(DType::F32, &[n_angles, dim / 2, 2], angles),
            targets,
            output(DType::F32, &[s.rows, heads, dim]),
            keys,
            values,
        ];
        case(name, &params, args)
    }
}

const BASE: Scene = Scene {
    dtypes: [DType::F32, DType::F32],
    rows: 1,
    k: 8,
    heads: [1, 1, 8],
    count: 8,
    eps: 1e-6,
    by: By::Columns,
};

fn cases() -> Vec<Case> {
    vec![
        BASE.case("the smallest head"),
        Scene {
            rows: 5,
            k: 72,
            heads: [7, 1, 40],
            count: 67,
            ..BASE
        }
        .case("odd head counts and padding"),
        Scene {
            dtypes: [DType::F16, DType::F16],
            rows: 3,
            k: 264,
            heads: [8, 2, 64],
            count: 264,
            eps: 1e-5,
            ..BASE
        }
        .case("Llama-3.2-1B heads in f16"),
        Scene {
            dtypes: [DType::BF16, DType::BF16],
            rows: 2,
            k: 64,
            heads: [2, 2, 16],
            count: 64,
            eps: 1e-2,
            ..BASE
        }
        .case("eps decides"),
        Scene {
            dtypes: [DType::U4, DType::F16],
            rows: 4,
            k: 128,
            heads: [2, 1, 256],
            count: 128,
            ..BASE
        }
        .case("the widest head, int4"),
        Scene {
            dtypes: [DType::U8, DType::F32],
            rows: 37,
            k: 64,
            heads: [4, 2, 24],
            count: 64,
            ..BASE
        }
        .case("more rows than columns of a kernel"),
        Scene {
            dtypes: [DType::BF16, DType::F16],
            rows: 45,
            k: 136,
            heads: [5, 1, 72],
            count: 131,
            by: By::Tiles,
            ..BASE
        }
        .case("tiles"),
        Scene {
            dtypes: [DType::U4, DType::F32],
            rows: 32,
            k: 160,
            heads: [4, 2, 32],
            count: 160,
            by: By::Tiles,
            ..BASE
        }
        .case("tiles of int4"),
    ]
}
