//! The plan of a pass: batch and views to slots, tiles, splits, locations. Pure; numbers only.
//!
//! Splits have a fixed length in keys. They run over the history (the closed blocks at the front of a
//! view) in block order; every other block starts its own. So a row's partials, and the order in which
//! they merge, follow from its view alone, whoever else is in the pass and wherever prefill was cut.

use std::collections::{HashMap, HashSet};

use super::layout::View;
use super::pages::{BlockId, PAGE, Pages};
use crate::TokenId;

/// Keys of a split.
pub const SPLIT: usize = 256;

/// New tokens of one worker (or of a prefill) in one pass: they go to the end of the view's last block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Turn {
    /// What the tokens see.
    pub view: View,
    /// The tokens, at least one.
    pub tokens: Vec<TokenId>,
    /// Which tokens' logits are wanted.
    pub logits: Logits,
}

/// Which of a turn's tokens have their logits computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Logits {
    /// None: a prefill that is not sampled from.
    None,
    /// The last token's.
    Last,
    /// Every token's.
    All,
}

/// All that one pass feeds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// One entry for each worker that has new tokens; their last blocks differ.
    pub turns: Vec<Turn>,
}

impl Batch {
    /// New tokens of all turns.
    pub fn n_rows(&self) -> usize {
        self.turns.iter().map(|t| t.tokens.len()).sum()
    }

    /// Whether another batch has the same turns but for which tokens they feed.
    pub fn is_like(&self, other: &Self) -> bool {
        let alike = |(a, b): (&Turn, &Turn)| {
            a.tokens.len() == b.tokens.len() && a.view == b.view && a.logits == b.logits
        };
        self.turns.len() == other.turns.len() && self.turns.iter().zip(&other.turns).all(alike)
    }
}

/// What a pass needs to know, as flat arrays for the ops.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Token of each row.
    pub tokens: Vec<u32>,
    /// Slot and index in its block of each row, `[n_rows, 2]`.
    pub targets: Vec<u32>,
    /// Slot of the first key, its index in the block, keys, block; `[n_tiles, 4]`.
    pub tiles: Vec<u32>,
    /// First tile, end of the tiles, first pair, pairs; `[n_work, 4]`.
    pub work: Vec<u32>,
    /// The row of each pair of a split and a row that sees it.
    pub pair_rows: Vec<u32>,
    /// Location of each row in each block, negative where it does not see it; `[n_blocks, n_rows]`.
    pub locations: Vec<i32>,
    /// Where in `order` each row's pairs begin; `[n_rows + 1]`.
    pub ranges: Vec<u32>,
    /// Pairs of each row, in the order of its view.
    pub order: Vec<u32>,
    /// Rows whose logits are wanted.
    pub wanted: Vec<u32>,
    /// Position of each row in its view.
    pub positions: Vec<u32>,
    /// Most pairs of a work item.
    pub most_pairs: usize,
}

impl Plan {
    /// Rows of the pass.
    pub fn n_rows(&self) -> usize {
        self.tokens.len()
    }

    /// Work items.
    pub fn n_work(&self) -> usize {
        self.work.len() / 4
    }

    /// Pairs of a split and a row.
    pub fn n_pairs(&self) -> usize {
        self.pair_rows.len()
    }
}

/// One split: its tiles, and for each row that sees it the place in the row's order.
struct Split {
    tiles: std::ops::Range<usize>,
    /// Row, and how many splits the row saw before this one.
    rows: Vec<(u32, u32)>,
}

