//! Weight files: finding the tensors of a model, checking them, and reading them in pieces.
//!
//! Only headers are read when a checkpoint is opened. Weights are read where they are needed and a
//! piece at a time, so that host memory stays bounded; they are never mapped, because a mapped file
//! that another process cuts kills this one. Every offset is checked against the real length of its
//! file once, before anything uses it.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use safetensors::tensor::Metadata;
use serde::de::{
    DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor,
};
use sha2::{Digest, Sha256};

pub use safetensors::Dtype;

use super::config::Config;
use super::json::{self, shown};
use crate::{Error, Result};

/// Bytes of a header that the format allows.
const FORMAT_HEADER: u64 = 100_000_000;

/// Bytes of a header, and of an index, that are accepted: many times what any model needs.
const MAX_HEADER: u64 = 16 << 20;

/// Tensors that a model may have.
const MAX_TENSORS: usize = 200_000;

/// Dimensions that a tensor may have.
const MAX_DIMS: usize = 8;

/// Bytes of a tensor's name.
const MAX_NAME: usize = 256;

/// Files that the weights may be spread over; each is kept open.
const MAX_SHARDS: usize = 512;

/// Name of the file that holds all weights, if there is one.
const SINGLE: &str = "model.safetensors";

/// Name of the file that says which weights are where, if there are several.
const INDEX: &str = "model.safetensors.index.json";

/// Where a tensor is, and what it looks like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Type of an element.
    pub dtype: Dtype,
    /// Shape, outermost dimension first.
    pub shape: Vec<usize>,
    /// Which of [`Checkpoint::files`] holds it.
    pub file: usize,
    /// First byte, from the start of the file.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
}

impl Entry {
    /// Rows: the outermost dimension; 1 for a scalar.
    pub fn n_rows(&self) -> usize {
        self.shape.first().copied().unwrap_or(1)
    }

    /// Bytes of one row.
    pub fn row_bytes(&self) -> usize {
        // The length was checked to be the product of the shape when the header was read.
        usize::try_from(self.len).map_or(0, |len| len / self.n_rows().max(1))
    }

    /// Bytes of one element.
    fn element_bytes(&self) -> usize {
        (self.dtype.bitsize() / 8).max(1)
    }
}

/// What the header of one safetensors file says, checked against itself and the file's length.
///
/// Offsets of its entries are from the start of the file, and their `file` is 0.
#[derive(Debug, PartialEq, Eq)]
pub struct Header {
    /// The tensors by name.
    pub tensors: BTreeMap<String, Entry>,
}

impl Header {
    /// Checks a header. `bytes` begins with the file's first 8 bytes and holds the header that they
    /// announce, as far as the file has it; `file_len` is the length of the whole file; `path` is
    /// only for messages.
    ///
    /// # Errors
    /// If the header is damaged, or does not describe a file of this length.
    pub fn parse(path: &Path, bytes: &[u8], file_len: u64) -> Result<Self> {
        let len = header_len(path, bytes, file_len)?;
        let cut = || Error::bad(path, "header", "is cut off");
        let end = usize::try_from(len).ok().and_then(|n| n.checked_add(8));
        let header = end.and_then(|end| bytes.get(8..end)).ok_or_else(cut)?;
        // `header_len` made sure that the file is longer than its header.
        let data_start = 8 + len;
        let data_len = file_len - data_start;

        let text = json::text(path, "header", header)?;
        if !text.starts_with('{') || !text.trim_end_matches(' ').ends_with('}') {
            let problem = "is not a JSON object, padded with spaces at its end only";
            return Err(Error::bad(path, "header", problem));
        }
        let raw = read_raw(path, text)?;
        let tensors = place(path, raw, data_start, data_len)?;

        // A second opinion, from the crate that most writers of such files use.
        let bad =
            |problem: &dyn fmt::Display| Error::bad(path, "header", shown(&problem.to_string()));
        let metadata: Metadata = serde_json::from_str(text).map_err(|e| bad(&e))?;
        if metadata.data_len() as u64 != data_len {
            return Err(bad(&"does not cover the file"));
        }
        Ok(Self { tensors })
    }
}

