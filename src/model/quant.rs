//! Quantised checkpoints: what `quantization_config` says, and how the tensors of a file become the codes
//! and scales that kernels read.
//!
//! These published formats are read: AWQ (`gemm`), GPTQ (both checkpoint formats, with and without
//! `desc_act`), compressed-tensors (`pack-quantized`, `float-quantized`), and floats of 8 bits in blocks
//! (`fp8`, as `DeepSeek` and Qwen publish them). Each becomes the same two tensors: codes
//! `[n, k padded to whole spans]` in the order of [`DType::code_at`], and one word for each row and group.
//! Of whole numbers, its upper 24 bits are the scale as a float cut short and its lower 8 bits are the zero
//! point; a weight is `(code - zero) * scale`. Of floats, it is the scale. Pure: numbers in, numbers out.
//!
//! Formats: `AutoAWQ` (`packing_utils.py`), `AutoGPTQ` and `GPTQModel` (`qlinear`), compressed-tensors
//! (`pack_quantized.py`, `naive_quantized.py`), transformers (`finegrained_fp8.py`).

use rayon::prelude::*;
use serde_json::Value;

use super::config::Keys;
use super::json::{shown, shown_value};
use crate::Result;
use crate::device::{DType, e4m3};

/// Most channels that a config may put under one scale.
const MAX_GROUP: usize = 1 << 24;

/// Channels that a kernel reads under one scale; a group is a multiple of it.
const GROUP_STEP: usize = 32;

/// How the tensors of a file are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `qweight` `[k, n / 8]`, the eight codes of a word in an order of their own.
    Awq,
    /// `qweight` `[k / codes in a word, n]`.
    Gptq,
    /// `weight_packed` `[n, k / codes in a word]`.
    Compressed,
    /// `weight` `[n, k]` in floats of 8 bits.
    Floats {
        /// Rows under one scale of each group; none: all of them.
        rows: Option<usize>,
        /// End of the name of the scales.
        scales: &'static str,
    },
}

/// Where the zero points of a file are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zeros {
    /// Stored as they are.
    Stored,
    /// Stored less one, which wraps.
    StoredLessOne,
    /// Not stored: the middle of the codes; of floats, zero.
    Middle,
}

/// What `quantization_config` says of every quantised matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scheme {
    /// How tensors are packed.
    pub format: Format,
    /// [`DType::U4`], [`DType::U8`] or [`DType::F8`].
    pub dtype: DType,
    /// Input channels under one scale; none: all of a row.
    pub group: Option<usize>,
    /// Where the zero points are.
    pub zeros: Zeros,
    /// Whether a file must say which group a channel belongs to (`desc_act`).
    pub needs_order: bool,
}

/// What to do about a format that is not read.
const ADVICE: &str = "this version reads awq (gemm), gptq, fp8 and compressed-tensors (pack-quantized, \
                      float-quantized); use such a checkpoint, or the float one and `hogwild quantize`";

/// What to do about codes of floats that are not read.
const E4M3: &str = "floats are read in 8 bits, as e4m3; use another checkpoint";

impl Scheme {
    /// Reads `quantization_config`, if there is one.
    pub(super) fn read(keys: &Keys<'_>) -> Result<Option<Self>> {
        let new = keys.object("quantization_config", "quantization_config.")?;
        let old = keys.object("compression_config", "compression_config.")?;
        let Some(inner) = new.or(old) else {
            return Ok(None);
        };
        match inner.text("quant_method")? {
            Some("awq") => Self::awq(&inner),
            Some("gptq") => Self::gptq(&inner),
            Some("compressed-tensors") => Self::compressed(&inner),
            Some("fp8") => Self::fp8(&inner),
            Some(other) => {
                let found = format!("'{}'", shown(other));
                return Err(inner.unsupported("quant_method", &found, ADVICE));
            }
            None => return Err(inner.missing("quant_method")),
        }
        .map(Some)
    }

    fn awq(keys: &Keys<'_>) -> Result<Self> {
        match keys.text("version")? {
            Some(version) if !version.eq_ignore_ascii_case("gemm") => {
                let found = format!("'{}'", shown(version));
                let advice = "of the versions of awq only gemm is read; convert the checkpoint";
                return Err(keys.unsupported("version", &found, advice));
            }
            _ => {}
        }
        if keys.flag("zero_point")? == Some(false) {
            let advice = "awq is read with zero points only";
            return Err(keys.unsupported("zero_point", "false", advice));
        }
        let dtype = read_bits(keys, "bits")?;
        if dtype != DType::U4 {
            return Err(keys.unsupported("bits", "8", "awq is read with 4 bits only"));
        }
        Ok(Self {
            format: Format::Awq,
            dtype,
            group: read_group(keys, true)?,
            zeros: Zeros::Stored,
            needs_order: false,
        })
    }

