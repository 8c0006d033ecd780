//! Who sees what: the rule that makes a worker's view out of the shared blocks (paper, appendix A).
//!
//! | layout | view of a worker | when its step ends |
//! |---|---|---|
//! | combined | history, others' header, others' steps, own header, own step | its block becomes history |
//! | contiguous | history (the prompt), others' texts, own header, own text | nothing |
//! | interleaved | history, own header, own step | its block becomes history |

use super::pages::{BlockId, Pages};
use crate::Result;

/// The rule that makes views.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    /// Shared history of finished steps, and the others' unfinished steps as they are written.
    #[default]
    Combined,
    /// Each worker's text in one piece.
    Contiguous,
    /// Shared history of finished steps; unfinished ones are private.
    Interleaved,
}

impl std::str::FromStr for Layout {
    type Err = crate::Error;

    fn from_str(s: &str) -> Result<Self> {
        match s {
            "combined" => Ok(Self::Combined),
            "contiguous" => Ok(Self::Contiguous),
            "interleaved" => Ok(Self::Interleaved),
            _ => Err(crate::Error::Usage(format!(
                "no layout is called '{s}'; there are combined, contiguous and interleaved"
            ))),
        }
    }
}

/// The blocks that one worker sees, oldest first; the last is the one it writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View(pub Vec<BlockId>);

/// The blocks of a session.
#[derive(Clone, Debug)]
pub struct Shared {
    /// The prompt and then the finished steps, in the order in which they ended.
    pub history: Vec<BlockId>,
    /// The header above the others' unfinished steps.
    pub header_others: BlockId,
    /// The header above the own step.
    pub header_own: BlockId,
    /// The block that each worker writes, in ascending order of workers.
    pub own: Vec<BlockId>,
}

impl Shared {
    /// The blocks of a session that has come some way: a history of blocks of these lengths, headers of
    /// three tokens, and one token of each worker.
    ///
    /// # Errors
    /// [`crate::Error::CacheFull`] if there are too few pages.
    pub fn after(pages: &mut Pages, history: &[usize], workers: usize) -> Result<Self> {
        let mut block = |len: usize, closed: bool| {
            let block = pages.open();
            pages.extend(block, len)?;
            if closed {
                pages.close(block);
            }
            Ok(block)
        };
        Ok(Self {
            history: history
                .iter()
                .map(|&len| block(len, true))
                .collect::<Result<_>>()?,
            header_others: block(3, false)?,
            header_own: block(3, false)?,
            own: (0..workers)
                .map(|_| block(1, false))
                .collect::<Result<_>>()?,
        })
    }

    /// Every block, each once.
    pub fn blocks(&self) -> impl Iterator<Item = BlockId> {
        let open = [self.header_others, self.header_own];
        let steps = self.history.iter().chain(&self.own).copied();
        steps.chain(open)
    }
}

impl Layout {
    /// What worker `me` sees.
    pub fn view(self, me: usize, shared: &Shared) -> View {
        let mut view = shared.history.clone();
        let others = shared
            .own
            .iter()
            .enumerate()
            .filter(|(w, _)| *w != me)
            .map(|(_, b)| *b);
        match self {
            Self::Combined => {
                view.push(shared.header_others);
                view.extend(others);
            }
            Self::Contiguous => view.extend(others),
            Self::Interleaved => {}
        }
        view.push(shared.header_own);
        view.push(shared.own[me]);
        View(view)
    }

    /// Ends the step of worker `me`, who goes on in the block `fresh`.
    ///
    /// Returns the block that became history, if the layout has it so; otherwise `fresh` is not used.
    pub fn close(self, me: usize, fresh: BlockId, shared: &mut Shared) -> Option<BlockId> {
        match self {
            Self::Contiguous => None,
            Self::Combined | Self::Interleaved => {
                let done = std::mem::replace(&mut shared.own[me], fresh);
                shared.history.push(done);
                Some(done)
            }
        }
    }

    /// Whether a finished step becomes history, and the worker goes on in a new block.
    pub fn moves_steps(self) -> bool {
        self != Self::Contiguous
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shared() -> Shared {
        let own = [3, 4, 5].map(BlockId).to_vec();
        Shared {
            history: vec![BlockId(0)],
            header_others: BlockId(1),
            header_own: BlockId(2),
            own,
        }
    }

    fn ids(view: &View) -> Vec<u32> {
        view.0.iter().map(|b| b.0).collect()
    }

    #[test]
    fn views_are_those_of_the_reference() {
        let shared = shared();
        assert_eq!(
            ids(&Layout::Combined.view(1, &shared)),
            [0, 1, 3, 5, 2, 4],
            "combined"
        );
        assert_eq!(
            ids(&Layout::Contiguous.view(1, &shared)),
            [0, 3, 5, 2, 4],
            "contiguous"
        );
        assert_eq!(
            ids(&Layout::Interleaved.view(1, &shared)),
            [0, 2, 4],
            "interleaved"
        );
    }

    #[test]
    fn a_closed_step_is_the_end_of_everybodys_history() {
        let mut shared = shared();
        let done = Layout::Combined.close(1, BlockId(9), &mut shared);
        assert_eq!(done, Some(BlockId(4)), "the block of worker 1");
        assert_eq!(
            ids(&Layout::Combined.view(0, &shared)),
            [0, 4, 1, 9, 5, 2, 3],
            "seen by another"
        );
        assert_eq!(
            Layout::Contiguous.close(0, BlockId(8), &mut shared),
            None,
            "nothing moves"
        );
    }

    #[test]
    fn one_worker_is_not_a_special_case() {
        let mut shared = shared();
        shared.own.truncate(1);
        assert_eq!(
            ids(&Layout::Combined.view(0, &shared)),
            [0, 1, 2, 3],
            "both headers stay"
        );
    }
}
