//! Blocks over pages: where tokens live. Numbers only.
//!
//! A page holds 16 slots; a block is a list of pages and a length. A block's token at index `i` lives
//! in slot `pages[i / 16] * 16 + i % 16` for as long as the block lives: nothing is ever moved.

use crate::{Error, Result};

/// Slots of a page.
pub const PAGE: usize = 16;

/// Pages for a number of tokens, and room for the partly filled pages of short steps.
pub const fn pages_for(tokens: usize) -> usize {
    let pages = tokens.div_ceil(PAGE);
    pages + pages / 4 + 64
}

/// Name of a block; never used twice by one [`Pages`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);

/// The pages of one arena and the blocks that hold them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pages {
    /// Free pages; the next to be given is the last.
    free: Vec<u32>,
    total: usize,
    /// Indexed by `BlockId`; `None` once freed.
    blocks: Vec<Option<Block>>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Block {
    pages: Vec<u32>,
    len: usize,
    closed: bool,
}

impl Pages {
    /// `n_pages` free pages and no block.
    ///
    /// # Panics
    /// If the slots of that many pages have no 32-bit number.
    pub fn new(n_pages: usize) -> Self {
        let n = u32::try_from(n_pages).expect("pages have 32-bit numbers");
        assert!(n.checked_mul(16).is_some(), "slots have 32-bit numbers");
        Self {
            free: (0..n).rev().collect(),
            total: n_pages,
            blocks: Vec::new(),
        }
    }

    /// A new, empty block.
    ///
    /// # Panics
    /// After 2^32 blocks.
    pub fn open(&mut self) -> BlockId {
        let id = u32::try_from(self.blocks.len()).expect("fewer than 2^32 blocks");
        self.blocks.push(Some(Block::default()));
        BlockId(id)
    }

    fn block(&self, id: BlockId) -> &Block {
        self.blocks[id.0 as usize]
            .as_ref()
            .expect("the block was not freed")
    }

    fn block_mut(&mut self, id: BlockId) -> &mut Block {
        self.blocks[id.0 as usize]
            .as_mut()
            .expect("the block was not freed")
    }

    /// Tokens in a block.
    pub fn len(&self, id: BlockId) -> usize {
        self.block(id).len
    }

    /// Whether a block has no token.
    pub fn is_empty(&self, id: BlockId) -> bool {
        self.len(id) == 0
    }

    /// Whether a block is history: nothing is written to it any more.
    pub fn is_closed(&self, id: BlockId) -> bool {
        self.block(id).closed
    }

    /// Relabels a block as history. Not one byte of the arena changes.
    pub fn close(&mut self, id: BlockId) {
        self.block_mut(id).closed = true;
    }

    /// Makes room for `n` more tokens at the end of a block.
    ///
    /// # Errors
    /// [`Error::CacheFull`] if the free pages do not suffice; the block is then as before.
    ///
    /// # Panics
    /// If the block is closed.
    pub fn extend(&mut self, id: BlockId, n: usize) -> Result<()> {
        let (len, pages) = (self.block(id).len, self.block(id).pages.len());
        assert!(n == 0 || !self.block(id).closed, "history is not written");
        let need = (len + n).div_ceil(PAGE).saturating_sub(pages);
        if need > self.free.len() {
            return Err(Error::CacheFull {
                need,
                free: self.free.len(),
                pages: self.total,
            });
        }
        let taken = self.free.split_off(self.free.len() - need);
        let block = self.block_mut(id);
        block.pages.extend(taken.into_iter().rev());
        block.len += n;
        Ok(())
    }

    /// Shortens a block to `len` tokens and frees the pages behind them.
    ///
    /// # Panics
    /// If the block is shorter.
    pub fn truncate(&mut self, id: BlockId, len: usize) {
        let block = self.block_mut(id);
        assert!(len <= block.len, "a block is only shortened");
        block.len = len;
        let freed = block.pages.split_off(len.div_ceil(PAGE));
        self.free.extend(freed.into_iter().rev());
    }

    /// Frees a block and its pages.
    pub fn free(&mut self, id: BlockId) {
        self.truncate(id, 0);
        self.blocks[id.0 as usize] = None;
    }

    /// The slot of a block's token.
    ///
    /// # Panics
    /// If the block has no such token.
    pub fn slot(&self, id: BlockId, index: usize) -> usize {
        let block = self.block(id);
        assert!(index < block.len, "the token is in the block");
        block.pages[index / PAGE] as usize * PAGE + index % PAGE
    }

    /// Pages in all.
    pub fn n_pages(&self) -> usize {
        self.total
    }

    /// Free pages.
    pub fn n_free(&self) -> usize {
        self.free.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_grows_over_pages_and_gives_them_back() {
        let mut pages = Pages::new(3);
        let block = pages.open();
        pages.extend(block, 17).expect("two pages");
        assert_eq!(
            (pages.n_free(), pages.len(block)),
            (1, 17),
            "two of three pages are taken"
        );
        pages.truncate(block, 16);
        assert_eq!(pages.n_free(), 2, "the second page is free again");
        pages.free(block);
        assert_eq!(pages.n_free(), 3, "all pages are free again");
    }

    #[test]
    fn a_full_cache_is_an_error_and_changes_nothing() {
        let mut pages = Pages::new(2);
        let (a, b) = (pages.open(), pages.open());
        pages.extend(a, 5).expect("one page");
        let error = pages.extend(b, 17).expect_err("one page is left");
        assert!(
            matches!(
                error,
                Error::CacheFull {
                    need: 2,
                    free: 1,
                    pages: 2
                }
            ),
            "{error}"
        );
        assert_eq!((pages.len(b), pages.n_free()), (0, 1), "nothing changed");
    }

    #[test]
    fn no_two_tokens_share_a_slot() {
        let mut pages = Pages::new(8);
        let blocks = [pages.open(), pages.open(), pages.open()];
        for n in [3, 20, 1, 15, 7] {
            for &block in &blocks {
                pages.extend(block, n / 2 + 1).expect("it fits");
            }
        }
        let slots = |&b: &BlockId| {
            (0..pages.len(b))
                .map(|i| pages.slot(b, i))
                .collect::<Vec<_>>()
        };
        let mut all: Vec<usize> = blocks.iter().flat_map(slots).collect();
        let n = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), n, "every token has a slot of its own");
    }
}
