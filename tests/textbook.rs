//! Is the textbook right? Every golden case it knows the model of, and its own canaries.
//!
//! The numbers in the golden files came from f32 programs, which differ from f64 by up to 1.4e-5.

#![allow(
    clippy::unwrap_used,
    reason = "in a test, a file that cannot be read is a failure"
)]

mod common;

use std::{collections::BTreeMap, fs, iter::zip};

use common::{
    golden::{self, Case, Event, Expected, HogwildCase, LogitsRows, PlainCase, Script},
    textbook::{Row, Textbook},
    tiny::{Random, TinyLatent, TinyModel, TinyRope},
};
use safetensors::Dtype;

const TOLERANCE: f64 = 2e-5;

/// How far a run was from what was expected.
#[derive(Debug, Default)]
struct Judge {
    compared: usize,
    worst_logit: f64,
    compared_kv: usize,
    worst_kv: f64,
    greedy: usize,
    wrong_greedy: usize,
}

impl Judge {
    fn logits(&mut self, got: &[f64], want: &[f32]) {
        self.compared += 1;
        self.worst_logit = self.worst_logit.max(distance(got, want));
    }

    fn kv(&mut self, got: &[f64], want: &[f32]) {
        self.compared_kv += 1;
        self.worst_kv = self.worst_kv.max(distance(got, want));
    }

    fn greedy(&mut self, got: u32, want: u32) {
        self.greedy += 1;
        self.wrong_greedy += usize::from(got != want);
    }

    fn accepts(&self) -> bool {
        let worst = self.worst_logit.max(self.worst_kv);
        self.compared > 0 && worst <= TOLERANCE && self.wrong_greedy == 0
    }
}

/// The largest difference; infinite if anything is missing or not a number.
fn distance(got: &[f64], want: &[f32]) -> f64 {
    if got.len() != want.len() {
        return f64::INFINITY;
    }
    let differences = zip(got, want).map(|(got, &want)| (got - f64::from(want)).abs());
    differences.fold(0.0, |worst, d| {
        if d.is_nan() {
            f64::INFINITY
        } else {
            worst.max(d)
        }
    })
}

fn argmax(logits: &[f64], forbidden: &[u32]) -> u32 {
    let allowed = zip(0u32.., logits).filter(|(id, _)| !forbidden.contains(id));
    allowed.max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0
}

fn run_plain(
    model: &mut Textbook,
    case: &PlainCase,
    expected: &BTreeMap<String, Expected>,
) -> Judge {
    let mut judge = Judge::default();
    let n_inputs = case.input_ids.len();
    let prefill = model.forward(&[Row::new(case.input_ids.as_slice(), 0..n_inputs)]);
    let prefill = &prefill[0];
    assert_eq!(
        prefill.len(),
        expected["prefill"].shape[0],
        "prefill has one row per input"
    );
    for (got, want) in zip(prefill, expected["prefill"].rows()) {
        judge.logits(got, want);
    }
    judge.greedy(argmax(&prefill[n_inputs - 1], &[]), case.greedy_tokens[0]);

    for (n, want) in expected["decode"].rows().enumerate() {
        let row = Row::new([case.greedy_tokens[n]], 0..=n_inputs + n);
        let logits = model.forward(&[row]);
        judge.logits(&logits[0][0], want);
        if let Some(&next) = case.greedy_tokens.get(n + 1) {
            judge.greedy(argmax(&logits[0][0], &[]), next);
        }
    }
    judge
}

