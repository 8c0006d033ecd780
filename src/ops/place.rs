//! Placement of new tokens: norms of queries and keys, rotation of the keys, the write to the cache. For
//! models that normalise their heads; the others do it all in [`super::qkv`].
//!
//! A key is rotated to its index in its block, once and for ever; a value is stored as it is. The query
//! is only normalised: it is rotated where it is used, once for each block (paper 3.4).

use bytemuck::{Pod, Zeroable};

use super::case::{Rng, case, floats, output, targets};
use super::u32_of;
use crate::device::Access::{Read, Write};
use crate::device::{
    Args, Caps, Case, DType, Dispatch, Kernel, Op, Recording, Run, Tensor, Tolerance, View, Wgsl,
};

/// The op.
pub static OP: Op = Op {
    name: "place",
    summary: "norms q and k by head, rotates k to its index in its block, writes k and v to their slot",
    params: &["n_rows", "n_heads", "n_kv_heads", "head_dim", "eps"],
    args: &[
        ("qkv", Read),
        ("q_norm", Read),
        ("k_norm", Read),
        ("angles", Read),
        ("targets", Read),
        ("q", Write),
        ("keys", Write),
        ("values", Write),
    ],
    reference,
    kernels: &[
        Kernel {
            name: "head",
            run: Run::Wgsl(Wgsl {
                file: "shaders/place.wgsl",
                source: include_str!("../../shaders/place.wgsl"),
                consts: |d, _| vec![("HEAD_DIM", d.params.get::<Params>().head_dim)],
                elements: &[("Kv", 6)],
                groups: |d, _| {
                    let p: Params = d.params.get();
                    [p.n_rows, p.n_heads + 2 * p.n_kv_heads, 1]
                },
                loads: Some(|d, _, _, group| {
                    let p: Params = d.params.get();
                    let head = u64::from(p.head_dim) * 4;
                    let (is_q, is_v) = (group[1] < p.n_heads, group[1] >= p.n_heads + p.n_kv_heads);
                    let of_k = if is_q || is_v { 0 } else { head };
                    vec![head, if is_q { head } else { 0 }, of_k, of_k, 8, 0, 0, 0]
                }),
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
    tolerance: Tolerance::with_abs(2e-6),
};

/// Uniform of `place.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Params {
    n_rows: u32,
    n_heads: u32,
    n_kv_heads: u32,
    head_dim: u32,
    eps: f32,
}

fn fits(d: &Dispatch, _: &Caps) -> bool {
    let p: Params = d.params.get();
    p.head_dim.is_multiple_of(8) && p.head_dim <= 256 && d.args[6].dtype() == d.args[7].dtype()
}

/// Weights of the norms over a head, and their epsilon.
#[derive(Clone, Copy, Debug)]
pub struct HeadNorms<'a> {
    /// Of the queries, `[head_dim]`.
    pub q: &'a Tensor,
    /// Of the keys, `[head_dim]`.
    pub k: &'a Tensor,
    /// Epsilon of both.
    pub eps: f32,
}

/// Tensors of one layer's cache: keys and values, `[n_slots, n_kv_heads, head_dim]`.
#[derive(Clone, Copy, Debug)]
pub struct Arena<'a> {
    /// Keys, rotated to their index in their block.
    pub keys: &'a Tensor,
    /// Values.
    pub values: &'a Tensor,
}

/// Records the placement of `n_rows` tokens.
///
/// Shapes: `qkv` `[>= n_rows, (n_heads + 2 n_kv_heads) * head_dim]`; `angles` `[n, head_dim / 2, 2]`,
/// cosine and sine of each index; `targets` `[>= n_rows, 2]`, slot and index in the block of each row;
/// `q` `[>= n_rows, n_heads, head_dim]`.
///
/// # Panics
/// If the shapes disagree.
#[expect(clippy::too_many_arguments, reason = "one fused op")]
pub fn place(
    r: &mut Recording,
    qkv: &Tensor,
    norms: HeadNorms<'_>,
    angles: &Tensor,
    targets: &Tensor,
    q: &Tensor,
    arena: Arena<'_>,
    n_rows: usize,
) {
    let (n_heads, head_dim) = (q.shape()[1], q.cols());
    let n_kv_heads = arena.keys.shape()[1];
    assert_eq!(
        qkv.cols(),
        (n_heads + 2 * n_kv_heads) * head_dim,
        "place: width of qkv"
    );
    assert_eq!(
        angles.shape()[1] * 2,
        head_dim,
        "place: angles do not fit the head"
    );
    assert_eq!(
        arena.keys.shape(),
        arena.values.shape(),
        "place: keys and values differ in shape"
    );
    let params = Params {
        n_rows: u32_of(n_rows),
        n_heads: u32_of(n_heads),
        n_kv_heads: u32_of(n_kv_heads),
        head_dim: u32_of(head_dim),
        eps: norms.eps,
    };
    let args = [
        qkv,
        norms.q,
        norms.k,
        angles,
        targets,
        q,
        arena.keys,
        arena.values,
    ];
    r.push(&OP, &params, &args);
}

fn reference(args: &mut Args<'_>) {
    let p: Params = args.params();
    let [
        qkv,
        q_norm,
        k_norm,
        angles,
        targets,
        mut q,
        mut keys,
        mut values,
    ] = args.views();
    let (heads, kv_heads, dim) = (
        p.n_heads as usize,
        p.n_kv_heads as usize,
        p.head_dim as usize,
    );
    let half = dim / 2;
    for row in 0..p.n_rows as usize {
        let [slot, index] = [0, 1].map(|i| targets.u32s()[row * 2 + i] as usize);
        let head = |h: usize, norm: Option<&View<'_>>| -> Vec<f64> {
            let x = |i: usize| qkv.get((row * (heads + 2 * kv_heads) + h) * dim + i);
            let mean = (0..dim).map(|i| x(i).powi(2)).sum::<f64>() / dim as f64;
            let scale = (mean + f64::from(p.eps)).sqrt().recip();
            (0..dim)
                .map(|i| norm.map_or(x(i), |w| x(i) * scale * w.get(i)))
                .collect()
        };
        for h in 0..heads {
            for (i, v) in head(h, Some(&q_norm)).into_iter().enumerate() {
                q.set((row * heads + h) * dim + i, v);
            }
        }
        for h in 0..kv_heads {
            let at = (slot * kv_heads + h) * dim;
            let k = head(heads + h, Some(&k_norm));
            let v = head(heads + kv_heads + h, None);
            for i in 0..half {
                let [cos, sin] = [0, 1].map(|j| angles.get((index * half + i) * 2 + j));
                keys.set(at + i, k[i] * cos - k[i + half] * sin);
                keys.set(at + i + half, k[i + half] * cos + k[i] * sin);
            }
            for (i, v) in v.into_iter().enumerate() {
                values.set(at + i, v);
            }
        }
    }
}

