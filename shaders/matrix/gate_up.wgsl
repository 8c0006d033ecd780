// uses: quad, norm_scale, gate_up_op, matrix
// Gated projection: y[r, n] = silu(gate(norm(x))[r, n]) * up(norm(x))[r, n].
//
// By cooperative matrices: the many rows of a prefill. One workgroup serves 64 weight rows and 64 rows of x.
@compute @workgroup_size(128)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
    @builtin(subgroup_id) subgroup: u32,
) {
    linear(group, local, subgroup);
}