/// The length of the header, from the first 8 bytes of a file.
fn header_len(path: &Path, bytes: &[u8], file_len: u64) -> Result<u64> {
    let bad = |problem: String| Error::bad(path, "header length", problem);
    let Some(first) = bytes.first_chunk::<8>() else {
        return Err(bad(format!("the file ends after {file_len} bytes")));
    };
    let len = u64::from_le_bytes(*first);
    if len > FORMAT_HEADER {
        return Err(bad(format!(
            "{len} is more than the format allows; this is not a safetensors file, or it is damaged"
        )));
    }
    if len > MAX_HEADER {
        return Err(bad(format!(
            "{len} is more than the {MAX_HEADER} bytes that any model needs"
        )));
    }
    if len + 8 > file_len {
        return Err(bad(format!(
            "{len} is more than the file of {file_len} bytes holds; download it again"
        )));
    }
    Ok(len)
}

/// A tensor as the header has it, its offsets from the start of the data.
struct Raw {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    begin: u64,
    end: u64,
}

fn read_raw(path: &Path, text: &str) -> Result<Vec<Raw>> {
    let mut at = String::new();
    let mut raw = Vec::new();
    let mut json = serde_json::Deserializer::from_str(text);
    HeaderSeed {
        at: &mut at,
        raw: &mut raw,
    }
    .deserialize(&mut json)
    .and_then(|()| json.end())
    .map_err(|e| {
        let field = if at.is_empty() { "header" } else { &at };
        Error::bad(path, shown(field), shown(&e.to_string()))
    })?;
    Ok(raw)
}

/// Checks each tensor against its own shape, and all of them against the length of the data.
fn place(
    path: &Path,
    mut raw: Vec<Raw>,
    data_start: u64,
    data_len: u64,
) -> Result<BTreeMap<String, Entry>> {
    for tensor in &raw {
        let bad = |problem: String| Err(Error::bad(path, tensor.name.as_str(), problem));
        if let Some(problem) = bad_name(&tensor.name) {
            return Err(Error::bad(path, shown(&tensor.name), problem));
        }
        let bits = tensor
            .shape
            .iter()
            .try_fold(1_u64, |n, &dim| n.checked_mul(dim as u64))
            .and_then(|n| n.checked_mul(tensor.dtype.bitsize() as u64));
        let Some(bits) = bits else {
            return bad(format!("shape {:?} is too large", tensor.shape));
        };
        let (begin, end) = (tensor.begin, tensor.end);
        if begin > end || end > data_len {
            return bad(format!(
                "data_offsets [{begin}, {end}] are not inside of the {data_len} bytes of data"
            ));
        }
        if bits % 8 != 0 || end - begin != bits / 8 {
            return bad(format!(
                "data_offsets [{begin}, {end}] do not fit {} {:?}",
                tensor.dtype, tensor.shape
            ));
        }
    }

    raw.sort_by_key(|t| (t.begin, t.end));
    let mut covered = 0;
    for tensor in &raw {
        if tensor.begin != covered {
            let what = if tensor.begin < covered {
                "overlap another tensor"
            } else {
                "leave a hole"
            };
            let problem = format!("data_offsets [{}, {}] {what}", tensor.begin, tensor.end);
            return Err(Error::bad(path, tensor.name.as_str(), problem));
        }
        covered = tensor.end;
    }
    if covered != data_len {
        let problem = format!("{} bytes belong to no tensor", data_len - covered);
        return Err(Error::bad(path, "file length", problem));
    }

    let entry = |t: Raw| {
        let entry = Entry {
            dtype: t.dtype,
            shape: t.shape,
            file: 0,
            offset: data_start + t.begin,
            len: t.end - t.begin,
        };
        (t.name, entry)
    };
    Ok(raw.into_iter().map(entry).collect())
}