/// Plays the script of a case. A block is a list of token numbers and nothing more.
///
/// `change` may spoil the rows of a pass, whose first new token it is told.
fn run_hogwild(
    model: &mut Textbook,
    case: &HogwildCase,
    expected: &BTreeMap<String, Expected>,
    change: impl Fn(usize, &mut [Row]),
) -> Judge {
    let mut judge = Judge::default();
    let mut blocks = BTreeMap::<String, Vec<usize>>::new();
    for event in &case.events {
        match event {
            Event::Forward(pass) => {
                let first = model.len();
                let mut next = first..;
                for row in &pass.rows {
                    let new = next.by_ref().take(row.tokens.len());
                    blocks.entry(row.write_to.clone()).or_default().extend(new);
                }
                let rows = pass.rows.iter().map(|row| {
                    let seen = row
                        .view
                        .iter()
                        .filter_map(|block| blocks.get(block))
                        .flatten();
                    Row::new(row.tokens.as_slice(), seen.copied())
                });
                let mut rows: Vec<_> = rows.collect();
                change(first, &mut rows);

                let logits = model.forward(&rows);
                for (n, (row, got)) in zip(&pass.rows, &logits).enumerate() {
                    let want = &expected[&row.logits];
                    let got_rows = match row.logits_rows {
                        LogitsRows::All => &got[..],
                        LogitsRows::Last => &got[got.len() - 1..],
                    };
                    assert_eq!(got_rows.len(), want.shape[0], "{}: rows", row.logits);
                    zip(got_rows, want.rows()).for_each(|(got, want)| judge.logits(got, want));
                    let last = got.last().unwrap();
                    if let Some(token) = row.argmax_last {
                        judge.greedy(argmax(last, &[]), token);
                    }
                    if let Some(chosen) = &pass.chosen_tokens {
                        judge.greedy(argmax(last, &case.forbidden()), chosen[n]);
                    }
                }
            }
            Event::Move(step) => {
                let tokens = blocks.insert(step.src.clone(), vec![]).unwrap();
                assert_eq!(tokens.len(), step.n_tokens, "the step has another length");
                blocks.entry(step.dst.clone()).or_default().extend(tokens);
            }
            Event::Note {} => {}
        }
    }

    for (name, want) in expected {
        if let Some(("kv", rest)) = name.split_once('.') {
            let parts: Vec<_> = rest.split('.').collect();
            let (tokens, layer) = (&blocks[parts[0]], parts[1].parse().unwrap());
            // Rows of `[n_kv_heads, block_len, width]`: of head 0 first.
            let (len, head_dim) = (want.shape[1], want.shape[2]);
            assert_eq!(tokens.len(), len, "{name}: length of the block");
            for (n, want) in want.rows().enumerate() {
                let (head, position) = (n / len, n % len);
                let got = match parts[2] {
                    "k" => model.key(layer, tokens[position], position),
                    _ => model.value(layer, tokens[position]).to_vec(),
                };
                judge.kv(&got[head * head_dim..(head + 1) * head_dim], want);
            }
        }
    }
    judge
}

#[test]
fn the_textbook_reproduces_every_golden_case_it_supports() {
    let mut failures = vec![];
    let mut n_run = 0;
    let cases = golden::cases(&golden::dir());
    for case in &cases {
        let Case { name, script, .. } = case;
        let mut model = match Textbook::load_for(&case.model_dir(), case.prompt_len()) {
            Ok(model) => model,
            Err(what) => {
                eprintln!("{name}: unsupported: {what}");
                continue;
            }
        };
        let judge = match script {
            Script::Plain(plain) => run_plain(&mut model, plain, &case.expected()),
            Script::Hogwild(hogwild) => {
                run_hogwild(&mut model, hogwild, &case.expected(), |_, _| {})
            }
        };
        eprintln!(
            "{name}: {} rows of logits within {:.1e}, {} of 'kv' within {:.1e}, {}/{} greedy",
            judge.compared,
            judge.worst_logit,
            judge.compared_kv,
            judge.worst_kv,
            judge.greedy - judge.wrong_greedy,
            judge.greedy,
        );
        n_run += 1;
        if !judge.accepts() {
            failures.push(name);
        }
    }
    assert!(n_run > 0, "no golden case in {}", golden::dir().display());
    assert!(failures.is_empty(), "beyond {TOLERANCE:e}: {failures:?}");
}

/// Plays the committed two-worker case with a mistake in it.
fn spoiled(change: impl Fn(usize, &mut [Row])) -> Judge {
    let cases = golden::cases("tests/golden".as_ref());
    let case = cases
        .iter()
        .find(|case| case.name == "hogwild_qwen3_contiguous_w2")
        .unwrap();
    let Script::Hogwild(script) = &case.script else {
        panic!("{}: wrong format", case.name)
    };
    let mut model = Textbook::load(&case.model_dir()).unwrap();
    run_hogwild(&mut model, script, &case.expected(), change)
}

#[test]
fn the_judge_accepts_the_case_that_is_spoiled_below() {
    assert!(
        spoiled(|_, _| {}).accepts(),
        "the canaries below need a healthy case"
    );
}

#[test]
fn the_judge_rejects_rows_blind_to_the_others_new_tokens() {
    let judge = spoiled(|first, rows| {
        let mut own = first;
        for row in rows {
            let end = own + row.tokens.len();
            // Positions stay as they are: only the sight is lost.
            row.view
                .retain(|seen| seen.token < first || (own..end).contains(&seen.token));
            own = end;
        }
    });
    assert!(judge.worst_logit > 0.1, "{judge:?}");
}

#[test]
fn the_judge_rejects_queries_that_do_not_count_the_others_new_tokens() {
    let judge = spoiled(|first, rows| {
        for row in rows {
            let n_own = row.tokens.len();
            let n_new = row.view.iter().filter(|seen| seen.token >= first).count();
            let own = row.view.len() - n_own..;
            row.view[own]
                .iter_mut()
                .for_each(|seen| seen.position -= n_new - n_own);
        }
    });
    assert!(judge.worst_logit > 0.1, "{judge:?}");
}

