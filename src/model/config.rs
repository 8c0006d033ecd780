//! What a model says about itself: `config.json` and `generation_config.json`.
//!
//! Both spellings of Hugging Face transformers are read, that of version 4 (`rope_theta`,
//! `rope_scaling`) and that of version 5 (`rope_parameters`, `layer_types`). Every number is checked
//! against its own bounds and against the others here, once; later code computes with them freely.
//! What would change the computation and is not computed by this version is refused by name.

use std::f64::consts::PI;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::families::{self, Family, Heads, Mixture, Window};
use super::json::{self, shown, shown_value};
use super::quant::Scheme;
use crate::ops::attend::MAX_DIM;
use crate::ops::route::{MAX_EXPERTS, Routing};
use crate::{Error, Result, TokenId};

/// Bytes that either config may have.
const MAX_BYTES: u64 = 1 << 20;

/// Layers that a model may have.
const MAX_LAYERS: usize = 1024;

/// Bound of every width: far above any model, and small enough that no product of two overflows.
const MAX_WIDTH: usize = 1 << 24;

/// Positions that a model may promise; 10 million is the largest number in use.
const MAX_POSITIONS: usize = 1 << 28;

/// Bound of counts that only limit something, such as a window, in tokens.
const MAX_COUNT: usize = u32::MAX as usize;

/// The numbers that describe a decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// What the family adds.
    pub family: &'static Family,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the feed-forward block.
    pub intermediate_size: usize,
    /// Number of layers.
    pub n_layers: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads; divides the query heads. Of latents, one.
    pub n_kv_heads: usize,
    /// Width of one head in attention, divisible by 8: 8 to 256; of latents, what the cache holds of a token.
    pub head_dim: usize,
    /// Rows of the embedding; at least the number of tokens.
    pub vocab_size: usize,
    /// Added to the mean square before its root.
    pub rms_norm_eps: f32,
    /// Whether the head is the embedding; `None`: the config does not say, the tensors do.
    pub tie_word_embeddings: Option<bool>,
    /// Positions that the model was made for, in tokens.
    pub max_positions: usize,
    /// Channels of a head that are rotated, its first ones: 2 to `head_dim`, even.
    pub rotary_dim: usize,
    /// Rotary positions.
    pub rope: Rope,
    /// Multiplies the products of queries and keys.
    pub attention_scale: f32,
    /// The latent that all heads share in place of keys and values, where the family has it.
    pub latent: Option<Latent>,
    /// Layers behind the last that a checkpoint may have: they predict further tokens, and are not computed.
    pub extra_layers: usize,
    /// Tokens that a query of each layer sees, its own included; none: every one before it.
    pub windows: Vec<Option<usize>>,
    /// The id that begins a text, if the model has one.
    pub bos: Option<TokenId>,
    /// The ids that end a text.
    pub eos: Vec<TokenId>,
    /// How its matrices are quantised, where they are.
    pub quantised: Option<Scheme>,
    /// Experts in place of the feed-forward block, where layers have them.
    pub experts: Option<Experts>,
    digest: [u8; 32],
}

/// Multi-head latent attention: queries meet what keys and values are made of, in place of keys.
///
/// In device memory, and in the cache, a latent and its rotated channels are one head of [`Config::head_dim`]
/// channels: each half begins with [`Latent::gap`] rotated ones, one of each pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Latent {
    /// Width that queries are made from; none: they are made from the residual stream.
    pub q_rank: Option<usize>,
    /// Width of the latent.
    pub rank: usize,
    /// Channels of a query's head that are not rotated.
    pub nope_dim: usize,
    /// Channels of a query's head that are, even; all heads share those of the keys.
    pub rope_dim: usize,
    /// Channels of a head's value.
    pub v_dim: usize,
    /// Whether the rotated channels of files are pairs of neighbours, or else two halves.
    pub interleaved: bool,
}

impl Latent {
    /// What is added to the mean squares of the norms of latents, whatever `rms_norm_eps` is.
    pub const EPS: f32 = 1e-6;

    /// Width of the latent as it is stored, padded with zeros.
    pub fn dim(&self) -> usize {
        self.rank.next_multiple_of(8)
    }

    /// Width of a query's channels that are not rotated, padded with zeros.
    pub fn nope_wide(&self) -> usize {
        self.nope_dim.next_multiple_of(8)
    }

    /// Rotated pairs of a head as they are stored, padded with pairs of zeros.
    pub fn gap(&self) -> usize {
        (self.rope_dim / 2).next_multiple_of(4)
    }

    /// Rows of a file that make a query's head, in the order in which they are stored; none is a row of zeros.
    pub fn query_order(&self) -> Vec<Option<usize>> {
        self.order(self.nope_dim, self.nope_wide())
    }

    /// Rows of a file that make a latent and its rotated channels, in the order in which they are stored.
    pub fn key_order(&self) -> Vec<Option<usize>> {
        self.order(self.rank, self.dim())
    }

    /// `n` rows padded to `wide`, and behind them one half of the rotated ones and then the other.
    fn order(&self, n: usize, wide: usize) -> Vec<Option<usize>> {
        let half = self.rope_dim / 2;
        let rotated = |i: usize, second: usize| {
            let row = if self.interleaved {
                2 * i + second
            } else {
                i + second * half
            };
            (i < half).then_some(n + row)
        };
        let front = (0..wide).map(|i| (i < n).then_some(i));
        let pairs = |second: usize| (0..self.gap()).map(move |i| rotated(i, second));
        front.chain(pairs(0)).chain(pairs(1)).collect()
    }
}

/// A mixture of experts.
#[derive(Clone, Debug, PartialEq)]
pub struct Experts {
    /// Experts of a layer that tokens choose from.
    pub count: usize,
    /// Width inside an expert.
    pub intermediate_size: usize,
    /// Width inside what all tokens go through beside those they choose, if there is any.
    pub shared_size: Option<usize>,
    /// How a token chooses.
    pub routing: Routing,
    /// Which layers have experts.
    pub layers: Vec<bool>,
}

/// Rotary position embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// How they are stretched for long texts.
    pub kind: RopeKind,
}

/// How rotary frequencies are stretched for texts longer than those first trained on.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeKind {
    /// Not at all.
    Default,
    /// All alike.
    Linear {
        /// Divides the frequencies.
        factor: f64,
    },
    /// By wavelength, with a linear ramp between two of them (Llama 3.1 and later).
    Llama3 {
        /// Divides the frequencies of long waves.
        factor: f64,
        /// Waves longer than `original / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Waves shorter than `original / high_freq_factor` stay.
        high_freq_factor: f64,
        /// Positions of the first training, in tokens.
        original: usize,
    },
    /// By index, with a ramp between two numbers of turns (`YaRN`).
    Yarn {
        /// Divides the frequencies of slow turns.
        factor: f64,
        /// Frequencies with more turns than this over the first training stay.
        beta_fast: f64,
        /// Frequencies with fewer turns than this are divided.
        beta_slow: f64,
        /// Whether the ends of the ramp are rounded to whole indices.
        truncate: bool,
        /// Multiplies cosines and sines.
        attention_factor: f64,
        /// Multiplies queries and keys of latents, whole; 1 where nothing is said of it.
        all_factor: f64,
        /// Positions of the first training, in tokens.
        original: usize,
    },
    /// Pair by pair, by one of two tables (`LongRoPE`).
    LongRope {
        /// Divides each frequency in contexts of at most `original` tokens.
        short_factor: Vec<f64>,
        /// Divides each frequency in longer contexts.
        long_factor: Vec<f64>,
        /// Multiplies cosines and sines.
        attention_factor: f64,
        /// Positions of the first training, in tokens.
        original: usize,
    },
}

impl RopeKind {
    /// Whether a context of so many positions takes the frequencies of long texts, where there are two
    /// tables of them. Text by text the choice would change under keys that are in the cache already.
    pub fn is_long(&self, n_positions: usize) -> Option<bool> {
        match self {
            Self::LongRope { original, .. } => Some(n_positions > *original),
            _ => None,
        }
    }

    /// What multiplies the products of queries and keys where heads share a latent: `YaRN` has a factor of
    /// theirs, which in other families is left to cosines and sines.
    fn latent_scale(&self, latent: Latent) -> f32 {
        let factor = match self {
            Self::Yarn { all_factor, .. } => *all_factor,
            _ => 1.0,
        };
        let dim = (latent.nope_dim + latent.rope_dim) as f64;
        to_f32(factor * factor / dim.sqrt())
    }
}

impl Config {
    /// Reads `config.json` of a model folder.
    ///
    /// # Errors
    /// If there is none, or as [`Config::from_json`].
    pub fn open(dir: &Path) -> Result<Self> {
        match json::read_small(dir, "config.json", MAX_BYTES)? {
            Some((path, bytes)) => Self::from_json(&path, &bytes),
            None => Err(Error::bad(
                dir.join("config.json"),
                "file",
                "is not there; a model is a folder in Hugging Face layout",
            )),
        }
    }

