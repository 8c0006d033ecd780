//! The built-in model under many conditions, beside the scripted policy that it learned from.
//!
//! The policy is that of `examples/demo_model/task.py`: claim the first free sum in one's own order, give
//! a claim up that somebody else made first, add up, and who finds no free sum begins the answer.

#![allow(unreachable_pub, reason = "an example has no outside")]
#![allow(dead_code, reason = "the example and the tests each use a part of it")]

use std::collections::VecDeque;
use std::sync::Arc;

use hogwild::cache::layout::Layout;
use hogwild::demo::{self, LABELS, Problem};
use hogwild::device::Device;
use hogwild::model::Model;
use hogwild::protocol::{Problem as Asked, PromptStyle, Protocol};
use hogwild::session::{Command, Event, Session, Settings};
use hogwild::text::{Date, Text};
use hogwild::{Result, sampler};

/// Names that no training example had.
pub const UNSEEN_NAMES: [&str; 4] = ["Anna", "Boris", "Chloe", "Dmitri"];

/// What a run is put through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scene {
    /// Everybody takes part in every pass.
    Plain,
    /// Each worker misses passes at random.
    Stalls,
    /// All but the first join after some passes.
    Late,
    /// All but the first retire after a step or two.
    Retire,
    /// Workers see each other's finished steps only.
    Interleaved,
    /// Workers see each other's texts, each in one piece.
    Contiguous,
    /// The usual names, in another order.
    Swapped,
    /// Names that no training example had.
    Unseen,
}

/// How a run went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Run {
    /// Passes until the answer, or all of the budget.
    pub passes: u64,
    /// Sums of the problem.
    pub sums: usize,
    /// Results of the answer that are right; none without an answer.
    pub right: usize,
    /// Sums that were added up, by anybody.
    pub work: usize,
}

impl Run {
    /// Whether every result is right.
    pub fn all_right(&self) -> bool {
        self.right == self.sums
    }

    /// Sums that were added up more than once.
    pub fn duplicates(&self) -> usize {
        self.work.saturating_sub(self.sums)
    }
}

/// Who takes part in which pass: the same for the engine and for the policy.
#[derive(Clone, Debug)]
struct Schedule {
    seed: u64,
    join: Vec<u64>,
    /// Steps after which a worker retires.
    quit: Vec<usize>,
    /// Chance in 256 of missing a pass.
    stall: Vec<u32>,
}

fn random(seed: u64, a: u64, b: u64) -> u32 {
    let low = |n: u64| u32::try_from(n & 0xffff_ffff).unwrap_or(0);
    sampler::philox([low(a), low(b), 7, 7], [low(seed), low(seed >> 32)])[0]
}

impl Schedule {
    fn new(seed: u64, scene: Scene, workers: usize) -> Self {
        let draw = |w: usize, n: u32| random(seed, 1_000_000 + w as u64, 0) % n;
        let late = |w| {
            if scene == Scene::Late && w > 0 {
                u64::from(1 + draw(w, 60))
            } else {
                0
            }
        };
        let quit = |w| {
            if scene == Scene::Retire && w > 0 {
                1 + draw(w, 2) as usize
            } else {
                usize::MAX
            }
        };
        let stall = |w| {
            if scene == Scene::Stalls {
                [0, 26, 51, 77, 128][draw(w, 5) as usize]
            } else {
                0
            }
        };
        let mut join: Vec<u64> = (0..workers).map(late).collect();
        // Workers join in the order of their numbers.
        join.sort_unstable();
        Self {
            seed,
            join,
            quit: (0..workers).map(quit).collect(),
            stall: (0..workers).map(stall).collect(),
        }
    }

    fn is_on(&self, worker: usize, clock: u64) -> bool {
        clock >= self.join[worker]
            && random(self.seed, clock, worker as u64) % 256 >= self.stall[worker]
    }
}

/// The built-in model on a device.
#[derive(Debug)]
pub struct Stage {
    model: Arc<Model>,
    text: Arc<Text>,
    style: PromptStyle,
    kv_dtype: String,
}

const CONTEXT: usize = 3000;
const MAX_PASSES: u64 = 700;

impl Stage {
    /// Loads the model.
    pub fn new(device: Arc<Device>, kv_dtype: &str) -> Result<Self> {
        Ok(Self {
            model: Arc::new(Model::load(device, &demo::files()?, CONTEXT, &mut |_| {})?),
            text: Arc::new(demo::text()?),
            style: demo::style()?,
            kv_dtype: kv_dtype.to_owned(),
        })
    }

