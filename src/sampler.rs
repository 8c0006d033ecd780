//! Logits to a token: suppression, temperature, top-k, top-p, min-p, one draw.
//!
//! The processors are those of Hugging Face, in their order. A logit's distance from the best one is
//! one f32 subtraction and one f32 multiplication, which round alike everywhere; all that follows is
//! integer arithmetic, and the exponential too: weights are 31-bit fixed point and sums are exact. So
//! neither the device nor the order of summation can change a token. Random numbers come from a counter
//! (Philox), keyed by seed, worker and pass, never by the order of calls.
//!
//! [`Sampling`] is what a person asks for, [`Rule`] the same in the numbers that a device computes with.
//! Invariant: a token depends on its own logits and on (seed, worker, pass), and on nothing else.

use crate::{Error, Result, TokenId};

/// How to choose a token. The default is greedy.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 takes the most likely token, the lowest id where several are.
    pub temperature: f32,
    /// Keeps this many of the most likely tokens, and what ties with the last one; 0 keeps all.
    pub top_k: usize,
    /// Keeps the smallest set of tokens whose probability reaches this; 1 keeps all.
    pub top_p: f32,
    /// Keeps tokens at least this likely, relative to the most likely one; 0 keeps all.
    pub min_p: f32,
    /// Key of the random numbers.
    pub seed: u64,
    /// Ids from here on are padding of the model's matrix and never chosen.
    pub limit: Option<usize>,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: 0,
            limit: None,
        }
    }
}

/// A [`Sampling`] in the numbers that a device computes with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rule {
    /// What turns a distance of logits into halvings of the weight, times 2^26; 0 is greedy.
    pub inverse: f32,
    /// As [`Sampling::top_k`].
    pub top_k: u32,
    /// The share of all weight that the least likely tokens may take with them, times 2^32.
    pub may_go: u32,
    /// The least weight that is kept.
    pub least: u32,
    /// Ids from here on are never chosen.
    pub limit: u32,
}

/// Weight of the most likely token: 1, with 31 bits after the point.
const ONE: u32 = 1 << 31;

/// Bits after the point of a number of halvings.
const HALVING: u32 = 26;

/// `2^-f = 1 - f (c[0] - f (c[1] - ...))` for f in [0, 1) to within 2^-26, with 32 bits after the point:
/// the polynomial through six Chebyshev nodes.
const POLYNOMIAL: [u32; 6] = [
    0xb172_17df,
    0x3d7f_7506,
    0x0e35_3290,
    0x0274_f388,
    0x0054_a612,
    0x0007_8809,
];

/// Largest value that a logit counts as in a distance, 2^60, so that no distance is infinite.
const LARGEST: u32 = (127 + 60) << 23;

/// A token that may still be chosen.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    id: usize,
    /// As [`key`] gives it.
    key: u32,
    /// As [`weight`] gives it.
    weight: u32,
}

impl Sampling {
    /// Always the most likely token.
    pub fn greedy() -> Self {
        Self::default()
    }

