//! A model folder: what it says about itself, and the tensors it holds.
//!
//! `config` reads the numbers, and `families` holds what a model family adds to them; `header` reads
//! what a weight file says about itself, `weights` finds the tensors and reads them in pieces,
//! `tensors` holds which of them a model needs, and `quant` what becomes of quantised ones;
//! `quantize` makes such a folder, `placement` says which layers are on which device, and `memory` whether
//! they fit. Any of these files may be damaged or hostile: the worst result is an [`Error`](crate::Error) that
//! names the file and the key, tensor or offset.

mod bytes;
pub mod config;
pub mod engine;
pub mod families;
pub mod forward;
pub mod header;
mod json;
mod load;
pub mod memory;
pub mod placement;
pub mod quant;
pub mod quantize;
mod random;
mod relay;
pub mod shapes;
pub mod tensors;
pub mod weights;

use std::path::Path;

use sha2::{Digest, Sha256};

pub use config::{Config, Experts, GenerationConfig, Rope, RopeKind};
pub use engine::{Engine, Wanted};
pub use forward::{Scratch, Stage};
pub use header::{Dtype, Entry, Header};
pub use placement::{Model, Placement};
pub use random::RandomWeights;
pub use tensors::{Group, Kind, TensorMap, Want};
pub use weights::Checkpoint;

use crate::{Result, TokenId};

/// A model folder whose small files are read and whose tensors are found, but not yet loaded.
#[derive(Debug)]
pub struct ModelFiles {
    /// What `config.json` says.
    pub config: Config,
    /// What `generation_config.json` says, or the defaults where there is none.
    pub generation: GenerationConfig,
    /// The tensors, and the files they are in.
    pub checkpoint: Checkpoint,
    /// Which of the tensors the model needs.
    pub tensors: TensorMap,
}

impl ModelFiles {
    /// Reads the small files of the folder, the headers of the weight files, and checks each
    /// against the others. No weight is read.
    ///
    /// # Errors
    /// If a file is missing, damaged, contradicts another one, or asks for something that is not
    /// supported.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let config = Config::open(dir)?;
        let generation = GenerationConfig::open(dir, &config)?;
        let checkpoint = Checkpoint::open(dir)?;
        let tensors = TensorMap::new(&config, &checkpoint)?;
        Ok(Self {
            config,
            generation,
            checkpoint,
            tensors,
        })
    }

    /// A model that is part of the program: the contents of `config.json`, `generation_config.json` and
    /// `model.safetensors`; `name` stands for its directory in messages.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn embedded(
        name: &Path,
        config: &[u8],
        generation: &[u8],
        weights: &'static [u8],
    ) -> Result<Self> {
        let config = Config::from_json(&name.join("config.json"), config)?;
        let path = name.join("generation_config.json");
        let generation = GenerationConfig::from_json(&path, generation, &config)?;
        let checkpoint = Checkpoint::embedded(name.join("model.safetensors"), weights)?;
        let tensors = TensorMap::new(&config, &checkpoint)?;
        Ok(Self {
            config,
            generation,
            checkpoint,
            tensors,
        })
    }

    /// The ids that end a text: those of both configs, each once, in the order they are named.
    pub fn eos(&self) -> Vec<TokenId> {
        let mut ids = self.config.eos.clone();
        for &id in &self.generation.eos {
            if !ids.contains(&id) {
                ids.push(id);
            }
        }
        ids
    }

    /// Bytes of all tensors that the model needs, as they are in the files.
    pub fn weight_bytes(&self) -> u64 {
        let all = self.checkpoint.tensors();
        self.tensors
            .wants()
            .iter()
            .filter_map(|want| all.get(&want.name))
            .map(|e| e.len)
            .sum()
    }

    /// A name for the model that stays the same between runs: SHA-256, in hex, over `config.json`
    /// and over the length and the header of each weight file.
    ///
    /// It does not cover the weights themselves, so it is cheap, and it does not tell two trainings
    /// of one architecture apart.
    pub fn hash(&self) -> String {
        use std::fmt::Write as _;

        let mut hash = Sha256::new();
        hash.update(b"hogwild model 1\n");
        hash.update(self.config.digest());
        hash.update(self.checkpoint.digest());
        hash.finalize().iter().fold(String::new(), |mut hex, byte| {
            // Writing to a string cannot fail.
            let _ = write!(hex, "{byte:02x}");
            hex
        })
    }
}

/// Bytes that [`check`] holds of a tensor at a time.
const PIECE: usize = 64 << 10;

/// Opens a model folder and reads every tensor that the model needs once, in pieces of 64 KiB,
/// looking for numbers that are not finite, and for orders of channels that are none.
///
/// # Errors
/// As [`ModelFiles::open`], and if a weight is NaN or infinite or its file ends early.
pub fn check(dir: impl AsRef<Path>) -> Result<ModelFiles> {
    let files = ModelFiles::open(dir)?;
    for want in files.tensors.wants() {
        files
            .checkpoint
            .read_pieces(&want.name, PIECE, |_, _| Ok(()))?;
    }
    for packed in files.tensors.all_packed() {
        files.checkpoint.order(packed)?;
    }
    Ok(files)
}
