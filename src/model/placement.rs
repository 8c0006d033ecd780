//! A model over devices: which of its layers live where.
//!
//! A [`Stage`] is the layers of one device, with their weights and their angles; their cache lies there too.
//! The first embeds, the last makes logits, and the rows of the hidden state go from each to the next through
//! the host. Invariant: which layers are where changes no bit, as long as the devices are of one kind.

use std::ops::Range;
use std::sync::Arc;

use super::forward::{Scratch, Stage};
use super::load::load;
use super::random::{RandomWeights, random};
use super::{Config, ModelFiles};
use crate::cache::plan::Plan;
use crate::cache::{CacheShape, KvCache};
use crate::device::{DType, Device, Recording};
use crate::ops::linear::By;
use crate::{Error, Result};

/// Which layers are on which device: how many each has, in the order of the layers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement(Vec<usize>);

impl Placement {
    /// All layers on one device.
    ///
    /// # Panics
    /// If there is no layer.
    pub fn whole(n_layers: usize) -> Self {
        assert!(n_layers > 0, "a model has layers");
        Self(vec![n_layers])
    }

    /// So many layers on each device.
    ///
    /// # Errors
    /// [`Error::Usage`] if a device has none, or if they are not the layers of the model.
    pub fn new(counts: Vec<usize>, n_layers: usize) -> Result<Self> {
        let shown = || {
            let numbers: Vec<_> = counts.iter().map(usize::to_string).collect();
            numbers.join(",")
        };
        if counts.contains(&0) {
            return Err(Error::Usage(format!(
                "--layers {} leaves a device without a layer; name fewer devices",
                shown()
            )));
        }
        let sum = counts.iter().try_fold(0usize, |sum, &n| sum.checked_add(n));
        if sum != Some(n_layers) {
            let sum = sum.map_or("more".to_owned(), |sum| sum.to_string());
            return Err(Error::Usage(format!(
                "--layers {} are {sum} layers, but the model has {n_layers}",
                shown()
            )));
        }
        Ok(Self(counts))
    }

    /// How many layers each of several devices has; nothing of one.
    pub fn split(&self) -> &[usize] {
        if self.0.len() > 1 { &self.0 } else { &[] }
    }

    /// The layers of each device.
    pub fn ranges(&self) -> impl Iterator<Item = Range<usize>> {
        self.0.iter().scan(0, |end, &n| {
            let start = *end;
            *end += n;
            Some(start..*end)
        })
    }
}

/// A loaded model: its stages, of which there is usually one.
#[derive(Debug)]
pub struct Model(Vec<Stage>);