    /// Checks the values.
    ///
    /// # Errors
    /// [`Error::Usage`] that names the value and its range.
    pub fn check(&self) -> Result<()> {
        let wrong = |name: &str, value: f32, range: &str| {
            Err(Error::Usage(format!("{name} is {value}; give {range}")))
        };
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return wrong("temperature", self.temperature, "0 or more");
        }
        if !(0.0..=1.0).contains(&self.top_p) {
            return wrong("top-p", self.top_p, "a number from 0 to 1");
        }
        if !(0.0..=1.0).contains(&self.min_p) {
            return wrong("min-p", self.min_p, "a number from 0 to 1");
        }
        if self.limit == Some(0) {
            return Err(Error::Usage(
                "the limit leaves no token to choose".to_owned(),
            ));
        }
        Ok(())
    }

    /// The same in the numbers that a device computes with.
    pub fn rule(&self) -> Rule {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "what is out of range saturates, as is meant"
        )]
        let (inverse, may_go, least) = {
            let halvings = std::f64::consts::LOG2_E * f64::from(1u32 << HALVING);
            let inverse = (halvings / f64::from(self.temperature)) as f32;
            let parts = f64::from(u32::MAX) + 1.0;
            (
                // A product with a distance of at most 2^61 is finite; a tiny one is not flushed.
                inverse.clamp(f32::MIN_POSITIVE, f32::from_bits(LARGEST)),
                ((1.0 - f64::from(self.top_p)) * parts) as u32,
                (f64::from(self.min_p) * f64::from(ONE)).ceil() as u32,
            )
        };
        let greedy = self.temperature == 0.0;
        let or_most = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        Rule {
            inverse: if greedy { 0.0 } else { inverse },
            top_k: or_most(self.top_k),
            may_go,
            least,
            limit: self.limit.map_or(u32::MAX, or_most),
        }
    }

    /// Probability of every token, `[vocab]`; all zero where [`Self::sample`] gives none.
    pub fn probabilities(&self, logits: &[f32], suppressed: &[TokenId]) -> Vec<f32> {
        let mut out = vec![0.0; logits.len()];
        let mask = mask(suppressed, logits.len());
        let kept = self.rule().candidates(logits, &mask).unwrap_or_default();
        let total = total(&kept);
        for c in kept {
            #[allow(clippy::cast_possible_truncation, reason = "rounding to f32 is meant")]
            let p = (f64::from(c.weight) / total as f64) as f32;
            out[c.id] = p;
        }
        out
    }

    /// Chooses a token of one worker in one pass.
    ///
    /// None where a logit below the limit is NaN or +infinity, or where every token is suppressed.
    pub fn sample(
        &self,
        logits: &[f32],
        suppressed: &[TokenId],
        worker: usize,
        pass: u64,
    ) -> Option<TokenId> {
        let mask = mask(suppressed, logits.len());
        self.rule().choose(logits, &mask, self.draw(worker, pass))
    }

    /// 64 random bits of a worker's pass.
    pub fn draw(&self, worker: usize, pass: u64) -> u64 {
        let [seed_low, seed_high] = halves(self.seed);
        let [pass_low, pass_high] = halves(pass);
        let [worker, _] = halves(worker as u64);
        let bits = philox([pass_low, pass_high, worker, 0], [seed_low, seed_high]);
        u64::from(bits[0]) | u64::from(bits[1]) << 32
    }
}

impl Rule {
    /// Chooses a token with 64 random bits; `mask` is that of [`mask`].
    ///
    /// None where a logit below the limit is NaN or +infinity, or where every token is suppressed.
    pub fn choose(&self, logits: &[f32], mask: &[u32], draw: u64) -> Option<TokenId> {
        let kept = self.candidates(logits, mask)?;
        // The product of a 64-bit fraction and the total: uniform on 0..total.
        let target = (u128::from(draw) * u128::from(total(&kept))) >> 64;
        let mut sum: u128 = 0;
        let chosen = kept.iter().find(|c| {
            sum += u128::from(c.weight);
            sum > target
        })?;
        u32::try_from(chosen.id).ok()
    }

    /// What may be chosen, by ascending id, with weights that are not zero.
    fn candidates(&self, logits: &[f32], mask: &[u32]) -> Option<Vec<Candidate>> {
        let limit = (self.limit as usize).min(logits.len());
        let mut kept = Vec::new();
        for (id, &logit) in logits[..limit].iter().enumerate() {
            let key = key(logit)?;
            if key > 0 && mask[id / 32] >> (id % 32) & 1 == 0 {
                let weight = ONE;
                kept.push(Candidate { id, key, weight });
            }
        }
        let best = kept.iter().map(|c| c.key).max()?;
        if self.inverse == 0.0 {
            let first = kept.into_iter().find(|c| c.key == best)?;
            return Some(vec![first]);
        }
        self.keep_top_k(&mut kept);
        for c in &mut kept {
            c.weight = weight(best, c.key, self.inverse);
        }
        // What weighs nothing is never chosen, and takes nothing with it.
        kept.retain(|c| c.weight > 0);
        self.keep_top_p(&mut kept);
        // Relative to the most likely token the rule needs no sum: its weight is 1.
        kept.retain(|c| c.weight >= self.least);
        Some(kept)
    }

