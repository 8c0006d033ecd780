//! Choice of a token: `ids[i]` is what the sampler chooses from row `i` of the logits.
//!
//! [`crate::sampler`] defines the result, and every kernel gives the same ids: nothing here is rounded.

use bytemuck::{Pod, Zeroable};
use rayon::prelude::*;

use super::case::{Rng, case, floats, output, words};
use super::u32_of;
use crate::device::Access::{Read, Write};
use crate::device::{
    Args, Caps, Case, DType, Dispatch, Kernel, Op, Recording, Run, Tensor, Tolerance, Wgsl,
};
use crate::sampler::Sampling;
pub use crate::sampler::{Rule, mask};

/// The id that stands for no token: the model computed no number, or everything is suppressed.
pub const NONE: u32 = u32::MAX;

/// Most tokens of a vocabulary that the shader sums without overflow.
const MOST: usize = 1 << 21;

/// The op.
pub static OP: Op = Op {
    name: "sample",
    summary: "ids = one token for each row of logits, by temperature, top-k, top-p and min-p",
    params: &[
        "n_rows", "vocab", "limit", "top_k", "inverse", "may_go", "least",
    ],
    args: &[
        ("logits", Read),
        ("suppressed", Read),
        ("draws", Read),
        ("ids", Write),
    ],
    reference: choose,
    kernels: &[
        // A row has one workgroup, which is best as wide as can be: it waits for memory.
        Kernel {
            name: "wide",
            run: Run::Wgsl(wgsl(|_, _| vec![("LANES", 1024)])),
            // A small vocabulary does not keep so many lanes busy.
            fits: |d, caps| caps.lanes >= 1024 && (4097..=MOST).contains(&d.args[0].cols()),
        },
        Kernel {
            name: "narrow",
            run: Run::Wgsl(wgsl(|_, _| vec![("LANES", 256)])),
            fits: |d, _| d.args[0].cols() <= MOST,
        },
        Kernel {
            name: "rows",
            run: Run::Cpu(choose),
            fits: |_, _| true,
        },
    ],
    cases,
    tolerance: Tolerance::with_abs(0.0),
};

const fn wgsl(consts: fn(&Dispatch, &Caps) -> Vec<(&'static str, u32)>) -> Wgsl {
    Wgsl {
        file: "shaders/sample.wgsl",
        source: include_str!("../../shaders/sample.wgsl"),
        consts,
        elements: &[],
        groups: |d, _| [d.params.get::<Params>().n_rows, 1, 1],
        loads: None,
    }
}

/// Uniform of `sample.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Params {
    n_rows: u32,
    vocab: u32,
    limit: u32,
    top_k: u32,
    inverse: f32,
    may_go: u32,
    least: u32,
}

impl Params {
    fn new(rule: &Rule, vocab: usize, n_rows: usize) -> Self {
        Self {
            n_rows: u32_of(n_rows),
            vocab: u32_of(vocab),
            limit: rule.limit.min(u32_of(vocab)),
            top_k: rule.top_k,
            inverse: rule.inverse,
            may_go: rule.may_go,
            least: rule.least,
        }
    }
}

/// Records the choice of a token for each of the first `n_rows` rows of `logits`; [`NONE`] where there
/// is none.
///
/// Shapes: `logits` `[>= n_rows, vocab]` f32, `suppressed` `[>= vocab / 32]` the bits of
/// [`mask`], `draws` `[>= n_rows, 2]` the lower and the upper half of each row's 64 random bits,
/// `ids` `[>= n_rows]`.
///
/// # Panics
/// If the mask is shorter than the vocabulary, or the limit leaves no token.
pub fn sample(
    r: &mut Recording,
    rule: &Rule,
    logits: &Tensor,
    [suppressed, draws]: [&Tensor; 2],
    ids: &Tensor,
    n_rows: usize,
) {
    let vocab = logits.cols();
    assert!(
        suppressed.len() * 32 >= vocab,
        "sample: the mask has a bit for each token"
    );
    assert!(rule.limit > 0, "sample: the limit leaves no token");
    let params = Params::new(rule, vocab, n_rows);
    r.push(&OP, &params, &[logits, suppressed, draws, ids]);
}

fn choose(args: &mut Args<'_>) {
    let p: Params = args.params();
    let [logits, suppressed, draws, mut ids] = args.views();
    let rule = Rule {
        inverse: p.inverse,
        top_k: p.top_k,
        may_go: p.may_go,
        least: p.least,
        limit: p.limit,
    };
    let (logits, mask, draws) = (logits.f32s(), suppressed.u32s(), draws.u32s());
    let ids = &mut ids.u32s_mut()[..p.n_rows as usize];
    let rows = logits.par_chunks_exact(p.vocab as usize);
    ids.par_iter_mut()
        .zip(rows.zip(draws.par_chunks_exact(2)))
        .for_each(|(id, (row, draw))| {
            let draw = u64::from(draw[0]) | u64::from(draw[1]) << 32;
            *id = rule.choose(row, mask, draw).unwrap_or(NONE);
        });
}

/// The words of a mask and draws for a number of rows.
fn inputs(
    suppressed: &[u32],
    vocab: usize,
    n: usize,
    rng: &mut Rng,
) -> [crate::device::CaseArg; 2] {
    let mask = mask(suppressed, vocab);
    let half = |n: u64| u32::try_from(n >> 32).expect("32 bits");
    let draws = (0..2 * n).map(|_| half(rng.next())).collect();
    [words(&[mask.len()], mask), words(&[n, 2], draws)]
}

