//! Pipelines: compiled kernels, made once for each variant.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};

use super::compose::{Composed, Variant, compose};
use super::op::{Access, Op, Wgsl};
use crate::caught::caught;
use crate::{Error, Result};

/// A compiled kernel.
#[derive(Clone, Debug)]
pub(super) struct Pipeline {
    pub(super) id: usize,
    pub(super) compute: wgpu::ComputePipeline,
    pub(super) layout: wgpu::BindGroupLayout,
}

/// A text and what it is compiled for. The text's address tells kernels apart; a file from disk has one
/// of its own.
type Key = (usize, Variant);

/// Compiled kernels, and those that are compiled without runtime checks.
#[derive(Debug, Default)]
pub(super) struct Pipelines {
    compiled: HashMap<(Key, Checks), Pipeline>,
    trusted: HashSet<Key>,
}

/// Whether a shader's indices are checked as it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Checks {
    On,
    Off,
}

impl Pipelines {
    /// The pipeline of a variant, compiled on first use.
    pub(super) fn get(
        &mut self,
        device: &wgpu::Device,
        op: &Op,
        wgsl: &Wgsl,
        variant: Variant,
    ) -> Result<Pipeline> {
        let key = (wgsl.source.as_ptr() as usize, variant);
        let checks = if self.trusted.contains(&key) {
            Checks::Off
        } else {
            Checks::On
        };
        let key = (key, checks);
        if let Some(pipeline) = self.compiled.get(&key) {
            return Ok(pipeline.clone());
        }
        let variant = &key.0.1;
        let pipeline = build(device, op, wgsl, variant, checks, self.compiled.len())?;
        self.compiled.insert(key, pipeline.clone());
        Ok(pipeline)
    }

    /// Compiles a variant without runtime checks from now on.
    pub(super) fn trust(&mut self, wgsl: &Wgsl, variant: Variant) {
        self.trusted
            .insert((wgsl.source.as_ptr() as usize, variant));
    }
}

fn build(
    device: &wgpu::Device,
    op: &Op,
    wgsl: &Wgsl,
    variant: &Variant,
    checks: Checks,
    id: usize,
) -> Result<Pipeline> {
    let composed = compose(wgsl, variant)?;
    let reflected = reflect(&composed)?;
    agree(op, wgsl, &reflected)?;
    let entry =
        |binding: usize, ty: wgpu::BufferBindingType, dynamic: bool| wgpu::BindGroupLayoutEntry {
            binding: u32::try_from(binding).expect("ops have few arguments"),
            visibility: wgpu::ShaderStages::COMPUTE,
            ty: wgpu::BindingType::Buffer {
                ty,
                has_dynamic_offset: dynamic,
                min_binding_size: None,
            },
            count: None,
        };
    let mut entries = vec![entry(0, wgpu::BufferBindingType::Uniform, true)];
    for (i, (_, access)) in op.args.iter().enumerate() {
        let read_only = *access == Access::Read;
        entries.push(entry(
            i + 1,
            wgpu::BufferBindingType::Storage { read_only },
            false,
        ));
    }
    let guard = device.push_error_scope(wgpu::ErrorFilter::Validation);
    let label = Some(wgsl.file);
    let layout = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
        label,
        entries: &entries,
    });
    let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
        label,
        bind_group_layouts: &[Some(&layout)],
        immediate_size: 0,
    });
    let compile = || {
        let module = module(device, wgsl.file, &composed.text, checks);
        device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label,
            layout: Some(&pipeline_layout),
            module: &module,
            entry_point: Some("main"),
            compilation_options: wgpu::PipelineCompilationOptions {
                zero_initialize_workgroup_memory: false,
                ..Default::default()
            },
            cache: None,
        })
    };
    let fail = |message: String| Error::Shader {
        file: wgsl.file.to_owned(),
        line: 1,
        message,
    };
    // naga 30 validates some files that it then panics on; a file from disk must not end the process.
    let compute = caught(compile).ok_or_else(|| {
        fail(
            "the shader compiler panicked; a pointer to an element, &a[i], is known to do that"
                .into(),
        )
    })?;
    if let Some(error) = pollster::block_on(guard.pop()) {
        return Err(fail(error.to_string()));
    }
    Ok(Pipeline {
        id,
        compute,
        layout,
    })
}