    /// Drops what is below the k-th largest logit; ties with it stay.
    fn keep_top_k(&self, kept: &mut Vec<Candidate>) {
        let k = self.top_k as usize;
        if k == 0 || k >= kept.len() {
            return;
        }
        let mut sorted: Vec<u32> = kept.iter().map(|c| c.key).collect();
        let (_, &mut kth, _) = sorted.select_nth_unstable_by(k - 1, |a, b| b.cmp(a));
        kept.retain(|c| c.key >= kth);
    }

    /// Drops the least likely tokens while their sum stays within 1 - p; among equal ones the lower
    /// id goes first, as in a stable ascending sort. The share is less than one, so that one stays.
    fn keep_top_p(&self, kept: &mut Vec<Candidate>) {
        let may_go = (u128::from(total(kept)) * u128::from(self.may_go)) >> 32;
        if may_go == 0 {
            return;
        }
        kept.sort_unstable_by_key(|c| (c.key, c.id));
        let mut sum: u128 = 0;
        let goes = |c: &&Candidate| {
            sum += u128::from(c.weight);
            sum <= may_go
        };
        let gone = kept.iter().take_while(goes).count();
        kept.drain(..gone);
        kept.sort_unstable_by_key(|c| c.id);
    }
}

fn total(kept: &[Candidate]) -> u64 {
    kept.iter().map(|c| u64::from(c.weight)).sum()
}

/// A bit for each token of a vocabulary, `[vocab / 32]` rounded up: whether it is suppressed.
pub fn mask(suppressed: &[TokenId], vocab: usize) -> Vec<u32> {
    let mut mask = vec![0; vocab.div_ceil(32)];
    for &id in suppressed {
        if let Some(word) = mask.get_mut(id as usize / 32) {
            *word |= 1 << (id % 32);
        }
    }
    mask
}

/// A number that grows with the logit: 0 for -infinity, none for NaN and +infinity.
///
/// Numbers too small to be normal count as zero, as on devices that do not know them.
fn key(logit: f32) -> Option<u32> {
    const INFINITY: u32 = 0xff << 23;
    let bits = logit.to_bits();
    let (negative, magnitude) = (bits >> 31 == 1, bits & !ONE);
    match magnitude {
        INFINITY if negative => Some(0),
        INFINITY.. => None,
        0..0x0080_0000 => Some(ONE),
        _ if negative => Some(!bits),
        _ => Some(bits | ONE),
    }
}

/// What a key's logit counts as in a distance.
fn value(key: u32) -> f32 {
    let negative = key < ONE;
    let magnitude = if negative { !key } else { key } & !ONE;
    let sign = u32::from(negative) << 31;
    f32::from_bits(sign | magnitude.min(LARGEST))
}

/// `exp((logit - best) / temperature)` with 31 bits after the point, from the keys of the logits.
///
/// The distance is rounded twice, to 24 bits each time; the rest is exact to 2^-25 of the weight.
fn weight(best: u32, key: u32, inverse: f32) -> u32 {
    let halvings = (value(best) - value(key)) * inverse;
    if halvings >= 2_147_483_648.0 {
        return 0;
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "between 0 and 2^31, rounded down"
    )]
    let halvings = halvings as u32;
    let fraction = halvings << (32 - HALVING);
    let [first, rest @ ..] = POLYNOMIAL;
    let tail = |sum: u32, c: &u32| c - high(sum, fraction);
    let [.., last] = rest;
    let sum = rest[..4].iter().rev().fold(last, tail);
    let gone = high(tail(sum, &first), fraction);
    (ONE - gone / 2) >> (halvings >> HALVING)
}

/// The upper half of a product.
fn high(a: u32, b: u32) -> u32 {
    halves(u64::from(a) * u64::from(b))[1]
}

fn halves(x: u64) -> [u32; 2] {
    let b = x.to_le_bytes();
    [
        u32::from_le_bytes([b[0], b[1], b[2], b[3]]),
        u32::from_le_bytes([b[4], b[5], b[6], b[7]]),
    ]
}

/// Philox 4x32 with ten rounds: 128 random bits from a counter and a key.
///
/// *Source*: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
pub fn philox(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let [mut a, mut b, mut c, mut d] = counter;
    let [mut k, mut l] = key;
    for _ in 0..10 {
        let [low_a, high_a] = halves(u64::from(a) * 0xD251_1F53);
        let [low_c, high_c] = halves(u64::from(c) * 0xCD9E_8D57);
        [a, b, c, d] = [high_c ^ b ^ k, low_c, high_a ^ d ^ l, low_a];
        k = k.wrapping_add(0x9E37_79B9);
        l = l.wrapping_add(0xBB67_AE85);
    }
    [a, b, c, d]
}