    fn gptq(keys: &Keys<'_>) -> Result<Self> {
        let zeros = match keys.text("checkpoint_format")? {
            None | Some("gptq") => Zeros::StoredLessOne,
            Some("gptq_v2") => Zeros::Stored,
            Some(other) => {
                let found = format!("'{}'", shown(other));
                let advice =
                    "of gptq the formats gptq and gptq_v2 are read; convert the checkpoint";
                return Err(keys.unsupported("checkpoint_format", &found, advice));
            }
        };
        if keys.flag("is_marlin_format")? == Some(true) {
            let advice = "of gptq the formats gptq and gptq_v2 are read; convert the checkpoint";
            return Err(keys.unsupported("is_marlin_format", "true", advice));
        }
        if let Some(dynamic) = keys.object("dynamic", "quantization_config.dynamic.")?
            && let Some(module) = dynamic.map.keys().next()
        {
            let found = format!("for '{}'", shown(module));
            let advice = "every matrix is to be quantised alike or not at all";
            return Err(keys.unsupported("dynamic", &found, advice));
        }
        match keys.text("pack_dtype")? {
            None | Some("int32") => {}
            Some(other) => {
                let found = format!("'{}'", shown(other));
                return Err(keys.unsupported("pack_dtype", &found, "codes are read from int32"));
            }
        }
        Ok(Self {
            format: Format::Gptq,
            dtype: read_bits(keys, "bits")?,
            group: read_group(keys, true)?,
            zeros,
            needs_order: keys.flag("desc_act")?.unwrap_or(false),
        })
    }

    /// Blocks of `weight_block_size` rows and channels under one scale, or a matrix where that is null.
    fn fp8(keys: &Keys<'_>) -> Result<Self> {
        for (key, known) in [("fmt", "e4m3"), ("activation_scheme", "dynamic")] {
            match keys.text(key)? {
                Some(other) if other != known => {
                    let found = format!("'{}'", shown(other));
                    let advice = format!("of fp8 only {known} is read; use another checkpoint");
                    return Err(keys.unsupported(key, &found, &advice));
                }
                _ => {}
            }
        }
        let block = if keys.map.contains_key("weight_block_size") {
            keys.pair("weight_block_size", MAX_GROUP)?
        } else {
            Some([128, 128])
        };
        Ok(Self::floats(
            "weight_scale_inv",
            block.map(|b| b[0]),
            block.map(|b| b[1]),
        ))
    }

    fn floats(scales: &'static str, rows: Option<usize>, group: Option<usize>) -> Self {
        Self {
            format: Format::Floats { rows, scales },
            dtype: DType::F8,
            group,
            zeros: Zeros::Middle,
            needs_order: false,
        }
    }

    fn compressed(keys: &Keys<'_>) -> Result<Self> {
        // Whether its codes are floats.
        let format = |keys: &Keys<'_>| match keys.text("format")? {
            None => Ok(None),
            Some("pack-quantized") => Ok(Some(false)),
            // The older name, of what may be whole numbers too.
            Some("float-quantized" | "naive-quantized") => Ok(Some(true)),
            Some(other) => {
                let found = format!("'{}'", shown(other));
                let advice = "of compressed-tensors pack-quantized is read, weights of 4 or 8 bits, and \
                              float-quantized, in 8 bits";
                Err(keys.unsupported("format", &found, advice))
            }
        };
        let Some(floats) = format(keys)? else {
            return Err(keys.missing("format"));
        };
        match keys.text("quantization_status")? {
            None | Some("compressed") => {}
            // Of floats, the tensors themselves say whether they are codes.
            Some("frozen") if floats => {}
            Some(other) => {
                let found = format!("'{}'", shown(other));
                let advice = "only weights that are stored compressed are read";
                return Err(keys.unsupported("quantization_status", &found, advice));
            }
        }
        for key in ["kv_cache_scheme", "transform_config"] {
            refuse_object(keys, key)?;
        }
        if let Some(sparsity) =
            keys.object("sparsity_config", "quantization_config.sparsity_config.")?
            && let Some(kind) = sparsity.text("format")?
            && kind != "dense"
        {
            let found = format!("'{}'", shown(kind));
            return Err(sparsity.unsupported("format", &found, "only dense weights are read"));
        }
        let Some(groups) = keys.object("config_groups", "quantization_config.config_groups.")?
        else {
            return Err(keys.missing("config_groups"));
        };
        let mut scheme = None;
        for name in groups.map.keys() {
            let Some(group) = groups.object(name, "quantization_config.config_groups[…].")?
            else {
                return Err(groups.missing(name));
            };
            let floats = format(&group)?.unwrap_or(floats);
            if floats {
                refuse_static(&group)?;
            } else {
                refuse_object(&group, "input_activations")?;
            }
            refuse_object(&group, "output_activations")?;
            let weights = "quantization_config.config_groups[…].weights.";
            let Some(weights) = group.object("weights", weights)? else {
                return Err(group.missing("weights"));
            };
            let this = if floats {
                Self::compressed_floats(&weights)?
            } else {
                Self::compressed_weights(&weights)?
            };
            if scheme.is_some_and(|scheme| scheme != this) {
                let advice = "every matrix is to be quantised alike or not at all";
                return Err(groups.unsupported(name, "differs from the others", advice));
            }
            scheme = Some(this);
        }
        scheme.ok_or_else(|| keys.missing("config_groups"))
    }

    fn compressed_floats(keys: &Keys<'_>) -> Result<Self> {
        match keys.text("type")? {
            Some("float") => {}
            other => {
                let found = format!("'{}'", shown(other.unwrap_or("int")));
                return Err(keys.unsupported("type", &found, E4M3));
            }
        }
        let bits = keys.need_count("num_bits", 64)?;
        if bits != 8 {
            return Err(keys.unsupported("num_bits", &bits.to_string(), E4M3));
        }
        if keys.flag("symmetric")? == Some(false) {
            return Err(keys.unsupported("symmetric", "false", "floats have no zero points"));
        }
        if keys.flag("dynamic")? == Some(true) {
            return Err(keys.unsupported("dynamic", "true", "scales of weights are stored"));
        }
        let (rows, group) = match keys.text("strategy")? {
            Some("tensor") | None => (None, None),
            Some("channel") => (Some(1), None),
            Some("group") => (Some(1), read_group(keys, true)?),
            Some("block") => match keys.pair("block_structure", MAX_GROUP)? {
                Some([rows, group]) => (Some(rows), Some(group)),
                None => return Err(keys.missing("block_structure")),
            },
            Some(other) => {
                let found = format!("'{}'", shown(other));
                let advice = "floats have a scale for each tensor, channel, group or block";
                return Err(keys.unsupported("strategy", &found, advice));
            }
        };
        Ok(Self::floats("weight_scale", rows, group))
    }

    fn compressed_weights(keys: &Keys<'_>) -> Result<Self> {
        match keys.text("type")? {
            None | Some("int") => {}
            Some(other) => {
                let found = format!("'{}'", shown(other));
                return Err(keys.unsupported("type", &found, "codes are integers"));
            }
        }
        if keys.flag("dynamic")? == Some(true) {
            return Err(keys.unsupported("dynamic", "true", "scales of weights are stored"));
        }
        let group = match keys.text("strategy")? {
            Some("channel") => None,
            Some("group") => read_group(keys, true)?,
            None => read_group(keys, false)?,
            Some(other) => {
                let found = format!("'{}'", shown(other));
                let advice =
                    "weights have a scale for each row (channel) or group of channels (group)";
                return Err(keys.unsupported("strategy", &found, advice));
            }
        };
        let needs_order = match keys.get("actorder") {
            None | Some(Value::Bool(false)) => false,
            Some(Value::Bool(true)) => true,
            Some(_) => !matches!(keys.text("actorder")?, Some("weight" | "static")),
        };
        let symmetric = keys.flag("symmetric")?.unwrap_or(true);
        Ok(Self {
            format: Format::Compressed,
            dtype: read_bits(keys, "num_bits")?,
            group,
            zeros: if symmetric {
                Zeros::Middle
            } else {
                Zeros::Stored
            },
            needs_order,
        })
    }
}