    /// Reads the text of a `config.json`; `path` is only for messages.
    ///
    /// # Errors
    /// If a number is missing, out of bounds or contradicts another one ([`Error::BadFile`]), or if
    /// the model needs something that is not computed by this version ([`Error::Unsupported`]).
    pub fn from_json(path: &Path, bytes: &[u8]) -> Result<Self> {
        let map = json::object(path, bytes)?;
        let keys = Keys::new(path, &map);
        let family = read_family(&keys)?;
        let quantised = Scheme::read(&keys)?;
        refuse_activation(&keys)?;

        let hidden_size = keys.need_count("hidden_size", MAX_WIDTH)?;
        let intermediate_size = keys.need_count("intermediate_size", MAX_WIDTH)?;
        let n_layers = keys.need_count("num_hidden_layers", MAX_LAYERS)?;
        let n_heads = keys.need_count("num_attention_heads", MAX_WIDTH)?;
        let mut n_kv_heads = keys
            .count("num_key_value_heads", MAX_WIDTH)?
            .unwrap_or(n_heads);
        if !n_heads.is_multiple_of(n_kv_heads) {
            let problem = format!("{n_kv_heads} does not divide the {n_heads} attention heads");
            return Err(keys.bad("num_key_value_heads", problem));
        }
        let latent = read_latent(&keys, family, [n_heads, n_kv_heads])?;
        let (head_dim, rotated) = if let Some(latent) = latent {
            n_kv_heads = 1;
            (latent.dim() + 2 * latent.gap(), latent.rope_dim)
        } else {
            let head_dim = read_head_dim(&keys, family, hidden_size, n_heads)?;
            (head_dim, head_dim)
        };
        let vocab_size = keys.need_count("vocab_size", MAX_WIDTH)?;
        let eps = keys.need_number("rms_norm_eps")?;
        if !(eps > 0.0 && eps <= 1.0 && to_f32(eps) > 0.0) {
            let problem = format!("expected a small number above 0, found {eps}");
            return Err(keys.bad("rms_norm_eps", problem));
        }
        let max_positions = keys.need_count("max_position_embeddings", MAX_POSITIONS)?;
        let mut rotary_dim = read_rotary_dim(&keys, rotated)?;
        let rope = read_rope(&keys, family, rotary_dim, max_positions)?;
        if rotary_dim < rotated && !family.partial_rotary {
            if rope.kind != RopeKind::Default {
                let advice = "in this family all channels of a head are rotated; leave it out";
                return Err(keys.unsupported("partial_rotary_factor", "below 1", advice));
            }
            let path = path.display();
            log::warn!(
                "{path}: partial_rotary_factor means nothing in a {} config",
                family.model_type
            );
            rotary_dim = rotated;
        }

        let config = Self {
            family,
            hidden_size,
            intermediate_size,
            n_layers,
            n_heads,
            n_kv_heads,
            head_dim,
            vocab_size,
            rms_norm_eps: to_f32(eps),
            tie_word_embeddings: keys.flag("tie_word_embeddings")?,
            max_positions,
            rotary_dim,
            attention_scale: match latent {
                None => 1.0 / (head_dim as f32).sqrt(),
                Some(latent) => rope.kind.latent_scale(latent),
            },
            rope,
            latent,
            extra_layers: if family.heads == Heads::Latent {
                keys.count_or_none("num_nextn_predict_layers", MAX_LAYERS, 1)?
            } else {
                0
            },
            windows: read_windows(&keys, family, n_layers)?,
            bos: keys.ids("bos_token_id", vocab_size)?.first().copied(),
            eos: keys.ends(vocab_size)?,
            quantised,
            experts: read_experts(&keys, family, n_layers)?,
            digest: Sha256::digest(bytes).into(),
        };
        // One look at the result stands for bounds on every parameter of every kind.
        for n_positions in [1, usize::MAX] {
            let (inv_freq, multiplier) = config.inv_freq(n_positions);
            if !(multiplier > 0.0 && multiplier.is_finite())
                || inv_freq.iter().any(|f| !(*f > 0.0 && f.is_finite()))
            {
                return Err(keys.bad(
                    "rope_theta",
                    "with the other rope parameters gives frequencies that are not finite and positive",
                ));
            }
        }
        Ok(config)
    }

    /// The experts of a layer, if it has them.
    pub fn experts(&self, layer: usize) -> Option<&Experts> {
        self.experts
            .as_ref()
            .filter(|experts| experts.layers[layer])
    }

    /// Width of all query heads together.
    pub fn q_size(&self) -> usize {
        self.n_heads * self.head_dim
    }

    /// Width of all key heads, or of all value heads, together.
    pub fn kv_size(&self) -> usize {
        self.n_kv_heads * self.head_dim
    }

    /// Width of what attention gives to the projection behind it.
    pub fn attention_size(&self) -> usize {
        self.latent
            .map_or(self.q_size(), |latent| self.n_heads * latent.v_dim)
    }

    /// Tensors of the cache of a layer: keys and values, or the latent that is both.
    pub fn cache_copies(&self) -> usize {
        if self.latent.is_some() { 1 } else { 2 }
    }

    /// Pairs of channels of a head that the table of angles has.
    pub fn n_pairs(&self) -> usize {
        self.latent.map_or(self.head_dim / 2, |latent| latent.gap())
    }

    /// The channels of a head in the order in which queries and keys have them in device memory: the place
    /// `i` has `head_order()[i]`. None where that is their own order, since all of them are rotated, and for
    /// latents, which have orders of their own.
    ///
    /// Kernels rotate the places `i` and `i + head_dim / 2` together. So each half begins with its half of
    /// the rotated channels; the rest follows, in pairs that are not rotated.
    pub fn head_order(&self) -> Option<Vec<usize>> {
        let (dim, rotary) = (self.head_dim, self.rotary_dim);
        if self.latent.is_some() {
            return None;
        }
        let half = |rotated: Range<usize>, rest: Range<usize>| rotated.chain(rest);
        let middle = rotary.midpoint(dim);
        let first = half(0..rotary / 2, rotary..middle);
        let order = first.chain(half(rotary / 2..rotary, middle..dim));
        (rotary < dim).then(|| order.collect())
    }

    /// Radians per position of each of the `rotary_dim / 2` pairs of a head that are rotated, and what
    /// their cosines and sines are multiplied with, in a context of `n_positions`.
    ///
    /// Pair `i` is the channels `i` and `i + rotary_dim / 2`. The arithmetic is that of transformers,
    /// in f32 and in its order, so that positions far out agree with it.
    ///
    /// Source: `modeling_rope_utils.py` of transformers 5. Version 4 differs where a `YaRN` or `LongRoPE`
    /// config has both `factor` and a context length other than `factor` times the original one.
    pub fn inv_freq(&self, n_positions: usize) -> (Vec<f32>, f32) {
        let base: Vec<f32> = (0..self.rotary_dim / 2)
            .map(|i| {
                let exponent = (2 * i) as f32 / self.rotary_dim as f32;
                // `powf` in f64, rounded once, is within one unit of any f32 library's.
                to_f32(f64::from(to_f32(self.rope.theta)).powf(f64::from(exponent)))
            })
            .collect();
        match &self.rope.kind {
            RopeKind::Default => (base.iter().map(|p| p.recip()).collect(), 1.0),
            &RopeKind::Linear { factor } => {
                let divided = |p: &f32| p.recip() / to_f32(factor);
                (base.iter().map(divided).collect(), 1.0)
            }
            &RopeKind::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original,
            } => {
                let (low, high) = (low_freq_factor, high_freq_factor);
                let original = original as f64;
                let (long, short) = (to_f32(original / low), to_f32(original / high));
                let bend = |inv: f32| {
                    let wavelength = inv.recip() * to_f32(2.0 * PI);
                    if wavelength > long {
                        return inv / to_f32(factor);
                    }
                    if wavelength < short {
                        return inv;
                    }
                    let turns = wavelength.recip() * to_f32(original);
                    let smooth = (turns - to_f32(low)) / to_f32(high - low);
                    (1.0 - smooth) * inv / to_f32(factor) + smooth * inv
                };
                (base.iter().map(|p| bend(p.recip())).collect(), 1.0)
            }
            &RopeKind::Yarn {
                factor,
                beta_fast,
                beta_slow,
                truncate,
                attention_factor,
                original,
                ..
            } => {
                let dim = self.rotary_dim as f64;
                // The index at which a frequency makes this many turns over the first training.
                let index = |turns: f64| {
                    dim * (original as f64 / (turns * 2.0 * PI)).ln() / (2.0 * self.rope.theta.ln())
                };
                let (mut low, mut high) = (index(beta_fast), index(beta_slow));
                if truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                (low, high) = (low.max(0.0), high.min(dim - 1.0));
                if (high - low).abs() < f64::EPSILON {
                    high += 0.001;
                }
                let bend = |(i, &power): (usize, &f32)| {
                    let ramp = (i as f32 - to_f32(low)) / to_f32(high - low);
                    let keep = 1.0 - ramp.clamp(0.0, 1.0);
                    let divided = (to_f32(factor) * power).recip();
                    divided * (1.0 - keep) + power.recip() * keep
                };
                let inv_freq = base.iter().enumerate().map(bend).collect();
                (inv_freq, to_f32(attention_factor))
            }
            RopeKind::LongRope {
                short_factor,
                long_factor,
                attention_factor,
                ..
            } => {
                let factors = match self.rope.kind.is_long(n_positions) {
                    Some(true) => long_factor,
                    _ => short_factor,
                };
                let divided = |(power, &factor): (&f32, &f64)| (to_f32(factor) * power).recip();
                let inv_freq = base.iter().zip(factors).map(divided).collect();
                (inv_freq, to_f32(*attention_factor))
            }
        }
    }

    /// SHA-256 of the file's bytes.
    pub(super) fn digest(&self) -> &[u8; 32] {
        &self.digest
    }
}

