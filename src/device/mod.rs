//! Devices, and what runs on them.
//!
//! An [`Op`] is a contract; a [`Recording`] lists dispatches of ops as plain data; a [`Device`] plays
//! it. The GPU player runs WGSL kernels through wgpu, the CPU player runs Rust ones, and the judge
//! holds both to the op's reference. Invariant: nothing outside this module names `wgpu` or `naga`.

mod adapters;
mod compose;
mod cpu;
mod gpu;
pub mod judge;
mod measure;
mod op;
mod pipeline;
mod recording;
mod tensor;
mod traffic;

pub use adapters::{AdapterReport, Choice, adapters, choose, choose_all, gpus};
pub use compose::{Composed, PARTS, Variant, compose};
pub use cpu::{Cpu, CpuReport};
pub use gpu::Gpu;
pub use measure::{Memory, Samples};
pub use op::{
    Access, Args, Bound, Case, CaseArg, Data, Ints, Kernel, Loads, Op, ParamBytes, Run, Tolerance,
    View, Wgsl, always,
};
pub use pipeline::reflect;
pub use recording::{Dispatch, Recording, Upload};
pub use tensor::{DType, Tensor, e4m3};
pub use traffic::{Traffic, traffic};

use crate::{Error, Result};

/// Something that holds tensors and plays recordings.
#[derive(Debug)]
pub enum Device {
    /// WGSL kernels on a Vulkan adapter.
    Gpu(Box<Gpu>),
    /// Rust kernels on the host.
    Cpu(Cpu),
}

/// A recording that needs no more than to be submitted; dropped, it never runs.
#[derive(Debug)]
pub enum Prepared {
    /// Encoded commands.
    Gpu(gpu::Prepared),
    /// The recording itself, and what is to be read.
    Cpu(Recording, (Tensor, usize)),
}

/// A recording that was submitted; dropped, its result is not read.
#[derive(Debug)]
pub enum Running {
    /// Somewhere in the queue.
    Gpu(gpu::Running),
    /// It runs when it is waited for.
    Cpu(Recording, (Tensor, usize)),
}

/// What kernels may ask of a device.
#[derive(Clone, Copy, Debug)]
pub struct Caps {
    /// Smallest and largest subgroup; zero on the CPU.
    pub subgroup: (u32, u32),
    /// Workgroup memory in bytes; zero on the CPU.
    pub workgroup_bytes: u32,
    /// Most lanes of a workgroup; zero on the CPU.
    pub lanes: u32,
    /// Size of the cooperative matrices that multiply f16 and add up in f32; zero where there are none.
    pub matrix: u32,
}

impl Caps {
    /// The CPU's.
    pub const fn cpu() -> Self {
        Self {
            subgroup: (0, 0),
            workgroup_bytes: 0,
            lanes: 0,
            matrix: 0,
        }
    }
}

impl Device {
    /// The CPU path.
    pub fn cpu() -> Self {
        Self::Cpu(Cpu)
    }

    /// Opens `auto`, `cpu`, or an adapter by part of its name.
    ///
    /// # Errors
    /// [`Error::NoAdapter`] if nothing matches; [`Error::Device`] if the adapter cannot be opened.
    pub fn open(wanted: &str) -> Result<Self> {
        Self::of(&choose(wanted)?)
    }

    /// Opens what was chosen.
    ///
    /// # Errors
    /// [`Error::Device`] if the adapter cannot be opened.
    pub fn of(choice: &Choice) -> Result<Self> {
        Ok(match choice {
            Choice::Cpu { .. } => Self::cpu(),
            Choice::Adapter(adapter) => Self::Gpu(Box::new(Gpu::open(adapter)?)),
        })
    }

    /// The adapter's name, or `cpu`.
    pub fn name(&self) -> String {
        match self {
            Self::Gpu(gpu) => gpu.name().to_owned(),
            Self::Cpu(_) => "cpu".to_owned(),
        }
    }