/// Refuses activations that are rounded with scales of the file; what is rounded to what it is itself loses
/// nothing by being left as it is.
fn refuse_static(keys: &Keys<'_>) -> Result<()> {
    let prefix = "quantization_config.config_groups[…].input_activations.";
    match keys.object("input_activations", prefix)? {
        Some(inner) if inner.flag("dynamic")? != Some(true) => {
            let advice = "scales of activations are not read; use a checkpoint with dynamic ones";
            Err(inner.unsupported("dynamic", "that is not true", advice))
        }
        _ => Ok(()),
    }
}

fn read_bits(keys: &Keys<'_>, key: &str) -> Result<DType> {
    match keys.need_count(key, 64)? {
        4 => Ok(DType::U4),
        8 => Ok(DType::U8),
        other => {
            let advice = "quantised weights are read in 4 and in 8 bits";
            Err(keys.unsupported(key, &other.to_string(), advice))
        }
    }
}

/// Channels under one scale; -1 stands for a whole row.
fn read_group(keys: &Keys<'_>, needed: bool) -> Result<Option<usize>> {
    match keys.get("group_size") {
        Some(value) if value.as_i64() == Some(-1) => Ok(None),
        None if !needed => Ok(None),
        _ => keys.need_count("group_size", MAX_GROUP).map(Some),
    }
}

/// Refuses a key that asks for more than quantised weights.
fn refuse_object(keys: &Keys<'_>, key: &str) -> Result<()> {
    match keys.get(key) {
        None => Ok(()),
        Some(Value::Object(map)) if map.is_empty() => Ok(()),
        Some(other) => {
            let found = shown_value(other);
            Err(keys.unsupported(key, &found, "only weights are quantised"))
        }
    }
}

/// Where AWQ has the code of each of eight neighbouring rows: the nibble of the word.
const AWQ_NIBBLE: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// What a tensor of a packed matrix holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Codes, in 32-bit words; floats of 8 bits are there one by one.
    Codes,
    /// Scales, in float.
    Scales,
    /// Zero points, in 32-bit words.
    Zeros,
    /// The group of each input channel.
    Order,
    /// The shape before packing.
    Shape,
}

/// One quantised matrix of a checkpoint, `[n, k]` before it was packed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packed {
    /// Name of the layer: that of its tensors without `.qweight`.
    pub stem: String,
    /// Rows: output channels.
    pub n: usize,
    /// Columns: input channels.
    pub k: usize,
    /// How it is packed.
    pub scheme: Scheme,
    /// Whether the file says which group a channel belongs to.
    pub has_order: bool,
}

