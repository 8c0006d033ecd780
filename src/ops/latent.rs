//! Placement of latents: what all heads of a token share (MLA), normalised, with its rotated channels, to
//! its slot.
//!
//! A slot holds the latent and, in front of each half of it, half of the rotated channels, turned to the
//! token's index in its block once and for ever. It is the key of every head, and its value.

use bytemuck::{Pod, Zeroable};

use super::case::{Rng, case, floats, targets};
use super::linear::Norm;
use super::place::store;
use super::u32_of;
use crate::device::Access::{Read, Write};
use crate::device::{
    Args, Caps, Case, DType, Dispatch, Kernel, Op, Recording, Run, Tensor, Tolerance, Wgsl,
};

/// The op.
pub static OP: Op = Op {
    name: "latent",
    summary: "norms the first dim channels of x, rotates the others to their index in their block, writes both to their slot",
    params: &["n_rows", "dim", "count", "gap", "eps"],
    args: &[
        ("x", Read),
        ("gamma", Read),
        ("angles", Read),
        ("targets", Read),
        ("keys", Write),
    ],
    reference,
    kernels: &[
        Kernel {
            name: "row",
            run: Run::Wgsl(Wgsl {
                file: "shaders/latent.wgsl",
                source: include_str!("../../shaders/latent.wgsl"),
                consts: |_, _| Vec::new(),
                elements: &[("Kv", 4)],
                groups: |d, _| [d.params.get::<Params>().n_rows, 1, 1],
                loads: Some(|d, _, _, _| {
                    let p: Params = d.params.get();
                    let [dim, gap] = [p.dim, p.gap].map(u64::from);
                    vec![(dim + 2 * gap) * 4, dim * 4, gap * 8, 8, 0]
                }),
            }),
            fits,
        },
        Kernel {
            name: "row",
            run: Run::Cpu(by_row),
            fits,
        },
    ],
    cases,
    tolerance: Tolerance::with_abs(2e-6),
};

/// Uniform of `latent.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Params {
    n_rows: u32,
    dim: u32,
    count: u32,
    gap: u32,
    eps: f32,
}

fn fits(d: &Dispatch, _: &Caps) -> bool {
    let p: Params = d.params.get();
    p.dim.is_multiple_of(8) && p.gap.is_multiple_of(2)
}

/// Records the placement of `n_rows` latents.
///
/// Shapes: `x` `[>= n_rows, dim + 2 gap]`, a latent and then both halves of the rotated channels; the norm's
/// weight `[dim]`; `angles` `[n, gap, 2]`, cosine and sine of each index; `targets` `[>= n_rows, 2]`, slot and
/// index in the block of each row; `keys` `[n_slots, 1, dim + 2 gap]`.
///
/// # Panics
/// If the shapes disagree.
pub fn latent(
    r: &mut Recording,
    x: &Tensor,
    norm: Norm<'_>,
    angles: &Tensor,
    targets: &Tensor,
    keys: &Tensor,
    n_rows: usize,
) {
    let (dim, gap) = (norm.weight.len(), angles.shape()[1]);
    assert_eq!(x.cols(), dim + 2 * gap, "latent: width of x");
    assert_eq!(keys.shape()[1], 1, "latent: heads share it");
    assert_eq!(keys.cols(), x.cols(), "latent: width of the cache");
    let params = Params {
        n_rows: u32_of(n_rows),
        dim: u32_of(dim),
        count: u32_of(norm.count),
        gap: u32_of(gap),
        eps: norm.eps,
    };
    r.push(&OP, &params, &[x, norm.weight, angles, targets, keys]);
}

