//! Projection: `y[r, first + n] = sum over k of norm(x)[r, k] * weight[n, k] + bias[first + n]`, or added to `y`.
//!
//! The op of the output projections (added to the residual), of the head, and of queries, keys and values
//! where their heads are normalised. A weight larger than one binding comes in pieces of rows (`first`).

use bytemuck::{Pod, Zeroable};

use super::case::{Rng, case, floats, output};
use super::dot::ROWS;
use super::linear::{
    By, Launched, Linear, Norm, Product, Served, column_consts, column_groups, has_matrices,
    matrix, matrix_consts, matrix_groups, tile_consts, tile_groups,
};
use super::u32_of;
use crate::device::Access::{Read, ReadWrite};
use crate::device::{
    Args, Caps, Case, DType, Data, Dispatch, Kernel, Op, Recording, Run, Tensor, Tolerance, View,
    Wgsl,
};

/// The op.
pub static OP: Op = Op {
    name: "project",
    summary: "y[r, first + n] = (y if add) + sum_k norm(x)[r, k] * weight[n, k] + bias[first + n]",
    params: &[
        "n_rows", "k", "n_out", "y_cols", "first", "add", "norm", "count", "eps", "group", "tiled",
    ],
    args: &[
        ("x", Read),
        ("gamma", Read),
        ("weight", Read),
        ("scales", Read),
        ("bias", Read),
        ("y", ReadWrite),
    ],
    reference,
    kernels: &[
        Kernel {
            name: "matrix",
            run: Run::Wgsl(Wgsl {
                file: "shaders/matrix/project.wgsl",
                source: include_str!("../../shaders/matrix/project.wgsl"),
                consts: |d, caps| {
                    let p: Params = d.params.get();
                    let mut consts = matrix_consts(p.group, caps);
                    consts.push(("NORM", p.norm));
                    consts
                },
                elements: &[("Weight", 2)],
                groups: |d, _| {
                    let p: Params = d.params.get();
                    matrix_groups(p.n_out.div_ceil(4), p.n_rows)
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
                file: "shaders/tiles/project.wgsl",
                source: include_str!("../../shaders/tiles/project.wgsl"),
                consts: |d, _| {
                    let p: Params = d.params.get();
                    let mut consts = tile_consts(p.group);
                    consts.push(("NORM", p.norm));
                    consts
                },
                elements: &[("Weight", 2)],
                groups: |d, _| {
                    let p: Params = d.params.get();
                    tile_groups(p.n_out.div_ceil(4), p.n_rows)
                },
                loads: Some(|d, _, _, group| {
                    let p: Params = d.params.get();
                    p.loads(&p.launched(d).by_tiles(group, |quad| p.quad_rows(quad)))
                }),
            }),
            fits: |d, caps| d.params.get::<Params>().tiled == 1 && fits(d, caps),
        },
        Kernel {
            name: "columns",
            run: Run::Wgsl(Wgsl {
                file: "shaders/project.wgsl",
                source: include_str!("../../shaders/project.wgsl"),
                consts: |d, caps| {
                    let p: Params = d.params.get();
                    let mut consts = column_consts(p.n_rows, p.group, caps);
                    consts.push(("NORM", p.norm));
                    consts
                },
                elements: &[("Weight", 2)],
                groups: |d, caps| {
                    let p: Params = d.params.get();
                    column_groups(p.n_out.div_ceil(4), p.n_rows, caps)
                },
                loads: Some(|d, caps, _, group| {
                    let p: Params = d.params.get();
                    let launched = p.launched(d);
                    p.loads(&launched.by_columns(caps, group, |quad| p.quad_rows(quad)))
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
    norm: u32,
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
            norm: self.norm == 1,
            n_quads: self.n_out.div_ceil(4),
        }
    }

    /// As in `parts/project_op.wgsl`.
    fn quad_rows(self, quad: u32) -> [u32; 4] {
        [0, 1, 2, 3].map(|i| (4 * quad + i).min(self.n_out - 1))
    }

    /// With the old values of y, where it is added to.
    fn loads(self, served: &Served) -> Vec<u64> {
        let mut loads = served.loads.clone();
        let outputs = served.rows.len() as u64 * loads[4];
        loads.push(if self.add == 1 { outputs } else { 0 });
        loads
    }
}

fn fits(d: &Dispatch, _: &Caps) -> bool {
    d.params.get::<Params>().k.is_multiple_of(8)
}

/// What happens to the old value of `y`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Into {
    /// It is overwritten.
    Replace,
    /// The projection is added to it: a residual connection.
    Add,
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
    norm: Option<Norm<'_>>,
    linear: Linear<'_>,
    y: &Tensor,
    (n_rows, by): (usize, By),
    into: Into,
) {
    let n_out = linear.weight.shape()[0];
    linear.check("project", x.cols());
    assert!(linear.first + n_out <= y.cols(), "project: y is too narrow");
    let params = Params {
        n_rows: u32_of(n_rows),
        k: u32_of(x.cols()),
        n_out: u32_of(n_out),
        y_cols: u32_of(y.cols()),
        first: u32_of(linear.first),
        add: u32::from(into == Into::Add),
        norm: u32::from(norm.is_some()),
        count: norm.map_or(1, |n| u32_of(n.count)),
        eps: norm.map_or(0.0, |n| n.eps),
        group: u32_of(linear.group),
        tiled: u32::from(by == By::Tiles),
    };
    // Without a norm something is bound that is not read.
    let gamma = norm.map_or(linear.bias, |n| n.weight);
    let args = [x, gamma, linear.weight, linear.scales, linear.bias, y];
    r.push(&OP, &params, &args);
}

fn reference(args: &mut Args<'_>) {
    let p: Params = args.params();
    let [x, gamma, weight, scales, bias, mut y] = args.views();
    let product = product(p, [x, gamma, weight, scales]);
    for row in 0..p.n_rows as usize {
        let x = product.exact_input(row);
        for n in 0..p.n_out as usize {
            let out = p.first as usize + n;
            let at = row * p.y_cols as usize + out;
            let old = if p.add == 1 { y.get(at) } else { 0.0 };
            y.set(at, old + bias.get(out) + product.exact(&x, n));
        }
    }
}

fn product(p: Params, [x, gamma, weight, scales]: [View<'_>; 4]) -> Product<'_> {
    Product {
        x,
        norm: (p.norm == 1).then_some((gamma, p.count, p.eps)),
        weight,
        scales,
        n_rows: p.n_rows as usize,
        k: p.k as usize,
        group: p.group as usize,
    }
}

fn by_row(args: &mut Args<'_>) {
    let p: Params = args.params();
    let [x, gamma, weight, scales, bias, mut y] = args.views();
    let (n_rows, n_out) = (p.n_rows as usize, p.n_out as usize);
    let product = product(p, [x, gamma, weight, scales]);
    // An odd last row is computed twice, with itself.
    let pair = |i: usize| [ROWS * i, (ROWS * i + 1).min(n_out - 1)];
    let sums = product.sums(n_out.div_ceil(ROWS), pair);
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

/// A case: numbers that differ from call to call.
#[derive(Clone, Copy)]
struct Scene {
    dtype: DType,
    /// Rows, k, outputs.
    shape: [usize; 3],
    first: usize,
    into: Into,
    /// Columns that are no padding, and epsilon.
    norm: Option<(usize, f32)>,
    group: usize,
    by: By,
    /// What x is multiplied by, and the weight divided.
    scale: f32,
}

impl Scene {
    fn case(self, name: &str) -> Case {
        let mut rng = Rng::named(name);
        let ([n_rows, k, n_out], first) = (self.shape, self.first);
        let y_cols = first + n_out + 3;
        let (count, eps) = self.norm.unwrap_or((1, 0.0));
        let add = self.into == Into::Add;
        let params = Params {
            n_rows: u32_of(n_rows),
            k: u32_of(k),
            n_out: u32_of(n_out),
            y_cols: u32_of(y_cols),
            first: u32_of(first),
            add: u32::from(add),
            norm: u32::from(self.norm.is_some()),
            count: u32_of(count),
            eps,
            group: u32_of(self.group),
            tiled: u32::from(self.by == By::Tiles),
        };
        let mut x = rng.outliers(n_rows * k);
        if self.norm.is_some() {
            // Epsilon decides where it is large; the padding is zero.
            let small = if eps > 1e-3 { 1e-3 } else { 1.0 };
            for (i, x) in x.iter_mut().enumerate() {
                *x *= if i % k < count { small } else { 0.0 };
            }
        }
        let gamma = rng.scaled(k, 2.0);
        let [mut weight, scales] = matrix(&mut rng, self.dtype, [n_out, k], self.group);
        for x in &mut x {
            *x *= self.scale;
        }
        if let Data::Floats(weight) = &mut weight.data {
            for w in weight {
                *w /= self.scale;
            }
        }
        let bias = rng.scaled(first + n_out, 30.0);
        let y = rng.scaled(n_rows * y_cols, 30.0);
        let y = if add {
            floats(DType::F32, &[n_rows, y_cols], y)
        } else {
            output(DType::F32, &[n_rows, y_cols])
        };
        let args = vec![
            floats(DType::F32, &[n_rows, k], x),
            floats(DType::F32, &[k], gamma),
            weight,
            scales,
            floats(DType::F32, &[first + n_out], bias),
            y,
        ];
        case(name, &params, args)
    }
}

const BASE: Scene = Scene {
    dtype: DType::F32,
    shape: [1, 8, 1],
    first: 0,
    into: Into::Replace,
    norm: None,
    group: 32,
    by: By::Columns,
    scale: 1.0,
};

fn cases() -> Vec<Case> {
    let mut cases = vec![
        BASE.case("the smallest"),
        Scene {
            shape: [3, 1768, 1757],
            ..BASE
        }
        .case("a row count that nothing divides"),
        Scene {
            dtype: DType::BF16,
            shape: [2, 64, 37],
            first: 11,
            into: Into::Add,
            ..BASE
        }
        .case("a piece in the middle, added"),
        Scene {
            dtype: DType::F16,
            shape: [37, 176, 24],
            into: Into::Add,
            ..BASE
        }
        .case("more rows than columns of a kernel"),
        Scene {
            dtype: DType::BF16,
            shape: [4, 3072, 64],
            into: Into::Add,
            ..BASE
        }
        .case("Qwen3-0.6B down projection"),
        Scene {
            shape: [5, 64, 37],
            norm: Some((57, 1e-6)),
            ..BASE
        }
        .case("a norm over padded rows"),
        Scene {
            dtype: DType::BF16,
            shape: [2, 128, 21],
            norm: Some((128, 1e-2)),
            ..BASE
        }
        .case("a norm where eps decides"),
    ];
    cases.extend(code_cases());
    for n_rows in 1..=17 {
        let scene = Scene {
            dtype: DType::F16,
            shape: [n_rows, 264, 19],
            ..BASE
        };
        cases.push(scene.case(&format!("{n_rows} rows")));
    }
    cases.extend(tile_cases());
    cases
}

fn code_cases() -> impl Iterator<Item = Case> {
    let shapes = [
        (DType::U4, 32, 96),
        (DType::U4, 128, 1792),
        (DType::U4, 64, 360),
        (DType::U4, 40, 40),
        (DType::U8, 32, 64),
        (DType::U8, 128, 896),
        (DType::U8, 160, 488),
        (DType::U8, 24, 24),
        (DType::F8, 32, 96),
        (DType::F8, 128, 360),
        (DType::F8, 40, 40),
    ];
    shapes.into_iter().map(|(dtype, group, k)| {
        let scene = Scene {
            dtype,
            shape: [3, k, 38],
            norm: (group == 128).then_some((k - 5, 1e-6)),
            group,
            ..BASE
        };
        scene.case(&format!("{dtype} in groups of {group}, {k} columns"))
    })
}

fn tile_cases() -> impl Iterator<Item = Case> {
    let shapes = [
        (DType::F32, [1, 8, 1], None),
        (DType::F16, [33, 264, 69], Some((261, 1e-5))),
        (DType::BF16, [70, 64, 130], None),
        (DType::U4, [31, 352, 66], Some((352, 1e-5))),
        (DType::U8, [32, 64, 64], None),
        (DType::F8, [33, 96, 66], Some((93, 1e-5))),
    ];
    let scenes = shapes.into_iter().map(|(dtype, shape, norm)| {
        let scene = Scene {
            dtype,
            shape,
            into: [Into::Replace, Into::Add][shape[0] % 2],
            norm,
            by: By::Tiles,
            ..BASE
        };
        scene.case(&format!("tiles of {dtype}: {} rows", shape[0]))
    });
    // Beyond the range of f16, and near its least numbers.
    let massive = Scene {
        dtype: DType::BF16,
        shape: [5, 1768, 38],
        by: By::Tiles,
        scale: 2e4,
        ..BASE
    };
    scenes.chain([massive.case("tiles of massive activations")])
}