impl Model {
    /// Loads the weights of a model directory to a device, for contexts of at most `n_positions`.
    ///
    /// `progress` is told the bytes read by each step.
    ///
    /// # Errors
    /// If a weight cannot be read, is not finite, or does not fit the device.
    pub fn load(
        device: Arc<Device>,
        files: &ModelFiles,
        n_positions: usize,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Self> {
        let whole = Placement::whole(files.config.n_layers);
        Self::load_over(&[device], &whole, files, n_positions, progress)
    }

    /// Loads the weights of a model directory to several devices, as [`Model::load`] does to one. A device may
    /// be there twice.
    ///
    /// # Errors
    /// Those of [`Model::load`].
    ///
    /// # Panics
    /// If the placement is of another number of devices or layers.
    pub fn load_over(
        devices: &[Arc<Device>],
        placement: &Placement,
        files: &ModelFiles,
        n_positions: usize,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Self> {
        let config = &files.config;
        let ranges: Vec<_> = placement.ranges().collect();
        assert_eq!(ranges.len(), devices.len(), "each device has its layers");
        assert!(
            ranges.last().is_some_and(|r| r.end == config.n_layers),
            "a placement of the model's layers"
        );
        say_table(config, n_positions);
        // A tied embedding is read twice where first and last layer are apart.
        let mut left = files.weight_bytes();
        let mut tell = |bytes: u64| {
            let now = bytes.min(left);
            left -= now;
            progress(now);
        };
        let stage = |(device, layers): (&Arc<Device>, Range<usize>)| {
            let weights = load(device, files, layers.clone(), &mut tell)?;
            Stage::new(device.clone(), config, layers, weights, n_positions)
        };
        let stages = devices.iter().zip(ranges).map(stage);
        Ok(Self(stages.collect::<Result<_>>()?))
    }

    /// A model of the given shape with pseudo-random weights: for benches, which need no checkpoint.
    ///
    /// # Errors
    /// If the device cannot hold it.
    pub fn random(
        device: Arc<Device>,
        config: &Config,
        weights: RandomWeights,
        n_positions: usize,
    ) -> Result<Self> {
        say_table(config, n_positions);
        let shared = weights.shared;
        let (weights, all) = (random(&device, config, weights)?, 0..config.n_layers);
        let mut stage = Stage::new(device, config, all, weights, n_positions)?;
        stage.shared = shared;
        Ok(Self(vec![stage]))
    }

    /// Its parts, in the order of the layers; there is at least one.
    pub fn stages(&self) -> &[Stage] {
        &self.0
    }

    /// The stage that has a layer.
    ///
    /// # Panics
    /// If the model has no such layer.
    pub fn stage_of(&self, layer: usize) -> &Stage {
        let has = |stage: &&Stage| stage.layers().contains(&layer);
        self.0.iter().find(has).expect("the model has the layer")
    }

    pub(super) fn last(&self) -> &Stage {
        self.0.last().expect("a model has a stage")
    }

    /// The numbers that describe it.
    pub fn config(&self) -> &Config {
        self.0[0].config()
    }

    /// Where it lives, or its first layers do.
    pub fn device(&self) -> &Arc<Device> {
        self.0[0].device()
    }

    /// The names of its devices, comma-separated.
    pub fn device_names(&self) -> String {
        let names: Vec<_> = self.0.iter().map(|stage| stage.device().name()).collect();
        names.join(",")
    }

    /// How many layers each device has.
    pub fn placement(&self) -> Placement {
        Placement(self.0.iter().map(|stage| stage.layers().len()).collect())
    }

    /// Bytes of all its weights on its devices.
    pub fn stored_bytes(&self) -> u64 {
        self.0.iter().map(Stage::stored_bytes).sum()
    }

    /// Positions that its tables of angles cover.
    pub fn n_positions(&self) -> usize {
        self.0[0].n_positions()
    }

    /// Rows that one work item of attention serves at most; for [`crate::cache::plan::plan`].
    pub fn rows_per_work(&self) -> usize {
        self.0[0].rows_per_work()
    }

    /// Tokens that its layers see, each number once; none stands for all. For [`crate::cache::plan::plan`].
    pub fn windows(&self) -> &[Option<usize>] {
        self.0[0].windows()
    }

    /// Shape of a cache for this model.
    pub fn cache_shape(&self, dtype: DType) -> CacheShape {
        self.0[0].cache_shape(dtype)
    }

    /// A cache of `n_pages` pages, each layer's where the layer is.
    pub(super) fn cache(&self, dtype: DType, n_pages: usize) -> Result<KvCache> {
        let device = |layer| &**self.stage_of(layer).device();
        KvCache::over(device, self.cache_shape(dtype), n_pages)
    }

    /// Records one pass of a model that is on one device, as [`Stage::forward`] does.
    ///
    /// # Errors
    /// Those of [`Stage::forward`].
    ///
    /// # Panics
    /// If it is on several, and those of [`Stage::forward`].
    pub fn forward(
        &self,
        plan: &Plan,
        by: By,
        cache: &KvCache,
        scratch: &mut Scratch,
    ) -> Result<Recording> {
        let [stage] = &self.0[..] else {
            panic!("each stage of a model records its part");
        };
        stage.forward(plan, by, cache, scratch)
    }
}

/// Says which of two tables of factors a model goes by.
fn say_table(config: &Config, n_positions: usize) {
    if let Some(is_long) = config.rope.kind.is_long(n_positions) {
        let table = if is_long { "long" } else { "short" };
        log::info!("a context of {n_positions} tokens: rope by the {table} factors, throughout");
    }
}
