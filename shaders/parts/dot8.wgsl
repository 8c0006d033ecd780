// Eight weights (the element type Weight) times eight numbers, summed in a fixed order. A sum of such
// sums errs less than one long chain: a lane of a small subgroup adds up thousands of products.
fn dot8(w: Weight8, a: vec4<f32>, b: vec4<f32>) -> f32 {
    let lo = weight8_lo(w);
    let hi = weight8_hi(w);
    var sum = lo.x * a.x;
    sum = fma(lo.y, a.y, sum);
    sum = fma(lo.z, a.z, sum);
    sum = fma(lo.w, a.w, sum);
    sum = fma(hi.x, b.x, sum);
    sum = fma(hi.y, b.y, sum);
    sum = fma(hi.z, b.z, sum);
    return fma(hi.w, b.w, sum);
}
