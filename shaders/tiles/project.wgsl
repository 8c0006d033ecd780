// uses: quad, norm_scale, project_op, tiles
// Projection: y[r, first + n] = (y if add) + sum_k norm(x)[r, k] * weight[n, k] + bias[first + n].
//
// By tiles: the many rows of a prefill. One workgroup serves 16 quads of weight rows and 32 rows of x.
@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    linear(group, local);
}