/// What is wrong with a tensor's name, if anything.
fn bad_name(name: &str) -> Option<&'static str> {
    if name.is_empty() || name.len() > MAX_NAME {
        return Some("a tensor's name has 1 to 256 bytes");
    }
    if name.contains(['/', '\\']) || name.contains("..") || name.chars().any(char::is_control) {
        return Some("a tensor's name has no slash, no '..' and no control character");
    }
    None
}

/// Reads the header's object, with its limits applied while reading.
struct HeaderSeed<'a> {
    // The key that is being read, for the message.
    at: &'a mut String,
    raw: &'a mut Vec<Raw>,
}

impl<'de> DeserializeSeed<'de> for HeaderSeed<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<(), D::Error> {
        json.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for HeaderSeed<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut names = HashSet::new();
        while let Some(name) = map.next_key::<String>()? {
            self.at.clone_from(&name);
            if !names.insert(name.clone()) {
                return Err(A::Error::custom("the name is there twice"));
            }
            if name == "__metadata__" {
                map.next_value_seed(TextsSeed { limit: MAX_TENSORS })?;
            } else {
                if self.raw.len() == MAX_TENSORS {
                    self.at.clear();
                    let problem = format!("lists more than {MAX_TENSORS} tensors");
                    return Err(A::Error::custom(problem));
                }
                self.raw.push(map.next_value_seed(TensorSeed { name })?);
            }
            self.at.clear();
        }
        Ok(())
    }
}

/// Reads an object of texts, each key once.
struct TextsSeed {
    limit: usize,
}

impl<'de> DeserializeSeed<'de> for TextsSeed {
    type Value = BTreeMap<String, String>;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<Self::Value, D::Error> {
        json.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for TextsSeed {
    type Value = BTreeMap<String, String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of texts")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut texts = BTreeMap::new();
        while let Some((key, text)) = map.next_entry::<String, String>()? {
            if texts.len() == self.limit {
                let problem = format!("there are more than {} keys", self.limit);
                return Err(A::Error::custom(problem));
            }
            let again = format!("key '{}' is there twice", shown(&key));
            if texts.insert(key, text).is_some() {
                return Err(A::Error::custom(again));
            }
        }
        Ok(texts)
    }
}

/// Reads what the header says about one tensor.
struct TensorSeed {
    name: String,
}

impl<'de> DeserializeSeed<'de> for TensorSeed {
    type Value = Raw;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<Raw, D::Error> {
        json.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for TensorSeed {
    type Value = Raw;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with dtype, shape and data_offsets")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Raw, A::Error> {
        let (mut dtype, mut shape, mut offsets) = (None, None, None);
        while let Some(key) = map.next_key::<String>()? {
            let again = match key.as_str() {
                "dtype" => dtype.replace(map.next_value::<Dtype>()?).is_some(),
                "shape" => shape.replace(map.next_value_seed(ShapeSeed)?).is_some(),
                "data_offsets" => offsets.replace(map.next_value::<(u64, u64)>()?).is_some(),
                other => {
                    let problem = format!("unknown key '{}'", shown(other));
                    return Err(A::Error::custom(problem));
                }
            };
            if again {
                return Err(A::Error::custom(format!("key '{key}' is there twice")));
            }
        }
        let (begin, end) = offsets.ok_or_else(|| A::Error::missing_field("data_offsets"))?;
        Ok(Raw {
            name: self.name,
            dtype: dtype.ok_or_else(|| A::Error::missing_field("dtype"))?,
            shape: shape.ok_or_else(|| A::Error::missing_field("shape"))?,
            begin,
            end,
        })
    }
}

/// Reads a shape, and stops at too many dimensions instead of collecting them.
struct ShapeSeed;

impl<'de> DeserializeSeed<'de> for ShapeSeed {
    type Value = Vec<usize>;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<Self::Value, D::Error> {
        json.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for ShapeSeed {
    type Value = Vec<usize>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of dimensions")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut shape = Vec::new();
        while let Some(dim) = seq.next_element()? {
            if shape.len() == MAX_DIMS {
                let problem = format!("shape has more than {MAX_DIMS} dimensions");
                return Err(A::Error::custom(problem));
            }
            shape.push(dim);
        }
        Ok(shape)
    }
}

/// One weight file, kept open.
#[derive(Debug)]
struct Shard {
    path: PathBuf,
    file: File,
}

/// The weight files of a model: their tensors are known, their data is still on disk.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    shards: Vec<Shard>,
    tensors: BTreeMap<String, Entry>,
    digest: [u8; 32],
}

impl Checkpoint {
    /// Opens the weight files of a model folder and reads their headers: `model.safetensors`, or
    /// the files that `model.safetensors.index.json` names. Other files are ignored.
    ///
    /// # Errors
    /// If a file is missing or damaged, or if the index and the files disagree about a tensor.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let mut checkpoint = Self {
            dir: dir.to_path_buf(),
            shards: Vec::new(),
            tensors: BTreeMap::new(),
            digest: [0; 32],
        };
        let mut hash = Sha256::new();
        if let Some(path) = json::find(dir, SINGLE)? {
            checkpoint.add(path, &mut hash)?;
        } else if let Some((path, bytes)) = json::read_small(dir, INDEX, MAX_HEADER)? {
            checkpoint.add_indexed(&path, &bytes, &mut hash)?;
        } else {
            return Err(Error::bad(
                dir.join(SINGLE),
                "file",
                format!("is not there, nor is {INDEX}; weights in other formats are not read"),
            ));
        }
        checkpoint.digest = hash.finalize().into();
        Ok(checkpoint)
    }

