//! Makes a quantised model folder of one in float.
//!
//! The matrices of the layers become codes of 4 or 8 bits with a scale and a zero point for each group of
//! input channels; everything else stays as it is. Each weight is rounded to the nearest code; the range
//! that the codes span is that of the group, or a part of it where cutting off the largest weights leaves
//! a smaller squared error. The folder is in a published format, compressed-tensors' `pack-quantized`, so
//! that others read it too.
//!
//! Zero points are stored: normally distributed weights in groups of 128 lose 9.5 % in 4 bits and 0.59 % in
//! 8, against 10.1 % and 0.65 % with ranges that are symmetric around zero. Host memory holds a band of
//! rows and the scales of one matrix. A folder is there whole or not at all.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write as _};
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use safetensors::Dtype;
use serde_json::{Map, Value, json};

use super::load::{dtype_of, widened};
use super::quant::{Format, Packed, Role, Scheme, Zeros, scale_word};
use super::tensors::{EMBED, HEAD, KV_B};
use super::weights::{INDEX, SINGLE};
use super::{ModelFiles, json as small};
use crate::device::DType;
use crate::{Error, Result};

/// Bytes of a matrix that are read at a time.
const BAND: usize = 16 << 20;

/// Shares of a group's range that are tried.
const SHARES: [f32; 6] = [1.0, 0.95, 0.9, 0.85, 0.8, 0.75];

/// What a folder is to be.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// [`DType::U4`] or [`DType::U8`].
    pub dtype: DType,
    /// Input channels under one scale, a multiple of 32; none: all of a row.
    pub group: Option<usize>,
    /// Bytes of tensors after which another weight file begins.
    pub shard_bytes: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            dtype: DType::U4,
            group: Some(128),
            shard_bytes: 5_000_000_000,
        }
    }
}

/// What became of one matrix.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Loss {
    /// Its name.
    pub tensor: String,
    /// `[out, in]`.
    pub shape: [usize; 2],
    /// Root of the squared error over that of the squared weights.
    pub relative: f64,
    /// Largest difference of a weight.
    pub worst: f64,
}

/// A tensor of the folder that is to be made.
struct Planned {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
}

impl Planned {
    fn bytes(&self) -> u64 {
        let count: usize = self.shape.iter().product();
        count as u64 * (self.dtype.bitsize() / 8) as u64
    }
}

/// A tensor of the old folder, and what is made of it.
enum Work {
    /// The same bytes.
    Keep(Planned),
    /// The tensors of a packed matrix, in the order of [`Packed::tensors`].
    Pack(Packed, DType, Vec<Planned>),
}

impl Work {
    fn planned(&self) -> &[Planned] {
        match self {
            Self::Keep(one) => std::slice::from_ref(one),
            Self::Pack(_, _, all) => all,
        }
    }

    fn bytes(&self) -> u64 {
        self.planned().iter().map(Planned::bytes).sum()
    }
}

/// Writes the folder `to`, which must not be there; returns what each matrix lost.
///
/// `progress` is told the bytes read by each step, [`ModelFiles::weight_bytes`] in all.
///
/// # Errors
/// If `to` is there already, if the model is quantised already, or if a file cannot be read or written.
/// `to` is then not there.
///
/// # Panics
/// If the options ask for what [`Options`] does not allow.
pub fn quantize(
    files: &ModelFiles,
    to: &Path,
    options: Options,
    progress: &mut dyn FnMut(u64),
) -> Result<Vec<Loss>> {
    assert!(
        matches!(options.dtype, DType::U4 | DType::U8)
            && options.group.is_none_or(|g| g > 0 && g.is_multiple_of(32)),
        "codes of 4 or 8 bits, in groups of a multiple of 32"
    );
    let from = files.checkpoint.dir();
    if files.config.quantised.is_some() {
        let advice = "give the float model that it was made of";
        let what = "quantising a quantised model";
        return Err(Error::unsupported(from.join("config.json"), what, advice));
    }
    let folder = Partial::create(to)?;
    let losses = fill(files, &folder.path, options, progress)?;
    copy_small(from, &folder.path)?;
    folder.finish(to)?;
    Ok(losses)
}

/// A folder that is removed unless it is finished.
struct Partial {
    path: PathBuf,
    done: bool,
}

