//! The plan of a pass: batch and views to slots, tiles, splits, locations. Pure; numbers only.
//!
//! Splits have a fixed length in keys. They run over the history (the closed blocks at the front of a
//! view) in block order; every other block starts its own. So a row's partials, and the order in which
//! they merge, follow from its view alone, whoever else is in the pass and wherever prefill was cut.

use std::ops::Range;

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
    /// Slot of the first key, its index in the block, keys plus 65,536 times the keys of the split that
    /// come before, block; `[n_tiles, 4]`.
    pub tiles: Vec<u32>,
    /// Location of each row in each block, negative where it does not see it; `[n_blocks, n_rows]`.
    pub locations: Vec<i32>,
    /// Rows whose logits are wanted.
    pub wanted: Vec<u32>,
    /// Position of each row in its view.
    pub positions: Vec<u32>,
    /// Who attends to what, for each of the windows that were asked for.
    pub sights: Vec<Sight>,
}

/// Which rows attend to which splits, where they see a number of tokens or all of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sight {
    /// First tile, end of the tiles, first pair, pairs; `[n_work, 4]`.
    pub work: Vec<u32>,
    /// The row of each pair of a split and a row that sees it.
    pub pair_rows: Vec<u32>,
    /// Where in `order` each row's pairs begin; `[n_rows + 1]`.
    pub ranges: Vec<u32>,
    /// Pairs of each row, in the order of its view.
    pub order: Vec<u32>,
    /// Most pairs of a work item.
    pub most_pairs: usize,
}

impl Plan {
    /// Rows of the pass.
    pub fn n_rows(&self) -> usize {
        self.tokens.len()
    }
}

impl Sight {
    /// Work items.
    pub fn n_work(&self) -> usize {
        self.work.len() / 4
    }

    /// Pairs of a split and a row.
    pub fn n_pairs(&self) -> usize {
        self.pair_rows.len()
    }
}

/// Blocks that are cut into splits as one: a history, or another block. The rows that see them all see the
/// same splits, but for those that write the block, and but for their windows.
struct Run<'a> {
    blocks: &'a [BlockId],
    keys: usize,
    /// Tiles of each split.
    splits: Vec<Range<usize>>,
    /// Who sees it: indices of visits.
    visits: Vec<usize>,
}

/// The rows of a turn that see a run.
struct Visit {
    run: usize,
    rows: Range<usize>,
    /// Tokens that come before the run in their view.
    start: usize,
    /// If they write the run's block, the index of the first of them there: a row sees no key behind its own.
    writes: Option<usize>,
}

/// What a row sees of a run.
struct Span {
    /// Its splits.
    splits: Range<usize>,
    /// How many keys of the run come before the first that it sees.
    first: usize,
    /// Splits of other runs that come before in the row's order.
    before: u32,
}

/// What is known of a block, once a view holds it.
#[derive(Clone, Copy)]
struct Known {
    /// Its place in the locations.
    at: u32,
    /// The run that it is alone in.
    run: Option<u32>,
    /// Whether a turn writes it.
    written: bool,
}