/// Compiles a text, with the bounds of its indices and loops checked as it runs, or without.
#[expect(
    unsafe_code,
    reason = "checks cost time, and what is trusted has been seen to need none"
)]
fn module(device: &wgpu::Device, file: &str, text: &str, checks: Checks) -> wgpu::ShaderModule {
    let descriptor = wgpu::ShaderModuleDescriptor {
        label: Some(file),
        source: wgpu::ShaderSource::Wgsl(Cow::Borrowed(text)),
    };
    if checks == Checks::On {
        return device.create_shader_module(descriptor);
    }
    let unchecked = wgpu::ShaderRuntimeChecks::unchecked();
    // SAFETY: only `judge::trust` turns the checks off, for texts of this crate, and only after this very
    // text has passed every case of its op with the checks on, on this device. A kernel bounds its
    // indices by its params, which the op's verb derives from the shapes of the tensors it binds; its
    // loops end for the same reason.
    unsafe { device.create_shader_module_trusted(descriptor, unchecked) }
}

/// What a shader declares.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reflected {
    /// Members of the uniform at binding 0: name and byte offset.
    pub params: Vec<(String, u32)>,
    /// Bytes of the uniform.
    pub params_size: u32,
    /// Storage bindings in order, from binding 1: name, and whether it is written.
    pub args: Vec<(String, bool)>,
    /// Bytes of workgroup memory.
    pub workgroup_bytes: u32,
}

/// Reads a shader's bindings with naga; needs no GPU.
///
/// # Errors
/// [`Error::Shader`] if it does not compile or binds anything but one uniform and storage buffers.
pub fn reflect(composed: &Composed) -> Result<Reflected> {
    let (module, _) = composed.check()?;
    let mut out = Reflected {
        params: Vec::new(),
        params_size: 0,
        args: Vec::new(),
        workgroup_bytes: 0,
    };
    let mut args = std::collections::BTreeMap::new();
    for (_, variable) in module.global_variables.iter() {
        let ty = &module.types[variable.ty].inner;
        match (variable.space, &variable.binding) {
            (naga::AddressSpace::Uniform, Some(binding)) if binding.binding == 0 => {
                if let naga::TypeInner::Struct { members, span } = ty {
                    out.params_size = *span;
                    let name =
                        |m: &naga::StructMember| (m.name.clone().unwrap_or_default(), m.offset);
                    out.params = members.iter().map(name).collect();
                }
            }
            (naga::AddressSpace::Storage { access }, Some(binding)) => {
                let written = access.contains(naga::StorageAccess::STORE);
                args.insert(
                    binding.binding,
                    (variable.name.clone().unwrap_or_default(), written),
                );
            }
            (naga::AddressSpace::WorkGroup, _) => out.workgroup_bytes += ty.size(module.to_ctx()),
            _ => {}
        }
    }
    if args
        .keys()
        .copied()
        .ne(1..=u32::try_from(args.len()).unwrap_or(u32::MAX))
    {
        return Err(Error::Shader {
            file: composed.origin(usize::MAX).0.to_owned(),
            line: 1,
            message: "storage bindings are numbered from 1 without gaps".to_owned(),
        });
    }
    out.args = args.into_values().collect();
    Ok(out)
}

/// Checks that a shader declares what its op does.
pub(super) fn agree(op: &Op, wgsl: &Wgsl, found: &Reflected) -> Result<()> {
    let fail = |message: String| {
        Err(Error::Shader {
            file: wgsl.file.to_owned(),
            line: 1,
            message,
        })
    };
    let params: Vec<_> = (0u32..)
        .zip(op.params)
        .map(|(i, &n)| (n.to_owned(), 4 * i))
        .collect();
    if params != found.params {
        return fail(format!(
            "op {} has the params {params:?}, the shader {:?}",
            op.name, found.params
        ));
    }
    let args: Vec<_> = op
        .args
        .iter()
        .map(|&(n, a)| (n.to_owned(), a != Access::Read))
        .collect();
    if args != found.args {
        return fail(format!(
            "op {} has the arguments {args:?} (name, written), the shader {:?}",
            op.name, found.args
        ));
    }
    Ok(())
}