fn by_head(args: &mut Args<'_>) {
    let p: Params = args.params();
    let [
        qkv,
        q_norm,
        k_norm,
        angles,
        targets,
        mut q,
        mut keys,
        mut values,
    ] = args.views();
    let (heads, kv_heads, dim) = (
        p.n_heads as usize,
        p.n_kv_heads as usize,
        p.head_dim as usize,
    );
    let half = dim / 2;
    let angles = angles.f32s();
    let mut buffer = [0.0; 256];
    for row in 0..p.n_rows as usize {
        let [slot, index] = [0, 1].map(|i| targets.u32s()[row * 2 + i] as usize);
        let angles = &angles[index * dim..][..dim];
        let qkv = &qkv.f32s()[row * (heads + 2 * kv_heads) * dim..][..(heads + 2 * kv_heads) * dim];
        for (h, x) in qkv.chunks_exact(dim).enumerate() {
            let head = &mut buffer[..dim];
            head.copy_from_slice(x);
            if h < heads + kv_heads {
                let weight = if h < heads {
                    q_norm.f32s()
                } else {
                    k_norm.f32s()
                };
                normalise(head, weight, p.eps);
            }
            if h < heads {
                q.f32s_mut()[(row * heads + h) * dim..][..dim].copy_from_slice(head);
            } else if h < heads + kv_heads {
                rotate(head, angles);
                store(&mut keys, (slot * kv_heads + h - heads) * dim, head);
            } else {
                store(
                    &mut values,
                    (slot * kv_heads + h - heads - kv_heads) * dim,
                    head,
                );
            }
        }
    }
    debug_assert!(half * 2 == dim, "heads are even");
}

