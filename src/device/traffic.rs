//! Traffic: the bytes that a recording's workgroups load, group by group, without playing it.
//!
//! What an op declares is what it needs; what is summed here is what its kernels fetch. Every workgroup of
//! every dispatch is asked ([`super::Loads`]), so that a cache that is read once for each worker shows.

use super::op::{Ints, Run};
use super::{Caps, Recording};
use crate::{Error, Result};

/// Bytes that one dispatch loads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Traffic {
    /// The op's name.
    pub op: &'static str,
    /// The kernel's name.
    pub kernel: &'static str,
    /// Each argument's name and the bytes that all workgroups load of it.
    pub args: Vec<(&'static str, u64)>,
}

/// The bytes that each dispatch of a recording loads on a GPU that can do this.
///
/// # Errors
/// [`Error::Device`] if an op has no kernel for such a GPU, or one whose loads are not known.
pub fn traffic(recording: &Recording, caps: &Caps) -> Result<Vec<Traffic>> {
    let ints = Ints::of_recording(recording);
    let of = |dispatch: &super::Dispatch| {
        let op = dispatch.op;
        let fits = |k: &&super::Kernel| matches!(k.run, Run::Wgsl(_)) && (k.fits)(dispatch, caps);
        let kernel = op.kernels.iter().find(fits);
        let found = kernel.and_then(|kernel| match &kernel.run {
            Run::Wgsl(wgsl) => wgsl.loads.map(|loads| (kernel.name, wgsl.groups, loads)),
            Run::Cpu(_) => None,
        });
        let (kernel, groups, loads) = found.ok_or_else(|| Error::Device {
            device: "GPU".into(),
            problem: format!("what the kernel of {} loads is not known", op.name),
        })?;
        let mut sums = vec![0; op.args.len()];
        let [nx, ny, nz] = groups(dispatch, caps);
        for z in 0..nz {
            for y in 0..ny {
                for x in 0..nx {
                    let group = loads(dispatch, caps, &ints, [x, y, z]);
                    for (sum, bytes) in sums.iter_mut().zip(group) {
                        *sum += bytes;
                    }
                }
            }
        }
        let names = op.args.iter().map(|(name, _)| *name);
        Ok(Traffic {
            op: op.name,
            kernel,
            args: names.zip(sums).collect(),
        })
    };
    recording.dispatches.iter().map(of).collect()
}