    /// What kernels may ask of it.
    pub fn caps(&self) -> Caps {
        match self {
            Self::Gpu(gpu) => gpu.caps(),
            Self::Cpu(_) => Caps::cpu(),
        }
    }

    /// The largest tensor, in bytes.
    pub fn max_tensor_bytes(&self) -> usize {
        match self {
            Self::Gpu(gpu) => gpu.max_tensor_bytes(),
            // The same bound as on NVIDIA, so that both paths split alike.
            Self::Cpu(_) => (1 << 31) - 1,
        }
    }

    /// Bytes that it may still give, as far as is known: what the system calls available, or a GPU's
    /// largest heap.
    pub fn memory(&self) -> Option<u64> {
        match self {
            Self::Gpu(gpu) => gpu.memory(),
            Self::Cpu(_) => Cpu::memory(),
        }
    }

    /// Takes a GPU away under whoever uses it, to test what follows; does nothing on the CPU.
    #[doc(hidden)]
    pub fn lose(&self) {
        if let Self::Gpu(gpu) = self {
            gpu.lose();
        }
    }

    /// A new tensor, filled with zeros.
    ///
    /// # Errors
    /// [`Error::Limit`] if it is larger than the device binds; [`Error::Device`] out of memory.
    pub fn tensor(&self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        let elements = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        let bytes = elements.and_then(|n| dtype.bytes(n)).unwrap_or(usize::MAX);
        if bytes > self.max_tensor_bytes() {
            return Err(Error::Limit {
                what: format!("a tensor of shape {shape:?} in {dtype}"),
                need: format!("{bytes} bytes"),
                have: format!(
                    "{} bytes in one binding of {}",
                    self.max_tensor_bytes(),
                    self.name()
                ),
                advice: "use a shorter --context or another device".into(),
            });
        }
        match self {
            Self::Gpu(gpu) => gpu.tensor(shape, dtype),
            Self::Cpu(_) => Ok(Cpu::tensor(shape, dtype)),
        }
    }

    /// Copies bytes into a tensor at a byte offset (a multiple of 4, as is the length).
    ///
    /// # Errors
    /// [`Error::Device`] if the device was lost.
    pub fn write(&self, to: &Tensor, offset: usize, bytes: &[u8]) -> Result<()> {
        match self {
            Self::Gpu(gpu) => gpu.write(to, offset, bytes),
            Self::Cpu(_) => {
                Cpu::write(to, offset, bytes);
                Ok(())
            }
        }
    }

    /// A new tensor with the given contents.
    ///
    /// # Errors
    /// Those of [`Device::tensor`].
    ///
    /// # Panics
    /// If the shape does not fit the data.
    pub fn upload<T: bytemuck::Pod>(
        &self,
        shape: &[usize],
        dtype: DType,
        data: &[T],
    ) -> Result<Tensor> {
        let bytes: &[u8] = bytemuck::cast_slice(data);
        let tensor = self.tensor(shape, dtype)?;
        assert_eq!(bytes.len(), tensor.bytes(), "the data fills the shape");
        let mut padded = bytes.to_vec();
        padded.resize(tensor::padded_bytes(bytes.len()), 0);
        self.write(&tensor, 0, &padded)?;
        Ok(tensor)
    }

    /// Copies bytes out of a tensor, from a byte offset that is a multiple of 4.
    ///
    /// # Errors
    /// [`Error::Device`] if the device was lost.
    pub fn read(&self, from: &Tensor, offset: usize, len: usize) -> Result<Vec<u8>> {
        match self {
            Self::Gpu(gpu) => gpu.read(from, offset, len),
            Self::Cpu(_) => Ok(Cpu::read(from, offset, len)),
        }
    }

    /// The first `count` elements of an f32 tensor.
    ///
    /// # Errors
    /// Those of [`Device::read`].
    ///
    /// # Panics
    /// If the tensor is of another type.
    pub fn read_f32(&self, from: &Tensor, count: usize) -> Result<Vec<f32>> {
        assert_eq!(from.dtype(), DType::F32, "read_f32 reads f32");
        Ok(bytemuck::pod_collect_to_vec(&self.read(
            from,
            0,
            count * 4,
        )?))
    }