fn reference(args: &mut Args<'_>) {
    let p: Params = args.params();
    let [x, gamma, angles, targets, mut keys] = args.views();
    let [dim, gap] = [p.dim, p.gap].map(|n| n as usize);
    let (wide, half) = (dim + 2 * gap, dim / 2);
    for row in 0..p.n_rows as usize {
        let [slot, index] = [0, 1].map(|i| targets.u32s()[row * 2 + i] as usize);
        let x = |i: usize| x.get(row * wide + i);
        let mean = (0..dim).map(|i| x(i).powi(2)).sum::<f64>() / f64::from(p.count);
        let scale = (mean + f64::from(p.eps)).sqrt().recip();
        for i in 0..dim {
            let behind = if i < half { gap } else { 2 * gap };
            keys.set(slot * wide + behind + i, x(i) * scale * gamma.get(i));
        }
        for i in 0..gap {
            let [cos, sin] = [0, 1].map(|j| angles.get((index * gap + i) * 2 + j));
            let (a, b) = (x(dim + i), x(dim + gap + i));
            keys.set(slot * wide + i, a * cos - b * sin);
            keys.set(slot * wide + gap + half + i, b * cos + a * sin);
        }
    }
}

fn by_row(args: &mut Args<'_>) {
    let p: Params = args.params();
    let [x, gamma, angles, targets, mut keys] = args.views();
    let [dim, gap] = [p.dim, p.gap].map(|n| n as usize);
    let (wide, half) = (dim + 2 * gap, dim / 2);
    let mut out = vec![0.0; wide];
    for row in 0..p.n_rows as usize {
        let [slot, index] = [0, 1].map(|i| targets.u32s()[row * 2 + i] as usize);
        let (latent, rotated) = x.f32s()[row * wide..][..wide].split_at(dim);
        let sum: f64 = latent.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
        #[expect(
            clippy::cast_possible_truncation,
            reason = "the scale is applied in f32"
        )]
        let scale = (sum / f64::from(p.count) + f64::from(p.eps)).sqrt().recip() as f32;
        for (i, (&x, &w)) in latent.iter().zip(gamma.f32s()).enumerate() {
            out[i + if i < half { gap } else { 2 * gap }] = x * scale * w;
        }
        let angles = angles.f32s()[index * gap * 2..][..gap * 2].chunks_exact(2);
        for (i, angle) in angles.enumerate() {
            let (a, b, cos, sin) = (rotated[i], rotated[gap + i], angle[0], angle[1]);
            out[i] = a * cos - b * sin;
            out[gap + half + i] = b * cos + a * sin;
        }
        store(&mut keys, slot * wide, &out);
    }
}

fn cases() -> Vec<Case> {
    let make = |name: &str, dtype, [n_rows, dim, count, gap]: [usize; 4], eps: f32| {
        let mut rng = Rng::named(name);
        let (n_slots, n_angles) = (n_rows + 5, 33);
        let targets = targets(&mut rng, n_rows, n_slots, n_angles);
        let params = Params {
            n_rows: u32_of(n_rows),
            dim: u32_of(dim),
            count: u32_of(count),
            gap: u32_of(gap),
            eps,
        };
        let wide = dim + 2 * gap;
        let mut x = rng.scaled(n_rows * wide, if eps > 1e-3 { 0.05 } else { 1.0 });
        for (i, x) in x.iter_mut().enumerate() {
            // The padding of a latent is zero.
            *x *= if (count..dim).contains(&(i % wide)) {
                0.0
            } else {
                1.0
            };
        }
        let angles: Vec<f32> = (0..n_angles * gap)
            .flat_map(|_| {
                let a = rng.unit() * 3.0;
                [a.cos(), a.sin()]
            })
            .collect();
        let gamma = rng.scaled(dim, 2.0);
        // What lies in other slots is noise that must survive.
        let noise = rng.scaled(n_slots * wide, 900.0);
        let args = vec![
            floats(DType::F32, &[n_rows, wide], x),
            floats(DType::F32, &[dim], gamma),
            floats(DType::F32, &[n_angles, gap, 2], angles),
            targets,
            floats(dtype, &[n_slots, 1, wide], noise),
        ];
        case(name, &params, args)
    };
    vec![
        make("the smallest latent", DType::F32, [1, 8, 8, 2], 1e-6),
        make(
            "latents of DeepSeek-V3",
            DType::F16,
            [3, 512, 512, 32],
            1e-6,
        ),
        make("a padded latent", DType::F32, [5, 24, 20, 4], 1e-6),
        make("eps decides", DType::BF16, [2, 64, 64, 8], 1e-2),
        make("many rows", DType::F16, [37, 16, 16, 12], 1e-6),
    ]
}
