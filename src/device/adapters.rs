//! Which adapters there are, what they can do, and which one is used.
//!
//! A software driver is used only by name: running on the CPU through Vulkan is slower than the CPU
//! path and must never pass for a GPU.

use super::Cpu;
use crate::{Error, Result};

/// What is known of one adapter.
#[derive(Clone, Debug, serde::Serialize)]
pub struct AdapterReport {
    /// The name that `--device` matches.
    pub name: String,
    /// `discrete`, `integrated`, `virtual`, `software` or `other`.
    pub kind: &'static str,
    /// The driver and its version.
    pub driver: String,
    /// PCI vendor and device ids.
    pub pci: String,
    /// Memory heaps in bytes, with whether each is on the device.
    pub heaps: Vec<(u64, bool)>,
    /// Smallest and largest subgroup.
    pub subgroup: (u32, u32),
    /// Limits that matter, by name.
    pub limits: Vec<(&'static str, u64)>,
    /// Features that matter, by name, and whether it has them.
    pub features: Vec<(&'static str, bool)>,
    /// Whether it can be used at all; if not, why.
    pub refused: Option<String>,
}

/// What `--device` comes to.
#[derive(Debug)]
pub enum Choice {
    /// The CPU path, with the reason in words.
    Cpu {
        /// Why.
        why: String,
    },
    /// A Vulkan adapter.
    Adapter(wgpu::Adapter),
}

impl Choice {
    /// The adapter's name, or `cpu`.
    pub fn name(&self) -> String {
        match self {
            Self::Cpu { .. } => "cpu".to_owned(),
            Self::Adapter(adapter) => adapter.get_info().name,
        }
    }

    /// Bytes that it may give, as [`super::Device::memory`] has them.
    pub fn memory(&self) -> Option<u64> {
        match self {
            Self::Cpu { .. } => Cpu::memory(),
            Self::Adapter(adapter) => memory(adapter),
        }
    }

    /// Whether what one takes of its memory the other lacks: they are one adapter, or both use the host's.
    pub fn shares_memory(&self, other: &Self) -> bool {
        let of_host = |choice: &Self| match choice {
            Self::Cpu { .. } => true,
            Self::Adapter(adapter) => !has_own_memory(&adapter.get_info()),
        };
        match (self, other) {
            (Self::Adapter(a), Self::Adapter(b)) if a == b => true,
            _ => of_host(self) && of_host(other),
        }
    }

    /// Why `auto` comes to this, as half a sentence.
    pub fn why(&self) -> String {
        let adapter = match self {
            Self::Cpu { why } => return why.clone(),
            Self::Adapter(adapter) => adapter,
        };
        match kind(&adapter.get_info()) {
            "discrete" => "it is the first discrete GPU; those go before integrated ones",
            "integrated" => "it is the first integrated GPU, and there is no discrete one",
            _ => "it was asked for by name",
        }
        .to_owned()
    }
}

fn instance() -> wgpu::Instance {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    descriptor.backends = wgpu::Backends::VULKAN;
    // Release builds otherwise validate indirect calls; debug builds pay for debug layers.
    descriptor.flags = wgpu::InstanceFlags::empty();
    wgpu::Instance::new(descriptor)
}

/// The adapter that does nothing, where wgpu was built with it; no list and no name has it.
pub(super) fn noop() -> Option<wgpu::Adapter> {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    descriptor.backends = wgpu::Backends::NOOP;
    descriptor.flags = wgpu::InstanceFlags::empty();
    descriptor.backend_options.noop = wgpu::NoopBackendOptions {
        enable: true,
        subgroup_min_size: Some(32),
        subgroup_max_size: Some(32),
        // As on NVIDIA.
        limits: Some(wgpu::Limits {
            max_storage_buffer_binding_size: (1 << 31) - 1,
            max_compute_workgroup_storage_size: 48 << 10,
            max_bind_groups: 8,
            max_compute_workgroups_per_dimension: 65_535,
            min_uniform_buffer_offset_alignment: 64,
            ..wgpu::Limits::unlimited()
        }),
        ..Default::default()
    };
    let instance = wgpu::Instance::new(descriptor);
    let found = instance.enumerate_adapters(wgpu::Backends::NOOP);
    pollster::block_on(found).into_iter().next()
}

fn all() -> Vec<wgpu::Adapter> {
    pollster::block_on(instance().enumerate_adapters(wgpu::Backends::VULKAN))
}

fn kind(info: &wgpu::AdapterInfo) -> &'static str {
    match info.device_type {
        wgpu::DeviceType::DiscreteGpu => "discrete",
        wgpu::DeviceType::IntegratedGpu => "integrated",
        wgpu::DeviceType::VirtualGpu => "virtual",
        wgpu::DeviceType::Cpu => "software",
        wgpu::DeviceType::Other => "other",
    }
}

/// Every Vulkan adapter of this machine.
pub fn adapters() -> Vec<AdapterReport> {
    all().iter().map(report).collect()
}

fn report(adapter: &wgpu::Adapter) -> AdapterReport {
    let (info, limits, features) = (adapter.get_info(), adapter.limits(), adapter.features());
    let subgroups = features.contains(wgpu::Features::SUBGROUP);
    AdapterReport {
        kind: kind(&info),
        driver: format!("{} {}", info.driver, info.driver_info)
            .trim()
            .to_owned(),
        pci: format!("{:04x}:{:04x}", info.vendor, info.device),
        heaps: heaps(adapter),
        subgroup: (info.subgroup_min_size, info.subgroup_max_size),
        limits: vec![
            (
                "max_storage_buffer_binding_size",
                limits.max_storage_buffer_binding_size,
            ),
            ("max_buffer_size", limits.max_buffer_size),
            (
                "max_compute_workgroup_storage_size",
                limits.max_compute_workgroup_storage_size.into(),
            ),
            (
                "max_compute_invocations_per_workgroup",
                limits.max_compute_invocations_per_workgroup.into(),
            ),
            (
                "max_storage_buffers_per_shader_stage",
                limits.max_storage_buffers_per_shader_stage.into(),
            ),
        ],
        features: vec![
            ("subgroup", subgroups),
            (
                "timestamp_query",
                features.contains(wgpu::Features::TIMESTAMP_QUERY_INSIDE_PASSES),
            ),
            ("shader_f16", features.contains(wgpu::Features::SHADER_F16)),
            (
                "cooperative_matrix",
                features.contains(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX),
            ),
        ],
        refused: (!subgroups).then(|| "it has no subgroup operations".to_owned()),
        name: info.name,
    }
}

/// Sizes of the Vulkan memory heaps, and whether each is on the device.
#[expect(unsafe_code, reason = "wgpu does not tell the heaps; Vulkan does")]
fn heaps(adapter: &wgpu::Adapter) -> Vec<(u64, bool)> {
    // SAFETY: the adapter outlives the guard, and nothing is created, changed or destroyed through
    // the raw handles: the properties are only read.
    let properties = unsafe {
        let Some(hal) = adapter.as_hal::<wgpu::hal::api::Vulkan>() else {
            return Vec::new();
        };
        let physical = hal.raw_physical_device();
        hal.shared_instance()
            .raw_instance()
            .get_physical_device_memory_properties(physical)
    };
    let heaps = &properties.memory_heaps[..properties.memory_heap_count as usize];
    // Bit 0 is VK_MEMORY_HEAP_DEVICE_LOCAL_BIT.
    heaps
        .iter()
        .map(|heap| (heap.size, heap.flags.as_raw() & 1 != 0))
        .collect()
}

/// Whether an adapter's memory is not the host's.
fn has_own_memory(info: &wgpu::AdapterInfo) -> bool {
    ["discrete", "virtual"].contains(&kind(info))
}

/// Bytes that an adapter may give: its largest heap, but no more than the host has left where the heap is
/// the host's. What other programs hold of a GPU's own memory is not known. None if nothing is known.
pub(super) fn memory(adapter: &wgpu::Adapter) -> Option<u64> {
    let own = |&(bytes, local): &(u64, bool)| local.then_some(bytes);
    let largest = heaps(adapter).iter().filter_map(own).max()?;
    let separate = has_own_memory(&adapter.get_info());
    let host = if separate { None } else { Cpu::memory() };
    Some(host.map_or(largest, |host| host.min(largest)))
}

/// Most devices that a model may be on; more are a mistake.
const MAX_DEVICES: usize = 64;

/// Which device a `--device` value means: `auto`, `cpu`, or part of an adapter's name.
///
/// # Errors
/// [`Error::NoAdapter`] if a name matches nothing.
pub fn choose(wanted: &str) -> Result<Choice> {
    if wanted == "cpu" {
        return Ok(Choice::Cpu {
            why: "it was asked for".into(),
        });
    }
    let adapters = all();
    if wanted == "auto" {
        return Ok(match gpus_of(&adapters).next() {
            Some(adapter) => Choice::Adapter(adapter.clone()),
            None => Choice::Cpu {
                why: format!("no GPU was found (seen: {})", seen(&adapters)),
            },
        });
    }
    let mut uses = vec![0; adapters.len()];
    named(&adapters, wanted, &mut uses)
        .map(Choice::Adapter)
        .ok_or_else(|| Error::NoAdapter {
            wanted: wanted.to_owned(),
            seen: seen(&adapters),
        })
}

/// Which devices a `--device` value means: one as for [`choose`], or several names with commas between them.
/// Of adapters of one name each is taken once before any is taken twice.
///
/// An adapter that is taken twice is two devices that share its memory.
///
/// # Errors
/// [`Error::NoAdapter`] if a name matches nothing, [`Error::Usage`] if the list makes no sense.
pub fn choose_all(wanted: &str) -> Result<Vec<Choice>> {
    if !wanted.contains(',') {
        return Ok(vec![choose(wanted)?]);
    }
    let usage = |problem: &str| Err(Error::Usage(format!("--device {wanted}: {problem}")));
    let pieces: Vec<&str> = wanted.split(',').collect();
    if pieces.len() > 4 * MAX_DEVICES {
        return Err(Error::Usage(format!(
            "--device has {} names; a model is on {MAX_DEVICES} devices at most",
            pieces.len()
        )));
    }
    let adapters = all();
    let mut uses = vec![0; adapters.len()];
    let mut out = Vec::new();
    let mut rest = &pieces[..];
    while !rest.is_empty() {
        // A name may have commas itself: the longest that there is counts.
        let found = (1..=rest.len()).rev().find_map(|n| {
            let name = rest[..n].join(",");
            let choice = match name.trim() {
                _ if rest[..n].iter().any(|piece| piece.trim().is_empty()) => None,
                "cpu" => Some(Choice::Cpu {
                    why: "it was asked for".into(),
                }),
                name => named(&adapters, name, &mut uses).map(Choice::Adapter),
            };
            Some((choice?, n))
        });
        let Some((choice, n)) = found else {
            return match rest[0].trim() {
                "" => usage("a name is empty; write names with one comma between them"),
                "auto" => usage("auto stands alone; name each device, as `hogwild devices` does"),
                name => Err(Error::NoAdapter {
                    wanted: name.to_owned(),
                    seen: seen(&adapters),
                }),
            };
        };
        out.push(choice);
        rest = &rest[n..];
    }
    if out.len() > MAX_DEVICES {
        return usage(&format!("a model is on {MAX_DEVICES} devices at most"));
    }
    Ok(out)
}

/// The GPUs that `auto` would choose from, the first first.
pub fn gpus() -> Vec<Choice> {
    let adapters = all();
    let gpus = gpus_of(&adapters).cloned();
    gpus.map(Choice::Adapter).collect()
}

/// Usable GPUs, discrete ones before integrated ones.
fn gpus_of(adapters: &[wgpu::Adapter]) -> impl Iterator<Item = &wgpu::Adapter> {
    let kinds = [
        wgpu::DeviceType::DiscreteGpu,
        wgpu::DeviceType::IntegratedGpu,
    ];
    let usable = |a: &&wgpu::Adapter| a.features().contains(wgpu::Features::SUBGROUP);
    kinds.into_iter().flat_map(move |kind| {
        let of_kind = move |a: &&wgpu::Adapter| a.get_info().device_type == kind;
        adapters.iter().filter(usable).filter(of_kind)
    })
}

/// Of the adapters that a name is part of, the one with the fewest uses so far, which is one more then.
fn named(adapters: &[wgpu::Adapter], name: &str, uses: &mut [usize]) -> Option<wgpu::Adapter> {
    let name = name.to_lowercase();
    let matches = |at: &usize| {
        let info = adapters[*at].get_info();
        info.name.to_lowercase().contains(&name)
    };
    let at = (0..adapters.len())
        .filter(matches)
        .min_by_key(|&at| uses[at])?;
    uses[at] += 1;
    Some(adapters[at].clone())
}

/// The names of adapters, for a message.
fn seen(adapters: &[wgpu::Adapter]) -> String {
    let infos = adapters.iter().map(wgpu::Adapter::get_info);
    let names: Vec<_> = infos
        .map(|i| format!("{} ({})", i.name, kind(&i)))
        .collect();
    if names.is_empty() {
        "no Vulkan adapter".to_owned()
    } else {
        names.join(", ")
    }
}