impl Packed {
    /// Name of the tensor that has a role.
    pub fn name(&self, role: Role) -> String {
        let compressed = self.scheme.format == Format::Compressed;
        let end = match role {
            Role::Codes if self.is_float() => "weight",
            Role::Scales if let Format::Floats { scales, .. } = self.scheme.format => scales,
            Role::Codes if compressed => "weight_packed",
            Role::Scales if compressed => "weight_scale",
            Role::Zeros if compressed => "weight_zero_point",
            Role::Order if compressed => "weight_g_idx",
            Role::Codes => "qweight",
            Role::Scales => "scales",
            Role::Zeros => "qzeros",
            Role::Order => "g_idx",
            Role::Shape => "weight_shape",
        };
        format!("{}.{end}", self.stem)
    }

    /// The tensors that hold it, with their shapes.
    pub fn tensors(&self) -> Vec<(Role, Vec<usize>)> {
        let (n, k, groups, per) = (self.n, self.k, self.groups(), self.per_word());
        let mut all = match self.scheme.format {
            Format::Awq => vec![
                (Role::Codes, vec![k, n / per]),
                (Role::Scales, vec![groups, n]),
                (Role::Zeros, vec![groups, n / per]),
            ],
            Format::Gptq => vec![
                (Role::Codes, vec![k / per, n]),
                (Role::Scales, vec![groups, n]),
                (Role::Zeros, vec![groups, n / per]),
            ],
            Format::Compressed => vec![
                (Role::Codes, vec![n, k.div_ceil(per)]),
                (Role::Scales, vec![n, groups]),
                (Role::Zeros, vec![n.div_ceil(per), groups]),
                (Role::Shape, vec![2]),
            ],
            Format::Floats { rows, .. } => vec![
                (Role::Codes, vec![n, k]),
                match (rows, self.scheme.group) {
                    (None, None) => (Role::Scales, vec![1]),
                    (rows, _) => (Role::Scales, vec![n.div_ceil(rows.unwrap_or(n)), groups]),
                },
            ],
        };
        if self.scheme.zeros == Zeros::Middle {
            all.retain(|(role, _)| *role != Role::Zeros);
        }
        if self.has_order {
            all.push((Role::Order, vec![k]));
        }
        all
    }

    /// Why no kernel reads a matrix of this shape with this scheme, if that is so: what, and advice.
    pub fn unfit(&self) -> Option<(String, &'static str)> {
        let (n, k, per) = (self.n, self.k, self.per_word());
        let by_columns = matches!(self.scheme.format, Format::Awq | Format::Gptq);
        if by_columns && !n.is_multiple_of(per) {
            let what = format!("{n} rows, which do not fill words of {per} codes");
            return Some((what, ADVICE));
        }
        if self.scheme.format == Format::Gptq && !k.is_multiple_of(per) {
            let what = format!("{k} input channels, which do not fill words of {per} codes");
            return Some((what, ADVICE));
        }
        match self.scheme.group {
            Some(group) if group < k && !group.is_multiple_of(GROUP_STEP) => {
                let advice = "a group is a multiple of 32 channels or a whole row";
                Some((format!("group_size {group}"), advice))
            }
            _ => None,
        }
    }

    /// Whether its codes are floats.
    pub fn is_float(&self) -> bool {
        self.scheme.dtype == DType::F8
    }

    /// Codes in a 32-bit word.
    fn per_word(&self) -> usize {
        32 / self.scheme.dtype.bits()
    }

    /// Channels under one scale; a multiple of 32.
    pub fn group(&self) -> usize {
        let row = self.k.next_multiple_of(GROUP_STEP);
        self.scheme.group.map_or(row, |group| group.min(row))
    }

    /// Scales of one row.
    pub fn groups(&self) -> usize {
        self.k.div_ceil(self.group())
    }

    /// Columns of the codes: whole spans.
    pub fn wide(&self) -> usize {
        self.k.next_multiple_of(self.scheme.dtype.span())
    }

    /// Words of the codes of one row.
    pub fn row_words(&self) -> usize {
        self.wide() / self.per_word()
    }

    /// Rows of the file's tensor of codes that may be placed together: a multiple of this.
    pub fn row_step(&self) -> usize {
        if self.scheme.format == Format::Awq {
            8
        } else {
            1
        }
    }

    /// The order in which channels are stored so that those of a group lie side by side:
    /// `order[position]` is a channel. None where they do already.
    ///
    /// `group_of` is the file's list, one number for each channel. A list of -1 says nothing.
    ///
    /// # Errors
    /// If a number is no group, or a group has too many channels: the element, and what is wrong.
    ///
    /// # Panics
    /// If the list has another length than the matrix has channels.
    pub fn order(&self, group_of: &[i32]) -> Result<Option<Vec<u32>>, (usize, String)> {
        assert_eq!(group_of.len(), self.k, "one group for each channel");
        let (group, groups) = (self.group(), self.groups());
        if self.scheme.format == Format::Compressed && group_of.iter().all(|&g| g == -1) {
            return Ok(None);
        }
        let mut next: Vec<usize> = (0..groups).map(|g| g * group).collect();
        let mut order = vec![0; self.k];
        for (channel, &g) in group_of.iter().enumerate() {
            let index = usize::try_from(g).ok().filter(|&g| g < groups);
            let Some(index) = index else {
                return Err((channel, format!("{g} is none of the {groups} groups")));
            };
            let end = ((index + 1) * group).min(self.k);
            if next[index] == end {
                let room = end - index * group;
                let problem = format!("group {g} has more than its {room} channels");
                return Err((channel, problem));
            }
            order[next[index]] = u32::try_from(channel).expect("channels fit 32 bits");
            next[index] += 1;
        }
        // No group has too many, so none has too few.
        let in_place = order.iter().zip(0u32..).all(|(&channel, at)| channel == at);
        Ok((!in_place).then_some(order))
    }

