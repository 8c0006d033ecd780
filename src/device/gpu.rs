//! The player for Vulkan adapters: wgpu, one compute pass for each recording.

use std::collections::HashMap;
use std::hash::{Hash, Hasher};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, MutexGuard};

use super::compose::Variant;
use super::op::{Kernel, Run, Wgsl};
use super::pipeline::{Pipeline, Pipelines};
use super::tensor::{Storage, WeakTensor, padded_bytes};
use super::{Caps, DType, Dispatch, Recording, Tensor, Upload, adapters};
use crate::{Error, Result};

/// Uploads go through the queue in pieces, each submitted: staging memory is freed by submission.
const UPLOAD_PIECE: usize = 16 << 20;

/// Bytes of a tensor that is given no memory to speak of.
const HOLLOW: usize = 4 << 10;

/// A Vulkan adapter, opened.
#[derive(Debug)]
pub struct Gpu {
    name: String,
    caps: Caps,
    pub(super) device: wgpu::Device,
    pub(super) queue: wgpu::Queue,
    max_tensor_bytes: usize,
    memory: Option<u64>,
    max_groups: u32,
    /// Distance of two dispatches' parameters in the uniform buffer, in bytes.
    stride: usize,
    /// Whether tensors that hold weights or a cache are given no memory: nothing is computed with them.
    hollow: bool,
    /// The first thing that went wrong outside an error scope, or the loss of the device.
    failure: Arc<Mutex<Option<String>>>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    pipelines: Pipelines,
    params: Option<wgpu::Buffer>,
    groups: HashMap<Binding, BindGroup>,
    /// Buffers to read back through that nobody uses.
    staging: Vec<wgpu::Buffer>,
}

/// Commands that were encoded but not submitted.
#[derive(Debug)]
pub struct Prepared {
    uploads: Vec<Upload>,
    params: wgpu::Buffer,
    params_bytes: Vec<u8>,
    commands: wgpu::CommandBuffer,
    readback: Readback,
}

/// Commands that were submitted, and what is read back when they have run.
#[derive(Debug)]
pub struct Running {
    index: wgpu::SubmissionIndex,
    readback: Readback,
}

/// Memory that is mapped once the commands that copy to it have run.
#[derive(Debug)]
struct Readback {
    staging: wgpu::Buffer,
    len: usize,
    mapped: Receiver<std::result::Result<(), wgpu::BufferAsyncError>>,
}

/// A dispatch, and what every other of the same parameters and shapes comes to.
struct Kind<'a> {
    dispatch: &'a Dispatch,
    kernel: &'a Kernel,
    groups: [u32; 3],
    pipeline: Pipeline,
}

impl Kind<'_> {
    fn is_of(&self, dispatch: &Dispatch, kernel: &Kernel) -> bool {
        std::ptr::eq(self.kernel, kernel)
            && self.dispatch.params == dispatch.params
            && self
                .dispatch
                .args
                .iter()
                .zip(&dispatch.args)
                .all(|(a, b)| a.dtype() == b.dtype() && a.shape() == b.shape())
    }
}

/// A pipeline and the ids of the tensors that are bound to it.
#[derive(Debug, PartialEq, Eq)]
struct Binding {
    pipeline: usize,
    tensors: [u64; MOST_ARGS],
}

/// Most arguments of an op; adapters bind at least ten buffers.
const MOST_ARGS: usize = 12;

impl Hash for Binding {
    fn hash<H: Hasher>(&self, state: &mut H) {
        // One word for all: a lookup for each dispatch is on the way of every token.
        let mix = |h: u64, id: &u64| (h ^ id).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
        state.write_u64(self.tensors.iter().fold(self.pipeline as u64, mix));
    }
}

#[derive(Debug)]
struct BindGroup {
    group: wgpu::BindGroup,
    tensors: Vec<WeakTensor>,
}