impl Partial {
    fn create(to: &Path) -> Result<Self> {
        let there = |path: &Path, advice: &str| {
            let kind = io::ErrorKind::AlreadyExists;
            Err(Error::io(path)(io::Error::new(
                kind,
                format!("is there already; {advice}"),
            )))
        };
        if to.symlink_metadata().is_ok() {
            return there(to, "give a name that is free");
        }
        let mut name = to.file_name().unwrap_or_default().to_owned();
        name.push(".partial");
        let path = to.with_file_name(name);
        match fs::create_dir(&path) {
            Ok(()) => Ok(Self { path, done: false }),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                there(&path, "an interrupted run left it, remove it")
            }
            Err(e) => Err(Error::io(path)(e)),
        }
    }

    fn finish(mut self, to: &Path) -> Result<()> {
        // Renaming replaces an empty folder, which may have come in the meantime; it loses nothing.
        fs::rename(&self.path, to).map_err(Error::io(to))?;
        self.done = true;
        Ok(())
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.done {
            // The error that led here is the one to report.
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// Writes the weight files and `config.json`.
fn fill(
    files: &ModelFiles,
    folder: &Path,
    options: Options,
    progress: &mut dyn FnMut(u64),
) -> Result<Vec<Loss>> {
    let work = plan(files, options)?;
    let mut shards: Vec<&[Work]> = Vec::new();
    let (mut first, mut bytes) = (0, 0);
    for (i, one) in work.iter().enumerate() {
        if i > first && bytes + one.bytes() > options.shard_bytes {
            shards.push(&work[first..i]);
            (first, bytes) = (i, 0);
        }
        bytes += one.bytes();
    }
    shards.push(&work[first..]);

    let (mut losses, mut weight_map) = (Vec::new(), Map::new());
    for (i, shard) in shards.iter().enumerate() {
        let name = match shards.len() {
            1 => SINGLE.to_owned(),
            n => format!("model-{:05}-of-{n:05}.safetensors", i + 1),
        };
        losses.extend(write_shard(files, &folder.join(&name), shard, progress)?);
        for planned in shard.iter().flat_map(Work::planned) {
            weight_map.insert(planned.name.clone(), name.clone().into());
        }
    }
    if shards.len() > 1 {
        let total: u64 = work.iter().map(Work::bytes).sum();
        let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
        write_json(&folder.join(INDEX), &index)?;
    }
    write_config(files, folder, options)?;
    Ok(losses)
}

/// What is made of every tensor, in the order of computation.
fn plan(files: &ModelFiles, options: Options) -> Result<Vec<Work>> {
    let mut work = Vec::new();
    for want in files.tensors.wants() {
        let entry = files.checkpoint.expect(want)?;
        if entry.shape.len() > 2 {
            let what = format!("quantising {}, all experts in one tensor", want.name);
            let advice = "give a checkpoint that has a tensor for each matrix of each expert";
            let path = files.checkpoint.path_of(entry);
            return Err(Error::unsupported(path, what, advice));
        }
        let stem = want
            .name
            .strip_suffix(".weight")
            .filter(|_| ![EMBED, HEAD].contains(&&*want.name) && !want.name.ends_with(KV_B));
        let (Some(stem), &[n, k]) = (stem, &entry.shape[..]) else {
            work.push(Work::Keep(Planned {
                name: want.name.clone(),
                dtype: entry.dtype,
                shape: entry.shape.clone(),
            }));
            continue;
        };
        let packed = Packed {
            stem: stem.to_owned(),
            n,
            k,
            scheme: Scheme {
                format: Format::Compressed,
                dtype: options.dtype,
                group: options.group,
                zeros: Zeros::Stored,
                needs_order: false,
            },
            has_order: false,
        };
        let planned = packed.tensors().into_iter().map(|(role, shape)| Planned {
            name: packed.name(role),
            dtype: match role {
                Role::Scales => entry.dtype,
                Role::Shape => Dtype::I64,
                _ => Dtype::I32,
            },
            shape,
        });
        let planned = planned.collect();
        let from = dtype_of(entry.dtype).expect("a model in float was opened");
        work.push(Work::Pack(packed, from, planned));
    }
    Ok(work)
}

/// Writes one weight file.
fn write_shard(
    files: &ModelFiles,
    path: &Path,
    shard: &[Work],
    progress: &mut dyn FnMut(u64),
) -> Result<Vec<Loss>> {
    let file = File::create_new(path).map_err(Error::io(path))?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    let mut put = |bytes: &[u8]| out.write_all(bytes).map_err(Error::io(path));
    put(&header(shard))?;
    let mut losses = Vec::new();
    for work in shard {
        match work {
            Work::Keep(planned) => {
                files
                    .checkpoint
                    .read_pieces(&planned.name, BAND, |_, bytes| {
                        progress(bytes.len() as u64);
                        put(bytes)
                    })?;
            }
            Work::Pack(packed, from, _) => {
                losses.push(pack(files, packed, *from, &mut put, progress)?);
            }
        }
    }
    let file = out
        .into_inner()
        .map_err(|e| Error::io(path)(e.into_error()))?;
    file.sync_all().map_err(Error::io(path))?;
    Ok(losses)
}

/// The header of a safetensors file that holds the tensors in their order.
fn header(shard: &[Work]) -> Vec<u8> {
    let mut map = Map::new();
    // Readers of Hugging Face ask for it.
    map.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut at = 0;
    for planned in shard.iter().flat_map(Work::planned) {
        let end = at + planned.bytes();
        let entry = json!({
            "dtype": planned.dtype.to_string(),
            "shape": planned.shape,
            "data_offsets": [at, end],
        });
        map.insert(planned.name.clone(), entry);
        at = end;
    }
    let mut text = Value::Object(map).to_string();
    while !text.len().is_multiple_of(8) {
        text.push(' ');
    }
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

/// Quantises one matrix, a band of rows at a time: writes its codes as they come, then the rest.
fn pack(
    files: &ModelFiles,
    packed: &Packed,
    from: DType,
    put: &mut dyn FnMut(&[u8]) -> Result<()>,
    progress: &mut dyn FnMut(u64),
) -> Result<Loss> {
    let (name, per) = (
        format!("{}.weight", packed.stem),
        32 / packed.scheme.dtype.bits(),
    );
    let (row_bytes, groups) = (packed.k * from.size(), packed.groups());
    let row_words = packed.k.div_ceil(per);
    let step = (BAND / row_bytes).max(1);
    let (mut bytes, mut words) = (Vec::new(), Vec::new());
    let (mut error, mut power, mut worst) = (0.0, 0.0, 0.0f64);
    for first in (0..packed.n).step_by(step) {
        let n = step.min(packed.n - first);
        files.checkpoint.read_rows(&name, first, n, &mut bytes)?;
        progress(bytes.len() as u64);
        let mut codes = vec![0u32; n * row_words];
        let at = words.len();
        words.resize(at + n * groups, 0);
        let rows = codes.par_chunks_exact_mut(row_words);
        let rows = rows.zip(words[at..].par_chunks_exact_mut(groups));
        let sums: Vec<Sums> = rows
            .zip(bytes.par_chunks_exact(row_bytes))
            .map(|((codes, words), bytes)| {
                let numbers = bytes.chunks_exact(from.size());
                let row: Vec<f32> = numbers.map(|number| widened(number, from)).collect();
                quantise_row(&row, packed, from, codes, words)
            })
            .collect();
        // One after the other, so that the sums are the same in every run.
        for sums in sums {
            error += sums.error;
            power += sums.power;
            worst = worst.max(sums.worst);
        }
        put(bytemuck::cast_slice(&codes))?;
    }
    for (role, shape) in packed.tensors() {
        match role {
            Role::Scales => {
                let scales: Vec<u8> = words
                    .iter()
                    .flat_map(|&word| narrowed(packed.scheme.dtype.scale_of(word).0, from))
                    .collect();
                put(&scales)?;
            }
            Role::Zeros => {
                let mut zeros = vec![0u32; shape.iter().product()];
                for (row, words) in words.chunks_exact(groups).enumerate() {
                    let place = row % per * packed.scheme.dtype.bits();
                    for (zeros, &word) in zeros[row / per * groups..].iter_mut().zip(words) {
                        *zeros |= packed.scheme.dtype.scale_of(word).1 << place;
                    }
                }
                put(bytemuck::cast_slice(&zeros))?;
            }
            Role::Shape => {
                for dim in [packed.n, packed.k] {
                    put(&(dim as u64).to_le_bytes())?;
                }
            }
            Role::Codes | Role::Order => {}
        }
    }
    Ok(Loss {
        tensor: name,
        shape: [packed.n, packed.k],
        relative: if power > 0.0 {
            (error / power).sqrt()
        } else {
            0.0
        },
        worst,
    })
}

/// What a row lost.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    error: f64,
    power: f64,
    worst: f64,
}

/// Quantises one row: packs its codes, and gives scale and zero point of each group in a word.
fn quantise_row(
    row: &[f32],
    packed: &Packed,
    stored: DType,
    codes: &mut [u32],
    words: &mut [u32],
) -> Sums {
    let bits = packed.scheme.dtype.bits();
    let (per, most) = (32 / bits, ((1u32 << bits) - 1) as f32);
    let mut sums = Sums::default();
    for (g, (group, word)) in row.chunks(packed.group()).zip(words).enumerate() {
        let (scale, zero) = best_range(group, most, stored);
        for (i, &w) in group.iter().enumerate() {
            let code = code_of(w, scale, zero, most);
            let channel = g * packed.group() + i;
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "a whole number from 0 to 255"
            )]
            let stored = code as u32;
            codes[channel / per] |= stored << (channel % per * bits);
            let difference = f64::from((code - zero) * scale) - f64::from(w);
            sums.error += difference * difference;
            sums.power += f64::from(w) * f64::from(w);
            sums.worst = sums.worst.max(difference.abs());
        }
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a whole number from 0 to 255"
        )]
        let zero = zero as u32;
        *word = scale_word(scale, zero);
    }
    sums
}