#[test]
fn the_judge_rejects_keys_that_are_one_position_off() {
    let judge = spoiled(|first, rows| {
        for row in rows {
            let old = row
                .view
                .iter_mut()
                .filter(|seen| seen.token < first && seen.position > 0);
            old.for_each(|seen| seen.position -= 1);
        }
    });
    assert!(judge.worst_logit > 0.1, "{judge:?}");
}

#[test]
fn the_judge_rejects_what_is_not_a_number() {
    let mut judge = Judge::default();
    judge.logits(&[0.5, f64::NAN, 0.5], &[0.5; 3]);
    judge.logits(&[0.5; 3], &[0.5; 3]);
    assert!(!judge.accepts(), "{judge:?}");
}

#[test]
fn inverse_frequencies_are_those_of_transformers() {
    #[derive(serde::Deserialize)]
    struct Want {
        inv_freq: Vec<f32>,
        cos_sin_multiplier: f64,
    }
    let mut wanted = BTreeMap::new();
    let path = golden::dir().join("rope_inv_freq.json");
    if let Ok(json) = fs::read(&path) {
        wanted = serde_json::from_slice::<BTreeMap<String, Want>>(&json).unwrap();
    }
    for (name, want) in wanted {
        let dir = golden::dir().join(&name);
        // Of LongRoPE it has those of short texts.
        let Some(Ok(model)) = dir.is_dir().then(|| Textbook::load(&dir)) else {
            continue;
        };
        let (inv_freq, multiplier) = model.rope();
        eprintln!(
            "{name}: inverse frequencies off by {:.1e}",
            relative(inv_freq, &want.inv_freq)
        );
        assert!(
            relative(inv_freq, &want.inv_freq) < 3e-7,
            "{name}: {inv_freq:?}"
        );
        assert!(
            (multiplier - want.cos_sin_multiplier).abs() < 1e-12,
            "{name}: {multiplier}"
        );
    }
}

/// Largest relative difference; infinite if there are too few or too many.
fn relative(got: &[f32], want: &[f32]) -> f32 {
    if got.len() != want.len() {
        return f32::INFINITY;
    }
    zip(got, want)
        .map(|(got, want)| ((got - want) / want).abs())
        .fold(0.0, f32::max)
}

#[test]
fn yarn_slows_the_channels_that_transformers_slows() {
    // Of transformers 4.51.3 for head_dim 16, theta 1e6, factor 4, original 128.
    let want: [f32; 8] = [
        1.0,
        0.111_142_464,
        0.007_905_695,
        0.001_405_853_3,
        0.000_25,
        0.000_044_456_985,
        0.000_007_905_694,
        0.000_001_405_853_4,
    ];
    let dir = tempfile::tempdir().unwrap();
    let rope = TinyRope::Yarn {
        factor: 4.0,
        original: 128,
    };
    TinyModel {
        rope,
        ..TinyModel::default()
    }
    .write(dir.path(), "yarn");
    let config = dir.path().join("config.json");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(
        &config,
        text.replace("\"rope_theta\":10000.0", "\"rope_theta\":1000000.0"),
    )
    .unwrap();

    let model = Textbook::load(dir.path()).unwrap();
    let (inv_freq, multiplier) = model.rope();

    assert!(relative(inv_freq, &want) < 3e-7, "{inv_freq:?}");
    assert!(
        (multiplier - 1.138_629_436_111_989).abs() < 1e-12,
        "{multiplier}"
    );
}

/// Every mechanism of the tiny models at least once.
#[expect(clippy::too_many_lines, reason = "a table")]
fn tiny_models() -> Vec<(&'static str, TinyModel)> {
    let base = TinyModel::default;
    let llama3 = TinyRope::Llama3 {
        factor: 8.0,
        original: 32,
    };
    let yarn = TinyRope::Yarn {
        factor: 4.0,
        original: 32,
    };
    let longrope = TinyRope::LongRope {
        factor: 8.0,
        original: 32,
    };
    vec![
        ("llama", base()),
        (
            "llama of one kv head",
            TinyModel {
                kv_heads: 1,
                rope: llama3,
                ..base()
            },
        ),
        (
            "qwen2",
            TinyModel {
                bias: true,
                rope: yarn,
                dtype: Dtype::F16,
                ..base()
            },
        ),
        (
            "qwen3",
            TinyModel {
                qk_norm: true,
                head_dim: 32,
                dtype: Dtype::BF16,
                ..base()
            },
        ),
        (
            "tied with everything",
            TinyModel {
                qk_norm: true,
                bias: true,
                tied: true,
                ..base()
            },
        ),
        (
            "phi3",
            TinyModel {
                fused: true,
                rotary: 0.5,
                window: Some(9),
                ..base()
            },
        ),
        (
            "phi3 of a long context",
            TinyModel {
                fused: true,
                rotary: 0.75,
                rope: longrope,
                new_config: true,
                ..base()
            },
        ),
        (
            "mistral",
            TinyModel {
                window: Some(5),
                ..base()
            },
        ),
        (
            "deepseek_v3",
            TinyModel {
                rope: yarn,
                latent: Some(TinyLatent {
                    q_rank: Some(20),
                    rank: 24,
                    nope: 12,
                    rope: 8,
                    v: 20,
                    interleaved: true,
                }),
                ..base()
            },
        ),
        (
            "one head, one layer",
            TinyModel {
                heads: 1,
                kv_heads: 1,
                layers: 1,
                ..base()
            },
        ),
    ]
}