    fn add_indexed(&mut self, index: &Path, bytes: &[u8], hash: &mut Sha256) -> Result<()> {
        let weight_map = read_index(index, bytes)?;
        let names: BTreeSet<&str> = weight_map.values().map(String::as_str).collect();
        if names.len() > MAX_SHARDS {
            let problem = format!("names more than {MAX_SHARDS} files");
            return Err(Error::bad(index, "weight_map", problem));
        }
        let mut files = BTreeMap::new();
        for name in names {
            let Some(path) = json::find(&self.dir, name)? else {
                let problem = "is not there, but the index names it; download it again";
                return Err(Error::bad(self.dir.join(name), "file", problem));
            };
            files.insert(name, self.shards.len());
            self.add(path, hash)?;
        }
        for (name, shard) in &weight_map {
            let found = self.tensors.get(name).map(|t| t.file);
            if found != files.get(shard.as_str()).copied() {
                let problem = match found {
                    None => format!("is not in {shard}, though the index says so"),
                    Some(other) => format!(
                        "is in {}, though the index says {shard}",
                        self.shards[other].path.display()
                    ),
                };
                return Err(Error::bad(index, shown(name), problem));
            }
        }
        if let Some((name, entry)) = self
            .tensors
            .iter()
            .find(|(name, _)| !weight_map.contains_key(*name))
        {
            let path = &self.shards[entry.file].path;
            return Err(Error::bad(path, name, "is not in the index"));
        }
        Ok(())
    }

    /// Adds one weight file.
    fn add(&mut self, path: PathBuf, hash: &mut Sha256) -> Result<()> {
        let file = File::open(&path).map_err(Error::io(&path))?;
        let meta = file.metadata().map_err(Error::io(&path))?;
        let file_len = meta.len();
        let mut bytes = Vec::new();
        read_up_to(&file, &mut bytes, 8).map_err(Error::io(&path))?;
        let len = header_len(&path, &bytes, file_len)?;
        read_up_to(&file, &mut bytes, len).map_err(Error::io(&path))?;
        let header = Header::parse(&path, &bytes, file_len)?;
        hash.update(file_len.to_le_bytes());
        hash.update(&bytes);

        let shard = self.shards.len();
        for (name, mut entry) in header.tensors {
            entry.file = shard;
            if let Some(other) = self.tensors.get(&name) {
                let problem = format!("is in {} too", self.shards[other.file].path.display());
                return Err(Error::bad(path, name, problem));
            }
            self.tensors.insert(name, entry);
            if self.tensors.len() > MAX_TENSORS {
                let problem = format!("the model has more than {MAX_TENSORS} tensors");
                return Err(Error::bad(path, "header", problem));
            }
        }
        self.shards.push(Shard { path, file });
        Ok(())
    }

