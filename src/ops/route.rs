//! Routing: the experts that each row chooses, and the weight of each.
//!
//! Softmax over all experts, or a sigmoid of each with a bias that decides the choice only and groups that
//! compete first (DeepSeek-V3). The choice stays on the device: what reads experts reads it from there.

use bytemuck::{Pod, Zeroable};

use super::case::{Rng, case, floats, output};
use super::u32_of;
use crate::device::Access::{Read, Write};
use crate::device::{
    Args, Caps, Case, DType, Dispatch, Kernel, Op, Recording, Run, Tensor, Tolerance, Wgsl,
};

/// Most experts of a layer.
pub const MAX_EXPERTS: usize = 1024;

/// The op.
pub static OP: Op = Op {
    name: "route",
    summary: "the top_k experts of each row by score, ascending, and their weights",
    params: &[
        "n_rows",
        "n_experts",
        "top_k",
        "sigmoid",
        "normalise",
        "scale",
        "n_groups",
        "top_groups",
    ],
    args: &[
        ("logits", Read),
        ("bias", Read),
        ("chosen", Write),
        ("gates", Write),
    ],
    reference,
    kernels: &[
        Kernel {
            name: "ranks",
            run: Run::Wgsl(Wgsl {
                file: "shaders/route.wgsl",
                source: include_str!("../../shaders/route.wgsl"),
                consts: |d, _| vec![("EXPERTS", d.params.get::<Params>().n_experts)],
                elements: &[],
                loads: None,
                groups: |d, _| [d.params.get::<Params>().n_rows, 1, 1],
            }),
            fits,
        },
        Kernel {
            name: "reference",
            run: Run::Cpu(reference),
            fits,
        },
    ],
    cases,
    tolerance: Tolerance::with_abs(1e-6),
};

/// Uniform of `route.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Params {
    n_rows: u32,
    n_experts: u32,
    top_k: u32,
    sigmoid: u32,
    normalise: u32,
    scale: f32,
    n_groups: u32,
    top_groups: u32,
}

fn fits(d: &Dispatch, _: &Caps) -> bool {
    d.params.get::<Params>().n_experts as usize <= MAX_EXPERTS
}

/// How rows choose experts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Routing {
    /// Experts of a row.
    pub top_k: usize,
    /// A sigmoid of each logit, or else a softmax over all.
    pub sigmoid: bool,
    /// Whether the weights of the chosen are divided by their sum.
    pub normalise: bool,
    /// Multiplies the weights.
    pub scale: f32,
    /// Groups of neighbouring experts that compete first; divides the experts.
    pub n_groups: usize,
    /// Groups that stay.
    pub top_groups: usize,
}

/// Records the choice of `n_rows` rows.
///
/// Shapes: `logits` `[>= n_rows, n_experts]`, `bias` `[n_experts]`, added to sigmoids for the choice;
/// `chosen` and `gates` `[>= n_rows, top_k]`, ascending experts in u32 and their weights in f32.
///
/// # Panics
/// If the shapes disagree.
pub fn route(
    r: &mut Recording,
    logits: &Tensor,
    bias: &Tensor,
    routing: Routing,
    [chosen, gates]: [&Tensor; 2],
    n_rows: usize,
) {
    let n_experts = logits.cols();
    assert_eq!(bias.len(), n_experts, "route: bias");
    assert!(
        routing.top_k <= n_experts && n_experts.is_multiple_of(routing.n_groups),
        "route: {routing:?} of {n_experts}"
    );
    assert_eq!(chosen.cols(), routing.top_k, "route: chosen");
    assert_eq!(gates.cols(), routing.top_k, "route: gates");
    let params = Params {
        n_rows: u32_of(n_rows),
        n_experts: u32_of(n_experts),
        top_k: u32_of(routing.top_k),
        sigmoid: u32::from(routing.sigmoid),
        normalise: u32::from(routing.normalise),
        scale: routing.scale,
        n_groups: u32_of(routing.n_groups),
        top_groups: u32_of(routing.top_groups),
    };
    r.push(&OP, &params, &[logits, bias, chosen, gates]);
}

