//! Quantised checkpoints, through the real loader, against the textbook on the weights that they mean.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]
#![allow(
    clippy::print_stdout,
    reason = "the numbers of every case are for people"
)]

#[path = "common/adapter.rs"]
mod adapter;
mod common;

use std::fs;
use std::path::Path;
use std::sync::Arc;

use common::packed::{self, Order, Packing, Style};
use common::textbook::{Row, Textbook};
use common::tiny::TinyModel;
use hogwild::cache::plan::Logits;
use hogwild::device::{DType, Device};
use hogwild::model::quantize::{Options, quantize};
use hogwild::model::{Engine, Model, ModelFiles};
use safetensors::Dtype;

/// Logits have a standard deviation of about 1.
const TOLERANCE: f64 = 1e-4;

/// Prompt and, after it, tokens that are fed one by one.
const TOKENS: [u32; 24] = [
    5, 17, 3, 90, 41, 8, 8, 77, 23, 60, 12, 95, 1, 33, 54, 70, 29, 6, 88, 19, 47, 64, 2, 81,
];

fn logits(device: &Arc<Device>, dir: &Path) -> Vec<Vec<f32>> {
    let files = ModelFiles::open(dir).unwrap_or_else(|e| panic!("{e}"));
    let mut read = 0;
    let model = Model::load(device.clone(), &files, 64, &mut |bytes| read += bytes).unwrap();
    assert_eq!(read, files.weight_bytes(), "every tensor is read once");
    let mut engine = Engine::new(Arc::new(model), DType::F32, 16, false).unwrap();
    let block = engine.cache.pages.open();
    let (prompt, rest) = TOKENS.split_at(20);
    let mut out = engine.prefill(block, prompt, Logits::All).unwrap();
    for token in rest {
        out.extend(engine.prefill(block, &[*token], Logits::All).unwrap());
    }
    out
}

fn textbook(dir: &Path) -> Vec<Vec<f64>> {
    let mut model = Textbook::load(dir).unwrap();
    model
        .forward(&[Row::new(TOKENS, 0..TOKENS.len())])
        .remove(0)
}

fn distance(got: &[Vec<f32>], want: &[Vec<f64>]) -> f64 {
    assert_eq!(got.len(), want.len(), "a row for each token");
    let pairs = got.iter().flatten().zip(want.iter().flatten());
    pairs.fold(0.0, |worst: f64, (g, w)| {
        let d = (f64::from(*g) - w).abs();
        if d.is_nan() {
            f64::INFINITY
        } else {
            worst.max(d)
        }
    })
}

/// Widths that fill neither spans of 128 nor groups.
fn model() -> TinyModel {
    TinyModel {
        hidden: 96,
        ff: 160,
        bias: true,
        dtype: Dtype::F16,
        ..TinyModel::default()
    }
}