/// How a model wants its tokens to be drawn, from `generation_config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerationConfig {
    /// Whether tokens are drawn at random; if not, the likeliest is taken and the rest is unused.
    pub do_sample: bool,
    /// Divides the logits; above 0, or 0 for the likeliest token.
    pub temperature: f32,
    /// Number of likeliest tokens that are kept; 0 keeps all.
    pub top_k: usize,
    /// Share of the probability that the kept tokens reach together, above 0 and up to 1.
    pub top_p: f32,
    /// Least probability of a kept token, as a share of the likeliest one's; 0 to 1.
    pub min_p: f32,
    /// The ids that end a text.
    pub eos: Vec<TokenId>,
}

impl Default for GenerationConfig {
    /// What Hugging Face transformers does without a file.
    fn default() -> Self {
        Self {
            do_sample: false,
            temperature: 1.0,
            top_k: 50,
            top_p: 1.0,
            min_p: 0.0,
            eos: Vec::new(),
        }
    }
}

impl GenerationConfig {
    /// Reads `generation_config.json` of a model folder; without one, the defaults.
    ///
    /// # Errors
    /// If the file is damaged, or a value in it is out of its bounds.
    pub fn open(dir: &Path, config: &Config) -> Result<Self> {
        match json::read_small(dir, "generation_config.json", MAX_BYTES)? {
            Some((path, bytes)) => Self::from_json(&path, &bytes, config),
            None => Ok(Self::default()),
        }
    }

    /// Reads the text of a `generation_config.json`; `path` is only for messages.
    ///
    /// # Errors
    /// If a value is out of its bounds.
    pub fn from_json(path: &Path, bytes: &[u8], config: &Config) -> Result<Self> {
        let map = json::object(path, bytes)?;
        let keys = Keys::new(path, &map);
        let default = Self::default();
        let temperature = keys.share("temperature", f64::from(f32::MAX))?;
        let top_p = keys.share("top_p", 1.0)?;
        if top_p == Some(0.0) {
            return Err(keys.bad("top_p", "expected a number above 0 and up to 1, found 0"));
        }
        let top_k = match keys.get("top_k") {
            Some(Value::Number(n)) if n.as_u64() == Some(0) => Some(0),
            // More than the vocabulary keeps everything, as 0 does.
            _ => keys.count("top_k", MAX_COUNT)?,
        };
        if let Some(penalty) = keys.number("repetition_penalty")?
            && (penalty - 1.0).abs() > f64::EPSILON
        {
            log::warn!(
                "{}: repetition_penalty: {penalty} is not applied by this version",
                path.display()
            );
        }
        Ok(Self {
            do_sample: keys.flag("do_sample")?.unwrap_or(default.do_sample),
            temperature: temperature.map_or(default.temperature, to_f32),
            top_k: top_k.unwrap_or(default.top_k),
            top_p: top_p.map_or(default.top_p, to_f32),
            min_p: keys.share("min_p", 1.0)?.map_or(default.min_p, to_f32),
            eos: keys.ends(config.vocab_size)?,
        })
    }

    /// Whether the likeliest token is taken, always.
    pub fn is_greedy(&self) -> bool {
        !self.do_sample || self.temperature == 0.0
    }
}

/// The keys of one object of a file, and how to name them in a message.
pub(super) struct Keys<'a> {
    path: &'a Path,
    prefix: &'static str,
    pub(super) map: &'a Map<String, Value>,
}

impl<'a> Keys<'a> {
    fn new(path: &'a Path, map: &'a Map<String, Value>) -> Self {
        Self {
            path,
            prefix: "",
            map,
        }
    }

    /// An [`Error::BadFile`] at a key.
    fn bad(&self, key: &str, problem: impl Into<String>) -> Error {
        Error::bad(self.path, format!("{}{key}", self.prefix), problem)
    }

    fn expected(&self, key: &str, what: &str, found: &Value) -> Error {
        self.bad(
            key,
            format!("expected {what}, found {}", shown_value(found)),
        )
    }

    pub(super) fn missing(&self, key: &str) -> Error {
        self.bad(key, "is missing; the model needs it")
    }

    /// The value of a key; one that is null counts as absent, as it does in transformers.
    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    /// A whole number from 1 to `max`.
    fn count(&self, key: &str, max: usize) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let count = value.as_u64().and_then(|n| usize::try_from(n).ok());
        match count {
            Some(n) if (1..=max).contains(&n) => Ok(Some(n)),
            _ => Err(self.expected(key, &format!("a whole number from 1 to {max}"), value)),
        }
    }

    /// A whole number from 0 to `max`, or else `default`; null is none.
    fn count_or_none(&self, key: &str, max: usize, default: usize) -> Result<usize> {
        match self.map.get(key) {
            None => Ok(default),
            Some(Value::Number(n)) if n.as_u64() == Some(0) => Ok(0),
            Some(_) => Ok(self.count(key, max)?.unwrap_or(0)),
        }
    }

    pub(super) fn need_count(&self, key: &str, max: usize) -> Result<usize> {
        self.count(key, max)?.ok_or_else(|| self.missing(key))
    }

    /// A finite number.
    fn number(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match value.as_f64() {
            Some(x) if x.is_finite() => Ok(Some(x)),
            _ => Err(self.expected(key, "a number", value)),
        }
    }

    fn need_number(&self, key: &str) -> Result<f64> {
        self.number(key)?.ok_or_else(|| self.missing(key))
    }

    /// A finite number above 0, in f64 and in f32.
    fn positive(&self, key: &str) -> Result<Option<f64>> {
        match self.number(key)? {
            Some(x) if !(to_f32(x) > 0.0 && to_f32(x).is_finite()) => {
                Err(self.bad(key, format!("expected a number above 0, found {x}")))
            }
            x => Ok(x),
        }
    }

    /// A number of at least 1, by which frequencies are divided.
    fn factor(&self, key: &str) -> Result<Option<f64>> {
        match self.positive(key)? {
            Some(x) if x < 1.0 => {
                Err(self.bad(key, format!("expected a number of at least 1, found {x}")))
            }
            x => Ok(x),
        }
    }

    /// A list of `n` numbers above 0.
    fn factors(&self, key: &str, n: usize) -> Result<Vec<f64>> {
        let list = match self.get(key) {
            Some(Value::Array(list)) => list,
            Some(other) => return Err(self.expected(key, "a list", other)),
            None => return Err(self.missing(key)),
        };
        if list.len() != n {
            let problem = format!(
                "lists {} numbers, expected {n}: one for each pair",
                list.len()
            );
            return Err(self.bad(key, problem));
        }
        let fits = |x: &f64| to_f32(*x) > 0.0 && to_f32(*x).is_finite();
        let number = |value: &Value| value.as_f64().filter(fits);
        let one = |v| number(v).ok_or_else(|| self.expected(key, "numbers above 0", v));
        list.iter().map(one).collect()
    }

    /// A list of two whole numbers from 1 to `max`.
    pub(super) fn pair(&self, key: &str, max: usize) -> Result<Option<[usize; 2]>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let count = |v: &Value| {
            let n = v.as_u64().and_then(|n| usize::try_from(n).ok());
            n.filter(|n| (1..=max).contains(n))
        };
        match value.as_array().map(Vec::as_slice) {
            Some([a, b]) => count(a).zip(count(b)).map(|(a, b)| [a, b]),
            _ => None,
        }
        .map(Some)
        .ok_or_else(|| self.expected(key, &format!("two whole numbers from 1 to {max}"), value))
    }

    /// A number from 0 to `max`.
    fn share(&self, key: &str, max: f64) -> Result<Option<f64>> {
        match self.number(key)? {
            Some(x) if !(0.0..=max).contains(&x) => {
                Err(self.bad(key, format!("expected a number from 0 to {max}, found {x}")))
            }
            x => Ok(x),
        }
    }

    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(other) => Err(self.expected(key, "true or false", other)),
        }
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.expected(key, "a text", other)),
        }
    }

    /// The ids under `eos_token_id`. One beyond the vocabulary never comes, so it ends nothing.
    fn ends(&self, vocab_size: usize) -> Result<Vec<TokenId>> {
        let mut ids = self.ids("eos_token_id", TokenId::MAX as usize)?;
        ids.retain(|&id| {
            let is_there = (id as usize) < vocab_size;
            if !is_there {
                let path = self.path.display();
                log::warn!("{path}: eos_token_id {id} is beyond the vocabulary of {vocab_size}");
            }
            is_there
        });
        Ok(ids)
    }

    /// A token id or a list of them, each below `vocab_size`.
    fn ids(&self, key: &str, vocab_size: usize) -> Result<Vec<TokenId>> {
        let Some(value) = self.get(key) else {
            return Ok(Vec::new());
        };
        let list = match value {
            Value::Array(list) => list.as_slice(),
            one => std::slice::from_ref(one),
        };
        let mut ids = Vec::new();
        for id in list {
            match id.as_u64().and_then(|n| TokenId::try_from(n).ok()) {
                Some(n) if (n as usize) < vocab_size => {
                    if !ids.contains(&n) {
                        ids.push(n);
                    }
                }
                _ => {
                    let what = format!("token ids below the vocabulary's {vocab_size}");
                    return Err(self.expected(key, &what, id));
                }
            }
            if ids.len() > MAX_IDS {
                return Err(self.bad(key, format!("lists more than {MAX_IDS} ids")));
            }
        }
        Ok(ids)
    }

    /// The object under a key. An empty one says as much as none.
    pub(super) fn object(&self, key: &str, prefix: &'static str) -> Result<Option<Self>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) if map.is_empty() => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Self {
                path: self.path,
                prefix,
                map,
            })),
            Some(other) => Err(self.expected(key, "an object", other)),
        }
    }

    /// An [`Error::Unsupported`] at a key.
    pub(super) fn unsupported(&self, key: &str, found: &str, advice: &str) -> Error {
        let path = PathBuf::from(self.path);
        Error::unsupported(path, format!("{}{key} {found}", self.prefix), advice)
    }
}