/// The code of a weight: the nearest, from 0 to `most`.
fn code_of(w: f32, scale: f32, zero: f32, most: f32) -> f32 {
    ((w / scale).round_ties_even() + zero).clamp(0.0, most)
}

/// The scale and the zero point of a group whose squared error is the smallest of those tried.
fn best_range(group: &[f32], most: f32, stored: DType) -> (f32, f32) {
    // Zero is always a code, so that the zero point is one.
    let low = group.iter().copied().fold(0.0, f32::min);
    let high = group.iter().copied().fold(0.0, f32::max);
    if low >= high {
        return (1.0, 0.0);
    }
    let mut best = (f64::INFINITY, (1.0, 0.0));
    for share in SHARES {
        // Apart, so that the width of the largest f32 does not overflow.
        let scale = rounded((high / most - low / most) * share, stored);
        let zero = (-low * share / scale).round_ties_even().clamp(0.0, most);
        let error: f64 = group
            .iter()
            .map(|&w| {
                let value = (code_of(w, scale, zero, most) - zero) * scale;
                (f64::from(value) - f64::from(w)).powi(2)
            })
            .sum();
        if error < best.0 {
            best = (error, (scale, zero));
        }
    }
    best.1
}

/// A scale as the file stores it, and as a word holds it; never 0.
fn rounded(scale: f32, stored: DType) -> f32 {
    let (kept, smallest) = match stored {
        DType::F16 => {
            let tiny = half::f16::from_bits(1).to_f32();
            (half::f16::from_f32(scale.min(65504.0)).to_f32(), tiny)
        }
        DType::BF16 => (half::bf16::from_f32(scale).to_f32(), f32::MIN_POSITIVE),
        _ => (
            DType::U8.scale_of(scale_word(scale, 0)).0,
            f32::MIN_POSITIVE,
        ),
    };
    kept.max(smallest)
}

