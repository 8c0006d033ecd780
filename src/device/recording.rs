//! A recording: what a device shall do, as plain data.

use bytemuck::Pod;

use super::Tensor;
use super::op::{Access, Op, ParamBytes};

/// One op applied to arguments.
#[derive(Clone, Debug)]
pub struct Dispatch {
    /// The op.
    pub op: &'static Op,
    /// Its parameters.
    pub params: ParamBytes,
    /// Its arguments, in the op's order.
    pub args: Vec<Tensor>,
}

/// Bytes to copy into a tensor, from its start, before the dispatches run.
#[derive(Clone, Debug)]
pub struct Upload {
    /// Where to.
    pub to: Tensor,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// Uploads and dispatches, in order.
#[derive(Clone, Debug, Default)]
pub struct Recording {
    /// Copied first.
    pub uploads: Vec<Upload>,
    /// Run one after the other, each seeing what the ones before it wrote.
    pub dispatches: Vec<Dispatch>,
}

impl Recording {
    /// Records the copy of `data` to the start of `to`.
    ///
    /// # Panics
    /// If `data` is larger than the tensor.
    pub fn upload<T: Pod>(&mut self, to: &Tensor, data: &[T]) {
        let bytes: &[u8] = bytemuck::cast_slice(data);
        assert!(
            bytes.len() <= to.bytes(),
            "an upload is at most as large as its tensor"
        );
        self.uploads.push(Upload {
            to: to.clone(),
            bytes: bytes.to_vec(),
        });
    }

    /// Records one dispatch.
    ///
    /// # Panics
    /// If the arguments are not those that the op declares, or if a tensor that is written is bound
    /// twice: neither player could say what that means.
    pub fn push<P: Pod>(&mut self, op: &'static Op, params: &P, args: &[&Tensor]) {
        assert_eq!(
            args.len(),
            op.args.len(),
            "{}: number of arguments",
            op.name
        );
        let params = ParamBytes::new(params);
        assert_eq!(
            params.as_bytes().len(),
            4 * op.params.len(),
            "{}: size of the params",
            op.name
        );
        for (i, (name, access)) in op.args.iter().enumerate() {
            let twice = args
                .iter()
                .enumerate()
                .any(|(j, t)| j != i && t.id() == args[i].id());
            assert!(
                *access == Access::Read || !twice,
                "{}: {name} is bound twice",
                op.name
            );
        }
        self.dispatches.push(Dispatch {
            op,
            params,
            args: args.iter().map(|&t| t.clone()).collect(),
        });
    }
}
