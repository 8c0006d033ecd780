//! Damaged and hostile model folders: every kind is refused on one line that names the file and
//! what in it is wrong, quickly and without a panic; and what is only unusual is accepted.
//!
//! Each row of the table damages a copy of a good model. A damage that no row knows is looked for
//! by cutting a file at every byte and by changing every byte of a header.

#![expect(clippy::too_many_lines, reason = "tables are as long as they are")]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hogwild::model::{self, Header, ModelFiles};
use hogwild::{Error, Result};
use rayon::prelude::*;
use serde_json::{Map, Value, json};

/// No folder may keep a reader busy for longer.
const PATIENCE: Duration = Duration::from_secs(2);

/// One kind of damage.
struct Row {
    name: &'static str,
    /// The good model that is damaged: a folder of `tests/golden/models`, with `+` if its weights
    /// are spread over two files.
    model: &'static str,
    damage: Box<dyn Fn(&Path)>,
    /// What the message must name.
    file: &'static str,
    field: &'static str,
}

/// A row over the qwen3 model in one file.
fn row(
    name: &'static str,
    file: &'static str,
    field: &'static str,
    damage: impl Fn(&Path) + 'static,
) -> Row {
    on("qwen3", name, file, field, damage)
}

/// A row over the qwen3 model in two files.
fn row2(
    name: &'static str,
    file: &'static str,
    field: &'static str,
    damage: impl Fn(&Path) + 'static,
) -> Row {
    on("qwen3+", name, file, field, damage)
}

fn on(
    model: &'static str,
    name: &'static str,
    file: &'static str,
    field: &'static str,
    damage: impl Fn(&Path) + 'static,
) -> Row {
    Row {
        name,
        model,
        damage: Box::new(damage),
        file,
        field,
    }
}

const CONFIG: &str = "config.json";
const GENERATION: &str = "generation_config.json";
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const FIRST: &str = "model-00001-of-00002.safetensors";
const SECOND: &str = "model-00002-of-00002.safetensors";

/// A writable copy of a good model.
fn copy_of(model: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let from = golden(model.trim_end_matches('+'));
    for file in [CONFIG, GENERATION, SINGLE] {
        write(dir.path(), file, read(&from, file));
    }
    if model.ends_with('+') {
        split(dir.path());
    }
    dir
}

fn golden(model: &str) -> PathBuf {
    Path::new("tests/golden/models").join(model)
}

fn write(dir: &Path, file: &str, bytes: impl AsRef<[u8]>) {
    fs::write(dir.join(file), bytes).expect("a file in a temporary folder");
}

fn read(dir: &Path, file: &str) -> Vec<u8> {
    fs::read(dir.join(file)).expect("a file of the copy")
}

fn remove(dir: &Path, file: &str) {
    fs::remove_file(dir.join(file)).expect("a file of the copy");
}

/// Changes a JSON file of the copy.
fn edit(dir: &Path, file: &str, change: impl Fn(&mut Map<String, Value>)) {
    let mut value: Value = serde_json::from_slice(&read(dir, file)).expect("good JSON");
    change(value.as_object_mut().expect("an object"));
    write(dir, file, value.to_string());
}

/// Sets one key of `config.json`.
fn set(key: &'static str, value: Value) -> impl Fn(&Path) {
    move |dir| {
        edit(dir, CONFIG, |map| {
            drop(map.insert(key.into(), value.clone()));
        });
    }
}

/// Sets one key of `generation_config.json`.
fn set_generation(key: &'static str, value: Value) -> impl Fn(&Path) {
    move |dir| {
        edit(dir, GENERATION, |map| {
            drop(map.insert(key.into(), value.clone()));
        });
    }
}

/// Sets `rope_scaling` to a good yarn or llama3 with some keys changed.
fn set_rope(kind: &'static str, key: &'static str, value: Value) -> impl Fn(&Path) {
    move |dir| {
        let mut rope = json!({"rope_type": kind, "factor": 4.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 256});
        rope[key] = value.clone();
        set("rope_scaling", rope)(dir);
    }
}

/// The header and the data of a safetensors file.
fn parts(bytes: &[u8]) -> (Map<String, Value>, Vec<u8>) {
    let (len, rest) = bytes.split_first_chunk::<8>().expect("a good file");
    let len = usize::try_from(u64::from_le_bytes(*len)).expect("a good length");
    let header = serde_json::from_slice(&rest[..len]).expect("a good header");
    (header, rest[len..].to_vec())
}

/// A safetensors file from the text of its header and its data.
fn whole(header: impl AsRef<[u8]>, data: &[u8]) -> Vec<u8> {
    let header = header.as_ref();
    [&(header.len() as u64).to_le_bytes(), header, data].concat()
}

/// Changes the header of the single weight file, and leaves the data.
fn edit_header(dir: &Path, change: impl Fn(&mut Map<String, Value>)) {
    let (mut header, data) = parts(&read(dir, SINGLE));
    change(&mut header);
    write(dir, SINGLE, whole(Value::from(header).to_string(), &data));
}

/// Changes the text of the header of the single weight file, and leaves the data.
fn edit_text(dir: &Path, change: impl Fn(String) -> String) {
    let (header, data) = parts(&read(dir, SINGLE));
    write(
        dir,
        SINGLE,
        whole(change(Value::from(header).to_string()), &data),
    );
}

/// One key of one tensor in the header set.
fn set_tensor(tensor: &'static str, key: &'static str, value: Value) -> impl Fn(&Path) {
    move |dir| {
        edit_header(dir, |header| {
            let map = header[tensor].as_object_mut().expect("a tensor");
            map.insert(key.into(), value.clone());
        });
    }
}

/// A tensor and its data.
type Tensor = (String, Value, Vec<u8>);

fn tensors(bytes: &[u8]) -> Vec<Tensor> {
    let (header, data) = parts(bytes);
    let at = |value: &Value| usize::try_from(value.as_u64().expect("an offset")).expect("small");
    header
        .into_iter()
        .filter(|(name, _)| name != "__metadata__")
        .map(|(name, info)| {
            let range = at(&info["data_offsets"][0])..at(&info["data_offsets"][1]);
            (name, info, data[range].to_vec())
        })
        .collect()
}

fn file_of(tensors: &[Tensor]) -> Vec<u8> {
    let (mut header, mut data) = (Map::new(), Vec::new());
    for (name, info, bytes) in tensors {
        let mut info = info.clone();
        info["data_offsets"] = json!([data.len(), data.len() + bytes.len()]);
        header.insert(name.clone(), info);
        data.extend(bytes);
    }
    whole(Value::from(header).to_string(), &data)
}

/// Changes the tensors of a weight file, which stays a good file otherwise.
fn edit_tensors(dir: &Path, file: &str, change: impl Fn(&mut Vec<Tensor>)) {
    let mut all = tensors(&read(dir, file));
    change(&mut all);
    write(dir, file, file_of(&all));
}

/// A tensor added to the single file.
fn add(name: &'static str, dtype: &'static str, shape: Value, n_bytes: usize) -> impl Fn(&Path) {
    move |dir| {
        edit_tensors(dir, SINGLE, |all| {
            let info = json!({"dtype": dtype, "shape": shape});
            all.push((name.into(), info, vec![0; n_bytes]));
        });
    }
}

/// A copy of the embedding as the head.
fn head_beside_tie(dir: &Path) {
    edit_tensors(dir, SINGLE, |all| {
        let embed = all.iter().find(|t| t.0 == "model.embed_tokens.weight");
        let (_, info, data) = embed.expect("an embedding").clone();
        all.push(("lm_head.weight".into(), info, data));
    });
}

/// A tensor taken out of the single file.
fn take(name: &'static str) -> impl Fn(&Path) {
    move |dir| edit_tensors(dir, SINGLE, |all| all.retain(|t| t.0 != name))
}

/// Two bytes of a tensor of the single file overwritten.
fn poke(name: &'static str, at: usize, bytes: [u8; 2]) -> impl Fn(&Path) {
    move |dir| {
        edit_tensors(dir, SINGLE, |all| {
            let tensor = all.iter_mut().find(|t| t.0 == name).expect("a tensor");
            tensor.2[at..at + 2].copy_from_slice(&bytes);
        });
    }
}

/// Spreads the weights over two files with an index.
fn split(dir: &Path) {
    let all = tensors(&read(dir, SINGLE));
    let (first, second) = all.split_at(all.len() / 2);
    let mut weight_map = Map::new();
    for (file, tensors) in [(FIRST, first), (SECOND, second)] {
        write(dir, file, file_of(tensors));
        for tensor in tensors {
            weight_map.insert(tensor.0.clone(), file.into());
        }
    }
    let index = json!({"metadata": {"total_size": 1}, "weight_map": weight_map});
    write(dir, INDEX, index.to_string());
    remove(dir, SINGLE);
}

/// Changes the `weight_map` of the index.
fn edit_index(dir: &Path, change: impl Fn(&mut Map<String, Value>)) {
    edit(dir, INDEX, |map| {
        change(map["weight_map"].as_object_mut().expect("an object"));
    });
}

/// Writes a sparse file, which has a length but takes no room.
fn write_sparse(dir: &Path, file: &str, len: u64) {
    let file = fs::File::create(dir.join(file)).expect("a file in a temporary folder");
    file.set_len(len).expect("a sparse file");
}

const Q0: &str = "model.layers.0.self_attn.q_proj.weight";
const NORM: &str = "model.norm.weight";
const UP1: &str = "model.layers.1.mlp.up_proj.weight";