/// Plans a pass. The blocks have been extended by the batch's tokens already, all of them: within a
/// pass every worker's new tokens are visible to the others.
///
/// `rows_per_work` is the most rows that one work item serves. A [`Sight`] is made for each of `windows`: how
/// many tokens a row sees, its own included; none stands for all. Tiles that lie outside the windows of all
/// rows are in no work item. The work grows with the tiles, the blocks of all views and the pairs.
///
/// # Panics
/// If two turns write the same block, a turn has no token or no block, or a window is zero.
pub fn plan(pages: &Pages, batch: &Batch, rows_per_work: usize, windows: &[Option<usize>]) -> Plan {
    let mut out = Plan::default();
    let n_rows = batch.n_rows();
    let ids = batch.turns.iter().flat_map(|turn| &turn.view.0);
    let n_ids = ids.map(|b| b.0 as usize + 1).max().unwrap_or(0);
    let mut known: Vec<Option<Known>> = vec![None; n_ids];
    let mut runs: Vec<Run<'_>> = Vec::new();
    // In the order of the rows' views, turn by turn.
    let mut visits: Vec<Visit> = Vec::new();
    // Indices of the runs that are histories; workers mostly share one.
    let mut histories: Vec<usize> = Vec::new();
    let mut first_row = 0;
    for turn in &batch.turns {
        let n = turn.tokens.len();
        let rows = first_row..first_row + n;
        let view = turn.view.0.as_slice();
        let own = *view.last().expect("a view has a block");
        assert!(n > 0, "a turn has a token");
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
        let mut location = i32::try_from(total - n).expect("views are short");
        for &block in view {
            let known = known[block.0 as usize].get_or_insert_with(|| {
                out.locations.extend(std::iter::repeat_n(-1, n_rows));
                Known {
                    at: u32_of(out.locations.len() / n_rows - 1),
                    run: None,
                    written: false,
                }
            });
            let of_rows = &mut out.locations[known.at as usize * n_rows..][rows.clone()];
            for (of_row, at) in of_rows.iter_mut().zip(location..) {
                *of_row = at;
            }
            location -= i32::try_from(pages.len(block)).expect("views are short");
        }
        let written = &mut known[own.0 as usize].as_mut().expect("seen above").written;
        assert!(!*written, "a block is written by one turn");
        *written = true;

        // The history is one run of splits, every other block has its own.
        let closed = view.iter().take_while(|&&b| pages.is_closed(b)).count();
        let (history, others) = view.split_at(closed);
        let mut start = 0;
        let mut visit = |runs: &mut [Run<'_>], run: usize, writes: Option<usize>| {
            let run_of = &mut runs[run];
            run_of.visits.push(visits.len());
            let rows = rows.clone();
            visits.push(Visit {
                run,
                rows,
                start,
                writes,
            });
            start += run_of.keys;
        };
        if !history.is_empty() {
            let same = |&&run: &&usize| runs[run].blocks == history;
            let run = histories.iter().find(same).copied().unwrap_or_else(|| {
                runs.push(cut(pages, history, &known, &mut out.tiles));
                histories.push(runs.len() - 1);
                runs.len() - 1
            });
            visit(&mut runs, run, None);
        }
        for block in others.chunks(1) {
            let id = block[0].0 as usize;
            let run = known[id].and_then(|known| known.run).unwrap_or_else(|| {
                runs.push(cut(pages, block, &known, &mut out.tiles));
                let run = u32_of(runs.len() - 1);
                known[id].as_mut().expect("seen above").run = Some(run);
                run
            });
            let writes = (block[0] == own).then_some(own_first);
            visit(&mut runs, run as usize, writes);
        }
        first_row += n;
    }
    let sight = |&window| sight(&runs, &visits, &out, window, rows_per_work);
    out.sights = windows.iter().map(sight).collect();
    out
}