    /// Scale and zero point of every row and group, `[n, groups]`, from the file's tensors.
    ///
    /// # Panics
    /// If the tensors are not of their shapes.
    pub fn scales(&self, scales: &[f32], zeros: &[u32]) -> Vec<u32> {
        let (n, groups, per) = (self.n, self.groups(), self.per_word());
        let bits = self.scheme.dtype.bits();
        let mask = (1u32 << bits) - 1;
        let mut out = vec![0; n * groups];
        if let Format::Floats { rows, .. } = self.scheme.format {
            let rows = rows.unwrap_or(n);
            for (row, out) in out.chunks_exact_mut(groups).enumerate() {
                let scales = &scales[row / rows * groups..];
                out.iter_mut()
                    .zip(scales)
                    .for_each(|(out, scale)| *out = scale.to_bits());
            }
            return out;
        }
        assert_eq!(scales.len(), n * groups, "one scale for each row and group");
        let rows = out.par_chunks_exact_mut(groups).enumerate();
        rows.with_min_len(64).for_each(|(row, out)| {
            let (word, place) = (row / per, row % per);
            for (g, out) in out.iter_mut().enumerate() {
                let (scale, zero) = match self.scheme.format {
                    Format::Awq | Format::Gptq => (g * n + row, g * (n / per) + word),
                    _ => (row * groups + g, word * groups + g),
                };
                let place = match self.scheme.format {
                    Format::Awq => AWQ_NIBBLE[place],
                    _ => place,
                };
                let stored = || zeros[zero] >> (place * bits) & mask;
                let zero = match self.scheme.zeros {
                    Zeros::Stored => stored(),
                    Zeros::StoredLessOne => (stored() + 1) & mask,
                    Zeros::Middle => 1 << (bits - 1),
                };
                *out = scale_word(scales[scale], zero);
            }
        });
        out
    }

    /// Places rows of the file's tensor of codes, `words`, each row of which begins a word (as only floats of 8
    /// bits do not by themselves), which begin with row `first` and whose number
    /// is a multiple of [`Self::row_step`] except at the end. `to` is the whole matrix, `[n, row_words]`,
    /// zero where nothing was placed. `position` says where a channel goes, if not to its own place.
    ///
    /// # Panics
    /// If the words are no whole rows, or `to` is not of its size.
    pub fn place(&self, first: usize, words: &[u32], position: Option<&[u32]>, to: &mut [u32]) {
        let (per, row_words) = (self.per_word(), self.row_words());
        assert_eq!(to.len(), self.n * row_words, "the whole matrix");
        match self.scheme.format {
            Format::Awq => {
                let cols = self.n / per;
                let blocks = to.par_chunks_exact_mut(per * row_words).enumerate();
                blocks.with_min_len(8).for_each(|(col, rows)| {
                    for (block, words) in words.chunks(per * cols).enumerate() {
                        let mut runs = [0; 8];
                        for (i, word) in words.iter().skip(col).step_by(cols).enumerate() {
                            for (run, nibble) in runs.iter_mut().zip(AWQ_NIBBLE) {
                                *run |= (word >> (4 * nibble) & 15) << (4 * i);
                            }
                        }
                        let channel = first + block * per;
                        for (row, run) in rows.chunks_exact_mut(row_words).zip(runs) {
                            self.put(row, channel, run, position);
                        }
                    }
                });
            }
            Format::Gptq => {
                let rows = to.par_chunks_exact_mut(row_words).enumerate();
                rows.with_min_len(64).for_each(|(n, row)| {
                    for (i, &word) in words.iter().skip(n).step_by(self.n).enumerate() {
                        self.put(row, (first + i) * per, word, position);
                    }
                });
            }
            Format::Compressed | Format::Floats { .. } => {
                let from = words.par_chunks_exact(self.k.div_ceil(per));
                let rows = to[first * row_words..].par_chunks_exact_mut(row_words);
                rows.zip(from).with_min_len(64).for_each(|(row, words)| {
                    for (i, &word) in words.iter().enumerate() {
                        self.put(row, i * per, word, position);
                    }
                });
            }
        }
    }

    /// Puts the codes of a word, those of the channels from `channel` on, into a row.
    fn put(&self, row: &mut [u32], channel: usize, word: u32, position: Option<&[u32]>) {
        let (dtype, left) = (self.scheme.dtype, self.k - channel);
        let bits = dtype.bits();
        let Some(position) = position else {
            // A word of a file holds what a word of a row holds; what is behind the end is dropped.
            let dropped = 32 - 32.min(left * bits);
            row[dtype.code_at(channel).0] = word << dropped >> dropped;
            return;
        };
        for i in 0..left.min(self.per_word()) {
            let code = word >> (i * bits) & ((1 << bits) - 1);
            let (at, bit) = dtype.code_at(position[channel + i] as usize);
            row[at] |= code << bit;
        }
    }