    /// A session on a problem that has not begun.
    pub fn session(&self, problem: &Problem, names: &[&str], layout: Layout) -> Result<Session> {
        let text = problem.to_string();
        let asked = Asked {
            text: &text,
            style: &self.style,
            thinking: None,
            today: Date::default(),
        };
        let protocol = Protocol::open(self.text.clone(), demo::rules(), names, &asked)?;
        let settings = Settings {
            layout,
            max_passes: MAX_PASSES,
            context: CONTEXT,
            kv_dtype: self.kv_dtype.clone(),
            early_answer: false,
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: 0,
            vocab_limit: None,
        };
        Session::new(
            settings.engine(self.model.clone(), false)?,
            protocol,
            settings,
        )
    }

    /// Solves a problem with the given workers; also tells what was written, step by step.
    pub fn run(
        &self,
        problem: &Problem,
        names: &[&str],
        scene: Scene,
        seed: u64,
    ) -> Result<(Run, Vec<String>)> {
        let layout = match scene {
            Scene::Interleaved => Layout::Interleaved,
            Scene::Contiguous => Layout::Contiguous,
            _ => Layout::Combined,
        };
        let schedule = Schedule::new(seed, scene, names.len());
        let first = schedule.join.iter().filter(|&&at| at == 0).count();
        let mut session = self.session(problem, &names[..first], layout)?;
        let mut out = Run {
            sums: problem.sums().len(),
            ..Run::default()
        };
        let (mut held, mut retired) = (vec![false; names.len()], vec![false; names.len()]);
        let mut clock = 0;
        while !session.is_over() && clock < 4 * MAX_PASSES {
            let mut commands = Vec::new();
            for (worker, name) in names.iter().enumerate() {
                if session.protocol().n_workers() + joining(&commands) <= worker {
                    if clock >= schedule.join[worker] {
                        commands.push(Command::Join {
                            name: (*name).to_owned(),
                        });
                    } else {
                        break;
                    }
                } else if !retired[worker]
                    && session.protocol().step(worker) > schedule.quit[worker]
                {
                    retired[worker] = true;
                    commands.push(Command::Retire { worker });
                }
                let hold = !schedule.is_on(worker, clock);
                if !retired[worker] && hold != held[worker] {
                    held[worker] = hold;
                    commands.push(if hold {
                        Command::Hold { worker }
                    } else {
                        Command::Resume { worker }
                    });
                }
            }
            for event in session.step(&commands)? {
                if let Event::Finish {
                    answer: Some(answer),
                    ..
                } = event
                {
                    out.right = problem.right(&answer).unwrap_or(0);
                }
            }
            clock += 1;
        }
        out.passes = session.passes();
        let protocol = session.protocol();
        let history = protocol.history_tokens();
        let finished = protocol
            .steps()
            .iter()
            .map(|step| &history[step.tokens.clone()]);
        let current = (0..protocol.n_workers()).map(|w| protocol.current_tokens(w));
        let steps: Vec<String> = finished
            .chain(current)
            .map(|ids| self.text.decode(ids))
            .collect();
        out.work = steps.iter().filter(|step| adds_up(step)).count();
        Ok((out, steps))
    }
}

fn joining(commands: &[Command]) -> usize {
    commands
        .iter()
        .filter(|c| matches!(c, Command::Join { .. }))
        .count()
}

/// Whether a step adds a sum up: `… c: 20+8=28`.
fn adds_up(step: &str) -> bool {
    LABELS
        .iter()
        .any(|label| step.contains(&format!(" {label}: ")))
}

/// What the scripted policy says next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Word {
    Claim(usize),
    Answer,
    Box,
    Comma,
    Blank,
    Taken,
    Wait,
    WaitOn,
    /// The end of a step's prefix.
    StepOpen,
    Separator,
    /// A token that only takes its time.
    Other,
}

/// What a worker claims: a sum, or the answer.
const ANSWER: usize = usize::MAX;