#[cfg(test)]
mod tests {
    use super::{HALVING, ONE, POLYNOMIAL, Sampling, key, philox, value, weight};

    const WARM: Sampling = Sampling {
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        seed: 7,
        limit: None,
    };

    #[test]
    fn philox_gives_the_published_answers() {
        for (counter, key, want) in [
            (
                [0; 4],
                [0; 2],
                [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8],
            ),
            (
                [u32::MAX; 4],
                [u32::MAX; 2],
                [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd],
            ),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ] {
            assert_eq!(philox(counter, key), want, "Random123's kat_vectors");
        }
    }

    #[test]
    fn greedy_takes_the_lowest_of_equal_ids() {
        let greedy = Sampling::greedy();
        let logits = [0.0, 3.0, 3.0, 1.0];
        assert_eq!(greedy.sample(&logits, &[], 0, 0), Some(1), "a tie");
        assert_eq!(greedy.sample(&logits, &[1], 0, 0), Some(2), "suppressed");
        let two = Sampling {
            limit: Some(1),
            ..greedy
        };
        assert_eq!(two.sample(&logits, &[], 0, 0), Some(0), "padding is masked");
    }

    #[test]
    fn what_is_not_finite_gives_no_token() {
        for sampling in [Sampling::greedy(), WARM] {
            for bad in [f32::NAN, f32::INFINITY] {
                assert_eq!(sampling.sample(&[0.0, bad], &[], 0, 0), None, "{bad}");
                let limited = Sampling {
                    limit: Some(1),
                    ..sampling
                };
                assert_eq!(
                    limited.sample(&[0.0, bad], &[], 0, 0),
                    Some(0),
                    "padding does not count"
                );
            }
            assert_eq!(
                sampling.sample(&[0.0, 1.0], &[0, 1], 0, 0),
                None,
                "nothing left"
            );
            assert_eq!(
                sampling.sample(&[f32::NEG_INFINITY, 1.0], &[], 0, 0),
                Some(1),
                "-infinity is a mask"
            );
            assert_eq!(sampling.sample(&[], &[], 0, 0), None, "no logits");
        }
    }

    #[test]
    fn ties_stay_in_top_k_and_leave_top_p_in_order_of_id() {
        let logits = [1.0, 2.0, 1.0, 1.0];
        let kept = |s: Sampling| -> Vec<usize> {
            let p = s.probabilities(&logits, &[]);
            (0..4).filter(|&i| p[i] > 0.0).collect()
        };
        assert_eq!(kept(Sampling { top_k: 2, ..WARM }), [0, 1, 2, 3], "all tie");
        assert_eq!(kept(Sampling { top_k: 1, ..WARM }), [1], "one is best");
        // e : 1 : 1 : 1, that is 0.475 and three times 0.175.
        assert_eq!(
            kept(Sampling { top_p: 0.6, ..WARM }),
            [1, 3],
            "the last tie stays"
        );
        assert_eq!(kept(Sampling { top_p: 0.0, ..WARM }), [1], "at least one");
        assert_eq!(
            kept(Sampling { min_p: 1.0, ..WARM }),
            [1],
            "as likely as the best"
        );
        assert_eq!(
            kept(Sampling { min_p: 0.3, ..WARM }),
            [0, 1, 2, 3],
            "a third as likely"
        );
    }