    /// Every tensor by name, those that no model needs too.
    pub fn tensors(&self) -> &BTreeMap<String, Entry> {
        &self.tensors
    }

    /// The weight files.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.shards.iter().map(|s| s.path.as_path())
    }

    /// SHA-256 over the length and the header of each file.
    pub(super) fn digest(&self) -> &[u8; 32] {
        &self.digest
    }

    /// The file to name where a tensor is missing.
    fn main_path(&self) -> PathBuf {
        match self.shards.as_slice() {
            [one] => one.path.clone(),
            _ => self.dir.join(INDEX),
        }
    }

    /// The tensor of a name, if it is in float and has one of the shapes.
    ///
    /// # Errors
    /// If it is missing, has another shape, or is not in F32, F16 or BF16.
    pub fn expect(&self, name: &str, shapes: &[&[usize]]) -> Result<&Entry> {
        let wanted = || {
            let shapes: Vec<_> = shapes.iter().map(|s| format!("{s:?}")).collect();
            shapes.join(" or ")
        };
        let Some(entry) = self.tensors.get(name) else {
            let problem = format!("is missing; the model needs it in shape {}", wanted());
            return Err(Error::bad(self.main_path(), name, problem));
        };
        let path = &self.shards[entry.file].path;
        if !matches!(entry.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
            return Err(Error::unsupported(
                path,
                format!("tensor {name} in {}", entry.dtype),
                "this version reads F32, F16 and BF16; use the float checkpoint",
            ));
        }
        if !shapes.contains(&entry.shape.as_slice()) {
            let problem = format!("expected shape {}, found {:?}", wanted(), entry.shape);
            return Err(Error::bad(path, name, problem));
        }
        Ok(entry)
    }

    /// The tensor of a name that the caller knows to be there.
    fn entry(&self, name: &str) -> Result<&Entry> {
        self.tensors
            .get(name)
            .ok_or_else(|| Error::bad(self.main_path(), shown(name), "is missing"))
    }

    /// Reads whole rows of a tensor into `bytes`, replacing what it holds, and makes sure that
    /// every number is finite.
    ///
    /// # Errors
    /// If the file cannot be read or ends early, or if a number is NaN or infinite.
    ///
    /// # Panics
    /// If the tensor has fewer rows.
    pub fn read_rows(
        &self,
        name: &str,
        first_row: usize,
        n_rows: usize,
        bytes: &mut Vec<u8>,
    ) -> Result<()> {
        let entry = self.entry(name)?;
        assert!(
            first_row
                .checked_add(n_rows)
                .is_some_and(|end| end <= entry.n_rows()),
            "read_rows: {name} has {} rows, not {first_row} + {n_rows}",
            entry.n_rows()
        );
        let row = entry.row_bytes();
        bytes.clear();
        bytes.resize(n_rows * row, 0);
        self.read_at(entry, name, first_row as u64 * row as u64, bytes)?;
        self.check_finite(name, first_row * (row / entry.element_bytes()), bytes)
    }

    /// Reads a whole tensor in order, in pieces of at most `piece` bytes (but at least an element),
    /// and gives each with the index of its first element. Makes sure that every number is finite.
    ///
    /// # Errors
    /// As [`Checkpoint::read_rows`], and what `each` returns.
    pub fn read_pieces(
        &self,
        name: &str,
        piece: usize,
        mut each: impl FnMut(usize, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let entry = self.entry(name)?;
        let width = entry.element_bytes();
        let piece = (piece / width).max(1) * width;
        let mut bytes = Vec::new();
        let mut at = 0;
        while at < entry.len {
            let n = usize::try_from(entry.len - at).map_or(piece, |left| left.min(piece));
            bytes.resize(n, 0);
            self.read_at(entry, name, at, &mut bytes)?;
            let first = usize::try_from(at / width as u64)
                .map_err(|_| Error::bad(self.main_path(), name, "is too large for this machine"))?;
            self.check_finite(name, first, &bytes)?;
            each(first, &bytes)?;
            at += n as u64;
        }
        Ok(())
    }

    fn read_at(&self, entry: &Entry, name: &str, at: u64, bytes: &mut [u8]) -> Result<()> {
        let shard = &self.shards[entry.file];
        read_exact_at(&shard.file, bytes, entry.offset + at).map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => {
                let problem = "the file has become shorter since it was opened";
                Error::bad(&shard.path, name, problem)
            }
            _ => Error::io(&shard.path)(e),
        })
    }

    /// Makes sure that every number in a piece of a tensor is finite. `first` is the index of the
    /// piece's first element. Types other than F32, F16 and BF16 hold nothing to look for.
    ///
    /// # Errors
    /// If one is not: names the tensor and the element.
    pub fn check_finite(&self, name: &str, first: usize, bytes: &[u8]) -> Result<()> {
        let entry = self.entry(name)?;
        let Some((at, what)) = not_finite(entry.dtype, bytes) else {
            return Ok(());
        };
        let problem = format!("{what} at element {} of {:?}", first + at, entry.shape);
        Err(Error::bad(&self.shards[entry.file].path, name, problem))
    }
}

