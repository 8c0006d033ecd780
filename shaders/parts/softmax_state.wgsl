// Online softmax: partial results (max, sum, accumulator) merge by log-sum-exp.

// Weight of a partial with the given max in a result whose max is `into`; zero for an empty partial,
// whose max is NEG_LARGE, and one when the two are equal.
fn softmax_rescale(max_from: f32, into: f32) -> f32 {
    return exp(max_from - into);
}