    #[test]
    fn draws_follow_the_probabilities_and_not_the_order_of_calls() {
        let logits = [0.0, 1.0, f32::NEG_INFINITY, -1.0];
        let p = WARM.probabilities(&logits, &[]);
        let mut counts = [0_u32; 4];
        for pass in 0..40_000 {
            let id = WARM.sample(&logits, &[], 3, pass).expect("finite logits");
            counts[id as usize] += 1;
        }
        for (p, n) in p.iter().zip(counts) {
            let share = f64::from(n) / 40_000.0;
            assert!((share - f64::from(*p)).abs() < 0.01, "{share} for {p}");
        }
        let draw = |seed, worker, pass| -> Vec<_> {
            let s = Sampling { seed, ..WARM };
            (0..32_u64)
                .map(|i| s.sample(&logits, &[], worker, pass + i))
                .collect()
        };
        assert_eq!(draw(1, 2, 3), draw(1, 2, 3), "the same key, the same draws");
        assert_ne!(draw(1, 2, 3), draw(2, 2, 3), "another seed");
        assert_ne!(draw(1, 2, 3), draw(1, 3, 3), "another worker");
        assert_ne!(draw(1, 2, 3), draw(1, 2, 1 << 40), "another pass");
    }

    #[test]
    fn weights_are_powers_of_two() {
        // One halving for each unit of distance.
        let inverse = (1u32 << HALVING) as f32;
        let best = key(0.0).expect("a number");
        let mut last = ONE;
        let mut worst = 0.0_f64;
        for i in 0..700_001u32 {
            let distance = f64::from(i) * 4.573e-5;
            #[allow(clippy::cast_possible_truncation, reason = "a test value")]
            let logit = -distance as f32;
            let w = weight(best, key(logit).expect("a number"), inverse);
            assert!(w <= last, "{distance}: weights fall");
            last = w;
            let exact = f64::from(logit).exp2() * f64::from(ONE);
            worst = worst.max((f64::from(w) - exact).abs() - exact * 2.0_f64.powi(-25));
        }
        assert!(worst < 1.0, "rounded down once: {worst}");
        assert_eq!((weight(best, best, inverse), last), (ONE, 0), "both ends");
        let sum: f64 = POLYNOMIAL
            .iter()
            .rev()
            .fold(0.0, |sum, &c| f64::from(c) / 2.0_f64.powi(32) - sum);
        assert!(
            (sum - 0.5).abs() < 1e-7,
            "2^-1 is a half, not {}",
            1.0 - sum
        );
    }

    #[test]
    fn keys_keep_the_order_of_logits() {
        let rising = [
            f32::NEG_INFINITY,
            f32::MIN,
            -1e20,
            -1.5,
            -f32::MIN_POSITIVE,
            0.0,
            f32::MIN_POSITIVE,
            1.0,
            1.000_000_1,
            f32::MAX,
        ];
        let keys: Vec<u32> = rising.iter().map(|&l| key(l).expect("no NaN")).collect();
        assert!(keys.is_sorted_by(|a, b| a < b), "{keys:?}");
        assert_eq!(keys[0], 0, "a mask");
        for zero in [0.0, -0.0, 1e-40, -1e-40] {
            assert_eq!(key(zero), key(0.0), "{zero}");
        }
        for (logit, counts) in [(-1.5, -1.5), (3e38, 2.0_f32.powi(60)), (-0.0, 0.0)] {
            let value = value(key(logit).expect("a number"));
            assert_eq!(value.to_bits(), f32::to_bits(counts), "{logit}");
        }
        let bad = [f32::NAN, -f32::NAN, f32::INFINITY];
        assert_eq!(bad.map(key), [None; 3], "no number");
    }

    #[test]
    fn extreme_temperatures_are_sound() {
        for temperature in [1e-30, 1e-3, 1e30] {
            let s = Sampling {
                temperature,
                ..WARM
            };
            let p = s.probabilities(&[-5e4, 5e4, 0.0], &[]);
            assert!(
                (p.iter().sum::<f32>() - 1.0).abs() < 1e-6,
                "{temperature}: {p:?}"
            );
        }
    }

    #[test]
    fn values_out_of_range_are_refused() {
        assert!(WARM.check().is_ok(), "sound values");
        for bad in [
            Sampling {
                temperature: -1.0,
                ..WARM
            },
            Sampling {
                temperature: f32::NAN,
                ..WARM
            },
            Sampling {
                temperature: f32::INFINITY,
                ..WARM
            },
            Sampling { top_p: 1.5, ..WARM },
            Sampling {
                top_p: f32::NAN,
                ..WARM
            },
            Sampling {
                min_p: -0.1,
                ..WARM
            },
            Sampling {
                limit: Some(0),
                ..WARM
            },
        ] {
            assert!(bad.check().is_err(), "{bad:?}");
        }
    }
}