/// Ids that a list may name.
const MAX_IDS: usize = 1024;

fn read_family(keys: &Keys<'_>) -> Result<&'static Family> {
    let Some(model_type) = keys.text("model_type")? else {
        return Err(keys.missing("model_type"));
    };
    let Some(family) = families::family(model_type) else {
        let found = format!("'{}'", shown(model_type));
        let advice = format!("this version computes {}", families::names());
        return Err(keys.unsupported("model_type", &found, &advice));
    };
    match keys.get("architectures") {
        None => {}
        Some(Value::Array(list)) => {
            let ours = |v: &Value| v.as_str() == Some(family.architecture);
            if !list.is_empty() && !list.iter().any(ours) {
                let found = shown_value(&Value::from(list.as_slice()));
                let advice = format!("of this model type only {} is", family.architecture);
                return Err(keys.unsupported("architectures", &found, &advice));
            }
        }
        Some(other) => return Err(keys.expected("architectures", "a list", other)),
    }
    Ok(family)
}

/// The experts of a model.
fn read_experts(keys: &Keys<'_>, family: &Family, n_layers: usize) -> Result<Option<Experts>> {
    match family.experts {
        Mixture::None => Ok(None),
        Mixture::Qwen => read_qwen_experts(keys, n_layers).map(Some),
        Mixture::DeepSeek => read_deepseek_experts(keys, n_layers).map(Some),
    }
}

fn read_qwen_experts(keys: &Keys<'_>, n_layers: usize) -> Result<Experts> {
    let count = keys.need_count("num_experts", MAX_EXPERTS)?;
    let step = keys.count("decoder_sparse_step", MAX_LAYERS)?.unwrap_or(1);
    let mut layers: Vec<bool> = (1..=n_layers).map(|l| l.is_multiple_of(step)).collect();
    match keys.get("mlp_only_layers") {
        None => {}
        Some(Value::Array(list)) => {
            for layer in list {
                let at = layer.as_u64().and_then(|l| usize::try_from(l).ok());
                let Some(has) = at.and_then(|l| layers.get_mut(l)) else {
                    let what = format!("layers below {n_layers}");
                    return Err(keys.expected("mlp_only_layers", &what, layer));
                };
                *has = false;
            }
        }
        Some(other) => return Err(keys.expected("mlp_only_layers", "a list", other)),
    }
    Ok(Experts {
        count,
        intermediate_size: keys.need_count("moe_intermediate_size", MAX_WIDTH)?,
        shared_size: None,
        routing: Routing {
            top_k: keys.need_count("num_experts_per_tok", count)?,
            sigmoid: false,
            normalise: keys.flag("norm_topk_prob")?.unwrap_or(false),
            scale: 1.0,
            n_groups: 1,
            top_groups: 1,
        },
        layers,
    })
}

/// What the config leaves out is as in DeepSeek-V3.
fn read_deepseek_experts(keys: &Keys<'_>, n_layers: usize) -> Result<Experts> {
    for (key, known) in [("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")] {
        if let Some(other) = keys.text(key)?.filter(|&found| found != known) {
            let advice = format!("this version computes '{known}'");
            return Err(keys.unsupported(key, &format!("'{}'", shown(other)), &advice));
        }
    }
    if let Some(other) = keys.count("moe_layer_freq", MAX_LAYERS)?.filter(|&n| n > 1) {
        let advice = "this version has experts in every layer behind the dense ones";
        return Err(keys.unsupported("moe_layer_freq", &other.to_string(), advice));
    }
    let count = keys.need_count("n_routed_experts", MAX_EXPERTS)?;
    let n_groups = keys.count("n_group", MAX_EXPERTS)?.unwrap_or(8);
    let top_groups = keys.count("topk_group", MAX_EXPERTS)?.unwrap_or(4);
    if !count.is_multiple_of(n_groups) || n_groups > 1 && count < 2 * n_groups {
        let problem = format!("{count} experts do not make {n_groups} groups of two or more");
        return Err(keys.bad("n_group", problem));
    }
    if top_groups > n_groups {
        let problem = format!("{top_groups} is above n_group {n_groups}");
        return Err(keys.bad("topk_group", problem));
    }
    let top_k = keys.need_count("num_experts_per_tok", count)?;
    let most = count / n_groups * top_groups;
    if top_k > most {
        let problem = format!("{top_k} of {most} experts, in {top_groups} of {n_groups} groups");
        return Err(keys.bad("num_experts_per_tok", problem));
    }
    let n_dense = keys.count_or_none("first_k_dense_replace", MAX_COUNT, 3)?;
    let intermediate_size = keys.need_count("moe_intermediate_size", MAX_WIDTH)?;
    let n_shared = keys.count_or_none("n_shared_experts", MAX_EXPERTS, 1)?;
    let shared = intermediate_size * n_shared;
    if shared > MAX_WIDTH {
        let problem = format!("{n_shared} of width {intermediate_size} are too many");
        return Err(keys.bad("n_shared_experts", problem));
    }
    let scale = keys.positive("routed_scaling_factor")?.unwrap_or(2.5);
    Ok(Experts {
        count,
        intermediate_size,
        shared_size: (shared > 0).then_some(shared),
        routing: Routing {
            top_k,
            sigmoid: true,
            normalise: keys.flag("norm_topk_prob")?.unwrap_or(true),
            scale: to_f32(scale),
            n_groups,
            top_groups,
        },
        layers: (0..n_layers).map(|layer| layer >= n_dense).collect(),
    })
}

/// The latent of a family that has one.
fn read_latent(
    keys: &Keys<'_>,
    family: &Family,
    [n_heads, n_kv_heads]: [usize; 2],
) -> Result<Option<Latent>> {
    if family.heads != Heads::Latent {
        return Ok(None);
    }
    if n_kv_heads != n_heads {
        let problem = format!("{n_kv_heads}, but each of the {n_heads} heads has its own");
        return Err(keys.bad("num_key_value_heads", problem));
    }
    if !keys.map.contains_key("q_lora_rank") {
        let problem = "is missing; null says that queries have none";
        return Err(keys.bad("q_lora_rank", problem));
    }
    let latent = Latent {
        q_rank: keys.count("q_lora_rank", MAX_WIDTH)?,
        rank: keys.need_count("kv_lora_rank", MAX_WIDTH)?,
        nope_dim: keys.need_count("qk_nope_head_dim", MAX_WIDTH)?,
        rope_dim: keys.need_count("qk_rope_head_dim", MAX_WIDTH)?,
        v_dim: keys.need_count("v_head_dim", MAX_WIDTH)?,
        interleaved: keys.flag("rope_interleave")?.unwrap_or(true),
    };
    let Latent { rope_dim, .. } = latent;
    if !rope_dim.is_multiple_of(2) {
        let problem = format!("expected an even number, found {rope_dim}");
        return Err(keys.bad("qk_rope_head_dim", problem));
    }
    let agree = |key: &str, want: usize| match keys.count(key, MAX_COUNT)? {
        Some(found) if found != want => {
            Err(keys.bad(key, format!("{found} contradicts the other sizes: {want}")))
        }
        _ => Ok(()),
    };
    agree("head_dim", rope_dim)?;
    agree("qk_head_dim", latent.nope_dim + rope_dim)?;
    let width = latent.dim() + 2 * latent.gap();
    if width > MAX_DIM {
        let found = format!("{} with {rope_dim} rotated channels", latent.rank);
        let advice = format!("this version computes latents of up to {MAX_DIM} channels with them");
        return Err(keys.unsupported("kv_lora_rank", &found, &advice));
    }
    for wide in [
        width,
        latent.nope_wide() + 2 * latent.gap(),
        latent.nope_dim + latent.v_dim,
    ] {
        if n_heads.checked_mul(wide).is_none_or(|n| n > MAX_WIDTH) {
            let problem = format!("{n_heads} heads of {wide} channels are too many");
            return Err(keys.bad("num_attention_heads", problem));
        }
    }
    Ok(Some(latent))
}

fn refuse_activation(keys: &Keys<'_>) -> Result<()> {
    match keys.text("hidden_act")? {
        None | Some("silu" | "swish") => Ok(()),
        Some(other) => {
            let found = format!("'{}'", shown(other));
            Err(keys.unsupported("hidden_act", &found, "this version computes silu"))
        }
    }
}

fn read_head_dim(
    keys: &Keys<'_>,
    family: &Family,
    hidden_size: usize,
    n_heads: usize,
) -> Result<usize> {
    let head_dim = match keys.count("head_dim", MAX_WIDTH)?.or(family.head_dim) {
        Some(head_dim) => head_dim,
        None if hidden_size.is_multiple_of(n_heads) => hidden_size / n_heads,
        None => {
            let problem = format!("{n_heads} does not divide hidden_size {hidden_size}");
            return Err(keys.bad("num_attention_heads", problem));
        }
    };
    if !(8..=256).contains(&head_dim) || !head_dim.is_multiple_of(8) {
        let advice = "this version computes heads of 8 to 256 channels, in steps of 8";
        return Err(keys.unsupported("head_dim", &head_dim.to_string(), advice));
    }
    if n_heads.checked_mul(head_dim).is_none_or(|n| n > MAX_WIDTH) {
        let problem = format!("{n_heads} heads of {head_dim} channels are too many");
        return Err(keys.bad("num_attention_heads", problem));
    }
    Ok(head_dim)
}

/// Reads how far each layer sees: by `layer_types` where the family has them, else alike from some layer on.
fn read_windows(keys: &Keys<'_>, family: &Family, n_layers: usize) -> Result<Vec<Option<usize>>> {
    let (default, used, first) = match family.window {
        Window::Ignored => (None, false, None),
        Window::Always { default } => (default, true, None),
        Window::Switched { default, first } => {
            let used = keys.flag("use_sliding_window")?.unwrap_or(false);
            let first = match (first, keys.get("max_window_layers")) {
                (Some(_), Some(Value::Number(n))) if n.as_u64() == Some(0) => Some(0),
                (Some(first), Some(_)) => {
                    keys.count("max_window_layers", MAX_COUNT)?.or(Some(first))
                }
                (first, _) => first,
            };
            (Some(default), used, first)
        }
    };
    let window = match keys.count("sliding_window", MAX_COUNT)? {
        _ if !used => None,
        None if !keys.map.contains_key("sliding_window") => default,
        given => given,
    };
    let alike = (0..n_layers)
        .map(|i| window.filter(|_| i >= first.unwrap_or(0)))
        .collect();
    let Some(value) = keys.get("layer_types") else {
        return Ok(alike);
    };
    let Value::Array(types) = value else {
        return Err(keys.expected("layer_types", "a list", value));
    };
    if types.len() != n_layers {
        let problem = format!("lists {} layers of {n_layers}", types.len());
        return Err(keys.bad("layer_types", problem));
    }
    let of_type = |value: &Value| match (value.as_str(), window) {
        (Some("full_attention"), _) => Ok(None),
        (Some("sliding_attention"), Some(window)) => Ok(Some(window)),
        (Some("sliding_attention"), None) => {
            let problem = "has sliding_attention, but there is no sliding_window in use";
            Err(keys.bad("layer_types", problem))
        }
        _ => {
            let advice = "this version computes full_attention and sliding_attention";
            Err(keys.unsupported("layer_types", &shown_value(value), advice))
        }
    };
    let by_type = types.iter().map(of_type).collect::<Result<Vec<_>>>()?;
    if !family.layer_types && by_type != alike {
        let advice = "in this family sliding_window alone says what layers see; leave the list out";
        return Err(keys.unsupported("layer_types", &shown_value(value), advice));
    }
    Ok(by_type)
}

/// Reads how many channels of a head are rotated, from either spelling of a config.
fn read_rotary_dim(keys: &Keys<'_>, head_dim: usize) -> Result<usize> {
    let old = keys.object("rope_scaling", "rope_scaling.")?;
    let new = keys.object("rope_parameters", "rope_parameters.")?;
    let mut found: Option<f64> = None;
    for keys in [Some(keys), old.as_ref(), new.as_ref()]
        .into_iter()
        .flatten()
    {
        match (keys.share("partial_rotary_factor", 1.0)?, found) {
            (Some(here), Some(other)) if here.to_bits() != other.to_bits() => {
                let problem = format!("{here} contradicts partial_rotary_factor {other}");
                return Err(keys.bad("partial_rotary_factor", problem));
            }
            (here, _) => found = here.or(found),
        }
    }
    let Some(share) = found else {
        return Ok(head_dim);
    };
    // Rounded down, as Python's `int` does it.
    let wanted = share * head_dim as f64;
    let rotary_dim = (0..=head_dim).rfind(|&n| n as f64 <= wanted).unwrap_or(0);
    if rotary_dim < 2 || !rotary_dim.is_multiple_of(2) {
        let problem = format!("{share} of {head_dim} channels is no even number above 0");
        return Err(keys.bad("partial_rotary_factor", problem));
    }
    Ok(rotary_dim)
}

fn read_rope(
    keys: &Keys<'_>,
    family: &Family,
    rotary_dim: usize,
    max_positions: usize,
) -> Result<Rope> {
    let old = keys.object("rope_scaling", "rope_scaling.")?;
    let new = keys.object("rope_parameters", "rope_parameters.")?;
    let outer_theta = keys.positive("rope_theta")?;

    let read = |inner: Keys<'_>| -> Result<Rope> {
        let inner_theta = inner.positive("rope_theta")?;
        if let (Some(inner_theta), Some(outer_theta)) = (inner_theta, outer_theta)
            && inner_theta.to_bits() != outer_theta.to_bits()
        {
            let problem = format!("{inner_theta} contradicts rope_theta {outer_theta}");
            return Err(inner.bad("rope_theta", problem));
        }
        // 10000 is the default of every family here.
        let theta = inner_theta.or(outer_theta).unwrap_or(10_000.0);
        let original = read_original(&inner, keys, family)?;
        let sizes = Sizes {
            theta,
            rotary_dim,
            original,
            max_positions,
        };
        let kind = read_rope_kind(&inner, keys, sizes)?;
        Ok(Rope { theta, kind })
    };
    match (old.map(read).transpose()?, new.map(read).transpose()?) {
        (Some(old), Some(new)) if old != new => {
            Err(keys.bad("rope_scaling", "contradicts rope_parameters"))
        }
        (Some(rope), _) | (None, Some(rope)) => Ok(rope),
        (None, None) => Ok(Rope {
            theta: outer_theta.unwrap_or(10_000.0),
            kind: RopeKind::Default,
        }),
    }
}

