//! The gated half of the feed-forward block: `y = silu(gate(norm(x))) * up(norm(x))`, in one pass over the
//! weights.
//!
//! The weight holds the gate's rows first, then those of up, as Phi-3's files do.

use bytemuck::{Pod, Zeroable};

use super::case::{Rng, case, floats, output};
use super::linear::{
    By, Launched, Linear, Norm, Product, Served, column_consts, column_groups, has_matrices,
    matrix, matrix_consts, matrix_groups, tile_consts, tile_groups,
};
use super::u32_of;
use crate::device::Access::{Read, Write};
use crate::device::{
    Args, Caps, Case, DType, Dispatch, Kernel, Op, Recording, Run, Tensor, Tolerance, View, Wgsl,
};

/// The op.
pub static OP: Op = Op {
    name: "gate_up",
    summary: "y[r, n] = silu(g) * u with g, u = the rows n and n_out + n of weight times norm(x)[r], plus bias",
    params: &["n_rows", "k", "n_out", "count", "eps", "group", "tiled"],
    args: &[
        ("x", Read),
        ("gamma", Read),
        ("weight", Read),
        ("scales", Read),
        ("bias", Read),
        ("y", Write),
    ],
    reference,
    kernels: &[
        Kernel {
            name: "matrix",
            run: Run::Wgsl(Wgsl {
                file: "shaders/matrix/gate_up.wgsl",
                source: include_str!("../../shaders/matrix/gate_up.wgsl"),
                consts: |d, caps| matrix_consts(d.params.get::<Params>().group, caps),
                elements: &[("Weight", 2)],
                groups: |d, _| {
                    let p: Params = d.params.get();
                    matrix_groups(p.n_out.div_ceil(2), p.n_rows)
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
                file: "shaders/tiles/gate_up.wgsl",
                source: include_str!("../../shaders/tiles/gate_up.wgsl"),
                consts: |d, _| tile_consts(d.params.get::<Params>().group),
                elements: &[("Weight", 2)],
                groups: |d, _| {
                    let p: Params = d.params.get();
                    tile_groups(p.n_out.div_ceil(2), p.n_rows)
                },
                loads: Some(|d, _, _, group| {
                    let p: Params = d.params.get();
                    loads(&p.launched(d).by_tiles(group, |quad| p.quad_rows(quad)))
                }),
            }),
            fits: |d, caps| d.params.get::<Params>().tiled == 1 && fits(d, caps),
        },
        Kernel {
            name: "columns",
            run: Run::Wgsl(Wgsl {
                file: "shaders/gate_up.wgsl",
                source: include_str!("../../shaders/gate_up.wgsl"),
                consts: |d, caps| {
                    let p: Params = d.params.get();
                    column_consts(p.n_rows, p.group, caps)
                },
                elements: &[("Weight", 2)],
                groups: |d, caps| {
                    let p: Params = d.params.get();
                    column_groups(p.n_out.div_ceil(2), p.n_rows, caps)
                },
                loads: Some(|d, caps, _, group| {
                    let p: Params = d.params.get();
                    let launched = p.launched(d);
                    loads(&launched.by_columns(caps, group, |quad| p.quad_rows(quad)))
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
    // Sums of up to thousands of terms as large as 100: an error of one in the last place of the
    // largest partial sum is 1e-4. The NMSE bound is the tight one.
    tolerance: Tolerance::with_abs(3e-4),
};

/// Uniform of `gate_up.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Params {
    n_rows: u32,
    k: u32,
    n_out: u32,
    count: u32,
    eps: f32,
    group: u32,
    tiled: u32,
}

impl Params {
    fn launched(self, dispatch: &Dispatch) -> Launched<'_> {
        Launched {
            weight: &dispatch.args[2],
            n_rows: self.n_rows,
            k: self.k,
            group: self.group,
            norm: true,
            n_quads: self.n_out.div_ceil(2),
        }
    }

    /// As in `parts/gate_up_op.wgsl`.
    fn quad_rows(self, quad: u32) -> [u32; 4] {
        let [a, b] = [0, 1].map(|i| (2 * quad + i).min(self.n_out - 1));
        [a, b, a + self.n_out, b + self.n_out]
    }
}

/// What a workgroup loads; of the output, nothing.
fn loads(served: &Served) -> Vec<u64> {
    [served.loads.as_slice(), &[0]].concat()
}

fn fits(d: &Dispatch, _: &Caps) -> bool {
    d.params.get::<Params>().k.is_multiple_of(8)
}

/// Records the gated projection of `n_rows` rows.
///
/// Shapes: `x` `[>= n_rows, k]`, the weight `[2 n, k]`, `y` `[>= n_rows, n]`; x and y in f32.
///
/// # Panics
/// If the shapes disagree.
pub fn gate_up(
    r: &mut Recording,
    x: &Tensor,
    norm: Norm<'_>,
    linear: Linear<'_>,
    y: &Tensor,
    (n_rows, by): (usize, By),
) {
    linear.check("gate_up", x.cols());
    assert_eq!(
        linear.weight.shape()[0],
        2 * y.cols(),
        "gate_up: y does not fit the weight"
    );
    assert_eq!(linear.first, 0, "gate_up: the weight is in one piece");
    let params = Params {
        n_rows: u32_of(n_rows),
        k: u32_of(x.cols()),
        n_out: u32_of(y.cols()),
        count: u32_of(norm.count),
        eps: norm.eps,
        group: u32_of(linear.group),
        tiled: u32::from(by == By::Tiles),
    };
    let args = [x, norm.weight, linear.weight, linear.scales, linear.bias, y];
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
    let [x, gamma, weight, scales, bias, mut y] = args.views();
    let product = product(p, [x, gamma, weight, scales]);
    let n_out = p.n_out as usize;
    for row in 0..p.n_rows as usize {
        let x = product.exact_input(row);
        for n in 0..n_out {
            let gate = product.exact(&x, n) + bias.get(n);
            let up = product.exact(&x, n_out + n) + bias.get(n_out + n);
            y.set(row * n_out + n, gate / (1.0 + (-gate).exp()) * up);
        }
    }
}

fn by_row(args: &mut Args<'_>) {
    let p: Params = args.params();
    let [x, gamma, weight, scales, bias, mut y] = args.views();
    let (n_rows, n_out) = (p.n_rows as usize, p.n_out as usize);
    let sums = product(p, [x, gamma, weight, scales]).sums(n_out, |n| [n, n_out + n]);
    let (bias, y) = (bias.f32s(), y.f32s_mut());
    for (row, y) in y.chunks_exact_mut(n_out).take(n_rows).enumerate() {
        for (n, y) in y.iter_mut().enumerate() {
            let g = sums[2 * n * n_rows + row] + bias[n];
            let u = sums[(2 * n + 1) * n_rows + row] + bias[n_out + n];
            *y = g / (1.0 + (-g).exp()) * u;
        }
    }
}

fn cases() -> Vec<Case> {
    let make =
        |name: &str, dtype, [n_rows, k, n_out]: [usize; 3], count: usize, eps: f32, by: By| {
            let mut rng = Rng::named(name);
            let group = 64;
            let params = Params {
                n_rows: u32_of(n_rows),
                k: u32_of(k),
                n_out: u32_of(n_out),
                count: u32_of(count),
                eps,
                group,
                tiled: u32::from(by == By::Tiles),
            };
            // Epsilon decides where it is large; the padding is zero.
            let small = if eps > 1e-3 { 1e-3 } else { 1.0 };
            let mut x = rng.outliers(n_rows * k);
            for (i, x) in x.iter_mut().enumerate() {
                *x *= if i % k < count { small } else { 0.0 };
            }
            // Gates of some hundreds are saturated.
            let gamma = rng.scaled(
                k,
                if name.contains("saturated") {
                    40.0
                } else {
                    1.0
                },
            );
            let [weight, scales] = matrix(&mut rng, dtype, [2 * n_out, k], group as usize);
            let bias = rng.uniform(2 * n_out);
            let args = vec![
                floats(DType::F32, &[n_rows, k], x),
                floats(DType::F32, &[k], gamma),
                weight,
                scales,
                floats(DType::F32, &[2 * n_out], bias),
                output(DType::F32, &[n_rows, n_out]),
            ];
            case(name, &params, args)
        };
    let (columns, tiles) = (By::Columns, By::Tiles);
    vec![
        make("the smallest", DType::F32, [1, 8, 1], 8, 1e-6, columns),
        make(
            "saturated gates",
            DType::F32,
            [2, 64, 37],
            64,
            1e-6,
            columns,
        ),
        make(
            "a width that nothing divides",
            DType::BF16,
            [3, 256, 1757],
            256,
            1e-6,
            columns,
        ),
        make("eps decides", DType::F32, [2, 128, 33], 128, 1e-2, columns),
        make("padded rows", DType::F32, [2, 64, 9], 57, 1e-6, columns),
        make("16 rows", DType::F16, [16, 264, 19], 264, 1e-6, columns),
        make(
            "more rows than columns of a kernel",
            DType::BF16,
            [37, 176, 24],
            176,
            1e-5,
            columns,
        ),
        make(
            "Qwen3-0.6B hidden size",
            DType::BF16,
            [4, 1024, 48],
            1024,
            1e-6,
            columns,
        ),
        make(
            "int4, the last group not full",
            DType::U4,
            [4, 352, 21],
            352,
            1e-6,
            columns,
        ),
        make("int8", DType::U8, [2, 192, 21], 192, 1e-6, columns),
        make("tiles of f16", DType::F16, [35, 264, 41], 264, 1e-6, tiles),
        make("tiles of int4", DType::U4, [64, 192, 64], 190, 1e-5, tiles),
    ]
}
