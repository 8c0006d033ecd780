//! Measuring: what each dispatch takes, what the device's memory can do, and how steady both are.
//!
//! A GPU says the time before and after every dispatch itself, where it can (`TIMESTAMP_QUERY_INSIDE_PASSES`);
//! elsewhere dispatches run one at a time against the wall clock. Invariant: numbers from here are of work
//! that has ended.

use std::time::Instant;

use rayon::prelude::*;

use super::gpu::buffer;
use super::op::Kernel;
use super::{Cpu, DType, Device, Dispatch, Gpu, Recording, Tensor};
use crate::{Error, Result};

/// Repeated measurements of one thing.
#[derive(Clone, Debug)]
pub struct Samples(Vec<f64>);

impl Samples {
    /// # Panics
    /// If there is none, or one is not a number.
    pub fn new(mut samples: Vec<f64>) -> Self {
        assert!(
            !samples.is_empty() && samples.iter().all(|s| !s.is_nan()),
            "a measurement gives numbers"
        );
        samples.sort_by(f64::total_cmp);
        Self(samples)
    }

    /// The middle one; of an even number, the mean of both in the middle.
    pub fn median(&self) -> f64 {
        let n = self.0.len();
        f64::midpoint(self.0[(n - 1) / 2], self.0[n / 2])
    }

    /// The least: what else the machine does only adds to a time.
    pub fn least(&self) -> f64 {
        self.0[0]
    }

    /// The first and third quartile.
    pub fn quartiles(&self) -> [f64; 2] {
        let last = self.0.len() - 1;
        [self.0[last / 4], self.0[last - last / 4]]
    }

    /// Half the distance of the quartiles over the median: how far a measurement usually is off.
    pub fn spread(&self) -> f64 {
        let [low, high] = self.quartiles();
        (high - low) / 2.0 / self.median()
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.0.len()
    }
}

impl Device {
    /// Waits until all that was played has ended.
    ///
    /// # Errors
    /// [`Error::Device`] if the device failed.
    pub fn finish(&self) -> Result<()> {
        match self {
            Self::Gpu(gpu) => gpu.finish(),
            Self::Cpu(_) => Ok(()),
        }
    }

    /// Whether [`Device::play_timed`] is told the times by the device itself.
    pub fn has_timestamps(&self) -> bool {
        match self {
            Self::Gpu(gpu) => gpu.has_timestamps(),
            Self::Cpu(_) => false,
        }
    }

    /// Plays a recording and returns the seconds that each dispatch took.
    ///
    /// # Errors
    /// Those of [`Device::play`].
    pub fn play_timed(&self, recording: &Recording) -> Result<Vec<f64>> {
        let uploads = Recording {
            uploads: recording.uploads.clone(),
            dispatches: Vec::new(),
        };
        self.play(&uploads)?;
        match self {
            Self::Gpu(gpu) if gpu.has_timestamps() => {
                let kernels = recording.dispatches.iter().map(|d| Ok((d, gpu.kernel(d)?)));
                gpu.timed(&kernels.collect::<Result<Vec<_>>>()?)
            }
            _ => {
                let each = recording.dispatches.iter().map(|dispatch| {
                    let kernel = self.kernel(dispatch)?;
                    self.against_the_clock(|| {
                        if let Some(kernel) = kernel {
                            return self.run(dispatch, kernel);
                        }
                        Cpu::run(dispatch, None);
                        Ok(())
                    })
                });
                each.collect()
            }
        }
    }

    /// Runs one dispatch with a kernel of choice and returns the seconds it took.
    ///
    /// # Errors
    /// Those of [`Device::run`].
    pub fn run_timed(&self, dispatch: &Dispatch, kernel: &Kernel) -> Result<f64> {
        match self {
            Self::Gpu(gpu) if gpu.has_timestamps() => Ok(gpu.timed(&[(dispatch, kernel)])?[0]),
            _ => self.against_the_clock(|| self.run(dispatch, kernel)),
        }
    }

    fn against_the_clock(&self, run: impl FnOnce() -> Result<()>) -> Result<f64> {
        self.finish()?;
        let started = Instant::now();
        run()?;
        self.finish()?;
        Ok(started.elapsed().as_secs_f64())
    }
}

impl Gpu {
    fn has_timestamps(&self) -> bool {
        self.device
            .features()
            .contains(wgpu::Features::TIMESTAMP_QUERY_INSIDE_PASSES)
    }

