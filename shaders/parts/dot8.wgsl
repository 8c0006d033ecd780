// Eight weights (the element type Weight) times eight numbers, added to a sum in a fixed order.
fn dot8(w: Weight8, a: vec4<f32>, b: vec4<f32>, from_sum: f32) -> f32 {
    let lo = weight8_lo(w);
    let hi = weight8_hi(w);
    var sum = fma(lo.x, a.x, from_sum);
    sum = fma(lo.y, a.y, sum);
    sum = fma(lo.z, a.z, sum);
    sum = fma(lo.w, a.w, sum);
    sum = fma(hi.x, b.x, sum);
    sum = fma(hi.y, b.y, sum);
    sum = fma(hi.z, b.z, sum);
    return fma(hi.w, b.w, sum);
}