#[expect(clippy::too_many_lines, reason = "a list, read from top to bottom")]
fn cases() -> Vec<Case> {
    let make = |name: &str, s: Sampling, suppressed: &[u32], vocab: usize, rows: Vec<Vec<f32>>| {
        let n = rows.len();
        let params = Params::new(&s.rule(), vocab, n);
        let [mask, draws] = inputs(suppressed, vocab, n, &mut Rng::named(name));
        let logits = floats(DType::F32, &[n, vocab], rows.concat());
        let ids = output(DType::U32, &[n]);
        case(name, &params, vec![logits, mask, draws, ids])
    };
    let noise = |name: &str, n: usize, vocab: usize, scale: f32| -> Vec<Vec<f32>> {
        let mut rng = Rng::named(name);
        (0..n).map(|_| rng.scaled(vocab, scale)).collect()
    };
    // A few values, each many times.
    let steps = |n: usize, vocab: usize| -> Vec<Vec<f32>> {
        let row = |at: usize| (0..vocab).map(|i| ((i * 7 + at) % 5) as f32).collect();
        (0..n).map(row).collect()
    };
    let greedy = Sampling::greedy();
    let warm = Sampling {
        temperature: 1.0,
        ..greedy
    };
    let all = Sampling {
        temperature: 0.6,
        top_k: 20,
        top_p: 0.95,
        min_p: 0.05,
        ..greedy
    };
    let limited = |s: Sampling, limit| Sampling {
        limit: Some(limit),
        ..s
    };
    let masked = |s: Sampling| {
        let inf = f32::NEG_INFINITY;
        make(
            "nothing, something and no number",
            s,
            &[0],
            5,
            vec![
                vec![1.0, inf, inf, inf, inf],
                vec![f32::NAN, 1.0, 1.0, 2.0, 0.0],
                vec![1.0, inf, -0.0, 0.0, 1e-40],
                vec![0.0, f32::INFINITY, 1.0, 1.0, 1.0],
                vec![0.0, f32::MIN, f32::MIN, inf, inf],
                vec![f32::MAX, f32::MAX, 3e38, 1e30, f32::MIN],
                vec![0.0, 0.0, 0.0, 0.0, -f32::NAN],
            ],
        )
    };
    vec![
        make("the only token", greedy, &[], 1, vec![vec![-3.0]]),
        make("the lowest of equals", greedy, &[3], 17, steps(3, 17)),
        make(
            "padding is not seen",
            limited(greedy, 2),
            &[],
            4,
            vec![vec![0.0, 1.0, 2.0, 3.0], vec![0.5, 0.0, f32::NAN, 9.0]],
        ),
        masked(greedy),
        masked(warm),
        make(
            "temperature alone",
            warm,
            &[1, 5],
            1757,
            noise("temperature", 16, 1757, 6.0),
        ),
        make(
            "top-k alone",
            Sampling { top_k: 3, ..warm },
            &[],
            17,
            noise("top-k", 16, 17, 2.0),
        ),
        make(
            "top-k of more ties than the list holds",
            Sampling { top_k: 5, ..warm },
            &[],
            4096,
            steps(8, 4096),
        ),
        make(
            "a wide top-k",
            Sampling { top_k: 700, ..warm },
            &[],
            1757,
            noise("wide", 8, 1757, 3.0),
        ),
        make(
            "top-k of more than there are",
            Sampling { top_k: 50, ..warm },
            &[],
            17,
            noise("few", 4, 17, 1.0),
        ),
        make(
            "top-p alone",
            Sampling { top_p: 0.5, ..warm },
            &[],
            17,
            noise("top-p", 16, 17, 2.0),
        ),
        make(
            "top-p among ties",
            Sampling { top_p: 0.3, ..warm },
            &[],
            1757,
            steps(16, 1757),
        ),
        make(
            "top-p of nothing",
            Sampling { top_p: 0.0, ..warm },
            &[],
            1757,
            steps(4, 1757),
        ),
        make(
            "min-p alone",
            Sampling { min_p: 0.3, ..warm },
            &[],
            17,
            noise("min-p", 16, 17, 2.0),
        ),
        make(
            "min-p on the border",
            // One halving for each unit of distance.
            Sampling {
                temperature: std::f32::consts::LOG2_E,
                min_p: 0.5,
                ..greedy
            },
            &[],
            64,
            steps(16, 64),
        ),
        make(
            "all together",
            limited(all, 1500),
            &[7],
            1757,
            noise("all", 16, 1757, 6.0),
        ),
        make(
            "a tiny temperature",
            Sampling {
                temperature: 1e-30,
                ..warm
            },
            &[],
            17,
            noise("tiny", 4, 17, 1.0),
        ),
        make(
            "a huge temperature",
            Sampling {
                temperature: 1e38,
                ..warm
            },
            &[],
            1757,
            noise("huge", 4, 1757, 100.0),
        ),
        make(
            "Qwen's vocabulary",
            all,
            &[151_643],
            151_936,
            noise("Qwen", 3, 151_936, 12.0),
        ),
        make(
            "a large vocabulary, nearly even",
            Sampling {
                top_p: 0.9,
                temperature: 2.0,
                ..warm
            },
            &[],
            262_145,
            noise("large", 2, 262_145, 4.0),
        ),
    ]
}
