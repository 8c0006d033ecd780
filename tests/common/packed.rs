//! Quantised model folders made of float ones, number by number as the formats' documents have them, and
//! the float twin that says what each must compute.
//!
//! Formats: `FORMATS` of the published packers (`AutoAWQ`, `AutoGPTQ`, `GPTQModel`, compressed-tensors). A code
//! is put at its bit one at a time, which is slow and hard to get wrong.

use std::{collections::BTreeMap, fs, path::Path};

use half::f16;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};

use super::tiny::Random;

/// How matrices are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    Awq,
    /// Zero points are stored less one.
    Gptq,
    GptqV2,
    Compressed,
    /// Floats of 8 bits as `DeepSeek` publishes them.
    Fp8,
    /// Floats of 8 bits in compressed-tensors.
    Floats,
}

/// Which channels share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Neighbours.
    Plain,
    /// Any; the same for all matrices that have an input in common.
    Shared,
    /// Any; each matrix by itself.
    Apart,
}

#[derive(Clone, Copy, Debug)]
pub struct Packing {
    pub style: Style,
    pub bits: usize,
    /// Channels under one scale; none: all of a row.
    pub group: Option<usize>,
    /// Rows under one scale, of floats of 8 bits; none: all of them.
    pub rows: Option<usize>,
    /// Zero points are the middle of the codes.
    pub symmetric: bool,
    pub order: Order,
    /// Ends of the names of matrices that stay in float.
    pub float: &'static [&'static str],
}

impl Default for Packing {
    fn default() -> Self {
        Self {
            style: Style::Gptq,
            bits: 4,
            group: Some(32),
            rows: Some(1),
            symmetric: false,
            order: Order::Plain,
            float: &[],
        }
    }
}

/// Tensors of a file: type, shape, bytes.
pub type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

pub fn read(dir: &Path) -> Tensors {
    let mut all = Tensors::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|end| end == "safetensors") {
            let bytes = fs::read(path).unwrap();
            for (name, t) in SafeTensors::deserialize(&bytes).unwrap().iter() {
                let tensor = (t.dtype(), t.shape().to_vec(), t.data().to_vec());
                assert!(
                    all.insert(name.to_owned(), tensor).is_none(),
                    "{name} twice"
                );
            }
        }
    }
    all
}

pub fn write(dir: &Path, config: &Value, tensors: &Tensors) {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
        (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, &dir.join("model.safetensors")).unwrap();
}

pub fn config(dir: &Path) -> Value {
    serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap()
}

/// The numbers of a float tensor.
pub fn floats(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    let two = || bytes.chunks(2).map(|b| [b[0], b[1]]);
    match dtype {
        Dtype::F32 => bytes
            .chunks(4)
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect(),
        Dtype::F16 => two().map(|b| f16::from_le_bytes(b).to_f32()).collect(),
        Dtype::BF16 => two()
            .map(|b| half::bf16::from_le_bytes(b).to_f32())
            .collect(),
        other => panic!("floats in {other:?}"),
    }
}

fn words(bytes: &[u8]) -> Vec<u32> {
    bytes
        .chunks(4)
        .map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect()
}