/// Plans a pass. The blocks have been extended by the batch's tokens already, all of them: within a
/// pass every worker's new tokens are visible to the others.
///
/// `rows_per_work` is the most rows that one work item serves.
///
/// # Panics
/// If two turns write the same block, or a turn has no token or no block.
pub fn plan(pages: &Pages, batch: &Batch, rows_per_work: usize) -> Plan {
    let mut out = Plan::default();
    let n_rows = batch.n_rows();
    let mut blocks: HashMap<BlockId, u32> = HashMap::new();
    let mut splits: Vec<Split> = Vec::new();
    // The splits of a run of history or of an open block, by the blocks it is made of.
    let mut runs: HashMap<Vec<BlockId>, std::ops::Range<usize>> = HashMap::new();
    let mut splits_of_row: Vec<u32> = vec![0; n_rows];
    let mut written: HashSet<BlockId> = HashSet::new();
    let mut first_row = 0;
    for turn in &batch.turns {
        let n = turn.tokens.len();
        let view = &turn.view.0;
        let own = *view.last().expect("a view has a block");
        assert!(n > 0, "a turn has a token");
        assert!(written.insert(own), "a block is written by one turn");
        let total: usize = view.iter().map(|&b| pages.len(b)).sum();
        let own_first = pages.len(own) - n;
        for (i, &token) in turn.tokens.iter().enumerate() {
            out.tokens.push(token);
            out.targets.push(u32_of(pages.slot(own, own_first + i)));
            out.targets.push(u32_of(own_first + i));
            out.positions.push(u32_of(total - n + i));
        }
        let wanted = match turn.logits {
            Logits::None => n..n,
            Logits::Last => n - 1..n,
            Logits::All => 0..n,
        };
        out.wanted.extend(wanted.map(|i| u32_of(first_row + i)));

        // Locations of the rows in every block of the view.
        let mut start = 0;
        for &block in view {
            let at = *blocks.entry(block).or_insert_with(|| {
                out.locations.extend(std::iter::repeat_n(-1, n_rows));
                u32_of(out.locations.len() / n_rows - 1)
            });
            let row = &mut out.locations[at as usize * n_rows + first_row..][..n];
            for (i, location) in row.iter_mut().enumerate() {
                *location = i32::try_from(total - n + i - start).expect("views are short");
            }
            start += pages.len(block);
        }

        // The history is one run of splits, every other block has its own.
        let closed = view.iter().take_while(|&&b| pages.is_closed(b)).count();
        let history = (closed > 0).then(|| &view[..closed]);
        for run in history.into_iter().chain(view[closed..].chunks(1)) {
            let range = if let Some(range) = runs.get(run) {
                range.clone()
            } else {
                let first = splits.len();
                cut(pages, run, &blocks, &mut out.tiles, &mut splits);
                runs.insert(run.to_vec(), first..splits.len());
                first..splits.len()
            };
            for split in range {
                let tiles = splits[split].tiles.clone();
                for (row, seen) in splits_of_row.iter_mut().enumerate().skip(first_row).take(n) {
                    let sees = |tile: usize| {
                        let [_, first, _, block] = tile_of(&out.tiles, tile);
                        let location = out.locations[block as usize * n_rows + row];
                        i64::from(location) >= i64::from(first)
                    };
                    // A causal prefill skips what lies ahead; the first tile decides, for later tiles
                    // of a split are not seen earlier than it.
                    if tiles.clone().any(sees) {
                        splits[split].rows.push((u32_of(row), *seen));
                        *seen += 1;
                    }
                }
            }
        }
        first_row += n;
    }
    out.ranges.push(0);
    for n in &splits_of_row {
        out.ranges
            .push(out.ranges.last().expect("starts with zero") + n);
    }
    out.order = vec![0; out.ranges[n_rows] as usize];
    for split in &splits {
        for rows in split.rows.chunks(rows_per_work) {
            let first_pair = out.pair_rows.len();
            for &(row, nth) in rows {
                out.order[(out.ranges[row as usize] + nth) as usize] = u32_of(out.pair_rows.len());
                out.pair_rows.push(row);
            }
            out.most_pairs = out.most_pairs.max(rows.len());
            let item = [split.tiles.start, split.tiles.end, first_pair, rows.len()];
            out.work.extend(item.map(u32_of));
        }
    }
    out
}