    /// Seconds of each of some dispatches, by the device's clock.
    fn timed(&self, work: &[(&Dispatch, &Kernel)]) -> Result<Vec<f64>> {
        // One stamp more than dispatches; wgpu's sets hold 4096.
        let mut out = Vec::with_capacity(work.len());
        for work in work.chunks(wgpu::QUERY_SET_MAX_QUERIES as usize - 1) {
            out.extend(self.timed_at_once(work)?);
        }
        Ok(out)
    }

    fn timed_at_once(&self, work: &[(&Dispatch, &Kernel)]) -> Result<Vec<f64>> {
        let count = u32::try_from(work.len() + 1).expect("at most a set");
        let set = self.device.create_query_set(&wgpu::QuerySetDescriptor {
            label: None,
            ty: wgpu::QueryType::Timestamp,
            count,
        });
        let (params, params_bytes, encoder) = self.encode(work, Some(&set))?;
        self.queue.write_buffer(&params, 0, &params_bytes);
        self.queue.submit([encoder.finish()]);
        let bytes = 8 * (work.len() + 1);
        let usage = wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC;
        let resolved = self.buffer(bytes, usage)?;
        let usage = wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::MAP_READ;
        let staging = self.buffer(bytes, usage)?;
        let mut encoder = self
            .device
            .create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        encoder.resolve_query_set(&set, 0..count, &resolved, 0);
        encoder.copy_buffer_to_buffer(&resolved, 0, &staging, 0, bytes as u64);
        let index = self.queue.submit([encoder.finish()]);
        staging.map_async(wgpu::MapMode::Read, .., |_| {});
        self.until(index)?;
        let mapped = staging
            .get_mapped_range(..)
            .map_err(|e| self.error(format!("timestamps could not be read back: {e}")))?;
        let stamps: Vec<u64> = bytemuck::pod_collect_to_vec(&mapped[..]);
        let period = f64::from(self.queue.get_timestamp_period()) * 1e-9;
        // A clock that steps back gives zero, not centuries.
        let between = |w: &[u64]| w[1].saturating_sub(w[0]) as f64 * period;
        Ok(stamps.windows(2).map(between).collect())
    }

    /// Copies the first bytes of a tensor to another, some times over.
    fn copy(&self, from: &Tensor, to: &Tensor, times: usize) -> Result<()> {
        let mut encoder = self
            .device
            .create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let size = buffer(from).size().min(buffer(to).size());
        for _ in 0..times {
            encoder.copy_buffer_to_buffer(buffer(from), 0, buffer(to), 0, size);
        }
        self.queue.submit([encoder.finish()]);
        self.healthy()
    }
}

/// Two stretches of device memory, larger than its caches: to measure its bandwidth, and to push out of the
/// caches what a measurement should not find there.
#[derive(Debug)]
pub struct Memory<'a> {
    device: &'a Device,
    from: Tensor,
    to: Tensor,
}

impl<'a> Memory<'a> {
    /// Reserves 256 MiB twice, or what one binding holds, if that is less.
    ///
    /// # Errors
    /// If the device cannot hold them.
    pub fn new(device: &'a Device) -> Result<Self> {
        let most = match device {
            Device::Gpu(_) => 256 << 20,
            Device::Cpu(_) => 128 << 20,
        };
        let words = most.min(device.max_tensor_bytes()) / 4;
        let stretch = || device.tensor(&[words], DType::U32);
        let memory = Self {
            device,
            from: stretch()?,
            to: stretch()?,
        };
        // First uses find pages that no one has touched.
        memory.copy(1)?;
        Ok(memory)
    }

    fn copy(&self, times: usize) -> Result<()> {
        match self.device {
            Device::Gpu(gpu) => gpu.copy(&self.from, &self.to, times)?,
            Device::Cpu(_) => (0..times).for_each(|_| Cpu::copy(&self.from, &self.to)),
        }
        self.device.finish()
    }

    /// Leaves nothing in the caches but these stretches.
    ///
    /// # Errors
    /// [`Error::Device`] if the device failed.
    pub fn scrub(&self) -> Result<()> {
        self.copy(1)
    }

    /// Bytes in a second that a plain copy reads and writes: the roof of what only moves bytes.
    ///
    /// # Errors
    /// [`Error::Device`] if the device failed.
    pub fn bandwidth(&self) -> Result<Samples> {
        const MORE: usize = 4;
        let bytes = 2.0 * self.from.bytes() as f64;
        let time = |times: usize| self.device.against_the_clock(|| self.copy(times));
        let mut rates = Vec::new();
        for _ in 0..7 {
            // The difference has no part in it that is not copying.
            let (one, more) = (time(1)?, time(1 + MORE)?);
            rates.push(bytes * MORE as f64 / (more - one).max(more / 4.0));
        }
        Ok(Samples::new(rates))
    }
}