fn reference(args: &mut Args<'_>) {
    let p: Params = args.params();
    let [logits, bias, mut chosen, mut gates] = args.views();
    let [n, top_k, n_groups] = [p.n_experts, p.top_k, p.n_groups].map(|n| n as usize);
    // Best first; of equals, the lower index.
    let best = |scores: &[f64], k: usize| -> Vec<usize> {
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
        order.truncate(k);
        order
    };
    for row in 0..p.n_rows as usize {
        let logits: Vec<f64> = (0..n).map(|e| logits.get(row * n + e)).collect();
        let max = logits.iter().copied().fold(f64::MIN, f64::max);
        let softmax_sum: f64 = logits.iter().map(|l| (l - max).exp()).sum();
        let score = |l: &f64| match p.sigmoid {
            1 => 1.0 / (1.0 + (-l).exp()),
            _ => (l - max).exp() / softmax_sum,
        };
        let scores: Vec<f64> = logits.iter().map(score).collect();
        let mut ranked: Vec<f64> = match p.sigmoid {
            1 => (0..n).map(|e| scores[e] + bias.get(e)).collect(),
            _ => logits,
        };
        if p.top_groups < p.n_groups {
            let size = n / n_groups;
            let sum_of_two = |group: &[f64]| best(group, 2).iter().map(|&e| group[e]).sum();
            let sums: Vec<f64> = ranked.chunks_exact(size).map(sum_of_two).collect();
            let stay = best(&sums, p.top_groups as usize);
            for (e, score) in ranked.iter_mut().enumerate() {
                if !stay.contains(&(e / size)) {
                    *score = 0.0;
                }
            }
        }
        let mut taken = best(&ranked, top_k);
        taken.sort_unstable();
        let sum: f64 = taken.iter().map(|&e| scores[e]).sum();
        let divisor = match (p.normalise, p.sigmoid) {
            (1, 1) => sum + 1e-20,
            (1, _) => sum,
            _ => 1.0,
        };
        for (i, &e) in taken.iter().enumerate() {
            chosen.u32s_mut()[row * top_k + i] = u32_of(e);
            gates.set(row * top_k + i, scores[e] / divisor * f64::from(p.scale));
        }
    }
}

fn cases() -> Vec<Case> {
    let make = |name: &str, n_rows: usize, n_experts: usize, routing: Routing| {
        let mut rng = Rng::named(name);
        let Routing {
            top_k,
            n_groups,
            top_groups,
            ..
        } = routing;
        let params = Params {
            n_rows: u32_of(n_rows),
            n_experts: u32_of(n_experts),
            top_k: u32_of(top_k),
            sigmoid: u32::from(routing.sigmoid),
            normalise: u32::from(routing.normalise),
            scale: routing.scale,
            n_groups: u32_of(n_groups),
            top_groups: u32_of(top_groups),
        };
        let mut logits = rng.scaled(n_rows * n_experts, 4.0);
        if name.contains("ties") {
            for l in &mut logits {
                *l = l.round();
            }
        }
        let bias = rng.scaled(n_experts, 0.5);
        let args = vec![
            floats(DType::F32, &[n_rows, n_experts], logits),
            floats(DType::F32, &[n_experts], bias),
            output(DType::U32, &[n_rows, top_k]),
            output(DType::F32, &[n_rows, top_k]),
        ];
        case(name, &params, args)
    };
    let softmax = Routing {
        top_k: 8,
        sigmoid: false,
        normalise: true,
        scale: 1.0,
        n_groups: 1,
        top_groups: 1,
    };
    let deepseek = Routing {
        sigmoid: true,
        scale: 2.5,
        n_groups: 8,
        top_groups: 4,
        ..softmax
    };
    vec![
        make("Qwen3-30B-A3B", 5, 128, softmax),
        make(
            "not normalised",
            3,
            60,
            Routing {
                top_k: 4,
                normalise: false,
                ..softmax
            },
        ),
        make("ties", 7, 24, softmax),
        make("DeepSeek-V3", 4, 256, deepseek),
        make(
            "groups, not normalised",
            2,
            8,
            Routing {
                top_k: 3,
                normalise: false,
                n_groups: 4,
                top_groups: 2,
                ..deepseek
            },
        ),
        make(
            "one of one",
            1,
            1,
            Routing {
                top_k: 1,
                scale: 0.5,
                normalise: false,
                ..softmax
            },
        ),
        make(
            "many rows",
            37,
            72,
            Routing {
                top_k: 6,
                n_groups: 1,
                top_groups: 1,
                ..deepseek
            },
        ),
    ]
}