fn to_bytes(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

/// A matrix of codes in words, written one code at a time.
struct Words {
    cols: usize,
    words: Vec<u32>,
}

impl Words {
    fn new(rows: usize, cols: usize) -> Self {
        Self {
            cols,
            words: vec![0; rows * cols],
        }
    }

    fn put(&mut self, row: usize, col: usize, bit: usize, code: u32) {
        self.words[row * self.cols + col] |= code << bit;
    }

    fn tensor(self) -> (Dtype, Vec<usize>, Vec<u8>) {
        let shape = vec![self.words.len() / self.cols, self.cols];
        (Dtype::I32, shape, to_bytes(&self.words))
    }
}

/// Nibble `i` of a word of AWQ holds this one of eight neighbouring rows.
const AWQ: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

/// Codes, scales and zero points of one matrix.
struct Coded {
    n: usize,
    k: usize,
    bits: usize,
    /// Of each channel.
    group_of: Vec<usize>,
    groups: usize,
    codes: Vec<u32>,  // [n, k]
    scales: Vec<f16>, // [n, groups]
    zeros: Vec<u32>,  // [n, groups]
}

impl Coded {
    /// Rounds to the nearest code of the group's range.
    fn of(weights: &[f32], k: usize, packing: &Packing, group_of: Vec<usize>) -> Self {
        let (n, bits) = (weights.len() / k, packing.bits);
        let groups = group_of.iter().max().unwrap() + 1;
        let most = ((1u32 << bits) - 1) as f32;
        let mut coded = Self {
            n,
            k,
            bits,
            group_of,
            groups,
            codes: vec![0; n * k],
            scales: vec![],
            zeros: vec![],
        };
        for row in 0..n {
            for g in 0..groups {
                let mine = |c: &usize| coded.group_of[*c] == g;
                let channels: Vec<usize> = (0..k).filter(mine).collect();
                let of = |c: &usize| {
                    let w = weights[row * k + c];
                    // Zero points at both ends, too.
                    match row {
                        0 => w.abs() + 0.01,
                        1 => -w.abs() - 0.01,
                        _ => w,
                    }
                };
                let low = channels.iter().map(of).fold(f32::INFINITY, f32::min);
                let high = channels.iter().map(of).fold(f32::NEG_INFINITY, f32::max);
                let (width, zero) = if packing.symmetric {
                    (2.0 * high.abs().max(low.abs()), most.midpoint(1.0))
                } else {
                    let width = high.max(0.0) - low.min(0.0);
                    (width, (-low.min(0.0) / width * most).round())
                };
                let scale = f16::from_f32(width / most);
                for c in channels {
                    let code = (of(&c) / scale.to_f32()).round() + zero;
                    #[expect(
                        clippy::cast_possible_truncation,
                        clippy::cast_sign_loss,
                        reason = "0 to 255"
                    )]
                    let code = code.clamp(0.0, most) as u32;
                    coded.codes[row * k + c] = code;
                }
                coded.scales.push(scale);
                #[expect(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "0 to 255"
                )]
                coded.zeros.push(zero as u32);
            }
        }
        coded
    }

    /// What the matrix means.
    fn weights(&self) -> Vec<f32> {
        let value = |i: usize| {
            let at = i / self.k * self.groups + self.group_of[i % self.k];
            (self.codes[i] as f32 - self.zeros[at] as f32) * self.scales[at].to_f32()
        };
        (0..self.n * self.k).map(value).collect()
    }

    fn tensors(&self, stem: &str, packing: &Packing) -> Tensors {
        let (n, k, bits, groups) = (self.n, self.k, self.bits, self.groups);
        let per = 32 / bits;
        let mut out = Tensors::new();
        let mut add = |end: &str, tensor| drop(out.insert(format!("{stem}.{end}"), tensor));
        let scales = |by_group: bool| {
            let mut bytes = Vec::new();
            for i in 0..n * groups {
                let at = if by_group { i % n * groups + i / n } else { i };
                bytes.extend(self.scales[at].to_le_bytes());
            }
            let shape = if by_group {
                vec![groups, n]
            } else {
                vec![n, groups]
            };
            (Dtype::F16, shape, bytes)
        };
        match packing.style {
            Style::Awq => {
                let bit = |row: usize| 4 * AWQ.iter().position(|&r| r == row % 8).unwrap();
                let (mut codes, mut zeros) = (Words::new(k, n / 8), Words::new(groups, n / 8));
                for row in 0..n {
                    (0..k).for_each(|c| codes.put(c, row / 8, bit(row), self.codes[row * k + c]));
                    (0..groups).for_each(|g| {
                        zeros.put(g, row / 8, bit(row), self.zeros[row * groups + g]);
                    });
                }
                add("qweight", codes.tensor());
                add("qzeros", zeros.tensor());
                add("scales", scales(true));
            }
            Style::Gptq | Style::GptqV2 => {
                let less = u32::from(packing.style == Style::Gptq);
                let (mut codes, mut zeros) = (Words::new(k / per, n), Words::new(groups, n / per));
                for row in 0..n {
                    (0..k).for_each(|c| {
                        codes.put(c / per, row, c % per * bits, self.codes[row * k + c]);
                    });
                    for g in 0..groups {
                        let zero =
                            self.zeros[row * groups + g].wrapping_sub(less) & ((1 << bits) - 1);
                        zeros.put(g, row / per, row % per * bits, zero);
                    }
                }
                add("qweight", codes.tensor());
                add("qzeros", zeros.tensor());
                add("scales", scales(true));
                add("g_idx", self.order());
            }
            Style::Compressed => {
                let mut codes = Words::new(n, k.div_ceil(per));
                let mut zeros = Words::new(n.div_ceil(per), groups);
                for row in 0..n {
                    (0..k).for_each(|c| {
                        codes.put(row, c / per, c % per * bits, self.codes[row * k + c]);
                    });
                    for g in 0..groups {
                        zeros.put(row / per, g, row % per * bits, self.zeros[row * groups + g]);
                    }
                }
                add("weight_packed", codes.tensor());
                add("weight_scale", scales(false));
                if !packing.symmetric {
                    add("weight_zero_point", zeros.tensor());
                }
                if packing.order != Order::Plain {
                    add("weight_g_idx", self.order());
                }
                let shape = [n as u64, k as u64]
                    .iter()
                    .flat_map(|d| d.to_le_bytes())
                    .collect();
                add("weight_shape", (Dtype::I64, vec![2], shape));
            }
            Style::Fp8 | Style::Floats => panic!("floats are no whole numbers"),
        }
        out
    }

    fn order(&self) -> (Dtype, Vec<usize>, Vec<u8>) {
        let list: Vec<u32> = self
            .group_of
            .iter()
            .map(|&g| u32::try_from(g).unwrap())
            .collect();
        (Dtype::I32, vec![self.k], to_bytes(&list))
    }
}

