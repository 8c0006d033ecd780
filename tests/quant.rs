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
use std::process::Command;
use std::sync::Arc;

use common::packed::{self, Order, Packing, Style};
use common::textbook::{Row, Textbook};
use common::tiny::{TinyLatent, TinyModel};
use hogwild::cache::plan::Logits;
use hogwild::device::{DType, Device};
use hogwild::model::quantize::{Options, quantize};
use hogwild::model::{Config, Engine, Model, ModelFiles, RandomWeights};
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

/// A latent and experts: what makes keys and values is taken apart, and widened for that.
fn latent() -> TinyModel {
    TinyModel {
        bias: false,
        latent: Some(TinyLatent {
            q_rank: Some(40),
            rank: 24,
            nope: 16,
            rope: 8,
            v: 24,
            interleaved: true,
        }),
        ..model()
    }
}

/// A packing in few words: group 0 is a whole row.
fn packing(style: Style, bits: usize, group: usize, order: Order) -> Packing {
    Packing {
        style,
        bits,
        group: Some(group).filter(|&group| group > 0),
        order,
        ..Packing::default()
    }
}

fn symmetric(packing: Packing) -> Packing {
    Packing {
        symmetric: true,
        ..packing
    }
}

/// Widths of heads, residual and feed-forward that differ, with and without biases, norms and ties.
fn cases() -> Vec<(&'static str, TinyModel, Packing)> {
    use Order::{Apart, Plain, Shared};
    use Style::{Awq, Compressed, Gptq, GptqV2};
    let sized = |hidden, heads, ff| TinyModel {
        hidden,
        heads,
        ff,
        ..model()
    };
    let (qwen2, odd, wide) = (model(), sized(64, 4, 172), sized(320, 8, 408));
    let llama = TinyModel {
        bias: false,
        dtype: Dtype::BF16,
        ..model()
    };
    let qwen3 = TinyModel {
        qk_norm: true,
        tied: true,
        ..llama.clone()
    };
    // Heads that are rotated in part, whose rows are stored in another order.
    let phi3 = |ff| TinyModel {
        fused: true,
        rotary: 0.5,
        ff,
        ..llama.clone()
    };
    let parts = TinyModel {
        rotary: 0.75,
        ..qwen2.clone()
    };
    let latent = latent();
    let but_router = Packing {
        float: &["mlp.gate.weight"],
        ..packing(Compressed, 4, 32, Plain)
    };
    let [q, l, n, o, w] = [&qwen2, &llama, &qwen3, &odd, &wide];
    let [p, f, uneven] = [&parts, &phi3(160), &phi3(172)];
    let some_float = Packing {
        float: &["q_proj.weight", "down_proj.weight"],
        ..packing(Awq, 4, 32, Plain)
    };
    let rows = [
        ("awq in groups of 32", q, packing(Awq, 4, 32, Plain)),
        ("awq in groups of 64", l, packing(Awq, 4, 64, Plain)),
        ("awq in groups of 128", w, packing(Awq, 4, 128, Plain)),
        ("awq in whole rows", n, packing(Awq, 4, 0, Plain)),
        ("awq with floats in between", q, some_float),
        ("gptq", q, packing(Gptq, 4, 32, Plain)),
        ("gptq, symmetric", l, symmetric(packing(Gptq, 4, 64, Plain))),
        ("gptq in whole rows", q, packing(Gptq, 4, 0, Plain)),
        ("gptq in 8 bits", q, packing(Gptq, 8, 32, Plain)),
        ("gptq in an order", q, packing(Gptq, 4, 32, Shared)),
        ("gptq in an order, wide", w, packing(Gptq, 4, 64, Shared)),
        ("gptq in an order, norms", n, packing(Gptq, 4, 32, Shared)),
        ("gptq in an order, 8 bits", l, packing(Gptq, 8, 32, Shared)),
        ("gptq in orders apart", q, packing(Gptq, 4, 32, Apart)),
        ("awq, fused", f, packing(Awq, 4, 32, Plain)),
        ("gptq in an order, fused", f, packing(Gptq, 4, 32, Shared)),
        (
            "compressed, fused",
            uneven,
            packing(Compressed, 8, 32, Plain),
        ),
        (
            "gptq in orders apart, parts of heads",
            p,
            packing(Gptq, 4, 32, Apart),
        ),
        ("gptq v2", w, packing(GptqV2, 4, 128, Plain)),
        ("gptq v2 in 8 bits", n, packing(GptqV2, 8, 64, Plain)),
        ("compressed", o, packing(Compressed, 4, 32, Plain)),
        (
            "compressed, symmetric",
            o,
            symmetric(packing(Compressed, 4, 32, Plain)),
        ),
        (
            "compressed in rows of 8 bits",
            o,
            symmetric(packing(Compressed, 8, 0, Plain)),
        ),
        (
            "compressed in 8 bits",
            w,
            packing(Compressed, 8, 128, Plain),
        ),
        ("compressed, a latent and experts", &latent, but_router),
        (
            "compressed in an order",
            o,
            packing(Compressed, 4, 32, Shared),
        ),
    ];
    rows.map(|(name, model, packing)| (name, model.clone(), packing))
        .into()
}

