// What the linear ops share, by columns and by tiles.

// Eight weights times eight numbers, summed in a fixed order. A sum of such sums errs less than one long
// chain: a lane of a small subgroup adds up thousands of products.
fn dot8(lo: vec4<f32>, hi: vec4<f32>, a: vec4<f32>, b: vec4<f32>) -> f32 {
    var sum = lo.x * a.x;
    sum = fma(lo.y, a.y, sum);
    sum = fma(lo.z, a.z, sum);
    sum = fma(lo.w, a.w, sum);
    sum = fma(hi.x, b.x, sum);
    sum = fma(hi.y, b.y, sum);
    sum = fma(hi.z, b.z, sum);
    return fma(hi.w, b.w, sum);
}

// The factor of a row whose squares add up to `squares`.
fn norm_scale(squares: f32) -> f32 {
    return 1.0 / sqrt(squares / f32(params.count) + params.eps);
}