impl Gpu {
    /// Opens an adapter with the features and limits that it has.
    ///
    /// # Errors
    /// [`Error::Device`] if it lacks subgroups or cannot be opened.
    pub(super) fn open(adapter: &wgpu::Adapter) -> Result<Self> {
        let info = adapter.get_info();
        let fail = |problem: String| Error::Device {
            device: info.name.clone(),
            problem,
        };
        if !adapter.features().contains(wgpu::Features::SUBGROUP) {
            return Err(fail(
                "has no subgroup operations; use another --device".into(),
            ));
        }
        let optional =
            wgpu::Features::TIMESTAMP_QUERY | wgpu::Features::TIMESTAMP_QUERY_INSIDE_PASSES;
        let limits = adapter.limits();
        let matrix = matrix_size(adapter);
        let experimental = if matrix == 0 {
            wgpu::ExperimentalFeatures::disabled()
        } else {
            // SAFETY: cooperative matrices are the one experimental feature that is asked for. The kernel
            // that uses them is judged by the op's cases like any other, with bounds checks.
            #[expect(unsafe_code, reason = "wgpu marks experimental features so")]
            unsafe {
                wgpu::ExperimentalFeatures::enabled()
            }
        };
        let for_matrices =
            wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX | wgpu::Features::SHADER_F16;
        let (device, queue) = pollster::block_on(adapter.request_device(&wgpu::DeviceDescriptor {
            label: Some("hogwild"),
            required_features: wgpu::Features::SUBGROUP
                | (adapter.features() & optional)
                | if matrix == 0 {
                    wgpu::Features::empty()
                } else {
                    for_matrices
                },
            experimental_features: experimental,
            required_limits: limits.clone(),
            ..Default::default()
        }))
        .map_err(|e| fail(e.to_string()))?;
        let failure = Arc::new(Mutex::new(None));
        let (seen, lost) = (failure.clone(), failure.clone());
        device.on_uncaptured_error(Arc::new(move |e: wgpu::Error| {
            remember(&seen, e.to_string());
        }));
        device.set_device_lost_callback(move |_, message| {
            let why = if message.is_empty() {
                "the driver does not say why"
            } else {
                &message
            };
            remember(&lost, format!("was lost: {why}"));
        });
        let align = limits.min_uniform_buffer_offset_alignment.max(64);
        let max = limits
            .max_storage_buffer_binding_size
            .min(limits.max_buffer_size);
        Ok(Self {
            name: info.name,
            caps: Caps {
                subgroup: (info.subgroup_min_size, info.subgroup_max_size),
                workgroup_bytes: limits.max_compute_workgroup_storage_size,
                lanes: limits
                    .max_compute_invocations_per_workgroup
                    .min(limits.max_compute_workgroup_size_x),
                matrix,
            },
            device,
            queue,
            max_tensor_bytes: usize::try_from(max).unwrap_or(usize::MAX) & !3,
            memory: adapters::memory(adapter),
            max_groups: limits.max_compute_workgroups_per_dimension,
            stride: align as usize,
            hollow: info.backend == wgpu::Backend::Noop,
            failure,
            state: Mutex::default(),
        })
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn caps(&self) -> Caps {
        self.caps
    }

    pub(super) fn max_tensor_bytes(&self) -> usize {
        self.max_tensor_bytes
    }

    pub(super) fn memory(&self) -> Option<u64> {
        self.memory
    }

    /// Takes the device away, as a driver does that was reset.
    pub(super) fn lose(&self) {
        self.device.destroy();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of the state panics")
    }

    pub(super) fn error(&self, problem: impl Into<String>) -> Error {
        Error::Device {
            device: self.name.clone(),
            problem: problem.into(),
        }
    }

    pub(super) fn healthy(&self) -> Result<()> {
        match &*self
            .failure
            .lock()
            .expect("no holder of the failure panics")
        {
            Some(problem) => Err(self.error(problem.clone())),
            None => Ok(()),
        }
    }

    pub(super) fn buffer(&self, bytes: usize, usage: wgpu::BufferUsages) -> Result<wgpu::Buffer> {
        let guards = [
            wgpu::ErrorFilter::Validation,
            wgpu::ErrorFilter::OutOfMemory,
        ]
        .map(|filter| self.device.push_error_scope(filter));
        let buffer = self.device.create_buffer(&wgpu::BufferDescriptor {
            label: None,
            size: bytes as u64,
            usage,
            mapped_at_creation: false,
        });
        for guard in guards.into_iter().rev() {
            if let Some(error) = pollster::block_on(guard.pop()) {
                let advice = "use a shorter --context, a narrower --kv-dtype or another --device";
                return Err(self.error(format!(
                    "cannot hold {bytes} more bytes ({error}); {advice}"
                )));
            }
        }
        Ok(buffer)
    }

    pub(super) fn tensor(&self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        // Bind groups of tensors that are gone would keep their memory.
        self.state()
            .groups
            .retain(|_, g| g.tensors.iter().all(WeakTensor::is_alive));
        let bytes = padded_bytes(
            dtype
                .bytes(shape.iter().product())
                .expect("the caller checked"),
        );
        let filled = matches!(dtype, DType::F32 | DType::U32);
        let bytes = if self.hollow && !filled {
            bytes.min(HOLLOW)
        } else {
            bytes
        };
        let usage = wgpu::BufferUsages::STORAGE
            | wgpu::BufferUsages::COPY_DST
            | wgpu::BufferUsages::COPY_SRC;
        Ok(Tensor::new(
            shape,
            dtype,
            Storage::Gpu(self.buffer(bytes, usage)?),
        ))
    }

    pub(super) fn write(&self, to: &Tensor, offset: usize, bytes: &[u8]) -> Result<()> {
        for (i, piece) in bytes.chunks(UPLOAD_PIECE).enumerate() {
            self.queue
                .write_buffer(buffer(to), (offset + i * UPLOAD_PIECE) as u64, piece);
            if bytes.len() > UPLOAD_PIECE / 16 {
                let index = self.queue.submit([]);
                self.until(index)?;
            }
        }
        self.healthy()
    }

    /// Waits until all that was submitted has run.
    pub(super) fn finish(&self) -> Result<()> {
        self.device
            .poll(wgpu::PollType::wait_indefinitely())
            .map_err(|e| self.error(format!("did not finish: {e}")))?;
        self.healthy()
    }

    /// Waits until a submission has run.
    pub(super) fn until(&self, index: wgpu::SubmissionIndex) -> Result<()> {
        self.device
            .poll(wgpu::PollType::Wait {
                submission_index: Some(index),
                timeout: None,
            })
            .map_err(|e| {
                // A loss, which polling lets wgpu tell, says more than what came of it.
                let _ = self.device.poll(wgpu::PollType::Poll);
                let unfinished = || self.error(format!("did not finish: {e}"));
                self.healthy().err().unwrap_or_else(unfinished)
            })?;
        self.healthy()
    }

    pub(super) fn read(&self, from: &Tensor, offset: usize, len: usize) -> Result<Vec<u8>> {
        let mut encoder = self
            .device
            .create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let readback = self.read_back(&mut encoder, from, offset, len)?;
        let index = self.queue.submit([encoder.finish()]);
        self.wait(Running { index, readback })
    }

    /// Encodes a copy of `len` bytes to memory that is mapped as soon as the commands have run.
    fn read_back(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        from: &Tensor,
        offset: usize,
        len: usize,
    ) -> Result<Readback> {
        let size = padded_bytes(len) as u64;
        let kept = {
            let staging = &mut self.state().staging;
            let found = staging.iter().position(|s| s.size() >= size);
            found.map(|at| staging.swap_remove(at))
        };
        let staging = if let Some(staging) = kept {
            staging
        } else {
            let usage = wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::MAP_READ;
            self.buffer(padded_bytes(len).next_power_of_two(), usage)?
        };
        encoder.copy_buffer_to_buffer(buffer(from), offset as u64, &staging, 0, size);
        let (sender, mapped) = channel();
        encoder.map_buffer_on_submit(&staging, wgpu::MapMode::Read, 0..size, move |result| {
            // The receiver is gone only where nobody wants the bytes any more.
            let _ = sender.send(result);
        });
        Ok(Readback {
            staging,
            len,
            mapped,
        })
    }

    pub(super) fn wait(&self, running: Running) -> Result<Vec<u8>> {
        let Running { index, readback } = running;
        self.until(index)?;
        let fail = |e: String| self.error(format!("memory could not be read back: {e}"));
        match readback.mapped.recv() {
            Ok(Ok(())) => {}
            Ok(Err(e)) => return Err(fail(e.to_string())),
            Err(e) => return Err(fail(e.to_string())),
        }
        let Readback { staging, len, .. } = readback;
        let mapped = staging
            .get_mapped_range(0..padded_bytes(len) as u64)
            .map_err(|e| fail(e.to_string()))?;
        let bytes = mapped[..len].to_vec();
        drop(mapped);
        staging.unmap();
        // A large staging buffer is not kept: it would double the memory of what was read once.
        if staging.size() <= UPLOAD_PIECE as u64 {
            self.state().staging.push(staging);
        }
        Ok(bytes)
    }

    pub(super) fn kernel(&self, dispatch: &Dispatch) -> Result<&'static Kernel> {
        let fits = |k: &&Kernel| matches!(k.run, Run::Wgsl(_)) && (k.fits)(dispatch, &self.caps);
        dispatch.op.kernels.iter().find(fits).ok_or_else(|| {
            let dtypes: Vec<_> = dispatch.args.iter().map(|t| t.dtype().name()).collect();
            let op = dispatch.op.name;
            self.error(format!(
                "no kernel of {op} serves {:?} with {dtypes:?}",
                dispatch.params
            ))
        })
    }