/// Single values, one kind a line: its name, where the value is set, the key, the value, and what
/// the message must name.
///
/// It is set in one of the configs, or that of a model with a latent (and the message must name the weights where it says so), in the
/// weight map of the index, in a good `rope_scaling` of the type that is named instead, or
/// in the header at the tensor that is named instead.
const VALUES: &str = r#"
no model type | config | model_type | null | model_type
a model type that is a number | config | model_type | 3 | model_type
an unknown model type | config | model_type | "mamba\nx" | 'mamba\nx'
a mixture of experts | config | model_type | "mixtral" | 'mixtral'
another architecture | config | architectures | ["Qwen3ForSequenceClassification"] | architectures
another activation | config | hidden_act | "gelu" | hidden_act 'gelu'
weights quantised by nobody knows what | config | quantization_config | {"bits": 4} | quantization_config.quant_method
weights quantised in a list | config | quantization_config | [4] | quantization_config
weights of bitsandbytes | config | quantization_config | {"quant_method": "bitsandbytes"} | quant_method 'bitsandbytes' is not
weights in f8 of another kind | config | quantization_config | {"quant_method": "fp8", "fmt": "e5m2"} | fmt 'e5m2' is not
fp8 with scales of activations | config | quantization_config | {"quant_method": "fp8", "activation_scheme": "static"} | activation_scheme 'static' is not
fp8 in blocks of one number | config | quantization_config | {"quant_method": "fp8", "weight_block_size": [128]} | quantization_config.weight_block_size
fp8 in blocks of nothing | config | quantization_config | {"quant_method": "fp8", "weight_block_size": [128, 0]} | quantization_config.weight_block_size
fp8 in blocks below nothing | config | quantization_config | {"quant_method": "fp8", "weight_block_size": [-128, 128]} | quantization_config.weight_block_size
fp8 in blocks of parts | config | quantization_config | {"quant_method": "fp8", "weight_block_size": [128, 1.5]} | quantization_config.weight_block_size
fp8 in blocks of all | config | quantization_config | {"quant_method": "fp8", "weight_block_size": [128, 18446744073709551615]} | quantization_config.weight_block_size
fp8 in blocks in words | config | quantization_config | {"quant_method": "fp8", "weight_block_size": "128x128"} | quantization_config.weight_block_size
weights of exl2 | config | compression_config | {"quant_method": "exl2"} | compression_config.quant_method 'exl2' is not
awq for vectors | config | quantization_config | {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"} | version 'gemv' is not
awq for marlin | config | quantization_config | {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "marlin"} | version 'marlin' is not
awq without zero points | config | quantization_config | {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": false} | zero_point false is not
awq in 8 bits | config | quantization_config | {"quant_method": "awq", "bits": 8, "group_size": 128} | bits 8 is not
awq of unknown width | config | quantization_config | {"quant_method": "awq", "group_size": 128} | quantization_config.bits
awq of unknown groups | config | quantization_config | {"quant_method": "awq", "bits": 4} | quantization_config.group_size
groups of nothing | config | quantization_config | {"quant_method": "awq", "bits": 4, "group_size": 0} | quantization_config.group_size
groups below all | config | quantization_config | {"quant_method": "awq", "bits": 4, "group_size": -2} | quantization_config.group_size
groups in words | config | quantization_config | {"quant_method": "awq", "bits": 4, "group_size": "128"} | quantization_config.group_size
gptq in 3 bits | config | quantization_config | {"quant_method": "gptq", "bits": 3, "group_size": 128} | bits 3 is not
gptq for marlin | config | quantization_config | {"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "marlin"} | checkpoint_format 'marlin' is not
gptq for marlin, the old way | config | quantization_config | {"quant_method": "gptq", "bits": 4, "group_size": 128, "is_marlin_format": true} | is_marlin_format true is not
gptq of every module's own | config | quantization_config | {"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {"-:.*down": {}}} | dynamic for '-:.*down' is not
gptq in words of 16 bits | config | quantization_config | {"quant_method": "gptq", "bits": 4, "group_size": 128, "pack_dtype": "int16"} | pack_dtype 'int16' is not
an order that is a number | config | quantization_config | {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": 1} | quantization_config.desc_act
compressed in no format | config | quantization_config | {"quant_method": "compressed-tensors"} | quantization_config.format
compressed in f8 of nothing | config | quantization_config | {"quant_method": "compressed-tensors", "format": "float-quantized"} | quantization_config.config_groups
compressed in another format | config | quantization_config | {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"} | format 'nvfp4-pack-quantized' is not
compressed f8 in 4 bits | config | quantization_config | {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "float"}}}} | num_bits 4 is not
compressed f8 that is whole | config | quantization_config | {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "int"}}}} | type 'int' is not
compressed f8 with zero points | config | quantization_config | {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float", "symmetric": false}}}} | symmetric false is not
compressed f8 in blocks of unknown size | config | quantization_config | {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "block"}}}} | weights.block_structure
compressed f8 by something | config | quantization_config | {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "tensor_group"}}}} | strategy 'tensor_group' is not
compressed f8 with scales of activations | config | quantization_config | {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": {"input_activations": {"num_bits": 8, "dynamic": false}, "weights": {"num_bits": 8, "type": "float", "strategy": "tensor"}}}} | input_activations.dynamic
compressed of nothing | config | quantization_config | {"quant_method": "compressed-tensors", "format": "pack-quantized"} | quantization_config.config_groups
compressed and still frozen | config | quantization_config | {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "frozen"} | quantization_status 'frozen' is not
compressed with a cache | config | quantization_config | {"quant_method": "compressed-tensors", "format": "pack-quantized", "kv_cache_scheme": {"num_bits": 8}} | kv_cache_scheme
compressed and sparse | config | quantization_config | {"quant_method": "compressed-tensors", "format": "pack-quantized", "sparsity_config": {"format": "sparse-24-bitmask"}} | sparsity_config.format 'sparse-24-bitmask' is not
compressed activations | config | quantization_config | {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": {"input_activations": {"num_bits": 8}, "weights": {"num_bits": 8, "strategy": "channel"}}}} | input_activations
compressed without weights | config | quantization_config | {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": {"targets": ["Linear"]}}} | config_groups[…].weights
compressed floats | config | quantization_config | {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "float", "strategy": "channel"}}}} | type 'float' is not
compressed in 2 bits | config | quantization_config | {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": {"weights": {"num_bits": 2, "strategy": "channel"}}}} | num_bits 2 is not
compressed by blocks | config | quantization_config | {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": {"weights": {"num_bits": 4, "strategy": "block"}}}} | strategy 'block' is not
compressed in groups of unknown size | config | quantization_config | {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": {"weights": {"num_bits": 4, "strategy": "group"}}}} | weights.group_size
compressed here and there | config | quantization_config | {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": {"weights": {"num_bits": 4, "strategy": "channel"}}, "group_1": {"weights": {"num_bits": 8, "strategy": "channel"}}}} | group_1 differs
no hidden size | config | hidden_size | null | hidden_size
a hidden size of 0 | config | hidden_size | 0 | hidden_size
a hidden size below 0 | config | hidden_size | -64 | hidden_size
a hidden size with a fraction | config | hidden_size | 64.0 | hidden_size
a hidden size of 2^63 | config | hidden_size | 9223372036854775808 | hidden_size
a hidden size in words | config | hidden_size | "64" | hidden_size
a feed-forward width of 0 | config | intermediate_size | 0 | intermediate_size
no layers | config | num_hidden_layers | 0 | num_hidden_layers
10^12 layers | config | num_hidden_layers | 1000000000000 | num_hidden_layers
1025 layers | config | num_hidden_layers | 1025 | num_hidden_layers
heads below 0 | config | num_attention_heads | -4 | num_attention_heads
heads that overflow | config | num_attention_heads | 16777216 | num_attention_heads
KV heads that do not divide the heads | config | num_key_value_heads | 3 | num_key_value_heads
no KV heads | config | num_key_value_heads | 0 | num_key_value_heads
more KV heads than heads | config | num_key_value_heads | 8 | num_key_value_heads
a head of 12 | config | head_dim | 12 | head_dim 12
a head of 264 | config | head_dim | 264 | head_dim 264
a head of 2^60 | config | head_dim | 1152921504606846976 | head_dim
no vocabulary | config | vocab_size | 0 | vocab_size
an epsilon of 0 | config | rms_norm_eps | 0.0 | rms_norm_eps
an epsilon below 0 | config | rms_norm_eps | -1e-6 | rms_norm_eps
an epsilon that f32 rounds to 0 | config | rms_norm_eps | 1e-60 | rms_norm_eps
an epsilon in words | config | rms_norm_eps | "1e-6" | rms_norm_eps
no positions | config | max_position_embeddings | 0 | max_position_embeddings
10^15 positions | config | max_position_embeddings | 1000000000000000 | max_position_embeddings
a tie in words | config | tie_word_embeddings | "true" | tie_word_embeddings
an end id beyond 32 bits | config | eos_token_id | [2, 4294967296] | eos_token_id
an end id below 0 | config | eos_token_id | -1 | eos_token_id
a first id with a fraction | config | bos_token_id | 1.5 | bos_token_id
an end id in words | config | eos_token_id | ["</s>"] | eos_token_id
a sliding layer | config | layer_types | ["full_attention", "sliding_attention", "full_attention"] | layer_types: has sliding_attention
an unknown kind of layer | config | layer_types | ["full_attention", "chunked_attention", "full_attention"] | layer_types "chunked_attention" is not
a kind of layer that is a number | config | layer_types | [1, 1, 1] | layer_types 1 is not
layer types in one word | config | layer_types | "full_attention" | layer_types
too many layer types | config | layer_types | ["full_attention", "full_attention", "full_attention", "full_attention"] | layer_types
a window of 0 | config | sliding_window | 0 | sliding_window
a window below 0 | config | sliding_window | -1 | sliding_window
a window with a fraction | config | sliding_window | 64.5 | sliding_window
a window beyond 2^32 | config | sliding_window | 4294967297 | sliding_window
a window that is switched in words | config | use_sliding_window | "yes" | use_sliding_window
too few layer types | config | layer_types | ["full_attention"] | layer_types
a base of 0 | config | rope_theta | 0 | rope_theta
a base below 0 | config | rope_theta | -1e4 | rope_theta
a base beyond f32 | config | rope_theta | 1e60 | rope_theta
a base that makes frequencies overflow | config | rope_theta | 1e-44 | rope_theta
rope scaling in words | config | rope_scaling | "yarn" | rope_scaling
rope scaling without a type | config | rope_scaling | {"factor": 2.0} | rope_scaling.rope_type
two types | config | rope_scaling | {"type": "yarn", "rope_type": "default"} | rope_scaling.rope_type
su without its tables | config | rope_scaling | {"type": "su"} | rope_scaling.short_factor
two bases that differ | config | rope_parameters | {"rope_type": "default", "rope_theta": 1e4} | rope_parameters.rope_theta
parameters per kind of layer | config | rope_parameters | {"full_attention": {"rope_type": "default"}} | rope_parameters
no channel rotated | config | partial_rotary_factor | 0 | partial_rotary_factor
more than a head rotated | config | partial_rotary_factor | 1.5 | partial_rotary_factor
a share of a head below 0 | config | partial_rotary_factor | -0.5 | partial_rotary_factor
a share of a head in words | config | partial_rotary_factor | "half" | partial_rotary_factor
an odd number of channels rotated | config | partial_rotary_factor | 0.1 | partial_rotary_factor
no channel rotated, inside | config | rope_parameters | {"rope_type": "default", "partial_rotary_factor": 0.01} | partial_rotary_factor
longrope with a short table too short | config | rope_scaling | {"type": "longrope", "short_factor": [1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5], "long_factor": [1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5]} | rope_scaling.short_factor
longrope with a long table too long | config | rope_scaling | {"type": "longrope", "short_factor": [1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5], "long_factor": [1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5]} | rope_scaling.long_factor
longrope with an empty table | config | rope_scaling | {"type": "longrope", "short_factor": [], "long_factor": [1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5]} | rope_scaling.short_factor
longrope without a long table | config | rope_scaling | {"type": "longrope", "short_factor": [1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5], "long_factor": null} | rope_scaling.long_factor
longrope with a table of one number | config | rope_scaling | {"type": "longrope", "short_factor": 1.5, "long_factor": [1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5]} | rope_scaling.short_factor
longrope with a factor of 0 | config | rope_scaling | {"type": "longrope", "short_factor": [1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5], "long_factor": [1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 0]} | rope_scaling.long_factor
longrope with a factor below 0 | config | rope_scaling | {"type": "longrope", "short_factor": [1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, -1], "long_factor": [1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5]} | rope_scaling.short_factor
longrope with a factor in words | config | rope_scaling | {"type": "longrope", "short_factor": [1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, "1.5"], "long_factor": [1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5]} | rope_scaling.short_factor
longrope with a factor beyond f32 | config | rope_scaling | {"type": "longrope", "short_factor": [1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1e60], "long_factor": [1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5]} | rope_scaling.short_factor
longrope with an attention factor of 0 | config | rope_scaling | {"type": "longrope", "short_factor": [1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5], "long_factor": [1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5], "attention_factor": 0} | rope_scaling.attention_factor
longrope from 1 position | config | rope_scaling | {"type": "longrope", "short_factor": [1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5], "long_factor": [1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5], "original_max_position_embeddings": 1} | original_max_position_embeddings
longrope with a scaling factor of 0 | config | rope_scaling | {"type": "longrope", "short_factor": [1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5], "long_factor": [1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5], "factor": 0} | rope_scaling.factor
a missing head that is not tied | config and weights | tie_word_embeddings | false | lm_head.weight
a vocabulary larger than the embedding | config and weights | vocab_size | 513 | model.embed_tokens.weight
a feed-forward width other than the tensors' | config and weights | intermediate_size | 120 | mlp.gate_proj.weight
more layers than there are tensors | config and weights | num_hidden_layers | 4 | model.layers.3.
fewer layers than there are tensors | config and weights | num_hidden_layers | 2 | model.layers.2.
a head size other than the tensors' | config and weights | head_dim | 16 | self_attn.q_proj.weight
dynamic scaling | dynamic | factor | 2.0 | 'dynamic'
longrope without its tables | longrope | factor | 2.0 | rope_scaling.short_factor
linear scaling without a factor | linear | factor | null | rope_scaling.factor
linear scaling that speeds up | linear | factor | 0.5 | rope_scaling.factor
an unknown kind of scaling | mrope | factor | 2.0 | 'mrope'
a yarn factor of 0 | yarn | factor | 0 | rope_scaling.factor
a yarn factor below 1 | yarn | factor | 0.5 | rope_scaling.factor
yarn over positions with a fraction | yarn | original_max_position_embeddings | 256.5 | original_max_position_embeddings
yarn with its betas swapped | yarn | beta_fast | 0.5 | rope_scaling.beta_fast
yarn with a beta of 0 | yarn | beta_slow | 0 | rope_scaling.beta_slow
yarn with an mscale below 0 | yarn | mscale | -1 | rope_scaling.mscale
yarn with an attention factor of 0 | yarn | attention_factor | 0 | rope_scaling.attention_factor
yarn with truncate in words | yarn | truncate | "no" | rope_scaling.truncate
llama3 without a factor | llama3 | factor | null | rope_scaling.factor
llama3 with its bounds swapped | llama3 | low_freq_factor | 5.0 | rope_scaling.high_freq_factor
llama3 with equal bounds | llama3 | low_freq_factor | 4.0 | rope_scaling.high_freq_factor
a latent of 0 | deepseek | kv_lora_rank | 0 | kv_lora_rank
no latent | deepseek | kv_lora_rank | null | kv_lora_rank
a latent of 2^60 | deepseek | kv_lora_rank | 1152921504606846976 | kv_lora_rank
a latent wider than is computed | deepseek | kv_lora_rank | 1017 | kv_lora_rank 1017 with 8 rotated channels is not
a latent in words | deepseek | kv_lora_rank | "16" | kv_lora_rank
compressed queries of 0 | deepseek | q_lora_rank | 0 | q_lora_rank
compressed queries below 0 | deepseek | q_lora_rank | -24 | q_lora_rank
no channel of a key rotated | deepseek | qk_rope_head_dim | 0 | qk_rope_head_dim
an odd number of channels of a key rotated | deepseek | qk_rope_head_dim | 7 | qk_rope_head_dim
more channels of a key rotated than is computed | deepseek | qk_rope_head_dim | 16777216 | head_dim
no channel of a key unrotated | deepseek | qk_nope_head_dim | 0 | qk_nope_head_dim
a key of 2^24 channels | deepseek | qk_nope_head_dim | 16777216 | head_dim
values of 0 | deepseek | v_head_dim | 0 | v_head_dim
values of 2^24 channels | deepseek | v_head_dim | 16777216 | num_attention_heads
a head other than what rotates | deepseek | head_dim | 16 | head_dim
keys shared by heads twice | deepseek | num_key_value_heads | 2 | num_key_value_heads
interleaving as a number | deepseek | rope_interleave | 1 | rope_interleave
no experts to choose from | deepseek | n_routed_experts | 0 | n_routed_experts
2^20 experts | deepseek | n_routed_experts | 1048576 | n_routed_experts
groups that do not divide the experts | deepseek | n_group | 3 | n_group
groups of one expert | deepseek | n_group | 8 | n_group
no groups | deepseek | n_group | 0 | n_group
more groups than there are | deepseek | topk_group | 5 | topk_group
more experts than there are | deepseek | num_experts_per_tok | 9 | num_experts_per_tok
more experts than the groups have | deepseek | num_experts_per_tok | 5 | num_experts_per_tok
shared experts of 2^30 columns | deepseek | n_shared_experts | 1000000 | n_shared_experts
experts of 0 | deepseek | moe_intermediate_size | 0 | moe_intermediate_size
weights of experts times 0 | deepseek | routed_scaling_factor | 0 | routed_scaling_factor
weights of experts beyond f32 | deepseek | routed_scaling_factor | 1e60 | routed_scaling_factor
normalised as a number | deepseek | norm_topk_prob | 1 | norm_topk_prob
a softmax of groups | deepseek | scoring_func | "softmax" | scoring_func 'softmax' is not
another way to choose | deepseek | topk_method | "group_limited_greedy" | topk_method 'group_limited_greedy' is not
experts in every other layer | deepseek | moe_layer_freq | 2 | moe_layer_freq 2 is not
dense layers below 0 | deepseek | first_k_dense_replace | -1 | first_k_dense_replace
further tokens below 0 | deepseek | num_nextn_predict_layers | -1 | num_nextn_predict_layers
a latent other than the tensors' | deepseek and weights | kv_lora_rank | 24 | self_attn.kv_a_proj_with_mqa.weight
values other than the tensors' | deepseek and weights | v_head_dim | 24 | self_attn.kv_b_proj.weight
queries that are not compressed but in the tensors | deepseek and weights | q_lora_rank | null | self_attn.q_a_layernorm.weight
more shared experts than in the tensors | deepseek and weights | n_shared_experts | 2 | mlp.shared_experts.gate_proj.weight
no shared experts but in the tensors | deepseek and weights | n_shared_experts | 0 | mlp.shared_experts
more dense layers than in the tensors | deepseek and weights | first_k_dense_replace | 2 | model.layers.1.mlp.
more layers behind the last than said | deepseek and weights | num_hidden_layers | 1 | model.layers.2.
a temperature below 0 | generation | temperature | -1 | temperature
a temperature beyond f32 | generation | temperature | 1e300 | temperature
a temperature in words | generation | temperature | "hot" | temperature
a top_k below 0 | generation | top_k | -1 | top_k
a top_k with a fraction | generation | top_k | 20.5 | top_k
a top_p of 0 | generation | top_p | 0.0 | top_p
a top_p above 1 | generation | top_p | 1.5 | top_p
a min_p above 1 | generation | min_p | 2 | min_p
a min_p below 0 | generation | min_p | -0.1 | min_p
do_sample as a number | generation | do_sample | 1 | do_sample
an end id for sampling below 0 | generation | eos_token_id | -2 | eos_token_id
end ids in a list of lists | generation | eos_token_id | [[2]] | eos_token_id
an unknown key at a tensor | model.norm.weight | strides | [1] | model.norm.weight
an unknown type | model.norm.weight | dtype | "F12" | model.norm.weight
a dimension below 0 | model.norm.weight | shape | [-64] | model.norm.weight
a dimension with a fraction | model.norm.weight | shape | [64.0] | model.norm.weight
a shape whose product overflows | model.norm.weight | shape | [8589934592, 8589934592] | model.norm.weight
a shape whose bytes overflow | model.norm.weight | shape | [4611686018427387904] | model.norm.weight
nine dimensions | model.norm.weight | shape | [64, 1, 1, 1, 1, 1, 1, 1, 1] | model.norm.weight
a shape that does not fit its bytes | model.norm.weight | shape | [63] | model.norm.weight
offsets below 0 | model.norm.weight | data_offsets | [-2, 126] | model.norm.weight
offsets the wrong way round | model.norm.weight | data_offsets | [128, 0] | model.norm.weight
offsets beyond the file | model.norm.weight | data_offsets | [1073741824, 1073741952] | model.norm.weight
offsets up to 2^64 - 1 | model.norm.weight | data_offsets | [18446744073709551487, 18446744073709551615] | model.norm.weight
three offsets | model.norm.weight | data_offsets | [0, 128, 256] | model.norm.weight
two tensors over the same bytes | model.norm.weight | data_offsets | [0, 128] | overlap
a matrix the other way round | model.layers.0.self_attn.q_proj.weight | shape | [64, 128] | model.layers.0.self_attn.q_proj.weight
a matrix as a vector | model.layers.0.self_attn.q_proj.weight | shape | [8192] | model.layers.0.self_attn.q_proj.weight
weights in integers | model.layers.0.self_attn.q_proj.weight | dtype | "I16" | I16
a weight map of numbers | index | model.norm.weight | 2 | weight_map
a shard in another folder | index | model.norm.weight | "../x.safetensors" | model.norm.weight
a shard with an absolute path | index | model.norm.weight | "/x.safetensors" | model.norm.weight
a hidden shard | index | model.norm.weight | ".x.safetensors" | model.norm.weight
a shard without a name | index | model.norm.weight | ".safetensors" | model.norm.weight
a shard of another kind | index | model.norm.weight | "pytorch_model.bin" | model.norm.weight
a shard with a line break in its name | index | model.norm.weight | "a\n.safetensors" | model.norm.weight
"#;

fn value_rows() -> Vec<Row> {
    let row_of = |line: &'static str| {
        let cells: Vec<_> = line.split(" | ").collect();
        let [name, place, key, value, said] = cells[..] else {
            panic!("five cells: {line}");
        };
        let value: Value = serde_json::from_str(value).expect("a value in JSON");
        match place {
            "config" => row(name, CONFIG, said, set(key, value)),
            "config and weights" => row(name, SINGLE, said, set(key, value)),
            "deepseek" => on(DEEPSEEK, name, CONFIG, said, set(key, value)),
            "deepseek and weights" => on(DEEPSEEK, name, SINGLE, said, set(key, value)),
            "generation" => row(name, GENERATION, said, set_generation(key, value)),
            "index" => row2(name, INDEX, said, move |dir| {
                edit_index(dir, |map| drop(map.insert(key.into(), value.clone())));
            }),
            tensor if tensor.contains('.') => {
                row(name, SINGLE, said, set_tensor(tensor, key, value))
            }
            kind => row(name, CONFIG, said, set_rope(kind, key, value)),
        }
    };
    VALUES.trim().lines().map(row_of).collect()
}

fn config_rows() -> Vec<Row> {
    let c = CONFIG;
    vec![
        row("no config", c, "file", |dir| remove(dir, CONFIG)),
        row("an empty config", c, "JSON", |dir| write(dir, CONFIG, "")),
        row("a config cut in half", c, "JSON", |dir| {
            let bytes = read(dir, CONFIG);
            write(dir, CONFIG, &bytes[..bytes.len() / 2]);
        }),
        row("a config that is a list", c, "JSON", |dir| {
            write(dir, CONFIG, "[1]");
        }),
        row("a config with text after its end", c, "JSON", |dir| {
            write(dir, CONFIG, [read(dir, CONFIG), b"{}".to_vec()].concat());
        }),
        row("a config that is not UTF-8", c, "UTF-8", |dir| {
            write(dir, CONFIG, b"{\"model_type\": \"\xff\"}");
        }),
        row("a config with a byte order mark", c, "JSON", |dir| {
            write(
                dir,
                CONFIG,
                [b"\xef\xbb\xbf".to_vec(), read(dir, CONFIG)].concat(),
            );
        }),
        row("a config of 2 MiB", c, "file length", |dir| {
            write(
                dir,
                CONFIG,
                [read(dir, CONFIG), vec![b' '; 2 << 20]].concat(),
            );
        }),
        row("a config of a terabyte", c, "file length", |dir| {
            write_sparse(dir, CONFIG, 1 << 40);
        }),
        row("a config that nests 65 levels", c, "levels", |dir| {
            write(
                dir,
                CONFIG,
                format!("{{\"a\":{}{}}}", "[".repeat(64), "]".repeat(64)),
            );
        }),
        row("a config that nests 500,000 levels", c, "levels", |dir| {
            write(dir, CONFIG, format!("{{\"a\":{}", "[".repeat(500_000)));
        }),
        row("a key that is there twice", c, "hidden_size", |dir| {
            let text = String::from_utf8(read(dir, CONFIG)).expect("text");
            write(dir, CONFIG, text.replacen('{', "{\"hidden_size\": 64,", 1));
        }),
        row("a number beyond f64", c, "JSON", |dir| {
            write(
                dir,
                CONFIG,
                "{\"model_type\": \"qwen3\", \"rope_theta\": 1e999}",
            );
        }),
        row("NaN in place of a number", c, "JSON", |dir| {
            write(
                dir,
                CONFIG,
                "{\"model_type\": \"qwen3\", \"rms_norm_eps\": NaN}",
            );
        }),
        row("a config that is a folder", c, "file", |dir| {
            remove(dir, CONFIG);
            fs::create_dir(dir.join(CONFIG)).expect("a folder");
        }),
        on(
            "llama",
            "heads that do not divide the hidden size",
            c,
            "num_attention_heads",
            |dir| {
                set("head_dim", Value::Null)(dir);
                set("num_key_value_heads", json!(1))(dir);
                set("num_attention_heads", json!(3))(dir);
            },
        ),
        row("a window in half of the words", c, "layer_types", |dir| {
            set("sliding_window", json!(64))(dir);
            set("layer_types", json!(vec!["sliding_attention"; 3]))(dir);
        }),
        on("llama", "a window of llama", c, "layer_types", |dir| {
            set("sliding_window", json!(64))(dir);
            set("layer_types", json!(vec!["sliding_attention"; 3]))(dir);
        }),
    ]
}

/// A model with a latent and experts.
const DEEPSEEK: &str = "../plain_deepseek_v3/model";

fn latent_rows() -> Vec<Row> {
    let without = |tensor: &'static str| move |dir: &Path| take(tensor)(dir);
    vec![
        on(DEEPSEEK, "no word of queries", CONFIG, "q_lora_rank", |d| {
            edit(d, CONFIG, |map| drop(map.remove("q_lora_rank")));
        }),
        on(
            DEEPSEEK,
            "experts without a bias for the choice",
            SINGLE,
            "e_score_correction_bias",
            without("model.layers.1.mlp.gate.e_score_correction_bias"),
        ),
        on(
            DEEPSEEK,
            "a latent without its norm",
            SINGLE,
            "kv_a_layernorm",
            without("model.layers.2.self_attn.kv_a_layernorm.weight"),
        ),
        on(
            DEEPSEEK,
            "a layer for further tokens that should not be",
            SINGLE,
            "model.layers.3.eh_proj.weight",
            |dir| {
                add("model.layers.3.eh_proj.weight", "BF16", json!([8]), 16)(dir);
                set("num_nextn_predict_layers", json!(0))(dir);
            },
        ),
        on(
            DEEPSEEK,
            "a second layer for further tokens",
            SINGLE,
            "model.layers.4.eh_proj.weight",
            add("model.layers.4.eh_proj.weight", "BF16", json!([8]), 16),
        ),
    ]
}

fn rope_rows() -> Vec<Row> {
    let c = CONFIG;
    vec![
        row("two spellings that differ", c, "contradicts", |dir| {
            set_rope("yarn", "factor", json!(2.0))(dir);
            set("rope_parameters", json!({"rope_type": "default"}))(dir);
        }),
        row(
            "yarn over more than all positions",
            c,
            "original_max_position_embeddings",
            |dir| {
                set(
                    "rope_scaling",
                    json!({"type": "yarn", "original_max_position_embeddings": 4096}),
                )(dir);
            },
        ),
        row("two shares of a head", c, "partial_rotary_factor", |dir| {
            let inside = json!({"rope_type": "default", "partial_rotary_factor": 0.5});
            set("rope_parameters", inside)(dir);
            set("partial_rotary_factor", json!(0.25))(dir);
        }),
        row(
            "a share of a head, and stretched",
            c,
            "partial_rotary",
            |dir| {
                set_rope("yarn", "factor", json!(2.0))(dir);
                set("partial_rotary_factor", json!(0.5))(dir);
            },
        ),
        row("two first lengths", c, "original_max_position", |dir| {
            set_rope("yarn", "factor", json!(2.0))(dir);
            set("original_max_position_embeddings", json!(512))(dir);
        }),
        on(PHI3, "a table for all of a head", c, "long_factor", |dir| {
            let tables = json!({"type": "longrope", "short_factor": vec![1.5; 6],
                "long_factor": vec![1.5; 8]});
            set("rope_scaling", tables)(dir);
            set("partial_rotary_factor", json!(0.75))(dir);
        }),
        row("yarn with a base of 1", c, "rope_theta", |dir| {
            set_rope("yarn", "factor", json!(2))(dir);
            set("rope_theta", json!(1.0))(dir);
        }),
    ]
}

fn generation_rows() -> Vec<Row> {
    let g = GENERATION;
    vec![
        row("a generation config that is empty", g, "JSON", |dir| {
            write(dir, GENERATION, "");
        }),
        row("a generation config of 2 MiB", g, "file length", |dir| {
            write(dir, GENERATION, vec![b' '; 2 << 20]);
        }),
    ]
}

fn header_rows() -> Vec<Row> {
    let s = SINGLE;
    vec![
        row("no weights", s, "file", |dir| remove(dir, SINGLE)),
        row("an empty weight file", s, "header length", |dir| {
            write(dir, SINGLE, "");
        }),
        row("seven bytes", s, "header length", |dir| {
            write(dir, SINGLE, [0; 7]);
        }),
        row("a header of no bytes", s, "header", |dir| {
            write(dir, SINGLE, [0; 8]);
        }),
        row("a header of 2^64 - 1 bytes", s, "header length", |dir| {
            write(dir, SINGLE, u64::MAX.to_le_bytes());
        }),
        row("a header of 100,000,001 bytes", s, "header length", |dir| {
            let mut bytes = vec![0; 1 << 10];
            bytes[..8].copy_from_slice(&100_000_001_u64.to_le_bytes());
            write(dir, SINGLE, bytes);
        }),
        row("a header of 17 MiB", s, "header length", |dir| {
            write(dir, SINGLE, whole(vec![b' '; 17 << 20], &[]));
        }),
        row("a header longer than its file", s, "header length", |dir| {
            let mut bytes = read(dir, SINGLE);
            let len = bytes.len() as u64 - 7;
            bytes[..8].copy_from_slice(&len.to_le_bytes());
            write(dir, SINGLE, bytes);
        }),
        row("a web page", s, "header length", |dir| {
            write(dir, SINGLE, "<!DOCTYPE html><html>not found</html>");
        }),
        row("a pointer of git-lfs", s, "header length", |dir| {
            write(
                dir,
                SINGLE,
                "version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            );
        }),
        row("a header that is not UTF-8", s, "UTF-8", |dir| {
            write(dir, SINGLE, whole(b"{\"\xff\":1}", &[]));
        }),
        row("a header that is a list", s, "header", |dir| {
            write(dir, SINGLE, whole("[]", &[]));
        }),
        row("a space before the header", s, "header", |dir| {
            edit_text(dir, |t| format!(" {t}"));
        }),
        row("a line break after the header", s, "header", |dir| {
            edit_text(dir, |t| format!("{t}\n"));
        }),
        row("a second object after the header", s, "header", |dir| {
            edit_text(dir, |t| format!("{t}{{}}"));
        }),
        row("a header that nests 10,000 levels", s, "levels", |dir| {
            write(
                dir,
                SINGLE,
                whole(format!("{{\"a\":{}}}", "[".repeat(10_000)), &[]),
            );
        }),
        row("a tensor that is there twice", s, NORM, |dir| {
            edit_text(dir, |t| {
                let info = r#"{"dtype":"BF16","shape":[0],"data_offsets":[0,0]}"#;
                t.replacen('{', &format!("{{\"{NORM}\":{info},"), 1)
            });
        }),
        row("metadata that is not text", s, "__metadata__", |dir| {
            edit_header(dir, |h| {
                drop(h.insert("__metadata__".into(), json!({"format": 1})));
            });
        }),
        row(
            "a metadata key that is there twice",
            s,
            "__metadata__",
            |dir| {
                edit_text(dir, |t| {
                    t.replace("\"format\":\"pt\"", "\"format\":\"pt\",\"format\":\"tf\"")
                });
            },
        ),
        row("a key that is there twice at a tensor", s, "dtype", |dir| {
            edit_text(dir, |t| {
                t.replacen("\"dtype\":", "\"dtype\":\"F32\",\"dtype\":", 1)
            });
        }),
        row(
            "2^20 dimensions",
            s,
            NORM,
            set_tensor(NORM, "shape", json!(vec![1; 1 << 20])),
        ),
        row("a tensor without a shape", s, NORM, |dir| {
            edit_header(dir, |h| {
                h[NORM].as_object_mut().expect("a tensor").remove("shape");
            });
        }),
        row("a tensor that is a list", s, NORM, |dir| {
            edit_header(dir, |h| h[NORM] = json!(["BF16", [64], [0, 128]]));
        }),
        row("a hole between tensors", s, "hole", |dir| {
            edit_header(dir, |h| drop(h.remove(UP1)));
        }),
        row("a byte too many", s, "file length", |dir| {
            write(dir, SINGLE, [read(dir, SINGLE), vec![0]].concat());
        }),
        row("a byte too few", s, "data_offsets", |dir| {
            let bytes = read(dir, SINGLE);
            write(dir, SINGLE, &bytes[..bytes.len() - 1]);
        }),
        row(
            "a name that climbs",
            s,
            "../../etc/passwd",
            add("../../etc/passwd", "U8", json!([1]), 1),
        ),
        row(
            "a name with a NUL",
            s,
            "a\\u{0}b",
            add("a\0b", "U8", json!([1]), 1),
        ),
        row("an empty name", s, "name has", add("", "U8", json!([1]), 1)),
        row("a name of a megabyte", s, "name has", |dir| {
            edit_tensors(dir, SINGLE, |all| {
                all.push((
                    "x".repeat(1 << 20),
                    json!({"dtype": "U8", "shape": [1]}),
                    vec![0],
                ));
            });
        }),
        row("400,000 empty tensors", s, "header length", |dir| {
            write(dir, SINGLE, empties(400_000));
        }),
        row("200,001 empty tensors", s, "200000 tensors", |dir| {
            write(dir, SINGLE, empties(200_001));
        }),
        row("a weight file that is a folder", s, "file", |dir| {
            remove(dir, SINGLE);
            fs::create_dir(dir.join(SINGLE)).expect("a folder");
        }),
    ]
}

/// A file of empty tensors, each with a short name.
fn empties(n: usize) -> Vec<u8> {
    let all: Vec<_> = (0..n)
        .map(|i| format!("\"{i}\":{{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}"))
        .collect();
    whole(format!("{{{}}}", all.join(",")), &[])
}

/// A model whose layers have queries, keys and values in one tensor, gate and up in one.
const PHI3: &str = "../plain_phi3/model";

fn fused_rows() -> Vec<Row> {
    const QKV: &str = "model.layers.1.self_attn.qkv_proj.weight";
    const GATE_UP: &str = "model.layers.1.mlp.gate_up_proj.weight";
    const KEYS: &str = "model.layers.1.self_attn.k_proj.weight";
    let s = SINGLE;
    let on = |name, field, damage: Box<dyn Fn(&Path)>| on(PHI3, name, s, field, damage);
    vec![
        on(
            "no fused tensor",
            "q_proj.weight: is missing",
            Box::new(take(QKV)),
        ),
        on(
            "a part beside the fused tensor",
            "k_proj.weight: is there beside model.layers.1.self_attn.qkv_proj.weight",
            Box::new(add(KEYS, "BF16", json!([32, 64]), 4096)),
        ),
        on(
            "a fused tensor that lacks a row",
            "qkv_proj.weight: expected shape [128, 64]",
            Box::new(|dir| {
                take(QKV)(dir);
                add(QKV, "BF16", json!([127, 64]), 127 * 128)(dir);
            }),
        ),
        on(
            "a fused tensor of one part",
            "gate_up_proj.weight: expected shape [224, 64]",
            Box::new(|dir| {
                take(GATE_UP)(dir);
                add(GATE_UP, "BF16", json!([112, 64]), 112 * 128)(dir);
            }),
        ),
        on(
            "something else of a fused module",
            "gate_up_proj.scale",
            Box::new(add(
                "model.layers.1.mlp.gate_up_proj.scale",
                "F32",
                json!([1]),
                4,
            )),
        ),
        on(
            "a fused bias in one layer",
            "model.layers.0.self_attn.q",
            Box::new(add(
                "model.layers.1.self_attn.qkv_proj.bias",
                "BF16",
                json!([128]),
                256,
            )),
        ),
        on(
            "codes of a fused matrix that is not said to be quantised",
            "gate_up_proj.qweight",
            Box::new(add(
                "model.layers.1.mlp.gate_up_proj.qweight",
                "I32",
                json!([1]),
                4,
            )),
        ),
        on(
            "a NaN in a fused tensor",
            "qkv_proj.weight: NaN at element 1",
            Box::new(poke(QKV, 2, [0xc0, 0x7f])),
        ),
    ]
}

fn tensor_rows() -> Vec<Row> {
    let s = SINGLE;
    vec![
        row("a missing weight", s, UP1, take(UP1)),
        row(
            "a missing embedding",
            s,
            "model.embed_tokens.weight",
            take("model.embed_tokens.weight"),
        ),
        row(
            "one norm on queries missing",
            s,
            "model.layers.1.self_attn.q_norm.weight",
            take("model.layers.1.self_attn.q_norm.weight"),
        ),
        on(
            "qwen2",
            "one bias missing",
            s,
            "model.layers.2.self_attn.k_proj.bias",
            take("model.layers.2.self_attn.k_proj.bias"),
        ),
        on(
            "llama",
            "a missing head",
            s,
            "lm_head.weight",
            take("lm_head.weight"),
        ),
        row(
            "an expert",
            s,
            "model.layers.0.mlp.experts.0.up_proj.weight",
            add(
                "model.layers.0.mlp.experts.0.up_proj.weight",
                "BF16",
                json!([1]),
                2,
            ),
        ),
        row(
            "packed weights",
            s,
            "model.layers.0.mlp.up_proj.qweight",
            add("model.layers.0.mlp.up_proj.qweight", "I32", json!([1]), 4),
        ),
        row(
            "a bias of the head",
            s,
            "lm_head.bias",
            add("lm_head.bias", "BF16", json!([512]), 1024),
        ),
        row(
            "a norm after the feed-forward block",
            s,
            "post_feedforward_layernorm",
            add(
                "model.layers.0.post_feedforward_layernorm.weight",
                "BF16",
                json!([64]),
                128,
            ),
        ),
        row("weights in f8", s, "F8_E4M3", |dir| {
            set_tensor(NORM, "dtype", json!("F8_E4M3"))(dir);
            set_tensor(NORM, "shape", json!([128]))(dir);
        }),
        row("weights in f64", s, "F64", |dir| {
            set_tensor(NORM, "dtype", json!("F64"))(dir);
            set_tensor(NORM, "shape", json!([16]))(dir);
        }),
        row(
            "NaN in a weight",
            s,
            "NaN at element 5 of",
            poke(Q0, 10, [0xc0, 0x7f]),
        ),
        row(
            "infinity in a weight",
            s,
            "infinity at element 0 of",
            poke(NORM, 0, [0x80, 0xff]),
        ),
        row(
            "NaN in the second piece of a weight",
            s,
            "NaN at element 32767 of",
            poke("model.embed_tokens.weight", 65_534, [0x81, 0x7f]),
        ),
        on(
            "llama",
            "NaN in an f16 weight",
            s,
            "NaN at element 1 of",
            poke(NORM, 2, [0x01, 0x7c]),
        ),
        on(
            "qwen2",
            "infinity in an f32 weight",
            s,
            "infinity at element 1 of",
            |dir| {
                poke(NORM, 4, [0, 0])(dir);
                poke(NORM, 6, [0x80, 0x7f])(dir);
            },
        ),
    ]
}

const AWQ: &str = "../awq_qwen2_g128/model";
const GPTQ: &str = "../gptq_qwen2_g128_sym/model";
const DOWN: &str = "model.layers.0.mlp.down_proj";

/// One key of `quantization_config` set.
fn set_quant(key: &'static str, value: Value) -> impl Fn(&Path) {
    move |dir| {
        edit(dir, CONFIG, |map| {
            map["quantization_config"][key] = value.clone();
        });
    }
}

/// Metadata of quantised weights that is not that of the files.
fn quant_rows() -> Vec<Row> {
    let s = SINGLE;
    let of = |end: &str| -> &'static str { format!("{DOWN}.{end}").leak() };
    let (codes, scales, zeros) = (of("qweight"), of("scales"), of("qzeros"));
    let order = of("g_idx");
    vec![
        on(AWQ, "codes without a word in the config", s, codes, |dir| {
            edit(dir, CONFIG, |map| drop(map.remove("quantization_config")));
        }),
        on(
            AWQ,
            "awq that says gptq",
            s,
            "qweight",
            set_quant("quant_method", json!("gptq")),
        ),
        on(GPTQ, "gptq that says awq", s, "g_idx", |dir| {
            set_quant("quant_method", json!("awq"))(dir);
        }),
        on(
            AWQ,
            "groups of half the size",
            s,
            "scales",
            set_quant("group_size", json!(64)),
        ),
        on(
            AWQ,
            "groups of twice the size",
            s,
            "scales",
            set_quant("group_size", json!(256)),
        ),
        on(
            AWQ,
            "groups of whole rows",
            s,
            "scales",
            set_quant("group_size", json!(-1)),
        ),
        on(
            AWQ,
            "groups that no kernel reads",
            s,
            "group_size 24",
            set_quant("group_size", json!(24)),
        ),
        on(AWQ, "codes missing", s, of("weight"), |dir| {
            edit_tensors(dir, SINGLE, |all| {
                all.retain(|t| !t.0.starts_with(DOWN) || t.0.ends_with("bias"));
            });
        }),
        on(AWQ, "codes missing beside scales", s, codes, take(codes)),
        on(AWQ, "scales missing", s, scales, take(scales)),
        on(AWQ, "zero points missing", s, zeros, take(zeros)),
        on(GPTQ, "scales of gptq missing", s, scales, take(scales)),
        on(GPTQ, "zero points of gptq missing", s, zeros, take(zeros)),
        on(
            AWQ,
            "codes in float",
            s,
            "qweight in F32",
            set_tensor(codes, "dtype", json!("F32")),
        ),
        on(
            AWQ,
            "zero points in U32",
            s,
            "qzeros in U32",
            set_tensor(zeros, "dtype", json!("U32")),
        ),
        on(
            AWQ,
            "scales in I16",
            s,
            "scales in I16",
            set_tensor(scales, "dtype", json!("I16")),
        ),
        on(
            AWQ,
            "codes lying down",
            s,
            codes,
            set_tensor(codes, "shape", json!([16, 256])),
        ),
        on(
            AWQ,
            "codes in a row",
            s,
            codes,
            set_tensor(codes, "shape", json!([4096])),
        ),
        on(
            AWQ,
            "scales lying down",
            s,
            scales,
            set_tensor(scales, "shape", json!([128, 2])),
        ),
        on(
            AWQ,
            "zero points lying down",
            s,
            zeros,
            set_tensor(zeros, "shape", json!([16, 2])),
        ),
        on(
            AWQ,
            "NaN in a scale",
            s,
            "mlp.down_proj.scales: NaN at element 130 of",
            poke(scales, 260, [0x01, 0x7e]),
        ),
        on(
            AWQ,
            "infinity in a scale",
            s,
            "mlp.down_proj.scales: infinity at element 0 of",
            poke(scales, 0, [0x00, 0xfc]),
        ),
        on(
            AWQ,
            "floats beside codes",
            s,
            "which of them counts?",
            add(of("weight"), "F16", json!([128, 256]), 65_536),
        ),
        on(
            AWQ,
            "a quantised head",
            s,
            "lm_head.qweight",
            add("lm_head.qweight", "I32", json!([1]), 4),
        ),
        on(
            AWQ,
            "an order in awq",
            s,
            order,
            add(order, "I32", json!([256]), 1024),
        ),
        on(
            GPTQ,
            "no order where there must be one",
            s,
            "g_idx",
            |dir| {
                take("model.layers.0.mlp.down_proj.g_idx")(dir);
                set_quant("desc_act", json!(true))(dir);
            },
        ),
        on(
            GPTQ,
            "an order in float",
            s,
            "g_idx in F32",
            set_tensor(order, "dtype", json!("F32")),
        ),
        on(GPTQ, "an order too short", s, order, |dir| {
            edit_tensors(dir, SINGLE, |all| {
                let tensor = all.iter_mut().find(|t| t.0.ends_with("down_proj.g_idx"));
                let tensor = tensor.expect("an order");
                tensor.1["shape"] = json!([255]);
                tensor.2.truncate(1020);
            });
        }),
        on(
            GPTQ,
            "a group that is none",
            s,
            "g_idx: element 3: 2 is none of the 2 groups",
            poke(order, 12, [2, 0]),
        ),
        on(
            GPTQ,
            "a group below 0",
            s,
            "g_idx: element 0: -65536 is none of the 2 groups",
            poke(order, 2, [0xff, 0xff]),
        ),
        on(
            GPTQ,
            "a group that is too large",
            s,
            "g_idx: element 255: group 1 has more than its 128 channels",
            poke(order, 12, [1, 0]),
        ),
    ]
}

fn index_rows() -> Vec<Row> {
    let i = INDEX;
    let mut rows = vec![
        row2("an index that is not JSON", i, "JSON", |dir| {
            write(dir, INDEX, "{");
        }),
        row2("an index that is a list", i, "JSON", |dir| {
            write(dir, INDEX, "[]");
        }),
        row2("an index without a weight map", i, "weight_map", |dir| {
            write(dir, INDEX, "{}");
        }),
        row2("an empty weight map", i, "weight_map", |dir| {
            write(dir, INDEX, r#"{"weight_map": {}}"#);
        }),
        row2("a weight map that is a list", i, "weight_map", |dir| {
            write(dir, INDEX, r#"{"weight_map": ["a"]}"#);
        }),
        row2("two weight maps", i, "weight_map", |dir| {
            let text = String::from_utf8(read(dir, INDEX)).expect("text");
            write(
                dir,
                INDEX,
                text.replacen('{', "{\"weight_map\": {\"a\": \"b\"},", 1),
            );
        }),
        row2("a tensor twice in the weight map", i, NORM, |dir| {
            let text = String::from_utf8(read(dir, INDEX)).expect("text");
            let twice = format!("\"weight_map\":{{\"{NORM}\":\"{FIRST}\",");
            write(dir, INDEX, text.replacen("\"weight_map\":{", &twice, 1));
        }),
        row2("an index that nests 10,000 levels", i, "levels", |dir| {
            write(dir, INDEX, format!("{{\"metadata\":{}", "[".repeat(10_000)));
        }),
        row2("an index of 17 MiB", i, "file length", |dir| {
            write_sparse(dir, INDEX, 17 << 20);
        }),
        row2("600 shards", i, "weight_map", |dir| {
            edit_index(dir, |map| {
                for n in 0..600 {
                    map.insert(format!("t{n}"), json!(format!("{n}.safetensors")));
                }
            });
        }),
        row2("a shard with an endless name", i, "t0", |dir| {
            let endless = format!("{}.safetensors", "x".repeat(4000));
            edit_index(dir, |map| drop(map.insert("t0".into(), json!(endless))));
        }),
        row2("a missing shard", SECOND, "file", |dir| remove(dir, SECOND)),
        row2("a cut shard", SECOND, "data_offsets", |dir| {
            let bytes = read(dir, SECOND);
            write(dir, SECOND, &bytes[..bytes.len() - 100]);
        }),
        row2(
            "a tensor that the shard lacks",
            i,
            "model.layers.0.ghost",
            |dir| {
                edit_index(dir, |map| {
                    drop(map.insert("model.layers.0.ghost".into(), json!(FIRST)));
                });
            },
        ),
        row2(
            "a tensor in another shard than the index says",
            i,
            NORM,
            |dir| {
                edit_index(dir, |map| drop(map.insert(NORM.into(), json!(FIRST))));
            },
        ),
        row2("a tensor that the index lacks", SECOND, NORM, |dir| {
            edit_index(dir, |map| drop(map.remove(NORM)));
        }),
        row2(
            "a tensor in two shards",
            SECOND,
            "model.embed_tokens.weight",
            |dir| {
                let first = tensors(&read(dir, FIRST));
                edit_tensors(dir, SECOND, |all| all.push(first[0].clone()));
            },
        ),
    ];
    if cfg!(unix) {
        rows.extend(link_rows());
    }
    rows
}

/// Replaces a file of the copy by a link.
fn link(dir: &Path, file: &str, target: impl AsRef<Path>) {
    let _ = fs::remove_file(dir.join(file));
    #[cfg(unix)]
    std::os::unix::fs::symlink(target, dir.join(file)).expect("a link");
    #[cfg(not(unix))]
    let _ = target;
}

fn link_rows() -> Vec<Row> {
    vec![
        row(
            "a config that links out of the folder",
            CONFIG,
            "link",
            |dir| {
                let target = fs::canonicalize(golden("qwen3").join(CONFIG)).expect("a golden file");
                link(dir, CONFIG, target);
            },
        ),
        row(
            "weights that link out of the folder",
            SINGLE,
            "link",
            |dir| {
                let target = fs::canonicalize(golden("qwen3").join(SINGLE)).expect("a golden file");
                link(dir, SINGLE, target);
            },
        ),
        row("weights that link to nothing", SINGLE, "link", |dir| {
            link(dir, SINGLE, "nothing");
        }),
        row("weights that link to themselves", SINGLE, "link", |dir| {
            link(dir, SINGLE, SINGLE);
        }),
        row(
            "weights that link to an endless device",
            SINGLE,
            "link",
            |dir| {
                link(dir, SINGLE, "/dev/zero");
            },
        ),
        row2(
            "a shard that links out of the folder",
            SECOND,
            "link",
            |dir| {
                let target = fs::canonicalize(golden("qwen3").join(SINGLE)).expect("a golden file");
                link(dir, SECOND, target);
            },
        ),
    ]
}

#[test]
fn every_kind_of_damage_is_refused_on_one_line_that_names_it() {
    let mut rows = value_rows();
    rows.extend(config_rows());
    rows.extend(latent_rows());
    rows.extend(rope_rows());
    rows.extend(generation_rows());
    rows.extend(header_rows());
    rows.extend(tensor_rows());
    rows.extend(fused_rows());
    rows.extend(quant_rows());
    rows.extend(index_rows());
    let mut names: Vec<_> = rows.iter().map(|row| row.name).collect();
    names.sort_unstable();
    names.dedup();
    eprintln!("{} kinds of damage", names.len());
    assert!(names.len() >= 120, "only {} kinds", names.len());
    assert_eq!(names.len(), rows.len(), "a name is used twice");

    let mut wrong = Vec::new();
    for row in rows {
        let copy = copy_of(row.model);
        model::check(copy.path()).expect("the copy is good before it is damaged");
        (row.damage)(copy.path());
        let start = Instant::now();
        let result = model::check(copy.path());
        let took = start.elapsed();
        if took > PATIENCE {
            wrong.push(format!("{}: took {took:?}", row.name));
        }
        match result {
            Ok(_) => wrong.push(format!("{}: accepted", row.name)),
            Err(error) => {
                let line = error.to_string();
                let path = copy.path().join(row.file).display().to_string();
                let rest = line.strip_prefix(&path).unwrap_or_default();
                if !rest.contains(row.field) || line.contains('\n') || error.exit_code() != 3 {
                    wrong.push(format!("{}: said: {line}", row.name));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_golden_models_are_good() {
    for model in ["qwen2", "qwen3", "llama", "../plain_qwen2/model"] {
        let files = model::check(golden(model)).expect("a golden model is good");
        assert_eq!(
            files.eos(),
            [2],
            "{model}: the end id of both configs, once"
        );
        assert_eq!(files.tensors.is_tied(), model == "qwen3", "{model}: tied");
        assert_eq!(files.hash().len(), 64, "{model}: SHA-256 in hex");
        let again = model::check(golden(model)).expect("a golden model is good");
        assert_eq!(files.hash(), again.hash(), "{model}: the hash is stable");
    }
}

#[test]
fn shards_hold_the_same_tensors_as_one_file() {
    let (one, two) = (copy_of("qwen3"), copy_of("qwen3+"));
    let (one, two) = (check_ok(one.path()), check_ok(two.path()));
    assert_eq!(two.checkpoint.files().count(), 2, "two files");
    assert_eq!(one.tensors, two.tensors, "the same tensors");
    let (mut a, mut b) = (Vec::new(), Vec::new());
    for want in one.tensors.wants() {
        let entry = one.checkpoint.expect(want).expect("a tensor");
        let rows = entry.n_rows();
        one.checkpoint
            .read_rows(&want.name, 0, rows, &mut a)
            .expect("data");
        two.checkpoint
            .read_rows(&want.name, 0, rows, &mut b)
            .expect("data");
        assert_eq!(a, b, "{}: the data differs", want.name);
        one.checkpoint
            .read_rows(&want.name, rows - 1, 1, &mut b)
            .expect("data");
        assert_eq!(
            a[a.len() - b.len()..],
            b,
            "{}: the last row differs",
            want.name
        );
        let mut pieces: Vec<u8> = Vec::new();
        let collect = |_, bytes: &[u8]| -> Result<()> {
            pieces.extend(bytes);
            Ok(())
        };
        one.checkpoint
            .read_pieces(&want.name, 1001, collect)
            .expect("data");
        assert_eq!(a, pieces, "{}: the pieces differ", want.name);
    }
}

#[track_caller]
fn check_ok(dir: &Path) -> ModelFiles {
    model::check(dir).expect("the model is good")
}

#[test]
fn what_is_only_unusual_is_accepted() {
    type Change = Box<dyn Fn(&Path)>;
    let rows: Vec<(&str, Change)> = vec![
        (
            "no generation config",
            Box::new(|dir| remove(dir, GENERATION)),
        ),
        ("a head beside a tie", Box::new(head_beside_tie)),
        (
            "experts that all tokens share, but none of them",
            Box::new(add(
                "model.layers.1.mlp.shared_experts.down_proj.weight",
                "BF16",
                json!([64, 0]),
                0,
            )),
        ),
        (
            "old rope tables",
            Box::new(add(
                "model.layers.0.self_attn.rotary_emb.inv_freq",
                "F32",
                json!([16]),
                64,
            )),
        ),
        (
            "a tensor of something else",
            Box::new(add("vision.weight", "U8", json!([3]), 3)),
        ),
        (
            "a window that is switched on",
            Box::new(|dir| {
                set("sliding_window", json!(64))(dir);
                set("use_sliding_window", json!(true))(dir);
                set("max_window_layers", json!(1))(dir);
            }),
        ),
        (
            "half a head rotated",
            Box::new(set("partial_rotary_factor", json!(0.5))),
        ),
        (
            "an end that is no token of the vocabulary",
            Box::new(set("eos_token_id", json!([2, 32_000]))),
        ),
        (
            "no word on tying",
            Box::new(set("tie_word_embeddings", Value::Null)),
        ),
        (
            "an index beside the single file",
            Box::new(|dir| write(dir, INDEX, "{}")),
        ),
        (
            "a header without metadata",
            Box::new(|dir| {
                edit_header(dir, |h| drop(h.remove("__metadata__")));
            }),
        ),
        (
            "a header of odd length",
            Box::new(|dir| {
                edit_text(dir, |t| {
                    let pad = if t.len().is_multiple_of(2) { " " } else { "" };
                    format!("{t}{pad}  ")
                });
            }),
        ),
    ];
    let quantised: Vec<(&str, &str, Change)> = vec![
        (
            AWQ,
            "exceptions that are none",
            Box::new(set_quant("modules_to_not_convert", json!(["down_proj"]))),
        ),
        (
            AWQ,
            "the name in capitals",
            Box::new(set_quant("version", json!("GEMM"))),
        ),
        (
            GPTQ,
            "zero points as they are",
            Box::new(set_quant("checkpoint_format", json!("gptq_v2"))),
        ),
        (
            GPTQ,
            "an order that is there though nothing says so",
            Box::new(|dir| {
                edit_tensors(dir, SINGLE, |all| {
                    let order = all.iter_mut().find(|t| t.0.ends_with("down_proj.g_idx"));
                    let order = &mut order.expect("an order").2;
                    (order[0], order[4 * 200]) = (1, 0);
                });
            }),
        ),
        (
            GPTQ,
            "no order where none is needed",
            Box::new(|dir| {
                edit_tensors(dir, SINGLE, |all| all.retain(|t| !t.0.ends_with("g_idx")));
            }),
        ),
    ];
    for (model, name, change) in quantised {
        let copy = copy_of(model);
        change(copy.path());
        let files = model::check(copy.path()).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(
            files.tensors.all_packed().count(),
            14,
            "{name}: seven a layer"
        );
    }
    let good = check_ok(copy_of("qwen3").path());
    for (name, change) in rows {
        let copy = copy_of("qwen3");
        change(copy.path());
        match model::check(copy.path()) {
            Ok(files) => assert_eq!(files.tensors, good.tensors, "{name}: other tensors"),
            Err(error) => panic!("{name}: {error}"),
        }
    }
}

/// As in transformers 5: what is there twice and differs is not tied.
#[test]
fn a_head_beside_a_tie_is_the_head_where_it_differs_from_the_embedding() {
    let copy = copy_of("qwen3");
    head_beside_tie(copy.path());
    assert!(check_ok(copy.path()).tensors.is_tied(), "a copy");
    poke("lm_head.weight", 65_534, [1, 1])(copy.path());
    assert!(!check_ok(copy.path()).tensors.is_tied(), "another");
}

#[cfg(unix)]
#[test]
fn links_into_the_blobs_of_the_same_repository_are_followed_and_no_others() {
    let cache = tempfile::tempdir().expect("a temporary folder");
    let repo = cache.path().join("models--a--b");
    let snapshot = repo.join("snapshots/0123");
    for dir in [&repo.join("blobs"), &snapshot] {
        fs::create_dir_all(dir).expect("a folder");
    }
    for file in [CONFIG, GENERATION, SINGLE] {
        let blob = repo.join("blobs").join(format!("sha-{file}"));
        fs::copy(golden("qwen3").join(file), blob).expect("a copy");
        link(&snapshot, file, format!("../../blobs/sha-{file}"));
    }
    check_ok(&snapshot);

    // A blob of another repository, and a blob that is itself a link out.
    let other = cache.path().join("models--c--d/blobs");
    fs::create_dir_all(&other).expect("a folder");
    fs::copy(golden("qwen3").join(SINGLE), other.join("x")).expect("a copy");
    for target in ["../../../models--c--d/blobs/x", "../../blobs/out"] {
        link(&repo.join("blobs"), "out", other.join("x"));
        link(&snapshot, SINGLE, target);
        let line = refused(model::check(&snapshot));
        assert!(
            line.contains("model.safetensors: link: "),
            "{target}: said: {line}"
        );
    }
}

fn refused(result: Result<ModelFiles>) -> String {
    match result {
        Ok(_) => panic!("a bad model was accepted"),
        Err(error) => error.to_string(),
    }
}

#[cfg(unix)]
#[test]
fn a_pipe_in_place_of_a_file_is_refused_without_waiting() {
    let copy = copy_of("qwen3");
    remove(copy.path(), SINGLE);
    let made = std::process::Command::new("mkfifo")
        .arg(copy.path().join(SINGLE))
        .status();
    if !made.is_ok_and(|status| status.success()) {
        eprintln!("skipped: there is no mkfifo");
        return;
    }
    let line = refused(model::check(copy.path()));
    assert!(line.contains("is not a regular file"), "said: {line}");
}

#[test]
fn a_header_is_refused_at_every_length_of_its_file_but_its_own() {
    let path = golden("qwen3").join(SINGLE);
    let bytes = fs::read(&path).expect("a golden file");
    let (header_len, _) = bytes.split_first_chunk::<8>().expect("a good file");
    let data_start = 8 + usize::try_from(u64::from_le_bytes(*header_len)).expect("small");
    let parse = |len: usize| {
        // A reader of the file would have as much of the header as there is.
        Header::parse(&path, &bytes[..len.min(data_start)], len as u64)
    };
    let good = parse(bytes.len()).expect("the whole file is good");
    assert_eq!(good.tensors.len(), 35, "the tensors of the golden model");
    let accepted = (0..bytes.len())
        .into_par_iter()
        .find_any(|&len| parse(len).is_ok());
    assert_eq!(accepted, None, "a cut file was accepted");
}

#[test]
fn a_cut_weight_file_is_refused_by_the_whole_check() {
    let copy = copy_of("qwen3");
    let path = copy.path().join(SINGLE);
    let len = fs::metadata(&path).expect("a file").len();
    // A thousand lengths, from long to short, so that one file serves for all.
    for cut in 1..=1000 {
        let left = len - len * cut / 1000;
        let file = fs::OpenOptions::new()
            .write(true)
            .open(&path)
            .expect("a file");
        file.set_len(left).expect("a shorter file");
        let error = model::check(copy.path()).expect_err("a cut file must be refused");
        assert!(
            matches!(error, Error::BadFile { .. }),
            "{left} bytes: {error}"
        );
    }
}

#[test]
fn any_changed_byte_of_a_header_is_an_error_or_the_same_tensors() {
    let bytes = fs::read(golden("qwen3").join(SINGLE)).expect("a golden file");
    let (header_len, _) = bytes.split_first_chunk::<8>().expect("a good file");
    let end = 8 + usize::try_from(u64::from_le_bytes(*header_len)).expect("small");
    let good = check_ok(&golden("qwen3"));
    let changes: Vec<_> = (0..end)
        .flat_map(|at| [0x01, 0x20, 0x80].map(|bits| (at, bits)))
        .collect();
    // Each run of changes has its own copy, and undoes a change before the next.
    changes.par_chunks(1024).for_each(|changes| {
        let copy = copy_of("qwen3");
        let mut file = bytes.clone();
        for &(at, bits) in changes {
            file[at] ^= bits;
            write(copy.path(), SINGLE, &file);
            file[at] ^= bits;
            let start = Instant::now();
            if let Ok(files) = model::check(copy.path()) {
                assert_eq!(files.tensors, good.tensors, "byte {at} ^ {bits}");
                assert_eq!(
                    files.checkpoint.tensors(),
                    good.checkpoint.tensors(),
                    "byte {at} ^ {bits}"
                );
            }
            assert!(
                start.elapsed() < PATIENCE,
                "byte {at} ^ {bits} took too long"
            );
        }
    });
}

#[test]
fn any_changed_byte_of_a_small_file_is_an_error_or_a_model() {
    for (model, file) in [("qwen3", CONFIG), ("qwen3", GENERATION), (GPTQ, CONFIG)] {
        let copy = copy_of(model);
        let good = read(copy.path(), file);
        // Without its last line break a file is still whole.
        for at in 0..good.trim_ascii_end().len() {
            for bits in [0x01, 0x20, 0x80] {
                let mut bytes = good.clone();
                bytes[at] ^= bits;
                write(copy.path(), file, &bytes);
                // Whatever it says, it must say it without a panic.
                if let Err(error) = ModelFiles::open(copy.path()) {
                    let line = error.to_string();
                    assert!(!line.contains('\n'), "{file}: byte {at}: said: {line}");
                }
            }
            write(copy.path(), file, &good[..at]);
            let line = refused(ModelFiles::open(copy.path()));
            assert!(line.contains(file), "{file}: cut at {at}: said: {line}");
        }
    }
}