#[test]
fn logits_of_tiny_models_have_a_standard_deviation_of_about_one() {
    for (name, tiny) in tiny_models() {
        let dir = tempfile::tempdir().unwrap();
        tiny.write(dir.path(), name);
        let mut model = Textbook::load(dir.path()).unwrap();
        let mut random = Random::new(name);
        let tokens: Vec<_> = (0..40).map(|_| token(&mut random, &tiny)).collect();

        let logits = model.forward(&[Row::new(tokens, 0..40)]).concat().concat();

        let n = logits.len() as f64;
        let mean = logits.iter().sum::<f64>() / n;
        let std = (logits.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n).sqrt();
        eprintln!("{name}: mean {mean:.2}, standard deviation {std:.2}");
        assert!((0.7..1.5).contains(&std), "{name}: {std}");
    }
}

fn token(random: &mut Random, tiny: &TinyModel) -> u32 {
    u32::try_from(random.below(tiny.vocab)).unwrap()
}

#[test]
fn a_model_is_the_same_files_for_the_same_name() {
    let dirs = [(); 3].map(|()| tempfile::tempdir().unwrap());
    for (dir, seed) in zip(&dirs, ["a", "a", "b"]) {
        TinyModel::default().write(dir.path(), seed);
    }
    let files = dirs
        .each_ref()
        .map(|dir| fs::read(dir.path().join("model.safetensors")).unwrap());
    assert_eq!(
        files[0], files[1],
        "the seed is all the randomness there is"
    );
    assert_ne!(files[0], files[2], "the seed matters");
}

#[test]
fn tokens_fed_one_by_one_are_tokens_fed_at_once() {
    for (name, tiny) in tiny_models() {
        let dir = tempfile::tempdir().unwrap();
        tiny.write(dir.path(), name);
        let tokens = [5, 17, 17, 80, 3, 41, 9];
        let mut at_once = Textbook::load(dir.path()).unwrap();
        let mut one_by_one = at_once.clone();

        let want = at_once.forward(&[Row::new(tokens, 0..7)]);
        for (n, token) in tokens.into_iter().enumerate() {
            let got = one_by_one.forward(&[Row::new([token], 0..=n)]);
            let d = zip(&got[0][0], &want[0][n])
                .map(|(a, b)| (a - b).abs())
                .fold(0.0, f64::max);
            assert!(d < 1e-12, "{name}: token {n} is off by {d:e}");
        }
    }
}

#[test]
fn only_differences_of_positions_matter() {
    for (name, tiny) in tiny_models() {
        let dir = tempfile::tempdir().unwrap();
        tiny.write(dir.path(), name);
        let mut near = Textbook::load(dir.path()).unwrap();
        let mut far = near.clone();
        // Two rows that see each other's new tokens before their own.
        let rows = [
            Row::new([5, 17, 17], [3, 4, 0, 1, 2]),
            Row::new([80, 3], [0, 1, 2, 3, 4]),
        ];
        let mut shifted = rows.clone();
        for (row, shift) in zip(&mut shifted, [100_000, 7]) {
            row.view.iter_mut().for_each(|seen| seen.position += shift);
        }

        let want = near.forward(&rows).concat().concat();
        let got = far.forward(&shifted).concat().concat();

        let d = zip(&got, &want)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f64::max);
        assert!(d < 1e-9, "{name}: off by {d:e}");
    }
}

#[test]
fn an_unsupported_model_says_why() {
    let dir = tempfile::tempdir().unwrap();
    TinyModel::default().write(dir.path(), "unsupported");
    let config = dir.path().join("config.json");
    let text = fs::read_to_string(&config).unwrap();
    for (from, to, why) in [
        ("\"llama\"", "\"gemma\"", "model type gemma"),
        ("\"silu\"", "\"gelu\"", "activation gelu"),
        (
            "\"rope_scaling\":null",
            "\"rope_scaling\":{\"type\":\"dynamic\"}",
            "rope type dynamic",
        ),
    ] {
        assert!(text.contains(from), "the config says {from}");
        fs::write(&config, text.replace(from, to)).unwrap();
        assert_eq!(Textbook::load(dir.path()).unwrap_err(), why);
    }
}