/// Cuts a run of blocks into splits of [`SPLIT`] keys, each a list of tiles within pages.
fn cut(
    pages: &Pages,
    run: &[BlockId],
    blocks: &HashMap<BlockId, u32>,
    tiles: &mut Vec<u32>,
    splits: &mut Vec<Split>,
) {
    let mut room = 0;
    for block in run {
        let len = pages.len(*block);
        let mut index = 0;
        while index < len {
            if room == 0 {
                let at = tiles.len() / 4;
                splits.push(Split {
                    tiles: at..at,
                    rows: Vec::new(),
                });
                room = SPLIT;
            }
            let keys = (PAGE - index % PAGE).min(len - index).min(room);
            let tile = [
                pages.slot(*block, index),
                index,
                keys | (SPLIT - room) << 16,
            ];
            tiles.extend(tile.map(u32_of));
            tiles.push(blocks[block]);
            splits.last_mut().expect("one is open").tiles.end += 1;
            index += keys;
            room -= keys;
        }
    }
}

fn tile_of(tiles: &[u32], at: usize) -> [u32; 4] {
    [0, 1, 2, 3].map(|i| tiles[at * 4 + i])
}

fn u32_of(n: usize) -> u32 {
    u32::try_from(n).expect("counts fit 32 bits")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turn(view: &[BlockId], n: usize) -> Turn {
        Turn {
            view: View(view.to_vec()),
            tokens: vec![7; n],
            logits: Logits::Last,
        }
    }

    #[test]
    fn a_view_of_one_block_is_causal_and_cut_into_fixed_splits() {
        let mut pages = Pages::new(64);
        let block = pages.open();
        pages.extend(block, 600).expect("it fits");
        let plan = plan(
            &pages,
            &Batch {
                turns: vec![turn(&[block], 2)],
            },
            16,
        );
        assert_eq!(plan.positions, [598, 599], "the last two positions");
        assert_eq!(
            plan.locations,
            [598, 599],
            "in one block the location is the position"
        );
        assert_eq!(plan.n_work(), 3, "600 keys are three splits of 256");
        assert_eq!(plan.ranges, [0, 3, 6], "each row sees all three");
        assert_eq!(
            plan.order,
            [0, 2, 4, 1, 3, 5],
            "and merges them in block order"
        );
        assert_eq!(plan.wanted, [1], "only the last row's logits");
    }

    #[test]
    #[should_panic(expected = "a block is written by one turn")]
    fn two_turns_do_not_write_one_block() {
        let mut pages = Pages::new(4);
        let block = pages.open();
        pages.extend(block, 2).expect("it fits");
        let turns = vec![turn(&[block], 1), turn(&[block], 1)];
        plan(&pages, &Batch { turns }, 16);
    }

    #[test]
    fn prefill_does_not_visit_splits_that_lie_ahead() {
        let mut pages = Pages::new(64);
        let block = pages.open();
        pages.extend(block, 300).expect("it fits");
        let plan = plan(
            &pages,
            &Batch {
                turns: vec![turn(&[block], 300)],
            },
            16,
        );
        assert_eq!(plan.ranges[256], 256, "the first 256 rows see one split");
        assert_eq!(plan.ranges[300], 256 + 44 * 2, "the others two");
    }

    #[test]
    fn workers_share_the_splits_of_what_they_both_see() {
        let mut pages = Pages::new(64);
        let [prompt, step, a, b] = [100, 30, 5, 9].map(|n| {
            let block = pages.open();
            pages.extend(block, n).expect("it fits");
            block
        });
        pages.close(prompt);
        pages.close(step);
        let turns = vec![
            turn(&[prompt, step, b, a], 1),
            turn(&[prompt, step, a, b], 1),
        ];
        let plan = plan(&pages, &Batch { turns }, 16);
        // One split of history, one of a, one of b; each is seen by both rows.
        assert_eq!(plan.n_work(), 3, "{:?}", plan.work);
        assert_eq!(plan.most_pairs, 2, "both rows are served together");
        assert_eq!(
            plan.positions,
            [143, 143],
            "all tokens but the last come before it"
        );
        // Row 0 is at the end of a; a starts at 100 + 30 + 9.
        let blocks: Vec<&[i32]> = plan.locations.chunks(2).collect();
        assert_eq!(
            blocks,
            [[143, 143], [43, 43], [13, 8], [4, 13]],
            "prompt, step, b, a"
        );
    }
}
