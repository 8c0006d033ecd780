//! Logits to a token: suppression, temperature, top-k, top-p, min-p, one draw.
//!
//! The processors are those of Hugging Face, in their order. Everything after the exponential is
//! integer arithmetic: weights are 31-bit fixed point and sums are exact, so that the order of
//! summation, which differs between devices, cannot change a token. Random numbers come from a
//! counter (Philox), keyed by seed, worker and pass, never by the order of calls.
//!
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

/// Weight of the most likely token: 1 as a fixed-point number.
const ONE: f32 = 2_147_483_648.0;

/// A token that may still be chosen.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    id: usize,
    logit: f32,
    /// `exp((logit - max) / temperature)`, 31 bits after the point.
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

    /// Probability of every token, `[vocab]`; all zero where [`Self::sample`] gives none.
    pub fn probabilities(&self, logits: &[f32], suppressed: &[TokenId]) -> Vec<f32> {
        let mut out = vec![0.0; logits.len()];
        let kept = self.candidates(logits, suppressed).unwrap_or_default();
        let total: u64 = kept.iter().map(|c| u64::from(c.weight)).sum();
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
        let kept = self.candidates(logits, suppressed)?;
        let total: u64 = kept.iter().map(|c| u64::from(c.weight)).sum();
        // The product of a 64-bit fraction and the total: uniform on 0..total.
        let target = (u128::from(self.random(worker, pass)) * u128::from(total)) >> 64;
        let mut sum: u128 = 0;
        let chosen = kept.iter().find(|c| {
            sum += u128::from(c.weight);
            sum > target
        })?;
        u32::try_from(chosen.id).ok()
    }

    /// 64 random bits of a worker's pass.
    fn random(&self, worker: usize, pass: u64) -> u64 {
        let [seed_low, seed_high] = halves(self.seed);
        let [pass_low, pass_high] = halves(pass);
        let [worker, _] = halves(worker as u64);
        let bits = philox([pass_low, pass_high, worker, 0], [seed_low, seed_high]);
        u64::from(bits[0]) | u64::from(bits[1]) << 32
    }

    /// What may be chosen, by ascending id, with weights whose sum is not zero.
    fn candidates(&self, logits: &[f32], suppressed: &[TokenId]) -> Option<Vec<Candidate>> {
        let logits = &logits[..self.limit.unwrap_or(logits.len()).min(logits.len())];
        if logits.iter().any(|l| l.is_nan() || *l == f32::INFINITY) {
            return None;
        }
        let mut allowed = vec![true; logits.len()];
        for &id in suppressed {
            if let Some(slot) = allowed.get_mut(id as usize) {
                *slot = false;
            }
        }
        let mut kept: Vec<Candidate> = logits
            .iter()
            .zip(&allowed)
            .enumerate()
            .filter(|(_, (logit, allowed))| **allowed && **logit > f32::NEG_INFINITY)
            .map(|(id, (&logit, _))| Candidate {
                id,
                logit,
                weight: 0,
            })
            .collect();
        let best = kept
            .iter()
            .copied()
            .reduce(|a, b| if b.logit > a.logit { b } else { a })?;
        if self.temperature == 0.0 {
            return Some(vec![Candidate { weight: 1, ..best }]);
        }
        self.keep_top_k(&mut kept);
        for c in &mut kept {
            let x = (c.logit - best.logit) / self.temperature;
            #[allow(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "between 0 and 2^31, rounded down"
            )]
            let weight = (x.exp() * ONE) as u32;
            c.weight = weight;
        }
        self.keep_top_p(&mut kept);
        // Relative to the most likely token the rule needs no sum: its weight is 1.
        let least = f64::from(self.min_p) * f64::from(ONE);
        kept.retain(|c| f64::from(c.weight) >= least);
        Some(kept)
    }

    /// Drops what is below the k-th largest logit; ties with it stay.
    fn keep_top_k(&self, kept: &mut Vec<Candidate>) {
        if self.top_k == 0 || self.top_k >= kept.len() {
            return;
        }
        let mut sorted: Vec<f32> = kept.iter().map(|c| c.logit).collect();
        let (_, kth, _) = sorted.select_nth_unstable_by(self.top_k - 1, |a, b| b.total_cmp(a));
        let kth = *kth;
        kept.retain(|c| c.logit >= kth);
    }

    /// Drops the least likely tokens while their sum stays within 1 - p; among equal ones the lower
    /// id goes first, as in a stable ascending sort.
    fn keep_top_p(&self, kept: &mut Vec<Candidate>) {
        if self.top_p >= 1.0 || kept.len() < 2 {
            return;
        }
        let total: u64 = kept.iter().map(|c| u64::from(c.weight)).sum();
        let may_go = (1.0 - f64::from(self.top_p)) * total as f64;
        kept.sort_by(|a, b| a.logit.total_cmp(&b.logit).then(a.id.cmp(&b.id)));
        let mut sum = 0;
        let gone = kept
            .iter()
            .take_while(|c| {
                sum += u64::from(c.weight);
                sum as f64 <= may_go
            })
            .count();
        kept.drain(..gone.min(kept.len() - 1));
        kept.sort_by_key(|c| c.id);
    }
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
    use super::{Sampling, philox};

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
