//! The header of a safetensors file: what it says about each tensor, and whether that can be true.
//!
//! The `safetensors` crate checks a header too, and has the last word here; but it lets equal names,
//! any number of dimensions or empty tensors, and any name pass. After [`Header::parse`] every
//! tensor lies inside of its file, in bytes of its own, and is as long as its shape says.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::path::Path;

use safetensors::tensor::Metadata;
use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};

pub use safetensors::Dtype;

use super::json::{self, shown};
use crate::{Error, Result};

/// Bytes of a header that the format allows.
const FORMAT_HEADER: u64 = 100_000_000;

/// Bytes of a header, and of an index, that are accepted: many times what any model needs.
pub(super) const MAX_HEADER: u64 = 16 << 20;

/// Tensors that a model may have.
pub(super) const MAX_TENSORS: usize = 200_000;

/// Dimensions that a tensor may have.
const MAX_DIMS: usize = 8;

/// Bytes of a tensor's name.
const MAX_NAME: usize = 256;

/// Where a tensor is, and what it looks like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Type of an element.
    pub dtype: Dtype,
    /// Shape, outermost dimension first.
    pub shape: Vec<usize>,
    /// Which of the checkpoint's files holds it.
    pub file: usize,
    /// First byte, from the start of the file.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
}

impl Entry {
    /// Rows: all dimensions but the last, or the only one; 1 for a scalar.
    pub fn n_rows(&self) -> usize {
        match &self.shape[..] {
            [] => 1,
            &[len] => len,
            [outer @ .., _] => outer.iter().product(),
        }
    }

    /// Bytes of one row.
    pub fn row_bytes(&self) -> usize {
        // The length was checked to be the product of the shape when the header was read.
        usize::try_from(self.len).map_or(0, |len| len / self.n_rows().max(1))
    }

    /// Bytes of one element.
    pub(super) fn element_bytes(&self) -> usize {
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
pub(super) fn header_len(path: &Path, bytes: &[u8], file_len: u64) -> Result<u64> {
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
pub(super) struct TextsSeed {
    /// Keys that it may have.
    pub(super) limit: usize,
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