#[test]
fn every_format_computes_what_its_weights_mean() {
    use Style::{Awq, Compressed, Gptq, GptqV2};
    let (base, eight) = (Packing::default(), 8);
    let llama = TinyModel {
        bias: false,
        dtype: Dtype::BF16,
        ..model()
    };
    let qwen3 = TinyModel {
        qk_norm: true,
        bias: false,
        tied: true,
        ..model()
    };
    let odd = TinyModel {
        ff: 172,
        hidden: 64,
        ..model()
    };
    let wide = TinyModel {
        hidden: 320,
        ff: 408,
        heads: 8,
        ..model()
    };
    let cases = [
        (
            "awq in groups of 32",
            model(),
            Packing { style: Awq, ..base },
        ),
        (
            "awq in groups of 64",
            llama.clone(),
            Packing {
                style: Awq,
                group: Some(64),
                ..base
            },
        ),
        (
            "awq in groups of 128",
            wide.clone(),
            Packing {
                style: Awq,
                group: Some(128),
                ..base
            },
        ),
        (
            "awq in whole rows",
            qwen3.clone(),
            Packing {
                style: Awq,
                group: None,
                ..base
            },
        ),
        ("gptq", model(), base),
        (
            "gptq, symmetric",
            llama.clone(),
            Packing {
                symmetric: true,
                group: Some(64),
                ..base
            },
        ),
        (
            "gptq v2",
            wide.clone(),
            Packing {
                style: GptqV2,
                group: Some(128),
                ..base
            },
        ),
        (
            "gptq in whole rows",
            model(),
            Packing {
                group: None,
                ..base
            },
        ),
        (
            "gptq in 8 bits",
            model(),
            Packing {
                bits: eight,
                ..base
            },
        ),
        (
            "gptq v2 in 8 bits",
            qwen3.clone(),
            Packing {
                style: GptqV2,
                bits: eight,
                group: Some(64),
                ..base
            },
        ),
        (
            "gptq in an order",
            model(),
            Packing {
                order: Order::Shared,
                ..base
            },
        ),
        (
            "gptq in an order, wide",
            wide.clone(),
            Packing {
                order: Order::Shared,
                group: Some(64),
                ..base
            },
        ),
        (
            "gptq in an order, with norms of heads",
            qwen3.clone(),
            Packing {
                order: Order::Shared,
                ..base
            },
        ),
        (
            "gptq in orders apart",
            model(),
            Packing {
                order: Order::Apart,
                ..base
            },
        ),
        (
            "gptq in an order and 8 bits",
            llama.clone(),
            Packing {
                order: Order::Shared,
                bits: eight,
                ..base
            },
        ),
        (
            "compressed",
            odd.clone(),
            Packing {
                style: Compressed,
                ..base
            },
        ),
        (
            "compressed, symmetric",
            odd.clone(),
            Packing {
                style: Compressed,
                symmetric: true,
                ..base
            },
        ),
        (
            "compressed in 8 bits",
            odd.clone(),
            Packing {
                style: Compressed,
                bits: eight,
                group: None,
                symmetric: true,
                ..base
            },
        ),
        (
            "compressed in 8 bits with zero points",
            wide,
            Packing {
                style: Compressed,
                bits: eight,
                group: Some(128),
                ..base
            },
        ),
        (
            "compressed in an order",
            odd,
            Packing {
                style: Compressed,
                order: Order::Shared,
                ..base
            },
        ),
        (
            "awq with a float among the queries",
            model(),
            Packing {
                style: Awq,
                float: &["q_proj.weight", "down_proj.weight"],
                ..base
            },
        ),
    ];
    let devices: Vec<_> = adapter::devices().into_iter().map(Arc::new).collect();
    for (name, model, packing) in cases {
        let dir = tempfile::tempdir().unwrap();
        let [float, packed, twin] = ["float", "packed", "twin"].map(|n| dir.path().join(n));
        model.write(&float, name);
        packed::pack(&float, &packed, &twin, &packing);
        hogwild::model::check(&packed).unwrap_or_else(|e| panic!("{name}: {e}"));
        let want = textbook(&twin);
        for device in &devices {
            let d = distance(&logits(device, &packed), &want);
            println!("{name} on {}: {d:.1e}", device.name());
            assert!(
                d <= TOLERANCE,
                "{name} on {}: a logit is off by {d}",
                device.name()
            );
        }
        // Not because codes do not matter.
        let far = distance(&logits(&devices[0], &float), &want);
        assert!(
            far > 10.0 * TOLERANCE,
            "{name}: the float model is as near: {far}"
        );
    }
}

#[test]
fn a_shape_that_is_another_and_an_order_that_says_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let [float, packed, twin] = ["float", "packed", "twin"].map(|n| dir.path().join(n));
    model().write(&float, "shape");
    let packing = Packing {
        style: Style::Compressed,
        order: Order::Shared,
        ..Packing::default()
    };
    packed::pack(&float, &packed, &twin, &packing);
    let (config, tensors) = (packed::config(&packed), packed::read(&packed));
    let stem = "model.layers.1.mlp.up_proj";

    let mut changed = tensors.clone();
    let shape = changed.get_mut(&format!("{stem}.weight_shape")).unwrap();
    shape.2[0] = 152;
    packed::write(&packed, &config, &changed);
    let error = hogwild::model::check(&packed)
        .expect_err("another shape")
        .to_string();
    assert!(
        error.contains("up_proj.weight_shape: is [152, 96], expected [160, 96]"),
        "said: {error}"
    );

    let mut changed = tensors.clone();
    for (name, (_, _, bytes)) in &mut changed {
        if name.ends_with("g_idx") {
            bytes.fill(0xff);
        }
    }
    packed::write(&packed, &config, &changed);
    hogwild::model::check(&packed).expect("-1 says that channels are where they are");

    let mut changed = tensors;
    let order = changed.get_mut(&format!("{stem}.weight_g_idx")).unwrap();
    order.2[..4].fill(0xff);
    packed::write(&packed, &config, &changed);
    let error = hogwild::model::check(&packed)
        .expect_err("one -1 is no order")
        .to_string();
    assert!(
        error.contains("weight_g_idx: element 0: -1 is none of the 3 groups"),
        "said: {error}"
    );
}