/// The first element that is not finite: its index, and what it is.
fn not_finite(dtype: Dtype, bytes: &[u8]) -> Option<(usize, &'static str)> {
    // A float is not finite if all bits of its exponent are set, and NaN if another one below is.
    fn kind(mantissa: u32) -> &'static str {
        if mantissa == 0 { "infinity" } else { "NaN" }
    }
    let halves = |exponent: u16, mantissa: u16| {
        let (all, _) = bytes.as_chunks::<2>();
        let at = all
            .iter()
            .position(|b| u16::from_le_bytes(*b) & exponent == exponent)?;
        Some((at, kind(u32::from(u16::from_le_bytes(all[at]) & mantissa))))
    };
    match dtype {
        Dtype::F32 => {
            let (all, _) = bytes.as_chunks::<4>();
            let at = all
                .iter()
                .position(|b| u32::from_le_bytes(*b) & 0x7f80_0000 == 0x7f80_0000)?;
            Some((at, kind(u32::from_le_bytes(all[at]) & 0x007f_ffff)))
        }
        Dtype::F16 => halves(0x7c00, 0x03ff),
        Dtype::BF16 => halves(0x7f80, 0x007f),
        _ => None,
    }
}

/// Appends up to `n` bytes, fewer only where the file ends.
fn read_up_to(mut file: &File, bytes: &mut Vec<u8>, n: u64) -> io::Result<()> {
    (&mut file).take(n).read_to_end(bytes).map(drop)
}

/// Reads from a place of the file without moving a cursor, so that threads may share it.
#[cfg(unix)]
fn read_exact_at(file: &File, bytes: &mut [u8], at: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, at)
}

