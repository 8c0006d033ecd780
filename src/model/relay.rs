//! One pass over the stages of a model: each device runs its layers when the one before it has run, and the
//! hidden rows go from one to the next through the host.
//!
//! Of one stage it is that stage's recording and nothing else.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::Result;
use crate::device::{self, Device, Recording, Tensor, Upload, judge};

/// What one stage records of a pass.
#[derive(Debug)]
pub(super) struct Leg {
    pub(super) device: Arc<Device>,
    pub(super) recording: Recording,
    /// Where the hidden rows are, before and after.
    pub(super) hidden: Tensor,
}

/// The recordings of a pass, in the order of the stages.
#[derive(Debug)]
pub(super) struct Relay {
    pub(super) legs: Vec<Leg>,
    /// Of the hidden rows.
    pub(super) bytes: usize,
}

/// A pass that needs no more than to be submitted; dropped, it never runs.
#[derive(Debug)]
pub(super) struct Prepared(VecDeque<(Arc<Device>, device::Prepared, Tensor)>);

/// A pass whose first stage was submitted.
#[derive(Debug)]
pub(super) struct Running {
    device: Arc<Device>,
    now: device::Running,
    then: Prepared,
}

impl Relay {
    /// The last stage's recording.
    pub(super) fn last(&mut self) -> &mut Recording {
        &mut self.legs.last_mut().expect("a pass has a stage").recording
    }

    /// Plays all of it; `checked` by the references too.
    pub(super) fn play(self, checked: bool) -> Result<()> {
        let mut before: Option<Vec<u8>> = None;
        let mut legs = self.legs.into_iter().peekable();
        while let Some(mut leg) = legs.next() {
            if let Some(rows) = before.take() {
                leg.recording.upload(&leg.hidden, &rows);
            }
            if checked {
                judge::play_checked(&leg.device, &leg.recording)?;
            } else {
                leg.device.play(&leg.recording)?;
            }
            if legs.peek().is_some() {
                before = Some(leg.device.read(&leg.hidden, 0, self.bytes)?);
            }
        }
        Ok(())
    }

    /// Makes all stages ready; `read` is what [`Running::wait`] will give, of the last device.
    pub(super) fn prepare(self, read: (&Tensor, usize)) -> Result<Prepared> {
        let n = self.legs.len();
        let mut out = VecDeque::with_capacity(n);
        for (i, leg) in self.legs.into_iter().enumerate() {
            let rows = (&leg.hidden, self.bytes);
            let read = if i + 1 == n { read } else { rows };
            let prepared = leg.device.prepare(leg.recording, read)?;
            out.push_back((leg.device, prepared, leg.hidden));
        }
        Ok(Prepared(out))
    }
}

impl Prepared {
    /// Starts the first stage, with what was not known when it was recorded.
    pub(super) fn submit(mut self, late: &[Upload]) -> Result<Running> {
        let (device, prepared, _) = self.0.pop_front().expect("a pass has a stage");
        let now = device.submit(prepared, late)?;
        Ok(Running {
            device,
            now,
            then: self,
        })
    }
}

impl Running {
    /// Runs the other stages, and gives what was to be read of the last.
    pub(super) fn wait(self) -> Result<Vec<u8>> {
        let Self {
            mut device,
            mut now,
            then: Prepared(mut then),
        } = self;
        loop {
            let bytes = device.wait(now)?;
            let Some((next, prepared, to)) = then.pop_front() else {
                return Ok(bytes);
            };
            now = next.submit(prepared, &[Upload { to, bytes }])?;
            device = next;
        }
    }
}
