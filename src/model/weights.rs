//! Weight files: finding the tensors of a model, checking them, and reading them in pieces.
//!
//! Only headers are read when a checkpoint is opened. Weights are read where they are needed and a
//! piece at a time, so that host memory stays bounded; they are never mapped, because a mapped file
//! that another process cuts kills this one. Every offset is checked against the real length of its
//! file once, before anything uses it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};
use sha2::{Digest, Sha256};

use super::header::{Dtype, Entry, Header, MAX_HEADER, MAX_TENSORS, TextsSeed, header_len};
use super::json::{self, shown};
use super::quant::{Packed, Role};
use super::tensors::{Kind, Want};
use crate::{Error, Result};

/// Files that the weights may be spread over; each is kept open.
const MAX_SHARDS: usize = 512;

/// Name of the file that holds all weights, if there is one.
pub(super) const SINGLE: &str = "model.safetensors";

/// Name of the file that says which weights are where, if there are several.
pub(super) const INDEX: &str = "model.safetensors.index.json";

/// One weight file.
#[derive(Debug)]
struct Shard {
    path: PathBuf,
    data: Data,
}

/// Where a weight file's bytes are.
#[derive(Debug)]
enum Data {
    /// On disk, kept open.
    File(File),
    /// In the program.
    Embedded(&'static [u8]),
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

    /// A weight file that is part of the program; `path` stands for it in messages.
    ///
    /// # Errors
    /// If its header is damaged.
    pub fn embedded(path: PathBuf, bytes: &'static [u8]) -> Result<Self> {
        let mut checkpoint = Self {
            dir: path.parent().unwrap_or(Path::new("")).to_path_buf(),
            shards: Vec::new(),
            tensors: BTreeMap::new(),
            digest: [0; 32],
        };
        let mut hash = Sha256::new();
        let file_len = bytes.len() as u64;
        let len = header_len(&path, &bytes[..bytes.len().min(8)], file_len)?;
        let end = usize::try_from(8 + len)
            .unwrap_or(usize::MAX)
            .min(bytes.len());
        let data = Data::Embedded(bytes);
        checkpoint.add_shard(path, data, &bytes[..end], file_len, &mut hash)?;
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
            let path = self.path_of(entry);
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
        self.add_shard(path, Data::File(file), &bytes, file_len, hash)
    }

    /// Adds one weight file whose length and header bytes are known.
    fn add_shard(
        &mut self,
        path: PathBuf,
        data: Data,
        bytes: &[u8],
        file_len: u64,
        hash: &mut Sha256,
    ) -> Result<()> {
        let header = Header::parse(&path, bytes, file_len)?;
        hash.update(file_len.to_le_bytes());
        hash.update(bytes);

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
        self.shards.push(Shard { path, data });
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

    /// The folder.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// SHA-256 over the length and the header of each file.
    pub(super) fn digest(&self) -> &[u8; 32] {
        &self.digest
    }

    /// The file that holds a tensor.
    pub(super) fn path_of(&self, entry: &Entry) -> &Path {
        &self.shards[entry.file].path
    }

    /// The file to name where a tensor is missing.
    pub(super) fn main_path(&self) -> PathBuf {
        match self.shards.as_slice() {
            [one] => one.path.clone(),
            _ => self.dir.join(INDEX),
        }
    }

    /// The tensor that a model wants, if it is there, of its kind and of its shape.
    ///
    /// # Errors
    /// If it is missing, has another shape, or its elements are of another type.
    pub fn expect(&self, want: &Want) -> Result<&Entry> {
        let (name, shape) = (&want.name, &want.shape);
        let Some(entry) = self.tensors.get(name) else {
            let problem = format!("is missing; the model needs it in shape {shape:?}");
            return Err(Error::bad(self.main_path(), name, problem));
        };
        let path = self.path_of(entry);
        let (of_kind, advice) = match want.kind {
            Kind::Float => (
                matches!(entry.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16),
                "this version reads F32, F16 and BF16; use the float checkpoint",
            ),
            Kind::Eight => (
                entry.dtype == Dtype::F8_E4M3,
                "with scales it is read in F8_E4M3",
            ),
            Kind::Words => (entry.dtype == Dtype::I32, "it is read in I32"),
            Kind::Counts => (
                matches!(entry.dtype, Dtype::I32 | Dtype::I64),
                "it is read in I32 and I64",
            ),
        };
        if !of_kind {
            let what = format!("tensor {name} in {}", entry.dtype);
            return Err(Error::unsupported(path, what, advice));
        }
        if *shape != entry.shape {
            let problem = format!("expected shape {shape:?}, found {:?}", entry.shape);
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

    /// Whether two tensors are of one type and shape and hold the same bytes.
    ///
    /// # Errors
    /// As [`Checkpoint::read_rows`].
    pub fn are_equal(&self, a: &str, b: &str) -> Result<bool> {
        const PIECE: usize = 1 << 22;
        let (first, second) = (self.entry(a)?, self.entry(b)?);
        if first.dtype != second.dtype || first.shape != second.shape {
            return Ok(false);
        }
        let most = (PIECE / first.row_bytes().max(1)).max(1);
        let (mut one, mut other) = (Vec::new(), Vec::new());
        for row in (0..first.n_rows()).step_by(most) {
            let n = most.min(first.n_rows() - row);
            self.read_rows(a, row, n, &mut one)?;
            self.read_rows(b, row, n, &mut other)?;
            if one != other {
                return Ok(false);
            }
        }
        Ok(true)
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

    /// The order in which the channels of a quantised matrix are stored, as [`Packed::order`] gives it,
    /// after a check of what the file says of the matrix's shape.
    ///
    /// # Errors
    /// If the files cannot be read or contradict themselves.
    pub fn order(&self, packed: &Packed) -> Result<Option<Vec<u32>>> {
        let mut order = None;
        for (role, shape) in packed.tensors() {
            let name = packed.name(role);
            match role {
                Role::Shape => {
                    let said = self.integers(&name)?;
                    if said != [packed.n as u64, packed.k as u64].map(u64::cast_signed) {
                        let problem = format!("is {said:?}, expected {:?}", [packed.n, packed.k]);
                        return Err(Error::bad(self.path_of(self.entry(&name)?), name, problem));
                    }
                }
                Role::Order => {
                    let mut bytes = Vec::new();
                    self.read_rows(&name, 0, shape[0], &mut bytes)?;
                    let group_of: Vec<i32> = bytemuck::pod_collect_to_vec(&bytes);
                    order = packed.order(&group_of).map_err(|(at, problem)| {
                        let path = self.entry(&name).map(|e| self.path_of(e).to_owned());
                        let problem = format!("element {at}: {problem}");
                        path.map_or_else(|e| e, |path| Error::bad(path, &name, problem))
                    })?;
                }
                _ => {}
            }
        }
        Ok(order)
    }

    /// The elements of a small tensor of integers.
    fn integers(&self, name: &str) -> Result<Vec<i64>> {
        let entry = self.entry(name)?;
        let mut bytes = Vec::new();
        self.read_rows(name, 0, entry.n_rows(), &mut bytes)?;
        Ok(if entry.dtype == Dtype::I64 {
            bytemuck::pod_collect_to_vec(&bytes)
        } else {
            let narrow: Vec<i32> = bytemuck::pod_collect_to_vec(&bytes);
            narrow.into_iter().map(i64::from).collect()
        })
    }

    fn read_at(&self, entry: &Entry, name: &str, at: u64, bytes: &mut [u8]) -> Result<()> {
        let shard = &self.shards[entry.file];
        let at = entry.offset + at;
        let read = match &shard.data {
            Data::File(file) => read_exact_at(file, bytes, at),
            Data::Embedded(all) => {
                let from = usize::try_from(at)
                    .ok()
                    .and_then(|at| all.get(at..)?.get(..bytes.len()));
                match from {
                    Some(from) => {
                        bytes.copy_from_slice(from);
                        Ok(())
                    }
                    None => Err(io::ErrorKind::UnexpectedEof.into()),
                }
            }
        };
        read.map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => {
                let problem = "the file has become shorter since it was opened";
                Error::bad(&shard.path, name, problem)
            }
            _ => Error::io(&shard.path)(e),
        })
    }

    /// Makes sure that every number in a piece of a tensor is finite. `first` is the index of the
    /// piece's first element. Types other than F32, F16, BF16 and `F8_E4M3` hold nothing to look for.
    ///
    /// # Errors
    /// If one is not: names the tensor and the element.
    pub fn check_finite(&self, name: &str, first: usize, bytes: &[u8]) -> Result<()> {
        let entry = self.entry(name)?;
        let Some((at, what)) = not_finite(entry.dtype, bytes) else {
            return Ok(());
        };
        let problem = format!("{what} at element {} of {:?}", first + at, entry.shape);
        Err(Error::bad(self.path_of(entry), name, problem))
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
        Dtype::F8_E4M3 => {
            let at = bytes.iter().position(|b| b & 0x7f == 0x7f)?;
            Some((at, "NaN"))
        }
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

/// `^[A-Za-z0-9_-][A-Za-z0-9._-]*\.safetensors$`, no longer than a name may be: a file of the folder itself, and
/// not a hidden one.
fn is_shard_name(name: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    name.strip_suffix(".safetensors")
        .is_some_and(|stem| !stem.is_empty())
        && name.len() <= 255
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
