//! Readers of the golden formats, `hogwild-golden-1` and `plain-golden-1`.
//!
//! The formats are described in `tests/golden/README.md`. Keys that no reader knows land in `extra`,
//! so that a case may say more than the format asks for.

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
};

use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use serde_json::{Map, Value};

/// A directory with a `script.json` and the numbers that must come out.
#[derive(Clone, Debug)]
pub struct Case {
    /// Its path below the golden directory.
    pub name: String,
    pub dir: PathBuf,
    pub script: Script,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(tag = "format")]
pub enum Script {
    #[serde(rename = "hogwild-golden-1")]
    Hogwild(HogwildCase),
    #[serde(rename = "plain-golden-1")]
    Plain(PlainCase),
}

/// Workers over a shared cache, pass by pass. Every block starts empty.
#[derive(Clone, Debug, Deserialize)]
pub struct HogwildCase {
    /// Relative to the directory of the case.
    pub model_dir: PathBuf,
    pub layout: Option<String>,
    /// Names of the blocks that each worker sees, oldest first; empty where the events say it all.
    #[serde(default)]
    pub views: BTreeMap<String, Vec<String>>,
    #[serde(default)]
    pub write_to: BTreeMap<String, String>,
    pub events: Vec<Event>,
    /// What only some cases have: the texts and states of whole runs, who made the numbers.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl HogwildCase {
    /// Tokens that the greedy choice of a whole run must not take; none in other cases.
    pub fn forbidden(&self) -> Vec<u32> {
        let ids = self
            .extra
            .get("token_ids")
            .map(|ids| ids["forbidden"].clone());
        ids.map_or(vec![], |ids| serde_json::from_value(ids).unwrap())
    }
}

#[derive(Clone, Debug, Deserialize)]
#[serde(tag = "op", rename_all = "lowercase")]
pub enum Event {
    Forward(Forward),
    Move(Move),
    Note {},
}

/// One pass of all rows together.
#[derive(Clone, Debug, Deserialize)]
pub struct Forward {
    pub index: usize,
    pub kind: String,
    pub rows: Vec<Row>,
    /// In whole runs: what each row says next, the forbidden tokens left out.
    pub chosen_tokens: Option<Vec<u32>>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Row {
    /// `None` for the prefill of a single block that sees nothing but itself.
    pub worker: Option<usize>,
    pub view: Vec<String>,
    pub write_to: String,
    pub tokens: Vec<u32>,
    /// Of the new tokens in this view, `[first, end)`; redundant.
    pub positions: Option<[usize; 2]>,
    /// After the new tokens of all rows were appended; redundant.
    pub view_block_starts: Option<Vec<usize>>,
    pub view_block_lengths: Option<Vec<usize>>,
    /// Name of the expected tensor.
    pub logits: String,
    #[serde(default)]
    pub logits_rows: LogitsRows,
    pub argmax_last: Option<u32>,
    pub top1_minus_top2: Option<f64>,
}

/// Which new tokens have expected logits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogitsRows {
    #[default]
    All,
    Last,
}

/// Append all of `src` to the end of `dst`, in order, and empty `src`.
#[derive(Clone, Debug, Deserialize)]
pub struct Move {
    pub worker: Option<usize>,
    pub src: String,
    pub dst: String,
    pub n_tokens: usize,
    pub dst_len_before: usize,
    pub rotate_keys_by: usize,
}

/// One sequence: `prefill` are the logits at every input, `decode` those after each greedy token.
#[derive(Clone, Debug, Deserialize)]
pub struct PlainCase {
    /// Relative to the directory of the case.
    pub model_dir: PathBuf,
    pub input_ids: Vec<u32>,
    pub greedy_tokens: Vec<u32>,
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Case {
    pub fn model_dir(&self) -> PathBuf {
        self.dir.join(match &self.script {
            Script::Hogwild(case) => &case.model_dir,
            Script::Plain(case) => &case.model_dir,
        })
    }

    /// Tokens of the prompt: what is prefilled to one block.
    pub fn prompt_len(&self) -> usize {
        match &self.script {
            Script::Plain(case) => case.input_ids.len(),
            Script::Hogwild(case) => {
                let mut lengths = BTreeMap::<&str, usize>::new();
                for event in &case.events {
                    let Event::Forward(pass) = event else {
                        continue;
                    };
                    for row in pass.rows.iter().filter(|row| row.worker.is_none()) {
                        *lengths.entry(&row.write_to).or_default() += row.tokens.len();
                    }
                }
                lengths.into_values().max().unwrap_or(0)
            }
        }
    }

    pub fn expected(&self) -> BTreeMap<String, Expected> {
        read_expected(&self.dir.join("expected.safetensors"))
    }
}

/// A tensor that must come out.
#[derive(Clone, Debug)]
pub struct Expected {
    pub shape: Vec<usize>,
    pub data: Vec<f32>,
}

impl Expected {
    /// Slices along the last dimension.
    pub fn rows(&self) -> std::slice::ChunksExact<'_, f32> {
        self.data.chunks_exact(*self.shape.last().unwrap())
    }
}

/// `HOGWILD_GOLDEN_DIR`, or `tests/golden`.
pub fn dir() -> PathBuf {
    env::var_os("HOGWILD_GOLDEN_DIR").map_or_else(|| "tests/golden".into(), PathBuf::from)
}

/// Every case at or below `dir`, by name. A directory of any other format is none.
pub fn cases(dir: &Path) -> Vec<Case> {
    let mut cases = vec![];
    let mut open = vec![dir.to_owned()];
    while let Some(here) = open.pop() {
        let entries = fs::read_dir(&here).unwrap_or_else(|e| panic!("{}: {e}", here.display()));
        let paths = entries.map(|entry| entry.unwrap().path());
        open.extend(paths.filter(|path| path.is_dir()));
        if let Some(script) = read_script(&here.join("script.json")) {
            let name = here.strip_prefix(dir).unwrap().display().to_string();
            cases.push(Case {
                name,
                dir: here,
                script,
            });
        }
    }
    cases.sort_by(|a, b| a.name.cmp(&b.name));
    cases
}

fn read_script(path: &Path) -> Option<Script> {
    let json: Value = serde_json::from_slice(&fs::read(path).ok()?)
        .unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    if !["hogwild-golden-1", "plain-golden-1"].contains(&json["format"].as_str()?) {
        return None;
    }
    // From here on, what does not parse is a failure, not a case less.
    Some(serde_json::from_value(json).unwrap_or_else(|e| panic!("{}: {e}", path.display())))
}

pub fn read_expected(path: &Path) -> BTreeMap<String, Expected> {
    let bytes = fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensors = file.iter().map(|(name, tensor)| {
        assert_eq!(
            tensor.dtype(),
            Dtype::F32,
            "{name}: expected values are f32"
        );
        let four = tensor.data().chunks(4).map(|b| [b[0], b[1], b[2], b[3]]);
        let data = four.map(f32::from_le_bytes).collect();
        (
            name.to_owned(),
            Expected {
                shape: tensor.shape().to_vec(),
                data,
            },
        )
    });
    tensors.collect()
}