    /// Plays a recording: its uploads, then its dispatches.
    ///
    /// # Errors
    /// [`Error::Device`] if the device fails; [`Error::Shader`] if a kernel does not compile.
    pub fn play(&self, recording: &Recording) -> Result<()> {
        match self {
            Self::Gpu(gpu) => gpu.play(recording),
            Self::Cpu(_) => {
                Cpu::play(recording);
                Ok(())
            }
        }
    }

    /// Makes everything of a recording ready but its uploads, so that submitting it takes little time.
    ///
    /// The first bytes of the tensor `read` are what [`Device::wait`] will give.
    ///
    /// # Errors
    /// Those of [`Device::play`].
    pub fn prepare(&self, recording: Recording, read: (&Tensor, usize)) -> Result<Prepared> {
        Ok(match self {
            Self::Gpu(gpu) => Prepared::Gpu(gpu.prepare(recording, read)?),
            Self::Cpu(_) => Prepared::Cpu(recording, (read.0.clone(), read.1)),
        })
    }

    /// Starts a recording: its uploads, then those that were not known when it was recorded and replace
    /// what it has for their tensors, then its dispatches, all after what was submitted before.
    ///
    /// # Errors
    /// [`Error::Device`] if the device fails.
    ///
    /// # Panics
    /// If it was prepared for another device.
    pub fn submit(&self, prepared: Prepared, late: &[Upload]) -> Result<Running> {
        match (self, prepared) {
            (Self::Gpu(gpu), Prepared::Gpu(prepared)) => {
                Ok(Running::Gpu(gpu.submit(prepared, late)?))
            }
            (Self::Cpu(_), Prepared::Cpu(mut recording, read)) => {
                recording.uploads.extend_from_slice(late);
                Ok(Running::Cpu(recording, read))
            }
            _ => panic!("a recording was prepared for another device"),
        }
    }

    /// Waits until a recording has run, and gives what was to be read.
    ///
    /// The CPU has nobody else to run it: it runs here, or not at all.
    ///
    /// # Errors
    /// [`Error::Device`] if the device fails.
    ///
    /// # Panics
    /// If the recording runs on another device.
    pub fn wait(&self, running: Running) -> Result<Vec<u8>> {
        match (self, running) {
            (Self::Gpu(gpu), Running::Gpu(running)) => gpu.wait(running),
            (Self::Cpu(_), Running::Cpu(recording, (tensor, len))) => {
                Cpu::play(&recording);
                Ok(Cpu::read(&tensor, 0, len))
            }
            _ => panic!("a recording runs on another device"),
        }
    }

    /// The kernel that would serve a dispatch here; `None` means the reference (CPU only).
    ///
    /// # Errors
    /// [`Error::Device`] if a GPU has no kernel for it.
    pub fn kernel(&self, dispatch: &Dispatch) -> Result<Option<&'static Kernel>> {
        match self {
            Self::Gpu(gpu) => gpu.kernel(dispatch).map(Some),
            Self::Cpu(_) => Ok(Cpu::kernel(dispatch)),
        }
    }

    /// Runs one dispatch with a kernel of choice.
    ///
    /// # Errors
    /// Those of [`Device::play`].
    ///
    /// # Panics
    /// If the kernel is not of this device's kind.
    pub fn run(&self, dispatch: &Dispatch, kernel: &Kernel) -> Result<()> {
        match (self, &kernel.run) {
            (Self::Gpu(gpu), Run::Wgsl(_)) => gpu.run(dispatch, kernel),
            (Self::Cpu(_), Run::Cpu(_)) => {
                Cpu::run(dispatch, Some(kernel));
                Ok(())
            }
            _ => panic!("kernel {} runs on another kind of device", kernel.name),
        }
    }
}