fn normalise(x: &mut [f32], weight: &[f32], eps: f32) {
    let sum: f64 = x.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the scale is applied in f32"
    )]
    let scale = (sum / x.len() as f64 + f64::from(eps)).sqrt().recip() as f32;
    for (x, &w) in x.iter_mut().zip(weight) {
        *x = *x * scale * w;
    }
}

/// Rotates one head in place by the angles of one index, `[head_dim / 2, 2]`.
pub(super) fn rotate(head: &mut [f32], angles: &[f32]) {
    let (a, b) = head.split_at_mut(angles.len() / 2);
    for ((a, b), angle) in a.iter_mut().zip(b).zip(angles.chunks_exact(2)) {
        let (cos, sin) = (angle[0], angle[1]);
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}

/// Stores numbers of a head from an element on, rounded to the type of the cache.
pub(super) fn store(to: &mut View<'_>, at: usize, from: &[f32]) {
    use half::{bf16, f16};
    match to.dtype() {
        DType::F32 => to.f32s_mut()[at..at + from.len()].copy_from_slice(from),
        DType::F16 => {
            for (to, &v) in to.f16s_mut()[at..].iter_mut().zip(from) {
                *to = f16::from_f32(v);
            }
        }
        DType::BF16 => {
            for (to, &v) in to.bf16s_mut()[at..].iter_mut().zip(from) {
                *to = bf16::from_f32(v);
            }
        }
        DType::U32 | DType::U4 | DType::U8 | DType::F8 => panic!("the cache is of a float type"),
    }
}

fn cases() -> Vec<Case> {
    let make = |name: &str, dtype, [n_rows, heads, kv_heads, dim]: [usize; 4], eps: f32| {
        let mut rng = Rng::named(name);
        let (n_slots, n_angles) = (n_rows + 5, 33);
        let targets = targets(&mut rng, n_rows, n_slots, n_angles);
        let params = Params {
            n_rows: u32_of(n_rows),
            n_heads: u32_of(heads),
            n_kv_heads: u32_of(kv_heads),
            head_dim: u32_of(dim),
            eps,
        };
        let scale = if eps > 1e-3 { 0.05 } else { 1.0 };
        let qkv = rng.scaled(n_rows * (heads + 2 * kv_heads) * dim, scale);
        // What lies in other slots is noise that must survive.
        let arena = |rng: &mut Rng| {
            floats(
                dtype,
                &[n_slots, kv_heads, dim],
                rng.scaled(n_slots * kv_heads * dim, 900.0),
            )
        };
        let angles: Vec<f32> = (0..n_angles * dim / 2)
            .flat_map(|_| {
                let a = rng.unit() * 3.0;
                [a.cos(), a.sin()]
            })
            .collect();
        let norms = [0, 1].map(|_| floats(DType::F32, &[dim], rng.scaled(dim, 2.0)));
        let [q_norm, k_norm] = norms;
        let keys = arena(&mut rng);
        let values = arena(&mut rng);
        case(
            name,
            &params,
            vec![
                floats(DType::F32, &[n_rows, (heads + 2 * kv_heads) * dim], qkv),
                q_norm,
                k_norm,
                floats(DType::F32, &[n_angles, dim / 2, 2], angles),
                targets,
                output(DType::F32, &[n_rows, heads, dim]),
                keys,
                values,
            ],
        )
    };
    vec![
        make("the smallest head", DType::F32, [1, 1, 1, 8], 1e-6),
        make(
            "Qwen3-0.6B heads with norms",
            DType::F16,
            [3, 16, 8, 128],
            1e-6,
        ),
        make("odd head counts", DType::F32, [5, 7, 1, 40], 1e-5),
        make("the widest head", DType::BF16, [2, 2, 1, 256], 1e-6),
        make("eps decides", DType::F32, [2, 2, 2, 64], 1e-2),
        make("many rows", DType::F16, [37, 4, 2, 16], 1e-6),
    ]
}
