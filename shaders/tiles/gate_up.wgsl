// uses: quad, norm_scale, gate_up_op, tiles
// Gated projection: y[r, n] = silu(gate(norm(x))[r, n]) * up(norm(x))[r, n].
//
// By tiles: the many rows of a prefill. One workgroup serves 16 quads of weight rows and 32 rows of x.
@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    linear(group, local);
}