/// What the kinds of rope are computed from beside their own keys.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    theta: f64,
    rotary_dim: usize,
    original: Option<usize>,
    max_positions: usize,
}

/// Positions of the first training. What the config itself says counts, and in some families nothing else.
fn read_original(inner: &Keys<'_>, outer: &Keys<'_>, family: &Family) -> Result<Option<usize>> {
    let key = "original_max_position_embeddings";
    let (inside, outside) = (
        inner.count(key, MAX_POSITIONS)?,
        outer.count(key, MAX_POSITIONS)?,
    );
    if let (Some(a), Some(b)) = (inside, outside)
        && a != b
    {
        return Err(inner.bad(key, format!("{a} contradicts the config's {b}")));
    }
    let found = outside.or(family.original_positions).or(inside);
    if let (Some(inside), Some(found)) = (inside, found)
        && inside != found
    {
        let path = inner.path.display();
        log::warn!(
            "{path}: {}{key}: {inside} counts only outside of it in a {} config; {found} is taken",
            inner.prefix,
            family.model_type
        );
    }
    Ok(found)
}

/// Reads the object under `rope_scaling` or `rope_parameters`; `outer` is the whole config.
fn read_rope_kind(keys: &Keys<'_>, outer: &Keys<'_>, sizes: Sizes) -> Result<RopeKind> {
    let (rope_type, legacy) = (keys.text("rope_type")?, keys.text("type")?);
    if let (Some(a), Some(b)) = (rope_type, legacy)
        && a != b
    {
        let problem = format!("'{}' contradicts type '{}'", shown(a), shown(b));
        return Err(keys.bad("rope_type", problem));
    }
    // Phi-3 had other names for it first; its lists tell it from the other yarn.
    let lists = keys.get("short_factor").is_some() && keys.get("long_factor").is_some();
    match rope_type.or(legacy) {
        Some("default") => Ok(RopeKind::Default),
        // Version 5 leaves the type out where it is the default one; version 4 never does.
        None if keys.prefix == "rope_parameters." => {
            if let Some(key) = keys.map.keys().find(|k| keys.map[*k].is_object()) {
                let found = format!("per kind of layer ('{}')", shown(key));
                let advice = "this version rotates all layers alike";
                return Err(outer.unsupported("rope_parameters", &found, advice));
            }
            if keys.get("factor").is_some() {
                return Err(keys.missing("rope_type"));
            }
            Ok(RopeKind::Default)
        }
        None => Err(keys.missing("rope_type")),
        Some("llama3") => read_llama3(keys, sizes),
        Some("linear") => match keys.factor("factor")? {
            Some(factor) => Ok(RopeKind::Linear { factor }),
            None => Err(keys.missing("factor")),
        },
        Some("longrope" | "su") => read_longrope(keys, sizes),
        Some("yarn") if lists => read_longrope(keys, sizes),
        Some("yarn") => read_yarn(keys, sizes),
        Some(other) => {
            let advice = match other {
                "dynamic" => {
                    "its frequencies change as the text grows, which would spoil keys already in \
                     the cache; a config without rope scaling works within the trained length"
                }
                _ => {
                    "it is not known; this version computes default, linear, llama3, yarn and longrope"
                }
            };
            Err(keys.unsupported("rope_type", &format!("'{}'", shown(other)), advice))
        }
    }
}