fn group_of(packing: &Packing, k: usize, seed: &str) -> Vec<usize> {
    let mut order: Vec<usize> = (0..k).collect();
    if packing.order != Order::Plain {
        let mut random = Random::new(seed);
        (1..k)
            .rev()
            .for_each(|i| order.swap(i, random.below(i + 1)));
    }
    let mut out = vec![0; k];
    for (at, channel) in order.into_iter().enumerate() {
        out[channel] = at / packing.group.unwrap_or(k);
    }
    out
}

/// The numbers that a float of 8 bits can be, by its code; those of NaN are NaN.
fn eight_bit_floats() -> Vec<f32> {
    let number = |code: u32| {
        let (sign, exponent, mantissa) = (code >> 7, code >> 3 & 15, code & 7);
        let size = match (exponent, mantissa) {
            (15, 7) => f32::NAN,
            (0, m) => m as f32 / 8.0 * 2f32.powi(-6),
            (e, m) => (1.0 + m as f32 / 8.0) * (e as f32 - 7.0).exp2(),
        };
        if sign == 1 { -size } else { size }
    };
    (0..256).map(number).collect()
}

/// A matrix in floats of 8 bits, `[n, k]`: the tensors of a file, and what it means.
fn eight(
    weights: &[f32],
    n: usize,
    k: usize,
    stem: &str,
    packing: &Packing,
) -> (Tensors, Vec<f32>) {
    let table = eight_bit_floats();
    let (rows, group) = (packing.rows.unwrap_or(n), packing.group.unwrap_or(k));
    let groups = k.div_ceil(group);
    let mut scales = vec![0f32; n.div_ceil(rows) * groups];
    let block = |i: usize| i / k / rows * groups + i % k / group;
    for (i, w) in weights.iter().enumerate() {
        scales[block(i)] = scales[block(i)].max(w.abs() / 448.0);
    }
    if packing.style == Style::Floats {
        for scale in &mut scales {
            *scale = half::bf16::from_f32(*scale).to_f32();
        }
    }
    let (mut codes, mut meant) = (Vec::new(), Vec::new());
    for (i, w) in weights.iter().enumerate() {
        let scale = scales[block(i)];
        let far = |code: &u8| (table[usize::from(*code)] - w / scale).abs();
        let finite = (0..=255u8).filter(|code| !far(code).is_nan());
        let code = finite.min_by(|a, b| far(a).total_cmp(&far(b))).unwrap();
        codes.push(code);
        meant.push(table[usize::from(code)] * scale);
    }
    let whole = packing.rows.is_none() && packing.group.is_none();
    let (end, dtype, shape, bytes): (_, _, _, Vec<u8>) = if packing.style == Style::Fp8 {
        let bytes = scales.iter().flat_map(|s| s.to_le_bytes()).collect();
        let shape = if whole {
            vec![]
        } else {
            vec![n.div_ceil(rows), groups]
        };
        ("weight_scale_inv", Dtype::F32, shape, bytes)
    } else {
        let halves = scales.iter().map(|s| half::bf16::from_f32(*s));
        let bytes = halves.flat_map(half::bf16::to_le_bytes).collect();
        let shape = if whole {
            vec![1]
        } else {
            vec![n.div_ceil(rows), groups]
        };
        ("weight_scale", Dtype::BF16, shape, bytes)
    };
    let tensors = Tensors::from([
        (
            format!("{stem}.weight"),
            (Dtype::F8_E4M3, vec![n, k], codes),
        ),
        (format!("{stem}.{end}"), (dtype, shape, bytes)),
    ]);
    (tensors, meant)
}

