//! What `generate` and `replay` share: a model directory, opened and put on one device or several.

use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use indicatif::{ProgressBar, ProgressStyle};

use crate::device::judge::trust;
use crate::device::{Choice, DType, Device, choose_all, gpus};
use crate::model::memory::{self, Room};
use crate::model::{Model, ModelFiles, Placement};
use crate::ops::OPS;
use crate::{Error, Result, TokenId};

/// Where the model is and where it runs.
#[derive(Clone, Debug, clap::Args)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a flag that people type"
)]
pub(super) struct LoadArgs {
    /// Model directory in Hugging Face's format, or OWNER/NAME of the hub: downloaded where the Hugging Face
    /// cache lacks it (`HF_HOME`, `HF_HUB_CACHE`, `HF_HUB_OFFLINE`, `HF_ENDPOINT`, `HF_TOKEN`)
    #[arg(short, long, value_name = "MODEL")]
    pub(super) model: Option<PathBuf>,

    /// Branch, tag or commit of a model of the hub [default: main]
    #[arg(long, value_name = "REV", requires = "model")]
    pub(super) revision: Option<String>,

    /// `auto` (a GPU if there is one, else the CPU path), `cpu`, or part of an adapter's name; several names,
    /// comma-separated, share the layers in proportion to their memory
    #[arg(long, value_name = "NAME,…", env = "HOGWILD_DEVICE")]
    pub(super) device: Option<String>,

    /// Layers of each device [default: in proportion to memory]
    #[arg(long, value_name = "N,…", value_delimiter = ',')]
    pub(super) layers: Vec<usize>,

    /// Play every dispatch by its reference too, and stop at the first that disagrees (slow)
    #[arg(long)]
    pub(super) check: bool,

    /// Judge all shaders first, then run them without checks of their indices (for measurements)
    #[arg(long, hide = true)]
    pub(super) unchecked: bool,

    /// Record no pass before its tokens are known (for measurements)
    #[arg(long, hide = true)]
    pub(super) no_ahead: bool,

    /// Say nothing on standard error but errors
    #[arg(short, long)]
    pub(super) quiet: bool,
}

/// The file that holds the vocabulary.
const TOKENIZER: &str = "tokenizer.json";

/// Names the file in an error that a vocabulary is to blame for, ready for `map_err`.
pub(super) fn name_tokenizer(directory: &Path) -> impl FnOnce(Error) -> Error {
    let path = directory.join(TOKENIZER);
    |error| match error {
        Error::Tokenizer(problem) => Error::bad(path, "vocabulary", problem),
        other => other,
    }
}

/// Refuses tokens that the model has no embedding of, before it is loaded.
pub(super) fn check_ids<'a>(
    files: &ModelFiles,
    ids: impl IntoIterator<Item = &'a TokenId>,
) -> Result<()> {
    let rows = files.config.vocab_size;
    match ids.into_iter().find(|&&id| id as usize >= rows) {
        None => Ok(()),
        Some(id) => Err(Error::Tokenizer(format!(
            "token {id} is beyond the {rows} rows of the embedding: \
             tokenizer and model do not belong together"
        ))),
    }
}