fn read_llama3(keys: &Keys<'_>, sizes: Sizes) -> Result<RopeKind> {
    let need = |value: Option<f64>, key| value.ok_or_else(|| keys.missing(key));
    let factor = need(keys.factor("factor")?, "factor")?;
    let low_freq_factor = need(keys.positive("low_freq_factor")?, "low_freq_factor")?;
    let high_freq_factor = need(keys.positive("high_freq_factor")?, "high_freq_factor")?;
    if to_f32(low_freq_factor) >= to_f32(high_freq_factor) {
        let problem = format!("{high_freq_factor} is not above low_freq_factor {low_freq_factor}");
        return Err(keys.bad("high_freq_factor", problem));
    }
    Ok(RopeKind::Llama3 {
        factor,
        low_freq_factor,
        high_freq_factor,
        original: sizes.original.unwrap_or(sizes.max_positions),
    })
}

fn read_longrope(keys: &Keys<'_>, sizes: Sizes) -> Result<RopeKind> {
    for key in ["short_mscale", "long_mscale"] {
        if let Some(value) = keys.get(key) {
            let (path, found) = (keys.path.display(), shown_value(value));
            log::warn!(
                "{path}: {}{key}: {found} means nothing in these families",
                keys.prefix
            );
        }
    }
    let original = sizes.original.unwrap_or(sizes.max_positions);
    let factor = match keys.positive("factor")? {
        Some(factor) => factor,
        None => sizes.max_positions as f64 / original as f64,
    };
    let attention_factor = match keys.positive("attention_factor")? {
        Some(given) => given,
        None if factor <= 1.0 => 1.0,
        None if original == 1 => {
            let problem = "longrope needs more than 1 position, or an attention_factor";
            return Err(keys.bad("original_max_position_embeddings", problem));
        }
        None => (1.0 + factor.ln() / (original as f64).ln()).sqrt(),
    };
    Ok(RopeKind::LongRope {
        short_factor: keys.factors("short_factor", sizes.rotary_dim / 2)?,
        long_factor: keys.factors("long_factor", sizes.rotary_dim / 2)?,
        attention_factor,
        original,
    })
}

