//! The player for Vulkan adapters: wgpu, one compute pass for each recording.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use super::compose::Variant;
use super::op::{Kernel, Run};
use super::pipeline::{Pipeline, Pipelines};
use super::tensor::{Storage, WeakTensor, padded_bytes};
use super::{Caps, DType, Dispatch, Recording, Tensor};
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
    groups: HashMap<(usize, Vec<u64>), BindGroup>,
    staging: Option<wgpu::Buffer>,
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
        device.set_device_lost_callback(move |reason, message| {
            if reason != wgpu::DeviceLostReason::Destroyed {
                remember(&lost, format!("was lost: {message}"));
            }
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
                matrix,
            },
            device,
            queue,
            max_tensor_bytes: usize::try_from(max).unwrap_or(usize::MAX) & !3,
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
                self.wait(Some(index))?;
            }
        }
        self.healthy()
    }

    pub(super) fn wait(&self, submission_index: Option<wgpu::SubmissionIndex>) -> Result<()> {
        self.device
            .poll(wgpu::PollType::Wait {
                submission_index,
                timeout: None,
            })
            .map_err(|e| self.error(format!("did not finish: {e}")))?;
        self.healthy()
    }

    pub(super) fn read(&self, from: &Tensor, offset: usize, len: usize) -> Result<Vec<u8>> {
        let size = padded_bytes(len) as u64;
        let mut state = self.state();
        let staging = match state.staging.take() {
            Some(staging) if staging.size() >= size => staging,
            _ => {
                let usage = wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::MAP_READ;
                self.buffer(padded_bytes(len).next_power_of_two(), usage)?
            }
        };
        let mut encoder = self
            .device
            .create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        encoder.copy_buffer_to_buffer(buffer(from), offset as u64, &staging, 0, size);
        let index = self.queue.submit([encoder.finish()]);
        let (sender, receiver) = std::sync::mpsc::channel();
        staging.map_async(wgpu::MapMode::Read, 0..size, move |result| {
            // The receiver is gone only if the wait below failed, which is reported there.
            let _ = sender.send(result);
        });
        self.wait(Some(index))?;
        match receiver.recv() {
            Ok(Ok(())) => {}
            Ok(Err(e)) => return Err(self.error(format!("memory could not be read back: {e}"))),
            Err(e) => return Err(self.error(format!("memory was not read back: {e}"))),
        }
        let mapped = staging
            .get_mapped_range(0..size)
            .map_err(|e| self.error(format!("memory could not be read back: {e}")))?;
        let bytes = mapped[..len].to_vec();
        drop(mapped);
        staging.unmap();
        // A large staging buffer is not kept: it would double the memory of what was read once.
        if size <= UPLOAD_PIECE as u64 {
            state.staging = Some(staging);
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

    pub(super) fn play(&self, recording: &Recording) -> Result<()> {
        for upload in &recording.uploads {
            let mut bytes = upload.bytes.clone();
            bytes.resize(bytes.len().next_multiple_of(4), 0);
            self.queue.write_buffer(buffer(&upload.to), 0, &bytes);
        }
        let kernels = recording
            .dispatches
            .iter()
            .map(|d| Ok((d, self.kernel(d)?)));
        self.submit(&kernels.collect::<Result<Vec<_>>>()?, None)
    }

    pub(super) fn run(&self, dispatch: &Dispatch, kernel: &Kernel) -> Result<()> {
        self.submit(&[(dispatch, kernel)], None)
    }

    /// Submits dispatches in one compute pass; `stamps` takes the time before each and after the last.
    pub(super) fn submit(
        &self,
        work: &[(&Dispatch, &Kernel)],
        stamps: Option<&wgpu::QuerySet>,
    ) -> Result<()> {
        let stamp = |pass: &mut wgpu::ComputePass<'_>, at: usize| {
            if let Some(set) = stamps {
                pass.write_timestamp(set, u32::try_from(at).expect("recordings are short"));
            }
        };
        let mut state = self.state();
        let state = &mut *state;
        self.write_params(state, work)?;
        let mut encoder = self
            .device
            .create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        {
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
            for (i, (dispatch, kernel)) in work.iter().enumerate() {
                stamp(&mut pass, i);
                let Run::Wgsl(wgsl) = &kernel.run else {
                    panic!("kernel {} is not a shader", kernel.name)
                };
                let groups = (wgsl.groups)(dispatch, &self.caps);
                if groups.contains(&0) {
                    continue;
                }
                if let Some(&most) = groups.iter().max().filter(|&&n| n > self.max_groups) {
                    return Err(Error::Limit {
                        what: format!("op {}", dispatch.op.name),
                        need: format!("{most} workgroups"),
                        have: format!("{} in one dimension", self.max_groups),
                        advice: "use a shorter prompt or context".into(),
                    });
                }
                let variant = Variant::of(wgsl, dispatch, &self.caps);
                let pipeline = state
                    .pipelines
                    .get(&self.device, dispatch.op, wgsl, variant)?;
                let offset = u32::try_from(i * self.stride).expect("recordings are short");
                let params = state.params.as_ref().expect("written above");
                pass.set_pipeline(&pipeline.compute);
                let group = self.bind_group(&mut state.groups, params, &pipeline, dispatch);
                pass.set_bind_group(0, group, &[offset]);
                pass.dispatch_workgroups(groups[0], groups[1], groups[2]);
            }
            stamp(&mut pass, work.len());
        }
        self.queue.submit([encoder.finish()]);
        self.healthy()
    }

    /// Writes the parameters of all dispatches to one uniform buffer, `stride` bytes apart.
    fn write_params(&self, state: &mut State, work: &[(&Dispatch, &Kernel)]) -> Result<()> {
        let mut bytes = vec![0; self.stride * work.len().max(1)];
        for (slot, (dispatch, _)) in bytes.chunks_exact_mut(self.stride).zip(work) {
            let params = dispatch.params.as_bytes();
            slot[..params.len()].copy_from_slice(params);
        }
        if state
            .params
            .as_ref()
            .is_none_or(|p| p.size() < bytes.len() as u64)
        {
            let usage = wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST;
            state.params = Some(self.buffer(bytes.len().next_power_of_two(), usage)?);
            state.groups.clear();
        }
        let params = state.params.as_ref().expect("set above");
        self.queue.write_buffer(params, 0, &bytes);
        Ok(())
    }

    fn bind_group<'a>(
        &self,
        groups: &'a mut HashMap<(usize, Vec<u64>), BindGroup>,
        params: &wgpu::Buffer,
        pipeline: &Pipeline,
        dispatch: &Dispatch,
    ) -> &'a wgpu::BindGroup {
        let key = (pipeline.id, dispatch.args.iter().map(Tensor::id).collect());
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