/// A bar over bytes on standard error, where that is a terminal.
pub(super) fn bar(verb: &str, bytes: u64, quiet: bool) -> ProgressBar {
    if quiet || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = "{bar:30} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left";
    let style = ProgressStyle::with_template(&format!("{verb} {style}"));
    ProgressBar::new(bytes).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// The devices that a model is put on, in the order of its layers.
pub(super) struct Devices {
    devices: Vec<Arc<Device>>,
    /// Of each the first that has the same memory.
    pools: Vec<usize>,
}

impl Devices {
    /// That of the first layers.
    pub(super) fn first(&self) -> Arc<Device> {
        self.devices[0].clone()
    }

    /// The only one, for what is measured on one device.
    pub(super) fn only(&self) -> Result<Arc<Device>> {
        match self.devices.len() {
            1 => Ok(self.first()),
            n => Err(Error::Usage(format!(
                "{n} devices were named, but only whole passes of a checkpoint (-m) are measured on several; \
                 name one with --device"
            ))),
        }
    }

    fn rooms(&self) -> Vec<Room> {
        let room = |(device, &pool): (&Arc<Device>, &usize)| Room {
            device: device.name(),
            bytes: device.memory(),
            pool,
        };
        self.devices.iter().zip(&self.pools).map(room).collect()
    }
}

/// Of each device the first that has the same memory.
fn pools(choices: &[Choice]) -> Vec<usize> {
    let first = |at: usize| {
        let shares = |before: &usize| choices[at].shares_memory(&choices[*before]);
        (0..at).find(shares).unwrap_or(at)
    };
    (0..choices.len()).map(first).collect()
}

/// The GPUs that a model could be put on, as far as their memory is known.
fn seen() -> Vec<Room> {
    let gpus: Vec<Choice> = gpus()
        .into_iter()
        .filter(|g| g.memory().is_some())
        .collect();
    let room = |(gpu, pool): (&Choice, usize)| Room {
        device: gpu.name(),
        bytes: gpu.memory(),
        pool,
    };
    gpus.iter().zip(pools(&gpus)).map(room).collect()
}

impl LoadArgs {
    /// Says something on standard error.
    pub(super) fn note(&self, text: &str) {
        if !self.quiet {
            super::note(text);
        }
    }

    /// The directory of the model that was named, downloaded if need be.
    pub(super) fn directory(&self) -> Result<Option<PathBuf>> {
        let revision = self.revision.as_deref();
        let model = self.model.as_deref();
        model
            .map(|model| super::models::locate(model, revision, self.quiet))
            .transpose()
    }

    /// Opens one device or several; says so where `auto` came to the CPU path.
    pub(super) fn open_devices(&self, wanted: &str) -> Result<Devices> {
        let choices = choose_all(wanted)?;
        if let ([Choice::Cpu { why }], "auto") = (&choices[..], wanted) {
            self.note(&format!("device: the CPU path, because {why}"));
        }
        let mut devices = Vec::with_capacity(choices.len());
        for choice in &choices {
            let device = Device::of(choice)?;
            if self.unchecked {
                let n = trust(&device, OPS)?;
                self.note(&format!(
                    "unchecked: {n} variants of shaders passed their cases"
                ));
            }
            devices.push(Arc::new(device));
        }
        Ok(Devices {
            devices,
            pools: pools(&choices),
        })
    }

    /// Loads the weights, with a bar on a terminal; refuses what does not fit before anything is read. Of
    /// several devices, says which layers went where: those that `layers` counts, or what memory there is.
    pub(super) fn load(
        &self,
        devices: &Devices,
        layers: &[usize],
        files: &ModelFiles,
        n_positions: usize,
        kv_dtype: DType,
    ) -> Result<Arc<Model>> {
        let by_hand = (!layers.is_empty())
            .then(|| Placement::new(layers.to_vec(), files.config.n_layers))
            .transpose()?;
        let rooms = devices.rooms();
        let placement =
            memory::place(files, n_positions, kv_dtype, by_hand.as_ref(), &rooms, seen)?;
        if rooms.len() > 1 {
            let part = |(room, layers): (&Room, _)| {
                format!("layers {} on {}", memory::shown(&layers), room.device)
            };
            let parts: Vec<_> = rooms.iter().zip(placement.ranges()).map(part).collect();
            self.note(&parts.join("; "));
        }
        let bar = bar("loading", files.weight_bytes(), self.quiet);
        let started = std::time::Instant::now();
        let tell = &mut |bytes| bar.inc(bytes);
        let model = Model::load_over(&devices.devices, &placement, files, n_positions, tell);
        bar.finish_and_clear();
        let seconds = started.elapsed().as_secs_f64();
        let gb = files.weight_bytes() as f64 / 1e9;
        log::info!(
            "loaded {gb:.2} GB in {seconds:.1} s, {:.2} GB/s",
            gb / seconds.max(1e-9)
        );
        Ok(Arc::new(model?))
    }
}
