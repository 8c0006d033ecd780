// The factor of a row whose squares add up to `squares`.
fn norm_scale(squares: f32) -> f32 {
    return 1.0 / sqrt(squares / f32(params.count) + params.eps);
}