/// A scale in the bytes of a file; exact, as [`rounded`] chose it.
fn narrowed(scale: f32, stored: DType) -> Vec<u8> {
    match stored {
        DType::F16 => half::f16::from_f32(scale).to_le_bytes().to_vec(),
        DType::BF16 => half::bf16::from_f32(scale).to_le_bytes().to_vec(),
        _ => scale.to_le_bytes().to_vec(),
    }
}

/// Writes `config.json`: the old one, and how the weights are quantised.
fn write_config(files: &ModelFiles, folder: &Path, options: Options) -> Result<()> {
    let from = files.checkpoint.dir();
    let Some((path, bytes)) = small::read_small(from, CONFIG, MAX_SMALL)? else {
        return Err(Error::bad(
            from.join(CONFIG),
            "file",
            "is not there any more",
        ));
    };
    let mut config = small::object(&path, &bytes)?;
    config.insert(
        "quantization_config".into(),
        json!({
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {
                        "num_bits": options.dtype.bits(),
                        "type": "int",
                        "symmetric": false,
                        "strategy": if options.group.is_some() { "group" } else { "channel" },
                        "group_size": options.group,
                        "dynamic": false,
                        "actorder": null,
                        "observer": "minmax",
                    },
                    "input_activations": null,
                    "output_activations": null,
                },
            },
            "ignore": ["lm_head"],
            "kv_cache_scheme": null,
        }),
    );
    write_json(&folder.join(CONFIG), &Value::Object(config))
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    let mut file = File::create_new(path).map_err(Error::io(path))?;
    file.write_all(format!("{value:#}\n").as_bytes())
        .and_then(|()| file.sync_all())
        .map_err(Error::io(path))
}

const CONFIG: &str = "config.json";

/// Bytes of a small file that is copied.
const MAX_SMALL: u64 = 256 << 20;

/// Ends of the names of small files: tokenizer, templates, what people read.
const SMALL: [&str; 6] = ["json", "txt", "model", "jinja", "md", "tiktoken"];

/// Copies the files that are no weights: tokenizer, templates, licence.
fn copy_small(from: &Path, folder: &Path) -> Result<()> {
    for entry in fs::read_dir(from).map_err(Error::io(from))? {
        let entry = entry.map_err(Error::io(from))?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        let end = Path::new(name).extension().and_then(|end| end.to_str());
        let readable = ["LICENSE", "LICENCE", "NOTICE", "README"].contains(&name);
        let wanted = end.map_or(readable, |end| SMALL.contains(&end));
        if !wanted || name == CONFIG || name.ends_with(".index.json") || entry.path().is_dir() {
            continue;
        }
        if let Some((_, bytes)) = small::read_small(from, name, MAX_SMALL)? {
            let path = folder.join(name);
            fs::write(&path, bytes).map_err(Error::io(&path))?;
        }
    }
    Ok(())
}