    /// Compiles a variant of a shader without runtime checks from now on.
    pub(super) fn trust(&self, wgsl: &Wgsl, variant: Variant) {
        self.state().pipelines.trust(wgsl, variant);
    }

    pub(super) fn play(&self, recording: &Recording) -> Result<()> {
        let work = self.kernels(recording)?;
        let (params, params_bytes, encoder) = self.encode(&work, None)?;
        self.upload(&recording.uploads);
        self.queue.write_buffer(&params, 0, &params_bytes);
        self.queue.submit([encoder.finish()]);
        self.healthy()
    }

    pub(super) fn run(&self, dispatch: &Dispatch, kernel: &Kernel) -> Result<()> {
        let (params, params_bytes, encoder) = self.encode(&[(dispatch, kernel)], None)?;
        self.queue.write_buffer(&params, 0, &params_bytes);
        self.queue.submit([encoder.finish()]);
        self.healthy()
    }

    pub(super) fn prepare(
        &self,
        recording: Recording,
        (from, len): (&Tensor, usize),
    ) -> Result<Prepared> {
        let work = self.kernels(&recording)?;
        let (params, params_bytes, mut encoder) = self.encode(&work, None)?;
        let readback = self.read_back(&mut encoder, from, 0, len)?;
        Ok(Prepared {
            uploads: recording.uploads,
            params,
            params_bytes,
            commands: encoder.finish(),
            readback,
        })
    }