/// Reads from a place of the file; every read names its place, so threads may share it.
#[cfg(windows)]
fn read_exact_at(file: &File, mut bytes: &mut [u8], mut at: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, bytes, at) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => {
                bytes = &mut bytes[n..];
                at += n as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// The `weight_map` of an index: tensor to file.
fn read_index(path: &Path, bytes: &[u8]) -> Result<BTreeMap<String, String>> {
    let text = json::text(path, "JSON", bytes)?;
    let mut json = serde_json::Deserializer::from_str(text);
    let mut inside = false;
    let weight_map = IndexSeed {
        inside: &mut inside,
    }
    .deserialize(&mut json)
    .and_then(|map| json.end().map(|()| map))
    .map_err(|e| {
        let field = if inside { "weight_map" } else { "JSON" };
        Error::bad(path, field, shown(&e.to_string()))
    })?;
    let Some(weight_map) = weight_map else {
        return Err(Error::bad(path, "weight_map", "is missing"));
    };
    if weight_map.is_empty() {
        return Err(Error::bad(path, "weight_map", "names no tensor"));
    }
    for (name, file) in &weight_map {
        if !is_shard_name(file) {
            let problem = format!(
                "weight_map gives '{}', which is not the plain name of a .safetensors file",
                shown(file)
            );
            return Err(Error::bad(path, shown(name), problem));
        }
    }
    Ok(weight_map)
}

/// `^[A-Za-z0-9_-][A-Za-z0-9._-]*\.safetensors$`: a file of the folder itself, and not a hidden one.
fn is_shard_name(name: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    name.strip_suffix(".safetensors")
        .is_some_and(|stem| !stem.is_empty())
        && !name.starts_with('.')
        && name.bytes().all(plain)
}

/// Reads an index, of which only `weight_map` counts.
struct IndexSeed<'a> {
    inside: &'a mut bool,
}

impl<'de> DeserializeSeed<'de> for IndexSeed<'_> {
    type Value = Option<BTreeMap<String, String>>;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<Self::Value, D::Error> {
        json.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for IndexSeed<'_> {
    type Value = Option<BTreeMap<String, String>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut weight_map = None;
        while let Some(key) = map.next_key::<String>()? {
            if key != "weight_map" {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            *self.inside = true;
            let texts = map.next_value_seed(TextsSeed { limit: MAX_TENSORS })?;
            if weight_map.replace(texts).is_some() {
                return Err(A::Error::custom("the key is there twice"));
            }
            *self.inside = false;
        }
        Ok(weight_map)
    }
}

/// Tensors that a model has all of, in every layer, or none of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Group {
    /// Those that every model has.
    Always,
    /// Biases of queries, keys and values.
    QkvBias,
    /// Bias of the projection after attention.
    OutBias,
    /// Norms on queries and keys, before their rotation.
    QkNorm,
    /// Biases of the feed-forward block.
    MlpBias,
    /// A head that is not the embedding.
    Head,
}

/// A tensor that a model needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Want {
    /// Its name.
    pub name: String,
    /// Its shape; a matrix is `[out, in]`.
    pub shape: Vec<usize>,
    /// What it depends on.
    pub group: Group,
}

/// The name of a tensor of a layer: `layer_name(2, "mlp.up_proj.weight")`.
pub fn layer_name(layer: usize, tensor: &str) -> String {
    format!("model.layers.{layer}.{tensor}")
}

/// Every tensor that a layer may have, with its shape.
pub fn layer_tensors(config: &Config, layer: usize) -> Vec<Want> {
    let (h, q, kv) = (config.hidden_size, config.q_size(), config.kv_size());
    let (ff, d) = (config.intermediate_size, config.head_dim);
    let table: [(&str, &[usize], Group); 18] = [
        ("input_layernorm.weight", &[h], Group::Always),
        ("self_attn.q_proj.weight", &[q, h], Group::Always),
        ("self_attn.k_proj.weight", &[kv, h], Group::Always),
        ("self_attn.v_proj.weight", &[kv, h], Group::Always),
        ("self_attn.o_proj.weight", &[h, q], Group::Always),
        ("self_attn.q_proj.bias", &[q], Group::QkvBias),
        ("self_attn.k_proj.bias", &[kv], Group::QkvBias),
        ("self_attn.v_proj.bias", &[kv], Group::QkvBias),
        ("self_attn.o_proj.bias", &[h], Group::OutBias),
        ("self_attn.q_norm.weight", &[d], Group::QkNorm),
        ("self_attn.k_norm.weight", &[d], Group::QkNorm),
        ("post_attention_layernorm.weight", &[h], Group::Always),
        ("mlp.gate_proj.weight", &[ff, h], Group::Always),
        ("mlp.up_proj.weight", &[ff, h], Group::Always),
        ("mlp.down_proj.weight", &[h, ff], Group::Always),
        ("mlp.gate_proj.bias", &[ff], Group::MlpBias),
        ("mlp.up_proj.bias", &[ff], Group::MlpBias),
        ("mlp.down_proj.bias", &[h], Group::MlpBias),
    ];
    let want = |(name, shape, group): (&str, &[usize], Group)| Want {
        name: layer_name(layer, name),
        shape: shape.to_vec(),
        group,
    };
    table.into_iter().map(want).collect()
}