/// Passes and work of the scripted policy on the same problem and schedule.
#[allow(
    clippy::too_many_lines,
    reason = "one loop, told as the policy's source tells it"
)]
pub fn policy(problem: &Problem, names: &[&str], scene: Scene, seed: u64) -> Run {
    let (sums, n) = (problem.sums(), names.len());
    let k = sums.len();
    let digits = |v: u32| if v < 10 { 1 } else { 2 };
    let rank = |w: usize| {
        names[w]
            .bytes()
            .next()
            .map_or(0, |b| usize::from(b.wrapping_sub(b'A')))
    };
    let order = |w: usize| -> Vec<usize> {
        match rank(w) % 4 {
            0 => (0..k).collect(),
            1 => (0..k).rev().collect(),
            2 => (0..k).map(|i| (k / 2 + i) % k).collect(),
            _ => (0..k).map(|i| (k / 2 + 2 * k - 1 - i) % k).collect(),
        }
    };
    let schedule = Schedule::new(seed, scene, n);
    let mut claims: Vec<(usize, usize, u64)> = Vec::new();
    let (mut done, mut slot, mut work, mut passes) = (Vec::new(), 0, 0, 0u64);
    // The last word of each worker's pending tokens, and whether it stands alone.
    let mut pending = vec![(Word::StepOpen, false); n];
    let mut queue: Vec<VecDeque<Word>> = vec![VecDeque::new(); n];
    let (mut doing, mut closed, mut step) = (vec![None; n], vec![false; n], vec![1; n]);
    let (mut last, mut gone) = (vec![false; n], vec![false; n]);
    for clock in 0..4 * MAX_PASSES {
        let on: Vec<bool> = (0..n)
            .map(|w| !gone[w] && (last[w] || schedule.is_on(w, clock)))
            .collect();
        if !on.contains(&true) {
            continue;
        }
        let t = passes;
        for w in 0..n {
            if closed[w] && on.contains(&true) {
                done.extend(doing[w].take());
                closed[w] = false;
            }
            if let (true, (word, true)) = (on[w], pending[w]) {
                match word {
                    Word::Claim(i) => claims.push((i, w, t)),
                    Word::Answer => claims.push((ANSWER, w, t)),
                    _ => {}
                }
            }
        }
        passes += 1;
        for w in 0..n {
            if !on[w] {
                continue;
            }
            if last[w] {
                (gone[w], last[w]) = (true, false);
                continue;
            }
            let word = pending[w].0;
            let said = if let Some(next) = queue[w].pop_front() {
                next
            } else {
                let taken = |i: usize| claims.iter().any(|c| c.0 == i);
                match word {
                    Word::StepOpen | Word::Taken => match order(w).into_iter().find(|&i| !taken(i))
                    {
                        Some(free) => Word::Claim(free),
                        None if taken(ANSWER) => Word::Wait,
                        None => Word::Answer,
                    },
                    Word::Claim(_) | Word::Answer => {
                        let me = if let Word::Claim(i) = word { i } else { ANSWER };
                        let lost = claims.iter().any(|&(c, o, p)| {
                            (o, p) != (w, t) && c == me && (p < t || (o != w && rank(o) < rank(w)))
                        });
                        if lost {
                            Word::Taken
                        } else {
                            doing[w] = Some(me);
                            if me == ANSWER {
                                Word::Box
                            } else {
                                work += 1;
                                let mut total = sums[me][0];
                                let mut tokens = digits(total);
                                for term in &sums[me][1..] {
                                    total += term;
                                    tokens += 3 + digits(total);
                                }
                                queue[w].extend(std::iter::repeat_n(Word::Other, tokens + 1));
                                queue[w].push_back(Word::Separator);
                                Word::Other
                            }
                        }
                    }
                    Word::Box | Word::Comma | Word::Blank => {
                        if done.contains(&slot) {
                            let more = digits(sums[slot].iter().sum()) - 1;
                            queue[w].extend(std::iter::repeat_n(Word::Other, more));
                            if slot + 1 < k {
                                queue[w].push_back(Word::Comma);
                            } else {
                                queue[w].extend([Word::Other, Word::Other, Word::Separator]);
                            }
                            slot += 1;
                            Word::Other
                        } else {
                            Word::Blank
                        }
                    }
                    _ => Word::WaitOn,
                }
            };
            pending[w] = (said, true);
            if said == Word::Separator {
                if doing[w] == Some(ANSWER) {
                    return Run {
                        passes,
                        sums: k,
                        right: k,
                        work,
                    };
                }
                step[w] += 1;
                closed[w] = true;
                pending[w] = (Word::StepOpen, false);
                let others = (0..n).any(|o| o != w && !gone[o] && !last[o]);
                last[w] = step[w] > schedule.quit[w] && others;
            }
        }
    }
    Run {
        passes,
        sums: k,
        right: 0,
        work,
    }
}