/// What `quantization_config` says.
fn said(packing: &Packing) -> Value {
    let group = packing.group.map_or(json!(-1), |g| json!(g));
    match packing.style {
        Style::Fp8 => json!({
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
            "weight_block_size": packing.rows.zip(packing.group).map(|(rows, group)| [rows, group]),
            "modules_to_not_convert": ["lm_head"],
        }),
        Style::Floats => json!({
            "quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"],
            "quantization_status": "compressed",
            "config_groups": {"group_0": {
                "targets": ["Linear"],
                "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": true},
                "weights": {
                    "num_bits": 8, "type": "float", "symmetric": true, "dynamic": false,
                    "strategy": match (packing.rows, packing.group) {
                        (None, _) => "tensor",
                        (Some(1), None) => "channel",
                        _ => "block",
                    },
                    "block_structure": packing.rows.zip(packing.group).map(|(rows, group)| [rows, group]),
                },
            }},
        }),
        Style::Awq => json!({
            "quant_method": "awq", "bits": packing.bits, "group_size": group, "version": "gemm",
            "zero_point": true, "modules_to_not_convert": null,
        }),
        Style::Gptq => json!({
            "quant_method": "gptq", "bits": packing.bits, "group_size": group,
            "sym": packing.symmetric, "desc_act": packing.order != Order::Plain,
        }),
        Style::GptqV2 => json!({
            "quant_method": "gptq", "bits": packing.bits, "group_size": group,
            "sym": packing.symmetric, "desc_act": packing.order != Order::Plain, "checkpoint_format": "gptq_v2",
        }),
        Style::Compressed => json!({
            "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
            "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "input_activations": null, "weights": {
                "num_bits": packing.bits, "type": "int", "symmetric": packing.symmetric,
                "strategy": if packing.group.is_some() { "group" } else { "channel" },
                "group_size": packing.group,
                "actorder": if packing.order == Order::Plain { json!(null) } else { json!("group") },
            }}},
        }),
    }
}

/// Whether a tensor is a matrix of a layer.
fn is_matrix(name: &str) -> bool {
    name.ends_with("_proj.weight")
}