/// Every tensor that a model may have, with its shape, in the order of computation.
pub fn all_tensors(config: &Config) -> Vec<Want> {
    let outer = |name: &str, shape: &[usize], group| Want {
        name: name.to_owned(),
        shape: shape.to_vec(),
        group,
    };
    let (vocab, h) = (config.vocab_size, config.hidden_size);
    let mut all = vec![outer(EMBED, &[vocab, h], Group::Always)];
    all.extend((0..config.n_layers).flat_map(|layer| layer_tensors(config, layer)));
    all.push(outer(NORM, &[h], Group::Always));
    all.push(outer(HEAD, &[vocab, h], Group::Head));
    all
}

/// Name of the embedding.
pub const EMBED: &str = "model.embed_tokens.weight";

/// Name of the last norm.
pub const NORM: &str = "model.norm.weight";

/// Name of the head, where it is not the embedding.
pub const HEAD: &str = "lm_head.weight";

/// The tensors of a checkpoint that a model needs, all of them found in their right shapes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorMap {
    wants: Vec<Want>,
    groups: HashSet<Group>,
}

impl TensorMap {
    /// Finds the tensors that a model needs.
    ///
    /// Which biases and norms it has follows from the tensors: one of a [`Group`] in one layer
    /// means all of the group in every layer.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape or type, or if there is one that would have to
    /// change the computation and does not.
    pub fn new(config: &Config, checkpoint: &Checkpoint) -> Result<Self> {
        let all = all_tensors(config);
        let found = |want: &&Want| checkpoint.tensors.contains_key(&want.name);
        let mut groups: HashSet<Group> = all.iter().filter(found).map(|w| w.group).collect();
        groups.insert(Group::Always);
        match config.tie_word_embeddings {
            Some(true) => {
                if groups.remove(&Group::Head) {
                    let path = checkpoint.main_path();
                    let path = path.display();
                    log::warn!("{path}: {HEAD} is ignored: the config ties it to the embedding");
                }
            }
            Some(false) => {
                groups.insert(Group::Head);
            }
            // The config does not say, so the tensors do.
            None => {}
        }

        let known: HashSet<&str> = all.iter().map(|w| w.name.as_str()).collect();
        for (name, entry) in &checkpoint.tensors {
            if known.contains(name.as_str()) || name.ends_with(".rotary_emb.inv_freq") {
                continue;
            }
            let path = &checkpoint.shards[entry.file].path;
            if name.starts_with("model.") || name.starts_with("lm_head.") {
                let what = format!("tensor {}", shown(name));
                let advice = format!(
                    "a {} model of {} layers has none of this name",
                    config.family.model_type, config.n_layers
                );
                return Err(Error::unsupported(path, what, advice));
            }
            log::warn!("{}: {name} is ignored", path.display());
        }

        let mut wants = all;
        wants.retain(|want| groups.contains(&want.group));
        for want in &wants {
            checkpoint.expect(&want.name, &[&want.shape])?;
        }
        Ok(Self { wants, groups })
    }

    /// The tensors that the model needs, in the order of computation.
    pub fn wants(&self) -> &[Want] {
        &self.wants
    }

    /// Whether the model has the tensors of a group.
    pub fn has(&self, group: Group) -> bool {
        self.groups.contains(&group)
    }

    /// Whether the head is the embedding.
    pub fn is_tied(&self) -> bool {
        !self.has(Group::Head)
    }
}