fn read_yarn(keys: &Keys<'_>, sizes: Sizes) -> Result<RopeKind> {
    let (theta, max_positions) = (sizes.theta, sizes.max_positions);
    let original = sizes.original.unwrap_or(max_positions);
    if to_f32(theta) <= 1.0 {
        return Err(keys.bad(
            "rope_theta",
            format!("yarn needs more than 1, found {theta}"),
        ));
    }
    let factor = match keys.factor("factor")? {
        Some(factor) => factor,
        None if max_positions >= original => max_positions as f64 / original as f64,
        None => {
            let problem = format!("{original} is above max_position_embeddings {max_positions}");
            return Err(keys.bad("original_max_position_embeddings", problem));
        }
    };
    let beta_fast = keys.positive("beta_fast")?.unwrap_or(32.0);
    let beta_slow = keys.positive("beta_slow")?.unwrap_or(1.0);
    if beta_fast < beta_slow {
        let problem = format!("{beta_fast} is below beta_slow {beta_slow}");
        return Err(keys.bad("beta_fast", problem));
    }
    let scale = |mscale: f64| {
        if factor <= 1.0 {
            1.0
        } else {
            0.1 * mscale * factor.ln() + 1.0
        }
    };
    let max = f64::from(f32::MAX);
    let mscale = keys.share("mscale", max)?.unwrap_or(0.0);
    let mscale_all_dim = keys.share("mscale_all_dim", max)?.unwrap_or(0.0);
    let attention_factor = match keys.positive("attention_factor")? {
        Some(given) => given,
        // Zero counts as absent, as it does in Python.
        None if mscale > 0.0 && mscale_all_dim > 0.0 => scale(mscale) / scale(mscale_all_dim),
        None => scale(1.0),
    };
    Ok(RopeKind::Yarn {
        factor,
        beta_fast,
        beta_slow,
        truncate: keys.flag("truncate")?.unwrap_or(true),
        attention_factor,
        all_factor: scale(mscale_all_dim),
        original,
    })
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "the one place where a number of a config is rounded to the width it is computed in"
)]
fn to_f32(x: f64) -> f32 {
    x as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const TINY: &str = r#"{
        "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 112,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 512, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
        "bos_token_id": 1, "eos_token_id": [2, 3, 2], "tie_word_embeddings": true
    }"#;

    /// The tiny config with some keys set.
    fn read(keys: Value) -> Result<Config> {
        let mut map: Value = serde_json::from_str(TINY).expect("TINY is JSON");
        let (Value::Object(map), Value::Object(keys)) = (&mut map, keys) else {
            unreachable!("both are objects");
        };
        map.extend(keys);
        let text = serde_json::to_vec(map).expect("a map is JSON");
        Config::from_json(Path::new("config.json"), &text)
    }

    /// Compares with what transformers computed.
    #[track_caller]
    fn agrees(config: &Config, golden: &str) {
        let all = std::fs::read("tests/golden/rope_inv_freq.json").expect("a golden file");
        let all: Value = serde_json::from_slice(&all).expect("a golden file is JSON");
        let want = &all[golden];
        let (inv_freq, multiplier) = config.inv_freq(1);
        let list = want["inv_freq"].as_array().expect("a list");
        assert_eq!(
            inv_freq.len(),
            list.len(),
            "{golden}: number of frequencies"
        );
        for (i, (found, want)) in inv_freq.iter().zip(list).enumerate() {
            let want = want.as_f64().expect("a number");
            let error = (f64::from(*found) / want - 1.0).abs();
            assert!(error <= 2e-7, "{golden}: frequency {i}: {found} for {want}");
        }
        let want = want["cos_sin_multiplier"].as_f64().expect("a number");
        let error = (f64::from(multiplier) - want).abs();
        assert!(
            error <= 1e-6,
            "{golden}: multiplier {multiplier} for {want}"
        );
    }

    #[test]
    fn frequencies_of_the_golden_models_are_those_of_transformers() {
        for name in ["qwen2", "qwen3", "llama"] {
            let config = Config::open(&Path::new("tests/golden/models").join(name))
                .expect("a golden model is good");
            agrees(&config, &format!("models/{name}"));
        }
    }

    #[test]
    fn frequencies_of_configs_written_here_are_those_of_transformers() {
        let theta = |theta: f64| json!({"rope_theta": theta});
        let plain = read(theta(1e6)).expect("a good config");
        agrees(&plain, "plain_qwen2/model");
        let plain = read(theta(5e5)).expect("a good config");
        agrees(&plain, "plain_phi3/model");
        let wide = read(json!({"rope_theta": 1e6, "head_dim": 32})).expect("a good config");
        agrees(&wide, "plain_qwen3/model");
        agrees(&wide, "plain_qwen3_moe/model");
        let short = read(json!({"head_dim": 8})).expect("a good config");
        agrees(&short, "plain_deepseek_v3/model");
        let llama3 = read(json!({"rope_theta": 5e5, "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 256}}))
        .expect("a good config");
        agrees(&llama3, "plain_llama/model");
    }

    #[test]
    fn yarn_is_that_of_transformers_however_its_factor_is_given() {
        for factor in [json!(4.0), json!(4), Value::Null] {
            for original in [64, 128] {
                let config = read(
                    json!({"rope_theta": 1e6, "max_position_embeddings": 4 * original,
                    "rope_scaling": {"type": "yarn", "factor": factor,
                        "original_max_position_embeddings": original}}),
                )
                .expect("a good config");
                agrees(&config, "plain_qwen2_tied_yarn/model");
            }
        }
    }

    #[test]
    fn equal_mscales_cancel_and_a_given_attention_factor_wins() {
        let multiplier = |extra: Value| {
            let mut rope = json!({"rope_type": "yarn", "factor": 40.0,
                "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1});
            let (Value::Object(rope_map), Value::Object(extra)) = (&mut rope, extra) else {
                unreachable!("both are objects");
            };
            rope_map.extend(extra);
            read(json!({"rope_scaling": rope}))
                .expect("a good config")
                .inv_freq(512)
                .1
        };
        let near = |a: f32, b: f64| (f64::from(a) - b).abs() < 1e-6;
        let full = 0.1 * 40_f64.ln() + 1.0;
        assert!(near(multiplier(json!({})), full), "the paper's factor");
        let equal = multiplier(json!({"mscale": 1.0, "mscale_all_dim": 1.0}));
        assert!(near(equal, 1.0), "equal mscales cancel");
        let unequal = multiplier(json!({"mscale": 0.707, "mscale_all_dim": 1.0}));
        let want = (0.0707 * 40_f64.ln() + 1.0) / full;
        assert!(near(unequal, want), "unequal mscales divide");
        let alone = multiplier(json!({"mscale": 0.707}));
        assert!(near(alone, full), "one mscale alone does nothing");
        let given = multiplier(json!({"attention_factor": 1.5, "mscale": 1.0}));
        assert!(near(given, 1.5), "a given factor wins");
    }

    /// The sizes of DeepSeek-V3, with some keys set.
    fn read_deepseek(keys: Value) -> Result<Config> {
        let mut all = json!({"model_type": "deepseek_v3", "hidden_size": 7168,
            "intermediate_size": 18_432, "moe_intermediate_size": 2048, "num_hidden_layers": 61,
            "num_attention_heads": 128, "num_key_value_heads": 128, "n_shared_experts": 1,
            "n_routed_experts": 256, "q_lora_rank": 1536, "kv_lora_rank": 512,
            "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
            "num_experts_per_tok": 8, "max_position_embeddings": 163_840, "vocab_size": 129_280,
            "rope_scaling": {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1,
                "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0}});
        let (Value::Object(map), Value::Object(keys)) = (&mut all, keys) else {
            unreachable!("both are objects");
        };
        map.extend(keys);
        read(all)
    }

    #[test]
    fn the_cache_of_deepseek_v3_has_576_numbers_for_a_token_and_layer() {
        let config = read_deepseek(json!({})).expect("a good config");
        let numbers = config.cache_copies() * config.n_kv_heads * config.head_dim;
        assert_eq!(numbers, 576, "latent and rotated channels, once");
        assert_eq!((config.n_pairs(), config.rotary_dim), (32, 64), "rotated");
        assert_eq!(config.attention_size(), 128 * 128, "values of all heads");
        let experts = config.experts.as_ref().expect("it has experts");
        let routing = experts.routing;
        assert_eq!((routing.n_groups, routing.top_groups), (8, 4), "groups");
        assert!((routing.scale - 2.5).abs() < 1e-6, "its own scale");
        assert_eq!(experts.layers[..4], [false, false, false, true], "dense");
        assert_eq!(config.extra_layers, 1, "one behind the last");
    }

    /// By hand, of transformers' `DeepseekV3Attention`: `192^-0.5 * (0.1 * mscale_all_dim * ln(40) + 1)^2`.
    #[test]
    fn yarn_multiplies_the_scores_of_latents_by_its_factor_squared() {
        let scale = |rope: Value| {
            let config = read_deepseek(json!({"rope_scaling": rope})).expect("a good config");
            (config.attention_scale, config.inv_freq(1).1)
        };
        let yarn = |mscale: f64, all: f64| {
            scale(json!({"type": "yarn", "factor": 40,
                "original_max_position_embeddings": 4096, "mscale": mscale, "mscale_all_dim": all}))
        };
        let near = |(a, b): (f32, f32), want: [f64; 2]| {
            let found = [a, b].map(f64::from);
            let close = (0..2).all(|i| (found[i] - want[i]).abs() < 1e-6);
            assert!(close, "{found:?} for {want:?}");
        };
        near(scale(Value::Null), [0.072_168_784, 1.0]);
        near(yarn(1.0, 1.0), [0.135_233_779, 1.0]);
        near(yarn(0.707, 1.0), [0.135_233_779, 0.921_042_3]);
        near(yarn(0.707, 0.0), [0.072_168_784, 1.368_887_9]);
        near(yarn(1.0, 0.707), [0.114_721_387, 1.085_726_4]);
        let golden = read_deepseek(
            json!({"qk_rope_head_dim": 8, "max_position_embeddings": 512,
            "rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 128,
                "mscale": 1.0, "mscale_all_dim": 1.0}}),
        );
        agrees(
            &golden.expect("a good config"),
            "plain_deepseek_v3_yarn/model",
        );
    }

    #[test]
    fn the_rows_of_latents_are_padded_and_paired_for_kernels() {
        let latent = |interleaved: bool| Latent {
            q_rank: None,
            rank: 10,
            nope_dim: 3,
            rope_dim: 6,
            v_dim: 5,
            interleaved,
        };
        let rows = |order: Vec<Option<usize>>| -> Vec<i64> {
            let row = |row: Option<usize>| row.map_or(-1, |row| i64::try_from(row).expect("small"));
            order.into_iter().map(row).collect()
        };
        let want = [0, 1, 2, -1, -1, -1, -1, -1, 3, 5, 7, -1, 4, 6, 8, -1];
        assert_eq!(rows(latent(true).query_order()), want, "neighbours");
        let want = [0, 1, 2, -1, -1, -1, -1, -1, 3, 4, 5, -1, 6, 7, 8, -1];
        assert_eq!(rows(latent(false).query_order()), want, "halves");
        let keys = rows(latent(true).key_order());
        assert_eq!(keys.len(), 24, "a latent of 16 and four pairs");
        assert_eq!(keys[9..12], [9, -1, -1], "padding behind the latent");
        assert_eq!(keys[16..], [10, 12, 14, -1, 11, 13, 15, -1], "pairs");
    }

    #[test]
    fn a_ramp_that_is_not_truncated_has_other_frequencies() {
        let rope = |truncate: bool| {
            read(
                json!({"rope_theta": 1e4, "rope_scaling": {"rope_type": "yarn", "factor": 4.0,
                "original_max_position_embeddings": 512, "truncate": truncate}}),
            )
            .expect("a good config")
            .inv_freq(512)
            .0
        };
        assert_ne!(rope(true), rope(false), "truncation moves the ramp's ends");
    }

    #[test]
    fn both_spellings_of_a_config_mean_the_same() {
        let yarn = json!({"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6,
            "original_max_position_embeddings": 128});
        let pairs = [
            (
                json!({"rope_theta": 1e6, "rope_scaling": null, "torch_dtype": "bfloat16"}),
                json!({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
                    "dtype": "bfloat16", "layer_types": ["full_attention", "full_attention", "full_attention"]}),
            ),
            (
                json!({"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0,
                    "original_max_position_embeddings": 128}}),
                json!({"rope_parameters": yarn}),
            ),
            (
                json!({"rope_theta": 1e6}),
                json!({"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 1.0}}),
            ),
        ];
        for (old, new) in pairs {
            let (old, new) = (read(old).expect("version 4"), read(new).expect("version 5"));
            let old = Config {
                digest: new.digest,
                ..old
            };
            assert_eq!(old, new, "the spellings differ");
        }
    }

    #[test]
    fn what_a_config_leaves_out_has_the_family_s_default() {
        let config = read(json!({"num_key_value_heads": null})).expect("a good config");
        assert_eq!(config.n_kv_heads, 4, "as many as query heads");
        assert_eq!(config.head_dim, 16, "hidden size by heads");
        assert_eq!(config.eos, [2, 3], "each id once");
        assert_eq!(config.rope.theta.to_bits(), 10_000_f64.to_bits(), "theta");
        let config = read(json!({"model_type": "qwen3"})).expect("a good config");
        assert_eq!(config.head_dim, 128, "that of qwen3");
    }

    #[test]
    fn longrope_is_that_of_transformers_in_either_spelling() {
        let short: Vec<f64> = (0..6).map(|i| 1.0 + 0.05 * f64::from(i)).collect();
        let long: Vec<f64> = (0..6).map(|i| 1.0 + 2.0 * f64::from(i)).collect();
        for (name, original) in [
            ("plain_phi3_partial_longrope_long/model", 16),
            ("plain_phi3_partial_longrope_short/model", 128),
        ] {
            let lists = json!({"type": "longrope", "short_factor": short, "long_factor": long});
            let old = read(json!({"model_type": "phi3", "partial_rotary_factor": 0.75,
                "original_max_position_embeddings": original, "rope_scaling": lists}))
            .expect("a good config");
            agrees(&old, name);
            let new = read(json!({"model_type": "phi3", "original_max_position_embeddings": original,
                "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75,
                "original_max_position_embeddings": original, "short_factor": short,
                "long_factor": long}}))
            .expect("a good config");
            assert_eq!(
                (&old.rope, old.rotary_dim),
                (&new.rope, new.rotary_dim),
                "{name}"
            );

            let table = |n_positions| old.inv_freq(n_positions).0;
            assert_eq!(
                table(original),
                table(1),
                "{name}: short up to the original length"
            );
            assert_eq!(
                table(original + 1),
                table(usize::MAX),
                "{name}: long beyond it"
            );
            for i in 0..6 {
                let ratio = f64::from(table(1)[i] / table(usize::MAX)[i]);
                assert!(
                    (ratio - long[i] / short[i]).abs() < 1e-5,
                    "{name}: pair {i}"
                );
            }
        }
    }

    #[test]
    fn phi3_called_longrope_su_and_yarn_and_began_at_4096_tokens() {
        let kind = |name: &str, extra: Value| {
            let mut keys = json!({"model_type": "phi3", "max_position_embeddings": 131_072,
                "rope_scaling": {"type": name, "short_factor": [1, 1, 1, 1, 1, 1, 1, 1],
                    "long_factor": [1, 2, 3, 4, 5, 6, 7, 8]}});
            let (Value::Object(map), Value::Object(extra)) = (&mut keys, extra) else {
                unreachable!("both are objects");
            };
            map.extend(extra);
            read(keys).expect("a good config").rope.kind
        };
        let want = kind(
            "longrope",
            json!({"original_max_position_embeddings": 4096}),
        );
        assert_eq!(want.is_long(4096), Some(false), "4096 tokens are short");
        assert_eq!(want.is_long(4097), Some(true), "more are long");
        for name in ["longrope", "su", "yarn"] {
            assert_eq!(kind(name, json!({})), want, "{name}");
        }
    }

    /// As `standardize_rope_params` of transformers 5 has it, once the config is there.
    #[test]
    fn the_first_length_is_the_config_s_and_then_that_of_its_rope() {
        let original = |model_type: &str, inside: Value, outside: Value| {
            let rope = json!({"type": "longrope", "short_factor": [1, 1, 1, 1, 1, 1, 1, 1],
                "long_factor": [1, 2, 3, 4, 5, 6, 7, 8], "original_max_position_embeddings": inside});
            let keys = json!({"model_type": model_type, "rope_scaling": rope,
                "original_max_position_embeddings": outside});
            match read(keys).expect("a good config").rope.kind {
                RopeKind::LongRope { original, .. } => original,
                kind => panic!("{kind:?}"),
            }
        };
        for (inside, outside, qwen2, phi3) in [
            (json!(32), json!(32), 32, 32),
            (json!(32), Value::Null, 32, 4096),
            (Value::Null, json!(32), 32, 32),
            (Value::Null, Value::Null, 512, 4096),
        ] {
            let found = ["qwen2", "phi3"].map(|of| original(of, inside.clone(), outside.clone()));
            assert_eq!(found, [qwen2, phi3], "{inside} inside, {outside} outside");
        }
    }

    #[test]
    fn a_share_of_a_head_means_nothing_but_to_phi3() {
        let share = |keys: Value| read(keys).map(|config| (config.rotary_dim, config.head_dim));
        let phi3 = share(json!({"model_type": "phi3", "partial_rotary_factor": 0.5}));
        assert_eq!(phi3.expect("a good config"), (8, 16), "half of it");
        let qwen2 = share(json!({"partial_rotary_factor": 0.5}));
        assert_eq!(qwen2.expect("a good config"), (16, 16), "all of it");
        let stretched = share(json!({"partial_rotary_factor": 0.5,
            "rope_scaling": {"type": "linear", "factor": 2.0}}));
        let error = stretched.expect_err("transformers cannot compute it either");
        assert!(
            error.to_string().contains("partial_rotary_factor"),
            "{error}"
        );
    }

    #[test]
    fn a_linear_rope_divides_every_frequency() {
        let plain = read(json!({})).expect("a good config").inv_freq(1);
        let linear = read(json!({"rope_scaling": {"type": "linear", "factor": 4}}));
        let (found, multiplier) = linear.expect("a good config").inv_freq(1);
        assert!((multiplier - 1.0).abs() < f32::EPSILON, "cosines stay");
        let want: Vec<f32> = plain.0.iter().map(|f| f / 4.0).collect();
        assert_eq!(found, want, "a quarter of each");
    }

    #[test]
    fn llama3_without_a_first_length_has_that_of_the_config() {
        let read = |rope: Value| {
            read(json!({"model_type": "llama", "rope_scaling": rope})).expect("a good config")
        };
        let without = read(
            json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 1,
            "high_freq_factor": 4}),
        );
        let with = read(
            json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 1,
            "high_freq_factor": 4, "original_max_position_embeddings": 512}),
        );
        assert_eq!(without.rope, with.rope, "512 positions");
    }

    #[test]
    fn the_channels_of_a_head_are_paired_for_kernels_that_rotate_all_of_it() {
        let order = |share: f64| {
            read(json!({"model_type": "phi3", "head_dim": 16, "partial_rotary_factor": share}))
                .expect("a good config")
                .head_order()
        };
        assert_eq!(order(1.0), None, "their own order");
        let want = [0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15];
        assert_eq!(order(0.5), Some(want.to_vec()), "pairs of i and i + 4");
        let want = [0, 1, 2, 3, 4, 5, 12, 13, 6, 7, 8, 9, 10, 11, 14, 15];
        assert_eq!(order(0.75), Some(want.to_vec()), "pairs of i and i + 6");
    }

    #[test]
    fn a_sliding_window_counts_only_where_it_is_switched_on() {
        let windows = |keys: Value| read(keys).expect("a good config").windows;
        let qwen = |used: bool, from: usize| {
            windows(
                json!({"sliding_window": 64, "use_sliding_window": used, "max_window_layers": from}),
            )
        };
        assert_eq!(qwen(false, 0), [None; 3], "switched off");
        assert_eq!(qwen(true, 3), [None; 3], "no layer has it");
        assert_eq!(qwen(true, 2), [None, None, Some(64)], "one layer has it");
        let other = |model_type: &str, window: Value| {
            windows(json!({"model_type": model_type, "sliding_window": window}))
        };
        assert_eq!(
            other("llama", json!(64)),
            [None; 3],
            "llama has no such key"
        );
        for model_type in ["mistral", "phi3"] {
            assert_eq!(other(model_type, json!(64)), [Some(64); 3], "no switch");
            assert_eq!(other(model_type, Value::Null), [None; 3], "null is none");
        }
        let moe = windows(
            json!({"model_type": "qwen3_moe", "sliding_window": 64, "use_sliding_window": true,
            "max_window_layers": 2, "num_experts": 4, "num_experts_per_tok": 2,
            "moe_intermediate_size": 16}),
        );
        assert_eq!(moe, [Some(64); 3], "whatever max_window_layers is");
        let switched = windows(
            json!({"model_type": "mistral", "sliding_window": 64, "use_sliding_window": false}),
        );
        assert_eq!(switched, [Some(64); 3], "mistral has no such switch");
        let absent = |model_type: &str| windows(json!({"model_type": model_type}));
        assert_eq!(absent("mistral"), [Some(4096); 3], "the family's own");
        assert_eq!(absent("phi3"), [None; 3], "it has none");
        let types = json!(["sliding_attention", "full_attention", "sliding_attention"]);
        let by_layer =
            windows(json!({"use_sliding_window": true, "sliding_window": 5, "layer_types": types}));
        assert_eq!(by_layer, [Some(5), None, Some(5)], "as the list has it");
        let listed = |model_type: &str| {
            read(json!({"model_type": model_type, "sliding_window": 5, "layer_types": types}))
                .map(|config| config.windows)
        };
        let mistral = listed("mistral").expect("a good config");
        assert_eq!(mistral, [Some(5), None, Some(5)], "as the list has it");
        let error = listed("phi3").expect_err("phi3 has no such list");
        assert!(error.to_string().contains("layer_types"), "{error}");
    }

    #[test]
    fn generation_defaults_are_those_of_transformers() {
        let config = read(json!({})).expect("a good config");
        let parse = |text: &str| {
            GenerationConfig::from_json(Path::new("g.json"), text.as_bytes(), &config)
                .expect("a good file")
        };
        let empty = parse("{}");
        assert_eq!(empty, GenerationConfig::default(), "nothing said");
        assert!(
            empty.is_greedy(),
            "without do_sample the likeliest is taken"
        );
        let drawn = parse(
            r#"{"do_sample": true, "temperature": 0.6, "top_p": 0.95, "eos_token_id": [7, 8]}"#,
        );
        assert!(!drawn.is_greedy(), "with do_sample it is drawn");
        assert_eq!(drawn.top_k, 50, "the default of transformers");
        assert_eq!(drawn.eos, [7, 8], "the list of ids");
        assert_eq!(parse(r#"{"top_k": 0}"#).top_k, 0, "0 keeps all");
        assert!(
            parse(r#"{"do_sample": true, "temperature": 0}"#).is_greedy(),
            "temperature 0"
        );
    }
}
