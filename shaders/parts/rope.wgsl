// Rotary position embedding in half-split layout: channels i and i + HEAD_DIM / 2 form a pair.

// Rotates the pair (a, b) by an angle given as (cos, sin).
fn rope_rotate(a: f32, b: f32, angle: vec2<f32>) -> vec2<f32> {
    return vec2<f32>(a * angle.x - b * angle.y, b * angle.x + a * angle.y);
}