impl Cpu {
    fn copy(from: &Tensor, to: &Tensor) {
        use super::cpu::{POISONED, words};
        let (from, mut to) = (
            words(from).read().expect(POISONED),
            words(to).write().expect(POISONED),
        );
        let piece = 1 << 16;
        let pieces = to.par_chunks_mut(piece).zip(from.par_chunks(piece));
        pieces.for_each(|(to, from)| to.copy_from_slice(from));
    }
}

impl Device {
    /// A device that plays nothing and holds next to nothing, with the limits of a large GPU: for measuring
    /// what a pass costs the host. No name chooses it.
    ///
    /// # Errors
    /// [`Error::Device`] where wgpu was built without its noop backend, as it is for users.
    pub fn noop() -> Result<Self> {
        let adapter = super::adapters::noop().ok_or_else(|| Error::Device {
            device: "noop".into(),
            problem: "wgpu was built without its noop backend, which is for tests and benches"
                .into(),
        })?;
        Ok(Self::Gpu(Box::new(Gpu::open(&adapter)?)))
    }

    /// Seconds to encode, finish and submit `n` dispatches that do next to nothing, each with a bind group of
    /// its own of seven buffers: what a pass of as many dispatches costs the host at least.
    ///
    /// # Errors
    /// [`Error::Device`] on the CPU path, or if the device failed.
    pub fn bare_dispatches(&self, n: usize, rounds: usize) -> Result<Samples> {
        match self {
            Self::Gpu(gpu) => gpu.bare_dispatches(n, rounds),
            Self::Cpu(_) => Err(Error::Device {
                device: self.name(),
                problem: "has no dispatches to submit".into(),
            }),
        }
    }
}

impl Gpu {
    fn bare_dispatches(&self, n: usize, rounds: usize) -> Result<Samples> {
        // Seven buffers, as an op has on average.
        const EMPTY: &str = "
            @group(0) @binding(0) var<storage, read> a: array<u32>;
            @group(0) @binding(1) var<storage, read> b: array<u32>;
            @group(0) @binding(2) var<storage, read> c: array<u32>;
            @group(0) @binding(3) var<storage, read> d: array<u32>;
            @group(0) @binding(4) var<storage, read> e: array<u32>;
            @group(0) @binding(5) var<storage, read> f: array<u32>;
            @group(0) @binding(6) var<storage, read_write> y: array<u32>;
            @compute @workgroup_size(64)
            fn main() { y[0] = a[0] + b[0] + c[0] + d[0] + e[0] + f[0]; }";
        let source = wgpu::ShaderSource::Wgsl(EMPTY.into());
        let module = self
            .device
            .create_shader_module(wgpu::ShaderModuleDescriptor {
                label: None,
                source,
            });
        let pipeline = self
            .device
            .create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                label: None,
                layout: None,
                module: &module,
                entry_point: None,
                compilation_options: wgpu::PipelineCompilationOptions::default(),
                cache: None,
            });
        let layout = pipeline.get_bind_group_layout(0);
        let group = |_| {
            let buffer = |_| self.buffer(64, wgpu::BufferUsages::STORAGE);
            let buffers = (0..7).map(buffer).collect::<Result<Vec<_>>>()?;
            let entries = (0..)
                .zip(&buffers)
                .map(|(binding, buffer)| wgpu::BindGroupEntry {
                    binding,
                    resource: buffer.as_entire_binding(),
                });
            let entries: Vec<_> = entries.collect();
            Ok(self.device.create_bind_group(&wgpu::BindGroupDescriptor {
                label: None,
                layout: &layout,
                entries: &entries,
            }))
        };
        let groups = (0..n).map(group).collect::<Result<Vec<_>>>()?;
        let mut times = Vec::new();
        for round in 0..=rounds {
            self.finish()?;
            let started = Instant::now();
            let mut encoder = self
                .device
                .create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            {
                let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
                for group in &groups {
                    pass.set_pipeline(&pipeline);
                    pass.set_bind_group(0, group, &[]);
                    pass.dispatch_workgroups(1, 1, 1);
                }
            }
            self.queue.submit([encoder.finish()]);
            if round > 0 {
                times.push(started.elapsed().as_secs_f64());
            }
        }
        Ok(Samples::new(times))
    }
}