/// Makes the work items of a window: every split with the rows that see some of it, at most `rows_per_work`
/// at once.
fn sight(
    runs: &[Run<'_>],
    visits: &[Visit],
    plan: &Plan,
    window: Option<usize>,
    rows_per_work: usize,
) -> Sight {
    assert_ne!(window, Some(0), "a row sees itself");
    let mut out = Sight::default();
    let mut seen = vec![0; plan.n_rows()];
    let spans: Vec<Vec<Span>> = visits
        .iter()
        .map(|visit| {
            let run = &runs[visit.run];
            let of_row = |(i, row): (usize, usize)| {
                // The first key behind what the row sees.
                let end = visit.writes.map_or(run.keys, |first| first + i + 1);
                let after = plan.positions[row] as usize + 1;
                let outside = window.map_or(0, |window| after.saturating_sub(window));
                let first = outside.saturating_sub(visit.start);
                let splits = first.min(end) / SPLIT..end.div_ceil(SPLIT);
                let splits = if first < end { splits } else { 0..0 };
                let before = seen[row];
                seen[row] += u32_of(splits.len());
                Span {
                    splits,
                    first,
                    before,
                }
            };
            visit.rows.clone().enumerate().map(of_row).collect()
        })
        .collect();
    out.ranges.push(0);
    for pairs in seen {
        out.ranges.push(out.ranges[out.ranges.len() - 1] + pairs);
    }
    let n_pairs = out.ranges[out.ranges.len() - 1] as usize;
    out.order = vec![0; n_pairs];
    out.pair_rows.reserve(n_pairs);
    // Of each pair of a split, how many of its keys come before the first that the row sees.
    let mut skipped = Vec::new();
    for run in runs {
        for (nth, split) in run.splits.iter().enumerate() {
            let mut first_pair = out.pair_rows.len();
            skipped.clear();
            for &visit in &run.visits {
                for (row, span) in visits[visit].rows.clone().zip(&spans[visit]) {
                    if span.splits.contains(&nth) {
                        let place = out.ranges[row] + span.before + u32_of(nth - span.splits.start);
                        out.order[place as usize] = u32_of(out.pair_rows.len());
                        out.pair_rows.push(u32_of(row));
                        skipped.push(span.first.saturating_sub(nth * SPLIT));
                    }
                }
            }
            for skipped in skipped.chunks(rows_per_work) {
                let n = skipped.len();
                let outside = skipped.iter().copied().min().unwrap_or(0);
                let is_outside = |tile: &usize| {
                    let keys_and_start = plan.tiles[tile * 4 + 2] as usize;
                    (keys_and_start >> 16) + (keys_and_start & 0xffff) <= outside
                };
                let first = split.start + split.clone().take_while(is_outside).count();
                out.work
                    .extend([first, split.end, first_pair, n].map(u32_of));
                out.most_pairs = out.most_pairs.max(n);
                first_pair += n;
            }
        }
    }
    out
}

/// Cuts blocks into splits of [`SPLIT`] keys, each a list of tiles within pages.
fn cut<'a>(
    pages: &Pages,
    blocks: &'a [BlockId],
    known: &[Option<Known>],
    tiles: &mut Vec<u32>,
) -> Run<'a> {
    let mut splits: Vec<Range<usize>> = Vec::new();
    let mut room = 0;
    for block in blocks {
        let at = known[block.0 as usize]
            .expect("every block of a view is known")
            .at;
        let len = pages.len(*block);
        let mut index = 0;
        while index < len {
            if room == 0 {
                splits.push(tiles.len() / 4..tiles.len() / 4);
                room = SPLIT;
            }
            let keys = (PAGE - index % PAGE).min(len - index).min(room);
            let slot = pages.slot(*block, index);
            let keys_and_start = keys | (SPLIT - room) << 16;
            tiles.extend([slot, index, keys_and_start].map(u32_of));
            tiles.push(at);
            splits.last_mut().expect("one is open").end += 1;
            index += keys;
            room -= keys;
        }
    }
    Run {
        blocks,
        keys: blocks.iter().map(|&b| pages.len(b)).sum(),
        splits,
        visits: Vec::new(),
    }
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
            &[None],
        );
        assert_eq!(plan.positions, [598, 599], "the last two positions");
        assert_eq!(
            plan.locations,
            [598, 599],
            "in one block the location is the position"
        );
        assert_eq!(
            plan.sights[0].n_work(),
            3,
            "600 keys are three splits of 256"
        );
        assert_eq!(plan.sights[0].ranges, [0, 3, 6], "each row sees all three");
        assert_eq!(
            plan.sights[0].order,
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
        plan(&pages, &Batch { turns }, 16, &[None]);
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
            &[None],
        );
        let plan = &plan.sights[0];
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
        let plan = plan(&pages, &Batch { turns }, 16, &[None]);
        // One split of history, one of a, one of b; each is seen by both rows.
        assert_eq!(plan.sights[0].n_work(), 3, "{:?}", plan.sights[0].work);
        assert_eq!(
            plan.sights[0].most_pairs, 2,
            "both rows are served together"
        );
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

    /// Numbers from a seed.
    struct Random(u64);

    impl Random {
        fn below(&mut self, n: usize) -> usize {
            self.0 = self
                .0
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            usize::try_from(self.0 >> 33).expect("31 bits") % n
        }
    }

    /// A history that the workers share or not, open blocks that some see and some do not, and turns of one
    /// to many tokens.
    fn any_batch(random: &mut Random) -> (Pages, Batch) {
        let mut pages = Pages::new(4096);
        let block = |pages: &mut Pages, len: usize| {
            let block = pages.open();
            pages.extend(block, len).expect("it fits");
            block
        };
        let mut history = Vec::new();
        for _ in 0..random.below(30) {
            let most = [2, 17, 60, 700][random.below(4)];
            let step = block(&mut pages, random.below(most));
            pages.close(step);
            history.push(step);
        }
        let n_workers = 1 + random.below(8);
        let turns: Vec<(BlockId, usize)> = (0..n_workers)
            .map(|_| {
                let most = [2, 5, 400][random.below(3)];
                let n = 1 + random.below(most);
                let before = random.below(300);
                (block(&mut pages, before + n), n)
            })
            .collect();
        let view = |me: usize, random: &mut Random| {
            // Some see less of the history; all see some of the others, in any order.
            let seen = history.len() - random.below(2) * random.below(history.len() + 1);
            let mut view = history[..seen].to_vec();
            for (w, (other, _)) in turns.iter().enumerate() {
                if w != me && random.below(3) > 0 {
                    let at = seen + random.below(view.len() - seen + 1);
                    view.insert(at, *other);
                }
            }
            view.push(turns[me].0);
            view
        };
        let turns = (0..n_workers).map(|me| turn(&view(me, random), turns[me].1));
        let turns = turns.collect();
        (pages, Batch { turns })
    }

    /// What row `i` of a turn sees, by the definition: slot, index in the block and location, in order.
    fn naive(
        pages: &Pages,
        turn: &Turn,
        i: usize,
        window: Option<usize>,
    ) -> Vec<(usize, usize, usize)> {
        let view = &turn.view.0;
        let total: usize = view.iter().map(|&b| pages.len(b)).sum();
        let position = total - turn.tokens.len() + i;
        let mut seen = Vec::new();
        let mut start = 0;
        for &block in view {
            for index in 0..pages.len(block) {
                let near = |window| position < start + index + window;
                if start + index <= position && window.is_none_or(near) {
                    seen.push((pages.slot(block, index), index, position - start));
                }
            }
            start += pages.len(block);
        }
        seen
    }

    #[test]
    fn every_row_sees_the_keys_of_its_view_once_and_in_order() {
        for seed in 0..60 {
            let random = &mut Random(seed);
            let (pages, batch) = any_batch(random);
            let rows_per_work = 1 + random.below(16);
            let window = [
                None,
                Some(1 + random.below(40)),
                Some(1 + random.below(900)),
            ];
            let window = window[random.below(3)];
            let plan = plan(&pages, &batch, rows_per_work, &[None, window]);
            let (locations, n_rows) = (&plan.locations, plan.n_rows());
            let tiles: Vec<&[u32]> = plan.tiles.chunks(4).collect();
            let plan = &plan.sights[1];
            // Whether a row sees a key of a tile, and where.
            let sees = |row: usize, tile: &[u32], key: u32| {
                let location = locations[tile[3] as usize * n_rows + row];
                let (at, location) = (i64::from(tile[1] + key), i64::from(location));
                let window = window.map_or(i64::MAX, |w| i64::try_from(w).expect("small"));
                (at <= location && location - at < window).then_some(location)
            };
            let mut item_of_pair = vec![usize::MAX; plan.n_pairs()];
            for (item, work) in plan.work.chunks(4).enumerate() {
                let [first, end, first_pair, n] = [0, 1, 2, 3].map(|i| work[i] as usize);
                assert!((1..=rows_per_work).contains(&n), "{n} rows at once");
                assert!(n <= plan.most_pairs, "more than the most");
                for of_pair in &mut item_of_pair[first_pair..first_pair + n] {
                    assert_eq!(*of_pair, usize::MAX, "a pair has one work item");
                    *of_pair = item;
                }
                // Only at the front of a split tiles are left out, and no tile is there for nothing.
                let rows = &plan.pair_rows[first_pair..first_pair + n];
                let is_seen = |&row: &u32| {
                    let tile = tiles[first];
                    (0..tile[2] & 0xffff).any(|key| sees(row as usize, tile, key).is_some())
                };
                assert!(rows.iter().any(is_seen), "the first tile is outside");
                let mut keys = tiles[first][2] >> 16;
                for tile in &tiles[first..end] {
                    assert_eq!(tile[2] >> 16, keys, "a tile knows its place in the split");
                    let last = tile[0] + (tile[2] & 0xffff) - 1;
                    assert_eq!(tile[0] / 16, last / 16, "a tile lies in one page");
                    keys += tile[2] & 0xffff;
                }
                assert!(
                    (1..=u32_of(SPLIT)).contains(&keys),
                    "{keys} keys of a split"
                );
            }
            assert_eq!(plan.order.len(), plan.n_pairs(), "every pair is merged");
            let mut row = 0;
            for turn in &batch.turns {
                for i in 0..turn.tokens.len() {
                    let mut seen = Vec::new();
                    let order = plan.ranges[row] as usize..plan.ranges[row + 1] as usize;
                    for &pair in &plan.order[order] {
                        assert_eq!(plan.pair_rows[pair as usize] as usize, row, "its own pair");
                        let work = &plan.work[item_of_pair[pair as usize] * 4..][..2];
                        let before = seen.len();
                        for tile in &tiles[work[0] as usize..work[1] as usize] {
                            for key in 0..tile[2] & 0xffff {
                                if let Some(location) = sees(row, tile, key) {
                                    let location = usize::try_from(location).expect("it sees it");
                                    let [slot, index] =
                                        [tile[0] + key, tile[1] + key].map(|n| n as usize);
                                    seen.push((slot, index, location));
                                }
                            }
                        }
                        assert!(seen.len() > before, "no pair is empty");
                    }
                    assert!(
                        seen == naive(&pages, turn, i, window),
                        "row {row} of seed {seed}"
                    );
                    row += 1;
                }
            }
        }
    }

    #[test]
    fn splits_are_as_long_as_they_may_be_whatever_the_blocks() {
        let mut pages = Pages::new(64);
        let history: Vec<BlockId> = (0..40)
            .map(|i| {
                let block = pages.open();
                pages.extend(block, 1 + i % 23).expect("it fits");
                pages.close(block);
                block
            })
            .collect();
        let own = pages.open();
        pages.extend(own, 1).expect("it fits");
        let total: usize = history.iter().map(|&b| pages.len(b)).sum();
        let view: Vec<BlockId> = history.into_iter().chain([own]).collect();
        let turns = vec![turn(&view, 1)];
        let plan = plan(&pages, &Batch { turns }, 16, &[None]);
        let keys_of = |work: &[u32]| -> usize {
            let tiles = &plan.tiles[work[0] as usize * 4..work[1] as usize * 4];
            tiles.chunks(4).map(|t| t[2] as usize & 0xffff).sum()
        };
        let keys: Vec<usize> = plan.sights[0].work.chunks(4).map(keys_of).collect();
        let mut want = vec![SPLIT; total / SPLIT];
        want.extend([total % SPLIT, 1]);
        assert_eq!(keys, want, "only the last split of a history is short");
    }
}