/// Packs the matrices of a float model's layers: the folder `packed`, and `twin`, which means the same.
pub fn pack(from: &Path, packed: &Path, twin: &Path, packing: &Packing) {
    let (mut codes, mut meant) = (Tensors::new(), Tensors::new());
    for (name, (dtype, shape, bytes)) in read(from) {
        let stays = packing.float.iter().any(|end| name.ends_with(end));
        if !is_matrix(&name) || stays {
            meant.insert(name.clone(), (dtype, shape.clone(), bytes.clone()));
            codes.insert(name, (dtype, shape, bytes));
            continue;
        }
        let stem = name.strip_suffix(".weight").unwrap();
        let (layer, part) = stem.rsplit_once('.').unwrap();
        let seed = match (packing.order, part) {
            (Order::Shared, "q_proj" | "k_proj" | "v_proj" | "gate_proj" | "up_proj") => layer,
            _ => stem,
        };
        let k = shape[1];
        if matches!(packing.style, Style::Fp8 | Style::Floats) {
            let (tensors, weights) = eight(&floats(dtype, &bytes), shape[0], k, stem, packing);
            codes.extend(tensors);
            let weights = weights.iter().flat_map(|w| w.to_le_bytes()).collect();
            meant.insert(name, (Dtype::F32, shape, weights));
            continue;
        }
        let coded = Coded::of(
            &floats(dtype, &bytes),
            k,
            packing,
            group_of(packing, k, seed),
        );
        codes.extend(coded.tensors(stem, packing));
        let weights = coded
            .weights()
            .iter()
            .flat_map(|w| w.to_le_bytes())
            .collect();
        meant.insert(name, (Dtype::F32, shape, weights));
    }
    let config = config(from);
    write(twin, &config, &meant);
    let mut config = config;
    config["quantization_config"] = said(packing);
    write(packed, &config, &codes);
}

/// The float twin of a folder of compressed-tensors, asymmetric; returns its matrices.
pub fn unpack(packed: &Path, twin: &Path) -> BTreeMap<String, Vec<f32>> {
    let mut config = config(packed);
    let weights = &config["quantization_config"]["config_groups"]["group_0"]["weights"];
    let bits = usize::try_from(weights["num_bits"].as_u64().unwrap()).unwrap();
    let group = weights["group_size"]
        .as_u64()
        .map(|g| usize::try_from(g).unwrap());
    let (per, mask) = (32 / bits, (1u64 << bits) - 1);
    let all = read(packed);
    let (mut meant, mut matrices) = (Tensors::new(), BTreeMap::new());
    for (name, (dtype, shape, bytes)) in &all {
        let Some(stem) = name.strip_suffix(".weight_packed") else {
            if !name.contains(".weight_") {
                meant.insert(name.clone(), (*dtype, shape.clone(), bytes.clone()));
            }
            continue;
        };
        let of = |end: &str| &all[&format!("{stem}.{end}")];
        let size: Vec<usize> = of("weight_shape")
            .2
            .chunks(8)
            .map(|b| usize::from(b[0]) + 256 * usize::from(b[1]))
            .collect();
        let (n, k) = (size[0], size[1]);
        let (codes, zeros) = (words(bytes), words(&of("weight_zero_point").2));
        let (scale_type, scale_shape, scale_bytes) = of("weight_scale");
        let (scales, groups) = (floats(*scale_type, scale_bytes), scale_shape[1]);
        let field = |word: u32, i: usize| (u64::from(word) >> (i * bits) & mask) as f32;
        let mut weights = Vec::with_capacity(n * k);
        for row in 0..n {
            for c in 0..k {
                let g = group.map_or(0, |group| c / group);
                let code = field(codes[row * k.div_ceil(per) + c / per], c % per);
                let zero = field(zeros[row / per * groups + g], row % per);
                weights.push((code - zero) * scales[row * groups + g]);
            }
        }
        let data = weights.iter().flat_map(|w| w.to_le_bytes()).collect();
        meant.insert(format!("{stem}.weight"), (Dtype::F32, vec![n, k], data));
        matrices.insert(format!("{stem}.weight"), weights);
    }
    config
        .as_object_mut()
        .unwrap()
        .remove("quantization_config");
    write(twin, &config, &meant);
    matrices
}