    pub(super) fn submit(&self, prepared: Prepared, late: &[Upload]) -> Result<Running> {
        // The queue keeps its order: nothing here is written before what runs now has ended.
        let is_late = |upload: &&Upload| late.iter().any(|l| l.to.id() == upload.to.id());
        self.upload(prepared.uploads.iter().filter(|upload| !is_late(upload)));
        self.upload(late);
        self.queue
            .write_buffer(&prepared.params, 0, &prepared.params_bytes);
        let index = self.queue.submit([prepared.commands]);
        self.healthy()?;
        Ok(Running {
            index,
            readback: prepared.readback,
        })
    }

    fn upload<'a>(&self, uploads: impl IntoIterator<Item = &'a Upload>) {
        for upload in uploads {
            let mut bytes = std::borrow::Cow::from(&upload.bytes);
            if !bytes.len().is_multiple_of(4) {
                let len = bytes.len().next_multiple_of(4);
                bytes.to_mut().resize(len, 0);
            }
            self.queue.write_buffer(buffer(&upload.to), 0, &bytes);
        }
    }

    fn kernels<'a>(&self, recording: &'a Recording) -> Result<Vec<(&'a Dispatch, &'a Kernel)>> {
        let kernels = recording.dispatches.iter();
        kernels.map(|d| Ok((d, self.kernel(d)?))).collect()
    }

    /// Encodes dispatches; gives the buffer of their parameters and what is to be written to it first.
    /// `stamps` takes the time before each dispatch and after the last.
    pub(super) fn encode(
        &self,
        work: &[(&Dispatch, &Kernel)],
        stamps: Option<&wgpu::QuerySet>,
    ) -> Result<(wgpu::Buffer, Vec<u8>, wgpu::CommandEncoder)> {
        let stamp = |pass: &mut wgpu::ComputePass<'_>, at: usize| {
            if let Some(set) = stamps {
                pass.write_timestamp(set, u32::try_from(at).expect("recordings are short"));
            }
        };
        let mut state = self.state();
        let state = &mut *state;
        let (params, params_bytes) = self.params(state, work)?;
        let mut encoder = self
            .device
            .create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        {
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
            // Layers dispatch the same kinds over and over.
            let mut kinds: Vec<Kind<'_>> = Vec::new();
            for (i, &(dispatch, kernel)) in work.iter().enumerate() {
                stamp(&mut pass, i);
                let known = kinds.iter().position(|kind| kind.is_of(dispatch, kernel));
                let at = known.unwrap_or(kinds.len());
                if known.is_none() {
                    kinds.push(self.kind(&mut state.pipelines, dispatch, kernel)?);
                }
                let Kind {
                    groups, pipeline, ..
                } = &kinds[at];
                if groups.contains(&0) {
                    continue;
                }
                let offset = u32::try_from(i * self.stride).expect("recordings are short");
                pass.set_pipeline(&pipeline.compute);
                let group = self.bind_group(&mut state.groups, &params, pipeline, dispatch);
                pass.set_bind_group(0, group, &[offset]);
                pass.dispatch_workgroups(groups[0], groups[1], groups[2]);
            }
            stamp(&mut pass, work.len());
        }
        Ok((params, params_bytes, encoder))
    }

    /// What a dispatch comes to, whatever its tensors.
    fn kind<'a>(
        &self,
        pipelines: &mut Pipelines,
        dispatch: &'a Dispatch,
        kernel: &'a Kernel,
    ) -> Result<Kind<'a>> {
        let Run::Wgsl(wgsl) = &kernel.run else {
            panic!("kernel {} is not a shader", kernel.name)
        };
        let groups = (wgsl.groups)(dispatch, &self.caps);
        if let Some(&most) = groups.iter().max().filter(|&&n| n > self.max_groups) {
            return Err(Error::Limit {
                what: format!("op {}", dispatch.op.name),
                need: format!("{most} workgroups"),
                have: format!("{} in one dimension", self.max_groups),
                advice: "use a shorter prompt or context".into(),
            });
        }
        let variant = Variant::of(wgsl, dispatch, &self.caps);
        let pipeline = pipelines.get(&self.device, dispatch.op, wgsl, variant)?;
        Ok(Kind {
            dispatch,
            kernel,
            groups,
            pipeline,
        })
    }

    /// The parameters of all dispatches, `stride` bytes apart, and the one uniform buffer for them.
    fn params(
        &self,
        state: &mut State,
        work: &[(&Dispatch, &Kernel)],
    ) -> Result<(wgpu::Buffer, Vec<u8>)> {
        let mut bytes = vec![0; self.stride * work.len().max(1)];
        for (slot, (dispatch, _)) in bytes.chunks_exact_mut(self.stride).zip(work) {
            let params = dispatch.params.as_bytes();
            slot[..params.len()].copy_from_slice(params);
        }
        let len = bytes.len() as u64;
        if let Some(params) = state.params.as_ref().filter(|p| p.size() >= len) {
            return Ok((params.clone(), bytes));
        }
        let usage = wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST;
        let params = self.buffer(bytes.len().next_power_of_two(), usage)?;
        state.params = Some(params.clone());
        state.groups.clear();
        Ok((params, bytes))
    }

    fn bind_group<'a>(
        &self,
        groups: &'a mut HashMap<Binding, BindGroup>,
        params: &wgpu::Buffer,
        pipeline: &Pipeline,
        dispatch: &Dispatch,
    ) -> &'a wgpu::BindGroup {
        let mut tensors = [u64::MAX; MOST_ARGS];
        for (id, tensor) in tensors[..dispatch.args.len()]
            .iter_mut()
            .zip(&dispatch.args)
        {
            *id = tensor.id();
        }
        let key = Binding {
            pipeline: pipeline.id,
            tensors,
        };
        let make = || {
            let uniform = wgpu::BufferBinding {
                buffer: params,
                offset: 0,
                size: std::num::NonZeroU64::new(64),
            };
            let mut entries = vec![wgpu::BindGroupEntry {
                binding: 0,
                resource: wgpu::BindingResource::Buffer(uniform),
            }];
            for (binding, tensor) in (1..).zip(&dispatch.args) {
                let resource = buffer(tensor).as_entire_binding();
                entries.push(wgpu::BindGroupEntry { binding, resource });
            }
            let group = self.device.create_bind_group(&wgpu::BindGroupDescriptor {
                label: Some(dispatch.op.name),
                layout: &pipeline.layout,
                entries: &entries,
            });
            BindGroup {
                group,
                tensors: dispatch.args.iter().map(Tensor::downgrade).collect(),
            }
        };
        &groups.entry(key).or_insert_with(make).group
    }
}

/// Size of the adapter's cooperative matrices that multiply f16 and add up in f32, the largest that kernels
/// know; zero where there are none.
fn matrix_size(adapter: &wgpu::Adapter) -> u32 {
    use wgpu::CooperativeScalarType::{F16, F32};
    let features = wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX | wgpu::Features::SHADER_F16;
    if !adapter.features().contains(features) {
        return 0;
    }
    let all = adapter.cooperative_matrix_properties();
    let has = |size: &u32| {
        all.iter().any(|m| {
            [m.m_size, m.n_size, m.k_size] == [*size; 3] && m.ab_type == F16 && m.cr_type == F32
        })
    };
    [16, 8].into_iter().find(has).unwrap_or(0)
}

fn remember(failure: &Mutex<Option<String>>, problem: String) {
    let mut failure = failure.lock().expect("no holder of the failure panics");
    failure.get_or_insert(problem);
}

pub(super) fn buffer(tensor: &Tensor) -> &wgpu::Buffer {
    match tensor.storage() {
        Storage::Gpu(buffer) => buffer,
        Storage::Cpu(_) => panic!("a tensor of the CPU was given to a GPU"),
    }
}