#[test]
fn every_format_computes_what_its_weights_mean() {
    let devices: Vec<_> = adapter::devices().into_iter().map(Arc::new).collect();
    for (name, model, packing) in cases() {
        computes(&devices, name, &model, &packing);
    }
}

/// Packs a model and holds every device to the textbook on what it means.
fn computes(devices: &[Arc<Device>], name: &str, model: &TinyModel, packing: &Packing) {
    let dir = tempfile::tempdir().unwrap();
    let [float, packed, twin] = ["float", "packed", "twin"].map(|n| dir.path().join(n));
    model.write(&float, name);
    packed::pack(&float, &packed, &twin, packing);
    hogwild::model::check(&packed).unwrap_or_else(|e| panic!("{name}: {e}"));
    let want = textbook(&twin);
    for device in devices {
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

#[test]
fn floats_of_eight_bits_compute_what_they_mean() {
    let devices: Vec<_> = adapter::devices().into_iter().map(Arc::new).collect();
    let packing = |style, rows: usize, group: usize| Packing {
        style,
        rows: Some(rows).filter(|&n| n > 0),
        group: Some(group).filter(|&n| n > 0),
        ..Packing::default()
    };
    let odd = TinyModel {
        hidden: 64,
        ff: 172,
        ..model()
    };
    let wide = TinyModel {
        hidden: 320,
        heads: 8,
        ff: 408,
        ..model()
    };
    // Heads that are rotated in part, in a tensor whose blocks do not end where they do.
    let phi3 = TinyModel {
        fused: true,
        rotary: 0.5,
        ff: 172,
        bias: false,
        dtype: Dtype::BF16,
        ..model()
    };
    let some_float = Packing {
        float: &["q_proj.weight", "down_proj.weight"],
        ..packing(Style::Fp8, 64, 32)
    };
    let (every, one) = (&devices[..], &devices[..1]);
    for (name, model, packing, devices) in [
        (
            "fp8 in blocks of 128",
            &wide,
            packing(Style::Fp8, 128, 128),
            every,
        ),
        (
            "fp8 in narrow blocks",
            &phi3,
            packing(Style::Fp8, 40, 32),
            every,
        ),
        ("fp8 in whole tensors", &odd, packing(Style::Fp8, 0, 0), one),
        ("fp8 with floats in between", &odd, some_float, one),
        (
            "floats in blocks",
            &wide,
            packing(Style::Floats, 128, 64),
            one,
        ),
        ("floats in rows", &odd, packing(Style::Floats, 1, 0), one),
        (
            "floats in whole tensors",
            &phi3,
            packing(Style::Floats, 0, 0),
            one,
        ),
    ] {
        computes(devices, name, model, &packing);
    }
}

#[test]
fn experts_of_every_format_compute_what_they_mean() {
    let devices: Vec<_> = adapter::devices().into_iter().map(Arc::new).collect();
    let moe = TinyModel {
        hidden: 64,
        ff: 40,
        experts: 5,
        qk_norm: true,
        bias: false,
        ..model()
    };
    let (every, one) = (&devices[..], &devices[..1]);
    let fp8 = Packing {
        style: Style::Fp8,
        rows: Some(32),
        group: Some(32),
        ..Packing::default()
    };
    for (name, packing, devices) in [
        (
            "experts in awq",
            packing(Style::Awq, 4, 32, Order::Plain),
            every,
        ),
        (
            "experts in gptq",
            packing(Style::Gptq, 4, 0, Order::Plain),
            one,
        ),
        (
            "experts in gptq, 8 bits",
            packing(Style::GptqV2, 8, 32, Order::Plain),
            one,
        ),
        (
            "experts in compressed-tensors",
            symmetric(packing(Style::Compressed, 4, 32, Order::Plain)),
            one,
        ),
        ("experts in fp8", fp8, one),
    ] {
        computes(devices, name, &moe, &packing);
    }
}

#[test]
fn experts_may_be_one_tensor_and_their_channels_not_in_an_order() {
    let dir = tempfile::tempdir().unwrap();
    let [float, fused, packed, twin] =
        ["float", "fused", "packed", "twin"].map(|n| dir.path().join(n));
    let moe = TinyModel {
        hidden: 64,
        ff: 36,
        experts: 3,
        qk_norm: true,
        bias: false,
        ..model()
    };
    moe.write(&float, "fused experts");
    let (config, apart) = (packed::config(&float), packed::read(&float));
    let mut all = packed::Tensors::new();
    for (name, (dtype, shape, bytes)) in &apart {
        let expert = name.split_once(".mlp.experts.").and_then(|(layer, rest)| {
            let (e, module) = rest.strip_suffix(".weight")?.split_once('.')?;
            Some((layer, e.parse::<usize>().unwrap(), module))
        });
        let Some((layer, e, module)) = expert else {
            all.insert(name.clone(), (*dtype, shape.clone(), bytes.clone()));
            continue;
        };
        let (whole, n_parts, part) = match module {
            "down_proj" => ("down_proj", 1, 0),
            module => ("gate_up_proj", 2, usize::from(module == "up_proj")),
        };
        let (_, _, to) = all
            .entry(format!("{layer}.mlp.experts.{whole}"))
            .or_insert_with(|| {
                let shape = vec![3, n_parts * shape[0], shape[1]];
                (*dtype, shape, vec![0; 3 * n_parts * bytes.len()])
            });
        let at = (e * n_parts + part) * bytes.len();
        to[at..at + bytes.len()].copy_from_slice(bytes);
    }
    packed::write(&fused, &config, &all);
    let device = Arc::new(Device::cpu());
    assert_eq!(
        logits(&device, &fused),
        logits(&device, &float),
        "the same bits"
    );
    let files = ModelFiles::open(&fused).unwrap();
    let error = quantize(&files, &packed, Options::default(), &mut |_| {}).expect_err("refused");
    assert!(
        error.to_string().contains("all experts in one tensor"),
        "said: {error}"
    );

    let refused = |all: &packed::Tensors, word: &str| {
        packed::write(&fused, &config, all);
        let error = ModelFiles::open(&fused).expect_err(word).to_string();
        assert!(error.contains(word), "said: {error}");
    };
    let name = "model.layers.1.mlp.experts.1.up_proj.weight";
    let mut both = all.clone();
    both.insert(name.into(), apart[name].clone());
    refused(
        &both,
        "is there beside model.layers.1.mlp.experts.gate_up_proj",
    );
    let mut turned = all.clone();
    let whole = turned
        .get_mut("model.layers.1.mlp.experts.gate_up_proj")
        .unwrap();
    whole.1.swap(1, 2);
    refused(
        &turned,
        "gate_up_proj: expected shape [3, 72, 64], found [3, 64, 72]",
    );

    // Channels in the same order everywhere would have to be gathered for each expert.
    let order = packing(Style::Gptq, 4, 32, Order::Plain);
    let wide = TinyModel { ff: 64, ..moe };
    wide.write(&float, "ordered experts");
    packed::pack(&float, &packed, &twin, &order);
    let mut ordered = packed::read(&packed);
    for (name, (_, shape, bytes)) in &mut ordered {
        if name.ends_with("g_idx") && name.contains(".experts.") {
            let n = u32::try_from(shape[0]).unwrap();
            let group_of = (0..n).flat_map(|i| (i % (n / 32)).to_le_bytes());
            bytes.clear();
            bytes.extend(group_of);
        }
    }
    packed::write(&packed, &packed::config(&packed), &ordered);
    let files = ModelFiles::open(&packed).unwrap();
    let loaded = Model::load(device, &files, 64, &mut |_| {}).map(drop);
    let error = loaded.expect_err("refused").to_string();
    assert!(error.contains("desc_act"), "said: {error}");
}

#[test]
fn scales_may_be_in_another_file_than_their_codes() {
    let dir = tempfile::tempdir().unwrap();
    let [float, packed, twin] = ["float", "packed", "twin"].map(|n| dir.path().join(n));
    model().write(&float, "shards");
    let packing = Packing {
        style: Style::Fp8,
        rows: Some(64),
        group: Some(64),
        ..Packing::default()
    };
    packed::pack(&float, &packed, &twin, &packing);
    let device = Arc::new(Device::cpu());
    let want = logits(&device, &packed);

    let (config, all) = (packed::config(&packed), packed::read(&packed));
    let is_scale = |name: &str| name.ends_with("_scale_inv");
    let mut map = serde_json::Map::new();
    for (i, file) in ["codes.safetensors", "scales.safetensors"]
        .iter()
        .enumerate()
    {
        let mut mine = all.clone();
        mine.retain(|name, _| is_scale(name) == (i == 1));
        map.extend(mine.keys().map(|name| (name.clone(), (*file).into())));
        packed::write(&packed, &config, &mine);
        fs::rename(packed.join("model.safetensors"), packed.join(file)).unwrap();
    }
    let index = serde_json::json!({"metadata": {}, "weight_map": map});
    fs::write(
        packed.join("model.safetensors.index.json"),
        index.to_string(),
    )
    .unwrap();
    assert_eq!(logits(&device, &packed), want, "the same bits");
}

#[test]
fn a_float_of_eight_bits_that_is_none_is_refused_by_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let [float, packed, twin] = ["float", "packed", "twin"].map(|n| dir.path().join(n));
    model().write(&float, "bad floats");
    let packing = Packing {
        style: Style::Fp8,
        rows: Some(64),
        group: Some(64),
        ..Packing::default()
    };
    packed::pack(&float, &packed, &twin, &packing);
    let (config, all) = (packed::config(&packed), packed::read(&packed));
    let up = "model.layers.1.mlp.up_proj.weight";
    let refused =
        |config: &serde_json::Value, change: &dyn Fn(&mut packed::Tensors), word: &str| {
            let mut changed = all.clone();
            change(&mut changed);
            packed::write(&packed, config, &changed);
            let error = hogwild::model::check(&packed).expect_err(word).to_string();
            assert!(error.contains(word), "said: {error}");
            let files = ModelFiles::open(&packed);
            let loaded = files
                .and_then(|files| Model::load(Arc::new(Device::cpu()), &files, 64, &mut |_| {}));
            let error = loaded.expect_err(word).to_string();
            assert!(error.contains(word), "said: {error}");
        };
    let scale = format!("{up}_scale_inv");
    for code in [0x7f, 0xff] {
        let nan = |all: &mut packed::Tensors| all.get_mut(up).unwrap().2[777] = code;
        refused(
            &config,
            &nan,
            "up_proj.weight: NaN at element 777 of [160, 96]",
        );
    }
    let infinite = |all: &mut packed::Tensors| {
        all.get_mut(&scale).unwrap().2[4..8].copy_from_slice(&f32::INFINITY.to_le_bytes());
    };
    refused(
        &config,
        &infinite,
        "up_proj.weight_scale_inv: infinity at element 1",
    );
    let missing = |all: &mut packed::Tensors| drop(all.remove(&scale));
    refused(&config, &missing, "up_proj.weight_scale_inv: is missing");
    let alone = |all: &mut packed::Tensors| drop(all.remove(up));
    refused(&config, &alone, "up_proj.weight: is missing");
    for shape in [vec![2, 3], vec![3, 1], vec![6], vec![3, 2, 1]] {
        let other = |all: &mut packed::Tensors| {
            let scale = all.get_mut(&scale).unwrap();
            scale.2.resize(shape.iter().product::<usize>() * 4, 0);
            scale.1.clone_from(&shape);
        };
        refused(
            &config,
            &other,
            "up_proj.weight_scale_inv: expected shape [3, 2], found",
        );
    }
    let words = |all: &mut packed::Tensors| {
        let (_, shape, bytes) = all[&scale].clone();
        all.insert(scale.clone(), (Dtype::I32, shape, bytes));
    };
    refused(&config, &words, "up_proj.weight_scale_inv in I32");
    let wide = |all: &mut packed::Tensors| {
        all.insert(up.into(), packed::read(&float)[up].clone());
    };
    refused(&config, &wide, "up_proj.weight in F16");
    let mut narrow = config.clone();
    narrow["quantization_config"]["weight_block_size"] = serde_json::json!([64, 24]);
    refused(&narrow, &|_| {}, "weight with group_size 24");
    let mut silent = config.clone();
    silent
        .as_object_mut()
        .unwrap()
        .remove("quantization_config");
    refused(
        &silent,
        &|_| {},
        "config.json does not say how it is quantised",
    );
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

/// Root of the squared difference over that of the squared numbers, and the largest difference.
fn loss(got: &[f32], want: &[f32]) -> (f64, f64) {
    assert_eq!(got.len(), want.len(), "all of the matrix");
    let (mut error, mut power, mut worst) = (0.0, 0.0, 0.0f64);
    for (got, want) in got
        .iter()
        .zip(want)
        .map(|(g, w)| (f64::from(*g), f64::from(*w)))
    {
        error += (got - want).powi(2);
        power += want * want;
        worst = worst.max((got - want).abs());
    }
    ((error / power).sqrt(), worst)
}

fn options(dtype: DType, group: Option<usize>) -> Options {
    Options {
        dtype,
        group,
        ..Options::default()
    }
}

/// Quantises a folder and holds the result to the original, tensor by tensor, and to the textbook.
fn quantised(devices: &[Arc<Device>], name: &str, float: &Path, options: Options, most: f64) {
    let dir = tempfile::tempdir().unwrap();
    let [to, twin] = ["to", "twin"].map(|n| dir.path().join(n));
    let files = ModelFiles::open(float).unwrap();
    let mut read = 0;
    let losses = quantize(&files, &to, options, &mut |bytes| read += bytes).unwrap();
    assert_eq!(
        read,
        files.weight_bytes(),
        "{name}: every tensor is read once"
    );
    hogwild::model::check(&to).unwrap_or_else(|e| panic!("{name}: {e}"));
    let (original, meant) = (packed::read(float), packed::unpack(&to, &twin));
    assert_eq!(
        losses.len(),
        7 * files.config.n_layers,
        "{name}: seven matrices a layer"
    );
    for said in &losses {
        let (dtype, shape, bytes) = &original[&said.tensor];
        assert_eq!(said.shape, shape[..], "{name}: {}", said.tensor);
        let (relative, worst) = loss(&meant[&said.tensor], &packed::floats(*dtype, bytes));
        let near = |a: f64, b: f64| (a - b).abs() <= 1e-6 * a;
        assert!(
            near(relative, said.relative) && near(worst, said.worst),
            "{name}: {said:?}: {relative}, {worst}"
        );
        assert!(relative > 0.0 && relative < most, "{name}: {said:?}");
    }
    let want = textbook(&twin);
    for device in devices {
        let d = distance(&logits(device, &to), &want);
        println!(
            "{name} on {}: {d:.1e}, worst tensor {:.4}",
            device.name(),
            losses.iter().map(|l| l.relative).fold(0.0, f64::max)
        );
        assert!(
            d <= TOLERANCE,
            "{name} on {}: a logit is off by {d}",
            device.name()
        );
    }
}

#[test]
fn a_quantised_model_is_near_the_float_one_and_computes_what_it_says() {
    let devices: Vec<_> = adapter::devices().into_iter().map(Arc::new).collect();
    let odd = TinyModel {
        hidden: 72,
        ff: 172,
        ..model()
    };
    let wide = TinyModel {
        hidden: 320,
        heads: 8,
        bias: false,
        dtype: Dtype::BF16,
        ..model()
    };
    let qwen3 = TinyModel {
        qk_norm: true,
        tied: true,
        dtype: Dtype::F32,
        ..model()
    };
    let cases = [
        ("4 bits in groups of 32", &odd, DType::U4, Some(32), 0.10),
        ("4 bits in groups of 128", &wide, DType::U4, Some(128), 0.11),
        ("4 bits in rows", &qwen3, DType::U4, None, 0.12),
        (
            "8 bits in groups of 128",
            &odd,
            DType::U8,
            Some(128),
            0.0075,
        ),
        ("8 bits in rows of bf16", &wide, DType::U8, None, 0.0075),
        ("8 bits in groups of 32", &qwen3, DType::U8, Some(32), 0.006),
    ];
    for (name, model, dtype, group, most) in cases {
        let float = tempfile::tempdir().unwrap();
        model.write(float.path(), name);
        quantised(&devices, name, float.path(), options(dtype, group), most);
    }
}

#[test]
fn a_really_trained_model_is_quantised() {
    let dir = Path::new("../shared/models/stories260K");
    if !dir.is_dir() {
        println!("skipped: {} is not there", dir.display());
        return;
    }
    let devices = [Arc::new(Device::cpu())];
    quantised(
        &devices,
        "stories260K in 8 bits",
        dir,
        options(DType::U8, Some(32)),
        0.006,
    );
    quantised(
        &devices,
        "stories260K in 4 bits",
        dir,
        options(DType::U4, Some(32)),
        0.10,
    );
}

#[test]
fn all_zeros_and_extreme_weights_are_quantised() {
    let dir = tempfile::tempdir().unwrap();
    let [float, to, twin] = ["float", "to", "twin"].map(|n| dir.path().join(n));
    model().write(&float, "extremes");
    let mut tensors = packed::read(&float);
    let name = "model.layers.0.mlp.up_proj.weight";
    let (_, shape, bytes) = tensors.get_mut(name).unwrap();
    let row = 2 * shape[1];
    bytes[..row].fill(0);
    // The smallest and the largest number of f16; all of one sign.
    let fill = |row: &mut [u8], bits: u16| {
        row.chunks_mut(2)
            .for_each(|b| b.copy_from_slice(&bits.to_le_bytes()));
    };
    fill(&mut bytes[row..2 * row], 0x0001);
    fill(&mut bytes[2 * row..3 * row], 0xfbff);
    fill(&mut bytes[3 * row..4 * row], 0x7bff);
    fill(&mut bytes[3 * row..3 * row + 2], 0xfbff);
    let want = packed::floats(Dtype::F16, bytes);
    packed::write(&float, &packed::config(&float), &tensors);
    let files = ModelFiles::open(&float).unwrap();
    let losses = quantize(&files, &to, options(DType::U4, Some(32)), &mut |_| {}).unwrap();
    assert!(
        losses
            .iter()
            .all(|l| l.relative.is_finite() && l.relative < 0.12),
        "{losses:?}"
    );
    hogwild::model::check(&to).unwrap();
    let got = &packed::unpack(&to, &twin)[name];
    let cols = row / 2;
    assert!(got[..cols].iter().all(|&w| w == 0.0), "zeros stay zeros");
    for (row, bound) in [(1, 1e-3), (2, 1e-3), (3, 0.07)] {
        let at = row * cols..(row + 1) * cols;
        let (relative, _) = loss(&got[at.clone()], &want[at]);
        assert!(relative < bound, "row {row} loses {relative}");
    }
}

#[test]
fn a_folder_is_there_whole_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let [float, to, twin] = ["float", "to", "twin"].map(|n| dir.path().join(n));
    model().write(&float, "whole");
    for (name, text) in [
        ("tokenizer.json", "{}"),
        ("LICENSE", "free"),
        ("model.bin", "x"),
        ("x.py", "x"),
    ] {
        fs::write(float.join(name), text).unwrap();
    }
    fs::create_dir(float.join("folder.json")).unwrap();
    let files = ModelFiles::open(&float).unwrap();
    let names = |dir: &Path| {
        let names = fs::read_dir(dir)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = names.collect();
        names.sort();
        names
    };
    let refused = |files: &ModelFiles, word: &str| {
        let before = names(dir.path());
        let error = quantize(files, &to, Options::default(), &mut |_| {}).expect_err("refused");
        assert!(
            error.to_string().contains(word) || format!("{error:?}").contains(word),
            "said: {error}"
        );
        assert_eq!(names(dir.path()), before, "nothing is left");
    };

    // Spread over files, each with its share.
    let shards = Options {
        shard_bytes: 20_000,
        ..Options::default()
    };
    quantize(&files, &to, shards, &mut |_| {}).unwrap();
    let made = names(&to);
    let n = made.iter().filter(|n| n.ends_with(".safetensors")).count();
    assert!(
        n > 4 && made.contains(&format!("model-00001-of-{n:05}.safetensors")),
        "{made:?}"
    );
    for name in [
        "LICENSE",
        "config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
    ] {
        assert!(made.iter().any(|n| n == name), "{name} is not in {made:?}");
    }
    assert_eq!(made.len(), n + 4, "no other files: {made:?}");
    hogwild::model::check(&to).unwrap();
    let whole = twin.join("in one");
    fs::create_dir(&twin).unwrap();
    quantize(&files, &whole, Options::default(), &mut |_| {}).unwrap();
    assert_eq!(packed::read(&to), packed::read(&whole), "the same tensors");

    refused(&files, "is there already");
    let again = ModelFiles::open(&to).unwrap();
    fs::rename(&to, dir.path().join("moved")).unwrap();
    refused(&again, "quantising a quantised model");
    fs::create_dir(dir.path().join("to.partial")).unwrap();
    refused(&files, "interrupted run");
    fs::remove_dir(dir.path().join("to.partial")).unwrap();
    let mut tensors = packed::read(&float);
    let (_, _, bytes) = tensors
        .get_mut("model.layers.1.mlp.down_proj.weight")
        .unwrap();
    bytes[40..42].copy_from_slice(&0x7e00u16.to_le_bytes());
    packed::write(&float, &packed::config(&float), &tensors);
    let bad = ModelFiles::open(&float).unwrap();
    refused(&bad, "NaN at element 20");
}

/// Runs `hogwild quantize`; exit code, standard output, standard error.
fn command(args: &[&str], from: &Path, to: &Path) -> (Option<i32>, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_hogwild"))
        .arg("quantize")
        .args(args)
        .args([from, to])
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (
        output.status.code(),
        text(output.stdout),
        text(output.stderr),
    )
}

#[test]
fn the_command_reports_the_error_of_each_tensor() {
    let dir = tempfile::tempdir().unwrap();
    let [float, to, eight] = ["float", "to", "eight"].map(|n| dir.path().join(n));
    model().write(&float, "command");
    let (code, out, err) = command(&["--group-size", "32"], &float, &to);
    assert_eq!(code, Some(0), "{err}");
    let lines: Vec<_> = out.lines().collect();
    assert_eq!(
        lines.len(),
        1 + 14 + 1,
        "a heading, seven matrices a layer, a sum: {out}"
    );
    let row: Vec<_> = lines[1].split_whitespace().collect();
    assert_eq!(
        row[..4],
        ["model.layers.0.self_attn.q_proj.weight", "64", "x", "96"],
        "{out}"
    );
    let relative: f64 = row[4].parse().unwrap();
    assert!(relative > 0.01 && relative < 0.1, "{out}");
    assert!(err.is_empty(), "32 divides every width: {err}");

    let (code, out, err) = command(&["--bits", "8", "--format", "json"], &float, &eight);
    assert_eq!(code, Some(0), "{err}");
    assert!(
        err.contains("groups of 128 do not divide the widths [96, 64, 160]"),
        "{err}"
    );
    let said: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(said["bits"], 8, "{said}");
    assert_eq!(said["tensors"].as_array().unwrap().len(), 14, "{said}");
    assert_eq!(
        said["tensors"][13]["shape"],
        serde_json::json!([96, 160]),
        "{said}"
    );
    let bytes = |key: &str| said["bytes"][key].as_u64().unwrap();
    let files = [&float, &eight].map(|dir| ModelFiles::open(dir).unwrap().weight_bytes());
    assert_eq!([bytes("from"), bytes("to")], files, "bytes of both");

    for (args, word, wanted) in [
        (&["--bits", "5"][..], "4 or 8 bits, not 5", 2),
        (&["--bits", "3"], "3", 2),
        (&["--group-size", "24"], "--group-size 24", 2),
        (&["--group-size", "0"], "--group-size 0", 2),
        (&["--group-size", "-2"], "--group-size -2", 2),
        (&[], "is there already", 1),
    ] {
        let (code, out, err) = command(args, &float, &to);
        assert_eq!(code, Some(wanted), "{args:?}: {err}");
        assert!(err.contains(word) && out.is_empty(), "{args:?}: {err}");
    }
    let (code, _, err) = command(&[], &to, &dir.path().join("again"));
    assert_eq!(code, Some(3), "{err}");
    let (code, _, err) = command(&[], &dir.path().join("none"), &dir.path().join("again"));
    assert_eq!(code, Some(3), "{err}");
    assert!(!dir.path().join("again").exists(), "nothing is left");
}

#[test]
fn random_codes_have_the_size_of_weights() {
    let dir = tempfile::tempdir().unwrap();
    let shape = TinyModel {
        hidden: 256,
        heads: 8,
        ff: 384,
        ..model()
    };
    shape.write(dir.path(), "random");
    let config = Config::open(dir.path()).unwrap();
    for dtype in [DType::F16, DType::U8, DType::F8, DType::U4] {
        let device = Arc::new(Device::cpu());
        let model = Model::random(
            device,
            &config,
            RandomWeights {
                dtype,
                shared: false,
            },
            64,
        )
        .unwrap();
        let bytes = model.stored_bytes();
        let mut engine = Engine::new(Arc::new(model), DType::F32, 16, false).unwrap();
        let block = engine.cache.pages.open();
        let rows = engine.prefill(block, &TOKENS, Logits::All).unwrap();
        let all: Vec<f64> = rows.iter().flatten().map(|&v| f64::from(v)).collect();
        let size = (all.iter().map(|v| v * v).sum::<f64>() / all.len() as f64).sqrt();
        println!("{dtype}: logits of size {size:.2}, {bytes} bytes");
        assert!((0.2..5.0).contains(&size), "{dtype}: logits of size {size}");
    }
}