    /// Fills what is behind the channels of each row with the zero point of its last group.
    pub fn pad(&self, codes: &mut [u32], scales: &[u32]) {
        let dtype = self.scheme.dtype;
        let rows = codes.chunks_exact_mut(self.row_words());
        for (row, scales) in rows.zip(scales.chunks_exact(self.groups())) {
            let (_, zero) = dtype.scale_of(scales[scales.len() - 1]);
            for at in self.k..self.wide() {
                let (word, bit) = dtype.code_at(at);
                row[word] |= zero << bit;
            }
        }
    }

    /// The weights of one row, channel by channel, from its codes and scales; exact, but for floats beside a
    /// scale of more than 20 bits, whose products are rounded once.
    ///
    /// # Panics
    /// If `out` has another length than the matrix has channels.
    pub fn widen(&self, codes: &[u32], scales: &[u32], order: Option<&[u32]>, out: &mut [f32]) {
        assert_eq!(out.len(), self.k, "one number for each channel");
        let (dtype, group) = (self.scheme.dtype, self.group());
        for at in 0..self.k {
            let (word, bit) = dtype.code_at(at);
            let code = codes[word] >> bit & ((1 << dtype.bits()) - 1);
            let (scale, zero) = dtype.scale_of(scales[at / group]);
            let channel = order.map_or(at, |order| order[at] as usize);
            let number = match dtype {
                DType::F8 => e4m3(code),
                _ => code as f32 - zero as f32,
            };
            // At most 8 bits times 16 bits of a scale from f16 or bf16.
            out[channel] = number * scale;
        }
    }
}

/// The inverse of an order: where each channel lies.
pub fn positions(order: &[u32]) -> Vec<u32> {
    let mut out = vec![0; order.len()];
    for (at, &channel) in order.iter().zip(0u32..).map(|(channel, at)| (at, channel)) {
        out[channel as usize] = at;
    }
    out
}

/// A scale and a zero point in one word. The scale is rounded to 24 bits, which holds every f16 and bf16.
pub fn scale_word(scale: f32, zero: u32) -> u32 {
    debug_assert!(zero < 256, "a zero point has 8 bits");
    let bits = scale.to_bits();
    let rounded = bits.saturating_add(0x80) & !0xff;
    // The largest floats would round to infinity.
    let kept = if f32::from_bits(rounded).is_finite() {
        rounded
    } else {
        bits & !0xff
    };
    kept | zero
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A stream of words (`SplitMix64`): any bits are a good file.
    struct Words(u64);

    impl Words {
        fn next(&mut self) -> u32 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            u32::try_from((z ^ (z >> 27)) >> 32).expect("32 bits")
        }

        fn take(&mut self, n: usize) -> Vec<u32> {
            (0..n).map(|_| self.next()).collect()
        }

        fn below(&mut self, n: usize) -> usize {
            self.next() as usize % n
        }
    }

    fn of_word(word: u32) -> (f32, u32) {
        DType::U8.scale_of(word)
    }

    /// The tensors of a file as numbers of two dimensions.
    struct File {
        codes: Vec<u32>,
        zeros: Vec<u32>,
        scales: Vec<f32>,
        group_of: Vec<i32>,
    }

    /// A weight, computed from the words of the file as the formats' own documents have it.
    fn naive(p: &Packed, file: &File, row: usize, channel: usize) -> f32 {
        let g = usize::try_from(file.group_of[channel]).expect("a group");
        let bits = p.scheme.dtype.bits();
        let per = 32 / bits;
        let field = |word: u32, i: usize| i64::from(word >> (i * bits)) % (1 << bits);
        // Nibble i of a word of AWQ is of row 8 c + [0, 2, 4, 6, 1, 3, 5, 7][i].
        let awq = |row: usize| {
            let mine = |&i: &usize| [0, 2, 4, 6, 1, 3, 5, 7][i] == row % 8;
            (0..8).find(mine).expect("every row has a nibble")
        };
        let (code, zero, scale) = match p.scheme.format {
            Format::Awq => (
                field(file.codes[channel * (p.n / 8) + row / 8], awq(row)),
                field(file.zeros[g * (p.n / 8) + row / 8], awq(row)),
                file.scales[g * p.n + row],
            ),
            Format::Gptq => (
                field(file.codes[channel / per * p.n + row], channel % per),
                field(file.zeros[g * (p.n / per) + row / per], row % per),
                file.scales[g * p.n + row],
            ),
            Format::Compressed => {
                let middle = 1 << (bits - 1);
                let cols = p.k.div_ceil(per);
                let zero = match p.scheme.zeros {
                    Zeros::Middle => 0,
                    _ => field(file.zeros[row / per * p.groups() + g], row % per) - middle,
                };
                let code = field(file.codes[row * cols + channel / per], channel % per) - middle;
                (code, zero, file.scales[row * p.groups() + g])
            }
            Format::Floats { .. } => panic!("floats have a test of their own"),
        };
        let zero = match p.scheme.zeros {
            Zeros::StoredLessOne => (zero + 1) % (1 << bits),
            _ => zero,
        };
        (code - zero) as f32 * scale
    }

    /// Makes the tensors of a file out of random words, and compares every weight.
    #[track_caller]
    fn agrees(p: &Packed, shuffled: bool, seed: u64) {
        assert_eq!(p.unfit(), None, "a good shape");
        let mut words = Words(seed);
        let size = |role| {
            let found = p.tensors().into_iter().find(|t| t.0 == role);
            found.map_or(0, |t| t.1.iter().product())
        };
        let mut group_of: Vec<i32> = (0..p.k)
            .map(|c| i32::try_from(c / p.group()).expect("small"))
            .collect();
        if shuffled {
            for i in (1..p.k).rev() {
                group_of.swap(i, words.below(i + 1));
            }
        }
        let half = |w: u32| half::f16::from_bits(u16::try_from(w & 0xbbff).expect("16 bits"));
        let scales = words.take(size(Role::Scales));
        let file = File {
            codes: words.take(size(Role::Codes)),
            zeros: words.take(size(Role::Zeros)),
            scales: scales.into_iter().map(|w| half(w).to_f32()).collect(),
            group_of,
        };

        let order = p.order(&file.group_of).expect("a good order");
        assert_eq!(order.is_some(), shuffled, "whether channels move");
        let position = order.as_deref().map(positions);
        let scales = p.scales(&file.scales, &file.zeros);
        let mut codes = vec![0; p.n * p.row_words()];
        let cols = p.tensors()[0].1[1];
        // In pieces, as files are read.
        let step = 3 * p.row_step();
        for (i, piece) in file.codes.chunks(step * cols).enumerate() {
            p.place(i * step, piece, position.as_deref(), &mut codes);
        }
        p.pad(&mut codes, &scales);

        let mut row = vec![0.0; p.k];
        for n in 0..p.n {
            let codes = &codes[n * p.row_words()..][..p.row_words()];
            let scales = &scales[n * p.groups()..][..p.groups()];
            p.widen(codes, scales, order.as_deref(), &mut row);
            for (channel, got) in row.iter().enumerate() {
                let want = naive(p, &file, n, channel);
                assert!(
                    got.to_bits() == want.to_bits() || want == 0.0 && *got == 0.0,
                    "{p:?}: [{n}, {channel}] is {got}, not {want}"
                );
            }
            // Kernels may multiply what is behind a row with zero: it is to be zero as well.
            for at in p.k..p.wide() {
                let (word, bit) = p.scheme.dtype.code_at(at);
                let code = codes[word] >> bit & ((1 << p.scheme.dtype.bits()) - 1);
                assert_eq!(code, scales[p.groups() - 1] & 0xff, "padding is zero");
            }
        }
    }

    fn packed(scheme: Scheme, n: usize, k: usize) -> Packed {
        Packed {
            stem: "x".into(),
            n,
            k,
            scheme,
            has_order: true,
        }
    }

    #[test]
    fn every_weight_of_every_format_is_what_its_document_says() {
        use Format::{Awq, Compressed, Gptq};
        use Zeros::{Middle, Stored, StoredLessOne};
        let kinds = [
            (Awq, DType::U4, vec![Stored]),
            (Gptq, DType::U4, vec![Stored, StoredLessOne]),
            (Gptq, DType::U8, vec![Stored, StoredLessOne]),
            (Compressed, DType::U4, vec![Stored, Middle]),
            (Compressed, DType::U8, vec![Stored, Middle]),
        ];
        let mut seed = 0;
        for (format, dtype, zeros) in kinds {
            for zeros in zeros {
                for (n, k, group) in [
                    (8, 128, Some(128)),
                    (24, 256, Some(32)),
                    (136, 160, Some(64)),
                    (16, 40, Some(128)),
                    (8, 344, None),
                ] {
                    let scheme = Scheme {
                        format,
                        dtype,
                        group,
                        zeros,
                        needs_order: false,
                    };
                    let p = packed(scheme, n, k);
                    for shuffled in [false, true] {
                        seed += 1;
                        agrees(&p, shuffled && p.groups() > 1, seed);
                    }
                }
            }
        }
        // Neither rows nor channels fill a word.
        for zeros in [Stored, Middle] {
            for dtype in [DType::U4, DType::U8] {
                let scheme = Scheme {
                    format: Compressed,
                    dtype,
                    group: Some(32),
                    zeros,
                    needs_order: false,
                };
                agrees(&packed(scheme, 5, 77), false, 7);
                agrees(&packed(scheme, 5, 77), true, 8);
            }
        }
        // AWQ packs along the rows: any number of channels will do.
        let awq = packed(AWQ, 8, 77);
        agrees(&awq, false, 9);
    }

    #[test]
    fn every_float_of_a_block_is_what_its_document_says() {
        let number = |code: u32| {
            let (sign, exponent, mantissa) = (code >> 7, code >> 3 & 15, (code & 7) as f32 / 8.0);
            let size = match exponent {
                0 => mantissa * 0.015_625,
                e => (1.0 + mantissa) * (e as f32 - 7.0).exp2(),
            };
            if sign == 1 { -size } else { size }
        };
        for (rows, group, n, k) in [
            (Some(128), Some(128), 200, 333),
            (Some(48), Some(32), 97, 64),
            (Some(1), None, 5, 39),
            (Some(1), Some(64), 3, 130),
            (None, None, 9, 70),
        ] {
            let p = Packed {
                has_order: false,
                ..packed(Scheme::floats("weight_scale", rows, group), n, k)
            };
            assert_eq!(p.unfit(), None, "a good shape");
            let shapes = p.tensors();
            let [(Role::Codes, codes), (Role::Scales, shape)] = &shapes[..] else {
                panic!("codes and scales: {shapes:?}")
            };
            assert_eq!(codes[..], [n, k], "codes as they are");
            let mut words = Words(u64::from(rows.is_some()) + k as u64);
            let n_scales = shape.iter().product();
            let scales: Vec<f32> = (0..n_scales).map(|_| words.next() as f32 / 3e9).collect();
            // Each row begins a word; what stands for NaN is refused before.
            let mut file = words.take(n * k.div_ceil(4));
            for code in bytemuck::cast_slice_mut::<u32, u8>(&mut file) {
                *code ^= u8::from(*code & 0x7f == 0x7f);
            }
            let mut codes = vec![0; n * p.row_words()];
            for (i, piece) in file.chunks(3 * k.div_ceil(4)).enumerate() {
                p.place(3 * i, piece, None, &mut codes);
            }
            let scale_words = p.scales(&scales, &[]);
            p.pad(&mut codes, &scale_words);
            let mut row = vec![0.0; k];
            for i in 0..n {
                let codes = &codes[i * p.row_words()..][..p.row_words()];
                p.widen(
                    codes,
                    &scale_words[i * p.groups()..][..p.groups()],
                    None,
                    &mut row,
                );
                for (c, got) in row.iter().enumerate() {
                    let code = file[i * k.div_ceil(4) + c / 4] >> (c % 4 * 8) & 0xff;
                    let per_row = shape.get(1).copied().unwrap_or(1);
                    let block = i / rows.unwrap_or(n) * per_row + c / group.unwrap_or(k);
                    let want = number(code) * scales[block];
                    assert_eq!(got.to_bits(), want.to_bits(), "{p:?}: [{i}, {c}]");
                }
                for at in k..p.wide() {
                    let (word, bit) = DType::F8.code_at(at);
                    assert_eq!(codes[word] >> bit & 0xff, 0, "padding is zero");
                }
            }
        }
    }

    const AWQ: Scheme = Scheme {
        format: Format::Awq,
        dtype: DType::U4,
        group: Some(64),
        zeros: Zeros::Stored,
        needs_order: false,
    };

    #[test]
    fn a_stored_zero_point_of_gptq_wraps_by_itself() {
        let scheme = Scheme {
            format: Format::Gptq,
            zeros: Zeros::StoredLessOne,
            ..AWQ
        };
        // The word as a whole plus 0x11111111 would carry from nibble to nibble.
        let words = packed(scheme, 8, 64).scales(&[1.0; 8], &[0xf0f7_ffff]);
        let zeros: Vec<u32> = words.iter().map(|w| of_word(*w).1).collect();
        assert_eq!(zeros, [0, 0, 0, 0, 8, 0, 1, 0], "each nibble by itself");
    }

    #[test]
    fn a_scale_keeps_every_bit_of_f16_and_bf16_and_rounds_f32() {
        for bits in 0..=u16::MAX {
            for scale in [
                half::f16::from_bits(bits).to_f32(),
                half::bf16::from_bits(bits).to_f32(),
            ] {
                if scale.is_finite() {
                    assert_eq!(
                        of_word(scale_word(scale, 200)),
                        (scale, 200),
                        "{scale} is kept"
                    );
                }
            }
        }
        for scale in [0.1f32, -1.0 / 3.0, 1e-30, f32::MAX, f32::MIN] {
            let (kept, zero) = of_word(scale_word(scale, 15));
            let error = (f64::from(kept) / f64::from(scale) - 1.0).abs();
            assert!(
                error < 2f64.powi(-15) && zero == 15,
                "{scale} became {kept}"
            );
        }
        let (kept, _) = of_word(scale_word(0.1, 0));
        assert!(
            (f64::from(kept) / 0.1 - 1.0).abs() < 2f64.powi(-17),
            "to the nearest"
        );
    }

    #[test]
    fn an_order_that_is_none_is_refused_at_its_element() {
        let p = packed(AWQ, 8, 128);
        let good: Vec<i32> = (0..128).map(|i| i % 2).collect();
        let order = p
            .order(&good)
            .expect("a good order")
            .expect("channels move");
        assert_eq!(order[..3], [0, 2, 4], "the first group's channels");
        assert_eq!(order[64..66], [1, 3], "then the second's");
        assert_eq!(positions(&order)[3], 65, "and back");
        let with = |at: usize, g: i32| {
            let mut list = good.clone();
            list[at] = g;
            p.order(&list).expect_err("a bad order")
        };
        assert_eq!(with(5, 2).0, 5, "no such group");
        assert_eq!(with(7, -1).0, 7, "a negative group");
        let (at, problem) = with(127, 0);
        assert_eq!(at, 127, "one too many, at the last of them");
        assert!(problem.contains("more than its 64"), "{problem}");
        assert!(p.order(&[-1; 128]).is_err(), "awq has no word for nothing");
    }
}
